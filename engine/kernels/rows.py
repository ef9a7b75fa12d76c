"""Rows in: the guards of the clock, and the rings that take the rows up."""

import numpy as np

from engine.kernels.compile import F64, I32_IN, I64, I64_IN, U8, boolean, i64, inline, kernel, prefetch
from engine.kernels.exact import entry_word, lower_bound, mean, minus, span_sum, upper_bound, wrapped_difference, wrapped_sum
from engine.kernels.layout import (
    AHEAD,
    COUNT_MAX,
    ENTRIES,
    HALF_BITS,
    HALF_MASK,
    INLINE_CAPACITY,
    INT64_MAX,
    LEFT,
    LEFT_BEFORE,
    LEFT_TIME,
    LINE_WORDS,
    NEWEST,
    PLACE_BITS,
    PLACE_MASK,
    RING,
    RING_CLASSES,
    RING_FREE,
    RING_HEADS,
    RING_NEXT,
    SAFE_COUNT,
    SPAN,
    TOTAL,
    UNITS_MAX,
)

SUM_LIMIT_HIGH = 1 << 30  # 2**62 >> 32


@kernel(i64, I64_IN, U8, boolean, i64, i64, i64, i64, i64, I64)
def admit_rows(
    time_ns,  # (n,)  int64  in     event times
    reasons,  # (n,)  uint8  inout  0, or why the row is not applied
    has_clock,  # ()    bool   in     whether any row was accepted before
    clock_now,  # ()    int64  in     the clock before the first row
    latest_ns,  # ()    int64  in     later rows are too far ahead of the wall clock
    jump_ns,  # ()    int64  in     rows further ahead of the clock are refused; -1: none are
    lateness_ns,  # ()    int64  in     rows further behind the clock are refused
    future,  # ()    int64  in     code of the reason; jump and late follow it
    clock_ns,  # (n,)  int64  out    the clock just after each row
):
    """Let each row pass the guards S8 and S7 against the clock as it stood just before it. Returns the rows let through.

    Sequential; no random lines.
    """
    admitted = 0
    for row in range(len(time_ns)):
        if reasons[row] == 0:
            time = time_ns[row]
            if time > latest_ns:
                reasons[row] = future
            elif has_clock and jump_ns >= 0 and minus(time, jump_ns) > clock_now:
                reasons[row] = future + 1
            elif has_clock and time < minus(clock_now, lateness_ns):
                reasons[row] = future + 2
            else:
                admitted += 1
                if not has_clock or time > clock_now:
                    clock_now = time
                    has_clock = True
        clock_ns[row] = clock_now
    return admitted


@inline
def ring_class(capacity):
    """log2 of a ring's capacity: its free list."""
    at = 0
    while capacity > 1:
        capacity >>= 1
        at += 1
    return at


@inline
def ring_add(memory, control, capacity):
    """Place of a ring of so many entries: a free block of the size, a half of a larger one, or never used memory (checked to be there)."""
    at = ring_class(capacity)
    larger = at
    while larger < RING_CLASSES and control[RING_HEADS + larger] == 0:
        larger += 1
    if larger == RING_CLASSES:
        place = control[RING_NEXT]
        control[RING_NEXT] += capacity
        return place
    place = control[RING_HEADS + larger]
    control[RING_HEADS + larger] = memory[2 * place]
    prefetch(memory, 2 * control[RING_HEADS + larger])
    while larger > at:
        larger -= 1
        half = place + (1 << larger)
        memory[2 * half] = control[RING_HEADS + larger]
        control[RING_HEADS + larger] = half
    control[RING_FREE] -= capacity
    return place


@inline
def ring_remove(memory, control, place, capacity):
    """Give a ring's block back."""
    at = ring_class(capacity)
    memory[2 * place] = control[RING_HEADS + at]
    control[RING_HEADS + at] = place
    control[RING_FREE] += capacity


@inline
def set_left(memory, base, place, capacity, start, count, reach_ns):
    """Work out NEWEST and LEFT of a large ring afresh."""
    newest = memory[entry_word(place, capacity, start, count - 1)]
    left = lower_bound(memory, place, capacity, start, 0, count, minus(newest, reach_ns))
    word = entry_word(place, capacity, start, left)
    memory[base + NEWEST] = newest
    memory[base + LEFT_TIME] = memory[word]
    memory[base + LEFT_BEFORE] = memory[word + 1]
    memory[base + LEFT] = left


