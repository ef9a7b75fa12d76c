"""Shard: the memory of some of the users, and all that is done to it. One thread works on a shard at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import array_of
from engine.columns import Columns, Ids
from engine.config import BLOCK_LINES, REASONS, RING_CAPACITY_MAX, TIME_NS_MIN, Config
from engine.copies import Copy
from engine.entries import Entries
from engine.index import Index, is_bytes
from engine.kernels import (
    count_entries,
    count_retained,
    expire_slots,
    list_retained,
    read_entries,
    take_rows,
    user_features,
    window_features,
    window_score,
    window_scores,
)
from engine.kernels import layout as at
from engine.memory import machine_bytes, reserved
from engine.watch import Watch

#: What a window's feature says when there is nothing to say (no transaction, no end).
NO_TIME: Final = -(2**63)

_SPARE_BYTES: Final = 8 << 30

#: Slots that expiry lists before it looks into them.
_SWEPT_AT_ONCE: Final = 1 << 10

#: Slots whose entries are read at a time: their lines stay in the second-level cache between the two passes.
_READ_AT_ONCE: Final = 1 << 13

#: When so many epochs have passed since the earliest mark, marks may soon mean another time.
_EPOCHS_MAX: Final = at.MARK_EPOCHS - 4

#: What it costs to read a slot line, in marks: when expiry goes by lines it looks at so many fewer slots.
_LINE_IN_MARKS: Final = 16

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
        numbers, times = np.zeros((4, count), np.int64), np.full((3, count), NO_TIME)
        return cls(numbers[0], numbers[1:3].reshape(-1), numbers[3].view(np.float64), times[0], times[1], times[2])

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Some of the rows."""
        return Features(
            counts=self.counts[rows],
            sums=self.sums.reshape(-1, 2)[rows].reshape(-1),
            scores=self.scores[rows],
            newest=self.newest[rows],
            valid_until=self.valid_until[rows],
            zero_at=self.zero_at[rows],
        )

    def greatest(self, by: str, count: int) -> NDArray[np.int64]:
        """Rows with a transaction in the window that may be among the `count` greatest by a column, equals of the last one included."""
        key: Any = {"score": self.scores, "count": self.counts, "newest": self.newest}.get(by)
        if key is None:  # 128-bit sums, in floats: these keep the order, though not every difference
            key = self.sums[1::2] * 2.0**64 + self.sums[::2].view(np.uint64)
        rows = np.flatnonzero(self.counts)
        if len(rows) <= count:
            return rows
        likely: NDArray[np.int64] = rows[key[rows] >= np.partition(key[rows], -count)[-count]]
        return likely


