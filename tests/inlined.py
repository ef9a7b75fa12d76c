"""Small functions that kernels inline, made callable from here."""

from __future__ import annotations

from typing import Any

import numba

from engine.kernels.compile import _FLAGS


def from_python(function: Any) -> Any:
    """The same function, compiled with the entry for Python that kernels do without."""
    return numba.njit(getattr(function, "py_func", function), **_FLAGS)
