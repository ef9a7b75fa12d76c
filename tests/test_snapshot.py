"""Snapshots: what is saved comes back bit by bit, is the state at one instant, and lies in the folder as it should."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import CapacityError, ConfigError, EngineError, RiskEngine, SnapshotError
from engine import copies as copies_module
from engine import snapshot as snapshot_module
from engine.config import TIME_NS_MAX, TIME_NS_MIN, Config
from engine.reference import Reference
from engine.storage import LocalStore
from tests.disks import Disk
from tests.strategies import Stream, UserRow, cut, shard_counts, splits, streams, to_batch
from tests.test_properties import apply, bits, check, common, new_engine, outcomes, same_state

NOW_NS = 1_700_000_000 * 10**9

IDS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "int64": (pa.int64(), [0, 1, -1, 2**63 - 1, -(2**63), 77, 78, 79]),
    "uint64": (pa.uint64(), [0, 1, 2**64 - 1, 2**63, 77, 78]),
    "string": (pa.string(), ["", "a", "né\U0001f600", "x" * 300, "x" * 299 + "y", "\0", "a\0"]),
    "binary": (pa.binary(), [b"", b"\0", b"\0\0", b"\xff\xfe", b"a\0b", bytes(100)]),
}


def make(**options: Any) -> RiskEngine:
    """A small engine in simulated time; amounts are whole numbers."""
    few: dict[str, Any] = {"window": "100ns", "lateness": "50ns", "users": 50, "shards": 2, "decimals": 0, "max_ahead": None}
    return RiskEngine(**(few | options), now=lambda: NOW_NS)


def some_rows(kind: str, seed: int, count: int = 600, base_ns: int = 0) -> list[UserRow]:
    """Rows with disorder, ties, extreme amounts and late ones; more than half of them are of the first user."""
    draw, users = random.Random(seed), IDS[kind][1]
    result, now = [], base_ns
    for _ in range(count):
        now += draw.choice((0, 0, 0, 0, 1))
        user = users[0] if draw.random() < 0.6 else draw.choice(users)
        amount = draw.choice((draw.randint(-9, 99), draw.randint(-9, 99), 2**53, -(2**53), draw.randint(-(2**40), 2**40)))
        result.append((user, amount, max(now - draw.choice((0, 0, 0, 1, 20, 50, 60)), TIME_NS_MIN)))
    return result


def batch(kind: str, rows: list[UserRow]) -> pa.RecordBatch:
    return to_batch(rows, IDS[kind][0], pa.int64())


def disk_store(disk: Disk, where: str = "/disk") -> LocalStore:
    return LocalStore(where, disk)


def load(uri: Any, **overrides: Any) -> RiskEngine:
    return RiskEngine.load(uri, now=lambda: NOW_NS, **overrides)


def reloaded(engine: RiskEngine, **overrides: Any) -> RiskEngine:
    """The engine after a round trip."""
    store = disk_store(Disk())
    engine.save(store)
    return load(store, **overrides)


def same(one: RiskEngine, other: RiskEngine) -> None:
    """Two engines give the same bits to every question."""
    check(other)
    assert other.digest() == one.digest()
    stats = one.stats()
    assert replace(other.stats(), bytes=0) == replace(stats, bytes=0)
    assert other._core.kind == one._core.kind
    if stats.clock is None:
        assert other.features().num_rows == 0
        return
    clock_ns, config = int(stats.clock.astype(np.int64)), one.config
    for at_ns in (clock_ns, clock_ns - config.lateness_ns, clock_ns + 1, clock_ns + config.window_ns, clock_ns - config.lateness_ns // 2):
        at = pa.scalar(min(max(at_ns, TIME_NS_MIN), TIME_NS_MAX), pa.timestamp("ns", "UTC"))
        table = one.features(at=at)
        assert other.features(at=at).equals(table)
        users = table["user_id"].combine_chunks()
        assert other.scores(users, at=at).equals(one.scores(users, at=at))


@contextmanager
def smallest_steps(part_rows: int = 1) -> Iterator[None]:
    """Copies go user by user, and each file has a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies_module, "_USERS_AT_ONCE", 1)
        patch.setattr(copies_module, "_ENTRIES_AT_ONCE", 1)
        patch.setattr(snapshot_module, "PART_ROWS", part_rows)
        yield


