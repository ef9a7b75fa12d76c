"""The index: user ids to slots, in a table of 32-bit entries.

An entry is `DISPLACED | tag | slot + 1` (0: empty); a line of 16 entries fills one 64-byte memory line and is compared as one vector, as in
the "Swiss tables" of Abseil, but with the slot beside the tag. A hash names a home line. An id is put into its home line if that has room,
else into the next line that has, and is then DISPLACED. So (invariant I5): *between the home line of an entry and the line it is in,
every line is full*, and a search ends at the first line with an empty entry. Removal keeps this by pulling displaced entries back, which
needs no tombstones; at a load of 0.7 one line in ten is full, so it is rarely more than clearing the entry. This is linear probing with
backward-shift deletion (Knuth, The Art of Computer Programming 3, section 6.4, algorithm R), with lines for cells.
"""

import numpy as np

from engine.kernels.compile import (
    I32,
    I32_IN,
    I64,
    I64_IN,
    U8,
    U8_IN,
    U32,
    U64_IN,
    boolean,
    i64,
    inline,
    kernel,
    lanes_equal,
    lowest_bit,
    natural,
    prefetch,
)
from engine.kernels.hashing import U32 as SHIFT_32
from engine.kernels.hashing import hash_integer, load_word
from engine.kernels.layout import (
    AHEAD,
    AMOUNTS,
    ARENA_EXACT,
    ARENA_FREE,
    ARENA_HEADS,
    ARENA_NEXT,
    BUCKET,
    DISPLACED,
    EMPTY,
    HALF_BITS,
    HALF_MASK,
    ID,
    INLINE_CAPACITY,
    LINE_WORDS,
    META,
    NEWEST,
    SLOT_BITS,
    SLOT_FREE,
    SLOTS_MAX,
    SLOTS_USED,
    TABLE_LINES,
    TIMES,
    USERS,
)

U = np.uint64
ENTRY_MASK = DISPLACED - 1
WHOLE_ENTRY = HALF_MASK


@inline
def home_of(high, lines):
    """Home line from the high half of a hash."""
    return natural((high * lines) >> 32)


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
    at = natural(place * 8)
    length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
    if length != last - first:
        return False
    at += 4
    if length >= 8:
        end = at + length - 8
        while at < end:
            if load_word(arena, at) != load_word(data, first):
                return False
            at += 8
            first += 8
        return load_word(arena, end) == load_word(data, last - 8)
    while first < last:
        if arena[natural(at)] != data[natural(first)]:
            return False
        at += 1
        first += 1
    return True


@inline
def tag_of(h, slot_bits):
    """Tag bits of a hash, where they stand in an index entry."""
    return (low_half(h) << slot_bits) & ENTRY_MASK


@inline
def tag_matches(table, line, slot_bits, want):
    """Bits of the entries of an index line whose tag fits, and of those that are empty."""
    slot_mask = (1 << slot_bits) - 1
    free = lanes_equal(table, line * BUCKET, WHOLE_ENTRY, 0)
    return lanes_equal(table, line * BUCKET, ENTRY_MASK & ~slot_mask, want) & ~free, free


@inline
def slot_at(table, line, found, slot_bits):
    """Slot in the first of the entries `found` in an index line."""
    entry = np.int64(table[natural(line * BUCKET + lowest_bit(found))])
    return natural((entry & ((1 << slot_bits) - 1)) - 1)


@inline
def holds(memory, arena, slot, h, value, data, first, last, is_bytes):
    """Whether a slot is that of an id."""
    word = memory[natural(slot) * LINE_WORDS + ID]
    used = memory[slot * LINE_WORDS + META] != 0  # the ID word of a free slot is no id
    if is_bytes:
        return used and (word & HALF_MASK) == high_half(h) and same_bytes(arena, word >> HALF_BITS, data, first, last)
    return (word == value) & used


@inline
def probe(memory, table, control, arena, h, value, data, first, last, is_bytes):
    """Slot of an id, or -1."""
    lines = control[TABLE_LINES]
    slot_bits = control[SLOT_BITS]
    want = tag_of(h, slot_bits)
    line = home_of(high_half(h), lines)
    for _ in range(lines):
        found, free = tag_matches(table, line, slot_bits, want)
        while found != 0:
            slot = slot_at(table, line, found, slot_bits)
            if holds(memory, arena, slot, h, value, data, first, last, is_bytes):
                return slot
            found &= found - 1
        if free != 0:
            return np.int64(-1)
        line += 1
        if line == lines:
            line = 0
    return np.int64(-1)


@inline
def insert(table, control, h, slot):
    """Put a slot whose id is not in the table into it. There is room: the load is at most 0.7."""
    lines = control[TABLE_LINES]
    entry = tag_of(h, control[SLOT_BITS]) | (slot + 1)
    line = home_of(high_half(h), lines)
    while True:
        free = lanes_equal(table, line * BUCKET, WHOLE_ENTRY, 0)
        if free != 0:
            table[line * BUCKET + lowest_bit(free)] = entry
            return
        entry |= DISPLACED
        line += 1
        if line == lines:
            line = 0


