"""Hypothesis strategies: small streams that reach every edge, as plain rows and as Arrow batches of every type.

A `Stream` holds what a test needs: the options of an engine, rows as plain Python values, which is what the reference reads,
and the Arrow types in which the same rows are given to the engine. Few users, few instants around the edges of the window, and
small limits make ties, disorder, late rows, expiry and full engines common instead of rare.
"""

import datetime
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from engine.config import TIME_UNIT_NS, Config

UserRow = tuple[Any, Any, int | None]  # user, amount, time in ns

#: Where event times begin: the epoch, some day, and both ends of what nanoseconds can hold.
BASES_NS = (0, 0, 1_700_000_000 * 10**9, -86_400 * 10**9, -(2**63) + 1, 2**63 - 1)

INT64 = pa.int64()
ID_TYPES = {
    "int64": (pa.int64(), pa.int8(), pa.int32(), pa.uint16(), pa.dictionary(pa.int8(), pa.int64())),
    "uint64": (pa.uint64(),),
    "string": (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())),
    "binary": (pa.binary(), pa.large_binary(), pa.binary(4), pa.dictionary(pa.int16(), pa.binary())),
}
AMOUNT_TYPES = (
    pa.float64(),
    pa.float64(),
    pa.float32(),
    pa.int64(),
    pa.int8(),
    pa.uint64(),
    pa.decimal128(12, 2),
    pa.decimal128(38, 10),
    pa.decimal256(76, 20),
)


@dataclass(frozen=True)
class Stream:
    """Rows and how they are given to an engine.

    Attributes:
        options: Keyword arguments of `RiskEngine` and `Config.of`.
        rows: (user, amount, time_ns); None is a null.
        wall_ns: What the injected wall clock shows.
        id_type, amount_type, time_type: Arrow types of the columns.
        users: The ids that rows are drawn from.
    """

    options: dict[str, Any]
    rows: list[UserRow]
    wall_ns: int
    id_type: pa.DataType
    amount_type: pa.DataType
    time_type: pa.DataType
    users: tuple[Any, ...]

    @property
    def config(self) -> Config:
        return Config.of(**self.options)

    @property
    def single(self) -> bool:
        """Amounts are float32."""
        return self.amount_type == pa.float32()

    def batch(self, rows: Sequence[UserRow]) -> pa.RecordBatch:
        """The rows as one record batch of this stream's types."""
        return to_batch(rows, self.id_type, self.amount_type, self.time_type, self.options.get("time_unit"))


