"""Numbers as int64 multiples of a unit: integers, floats and decimals, rounded half-even by their exact value.

A float counts as its exact binary value, a decimal as its digits; nothing is rounded twice. Amounts become units of
`10**-decimals`, times become nanoseconds. What does not fit is masked, not raised. The usual float64 has a kernel; the rest is
vectorised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Bools, Ints, values_of
from engine.config import AMOUNT_UNITS_MAX
from engine.kernels import NOT_FINITE, OUT_OF_RANGE, round_amounts


@dataclass(slots=True)
class Converted:
    """Values of one column, and masks of rows that have none; a mask is None when it would be all False."""

    values: Ints
    null: Bools | None = None
    out_of_range: Bools | None = None
    not_finite: Bools | None = None
    rounded: Bools | None = None

    def put(self, rows: Ints | slice, part: Converted) -> None:
        """Take over the values and masks of some rows from a conversion of just these."""
        self.values[rows] = part.values
        for name in ("null", "out_of_range", "not_finite", "rounded"):
            mask = getattr(part, name)
            if mask is not None:
                if getattr(self, name) is None:
                    setattr(self, name, np.zeros(len(self.values), np.bool_))
                getattr(self, name)[rows] = mask


def whole_units(values: NDArray[Any], factor: int, most: int) -> Converted:
    """Integers times a factor; out of range beyond `most` in magnitude, decided before multiplying."""
    limit = most // factor
    out = None
    if len(values) and (int(values.max()) > limit or int(values.min()) < -limit):
        wide = values if values.dtype == np.uint64 else values.astype(np.int64, copy=False)
        out = wide > limit
        if wide.dtype != np.uint64:
            out |= wide < -limit
    units = values.astype(np.int64)
    if limit and factor != 1:
        units *= factor
    return Converted(units, out_of_range=out)


def float_units(values: NDArray[Any], scale: int) -> Converted:
    """Half-even rounding of the exact product values * scale, for floats of any width."""
    if values.dtype != np.float64:
        return _narrow_float_units(values, scale)
    n = len(values)
    units, faults = np.empty(n, np.int64), np.empty(n, np.uint8)
    rounded = np.zeros(n, np.bool_)
    with np.errstate(all="ignore"):  # of kernels that run uncompiled
        fault_count = round_amounts(values, scale, AMOUNT_UNITS_MAX, units, rounded.view(np.uint8), faults)
    if fault_count:
        return Converted(units, out_of_range=faults == OUT_OF_RANGE, not_finite=faults == NOT_FINITE, rounded=rounded)
    return Converted(units, rounded=rounded)


def _narrow_float_units(values: NDArray[Any], scale: int) -> Converted:
    """float16 and float32: their products with a scale fit into float64 without any rounding."""
    wide = values.astype(np.float64)
    with np.errstate(all="ignore"):
        product = wide * scale
        np.rint(product, out=product)
        inside = np.abs(product) <= AMOUNT_UNITS_MAX
        finite = None if inside.all() else np.isfinite(wide)
        if finite is not None:
            product[~inside] = 0.0
        # Rounding units / scale to float64 and then to the narrow float gives the nearest narrow float: a half-way point h
        # between two of those is odd * 2**-j with at most 25 bits. With scale = 10**d, units / scale either is h or differs
        # from it by at least 5**-8 * 2**-j, a thousand times more than float64 can hide.
        rounded = (product / scale).astype(values.dtype) != values
    found = Converted(product.astype(np.int64), rounded=rounded)
    if finite is not None:
        found.out_of_range = finite & ~inside
        found.not_finite = ~finite
    return found


def decimal_units(array: Any, decimals: int) -> Converted:
    """Half-even rounding of decimals of any width and scale by their digits."""
    drop = array.type.scale - decimals  # how many digits there are too many
    width = array.type.bit_width
    if width <= 64:
        return _digit_units(values_of(array, np.int32 if width == 32 else np.int64).astype(np.int64), drop)
    words = values_of(array, np.uint64, width // 64).reshape(len(array), width // 64)
    low = words[:, 0].copy().view(np.int64)
    sign = (low >> 63).view(np.uint64)
    fits = words[:, 1] == sign
    for word in range(2, width // 64):
        fits &= words[:, word] == sign
    if fits.all():
        return _digit_units(low, drop)
    rest = np.flatnonzero(~fits)
    low[rest] = 0
    found = _digit_units(low, drop)
    found.put(rest, _wide_digit_units(words[rest], drop))
    return found


def _digit_units(values: Ints, drop: int) -> Converted:
    """int64 without its last `drop` digits, rounded half-even; negative: with so many zeros more."""
    if drop <= 0:
        return whole_units(values, 10 ** min(-drop, 18), AMOUNT_UNITS_MAX)  # Arrow allows any scale; beyond this only 0 is in range
    if drop >= 19:  # int64 stays below 10**19: only with 19 digits can half a unit be reached
        half = 5 * 10**18
        units = (values > half).astype(np.int64) - (values < -half) if drop == 19 else np.zeros_like(values)
        return Converted(units, rounded=values != 0)
    divisor = 10**drop
    units = values // divisor
    left = values - units * divisor
    rounded = left != 0
    left *= 2
    units += (left > divisor) | ((left == divisor) & (units & 1).astype(np.bool_))
    out = (units > AMOUNT_UNITS_MAX) | (units < -AMOUNT_UNITS_MAX)
    return Converted(units, out_of_range=out if out.any() else None, rounded=rounded)


def _wide_digit_units(words: NDArray[np.uint64], drop: int) -> Converted:
    """The same for integers beyond int64, given as (n, 2 or 4) little-endian words in two's complement.

    Schoolbook division in limbs of 32 bits: at most nine digits at a time, so that remainder and limb fit 64 bits.
    """
    n = len(words)
    if drop <= 0:
        return Converted(np.zeros(n, np.int64), out_of_range=np.ones(n, np.bool_))
    negative = words[:, -1] >> np.uint64(63) == 1
    carry = negative.astype(np.uint64)
    magnitude = np.where(negative[:, None], ~words, words)
    limbs = []
    for word in range(words.shape[1]):
        for shift in (0, 32):
            limb = ((magnitude[:, word] >> np.uint64(shift)) & np.uint64(0xFFFFFFFF)) + carry
            carry = limb >> np.uint64(32)
            limbs.append(limb & np.uint64(0xFFFFFFFF))
    sticky = np.zeros(n, np.bool_)
    digits = min(drop - 1, 78)  # no more are in 256 bits, whatever the scale
    while digits:
        sticky |= _divide(limbs, 10 ** min(digits, 9)) != 0
        digits -= min(digits, 9)
    last = _divide(limbs, 10)
    out = limbs[1] >= 2**22
    for limb in limbs[2:]:
        out |= limb != 0
    units = (limbs[0] | (limbs[1] << np.uint64(32))).view(np.int64)
    units += (last > 5) | ((last == 5) & (sticky | (units & 1).astype(np.bool_)))
    out |= units > AMOUNT_UNITS_MAX
    return Converted(np.where(negative, -units, units), out_of_range=out, rounded=sticky | (last != 0))


def _divide(limbs: list[NDArray[np.uint64]], divisor: int) -> NDArray[np.uint64]:
    """Divide in place, least limb first in the list; returns the remainders."""
    by = np.uint64(divisor)
    left = np.zeros_like(limbs[0])
    for place in reversed(range(len(limbs))):
        if left.any() or limbs[place].any():
            whole = (left << np.uint64(32)) | limbs[place]
            limbs[place] = whole // by
            left = whole - limbs[place] * by
    return left
