"""The configuration of an engine, checked at the door; durations and instants as people write them.

Everything behind this module works in whole nanoseconds and whole units of money: no duration or
instant is ever a bare number, because a number without its unit is wrong by a factor of 1000 some day.
"""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from engine.errors import ConfigError

#: Why a row was not applied (S12). The order is the order in which the reasons are tried.
REASONS: Final = (
    "null_user",
    "null_amount",
    "null_timestamp",
    "amount_not_finite",
    "amount_out_of_range",
    "timestamp_out_of_range",
    "future",
    "jump",
    "late",
    "sum_overflow",
)

#: Greatest magnitude of one amount, and of the sum of a user's retained amounts, in units (S3).
AMOUNT_UNITS_MAX: Final = 2**53
SUM_UNITS_MAX: Final = 2**62

#: Event times are int64 nanoseconds. The lowest int64 is what NumPy calls "not a time", so it is none here either.
TIME_NS_MIN: Final = -(2**63) + 1
TIME_NS_MAX: Final = 2**63 - 1

#: No duration is longer (36 years): sums of a few durations then stay far inside int64.
DURATION_NS_MAX: Final = 2**60

#: With 8 decimals (a satoshi) and RING_CAPACITY_MAX rows, count * 10**decimals stays below 2**53,
#: which is what makes one float division a correctly rounded score.
DECIMALS_MAX: Final = 8
RING_CAPACITY_MAX: Final = 2**26

#: Sizes of the blocks that rings lie in, in memory lines of four transactions; a larger ring takes a multiple of the last. Few sizes
#: waste little of a slab of 64 lines, and each is at most a third (beyond 16 lines, a half) more than the one before.
BLOCK_LINES: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 21, 32, 64)

#: Slots are named in 32-bit index entries that also hold tag bits.
USERS_MAX: Final = 400_000_000
SHARDS_MAX: Final = 256

TIME_UNIT_NS: Final = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

_DURATION_UNIT_NS: Final = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|min|s|m|h|d)\s*")


def duration_ns(value: Any, name: str) -> int:
    """Turn a duration into whole nanoseconds.

    Args:
        value: A string such as `"60s"`, `"5m"`, `"500ms"` or `"1h30m"`, a `datetime.timedelta` or a `numpy.timedelta64`.
        name: The option's name, for the error text.

    Raises:
        ConfigError: It is a bare number, not a duration, negative, finer than 1 ns or longer than 36 years.

    Example:
        >>> duration_ns("1.5s", "window")
        1500000000
    """
    if isinstance(value, str):
        exact = _parse_duration(value, name)
    elif isinstance(value, datetime.timedelta):
        microseconds = (value.days * 86400 + value.seconds) * 10**6 + value.microseconds
        exact = Fraction(microseconds * 1000)
    elif type(value).__name__ == "timedelta64":  # recognised by name: this module does not import numpy
        nanoseconds = value.astype("timedelta64[ns]").astype("int64")
        if str(value) == "NaT" or nanoseconds.astype("timedelta64[ns]") != value:
            raise ConfigError(f"{name}={value!r} is not a duration that nanoseconds can hold; give one such as '60s'")
        exact = Fraction(int(nanoseconds))
    else:
        raise ConfigError(
            f"{name}={value!r} has no unit; durations are strings such as '60s', '5m' or '500ms', timedelta or numpy.timedelta64"
        )
    if exact.denominator != 1:
        raise ConfigError(f"{name}={value!r} is not a whole number of nanoseconds; give one that is")
    if not 0 <= exact <= DURATION_NS_MAX:
        raise ConfigError(f"{name}={value!r} must lie between 0 and {DURATION_NS_MAX} ns (36 years)")
    return int(exact)


def _parse_duration(text: str, name: str) -> Fraction:
    position, total = 0, Fraction(0)
    stripped = text.strip()
    while match := _DURATION_PART.match(stripped, position):
        total += Fraction(match[1]) * _DURATION_UNIT_NS[match[2]]
        position = match.end()
    if position == 0 or position != len(stripped):
        raise ConfigError(
            f"{name}={text!r} is not a duration; write a number and a unit (ns, us, ms, s, m, h, d), such as '60s' or '1h30m'"
        )
    return total


