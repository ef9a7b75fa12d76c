"""Whole-shard passes: expiry, counting, listing users, compaction of the arena."""

import numpy as np

from engine.kernels.blocks import block_remove, lines_for, scattered, slab_give, slab_take, sparse
from engine.kernels.compile import (
    F64,
    I32,
    I64,
    U8,
    U8_IN,
    U32,
    U64_IN,
    boolean,
    i64,
    inline,
    kernel,
    lowest_bit,
    marks_due,
    natural,
    prefetch,
)
from engine.kernels.entries import expired
from engine.kernels.exact import count_of, entry_word, ring_of
from engine.kernels.layout import (
    AHEAD,
    AMOUNTS,
    ARENA_FREE,
    ARENA_NEXT,
    BLOCK_ENTRIES,
    BUCKET,
    EMPTY,
    ENTRIES,
    GONE,
    HALF_BITS,
    HALF_MASK,
    ID,
    INLINE_CAPACITY,
    LEFT,
    LINE_WORDS,
    MARK_LANES,
    META,
    NEWEST,
    PLACE_BITS,
    PLACE_MASK,
    RING_FROM,
    SCATTERED,
    SLOTS_USED,
    SPAN,
    SWEPT,
    TABLE_LINES,
    TIMES,
)
from engine.kernels.probing import arena_class, free_slot, home_of, slot_high
from engine.kernels.rows import drop_oldest, enter_line, entries_in_line, mark_of, may_enter_line, move_ring


@inline
def worth_shortening(memory, base, thorough):
    """Whether a ring is to be looked into: always, or when it has several lines and a quarter of it is older than its newest window.

    (A ring of one line goes back into the slot line by itself, when it is full.)
    """
    meta = memory[base + META]
    capacity = meta >> PLACE_BITS
    return thorough & (meta >= RING_FROM) | (capacity > BLOCK_ENTRIES) & (memory[base + LEFT] >= capacity >> 2)


@inline
def list_marked_before(marks, first, last, before, due):
    """List those of the slots from `first` on, a multiple of MARK_LANES, marked with an epoch before another's mark.

    Ends before `last`, and when `due` has no room for more. Returns (how many, the slot to go on with).
    """
    count = 0
    while first < last and count + MARK_LANES <= len(due):
        found = marks_due(marks, first, before)
        while found != 0:
            due[natural(count)] = first + lowest_bit(found)
            count += 1
            found &= found - 1
        first += MARK_LANES
    return count, first


@inline
def list_due(memory, control, marks, first, last, floor_ns, thorough, every_ring, due):
    """List those of the slots from `first` on that expiry has to look into, going by their lines, and mark all of them anew (I9).

    Returns as `list_marked_before`.
    """
    count = 0
    last = min(last, first + len(due))
    for slot in range(first, last):
        base = natural(slot) * LINE_WORDS
        meta = memory[base + META]
        newest = memory[base + NEWEST]
        marks[natural(slot)] = mark_of(control, newest) if meta != 0 else 0
        gone = (meta != 0) & (newest < floor_ns)
        due[natural(count)] = slot
        count += np.int64(gone | worth_shortening(memory, base, thorough) | thorough & (meta != 0) | every_ring & (meta >= RING_FROM))
    return count, last


@inline
def ask_expiry(memory, table, control, keys, slot, is_bytes):
    """Prefetch the lines that expiring this slot may touch: of the index, and of its ring."""
    base = natural(slot) * LINE_WORDS
    prefetch(table, home_of(slot_high(memory, keys, slot, is_bytes), control[TABLE_LINES]) * BUCKET)
    meta = memory[base + META]
    if meta >= RING_FROM:
        start = memory[base + SPAN] & HALF_MASK
        prefetch(memory, entry_word(meta & PLACE_MASK, meta >> PLACE_BITS, start, memory[base + LEFT] >> 1))


@inline
def expire_line(memory, base, floor_ns):
    """Make the expired entries of a line EMPTY. Returns how many they were."""
    freed = 0
    for index in range(INLINE_CAPACITY):
        if EMPTY < memory[base + TIMES + index] < floor_ns:
            memory[base + TIMES + index] = EMPTY
            pair = natural(base + AMOUNTS + (index >> 1))
            memory[pair] &= HALF_MASK if index & 1 else ~HALF_MASK
            freed += 1
    return freed


@inline
def expire_ring(memory, control, slabs, base, floor_ns, reach_ns):
    """Forget the expired entries of a ring that keeps at least one; shorten it if it has grown too large. Returns how many they were."""
    _, capacity, _, count = ring_of(memory, base)
    dropped = expired(memory, base, floor_ns)
    count -= dropped
    lines = lines_for(count + 1)
    if count <= INLINE_CAPACITY and may_enter_line(memory, control, base, dropped):
        enter_line(memory, control, slabs, base, dropped)
    elif 4 * lines * BLOCK_ENTRIES <= 3 * capacity:
        move_ring(memory, control, slabs, base, lines, dropped, reach_ns)
    elif dropped > 0:
        drop_oldest(memory, control, base, dropped, reach_ns)
    return dropped