class TestRoundTrip:
    """What comes back."""

    @pytest.mark.parametrize("kind", IDS)
    @pytest.mark.parametrize(("shards", "later"), [(1, 3), (3, 1), (2, 7)])
    def test_everything_comes_back_and_goes_on_alike(self, kind: str, shards: int, later: int) -> None:
        engine = make(shards=shards)
        engine.ingest(batch(kind, some_rows(kind, 1)))
        assert max(engine.features()["count"].to_pylist()) > 200, "a ring of hundreds"
        restored = reloaded(engine, shards=later, users=99)
        same(engine, restored)
        clock_ns = engine._core.clock_ns
        assert clock_ns is not None
        for seed in range(2, 6):
            more = batch(kind, some_rows(kind, seed, 100, clock_ns + 30 * (seed - 2)))
            found, wanted = restored.ingest(more, scores=True), engine.ingest(more, scores=True)
            assert bits(outcomes(found)) == bits(outcomes(wanted))
            assert found.rejected == wanted.rejected
            assert found.rejects().equals(wanted.rejects())
            same(engine, restored)
        assert restored.expire() >= 0
        same(engine, restored)

    @pytest.mark.parametrize("base_ns", [TIME_NS_MIN, TIME_NS_MAX - 150, 0])
    @pytest.mark.parametrize("closed", ["both", "right"])
    def test_at_both_ends_of_time(self, base_ns: int, closed: str) -> None:
        engine = make(closed=closed)
        engine.ingest(batch("int64", some_rows("int64", 3, base_ns=base_ns)))
        same(engine, reloaded(engine))

    def test_times_as_far_apart_as_they_can_be(self) -> None:
        longest = f"{2**60}ns"
        engine = make(window=longest, lateness=longest)
        first = TIME_NS_MAX - 2**61
        engine.ingest(
            batch("int64", [(1, 2**53, first + 2**60), (1, -(2**53), TIME_NS_MAX), (1, 5, TIME_NS_MAX - 2**60), (2, 1, TIME_NS_MAX)])
        )
        assert engine.stats().transactions == 4
        same(engine, reloaded(engine))

    def test_an_engine_without_rows(self) -> None:
        engine = make()
        restored = reloaded(engine)
        same(engine, restored)
        assert restored.restored is not None
        assert (restored.restored.clock, restored.restored.users, restored.restored.transactions) == (None, 0, 0)
        restored.ingest(batch("string", some_rows("string", 1)))  # the kind of ids was still open
        engine.ingest(batch("string", some_rows("string", 1)))
        same(engine, restored)

    def test_an_engine_that_only_rejected(self) -> None:
        engine = make()
        assert engine.ingest(batch("int64", [(None, 1, 0), (1, None, 0), (1, 2**54, 0), (1, 1, None)])).accepted == 0
        same(engine, reloaded(engine))
        assert sum(reloaded(engine).stats().rejected.values()) == 4

    def test_an_engine_whose_users_have_all_gone(self) -> None:
        """Their slots are still in use."""
        engine = make()
        engine.ingest(batch("int64", [(1, 2**53, 0)] * 512 + [(1, 1, 0), (2, 5, 0)]))
        engine.ingest(batch("int64", [(3, 1, 1000)]))
        same(engine, reloaded(engine))
        assert reloaded(engine).stats().users == 1

    def test_large_sums(self) -> None:
        engine = make()
        engine.ingest(batch("int64", [(1, 2**53, 0)] * 512))
        restored = reloaded(engine)
        for each in (engine, restored):
            assert each.ingest(batch("int64", [(1, 1, 1), (1, -1, 1), (1, 1, 2)])).rejected == {"sum_overflow": 1}
        same(engine, restored)

    def test_rounded_amounts_and_totals(self) -> None:
        engine = make(decimals=1)
        engine.ingest(to_batch([(1, 0.12345, 0), (1, 0.1, 0), (2, float("nan"), 0)]))
        assert engine.stats().rounded == 1
        same(engine, reloaded(engine))

    def test_several_files(self) -> None:
        engine, disk = make(), Disk()
        engine.ingest(batch("string", some_rows("string", 4)))
        with smallest_steps():
            info = engine.save(disk_store(disk))
        parts = [path for path in disk.paths("/disk") if path.endswith(".parquet")]
        assert len(parts) == info.users == 7, "a user's transactions are in one file"
        same(engine, load(disk_store(disk)))

    @common
    @given(streams(), splits(), st.lists(st.tuples(st.booleans(), shard_counts()), min_size=1, max_size=4))
    def test_save_and_load_anywhere_do_not_matter(self, stream: Stream, lengths: list[int], acts: list[tuple[bool, int]]) -> None:
        engine, judge = new_engine(stream), Reference(stream.config)
        for turn, piece in enumerate(cut(stream.rows, lengths)):
            apply(engine, judge, stream, piece)
            moves, shards = acts[turn % len(acts)]
            if moves:
                store = disk_store(Disk())
                engine.save(store, position=turn)
                engine = RiskEngine.load(store, now=lambda: stream.wall_ns, shards=shards)
                assert engine.restored is not None and engine.restored.position == turn
                check(engine)
        same_state(engine, judge)


