"""`changes`: exactly the users whose score is no longer what was last reported of them; and how long a score stays as it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import RiskEngine, TimeTooOldError
from engine.config import TIME_NS_MAX, TIME_NS_MIN, Config
from engine.reference import Reference
from tests.strategies import instant

SEEDS = range(150)
OPTIONS: dict[str, Any] = {"users": 6, "max_ahead": None, "time_unit": "ns"}
NAMES = {"int64": lambda user: user - 2, "string": lambda user: "ab"[:user] * user, "binary": lambda user: b"\0" * user}


def ingest(engine: RiskEngine, judge: Reference, rows: list[tuple[Any, float, int]]) -> None:
    users, amounts, times = zip(*rows, strict=True)
    engine.ingest({"user_id": list(users), "amount": list(amounts), "timestamp": list(times)})
    judge.ingest(rows)


def reported(engine: RiskEngine, at_ns: int | None = None) -> dict[Any, float]:
    """What `changes` says, which must be what `features` says of the same users."""
    at = None if at_ns is None else instant(at_ns)
    table = engine.changes(at=at)
    users = table["user_id"].to_pylist()
    if users:
        assert table.equals(engine.features(table["user_id"].combine_chunks(), at=at))
    assert len(set(users)) == len(users)
    return dict(zip(users, table["score"].to_pylist(), strict=True))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_changes_are_those_of_the_reference(seed: int, kind: str) -> None:
    """Rows in any order, expiry, instants that go forth, back and far ahead; users who leave and come back unreported."""
    choose = random.Random(seed)
    options = {
        "window": f"{choose.choice([1, 7, 50])}ns",
        "lateness": f"{choose.choice([0, 5, 60])}ns",
        "closed": choose.choice(["both", "right"]),
        "shards": choose.choice([1, 2]),
    }
    base_ns = choose.choice([0, TIME_NS_MIN + 200, TIME_NS_MAX - 20_000])
    engine, judge = RiskEngine(**OPTIONS, **options), Reference(Config.of(**OPTIONS, **options))
    now_ns = 0
    for _ in range(40):
        step = choose.random()
        if step < 0.5:
            now_ns += choose.choice([0, 1, 3, 20, 200])
            count = choose.randrange(1, 8)
            rows = [
                (NAMES[kind](choose.randrange(5)), choose.choice([1.0, -1.0, 2.5, 0.0]), base_ns + now_ns - choose.choice([0, 0, 0, 3, 30]))
                for _ in range(count)
            ]
            ingest(engine, judge, rows)
        elif step < 0.6:
            engine.expire()
        elif judge.clock_ns is not None:
            at_ns = judge.clock_ns + choose.choice([0, 0, 1, 5, -1, -3, 40, 100])
            at_ns = min(max(at_ns, judge.clock_ns - engine.config.lateness_ns, TIME_NS_MIN), TIME_NS_MAX)
            assert reported(engine, at_ns) == judge.changes(at_ns)
        for shard in engine._core.shards:
            shard.check(engine._core.kind)


def test_users_who_left_unreported_and_those_who_came_back() -> None:
    options = {**OPTIONS, "window": "10ns", "lateness": "0ns", "shards": 1}
    engine, judge = RiskEngine(**options), Reference(Config.of(**options))
    ingest(engine, judge, [("gone", 1.0, 0), ("back", 2.0, 0), ("same", 3.0, 0), ("twice", 4.0, 0)])
    assert reported(engine) == judge.changes() == {"gone": 1.0, "back": 2.0, "same": 3.0, "twice": 4.0}
    for clock_ns, user in ((100, "twice"), (200, "other"), (300, "back"), (300, "same")):
        ingest(engine, judge, [(user, 3.0, clock_ns)])
        engine.expire()
    assert len(engine) == 2
    assert reported(engine) == judge.changes() == {"back": 3.0, "gone": 0.0, "twice": 0.0}
    assert reported(engine) == judge.changes() == {}


def test_a_full_engine_makes_room_and_still_reports_who_left() -> None:
    options = {**OPTIONS, "window": "10ns", "lateness": "0ns", "users": 2, "shards": 2}
    engine, judge = RiskEngine(**options), Reference(Config.of(**options))
    for clock_ns in range(0, 300, 30):
        rows = [(clock_ns, 1.0, clock_ns), (clock_ns + 1, 2.0, clock_ns)]
        ingest(engine, judge, rows)
        if clock_ns % 90 == 0:
            assert reported(engine) == judge.changes()
    assert reported(engine) == judge.changes()


@pytest.mark.parametrize("leap_ns", [10, 600, 5_000, 50_000])
def test_instants_far_apart(leap_ns: int) -> None:
    """Marks say when a score may change only within so many epochs; beyond, all users are looked at."""
    options = {**OPTIONS, "window": "1000ns", "users": 300, "shards": 1}
    engine, judge = RiskEngine(**options), Reference(Config.of(**options))
    ingest(engine, judge, [(user, user + 1.0, 7 * user) for user in range(200)])
    assert reported(engine) == judge.changes()
    assert judge.clock_ns is not None
    at_ns = judge.clock_ns
    for _ in range(4):
        at_ns += leap_ns
        assert reported(engine, at_ns) == judge.changes(at_ns)
    ingest(engine, judge, [(user, 2.0, at_ns) for user in range(0, 200, 3)])
    assert reported(engine) == judge.changes()


def test_an_instant_too_old_counts_as_no_report() -> None:
    engine = RiskEngine(**{**OPTIONS, "window": "10ns", "lateness": "5ns"})
    engine.ingest({"user_id": [1], "amount": [2.0], "timestamp": [100]})
    with pytest.raises(TimeTooOldError):
        engine.changes(at=instant(94))
    assert reported(engine) == {1: 2.0}


def test_nothing_to_report() -> None:
    engine = RiskEngine(**OPTIONS)
    assert engine.changes().num_rows == engine.changes(at="2026-01-01").num_rows == 0
    assert engine.changes().schema.names == engine.features().schema.names


def test_a_batch_that_is_refused_reports_nobody() -> None:
    engine = RiskEngine(**{**OPTIONS, "users": 2, "shards": 1})
    engine.ingest({"user_id": [1, 2], "amount": [1.0, 2.0], "timestamp": [5, 5]})
    assert reported(engine) == {1: 1.0, 2: 2.0}
    with pytest.raises(MemoryError):
        engine.ingest({"user_id": [1, 3], "amount": [9.0, 9.0], "timestamp": [6, 6]})
    assert reported(engine) == {}


def test_many_users_over_both_shards() -> None:
    """More users than are looked at in one call, and rows added one by one."""
    count = 70_000
    engine = RiskEngine(window="1000ns", users=2 * count, shards=2, max_ahead=None, time_unit="ns")
    users = np.arange(count)
    engine.ingest({"user_id": users, "amount": users + 1.0, "timestamp": np.zeros(count, np.int64)})
    assert engine.changes()["user_id"].to_pylist() == users.tolist()
    assert engine.changes().num_rows == 0
    for user in (3, 65_536, 69_999):
        engine.add(user, 5.0, 500)
    assert engine.changes()["user_id"].to_pylist() == [3, 65_536, 69_999]
    fell = engine.changes(at=instant(1_001))
    assert fell["user_id"].to_pylist() == users.tolist()
    assert pa.compute.sum(fell["score"]).as_py() == 15.0


def test_a_loaded_engine_reports_everybody_again(tmp_path: Path) -> None:
    """What was reported is no part of a snapshot; those who had fallen to 0.0 unreported are not known any more."""
    options = {**OPTIONS, "window": "10ns", "lateness": "20ns", "shards": 2}
    engine, judge = RiskEngine(**options), Reference(Config.of(**options))
    ingest(engine, judge, [("old", 1.0, 0), ("new", 2.0, 15), ("none", 0.0, 15)])
    assert reported(engine, 5) == {"old": 1.0}
    engine.save(tmp_path)
    assert reported(RiskEngine.load(tmp_path)) == {"new": 2.0}
    assert reported(engine) == {"old": 0.0, "new": 2.0}


class TestHowLongAScoreStays:
    """`valid_until` and `zero_at`, nanosecond by nanosecond. All sums of these amounts differ, so another window is another score."""

    @pytest.mark.parametrize("closed", ["both", "right"])
    @pytest.mark.parametrize("seed", range(40))
    def test_to_the_nanosecond(self, seed: int, closed: str) -> None:
        choose = random.Random(seed)
        options = {**OPTIONS, "window": "9ns", "lateness": "20ns", "closed": closed, "decimals": 0, "shards": 1}
        engine = RiskEngine(**options)
        times = sorted(choose.randrange(40) for _ in range(choose.randrange(1, 9)))
        engine.ingest({"user_id": [1] * len(times), "amount": [10.0**place for place in range(len(times))], "timestamp": times})
        clock_ns = times[-1]
        scores = {at_ns: engine.score(1, at=instant(at_ns)) for at_ns in range(clock_ns - 20, clock_ns + 15)}
        for at_ns in range(clock_ns - 20, clock_ns + 14):
            row = engine.features([1], at=instant(at_ns))
            valid_until, zero_at = (row[name].cast(pa.int64())[0].as_py() for name in ("valid_until", "zero_at"))
            later = range(at_ns, clock_ns + 15)
            changed = next((after_ns for after_ns in later if scores[after_ns] != scores[at_ns]), None)
            empty = next((after_ns for after_ns in later if scores[after_ns] == 0.0), None)
            assert valid_until == (None if changed is None else changed - 1)
            assert zero_at == (empty if scores[at_ns] else None)


@pytest.mark.parametrize("seed", range(40))
def test_a_cache_that_takes_the_updates_is_right(seed: int) -> None:
    """Whoever keeps what `updates` lists, and drops users at their `zero_at`, has all features of all users."""
    choose = random.Random(seed)
    options = {"window": f"{choose.choice([3, 20])}ns", "lateness": f"{choose.choice([0, 30])}ns", "shards": choose.choice([1, 2])}
    engine = RiskEngine(**OPTIONS, **options)
    cache: dict[Any, dict[str, Any]] = {}
    now_ns = at_ns = 0
    for _ in range(60):
        now_ns += choose.choice([0, 1, 2, 15, 300])
        step = choose.random()
        if step < 0.6:  # amounts alike, so that most scores stay as they are
            engine.add(choose.randrange(5), choose.choice([1, 1, 1, 0]), max(now_ns - choose.choice([0, 0, 0, 4]), 0))
        elif step < 0.7:
            engine.expire()
        elif step < 0.75:
            engine.changes()
            cache = {row["user_id"]: row for row in engine.updates(anew=True).to_pylist()}
        elif step < 0.8:
            cache = {row["user_id"]: row for row in engine.updates(anew=True).to_pylist()}
        at_ns = max(at_ns, now_ns)
        if engine.stats().clock is None:
            continue
        at = instant(at_ns)
        listed = engine.updates(at=at).to_pylist()
        assert len({row["user_id"] for row in listed}) == len(listed)
        cache |= {row["user_id"]: row for row in listed}
        held = {
            user: row
            for user, row in cache.items()
            if row["count"] and row["zero_at"] > pa.scalar(at_ns, pa.timestamp("ns", "UTC")).as_py()
        }
        assert held == {row["user_id"]: row for row in engine.features(at=at).to_pylist() if row["count"]}
        assert all(row["score"] == 0.0 for row in listed if row["count"] == 0)


def test_updates_list_who_stays_longer_although_the_score_is_the_same() -> None:
    engine = RiskEngine(window="10ns", **OPTIONS)
    engine.add("alice", 5, 100)
    engine.add("bob", 5, 100)
    assert sorted(engine.updates()["user_id"].to_pylist()) == ["alice", "bob"]
    engine.add("alice", 5, 103)
    assert engine.changes().num_rows == 0
    engine.add("alice", 5, 104)
    table = engine.updates()
    assert table.select(["user_id", "score"]).to_pylist() == [{"user_id": "alice", "score": 5.0}]
    assert table["zero_at"].cast(pa.int64()).to_pylist() == [115]
    left = engine.updates(at=instant(130)).sort_by("user_id").select(["user_id", "count"])
    assert left.to_pydict() == {"user_id": ["alice", "bob"], "count": [0, 0]}
    assert engine.updates(at=instant(131)).num_rows == 0
