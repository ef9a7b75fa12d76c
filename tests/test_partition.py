"""One partition and its publisher, without servers: the state is that of the records, ways of recovery agree, nothing published is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import ConfigError, ConnectorError, RiskEngine
from engine.columns import ids_of
from engine.config import Config
from engine.messages import encode_arrow
from engine.partition import FULL, READY, Ends, Partition, Topic, check_state, recover
from engine.partitions import partition_of
from engine.publisher import Publisher
from engine.ticks import Lost, Published, Refused, Tick

MS = 10**6
OPTIONS: dict[str, Any] = {"window": "50ms", "lateness": "20ms", "max_ahead": "7ms", "users": 60, "time_unit": "ms", "shards": 1}
TOPIC = Topic("topic", "id", 1, "group", "me")

Record = tuple[bytes, int]  # value, Kafka time in ms


class Log:
    """Records, and what was logged of them."""

    def __init__(self, records: list[Record], low: int = 0) -> None:
        self.records, self.low = records, low
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def ends(self, since_ms: int = 0) -> Ends:
        later = (offset for offset in range(self.low, len(self.records)) if self.records[offset][1] >= since_ms)
        return Ends(self.low, len(self.records), next(later, len(self.records)), since_ms * MS)

    def recovered(
        self, state: Path | None = None, now_ms: int = 0, from_start: bool = False, topic: Topic = TOPIC, **options: Any
    ) -> Partition:
        config = Config.of(**(OPTIONS | options))
        ends = self.ends(now_ms - 2 * config.retention_ns // MS)
        text = None if state is None else str(state)
        return recover(0, topic, ends, text, OPTIONS | options, lambda: now_ms * MS, from_start, None, True, self)

    def feed(self, partition: Partition, first: int, last: int) -> None:
        some = self.records[first:last]
        times = np.array([arrival for _, arrival in some], np.int64) * MS
        partition.apply([value for value, _ in some], np.arange(first, last), times)


def record(user: str, amount: float, time_ms: int, arrival_ms: int) -> Record:
    return json.dumps({"user_id": user, "amount": amount, "timestamp": time_ms}).encode(), arrival_ms


def records(seed: int, count: int = 300) -> list[Record]:
    """Late, ahead, undecodable and of other kinds, while Kafka's time goes on."""
    choose, now_ms, found = Random(seed), 1000, []
    for _ in range(count):
        now_ms += choose.choice([0, 0, 1, 2, 5])
        time_ms = now_ms - choose.choice([0, 0, 1, 15, 25, 60]) + choose.choice([0, 0, 0, 5, 9])
        bad = choose.random()
        value = record(f"u{choose.randrange(6)}", choose.randrange(1, 9), time_ms, now_ms)[0]
        found.append((b"{" if bad < 0.02 else re.sub(rb'"u\d"', b"7", value) if bad < 0.04 else value, now_ms))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_the_state_does_not_depend_on_how_records_come(seed: int) -> None:
    """In any groups, some of them again, as after a seek."""
    choose, log = Random(seed), Log(records(seed))
    whole, parts = log.recovered(from_start=True), log.recovered(from_start=True)
    log.feed(whole, 0, len(log.records))
    place = 0
    while place < len(log.records):
        first = max(place - choose.choice([0, 0, 3]), 0)
        place = min(place + choose.randrange(1, 30), len(log.records))
        log.feed(parts, first, place)
        parts.draw(choose.randrange(10**12), choose.random() < 0.5)
    assert (whole.position, whole.state, whole.dead, whole.accepted) == (parts.position, parts.state, parts.dead, parts.accepted)
    assert whole.engine.digest() == parts.engine.digest()
    assert set(whole.dead) == {"undecodable", "wrong_kind", "late", "future"}


class Letters:
    """Dead letters, kept."""

    wants_dead_letters, wants_scores = True, False

    def __init__(self) -> None:
        self.kept: list[tuple[int, int, str, bytes | None]] = []

    def dead_letter(self, partition: int, offset: int, row: int | None, reason: str, value: bytes | None) -> None:
        self.kept.append((offset, -1 if row is None else row, reason, value))

    def scores(self, partition: int, table: Any) -> None:
        raise AssertionError("nobody wants scores")

    def flush(self) -> None:
        pass


