"""User ids to dense slots: one shard's index.

The table holds 32-bit entries of a few tag bits and a slot; the ids themselves stand in the slot lines (integers) or in an arena of
bytes (strings, binary), and are always compared whole. How the table works is told in `kernels/probing.py`.
"""

from __future__ import annotations

import math
import secrets
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.columns import Ids
from engine.kernels import compact_arena, find_slots, hash_one, partition, read_ids, release_slots
from engine.kernels import layout as at
from engine.memory import reserved

#: Share of index entries in use when every slot is: one line of 16 in ten is full then.
LOAD: Final = 0.7

#: Below this much memory in free records the arena is not worth compacting.
COMPACT_FROM_UNITS: Final = 1 << 17

_NO_OFFSETS: Final = np.zeros(1, np.int64)


def random_keys(seed: int | None = None) -> NDArray[np.uint64]:
    """The secret of an engine's hashing (S14): four words, the last three odd. A `seed` makes them repeatable, for tests."""
    words = [secrets.randbits(64) for _ in range(4)] if seed is None else np.random.default_rng(seed).integers(0, 2**64, 4, np.uint64)
    keys = np.array(words, np.uint64)
    keys[1:] |= np.uint64(1)
    return keys


def split_rows(
    ids: Ids, reasons: NDArray[np.uint8], keys: NDArray[np.uint64], shards: int
) -> tuple[NDArray[np.uint64], list[NDArray[np.int32]]]:
    """Hash ids and list, for each shard, the rows that belong to it in arrival order. Rows with a reason are left out.

    Returns:
        hashes: (n,) of all rows.
        rows: One (m,) array a shard.
    """
    count = len(reasons)
    hashes = np.empty(count, np.uint64)
    rows = np.empty(count, np.int32)
    bounds = np.empty(shards + 1, np.int64)
    partition(ids.values, ids.offsets, ids.data, is_bytes(ids.kind), reasons, keys, shards, hashes, rows, bounds)
    return hashes, [rows[bounds[shard] : bounds[shard + 1]] for shard in range(shards)]


def hash_of(value: int, data: NDArray[np.uint8], by_bytes: bool, keys: NDArray[np.uint64], shards: int) -> tuple[int, int]:
    """Hash of one id, an integer or bytes, and the shard it belongs to."""
    found: int = hash_one(value, data, by_bytes, keys)
    return found, ((found >> 16 & 0xFFFF) * shards) >> 16


def is_bytes(kind: str | None) -> bool:
    """Whether ids of this kind are byte strings."""
    return kind in ("string", "binary")


