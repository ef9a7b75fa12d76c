"""Windows out: scores and features of users at an instant. Nothing here writes to a shard."""

import numpy as np

from engine.kernels.compile import F64, I32_IN, I64, i64, inline, kernel, prefetch
from engine.kernels.exact import entry_word, lower_bound, mean, minus, plus, span_sum, upper_bound, wrapped_difference
from engine.kernels.layout import (
    AHEAD,
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
    SAFE_COUNT,
    SPAN,
    TOTAL,
)


@inline
def window(memory, base, at_ns, reach_ns):
    """Indices [first, last) of the entries that count at an instant.

    At or after a user's newest entry the window's left edge is searched from LEFT on; before it, in the whole ring.
    """
    capacity = memory[base + RING] >> PLACE_BITS
    place = memory[base + RING] & PLACE_MASK
    start = memory[base + SPAN] & HALF_MASK
    count = memory[base + SPAN] >> HALF_BITS
    floor_ns = minus(at_ns, reach_ns)
    if capacity == INLINE_CAPACITY:
        first = lower_bound(memory, place, capacity, start, 0, count, floor_ns)
        return first, upper_bound(memory, place, capacity, start, first, count, at_ns)
    if at_ns >= memory[base + NEWEST]:
        if floor_ns > memory[base + NEWEST]:
            return count, count
        left = memory[base + LEFT]
        if floor_ns <= memory[base + LEFT_TIME]:
            return left, count
        return lower_bound(memory, place, capacity, start, left, count, floor_ns), count
    first = lower_bound(memory, place, capacity, start, 0, count, floor_ns)
    return first, upper_bound(memory, place, capacity, start, first, count, at_ns)


@inline
def prefetch_window(memory, slot, floor_ns):
    """Ask for the ring line where a window's left edge will be searched, if LEFT is not it."""
    base = slot * LINE_WORDS
    capacity = memory[base + RING] >> PLACE_BITS
    if capacity > INLINE_CAPACITY and memory[base + LEFT_TIME] < floor_ns <= memory[base + NEWEST]:
        start = memory[base + SPAN] & HALF_MASK
        prefetch(memory, entry_word(memory[base + RING] & PLACE_MASK, capacity, start, memory[base + LEFT]))


@kernel(i64, I32_IN, I32_IN, i64, i64, i64, I64, I64, F64)
def window_scores(
    rows,  # (m,)  int32    in   where the score of slots[j] goes: scores[rows[j]]
    slots,  # (m,)  int32    in   slots to read; -1: unknown user
    at_ns,  # ()    int64    in   right edge, included
    reach_ns,  # ()    int64    in   how far back the window counts
    scale,  # ()    int64    in   units per 1 of the currency
    memory,  # ...   int64    in   see Shard
    control,  # ...   int64    in
    scores,  # (n,)  float64  out  0.0 where nothing counts
):
    """Score of each slot's window [at - reach, at]. Reads only; needs I1-I4. Returns the number with a transaction in it.

    Cost per row: slot line; ring lines only where the window's left edge has moved since the user's last row.
    """
    counted = 0
    total_rows = len(slots)
    floor_ns = minus(at_ns, reach_ns)
    for position in range(-2 * AHEAD, total_rows):
        if position + 2 * AHEAD < total_rows:
            prefetch(memory, max(np.int64(slots[position + 2 * AHEAD]), np.int64(0)) * LINE_WORDS)
        if 0 <= position + AHEAD < total_rows:
            prefetch_window(memory, max(np.int64(slots[position + AHEAD]), np.int64(0)), floor_ns)
        if position < 0:
            continue
        slot = np.int64(slots[position])
        score = 0.0
        if slot >= 0:
            base = slot * LINE_WORDS
            first, last = window(memory, base, at_ns, reach_ns)
            if first < last:
                counted += 1
                capacity = memory[base + RING] >> PLACE_BITS
                count = memory[base + SPAN] >> HALF_BITS
                if capacity > INLINE_CAPACITY and last == count and first == memory[base + LEFT] and last - first <= control[SAFE_COUNT]:
                    difference = wrapped_difference(memory[base + TOTAL], memory[base + LEFT_BEFORE])
                    high, low = difference >> HALF_BITS, difference & HALF_MASK
                else:
                    place = memory[base + RING] & PLACE_MASK
                    start = memory[base + SPAN] & HALF_MASK
                    high, low = span_sum(memory, control, place, capacity, start, count, memory[base + TOTAL], first, last)
                score = mean(high, low, (last - first) * scale)
        scores[rows[position]] = score
    return counted


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
    none = -INT64_MAX - 1
    counted = 0
    total_rows = len(slots)
    for position in range(total_rows):
        if position + AHEAD < total_rows:
            prefetch(memory, max(np.int64(slots[position + AHEAD]), np.int64(0)) * LINE_WORDS)
        row = rows[position]
        slot = np.int64(slots[position])
        counts[row] = 0
        sums[2 * row] = 0
        sums[2 * row + 1] = 0
        scores[row] = 0.0
        newest[row] = none
        valid_until[row] = none
        zero_at[row] = none
        if slot < 0:
            continue
        base = slot * LINE_WORDS
        capacity = memory[base + RING] >> PLACE_BITS
        place = memory[base + RING] & PLACE_MASK
        start = memory[base + SPAN] & HALF_MASK
        count = memory[base + SPAN] >> HALF_BITS
        first, last = window(memory, base, at_ns, reach_ns)
        if last < count:
            following = memory[entry_word(place, capacity, start, last)]
            if following > at_ns and following >= floor_ns:
                valid_until[row] = following - 1
        if first == last:
            continue
        counted += 1
        high, low = span_sum(memory, control, place, capacity, start, count, memory[base + TOTAL], first, last)
        counts[row] = last - first
        sums[2 * row] = (high << HALF_BITS) | low
        sums[2 * row + 1] = high >> HALF_BITS
        scores[row] = mean(high, low, (last - first) * scale)
        leaves = plus(memory[entry_word(place, capacity, start, first)], reach_ns)
        if valid_until[row] == none or leaves < valid_until[row]:
            valid_until[row] = leaves
        time = memory[entry_word(place, capacity, start, last - 1)]
        newest[row] = time
        empty_ns = plus(plus(time, reach_ns), 1)
        while last < count:
            time = memory[entry_word(place, capacity, start, last)]
            if time > empty_ns:
                break
            empty_ns = plus(plus(time, reach_ns), 1)
            last += 1
        zero_at[row] = empty_ns
    return counted
