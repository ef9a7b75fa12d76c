"""Rows in: the guards of the clock, and the lines and rings that take the rows up."""

import numpy as np

from engine.kernels.blocks import block_add, block_remove, larger, lines_for
from engine.kernels.compile import F64, I32, I32_IN, I64, I64_IN, U8, U8_IN, U32, U64_IN, boolean, i64, inline, kernel, natural, prefetch
from engine.kernels.exact import (
    entry_word,
    first_from,
    line_units,
    line_window,
    lower_bound,
    mean,
    minus,
    pair_of,
    ring_of,
    ring_units,
    span_sum,
    upper_bound,
    wrapped_difference,
    wrapped_sum,
)
from engine.kernels.layout import (
    AHEAD,
    AMOUNTS,
    BLOCK_ENTRIES,
    COUNT_MAX,
    EMPTY,
    ENTRIES,
    EPOCH_BITS,
    HALF_BITS,
    HALF_MASK,
    INLINE_CAPACITY,
    INLINE_UNITS,
    LEFT,
    LEFT_BEFORE,
    LEFT_TIME,
    LINE_WORDS,
    MARKED,
    META,
    NEWEST,
    PLACE_BITS,
    PLACE_MASK,
    RING_FROM,
    SAFE_COUNT,
    SPAN,
    TIMES,
    TOTAL,
    UNITS_MAX,
)
from engine.kernels.probing import ask_bytes, ask_line, ask_slot, bytes_between, bytes_of, slot_made

SUM_LIMIT_HIGH = 1 << 30  # 2**62 >> 32


@kernel(i64, I64_IN, I64_IN, U8, boolean, i64, I64, i64, i64, i64, I64, I64)
def admit_rows(
    time_ns,  # (n,)  int64  in     event times
    units,  # (n,)  int64  in     amounts
    reasons,  # (n,)  uint8  inout  0, or why the row is not applied
    has_clock,  # ()    bool   in     whether any row was accepted before
    clock_now,  # ()    int64  in     the clock before the first row
    latest_ns,  # (m,)  int64  in     later rows are too far ahead of the wall clock; m = n, or 1 for all rows alike
    jump_ns,  # ()    int64  in     rows further ahead of the clock are refused; -1: none are
    lateness_ns,  # ()    int64  in     rows further behind the clock are refused
    future,  # ()    int64  in     code of the reason; jump and late follow it
    clock_ns,  # (n,)  int64  out    the clock just after each row
    units_max,  # (1,)  int64  out    greatest |units| of a row let through
):
    """Let each row pass the guards S8 and S7 against the clock as it stood just before it. Returns the rows let through.

    Sequential; no random lines.
    """
    each = np.int64(1) if len(latest_ns) > 1 else np.int64(0)
    admitted = 0
    greatest = np.int64(0)
    for row in range(len(time_ns)):
        if reasons[row] == 0:
            time = time_ns[row]
            if time > latest_ns[row * each]:
                reasons[row] = future
            elif has_clock and jump_ns >= 0 and minus(time, jump_ns) > clock_now:
                reasons[row] = future + 1
            elif has_clock and time < minus(clock_now, lateness_ns):
                reasons[row] = future + 2
            else:
                admitted += 1
                greatest = max(greatest, abs(units[row]))
                if not has_clock or time > clock_now:
                    clock_now = time
                    has_clock = True
        clock_ns[row] = clock_now
    units_max[0] = greatest
    return admitted


@inline
def set_left(memory, base, reach_ns):
    """Work out NEWEST and LEFT of a ring afresh."""
    place, capacity, start, count = ring_of(memory, base)
    newest = memory[entry_word(place, capacity, start, count - 1)]
    point_left(memory, base, lower_bound(memory, place, capacity, start, 0, count, minus(newest, reach_ns)))
    memory[base + NEWEST] = newest


@inline
def point_left(memory, base, left):
    """Make LEFT an entry of a ring."""
    place, capacity, start, _ = ring_of(memory, base)
    word = entry_word(place, capacity, start, left)
    memory[base + LEFT] = left
    memory[base + LEFT_TIME] = memory[word]
    memory[base + LEFT_BEFORE] = memory[word + 1]


