"""The index: user ids to slots, in a table of 32-bit entries.

An entry is `DISPLACED | tag | slot + 1` (0: empty); a line of 16 entries fills one 64-byte memory line. A hash names a home line
and a position in it where the search begins. An id is put into its home line if that has room, else into the next line that has,
and is then DISPLACED. So (invariant I5): *between the home line of an entry and the line it is in, every line is full*, and a
search ends at the first line with an empty entry. Removal keeps this by pulling displaced entries back, which needs no tombstones;
at a load of 0.7 one line in ten is full, so it is rarely more than clearing the entry. This is linear probing with
backward-shift deletion (Knuth, The Art of Computer Programming 3, section 6.4, algorithm R), with lines for cells.
"""

import numpy as np

from engine.kernels.compile import I32, I32_IN, I64, I64_IN, U8, U8_IN, U32, U64_IN, boolean, i64, inline, kernel, prefetch
from engine.kernels.hashing import U32 as SHIFT_32
from engine.kernels.hashing import hash_integer, load_word
from engine.kernels.layout import (
    AHEAD,
    ARENA_EXACT,
    ARENA_FREE,
    ARENA_HEADS,
    ARENA_NEXT,
    BUCKET,
    DISPLACED,
    HALF_BITS,
    HALF_MASK,
    ID,
    INLINE_CAPACITY,
    LINE_WORDS,
    PLACE_BITS,
    RING,
    SLOT_BITS,
    SLOT_FREE,
    SLOTS_MAX,
    SLOTS_USED,
    SPAN,
    TABLE_LINES,
    TOTAL,
    USERS,
)

U = np.uint64
ENTRY_MASK = DISPLACED - 1


@inline
def home_of(high, lines):
    """Home line from the high half of a hash."""
    return (high * lines) >> 32


@inline
def high_half(h):
    """The high half of a hash, as a non-negative int64."""
    return np.int64(h >> SHIFT_32)


@inline
def low_half(h):
    """The low half of a hash, as a non-negative int64."""
    return np.int64(h & U(HALF_MASK))


@inline
def same_bytes(arena, place, data, first, last):
    """Whether the arena's record at `place` is data[first:last]."""
    at = place * 8
    length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
    if length != last - first:
        return False
    at += 4
    while first + 8 <= last:
        if load_word(arena, at) != load_word(data, first):
            return False
        at += 8
        first += 8
    while first < last:
        if arena[at] != data[first]:
            return False
        at += 1
        first += 1
    return True


@inline
def probe(memory, table, lines, slot_bits, arena, h, value, data, first, last, is_bytes):
    """Slot of an id, or -1."""
    slot_mask = (1 << slot_bits) - 1
    tag_mask = ENTRY_MASK & ~slot_mask
    low = low_half(h)
    want = ((low >> 4) << slot_bits) & ENTRY_MASK
    line = home_of(high_half(h), lines)
    for _ in range(lines):
        base = line * BUCKET
        full = True
        for step in range(BUCKET):
            entry = np.int64(table[base + ((low + step) & (BUCKET - 1))])
            if entry == 0:
                full = False
            elif (entry & tag_mask) == want:
                slot = (entry & slot_mask) - 1
                word = memory[slot * LINE_WORDS + ID]
                if is_bytes:
                    if (word & HALF_MASK) == high_half(h) and same_bytes(arena, word >> HALF_BITS, data, first, last):
                        return slot
                elif word == value:
                    return slot
        if not full:
            return -1
        line += 1
        if line == lines:
            line = 0
    return -1


@inline
def guess(table, lines, slot_bits, h):
    """First slot in the home line whose tag fits, or -1: what to prefetch."""
    slot_mask = (1 << slot_bits) - 1
    tag_mask = ENTRY_MASK & ~slot_mask
    low = low_half(h)
    want = ((low >> 4) << slot_bits) & ENTRY_MASK
    base = home_of(high_half(h), lines) * BUCKET
    for step in range(BUCKET):
        entry = np.int64(table[base + ((low + step) & (BUCKET - 1))])
        if entry != 0 and (entry & tag_mask) == want:
            return (entry & slot_mask) - 1
    return -1


@inline
def insert(table, lines, slot_bits, h, slot):
    """Put a slot whose id is not in the table into it. There is room: the load is at most 0.7."""
    low = low_half(h)
    entry = (((low >> 4) << slot_bits) & ENTRY_MASK) | (slot + 1)
    line = home_of(high_half(h), lines)
    while True:
        base = line * BUCKET
        for step in range(BUCKET):
            at = base + ((low + step) & (BUCKET - 1))
            if table[at] == 0:
                table[at] = entry
                return
        entry |= DISPLACED
        line += 1
        if line == lines:
            line = 0


@inline
def slot_high(memory, keys, slot, is_bytes):
    """High half of the hash of the id in a slot."""
    word = memory[slot * LINE_WORDS + ID]
    if is_bytes:
        return word & HALF_MASK
    return high_half(hash_integer(word, keys))


