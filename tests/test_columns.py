"""`engine.columns`: every source and type gives the same exact columns, and bad input is named, not guessed at."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import math
import os
import sys
import threading
from fractions import Fraction
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import columns as module
from engine.columns import PIECE_ROWS, Ids, columns_of, ids_of, ids_to_arrow, read
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.errors import SchemaError

CONFIG = Config.of(shards=1)
IN_SECONDS = Config.of(shards=1, time_unit="s")
VIEWS = int(pa.__version__.split(".")[0]) >= 20  # older pyarrow knows views but cannot convert them
UTC = datetime.UTC


def user_of(ids: Ids) -> list:
    return ids_to_arrow(ids).to_pylist()


def rows_of(data, config=CONFIG):
    """(user, time_ns, units, reason, rounded) of all rows of a source."""
    rows = []
    for unit in read(data, config):
        for batch in unit:
            assert batch.num_rows <= PIECE_ROWS
            rows += rows_of_batch(batch, config)
    return rows


def rows_of_batch(batch, config=CONFIG):
    found = columns_of(batch, config)
    n = batch.num_rows
    assert len(found) == len(found.ids) == n
    assert found.batch is batch
    for array, dtype in ((found.time_ns, "i8"), (found.amount_units, "i8"), (found.reasons, "u1"), (found.rounded, "u1")):
        assert array.dtype == dtype
        assert array.shape == (n,)
        assert array.flags.c_contiguous
        assert array.flags.writeable
    for array, dtype in ((found.ids.values, "i8"), (found.ids.offsets, "i8"), (found.ids.data, "u1")):
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert not array.flags.writeable
    refused = found.reasons != 0
    assert not found.time_ns[refused].any()
    assert not found.amount_units[refused].any()
    assert not found.rounded[refused].any()
    reasons = [REASONS[code - 1] if code else None for code in found.reasons.tolist()]
    return list(zip(user_of(found.ids), found.time_ns.tolist(), found.amount_units.tolist(), reasons, found.rounded.tolist(), strict=True))


def batch_of(users=None, amounts=None, times=None):
    """A batch of the given columns; what is not given is harmless."""
    n = len(next(column for column in (users, amounts, times) if column is not None))
    users = pa.array(range(n), pa.int64()) if users is None else users
    amounts = pa.array([1] * n, pa.int64()) if amounts is None else amounts
    times = pa.array([0] * n, pa.timestamp("s")) if times is None else times
    return pa.RecordBatch.from_arrays([users, amounts, times], ["user_id", "amount", "timestamp"])


def amounts_of(array, decimals=4):
    """(units, reason, rounded) of an array of amounts."""
    found = rows_of_batch(batch_of(amounts=array), Config.of(shards=1, decimals=decimals))
    return [(units, reason, rounded) for _, _, units, reason, rounded in found]


def times_of(array, config=CONFIG):
    """(time_ns, reason) of an array of times."""
    return [(time, reason) for _, time, _, reason, _ in rows_of_batch(batch_of(times=array), config)]


def text_batch(amounts=None, times=None):
    """A batch as `read` makes it of a text file."""
    n = len(amounts if amounts is not None else times)
    amounts = ["1"] * n if amounts is None else amounts
    times = ["1970-01-01"] * n if times is None else times
    mark = {b"riskring": b"text"}
    schema = pa.schema(
        [
            pa.field("user_id", pa.int64()),
            pa.field("amount", pa.string(), metadata=mark),
            pa.field("timestamp", pa.string(), metadata=mark),
        ]
    )
    arrays = [pa.array(range(n), pa.int64()), pa.array(amounts, pa.string()), pa.array(times, pa.string())]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


# --------------------------------------------------------------------------------------------------
# What is expected, in plain Python


def expected_amount(exact: Fraction, decimals: int):
    units = round(exact * 10**decimals)  # half-even
    return (0, "amount_out_of_range") if abs(units) > 2**53 else (units, None)


def nearest(exact: Fraction, dtype) -> float:
    """The float of a width nearest to a fraction, ties to even, by trying the neighbours."""
    with np.errstate(all="ignore"):
        start = dtype(float(exact))
        tries = [start, np.nextafter(start, dtype(-math.inf)), np.nextafter(start, dtype(math.inf))]
    bits = {np.float16: np.uint16, np.float32: np.uint32, np.float64: np.uint64}[dtype]
    tries = [value for value in tries if np.isfinite(value)]
    return float(min(tries, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(bits)) & 1)))


def expected_float(value, decimals: int, dtype=np.float64):
    if not math.isfinite(value):
        return 0, "amount_not_finite", 0
    units, reason = expected_amount(Fraction(float(value)), decimals)
    if reason:
        return 0, reason, 0
    return units, None, int(nearest(Fraction(units, 10**decimals), dtype) != float(value))


def expected_decimal(value: decimal.Decimal, decimals: int):
    units, reason = expected_amount(Fraction(value), decimals)
    rounded = int(reason is None and Fraction(units, 10**decimals) != Fraction(value))
    with decimal.localcontext(prec=200):
        quantized = value.quantize(decimal.Decimal(1).scaleb(-decimals), rounding=decimal.ROUND_HALF_EVEN)
        assert reason or int(quantized.scaleb(decimals)) == units
    return units, reason, rounded


# --------------------------------------------------------------------------------------------------
# Amounts: floats

FLOATS = [
    *(0.0, -0.0, 0.1, 0.12345, 0.00005, 0.00015, 0.00025, -0.00005, 0.5, 1.5, 2.5, 1e-300, 5e-324, -5e-324, 1e300, 1.7976931348623157e308),
    *(math.nan, math.inf, -math.inf, 2.0**53, 2.0**53 + 2, -(2.0**53), 2.0**52 + 0.5, 2.0**51 + 0.25, 2.0**53 / 10**4, 900719925474.0992),
    *(
        9007199254740993.0,
        9007199254740994.0,
        90071992.54740992,
        90071992.54740993,
        1e11 + 0.00005,
        0.49999999999999994,
        4503599627370497.5,
    ),
]


def with_neighbours(values):
    return [near for value in values for near in (math.nextafter(value, -math.inf), value, math.nextafter(value, math.inf))]


@pytest.mark.parametrize("decimals", range(9))
def test_float64_known(decimals):
    values = with_neighbours(FLOATS)
    assert amounts_of(pa.array(values, pa.float64()), decimals) == [expected_float(value, decimals) for value in values]


@st.composite
def float_amounts(draw):
    """Floats where rounding is decided: next to grid values and to halves between them, at every size."""
    decimals = draw(st.integers(0, 8))
    grid = st.integers(-(2**54), 2**54)
    small = st.integers(-(10**6), 10**6)
    halves = st.builds(lambda units: float(Fraction(2 * units + 1, 2 * 10**decimals)), grid | small)
    whole = st.builds(lambda units: units / 10**decimals, grid | small)
    edge = st.builds(lambda step: (2**53 + step / 4) / 10**decimals, st.integers(-8, 8))
    value = st.floats() | halves | whole | edge
    near = st.builds(lambda base, step: math.nextafter(base, math.copysign(math.inf, step)) if step else base, value, st.integers(-1, 1))
    return decimals, draw(st.lists(near, min_size=1, max_size=50))


@given(float_amounts())
@settings(max_examples=300, deadline=None)
def test_float64_is_rounded_by_its_exact_value(case):
    decimals, values = case
    assert amounts_of(pa.array(values, pa.float64()), decimals) == [expected_float(value, decimals) for value in values]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(float_amounts())
@settings(max_examples=150, deadline=None)
def test_narrow_floats_are_rounded_by_their_exact_value(dtype, case):
    decimals, values = case
    with np.errstate(all="ignore"):
        narrow = np.array(values).astype(dtype)
    found = amounts_of(pa.array(narrow), decimals)
    assert found == [expected_float(value, decimals, dtype) for value in narrow]


def test_every_finite_float16():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)][::7]
    for decimals in (0, 4, 8):
        assert amounts_of(pa.array(values), decimals) == [expected_float(value, decimals, np.float16) for value in values]


@pytest.mark.parametrize("decimals", range(9))
def test_float32_next_to_half_way_points(decimals):
    # Grid values as close as they come to the middle between two float32: where rounding twice could go wrong.
    generator = np.random.default_rng(decimals)
    middles = (generator.integers(2**23, 2**24, 3000) * 2 + 1).astype(np.float64) * 2.0 ** generator.integers(-30, 29, 3000)
    units = np.rint(middles * 10.0**decimals)
    near = (units[np.abs(units) <= 2.0**53] / 10**decimals).astype(np.float32)
    values = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    assert amounts_of(pa.array(values), decimals) == [expected_float(value, decimals, np.float32) for value in values]


def test_rows_on_the_grid_and_off_it_do_not_influence_each_other():
    generator = np.random.default_rng(2)
    values = np.round(generator.lognormal(3, 2, 20000), 2)
    off = generator.random(20000) < 0.01
    values[off] = generator.lognormal(3, 12, off.sum())
    values[::997] = np.nan
    assert amounts_of(pa.array(values)) == [expected_float(value, 4) for value in values.tolist()]


def test_no_numpy_warnings(recwarn):
    array = pa.array(with_neighbours(FLOATS), pa.float64())
    amounts_of(array)
    with np.errstate(all="ignore"):
        narrow = np.array(FLOATS).astype(np.float32)
    amounts_of(pa.array(narrow))
    times_of(pa.array([2**63 - 1, -(2**63)], pa.timestamp("s")))
    assert not recwarn.list


# --------------------------------------------------------------------------------------------------
# Amounts: integers and decimals

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize("decimals", [0, 4, 8])
def test_integer_amounts(kind, decimals):
    limits = np.iinfo(kind.to_pandas_dtype())
    limit = 2**53 // 10**decimals
    tries = {0, 1, 7, -1, limit, limit + 1, -limit, -limit - 1, int(limits.min), int(limits.max)}
    values = sorted(value for value in tries if limits.min <= value <= limits.max)
    expected = [(*expected_amount(Fraction(value), decimals), 0) for value in values]
    assert amounts_of(pa.array(values, kind), decimals) == expected
    assert [amounts_of(pa.array([value], kind), decimals)[0] for value in values] == expected


def decimal_kinds():
    kinds = [(pa.decimal128, 38), (pa.decimal256, 76)]
    if hasattr(pa, "decimal32"):
        kinds += [(pa.decimal32, 9), (pa.decimal64, 18)]
    return kinds


def decimal_array(digits, kind):
    """Unscaled integers as a decimal array; `pyarrow.array` refuses negative scales."""
    size = kind.bit_width // 8
    data = b"".join(value.to_bytes(size, "little", signed=True) for value in digits)
    return pa.Array.from_buffers(kind, len(digits), [None, pa.py_buffer(data)])


@st.composite
def decimal_amounts(draw):
    decimals = draw(st.integers(0, 8))
    make, most = draw(st.sampled_from(decimal_kinds()))
    precision = draw(st.integers(1, most))
    scale = draw(st.integers(-4, precision))
    top = 10**precision - 1
    any_digits = st.integers(-top, top) | st.integers(-1000, 1000)
    # Next to the halves between two units, where there are any.
    step = 10 ** max(scale - decimals, 0)
    halves = st.builds(lambda units, off: (2 * units + 1) * step // 2 + off, st.integers(-(2**54), 2**54), st.integers(-1, 1))
    edge = st.builds(lambda off: (2**53) * step + step // 2 + off, st.integers(-1, 1))
    digits = draw(st.lists(any_digits | halves | edge, max_size=20))
    return decimals, make(precision, scale), [value for value in digits if abs(value) <= top]


@given(decimal_amounts())
@example((4, pa.decimal128(38, 38), [10**38 - 1, -(10**38) + 1, 5 * 10**33, 15 * 10**33, 5 * 10**33 + 1]))
@example((0, pa.decimal256(76, 0), [2**53, 2**53 + 1, -(2**53), 10**76 - 1, 2**64, 2**63, -(2**63), -(2**63) - 1]))
@example((0, pa.decimal128(38, 19), [5 * 10**18, 5 * 10**18 + 1, -5 * 10**18 - 1, 15 * 10**18, 25 * 10**18, -(2**63)]))
@settings(max_examples=300, deadline=None)
def test_decimals_are_rounded_half_even_by_their_digits(case):
    decimals, kind, digits = case
    with decimal.localcontext(prec=200):
        values = [decimal.Decimal(value).scaleb(-kind.scale) for value in digits]
        expected = [expected_decimal(value, decimals) for value in values]
    assert amounts_of(decimal_array(digits, kind), decimals) == expected
    assert amounts_of(decimal_array([7, *digits, 7], kind)[1:-1], decimals) == expected


def test_negative_scale():
    array = decimal_array([120, 9_007_199_254_740, 9_007_199_254_741, 0], pa.decimal128(13, -3))
    assert amounts_of(array, 0) == [(120000, None, 0), (9_007_199_254_740_000, None, 0), (0, "amount_out_of_range", 0), (0, None, 0)]
    assert amounts_of(array, 4) == [(1_200_000_000, None, 0), *[(0, "amount_out_of_range", 0)] * 2, (0, None, 0)]
    array = decimal_array([1, 0, -1], pa.decimal128(3, -30))
    assert amounts_of(array) == [(0, "amount_out_of_range", 0), (0, None, 0), (0, "amount_out_of_range", 0)]


# --------------------------------------------------------------------------------------------------
# Times

UNIT_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def expected_time(value: int, factor: int):
    time = value * factor
    return (time, None) if TIME_NS_MIN <= time <= TIME_NS_MAX else (0, "timestamp_out_of_range")


@pytest.mark.parametrize("unit", UNIT_NS)
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_timestamps_keep_every_nanosecond(unit, zone):
    limit = TIME_NS_MAX // UNIT_NS[unit]
    values = [0, 1, -1, limit, -limit, limit - 1, 2**63 - 1, -(2**63), 1_700_000_000]
    values += [limit + 1, -limit - 1] if unit != "ns" else []
    array = pa.array(values, pa.int64()).cast(pa.timestamp(unit, zone))
    expected = [expected_time(value, UNIT_NS[unit]) for value in values]
    assert times_of(array) == expected
    assert [times_of(array[row : row + 1])[0] for row in range(len(array))] == expected


@pytest.mark.parametrize("unit", UNIT_NS)
@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integer_times_have_the_unit_that_was_said(unit, kind):
    limits = np.iinfo(kind.to_pandas_dtype())
    limit = TIME_NS_MAX // UNIT_NS[unit]
    tries = {0, 1, -1, limit, limit + 1, -limit, -limit - 1, int(limits.min), int(limits.max)}
    values = sorted(value for value in tries if limits.min <= value <= limits.max)
    config = Config.of(shards=1, time_unit=unit)
    assert times_of(pa.array(values, kind), config) == [expected_time(value, UNIT_NS[unit]) for value in values]
    with pytest.raises(SchemaError, match=rf"'timestamp' has type {kind}, which has no unit.*time_unit="):
        times_of(pa.array(values, kind))


def test_dates_are_midnight_utc():
    days = [datetime.date(1969, 12, 31), datetime.date(1970, 1, 1), datetime.date(2262, 4, 11), datetime.date(2262, 4, 12)]
    expected = [expected_time((day - datetime.date(1970, 1, 1)).days, 86400 * 10**9) for day in days]
    assert times_of(pa.array(days, pa.date32())) == expected
    assert times_of(pa.array(days, pa.date64())) == expected
    assert expected[-1] == (0, "timestamp_out_of_range")


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1.0]),
        pa.array([1], pa.duration("s")),
        pa.array([1], pa.time32("s")),
        pa.array([1], pa.time64("ns")),
        pa.array([True]),
        pa.array(["2020-01-01"]),
        pa.array([[1]]),
    ],
    ids=lambda array: str(array.type),
)
def test_other_times_are_refused(array):
    with pytest.raises(SchemaError, match=r"'timestamp' has type .*cast it") as caught:
        times_of(array, IN_SECONDS)
    assert str(array.type) in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["1"]),
        pa.array([True]),
        pa.array([b"1"]),
        pa.array([1], pa.timestamp("s")),
        pa.array([[1]]),
        pa.array(["1"], pa.large_string()),
    ],
    ids=lambda array: str(array.type),
)
def test_other_amounts_are_refused(array):
    with pytest.raises(SchemaError, match=r"'amount' has type .*cast it") as caught:
        amounts_of(array)
    assert str(array.type) in str(caught.value)


@pytest.mark.parametrize(
    "array", [pa.array([1.0]), pa.array([True]), pa.array([1], pa.timestamp("s")), pa.array([[1]])], ids=lambda a: str(a.type)
)
def test_other_ids_are_refused(array):
    with pytest.raises(SchemaError, match=r"'user_id' has type .*cast it") as caught:
        rows_of_batch(batch_of(users=array))
    assert str(array.type) in str(caught.value)
    with pytest.raises(SchemaError, match="'who' has type"):
        ids_of(array, "who")


# --------------------------------------------------------------------------------------------------
# Ids

TEXTS = ["alice", "", None, "böb", "a long name, longer than twelve bytes", "alice", "x\0y"]
NUMBERS = [0, 7, None, 127, 7]


def id_arrays():
    bytes_of = [None if text is None else text.encode() for text in TEXTS]
    yield from ((pa.array(NUMBERS, kind), "uint64" if kind == pa.uint64() else "int64", NUMBERS) for kind in INTEGERS)
    yield pa.array([-(2**63), 2**63 - 1], pa.int64()), "int64", [-(2**63), 2**63 - 1]
    yield pa.array([2**64 - 1, None, 0], pa.uint64()), "uint64", [2**64 - 1, None, 0]
    kinds = [(pa.string(), "string"), (pa.large_string(), "string"), (pa.binary(), "binary"), (pa.large_binary(), "binary")]
    if VIEWS:
        kinds += [(pa.string_view(), "string"), (pa.binary_view(), "binary")]
    for kind, name in kinds:
        values = TEXTS if name == "string" else bytes_of
        yield pa.array(values, kind), name, values
    fixed = [b"0123456789abcdef", None, b"fedcba9876543210", b"\0" * 16]
    yield pa.array(fixed, pa.binary(16)), "binary", fixed
    yield pa.array([b"", None], pa.binary(0)), "binary", [b"", None]
    yield pa.array(TEXTS).dictionary_encode(), "string", TEXTS
    yield pa.array(NUMBERS, pa.int32()).dictionary_encode(), "int64", NUMBERS
    yield pa.array(fixed, pa.binary(16)).dictionary_encode(), "binary", fixed
    yield pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int8()), pa.array(["a", None])), "string", ["a", None, None, "a"]
    yield pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.uint16()), pa.array([5, 9])), "int64", [9, 5]
    yield pa.nulls(3), "int64", [None] * 3
    if hasattr(pa, "uuid"):
        yield pa.ExtensionArray.from_storage(pa.uuid(), pa.array(fixed, pa.binary(16))), "binary", fixed


@pytest.mark.parametrize(("array", "kind", "expected"), [pytest.param(*case, id=str(case[0].type)) for case in id_arrays()])
def test_ids_of_every_type(array, kind, expected):
    def check(part, values):
        ids = ids_of(part, "user_id")
        assert ids.kind == kind
        assert len(ids) == len(values)
        assert user_of(ids) == values
        assert (ids.valid is None) == (None not in values)
        if kind in ("int64", "uint64"):
            assert (len(ids.offsets), len(ids.data)) == (0, 0)
        else:
            assert len(ids.values) == 0
            assert [
                None if value is None else bytes(ids.data[ids.offsets[row] : ids.offsets[row + 1]]) for row, value in enumerate(values)
            ] == [value.encode() if isinstance(value, str) else value for value in values]
        back = ids_of(ids_to_arrow(ids), "user_id")
        assert (back.kind, user_of(back)) == (kind, values)

    check(array, expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            check(array[start:stop], expected[start:stop])
    check(pa.chunked_array([array[:1], array[1:], array[:0]]), expected)
    check(pa.chunked_array([], array.type), [])
    check(pa.concat_arrays([array] * 20)[13:], (expected * 20)[13:])
    found = rows_of_batch(batch_of(users=array))
    assert [row[3] for row in found] == ["null_user" if value is None else None for value in expected]


def test_integer_and_string_ids_are_views():
    array = pa.array(np.arange(100))[10:]
    ids = ids_of(array, "user_id")
    assert ids.values.ctypes.data == array.buffers()[1].address + 80
    array = pa.array(["a", "bc"] * 10, pa.large_string())[3:]
    ids = ids_of(array, "user_id")
    assert ids.data.ctypes.data == array.buffers()[2].address
    assert ids.offsets.ctypes.data == array.buffers()[1].address + 24


def test_ids_on_odd_addresses_are_copied():
    memory = pa.py_buffer(b"\0" + np.arange(5).tobytes())
    array = pa.Array.from_buffers(pa.int64(), 5, [None, memory.slice(1)])
    assert ids_of(array, "user_id").values.flags.aligned
    assert user_of(ids_of(array, "user_id")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("offset_type", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4, 2, 6], "row 1: its offsets fall"),
        ([0, 2, 4, 7], "offsets reach from 0 to 7 in 6 bytes"),
        ([-1, 2, 4, 6], "offsets reach from -1 to 6"),
    ],
)
def test_damaged_offsets_never_reach_a_kernel(offset_type, offsets, message):
    kind = pa.string() if offset_type == np.int32 else pa.large_string()
    memory = np.array([0, 2, 4, 6], offset_type)
    array = pa.Array.from_buffers(kind, 3, [None, pa.py_buffer(memory), pa.py_buffer(b"abcdef")])
    memory[:] = offsets  # behind the back of Arrow, which would have refused them
    with pytest.raises(SchemaError, match=f"'user_id'.*{message}"):
        ids_of(array, "user_id")


def test_damaged_dictionary_indices():
    array = pa.DictionaryArray.from_arrays(pa.array([0, 5], pa.int8()), pa.array(["a"]), safe=False)
    with pytest.raises(SchemaError, match="'user_id' has dictionary indices without a value"):
        ids_of(array, "user_id")


# --------------------------------------------------------------------------------------------------
# Reasons


def test_the_first_reason_wins():
    nan, huge, late = math.nan, 1e300, 2**62
    cases = [
        (None, None, None, "null_user"),
        (None, nan, late, "null_user"),
        (1, None, None, "null_amount"),
        (1, None, late, "null_amount"),
        (1, nan, None, "null_timestamp"),
        (1, huge, None, "null_timestamp"),
        (1, nan, late, "amount_not_finite"),
        (1, huge, late, "amount_out_of_range"),
        (1, 1.0, late, "timestamp_out_of_range"),
        (1, 1.0, 5, None),
    ]
    users, amounts, times, reasons = zip(*cases, strict=True)
    batch = batch_of(pa.array(users, pa.int64()), pa.array(amounts, pa.float64()), pa.array(times, pa.timestamp("s")))
    for start in range(len(cases)):
        assert [row[3] for row in rows_of_batch(batch[start:])] == list(reasons[start:])
    assert rows_of_batch(batch)[-1] == (1, 5 * 10**9, 10000, None, 0)


def test_columns_of_nulls_only():
    assert rows_of({"user_id": [None], "amount": [None], "timestamp": [None]}) == [(None, 0, 0, "null_user", 0)]
    assert rows_of({"user_id": [1], "amount": [None], "timestamp": [None]}) == [(1, 0, 0, "null_amount", 0)]
    assert rows_of({"user_id": [1], "amount": [1], "timestamp": [None]}) == [(1, 0, 0, "null_timestamp", 0)]


@given(st.integers(0, 20), st.integers(0, 60), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_nulls_of_slices(start, count, seed):
    generator = np.random.default_rng(seed)
    n = 100
    masks = [generator.random(n) < share for share in (0.3, 0.2, 0.4)]
    users = pa.array(np.arange(n), mask=masks[0])
    amounts = pa.array(np.arange(n) / 4, mask=masks[1])
    times = pa.array(np.arange(n).astype("M8[s]"), mask=masks[2])
    found = rows_of_batch(batch_of(users, amounts, times).slice(start, count))
    reasons = [next((reason for mask, reason in zip(masks, REASONS, strict=False) if mask[row]), None) for row in range(n)]
    expected = [
        (None if masks[0][row] else row, 0, 0, reasons[row], 0) if reasons[row] else (row, row * 10**9, row * 2500, None, 0)
        for row in range(n)
    ]
    assert found == expected[start : start + count]


def test_columns_keep_the_arrays_apart_from_the_batch():
    batch = batch_of(times=pa.array([1, 2], pa.timestamp("ns")), amounts=pa.array([1, 2], pa.int64()))
    found = columns_of(batch, Config.of(shards=1, decimals=0))
    found.time_ns[:] = 9
    found.amount_units[:] = 9
    assert batch.column("amount").to_pylist() == [1, 2]
    assert batch.column("timestamp").cast(pa.int64()).to_pylist() == [1, 2]


# --------------------------------------------------------------------------------------------------
# Text

AMOUNT_TEXTS = [
    *"1 1.5 -1.5 +1.5 .5 5. 007 -0 0.00005 0.00015 0.000050000000000000000000000000000000000000000000001".split(),
    *"1e3 1E+3 1.5e-2 5e-5 15e-5 1e-30 1e-44 1E-9 1e-09 1e+007 1e+99 1e39 1e-400 0e-400 1e400 -1e400 1e15".split(),
    *"9007199254740992 900719925474.0992 900719925474.0993 900719925474.09925 900719925474.0992500001 12345678901234567890.5".split(),
    *"nan NaN -nan inf +Inf -Infinity iNFINITY".split(),
    *"x 1,5 1_000 0x10 --1 + - . e5 1e 1e+ 1d5 1.2.3 infinit nanx $5 1e5e5 1e+-5 1e0x5 1e+0X5 1e-0x5 1e--5 1e-+5 0e+-0".split(),
    *("", " ", "1 5", "\u0661", " 1.5 ", "\t2", "0" * 50 + "1.25", "9" * 60, "-" + "9" * 38, "0." + "0" * 60 + "1", "0.1" + "0" * 60),
    *("1.00005" + "0" * 31, "1.00005" + "0" * 32 + "1", "1.00005" + "0" * 33),
]


def expected_amount_text(text: str | None, decimals: int):
    text = None if text is None else text.strip(" \t")
    try:
        assert text is not None
        assert text.isascii()
        assert "_" not in text
        value = decimal.Decimal(text)
    except (AssertionError, decimal.InvalidOperation):
        return 0, "null_amount", 0
    if not value.is_finite():
        return 0, "amount_not_finite", 0
    exact = Fraction(value)
    units, reason = expected_amount(exact, decimals)
    return units, reason, int(reason is None and Fraction(units, 10**decimals) != exact)


def text_amounts(texts, decimals=4):
    found = rows_of_batch(text_batch(amounts=texts), Config.of(shards=1, decimals=decimals))
    return [(units, reason, rounded) for _, _, units, reason, rounded in found]


@pytest.mark.parametrize("decimals", [0, 4, 8])
def test_amount_texts(decimals):
    texts = [*AMOUNT_TEXTS, None]
    expected = [expected_amount_text(text, decimals) for text in texts]
    assert text_amounts(texts, decimals) == expected
    assert [text_amounts([text], decimals)[0] for text in texts] == expected  # whatever its neighbours are


@given(
    st.lists(
        st.from_regex(r"\A[ ]?[+-]?[0-9]{0,12}(\.[0-9]{0,12})?([eE][+-]?[0-9]{1,2})?\Z")
        | st.decimals(allow_nan=True).map(str).filter(lambda text: "NaN" not in text or text == "NaN")
        | st.text("0123456789.eE+-xXnaif _", max_size=8)
        | st.integers(-(2**60), 2**60).map(lambda units: f"{units // 10**5}.{abs(units) % 10**5:05}")
        | st.none(),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 8),
)
@settings(max_examples=300, deadline=None)
def test_amount_texts_like_decimal(texts, decimals):
    expected = [expected_amount_text(text, decimals) for text in texts]
    assert text_amounts(texts, decimals) == expected
    assert [text_amounts([text], decimals)[0] for text in texts] == expected


def test_one_malformed_text_among_many_costs_one_row():
    n = 5000
    amounts = [f"{row}.25" for row in range(n)]
    times = [f"2020-01-01T00:00:00.{row:06}" for row in range(n)]
    good = rows_of_batch(text_batch(amounts, times))
    assert all(row[3] is None for row in good)
    amounts[1234], times[4321], times[77] = "many", "never", "2300-01-01"
    bad = rows_of_batch(text_batch(amounts, times))
    assert [row[3] for row in bad if row[3]] == ["timestamp_out_of_range", "null_amount", "null_timestamp"]
    assert [row for row in bad if not row[3]] == [row for place, row in enumerate(good) if place not in (77, 1234, 4321)]


EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)


def ns_of(moment: datetime.datetime) -> int:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // datetime.timedelta(microseconds=1) * 1000


TIME_TEXTS = {
    "1970-01-01": 0,
    "1970-01-01T00:00:00Z": 0,
    "1970-01-01 00": 0,
    "1970-01-01T01:02": 3720 * 10**9,
    "1970-01-01T01:02Z": 3720 * 10**9,
    "1969-12-31T23:59:59.999999999": -1,
    "2024-02-29T12:34:56.123456789+02:00": ns_of(datetime.datetime(2024, 2, 29, 10, 34, 56)) + 123456789,
    "2024-02-29 12:34:56.5-0530": ns_of(datetime.datetime(2024, 2, 29, 18, 4, 56, 500000)),
    "2024-02-29T12:34:56+02": ns_of(datetime.datetime(2024, 2, 29, 10, 34, 56)),
    "2024-02-29t12:34:56z": ns_of(datetime.datetime(2024, 2, 29, 12, 34, 56)),
    " 1970-01-02 ": 86400 * 10**9,
    "2000-02-29": ns_of(datetime.datetime(2000, 2, 29)),
    "1677-09-21T00:12:43.145224193": TIME_NS_MIN,
    "1677-09-21T00:12:43.145224192": "timestamp_out_of_range",
    "1677-09-21T00:12:42.999999999": "timestamp_out_of_range",
    "2262-04-11T23:47:16.854775807": TIME_NS_MAX,
    "2262-04-11T23:47:16.854775808": "timestamp_out_of_range",
    "2262-04-11T23:47:17": "timestamp_out_of_range",
    "2262-04-12T01:47:16.854775807+02:00": TIME_NS_MAX,
    "2300-01-01": "timestamp_out_of_range",
    "2300-01-01T00:00:00Z": "timestamp_out_of_range",
    "9999-12-31T23:59:59": "timestamp_out_of_range",
    "0000-01-01": "timestamp_out_of_range",
    "1600-01-01": "timestamp_out_of_range",
    **dict.fromkeys(
        ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "2024-00-10", "2024-01-00", "2024-01-01T24:00", "2024-01-01T00:60"],
        "null_timestamp",
    ),
    **dict.fromkeys(
        ["2024-01-01T00:00:60", "2024-01-01T00:00:00.", "2024-01-01T00:00:00.1234567890", "2024-1-1", "2024", "20240101", "", "now", "x"],
        "null_timestamp",
    ),
    **dict.fromkeys(
        ["2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+02:60", "2024-01-01Z", "2024-01-01T00:00:00 UTC", "2300-02-30", "0x10", "1.5"],
        "null_timestamp",
    ),
    "0": "null_timestamp",
    "1700000000": "null_timestamp",
}


def text_times(texts, config=CONFIG):
    return [(time, reason) for _, time, _, reason, _ in rows_of_batch(text_batch(times=texts), config)]


def answer(expected):
    return (0, expected) if isinstance(expected, str) else (expected, None)


def test_time_texts():
    texts = [*TIME_TEXTS, None]
    expected = [answer(value) for value in TIME_TEXTS.values()] + [(0, "null_timestamp")]
    assert text_times(texts) == expected
    assert [text_times([text])[0] for text in texts] == expected
    assert [text_times([text, "1970-01-01T00:00:00Z"])[0] for text in texts] == expected
    assert [text_times([text, "1970-01-01T00:00:00"])[0] for text in texts] == expected


@pytest.mark.parametrize("unit", UNIT_NS)
def test_integer_time_texts(unit):
    config = Config.of(shards=1, time_unit=unit)
    limit = TIME_NS_MAX // UNIT_NS[unit]
    numbers = [0, 1, -1, limit, limit + 1, -limit, -limit - 1, 10**18, 10**19, 2**64, -(2**63), 10**30]
    texts = [*map(str, numbers), "+5", "0" * 30 + "7", "-" + "0" * 30 + "7", "0x10", "1.0", "1e3", " 8 "]
    expected = [expected_time(number, UNIT_NS[unit]) for number in numbers]
    expected += [expected_time(number, UNIT_NS[unit]) for number in (5, 7, -7)]
    expected += [(0, "null_timestamp")] * 3 + [expected_time(8, UNIT_NS[unit])]
    mixed = {**TIME_TEXTS, "0": 0, "2024": expected_time(2024, UNIT_NS[unit])[0], "20240101": 20240101 * UNIT_NS[unit]}
    mixed["1700000000"] = 1700000000 * UNIT_NS[unit]
    texts += list(mixed)
    expected += [answer(value) for value in mixed.values()]
    assert text_times(texts, config) == expected
    assert [text_times([text], config)[0] for text in texts] == expected


@given(
    st.lists(
        st.builds(
            lambda moment, sep, zone: moment.replace(tzinfo=None).isoformat(sep) + zone,
            st.datetimes(datetime.datetime(1600, 1, 1), datetime.datetime(2400, 1, 1)),
            st.sampled_from("T "),
            st.sampled_from(["", "Z", "+00:00", "-11:30", "+23:59"]),
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=200, deadline=None)
def test_time_texts_like_datetime(texts):
    expected = [expected_time(ns_of(datetime.datetime.fromisoformat(text)), 1) for text in texts]
    assert text_times(texts) == expected
    assert [text_times([text])[0] for text in texts] == expected


@given(
    st.lists(
        st.text("0123456789-:T Z+.x", max_size=12).map(lambda end: "2024-01-01" + end) | st.text("0123456789-:TZ+", max_size=26), max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_what_becomes_of_a_time_text_does_not_depend_on_its_neighbours(texts):
    for config in (CONFIG, IN_SECONDS):
        alone = [text_times([text], config)[0] for text in texts]
        assert text_times([*texts, "spoilt"], config)[:-1] == alone


# --------------------------------------------------------------------------------------------------
# Sources: all give the same rows

SOURCE = pa.table(
    {
        "note": pa.array(["a", "b", None, 'quoted "x", with\ncomma', "e", "f"]),
        "user_id": pa.array(["alice", "007", None, "bob", "alice", "7"]),
        "amount": pa.array([12.5, 0.1, 1.0, -3.25, None, 0.00012]),
        "timestamp": pa.array([1_700_000_000_000_000 + step for step in (0, 1, 2, 3, 4, 5)], pa.timestamp("us", "UTC")),
    }
)
EXPECTED = [
    ("alice", 1_700_000_000_000_000_000, 125000, None, 0),
    ("007", 1_700_000_000_000_001_000, 1000, None, 0),
    (None, 0, 0, "null_user", 0),
    ("bob", 1_700_000_000_000_003_000, -32500, None, 0),
    ("alice", 0, 0, "null_amount", 0),
    ("7", 1_700_000_000_000_005_000, 1, None, 1),
]


class OneBatch:
    """Only the array side of Arrow's C interface."""

    def __init__(self, batch):
        self.batch = batch

    def __arrow_c_array__(self, requested_schema=None):
        return self.batch.__arrow_c_array__(requested_schema)


