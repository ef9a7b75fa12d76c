"""Whole-shard passes: expiry, counting, listing users, the digest, compaction of the arena."""

import numpy as np

from engine.kernels.compile import I32, I64, U8, U8_IN, U32, U64, U64_IN, boolean, i64, inline, kernel, prefetch
from engine.kernels.exact import before_of, entry_word, lower_bound, wrapped_difference
from engine.kernels.hashing import U56, hash_bytes, sip_end, sip_start, sip_word
from engine.kernels.layout import (
    AHEAD,
    ARENA_FREE,
    ARENA_NEXT,
    BUCKET,
    ENTRIES,
    HALF_BITS,
    HALF_MASK,
    ID,
    INLINE_CAPACITY,
    LEFT,
    LEFT_TIME,
    LINE_WORDS,
    NEWEST,
    PLACE_BITS,
    PLACE_MASK,
    RING,
    SLOTS_USED,
    SPAN,
    TABLE_LINES,
    TOTAL,
)
from engine.kernels.probing import arena_class, free_slot, home_of, slot_high
from engine.kernels.rows import drop_oldest, move_ring, ring_remove

U = np.uint64
DIGEST_KEY = U(0x7269736B72696E67)
ENTRY_LENGTH = U(24) << U56
INTEGER_LENGTH = U(8) << U56
U2 = U(2)


@inline
def newest_of(memory, base):
    """Time of a user's newest entry; the ring is not empty."""
    capacity = memory[base + RING] >> PLACE_BITS
    if capacity > INLINE_CAPACITY:
        return memory[base + NEWEST]
    span = memory[base + SPAN]
    return memory[entry_word(memory[base + RING] & PLACE_MASK, capacity, span & HALF_MASK, (span >> HALF_BITS) - 1)]


@inline
def expired(memory, base, floor_ns):
    """How many of a user's entries are before `floor_ns`. Costs a ring line only if some may be."""
    capacity = memory[base + RING] >> PLACE_BITS
    count = memory[base + SPAN] >> HALF_BITS
    # With LEFT = 0 the left edge of the newest entry's window is the oldest entry.
    if capacity > INLINE_CAPACITY and memory[base + LEFT] == 0 and memory[base + LEFT_TIME] >= floor_ns:
        return 0
    return lower_bound(memory, memory[base + RING] & PLACE_MASK, capacity, memory[base + SPAN] & HALF_MASK, 0, count, floor_ns)


@inline
def worth_shortening(memory, base, thorough):
    """Whether a larger ring is to be looked into: always, or when at least half of it is older than its newest window."""
    capacity = memory[base + RING] >> PLACE_BITS
    return capacity > INLINE_CAPACITY and (thorough or 2 * memory[base + LEFT] >= capacity)


@inline
def prefetch_expiry(memory, table, control, keys, slot, floor_ns, thorough, is_bytes):
    """Ask for the lines that expiring this slot will touch: of the index if the user goes, of its ring if entries may."""
    base = slot * LINE_WORDS
    capacity = memory[base + RING] >> PLACE_BITS
    if capacity == 0:
        return
    place = memory[base + RING] & PLACE_MASK
    if newest_of(memory, base) < floor_ns:
        prefetch(table, home_of(slot_high(memory, keys, slot, is_bytes), control[TABLE_LINES]) * BUCKET)
        prefetch(memory, 2 * place)
    elif worth_shortening(memory, base, thorough):
        prefetch(memory, entry_word(place, capacity, memory[base + SPAN] & HALF_MASK, memory[base + LEFT] >> 1))


