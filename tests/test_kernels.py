"""Kernels against plain loops: exact quotients, saturating times, hashing, the split into shards, the index under churn, rings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import Columns, ids_of
from engine.config import TIME_NS_MAX, TIME_NS_MIN, Config
from engine.index import random_keys, split_rows
from engine.kernels import exact, hashing, probing
from engine.kernels import layout as at
from engine.memory import reserved
from engine.reference import siphash
from engine.shard import Shard
from tests.inlined import from_python

np.seterr(over="ignore")  # uncompiled kernels wrap as compiled ones do, but NumPy would warn

mean, minus, plus = map(from_python, (exact.mean, exact.minus, exact.plus))
wrapped_sum, wrapped_difference, hash_bytes = map(from_python, (exact.wrapped_sum, exact.wrapped_difference, hashing.hash_bytes))
same_bytes = from_python(probing.same_bytes)

int64s = st.integers(-(2**63), 2**63 - 1)
times = st.one_of(st.integers(TIME_NS_MIN, TIME_NS_MIN + 100), st.integers(TIME_NS_MAX - 100, TIME_NS_MAX), int64s)
durations = st.one_of(st.integers(0, 200), st.integers(0, 2**61))


class TestExact:
    """Arithmetic that money depends on."""

    @given(
        count=st.integers(1, 2**26),
        scale=st.sampled_from([1, 10, 10**4, 10**8]),
        per_row=st.one_of(st.integers(-(2**53), 2**53), st.integers(-100, 100)),
        rest=st.integers(-(2**27), 2**27),
    )
    def test_mean_is_the_nearest_float(self, count: int, scale: int, per_row: int, rest: int) -> None:
        total = max(min(per_row * count + rest, 2**53 * count), -(2**53) * count)
        assert mean(np.int64(total >> 32), np.int64(total & at.HALF_MASK), np.int64(count * scale)) == total / (count * scale)

    @pytest.mark.parametrize("total", [2**53 - 1, 2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 2**53 + 3, 2**62, -(2**62), 2**63, 2**78 + 1])
    @pytest.mark.parametrize("count", [2**26, 2**26 - 1, 3 * 2**24])
    def test_mean_where_operands_are_no_longer_exact(self, total: int, count: int) -> None:
        assert mean(np.int64(total >> 32), np.int64(total & at.HALF_MASK), np.int64(count)) == total / count

    def test_mean_ties_go_to_the_even(self) -> None:
        for total, wanted in ((2**54 + 2, 2.0**53), (2**54 + 6, 2.0**53 + 4), (-(2**54) - 6, -(2.0**53) - 4)):
            assert mean(np.int64(total >> 32), np.int64(total & at.HALF_MASK), np.int64(2)) == wanted == total / 2

    @given(times, durations)
    def test_times_saturate(self, time: int, duration: int) -> None:
        assert minus(np.int64(time), np.int64(duration)) == max(time - duration, TIME_NS_MIN)
        assert plus(np.int64(time), np.int64(duration)) == min(time + duration, TIME_NS_MAX)

    @given(int64s, int64s)
    def test_prefix_sums_wrap(self, first: int, second: int) -> None:
        for wrapped, unbounded in (
            (wrapped_sum(np.int64(first), np.int64(second)), first + second),
            (wrapped_difference(np.int64(first), np.int64(second)), first - second),
        ):
            assert wrapped == (unbounded + 2**63) % 2**64 - 2**63


#: Rows of every kind through kernels as plain Python, in which NumPy says where a number wraps around.
WRAPS = """
import sys
import numpy as np
from engine import RiskEngine
from tests.strategies import instant

found = set()

def wrapped(kind, flag):
    frame = sys._getframe(1)
    found.add(frame.f_code.co_name)

