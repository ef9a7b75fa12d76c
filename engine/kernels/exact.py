"""Exact arithmetic on windows: entries in order of time, wide sums, and the score as a correctly rounded quotient.

A window's sum nearly always fits int64, and then it is one subtraction of prefix sums. Whether it does is known beforehand: `count`
entries of at most UNITS_MAX each cannot leave int64 while count <= SAFE_COUNT. Else the units are added up one by one in two halves.
"""

import numpy as np

from engine.kernels.compile import inline, natural
from engine.kernels.layout import (
    AMOUNTS,
    EXACT_FLOAT,
    HALF_BITS,
    HALF_MASK,
    INLINE_CAPACITY,
    INT64_MAX,
    META,
    PLACE_BITS,
    PLACE_MASK,
    RING_FROM,
    SAFE_COUNT,
    SPAN,
    TIME_MIN,
    TIMES,
    TOTAL,
)


@inline
def minus(time_ns, duration_ns):
    """`time_ns - duration_ns`, not below the least time."""
    if time_ns < TIME_MIN + duration_ns:
        return np.int64(TIME_MIN)
    return time_ns - duration_ns


@inline
def plus(time_ns, duration_ns):
    """`time_ns + duration_ns`, not above the greatest time."""
    if time_ns > INT64_MAX - duration_ns:
        return np.int64(INT64_MAX)
    return time_ns + duration_ns


@inline
def wrapped_sum(first, second):
    """Sum modulo 2**64. Signed arithmetic must not wrap: LLVM takes it for granted that it does not."""
    return np.int64(np.uint64(first) + np.uint64(second))


@inline
def wrapped_difference(first, second):
    """Difference modulo 2**64."""
    return np.int64(np.uint64(first) - np.uint64(second))


@inline
def ring_of(memory, base):
    """(place, capacity, start, count) of a ring."""
    meta = memory[base + META]
    span = memory[base + SPAN]
    return meta & PLACE_MASK, meta >> PLACE_BITS, span & HALF_MASK, span >> HALF_BITS


@inline
def entry_word(place, capacity, start, index):
    """Word of a ring's entry: its time; the next word is its `before`."""
    at = start + index
    if at >= capacity:
        at -= capacity
    return natural(2 * (place + at))


@inline
def lower_bound(memory, place, capacity, start, low, high, time_ns):
    """First index in [low, high) whose entry is at or after `time_ns`; `high` if none is."""
    while low < high:
        middle = (low + high) >> 1
        if memory[entry_word(place, capacity, start, middle)] < time_ns:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def upper_bound(memory, place, capacity, start, low, high, time_ns):
    """First index in [low, high) whose entry is after `time_ns`; `high` if none is."""
    while low < high:
        middle = (low + high) >> 1
        if memory[entry_word(place, capacity, start, middle)] <= time_ns:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def first_from(memory, place, capacity, start, low, count, time_ns):
    """As `lower_bound` of [low, count), for an answer that is near `low`: gallop, then search where that ends."""
    step = 1
    while low + step <= count and memory[entry_word(place, capacity, start, low + step - 1)] < time_ns:
        low += step
        step *= 2
    return lower_bound(memory, place, capacity, start, low, min(low + step - 1, count), time_ns)


@inline
def before_of(memory, place, capacity, start, count, total, index):
    """Prefix sum before entry `index` of a ring; with index == count, the sum of all."""
    if index == count:
        return total
    return memory[entry_word(place, capacity, start, index) + 1]


@inline
def ring_units(memory, base, index):
    """Units of a ring's entry."""
    place, capacity, start, count = ring_of(memory, base)
    before = memory[entry_word(place, capacity, start, index) + 1]
    return wrapped_difference(before_of(memory, place, capacity, start, count, memory[base + TOTAL], index + 1), before)


@inline
def low_units(pair):
    """Units in the low half of a word of AMOUNTS."""
    return (pair << HALF_BITS) >> HALF_BITS


@inline
def pair_of(low, high):
    """A word of AMOUNTS."""
    return (low & HALF_MASK) | (high << HALF_BITS)


@inline
def line_units(memory, base, index):
    """Units of a line's entry; 0 if it is EMPTY."""
    pair = memory[natural(base + AMOUNTS + (index >> 1))]
    return pair >> HALF_BITS if index & 1 else low_units(pair)


