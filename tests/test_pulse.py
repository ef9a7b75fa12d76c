"""What whoever watches a server is told: rates from totals, the greatest users and how they moved, with clocks that the tests set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import RiskEngine
from engine.columns import ids_of
from engine.errors import EngineError, StaleError
from engine.partitions import partition_of
from engine.pulse import BUDGET_SECONDS, Pulse
from engine.service import Service

START_NS = 1_767_225_600 * 10**9


class Clock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> int:
        return START_NS + int(self.seconds * 10**9)

    def ticks(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, **options: Any) -> RiskEngine:
    return RiskEngine(**({"users": 1000, "clock": "wall", "now": clock.now} | options))


def pay(engine: RiskEngine, clock: Clock, *rows: tuple[Any, float], ago: float = 0.0) -> None:
    """Rows of (user, amount) of now, or of some seconds ago."""
    users, amounts = zip(*rows, strict=True)
    when = np.datetime64(clock.now() - int(ago * 10**9), "ns")
    engine.ingest({"user_id": pa.array(users), "amount": pa.array(amounts, pa.float64()), "timestamp": np.full(len(rows), when)})


def shown(found: dict[str, Any], *names: str) -> list[Any]:
    return [tuple(user[name] for name in names) for user in found["top"]["users"]]


def test_figures_are_those_of_the_engine(clock: Clock) -> None:
    engine = make(clock)
    service = Service.of(engine)
    pulse = Pulse(service, clock.now, clock.ticks, lambda: 12345, lambda: -3.0)
    pay(engine, clock, ("a", 10), ("b", 30), (None, 1), ("a", 20))
    service.scores(["a", "b", "c"])
    found, stats = pulse.sample(), engine.stats()
    assert (found["users"], found["transactions"], found["bytes"]) == (stats.users, stats.transactions, stats.bytes) == (2, 3, stats.bytes)
    assert (found["rows"], found["accepted"], found["lookups"]) == (4, 3, 3)
    assert found["rejected"] == {"null_user": {"count": 1, "per_second": None}}
    assert (found["rows_per_second"], found["lookups_per_second"]) == (None, None)  # there is nothing to compare with yet
    assert (found["resident_bytes"], found["snapshot_age_seconds"]) == (12345, 3.0)
    assert (found["at"], found["clock"], found["lag_seconds"]) == ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", 0.0)
    assert (found["window_ns"], found["closed"], found["decimals"]) == ("60000000000", "both", 4)
    assert shown(found, "user_id", "score", "sum", "count") == [("b", 30.0, "30.0000", 1), ("a", 15.0, "30.0000", 2)]


def test_rates_are_of_the_last_five_seconds(clock: Clock) -> None:
    engine = make(clock)
    service = Service.of(engine)
    pulse = Pulse(service, clock.now, clock.ticks)
    rates = []
    for second in range(12):
        clock.seconds = float(second)
        if second:
            pay(engine, clock, *[("a", 1)] * (10 if second <= 6 else 20))
            pay(engine, clock, ("late", 1), ago=1000)
            service.scores(["a"] * 3)
        rates.append(pulse.sample())
    assert [found["rows_per_second"] for found in rates] == [None, *[11.0] * 6, 13.0, 15.0, 17.0, 19.0, 21.0]
    assert {found["rejected"]["late"]["per_second"] for found in rates[2:]} == {1.0}
    assert rates[1]["rejected"]["late"] == {"count": 1, "per_second": 1.0}
    assert {found["lookups_per_second"] for found in rates[1:]} == {3.0}


def test_a_clock_that_was_set_back_gives_no_rate(clock: Clock) -> None:
    engine = make(clock)
    pulse = Pulse(Service.of(engine), clock.now, clock.ticks)
    clock.seconds = 50.0
    pay(engine, clock, ("a", 1))
    pulse.sample()
    clock.seconds = 49.0
    found = pulse.sample()
    assert (found["rows_per_second"], found["lag_seconds"]) == (None, -1.0)
    assert shown(found, "rank_before", "is_new") == [(None, False)]


def test_scores_shown_fall_with_time_and_ranks_are_compared_with_those_of_ten_seconds_ago(clock: Clock) -> None:
    engine = make(clock)
    pulse = Pulse(Service.of(engine), clock.now, clock.ticks)
    pay(engine, clock, ("a", 100), ("b", 50), ("c", 10))
    assert shown(pulse.sample(), "user_id", "rank_before", "is_new") == [("a", None, False), ("b", None, False), ("c", None, False)]
    clock.seconds = 5.0
    pay(engine, clock, ("c", 190), ("d", 70))
    moved = [("a", 100.0, 1, 100.0, False), ("c", 100.0, 3, 10.0, False), ("d", 70.0, None, None, True), ("b", 50.0, 2, 50.0, False)]
    names = ("user_id", "score", "rank_before", "score_before", "is_new")
    assert shown(pulse.sample(), *names) == moved
    clock.seconds = 15.0  # the sample of second 5 is ten seconds old
    found = shown(pulse.sample(), "user_id", "rank_before", "is_new")
    assert found == [("a", 1, False), ("c", 2, False), ("d", 3, False), ("b", 4, False)]
    clock.seconds = 60.0
    assert shown(pulse.sample(), "user_id", "score") == [("a", 100.0), ("c", 100.0), ("d", 70.0), ("b", 50.0)]
    clock.seconds = 60.5  # nothing has come, and the first transactions have left
    assert shown(pulse.sample(), "user_id", "score") == [("c", 190.0), ("d", 70.0)]
    clock.seconds = 66.0
    assert pulse.sample()["top"]["users"] == []


def test_many_users_are_searched_in_parts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(clock, users=200_000, shards=1)
    service = Service.of(engine)
    users = 100_000
    when = np.full(users, np.datetime64(clock.now(), "ns"))
    engine.ingest({"user_id": np.arange(users), "amount": np.arange(users) + 1, "timestamp": when})
    plain = service.top_in_parts

    def slow(k: int, by: str = "score") -> Iterator[Any]:
        for part in plain(k, by):
            clock.seconds += BUDGET_SECONDS / 2
            yield part

    monkeypatch.setattr(service, "top_in_parts", slow)
    pulse = Pulse(service, clock.now, clock.ticks)
    best = []
    for _ in range(5):
        found = pulse.sample()
        best.append((found["top"]["users"][0]["user_id"], found["top"]["searched_in_seconds"] is not None))
    parts = [2 * 16384, 4 * 16384, 6 * 16384, users, users]  # two parts a sample
    assert best == [(str(part - 1), last) for part, last in zip(parts, [False, False, False, False, True], strict=True)]


@pytest.mark.parametrize(
    ("user", "text"),
    [(2**63 - 1, "9223372036854775807"), (-5, "-5"), (b"\x00\xff", "00ff"), ("<b>\u202e\n</b>", "<b>\u202e\n</b>")],
)
def test_user_ids_are_texts(clock: Clock, user: Any, text: str) -> None:
    engine = make(clock)
    pay(engine, clock, (user, 1))
    pulse = Pulse(Service.of(engine), clock.now, clock.ticks)
    assert json.loads(pulse.text())["top"]["users"][0]["user_id"] == text
    assert b"\n" not in pulse.text()


def test_users_of_several_engines(clock: Clock) -> None:
    engines = {number: make(clock) for number in range(3)}
    service = Service(engines[0].config, lambda: engines, clock.now, partitions=3)
    users = [f"user-{user}" for user in range(40)]
    chosen = partition_of(ids_of(pa.array(users), "user_id"), 3).tolist()
    assert set(chosen[30:]) == {0, 1, 2}
    for amount, (user, number) in enumerate(zip(users, chosen, strict=True), 1):
        pay(engines[number], clock, (user, amount))
    found = Pulse(service, clock.now, clock.ticks).sample()
    assert shown(found, "user_id", "score") == [(f"user-{user}", user + 1.0) for user in reversed(range(30, 40))]
    assert (found["users"], found["writable"]) == (40, False)


def test_what_is_not_there_yet_is_told(clock: Clock) -> None:
    engines: dict[int, RiskEngine] = {}

    def those() -> dict[int, RiskEngine]:
        if not engines:
            raise StaleError("the snapshot is being loaded; try again in a second")
        return engines

    engine = make(clock)
    service = Service(engine.config, those, clock.now, why_not=lambda: None if engines else "the snapshot is being loaded")
    pulse = Pulse(service, clock.now, clock.ticks)
    found = json.loads(pulse.text())
    assert found["ready"] == "the snapshot is being loaded" and "rows" not in found
    engines[0] = engine
    found = json.loads(pulse.text())
    assert (found["ready"], found["clock"], found["lag_seconds"], found["top"]["users"]) == (None, None, None, [])
    pay(engine, clock, ("a", 1))
    assert shown(pulse.sample(), "user_id") == [("a",)]
    engine.close()
    assert "the engine is closed" in json.loads(pulse.text())["error"]
    with pytest.raises(EngineError):
        pulse.sample()
