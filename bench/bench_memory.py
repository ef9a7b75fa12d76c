"""How much memory does a user take? Resident bytes of a process of its own, not the sum of array sizes.

    python -m pytest bench/bench_memory.py -s      RISKRING_BENCH_HUGE=1 adds 100 million users

Prediction: 64 bytes of slot line and 4 / 0.7 of index for a user whose transactions fit the slot line: 70. Beyond, 16 bytes an entry in a
ring of whole memory lines that is not quite full: 16 to 32 bytes a transaction, more for the first few. Huge pages that are begun and not
filled show below a million users. After an hour of churn: what a new engine takes, and up to half a retention of users whose transactions
have expired and that were not swept yet.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measure import prove
from workload import HUGE, SMOKE, USERS, Uniform

HERE = Path(__file__).parent
#: Enough users that the pages at the ends of arrays do not show.
FEWER = 10_000 if SMOKE else min(USERS, 1_000_000)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")


@functools.cache
def resident(case: str, users: int, rows_per_user: int = 1) -> dict[str, Any]:
    """What `resident.py` prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "resident.py"), case, str(users), str(rows_per_user)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def note(benchmark: Any, found: dict[str, Any], figures: dict[str, float]) -> None:
    benchmark.extra_info |= {**found, "rows": found["transactions"], "figures": figures}
    print("\n" + ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()))


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: same rows, same bits."""
    prove(Uniform(USERS))


@pytest.mark.benchmark(group="exactly so many transactions per user")
@pytest.mark.parametrize("rows_per_user", [1, 2])
@pytest.mark.parametrize("users", sorted({FEWER, USERS}))
def test_bytes_of_a_user(benchmark: Any, users: int, rows_per_user: int) -> None:
    """Users with one transaction each, and with two."""
    found = benchmark.pedantic(resident, ("exact", users, rows_per_user), rounds=1)
    assert (found["users"], found["transactions"]) == (users, users * rows_per_user)
    note(benchmark, found, {"per user B": found["resident"] / users})


@pytest.mark.benchmark(group="exactly so many transactions per user")
@pytest.mark.parametrize("rows_per_user", [5] if SMOKE else [5, 12, 24, 100])
def test_bytes_of_further_transactions(benchmark: Any, rows_per_user: int) -> None:
    """What a transaction beyond the second takes."""
    found = benchmark.pedantic(resident, ("exact", FEWER, rows_per_user), rounds=1)
    assert found["transactions"] == FEWER * rows_per_user
    further = (found["resident"] - resident("exact", FEWER, 2)["resident"]) / (FEWER * (rows_per_user - 2))
    note(benchmark, found, {"per user B": found["resident"] / FEWER, "per further transaction B": further})


@pytest.mark.benchmark(group="drawn users")
@pytest.mark.parametrize("rows_per_user", [1, 2])
def test_bytes_of_drawn_users(benchmark: Any, rows_per_user: int) -> None:
    """Rows of uniformly drawn users, as many as users or twice as many: some users have none, some five."""
    found = benchmark.pedantic(resident, ("drawn", USERS, rows_per_user), rounds=1)
    note(benchmark, found, {"per active user B": found["resident"] / found["users"]})


@pytest.mark.skipif(not HUGE, reason="RISKRING_BENCH_HUGE=1 is not set: 100 million users")
@pytest.mark.benchmark(group="exactly so many transactions per user")
def test_bytes_of_a_hundred_million_users(benchmark: Any) -> None:
    """100 million users with one transaction each."""
    found = benchmark.pedantic(resident, ("exact", 100_000_000), rounds=1)
    assert found["users"] == 100_000_000
    note(benchmark, found, {"per user B": found["resident"] / 1e8, "resident GB": found["resident"] / 1e9})


@pytest.mark.benchmark(group="churn")
def test_churn(benchmark: Any) -> None:
    """An hour in which five times the capacity comes and goes, beside a new engine with the same live users."""
    churned = benchmark.pedantic(resident, ("churn", FEWER), rounds=1)
    fresh, young = resident("fresh", FEWER), resident("young", FEWER)
    assert churned["digest"] == fresh["digest"] == young["digest"]
    figures = {
        "churned per user B": churned["resident"] / churned["users"],
        "fresh per user B": fresh["resident"] / fresh["users"],
        "churned / fresh x": churned["resident"] / fresh["resident"],
        "churned / six minutes old x": churned["resident"] / young["resident"],
    }
    note(benchmark, churned, figures)
