"""What do ids that are not integers cost?

    python -m pytest bench/bench_ids.py --benchmark-columns=min,median,iqr,rounds

Prediction: an id of bytes is hashed byte by byte (SipHash, some 10 to 25 ns for 16 to 36 bytes) and compared in full, which touches one or
two more random lines: where the bytes lie. So three to four lines and a hash instead of two to three lines: about half the speed of
integers. A dictionary-encoded column is hashed once for each entry of its dictionary, which for random users is about once a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from measure import Engines, prove, take
from workload import ID_KINDS, USERS, Ids, Uniform

INTEGERS = Uniform(USERS)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ID_KINDS)
def test_answers_are_those_of_the_reference(kind: str) -> None:
    """Proven first: same rows, same bits, whatever the ids are."""
    prove(Ids(USERS, kind=kind))


@pytest.mark.benchmark(group="ids")
@pytest.mark.parametrize("kind", ID_KINDS[1:])
def test_ids(benchmark: Any, engines: Engines, kind: str) -> None:
    """Batches of 65,536 rows with scores, one shard, in turn with the same rows under int64 ids."""
    workload = Ids(USERS, kind=kind)
    take(benchmark, engines(workload).ingest(), users=USERS, beside={"int64": engines(INTEGERS).ingest()})
    engines.drop(workload)
