"""Integers of a JSON array, read straight from its bytes: no object is made for each."""

import numpy as np

from engine.kernels.compile import I64, U8_IN, i64, inline, kernel, natural
from engine.kernels.quoting import COMMA, MINUS, NINE, ZERO, is_space

BRACKET = ord("]")

#: Any integer of so many digits fits int64.
DIGITS_MAX = 18


@inline
def after_space(block, at):
    """The next place that has no white space; the end if there is none."""
    while at < len(block) and is_space(block[natural(at)]):
        at += 1
    return at


@kernel(i64, U8_IN, i64, I64)
def parse_integers(
    block,  # (n,)  uint8  in   JSON
    first,  # scalar            where the elements of an array begin, behind its bracket
    values,  # (m,)  int64  out  the elements, and behind them the place behind the array; room for one more than there are
):
    """Read an array of integers of up to DIGITS_MAX digits. Returns how many there are; -1 if it is anything else, or too long.

    Sequential; some 1.3 ns a byte.
    """
    at, count = np.int64(first), np.int64(0)
    while count < len(values) - 1:
        at = after_space(block, at)
        negative = at < len(block) and block[natural(at)] == MINUS
        at += negative
        begin, value = at, np.int64(0)
        while at < len(block) and ZERO <= block[natural(at)] <= NINE:
            value = value * 10 + (np.int64(block[natural(at)]) - ZERO)
            at += 1
        digits = at - begin
        if digits == 0 or digits > DIGITS_MAX or (block[natural(begin)] == ZERO and (digits > 1 or negative)):
            return np.int64(-1)
        values[natural(count)] = -value if negative else value
        count += 1
        at = after_space(block, at)
        if at == len(block):
            return np.int64(-1)
        last = block[natural(at)]
        at += 1
        if last == BRACKET:
            values[natural(count)] = at
            return count
        if last != COMMA:
            return np.int64(-1)
    return np.int64(-1)
