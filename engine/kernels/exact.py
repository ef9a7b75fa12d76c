"""Exact arithmetic on windows: wide sums, and the score as a correctly rounded quotient.

A window's sum nearly always fits int64, and then it is one subtraction of prefix sums. Whether it does is known beforehand: `count`
entries of at most UNITS_MAX each cannot leave int64 while count <= SAFE_COUNT. Else the units are added up one by one in two halves.
"""

import numpy as np

from engine.kernels.compile import inline
from engine.kernels.layout import EXACT_FLOAT, HALF_BITS, HALF_MASK, INT64_MAX, SAFE_COUNT, TIME_MIN


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
def entry_word(place, capacity, start, index):
    """Word of entry `index` of a ring: its time; the next word is its `before`."""
    at = start + index
    if at >= capacity:
        at -= capacity
    return 2 * (place + at)


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
def before_of(memory, place, capacity, start, count, total, index):
    """Prefix sum before entry `index`; with index == count, the sum of all."""
    if index == count:
        return total
    return memory[entry_word(place, capacity, start, index) + 1]


@inline
def span_sum(memory, control, place, capacity, start, count, total, first, last):
    """Sum of the units of entries first..last-1 as (high, low): high * 2**32 + low, 0 <= low < 2**32.

    Cost: two entries; or, when the sum might not fit int64, all of them.
    """
    if last - first <= control[SAFE_COUNT]:
        difference = wrapped_difference(
            before_of(memory, place, capacity, start, count, total, last),
            before_of(memory, place, capacity, start, count, total, first),
        )
        return difference >> HALF_BITS, difference & HALF_MASK
    high = np.int64(0)
    low = np.int64(0)
    for index in range(first, last):
        units = wrapped_difference(
            before_of(memory, place, capacity, start, count, total, index + 1),
            before_of(memory, place, capacity, start, count, total, index),
        )
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
