"""A partition whose truth is kept elsewhere: whenever a checkpoint is taken, what is made of it goes on as if nothing had happened."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import RiskEngine
from engine.errors import CapacityError, ConfigError, ConnectorError
from engine.hosted import Hosted, Plan
from engine.messages import OFFSET, ROW, encode_arrow
from engine.partition import READY, Beginning, Topic

SECOND = 10**9
OPTIONS: dict[str, Any] = {"window": "10s", "lateness": "5s", "users": 1000, "time_unit": "s", "max_ahead": "100s", "shards": 1}
TOPIC = Topic("payments", "id-1", 1, "job", "job")
PLAN = Plan(TOPIC, {0: Beginning(0, None, False, 0)}, OPTIONS)
#: When messages come to Kafka, whatever their rows say; and the clock on the wall, which must not matter.
ARRIVAL = 50 * SECOND


class Store:
    """Keeps a partition as Flink does: all of it changes at once with a checkpoint, or not at all."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.kept: dict[int, tuple[int, bytes | None]] = {}

    def place(self) -> str | None:
        return self.text

    def keep_place(self, text: str) -> None:
        self.text = text

    def keep(self, offset: int, arrival_ns: int, value: bytes | None) -> None:
        assert offset not in self.kept
        self.kept[offset] = arrival_ns, value

    def drop(self, offset: int) -> None:
        del self.kept[offset]

    def messages(self) -> Iterable[tuple[int, int, bytes | None]]:
        return reversed([(offset, *rest) for offset, rest in self.kept.items()])


class Told:
    """What was told, by offset and row."""

    wants_dead_letters = wants_scores = True

    def __init__(self) -> None:
        self.scored: list[tuple[int, int, float]] = []
        self.letters: list[tuple[int, int | None, str]] = []

    def dead_letter(self, partition: int, offset: int, row: int | None, reason: str, value: bytes | None) -> None:
        self.letters.append((offset, row, reason))

    def scores(self, partition: int, table: Any) -> None:
        self.scored += zip(*(table[name].to_pylist() for name in (OFFSET, ROW, "score")), strict=True)

    def flush(self) -> None:
        """Nothing is on its way."""


def silent(level: str, event: str, **fields: Any) -> None:
    """Nobody reads it."""


def hosted(store: Store, told: Told | None = None, plan: Plan = PLAN, number: int = 0, wall: int = 1) -> Hosted:
    return Hosted(number, plan, store, told, silent, lambda: wall * SECOND)


def message(*rows: tuple[str, float, int]) -> bytes:
    """One row as JSON, others as Arrow."""
    if len(rows) == 1:
        return json.dumps(dict(zip(("user_id", "amount", "timestamp"), rows[0], strict=True))).encode()
    users, amounts, times = zip(*rows, strict=True)
    return encode_arrow(pa.record_batch({"user_id": list(users), "amount": list(amounts), "timestamp": list(times)}))


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-9, 9).map(float), st.integers(0, 160)), min_size=1, max_size=4)
MESSAGES = st.lists(st.one_of(ROWS.map(lambda rows: message(*rows)), st.sampled_from([None, b"{", b"\xff"])), max_size=30)
#: After a message: nothing; what waits is applied; a checkpoint; the worker dies and goes on from the last checkpoint.
STEPS = st.lists(st.sampled_from(["", "apply", "checkpoint", "die"]), min_size=30, max_size=30)


@given(MESSAGES, STEPS)
def test_whatever_happens_it_is_as_if_nothing_had(messages: list[bytes | None], steps: list[str]) -> None:
    expected_store, expected = Store(), Told()
    whole = hosted(expected_store, expected, wall=10**6)
    for offset, value in enumerate(messages):
        whole.take(offset, ARRIVAL, value)
        whole.apply()

    store, told = Store(), Told()
    checkpoint, restored_at, delivered = (Store(), 0, ([], [])), 0, Told()
    running, offset = hosted(store, told), 0
    for step in [*steps, "checkpoint", "die"]:  # the last one reads to the end
        if offset < len(messages):
            running.take(offset, ARRIVAL, messages[offset])
            offset += 1
        if step == "apply":
            running.apply()
        elif step == "checkpoint":  # what was told is out for good
            delivered.scored += told.scored
            delivered.letters += told.letters
            told.scored, told.letters = [], []
            checkpoint, restored_at = (copy.deepcopy(store), 0, ([], [])), offset
        elif step == "die":
            store, offset, told = copy.deepcopy(checkpoint[0]), restored_at, Told()
            running = hosted(store, told)
    while offset < len(messages):
        running.take(offset, ARRIVAL, messages[offset])
        offset += 1
    running.apply()
    assert running.partition.engine.digest() == whole.partition.engine.digest()
    assert running.partition.accepted == whole.partition.accepted
    assert running.partition.dead == whole.partition.dead
    assert running.partition.position == whole.partition.position
    assert delivered.scored + told.scored == expected.scored
    assert sorted(delivered.letters + told.letters, key=str) == sorted(expected.letters, key=str)


def test_only_the_last_retention_is_kept() -> None:
    store = Store()
    running = hosted(store)
    for offset in range(1000):
        running.take(offset, offset * SECOND, message(("a", 1.0, offset)))
        running.apply()
    assert sorted(store.kept) == list(range(984, 1000))  # as old as window and lateness together, and not older
    again = hosted(copy.deepcopy(store))
    assert again.partition.engine.digest() == running.partition.engine.digest()
    assert (again.partition.accepted, again.partition.position, again.partition.state) == (1000, 1000, READY)