@inline
def remove(memory, table, lines, slot_bits, keys, slot, is_bytes):
    """Take a slot out of the table and pull displaced entries back (I5)."""
    slot_mask = (1 << slot_bits) - 1
    line = home_of(slot_high(memory, keys, slot, is_bytes), lines)
    hole = -1
    while hole < 0:
        base = line * BUCKET
        for at in range(base, base + BUCKET):
            if (np.int64(table[at]) & slot_mask) == slot + 1:
                hole = at
        if hole < 0:
            line += 1
            if line == lines:
                line = 0
    full = True
    for at in range(line * BUCKET, line * BUCKET + BUCKET):
        if table[at] == 0:
            full = False
    table[hole] = 0
    hole_line = line
    while full:  # the line with the hole was full: an entry further on may belong here
        line += 1
        if line == lines:
            line = 0
        if line == hole_line:
            return
        base = line * BUCKET
        moved = -1
        moved_home = -1
        for at in range(base, base + BUCKET):
            entry = np.int64(table[at])
            if entry == 0:
                full = False
            elif entry & DISPLACED and moved < 0:
                home = home_of(slot_high(memory, keys, (entry & slot_mask) - 1, is_bytes), lines)
                if (line - home + lines) % lines >= (line - hole_line + lines) % lines:
                    moved = at
                    moved_home = home
        if moved >= 0:
            entry = np.int64(table[moved]) & ENTRY_MASK
            if moved_home != hole_line:
                entry |= DISPLACED
            table[hole] = entry
            table[moved] = 0
            hole = moved
            hole_line = line


@inline
def arena_class(units):
    """Free list of records of so many 8-byte units, and the units such a record takes."""
    if units < ARENA_EXACT:
        return units, units
    size = 2 * ARENA_EXACT
    at = ARENA_EXACT
    while size < units:
        size *= 2
        at += 1
    return at, size


@inline
def arena_load(arena, place):
    """First word of a record, as an integer."""
    return np.int64(load_word(arena, place * 8))


