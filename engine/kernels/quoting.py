"""Numbers of JSON put into quotes, so that what reads the JSON keeps them as they are written."""

import numpy as np

from engine.kernels.compile import U8, U8_IN, i64, inline, kernel, natural

QUOTE, COLON, COMMA, BRACE, MINUS, PLUS, POINT = ord('"'), ord(":"), ord(","), ord("{"), ord("-"), ord("+"), ord(".")
SPACE, TAB, LINE_FEED, RETURN = ord(" "), ord("\t"), ord("\n"), ord("\r")
ZERO, NINE, LOWER_E, UPPER_E = ord("0"), ord("9"), ord("e"), ord("E")

#: What Arrow takes for numbers, too.
NAN, INFINITY = np.frombuffer(b"NaN", np.uint8), np.frombuffer(b"Infinity", np.uint8)


@inline
def is_space(byte):
    return (byte == SPACE) | (byte == TAB) | (byte == RETURN) | (byte == LINE_FEED)


@inline
def begins_with(block, at, word, length):
    """Whether the first `length` bytes of a word are there."""
    if at + length > len(block):
        return False
    for place in range(length):  # noqa: SIM110 - kernels have no generators
        if block[natural(at + place)] != word[natural(place)]:
            return False
    return True


@inline
def value_of(block, at, key):
    """Where the value of a member begins, if its key is there; else -1."""
    if not begins_with(block, at, key, len(key)):
        return np.int64(-1)
    at += len(key)
    while at < len(block) and is_space(block[natural(at)]):
        at += 1
    if at == len(block) or block[natural(at)] != COLON:
        return np.int64(-1)
    at += 1
    while at < len(block) and is_space(block[natural(at)]):
        at += 1
    return at


@inline
def end_of_number(block, at):
    """Where a number ends that begins there; `at` itself if there is none."""
    first = at
    if at < len(block) and block[natural(at)] == MINUS:
        at += 1
    if at < len(block) and ZERO <= block[natural(at)] <= NINE:
        while at < len(block):
            byte = block[natural(at)]
            if not ((ZERO <= byte <= NINE) | (byte == POINT) | (byte == LOWER_E) | (byte == UPPER_E) | (byte == PLUS) | (byte == MINUS)):
                break
            at += 1
        return at
    if begins_with(block, at, NAN, 3):
        return at + 3
    if begins_with(block, at, INFINITY, 3):
        return at + (8 if begins_with(block, at, INFINITY, 8) else 3)
    return first


@kernel(i64, U8_IN, U8_IN, U8_IN, U8)
def quote_numbers(
    block,  # (n,)  uint8  in   JSON
    one_key,  # (k,)  uint8  in   names of members, with their quotes
    other_key,  # (k,)  uint8  in
    quoted,  # (m,)  uint8  out  the same with these members' numbers in quotes; m at least n + n // 2 + 2
):
    """Put the numbers of two members into quotes. Returns how many bytes that makes.

    A name counts where an object or white space or a comma is in front of it: within a text a quote has a backslash there. Sequential.
    """
    at, copied, written = np.int64(1), np.int64(0), np.int64(0)
    while at < len(block):
        before = block[natural(at - 1)]
        if block[natural(at)] != QUOTE or not ((before == COMMA) | (before == BRACE) | is_space(before)):
            at += 1
            continue
        first = value_of(block, at, one_key)
        if first < 0:
            first = value_of(block, at, other_key)
        end = end_of_number(block, first) if first >= 0 else first
        if end <= first:
            at += 1
            continue
        for place in range(first - copied):
            quoted[natural(written + place)] = block[natural(copied + place)]
        written += first - copied
        quoted[natural(written)] = QUOTE
        for place in range(end - first):
            quoted[natural(written + 1 + place)] = block[natural(first + place)]
        written += end - first + 2
        quoted[natural(written - 1)] = QUOTE
        at = copied = end
    for place in range(len(block) - copied):
        quoted[natural(written + place)] = block[natural(copied + place)]
    return written + len(block) - copied
