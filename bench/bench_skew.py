"""What do users and rows cost that are not as tame as the uniform case?

    python -m pytest bench/bench_skew.py --benchmark-columns=min,median,iqr,rounds

Prediction: Zipf's law keeps the lines of frequent users in the cache, so it costs less than the uniform case, unless dependent work on one
user's line (a row cannot start before the same user's last one is done) eats it up. A row out of order looks for its place and moves the
entries behind it: for a user of few transactions within the slot line, so no further line. A hot user's ring is one line in sequence for
four rows and its left edge moves forward likewise: cheaper than uniform. At twelve rows per user and window each user has a ring of some
thirty entries: one line to write and one at the left edge, four lines a row instead of two to three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from measure import Engines, prove, take
from workload import USERS, OneHot, OutOfOrder, Uniform, Zipf

#: Users of the dense case: a tenth, so that its rows are about as many as those of the others.
FEWER = USERS // 10
CASES: dict[str, tuple[Uniform, Uniform]] = {
    "zipf": (Zipf(USERS), Uniform(USERS)),
    "out_of_order": (OutOfOrder(USERS), Uniform(USERS)),
    "hot_user": (OneHot(USERS), Uniform(USERS)),
    "twelve_rows_per_user": (Uniform(FEWER, rows_per_user=12), Uniform(FEWER)),
}


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_reference(case: str) -> None:
    """Proven first: same rows, same bits."""
    workload, _ = CASES[case]
    _, reference = prove(workload)
    assert not any(reference.rejected.values())


@pytest.mark.benchmark(group="skew")
@pytest.mark.parametrize("case", CASES)
def test_skew(benchmark: Any, engines: Engines, case: str) -> None:
    """Batches of 65,536 rows with scores, one shard, in turn with the uniform case of as many users."""
    workload, uniform = CASES[case]
    take(benchmark, engines(workload).ingest(), users=workload.users, beside={"uniform": engines(uniform).ingest()})
    engines.drop(workload)