class Index:
    """Ids of one shard's users and their slots.

    Invariants, with those of `Shard`:

    I5  Between the home line of an index entry and the line it is in, every line is full, and exactly the entries not in their home
        line are marked displaced.
    I6  Each slot in use is named by exactly one index entry, whose tag is that of its id; no entry names a free slot.
    I7  Each byte id has one record in the arena; records in use and free ones cover the arena's used part without overlap.
    """

    def __init__(self, slots_max: int, arena_bytes_max: int, keys: NDArray[np.uint64], control: NDArray[np.int64]) -> None:
        lines = math.ceil(slots_max / (LOAD * at.BUCKET)) + 1
        self.keys = keys
        self.control = control
        self.table: NDArray[np.uint32] = reserved(lines * at.BUCKET, np.uint32)
        self._arena_bytes_max = arena_bytes_max
        self.arena: NDArray[np.uint8] = reserved(arena_bytes_max, np.uint8, least=1 << 16)
        control[at.TABLE_LINES] = lines
        control[at.SLOT_BITS] = slots_max.bit_length()
        control[at.ARENA_LIMIT] = min(len(self.arena) // 8, 2**31)

    def room_for(self, batches: list[Ids]) -> bool:
        """Whether the arena can take all of these ids, even if each were new and none of its free records fitted."""
        worst = 0
        for ids in batches:
            if is_bytes(ids.kind):
                # A record has 4 bytes of length, is rounded up to 8, and above 512 bytes to a power of two.
                worst += 2 * (int(ids.offsets[-1]) - int(ids.offsets[0])) + 16 * len(ids)
        return int(self.control[at.ARENA_NEXT]) + worst // 8 <= int(self.control[at.ARENA_LIMIT])

    def takes_one(self, id_bytes: int) -> bool:
        """`room_for` of one id of so many bytes, 0 for an integer."""
        return int(self.control[at.ARENA_NEXT]) + (2 * id_bytes + 16) // 8 <= int(self.control[at.ARENA_LIMIT])

    def reserve(
        self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32], slots_max: int, memory: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], int]:
        """Slots of the users of these rows, made where they are new; and how many rows got one before all were in use."""
        slots = np.empty(len(rows), np.int32)
        return slots, self._look_up(ids, hashes, rows, True, slots_max, memory, slots)

    def _look_up(
        self,
        ids: Ids,
        hashes: NDArray[np.uint64],
        rows: NDArray[np.int32],
        made: bool,
        slots_max: int,
        memory: NDArray[np.int64],
        slots: NDArray[np.int32],
    ) -> int:
        return int(
            find_slots(
                ids.values,
                ids.offsets,
                ids.data,
                is_bytes(ids.kind),
                hashes,
                rows,
                made,
                slots_max,
                memory,
                self.table,
                self.control,
                self.arena,
                slots,
            )
        )

    def release(self, slots: NDArray[np.int32], count: int, kind: str, memory: NDArray[np.int64]) -> None:
        """Undo `reserve`: free the first `count` of the slots as far as they hold no entry."""
        release_slots(slots, count, memory, self.table, self.control, self.arena, self.keys, is_bytes(kind))

    def find(self, ids: Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int32], memory: NDArray[np.int64]) -> NDArray[np.int32]:
        """Slots of the users of these rows; -1 for those it does not know."""
        slots = np.empty(len(rows), np.int32)
        self._look_up(ids, hashes, rows, False, 0, memory, slots)
        return slots

    def ids_of(self, slots: NDArray[np.int32], kind: str, memory: NDArray[np.int64]) -> Ids:
        """The ids that slots stand for, in their order."""
        count = len(slots)
        values = np.empty(0 if is_bytes(kind) else count, np.int64)
        offsets = np.zeros(count + 1 if is_bytes(kind) else 1, np.int64)
        data = np.empty(0, np.uint8)
        if is_bytes(kind):
            length = read_ids(slots, count, 1, memory, self.arena, values, offsets, data)
            data = np.empty(length, np.uint8)
            read_ids(slots, count, 2, memory, self.arena, values, offsets, data)
        else:
            read_ids(slots, count, 0, memory, self.arena, values, offsets, data)
        return Ids(kind, values, offsets, data, None)

    def compact(self, memory: NDArray[np.int64]) -> bool:
        """Close the arena's gaps when more than half of it is free records. Returns whether it was done."""
        free, used = int(self.control[at.ARENA_FREE]), int(self.control[at.ARENA_NEXT])
        if free < COMPACT_FROM_UNITS or 2 * free < used:
            return False
        old = self.arena
        self.arena = reserved(len(old), np.uint8)
        self.control[at.ARENA_NEXT] = 0
        self.control[at.ARENA_HEADS : at.ARENA_HEADS + at.ARENA_CLASSES] = 0
        compact_arena(memory, self.control, old, self.arena)
        return True

    @property
    def bytes_used(self) -> int:
        """Memory the index takes, arena included."""
        return int(self.table.nbytes) + 8 * int(self.control[at.ARENA_NEXT])

    def check(self, memory: NDArray[np.int64], kind: str | None) -> None:
        """Assert I5-I7. Slow: for tests."""
        lines = int(self.control[at.TABLE_LINES])
        slot_mask = (1 << int(self.control[at.SLOT_BITS])) - 1
        used = np.array([slot for slot in range(int(self.control[at.SLOTS_USED])) if memory[slot * at.LINE_WORDS + at.META] != 0], np.int32)
        ids = self.ids_of(used, kind or "int64", memory)
        hashes, _ = split_rows(ids, np.zeros(len(used), np.uint8), self.keys, 1)
        cells = np.asarray(self.table).reshape(lines, at.BUCKET).astype(np.int64)
        where: dict[int, tuple[int, int]] = {}
        for line, position in zip(*np.nonzero(cells), strict=True):
            entry = int(cells[line, position])
            slot = (entry & slot_mask) - 1
            assert slot not in where, f"I6: two index entries name slot {slot}"
            where[slot] = (int(line), entry)
        assert sorted(where) == used.tolist(), "I6: index entries and slots in use differ"
        full = (cells != 0).all(axis=1)
        for slot, value in zip(used.tolist(), hashes.tolist(), strict=True):
            line, entry = where[slot]
            home = ((value >> 32) * lines) >> 32
            tag = ((value & at.HALF_MASK) << int(self.control[at.SLOT_BITS])) & (at.DISPLACED - 1)
            assert entry & (at.DISPLACED - 1) & ~slot_mask == tag, f"I6: the tag of slot {slot} is not that of its id"
            assert bool(entry & at.DISPLACED) == (line != home), f"I5: slot {slot} is wrongly marked"
            while home != line:
                assert full[home], f"I5: line {home} has room, yet slot {slot} is beyond it"
                home = (home + 1) % lines
        if is_bytes(kind):
            self._check_arena(memory, used)

    def _check_arena(self, memory: NDArray[np.int64], used: NDArray[np.int32]) -> None:
        records: list[tuple[int, int]] = []
        for slot in used.tolist():
            place = int(memory[slot * at.LINE_WORDS + at.ID]) >> at.HALF_BITS
            length = int.from_bytes(self.arena[place * 8 : place * 8 + 4].tobytes(), "little")
            records.append((place, _record_units(length)))
        free = 0
        for size_class in range(at.ARENA_CLASSES):
            units = size_class if size_class < at.ARENA_EXACT else at.ARENA_EXACT << (size_class - at.ARENA_EXACT + 1)
            head = int(self.control[at.ARENA_HEADS + size_class])
            while head:
                records.append((head - 1, units))
                free += units
                head = int.from_bytes(self.arena[(head - 1) * 8 : head * 8].tobytes(), "little")
        assert free == int(self.control[at.ARENA_FREE]), "I7: units in free records are miscounted"
        following = 0
        for place, units in sorted(records):
            assert place == following, f"I7: arena unit {following} is lost or shared"
            following += units
        assert following == int(self.control[at.ARENA_NEXT]), "I7: the arena's end is wrong"


def _record_units(length: int) -> int:
    units = (length + 4 + 7) // 8
    if units < at.ARENA_EXACT:
        return units
    size = 2 * at.ARENA_EXACT
    while size < units:
        size *= 2
    return size
