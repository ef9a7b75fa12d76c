"""Windows out: scores and features of users at an instant. Nothing here writes to a shard."""

import numpy as np

from engine.kernels.compile import (
    F64,
    I32,
    I32_IN,
    I64,
    I64_IN,
    U8,
    U8_IN,
    U32,
    U64_IN,
    boolean,
    f64,
    i64,
    inline,
    kernel,
    natural,
    prefetch,
    u64,
)
from engine.kernels.exact import (
    count_of,
    entry_word,
    first_from,
    line_before,
    line_until,
    line_window,
    lower_bound,
    mean,
    minus,
    plus,
    ring_of,
    span_sum,
    time_of,
    upper_bound,
    wrapped_difference,
)
from engine.kernels.layout import (
    AHEAD,
    HALF_BITS,
    HALF_MASK,
    INT64_MAX,
    LEFT,
    LEFT_BEFORE,
    LEFT_TIME,
    LINE_WORDS,
    META,
    NEWEST,
    PLACE_BITS,
    PLACE_MASK,
    RING_FROM,
    SAFE_COUNT,
    SPAN,
    TOTAL,
)
from engine.kernels.probing import ask_bytes, ask_line, ask_slot, bytes_between, bytes_of, probe, slot_found


@inline
def window(memory, base, at_ns, left_ns):
    """Indices [first, last) of the entries that count at an instant, from `left_ns` on.

    At or after the newest entry of a ring the window's left edge is searched from LEFT on; before it, in the whole ring.
    """
    if memory[base + META] < RING_FROM:
        return line_before(memory, base, left_ns), line_until(memory, base, at_ns)
    place, capacity, start, count = ring_of(memory, base)
    if at_ns >= memory[base + NEWEST]:
        if left_ns > memory[base + NEWEST]:
            return count, count
        left = memory[base + LEFT]
        if left_ns <= memory[base + LEFT_TIME]:
            return left, count
        return first_from(memory, place, capacity, start, left + 1, count, left_ns), count
    first = lower_bound(memory, place, capacity, start, 0, count, left_ns)
    return first, upper_bound(memory, place, capacity, start, first, count, at_ns)


@inline
def ring_window(memory, control, base, at_ns, left_ns):
    """Units of a ring's entries that count at an instant as (high, low), and their number."""
    first, last = window(memory, base, at_ns, left_ns)
    if first == memory[base + LEFT] and last == memory[base + SPAN] >> HALF_BITS and last - first <= control[SAFE_COUNT]:
        difference = wrapped_difference(memory[base + TOTAL], memory[base + LEFT_BEFORE])
        return difference >> HALF_BITS, difference & HALF_MASK, last - first
    high, low = span_sum(memory, control, base, first, last)
    return high, low, last - first


@inline
def ask_window(memory, slot, left_ns):
    """Prefetch the ring line where a window's left edge will be searched, if LEFT is not it."""
    base = natural(slot) * LINE_WORDS
    meta = memory[base + META]
    if meta >= RING_FROM and memory[base + LEFT_TIME] < left_ns <= memory[base + NEWEST]:
        prefetch(memory, entry_word(meta & PLACE_MASK, meta >> PLACE_BITS, memory[base + SPAN] & HALF_MASK, memory[base + LEFT] + 1))


