"""How long until a fresh process gives its first score, with and without compiled code on disk?

    python -m pytest bench/bench_startup.py --benchmark-columns=min,median,rounds

Prediction: warm, the imports of NumPy, Numba and pyarrow are 0.3 to 0.5 s and loading the machine code of the kernels the rest; the arrays
of ten million users cost nothing, since no page of them is touched. Cold, each kernel takes LLVM some 0.3 s, one after another.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workload import SMOKE

from engine.config import Config
from engine.reference import Reference

PROGRAM = "from engine import RiskEngine; print(RiskEngine(max_ahead=None).add('alice', 12.5, '2026-01-01T00:00:00Z'))"
HELP = "import sys; from engine.cli import main; sys.exit(main(['--help']))"


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wanted() -> str:
    """The answer of the reference."""
    (row,) = Reference(Config.of(max_ahead=None)).ingest([("alice", 12.5, 0)])
    return str(row.score)


def python(program: str, cache: Path) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.mark.benchmark(group="first score")
def test_first_score_cold(benchmark: Any, cache: Path, wanted: str) -> None:
    """Start Python, make an engine of 10 million users, add one row; all kernels are compiled first."""

    def empty() -> tuple[tuple[str, Path], dict[str, object]]:
        shutil.rmtree(cache)
        cache.mkdir()
        return (PROGRAM, cache), {}

    assert benchmark.pedantic(python, setup=empty, rounds=1 if SMOKE else 3) == wanted


@pytest.mark.benchmark(group="first score")
def test_first_score_warm(benchmark: Any, cache: Path, wanted: str) -> None:
    """The same with kernels from the cache on disk."""
    assert python(PROGRAM, cache) == wanted
    assert benchmark.pedantic(python, (PROGRAM, cache), rounds=1 if SMOKE else 10) == wanted


@pytest.mark.benchmark(group="help")
def test_help(benchmark: Any, cache: Path) -> None:
    """`riskring --help`, which imports none of them."""
    assert "usage" in benchmark.pedantic(python, (HELP, cache), rounds=1 if SMOKE else 20).lower()
