"""Seeded streams of transactions that look like real ones.

What it is: a source of test and demonstration data whose every row is a pure function of the options, the seed and the
row's number. Rows are made in blocks of a fixed size, each from a random generator of its own, and the stream is cut
into batches afterwards; so it does not depend on `batch_rows`, and a shorter stream is the beginning of a longer one.
(NumPy may change how its distributions use random bits; the same rows need the same NumPy.)

What it is not: a model of anybody's customers. Users are drawn independently, amounts too.

Time: rows arrive as a Poisson process of `rate` rows per second of event time; the file is in order of arrival, and a
row's event time is its arrival minus its delay. Skewed users follow Zipf's law exactly, by rejection-inversion
(W. Hoermann and G. Derflinger, "Rejection-inversion to generate variates from monotone discrete distributions",
ACM TOMACS 6(3), 1996): a draw costs a few powers and no memory, whatever the number of users.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.config import TIME_NS_MAX, TIME_NS_MIN, duration_ns
from engine.errors import ConfigError
from engine.outputs import FileWriter

#: Rows that share a random generator. Part of the definition of a stream: another size gives other rows.
BLOCK_ROWS: Final = 65536

#: Beyond this a batch of 36-byte ids no longer fits the 32-bit offsets of an Arrow string column.
BATCH_ROWS_MAX: Final = 2**24

#: A burst is this many rows of one user on average (Poisson), spread over at most this long.
BURST_ROWS_MEAN: Final = 8
BURST_US: Final = 5_000_000

#: Amounts: median 30, mean 62, one in a thousand above 1200; whole cents, at least one.
AMOUNT_LOG_MEAN: Final = math.log(30.0)
AMOUNT_LOG_SIGMA: Final = 1.2

#: What a bad row has wrong with it, in equal shares; named after the reason it is rejected for.
BAD_KINDS: Final = (
    "null_user",
    "null_amount",
    "null_timestamp",
    "amount_not_finite",
    "amount_out_of_range",
    "timestamp_out_of_range",
    "future",
    "late",
)

#: A future row lies in the year 2200: ahead of any wall clock, so that a replayed file still shows it as such.
FUTURE_US: Final = 7_258_118_400_000_000
#: The "never" of many databases, 9999-12-31 23:59:59, which nanoseconds since 1970 cannot hold.
NEVER_US: Final = 253_402_300_799_000_000
#: A late row is this much older than its neighbours.
LATE_US: Final = (3_600_000_000, 86_400_000_000)

ID_KINDS: Final = ("int", "uuid", "name")


def transactions(
    rows: int,
    *,
    users: int = 1_000_000,
    rate: float = 100_000.0,
    skew: float = 0.0,
    bursts: float = 0.0,
    disorder: Any = "0s",
    ties: float = 0.0,
    bad: float = 0.0,
    ids: str = "int",
    start: Any = "2025-01-01",
    seed: int = 0,
    batch_rows: int = BLOCK_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Make a stream of transactions.

    Args:
        rows: Length of the stream.
        users: Users drawn from. User number 0 is the most frequent one when there is skew.
        rate: Rows per second of event time.
        skew: Exponent of Zipf's law; 0 draws all users alike.
        bursts: Share of rows that belong to a burst: one user, some eight rows, within five seconds.
        disorder: Duration; standard deviation of the normal distribution whose magnitude is a row's delay.
        ties: Share of rows that get the event time of the row before.
        bad: Share of rows with one thing wrong, see `BAD_KINDS`.
        ids: "int" (int64 that look random), "uuid" (36 characters) or "name" ("user-17").
        start: Where arrivals begin: ISO string, `datetime` or `numpy.datetime64`; UTC if it names no zone.
        seed: A whole number from 0; other seeds give other rows of the same users.
        batch_rows: Rows of each batch but the last. Changes no row.

    Returns:
        Batches of `user_id` (int64 or string), `amount` (float64 with two decimals) and `timestamp`
        (timestamp[us, UTC]). 0.1 us per row, 0.3 us with every option in use; memory of a few batches.

    Raises:
        ConfigError: An option cannot be used; raised by the call, before the first batch.

    Example:
        >>> batch = next(transactions(3, users=10, ids="name"))
        >>> batch.num_rows, batch.schema.names
        (3, ['user_id', 'amount', 'timestamp'])
    """
    stream = _Stream(
        users=_whole("users", users, 1, 2**62),
        rate=_number("rate", rate, 1e-6, 1e12),
        skew=_number("skew", skew, 0.0, 10.0),
        bursts=_number("bursts", bursts, 0.0, 1.0),
        disorder_us=duration_ns(disorder, "disorder") / 1000,
        ties=_number("ties", ties, 0.0, 1.0),
        bad=_number("bad", bad, 0.0, 1.0),
        ids=ids,
        start_us=_instant_us(start),
        seed=_whole("seed", seed, 0, 2**128),
    )
    rows = _whole("rows", rows, 0, 2**62)
    if ids not in ID_KINDS:
        raise ConfigError(f"ids={ids!r} must be one of {', '.join(map(repr, ID_KINDS))}")
    ends_ns = stream.start_us * 1000 + rows / stream.rate * 1e9
    if ends_ns > TIME_NS_MAX:
        raise ConfigError(f"rows={rows:,} at rate={rate:,} end after the year 2262; give fewer rows or a higher rate")
    return _cut(stream, rows, _whole("batch_rows", batch_rows, 1, BATCH_ROWS_MAX))


