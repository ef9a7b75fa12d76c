"""Which users' scores are no longer what was last reported of them.

A byte a slot, the watch, says when its user's score may next change: when a transaction enters or leaves the window, in the epochs of marks
(`layout`), or at once after a row. 64 are compared at a time, so that users whose scores cannot have changed cost a byte each.
"""

import numpy as np

from engine.kernels.compile import F64, I32, I64, U8, boolean, i64, inline, kernel, natural, prefetch
from engine.kernels.exact import count_of, mean, minus, plus, time_of
from engine.kernels.layout import AHEAD, EMPTY, EPOCH_BITS, INT64_MAX, LINE_WORDS, MARKED, META
from engine.kernels.rows import mark_of
from engine.kernels.upkeep import list_marked_before
from engine.kernels.windows import window, window_units


@inline
def next_change(memory, base, at_ns, left_ns, reach_ns):
    """First instant after `at` at which a transaction enters or leaves the window, if nothing more arrives; INT64_MAX: none does."""
    first, last = window(memory, base, at_ns, left_ns)
    instant = np.int64(INT64_MAX)
    if last < count_of(memory, base):
        instant = time_of(memory, base, last)
    if first < last:
        oldest = time_of(memory, base, first)
        if oldest > EMPTY:
            instant = min(instant, plus(plus(oldest, reach_ns), 1))
    return instant


@kernel(i64, i64, i64, i64, i64, i64, boolean, boolean, I64, I64, U8, F64, I32, I32)
def list_changed(
    first,  # ()   int64    in     slots from here, a multiple of 64,
    last,  # ()   int64    in     to here are looked at
    at_ns,  # ()   int64    in     the instant of the scores
    reach_ns,  # ()   int64    in     how far back a window counts
    scale,  # ()   int64    in     units per 1 of the currency
    every,  # ()   bool     in     look into all of them, not only those whose watch is due
    touched,  # ()   bool     in     list also users with a window that may have changed, though their score has not
    memory,  # ...  int64    in     see Shard
    control,  # ...  int64    in
    watch,  # (m,) uint8    inout  0: no change to come; else MARKED and an epoch
    reported,  # (m,) float64  inout  what was last reported of each slot
    due,  # (k,) int32    out    scratch, k >= last - first + 64
    changed,  # (k,) int32    out    slots whose score at `at` is another than was reported, and what `touched` adds
):
    """List the slots whose score has changed, remember what it is now, and watch for the next change. Returns how many.

    Cost: a byte a slot; a slot line, now and then a ring line, and a line of `reported` for each that is due.
    """
    count = np.int64(0)
    if every:
        for slot in range(first, last):
            due[natural(count)] = slot
            count += 1
    else:
        before = MARKED | ((at_ns >> control[EPOCH_BITS]) + 1) & (MARKED - 1)
        count, _ = list_marked_before(watch, first, last, before, due)
    left_ns = minus(at_ns, reach_ns)
    found = np.int64(0)
    for position in range(count):
        if position + AHEAD < count:
            ahead = np.int64(due[natural(position + AHEAD)])
            prefetch(memory, ahead * LINE_WORDS)
            prefetch(reported, ahead)
        slot = natural(np.int64(due[position]))
        base = slot * LINE_WORDS
        if memory[base + META] == 0:
            watch[slot] = 0
            continue
        high, low, counted = window_units(memory, control, base, at_ns, left_ns)
        score = mean(high, low, max(counted, 1) * scale)
        if score != reported[slot] or (touched and counted > 0):
            reported[slot] = score
            changed[natural(found)] = slot
            found += 1
        instant = next_change(memory, base, at_ns, left_ns, reach_ns)
        watch[slot] = 0 if instant == INT64_MAX else mark_of(control, instant)
    return found