def nested(depth: int) -> list[Any]:
    """Lists in each other."""
    inner: list[Any] = []
    for _ in range(depth - 1):
        inner = [inner]
    return inner


def str_of_type(value: Any) -> str:
    """A short name of a test case: some of them have no others."""
    return type(value).__name__


class TestInfo:
    """What is known of a snapshot, and what may be asked for in loading it."""

    def test_what_is_told(self) -> None:
        engine, disk = make(), Disk()
        engine.ingest(batch("int64", [(1, 5, 7), (2, 5, 8), (1, 5, 9)]))
        info = engine.save(disk_store(disk), position={"offsets": [1, 2]})
        assert info.name == "snapshot-00000000000000000001"
        assert info.where == "/disk"
        assert info.position == {"offsets": [1, 2]}
        assert info.clock == np.datetime64(9, "ns")
        assert (info.users, info.transactions, info.version, info.passed_over) == (2, 3, 1, ())
        assert info.digest == engine.digest()
        assert info.created == np.datetime64(NOW_NS, "ns")

        assert info.bytes == sum(len(disk.file(path).data) for path in disk.paths("/disk"))
        assert load(disk_store(disk)).restored == info
        assert engine.restored is None

    @pytest.mark.parametrize(
        "position",
        [
            None,
            True,
            0,
            -(2**80),
            1.5,
            1e300,
            "",
            "né\U0001f600\ud800\0",
            [],
            {},
            [[1, [2.0]], {"a": {"b": None}}],
            {"": 0},
            "x" * 100_000,
            nested(100),
        ],
        ids=str_of_type,
    )
    def test_positions_come_back(self, position: Any) -> None:
        engine, store = make(), disk_store(Disk())
        assert engine.save(store, position=position).position == position
        restored = load(store).restored
        assert restored is not None
        assert restored.position == position
        assert type(restored.position) is type(position)

    @pytest.mark.parametrize(
        ("position", "text"),
        [
            ((1, 2), "would come back from JSON as"),
            ({1: 2}, "would come back from JSON as"),
            ({"a": (1,)}, "would come back from JSON as"),
            (float("nan"), "is not JSON"),
            ([float("inf")], "is not JSON"),
            (b"bytes", "is not JSON"),
            ({1, 2}, "is not JSON"),
            (np.int64(3), "is not JSON"),
            (10**5000, "is not JSON"),
            (nested(101), "100 deep"),
            ("x" * (1 << 24), "16,777,218 bytes"),
        ],
        ids=str_of_type,
    )
    def test_positions_that_json_does_not_keep_are_refused(self, position: Any, text: str) -> None:
        engine, disk = make(), Disk()
        with pytest.raises(ConfigError, match=text):
            engine.save(disk_store(disk), position=position)
        assert not disk.calls
        engine.save(disk_store(disk), position="another")

    def test_positions_without_end_are_refused(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for position, text in ((endless, "is not JSON|deep"), (deep, "100 deep")):
            with pytest.raises(ConfigError, match=text):
                make().save(disk_store(Disk()), position=position)
        while deep:  # freed one by one: all at once is as deep a recursion
            deep = deep[0]

    def test_a_position_is_the_one_there_was(self) -> None:
        """Changing it afterwards changes nothing, also while the snapshot is written."""
        engine, disk, position = make(), Disk(), {"offset": 1}
        disk.during = lambda call: position.update(offset=2)
        engine.save(disk_store(disk), position=position)
        restored = load(disk_store(disk)).restored
        assert restored is not None and restored.position == {"offset": 1}

    @pytest.mark.parametrize(
        ("overrides", "text"),
        [
            ({"window": "101ns"}, "window='101ns' contradicts"),
            ({"lateness": "51ns"}, "lateness='51ns' contradicts"),
            ({"closed": "right"}, "closed='right' contradicts"),
            ({"decimals": 1}, "decimals=1 contradicts"),
            ({"users": 2}, "users=2 is fewer than the 3"),
            ({"windows": "100ns"}, "windows: no such option"),
            ({"users": 0}, "users=0 must be"),
            ({"window": 100}, "has no unit"),
        ],
    )
    def test_options_that_contradict_are_refused(self, overrides: dict[str, Any], text: str) -> None:
        engine, store = make(), disk_store(Disk())
        engine.ingest(batch("int64", [(user, 5, 7) for user in (1, 2, 3)]))
        engine.save(store)
        with pytest.raises(ConfigError, match=text):
            load(store, **overrides)

    def test_other_options_are_taken(self) -> None:
        engine, store = make(max_jump="7s", time_unit="ms"), disk_store(Disk())
        engine.ingest(batch("int64", [(user, 5, 7) for user in (1, 2, 3)]))
        engine.save(store)
        saved = load(store, shards=2).config
        assert saved == engine.config
        given = {"users": 3, "shards": 1, "clock": "wall", "max_ahead": "1s", "max_jump": None, "time_unit": "s"}
        columns = {"user_id": "account", "amount": "value", "timestamp": "when"}
        same_options = {"window": "0.1us", "lateness": "50ns", "closed": "both", "decimals": 0}
        other = load(store, **given, **columns, **same_options)
        assert other.config == Config.of(**given, **columns, **same_options)
        assert other.digest() == engine.digest()

    def test_files_are_parquet_that_any_tool_reads(self, tmp_path: Path) -> None:
        engine, rows = make(), some_rows("string", 5)
        judge = Reference(engine.config)
        judge.ingest(rows)
        engine.ingest(batch("string", rows))
        with smallest_steps(part_rows=40):
            info = engine.save(tmp_path / "snapshots")
        table = pq.read_table(sorted((tmp_path / "snapshots" / info.name).glob("*.parquet")))
        assert table.schema.field("timestamp").type == pa.timestamp("ns", "UTC")
        assert table.schema.field("amount_units").type == pa.int64()
        found: dict[str, list[tuple[int, int]]] = {}
        for user, time_ns, units in zip(
            table["user_id"].to_pylist(), table["timestamp"].cast(pa.int64()).to_pylist(), table["amount_units"].to_pylist(), strict=True
        ):
            found.setdefault(user, []).append((time_ns, units))
        assert found == {user: judge.retained(user) for user in judge.users()}


Step = Callable[[], Any]


def save_with(engine: RiskEngine, steps: list[Step], position: Any = None) -> Disk:
    """Save user by user, and take one step before each call on the disk, until none are left."""
    disk, rest = Disk(), iter(steps)

    def one_step(call: str) -> None:
        for step in rest:
            step()
            return

    disk.during = one_step
    with smallest_steps():
        engine.start_save(disk_store(disk), position=position).result()
    disk.during = lambda call: None
    for step in rest:
        step()
    return disk


class TestOneInstant:
    """A snapshot is of the state when it was asked for, whatever happens while it is written; and writing it changes nothing."""

    def both(self, engine: RiskEngine, judge: Reference, stream: Stream, rows: Any) -> None:
        try:
            wanted = judge.ingest(rows, wall_ns=stream.wall_ns, single=stream.single)
        except CapacityError:
            with pytest.raises(CapacityError):
                engine.ingest(stream.batch(rows))
            return
        assert bits(outcomes(engine.ingest(stream.batch(rows), scores=True))) == bits(wanted)

    @settings(parent=common, max_examples=150)
    @given(streams(row_count_max=50), splits(), st.integers(0, 30), st.lists(st.sampled_from(("rows", "rows", "rows", "expire", "lookup"))))
    def test_whatever_happens_meanwhile(self, stream: Stream, lengths: list[int], before: int, acts: list[str]) -> None:
        engine, judge = new_engine(stream), Reference(stream.config)
        for piece in cut(stream.rows[:before], lengths):
            self.both(engine, judge, stream, piece)
        wanted = copy.deepcopy(judge)
        digest = engine.digest()
        pieces = list(cut(stream.rows[before:], lengths))
        waiting = iter(pieces)

        def step(act: str) -> None:
            if act == "expire":
                engine.expire()
            elif act == "lookup":
                engine.features()
            else:
                self.both(engine, judge, stream, next(waiting, []))

        disk = save_with(engine, [partial(step, act) for act in [*acts, *["rows"] * len(pieces)]])
        check(engine)
        same_state(engine, judge)
        restored = RiskEngine.load(disk_store(disk), now=lambda: stream.wall_ns)
        assert restored.digest() == digest
        same_state(restored, wanted)
        for piece in pieces:
            self.both(restored, wanted, stream, piece)
        same_state(restored, judge)

    def run(self, engine: RiskEngine, steps: list[Callable[[RiskEngine], Any]]) -> None:
        """The saved engine is the one before all steps; and the engine goes on like one that is not saved."""
        digest, before, plain = engine.digest(), reloaded(engine), reloaded(engine)
        assert before.digest() == digest
        disk = save_with(engine, [partial(step, engine) for step in steps])
        same(before, load(disk_store(disk)))
        for step in steps:
            step(plain)
        check(engine)
        same(plain, engine)

    def rows(self, *rows: UserRow) -> Callable[[RiskEngine], Any]:
        return lambda engine: engine.ingest(batch("int64", list(rows)), scores=True)

    def full(self, users: int = 12, **options: Any) -> RiskEngine:
        engine = make(users=users, **options)
        engine.ingest(batch("int64", [(user, user, user) for user in range(users)]))
        return engine

    def test_lines_grow_into_rings(self) -> None:
        self.run(self.full(), [self.rows((user, 1, 12), (user, 2, 12)) for user in (11, 0, 5, 11, 0, 5, 1, 2) for _ in range(6)])

    def test_rings_grow(self) -> None:
        engine = self.full()
        engine.ingest(batch("int64", [(user, 7, 12) for user in range(12) for _ in range(9)]))
        self.run(engine, [self.rows(*[(user, 1, 13)] * 40) for user in (11, 0, 5, 1, 2)])

    @pytest.mark.parametrize("shards", [1, 2])
    def test_single_rows(self, shards: int) -> None:
        engine = self.full(shards=shards)

        def add(user: int) -> Callable[[RiskEngine], Any]:
            return lambda engine: engine.add(user, 3, pa.scalar(20, pa.timestamp("ns")))

        self.run(engine, [add(user) for user in (11, 0, 11, 5, 6, 7, 8, 11, 0)])

    def test_everybody_leaves(self) -> None:
        self.run(self.full(), [self.rows((50, 1, 1000)), lambda engine: engine.expire(), self.rows((51, 1, 1001))])

    def test_some_leave_and_others_take_their_slots(self) -> None:
        def come(number: int) -> Callable[[RiskEngine], Any]:
            return self.rows((100 + number, 1, 151 + number))

        self.run(self.full(), [come(number) for number in range(12)])

    def test_the_clock_leaps_while_users_wait_to_be_copied(self) -> None:
        """The retention of the copy is that of its own instant: users that have expired since are in it."""
        self.run(self.full(), [self.rows((0, 1, 100_000)), self.rows((1, 1, 100_001))])

    def test_what_is_exactly_as_old_as_the_retention(self) -> None:
        engine = self.full()
        engine.ingest(batch("int64", [(11, 1, 150)]))
        assert engine.stats().transactions == 13
        self.run(engine, [self.rows((0, 1, 151)), self.rows((1, 1, 152))])

    def test_users_whose_transactions_have_expired_are_left_out(self) -> None:
        engine = make(shards=1)
        engine.ingest(batch("int64", [(user, 1, 0) for user in range(12)]))
        engine.ingest(batch("int64", [(0, 1, 150)]))
        engine.ingest(batch("int64", [(0, 1, 152)]))
        assert (engine._core.shards.users, len(engine)) == (12, 1), "their slots are still in use, the last ones among them"
        self.run(engine, [])

    def test_rows_put_among_older_ones(self) -> None:
        engine = self.full()
        engine.ingest(batch("int64", [(user, 7, 60) for user in range(12) for _ in range(9)]))
        self.run(engine, [self.rows(*[(user, -1, 11) for user in range(12)]), self.rows(*[(user, -1, 10) for user in range(12)])])

    def test_full_engines_refuse_what_they_would(self) -> None:
        def refused(engine: RiskEngine) -> None:
            with pytest.raises(CapacityError):
                engine.ingest(batch("int64", [(user, 1, 14) for user in range(10, 20)]))

        self.run(self.full(), [refused, refused, self.rows((3, 3, 14))])

    def test_an_engine_without_rows_gets_some(self) -> None:
        self.run(make(), [self.rows((1, 1, 1)), self.rows((2, 1, 1))])

    def test_memory_follows_activity_again_afterwards(self) -> None:
        """Expiry waits for the copy, not longer."""
        engine = self.full(users=200, shards=1)
        save_with(engine, [partial(self.rows((user, 1, 1000 + user)), engine) for user in range(100, 110)])
        for step in range(200):
            engine.ingest(batch("int64", [(7, 1, 3000 + 10 * step)]))
        assert engine._core.shards.users == 1

    def test_expiry_waits_for_the_copy(self) -> None:
        engine = self.full(users=200, shards=1)
        users = []
        disk = Disk()
        disk.during = lambda call: users.append(
            (engine.ingest(batch("int64", [(7, 1, 1000 + 50 * len(users))])), engine._core.shards.users)[1]
        )
        with smallest_steps(part_rows=1000):
            engine.save(disk_store(disk))
        assert len(users) > 10
        assert set(users[:5]) == {200}

    def test_one_snapshot_at_a_time(self) -> None:
        engine, disk = self.full(), Disk()

        def another(call: str) -> None:
            with pytest.raises(EngineError, match="another snapshot"):
                engine.start_save(disk_store(Disk()))

        disk.during = another
        info = engine.save(disk_store(disk))
        disk.during = lambda call: None
        assert load(disk_store(disk)).restored == info

    def test_a_copy_that_was_interrupted_is_not_written(self) -> None:
        """Memory is short, or Ctrl-C comes, while a user who is about to change is copied: the snapshot would lack that user."""
        engine, disk = self.full(), Disk()
        engine.save(disk_store(disk), position="old")

        def interrupt(call: str) -> None:
            disk.during = lambda call: None
            for shard in engine._core.shards:
                assert shard.copy is not None
                reading = shard.copy._read
                shard.copy._read = lambda slots: 1 // 0  # type: ignore[assignment, return-value]
                with pytest.raises(ZeroDivisionError):
                    shard.copy.before(np.arange(shard.slots_used, dtype=np.int32))
                shard.copy._read = reading

        disk.during = interrupt
        with pytest.raises(SnapshotError, match="interrupted"):
            engine.save(disk_store(disk), position="new")
        restored = load(disk_store(disk)).restored
        assert restored is not None and restored.position == "old"
        engine.save(disk_store(disk), position="new")

    def test_without_a_thread_nothing_is_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, store = self.full(), disk_store(Disk())

        class NoThreads:
            def __init__(self, *_: Any, **__: Any) -> None:
                raise RuntimeError("can't start new thread")

        monkeypatch.setattr("engine.saving.ThreadPoolExecutor", NoThreads)
        with pytest.raises(RuntimeError, match="new thread"):
            engine.save(store)
        assert all(shard.copy is None for shard in engine._core.shards)
        monkeypatch.undo()
        engine.save(store)

    def test_closing_waits_for_the_snapshot(self) -> None:
        engine, disk = self.full(), Disk()
        saving = engine.start_save(disk_store(disk))
        engine.close()
        assert saving.done()
        assert load(disk_store(disk)).restored == saving.result()
        with pytest.raises(EngineError, match="closed"):
            engine.save(disk_store(disk))
