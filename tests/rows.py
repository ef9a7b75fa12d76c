"""Batches of rows for tests, and what `columns_of` makes of them as plain Python values."""

from __future__ import annotations

import datetime
from fractions import Fraction

import pyarrow as pa

from engine.columns import Ids, columns_of, ids_to_arrow
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.sources import PIECE_ROWS, read

CONFIG = Config.of(shards=1)
IN_SECONDS = Config.of(shards=1, time_unit="s")
VIEWS = int(pa.__version__.split(".")[0]) >= 18  # older pyarrow knows views but cannot convert them
UTC = datetime.UTC
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
UNIT_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


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


def expected_amount(exact: Fraction, decimals: int):
    units = round(exact * 10**decimals)  # half-even
    return (0, "amount_out_of_range") if abs(units) > 2**53 else (units, None)


def expected_time(value: int, factor: int):
    time = value * factor
    return (time, None) if TIME_NS_MIN <= time <= TIME_NS_MAX else (0, "timestamp_out_of_range")