@inline
def window_units(memory, control, base, at_ns, left_ns):
    """Units of a user's entries that count at an instant as (high, low), and their number."""
    if memory[base + META] < RING_FROM:
        counted, total = line_window(memory, base, left_ns, at_ns)
        return total >> HALF_BITS, total & HALF_MASK, counted
    return ring_window(memory, control, base, at_ns, left_ns)


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, U64_IN, I32_IN, i64, i64, i64, I64, U32, I64, U8, I32, F64)
def window_scores(
    values,  # (n,)    int64    in   integer ids
    offsets,  # (n+1,)  int64    in   byte ids: where each begins in data
    data,  # (b,)    uint8    in   byte ids: their bytes
    is_bytes,  # ()      bool     in   which of the two it is
    hashes,  # (n,)    uint64   in   hash of each id
    rows,  # (m,)    int32    in   ids that belong to this shard
    at_ns,  # ()      int64    in   right edge, included
    reach_ns,  # ()      int64    in   how far back the window counts
    scale,  # ()      int64    in   units per 1 of the currency
    memory,  # ...     int64    in   see Shard
    table,  # ...     uint32   in
    control,  # ...     int64    in
    arena,  # ...     uint8    in
    slots,  # (m,)    int32    out  scratch
    scores,  # (n,)    float64  out  0.0 where nothing counts, and for unknown users
):
    """Score of each user's window [at - reach, at]. Reads only; needs I1-I7. Returns the number with a transaction in it.

    Cost per row: index line and slot line; ring lines only where the window's left edge has moved since the user's last row.
    """
    counted_rows = 0
    count = len(rows)
    left_ns = minus(at_ns, reach_ns)
    for position in range(-3 * AHEAD, count):
        ahead = position + 3 * AHEAD
        if ahead < count:
            ask_line(table, control, hashes[natural(np.int64(rows[ahead]))])
        ahead -= AHEAD
        if 0 <= ahead < count:
            slots[ahead] = ask_slot(memory, table, control, hashes[natural(np.int64(rows[ahead]))])
        ahead -= AHEAD
        if 0 <= ahead < count and slots[ahead] >= 0:
            ask_window(memory, np.int64(slots[ahead]), left_ns)
            if is_bytes:
                ask_bytes(memory, arena, np.int64(slots[ahead]), bytes_of(offsets, rows[ahead]))
        if position < 0:
            continue
        row = natural(np.int64(rows[position]))
        slot = np.int64(slots[position])
        if slot > -2:
            value, first, last = bytes_between(values, offsets, row, is_bytes)
            slot = slot_found(memory, table, control, arena, hashes[row], value, data, first, last, is_bytes, slot)
        if slot < 0:
            scores[row] = 0.0
            continue
        high, low, counted = window_units(memory, control, natural(slot) * LINE_WORDS, at_ns, left_ns)
        counted_rows += np.int64(counted > 0)
        scores[row] = mean(high, low, max(counted, 1) * scale)  # nothing counted: 0 / 1
    return counted_rows


@kernel(f64, i64, U8_IN, boolean, u64, i64, i64, i64, I64, U32, I64, U8)
def window_score(
    value,  # ()   int64    in   an integer id
    data,  # (b,) uint8    in   or the bytes of one
    is_bytes,  # ()   bool     in   which of the two it is
    h,  # ()   uint64   in   its hash
    at_ns,  # ()   int64    in   right edge, included
    reach_ns,  # ()   int64    in   how far back the window counts
    scale,  # ()   int64    in   units per 1 of the currency
    memory,  # ...  int64    in   see Shard
    table,  # ...  uint32   in
    control,  # ...  int64    in
    arena,  # ...  uint8    in
):
    """Score of one user's window [at - reach, at]; 0.0 where nothing counts, and for an unknown user. Reads only; needs I1-I7."""
    slot = probe(memory, table, control, arena, h, value, data, np.int64(0), np.int64(len(data)), is_bytes)
    if slot < 0:
        return 0.0
    high, low, counted = window_units(memory, control, natural(slot) * LINE_WORDS, at_ns, minus(at_ns, reach_ns))
    return mean(high, low, max(counted, 1) * scale)