np.seterrcall(wrapped)
draw = np.random.default_rng(5)
with np.errstate(over="call"):
    for base, kind in ((0, "U"), (-(2**63) + 1, "i8"), (2**63 - 600, "i8"), (2**62, "S")):
        engine = RiskEngine("50ns", lateness="20ns", users=200, shards=1, decimals=0, max_ahead=None, time_unit="ns")
        for turn in range(6):
            times = base + 80 * turn + np.sort(draw.integers(0, 99, 150)) - draw.choice([0, 0, 0, 15], 150) * (turn > 0)
            users = (draw.pareto(0.5, 150) % 50).astype(np.int64)
            units = draw.choice([-(2**53), -1, 0, 7, 2**53], 150) if turn % 2 else np.full(150, 2**53)
            units = np.where(users == 0, 2**53, units)
            for _ in range(4 if turn == 3 else 1):
                engine.ingest({"user_id": users.astype(kind), "amount": units, "timestamp": times}, scores=True)
            engine.features()
            engine.scores(users.astype(kind), at=instant(int(engine.stats().clock.astype(np.int64)) - 11))
            engine.digest()
            if turn == 2:
                engine.expire()
print(*sorted(found))
"""


def test_signed_arithmetic_never_wraps() -> None:
    """LLVM takes it for granted: what follows from a signed number that has wrapped may be anything."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", WRAPS],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    unsigned = {"hash_integer", "sip_round", "sip_word", "digest_entries", "wrapped_sum", "wrapped_difference", "partition"}
    assert set(done.stdout.split()) - unsigned == set()
    assert {"sip_round", "wrapped_difference"} <= set(done.stdout.split()), "it sees some that do"


