"""One instant or amount as people write it, exactly in nanoseconds or units: what `columns` does to columns, for single values."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.config import AMOUNT_UNITS_MAX, TIME_UNIT_NS, Config
from engine.errors import EngineError, SchemaError

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_SECOND = datetime.timedelta(seconds=1)


def instant_ns(value: Any, name: str, *, time_unit: str | None, error: type[EngineError]) -> int:
    """Nanoseconds since the Unix epoch of one instant; it may lie beyond int64.

    Args:
        value: datetime (naive: UTC), date, numpy.datetime64, Arrow scalar, ISO 8601 text; an integer if `time_unit` is given.
        name: What it is, for the error text.
        time_unit: Unit of integers; None refuses them.
        error: Class of the error raised.

    Example:
        >>> instant_ns("1970-01-01T00:00:01.000000001Z", "at", time_unit=None, error=SchemaError)
        1000000001
    """
    if isinstance(value, pa.Scalar):
        if not value.is_valid:
            raise error(f"{name} is null; give an instant")
        if pa.types.is_timestamp(value.type):
            return int(value.value) * TIME_UNIT_NS[value.type.unit]
        value = value.as_py()
    if hasattr(value, "to_datetime64"):  # a pandas Timestamp is a datetime that has nanoseconds besides
        value = value.to_datetime64()
    if isinstance(value, datetime.datetime):
        zoned = value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value
        since = zoned - _EPOCH
        return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
    if isinstance(value, datetime.date):
        return (value - _EPOCH.date()).days * 86400 * 10**9
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            raise error(f"{name} is not a time (NaT); give an instant")
        unit, step = np.datetime_data(value.dtype)
        if unit in TIME_UNIT_NS:
            return int(value.astype(np.int64)) * step * TIME_UNIT_NS[unit]
        return int(value.astype("datetime64[s]").astype(np.int64)) * 10**9  # minutes and coarser
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if time_unit is None:
            raise error(f"{name}={value!r} is a number without a unit; give a datetime, numpy.datetime64 or ISO 8601 text")
        return int(value) * TIME_UNIT_NS[time_unit]
    if isinstance(value, str):
        return _text_ns(value, name, error)
    raise error(f"{name}={value!r} is no instant; give a datetime, numpy.datetime64, Arrow timestamp or ISO 8601 text")


def _text_ns(text: str, name: str, error: type[EngineError]) -> int:
    """ISO 8601 with up to nine digits of a second: `datetime` reads all but the fraction."""
    head, dot, tail = text.strip().partition(".")
    digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
    try:
        whole = datetime.datetime.fromisoformat(head + tail[len(digits) :])
    except ValueError as cause:
        raise error(f"{name}={text!r} is no instant; write it as in '2026-01-31T12:00:00Z'") from cause
    if (dot and not digits) or len(digits) > 9:
        raise error(f"{name}={text!r} must have one to nine digits after the point")
    seconds_ns = instant_ns(whole, name, time_unit=None, error=error)
    return seconds_ns + int(digits.ljust(9, "0")) if digits else seconds_ns


def arrival_times(values: Any, rows: int) -> NDArray[np.int64]:
    """Instants at which rows arrived, in nanoseconds since the Unix epoch.

    Args:
        values: (rows,) int64 nanoseconds, datetime64 or Arrow timestamps; none may be null.
        rows: How many there must be.

    Raises:
        SchemaError: They are others.

    Example:
        >>> arrival_times(np.array(["1970-01-01T00:00:01"], "datetime64[s]"), 1)
        array([1000000000])
    """
    wanted = f"arrival must be {rows:,} instants, one a row of data in memory, as int64 nanoseconds, datetime64 or Arrow timestamps"
    try:
        array = values if isinstance(values, pa.ChunkedArray) else pa.array(values)
        if pa.types.is_timestamp(array.type):
            array = array.cast(pa.timestamp("ns")).cast(pa.int64())
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SchemaError(f"{wanted}: {error}") from error
    if array.type != pa.int64() or array.null_count or len(array) != rows:
        raise SchemaError(f"{wanted}; found {len(array):,} of type {array.type}, {array.null_count:,} of them null")
    times: NDArray[np.int64] = array.to_numpy()
    return times


def instant_text(time_ns: int) -> str:
    """An instant as ISO 8601 text in UTC.

    Example:
        >>> instant_text(1_500_000_000)
        '1970-01-01T00:00:01.5Z'
    """
    seconds, nanoseconds = divmod(time_ns, 10**9)
    text = str(np.datetime64(seconds, "s"))
    return f"{text}.{nanoseconds:09d}".rstrip("0").rstrip(".") + "Z" if nanoseconds else f"{text}Z"


def amount_units(value: Any, config: Config) -> tuple[int, bool, str | None]:
    """Units of one amount, whether rounding changed it, and the reason to reject it, if any (S3).

    Raises:
        SchemaError: It is no number.

    Example:
        >>> amount_units(0.12345, Config.of())
        (1235, True, None)
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if value is None:
        return 0, False, "null_amount"
    single = isinstance(value, np.float32)
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return 0, False, "amount_not_finite"
        value = float(value)
        units = round(value * config.scale) if abs(value) < AMOUNT_UNITS_MAX else 0
        if not single and abs(units) < AMOUNT_UNITS_MAX // 2 and units / config.scale == value:
            return units, False, None  # the float nearest to a value of the grid, as nearly all are
        units = round(Fraction(value) * config.scale)  # half to even, on the exact value
        nearest = units / config.scale if abs(units) <= AMOUNT_UNITS_MAX else math.inf
        rounded = bool(np.float32(nearest) != np.float32(value)) if single else nearest != value
    elif isinstance(value, Decimal):
        if not value.is_finite():
            return 0, False, "amount_not_finite"
        if value.adjusted() > 40:  # far out of range, and too large a number to make
            return 0, False, "amount_out_of_range"
        exact = Fraction(value) * config.scale if value.adjusted() > -400 else Fraction(0)
        units, rounded = round(exact), exact.denominator != 1 or (exact == 0 and value != 0)
    elif isinstance(value, int | np.integer) and not isinstance(value, bool):
        units, rounded = int(value) * config.scale, False
    else:
        raise SchemaError(f"{config.amount}={value!r} is no amount; give an int, float or Decimal")
    if abs(units) > AMOUNT_UNITS_MAX:
        return 0, False, "amount_out_of_range"
    return units, rounded, None
