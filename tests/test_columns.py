"""`engine.columns`: ids, times and reasons of every type; what cannot be used is named, not guessed at."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import columns_of, ids_of, ids_to_arrow
from engine.config import REASONS, TIME_NS_MAX, Config
from engine.errors import SchemaError
from tests.rows import (
    IN_SECONDS,
    INTEGERS,
    UNIT_NS,
    VIEWS,
    amounts_of,
    batch_of,
    expected_time,
    rows_of,
    rows_of_batch,
    times_of,
    user_of,
)

# --------------------------------------------------------------------------------------------------
# Times


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


def test_numbers_need_no_pandas():
    """Neither is it a dependency, nor does every version of pyarrow know the types of numbers without it."""
    program = """
import sys
class WithoutPandas:
    def find_spec(self, name, path, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, WithoutPandas())
import pyarrow as pa
from engine.columns import columns_of
from engine.config import Config
for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.float32(), pa.float64()):
    whole = kind if pa.types.is_integer(kind) else pa.int64()
    batch = pa.record_batch({"user_id": pa.array([7], whole), "amount": pa.array([2], kind), "timestamp": pa.array([3], whole)})
    found = columns_of(batch, Config.of(shards=1, time_unit="s"))
    print(*found.ids.values, *found.amount_units, *found.time_ns)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("7 20000 3000000000\n" * 10, "")


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
