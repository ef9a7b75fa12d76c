"""Amounts and times that are written as text, parsed exactly and vectorised.

Arrow's casts know only all or nothing; they go first because they are fast. When one value spoils them, the column is
sorted out by regular expressions, which accept all that the casts accept: what becomes of a row must not depend on
its neighbours.

Limits: a number that needs an exponent beyond 20 goes through float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints, bytes_of, mask_of, matches, null_rows, values_of
from engine.config import TIME_NS_MAX, TIME_UNIT_NS
from engine.rounding import Converted, decimal_units, float_units, whole_units

_NUMBER: Final = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NOT_FINITE_TEXT: Final = r"^[+-]?(?i:nan|inf|infinity)$"
INTEGER: Final = r"^[+-]?[0-9]+$"
_INSTANT: Final = (
    r"^(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
    r"(?:[ Tt](?P<hour>[0-9]{2})(?::(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?)?)?"
    r"(?:[Zz]|(?P<sign>[+-])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?)?)?$"
)

#: Texts that are sorted out together around one that spoils a cast.
_SORTED_ROWS: Final = 512


def text_amounts(text: Any, decimals: int) -> Converted:
    """Decimal numbers, with or without an exponent, in units of 10**-decimals; NaN and infinities are `not_finite`.

    What is no number is null, as SQL's TRY_CAST has it. Blanks around a value do not matter.
    """
    for scale in () if _misleads_arrow(text) else (decimals, 18):
        try:
            found = decimal_units(text.cast(pa.decimal128(38, scale)), decimals)
        except pa.ArrowInvalid:
            continue
        found.null = null_rows(text)
        return found
    if len(text) > _SORTED_ROWS:
        return _halves(text, lambda half: text_amounts(half, decimals))
    return _sorted_text_amounts(text, decimals)


def _misleads_arrow(text: Any) -> bool:
    """Whether Arrow's cast to decimal might take a text for something else.

    It makes 0 of a value that has more than 38 digits behind the last one it keeps, without an error; that cannot happen
    in 28 characters with an exponent of one digit. And it takes "1e+-5" and "1e0x5" for numbers.
    """
    offsets, _ = bytes_of(text, "text")
    if len(text) and int(np.diff(offsets).max()) > 28:
        return True
    return _has_letter(text, b"eE") and not bool(pc.all(pc.match_substring_regex(text, r"^[^eE]*([eE][+-]?0*[0-9])?$")).as_py())


def _has_letter(text: Any, letters: bytes) -> bool:
    """Whether one of some ASCII letters occurs anywhere in the texts; by their bytes, which costs 1 ns per row."""
    offsets, data = bytes_of(text, "text")
    used = data[offsets[0] : offsets[-1]]
    return any(bool((used == letter).any()) for letter in letters)


def _halves(text: Any, convert: Callable[[Any], Converted]) -> Converted:
    middle = len(text) // 2
    found = Converted(np.zeros(len(text), np.int64))
    found.put(slice(0, middle), convert(text[:middle]))
    found.put(slice(middle, None), convert(text[middle:]))
    return found


def _sorted_text_amounts(text: Any, decimals: int) -> Converted:
    text = pc.ascii_trim_whitespace(text)
    number = matches(text, _NUMBER)
    endless = matches(text, _NOT_FINITE_TEXT)
    found = Converted(np.zeros(len(text), np.int64), null=~(number | endless), not_finite=endless)
    text = pc.replace_substring_regex(text, pattern=r"^([+-]?)0+([0-9])", replacement=r"\1\2")
    # decimal256(76, 38) holds 38 digits on both sides. Of a longer fraction it only matters whether anything is left.
    text = pc.replace_substring_regex(text, pattern=r"(\.[0-9]{37})[0-9]*[1-9][0-9]*$", replacement=r"\11")
    text = pc.replace_substring_regex(text, pattern=r"(\.[0-9]{37})0+$", replacement=r"\1")
    short = r"^[+-]?[0-9]{0,38}(\.[0-9]{0,38})?$"
    short_power = r"^[+-]?[0-9]{0,18}(\.[0-9]{0,18})?[eE][+-]?0*([0-9]|1[0-9]|20)$"
    # What `_misleads_arrow` lets through is exact whatever stands beside it, so it must be exact here too.
    brief_power = r"^[+-]?[0-9.]{1,26}[eE][+-]?0*[0-9]$"
    exact = number & (matches(text, short) | matches(text, short_power) | matches(text, brief_power))
    rows = np.flatnonzero(exact)
    found.put(rows, decimal_units(text.take(pa.array(rows)).cast(pa.decimal256(76, 38)), decimals))
    power = number & ~exact & matches(text, "[eE]")
    rows = np.flatnonzero(power)
    if len(rows):
        part = text.take(pa.array(rows))
        floats = part.cast(pa.float64()).to_numpy(zero_copy_only=False)
        units = float_units(floats, 10**decimals)
        vanished = (floats == 0) & matches(part, "^[^eE]*[1-9]")
        units.rounded = vanished if units.rounded is None else units.rounded | vanished
        if units.not_finite is not None:  # written as a number, but beyond any float
            units.out_of_range = units.not_finite if units.out_of_range is None else units.out_of_range | units.not_finite
            units.not_finite = None
        found.put(rows, units)
    long = number & ~exact & ~power
    if long.any():
        found.out_of_range = long if found.out_of_range is None else found.out_of_range | long
    return found


def text_times(text: Any, time_unit: str | None) -> Converted:
    """ISO 8601 dates and instants in nanoseconds, UTC unless they say otherwise; with a `time_unit` integers too.

    What is no time, such as the 31st of June, is null; what is one but beyond int64 nanoseconds is `out_of_range`.
    """
    least_most = pc.min_max(text).as_py()
    if least_most["min"] is None:
        return Converted(np.zeros(len(text), np.int64), null=np.ones(len(text), np.bool_))
    # Some versions of pyarrow wrap around silently outside of the years that int64 ns can hold; and Arrow reads
    # "0x10" as an integer.
    try:
        if least_most["min"] >= "1678" and least_most["max"] < "2262" and "-" in least_most["min"][:5]:
            zoned = bool(re.search(r"([Zz]|[ Tt].*[+-].*)$", least_most["min"]))
            array = text.cast(pa.timestamp("ns", "UTC" if zoned else None))
            return Converted(values_of(array, np.int64).copy(), null=null_rows(text))
        if time_unit is not None and not _has_letter(text, b"xX"):
            array = text.cast(pa.int64())
            found = whole_units(values_of(array, np.int64), TIME_UNIT_NS[time_unit], TIME_NS_MAX)
            found.null = null_rows(text)
            return found
    except pa.ArrowInvalid:
        pass
    if len(text) > _SORTED_ROWS:
        return _halves(text, lambda half: text_times(half, time_unit))
    return _sorted_text_times(text, time_unit)


def _sorted_text_times(text: Any, time_unit: str | None) -> Converted:
    text = pc.ascii_trim_whitespace(text)
    found = Converted(np.zeros(len(text), np.int64), null=np.ones(len(text), np.bool_))
    if time_unit is not None:
        rows = np.flatnonzero(matches(text, INTEGER))
        found.put(rows, _integer_text_times(text.take(pa.array(rows)), TIME_UNIT_NS[time_unit]))
    rows = np.flatnonzero(matches(text, _INSTANT))
    found.put(rows, _instant_text_times(text.take(pa.array(rows))))
    return found


def _integer_text_times(text: Any, factor: int) -> Converted:
    negative = matches(text, "^-")
    digits = pc.replace_substring_regex(text, pattern=r"^[+-]?0*", replacement="0")
    endless = matches(digits, "^[0-9]{21}")  # more than 19 digits behind the zero
    magnitude = values_of(pc.if_else(pa.array(endless), "0", digits).cast(pa.uint64()), np.uint64)
    out = endless | (magnitude > np.uint64(TIME_NS_MAX // factor))
    time_ns = np.where(out, np.uint64(0), magnitude).astype(np.int64) * factor
    return Converted(np.where(negative, -time_ns, time_ns), out_of_range=out, null=np.zeros(len(text), np.bool_))


def _instant_text_times(text: Any) -> Converted:
    parts = pc.extract_regex(text, _INSTANT)

    def part(name: str) -> Ints:
        found = parts.field(name)
        if name == "fraction":
            found = pc.utf8_rpad(found, 9, "0")
        return values_of(pc.if_else(pc.equal(found, ""), "0", found).cast(pa.int64()), np.int64)

    year, month, day = part("year"), part("month"), part("day")
    hour, minute, second, fraction = part("hour"), part("minute"), part("second"), part("fraction")
    zone_hour, zone_minute = part("zone_hour"), part("zone_minute")
    first = (year - 1970) * 12 + np.clip(month, 1, 12) - 1
    day_0 = first.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    days = (first + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) - day_0
    real = (month >= 1) & (month <= 12) & (day >= 1) & (day <= days)
    real &= (hour < 24) & (minute < 60) & (second < 60) & (zone_hour < 24) & (zone_minute < 60)
    west = mask_of(pc.equal(parts.field("sign"), "-"))
    zone = np.where(west, -1, 1) * (zone_hour * 3600 + zone_minute * 60)
    seconds = (day_0 + day - 1) * 86400 + hour * 3600 + minute * 60 + second - zone
    # The lowest and the highest second are only partly inside; the sum below may wrap there and comes out right.
    top, low = divmod(TIME_NS_MAX, 10**9), divmod(-TIME_NS_MAX, 10**9)
    inside = (seconds < top[0]) | ((seconds == top[0]) & (fraction <= top[1]))
    inside &= (seconds > low[0]) | ((seconds == low[0]) & (fraction >= low[1]))
    time_ns = np.where(inside, seconds, 0) * 10**9 + fraction
    return Converted(time_ns, out_of_range=~inside & real, null=~real)
