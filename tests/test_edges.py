"""Cases worked by hand at the edges that chance seldom meets: sums beyond int64, ids with one hash, full index lines, rings that wrap."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from engine import CapacityError, RiskEngine, SchemaError
from engine.columns import Columns, Ids, ids_of
from engine.config import TIME_NS_MAX, TIME_NS_MIN, Config
from engine.index import random_keys, split_rows
from engine.kernels import KERNELS
from engine.reference import Reference, plain_features
from engine.shard import Shard
from tests.strategies import instant, to_batch

MOST = 2**53


def make(**options: Any) -> RiskEngine:
    """An engine in simulated time whose amounts are whole units; windows are 10 ns."""
    return RiskEngine("10ns", **({"users": 100, "max_ahead": None, "decimals": 0, "shards": 1} | options))


def put(engine: RiskEngine, *rows: tuple[Any, int, int]) -> list[float | str]:
    """Apply rows as one batch; for each its score, or its reason."""
    result = engine.ingest(to_batch(rows, pa.array([row[0] for row in rows]).type, pa.int64()), scores=True)
    reasons = iter(result.rejects().column("reason").to_pylist())
    for shard in engine._core.shards:
        shard.check(engine._core.kind)
    return [next(reasons) if score is None else score for score in result.scores.to_pylist()]


def same_as_reference(rows: list[tuple[Any, int, int]], **options: Any) -> RiskEngine:
    """An engine after these rows, each a batch of its own, having compared every score and the digest."""
    engine, judge = make(**options), Reference(make(**options).config)
    for row in rows:
        [wanted] = judge.ingest([row])
        assert put(engine, row) == [wanted.score if wanted.reason is None else wanted.reason], row
        assert engine.digest() == judge.digest(), row
    return engine


class TestLargeSums:
    """Sums near 2**62, and those of windows, which may be twice as large."""

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_window_sum_beyond_int64(self, sign: int) -> None:
        # The sum retained goes from -2**62 to +2**62, so that of the last 1024 alone is 2**63: one more than int64 holds.
        engine = make(lateness="100ns")
        scores = put(engine, *[(7, -sign * MOST, 0)] * 512, *[(7, sign * MOST, 11)] * 1024)
        assert scores == [float(-sign * MOST)] * 512 + [float(sign * MOST)] * 1024
        [features] = engine.features([7]).to_pylist()
        assert (features["count"], features["sum"], features["score"]) == (1024, Decimal(sign * 2**63), float(sign * MOST))
        assert engine.score(7) == sign * float(MOST)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_low_halves_carry(self, sign: int) -> None:
        # As above, with amounts whose low 32 bits are all ones: 1024 of them make 1023 * 2**32 and more.
        engine = make(lateness="100ns")
        put(engine, *[(7, -sign * MOST, 0)] * 512, *[(7, sign * (MOST - 1), 11)] * 1024)
        [features] = engine.features([7]).to_pylist()
        assert (features["sum"], features["score"]) == (Decimal(sign * 1024 * (MOST - 1)), float(sign * (MOST - 1)))

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_limit_of_sums(self, sign: int) -> None:
        # 512 amounts of 2**53 are 2**62, which is the most; what brings the sum back is taken, and then there is room again.
        engine = make(lateness="0ns")
        assert put(engine, *[(7, sign * MOST, 0)] * 511) == [float(sign * MOST)] * 511
        tail = put(engine, (7, sign * MOST, 0), (7, sign, 0), (7, -sign, 0), (7, sign, 0), (7, sign, 0))
        assert [isinstance(answer, float) for answer in tail] == [True, False, True, True, False]
        # One ns after the first 512 have left they no longer count, although they still lie in the ring.
        assert put(engine, (7, sign * MOST, 10), (7, sign * MOST, 11)) == ["sum_overflow", float(sign * MOST)]

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_limit_of_sums_one_row_at_a_time(self, sign: int) -> None:
        engine = make(lateness="0ns")
        for _ in range(512):
            assert engine.add(7, sign * MOST, instant(0)) == sign * MOST
        for units, taken in ((sign, False), (-sign, True), (sign, True), (sign, False)):
            assert math.isnan(engine.add(7, units, instant(0))) == (not taken)
            assert not math.isnan(engine.add(8, units, instant(0)))
        assert engine.stats().rejected["sum_overflow"] == 2

    def test_ties_of_means_go_to_the_even(self) -> None:
        # (2**52 + 2**52 + 1) / 2 = 2**52 + 1/2 -> 2**52; (2**52 + 2**52 + 3) / 2 = 2**52 + 3/2 -> 2**52 + 2
        for more, wanted in ((1, 2.0**52), (3, 2.0**52 + 2)):
            for sign in (1, -1):
                assert put(make(), (1, sign * 2**52, 0), (1, sign * (2**52 + more), 0))[1] == sign * wanted


class TestOneHash:
    """Ids are compared whole: those that share a hash are different users."""

    @pytest.mark.parametrize(
        "users",
        [
            [5, 7, -5, 0, 2**63 - 1],
            ["ab", "abc", "a", "", "abd", "b"],
            ["12345678", "12345679", "02345678", "1234567", "123456789", "1234567890123456", "0234567890123456"],
            [b"\0", b"\0\0", b"", b"\0\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\1"],
        ],
    )
    def test_ids_of_one_hash(self, users: list[Any]) -> None:
        shard = Shard(Config.of(users=16, shards=1), 16, random_keys(1))
        ids = ids_of(pa.array(users), "user_id")
        rows, same = np.arange(len(users), dtype=np.int32), np.full(len(users), 2**40 + 7, np.uint64)
        assert shard.find(ids, same, rows).tolist() == [-1] * len(users)
        slots, done = shard.reserve(ids, same, rows)
        assert done == len(users)
        assert slots.tolist() == list(range(len(users)))
        for order in (rows, rows[::-1].copy()):
            assert shard.find(ids, same, order).tolist() == order.tolist()


class TestFullLines:
    """Users beyond their home line in the index."""

    @staticmethod
    def of_lines(shard: Shard, kind: str, draw: np.random.Generator | None, *homes: tuple[int, int]) -> tuple[Ids, Any, Any]:
        """Ids, hashes and rows of users in 7 lines of 16: of each of these lines so many; in this order or a random one."""
        lines = 7
        assert int(shard.index.table.size) == 16 * lines
        names = pa.array([f"user {number}" if kind == "string" else number for number in range(2_000)])  # type: ignore[misc]
        hashes, _ = split_rows(ids_of(names, "user_id"), np.zeros(2_000, np.uint8), shard.index.keys, 1)
        home = ((hashes >> np.uint64(32)).astype(np.int64) * lines) >> 32
        chosen = np.concatenate([np.flatnonzero(home == line)[:count] for line, count in homes])
        chosen = chosen if draw is None else draw.permutation(chosen)
        ids = ids_of(names.take(pa.array(chosen)), "user_id")
        hashes, (rows,) = split_rows(ids, np.zeros(len(chosen), np.uint8), shard.index.keys, 1)
        return ids, hashes, rows

    @classmethod
    def crowd(cls, shard: Shard, kind: str, draw: np.random.Generator) -> tuple[Ids, Any, Any]:
        """Of 52 users 40 are at home in the last line, which wraps around, 12 in the first."""
        return cls.of_lines(shard, kind, draw, (6, 40), (0, 12))

    @pytest.mark.parametrize("kind", ["int64", "string"])
    def test_nobody_is_pulled_back_beyond_home(self, kind: str) -> None:
        shard = Shard(Config.of(users=64, shards=1), 64, random_keys(5))
        ids, hashes, rows = self.of_lines(shard, kind, None, (2, 16), (3, 17))  # the last one is in line 4
        slots, _ = shard.reserve(ids, hashes, rows)
        shard.release(slots[:1], 1, kind)
        assert shard.find(ids, hashes, rows).tolist() == [-1, *slots[1:].tolist()]
        shard.index.check(shard.memory, kind)

    @pytest.mark.parametrize("kind", ["int64", "string"])
    def test_displaced_users_have_scores(self, kind: str) -> None:
        shard = Shard(Config.of(users=64, shards=1, decimals=0), 64, random_keys(5))
        ids, hashes, rows = self.crowd(shard, kind, np.random.default_rng(0))
        count = len(ids)
        for turn in (1, 3):
            none, times = np.zeros(count, np.uint8), np.full(count, turn)
            scores = np.zeros(count)
            shard.take(Columns(None, ids, times, turn * np.arange(count), none, none.copy()), hashes, times, 3 * count, rows, None, scores)
            assert scores.tolist() == [(turn + 1) / 2 * number for number in range(count)]
            shard.check(kind)
            found = np.full(count, np.nan)
            shard.scores(ids, hashes, rows, turn, found)
            assert found.tolist() == scores.tolist()
            for row in range(count):
                value = 0 if kind == "string" else int(ids.values[row])
                data = ids.data[ids.offsets[row] : ids.offsets[row + 1]] if kind == "string" else ids.data
                assert shard.score(value, data, kind == "string", int(hashes[row]), turn) == scores[row]

    @pytest.mark.parametrize("kind", ["int64", "string"])
    @pytest.mark.parametrize("seed", range(6))
    def test_removals_pull_displaced_users_back(self, kind: str, seed: int) -> None:
        shard, draw = Shard(Config.of(users=64, shards=1), 64, random_keys(5)), np.random.default_rng(seed)
        ids, hashes, rows = self.crowd(shard, kind, draw)
        slots, done = shard.reserve(ids, hashes, rows)
        assert done == len(rows)
        shard.index.check(shard.memory, kind)
        held = np.ones(len(rows), np.bool_)
        for row in draw.permutation(len(rows)).tolist():
            shard.release(slots[row : row + 1], 1, kind)
            held[row] = False
            assert shard.find(ids, hashes, rows).tolist() == np.where(held, slots, -1).tolist()
            shard.index.check(shard.memory, kind)
        assert not shard.index.table.any()


class TestWindows:
    """Instants at which something enters or leaves."""

    @pytest.mark.parametrize(("enters", "zero_at"), [(10, 21), (11, 22), (12, 11)])
    def test_zero_at_when_one_enters_as_the_last_leaves(self, enters: int, zero_at: int) -> None:
        # Seen from 0 ns: the transaction of 0 ns counts through 10 ns; one of 11 ns keeps the window from ever being empty before 22 ns.
        for more in ([], [(1, 1, -20), (1, 1, -20), (1, 1, -19)]):  # in the slot line, and in a ring
            engine = make(lateness="100ns")
            put(engine, *more, (1, 5, 0), (1, 7, enters))
            features = engine.features([1], at=instant(0))
            times = [features[name].cast(pa.int64())[0].as_py() for name in ("newest", "valid_until", "zero_at")]
            assert times == [0, min(10, enters - 1), zero_at]

    def test_the_newest_exactly_on_the_edge_counts(self) -> None:
        for more in ([], [(1, 1, -20), (1, 1, -20), (1, 1, -20), (1, 1, -19)]):
            engine = make()
            put(engine, *more, (1, 5, 0))
            assert [engine.score(1, at=instant(at)) for at in (0, 10, 11)] == [5.0, 5.0, 0.0]

    def test_scores_of_a_busy_user_decay_entry_by_entry(self) -> None:
        # At 16 ns only the last three of 0, 2, 4, 6, 8, 10 ns count: 8 + 16 + 32.
        engine = make()
        put(engine, *[(1, 1 << number, 2 * number) for number in range(6)])
        assert [engine.score(1, at=instant(at)) for at in (9, 10, 11, 16, 20, 21)] == [31 / 5, 63 / 6, 62 / 5, 56 / 3, 32.0, 0.0]

    def test_the_oldest_instant_shows_the_oldest_retained_transaction(self) -> None:
        # With a window and a lateness of 10 ns, what is of 0 ns is retained at 20 ns, and gone at 21 ns.
        engine = make()
        put(engine, (1, 5, 0), (2, 6, 0), (1, 7, 20))
        explanation = engine.explain(1, at=instant(10))
        assert (explanation.count, explanation.sum, explanation.score) == (1, Decimal(5), 5.0)
        assert 2 in engine
        put(engine, (1, 8, 21))
        assert 2 not in engine

    def test_guards_at_their_edges(self) -> None:
        engine = make(lateness="3ns", max_jump="5ns")
        assert put(engine, (1, 1, 0), (1, 1, 6), (1, 1, 5), (1, 1, 11), (1, 1, 10)) == [1.0, "jump", 1.0, "jump", 1.0]
        assert put(engine, (1, 1, 6), (1, 1, 7)) == ["late", 1.0]

    def test_rounded_counts_rows_applied(self) -> None:
        engine = make(lateness="0ns")
        rows = [(1, 0.5, 5), (1, 0.5, 4), (1, 1.0, 5), (None, 0.5, 5)]
        assert engine.ingest(to_batch(rows)).rounded == 1
        assert engine.stats().rounded == 1


class TestRings:
    """LEFT, wrap and reuse of rings of more than two entries."""

    def test_an_entry_exactly_on_the_edge_stays(self) -> None:
        # LEFT passes by 1, 2, 3 entries at a time; each time the first that stays is exactly 10 ns old.
        times = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 17, 18, 19, 26, 27, 28, 29, 36, 37, 47]
        rows = [(1, 2**number, time) for number, time in enumerate(times)]
        rows += [(2, 1, 0), (2, 3, 10), (2, 5, 20), (2, 7, 31)]  # never more than two: they stay in the slot line
        same_as_reference(rows, lateness="100ns")
        same_as_reference(rows[-4:], lateness="0ns")

    def test_late_rows_on_both_sides_of_the_newest_window(self) -> None:
        rows = [(1, 1, 20), (1, 2, 21), (1, 4, 25), (1, 8, 30), (1, 16, 32)]  # the newest window is [22, 32], LEFT is at 25
        rows += [(1, 32, 21), (1, 64, 20), (1, 128, 3), (1, 256, 22), (1, 512, 22), (1, 1024, 31), (1, 2048, 32), (1, 4096, 33)]
        engine = same_as_reference(rows, lateness="30ns")
        assert [engine.score(1, at=instant(at)) for at in (21, 22, 32)] == [
            (1 + 64 + 2 + 32) / 4,
            (1 + 64 + 2 + 32 + 256 + 512) / 6,
            (256 + 512 + 4 + 8 + 1024 + 16 + 2048) / 7,
        ]

    def test_a_ring_that_was_emptied_begins_anew(self) -> None:
        # The fifth row finds all four entries of a full ring expired: it goes back into the line alone. So does the last of two.
        rows = [(1, 1 << number, time) for number, time in enumerate([0, 1, 2, 3, 100, 101, 102, 111, 112, 200, 205, 211, 222])]
        same_as_reference(rows, lateness="0ns")

    def test_a_ring_wraps_where_it_drops_its_oldest(self) -> None:
        rows = [(1, 1 << (number % 40), 4 * number) for number in range(40)]
        rows += [(2, 1 << (number % 40), 157 + 3 * number) for number in range(40)]
        same_as_reference(rows, lateness="0ns")

    def test_rings_given_back_are_used_again_by_one_user_each(self) -> None:
        engine, judge = make(lateness="0ns"), Reference(make(lateness="0ns").config)
        touched = []
        for turn in range(8):
            rows = [(user, 1 << number, 100 * turn + number) for number in range(9) for user in range(4 * turn, 4 * turn + 4)]
            wanted = [row.score for row in judge.ingest(rows)]
            assert put(engine, *rows) == wanted
            engine.expire()
            assert engine.digest() == judge.digest()
            touched.append(engine.stats().bytes)
        assert touched[-1] == touched[2]

    def test_the_digest_does_not_depend_on_what_has_been_freed(self) -> None:
        rows = [("a", 1, 0), ("a", 2, 6), ("a", 3, 11), ("a", 4, 12), ("a", 5, 13), ("b", 9, 17)]
        engine, judge = make(lateness="0ns"), Reference(make(lateness="0ns").config)
        put(engine, *rows)
        judge.ingest(rows)
        assert engine.digest() == judge.digest()
        engine.expire()
        assert engine.digest() == judge.digest()


class TestEveryOrder:
    """Every way in which a user's rows can come in order, late, or at the same time, in the slot line and in rings."""

    @pytest.mark.parametrize(("step", "delays"), [(0, (0, 1, 2)), (4, (0, 4, 11, 15)), (7, (0, 7, 10, 15)), (13, (0, 13, 14, 15))])
    def test_rows_in_any_order(self, step: int, delays: tuple[int, ...]) -> None:
        # The window is 10 ns, the lateness 15 ns. Each user's n-th row has one of these delays behind the clock, which goes on by `step`.
        # Amounts are powers of two, so that a sum says which rows are in it.
        engine, judge = make(lateness="15ns", users=5_000, time_unit="ns"), Reference(make(lateness="15ns", users=5_000).config)
        users = np.arange(len(delays) ** (6 if KERNELS else 4))
        for number in range(7 if KERNELS else 5):
            clock = 100 + number * step
            times = clock - np.array(delays)[users // len(delays) ** number % len(delays)]
            times[-1] = clock  # so that the clock is there from the first row on
            order = np.concatenate([users[-1:], users[:-1]])
            columns = {"user_id": order, "amount": np.full(len(users), 1 << number), "timestamp": times[order]}
            found = engine.ingest(columns, scores=True).scores.to_pylist()
            assert found == [row.score for row in judge.ingest(list(zip(*(column.tolist() for column in columns.values()), strict=True)))]
            assert engine.digest() == judge.digest()
            for at_ns in (clock - 15, clock - 8, clock - 1, clock, clock + 2, clock + 10):
                wanted = [judge.score(user, at_ns) for user in users.tolist()]
                assert engine.scores(users, at=instant(at_ns)).tolist() == wanted
            if number % 2:
                engine.expire()
            for shard in engine._core.shards:
                shard.check("int64")
        assert plain_features(engine.features(), 0) == [(user, judge.features(user)) for user in judge.users()]

    @pytest.mark.parametrize("end", [TIME_NS_MIN, TIME_NS_MAX])
    @pytest.mark.parametrize("closed", ["both", "right"])
    @pytest.mark.parametrize("seed", range(6))
    def test_at_both_ends_of_time(self, end: int, closed: str, seed: int) -> None:
        # Where the window, the lateness or the next instant would lie beyond what 64 bits can say.
        draw = np.random.default_rng(seed)
        away = np.sort(draw.integers(0, 30, 40))
        times = [TIME_NS_MIN + int(step) for step in away] if end == TIME_NS_MIN else [TIME_NS_MAX - int(step) for step in away[::-1]]
        late = draw.integers(0, 4, 40).tolist()
        rows = [
            (int(draw.integers(0, 3)), 1 << number, max(time - back, TIME_NS_MIN))
            for number, (time, back) in enumerate(zip(times, late, strict=True))
        ]
        engine = same_as_reference(rows, lateness="5ns", closed=closed)
        judge = Reference(engine.config)
        judge.ingest(rows)
        for shift in range(-5, 40):
            at_ns = min(max(judge.clock_ns + shift, TIME_NS_MIN), TIME_NS_MAX)
            found = plain_features(engine.features([0, 1, 2], at=instant(at_ns)), 0)
            assert found == [(user, judge.features(user, at_ns)) for user in range(3)]
            assert engine.scores([0, 1, 2], at=instant(at_ns)).tolist() == [judge.score(user, at_ns) for user in range(3)]

    @pytest.mark.parametrize("lateness", ["0ns", "7ns", "100ns"])
    @pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 41, 64, 65, 256, 257])
    def test_a_full_ring_makes_room(self, length: int, lateness: str) -> None:
        # A ring is full at 4, 8, 12, ... entries. All of it, all but one, two, three, or none has expired when the next row comes,
        # which is in order, or late: behind the newest, in front of all, or between them.
        engine = make(lateness=lateness, users=1_000, time_unit="ns")
        judge = Reference(engine.config)
        retention = engine.config.retention_ns
        user = 0
        rows: list[list[tuple[int, int, int]]] = [[], [], []]
        for staying in sorted({0, 1, 2, 3, length // 2, length}):
            for late in (0, 1, min(engine.config.lateness_ns, 6), engine.config.lateness_ns):
                user += 1
                clock = 1_000 + retention
                rows[0] += [(user, 1 + number, 999) for number in range(length - staying)]
                rows[1] += [(user, 5 + number, 1_000 + number % 3) for number in range(staying)]
                rows[2] += [(user, 1_000, clock - late), (user, 2_000, clock), (user, 3_000, clock - late)]
        rows[1].sort(key=lambda row: row[2])
        rows[2].insert(0, (0, 1, 1_000 + retention))
        for batch in rows:
            assert put(engine, *batch) == [row.score if row.reason is None else row.reason for row in judge.ingest(batch)]
            assert engine.digest() == judge.digest()
        assert plain_features(engine.features(), 0) == [(user, judge.features(user)) for user in judge.users()]


class TestIds:
    """The bytes of ids: freed, used again, compacted."""

    def test_bytes_of_ids_are_used_again(self) -> None:
        engine = make(lateness="0ns", users=8)
        touched = []
        for turn in range(8):
            users = [f"{'x' * length}{turn}" for length in (0, 3, 11, 12, 40, 510, 520, 3000)]
            put(engine, *[(user, 1, 100 * turn) for user in users])
            assert engine.features()["user_id"].to_pylist() == sorted(users)
            assert engine.scores(users).tolist() == [1.0] * 8
            touched.append(engine.stats().bytes)
        assert touched[-1] == touched[1]

    def test_compaction(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.index.COMPACT_FROM_UNITS", 1)
        engine = make(lateness="0ns")
        for turn in range(6):
            users = [f"{'y' * (number % 20)}{turn}-{number}" for number in range(60)]
            put(engine, *[(user, 1, 100 * turn) for user in users], *[(user, 2, 100 * turn + 11) for user in users[::5]])
            engine.expire()
            for shard in engine._core.shards:
                shard.check("string")
            assert engine.features()["user_id"].to_pylist() == sorted(users[::5])
            assert engine.scores(users).tolist() == [2.0 if number % 5 == 0 else 0.0 for number in range(60)]
        assert put(engine, ("new", 5, 700), ("newer", 7, 701)) == [5.0, 7.0]
        assert engine.features()["user_id"].to_pylist() == ["new", "newer"]

    def test_lookups_longer_than_their_stages_reach(self) -> None:
        # Rows are asked for 24, 48 and 72 rows ahead of their answer; known users, unknown ones and nulls take turns.
        for users in ([1, 2, None, 3, None, 1, 2], ["a", "bb", None, "", None, "a", "bb"]):
            known = [user for user in users[:4] if user is not None]
            asked = (users + ([4, -5] if isinstance(users[0], int) else ["c", "b" * 20])) * 20
            scores = {**{user: 10.0 + number for number, user in enumerate(known)}, None: None}
            for shards in (1, 2):
                engine = make(shards=shards)
                put(engine, *[(user, 10 + number, 0) for number, user in enumerate(known)])
                for count in (0, 1, 23, 24, 25, 71, 72, 73, len(asked)):
                    wanted = [scores.get(user, 0.0) for user in asked[:count]]
                    assert engine.scores(pa.array(asked[:count], pa.array(users).type)).to_pylist() == wanted


class TestSeats:
    """Full engines: who keeps a place until when."""

    def test_a_seat_is_kept_through_the_last_instant(self) -> None:
        # With a window of 10 ns and no lateness the user of 0 ns is retained at 10 ns, and gone at 11 ns.
        for at, fits in ((10, False), (11, True)):
            for before in (0, 1):
                engine = make(users=1, lateness="0ns")
                rows = [("a", 1, 0), ("b", 2, at)]
                if before:
                    put(engine, rows[0])
                if fits:
                    assert put(engine, *rows[before:])[-1] == 2.0
                    assert engine.features()["user_id"].to_pylist() == ["b"]
                else:
                    digest = engine.digest()
                    with pytest.raises(CapacityError, match="2 users"):
                        put(engine, *rows[before:])
                    assert engine.digest() == digest
                    assert engine.stats().rows == before
                    assert put(engine, ("a", 3, 5)) == [2.0 if before else 3.0]

    @pytest.mark.parametrize("shards", [1, 2])
    def test_users_of_a_refused_batch_keep_what_they_had(self, shards: int) -> None:
        engine = make(users=3, shards=shards)
        put(engine, ("a", 1, 0), ("b", 2, 0))
        digest = engine.digest()
        with pytest.raises(CapacityError, match="4 users"):
            put(engine, ("a", 5, 1), ("c", 1, 1), ("b", 7, 1), ("d", 1, 1))
        assert engine.digest() == digest
        assert put(engine, ("a", 3, 1), ("b", 4, 1), ("c", 5, 1)) == [2.0, 3.0, 5.0]

    def test_the_last_seat_can_be_taken(self) -> None:
        engine = make(users=3, shards=2)
        assert put(engine, ("a", 1, 0), ("b", 1, 0)) == [1.0, 1.0]
        assert put(engine, ("c", 1, 0), ("a", 3, 0)) == [1.0, 2.0]
        with pytest.raises(CapacityError):
            put(engine, ("d", 1, 0))
        assert put(engine, ("b", 2, 1)) == [1.5]

    def test_users_of_all_pieces_of_a_refused_table_are_forgotten(self) -> None:
        engine = make(users=2)
        pieces = [to_batch([(user, 1, 0)], pa.string(), pa.int64()) for user in ("a", "b", "c")]
        with pytest.raises(CapacityError):
            engine.ingest(pa.Table.from_batches(pieces))
        assert engine.stats().bytes == make(users=2).stats().bytes + 65 * 2 + 8 * 2  # touched, but free
        for shard in engine._core.shards:
            shard.check("string")
        assert put(engine, ("d", 1, 0), ("e", 1, 0)) == [1.0, 1.0]

    def test_a_sum_overflow_moves_the_clock_also_alone(self) -> None:
        engine = make(lateness="0ns")
        put(engine, *[(7, MOST, 0)] * 512)
        assert put(engine, (7, 1, 5)) == ["sum_overflow"]
        assert put(engine, (8, 1, 4)) == ["late"]


class TestArrival:
    """`max_ahead` measured from when each row arrived, whatever the clock on the wall says now."""

    OPTIONS: ClassVar[dict[str, Any]] = {"users": 9, "time_unit": "ns", "max_ahead": "5ns"}

    def test_rows_are_judged_as_if_each_had_come_alone_at_its_time(self) -> None:
        choose = np.random.default_rng(7)
        arrival_ns = np.cumsum(choose.integers(0, 4, 200))
        time_ns = arrival_ns + choose.integers(-3, 12, 200)
        users, amounts = choose.integers(0, 4, 200), choose.integers(1, 9, 200)
        rows = {"user_id": users, "amount": amounts, "timestamp": time_ns}
        whole = RiskEngine(**self.OPTIONS, now=lambda: 0)
        result = whole.ingest(rows, arrival=arrival_ns)
        wall = [0]
        judge = Reference(Config.of(**self.OPTIONS))
        single = RiskEngine(**self.OPTIONS, now=lambda: wall[0])
        wanted = []
        for row, wall[0] in enumerate(arrival_ns.tolist()):
            one = (int(users[row]), int(amounts[row]), int(time_ns[row]))
            wanted += [each.reason for each in judge.ingest([one], wall_ns=wall[0])]
            single.add(*one)
        assert result.rejected == {"future": wanted.count("future")}
        assert 50 < wanted.count("future") < 150
        assert whole.digest() == single.digest() == judge.digest()

    @pytest.mark.parametrize("limit_ns", [TIME_NS_MIN, TIME_NS_MAX, -(2**63)])
    def test_arrivals_at_the_ends_of_time(self, limit_ns: int) -> None:
        engine = RiskEngine(**self.OPTIONS)
        times = [TIME_NS_MIN, max(limit_ns, TIME_NS_MIN), min(max(limit_ns + 6, TIME_NS_MIN), TIME_NS_MAX)]
        rows = {"user_id": [1, 2, 3], "amount": [1, 1, 1], "timestamp": times}
        result = engine.ingest(rows, arrival=np.full(3, limit_ns))
        assert result.rejected.get("future", 0) == sum(time_ns > limit_ns + 5 for time_ns in times)

    @pytest.mark.parametrize("unit", ["s", "ms", "ns"])
    def test_units_of_time(self, unit: str) -> None:
        rows = {"user_id": [1, 2], "amount": [1, 1], "timestamp": [1_000_000_005, 1_000_000_006]}
        second = {"s": 1, "ms": 1000, "ns": 10**9}[unit]
        arrow = pa.chunked_array([pa.array([second], pa.timestamp(unit))] * 2)
        for arrival in (arrow, arrow.combine_chunks(), np.full(2, second, f"datetime64[{unit}]")):
            assert RiskEngine(**self.OPTIONS).ingest(rows, arrival=arrival).rejected == {"future": 1}

    @pytest.mark.parametrize("arrival", [[1], [1, None], [1.0, 2.0], ["a", "b"], 5, pa.array([2**62, 2**62], pa.timestamp("s"))])
    def test_others_are_refused_and_nothing_is_applied(self, arrival: Any) -> None:
        engine = RiskEngine(**self.OPTIONS)
        with pytest.raises(SchemaError, match="arrival must be 2 instants"):
            engine.ingest({"user_id": [1, 2], "amount": [1, 1], "timestamp": [1, 1]}, arrival=arrival)
        assert len(engine) == 0