@inline
def move_ring(memory, control, base, capacity, dropped, reach_ns):
    """Move a user's entries but the `dropped` oldest into a ring of another capacity; at least one entry remains (I1-I4)."""
    old_capacity = memory[base + RING] >> PLACE_BITS
    old_place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    count = (memory[base + SPAN] >> HALF_BITS) - dropped
    if capacity == INLINE_CAPACITY:
        # The line's own ring overlaps the words about the old ring, which are no longer needed.
        place = (base + 4) >> 1
    else:
        place = ring_add(memory, control, capacity)
    for index in range(count):
        source = entry_word(old_place, old_capacity, start, dropped + index)
        target = 2 * (place + index)
        memory[target] = memory[source]
        memory[target + 1] = memory[source + 1]
    if old_capacity > INLINE_CAPACITY:
        ring_remove(memory, control, old_place, old_capacity)
    memory[base + RING] = capacity << PLACE_BITS | place
    memory[base + SPAN] = count << HALF_BITS
    control[ENTRIES] -= dropped
    if capacity > INLINE_CAPACITY:
        set_left(memory, base, place, capacity, 0, count, reach_ns)


@inline
def drop_oldest(memory, control, base, dropped, reach_ns):
    """Forget the `dropped` oldest entries of a ring where they are; none need remain (I1-I4)."""
    if dropped == 0:
        return
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = (memory[base + SPAN] & HALF_MASK) + dropped
    if start >= capacity:
        start -= capacity
    count = (memory[base + SPAN] >> HALF_BITS) - dropped
    memory[base + SPAN] = count << HALF_BITS | start
    control[ENTRIES] -= dropped
    if capacity > INLINE_CAPACITY and count > 0:
        if memory[base + LEFT] >= dropped:
            memory[base + LEFT] -= dropped
        else:
            set_left(memory, base, place, capacity, start, count, reach_ns)


@inline
def make_room(memory, control, base, floor_ns, reach_ns):
    """Make a full ring take one entry more: by forgetting what no exact lookup can need, or by doubling it."""
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    dropped = lower_bound(memory, place, capacity, start, 0, capacity, floor_ns)
    if 4 * dropped >= capacity:
        drop_oldest(memory, control, base, dropped, reach_ns)
    else:
        move_ring(memory, control, base, 2 * capacity, dropped, reach_ns)


@inline
def too_large(memory, control, base, floor_ns, units):
    """Whether the sum of the user's retained units would leave +-2**62 with `units` more (S3)."""
    count = memory[base + SPAN] >> HALF_BITS
    if 2 * (count + 1) <= control[SAFE_COUNT]:
        return False
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    first = lower_bound(memory, place, capacity, start, 0, count, floor_ns)
    high, low = span_sum(memory, control, place, capacity, start, count, memory[base + TOTAL], first, count)
    low += units & HALF_MASK
    high += (units >> HALF_BITS) + (low >> HALF_BITS)
    low &= HALF_MASK
    if high >= 0:
        return high > SUM_LIMIT_HIGH or (high == SUM_LIMIT_HIGH and low > 0)
    return high < -SUM_LIMIT_HIGH


@inline
def append(memory, control, base, time, units, reach_ns):
    """Put an entry behind all others of its ring. Returns (entries in its window, index of the first of them)."""
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    count = memory[base + SPAN] >> HALF_BITS
    total = memory[base + TOTAL]
    word = entry_word(place, capacity, start, count)
    memory[word] = time
    memory[word + 1] = total
    memory[base + TOTAL] = wrapped_sum(total, units)
    count += 1
    memory[base + SPAN] = count << HALF_BITS | start
    floor_ns = minus(time, reach_ns)
    if capacity == INLINE_CAPACITY:
        left = 0
        if count == 2 and memory[entry_word(place, capacity, start, 0)] < floor_ns:
            left = 1
        return count - left, left
    memory[base + NEWEST] = time
    if count == 1:
        memory[base + LEFT] = 0
        memory[base + LEFT_TIME] = time
        memory[base + LEFT_BEFORE] = total
        return 1, 0
    left = memory[base + LEFT]
    if memory[base + LEFT_TIME] < floor_ns:
        # Gallop: the next entries first, then a binary search where they end.
        step = 1
        low = left + 1
        while low + step < count and memory[entry_word(place, capacity, start, low + step - 1)] < floor_ns:
            low += step
            step *= 2
        high = low + step
        high = min(high, count)
        left = lower_bound(memory, place, capacity, start, low, high, floor_ns)
        word = entry_word(place, capacity, start, left)
        memory[base + LEFT] = left
        memory[base + LEFT_TIME] = memory[word]
        memory[base + LEFT_BEFORE] = memory[word + 1]
    return count - left, left


@inline
def insert_late(memory, base, time, units, reach_ns):
    """Put an entry where its time belongs, behind its equals. Returns (entries in its window, index of the first of them)."""
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    count = memory[base + SPAN] >> HALF_BITS
    at = upper_bound(memory, place, capacity, start, 0, count, time)
    for index in range(count, at, -1):
        source = entry_word(place, capacity, start, index - 1)
        target = entry_word(place, capacity, start, index)
        memory[target] = memory[source]
        memory[target + 1] = wrapped_sum(memory[source + 1], units)
    memory[entry_word(place, capacity, start, at)] = time  # its `before` is that of the entry it moved out of the way
    memory[base + TOTAL] = wrapped_sum(memory[base + TOTAL], units)
    count += 1
    memory[base + SPAN] = count << HALF_BITS | start
    if capacity > INLINE_CAPACITY:
        left = memory[base + LEFT]
        if time >= minus(memory[base + NEWEST], reach_ns):
            left = min(at, left)
        else:
            left += 1
        word = entry_word(place, capacity, start, left)
        memory[base + LEFT] = left
        memory[base + LEFT_TIME] = memory[word]
        memory[base + LEFT_BEFORE] = memory[word + 1]
    first = lower_bound(memory, place, capacity, start, 0, at + 1, minus(time, reach_ns))
    return at + 1 - first, first


