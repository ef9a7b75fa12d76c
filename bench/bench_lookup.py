"""How fast are the scores of a million random users read, beside what the memory of the machine can do?

    python -m pytest bench/bench_lookup.py --benchmark-columns=min,median,iqr,rounds

Prediction: a user of few transactions costs two random lines (index, slot), so the roofline is two lines a user. A user with a ring costs
one or two more, an unknown one only the index line. An instant in the past is a search in the entries, which for users of few
transactions lie in the slot line: no further line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from measure import CHECKED_USERS, Engines, Work, lines, prove, take
from workload import SMOKE, USERS, Uniform, user_ids

LOOKUPS = 10_000 if SMOKE else 1_000_000
ROUNDS = 3 if SMOKE else 25
UNIFORM = Uniform(USERS)
#: Further than any user's number: the ids from here on were never seen.
STRANGER = 2**40


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


@pytest.mark.parametrize("shards", [1, 2])
def test_answers_are_those_of_the_reference(shards: int) -> None:
    """Proven first: known and unknown users, now and at instants in the past and to come."""
    engine, reference = prove(UNIFORM, shards)
    known = Uniform(min(USERS, CHECKED_USERS)).ids.tolist()
    users = known[:2_000] + user_ids(np.arange(20) + STRANGER).to_pylist()
    assert reference.clock_ns is not None
    for back_s in (0, 1, 30, 60, -30, -61):
        at_ns = reference.clock_ns - back_s * 10**9
        wanted = [reference.score(user, at_ns) for user in users]
        assert engine.scores(users, at=np.datetime64(at_ns, "ns")).tolist() == wanted
        assert engine.scores(pa.array(users), at=np.datetime64(at_ns, "ns")).to_pylist() == wanted


@pytest.mark.benchmark(group="lookups")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_random_lines(benchmark: Any, threads: int) -> None:
    """The roofline of a lookup: two random lines a user."""
    take(benchmark, lines(USERS, 2, LOOKUPS, threads), users=USERS, rounds=ROUNDS)


@pytest.mark.benchmark(group="lookups")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", ["known", "unknown", "arrow", "in_the_past"])
def test_scores(benchmark: Any, engines: Engines, case: str, shards: int) -> None:
    """`scores()` of a million random users: ids as NumPy array or Arrow array, now or half a window ago."""
    engine = engines(UNIFORM, shards).engine
    random = np.random.default_rng(7)
    at = engine.stats().clock - np.timedelta64(30, "s") if case == "in_the_past" else None

    def prepare() -> Any:
        numbers = random.integers(0, USERS, LOOKUPS) + (STRANGER if case == "unknown" else 0)
        ids = user_ids(numbers)
        return ids if case == "arrow" else ids.to_numpy()

    work = Work(LOOKUPS, prepare, lambda ids: engine.scores(ids, at=at))
    take(benchmark, work, users=USERS, rounds=ROUNDS, beside={"two random lines": lines(USERS, 2, LOOKUPS, shards)})