@dataclass(slots=True)
class UserFeatures:
    """What is known of one user's window.

    Attributes:
        count: Transactions in it.
        sum_units: Their units.
        score: Their mean.
        newest_ns: Newest of them; None if there is none.
        valid_until_ns: Last instant with the same transactions in the window if nothing more arrives; None: for ever.
        zero_at_ns: First instant at which the window is empty; None if it is empty already.
    """

    count: int = 0
    sum_units: int = 0
    score: float = 0.0
    newest_ns: int | None = None
    valid_until_ns: int | None = None
    zero_at_ns: int | None = None


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

    I1  0 <= count <= capacity, 0 <= start < capacity of every ring. A line holds up to four entries, a ring at least one;
        between batches there is one in every slot in use. A ring's capacity is a multiple of 4, beyond 128 of 128.
    I2  From start, entries are in non-decreasing event time; equal times in arrival order; in a line EMPTY ones come first.
    I3  In a ring an entry's `before` is the sum modulo 2**64 of all units of this user that precede it in the ring and of those it had
        before; TOTAL continues the series. A line holds the units themselves.
    I4  In a ring NEWEST is the newest entry's time and LEFT, LEFT_TIME, LEFT_BEFORE are those of the first entry not before
        NEWEST - reach.
    I5-I7  see `Index`.
    I8  Slots in use and free ones are all slots below SLOTS_USED; rings in use and free lines cover the ring area up to RING_NEXT
        without overlap; USERS, ENTRIES, RING_FREE count them; no entry's |units| is above UNITS_MAX.
    I9  The mark of a slot in use is MARKED and an epoch that is not after that of its newest entry; that of a free one is 0.
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
        self.control[at.RING_BASE] = ring_base
        self.control[at.RING_NEXT] = ring_base
        self.control[at.RING_LIMIT] = min(len(self.memory) // 2, at.PLACE_MASK)
        ring_slabs = (len(self.memory) // 2 - ring_base) // (at.BLOCK_ENTRIES * at.SLAB_LINES) + 1
        self.slabs: NDArray[np.int64] = reserved(ring_slabs * at.SLAB_WORDS, np.int64)
        self.marks: NDArray[np.uint8] = reserved(-(-slots_max // at.MARK_LANES) * at.MARK_LANES, np.uint8)
        self.control[at.EPOCH_BITS] = max(config.retention_ns.bit_length() - at.MARK_EPOCHS.bit_length() + 1, 0)
        self.copy: Copy | None = None
        self.watch: Watch | None = None
        # Rounds of expiry: no mark is before the first; where the floor was when the round began; whether it reads lines, not marks.
        self._marks_from_ns = self._round_from_ns = 0
        self._by_lines = True
        # What `add` passes to `take`, made once: arrays cost more than the row.
        ids = Ids("int64", np.zeros(1, np.int64), np.zeros(1, np.int64), np.empty(0, np.uint8), None)
        self._row_of_one = Columns(None, ids, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros(1, np.uint8))
        self._features_of_one = Features.empty(1)
        self._hash_of_one: NDArray[np.uint64] = np.zeros(1, np.uint64)
        self._clock_of_one: NDArray[np.int64] = np.zeros(1, np.int64)
        self._score_of_one: NDArray[np.float64] = np.zeros(1, np.float64)

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
        rings = int(self.control[at.RING_NEXT]) - int(self.control[at.RING_BASE])
        return 65 * self.slots_used + 16 * rings + self.index.bytes_used

    @property
    def bytes_by_part(self) -> tuple[int, int, int, int, int, int]:
        """Memory that has been touched: rings; slot lines, index and ids. What of it serves again: any ring, a slot line, an id.

        And what the largest ring may take when it moves, a quarter larger, for which free slabs are rarely side by side.
        """
        control = self.control
        rings = 16 * (int(control[at.RING_NEXT]) - int(control[at.RING_BASE]))
        free_rings = 64 * at.SLAB_LINES * int(control[at.POOL_SLABS])
        free_slots, free_ids = 65 * (self.slots_used - self.users), 8 * int(control[at.ARENA_FREE])
        largest = int(control[at.COUNT_MAX])
        moved = 20 * largest if largest > at.BLOCK_ENTRIES * at.SLAB_LINES else 0
        return rings, self.bytes_used - rings, free_rings, free_slots, free_ids, moved

    def room_for(self, rows: int, of_one: int) -> bool:
        """Whether ring memory certainly takes so many rows more, at most `of_one` of one user, and no ring passes its greatest capacity."""
        control = self.control
        # A row moves at most four entries into a ring with it. A ring ends at no more than twice its entries (but for whole slabs),
        # and the smaller ones on the way there, each a quarter smaller, add up to four times as much.
        worst = 10 * (int(control[at.ENTRIES]) + 5 * rows) + 4 * at.BLOCK_ENTRIES * at.SLAB_LINES * len(BLOCK_LINES)
        if int(control[at.RING_NEXT]) + worst > int(control[at.RING_LIMIT]):
            return False
        if int(control[at.COUNT_MAX]) + of_one > RING_CAPACITY_MAX:
            self.count_again()
        return int(control[at.COUNT_MAX]) + of_one <= RING_CAPACITY_MAX

    def count_again(self) -> None:
        """Find the greatest count that a ring has now. Cost: a pass over all slots."""
        lines = self._lines()
        counts = lines[lines[:, at.META] >= at.RING_FROM, at.SPAN] >> at.HALF_BITS
        self.control[at.COUNT_MAX] = counts.max(initial=0)

    def reserve(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
        """Slots of the users of these rows, made where they are new; and how many rows got one before all were in use."""
        return self.index.reserve(ids, hashes, rows, self.slots_max, self.memory)

    def release(self, slots: NDArray[np.int32], count: int, kind: str) -> None:
        """Undo `reserve`."""
        self.index.release(slots, count, kind, self.memory)

    def take(
        self,
        columns: Columns,
        hashes: NDArray[np.uint64],
        clock_ns: NDArray[np.int64],
        units_max: int,
        rows: NDArray[np.int32],
        slots: NDArray[np.int32] | None,
        scores: NDArray[np.float64] | None,
    ) -> int:
        """Put rows, which certainly fit, into their users' lines and rings, and write their scores. Returns how many.

        `slots` is what `reserve` gave for them; without it users are looked up, and made where they are new.
        Rows that break the limit of sums get their reason.
        """
        if units_max > self.control[at.UNITS_MAX]:
            self.control[at.UNITS_MAX] = units_max
            self.control[at.SAFE_COUNT] = at.INT64_MAX // units_max
        ids = columns.ids
        if self.copy is not None:
            self.copy.before(self.find(ids, hashes, rows) if slots is None else slots)
        located = slots is not None
        slots = np.empty(len(rows), np.int32) if slots is None else slots
        applied = take_rows(
            ids.values,
            ids.offsets,
            ids.data,
            is_bytes(ids.kind),
            hashes,
            rows,
            located,
            columns.time_ns,
            columns.amount_units,
            clock_ns,
            self.config.reach_ns,
            self.config.retention_ns,
            self.config.scale,
            scores is not None,
            SUM_OVERFLOW,
            self.memory,
            self.index.table,
            self.control,
            self.index.arena,
            self.slabs,
            self.marks,
            slots,
            _NO_SCORES if scores is None else scores,
            columns.reasons,
        )
        if self.watch is not None:
            self.watch.rows_came(slots, int(self.control[at.EPOCH_BITS]))
        return int(applied)

    def takes_one(self, id_bytes: int, units: int) -> bool:
        """Whether it is plain that one row more, of a user old or new, fits and will not be refused for its sum."""
        control = self.control
        if control[at.COUNT_MAX] >= min(RING_CAPACITY_MAX - 1, (1 << 62) // max(units, int(control[at.UNITS_MAX]), 1) - 2):
            return False
        return bool(control[at.USERS] < self.slots_max and self.room_for(1, 1) and self.index.takes_one(id_bytes))

    def add(self, value: int, data: NDArray[np.uint8], kind: str, found: int, units: int, when_ns: int, clock_ns: int) -> float:
        """`take` of one row of one user, an integer or bytes, with this hash. Returns its score."""
        columns = self._row_of_one
        if is_bytes(kind):
            ids = Ids(kind, columns.ids.values, np.array([0, len(data)]), data, None)
            columns = Columns(None, ids, columns.time_ns, columns.amount_units, columns.reasons, columns.rounded)
        else:
            columns.ids.values[0] = value
        columns.time_ns[0] = when_ns
        columns.amount_units[0] = units
        self._hash_of_one[0] = found
        self._clock_of_one[0] = clock_ns
        self.take(columns, self._hash_of_one, self._clock_of_one, abs(units), _FIRST, None, self._score_of_one)
        return float(self._score_of_one[0])

    def find(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Slots of the users of these rows; -1 for those it does not know."""
        return self.index.find(ids, hashes, rows, self.memory)

    def scores(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32], at_ns: int, out: NDArray[np.float64]) -> None:
        """Write the score of each of these users at an instant to out[row]."""
        window_scores(
            ids.values,
            ids.offsets,
            ids.data,
            is_bytes(ids.kind),
            hashes,
            rows,
            at_ns,
            self.config.reach_ns,
            self.config.scale,
            self.memory,
            self.index.table,
            self.control,
            self.index.arena,
            np.empty(len(rows), np.int32),
            out,
        )

    def score(self, value: int, data: NDArray[np.uint8], by_bytes: bool, found: int, at_ns: int) -> float:
        """Score of one user, an integer or bytes, with this hash, at an instant."""
        config, index = self.config, self.index
        score: float = window_score(
            value,
            data,
            by_bytes,
            found,
            at_ns,
            config.reach_ns,
            config.scale,
            self.memory,
            index.table,
            self.control,
            index.arena,
        )
        return score

    def features_of_one(self, value: int, data: NDArray[np.uint8], by_bytes: bool, found: int, at_ns: int, floor_ns: int) -> UserFeatures:
        """What `features` says of one user, an integer or bytes, with this hash."""
        config, index, out = self.config, self.index, self._features_of_one
        user_features(
            value,
            data,
            by_bytes,
            found,
            at_ns,
            config.reach_ns,
            floor_ns,
            config.scale,
            self.memory,
            index.table,
            self.control,
            index.arena,
            out.counts,
            out.sums,
            out.scores,
            out.newest,
            out.valid_until,
            out.zero_at,
        )
        times = (out.newest.item(), out.valid_until.item(), out.zero_at.item())
        low, high = out.sums.tolist()
        return UserFeatures(
            out.counts.item(),
            (high << 64) | (low & (2**64 - 1)),
            out.scores.item(),
            *(None if time_ns == NO_TIME else time_ns for time_ns in times),
        )

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

    def expire(self, floor_ns: int, kind: str | None) -> int:
        """Free all entries before `floor_ns`. Cost: a pass over all slots.

        Returns:
            Entries freed.
        """
        if self.copy is not None:
            self.copy.before_all()
        self._round_begins(floor_ns, by_lines=True)
        freed = self._expire(self.slots_used, at.INT64_MAX, floor_ns, True, kind)
        self._round_ends(floor_ns)
        return freed

    def sweep(self, kind: str | None, floor_ns: int, slots: int, most: int) -> None:
        """Free users whose entries are all before `floor_ns`, and shorten rings: look at the next `slots` slots of a round over all.

        It ends earlier when it had to look into `most` of them. Cost: a byte per slot, and few random lines per slot looked into.
        """
        if self.copy is not None:
            return
        if not self._by_lines and self._epochs(floor_ns) - self._epochs(self._marks_from_ns) >= _EPOCHS_MAX:
            self._round_begins(floor_ns, by_lines=True)
        slots = max(slots // (_LINE_IN_MARKS if self._by_lines else 1), 1)
        last = min(int(self.control[at.SWEPT]) + slots, self.slots_used)
        self._expire(last, most, floor_ns, False, kind)
        if self.control[at.SWEPT] >= self.slots_used:
            self._round_ends(floor_ns)

    def _epochs(self, time_ns: int) -> int:
        return time_ns >> int(self.control[at.EPOCH_BITS])

    def _round_begins(self, floor_ns: int, by_lines: bool) -> None:
        self.control[at.SWEPT] = 0
        self._round_from_ns = floor_ns
        self._by_lines = by_lines

    def _round_ends(self, floor_ns: int) -> None:
        self.index.compact(self.memory)
        self._marks_from_ns = self._round_from_ns
        self._round_begins(floor_ns, by_lines=bool(self.control[at.SCATTERED]))

    def _expire(self, last: int, most: int, floor_ns: int, thorough: bool, kind: str | None) -> int:
        index, watch = self.index, self.watch
        self.control[at.GONE] = 0
        gone = _NO_SLOTS if watch is None else np.empty(min(self.slots_used, most + _SWEPT_AT_ONCE), np.int32)
        freed = int(
            expire_slots(
                last,
                most,
                floor_ns,
                self.config.reach_ns,
                not self._by_lines,
                thorough,
                is_bytes(kind),
                index.keys,
                self.memory,
                index.table,
                self.control,
                index.arena,
                self.slabs,
                self.marks,
                watch is not None,
                _NO_SCORES if watch is None else watch.reported,
                gone,
                np.empty(_SWEPT_AT_ONCE, np.int32),
            )
        )
        count = int(self.control[at.GONE])
        if watch is not None and kind is not None and count:
            watch.leave(gone[:count], self.ids_of(gone[:count], kind))
            self.release(gone, count, kind)
        return freed

    def retained(self, floor_ns: int) -> tuple[int, int]:
        """Users with a transaction not before `floor_ns`, and the number of such transactions. Cost: a pass over all slots."""
        result = np.empty(2, np.int64)
        count_retained(floor_ns, self.memory, self.control, result)
        return int(result[0]), int(result[1])

    def slots_retained(self, floor_ns: int) -> NDArray[np.int32]:
        """Slots of the users with a transaction not before `floor_ns`. Cost: a pass over all slots."""
        slots = np.empty(self.slots_used, np.int32)
        return slots[: list_retained(floor_ns, self.memory, self.control, slots)]

    def slots_among(self, first: int, last: int) -> NDArray[np.int32]:
        """Slots in use, from `first` to before `last`; what their users had may be retained no more."""
        marks = self.marks[first : min(last, self.slots_used)]
        return (np.flatnonzero(marks) + first).astype(np.int32)

    def newest(self, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Time of the newest entry of each slot."""
        times: NDArray[np.int64] = self._lines()[slots, at.NEWEST]
        return times

    def ids_of(self, slots: NDArray[np.int32], kind: str) -> Ids:
        """The ids that slots stand for."""
        return self.index.ids_of(slots, kind, self.memory)

    def entries_of(self, slots: NDArray[np.int32], floor_ns: int, kind: str) -> Entries:
        """What is retained of the users in these slots, those without left out."""
        counts = np.empty(len(slots), np.int64)
        total = count_entries(slots, floor_ns, self.memory, counts)
        if not counts.all():
            slots, counts = slots[counts > 0], counts[counts > 0]
        time_ns, units = np.empty(total, np.int64), np.empty(total, np.int64)
        read_entries(slots, counts, self.memory, time_ns, units)
        return Entries(self.ids_of(slots, kind), counts, time_ns, units)

    def changed(self, at_ns: int, touched: bool) -> NDArray[np.int32]:
        """Slots of the users whose score at an instant is another than was last reported; see `Watch.changed`."""
        if self.watch is None:
            self.watch = Watch(self.slots_max)
        return self.watch.changed(at_ns, self.config.reach_ns, self.config.scale, self.slots_used, touched, self.memory, self.control)

    def begin_copy(self, pending: NDArray[np.bool_], floor_ns: int, kind: str) -> None:
        """Copy what is retained now, while rows go on. `pending` is room for a bool a slot, touched beforehand to save time now."""
        used = self.slots_used
        pending = pending[:used] if len(pending) >= used else np.empty(used, np.bool_)
        np.not_equal(self.marks[:used], 0, out=pending)
        self.copy = Copy(pending, lambda slots: self.entries_of(slots, floor_ns, kind))

    def entries(self, slot: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Times and units of a user's entries, oldest first."""
        line = self._lines()[slot]
        if line[at.META] < at.RING_FROM:
            times = line[at.TIMES : at.AMOUNTS]
            held = times != at.EMPTY
            return times[held], line[at.AMOUNTS :].view("<i4")[held].astype(np.int64)
        capacity, place = int(line[at.META]) >> at.PLACE_BITS, int(line[at.META]) & at.PLACE_MASK
        count, start = int(line[at.SPAN]) >> at.HALF_BITS, int(line[at.SPAN]) & at.HALF_MASK
        ring = self.memory[2 * place : 2 * (place + capacity)].reshape(capacity, 2)
        taken = ring[(start + np.arange(count)) % capacity]
        return taken[:, 0], np.diff(taken[:, 1], append=line[at.TOTAL])

    def digest(self, floor_ns: int, kind: str | None) -> NDArray[np.uint64]:
        """Sums of the hashes of all retained entries, in two lanes."""
        lanes = np.zeros(2, np.uint64)
        slots = self.slots_retained(floor_ns)
        for first in range(0, len(slots), _READ_AT_ONCE):
            lanes += self.entries_of(slots[first : first + _READ_AT_ONCE], floor_ns, kind or "int64").digest()
        return lanes

    def _lines(self) -> NDArray[np.int64]:
        return self.memory[: self.slots_used * at.LINE_WORDS].reshape(-1, at.LINE_WORDS)

    def check(self, kind: str | None) -> None:
        """Assert I1-I9. Slow: for tests."""
        users = entries = 0
        blocks: list[tuple[int, int]] = []
        for slot, line in enumerate(self._lines().tolist()):
            if line[at.META] == 0:
                assert self.marks[slot] == 0, f"I9: slot {slot}"
                continue
            users += 1
            assert self.marks[slot] >= at.MARKED, f"I9: slot {slot}"
            times, units = self.entries(slot)
            assert (times[1:] >= times[:-1]).all(), f"I2: slot {slot}"
            assert abs(units).max() <= self.control[at.UNITS_MAX], f"I3, I8: slot {slot}"
            if line[at.META] < at.RING_FROM:
                assert line[at.META] == 1, f"I1: slot {slot}"
                assert len(times) >= 1, f"I1: slot {slot}"
                assert line[at.TIMES : at.AMOUNTS] == sorted(line[at.TIMES : at.AMOUNTS]), f"I2: slot {slot}"
                absent = np.array(line[at.AMOUNTS :]).view("<i4")[: at.INLINE_CAPACITY - len(times)]
                assert not absent.any(), f"I3: slot {slot}"
                continue
            capacity, place = line[at.META] >> at.PLACE_BITS, line[at.META] & at.PLACE_MASK
            count, start = line[at.SPAN] >> at.HALF_BITS, line[at.SPAN] & at.HALF_MASK
            assert 1 <= count <= capacity > start >= 0, f"I1: slot {slot}"
            lines = capacity // at.BLOCK_ENTRIES
            assert capacity % at.BLOCK_ENTRIES == 0, f"I1: slot {slot}"
            assert lines in BLOCK_LINES or lines % at.SLAB_LINES == 0, f"I1: slot {slot}"
            newest = int(times[-1])
            left = int(np.searchsorted(times, max(newest - self.config.reach_ns, TIME_NS_MIN)))
            assert (line[at.NEWEST], line[at.LEFT]) == (newest, left), f"I4: slot {slot}"
            word = 2 * (place + (start + left) % capacity)
            assert [line[at.LEFT_TIME], line[at.LEFT_BEFORE]] == self.memory[word : word + 2].tolist(), f"I4: slot {slot}"
            blocks.append((place, capacity))
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
        assert free_slots == set(np.flatnonzero(self._lines()[:, at.META] == 0).tolist()), "I8: slots neither in use nor free"
        self._check_slabs(blocks)

    def _check_slabs(self, blocks: list[tuple[int, int]]) -> None:
        control, slab_entries = self.control, at.BLOCK_ENTRIES * at.SLAB_LINES
        base = int(control[at.RING_BASE])
        count, rest = divmod(int(control[at.RING_NEXT]) - base, slab_entries)
        assert rest == 0, "I8: the ring area does not end with a slab"
        assert sum(capacity for _, capacity in blocks) == at.BLOCK_ENTRIES * int(control[at.RING_LINES]), "I8: ring lines are miscounted"
        slabs = self.slabs[: count * at.SLAB_WORDS].reshape(-1, at.SLAB_WORDS).tolist()
        for lines in range(1, at.MAGAZINE_LINES + 1):
            magazine = at.MAGAZINES + (lines - 1) * at.MAGAZINE_WORDS
            places = control[magazine + 1 : magazine + 1 + int(control[magazine])].tolist()
            blocks = blocks + [(place, lines * at.BLOCK_ENTRIES) for place in places]
        held: list[set[int]] = [set() for _ in range(count)]  # lines in use, those in magazines among them
        for place, capacity in blocks:
            for line in range((place - base) // at.BLOCK_ENTRIES, (place - base + capacity) // at.BLOCK_ENTRIES):
                slab, lines = line // at.SLAB_LINES, capacity // at.BLOCK_ENTRIES
                assert slabs[slab][at.SLAB_BLOCK] == min(lines, at.SLAB_LINES), f"I8: slab {slab} has a block of another size"
                assert line not in held[slab], f"I8: line {line} is in two rings"
                held[slab].add(line)
        listed: dict[int, int] = {}
        for lines in range(at.SLAB_LINES + 1):
            previous, head = 0, int(control[at.SLAB_HEADS + lines])
            while head:
                assert head - 1 not in listed, f"I8: slab {head - 1} is listed twice"
                assert slabs[head - 1][at.SLAB_PREVIOUS] == previous, f"I8: slab {head - 1} is wrongly linked"
                listed[head - 1] = lines
                previous, head = head, slabs[head - 1][at.SLAB_NEXT]
        assert list(listed.values()).count(0) == int(control[at.POOL_SLABS]), "I8: slabs in the pool are miscounted"
        for slab, (bits, _, _, lines) in enumerate(slabs):
            if lines == 0:
                assert not held[slab], f"I8: slab {slab} is in the pool and in use"
                assert listed.get(slab) == 0, f"I8: slab {slab} is not in the pool"
                continue
            free = {
                slab * at.SLAB_LINES + block * lines + line
                for block in range(at.SLAB_LINES // lines)
                if bits >> block & 1
                for line in range(lines)
            }
            every = {slab * at.SLAB_LINES + line for line in range(at.SLAB_LINES // lines * lines)}
            assert not free & held[slab], f"I8: lines of slab {slab} are free and in use"
            assert free | held[slab] == every, f"I8: lines of slab {slab} are lost"
            assert held[slab], f"I8: slab {slab} should be in the pool"
            assert listed.get(slab) == (lines if bits else None), f"I8: slab {slab} is wrongly listed"


_NO_SCORES: Final = np.empty(0, np.float64)
_NO_SLOTS: Final = np.empty(0, np.int32)
_FIRST: Final = np.zeros(1, np.int32)