class TestHashing:
    """Keyed hashes and the split into shards."""

    @given(st.binary(max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
    def test_siphash(self, message: bytes, key0: int, key1: int) -> None:
        data = np.frombuffer(b"#" + message + b"#", np.uint8)
        assert hash_bytes(data, 1, 1 + len(message), np.uint64(key0), np.uint64(key1)) == siphash(message, key0, key1)

    @given(st.binary(max_size=40), st.integers(0, 39), st.integers(1, 255))
    def test_ids_are_compared_to_their_last_byte(self, user: bytes, place: int, flipped: int) -> None:
        arena = np.frombuffer(b"#" * 8 + len(user).to_bytes(4, "little") + user + b"#", np.uint8)
        assert same_bytes(arena, 1, np.frombuffer(b"##" + user + b"#", np.uint8), 2, 2 + len(user))
        other = bytearray(user + b"#")
        assert not same_bytes(arena, 1, np.frombuffer(other, np.uint8), 0, len(other))
        if place < len(user):
            other[place] ^= flipped
            assert not same_bytes(arena, 1, np.frombuffer(other, np.uint8), 0, len(user))

    @pytest.mark.parametrize("shards", [1, 2, 3, 7, 256])
    @pytest.mark.parametrize("users", [[5, -1, 2**63 - 1, 0, 5, 7] * 50, ["a", "", "b", "a", "long" * 20] * 50])
    def test_split_keeps_order_and_leaves_out_refused_rows(self, users: list[object], shards: int) -> None:
        ids = ids_of(_array(users), "user_id")
        reasons = (np.arange(len(users)) % 3 == 1).astype(np.uint8)
        hashes, rows = split_rows(ids, reasons, random_keys(1), shards)
        assert sorted(np.concatenate(rows).tolist()) == np.flatnonzero(reasons == 0).tolist()
        home: dict[object, int] = {}
        for shard, mine in enumerate(rows):
            assert (np.diff(mine) > 0).all()
            for row in mine.tolist():
                assert home.setdefault(users[row], shard) == shard
        by_user = {users[row]: int(hashes[row]) for row in np.flatnonzero(reasons == 0).tolist()}
        assert len(set(by_user.values())) == len(by_user)

    def test_shards_get_equal_shares(self) -> None:
        ids = ids_of(_array(list(range(40_000))), "user_id")
        _, rows = split_rows(ids, np.zeros(40_000, np.uint8), random_keys(2), 4)
        assert all(abs(len(mine) - 10_000) < 600 for mine in rows)

    def test_another_secret_gives_other_hashes(self) -> None:
        ids = ids_of(_array(["a", "b"]), "user_id")
        first, second = (split_rows(ids, np.zeros(2, np.uint8), random_keys(), 1)[0] for _ in range(2))
        assert (first != second).all()


class TestIndexUnderChurn:
    """Users come and go until lines are full, displaced and mended; the invariants are asserted after each step."""

    @pytest.mark.parametrize("capacity", [1, 2, 8, 11, 12, 40, 200])
    @pytest.mark.parametrize("kind", ["int64", "string"])
    def test_users_come_and_go(self, capacity: int, kind: str) -> None:
        random = np.random.default_rng(capacity)
        config = Config.of("10ns", lateness="0s", users=capacity, shards=1, decimals=0, time_unit="ns")
        shard = Shard(config, capacity, random_keys(capacity))
        held: dict[int, int] = {}
        for step in range(60):
            clock = step * 4
            held = {user: newest for user, newest in held.items() if newest >= clock - config.retention_ns}
            shard.expire(clock - config.retention_ns, kind)
            assert shard.users == len(held)
            wanted = random.integers(0, 4 * capacity, random.integers(1, capacity + 1))
            wanted = wanted[: capacity - len(held)] if len(held) < capacity else np.array(list(held), np.int64)[:3]
            _take(shard, kind, wanted, clock)
            held |= dict.fromkeys(wanted.tolist(), clock)
            shard.check(kind)
            everyone = list(range(4 * capacity))
            found = _find(shard, kind, everyone)
            assert [slot >= 0 for slot in found] == [user in held for user in everyone]

    def test_a_full_shard_says_how_far_it_got_and_forgets_it_again(self) -> None:
        config = Config.of(users=3, shards=1)
        shard = Shard(config, 3, random_keys(3))
        _take(shard, "int64", np.array([1, 2]), 0)
        ids = ids_of(_array([2, 3, 4, 1]), "user_id")
        hashes, (rows,) = split_rows(ids, np.zeros(4, np.uint8), shard.index.keys, 1)
        slots, done = shard.reserve(ids, hashes, rows)
        assert done == 2
        shard.release(slots, done, "int64")
        shard.check("int64")
        assert shard.users == 2
        assert [slot >= 0 for slot in _find(shard, "int64", [1, 2, 3, 4])] == [True, True, False, False]


class TestRings:
    """Growth, wrap, shrinking and reuse of ring memory."""

    def test_a_ring_grows_wraps_shrinks_and_its_memory_is_used_again(self) -> None:
        config = Config.of("100ns", lateness="0s", users=4, shards=1, decimals=0)
        shard = Shard(config, 4, random_keys(4))
        everything = shard.bytes_used
        for burst in range(6):
            start = burst * 1_000
            for step in range(70):
                _take(shard, "int64", np.array([1, 2]), start + step)
                times, units = shard.entries(0)
                assert times.tolist()[-1] == start + step
                assert (units == 1).all()
                shard.check("int64")
            _take(shard, "int64", np.array([1]), start + 500)
            shard.expire(start + 400, "int64")
            shard.check("int64")
            assert [shard.entries(slot)[0].tolist() for slot in (0,)] == [[start + 500]]
            if burst == 0:
                everything = shard.bytes_used
        assert shard.bytes_used == everything

    def test_reserved_memory_costs_nothing_until_touched(self) -> None:
        huge = reserved(1 << 36, np.int64)
        huge[-1] = 7
        assert huge[0] == 0
        assert huge.ctypes.data % 64 == 0


def _array(values: list[object]) -> object:
    return pa.array(values)


def _names(kind: str, users: list[int]) -> list[object]:
    return list(users) if kind == "int64" else [f"{'u' * (user % 19)}{user}" for user in users]


def _take(shard: Shard, kind: str, users: np.ndarray, time: int) -> None:
    """One row of one unit for each of the users."""
    ids = ids_of(_array(_names(kind, users.tolist())), "user_id")
    count = len(ids)
    none = np.zeros(count, np.uint8)
    hashes, (rows,) = split_rows(ids, none, shard.index.keys, 1)
    columns = Columns(None, ids, np.full(count, time), np.ones(count, np.int64), none.copy(), none.copy())
    shard.take(columns, hashes, np.full(count, time), 1, rows, None, None)


def _find(shard: Shard, kind: str, users: list[int]) -> list[int]:
    ids = ids_of(_array(_names(kind, users)), "user_id")
    hashes, (rows,) = split_rows(ids, np.zeros(len(ids), np.uint8), shard.index.keys, 1)
    found: list[int] = shard.find(ids, hashes, rows).tolist()
    return found
