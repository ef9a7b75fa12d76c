"""All shards as one: rows and lookups are split by user, worked on side by side, and put together again.

Which shard a user is in depends on the engine's secret and on the number of shards, and changes no result. Here it is also decided
whether a batch fits (S13): nothing of it is applied before there is a slot for each of its users and room for its rings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.capacity import users_peak
from engine.columns import Columns, Ids, ids_of, ids_to_arrow
from engine.config import RING_CAPACITY_MAX, TIME_NS_MIN, Config
from engine.entries import Entries
from engine.errors import CapacityError
from engine.index import hash_of, is_bytes, random_keys, split_rows
from engine.kernels import layout as at
from engine.memory import Budget, process_budget
from engine.shard import Features, Shard, UserFeatures

#: Slots of a shard that `greatest` looks at together: their features stay in the second-level cache.
_RANKED_SLOTS: Final = 1 << 14

#: Fewer rows than this are not worth waking another thread for.
_THREADED_ROWS: Final = 4096

#: Slots whose marks expiry looks at after a batch: so often round all users while the clock moves by one retention, so that a user's
#: memory is back a thirtieth of it late; at least so many at a time, and at most so many after a batch, which takes a millisecond.
_SWEEP_ROUNDS: Final = 32
_SWEEP_SLOTS_MIN: Final = 1 << 12
_SWEEP_SLOTS_MAX: Final = 1 << 22

#: Slots that expiry looks into after a batch, at most: so many, and two for each row. So it keeps pace, and takes no longer than rows do.
_SWEEP_LOOKED: Final = 256

#: Room beside the slots in use for those that come into use before a copy of them begins.
_ROOM_SLOTS: Final = 1 << 16

#: What rows take beside the bytes of their ids: the first one of a user a slot line, the others so much of rings, on average over a batch.
_ROW_SLOT_BYTES: Final = 65
_ROW_RING_BYTES: Final = 64
_ROW_BYTES: Final = _ROW_SLOT_BYTES + _ROW_RING_BYTES

#: Memory is counted anew before so much more of it may be taken: some thousand rows, so that it costs nothing where rows come one by one.
_UNCOUNTED_BYTES: Final = 1 << 20

Answer = TypeVar("Answer")
Rows = NDArray[np.int32]
Sweep = tuple[int, int, int]  # the arguments of `Shard.sweep`
_NO_SWEEPS: Final[Sequence[Sweep]] = ()


@dataclass(slots=True)
class Piece:
    """One record batch on its way into the shards."""

    columns: Columns
    clock_ns: NDArray[np.int64]  # (n,) the clock just after each row
    admitted: int  # rows that passed all guards
    units_max: int  # greatest |units| of these
    hashes: NDArray[np.uint64]  # (n,)
    rows: list[Rows]  # those rows, for each shard, in arrival order
    scores: NDArray[np.float64] | None  # (n,) where to write scores, if they are wanted
    applied: int = 0  # rows that a shard has taken up


class Shards:
    """The users of one engine, spread over its shards."""

    def __init__(self, config: Config) -> None:
        self.config: Final = config
        self._keys = random_keys()
        self._pool: ThreadPoolExecutor | None = None
        self.budget: Budget
        self._uncounted_bytes = 0  # what rows may still take before memory is counted
        self._sweep_debt = 0.0  # rounds over all slots that expiry is behind
        slots_max = _slots_of_one(config.users, config.shards)
        self._shards = [Shard(config, slots_max, self._keys) for _ in range(config.shards)]
        self.share(process_budget())

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    @property
    def users(self) -> int:
        """Slots in use, those of users whose last transaction has expired included."""
        return sum(shard.users for shard in self._shards)

    @property
    def bytes_used(self) -> int:
        """Memory of the state that has been touched."""
        return sum(shard.bytes_used for shard in self._shards)

    def share(self, budget: Budget) -> None:
        """Take memory of this budget."""
        self.budget = budget
        budget.join(self)

    # ---- rows in -------------------------------------------------------------------------------------------------------------

    def route(self, columns: Columns, clock_ns: NDArray[np.int64], admitted: int, units_max: int, wanted: bool) -> Piece:
        """Split the rows that passed the guards by shard."""
        hashes, rows = self._split(columns.ids, columns.reasons)
        scores = np.empty(len(columns), np.float64) if wanted else None
        return Piece(columns, clock_ns, admitted, units_max, hashes, rows, scores)

    def apply(self, pieces: list[Piece], kind: str, clock_ns: int | None) -> None:
        """A slot for each user, then rows into rings.

        Args:
            pieces: What is applied whole or not at all.
            kind: Kind of its ids.
            clock_ns: The clock before it.

        Raises:
            CapacityError: It does not fit; nothing of it was applied.
        """
        rows = sum(piece.admitted for piece in pieces)
        self._check_room(pieces, rows)
        self._check_memory(pieces, rows, kind, clock_ns)
        if self.users + rows <= self.config.users:
            for piece in pieces:
                clock_ns = self._apply_one(piece, kind, clock_ns)
        else:
            self._apply_tight(pieces, kind, clock_ns)
            for piece in pieces:
                clock_ns = self._swept(piece, kind, clock_ns)

    def add(self, value: int, data: NDArray[np.uint8], kind: str, units: int, when_ns: int, clock_ns: int) -> float | None:
        """Apply one row of one user, an integer or bytes, that passed the guards. Returns its score.

        None, and nothing done, if it takes more than that: making room, or a sum so large that the row may be refused.
        """
        self._uncounted_bytes -= _ROW_BYTES + 2 * len(data)
        if self._uncounted_bytes < 0:
            return None
        found, number = hash_of(value, data, is_bytes(kind), self._keys, len(self._shards))
        shard = self._shards[number]
        if self.users >= self.config.users or not shard.takes_one(len(data), abs(units)):
            return None
        after_ns = max(clock_ns, when_ns)
        score = shard.add(value, data, kind, found, units, when_ns, after_ns)
        for each, sweep in zip(self._shards, self._sweeps(after_ns, after_ns - clock_ns, 1), strict=False):
            each.sweep(kind, *sweep)
        return score

    def _apply_one(self, piece: Piece, kind: str, clock_ns: int | None) -> int | None:
        """Slots, rings and expiry in one go for a piece that certainly fits, unless a shard got far more than its share of the users.

        Returns the clock after it.
        """
        if any(shard.users + len(rows) > shard.slots_max for shard, rows in zip(self._shards, piece.rows, strict=True)):
            self._apply_tight([piece], kind, clock_ns)
            return self._swept(piece, kind, clock_ns)
        if piece.admitted:
            sweeps, clock_ns = self._sweeps_after(piece, clock_ns)
            piece.applied += self._put(piece, [None] * len(self._shards), sweeps, kind)
        return clock_ns

    def _apply_tight(self, pieces: list[Piece], kind: str, clock_ns: int | None) -> None:
        """As `apply`, for batches that may not fit: users whose transactions have expired make room first."""
        if self._apply_reserved(pieces, kind):
            return
        if clock_ns is not None:
            self.expire(clock_ns, kind)
        if self._apply_reserved(pieces, kind):
            return
        peak = self._users_peak(pieces, clock_ns)
        if peak > self.config.users:
            raise CapacityError(
                f"the batch needs room for {peak:,} users with a retained transaction at a time, users={self.config.users:,} is the most; "
                "nothing of it was applied; make the engine with more users, or use more partitions"
            )
        for piece in pieces:
            self._apply_range(piece, 0, len(piece.columns), kind)

    def _apply_reserved(self, pieces: list[Piece], kind: str) -> bool:
        """Slots for all pieces, then their rows; False, and nothing changed, if there are not enough slots."""
        reserved: list[list[Rows]] = []
        for piece in pieces:
            slots = self._reserve(piece, kind)
            if slots is None:
                for done in reserved:
                    self._release(done, kind)
                return False
            reserved.append(slots)
        for piece, slots in zip(pieces, reserved, strict=True):
            piece.applied += self._put(piece, slots, _NO_SWEEPS, kind)
        return True

    def _apply_range(self, piece: Piece, first: int, last: int, kind: str) -> None:
        """Apply the rows [first, last) of a piece that is known to fit as users come and go within it."""
        rows = [mine[np.searchsorted(mine, first) : np.searchsorted(mine, last)] for mine in piece.rows]
        earliest = min((int(mine[0]) for mine in rows if len(mine)), default=None)
        if earliest is None:
            return
        self.expire(int(piece.clock_ns[earliest]), kind)
        part = Piece(piece.columns, piece.clock_ns, sum(map(len, rows)), piece.units_max, piece.hashes, rows, piece.scores)
        slots = self._reserve(part, kind)
        if slots is not None:
            piece.applied += self._put(part, slots, _NO_SWEEPS, kind)
        elif part.admitted == 1:
            raise CapacityError(
                f"a shard is full before users={self.config.users:,} are; the rows before it were applied; use fewer shards or more users"
            )
        else:
            middle = (first + last) // 2
            self._apply_range(piece, first, middle, kind)
            self._apply_range(piece, middle, last, kind)

    def _reserve(self, piece: Piece, kind: str) -> list[Rows] | None:
        """Slots of the piece's rows, per shard; None, and nothing changed, if there are not enough."""
        ids, hashes = piece.columns.ids, piece.hashes
        found = self._each(piece.rows, lambda shard, rows: shard.reserve(ids, hashes, rows), piece.admitted)
        complete = all(done == len(rows) for (_, done), rows in zip(found, piece.rows, strict=True))
        if complete and self.users <= self.config.users:
            return [slots for slots, _ in found]
        self._release([slots[:done] for slots, done in found], kind)
        return None

    def _release(self, slots: list[Rows], kind: str) -> None:
        for shard, reserved in zip(self._shards, slots, strict=True):
            shard.release(reserved, len(reserved), kind)

    def _put(self, piece: Piece, slots: Sequence[Rows | None], sweeps: Sequence[Sweep], kind: str) -> int:
        """Rows into shards, and then expiry, if there are sweeps. Returns the rows applied."""

        def put(shard: Shard, work: tuple[Rows, Rows | None, Sweep | None]) -> int:
            rows, mine, sweep = work
            applied = 0
            if len(rows):
                applied = shard.take(piece.columns, piece.hashes, piece.clock_ns, piece.units_max, rows, mine, piece.scores)
            if sweep:
                shard.sweep(kind, *sweep)
            return applied

        return sum(self._each(list(zip_longest(piece.rows, slots, sweeps)), put, piece.admitted))

    def _check_memory(self, pieces: list[Piece], rows: int, kind: str, clock_ns: int | None) -> None:
        """That the rows certainly fit into memory, expired users having left, or take none that was not taken before."""
        columns = [piece.columns for piece in pieces if piece.admitted]
        id_bytes = sum(int(each.ids.offsets[-1] - each.ids.offsets[0]) for each in columns if is_bytes(each.ids.kind))
        self._uncounted_bytes -= rows * _ROW_BYTES + 2 * id_bytes
        if rows == 0 or self._uncounted_bytes >= 0:
            return
        self._uncounted_bytes = 0
        left = self._bytes_left(rows, id_bytes)
        if left < 0 and clock_ns is not None:
            self.expire(clock_ns, kind)
            self._all(Shard.count_again)
            left = self._bytes_left(rows, id_bytes)
        if left < 0 and not self._leaves_room(pieces, rows, id_bytes):
            raise CapacityError(
                f"memory is full: all engines of this process may take {self.budget.bytes_max:,} bytes, seven eighths of what this "
                f"machine or control group has; this one has {self.bytes_used:,} of {self.budget.left_for(self):,} that the others leave, "
                f"and {rows:,} rows more may need too many; nothing of them was applied; use a shorter window or lateness, smaller "
                "batches, more processes or more memory (riskring plan tells how much)"
            )
        self._uncounted_bytes = min(max(left, 0), _UNCOUNTED_BYTES)

    def _leaves_room(self, pieces: list[Piece], rows: int, id_bytes: int) -> bool:
        """Whether a small batch moves the clock so far that memory will do when it has been applied: else a full engine stayed full.

        Meanwhile the state may grow into what is left of the machine's memory.
        """
        more = _ROW_BYTES * rows + 2 * id_bytes
        if more > self.budget.bytes_max // 16:
            return False
        after_ns = max(int(piece.clock_ns[-1]) for piece in pieces if piece.admitted)
        users, transactions = self.retained(after_ns)
        fixed = sum(shard.index.table.nbytes for shard in self._shards)
        ids = sum(8 * int(shard.control[at.ARENA_NEXT]) for shard in self._shards) * users // max(self.users, 1)
        return fixed + _ROW_SLOT_BYTES * users + 2 * 16 * transactions + ids + more <= self.budget.left_for(self)

    def _bytes_left(self, rows: int, id_bytes: int) -> int:
        """Memory that is left when so many rows more have been applied; less than 0 if it may be too little."""
        parts = np.array([shard.bytes_by_part for shard in self._shards]).sum(axis=0).tolist()
        rings, users, free_rings, free_slots, free_ids, largest = parts
        new_users = min(rows, max(self.config.users - self.users, 0))
        rings_more = max(_ROW_RING_BYTES * rows - free_rings, 0) + largest
        users_more = max(_ROW_SLOT_BYTES * new_users - free_slots, 0) + max(2 * id_bytes - free_ids, 0)
        if rings_more + users_more == 0:
            return 0
        # Neither may take all: what a flood of users has taken serves no rings when these users are gone, and the other way round.
        most = self.budget.left_for(self)
        alone = most - self.budget.bytes_max // 16
        left: int = min(most - rings - rings_more - users - users_more, alone - rings - rings_more, alone - users - users_more)
        return left

    def _check_room(self, pieces: list[Piece], rows: int) -> None:
        of_one = rows
        if rows > RING_CAPACITY_MAX // 2:  # then it matters how many rows one user has at most
            hashes = pa.chunked_array([pa.array(piece.hashes[piece.columns.reasons == 0]) for piece in pieces])
            of_one = pc.max(hashes.value_counts().field("counts")).as_py()
        for number, shard in enumerate(self._shards):
            if rows < _THREADED_ROWS and all(len(piece.rows[number]) == 0 for piece in pieces):
                continue  # nothing is for it, which is worth knowing when rows come one by one
            if not shard.room_for(rows, of_one):
                raise CapacityError(
                    f"no room for the rings of {rows:,} rows more: memory is full of retained transactions, or one user has 2**26 of them; "
                    "nothing of the batch was applied; use a shorter window or lateness, or more partitions"
                )
            if not shard.index.room_for([piece.columns.ids for piece in pieces]):
                raise CapacityError(
                    "no room for the bytes of the batch's user ids; nothing of it was applied; use shorter ids or more partitions"
                )

    def _users_peak(self, pieces: list[Piece], clock_ns: int | None) -> int:
        """Most users with a retained transaction just after any row of a batch."""
        admitted = [np.flatnonzero(piece.columns.reasons == 0) for piece in pieces]
        ids = [ids_to_arrow(piece.columns.ids).take(pa.array(rows)) for piece, rows in zip(pieces, admitted, strict=True)]
        encoded = pa.concat_arrays(_same_type(ids)).dictionary_encode()
        distinct = ids_of(encoded.dictionary, self.config.user_id)
        hashes, rows_of = self._split(distinct, np.zeros(len(distinct), np.uint8))
        users = np.full(len(distinct), -1)
        newest_of, held = [], 0
        for shard, rows in zip(self._shards, rows_of, strict=True):
            slots = shard.slots_retained(self._floor_ns(clock_ns))
            number_of = np.full(shard.slots_used + 1, -1)  # the last element is that of slot -1: unknown
            number_of[slots] = held + np.arange(len(slots))
            users[rows] = number_of[shard.find(distinct, hashes, rows)]
            newest_of.append(shard.newest(slots))
            held += len(slots)
        users[users < 0] = held + np.arange(int((users < 0).sum()))
        return users_peak(
            users[encoded.indices.to_numpy()],
            np.concatenate([piece.columns.time_ns[rows] for piece, rows in zip(pieces, admitted, strict=True)]),
            np.concatenate([piece.clock_ns[rows] for piece, rows in zip(pieces, admitted, strict=True)]),
            self.config.retention_ns,
            np.concatenate(newest_of),
        )

    # ---- scores out ----------------------------------------------------------------------------------------------------------

    def scores(self, ids: Ids, unknown: NDArray[np.uint8], at_ns: int) -> NDArray[np.float64]:
        """Scores of users at an instant; 0.0 where `unknown` is set."""
        scores = np.zeros(len(ids), np.float64)
        hashes, rows = self._split(ids, unknown)
        self._each(rows, lambda shard, mine: shard.scores(ids, hashes, mine, at_ns, scores), len(ids))
        return scores

    def score(self, value: int, data: NDArray[np.uint8], by_bytes: bool, at_ns: int) -> float:
        """Score of one user, an integer or bytes, at an instant."""
        found, shard = hash_of(value, data, by_bytes, self._keys, len(self._shards))
        return self._shards[shard].score(value, data, by_bytes, found, at_ns)

    def features(self, ids: Ids, unknown: NDArray[np.uint8], at_ns: int, clock_ns: int | None) -> Features:
        """Features of users at an instant, those of unknown users where `unknown` is set."""
        features = Features.empty(len(ids))
        floor_ns = self._floor_ns(clock_ns)
        hashes, rows = self._split(ids, unknown)
        self._each(rows, lambda shard, mine: shard.features(mine, shard.find(ids, hashes, mine), at_ns, floor_ns, features), len(ids))
        return features

    def features_of_one(self, value: int, data: NDArray[np.uint8], by_bytes: bool, at_ns: int, clock_ns: int | None) -> UserFeatures:
        """Features of one user, an integer or bytes, at an instant."""
        found, shard = hash_of(value, data, by_bytes, self._keys, len(self._shards))
        return self._shards[shard].features_of_one(value, data, by_bytes, found, at_ns, self._floor_ns(clock_ns))

    def features_of_all(self, kind: str, at_ns: int, clock_ns: int | None) -> tuple[Any, Features]:
        """Arrow ids and features of all users with a retained transaction, in no particular order."""
        slots_of = self._all(lambda shard: shard.slots_retained(self._floor_ns(clock_ns)))
        features = self._features_of_slots(slots_of, at_ns, clock_ns)
        return self._ids_of_slots(slots_of, kind), features

    def greatest(self, part: int, count: int, by: str, kind: str, at_ns: int, clock_ns: int | None) -> tuple[Any, Features] | None:
        """Arrow ids and features of the users of a part that may be the greatest by a column; None behind the last part."""
        first = part * _RANKED_SLOTS
        if first >= max(shard.slots_used for shard in self._shards):
            return None
        slots_of = [shard.slots_among(first, first + _RANKED_SLOTS) for shard in self._shards]
        features = self._features_of_slots(slots_of, at_ns, clock_ns)
        rows = features.greatest(by, count)
        bounds = np.cumsum([0] + [len(slots) for slots in slots_of])
        ends = np.searchsorted(rows, bounds)
        chosen = [slots[rows[low:high] - start] for slots, start, low, high in zip(slots_of, bounds[:-1], ends[:-1], ends[1:], strict=True)]
        return self._ids_of_slots(chosen, kind), features.take(rows)

    def forget_reports(self) -> None:
        """Take it that nothing was ever reported of any user."""
        for shard in self._shards:
            shard.watch = None

    def changed(self, kind: str, at_ns: int, clock_ns: int | None, touched: bool) -> Iterator[tuple[Any, Features]]:
        """Arrow ids and features of users whose score at an instant is another than was last reported: those with slots, then others."""
        left = [ids for shard in self._shards for ids in self._left(shard)]
        slots_of = self._all(lambda shard: shard.changed(at_ns, touched))
        yield self._ids_of_slots(slots_of, kind), self._features_of_slots(slots_of, at_ns, clock_ns)
        for ids in left:
            yield ids, Features.empty(len(ids))

    def _left(self, shard: Shard) -> Iterator[Any]:
        """Arrow ids of users who have lost their slots since the last report, and who are not back. It has then been reported."""
        gone = [] if shard.watch is None else shard.watch.gone
        while shard.watch is not None and gone:
            ids, reported = gone.pop()
            hashes, _ = self._split(ids, np.zeros(len(ids), np.uint8))
            slots = shard.find(ids, hashes, np.arange(len(ids), dtype=np.int32))
            shard.watch.came_back(slots[slots >= 0], reported[slots >= 0])
            yield ids_to_arrow(ids).take(pa.array(np.flatnonzero(slots < 0)))

    def _features_of_slots(self, slots_of: list[Rows], at_ns: int, clock_ns: int | None) -> Features:
        floor_ns = self._floor_ns(clock_ns)
        bounds = np.cumsum([0] + [len(slots) for slots in slots_of])
        features = Features.empty(int(bounds[-1]))
        work = [(np.arange(first, first + len(slots), dtype=np.int32), slots) for first, slots in zip(bounds[:-1], slots_of, strict=True)]
        self._each(work, lambda shard, mine: shard.features(mine[0], mine[1], at_ns, floor_ns, features), int(bounds[-1]))
        return features

    def _ids_of_slots(self, slots_of: list[Rows], kind: str) -> Any:
        return pa.concat_arrays(
            _same_type([ids_to_arrow(shard.ids_of(slots, kind)) for shard, slots in zip(self._shards, slots_of, strict=True)])
        )

    def entries(self, ids: Ids, unknown: NDArray[np.uint8], clock_ns: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Times and units of one user's retained transactions, oldest first."""
        hashes, rows = self._split(ids, unknown)
        for shard, mine in zip(self._shards, rows, strict=True):
            for slot in shard.find(ids, hashes, mine).tolist():
                if slot >= 0:
                    times, units = shard.entries(slot)
                    retained = times >= self._floor_ns(clock_ns)
                    return times[retained], units[retained]
        return np.empty(0, np.int64), np.empty(0, np.int64)

    # ---- upkeep --------------------------------------------------------------------------------------------------------------

    def expire(self, clock_ns: int, kind: str | None) -> int:
        """Free all entries that no exact lookup can need when the clock is there. Returns how many."""
        floor_ns = self._floor_ns(clock_ns)
        return sum(self._all(lambda shard: shard.expire(floor_ns, kind)))

    def _swept(self, piece: Piece, kind: str, clock_ns: int | None) -> int | None:
        """Expire in keeping with a piece that has been applied. Returns the clock after it."""
        if piece.admitted:
            sweeps, clock_ns = self._sweeps_after(piece, clock_ns)
            for shard, sweep in zip(self._shards, sweeps, strict=False):
                shard.sweep(kind, *sweep)
        return clock_ns

    def _sweeps_after(self, piece: Piece, clock_ns: int | None) -> tuple[Sequence[Sweep], int]:
        after_ns = int(piece.clock_ns[-1])
        return self._sweeps(after_ns, after_ns - (after_ns if clock_ns is None else clock_ns), piece.admitted), after_ns

    def _sweeps(self, clock_ns: int, moved_ns: int, rows: int) -> Sequence[Sweep]:
        """What each shard is to expire, in keeping with how far the clock has moved, and with the rows that came; or nothing yet."""
        if moved_ns == 0 and self._sweep_debt == 0:
            return _NO_SWEEPS
        debt = self._sweep_debt + _SWEEP_ROUNDS * moved_ns / max(self.config.retention_ns, 1)
        self._sweep_debt = min(debt, float(_SWEEP_ROUNDS))
        used = sum(shard.slots_used for shard in self._shards)
        slots = int(min(self._sweep_debt * used, _SWEEP_SLOTS_MAX))
        if slots == 0 or slots < min(used, _SWEEP_SLOTS_MIN):
            return _NO_SWEEPS  # not worth the call yet
        self._sweep_debt -= slots / used
        floor_ns = self._floor_ns(clock_ns)
        most = _SWEEP_LOOKED + 2 * rows // len(self._shards)
        return [(floor_ns, 1 + slots * shard.slots_used // used, most) for shard in self._shards]

    def retained(self, clock_ns: int | None) -> tuple[int, int]:
        """Users with a retained transaction, and retained transactions."""
        floor_ns = self._floor_ns(clock_ns)
        counts = self._all(lambda shard: shard.retained(floor_ns))
        return sum(users for users, _ in counts), sum(entries for _, entries in counts)

    def digest(self, clock_ns: int | None, kind: str | None) -> NDArray[np.uint64]:
        """Sums of the hashes of all retained transactions, in two lanes."""
        floor_ns = self._floor_ns(clock_ns)
        return sum(self._all(lambda shard: shard.digest(floor_ns, kind)), np.zeros(2, np.uint64))

    def begin_copy(self, clock_ns: int | None, kind: str, rooms: list[NDArray[np.bool_]]) -> None:
        """Copy what is retained now, while rows go on. `rooms` is what `copy_rooms` gave."""
        for shard, room in zip(self._shards, rooms, strict=True):
            shard.begin_copy(room, self._floor_ns(clock_ns), kind)

    def copy_rooms(self) -> list[NDArray[np.bool_]]:
        """Memory for `begin_copy`, touched beforehand."""
        return [np.ones(shard.slots_used + _ROOM_SLOTS, np.bool_) for shard in self._shards]

    def copied(self) -> list[Entries] | None:
        """Some of the copy; None when that was all."""
        for shard in self._shards:
            if shard.copy is not None and not shard.copy.complete:
                return shard.copy.take()
        return None

    def end_copy(self) -> None:
        """Forget the copy, whole or not."""
        for shard in self._shards:
            shard.copy = None

    def close(self) -> None:
        """Free memory and threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._shards = []

    # ---- shared --------------------------------------------------------------------------------------------------------------

    def _floor_ns(self, clock_ns: int | None) -> int:
        """Transactions before it are no longer retained."""
        return TIME_NS_MIN if clock_ns is None else max(clock_ns - self.config.retention_ns, TIME_NS_MIN)

    def _split(self, ids: Ids, reasons: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], list[Rows]]:
        return split_rows(ids, reasons, self._keys, len(self._shards))

    def _all(self, task: Callable[[Shard], Answer]) -> list[Answer]:
        """Run a task on every shard that passes over all of its slots."""
        return self._each([None] * len(self._shards), lambda shard, _: task(shard), sum(shard.slots_used for shard in self._shards))

    def _each(self, work: list[Any], task: Callable[[Shard, Any], Answer], rows: int) -> list[Answer]:
        """Run a task on every shard with its share of the work, on threads when there are rows enough."""
        if len(self._shards) == 1 or rows < _THREADED_ROWS:
            return [task(shard, share) for shard, share in zip(self._shards, work, strict=True)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self._shards), thread_name_prefix="riskring")
        return list(self._pool.map(task, self._shards, work))


def _slots_of_one(users: int, shards: int) -> int:
    """Slots of one shard: its share of the users and eight standard deviations, but never more than all of them."""
    share = users / shards
    return min(users, int(share + 8 * share**0.5) + 64)


def _same_type(arrays: list[Any]) -> list[Any]:
    """One Arrow type for all: the larger offsets, if any of them needed these."""
    large = {pa.large_string(), pa.large_binary()} & {array.type for array in arrays}
    return [array.cast(kind) for kind in large for array in arrays] or arrays