@inline
def line_window(memory, base, left_ns, at_ns):
    """Number and units of the entries in a line whose times are in [left, at]. No branches: which they are is unpredictable."""
    counted = np.int64(0)
    total = np.int64(0)
    for index in range(INLINE_CAPACITY):
        time = memory[base + TIMES + index]
        inside = np.int64(time >= left_ns) & np.int64(time <= at_ns)
        counted += inside
        total += line_units(memory, base, index) & -inside
    return counted, total


@inline
def line_before(memory, base, time_ns):
    """How many of a line's entries, EMPTY ones included, are before `time_ns`. No branches."""
    count = np.int64(0)
    for index in range(INLINE_CAPACITY):
        count += np.int64(memory[base + TIMES + index] < time_ns)
    return count


@inline
def line_until(memory, base, time_ns):
    """How many of a line's entries, EMPTY ones included, are at or before `time_ns`. No branches."""
    count = np.int64(0)
    for index in range(INLINE_CAPACITY):
        count += np.int64(memory[base + TIMES + index] <= time_ns)
    return count


@inline
def count_of(memory, base):
    """A user's entries; those of a line with the EMPTY ones."""
    if memory[base + META] < RING_FROM:
        return np.int64(INLINE_CAPACITY)
    return memory[base + SPAN] >> HALF_BITS


@inline
def time_of(memory, base, index):
    """Time of a user's entry, in a line or a ring."""
    if memory[base + META] < RING_FROM:
        return memory[natural(base + TIMES + index)]
    place, capacity, start, _ = ring_of(memory, base)
    return memory[entry_word(place, capacity, start, index)]


@inline
def units_of(memory, base, index):
    """Units of a user's entry, in a line or a ring."""
    if memory[base + META] < RING_FROM:
        return line_units(memory, base, index)
    return ring_units(memory, base, index)


@inline
def span_sum(memory, control, base, first, last):
    """Sum of the units of a ring's entries first..last-1 as (high, low): high * 2**32 + low, 0 <= low < 2**32.

    Cost: two entries; or, when the sum might not fit int64, all of them.
    """
    place, capacity, start, count = ring_of(memory, base)
    total = memory[base + TOTAL]
    if last - first <= control[SAFE_COUNT]:
        difference = wrapped_difference(
            before_of(memory, place, capacity, start, count, total, last),
            before_of(memory, place, capacity, start, count, total, first),
        )
        return difference >> HALF_BITS, difference & HALF_MASK
    high = np.int64(0)
    low = np.int64(0)
    for index in range(first, last):
        units = ring_units(memory, base, index)
        high += units >> HALF_BITS
        low += units & HALF_MASK
    return high + (low >> HALF_BITS), low & HALF_MASK


@inline
def mean(high, low, divisor):
    """(high * 2**32 + low) / divisor as the nearest float64, ties to even. `divisor` is positive and below 2**53.

    Below 2**53 both operands are exact floats and IEEE division does it. Above, the quotient is developed bit by bit.
    """
    if -(EXACT_FLOAT >> HALF_BITS) <= high < EXACT_FLOAT >> HALF_BITS:
        return np.float64(high * (HALF_MASK + 1) + low) / np.float64(divisor)
    negative = high < 0
    if negative:
        high = -high
        if low > 0:
            high -= 1
            low = HALF_MASK + 1 - low
    quotient = np.int64(0)  # below 2**54: no amount is above 2**53 units, so neither is their mean
    rest = np.int64(0)
    for bit in range(62, -1, -1):
        rest = rest * 2 + ((high >> bit) & 1)
        quotient *= 2
        if rest >= divisor:
            rest -= divisor
            quotient += 1
    for bit in range(HALF_BITS - 1, -1, -1):
        rest = rest * 2 + ((low >> bit) & 1)
        quotient *= 2
        if rest >= divisor:
            rest -= divisor
            quotient += 1
    scale = 1.0
    while quotient < EXACT_FLOAT:  # 53 bits and one to round with
        rest *= 2
        quotient *= 2
        scale *= 0.5
        if rest >= divisor:
            rest -= divisor
            quotient += 1
    half = quotient & 1
    quotient >>= 1
    if half == 1 and (rest > 0 or quotient & 1 == 1):
        quotient += 1
    result = np.float64(quotient) * 2.0 * scale
    if negative:
        return -result
    return result