def ids_at_random(seed: int) -> list[Record]:
    """Ids of all kinds from the first record on, some without an amount, so that it is not always the first one that decides."""
    choose, found = Random(seed), []
    ids = choose.sample([b"18446744073709551615", b"9223372036854775808", b"7", b"-7", b'"a"', b"null"], choose.randrange(2, 7))
    for number in range(25):
        amount = choose.choice([b"1", b"2", b"null"])
        value = b'{"user_id":%s,"amount":%s,"timestamp":%d}' % (choose.choice(ids), amount, 1000 + number)
        if choose.random() < 0.1:
            value = encode_arrow(pa.table({"user_id": [b"\xff"], "amount": [1], "timestamp": [1000 + number]}))
        found.append((b"{" if choose.random() < 0.1 else value, 1000 + number))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_kind_of_ids_is_that_of_the_first_row_however_records_come(seed: int) -> None:
    choose, log = Random(seed), Log(ids_at_random(seed))
    found = []
    for most in (1, 4, 25):
        partition, letters, place = log.recovered(from_start=True), Letters(), 0
        partition.output = letters
        while place < len(log.records):
            last = min(place + choose.randrange(1, most + 1) if most < 25 else 25, len(log.records))
            log.feed(partition, place, last)
            place = last
        found.append((partition.engine.id_kind, partition.engine.digest(), partition.accepted, partition.dead, sorted(letters.kept)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("low", [0, 40])
def test_a_rebuild_is_exact_from_the_instant_it_says(seed: int, low: int) -> None:
    """The log has forgotten what came before `low`."""
    log, choose = Log(records(seed, 600)), Random(seed)
    whole, start = log.recovered(from_start=True), choose.randrange(100, 300)
    log.feed(whole, 0, start)
    log.low = low
    rebuilt = log.recovered(now_ms=log.records[start - 1][1] + choose.choice([0, 100]), from_start=choose.random() < 0.3)
    assert rebuilt.position >= low
    if low == 0 == rebuilt.position:
        assert rebuilt.exact_from_ns is None
    log.feed(rebuilt, rebuilt.position, start)
    compared = 0
    for place in range(start, len(log.records), 7):
        log.feed(whole, whole.position, place)
        log.feed(rebuilt, rebuilt.position, place)
        clock_ns = whole.engine.clock_ns
        assert clock_ns is not None
        if rebuilt.exact_from_ns is None or clock_ns >= rebuilt.exact_from_ns:
            assert rebuilt.engine.digest() == whole.engine.digest()
            compared += 1
    assert compared > 5


def test_rows_are_judged_by_the_time_of_their_record() -> None:
    log = Log([record("a", 1, 1007, 1000), record("a", 2, 1008, 1000), record("b", 4, 2000, 1993)])
    partition = log.recovered(from_start=True, now_ms=10**9)
    log.feed(partition, 0, 3)
    assert (partition.dead, partition.accepted) == ({"future": 1}, 2)


def test_users_of_other_partitions_are_refused() -> None:
    users = [f"user {number}" for number in range(20)]
    mine = [user for user in users if partition_of(ids_of(pa.array([user]), "user_id"), 2)[0] == 0]
    log = Log([record(user, 1, 1000, 1000) for user in users])
    partition = log.recovered(from_start=True, topic=Topic("topic", "id", 2, "group", "me"))
    log.feed(partition, 0, 20)
    assert 0 < len(mine) < 20
    assert (partition.accepted, partition.dead, partition.position) == (len(mine), {"wrong_partition": 20 - len(mine)}, 20)


def test_an_engine_that_is_full_stops_where_it_is() -> None:
    log = Log([record(f"user {number}", 1, 1000, 1000) for number in range(70)])
    partition = log.recovered(from_start=True)
    log.feed(partition, 0, 50)
    log.feed(partition, 50, 70)
    assert (partition.state, partition.position, partition.accepted) == (FULL, 50, 50)
    partition.reach(70)
    log.feed(partition, 50, 70)
    assert (partition.position, partition.draw(0, True).state) == (50, FULL)


class TestRecovery:
    def saved(self, log: Log, state: Path, position: int, topic: Topic = TOPIC) -> None:
        partition = log.recovered(state, from_start=True, topic=topic)
        log.feed(partition, partition.position, position)
        partition.begin_save()
        assert partition.end_save(wait=True) == position
        partition.close()

    def test_the_newest_snapshot_that_fits_is_taken(self, tmp_path: Path) -> None:
        log = Log(records(1))
        for position in (50, 100, 150):
            self.saved(log, tmp_path, position)
        log.records = log.records[:120]
        partition = log.recovered(tmp_path)
        assert (partition.position, partition.exact_from_ns) == (100, None)
        assert [event for event, _ in log.events][-2:] == ["snapshot passed over", "snapshot loaded"]
        assert "its position 150 is not in the log, which goes from 0 to 120" in log.events[-2][1]["why"]
        whole = log.recovered(from_start=True)
        log.feed(whole, 0, 120)
        log.feed(partition, 100, 120)
        assert partition.engine.digest() == whole.engine.digest()
        log.low = 101
        assert log.recovered(tmp_path, from_start=True).position == 101

    def test_a_position_at_either_end_of_the_log_will_do(self, tmp_path: Path) -> None:
        log = Log(records(2))
        self.saved(log, tmp_path, 150)
        log.records, log.low = log.records[:150], 150
        assert log.recovered(tmp_path).position == 150

    @pytest.mark.parametrize(
        ("topic", "why"),
        [
            (Topic("topic", "another", 1, "group", "me"), "was deleted (id, now another)"),
            (Topic("topic", "id", 2, "group", "me"), "had 1 partitions then, and now has 2"),
        ],
    )
    def test_snapshots_of_what_was_are_passed_over(self, tmp_path: Path, topic: Topic, why: str) -> None:
        log = Log(records(3))
        self.saved(log, tmp_path, 100)
        assert log.recovered(tmp_path, from_start=True, topic=topic).position == 0
        assert why in log.events[-2][1]["why"]

    @pytest.mark.parametrize(
        ("topic", "text"),
        [
            (Topic("other", "id", 1, "group", "me"), "belongs to topic 'topic', not 'other'"),
            (Topic("topic", "id", 1, "others", "me"), "belongs to group 'group', not 'others'"),
        ],
    )
    def test_states_of_others_are_an_error(self, tmp_path: Path, topic: Topic, text: str) -> None:
        log = Log(records(4))
        self.saved(log, tmp_path, 100)
        for call in (lambda: log.recovered(tmp_path, topic=topic), lambda: check_state(str(tmp_path), topic)):
            with pytest.raises(ConfigError, match=text):
                call()
        check_state(str(tmp_path), TOPIC)

    @pytest.mark.parametrize("options", [{"window": "51ms"}, {"lateness": "0ms"}, {"closed": "right"}, {"decimals": 2}])
    def test_other_options_are_an_error(self, tmp_path: Path, options: dict[str, Any]) -> None:
        log = Log(records(5))
        self.saved(log, tmp_path, 100)
        with pytest.raises(ConfigError, match="is the state of a node with"):
            log.recovered(tmp_path, **options)
        assert log.recovered(tmp_path, users=90, max_ahead="1s").position == 100

    def test_snapshots_that_are_none_of_a_node(self, tmp_path: Path) -> None:
        with RiskEngine(users=5) as engine:
            for position in (None, {}, {"offset": 5}, {"topic": "topic"}):
                engine.save(tmp_path / "0", position=position)
                with pytest.raises(ConfigError, match="not those of a node"):
                    Log([]).recovered(tmp_path)
                with pytest.raises(ConfigError, match="not those of a node"):
                    check_state(str(tmp_path), TOPIC)

    def test_a_rebuild_that_is_not_exact_yet_says_so_after_a_restart_too(self, tmp_path: Path) -> None:
        log = Log(records(6), low=40)
        partition = log.recovered(tmp_path, from_start=True, now_ms=10**6)
        log.feed(partition, 40, 100)
        told = partition.exact_from_ns
        assert told == (log.records[40][1] + 7 + 50 + 20) * MS + 1
        partition.begin_save()
        partition.end_save(wait=True)
        assert log.recovered(tmp_path).exact_from_ns == told


class Store:
    """A sink that can be away, lose everything, or belong to another process by now."""

    def __init__(self) -> None:
        self.scores: dict[str, tuple[float, int]] = {}
        self.ticks: list[Tick] = []
        self.answers: list[Any] = []

    def begin(self, topic: str, partition: int, topic_id: str) -> None:
        assert (topic, partition, topic_id) == ("topic", 0, "id")

    def publish(self, tick: Tick) -> Any:
        self.ticks.append(tick)
        answer = self.answers.pop(0) if self.answers else Published()
        if isinstance(answer, ConnectorError):
            raise answer
        if isinstance(answer, Lost):
            self.scores = {}
        if not isinstance(answer, Refused) and tick.users is not None:
            for row in tick.users.select(["user_id", "score", "count"]).to_pylist():
                self.scores[row["user_id"]] = (row["score"], row["count"])
        return answer

    def shown(self) -> dict[str, float]:
        return {user: score for user, (score, count) in self.scores.items() if count}


class TestPublisher:
    def started(self, count: int = 200) -> tuple[Log, Partition, Store, Publisher, Callable[[], None], list[int]]:
        log, store, wall_ms = Log(records(7, count)), Store(), [1000]
        partition = log.recovered(from_start=True)
        publisher = Publisher(store, 0.01, lambda: wall_ms[0] * MS, log, lambda _: None)
        publisher.add(partition)

        def check() -> None:
            tick = store.ticks[-1]
            table = partition.engine.features(at=np.datetime64(tick.at_ns, "ns"))
            counted = {row["user_id"]: row["score"] for row in table.select(["user_id", "score", "count"]).to_pylist() if row["count"]}
            assert store.shown() == counted
            assert (tick.position, tick.clock_ns) == (partition.position, partition.engine.clock_ns)

        return log, partition, store, publisher, check, wall_ms

    @pytest.mark.parametrize("seed", range(15))
    def test_whatever_the_sink_does_it_is_right_in_the_end(self, seed: int) -> None:
        choose = Random(seed)
        log, partition, store, publisher, check, wall_ms = self.started()
        for place in range(0, 200, 10):
            log.feed(partition, place, place + 10)
            wall_ms[0] = max(wall_ms[0], log.records[place + 9][1] - choose.choice([0, 5]))
            for _ in range(choose.randrange(3)):
                answers = [ConnectorError("away"), Refused((10**6, 0)), Lost()]
                store.answers = [choose.choice(answers)] if choose.random() < 0.4 else []
                publisher.tick()
        store.answers = []
        publisher.tick()
        publisher.tick()
        publisher.tick()
        check()

    def test_scores_fall_although_nothing_comes(self) -> None:
        log, partition, store, publisher, check, wall_ms = self.started()
        log.feed(partition, 0, 200)
        last_ms = log.records[-1][1]
        for wall_ms[0] in range(last_ms, last_ms + 80, 3):
            publisher.tick()
            check()
        assert store.shown() == {}

    def test_a_tick_that_failed_is_tried_again_as_it_was(self) -> None:
        log, partition, store, publisher, check, _ = self.started()
        log.feed(partition, 0, 100)
        store.answers = [ConnectorError("away"), ConnectorError("away")]
        publisher.tick()
        log.feed(partition, 100, 200)
        publisher.tick()
        assert store.ticks[0] is store.ticks[1]
        assert publisher.pending == len(store.ticks[0].users) > 0
        assert publisher.away_seconds > 0
        publisher.tick()
        publisher.tick()
        check()
        assert [tick.everybody for tick in store.ticks] == [True, True, True, False]
        assert (publisher.pending, publisher.away_seconds) == (0, 0.0)
        assert [event for event, _ in log.events if "published" in event] == ["scores are not published", "scores are published again"]

    @pytest.mark.parametrize("answer", [Refused((10**6, 5)), Lost()])
    def test_everything_is_told_anew_when_it_must_be(self, answer: Any) -> None:
        log, partition, store, publisher, check, _ = self.started()
        log.feed(partition, 0, 150)
        publisher.tick()
        store.answers = [answer]
        publisher.tick()
        publisher.tick()
        check()
        assert [tick.everybody for tick in store.ticks] == [True, False, True]

    def test_the_last_tick(self) -> None:
        log, partition, store, publisher, check, _ = self.started()
        log.feed(partition, 0, 150)
        assert publisher.last(0)
        check()
        publisher.tick()
        assert len(store.ticks) == 1
        publisher.add(partition)
        store.answers = [ConnectorError("away")]
        assert not publisher.last(0)
        assert not publisher.last(0)

    def test_what_ends_the_thread_is_kept(self) -> None:
        log, partition, _, publisher, _, _ = self.started()
        log.feed(partition, 0, 50)
        partition.engine.close()
        publisher.start()
        publisher._thread.join(60)
        publisher.stop()
        assert "closed" in str(publisher.failure)


def test_ready_when_the_end_of_the_log_is_reached_also_past_marks_of_transactions() -> None:
    log = Log([record("a", 1, 1000, 1000)] * 5)
    partition = log.recovered(from_start=True)
    log.feed(partition, 0, 4)
    assert partition.state != READY
    partition.reach(5)
    assert (partition.state, partition.position) == (READY, 5)
    assert Log([]).recovered(from_start=True).state == READY
