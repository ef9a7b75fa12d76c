"""How fast are other systems at the engine's job, on the same rows, in the same run?

    python -m pytest bench/bench_peers.py --benchmark-columns=min,median,iqr,rounds

`RISKRING_BENCH_ROWS` sets the rows of the table (default 1,000,000, of 10 million users); slow peers get its first part, which
`extra_info["rows"]` says. `pip install 'riskring[bench]'` brings all peers but Flink, for which `RISKRING_FLINK_PYTHON` names an
interpreter with apache-flink; what is missing is skipped with the line that installs it.

Equal answers come first: the engine's are the reference's, and each peer's are the engine's, with ==, or within the tolerance that
`engine/adapters/peers.py` gives for running float sums. Before each round of a peer the engine does the same rows, `extra_info["beside"]`:
"engine, new" is made for the table and closed again, which is what peers do, so that nearly every row is the first touch of a line;
"engine, steady" holds all users and is given as many rows of the same workload, and is what a stream meets.

Prediction: of a million rows of ten million users nearly each user is new, so a batch system sorts or hashes a million small groups: 100 to
300 ns a row and core. Plain Python takes microseconds a row, and what makes an object per row and user tens of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from measure import Engines, Work, take
from workload import BATCH_ROWS, SMOKE, USERS, Uniform

from engine.adapters.peers import Peer, peers
from engine.config import Config
from engine.measurements import proven, table_scores

ROWS = 5_000 if SMOKE else int(os.environ.get("RISKRING_BENCH_ROWS", "1000000"))
SHARDS = Config.of().shards
UNIFORM = Uniform(USERS)
PEERS = peers(SHARDS, os.environ.get("RISKRING_FLINK_PYTHON"))


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return pa.Table.from_batches(UNIFORM.batches(ROWS)).combine_chunks()


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    found = PEERS[request.param]
    if found.needs:
        pytest.skip(f"{found.name} needs {found.needs}")
    return found


class FlinkClock:
    """A clock for pytest-benchmark that passes only the seconds that peers report: starting Flink is not part of the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def engine_beside(engines: Engines, part: pa.Table) -> dict[str, Work]:
    """The engine on the same rows, and in its steady state on as many."""
    steady = engines(UNIFORM, SHARDS)

    def batches() -> list[pa.RecordBatch]:
        return [next(steady.batches) for _ in range(-(-part.num_rows // BATCH_ROWS))]

    def ingest(some: list[pa.RecordBatch]) -> None:
        for batch in some:
            steady.engine.ingest(batch, scores=True)

    return {
        "engine, new": Work(part.num_rows, lambda: part, lambda part: table_scores(part, SHARDS)),
        "engine, steady": Work(-(-part.num_rows // BATCH_ROWS) * BATCH_ROWS, batches, ingest),
    }


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("shards", sorted({1, SHARDS}))
def test_engine(benchmark: Any, rows: pa.Table, shards: int) -> None:
    """The whole table through a new engine, made and closed each time."""
    proven(shards)
    work = Work(ROWS, lambda: rows, lambda rows: table_scores(rows, shards))
    take(benchmark, work, users=USERS, rounds=3 if SMOKE else 15)


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("peer", [name for name in PEERS if name != "flink"], indirect=True)
def test_peer(benchmark: Any, engines: Engines, rows: pa.Table, peer: Peer) -> None:
    """A table in memory to a score per row; equal answers first."""
    part = prove(peer, rows)
    work = Work(part.num_rows, lambda: part, peer.run)
    take(benchmark, work, users=USERS, rounds=3 if SMOKE else rounds_of(peer), beside=engine_beside(engines, part))
    describe(benchmark, peer)


@pytest.mark.benchmark(group="peers", timer=(CLOCK := FlinkClock()))
@pytest.mark.parametrize("peer", ["flink"], indirect=True)
def test_flink(benchmark: Any, engines: Engines, rows: pa.Table, peer: Peer) -> None:
    """As the others, in a process of its own; the start of the job is not counted."""

    def run(part: pa.Table) -> None:
        _, seconds = peer.timed(part)
        CLOCK.now += seconds

    part = prove(peer, rows)
    take(benchmark, Work(part.num_rows, lambda: part, run), users=USERS, rounds=3, beside=engine_beside(engines, part), warmup=0)
    describe(benchmark, peer)


def prove(peer: Peer, rows: pa.Table) -> pa.Table:
    """Equal answers on rows at the edges of windows, and on the rows that will be timed, which are returned."""
    peer.check(*proven(SHARDS))
    part = peer.part(rows)
    peer.check(part, table_scores(part, SHARDS))
    return part


def rounds_of(peer: Peer) -> int:
    """Fewer for those that take seconds even for their part."""
    return 15 if peer.share == 1.0 else 5


def describe(benchmark: Any, peer: Peer) -> None:
    """What ran."""
    described = {name: getattr(peer, name) for name in ("name", "how", "mode", "version", "share", "tolerance")}
    benchmark.extra_info["peer"] = described
