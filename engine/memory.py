"""Flat arrays that are reserved once: address space now, memory page by page when it is touched.

A shard reserves room for every user and every ring it may ever hold. Nothing is copied when it grows, no pointer ever moves under a
reader, and what is not used costs nothing. Pages are 4096-byte aligned, so every slot line is one memory line.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError

#: From this size on, 2 MiB pages save more in address translation than they waste at the end of an array.
HUGE_FROM_BYTES: Final = 8 << 20

_ANONYMOUS: Final = getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_PRIVATE", 0)
_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def reserved(words: int, dtype: Any, *, least: int | None = None) -> NDArray[Any]:
    """A zeroed array of up to `words` items that takes memory only where it is touched.

    Args:
        words: Items wanted.
        dtype: NumPy type of an item.
        least: Items that will do, where the system limits address space; default: all of them.

    Raises:
        CapacityError: The system refuses even `least` items.

    Example:
        >>> reserved(1 << 30, np.int64).nbytes >> 30
        8
    """
    item_bytes = np.dtype(dtype).itemsize
    least = words if least is None else least
    while True:
        try:
            area: NDArray[Any] = _mapped(max(words, 1) * item_bytes).view(dtype)
            return area[:words]
        except (OSError, ValueError, OverflowError) as error:
            if words <= least:
                raise CapacityError(
                    f"the system refuses {words * item_bytes:,} bytes of address space ({error}); "
                    "use fewer users, or raise its limit (ulimit -v, vm.overcommit_memory)"
                ) from error
            words = max(words // 2, least)


def _mapped(size: int) -> NDArray[np.uint8]:
    if not _ANONYMOUS:  # not a Unix: an anonymous map is private and zeroed by default
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    area = mmap.mmap(-1, size, flags=_ANONYMOUS | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if size >= HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do, only slower
            area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


#: Of the machine's memory, states may take all but this part: the rest is for what the process needs besides, batches on
#: their way above all, and for rings that take a larger block while a batch is applied.
_LEFT: Final = 8


class Taker(Protocol):
    """Takes memory."""

    @property
    def bytes_used(self) -> int:
        """How much it has."""


class Budget:
    """Memory that some states may take together, in bytes; those of one process share one. May be asked by any thread.

    Args:
        bytes_max: How much.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        self._takers: weakref.WeakSet[Taker] = weakref.WeakSet()

    def join(self, taker: Taker) -> None:
        """From now on it counts, until it is gone."""
        with self._lock:
            self._takers.add(taker)

    def left_for(self, taker: Taker) -> int:
        """What the others leave to it."""
        with self._lock:
            others = [each for each in self._takers if each is not taker]
        return self.bytes_max - sum(each.bytes_used for each in others)


@functools.cache
def process_budget() -> Budget:
    """The one of this process."""
    return Budget(state_bytes_max())


def state_bytes_max(files: str = "/") -> int:
    """Memory that the states of a process may take: seven eighths of the machine's, or of what the control group allows if that is less.

    Args:
        files: The folder in which /proc and /sys lie.

    Example:
        >>> 0 < state_bytes_max() <= machine_bytes()
        True
    """
    allowed = min([machine_bytes(), *_group_limits(files)])
    return allowed - allowed // _LEFT


def _group_limits(files: str) -> Iterator[int]:
    """Limits of memory of this process's control group and of those around it, as far as the system shows them."""
    with contextlib.suppress(OSError), open(os.path.join(files, "proc/self/cgroup"), encoding="utf-8") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, name = ("sys/fs/cgroup", "memory.max") if not controllers else ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            parts = [part for part in path.split("/") if part and part != ".."]
            for depth in range(len(parts) + 1):
                limit = os.path.join(files, root, *parts[:depth], name)
                with contextlib.suppress(OSError, ValueError), open(limit, encoding="ascii") as file:  # not shown; or "max", no limit
                    yield int(file.read())


def machine_bytes() -> int:
    """Memory of this machine in bytes; 16 GiB where the system does not say.

    Example:
        >>> machine_bytes() > 0
        True
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 << 30