@inline
def slot_high(memory, keys, slot, is_bytes):
    """High half of the hash of the id in a slot."""
    word = memory[natural(slot) * LINE_WORDS + ID]
    if is_bytes:
        return word & HALF_MASK
    return high_half(hash_integer(word, keys))


@inline
def remove(memory, table, control, keys, slot, is_bytes):
    """Take a slot out of the table and pull displaced entries back (I5)."""
    lines = control[TABLE_LINES]
    slot_mask = (1 << control[SLOT_BITS]) - 1
    line = home_of(slot_high(memory, keys, slot, is_bytes), lines)
    here = lanes_equal(table, line * BUCKET, slot_mask, slot + 1)
    while here == 0:
        line += 1
        if line == lines:
            line = 0
        here = lanes_equal(table, line * BUCKET, slot_mask, slot + 1)
    hole = line * BUCKET + lowest_bit(here)
    full = lanes_equal(table, line * BUCKET, WHOLE_ENTRY, 0) == 0
    table[hole] = 0
    hole_line = line
    while full:  # the line with the hole was full: an entry further on may belong here
        line += 1
        if line == lines:
            line = 0
        if line == hole_line:
            return
        full = lanes_equal(table, line * BUCKET, WHOLE_ENTRY, 0) == 0
        displaced = lanes_equal(table, line * BUCKET, DISPLACED, DISPLACED)
        while displaced != 0:
            moved = line * BUCKET + lowest_bit(displaced)
            displaced &= displaced - 1
            entry = np.int64(table[moved])
            home = home_of(slot_high(memory, keys, (entry & slot_mask) - 1, is_bytes), lines)
            if (line - home + lines) % lines >= (line - hole_line + lines) % lines:
                entry &= ENTRY_MASK
                if home != hole_line:
                    entry |= DISPLACED
                table[hole] = entry
                table[moved] = 0
                hole = moved
                hole_line = line
                displaced = np.int64(0)


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
    """Forget a user whose ring, if any, has been given back: index entry, id bytes and slot become free."""
    remove(memory, table, control, keys, slot, is_bytes)
    base = natural(slot) * LINE_WORDS
    if is_bytes:
        arena_remove(arena, control, memory[base + ID] >> HALF_BITS)
    memory[base + META] = 0
    memory[base + ID] = control[SLOT_FREE]
    control[SLOT_FREE] = slot + 1
    control[USERS] -= 1


@inline
def make_slot(memory, table, control, arena, h, value, data, first, last, is_bytes):
    """A slot for an id that has none, with an empty line. There is room."""
    if control[SLOT_FREE] != 0:
        slot = natural(control[SLOT_FREE] - 1)
        control[SLOT_FREE] = memory[slot * LINE_WORDS + ID]
        prefetch(memory, max(control[SLOT_FREE] - 1, 0) * LINE_WORDS)
    else:
        slot = control[SLOTS_USED]
        control[SLOTS_USED] += 1
        prefetch(memory, min(slot + AHEAD, control[SLOTS_MAX] - 1) * LINE_WORDS)
    control[USERS] += 1
    base = natural(slot) * LINE_WORDS
    if is_bytes:
        memory[base + ID] = arena_add(arena, control, data, first, last) << HALF_BITS | high_half(h)
    else:
        memory[base + ID] = value
    memory[base + META] = 1
    for index in range(INLINE_CAPACITY):
        memory[base + TIMES + index] = EMPTY
    memory[base + AMOUNTS] = 0
    memory[base + AMOUNTS + 1] = 0
    insert(table, control, h, slot)
    return slot


@inline
def ask_line(table, control, h):
    """First stage of a look-up: prefetch the index line."""
    prefetch(table, home_of(high_half(h), control[TABLE_LINES]) * BUCKET)


@inline
def ask_slot(memory, table, control, h):
    """Second stage: prefetch the slots whose tag fits. Returns the first of them; -1 if another line may have it, -2 if none has."""
    slot_bits = control[SLOT_BITS]
    line = home_of(high_half(h), control[TABLE_LINES])
    found, free = tag_matches(table, line, slot_bits, tag_of(h, slot_bits))
    if found == 0:
        return np.int64(-1 if free == 0 else -2)
    slot = slot_at(table, line, found, slot_bits)
    prefetch(memory, slot * LINE_WORDS)
    found &= found - 1
    while found != 0:
        prefetch(memory, slot_at(table, line, found, slot_bits) * LINE_WORDS)
        found &= found - 1
    return slot


