"""What does it cost to find the users whose scores have changed?

    python -m pytest bench/bench_changes.py --benchmark-columns=min,median,rounds

10 million users. Between two calls either rows come for about one user in a hundred, which with those whose transactions leave the window
meanwhile makes 2 % changed; or time passes and a thousandth of the users' scores fall; or nothing changes.

Prediction: a byte a user in order is 1 ms. A user looked at is a slot line and one of `reported`, asked for ahead, 30 to 40 ns; a user that
has changed is read again, with the id, 50 ns more, and sorted by id, 50 ns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from measure import Steady, Work, prove, take
from workload import BATCH_ROWS, SMOKE, USERS, Uniform

BATCHES = 1 if SMOKE else max(1, USERS // 100 // BATCH_ROWS)


@pytest.fixture(scope="module")
def steady() -> Iterator[Steady]:
    made = Steady(Uniform(USERS), shards=None)
    made.engine.changes()
    yield made
    made.engine.close()


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: all users once, and then those whose scores are others."""
    engine, reference = prove(Uniform(USERS))
    assert reference.clock_ns is not None
    for later_ns in (0, 0, 10**9, 20 * 10**9, 60 * 10**9):
        at_ns = reference.clock_ns + later_ns
        table = engine.changes(at=np.datetime64(at_ns, "ns"))
        assert dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True)) == reference.changes(at_ns)


@pytest.mark.benchmark(group="changes")
def test_after_rows(benchmark: Any, steady: Steady) -> None:
    """After rows of about one user in a hundred."""
    found: list[int] = []

    def rows() -> None:
        for _ in range(BATCHES):
            steady.engine.ingest(next(steady.batches))

    def changes(_: object) -> None:
        found.append(steady.engine.changes().num_rows)

    take(benchmark, Work(1, rows, changes), users=USERS, rounds=3 if SMOKE else 20)
    benchmark.extra_info["figures"] = {"changed users": float(np.median(found)), "median ms": benchmark.stats["median"] * 1e3}


@pytest.mark.benchmark(group="changes")
@pytest.mark.parametrize("milliseconds", [0, 60])
def test_after_time(benchmark: Any, steady: Steady, milliseconds: int) -> None:
    """After so much time without rows."""
    found: list[int] = []
    at = steady.engine.stats().clock

    def changes(when: np.datetime64) -> None:
        found.append(steady.engine.changes(at=when).num_rows)

    def later() -> np.datetime64:
        nonlocal at
        at = at + np.timedelta64(milliseconds, "ms")
        return at

    take(benchmark, Work(1, later, changes), users=USERS, rounds=3 if SMOKE else 20)
    benchmark.extra_info["figures"] = {"changed users": float(np.median(found)), "median ms": benchmark.stats["median"] * 1e3}