@kernel(i64, i64, i64, i64, i64, boolean, boolean, U64_IN, I64, U32, I64, U8)
def expire_slots(
    first,  # ()   int64   in     slots [first, last) are looked at
    last,  # ()   int64   in
    floor_ns,  # ()   int64   in     entries before it are freed
    reach_ns,  # ()   int64   in     how far back a window counts
    thorough,  # ()   bool    in     shorten every ring; else only those that may become half as large
    is_bytes,  # ()   bool    in     kind of the ids
    keys,  # (4,) uint64  in     the secret of this engine
    memory,  # ...  int64   inout  see Shard
    table,  # ...  uint32  inout
    control,  # ...  int64   inout
    arena,  # ...  uint8   inout
):
    """Free entries that no exact lookup can need, users left without any, and rings grown too large. Needs and keeps I1-I7.

    Returns the entries freed. Sequential over slot lines; a random index line per user freed, a ring line per ring shortened.
    """
    freed = 0
    for slot in range(first, last):
        if slot + AHEAD < last:
            prefetch_expiry(memory, table, control, keys, slot + AHEAD, floor_ns, thorough, is_bytes)
        base = slot * LINE_WORDS
        capacity = memory[base + RING] >> PLACE_BITS
        if capacity == 0:
            continue
        count = memory[base + SPAN] >> HALF_BITS
        if newest_of(memory, base) < floor_ns:
            if capacity > INLINE_CAPACITY:
                ring_remove(memory, control, memory[base + RING] & PLACE_MASK, capacity)
            control[ENTRIES] -= count
            freed += count
            free_slot(memory, table, control, arena, keys, slot, is_bytes)
            continue
        if capacity > INLINE_CAPACITY and not worth_shortening(memory, base, thorough):
            continue
        dropped = expired(memory, base, floor_ns)
        freed += dropped
        count -= dropped
        smaller = capacity
        while smaller > INLINE_CAPACITY and 4 * count <= smaller:
            smaller >>= 1
        if capacity > INLINE_CAPACITY and count <= INLINE_CAPACITY:
            smaller = INLINE_CAPACITY
        if smaller < capacity:
            move_ring(memory, control, base, smaller, dropped, reach_ns)
        else:
            drop_oldest(memory, control, base, dropped, reach_ns)
    return freed


@kernel(i64, i64, I64, I64, I64)
def count_retained(
    floor_ns,  # ()    int64  in   entries before it are no longer retained
    memory,  # ...   int64  in   see Shard
    control,  # ...   int64  in
    result,  # (2,)  int64  out  users with a retained transaction, transactions retained
):
    """Count what is retained, whatever has been freed so far. Reads only. Sequential over slot lines, ring lines where entries expired."""
    users = 0
    entries = 0
    for slot in range(control[SLOTS_USED]):
        base = slot * LINE_WORDS
        if memory[base + RING] != 0 and newest_of(memory, base) >= floor_ns:
            users += 1
            entries += (memory[base + SPAN] >> HALF_BITS) - expired(memory, base, floor_ns)
    result[0] = users
    result[1] = entries
    return users


@kernel(i64, i64, I64, I64, I32)
def list_retained(
    floor_ns,  # ()    int64  in   entries before it are no longer retained
    memory,  # ...   int64  in   see Shard
    control,  # ...   int64  in
    slots,  # (m,)  int32  out  slots of the users with a retained transaction; m >= slots ever used
):
    """List the users with a retained transaction, in slot order. Reads only; sequential. Returns how many."""
    users = 0
    for slot in range(control[SLOTS_USED]):
        base = slot * LINE_WORDS
        if memory[base + RING] != 0 and newest_of(memory, base) >= floor_ns:
            slots[users] = slot
            users += 1
    return users


@kernel(i64, I32, i64, i64, I64, I64, U8, I64, I64, U8)
def read_ids(
    slots,  # (m,)    int32  in     slots in use
    count,  # ()      int64  in     so many of them are read
    stage,  # ()      int64  in     0: integer ids into values; 1: lengths of byte ids into offsets; 2: their bytes into data
    memory,  # ...     int64  in     see Shard
    control,  # ...     int64  in
    arena,  # ...     uint8  in
    values,  # (m,)    int64  out    stage 0
    offsets,  # (m+1,)  int64  inout  stage 1: where each id begins in data
    data,  # (b,)    uint8  out    stage 2
):
    """Read the ids of slots. Returns the bytes that byte ids take. Cost per row: slot line, for byte ids also the arena's."""
    total = 0
    for position in range(count):
        word = memory[np.int64(slots[position]) * LINE_WORDS + ID]
        if stage == 0:
            values[position] = word
            continue
        at = (word >> HALF_BITS) * 8
        length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
        if stage == 1:
            offsets[position] = total
            offsets[position + 1] = total + length
        else:
            for k in range(length):
                data[offsets[position] + k] = arena[at + 4 + k]
        total += length
    return total


