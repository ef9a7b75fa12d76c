"""How fast do rows go in and scores come out, beside what the memory of the machine can do?

    python -m pytest bench/bench_ingest.py --benchmark-columns=min,median,iqr,rounds

Prediction: a row of a user of few transactions touches two random lines (index, slot), one of a user with a ring one or two more; with one
row per user and window that is less than three lines a row, so an engine that did nothing else would run at the roofline of three lines.
Two shards share the lines between two cores. A small batch costs a few dozen microseconds of Python however few its rows: 10 to 40 ns a
row at 1,024 rows. Fresh memory costs the first touch of a page: 64 bytes of a 2 MiB page that the system has to clear, some 10 ns a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from measure import Engines, Work, lines, prove, take
from workload import BATCH_ROWS, ROUNDS, SMOKE, USERS, Uniform

from engine import RiskEngine

UNIFORM = Uniform(USERS)
TABLE_BATCHES = 16
FEWER_ROUNDS = 3 if SMOKE else 15


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: same rows, same bits."""
    prove(UNIFORM)
    prove(UNIFORM, shards=2)


@pytest.mark.benchmark(group="rows")
@pytest.mark.parametrize("threads", [1, 2])
def test_three_random_lines(benchmark: Any, threads: int) -> None:
    """The roofline: three random lines a row, nothing else; two threads each have half of the rows and of the memory."""
    take(benchmark, lines(USERS, 3, threads=threads), users=USERS)


@pytest.mark.benchmark(group="rows")
@pytest.mark.parametrize("shards", [1, 2])
def test_ingest_with_scores(benchmark: Any, engines: Engines, shards: int) -> None:
    """Batches of 65,536 rows into a warm engine, a score per row."""
    beside = {"three random lines": lines(USERS, 3, threads=shards)}
    if shards > 1:
        beside["one shard"] = engines(UNIFORM).ingest()
    take(benchmark, engines(UNIFORM, shards).ingest(), users=USERS, beside=beside)


@pytest.mark.benchmark(group="growth")
@pytest.mark.parametrize("shards", [1, 2])
def test_growth_into_fresh_memory(benchmark: Any, shards: int) -> None:
    """The first batches of a new engine: nearly every row is a user's first."""
    batches = UNIFORM.batches(2**62, BATCH_ROWS)
    with RiskEngine(users=USERS, shards=shards, max_ahead=None) as engine:
        engine.ingest(next(batches), scores=True)
        work = Work(BATCH_ROWS, lambda: next(batches), lambda batch: engine.ingest(batch, scores=True))
        take(benchmark, work, users=USERS, warmup=0)


@pytest.mark.benchmark(group="batch sizes")
@pytest.mark.parametrize("rows_a_batch", [BATCH_ROWS // parts for parts in (64, 16, 4, 1)])
def test_batch_sizes(benchmark: Any, engines: Engines, rows_a_batch: int) -> None:
    """As many rows in more and smaller batches; both go into the same engine in turn."""
    steady = engines(UNIFORM)
    whole = steady.ingest()

    def cut() -> list[pa.RecordBatch]:
        batch = whole.prepare()
        return [batch.slice(first, rows_a_batch) for first in range(0, BATCH_ROWS, rows_a_batch)]

    def run(batches: list[pa.RecordBatch]) -> None:
        for batch in batches:
            steady.engine.ingest(batch, scores=True)

    take(benchmark, Work(BATCH_ROWS, cut, run), users=USERS, rounds=ROUNDS // 2 + 1, beside={f"batches of {BATCH_ROWS:,}": whole})


@pytest.mark.benchmark(group="sources")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("form", ["record_batches", "reader", "table_of_batches", "table_in_one_piece"])
def test_sources(benchmark: Any, engines: Engines, form: str, shards: int) -> None:
    """A million rows as record batches one by one, as a reader, and as one big table: that one is applied whole or not at all."""
    steady = engines(UNIFORM, shards)

    def prepare() -> Any:
        batches = list(itertools.islice(steady.batches, TABLE_BATCHES))
        if form == "record_batches":
            return batches
        if form == "reader":
            return [pa.RecordBatchReader.from_batches(batches[0].schema, batches)]
        table = pa.Table.from_batches(batches)
        return [table if form == "table_of_batches" else table.combine_chunks()]

    def run(sources: list[Any]) -> None:
        for source in sources:
            steady.engine.ingest(source, scores=True)

    take(benchmark, Work(TABLE_BATCHES * BATCH_ROWS, prepare, run), users=USERS, rounds=FEWER_ROUNDS)