@dataclass(frozen=True, slots=True)
class Config:
    """What one engine was asked to be. Built by `Config.of`, which checks it.

    Attributes:
        window_ns: What a score covers.
        lateness_ns: How far behind the clock a row is still applied.
        closed: "both" counts a transaction exactly `window` old, "right" does not (S4).
        decimals: Amounts are held in units of 10**-decimals.
        users: Most users with a retained transaction at a time.
        shards: Parts that are worked on by a thread each; never changes a result.
        clock: "event" or "wall": what a lookup without `at` takes for now (S6).
        max_ahead_ns: Rows further ahead of the wall clock are rejected; None: never.
        max_jump_ns: Rows further ahead of the engine's clock are rejected; None: never.
        time_unit: Unit of an integer time column; None: such a column is refused.
        user_id, amount, timestamp: Column names.
    """

    window_ns: int
    lateness_ns: int
    closed: str
    decimals: int
    users: int
    shards: int
    clock: str
    max_ahead_ns: int | None
    max_jump_ns: int | None
    time_unit: str | None
    user_id: str
    amount: str
    timestamp: str

    @classmethod
    def of(
        cls,
        window: Any = "60s",
        *,
        lateness: Any = None,
        closed: str = "both",
        decimals: int = 4,
        users: int = 10_000_000,
        shards: int | None = None,
        clock: str = "event",
        max_ahead: Any = "10s",
        max_jump: Any = None,
        time_unit: str | None = None,
        user_id: str = "user_id",
        amount: str = "amount",
        timestamp: str = "timestamp",
    ) -> Config:
        """Check the options of `RiskEngine` and turn them into whole numbers.

        Raises:
            ConfigError: An option cannot be used; the text names it, its value and the fix.

        Example:
            >>> Config.of("60s", shards=1).retention_ns
            120000000000
        """
        window_ns = duration_ns(window, "window")
        if window_ns == 0:
            raise ConfigError(f"window={window!r} is empty; give at least '1ns'")
        names = {"user_id": user_id, "amount": amount, "timestamp": timestamp}
        for option, column in names.items():
            if not isinstance(column, str) or not column:
                raise ConfigError(f"{option}={column!r} must be the name of a column")
        if len(set(names.values())) < len(names):
            raise ConfigError(f"user_id, amount and timestamp must be three different columns, found {names}")
        return cls(
            window_ns=window_ns,
            lateness_ns=window_ns if lateness is None else duration_ns(lateness, "lateness"),
            closed=_one_of("closed", closed, ("both", "right")),
            decimals=_whole("decimals", decimals, 0, DECIMALS_MAX),
            users=_whole("users", users, 1, USERS_MAX),
            shards=_cores() if shards is None else _whole("shards", shards, 1, SHARDS_MAX),
            clock=_one_of("clock", clock, ("event", "wall")),
            max_ahead_ns=None if max_ahead is None else duration_ns(max_ahead, "max_ahead"),
            max_jump_ns=None if max_jump is None else duration_ns(max_jump, "max_jump"),
            time_unit=None if time_unit is None else _one_of("time_unit", time_unit, tuple(TIME_UNIT_NS)),
            **names,
        )

    @property
    def reach_ns(self) -> int:
        """A transaction at `e` counts at `t` when `t - reach <= e <= t`: the one place where `closed` matters."""
        return self.window_ns if self.closed == "both" else self.window_ns - 1

    @property
    def retention_ns(self) -> int:
        """A transaction is retained while `e >= clock - retention`: as long as an exact lookup can need it."""
        return self.reach_ns + self.lateness_ns

    @property
    def scale(self) -> int:
        """Units per 1 of the currency."""
        return 10**self.decimals  # type: ignore[no-any-return]


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    return str(value)


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value.__index__() <= most:
        raise ConfigError(f"{name}={value!r} must be a whole number from {least:,} to {most:,}")
    return int(value.__index__())


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, SHARDS_MAX)