def test_a_row_that_jumped_too_far_is_refused_again() -> None:
    """Though the messages that the clock was of are no longer kept."""
    plan = Plan(TOPIC, PLAN.beginnings, OPTIONS | {"max_jump": "20s"})
    store, told = Store(), Told()
    running = hosted(store, told, plan)
    for offset, rows in enumerate([[("a", 1.0, 100)], [("b", 5.0, 130), ("a", 2.0, 118)]]):
        running.take(offset, 100 * SECOND, message(*rows))
        running.apply()
    assert told.letters == [(1, 0, "jump")]
    assert sorted(store.kept) == [1]
    again = hosted(store, told, plan)
    assert again.partition.engine.digest() == running.partition.engine.digest()
    assert "b" not in again.partition.engine
    assert len(told.letters) == 1


def test_the_kind_of_ids_outlives_the_messages_that_gave_it() -> None:
    """Also when the first message that is kept has another."""
    store, told = Store(), Told()
    running = hosted(store, told)
    running.take(0, 100 * SECOND, message(("a", 1.0, 0)))
    running.apply()
    running.take(1, 100 * SECOND, encode_arrow(pa.record_batch({"user_id": [7], "amount": [1.0], "timestamp": [100]})))
    running.take(2, 100 * SECOND, message(("b", 1.0, 100)))
    running.apply()
    assert (sorted(store.kept), told.letters) == ([1, 2], [(1, 0, "wrong_kind")])
    again = hosted(store, told)
    assert again.partition.engine.id_kind == "string"
    assert again.partition.engine.digest() == running.partition.engine.digest()


def test_what_waited_is_told_after_a_restore() -> None:
    store, told = Store(), Told()
    running = hosted(store, told)
    running.take(0, ARRIVAL, message(("a", 1.0, 0)))
    assert (running.waiting, told.scored) == (1, [])
    again = hosted(store, told)
    assert again.waiting == 1
    again.apply()
    assert told.scored == [(0, 0, 1.0)]


def test_many_messages_do_not_wait() -> None:
    running = hosted(Store())
    for offset in range(1000):
        running.take(offset, ARRIVAL, message(("a", 1.0, 0)))
    assert running.waiting == 0
    running.take(1000, ARRIVAL, b"\xff" + bytes(1 << 20))
    assert running.waiting == 0


def test_ready_when_the_log_of_the_start_is_applied() -> None:
    plan = Plan(TOPIC, {0: Beginning(0, None, False, 5)}, OPTIONS)
    running = hosted(Store(), plan=plan)
    running.take(3, ARRIVAL, message(("a", 1.0, 0)))
    running.apply()
    assert running.partition.state == "catching_up"  # offset 4 may be a message, or a mark of a transaction
    running.take(7, ARRIVAL, message(("a", 1.0, 0)))
    running.apply()
    assert running.partition.state == READY


def test_exactness_is_kept() -> None:
    plan = Plan(TOPIC, {0: Beginning(4, 99 * SECOND, True, 5)}, OPTIONS)
    store = Store()
    running = hosted(store, plan=plan)
    assert hosted(copy.deepcopy(store), plan=plan).partition.starts_at_first
    running.take(4, ARRIVAL, message(("a", 1.0, 0)))
    running.apply()
    exact = running.partition.exact_from_ns
    assert exact == ARRIVAL + 1 + 100 * SECOND + 15 * SECOND
    again = hosted(store, plan=plan)
    again.take(5, 2 * ARRIVAL, message(("a", 1.0, 0)))
    again.apply()
    assert again.partition.exact_from_ns == exact


def test_a_full_engine_ends_the_job() -> None:
    plan = Plan(TOPIC, PLAN.beginnings, OPTIONS | {"users": 2})
    running = hosted(Store(), plan=plan)
    for offset, user in enumerate("abc"):
        running.take(offset, ARRIVAL, message((user, 1.0, 0)))
    with pytest.raises(CapacityError, match="partition 0: the engine is full, from offset 0 on; give more --users"):
        running.apply()


def test_partitions_that_were_added() -> None:
    with pytest.raises(ConnectorError, match="payments has a partition 1; when this job began it had 1"):
        hosted(Store(), number=1)


@pytest.mark.parametrize(
    ("topic", "options", "told"),
    [
        (Topic("payments", "id-2", 1, "job", "job"), OPTIONS, "id='id-1', not 'id-2'"),
        (Topic("others", "id-1", 1, "job", "job"), OPTIONS, "name='payments', not 'others'"),
        (Topic("payments", "id-1", 2, "job", "job"), OPTIONS, "partitions=1, not 2"),
        (TOPIC, OPTIONS | {"window": "11s"}, "window_ns=10000000000, not 11000000000"),
        (TOPIC, OPTIONS | {"closed": "right"}, "closed='both', not 'right'"),
    ],
)
def test_states_of_something_else(topic: Topic, options: dict[str, Any], told: str) -> None:
    store = Store()
    hosted(store)
    with pytest.raises(ConfigError, match=told):
        hosted(store, plan=Plan(topic, PLAN.beginnings, options))


def test_states_of_another_version() -> None:
    store = Store()
    hosted(store)
    store.text = store.text and store.text.replace('"version": 1', '"version": 2')
    with pytest.raises(ConfigError, match=r"another riskring \(version 2, here 1\)"):
        hosted(store)


def test_it_is_what_an_engine_is_that_reads_the_log() -> None:
    running = hosted(Store())
    judge = RiskEngine(**OPTIONS, now=lambda: 10**6 * SECOND)
    for offset in range(50):
        rows = [("ab"[offset % 2], float(offset), 2 * offset), ("c", 1.5, 2 * offset - 4)]
        running.take(offset, 10**3 * SECOND, message(*rows))
        judge.ingest({name: [row[place] for row in rows] for place, name in enumerate(("user_id", "amount", "timestamp"))})
    running.apply()
    assert running.partition.engine.digest() == judge.digest()