@inline
def user_hash(arena, word, is_bytes, lane):
    """Hash of a user's id for the digest: not keyed, the same everywhere."""
    if is_bytes:
        at = (word >> HALF_BITS) * 8
        length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
        return hash_bytes(arena, at + 4, at + 4 + length, DIGEST_KEY, lane)
    v0, v1, v2, v3 = sip_start(DIGEST_KEY, lane + U2)
    v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(word))
    return sip_end(v0, v1, v2, v3, INTEGER_LENGTH)


@kernel(i64, i64, boolean, I64, I64, U8, U64)
def digest_lanes(
    floor_ns,  # ()    int64   in   entries before it are no longer retained
    is_bytes,  # ()    bool    in   kind of the ids
    memory,  # ...   int64   in   see Shard
    control,  # ...   int64   in
    arena,  # ...   uint8   in
    lanes,  # (2,)  uint64  out  sums of the hashes of all retained entries, in two lanes
):
    """Hash the logical state: each retained (user, position, time, units), added up so that the order of users does not matter.

    Reads only. Sequential over slot lines, plus each ring. Returns the entries hashed.
    """
    hashed = 0
    lanes[0] = U(0)
    lanes[1] = U(0)
    for slot in range(control[SLOTS_USED]):
        base = slot * LINE_WORDS
        if memory[base + RING] == 0 or newest_of(memory, base) < floor_ns:
            continue
        capacity = memory[base + RING] >> PLACE_BITS
        place = memory[base + RING] & PLACE_MASK
        start = memory[base + SPAN] & HALF_MASK
        count = memory[base + SPAN] >> HALF_BITS
        total = memory[base + TOTAL]
        first = expired(memory, base, floor_ns)
        for lane in range(2):
            key = user_hash(arena, memory[base + ID], is_bytes, U(lane))
            for index in range(first, count):
                word = entry_word(place, capacity, start, index)
                units = wrapped_difference(before_of(memory, place, capacity, start, count, total, index + 1), memory[word + 1])
                v0, v1, v2, v3 = sip_start(key, U(lane))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(index - first))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(memory[word]))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(units))
                lanes[lane] += sip_end(v0, v1, v2, v3, ENTRY_LENGTH)
        hashed += count - first
    return hashed


@kernel(i64, I64, I64, U8_IN, U8)
def compact_arena(
    memory,  # ...  int64  inout  see Shard: the places of byte ids change
    control,  # ...  int64  inout  registers of the arena, reset by the caller beforehand
    old,  # ...  uint8  in     the arena as it is
    new,  # ...  uint8  out    an untouched one
):
    """Copy the id bytes of all users into a new arena without gaps. Returns the 8-byte units used. Keeps I4-I7."""
    following = control[ARENA_NEXT]
    for slot in range(control[SLOTS_USED]):
        base = slot * LINE_WORDS
        if memory[base + RING] == 0:
            continue
        word = memory[base + ID]
        at = (word >> HALF_BITS) * 8
        length = np.int64(old[at]) | np.int64(old[at + 1]) << 8 | np.int64(old[at + 2]) << 16 | np.int64(old[at + 3]) << 24
        _, units = arena_class((length + 4 + 7) // 8)
        for k in range(length + 4):
            new[following * 8 + k] = old[at + k]
        memory[base + ID] = following << HALF_BITS | (word & HALF_MASK)
        following += units
    control[ARENA_NEXT] = following
    control[ARENA_FREE] = 0
    return following