@inline
def prefetch_ring(memory, slot):
    """Ask for the ring lines that the next row of this user touches: the one written, and that of the window's left edge."""
    base = slot * LINE_WORDS
    capacity = memory[base + RING] >> PLACE_BITS
    if capacity > INLINE_CAPACITY:
        place = memory[base + RING] & PLACE_MASK
        span = memory[base + SPAN]
        prefetch(memory, entry_word(place, capacity, span & HALF_MASK, span >> HALF_BITS))
        if capacity > 4:
            prefetch(memory, entry_word(place, capacity, span & HALF_MASK, memory[base + LEFT] + 1))


@kernel(i64, I32_IN, I32_IN, I64_IN, I64_IN, I64_IN, i64, i64, i64, boolean, i64, I64, I64, F64, U8)
def apply_rows(
    rows,  # (m,)  int32    in     rows of the batch that belong to this shard, in arrival order
    slots,  # (m,)  int32    in     slot of each, from reserve_slots
    time_ns,  # (n,)  int64    in     of the whole batch
    units,  # (n,)  int64    in     of the whole batch
    clock_ns,  # (n,)  int64    in     the clock just after each row
    reach_ns,  # ()    int64    in     how far back a window counts
    retention_ns,  # ()    int64    in     how far behind the clock an entry is retained
    scale,  # ()    int64    in     units per 1 of the currency
    wanted,  # ()    bool     in     whether to write scores
    overflow,  # ()    int64    in     code of the reason sum_overflow
    memory,  # ...   int64    inout  see Shard
    control,  # ...   int64    inout
    scores,  # (n,)  float64  out    score of each row at its own time (S9)
    reasons,  # (n,)  uint8    inout  set to `overflow` for rows that would break S3
):
    """Put each row into its user's ring and score it. Needs and keeps I1-I4; ring memory was checked. Returns the rows applied.

    Cost per row: the slot line, still cached from reserve_slots when the batch is small; for users of more than two entries
    also the ring line written, and now and then the line of the window's left edge. A late row moves the entries behind it.
    """
    count_rows = len(rows)
    applied = 0
    for position in range(-2 * AHEAD, count_rows):
        if position + 2 * AHEAD < count_rows:
            prefetch(memory, np.int64(slots[position + 2 * AHEAD]) * LINE_WORDS)
        if 0 <= position + AHEAD < count_rows:
            prefetch_ring(memory, np.int64(slots[position + AHEAD]))
        if position < 0:
            continue
        row = rows[position]
        base = np.int64(slots[position]) * LINE_WORDS
        time = time_ns[row]
        amount = units[row]
        if abs(amount) > control[UNITS_MAX]:
            control[UNITS_MAX] = abs(amount)
            control[SAFE_COUNT] = INT64_MAX // abs(amount)
        floor_ns = minus(clock_ns[row], retention_ns)
        if too_large(memory, control, base, floor_ns, amount):
            reasons[row] = overflow
            continue
        if memory[base + SPAN] >> HALF_BITS == memory[base + RING] >> PLACE_BITS:
            make_room(memory, control, base, floor_ns, reach_ns)
        capacity = memory[base + RING] >> PLACE_BITS
        place = memory[base + RING] & PLACE_MASK
        start = memory[base + SPAN] & HALF_MASK
        count = memory[base + SPAN] >> HALF_BITS
        if count == 0:
            in_order = True
        elif capacity == INLINE_CAPACITY:
            in_order = time >= memory[entry_word(place, capacity, start, count - 1)]
        else:
            in_order = time >= memory[base + NEWEST]
        if in_order:
            counted, left = append(memory, control, base, time, amount, reach_ns)
        else:
            counted, left = insert_late(memory, base, time, amount, reach_ns)
        applied += 1
        control[COUNT_MAX] = max(control[COUNT_MAX], count + 1)
        if wanted:
            if in_order and capacity > INLINE_CAPACITY and counted <= control[SAFE_COUNT]:
                difference = wrapped_difference(memory[base + TOTAL], memory[base + LEFT_BEFORE])
                high, low = difference >> HALF_BITS, difference & HALF_MASK
            else:
                high, low = span_sum(memory, control, place, capacity, start, count + 1, memory[base + TOTAL], left, left + counted)
            scores[row] = mean(high, low, counted * scale)
    control[ENTRIES] += applied
    return applied