def to_batch(
    rows: Sequence[UserRow],
    id_type: pa.DataType = INT64,
    amount_type: pa.DataType | None = None,
    time_type: pa.DataType | None = None,
    time_unit: str | None = None,
) -> pa.RecordBatch:
    """Turn plain rows into a RecordBatch with the columns user_id, amount and timestamp.

    Args:
        rows: (user, amount, time_ns); times are whole multiples of the time type's unit.
        id_type, amount_type: Types of these columns; float64 amounts by default.
        time_type: A timestamp type (ns by default), or an integer type, whose unit is `time_unit`.
        time_unit: Unit of an integer time type.
    """
    time_type = time_type or pa.timestamp("ns")
    unit_ns = TIME_UNIT_NS[time_type.unit if pa.types.is_timestamp(time_type) else time_unit or "ns"]
    times = [None if time_ns is None else time_ns // unit_ns for _, _, time_ns in rows]
    if pa.types.is_timestamp(time_type):
        time_column = pa.array(times, pa.int64()).cast(time_type)
    else:
        time_column = pa.array(times, time_type)
    users = [user for user, _, _ in rows]
    if pa.types.is_dictionary(id_type):
        id_column = pa.array(users, id_type.value_type).dictionary_encode().cast(id_type)
    else:
        id_column = pa.array(users, id_type)
    amounts = pa.array([amount for _, amount, _ in rows], amount_type or pa.float64(), from_pandas=False)
    return pa.RecordBatch.from_arrays([id_column, amounts, time_column], names=["user_id", "amount", "timestamp"])


def cut(rows: Sequence[UserRow], lengths: Sequence[int]) -> Iterator[Sequence[UserRow]]:
    """Cut rows into pieces of these lengths, over and over, until none are left. At least one length is not 0."""
    position, turn = 0, 0
    while position < len(rows):
        length = lengths[turn % len(lengths)]
        yield rows[position : position + length]
        position, turn = position + length, turn + 1


def to_float32(value: float) -> float:
    """The float32 nearest to a float64 (infinite beyond its range)."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def instant(time_ns: int) -> pa.Scalar:
    """An instant as every lookup takes it, exact to the nanosecond."""
    return pa.scalar(time_ns, pa.timestamp("ns", "UTC"))


def as_datetime(time_ns: int) -> datetime.datetime:
    """A whole number of microseconds as a datetime."""
    assert time_ns % 1000 == 0
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=time_ns // 1000)


# ------------------------------------------------------------------------------------------------------- options


def shard_counts() -> st.SearchStrategy[int]:
    return st.sampled_from((1, 2, 3, 7))


def splits() -> st.SearchStrategy[list[int]]:
    """Lengths of the batches that a stream is cut into, empty ones among them."""
    return st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@st.composite
def options(draw: st.DrawFn, unit: str = "ns") -> dict[str, Any]:
    """Keyword arguments of an engine; its window is a few of the given unit, so that its edges are met by chance."""
    length = draw(st.sampled_from((1, 2, 5, 10, 60)))
    lateness = draw(st.sampled_from((None, None, 0, 1, length, 3 * length + 1)))
    jump = draw(st.sampled_from((None, None, None, 2 * length, 100)))
    ahead = draw(st.sampled_from((None, None, 0, 3 * length)))
    return {
        "window": f"{length}{unit}",
        "lateness": None if lateness is None else f"{lateness}{unit}",
        "closed": draw(st.sampled_from(("both", "right"))),
        "decimals": draw(st.sampled_from((0, 1, 2, 4, 8))),
        "users": draw(st.sampled_from((1, 2, 3, 5, 8, 1000, 1000, 1000))),
        "shards": draw(shard_counts()),
        "max_jump": None if jump is None else f"{jump}{unit}",
        "max_ahead": None if ahead is None else f"{ahead}{unit}",
    }


# ----------------------------------------------------------------------------------------------------------- ids


def ids(kind: str, id_type: pa.DataType) -> st.SearchStrategy[Any]:
    """Ids of one kind that its Arrow type can hold, extremes among them."""
    if kind in ("int64", "uint64"):
        value_type = id_type.value_type if pa.types.is_dictionary(id_type) else id_type
        bits = value_type.bit_width
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(value_type) else (0, 2**bits - 1)
        return st.sampled_from((low, low + 1, 0, 1, high - 1, high)) | st.integers(low, high)
    if kind == "string":
        long = st.sampled_from(("x" * 7, "x" * 8, "x" * 9, "x" * 300, "user-" + "0" * 60, "user-" + "0" * 59 + "1", "\0", "a\0"))
        return st.text(max_size=5) | long | st.text("né\U0001f600", min_size=1, max_size=12)
    if pa.types.is_fixed_size_binary(id_type):
        return st.binary(min_size=4, max_size=4)
    return st.binary(max_size=4) | st.binary(min_size=7, max_size=40)


@st.composite
def id_columns(draw: st.DrawFn) -> tuple[pa.DataType, tuple[Any, ...]]:
    """An Arrow type of ids, and one to ten different ids."""
    kind = draw(st.sampled_from(("int64", "int64", "string", "string", "uint64", "binary")))
    id_type = draw(st.sampled_from(ID_TYPES[kind]))
    return id_type, tuple(draw(st.lists(ids(kind, id_type), min_size=1, max_size=10, unique=True)))


# ------------------------------------------------------------------------------------------------------- amounts


def amounts(amount_type: pa.DataType, decimals: int) -> st.SearchStrategy[Any]:
    """Amounts that an Arrow type can hold: everyday ones, ties of rounding, and the ends of the range."""
    if pa.types.is_floating(amount_type):
        edge = 2**53 / 10**decimals
        special = (0.0, -0.0, 5e-324, 1e-310, 0.1, 0.5, 2.5, -0.03125, 0.09375, edge, -edge, edge * 2, 1e300, float("nan"), float("inf"))
        everyday = st.integers(-10_000, 100_000).map(lambda cents: cents / 100)
        floats = everyday | everyday | st.sampled_from(special) | st.floats(-1e9, 1e9) | st.floats()
        return floats.map(to_float32) if amount_type == pa.float32() else floats
    if pa.types.is_integer(amount_type):
        bits = amount_type.bit_width
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(amount_type) else (0, 2**bits - 1)
        edge = 2**53 // 10**decimals
        extremes = [value for value in (low, high, edge, -edge, edge + 1, -edge - 1) if low <= value <= high]
        return st.integers(max(low, -100), 100) | st.sampled_from(extremes) | st.integers(low, high)
    scale, precision = amount_type.scale, amount_type.precision
    whole = min(10**precision - 1, 2**53 * 10**scale // 10**decimals)  # the greatest amount, in the type's own units
    tie = 5 * 10 ** max(0, scale - decimals - 1)
    extremes = [0, tie, -tie, 3 * tie, 5 * tie, tie + 1, whole, -whole, whole + tie, 10**precision - 1]
    numbers = st.integers(-(10**4), 10**6) | st.sampled_from([value for value in extremes if abs(value) < 10**precision])
    return numbers.map(lambda value: Decimal((int(value < 0), tuple(map(int, str(abs(value)))), -scale)))


# ---------------------------------------------------------------------------------------------------------- rows


@st.composite
def rows(draw: st.DrawFn, stream: Stream, row_count_max: int = 40) -> list[UserRow]:
    """Rows for a stream: times walk forward in small steps and step back around the edges of window, lateness and retention."""
    config = stream.config
    is_timestamp = pa.types.is_timestamp(stream.time_type)
    unit_ns = TIME_UNIT_NS[stream.time_type.unit if is_timestamp else stream.options["time_unit"]]
    amount = amounts(stream.amount_type, config.decimals)
    now = stream.wall_ns // unit_ns
    low, high = -(2**63), 2**63 - 1
    if not is_timestamp and stream.time_type.bit_width < 64:
        low, high = -(2 ** (stream.time_type.bit_width - 1)), 2 ** (stream.time_type.bit_width - 1) - 1
    spans = [0, 0, config.window_ns // unit_ns, config.lateness_ns // unit_ns, config.retention_ns // unit_ns]
    nulls = st.sampled_from((False,) * 30 + (True,))
    result: list[UserRow] = []
    for _ in range(draw(st.integers(0, row_count_max))):
        kind = draw(st.sampled_from(("step", "step", "step", "tie", "edge", "edge", "leap", "wild")))
        time = now
        if kind == "step":
            time = now = now + draw(st.integers(0, 3))
        elif kind == "edge":
            time = now + draw(st.sampled_from((-1, -1, -1, 1))) * draw(st.sampled_from(spans)) + draw(st.integers(-1, 1))
            now = max(now, time)
        elif kind == "leap":
            time = now = now + draw(st.sampled_from(spans)) + draw(st.integers(0, 100))
        elif kind == "wild":
            time = draw(st.sampled_from((low, low + 1, high - 1, high)) | st.integers(low, high))
        time = min(max(time, low), high)
        now = min(max(now, low), high)
        if time * unit_ns == -(2**63) and is_timestamp:
            time += 1  # the lowest int64 is not an instant in every Arrow library
        user = None if draw(nulls) else draw(st.sampled_from(stream.users))
        row = (user, None if draw(nulls) else draw(amount), None if draw(nulls) else time * unit_ns)
        # 513 times one amount of 2**53 units is more than a sum may be.
        repeats = draw(st.sampled_from((1,) * 60 + (2, 5, 20, 513)))
        result.extend([row] * repeats)
    return result


@st.composite
def streams(draw: st.DrawFn, row_count_max: int = 40) -> Stream:
    """An engine's options, the types of its columns, and rows for it."""
    unit = draw(st.sampled_from(("ns", "ns", "ns", "us", "ms", "s")))
    its_options = draw(options(unit))
    time_type = draw(st.sampled_from((pa.timestamp(unit), pa.timestamp(unit, "UTC"), pa.timestamp(unit, "+05:30"), pa.int64())))
    if not pa.types.is_timestamp(time_type):
        its_options["time_unit"] = unit
    id_type, users = draw(id_columns())
    base_ns = draw(st.sampled_from(BASES_NS)) // TIME_UNIT_NS[unit] * TIME_UNIT_NS[unit]
    amount_type = draw(st.sampled_from(AMOUNT_TYPES))
    empty = Stream(its_options, [], base_ns, id_type, amount_type, time_type, users)
    return Stream(its_options, draw(rows(empty, row_count_max)), base_ns, id_type, amount_type, time_type, users)