@inline
def leave_slab(memory, control, slabs, base):
    """Move a ring out of a slab of which little is in use, so that all of it can be used for other rings."""
    place, capacity, _, _ = ring_of(memory, base)
    if not sparse(control, slabs, place, capacity):
        return
    target = slab_take(memory, control, slabs, capacity // BLOCK_ENTRIES)
    for word in range(2 * capacity):
        memory[2 * target + word] = memory[2 * place + word]
    memory[base + META] = capacity << PLACE_BITS | target
    slab_give(control, slabs, place, capacity // BLOCK_ENTRIES)


@inline
def empty_slot(memory, marks, slot):
    """Leave nothing in a slot but the id of its user."""
    base = natural(slot) * LINE_WORDS
    memory[base + META] = 1
    for index in range(INLINE_CAPACITY):
        memory[base + TIMES + index] = EMPTY
    memory[base + AMOUNTS] = 0
    memory[base + AMOUNTS + 1] = 0
    marks[natural(slot)] = 0


@kernel(i64, i64, i64, i64, i64, boolean, boolean, boolean, U64_IN, I64, U32, I64, U8, I64, U8, boolean, F64, I32, I32)
def expire_slots(
    last,  # ()   int64   in     slots from SWEPT, a multiple of MARK_LANES where `marked`, to here or a little beyond are looked at
    most,  # ()   int64   in     while not so many of them had to be looked into
    floor_ns,  # ()   int64   in     entries before it are freed
    reach_ns,  # ()   int64   in     how far back a window counts
    marked,  # ()   bool    in     look into slots whose marks are due; else read all slot lines
    thorough,  # ()   bool    in     forget every expired entry; else only what frees memory: users, and rings that may become half as large
    is_bytes,  # ()   bool    in     kind of the ids
    keys,  # (4,) uint64  in     the secret of this engine
    memory,  # ...  int64   inout  see Shard
    table,  # ...  uint32  inout
    control,  # ...  int64   inout
    arena,  # ...  uint8   inout
    slabs,  # ...  int64   inout
    marks,  # ...  uint8   inout
    watched,  # ()   bool    in     whether users whose score was reported not to be 0.0 are only emptied, and listed
    reported,  # (m,) float64 in     where `watched`: what was last reported of each slot
    gone,  # (g,) int32   out    where `watched`: slots of users emptied, GONE of them; the caller frees them
    due,  # (k,) int32   out    scratch: slots that have to be looked into, up to k at a time
):
    """Free entries that no exact lookup can need, users left without any, and rings grown too large. Needs and keeps I1-I9.

    Returns the entries freed. Cost: a byte per slot, a slot and an index line per user freed, a slot and a ring line per ring shortened;
    or, where not `marked`, sequential over slot lines.
    """
    freed = 0
    looked = 0
    gather = not marked and scattered(control)
    listed = count = np.int64(0)
    while True:
        if listed == count:
            first = control[SWEPT]
            looked += count
            if first >= last or looked >= most:
                break
            listed = np.int64(0)
            if marked:
                count, first = list_marked_before(marks, first, last, mark_of(control, floor_ns), due)
            else:
                count, first = list_due(memory, control, marks, first, last, floor_ns, thorough, gather, due)
            control[SWEPT] = first
            for ahead in range(min(2 * AHEAD, count)):
                prefetch(memory, np.int64(due[ahead]) * LINE_WORDS)
            for ahead in range(min(AHEAD, count)):
                ask_expiry(memory, table, control, keys, np.int64(due[ahead]), is_bytes)
            continue
        if listed + 2 * AHEAD < count:
            prefetch(memory, np.int64(due[natural(listed + 2 * AHEAD)]) * LINE_WORDS)
        if listed + AHEAD < count:
            ask_expiry(memory, table, control, keys, np.int64(due[natural(listed + AHEAD)]), is_bytes)
        slot = np.int64(due[natural(listed)])
        listed += 1
        base = natural(slot) * LINE_WORDS
        meta = memory[base + META]
        newest = memory[base + NEWEST]
        if newest < floor_ns:
            if meta >= RING_FROM:
                entries = memory[base + SPAN] >> HALF_BITS
                block_remove(control, slabs, meta & PLACE_MASK, meta >> PLACE_BITS)
                control[ENTRIES] -= entries
                freed += entries
            else:
                freed += entries_in_line(memory, base)
            if watched and reported[natural(slot)] != 0.0:
                empty_slot(memory, marks, slot)
                gone[natural(control[GONE])] = slot
                control[GONE] += 1
                continue
            free_slot(memory, table, control, arena, keys, slot, is_bytes)
            marks[natural(slot)] = 0
            continue
        marks[natural(slot)] = mark_of(control, newest)
        if meta < RING_FROM:
            if thorough:
                freed += expire_line(memory, base, floor_ns)
        else:
            if worth_shortening(memory, base, thorough):
                freed += expire_ring(memory, control, slabs, base, floor_ns, reach_ns)
            if gather and memory[base + META] >= RING_FROM:
                leave_slab(memory, control, slabs, base)
    control[SCATTERED] = np.int64(scattered(control))
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
        base = natural(slot) * LINE_WORDS
        if memory[base + META] != 0 and memory[base + NEWEST] >= floor_ns:
            users += 1
            entries += count_of(memory, base) - expired(memory, base, floor_ns)
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
        base = natural(slot) * LINE_WORDS
        if memory[base + META] != 0 and memory[base + NEWEST] >= floor_ns:
            slots[users] = slot
            users += 1
    return users


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
        base = natural(slot) * LINE_WORDS
        if memory[base + META] == 0:
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
