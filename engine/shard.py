"""Shard: the memory of some of the users, and all that is done to it. One thread works on a shard at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import array_of
from engine.columns import Columns, Ids
from engine.config import REASONS, RING_CAPACITY_MAX, TIME_NS_MIN, Config
from engine.index import Index, is_bytes
from engine.kernels import (
    apply_rows,
    count_retained,
    digest_lanes,
    expire_slots,
    list_retained,
    window_features,
    window_scores,
)
from engine.kernels import layout as at
from engine.memory import machine_bytes, reserved

#: What a window's feature says when there is nothing to say (no transaction, no end).
NO_TIME: Final = -(2**63)

_SPARE_BYTES: Final = 8 << 30

#: Rows that get their slots and are applied at a time: half a second-level cache of slot lines.
_TAKEN_ROWS: Final = 1 << 13

SUM_OVERFLOW: Final = REASONS.index("sum_overflow") + 1


@dataclass(frozen=True, slots=True)
class Features:
    """Columns of `window_features`, one row a user."""

    counts: NDArray[np.int64]  # (n,)
    sums: NDArray[np.int64]  # (2n,) 128-bit units, low word first
    scores: NDArray[np.float64]  # (n,)
    newest: NDArray[np.int64]  # (n,) or NO_TIME
    valid_until: NDArray[np.int64]  # (n,) or NO_TIME
    zero_at: NDArray[np.int64]  # (n,) or NO_TIME

    @classmethod
    def empty(cls, count: int) -> Features:
        """Room for `count` users, filled as for users that are unknown."""
        return cls(
            counts=np.zeros(count, np.int64),
            sums=np.zeros(2 * count, np.int64),
            scores=np.zeros(count, np.float64),
            newest=np.full(count, NO_TIME),
            valid_until=np.full(count, NO_TIME),
            zero_at=np.full(count, NO_TIME),
        )


def features_table(ids: Any, features: Features, decimals: int) -> Any:
    """Features as an Arrow table, a row a user."""
    count = len(features.counts)
    instant = pa.timestamp("ns", "UTC")
    times = (features.newest, features.valid_until, features.zero_at)
    newest, valid_until, zero_at = (array_of(column, instant, column == NO_TIME) for column in times)
    return pa.table(
        {
            "user_id": ids,
            "count": array_of(features.counts, pa.int64()),
            "sum": pa.Array.from_buffers(pa.decimal128(38, decimals), count, [None, pa.py_buffer(features.sums)]),
            "score": array_of(features.scores, pa.float64()),
            "newest": newest,
            "valid_until": valid_until,
            "zero_at": zero_at,
        }
    )


class Shard:
    """The users one thread owns.

    Memory is one flat int64 array of slot lines and, behind them, larger rings (`kernels/layout.py`), the index of their ids
    (`Index`), and a small array of registers. Invariants:

    I1  0 <= count <= capacity, 0 <= start < capacity of every ring; capacity is 2 (in the line) or a power of two from 4 on.
        Between batches count is at least 1 in every slot in use.
    I2  From start, entries are in non-decreasing event time; equal times in arrival order.
    I3  An entry's `before` is the sum modulo 2**64 of all units of this user that precede it in the ring and of those it had before;
        TOTAL continues the series.
    I4  In a larger ring NEWEST is the newest entry's time and LEFT, LEFT_TIME, LEFT_BEFORE are those of the first entry not before
        NEWEST - reach.
    I5-I7  see `Index`.
    I8  Slots in use and free ones are all slots below SLOTS_USED; rings in use and free blocks cover the ring area up to RING_NEXT
        without overlap; USERS, ENTRIES, RING_FREE count them; no entry's |units| is above UNITS_MAX.
    """

    def __init__(self, config: Config, slots_max: int, keys: NDArray[np.uint64]) -> None:
        self.config = config
        self.slots_max = slots_max
        self.control: NDArray[np.int64] = np.zeros(at.CONTROL_WORDS, np.int64)
        machine = machine_bytes()
        ring_base = 4 * slots_max  # in entries of 16 bytes
        # Address space, not memory: what a batch may need in the worst case must be there beforehand, and shards need not be equal.
        ring_entries = (4 * machine // config.shards + _SPARE_BYTES) // 16
        self.memory: NDArray[np.int64] = reserved(2 * (ring_base + ring_entries), np.int64, least=2 * (ring_base + (1 << 16)))
        self.index = Index(slots_max, machine // config.shards + _SPARE_BYTES, keys, self.control)
        self.control[at.SLOTS_MAX] = slots_max
        self.control[at.SAFE_COUNT] = at.INT64_MAX
        self.control[at.RING_NEXT] = ring_base
        self.control[at.RING_LIMIT] = min(len(self.memory) // 2, at.PLACE_MASK)
        self._ring_base = ring_base
        self._sweep_from = 0

    @property
    def users(self) -> int:
        """Slots in use, those of users whose last transaction has expired included."""
        return int(self.control[at.USERS])

    @property
    def slots_used(self) -> int:
        """Slot lines ever used."""
        return int(self.control[at.SLOTS_USED])

    @property
    def bytes_used(self) -> int:
        """Memory that has been touched: slot lines, rings, index, arena."""
        rings = int(self.control[at.RING_NEXT]) - self._ring_base
        return 64 * self.slots_used + 16 * rings + self.index.bytes_used

    def room_for(self, rows: int, of_one: int) -> bool:
        """Whether ring memory certainly takes so many rows more, at most `of_one` of one user, and no ring passes its greatest capacity."""
        control = self.control
        # A user's ring ends at no more than twice its entries, and the smaller rings on the way there add up to as much again.
        if int(control[at.RING_NEXT]) + 4 * (int(control[at.ENTRIES]) + rows) > int(control[at.RING_LIMIT]):
            return False
        if int(control[at.COUNT_MAX]) + of_one > RING_CAPACITY_MAX:
            control[at.COUNT_MAX] = self._lines()[:, at.SPAN].max(initial=0) >> at.HALF_BITS
        return int(control[at.COUNT_MAX]) + of_one <= RING_CAPACITY_MAX

    def reserve(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
        """Slots of the users of these rows, made where they are new; and how many rows got one before all were in use."""
        return self.index.reserve(ids, hashes, rows, self.slots_max, self.memory)

    def release(self, slots: NDArray[np.int32], count: int, kind: str) -> None:
        """Undo `reserve`."""
        self.index.release(slots, count, kind, self.memory)

    def apply(
        self,
        columns: Columns,
        clock_ns: NDArray[np.int64],
        rows: NDArray[np.int32],
        slots: NDArray[np.int32],
        scores: NDArray[np.float64] | None,
    ) -> None:
        """Put rows into their users' rings, and write their scores. Rows that break the limit of sums get their reason."""
        apply_rows(
            rows,
            slots,
            columns.time_ns,
            columns.amount_units,
            clock_ns,
            self.config.reach_ns,
            self.config.retention_ns,
            self.config.scale,
            scores is not None,
            SUM_OVERFLOW,
            self.memory,
            self.control,
            _NO_SCORES if scores is None else scores,
            columns.reasons,
        )

    def take(
        self,
        columns: Columns,
        hashes: NDArray[np.uint64],
        clock_ns: NDArray[np.int64],
        rows: NDArray[np.int32],
        scores: NDArray[np.float64] | None,
    ) -> None:
        """`reserve` and `apply`, for rows that certainly fit, so few at a time that slot lines found for one are cached for the other."""
        for first in range(0, len(rows), _TAKEN_ROWS):
            part = rows[first : first + _TAKEN_ROWS]
            slots, done = self.reserve(columns.ids, hashes, part)
            assert done == len(part), "it was counted that there are slots enough"
            self.apply(columns, clock_ns, part, slots, scores)

    def find(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Slots of the users of these rows; -1 for those it does not know."""
        return self.index.find(ids, hashes, rows, self.memory)

    def scores(self, rows: NDArray[np.int32], slots: NDArray[np.int32], at_ns: int, out: NDArray[np.float64]) -> None:
        """Write the score of slots[j] at an instant to out[rows[j]]."""
        window_scores(rows, slots, at_ns, self.config.reach_ns, self.config.scale, self.memory, self.control, out)

    def features(self, rows: NDArray[np.int32], slots: NDArray[np.int32], at_ns: int, floor_ns: int, out: Features) -> None:
        """Write the features of slots[j] at an instant to row rows[j] of `out`."""
        window_features(
            rows,
            slots,
            at_ns,
            self.config.reach_ns,
            floor_ns,
            self.config.scale,
            self.memory,
            self.control,
            out.counts,
            out.sums,
            out.scores,
            out.newest,
            out.valid_until,
            out.zero_at,
        )

    def expire(self, floor_ns: int, kind: str | None, slots: int | None = None) -> int:
        """Free entries before `floor_ns`: of all users, or of the next `slots` slots of a round over all.

        Returns:
            Entries freed.
        """
        if slots is None:
            freed = self._expire(0, self.slots_used, floor_ns, True, kind)
            self.index.compact(self.memory)
            return freed
        freed = 0
        slots = min(slots, self.slots_used)
        while slots > 0:
            first = self._sweep_from if self._sweep_from < self.slots_used else 0
            last = min(first + slots, self.slots_used)
            freed += self._expire(first, last, floor_ns, False, kind)
            slots -= last - first
            self._sweep_from = last
            if last == self.slots_used:
                self.index.compact(self.memory)
        return freed

    def _expire(self, first: int, last: int, floor_ns: int, thorough: bool, kind: str | None) -> int:
        index = self.index
        return int(
            expire_slots(
                first,
                last,
                floor_ns,
                self.config.reach_ns,
                thorough,
                is_bytes(kind),
                index.keys,
                self.memory,
                index.table,
                self.control,
                index.arena,
            )
        )

    def retained(self, floor_ns: int) -> tuple[int, int]:
        """Users with a transaction not before `floor_ns`, and the number of such transactions. Cost: a pass over all slots."""
        result = np.empty(2, np.int64)
        count_retained(floor_ns, self.memory, self.control, result)
        return int(result[0]), int(result[1])

    def slots_retained(self, floor_ns: int) -> NDArray[np.int32]:
        """Slots of the users with a transaction not before `floor_ns`. Cost: a pass over all slots."""
        slots = np.empty(self.slots_used, np.int32)
        return slots[: list_retained(floor_ns, self.memory, self.control, slots)]

    def newest(self, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Time of the newest entry of each slot."""
        lines = self._lines()[slots]
        last = (lines[:, at.SPAN] & at.HALF_MASK) + (lines[:, at.SPAN] >> at.HALF_BITS) - 1
        in_line = lines[np.arange(len(lines)), 4 + 2 * (last % at.INLINE_CAPACITY)]
        return np.where(lines[:, at.RING] >> at.PLACE_BITS == at.INLINE_CAPACITY, in_line, lines[:, at.NEWEST])

    def ids_of(self, slots: NDArray[np.int32], kind: str) -> Ids:
        """The ids that slots stand for."""
        return self.index.ids_of(slots, kind, self.memory)

    def entries(self, slot: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Times and units of a user's entries, oldest first."""
        line = self._lines()[slot]
        capacity, place = int(line[at.RING]) >> at.PLACE_BITS, int(line[at.RING]) & at.PLACE_MASK
        count, start = int(line[at.SPAN]) >> at.HALF_BITS, int(line[at.SPAN]) & at.HALF_MASK
        ring = self.memory[2 * place : 2 * (place + capacity)].reshape(capacity, 2)
        taken = ring[(start + np.arange(count)) % capacity]
        return taken[:, 0], np.diff(taken[:, 1], append=line[at.TOTAL])

    def digest(self, floor_ns: int, kind: str | None) -> NDArray[np.uint64]:
        """Sums of the hashes of all retained entries, in two lanes."""
        lanes = np.zeros(2, np.uint64)
        digest_lanes(floor_ns, is_bytes(kind), self.memory, self.control, self.index.arena, lanes)
        return lanes

    def _lines(self) -> NDArray[np.int64]:
        return self.memory[: self.slots_used * at.LINE_WORDS].reshape(-1, at.LINE_WORDS)

    def check(self, kind: str | None) -> None:
        """Assert I1-I8. Slow: for tests."""
        users = entries = 0
        blocks: list[tuple[int, int]] = []
        for slot, line in enumerate(self._lines().tolist()):
            capacity, place = line[at.RING] >> at.PLACE_BITS, line[at.RING] & at.PLACE_MASK
            if capacity == 0:
                continue
            count, start = line[at.SPAN] >> at.HALF_BITS, line[at.SPAN] & at.HALF_MASK
            assert 1 <= count <= capacity > start >= 0, f"I1: slot {slot}"
            assert capacity.bit_count() == 1 < capacity, f"I1: slot {slot}"
            times, units = self.entries(slot)
            assert (times[1:] >= times[:-1]).all(), f"I2: slot {slot}"
            assert abs(units).max() <= self.control[at.UNITS_MAX], f"I3, I8: slot {slot}"
            if capacity == at.INLINE_CAPACITY:
                assert place == 4 * slot + 2, f"I8: slot {slot}"
            else:
                blocks.append((place, capacity))
                newest = int(times[-1])
                left = int(np.searchsorted(times, max(newest - self.config.reach_ns, TIME_NS_MIN)))
                assert (line[at.NEWEST], line[at.LEFT]) == (newest, left), f"I4: slot {slot}"
                word = 2 * (place + (start + left) % capacity)
                assert [line[at.LEFT_TIME], line[at.LEFT_BEFORE]] == self.memory[word : word + 2].tolist(), f"I4: slot {slot}"
            users += 1
            entries += count
        self._check_free(users, entries, blocks)
        self.index.check(self.memory, kind)

    def _check_free(self, users: int, entries: int, blocks: list[tuple[int, int]]) -> None:
        control = self.control
        assert (users, entries) == (int(control[at.USERS]), int(control[at.ENTRIES])), "I8: users or entries are miscounted"
        free_slots = set()
        head = int(control[at.SLOT_FREE])
        while head:
            assert head - 1 not in free_slots, "I8: a slot is free twice"
            free_slots.add(head - 1)
            head = int(self.memory[(head - 1) * at.LINE_WORDS + at.ID])
        assert len(free_slots) + users == self.slots_used, "I8: a slot is lost"
        free_entries = 0
        for size_class in range(at.RING_CLASSES):
            place = int(control[at.RING_HEADS + size_class])
            while place:
                blocks.append((place, 1 << size_class))
                free_entries += 1 << size_class
                place = int(self.memory[2 * place])
        assert free_entries == int(control[at.RING_FREE]), "I8: free ring memory is miscounted"
        following = self._ring_base
        for place, capacity in sorted(blocks):
            assert place == following, f"I8: ring memory at {following} is lost or shared"
            following += capacity
        assert following == int(control[at.RING_NEXT]), "I8: the end of ring memory is wrong"


_NO_SCORES: Final = np.empty(0, np.float64)