@inline
def ask_bytes(memory, arena, slot, length):
    """Third stage, for byte ids of so many bytes: prefetch the record of the id, from the first line of memory it has to the last."""
    if memory[natural(slot) * LINE_WORDS + META] != 0:
        place = (memory[slot * LINE_WORDS + ID] >> HALF_BITS) * 8
        prefetch(arena, place)
        prefetch(arena, min(place + 3 + length, len(arena) - 1))


@inline
def bytes_of(offsets, row):
    """Length of the byte id of a row."""
    row = natural(np.int64(row))
    return offsets[row + 1] - offsets[row]


@inline
def bytes_between(values, offsets, row, is_bytes):
    """The id of a row: (value, 0, 0), or (0, first, last) of its bytes."""
    if is_bytes:
        return np.int64(0), offsets[row], offsets[row + 1]
    return values[row], np.int64(0), np.int64(0)


@inline
def slot_found(memory, table, control, arena, h, value, data, first, last, is_bytes, guess):
    """Last stage: the slot of an id, or -1. `guess` is what the second stage gave."""
    if guess >= 0 and holds(memory, arena, guess, h, value, data, first, last, is_bytes):
        return guess
    return probe(memory, table, control, arena, h, value, data, first, last, is_bytes)


@inline
def slot_made(memory, table, control, arena, h, value, data, first, last, is_bytes, guess):
    """Last stage: the slot of an id, made if it has none. There is room."""
    slot = slot_found(memory, table, control, arena, h, value, data, first, last, is_bytes, guess)
    if slot >= 0:
        return slot
    return make_slot(memory, table, control, arena, h, value, data, first, last, is_bytes)


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, U64_IN, I32_IN, boolean, i64, I64, U32, I64, U8, I32)
def find_slots(
    values,  # (n,)    int64   in     integer ids
    offsets,  # (n+1,)  int64   in     byte ids: where each begins in data
    data,  # (b,)    uint8   in     byte ids: their bytes
    is_bytes,  # ()      bool    in     which of the two it is
    hashes,  # (n,)    uint64  in     hash of each id
    rows,  # (m,)    int32   in     ids that belong to this shard
    made,  # ()      bool    in     whether users that are new get a slot
    slots_max,  # ()      int64   in     most slots in use
    memory,  # ...     int64   inout  see Shard; only read unless `made`
    table,  # ...     uint32  inout
    control,  # ...     int64   inout
    arena,  # ...     uint8   inout
    slots,  # (m,)    int32   out    slot of rows[j], or -1
):
    """Find the slot of each user. Needs and keeps I4-I7.

    Stops when more than `slots_max` would be in use. Returns the number of rows that were looked up.
    Cost per row: index line and slot line, both asked for ahead of time; byte ids also the arena's line.
    """
    count = len(rows)
    for position in range(-3 * AHEAD, count):
        ahead = position + 3 * AHEAD
        if ahead < count:
            ask_line(table, control, hashes[natural(np.int64(rows[ahead]))])
        ahead -= AHEAD
        if 0 <= ahead < count:
            slots[ahead] = ask_slot(memory, table, control, hashes[natural(np.int64(rows[ahead]))])
        ahead -= AHEAD
        if is_bytes and 0 <= ahead < count and slots[ahead] >= 0:
            ask_bytes(memory, arena, np.int64(slots[ahead]), bytes_of(offsets, rows[ahead]))
        if position < 0:
            continue
        row = natural(np.int64(rows[position]))
        h = hashes[row]
        value, first, last = bytes_between(values, offsets, row, is_bytes)
        slot = slot_found(memory, table, control, arena, h, value, data, first, last, is_bytes, np.int64(slots[position]))
        if slot < 0 and made:
            if control[USERS] >= slots_max or (control[SLOT_FREE] == 0 and control[SLOTS_USED] >= control[SLOTS_MAX]):
                return position
            slot = make_slot(memory, table, control, arena, h, value, data, first, last, is_bytes)
        slots[position] = slot
    return count


@kernel(i64, I32_IN, i64, I64, U32, I64, U8, U64_IN, boolean)
def release_slots(
    slots,  # (m,)    int32   in   as find_slots made them
    count,  # ()      int64   in   so many of them are set
    memory,  # ...     int64   inout  see Shard
    table,  # ...     uint32  inout
    control,  # ...     int64   inout
    arena,  # ...     uint8   inout
    keys,  # (4,)    uint64  in
    is_bytes,  # ()      bool    in
):
    """Undo find_slots: free those of the slots that hold no entry. Returns how many. Needs and keeps I4-I7."""
    freed = 0
    for position in range(count):
        slot = np.int64(slots[position])
        base = natural(slot) * LINE_WORDS
        if memory[base + META] == 1 and memory[base + NEWEST] == EMPTY:
            free_slot(memory, table, control, arena, keys, slot, is_bytes)
            freed += 1
    return freed