@inline
def arena_add(arena, control, data, first, last):
    """Copy data[first:last] into the arena; returns its place. There is room: it was checked."""
    at_class, units = arena_class((last - first + 4 + 7) // 8)
    place = control[ARENA_HEADS + at_class] - 1
    if place >= 0:
        control[ARENA_HEADS + at_class] = arena_load(arena, place)
        control[ARENA_FREE] -= units
    else:
        place = control[ARENA_NEXT]
        control[ARENA_NEXT] += units
    at = place * 8
    length = last - first
    for k in range(4):
        arena[at + k] = (length >> (8 * k)) & 0xFF
    for k in range(length):
        arena[at + 4 + k] = data[first + k]
    return place


@inline
def arena_remove(arena, control, place):
    """Give a record back to the free list of its size."""
    at = place * 8
    length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
    at_class, units = arena_class((length + 4 + 7) // 8)
    following = control[ARENA_HEADS + at_class]
    for k in range(8):
        arena[at + k] = (following >> (8 * k)) & 0xFF
    control[ARENA_HEADS + at_class] = place + 1
    control[ARENA_FREE] += units


@inline
def free_slot(memory, table, control, arena, keys, slot, is_bytes):
    """Forget a user whose ring has been given back: index entry, id bytes and slot become free."""
    remove(memory, table, control[TABLE_LINES], control[SLOT_BITS], keys, slot, is_bytes)
    base = slot * LINE_WORDS
    if is_bytes:
        arena_remove(arena, control, memory[base + ID] >> HALF_BITS)
    memory[base + RING] = 0
    memory[base + SPAN] = 0
    memory[base + ID] = control[SLOT_FREE]
    control[SLOT_FREE] = slot + 1
    control[USERS] -= 1


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, U64_IN, I32_IN, i64, I64, U32, I64, U8, I32)
def reserve_slots(
    values,  # (n,)    int64   in   integer ids of the batch
    offsets,  # (n+1,)  int64   in   byte ids: where each begins in data
    data,  # (b,)    uint8   in   byte ids: their bytes
    is_bytes,  # ()      bool    in   which of the two it is
    hashes,  # (n,)    uint64  in   hash of each row of the batch
    rows,  # (m,)    int32   in   rows of the batch that belong to this shard
    slots_max,  # ()      int64   in   most slots in use
    memory,  # ...     int64   inout  see Shard
    table,  # ...     uint32  inout
    control,  # ...     int64   inout
    arena,  # ...     uint8   inout
    slots,  # (m,)    int32   out  slot of rows[j]
):
    """Find the slot of each row's user, making one for users that are new. Needs and keeps I4-I7.

    Stops when more than `slots_max` would be in use. Returns the number of rows that got a slot.
    Cost per row: index line and slot line, both asked for ahead of time; byte ids also the arena's line.
    """
    lines = control[TABLE_LINES]
    slot_bits = control[SLOT_BITS]
    count = len(rows)
    for position in range(count + 3 * AHEAD):
        if position < count:
            prefetch(table, home_of(high_half(hashes[rows[position]]), lines) * BUCKET)
        position -= AHEAD
        if 0 <= position < count:
            slot = guess(table, lines, slot_bits, hashes[rows[position]])
            slots[position] = slot
            if slot >= 0:
                prefetch(memory, np.int64(slot) * LINE_WORDS)
        position -= AHEAD
        if is_bytes and 0 <= position < count and slots[position] >= 0:
            prefetch(arena, (memory[np.int64(slots[position]) * LINE_WORDS + ID] >> HALF_BITS) * 8)
        position -= AHEAD
        if position >= 0:
            row = rows[position]
            h = hashes[row]
            value = np.int64(0)
            first = np.int64(0)
            last = np.int64(0)
            if is_bytes:
                first = offsets[row]
                last = offsets[row + 1]
            else:
                value = values[row]
            slot = probe(memory, table, lines, slot_bits, arena, h, value, data, first, last, is_bytes)
            if slot < 0:
                if control[USERS] >= slots_max or (control[SLOT_FREE] == 0 and control[SLOTS_USED] >= control[SLOTS_MAX]):
                    return position
                if control[SLOT_FREE] != 0:
                    slot = control[SLOT_FREE] - 1
                    control[SLOT_FREE] = memory[slot * LINE_WORDS + ID]
                    prefetch(memory, max(control[SLOT_FREE] - 1, 0) * LINE_WORDS)
                else:
                    slot = control[SLOTS_USED]
                    control[SLOTS_USED] += 1
                control[USERS] += 1
                base = slot * LINE_WORDS
                if is_bytes:
                    memory[base + ID] = arena_add(arena, control, data, first, last) << HALF_BITS | high_half(h)
                else:
                    memory[base + ID] = value
                memory[base + TOTAL] = 0
                memory[base + RING] = INLINE_CAPACITY << PLACE_BITS | (slot * 4 + 2)
                memory[base + SPAN] = 0
                insert(table, lines, slot_bits, h, slot)
            slots[position] = slot
    return count


@kernel(i64, I32_IN, i64, I64, U32, I64, U8, U64_IN, boolean)
def release_slots(
    slots,  # (m,)    int32   in   as reserve_slots gave them
    count,  # ()      int64   in   so many of them are set
    memory,  # ...     int64   inout  see Shard
    table,  # ...     uint32  inout
    control,  # ...     int64   inout
    arena,  # ...     uint8   inout
    keys,  # (4,)    uint64  in
    is_bytes,  # ()      bool    in
):
    """Undo reserve_slots: free those of the slots that hold no entry. Returns how many. Needs and keeps I4-I7."""
    freed = 0
    for position in range(count):
        slot = np.int64(slots[position])
        base = slot * LINE_WORDS
        if memory[base + RING] != 0 and memory[base + SPAN] >> HALF_BITS == 0:
            free_slot(memory, table, control, arena, keys, slot, is_bytes)
            freed += 1
    return freed


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, U64_IN, I32_IN, I64, U32, I64, U8, I32)
def find_slots(
    values,  # (n,)    int64   in   integer ids
    offsets,  # (n+1,)  int64   in   byte ids: where each begins in data
    data,  # (b,)    uint8   in   byte ids: their bytes
    is_bytes,  # ()      bool    in   which of the two it is
    hashes,  # (n,)    uint64  in   hash of each id
    rows,  # (m,)    int32   in   ids that belong to this shard
    memory,  # ...     int64   in   see Shard
    table,  # ...     uint32  in
    control,  # ...     int64   in
    arena,  # ...     uint8   in
    slots,  # (m,)    int32   out  slot of rows[j], or -1
):
    """Find the slot of each user. Reads only; needs I4-I7. Cost per row: index line and slot line. Returns the number found."""
    lines = control[TABLE_LINES]
    slot_bits = control[SLOT_BITS]
    count = len(rows)
    found = 0
    for position in range(count + 3 * AHEAD):
        if position < count:
            prefetch(table, home_of(high_half(hashes[rows[position]]), lines) * BUCKET)
        position -= AHEAD
        if 0 <= position < count:
            slot = guess(table, lines, slot_bits, hashes[rows[position]])
            slots[position] = slot
            if slot >= 0:
                prefetch(memory, np.int64(slot) * LINE_WORDS)
        position -= AHEAD
        if is_bytes and 0 <= position < count and slots[position] >= 0:
            prefetch(arena, (memory[np.int64(slots[position]) * LINE_WORDS + ID] >> HALF_BITS) * 8)
        position -= AHEAD
        if position >= 0:
            row = rows[position]
            value = np.int64(0)
            first = np.int64(0)
            last = np.int64(0)
            if is_bytes:
                first = offsets[row]
                last = offsets[row + 1]
            else:
                value = values[row]
            slot = probe(memory, table, lines, slot_bits, arena, hashes[row], value, data, first, last, is_bytes)
            slots[position] = slot
            if slot >= 0:
                found += 1
    return found