def write(path: str | os.PathLike[str], rows: int, **options: Any) -> int:
    """Write the stream `transactions(rows, **options)` to one file and return its size in bytes.

    Args:
        path: The suffix names the format, see `FileWriter`.
        rows, options: As in `transactions`.

    Raises:
        ConfigError: An option or the suffix cannot be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/small.csv", 100, users=5) > 1000
        True
    """
    batches = transactions(rows, **options)
    with FileWriter(path, schema(options.get("ids", "int"))) as writer:
        for batch in batches:
            writer.write(batch)
    return os.stat(path).st_size


def schema(ids: str) -> Any:
    """The Arrow schema of a stream with these ids."""
    id_type = pa.int64() if ids == "int" else pa.string()
    return pa.schema([("user_id", id_type), ("amount", pa.float64()), ("timestamp", pa.timestamp("us", "UTC"))])


class _Stream:
    """The rows of one stream, a block at a time."""

    def __init__(
        self,
        *,
        users: int,
        rate: float,
        skew: float,
        bursts: float,
        disorder_us: float,
        ties: float,
        bad: float,
        ids: str,
        start_us: int,
        seed: int,
    ) -> None:
        self.users, self.rate, self.skew, self.bursts = users, rate, skew, bursts
        self.disorder_us, self.ties, self.bad, self.ids = disorder_us, ties, bad, ids
        self.start_us, self.seed = start_us, seed

    def block(self, number: int) -> pa.RecordBatch:
        """Block `number`: a pure function of the options, the seed and the number."""
        random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,)))
        user, time_us = self._arrivals(random, number)
        cents = np.rint(np.exp(random.normal(AMOUNT_LOG_MEAN, AMOUNT_LOG_SIGMA, BLOCK_ROWS)) * 100.0)
        amount = np.maximum(cents, 1.0) / 100.0  # cents / 100 is the float nearest to the decimal: nothing is rounded by the engine
        if self.disorder_us:
            time_us -= np.rint(np.abs(random.normal(0.0, self.disorder_us, BLOCK_ROWS))).astype(np.int64)
        if self.ties:
            row = np.arange(BLOCK_ROWS)
            row[1:][random.random(BLOCK_ROWS - 1) < self.ties] = 0
            time_us = time_us[np.maximum.accumulate(row)]
        if self.bad:
            return self._batch(user, amount, time_us, self._spoil(random, amount, time_us))
        return self._batch(user, amount, time_us, None)

    def _arrivals(self, random: np.random.Generator, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Users and arrival times of a block.

        A block spans BLOCK_ROWS / rate seconds exactly. Given their number, the arrivals of a Poisson process are
        uniform, and normalised sums of exponential gaps are uniform draws in order, without a sort.
        """
        span_us = BLOCK_ROWS / self.rate * 1e6
        burst_rows = round(self.bursts * BLOCK_ROWS)
        plain_rows = BLOCK_ROWS - burst_rows
        reached = np.cumsum(random.standard_exponential(plain_rows + 1))
        offset_us = reached[:-1] * (span_us / reached[-1])
        user = self._draw_users(random, plain_rows)
        if burst_rows:
            bursts = max(1, burst_rows // BURST_ROWS_MEAN)
            length_us = min(BURST_US, span_us)
            burst = random.integers(0, bursts, burst_rows)
            begins_us = random.random(bursts) * (span_us - length_us)
            offset_us = np.concatenate((offset_us, begins_us[burst] + random.random(burst_rows) * length_us))
            user = np.concatenate((user, random.integers(0, self.users, bursts)[burst]))
            order = np.argsort(offset_us, kind="stable")
            offset_us, user = offset_us[order], user[order]
        return user, offset_us.astype(np.int64) + (self.start_us + int(number * span_us))

    def _draw_users(self, random: np.random.Generator, rows: int) -> NDArray[np.int64]:
        if self.skew == 0.0:
            return random.integers(0, self.users, rows)
        return zipf(random, self.skew, self.users, rows) - 1

    def _spoil(self, random: np.random.Generator, amount: NDArray[np.float64], time_us: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Put one thing wrong into a share of the rows; returns which users, amounts and times are null, (3, rows)."""
        row = np.flatnonzero(random.random(BLOCK_ROWS) < self.bad)
        kind = random.integers(0, len(BAD_KINDS), row.size)
        wrong = {name: row[kind == place] for place, name in enumerate(BAD_KINDS)}
        unfinite = wrong["amount_not_finite"]
        amount[unfinite] = random.choice([np.nan, np.inf, -np.inf], unfinite.size)
        amount[wrong["amount_out_of_range"]] = 1e18
        time_us[wrong["timestamp_out_of_range"]] = NEVER_US
        future = wrong["future"]
        time_us[future] = FUTURE_US + random.integers(0, 366 * 86_400, future.size) * 1_000_000
        late = wrong["late"]
        time_us[late] -= random.integers(*LATE_US, late.size)
        nulls = np.zeros((3, BLOCK_ROWS), np.bool_)
        for column, name in enumerate(("null_user", "null_amount", "null_timestamp")):
            nulls[column, wrong[name]] = True
        return nulls

    def _batch(
        self, user: NDArray[np.int64], amount: NDArray[np.float64], time_us: NDArray[np.int64], nulls: NDArray[np.bool_] | None
    ) -> pa.RecordBatch:
        null_user, null_amount, null_time = (None, None, None) if nulls is None else nulls
        columns = schema(self.ids)
        if self.ids == "int":
            user_id = pa.array(mix(user).view(np.int64), mask=null_user)
        else:
            user_id = _uuids(user) if self.ids == "uuid" else pc.binary_join_element_wise("user-", pa.array(user).cast(pa.string()), "")
            if null_user is not None:
                user_id = pc.if_else(pa.array(null_user), pa.scalar(None, pa.string()), user_id)
        times = pa.array(time_us, mask=null_time).cast(columns.field("timestamp").type)
        return pa.RecordBatch.from_arrays([user_id, pa.array(amount, mask=null_amount), times], schema=columns)


def _cut(stream: _Stream, rows: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Blocks of BLOCK_ROWS in, batches of `batch_rows` out."""
    pieces: list[pa.RecordBatch] = []
    missing = min(batch_rows, rows)
    for number in range(-(-rows // BLOCK_ROWS)):
        block = stream.block(number)[: rows - number * BLOCK_ROWS]
        while len(block):
            pieces.append(block[:missing])
            missing -= len(pieces[-1])
            block = block[len(pieces[-1]) :]
            if not missing:
                yield pieces[0] if len(pieces) == 1 else pa.Table.from_batches(pieces).combine_chunks().to_batches()[0]
                pieces, missing = [], batch_rows
    if pieces:
        yield pa.Table.from_batches(pieces).combine_chunks().to_batches()[0]


def mix(number: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Turn user numbers into ids that look random: the SplitMix64 finaliser, a bijection of 64-bit words.

    Example:
        >>> [f"{word:016x}" for word in mix(np.arange(2))]
        ['e220a8397b1dcdaf', '6e789e6aa1b965f4']
    """
    word = (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word ^= word >> np.uint64(shift)
        word *= np.uint64(factor)
    return word ^ (word >> np.uint64(31))


_HEX: Final = np.frombuffer(bytes(range(256)).hex().encode(), np.uint8).reshape(256, 2)
#: Where the 32 hexadecimal digits of a UUID stand between its hyphens.
_UUID_PLACES: Final = np.array([place for place in range(36) if place not in (8, 13, 18, 23)])


def _uuids(number: NDArray[np.int64]) -> Any:
    """Version 4 UUIDs in their usual spelling. 122 bits: two of 4e8 users share one with a probability of 1e-20."""
    words = np.empty((number.size, 2), ">u8")
    words[:, 0] = mix(number)
    words[:, 1] = mix(number + 2**62)  # beyond every user number
    octets = words.view(np.uint8).reshape(-1, 16)
    octets[:, 6] = octets[:, 6] & 0x0F | 0x40
    octets[:, 8] = octets[:, 8] & 0x3F | 0x80
    text = np.full((number.size, 36), ord("-"), np.uint8)
    text[:, _UUID_PLACES] = _HEX[octets].reshape(-1, 32)
    offsets = np.arange(0, 36 * number.size + 1, 36, dtype=np.int32)
    return pa.StringArray.from_buffers(number.size, pa.py_buffer(offsets), pa.py_buffer(text))


def zipf(random: np.random.Generator, exponent: float, most: int, rows: int) -> NDArray[np.int64]:
    """Draw ranks 1..most with probability proportional to rank**-exponent.

    Rejection-inversion: invert the integral of x**-exponent, which lies above the probabilities, round to the nearest
    rank, and keep the draw if it falls under the rank's own probability. At least 7 draws in 10 are kept at any
    exponent up to 10, so a few rounds fill the array.

    Args:
        random: Source of randomness; how much of it is used depends on the draws.
        exponent: Greater than 0.
        most: Greatest rank.
        rows: Length of the result.

    Example:
        >>> zipf(np.random.default_rng(0), 1.0, 3, 4).max() <= 3
        np.True_
    """
    steep = 1.0 - exponent

    def integral(x: Any) -> Any:  # of t**-exponent from 1 to x; expm1 and log1p keep it exact where exponent is near 1
        return np.log(x) if steep == 0.0 else np.expm1(steep * np.log(x)) / steep

    def inverse(area: Any) -> Any:
        return np.exp(area) if steep == 0.0 else np.exp(np.log1p(steep * area) / steep)

    lowest, highest = float(integral(1.5)) - 1.0, float(integral(most + 0.5))
    ranks = np.empty(rows, np.int64)
    open_rows = np.arange(rows)
    while open_rows.size:
        area = lowest + random.random(open_rows.size) * (highest - lowest)
        rank = np.clip(np.rint(inverse(area)), 1, most)
        kept = area >= integral(rank + 0.5) - rank**-exponent
        ranks[open_rows[kept]] = rank[kept].astype(np.int64)
        open_rows = open_rows[~kept]
    return ranks


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value.__index__() <= most:
        raise ConfigError(f"{name}={value!r} must be a whole number from {least:,} to {most:,}")
    return int(value.__index__())


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or not least <= float(value) <= most:
        raise ConfigError(f"{name}={value!r} must be a number from {least:g} to {most:g}")
    return float(value)


def _instant_us(start: Any) -> int:
    """Microseconds since the epoch of an ISO string, `datetime` or `numpy.datetime64`."""
    try:
        if isinstance(start, np.datetime64):
            start_us = int(start.astype("datetime64[us]").astype(np.int64))
        else:
            moment = start if isinstance(start, datetime.datetime) else datetime.datetime.fromisoformat(start)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
            start_us = (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"start={start!r} is not an instant; give one such as '2025-01-31T12:00:00Z'") from error
    if not TIME_NS_MIN <= start_us * 1000 <= TIME_NS_MAX:
        raise ConfigError(f"start={start!r} must lie between the years 1678 and 2262")
    return start_us