@inline
def write_features(row, slot, at_ns, reach_ns, floor_ns, scale, memory, control, counts, sums, scores, newest, valid_until, zero_at):
    """Everything about one slot's window, -1 being an unknown user, to one row of the answer. Returns whether it has a transaction."""
    none = -INT64_MAX - 1
    counts[row] = 0
    sums[2 * row] = 0
    sums[2 * row + 1] = 0
    scores[row] = 0.0
    newest[row] = none
    valid_until[row] = none
    zero_at[row] = none
    if slot < 0:
        return 0
    base = natural(slot) * LINE_WORDS
    count = count_of(memory, base)
    left_ns = minus(at_ns, reach_ns)
    first, last = window(memory, base, at_ns, left_ns)
    if last < count:
        following = time_of(memory, base, last)
        if following > at_ns and following >= floor_ns:
            valid_until[row] = following - 1
    if first == last:
        return 0
    if memory[base + META] < RING_FROM:
        _, total = line_window(memory, base, left_ns, at_ns)
        high, low = total >> HALF_BITS, total & HALF_MASK
    else:
        high, low = span_sum(memory, control, base, first, last)
    counts[row] = last - first
    sums[2 * row] = (high << HALF_BITS) | low
    sums[2 * row + 1] = high >> HALF_BITS
    scores[row] = mean(high, low, (last - first) * scale)
    leaves = plus(time_of(memory, base, first), reach_ns)
    if valid_until[row] == none or leaves < valid_until[row]:
        valid_until[row] = leaves
    time = time_of(memory, base, last - 1)
    newest[row] = time
    empty_ns = plus(plus(time, reach_ns), 1)
    while last < count:
        time = time_of(memory, base, last)
        if time > empty_ns:
            break
        empty_ns = plus(plus(time, reach_ns), 1)
        last += 1
    zero_at[row] = empty_ns
    return 1


@kernel(i64, I32_IN, I32_IN, i64, i64, i64, i64, I64, I64, I64, I64, F64, I64, I64, I64)
def window_features(
    rows,  # (m,)    int32    in   where the answers for slots[j] go
    slots,  # (m,)    int32    in   slots to read; -1: unknown user
    at_ns,  # ()      int64    in   right edge, included
    reach_ns,  # ()      int64    in   how far back the window counts
    floor_ns,  # ()      int64    in   entries before it are no longer retained
    scale,  # ()      int64    in   units per 1 of the currency
    memory,  # ...     int64    in   see Shard
    control,  # ...     int64    in
    counts,  # (n,)    int64    out  transactions in the window
    sums,  # (2n,)   int64    out  their units as 128-bit integers, low word first
    scores,  # (n,)    float64  out
    newest,  # (n,)    int64    out  newest time counted, or INT64_MIN
    valid_until,  # (n,)    int64    out  last instant with the same transactions in the window, or INT64_MIN: for ever
    zero_at,  # (n,)    int64    out  first instant after `at` with an empty window, or INT64_MIN: it is empty already
):
    """Everything about each slot's window [at - reach, at]. Reads only; needs I1-I4. Returns the number with a transaction in it.

    Cost per row: slot line and ring lines of the window's two edges; for lookups in the past also the entries after `at`.
    """
    counted = 0
    total_rows = len(slots)
    for position in range(total_rows):
        if position + AHEAD < total_rows:
            prefetch(memory, max(np.int64(slots[position + AHEAD]), np.int64(0)) * LINE_WORDS)
        row, slot = natural(np.int64(rows[position])), np.int64(slots[position])
        counted += write_features(
            row, slot, at_ns, reach_ns, floor_ns, scale, memory, control, counts, sums, scores, newest, valid_until, zero_at
        )
    return counted


@kernel(i64, i64, U8_IN, boolean, u64, i64, i64, i64, i64, I64, U32, I64, U8, I64, I64, F64, I64, I64, I64)
def user_features(
    value,  # ()   int64    in   an integer id
    data,  # (b,) uint8    in   or the bytes of one
    is_bytes,  # ()   bool     in   which of the two it is
    h,  # ()   uint64   in   its hash
    at_ns,  # ()   int64    in   as window_features
    reach_ns,  # ()   int64    in
    floor_ns,  # ()   int64    in
    scale,  # ()   int64    in
    memory,  # ...  int64    in   see Shard
    table,  # ...  uint32   in
    control,  # ...  int64    in
    arena,  # ...  uint8    in
    counts,  # (1,) int64    out  as window_features
    sums,  # (2,) int64    out
    scores,  # (1,) float64  out
    newest,  # (1,) int64    out
    valid_until,  # (1,) int64    out
    zero_at,  # (1,) int64    out
):
    """Everything about one user's window [at - reach, at]. Reads only; needs I1-I7. Returns 1 if it has a transaction."""
    slot = probe(memory, table, control, arena, h, value, data, np.int64(0), np.int64(len(data)), is_bytes)
    return write_features(
        natural(np.int64(0)), slot, at_ns, reach_ns, floor_ns, scale, memory, control, counts, sums, scores, newest, valid_until, zero_at
    )
