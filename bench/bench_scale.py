"""Does a row cost more when there are more users, and more than the caches of the machine explain?

    python -m pytest bench/bench_scale.py --benchmark-columns=min,median,iqr,rounds      RISKRING_BENCH_HUGE=1 adds 100 million users

Prediction: work per row is the same at any size; what grows is the cost of its three random lines, from the second-level cache (10,000
users) to the memory (from a million on). So the cost per row grows by no more than that of a random line in a working set of as many lines:
with 15 to 20 ns of work that does not grow, by less.
"""

from __future__ import annotations

from typing import Any

import pytest
from measure import Steady, lines, prove, take
from workload import BATCH_ROWS, HUGE, ROUNDS, SMOKE, USERS, Uniform

SIZES = [1_000, USERS] if SMOKE else [users for users in (10_000, 100_000, 1_000_000, 10_000_000) if users <= USERS]
#: Lines of 64 bytes: from 64 KiB to 1 GiB at 10 million users.
LINES = [2**10, 2**14] if SMOKE else [2**power for power in range(10, (USERS - 1).bit_length() + 1)]
if HUGE:
    SIZES, LINES = [*SIZES, 100_000_000], [*LINES, 100_000_000]


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: same rows, same bits."""
    prove(Uniform(USERS))


@pytest.mark.benchmark(group="line")
@pytest.mark.parametrize("lines_in_memory", LINES)
def test_cost_of_a_line(benchmark: Any, lines_in_memory: int) -> None:
    """One random line a row, among so many: shows the caches."""
    take(benchmark, lines(lines_in_memory, 1, 3 * BATCH_ROWS), users=lines_in_memory, rounds=ROUNDS // 3 + 1)


@pytest.mark.benchmark(group="scale")
@pytest.mark.parametrize("users", SIZES)
def test_scale(benchmark: Any, users: int) -> None:
    """Batches of 65,536 rows with scores, one shard, in turn with three random lines a row among as many lines as users."""
    steady = Steady(Uniform(users))
    take(benchmark, steady.ingest(), users=users, rounds=ROUNDS // 2 + 1, beside={"three random lines": lines(users, 3)})
    steady.engine.close()