@inline
def mark_of(control, time_ns):
    """What marks a slot whose newest entry is not before this time."""
    return MARKED | (time_ns >> control[EPOCH_BITS]) & (MARKED - 1)


@inline
def fits_line(units):
    """Whether a line can hold such units."""
    return -INLINE_UNITS <= units < INLINE_UNITS


@inline
def leave_line(memory, control, slabs, marks, base, time, reach_ns):
    """Move the entries of a line into a ring with room for the one of this time (I1-I4); if there are none, `append` must come next."""
    held = entries_in_line(memory, base)
    lines = lines_for(held + 1)
    place = block_add(memory, control, slabs, lines)
    total = np.int64(0)
    word = natural(2 * place)
    for index in range(INLINE_CAPACITY - held, INLINE_CAPACITY):
        memory[word] = memory[natural(base + TIMES + index)]
        memory[word + 1] = total
        total += line_units(memory, base, index)
        word += 2
    memory[base + META] = (lines * BLOCK_ENTRIES) << PLACE_BITS | place
    memory[base + SPAN] = held << HALF_BITS
    memory[base + TOTAL] = total
    control[ENTRIES] += held
    if held > 0:
        set_left(memory, base, reach_ns)
    else:
        memory[base + LEFT] = -1
        memory[base + LEFT_TIME] = memory[base + NEWEST] = EMPTY
        marks[base // LINE_WORDS] = mark_of(control, time)


@inline
def may_enter_line(memory, control, base, dropped):
    """Whether a line can hold the entries of a ring but the `dropped` oldest, as far as their units go."""
    if control[UNITS_MAX] < INLINE_UNITS:
        return True
    fit = True
    for index in range(dropped, memory[base + SPAN] >> HALF_BITS):
        fit &= fits_line(ring_units(memory, base, index))
    return fit


@inline
def enter_line(memory, control, slabs, base, dropped):
    """Move a ring's entries but the `dropped` oldest back into the line, which can hold them (I1-I3)."""
    place, capacity, start, count = ring_of(memory, base)
    time_0 = time_1 = time_2 = time_3 = np.int64(EMPTY)
    units_0 = units_1 = units_2 = units_3 = np.int64(0)
    for index in range(dropped, count):
        time_0, time_1, time_2, time_3 = time_1, time_2, time_3, memory[entry_word(place, capacity, start, index)]
        units_0, units_1, units_2, units_3 = units_1, units_2, units_3, ring_units(memory, base, index)
    memory[base + META] = 1
    memory[base + TIMES], memory[base + TIMES + 1], memory[base + TIMES + 2], memory[base + TIMES + 3] = time_0, time_1, time_2, time_3
    memory[base + AMOUNTS], memory[base + AMOUNTS + 1] = pair_of(units_0, units_1), pair_of(units_2, units_3)
    control[ENTRIES] -= count
    block_remove(control, slabs, place, capacity)


@inline
def move_ring(memory, control, slabs, base, lines, dropped, reach_ns):
    """Move a ring's entries but the `dropped` oldest into a block of another size; at least one entry remains (I1-I4)."""
    old_place, old_capacity, start, count = ring_of(memory, base)
    count -= dropped
    place = block_add(memory, control, slabs, lines)
    for index in range(count):
        source = entry_word(old_place, old_capacity, start, dropped + index)
        target = 2 * (place + index)
        memory[target] = memory[source]
        memory[target + 1] = memory[source + 1]
    block_remove(control, slabs, old_place, old_capacity)
    memory[base + META] = (lines * BLOCK_ENTRIES) << PLACE_BITS | place
    memory[base + SPAN] = count << HALF_BITS
    control[ENTRIES] -= dropped
    if memory[base + LEFT] >= dropped:
        memory[base + LEFT] -= dropped
    else:
        set_left(memory, base, reach_ns)


@inline
def drop_oldest(memory, control, base, dropped, reach_ns):
    """Forget the `dropped` oldest entries of a ring where they are; at least one remains (I1-I4)."""
    _, capacity, start, count = ring_of(memory, base)
    start += dropped
    if start >= capacity:
        start -= capacity
    memory[base + SPAN] = (count - dropped) << HALF_BITS | start
    control[ENTRIES] -= dropped
    if memory[base + LEFT] >= dropped:
        memory[base + LEFT] -= dropped
    else:
        set_left(memory, base, reach_ns)


@inline
def make_room(memory, control, slabs, base, time, units, floor_ns, reach_ns):
    """Make a full ring take one entry more: by forgetting what no exact lookup can need, or in the next larger block.

    A ring that fits the line with that entry goes back into it. When `time` is not before NEWEST, `append` must come next.
    """
    place, capacity, start, count = ring_of(memory, base)
    dropped = first_from(memory, place, capacity, start, 0, count, floor_ns)
    if dropped == 0:
        move_ring(memory, control, slabs, base, larger(capacity), 0, reach_ns)
    elif count - dropped < INLINE_CAPACITY and fits_line(units) and may_enter_line(memory, control, base, dropped):
        enter_line(memory, control, slabs, base, dropped)
    elif time >= memory[base + NEWEST]:
        # The entry at LEFT may be gone. It was before the window of this row too, and `append` will search from LEFT + 1 on.
        start += dropped
        if start >= capacity:
            start -= capacity
        memory[base + SPAN] = (count - dropped) << HALF_BITS | start
        memory[base + LEFT] = max(memory[base + LEFT] - dropped, -1)
        control[ENTRIES] -= dropped
    else:
        drop_oldest(memory, control, base, dropped, reach_ns)


@inline
def too_large(memory, control, base, floor_ns, units):
    """Whether the sum of the units a ring retains would leave +-2**62 with `units` more (S3)."""
    place, capacity, start, count = ring_of(memory, base)
    if 2 * (count + 1) <= control[SAFE_COUNT]:
        return False
    first = lower_bound(memory, place, capacity, start, 0, count, floor_ns)
    high, low = span_sum(memory, control, base, first, count)
    low += units & HALF_MASK
    high += (units >> HALF_BITS) + (low >> HALF_BITS)
    low &= HALF_MASK
    if high >= 0:
        return high > SUM_LIMIT_HIGH or (high == SUM_LIMIT_HIGH and low > 0)
    return high < -SUM_LIMIT_HIGH


@inline
def entries_in_line(memory, base):
    """Entries that a line holds. No branches."""
    count = np.int64(0)
    for index in range(INLINE_CAPACITY):
        count += np.int64(memory[base + TIMES + index] != EMPTY)
    return count


@inline
def put_in_line(memory, control, marks, base, time, units):
    """Put an entry into a line whose oldest is expired or EMPTY, and goes, where its time belongs, behind its equals (I2, I9)."""
    low, high = memory[base + AMOUNTS], memory[base + AMOUNTS + 1]
    if time >= memory[base + NEWEST]:
        memory[base + TIMES] = memory[base + TIMES + 1]
        memory[base + TIMES + 1] = memory[base + TIMES + 2]
        memory[base + TIMES + 2] = memory[base + TIMES + 3]
        memory[base + TIMES + 3] = time
        memory[base + AMOUNTS] = pair_of(low >> HALF_BITS, high)
        memory[base + AMOUNTS + 1] = pair_of(high >> HALF_BITS, units)
        marks[base // LINE_WORDS] = mark_of(control, time)
    else:
        second, third = memory[base + TIMES + 1], memory[base + TIMES + 2]
        if time < second:
            memory[base + TIMES] = time
            memory[base + AMOUNTS] = pair_of(units, low >> HALF_BITS)
        elif time < third:
            memory[base + TIMES], memory[base + TIMES + 1] = second, time
            memory[base + AMOUNTS] = pair_of(low >> HALF_BITS, units)
        else:
            memory[base + TIMES], memory[base + TIMES + 1], memory[base + TIMES + 2] = second, third, time
            memory[base + AMOUNTS] = pair_of(low >> HALF_BITS, high)
            memory[base + AMOUNTS + 1] = pair_of(units, high >> HALF_BITS)


@inline
def append(memory, base, time, units, reach_ns):
    """Put an entry behind all others of its ring. Returns (entries in its window, index of the first of them)."""
    place, capacity, start, count = ring_of(memory, base)
    total = memory[base + TOTAL]
    word = entry_word(place, capacity, start, count)
    memory[word] = time
    memory[word + 1] = total
    memory[base + TOTAL] = wrapped_sum(total, units)
    count += 1
    memory[base + SPAN] = count << HALF_BITS | start
    memory[base + NEWEST] = time
    left_ns = minus(time, reach_ns)
    if memory[base + LEFT_TIME] < left_ns:
        point_left(memory, base, first_from(memory, place, capacity, start, memory[base + LEFT] + 1, count, left_ns))
    return count - memory[base + LEFT], memory[base + LEFT]


@inline
def insert_late(memory, base, time, units, reach_ns):
    """Put an entry into a ring where its time belongs, behind its equals. Returns (entries in its window, index of the first of them)."""
    place, capacity, start, count = ring_of(memory, base)
    at = upper_bound(memory, place, capacity, start, 0, count, time)
    for index in range(count, at, -1):
        source = entry_word(place, capacity, start, index - 1)
        target = entry_word(place, capacity, start, index)
        memory[target] = memory[source]
        memory[target + 1] = wrapped_sum(memory[source + 1], units)
    memory[entry_word(place, capacity, start, at)] = time  # its `before` is that of the entry it moved out of the way
    memory[base + TOTAL] = wrapped_sum(memory[base + TOTAL], units)
    memory[base + SPAN] = (count + 1) << HALF_BITS | start
    if time >= minus(memory[base + NEWEST], reach_ns):
        point_left(memory, base, min(at, memory[base + LEFT]))
    else:
        point_left(memory, base, memory[base + LEFT] + 1)
    first = lower_bound(memory, place, capacity, start, 0, at + 1, minus(time, reach_ns))
    return at + 1 - first, first


@inline
def put_in_ring(memory, control, base, time, units, reach_ns):
    """Put an entry into a ring that has room. Returns the units in its window as (high, low), and their number."""
    control[ENTRIES] += 1
    control[COUNT_MAX] = max(control[COUNT_MAX], (memory[base + SPAN] >> HALF_BITS) + 1)
    if time >= memory[base + NEWEST]:
        counted, left = append(memory, base, time, units, reach_ns)
        if counted <= control[SAFE_COUNT]:
            difference = wrapped_difference(memory[base + TOTAL], memory[base + LEFT_BEFORE])
            return difference >> HALF_BITS, difference & HALF_MASK, counted
    else:
        counted, left = insert_late(memory, base, time, units, reach_ns)
    high, low = span_sum(memory, control, base, left, left + counted)
    return high, low, counted


@inline
def ask_ring(memory, slot):
    """Prefetch the ring lines that the next row of this user touches: the one written, and that of the window's left edge."""
    base = natural(slot) * LINE_WORDS
    meta = memory[base + META]
    if meta >= RING_FROM:
        capacity = meta >> PLACE_BITS
        place = meta & PLACE_MASK
        span = memory[base + SPAN]
        prefetch(memory, entry_word(place, capacity, span & HALF_MASK, span >> HALF_BITS))
        prefetch(memory, entry_word(place, capacity, span & HALF_MASK, memory[base + LEFT] + 1))


@kernel(
    i64, I64_IN, I64_IN, U8_IN, boolean, U64_IN, I32_IN, boolean, I64_IN, I64_IN, I64_IN,
    i64, i64, i64, boolean, i64, I64, U32, I64, U8, I64, U8, I32, F64, U8,
)  # fmt: skip
def take_rows(
    values,  # (n,)    int64    in     integer ids of the batch
    offsets,  # (n+1,)  int64    in     byte ids: where each begins in data
    data,  # (b,)    uint8    in     byte ids: their bytes
    is_bytes,  # ()      bool     in     which of the two it is
    hashes,  # (n,)    uint64   in     hash of each row of the batch
    rows,  # (m,)    int32    in     rows of the batch that belong to this shard, in arrival order
    located,  # ()      bool     in     whether `slots` says where the users are; else they are looked up, and made where they are new
    time_ns,  # (n,)    int64    in     of the whole batch
    units,  # (n,)    int64    in     of the whole batch; UNITS_MAX knows of them
    clock_ns,  # (n,)    int64    in     the clock just after each row
    reach_ns,  # ()      int64    in     how far back a window counts
    retention_ns,  # ()      int64    in     how far behind the clock an entry is retained
    scale,  # ()      int64    in     units per 1 of the currency
    wanted,  # ()      bool     in     whether to write scores
    overflow,  # ()      int64    in     code of the reason sum_overflow
    memory,  # ...     int64    inout  see Shard
    table,  # ...     uint32   inout
    control,  # ...     int64    inout
    arena,  # ...     uint8    inout
    slabs,  # ...     int64    inout
    marks,  # ...     uint8    inout
    slots,  # (m,)    int32    inout  slot of rows[j], whether or not it was known before
    scores,  # (n,)    float64  out    score of each row at its own time (S9)
    reasons,  # (n,)    uint8    inout  set to `overflow` for rows that would break S3
):
    """Put each row into its user's line or ring and score it. Needs and keeps I1-I9; slots, rings and arena were checked to suffice.

    A row passes four stages, AHEAD rows apart, each asking for the memory that the next one reads. Returns the rows applied.
    Cost per row: index line and slot line; with a ring also the line written and now and then that of the window's left edge.
    A late row moves the entries behind it.
    """
    count_rows = len(rows)
    applied = 0
    for position in range(-3 * AHEAD, count_rows):
        ahead = position + 3 * AHEAD
        if ahead < count_rows and not located:
            ask_line(table, control, hashes[natural(np.int64(rows[ahead]))])
        ahead -= AHEAD
        if 0 <= ahead < count_rows:
            if located:
                prefetch(memory, np.int64(slots[ahead]) * LINE_WORDS)
            else:
                slots[ahead] = ask_slot(memory, table, control, hashes[natural(np.int64(rows[ahead]))])
            prefetch(marks, np.int64(slots[ahead]))
        ahead -= AHEAD
        if 0 <= ahead < count_rows and slots[ahead] >= 0:
            ask_ring(memory, np.int64(slots[ahead]))
            if is_bytes and not located:
                ask_bytes(memory, arena, np.int64(slots[ahead]), bytes_of(offsets, rows[ahead]))
        if position < 0:
            continue
        row = natural(np.int64(rows[position]))
        slot = np.int64(slots[position])
        if not located:
            value, first, last = bytes_between(values, offsets, row, is_bytes)
            slot = slot_made(memory, table, control, arena, hashes[row], value, data, first, last, is_bytes, slot)
            slots[position] = slot
        base = natural(slot) * LINE_WORDS
        time = time_ns[row]
        amount = units[row]
        floor_ns = minus(clock_ns[row], retention_ns)
        if memory[base + META] >= RING_FROM:
            if too_large(memory, control, base, floor_ns, amount):
                reasons[row] = overflow
                continue
            if memory[base + SPAN] >> HALF_BITS == memory[base + META] >> PLACE_BITS:
                make_room(memory, control, slabs, base, time, amount, floor_ns, reach_ns)
        elif memory[base + TIMES] >= floor_ns or not fits_line(amount):  # the line is full of retained entries, or does not do
            leave_line(memory, control, slabs, marks, base, time, reach_ns)
        if memory[base + META] < RING_FROM:
            put_in_line(memory, control, marks, base, time, amount)
            counted, total = line_window(memory, base, minus(time, reach_ns), time)
            high, low = total >> HALF_BITS, total & HALF_MASK
        else:
            high, low, counted = put_in_ring(memory, control, base, time, amount, reach_ns)
        applied += 1
        if wanted:
            scores[row] = mean(high, low, counted * scale)
    return applied
