"""The stream of the demonstration, at the pace of a clock that the tests move."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from engine import RiskEngine
from engine.config import Config
from engine.demo import RATE, feed
from engine.results import IngestResult

SECOND = 10**9
START_NS = 1_767_225_600 * SECOND


class Pace:
    """A clock that moves when it is waited for, and ends after a while; some waits take longer than they should."""

    def __init__(self, seconds: float, held_up: dict[int, float] | None = None) -> None:
        self.now_ns, self.waits, self.held_up = START_NS, 0, held_up or {}
        self.ends_ns = START_NS + int(seconds * SECOND)

    def now(self) -> int:
        return self.now_ns

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.waits += 1
        self.now_ns += round(seconds * SECOND) + int(self.held_up.get(self.waits, 0) * SECOND)
        return self.now_ns >= self.ends_ns


def test_the_window_is_full_at_once_and_then_rows_come_at_their_time() -> None:
    pace, came = Pace(10), []
    feed(lambda batch: came.append((pace.now_ns, batch)), Config.of(), None, pace.now, pace.wait)
    assert sum(batch.num_rows for at_ns, batch in came if at_ns == START_NS) == 60 * RATE
    later = [(at_ns - START_NS, batch.num_rows) for at_ns, batch in came if at_ns > START_NS]
    assert later == [(tenth * SECOND // 10, RATE // 10) for tenth in range(1, 100)]


@pytest.mark.parametrize(("kind", "ids"), [(None, pa.string()), ("string", pa.string()), ("int64", pa.int64())])
def test_an_engine_takes_it(kind: str | None, ids: pa.DataType) -> None:
    pace = Pace(2)
    engine = RiskEngine(users=1_000_000, clock="wall", now=pace.now, user_id="who", amount="how_much", timestamp="when")
    results: list[IngestResult] = []
    feed(lambda batch: results.append(engine.ingest(batch)), engine.config, kind, pace.now, pace.wait)
    stats = engine.stats()
    assert engine.features()["user_id"].type == ids
    assert stats.accepted > 0.99 * stats.rows and stats.rounded == 0
    rejected = {"null_user", "null_amount", "null_timestamp", "amount_not_finite", "amount_out_of_range", "timestamp_out_of_range"}
    assert set(stats.rejected) == rejected | {"future", "late"}  # each kind of bad row is there, and no good one came too early
    assert sum(stats.rejected.values()) < 0.004 * stats.rows
    assert engine.top(1)["count"][0].as_py() >= 1 and max(engine.features()["count"].to_pylist()) >= 8


def test_the_seed_makes_the_rows() -> None:
    def rows(seed: int) -> Any:
        pace, came = Pace(0.3), []
        feed(came.append, Config.of("1s"), None, pace.now, pace.wait, seed)
        return pa.Table.from_batches(came).drop_columns(["amount"])  # nan is equal to nothing

    assert rows(3).equals(rows(3)) and not rows(3).equals(rows(4))
    assert len(rows(3)) == RATE * 12 // 10  # a window of a second, and two tenths


def test_whoever_slept_begins_anew() -> None:
    pace, came = Pace(8000, held_up={50: 30, 100: 7900}), []
    feed(lambda batch: came.append((pace.now_ns - START_NS, batch.num_rows)), Config.of(), None, pace.now, pace.wait)
    at_ns = [when for when, _ in came]
    assert at_ns.count(35 * SECOND) == 301  # half a minute was made up for
    assert at_ns.count(40 * SECOND + 7900 * SECOND) == 600  # of two hours the last minute