class Stream:
    """Only the stream side, and no length."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def chunked():
    return pa.concat_tables([SOURCE[:1], SOURCE[1:1], SOURCE[1:4], SOURCE[4:]])


def write_parquet(path):
    pq.write_table(SOURCE, path, row_group_size=4)


def write_arrow(path, stream=False):
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), SOURCE.schema) as writer:
        writer.write_table(SOURCE, max_chunksize=4)


def csv_bytes():
    sink = io.BytesIO()
    pa_csv.write_csv(SOURCE, sink)
    return sink.getvalue()


def ndjson_bytes():
    def plain(value):
        return value.isoformat() if isinstance(value, datetime.datetime) else value

    return "".join(json.dumps({name: plain(value) for name, value in row.items()}) + "\n" for row in SOURCE.to_pylist()).encode()


IN_MEMORY = {
    "batch": lambda: SOURCE.combine_chunks().to_batches()[0],
    "table": lambda: SOURCE,
    "chunked": chunked,
    "sliced": lambda: pa.concat_tables([SOURCE[4:], chunked(), SOURCE[:2]])[2:8],
    "dict of lists": lambda: {name: SOURCE[name].to_pylist() for name in SOURCE.column_names},
    "dict of arrays": lambda: {name: SOURCE[name] for name in SOURCE.column_names},
    "dict mixed": lambda: {
        "timestamp": SOURCE["timestamp"].to_numpy(),
        "user_id": np.array(SOURCE["user_id"].to_pylist(), dtype=object),
        "amount": SOURCE["amount"].combine_chunks(),
    },
    "c array": lambda: OneBatch(SOURCE.combine_chunks().to_batches()[0]),
    "pandas": lambda: pd.DataFrame(
        {**SOURCE.to_pandas(), "amount": SOURCE["amount"].to_pandas(types_mapper=lambda _: pd.ArrowDtype(pa.float64()))}
    ),
    "dictionary": lambda: SOURCE.set_column(1, "user_id", SOURCE["user_id"].dictionary_encode()),
    "decimal": lambda: SOURCE.set_column(2, "amount", SOURCE["amount"].cast(pa.decimal128(20, 10))),
}
if VIEWS:
    IN_MEMORY["polars"] = lambda: pl.from_arrow(SOURCE)
    IN_MEMORY["polars categorical"] = lambda: pl.from_arrow(SOURCE).with_columns(pl.col("user_id").cast(pl.Categorical))
    IN_MEMORY["duckdb"] = lambda: duckdb.sql("select * from source", connection=connection())
    IN_MEMORY["dict of series"] = lambda: pl.from_arrow(SOURCE).to_dict()


def connection():
    made = duckdb.connect()
    made.register("source", SOURCE)
    return made


@pytest.mark.parametrize("source", IN_MEMORY.values(), ids=IN_MEMORY.keys())
def test_data_in_memory_is_one_unit(source):
    units = list(read(source(), CONFIG))
    assert len(units) == 1
    assert [row for batch in units[0] for row in rows_of_batch(batch)] == EXPECTED


def test_nan_of_pandas_is_null_as_pandas_means_it():
    assert rows_of(SOURCE.to_pandas()) == EXPECTED


@pytest.mark.parametrize("source", [Stream, lambda table: table.to_reader()], ids=["c stream", "reader"])
def test_each_batch_of_a_stream_is_a_unit(source):
    (batch,) = SOURCE.to_batches()
    table = pa.Table.from_batches([batch[:4], batch[:0], batch[4:]])
    units = list(read(source(table), CONFIG))
    assert [[batch.num_rows for batch in unit] for unit in units] == [[4], [0], [2]]
    assert [row for unit in units for batch in unit for row in rows_of_batch(batch)] == EXPECTED


FILES = {
    "a.parquet": write_parquet,
    "a.pq": write_parquet,
    "A.PARQUET": write_parquet,
    "parquet without suffix": write_parquet,
    "a.arrow": write_arrow,
    "a.feather": write_arrow,
    "a.ipc": write_arrow,
    "a.arrows": lambda path: write_arrow(path, stream=True),
    "stream.arrow": lambda path: write_arrow(path, stream=True),
    "arrow.unknown": write_arrow,
    "a.csv": lambda path: path.write_bytes(csv_bytes()),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_bytes()),
    "crlf.csv": lambda path: path.write_bytes(csv_bytes().replace(b"\n", b"\r\n")),
    "open end.csv": lambda path: path.write_bytes(csv_bytes().rstrip()),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_bytes())),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(csv_bytes())),
    "a.csv.zst": lambda path: path.write_bytes(pa.compress(csv_bytes(), "zstd", asbytes=True)),
    "a.csv.lz4": lambda path: path.write_bytes(pa.compress(csv_bytes(), "lz4", asbytes=True)),
    "a.ndjson": lambda path: path.write_bytes(ndjson_bytes()),
    "a.jsonl": lambda path: path.write_bytes(ndjson_bytes().replace(b"\n", b"\r\n\n")),
    "a.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + ndjson_bytes().rstrip()),
    "a.ndjson.gz": lambda path: path.write_bytes(gzip.compress(ndjson_bytes())),
    "a.json.zst": lambda path: path.write_bytes(pa.compress(ndjson_bytes(), "zstd", asbytes=True)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_path", [str, lambda path: path, lambda path: [path]], ids=["str", "path", "list"])
def test_files(tmp_path, name, as_path):
    path = tmp_path / name
    FILES[name](path)
    assert rows_of(as_path(path)) == EXPECTED
    notes = [note for unit in read(as_path(path), CONFIG) for batch in unit for note in batch.column("note").to_pylist()]
    assert [note and note.replace("\r", "") for note in notes] == SOURCE["note"].to_pylist()


def test_folders_globs_and_lists(tmp_path):
    for name in ("2.csv", "1.parquet", "3.ndjson", "4.arrow"):
        {"csv": FILES["a.csv"], "parquet": write_parquet, "ndjson": FILES["a.ndjson"], "arrow": write_arrow}[name[2:]](tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.csv").write_text("x")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "inner.csv").write_bytes(csv_bytes())
    assert module._files_of(tmp_path) == [str(tmp_path / name) for name in ("1.parquet", "2.csv", "3.ndjson", "4.arrow")]
    assert rows_of(tmp_path) == EXPECTED * 4
    assert rows_of(str(tmp_path / "[12].*")) == EXPECTED * 2
    assert rows_of([tmp_path / "1.parquet", str(tmp_path / "folder.csv"), str(tmp_path / "?.csv")]) == EXPECTED * 3


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    path = tmp_path / "a[1].csv"
    path.write_bytes(csv_bytes())
    assert rows_of(path) == EXPECTED


def arrow_bytes(stream):
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, SOURCE.schema) as writer:
        writer.write_table(SOURCE)
    return sink.getvalue()


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))


@pytest.mark.parametrize(
    "data",
    [
        lambda: arrow_bytes(True),
        lambda: arrow_bytes(False),
        csv_bytes,
        ndjson_bytes,
        lambda: b"\n " + ndjson_bytes(),
        lambda: gzip.compress(csv_bytes()),
        lambda: pa.compress(ndjson_bytes(), "zstd", asbytes=True),
        lambda: bz2.compress(arrow_bytes(True)),
    ],
    ids=["stream", "file", "csv", "ndjson", "blank", "csv.gz", "ndjson.zst", "stream.bz2"],
)
def test_standard_input(monkeypatch, data):
    feed(monkeypatch, data())
    assert rows_of("-") == EXPECTED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "standard input is empty"),
        (b"PAR1xxxxxxxx", "standard input is a Parquet file.*give the path"),
        (b"[1, 2]", "standard input is a JSON array"),
        (b"nonsense\n", "standard input: column 'user_id' is missing"),
        (b"\n\n\n", "standard input"),
        (b"\xff\xff\xff\xff", "standard input is damaged"),
        (b"\x1f\x8bxxxxxxxxx", "standard input"),
    ],
)
def test_bad_standard_input(monkeypatch, data, message):
    feed(monkeypatch, data)
    with pytest.raises(SchemaError, match=message):
        rows_of("-")


def test_standard_input_stays_open(monkeypatch):
    feed(monkeypatch, csv_bytes())
    assert rows_of("-") == EXPECTED
    assert not sys.stdin.buffer.closed


def test_a_named_pipe_is_read_like_standard_input(tmp_path):
    for name, data in (("pipe", csv_bytes()), ("pipe.arrow", arrow_bytes(True)), ("pipe.csv", ndjson_bytes())):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        assert rows_of(tmp_path / name) == EXPECTED
        writer.join()


def test_large_data_comes_in_pieces(tmp_path):
    n = 2 * PIECE_ROWS + 5
    table = pa.table({"user_id": np.arange(n), "amount": np.arange(n) % 1000, "timestamp": np.arange(n).astype("M8[ms]")})
    (unit,) = read(table.combine_chunks(), CONFIG)
    assert [batch.num_rows for batch in unit] == [PIECE_ROWS, PIECE_ROWS, 5]
    assert [[b.num_rows for b in unit] for unit in read(pa.RecordBatchReader.from_batches(table.schema, table.to_batches()), CONFIG)] == [
        [PIECE_ROWS, PIECE_ROWS, 5]
    ]
    pq.write_table(table, tmp_path / "a.parquet")
    pa_csv.write_csv(table, tmp_path / "a.csv")
    pl.from_arrow(table).with_columns(pl.col("timestamp").dt.to_string("%Y-%m-%dT%H:%M:%S%.3f")).write_ndjson(tmp_path / "a.ndjson")
    expected = [(row, row * 10**6, row % 1000 * 10**4, None, 0) for row in range(n)]
    for name in ("a.parquet", "a.csv", "a.ndjson"):
        units = list(read(tmp_path / name, CONFIG))
        assert len(units) > 1
        assert all(len(unit) <= 2 for unit in units)
        found = [row for unit in units for batch in unit for row in rows_of_batch(batch)]
        assert [(int(row[0]), *row[1:]) for row in found] == expected, name


def test_reading_is_lazy(tmp_path):
    """Of a stream only what is asked for is read."""
    pulled = []

    def batches():
        for batch in SOURCE.to_batches(max_chunksize=2):
            pulled.append(batch)
            yield batch

    units = read(pa.RecordBatchReader.from_batches(SOURCE.schema, batches()), CONFIG)
    next(units)
    assert len(pulled) == 1


@pytest.mark.parametrize("empty", [SOURCE[:0], SOURCE.to_batches()[0][:0]], ids=["table", "batch"])
def test_no_rows(empty):
    ((batch,),) = read(empty, CONFIG)
    assert batch.schema.equals(SOURCE.schema)
    assert rows_of_batch(batch) == []


def test_no_rows_in_files(tmp_path):
    pq.write_table(SOURCE[:0], tmp_path / "a.parquet")
    pa.ipc.new_file(str(tmp_path / "a.arrow"), SOURCE.schema).close()
    (tmp_path / "a.csv").write_bytes(b"user_id,amount,timestamp\n")
    for name in ("a.parquet", "a.arrow", "a.csv"):
        assert rows_of(tmp_path / name) == []
        ((batch,),) = read(tmp_path / name, CONFIG)
        assert batch.schema.names[-3:] == ["user_id", "amount", "timestamp"]


# --------------------------------------------------------------------------------------------------
# CSV and NDJSON in particular


def test_csv_keeps_what_is_written(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('extra,user_id,amount,timestamp\n007,007,1.10,2020-01-01\n,"",,NA\nNaN,,nan,"2020-01-01"\n1e5,NULL,"",2020-01-01\n')
    ((batch,),) = read(path, CONFIG)
    assert batch.to_pydict() == {
        "extra": ["007", None, "NaN", "1e5"],
        "user_id": ["007", "", None, "NULL"],
        "amount": ["1.10", None, "nan", ""],
        "timestamp": ["2020-01-01", "NA", "2020-01-01", "2020-01-01"],
    }
    assert [row[3] for row in rows_of_batch(batch)] == [None, "null_amount", "null_user", "null_amount"]


@pytest.mark.parametrize("wrong", ["1,2", "1,2,2020-01-01,4"])
@pytest.mark.parametrize("at", [0, 3, 200_000])
def test_csv_rows_of_wrong_width(tmp_path, wrong, at):
    path = tmp_path / "a.csv"
    path.write_text("user_id,amount,timestamp\n" + "1,2,2020-01-01\n" * at + wrong + "\n" + "1,2,2020-01-01\n" * 5)
    with pytest.raises(SchemaError) as caught:
        rows_of(path)
    assert f"{path}: row {at + 2} has {wrong.count(',') + 1} values, wanted 3: {wrong!r}" in str(caught.value)


def test_csv_header_with_quotes_and_long_rows(tmp_path):
    path = tmp_path / "a.csv"
    config = Config.of(shards=1, amount="the\namount, in EUR")
    path.write_text('user_id,"the\namount, in EUR",timestamp\n1,2,2020-01-01\n')
    assert [row[2] for row in rows_of(path, config)] == [20000]
    path.write_text("user_id,amount,timestamp\n1,2,2020-01-01\n" + "x" * 10**7 + ",2,2020-01-01\n")
    with pytest.raises(SchemaError, match=r"a\.csv: a row after row .* is longer than"):
        rows_of(path)


def test_csv_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"user_id,amount,timestamp\n\xff\xfe,2,2020-01-01\n")
    with pytest.raises(SchemaError, match=r"a\.csv is damaged.*0 rows were read before.*UTF8"):
        rows_of(path)
    path.write_bytes("user_id,amount,timestamp\n".encode("utf-16"))
    with pytest.raises(SchemaError, match=r"a\.csv is damaged.*utf-8"):
        rows_of(path)


@pytest.mark.parametrize("suffix", ["csv", "ndjson"])
def test_integer_times_in_text_need_a_unit(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        "user_id,amount,timestamp\na,1,1700000000\nb,2,1700000001\n"
        if suffix == "csv"
        else '{"user_id":"a","amount":1,"timestamp":1700000000}\n{"user_id":"b","amount":2,"timestamp":1700000001}\n'
    )
    with pytest.raises(SchemaError, match=rf"a\.{suffix}: column 'timestamp' holds integers such as '1700000000'.*time_unit="):
        rows_of(path)
    assert [row[1] for row in rows_of(path, IN_SECONDS)] == [1_700_000_000 * 10**9, 1_700_000_001 * 10**9]


def test_ndjson_amounts_and_times_are_exact(tmp_path):
    path = tmp_path / "a.ndjson"
    lines = [
        '{"user_id": "a", "amount": 1.50, "timestamp": "2020-01-01"}',
        '{"amount": "1.50", "timestamp": "2020-01-01", "user_id": "a"}',
        '{"user_id": "a", "amount": 0.00005, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount" :0.00015 , "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 1e2, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": -3, "timestamp": 1577836800}',
        '{"user_id": "a", "amount": NaN, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": "much", "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 123456789012345678901234567890, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": null, "timestamp": "2020-01-01"}',
        '{"user_id": "a", "timestamp": "2020-01-01"}',
        '{"user_id": "a", "amount": 1, "timestamp": 1.5}',
        '{"user_id": null, "amount": 1, "timestamp": "2020-01-01"}',
        '{"user_id": "\\"amount\\": 5, \\"timestamp\\": 7", "amount": 1, "timestamp": "2020-01-01"}',
    ]
    path.write_text("\n".join(lines))
    found = rows_of(path, IN_SECONDS)
    assert [(units, reason, rounded) for _, _, units, reason, rounded in found] == [
        *[(15000, None, 0)] * 2,
        *[(0, None, 1), (2, None, 1), (10**6, None, 0), (-30000, None, 0)],
        *[(0, "amount_not_finite", 0), (0, "null_amount", 0), (0, "amount_out_of_range", 0), (0, "null_amount", 0), (0, "null_amount", 0)],
        *[(0, "null_timestamp", 0), (0, "null_user", 0), (10000, None, 0)],
    ]
    assert {time for _, time, _, reason, _ in found if not reason} == {1577836800 * 10**9}
    assert found[-1][0] == '"amount": 5, "timestamp": 7'
    table = pa.Table.from_batches([batch for unit in read(path, IN_SECONDS) for batch in unit])
    assert table["amount"].to_pylist()[:3] == ["1.50", "1.50", "0.00005"]


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ("1 2", [1, 2]),
        ('"1" "02"', ["1", "02"]),
        ("null null", [None, None]),
        ("null 5", [None, 5]),
        ("18446744073709551615 1", [2**64 - 1, 1]),
        ('"2020-01-01" "2020-01-02"', ["2020-01-01", "2020-01-02"]),
    ],
)
def test_ndjson_ids_are_what_json_says(tmp_path, users, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"user_id": {user}, "amount": 1, "timestamp": "2020-01-01"}}\n' for user in users.split()))
    assert [row[0] for row in rows_of(path)] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": 1.5, "amount": 1, "timestamp": "2020-01-01"}', "1.5"),
        ('{"user_id": "x", "amount": 1, "timestamp": "2020-01-01"}', "in row 2"),
        ('{"user_id": 1, "amount": true, "timestamp": "2020-01-01"}', "amount.* in row 2"),
        ('{"user_id": 1, "amount": 1', "row"),
        ("[1]", "array"),
        ("5", "number"),
        ('{"user_id": 1, "amount": 1, "amount": 2, "timestamp": "2020-01-01"}', "amount.*twice"),
    ],
)
def test_malformed_ndjson(tmp_path, line, message):
    path = tmp_path / "a.ndjson"
    good = '{"user_id": 1, "amount": 1, "timestamp": "2020-01-01"}\n'
    path.write_text(good + line + "\n")
    with pytest.raises(SchemaError, match=rf"a\.ndjson.*0 rows were read before.*{message}"):
        rows_of(path)
    path.write_text(good * 100_000 + line + "\n")
    with pytest.raises(SchemaError, match=r"a\.ndjson.* (?!0)[0-9,]+ rows were read before") as caught:
        rows_of(path)
    if "in row 2" in message:
        assert "in row 100001" in str(caught.value)


def test_ndjson_types_do_not_drift_between_blocks(tmp_path):
    path = tmp_path / "a.ndjson"
    n = 60_000
    lines = [f'{{"user_id":{row},"amount":1,"timestamp":"2020-01-01","memo":null,"when":"2020-01-01"}}' for row in range(n)]
    lines.append('{"user_id":1,"amount":0.5,"timestamp":"2020-01-01","memo":"text","when":"today","new":1}')
    path.write_text("\n".join(lines))
    units = list(read(path, CONFIG))
    assert len(units) > 1
    assert len({str(batch.schema) for unit in units for batch in unit}) == 1
    last = units[-1][-1][-1:].to_pylist() if hasattr(units[-1][-1], "to_pylist") else None
    assert last == [{"user_id": 1, "amount": "0.5", "timestamp": "2020-01-01", "memo": "text", "when": "today"}]


# --------------------------------------------------------------------------------------------------
# Bad sources


def test_missing_columns_suggest_near_misses():
    data = {"userid": [1], "amount": [1], "timestamp": [1]}
    with pytest.raises(SchemaError, match=r"column 'user_id' is missing, found 'userid', .*did you mean 'userid'\?.*user_id='userid'"):
        rows_of(data, IN_SECONDS)
    with pytest.raises(SchemaError, match=r"did you mean 'Amount'\?.*amount='Amount'"):
        rows_of({"user_id": [1], "Amount": [1], "timestamp": [1]}, IN_SECONDS)
    with pytest.raises(
        SchemaError, match=r"column 'timestamp' is missing, found 'user_id', 'amount'; if it has another name.*timestamp='\.\.\.'"
    ):
        rows_of({"user_id": [1], "amount": [1]}, IN_SECONDS)
    assert rows_of(data, Config.of(shards=1, time_unit="s", user_id="userid")) == [(1, 10**9, 10000, None, 0)]


@pytest.mark.parametrize("data", [{}, pa.table({}), pa.schema([]).empty_table(), pd.DataFrame()], ids=["dict", "table", "empty", "pandas"])
def test_no_columns(data):
    with pytest.raises(SchemaError, match="no columns; wanted 'user_id'"):
        rows_of(data)


def test_a_column_twice(tmp_path):
    batch = pa.RecordBatch.from_arrays([pa.array([1])] * 4, ["user_id", "amount", "amount", "timestamp"])
    with pytest.raises(SchemaError, match="'amount' is there 2 times"):
        rows_of(batch)
    (tmp_path / "a.csv").write_text("user_id,amount,amount,timestamp\n1,1,1,1\n")
    with pytest.raises(SchemaError, match="'amount' is there 2 times"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("data", [5, None, [1, 2], [], object(), [{"user_id": 1}], (1, 2)], ids=repr)
def test_what_cannot_be_read(data):
    with pytest.raises(SchemaError, match=r"cannot be read; give|must be a non-empty list of paths"):
        rows_of(data)


def test_dicts_that_are_not_columns():
    with pytest.raises(SchemaError, match=r"equal lengths, found \{'user_id': 1, 'amount': 2"):
        rows_of({"user_id": [1], "amount": [1, 2], "timestamp": [1]})
    with pytest.raises(SchemaError, match="column 'amount' cannot be an Arrow array"):
        rows_of({"user_id": [1, 2], "amount": [1, "x"], "timestamp": [1, 2]})
    with pytest.raises(SchemaError, match="column 'user_id' cannot be an Arrow array"):
        rows_of({"user_id": [2**70], "amount": [1], "timestamp": [1]})
    with pytest.raises(SchemaError, match="column 'user_id' cannot be an Arrow array"):
        rows_of({"user_id": 5, "amount": [1], "timestamp": [1]})

    with pytest.raises(SchemaError, match="column 'user_id' is one value, 'ab'"):
        rows_of({"user_id": "ab", "amount": [1, 2], "timestamp": [1, 2]})


def test_a_stream_of_something_else():
    with pytest.raises(SchemaError, match="not a table of columns"):
        rows_of(pl.Series([1, 2]))


def test_paths_that_name_nothing(tmp_path):
    (tmp_path / "sales.parquet").write_bytes(b"x")
    with pytest.raises(SchemaError, match=r"'.*sale\.parquet' does not exist; did you mean '.*sales\.parquet'\?"):
        rows_of(tmp_path / "sale.parquet")
    with pytest.raises(SchemaError, match=r"'.*nothing/there\.csv' does not exist; check the path"):
        rows_of(tmp_path / "nothing" / "there.csv")
    with pytest.raises(SchemaError, match=r"no file matches '.*\*\.csv'"):
        rows_of(str(tmp_path / "*.csv"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    with pytest.raises(SchemaError, match=r"folder '.*folder' has no data files; wanted files that end in \.parquet"):
        rows_of(tmp_path / "folder")
    with pytest.raises(SchemaError, match=r"notes\.txt: its format cannot be told.*rename it to end in \.parquet"):
        rows_of(tmp_path / "folder" / "notes.txt")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.ndjson", "a.csv.gz", "a"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SchemaError, match=rf"{name} is empty \(0 bytes\)"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.ndjson"])
def test_blank_and_compressed_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n\n")
    with pytest.raises(SchemaError, match=name):
        rows_of(tmp_path / name)
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(b""))
    with pytest.raises(SchemaError, match=name):
        rows_of(tmp_path / (name + ".gz"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.arrows", "a.csv.gz", "a.ndjson.gz"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    whole = path.read_bytes()
    for size in (1, 7, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(SchemaError, match=name):
            rows_of(path)


def test_a_file_that_is_damaged_further_on(tmp_path):
    path = tmp_path / "a.parquet"
    n = 3 * PIECE_ROWS
    table = pa.table({"user_id": np.arange(n), "amount": np.arange(n) % 1000, "timestamp": np.arange(n).astype("M8[ms]")})
    pq.write_table(table, path, row_group_size=PIECE_ROWS, compression="zstd", write_page_checksum=False, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 2000] = b"\xff" * 2000
    path.write_bytes(damaged)
    rows = 0
    with pytest.raises(SchemaError, match=r"a\.parquet is damaged.*131,072 rows were read before"):  # noqa: PT012
        for unit in read(path, CONFIG):
            rows += sum(batch.num_rows for batch in unit)
    assert rows == 2 * PIECE_ROWS


def test_files_of_another_format_than_their_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(csv_bytes())
    (tmp_path / "a.arrow").write_bytes(csv_bytes())
    write_parquet(tmp_path / "a.csv")
    write_parquet(tmp_path / "a.ndjson")
    (tmp_path / "a.csv.gz").write_bytes(csv_bytes())
    for name in ("a.parquet", "a.arrow", "a.csv", "a.ndjson", "a.csv.gz"):
        with pytest.raises(SchemaError, match=name):
            rows_of(tmp_path / name)
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(SchemaError, match="compressed Parquet file; decompress it first"):
        rows_of(tmp_path / "a.parquet.gz")
    (tmp_path / "b.json").write_text('[{"user_id": 1}]')
    with pytest.raises(SchemaError, match=r"b\.json is a JSON array.*one JSON object per line"):
        rows_of(tmp_path / "b.json")


def test_ndjson_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LINE_BYTES_MAX", 2**22)
    (tmp_path / "a.ndjson").write_bytes(b'{"user_id": "' + b"x" * 2**23 + b'"}')
    with pytest.raises(SchemaError, match="line of more than"):
        rows_of(tmp_path / "a.ndjson")


def test_columns_are_checked_before_the_first_batch(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(SOURCE.rename_columns(["note", "user_id", "amonut", "timestamp"]), path)
    with pytest.raises(SchemaError, match=r"a\.parquet: column 'amount' is missing.*did you mean 'amonut'"):
        next(read(path, CONFIG))
    reader = pa.RecordBatchReader.from_batches(SOURCE.schema, iter(SOURCE.to_batches()))
    with pytest.raises(SchemaError, match="'total' is missing"):
        next(read(reader, Config.of(shards=1, amount="total")))


def test_a_failing_reader_is_not_blamed_on_the_schema():
    def batches():
        yield from SOURCE.to_batches()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rows_of(pa.RecordBatchReader.from_batches(SOURCE.schema, batches()))


def test_random_bytes_are_a_schema_error_in_any_format(tmp_path):
    generator = np.random.default_rng(5)
    for name in ("a.parquet", "a.arrow", "a.arrows", "a.csv", "a.ndjson", "a.csv.gz", "a.csv.zst"):
        for magic in (b"", b"ARROW1\0\0", b"PAR1", b"\xff\xff\xff\xff", b"{", b"user_id,amount,timestamp\n"):
            (tmp_path / name).write_bytes(magic + generator.bytes(300) + b"PAR1")
            with pytest.raises(SchemaError, match=name):
                rows_of(tmp_path / name)


def test_flipped_bytes_of_an_arrow_file_never_crash(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(6)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            rows_of(path)
        except SchemaError:
            continue
        except UnicodeDecodeError:  # from this test's own to_pylist
            continue
