"""How the benchmarks take their times: equal answers first, an engine in its steady state, and rounds that alternate.

A virtual machine is not the same from one minute to the next. What a figure is compared with (a roofline, another workload, another batch
size) is therefore timed in the same rounds, one after the other, and the report divides round by round; `extra_info["beside"]` keeps those
times. Figures that are not times (bytes, percentiles) stand in `extra_info["figures"]`, each name ending in its unit.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from workload import BATCH_ROWS, ROUNDS, Uniform

from engine import RiskEngine
from engine.config import Config
from engine.measurements import Lines
from engine.reference import Reference, plain_rows

CHECKED_ROWS = 20_000
CHECKED_USERS = 5_000


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that is timed again and again: `run(prepare())`, of which `prepare` is not timed."""

    rows: int  # of one round
    prepare: Callable[[], Any]
    run: Callable[[Any], object]


def take(
    benchmark: Any, work: Work, *, users: int, rounds: int = ROUNDS, beside: Mapping[str, Work] | None = None, warmup: int = 1
) -> None:
    """Time `work`, and before each of its rounds everything in `beside` once."""
    beside = beside or {}
    seconds: dict[str, list[float]] = {name: [] for name in beside}

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        for name, other in beside.items():
            argument = other.prepare()
            start = time.perf_counter()
            other.run(argument)
            seconds[name].append(time.perf_counter() - start)
        return (work.prepare(),), {}

    benchmark.pedantic(work.run, setup=setup, rounds=rounds, warmup_rounds=warmup)
    benchmark.extra_info |= {"rows": work.rows, "users": users}
    if beside:
        measured = slice(warmup, warmup + rounds)
        benchmark.extra_info["beside"] = {name: {"rows": beside[name].rows, "seconds": seconds[name][measured]} for name in beside}


def lines(users: int, per_row: int, rows: int = BATCH_ROWS, threads: int = 1) -> Work:
    """The roofline: so many random lines a row, in memory of one line a user, and nothing else."""
    roofline = Lines(users, per_row, rows // threads, threads)
    return Work(rows // threads * threads, roofline.draw, roofline.run)


class Steady:
    """An engine in its steady state, after two retentions of a workload, and the rows that come next.

    Before that it still takes memory it has never touched, and the first touch of a page costs more than the row. The engine has room for
    twice the users: one that is nearly full makes sure of the room for each batch first.
    """

    def __init__(self, workload: Uniform, shards: int | None = 1, **options: Any) -> None:
        self.workload = workload
        self.engine = RiskEngine(users=2 * workload.users, shards=shards, max_ahead=None, **options)
        rows = int(4 * workload.users * workload.rows_per_user)
        self.batches: Iterator[pa.RecordBatch] = workload.batches(2**62, BATCH_ROWS)
        for batch in itertools.islice(self.batches, -(-rows // BATCH_ROWS)):
            self.engine.ingest(batch)

    def ingest(self, scores: bool = True) -> Work:
        """One batch of BATCH_ROWS, with a score per row."""
        return Work(BATCH_ROWS, lambda: next(self.batches), lambda batch: self.engine.ingest(batch, scores=scores))


class Engines:
    """Engines in their steady state, made once and used by all tests of a file."""

    def __init__(self) -> None:
        self._made: dict[tuple[Uniform, int], Steady] = {}

    def __call__(self, workload: Uniform, shards: int = 1) -> Steady:
        key = (workload, shards)
        if key not in self._made:
            self._made[key] = Steady(workload, shards)
        return self._made[key]

    def drop(self, workload: Uniform, shards: int = 1) -> None:
        """Give back the memory of one of them."""
        if steady := self._made.pop((workload, shards), None):
            steady.engine.close()

    def close(self) -> None:
        """Give back the memory of all."""
        for workload, shards in list(self._made):
            self.drop(workload, shards)


def prove(workload: Uniform, shards: int = 1) -> tuple[RiskEngine, Reference]:
    """Same rows, same bits: the first rows of the workload, with fewer users, compared with the reference.

    Returns:
        Both, for more questions.
    """
    small = dataclasses.replace(workload, users=min(workload.users, CHECKED_USERS))
    config = Config.of(max_ahead=None, users=small.users)
    reference = Reference(config)
    engine = RiskEngine(max_ahead=None, users=small.users, shards=shards)
    for batch in small.batches(CHECKED_ROWS, CHECKED_ROWS // 8):
        wanted = [row.score for row in reference.ingest(plain_rows(batch, config))]
        assert engine.ingest(batch, scores=True).scores.to_pylist() == wanted
    assert engine.digest() == reference.digest()
    return engine, reference
