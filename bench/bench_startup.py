"""How long until a fresh process gives its first score, with and without compiled code on disk?

python -m pytest bench/bench_startup.py --benchmark-columns=min,median,rounds
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from workload import SMOKE

PROGRAM = "from engine import RiskEngine; print(RiskEngine(max_ahead=None).add('alice', 12.5, '2026-01-01T00:00:00Z'))"


@pytest.fixture
def cache() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def first_score(cache: Path) -> None:
    """Start Python, make an engine of 10 million users, add one row."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "12.5"


@pytest.mark.benchmark(group="first score")
def test_first_score_warm(benchmark, cache: Path) -> None:
    """Kernels come from the cache on disk."""
    first_score(cache)
    benchmark.pedantic(first_score, (cache,), rounds=1 if SMOKE else 10)


@pytest.mark.benchmark(group="first score")
def test_first_score_cold(benchmark, cache: Path) -> None:
    """All kernels are compiled first."""

    def empty() -> tuple[tuple[Path], dict[str, object]]:
        shutil.rmtree(cache)
        cache.mkdir()
        return (cache,), {}

    benchmark.pedantic(first_score, setup=empty, rounds=1 if SMOKE else 3)
