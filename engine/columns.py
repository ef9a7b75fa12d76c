"""Arrow in, checked columns out: every source, type and unit that the engine accepts, and the reasons to refuse a row.

`read` turns files, frames and streams into record batches; `columns_of` turns a record batch into the flat
int64 arrays that kernels take. It knows no clock and no users: the first six of `REASONS`, those that a row
carries in itself, are set here, the others by the engine.

Conversions are exact. A float is rounded to the grid by its exact binary value, a decimal by its digits, a
text by what is written; times keep every nanosecond. All of it is vectorised, nothing loops over rows.

Limits: a line of a text file is at most 64 MiB; text that needs an exponent beyond 20 goes through float64.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.config import AMOUNT_UNITS_MAX, REASONS, TIME_NS_MAX, TIME_UNIT_NS, Config
from engine.errors import SchemaError

#: Rows handed to the engine at a time: the arrays of one piece then stay in the second-level cache.
PIECE_ROWS: Final = 65536

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NULL_USER, _NULL_AMOUNT, _NULL_TIMESTAMP, _NOT_FINITE, _AMOUNT_RANGE, _TIMESTAMP_RANGE = (
    1 + REASONS.index(reason)
    for reason in (
        "null_user",
        "null_amount",
        "null_timestamp",
        "amount_not_finite",
        "amount_out_of_range",
        "timestamp_out_of_range",
    )
)

#: Field metadata of columns that `read` took from a text file: only those are parsed from strings.
_TEXT_MARK: Final = {b"riskring": b"text"}


@dataclass(frozen=True, slots=True)
class Ids:
    """User ids as flat arrays, all read-only and, where the source allows it, views of its memory.

    Attributes:
        kind: "int64", "uint64", "string" or "binary". A column of nulls only, without a type of its own, is "int64".
        values: (n,) integer ids, uint64 as its bit pattern; (0,) for the byte kinds. Undefined at nulls.
        offsets: (n + 1,) byte kinds: id i is `data[offsets[i]:offsets[i + 1]]`; non-decreasing and inside `data`; (0,) for integers.
        data: bytes of the byte kinds; (0,) for integers.
        valid: (n,) False at nulls; None if there are none.
    """

    kind: str
    values: Ints
    offsets: Ints
    data: NDArray[np.uint8]
    valid: Bools | None

    def __len__(self) -> int:
        return len(self.values) if self.kind in ("int64", "uint64") else len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Columns:
    """One record batch, checked.

    Attributes:
        batch: the rows as they came, for rejects.
        ids: (n,) user ids.
        time_ns: (n,) int64, writable; 0 where a reason is set.
        amount_units: (n,) int64, writable; 0 where a reason is set.
        reasons: (n,) uint8: 0 = fine so far, k = `REASONS[k - 1]`. Only the first six are set here.
        rounded: (n,) uint8: 1 where rounding to the grid changed the amount; 0 where a reason is set.
    """

    batch: Any
    ids: Ids
    time_ns: Ints
    amount_units: Ints
    reasons: NDArray[np.uint8]
    rounded: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.time_ns)


def columns_of(batch: Any, config: Config) -> Columns:
    """Check one record batch and convert its three columns.

    Args:
        batch: (n,) `pyarrow.RecordBatch`. It stays alive as long as the result does: ids may be views of it.
        config: Column names, decimals and `time_unit`.

    Returns:
        Columns: fresh arrays that the caller owns, except `ids`, which is read-only.

    Raises:
        SchemaError: A column is missing or has a type that cannot be used.

    Cost: about 4 ns per row for int64 ids, float64 amounts on the grid and timestamps of microseconds.

    Example:
        >>> import pyarrow as pa
        >>> from engine.config import Config
        >>> batch = pa.record_batch({"user_id": [7], "amount": [12.5], "timestamp": pa.array([60], pa.timestamp("s"))})
        >>> columns = columns_of(batch, Config.of())
        >>> columns.amount_units, columns.time_ns
        (array([125000]), array([60000000000]))
    """
    places = _check_schema(batch.schema, config, "")
    ids = ids_of(batch.column(places[0]), config.user_id)
    amounts = _amounts(batch.column(places[1]), config.decimals)
    times = _times(batch.column(places[2]), config.time_unit)

    n = batch.num_rows
    reasons = np.zeros(n, np.uint8)
    faults = (
        (_NULL_USER, None if ids.valid is None else ~ids.valid),
        (_NULL_AMOUNT, amounts.null),
        (_NULL_TIMESTAMP, times.null),
        (_NOT_FINITE, amounts.not_finite),
        (_AMOUNT_RANGE, amounts.out_of_range),
        (_TIMESTAMP_RANGE, times.out_of_range),
    )
    faulty = False
    for code, mask in reversed(faults):  # the first reason is written last and wins
        if mask is not None:
            reasons[mask] = code
            faulty = True
    rounded = np.zeros(n, np.uint8) if amounts.rounded is None else amounts.rounded.view(np.uint8)
    if faulty:
        refused = reasons != 0
        times.values[refused] = 0
        amounts.values[refused] = 0
        rounded[refused] = 0
    return Columns(batch, ids, times.values, amounts.values, reasons, rounded)


@dataclass(slots=True)
class _Converted:
    """Values of one column, and masks of rows that have none; a mask is None when it would be all False."""

    values: Ints
    null: Bools | None = None
    out_of_range: Bools | None = None
    not_finite: Bools | None = None
    rounded: Bools | None = None

    def put(self, rows: Ints | slice, part: _Converted) -> None:
        """Take over the values and masks of some rows from a conversion of just these."""
        self.values[rows] = part.values
        for name in ("null", "out_of_range", "not_finite", "rounded"):
            mask = getattr(part, name)
            if mask is not None:
                if getattr(self, name) is None:
                    setattr(self, name, np.zeros(len(self.values), np.bool_))
                getattr(self, name)[rows] = mask


# --------------------------------------------------------------------------------------------------
# Schema


def _check_schema(schema: Any, config: Config, where: str) -> tuple[int, int, int]:
    """Places of the three columns, after checking that each exists once and has a type that can be used."""
    places = []
    for option, wanted in (("user_id", config.user_id), ("amount", config.amount), ("timestamp", config.timestamp)):
        found = schema.get_all_field_indices(wanted)
        if not found:
            raise SchemaError(_missing(schema.names, option, wanted, where))
        if len(found) > 1:
            raise SchemaError(f"{where}column {wanted!r} is there {len(found)} times; rename or drop all but one")
        places.append(found[0])
    user, amount, time = (schema.field(place) for place in places)
    if not _is_id_type(_value_type(user.type)):
        raise SchemaError(
            f"{where}column {user.name!r} has type {user.type}; user ids are integers, strings, binary or a dictionary of these"
            + ("; cast it to an integer type (Int64 in pandas keeps nulls)" if pa.types.is_floating(user.type) else "; cast it to one")
        )
    kind = _storage_type(amount.type)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_decimal(kind) or pa.types.is_null(kind) or _is_text(amount)):
        raise SchemaError(f"{where}column {amount.name!r} has type {amount.type}; amounts are integers, floats or decimals; cast it to one")
    kind = _storage_type(time.type)
    if pa.types.is_integer(kind):
        if config.time_unit is None:
            raise SchemaError(
                f"{where}column {time.name!r} has type {time.type}, which has no unit; say which with time_unit='s', 'ms', 'us' or 'ns'"
            )
    elif not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind) or _is_text(time)):
        raise SchemaError(
            f"{where}column {time.name!r} has type {time.type}; times are timestamps, dates or integers with time_unit set; cast it to one"
        )
    return places[0], places[1], places[2]


def _missing(names: list[str], option: str, wanted: str, where: str) -> str:
    if not names:
        return f"{where}there are no columns; wanted {wanted!r} for {option}"
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1)
    shown = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
    guess = f"did you mean {folded[near[0]]!r}? Then" if near else "if it has another name,"
    example = folded[near[0]] if near else "..."
    return f"{where}column {wanted!r} is missing, found {shown}; {guess} rename it or pass {option}={example!r}"


def _storage_type(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _value_type(kind: Any) -> Any:
    kind = _storage_type(kind)
    return _storage_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_decimal(kind: Any) -> bool:
    return bool(pa.types.is_decimal(kind))


def _is_view(kind: Any) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _is_id_type(kind: Any) -> bool:
    tests = (
        pa.types.is_integer,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_null,
        _is_view,
    )
    return any(test(kind) for test in tests) and not _is_decimal(kind)


def _is_text(field: Any) -> bool:
    return bool(pa.types.is_string(field.type)) and (field.metadata or {}).get(b"riskring") == b"text"


# --------------------------------------------------------------------------------------------------
# Arrow memory as NumPy arrays


def _values(array: Any, dtype: Any, per_row: int = 1) -> NDArray[Any]:
    """View of an array's fixed-width values, (n * per_row,), nulls included; copied only if it is not aligned."""
    buffer = array.buffers()[1]
    count = len(array) * per_row
    if buffer is None or count == 0:
        return np.zeros(count, dtype)
    view: NDArray[Any] = np.frombuffer(buffer, dtype, count, array.offset * per_row * np.dtype(dtype).itemsize)
    return view if view.flags.aligned else view.copy()


def _valid(array: Any) -> Bools | None:
    if array.null_count == 0:
        return None
    n = len(array)
    buffer = array.buffers()[0]
    if buffer is None:  # an array of type null has no bitmap
        return np.zeros(n, np.bool_)
    first = array.offset // 8
    skip = array.offset % 8
    packed = np.frombuffer(buffer, np.uint8, (skip + n + 7) // 8, first)
    bits = np.unpackbits(packed, count=skip + n, bitorder="little")
    return bits[skip:].view(np.bool_)


def _null(array: Any) -> Bools | None:
    valid = _valid(array)
    return None if valid is None else ~valid


def _plain(array: Any) -> Any:
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def _mask(mask: Any) -> Bools:
    """An Arrow boolean array as NumPy; null counts as False."""
    found: Bools = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return found


def _matches(text: Any, pattern: str) -> Bools:
    return _mask(pc.match_substring_regex(text, pattern))


# --------------------------------------------------------------------------------------------------
# User ids


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Read-only, so that kernels see one kind of array whether it is a view of Arrow memory or not."""
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


_NO_INTS: Final[Ints] = _frozen(np.zeros(0, np.int64))
_NO_BYTES: Final[NDArray[np.uint8]] = _frozen(np.zeros(0, np.uint8))


def ids_of(array: Any, column: str) -> Ids:
    """User ids of an Arrow array, without copying where its layout allows it.

    Args:
        array: (n,) `pyarrow.Array` or `ChunkedArray` of integers, strings, binary or a dictionary of these.
        column: Its name, for the error text.

    Raises:
        SchemaError: It has another type, or its offsets or dictionary indices point outside of its memory.

    Example:
        >>> import pyarrow as pa
        >>> ids_of(pa.array([7, 9]), "user_id").values
        array([7, 9])
    """
    if isinstance(array, pa.ChunkedArray):
        array = _one_chunk(array, column)
    array = _plain(array)
    if pa.types.is_dictionary(array.type):
        array = _decoded(array, column)
    kind = array.type
    if _is_view(kind):
        array = _unviewed(array, column)
        kind = array.type
    if not _is_id_type(kind):
        raise SchemaError(f"column {column!r} has type {kind}; user ids are integers, strings, binary or a dictionary of these")
    valid = _valid(array)
    if valid is not None:
        valid.flags.writeable = False
    if pa.types.is_null(kind):
        return Ids("int64", _frozen(np.zeros(len(array), np.int64)), _NO_INTS, _NO_BYTES, valid)
    if pa.types.is_integer(kind):
        values = _values(array, kind.to_pandas_dtype())
        unsigned = pa.types.is_uint64(kind)
        values = values.view(np.int64) if unsigned else values.astype(np.int64, copy=False)
        return Ids("uint64" if unsigned else "int64", _frozen(values), _NO_INTS, _NO_BYTES, valid)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    offsets, data = _byte_ids(array, column)
    return Ids("string" if text else "binary", _NO_INTS, _frozen(offsets), _frozen(data), valid)


def ids_to_arrow(ids: Ids) -> Any:
    """The ids as an int64, uint64, string or binary array; large_string or large_binary beyond 2 GiB.

    Example:
        >>> import pyarrow as pa
        >>> ids_to_arrow(ids_of(pa.array(["alice", None]), "user_id")).to_pylist()
        ['alice', None]
    """
    n = len(ids)
    bitmap = None if ids.valid is None else pa.py_buffer(np.packbits(ids.valid, bitorder="little"))
    if ids.kind in ("int64", "uint64"):
        return pa.Array.from_buffers(pa.int64() if ids.kind == "int64" else pa.uint64(), n, [bitmap, pa.py_buffer(ids.values)])
    start, stop = int(ids.offsets[0]), int(ids.offsets[-1])
    small = stop - start < 2**31
    kind = {"string": (pa.large_string(), pa.string()), "binary": (pa.large_binary(), pa.binary())}[ids.kind][small]
    offsets = np.ascontiguousarray((ids.offsets - start).astype(np.int32 if small else np.int64))
    return pa.Array.from_buffers(kind, n, [bitmap, pa.py_buffer(offsets), pa.py_buffer(ids.data[start:stop])])


def _one_chunk(array: Any, column: str) -> Any:
    if array.num_chunks == 1:
        return array.chunk(0)
    if array.num_chunks == 0:
        return pa.array([], array.type)
    chunks = array.chunks
    if pa.types.is_dictionary(array.type):
        chunks = [_decoded(chunk, column) for chunk in chunks]
    # Together the chunks may hold more than 32-bit offsets can say.
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}.get(chunks[0].type)
    return pa.concat_arrays(chunks if large is None else [chunk.cast(large) for chunk in chunks])


def _decoded(array: Any, column: str) -> Any:
    values = _plain(array.dictionary)
    if _is_view(values.type):
        values = _unviewed(values, column)
    try:
        return values.take(array.indices)
    except (pa.ArrowException, IndexError) as error:
        raise SchemaError(f"column {column!r} has dictionary indices without a value: {error}; write the data again") from error


def _unviewed(array: Any, column: str) -> Any:
    try:
        return array.cast(pa.large_string() if pa.types.is_string_view(array.type) else pa.large_binary())
    except pa.ArrowNotImplementedError as error:
        raise SchemaError(
            f"column {column!r} has type {array.type}, which pyarrow {pa.__version__} cannot convert; "
            "install a newer pyarrow or cast the column to string or binary"
        ) from error


def _byte_ids(array: Any, column: str) -> tuple[Ints, NDArray[np.uint8]]:
    n = len(array)
    kind = array.type
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        buffer = array.buffers()[1]
        offsets = np.arange(array.offset, array.offset + n + 1, dtype=np.int64) * width
    else:
        large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
        dtype = np.dtype(np.int64 if large else np.int32)
        _, places, buffer = array.buffers()
        if n == 0 or places is None:
            return np.zeros(n + 1, np.int64), _NO_BYTES
        raw = np.frombuffer(places, dtype, n + 1, array.offset * dtype.itemsize)
        # Kernels read data[offsets[i]:offsets[i + 1]] unchecked, so this is the door.
        falling = raw[1:] < raw[:-1]
        if falling.any():
            raise SchemaError(f"column {column!r}, row {int(falling.argmax())}: its offsets fall; the data is damaged, write it again")
        offsets = np.ascontiguousarray(raw.astype(np.int64, copy=not raw.flags.aligned))
    data = _NO_BYTES if buffer is None else np.frombuffer(buffer, np.uint8)
    if offsets[0] < 0 or offsets[-1] > len(data):
        raise SchemaError(
            f"column {column!r}: offsets reach from {offsets[0]} to {offsets[-1]} in {len(data)} bytes; the data is damaged, write it again"
        )
    return offsets, data


# --------------------------------------------------------------------------------------------------
# Amounts

_BLOCK_ROWS: Final = 8192


def _amounts(array: Any, decimals: int) -> _Converted:
    array = _plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        return _Converted(np.zeros(len(array), np.int64), null=np.ones(len(array), np.bool_))
    if pa.types.is_string(kind):
        return _text_amounts(array, decimals)
    if pa.types.is_integer(kind):
        found = _whole_units(_values(array, kind.to_pandas_dtype()), 10**decimals, AMOUNT_UNITS_MAX)
    elif pa.types.is_floating(kind):
        found = _float_units(_values(array, kind.to_pandas_dtype()), 10**decimals)
    else:
        found = _decimal_units(array, decimals)
    found.null = _null(array)
    return found


def _whole_units(values: NDArray[Any], factor: int, most: int) -> _Converted:
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
    return _Converted(units, out_of_range=out)


def _float_units(values: NDArray[Any], scale: int) -> _Converted:
    if values.dtype != np.float64:
        return _narrow_float_units(values, scale)
    n = len(values)
    found = _Converted(np.empty(n, np.int64))
    # Block by block, so that temporaries stay in the cache; fresh pages for each would cost more than the arithmetic.
    for start in range(0, n, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, n))
        block = values[rows]
        with np.errstate(all="ignore"):
            product = block * scale
            units = np.rint(product)
            # A float that is the nearest one to r / scale lies within |r| * 2**-53 units of r. Below 2**51 that is less
            # than a quarter of a unit: r is then its exact rounding, and nothing was changed.
            same = (units / scale) == block
            if same.all() and units.max() < 2.0**51 and units.min() > -(2.0**51):
                found.values[rows] = units
                continue
            # Below 2**40 units the product is off by less than 2**-13: only close to a half can it mislead.
            size = np.abs(units)
            sure = (same & (size < 2.0**51)) | ((np.abs(product - units) < 0.4998) & (size < 2.0**40))
        doubtful = np.flatnonzero(~sure)
        units[doubtful] = 0.0
        part = _Converted(units.astype(np.int64), rounded=~same)
        if len(doubtful):
            part.put(doubtful, _exact_float_units(block[doubtful], scale))
        found.put(rows, part)
    return found


def _exact_float_units(values: Floats, scale: int) -> _Converted:
    """Half-even rounding of the exact product values * scale, for any float64.

    The product is taken without error as the sum of two floats, `product + error` (Dekker 1971; Muller et al.,
    Handbook of Floating-Point Arithmetic, section 4.4). `rint(product)` is off by at most one unit, and whether
    it is is seen from `error` against what is left to the next half. Those comparisons are exact: the distance
    from `product` to the next half is exact wherever `error` can reach it.
    """
    with np.errstate(all="ignore"):
        product = values * scale
        finite = np.isfinite(values)
        inside = finite & (np.abs(product) <= AMOUNT_UNITS_MAX)
        values = np.where(inside, values, 0.0)
        product = np.where(inside, product, 0.0)
        error = _product_error(values, scale, product)
        near = np.rint(product)
        left = product - near
        units = near.astype(np.int64)
        odd = (units & 1).astype(np.bool_)
        above, below = 0.5 - left, -0.5 - left
        units += (error > above) | ((error == above) & odd)
        units -= (error < below) | ((error == below) & odd)
        rounded = units / scale != values
    out = (finite & ~inside) | (np.abs(units) > AMOUNT_UNITS_MAX)
    return _Converted(units, out_of_range=out, not_finite=~finite, rounded=rounded)


def _product_error(values: Floats, scale: int, product: Floats) -> Floats:
    """values * scale - product, exactly, where product is the float nearest to values * scale.

    A scale has at most 27 bits, so only `values` is split (Veltkamp): both partial products are exact.
    """
    big = values * 134217729.0  # 2**27 + 1
    high = big - (big - values)
    return (high * scale - product) + (values - high) * scale


def _narrow_float_units(values: NDArray[Any], scale: int) -> _Converted:
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
    found = _Converted(product.astype(np.int64), rounded=rounded)
    if finite is not None:
        found.out_of_range = finite & ~inside
        found.not_finite = ~finite
    return found


def _decimal_units(array: Any, decimals: int) -> _Converted:
    """Half-even rounding of decimals of any width and scale by their digits."""
    drop = array.type.scale - decimals  # how many digits there are too many
    width = array.type.bit_width
    if width <= 64:
        return _digit_units(_values(array, np.int32 if width == 32 else np.int64).astype(np.int64), drop)
    words = _values(array, np.uint64, width // 64).reshape(len(array), width // 64)
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


def _digit_units(values: Ints, drop: int) -> _Converted:
    """int64 without its last `drop` digits, rounded half-even; negative: with so many zeros more."""
    if drop <= 0:
        return _whole_units(values, 10**-drop, AMOUNT_UNITS_MAX)
    if drop >= 19:  # int64 stays below 10**19: only with 19 digits can half a unit be reached
        half = 5 * 10**18
        units = (values > half).astype(np.int64) - (values < -half) if drop == 19 else np.zeros_like(values)
        return _Converted(units, rounded=values != 0)
    divisor = 10**drop
    units = values // divisor
    left = values - units * divisor
    rounded = left != 0
    left *= 2
    units += (left > divisor) | ((left == divisor) & (units & 1).astype(np.bool_))
    out = (units > AMOUNT_UNITS_MAX) | (units < -AMOUNT_UNITS_MAX)
    return _Converted(units, out_of_range=out if out.any() else None, rounded=rounded)


def _wide_digit_units(words: NDArray[np.uint64], drop: int) -> _Converted:
    """The same for integers beyond int64, given as (n, 2 or 4) little-endian words in two's complement.

    Schoolbook division in limbs of 32 bits: at most nine digits at a time, so that remainder and limb fit 64 bits.
    """
    n = len(words)
    if drop <= 0:
        return _Converted(np.zeros(n, np.int64), out_of_range=np.ones(n, np.bool_))
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
    digits = drop - 1
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
    return _Converted(np.where(negative, -units, units), out_of_range=out, rounded=sticky | (last != 0))


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


# --------------------------------------------------------------------------------------------------
# Amounts and times as text. Arrow's casts know only all or nothing; they go first because they are fast. When one
# value spoils them, the column is sorted out by regular expressions, which accept all that the casts accept: what
# becomes of a row must not depend on its neighbours.

_NUMBER: Final = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NOT_FINITE_TEXT: Final = r"^[+-]?(?i:nan|inf|infinity)$"

#: Texts that are sorted out together around one that spoils a cast.
_SORTED_ROWS: Final = 512


def _text_amounts(text: Any, decimals: int) -> _Converted:
    for scale in () if _misleads_arrow(text) else (decimals, 18):
        try:
            found = _decimal_units(text.cast(pa.decimal128(38, scale)), decimals)
        except pa.ArrowInvalid:
            continue
        found.null = _null(text)
        return found
    if len(text) > _SORTED_ROWS:
        return _halves(text, lambda half: _text_amounts(half, decimals))
    return _sorted_text_amounts(text, decimals)


def _misleads_arrow(text: Any) -> bool:
    """Whether Arrow's cast to decimal might take a text for something else.

    It makes 0 of a value that has more than 38 digits behind the last one it keeps, without an error; that cannot happen
    in 28 characters with an exponent of one digit. And it takes "1e+-5" and "1e0x5" for numbers.
    """
    offsets, _ = _byte_ids(text, "text")
    if len(text) and int(np.diff(offsets).max()) > 28:
        return True
    return _has_letter(text, b"eE") and not bool(pc.all(pc.match_substring_regex(text, r"^[^eE]*([eE][+-]?0*[0-9])?$")).as_py())


def _has_letter(text: Any, letters: bytes) -> bool:
    """Whether one of some ASCII letters occurs anywhere in the texts; by their bytes, which costs 1 ns per row."""
    offsets, data = _byte_ids(text, "text")
    used = data[offsets[0] : offsets[-1]]
    return any(bool((used == letter).any()) for letter in letters)


def _halves(text: Any, convert: Callable[[Any], _Converted]) -> _Converted:
    middle = len(text) // 2
    found = _Converted(np.zeros(len(text), np.int64))
    found.put(slice(0, middle), convert(text[:middle]))
    found.put(slice(middle, None), convert(text[middle:]))
    return found


def _sorted_text_amounts(text: Any, decimals: int) -> _Converted:
    text = pc.ascii_trim_whitespace(text)
    number = _matches(text, _NUMBER)
    endless = _matches(text, _NOT_FINITE_TEXT)
    found = _Converted(np.zeros(len(text), np.int64), null=~(number | endless), not_finite=endless)
    text = pc.replace_substring_regex(text, pattern=r"^([+-]?)0+([0-9])", replacement=r"\1\2")
    # decimal256(76, 38) holds 38 digits on both sides. Of a longer fraction it only matters whether anything is left.
    text = pc.replace_substring_regex(text, pattern=r"(\.[0-9]{37})[0-9]*[1-9][0-9]*$", replacement=r"\11")
    text = pc.replace_substring_regex(text, pattern=r"(\.[0-9]{37})0+$", replacement=r"\1")
    short = r"^[+-]?[0-9]{0,38}(\.[0-9]{0,38})?$"
    short_power = r"^[+-]?[0-9]{0,18}(\.[0-9]{0,18})?[eE][+-]?0*([0-9]|1[0-9]|20)$"
    exact = number & (_matches(text, short) | _matches(text, short_power))
    rows = np.flatnonzero(exact)
    found.put(rows, _decimal_units(text.take(pa.array(rows)).cast(pa.decimal256(76, 38)), decimals))
    power = number & ~exact & _matches(text, "[eE]")
    rows = np.flatnonzero(power)
    if len(rows):
        part = text.take(pa.array(rows))
        floats = part.cast(pa.float64()).to_numpy(zero_copy_only=False)
        units = _float_units(floats, 10**decimals)
        vanished = (floats == 0) & _matches(part, "^[^eE]*[1-9]")
        units.rounded = vanished if units.rounded is None else units.rounded | vanished
        if units.not_finite is not None:  # written as a number, but beyond any float
            units.out_of_range = units.not_finite if units.out_of_range is None else units.out_of_range | units.not_finite
            units.not_finite = None
        found.put(rows, units)
    long = number & ~exact & ~power
    if long.any():
        found.out_of_range = long if found.out_of_range is None else found.out_of_range | long
    return found


_INTEGER: Final = r"^[+-]?[0-9]+$"
_INSTANT: Final = (
    r"^(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
    r"(?:[ Tt](?P<hour>[0-9]{2})(?::(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?)?)?"
    r"(?:[Zz]|(?P<sign>[+-])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?)?)?$"
)


def _text_times(text: Any, time_unit: str | None) -> _Converted:
    least_most = pc.min_max(text).as_py()
    if least_most["min"] is None:
        return _Converted(np.zeros(len(text), np.int64), null=np.ones(len(text), np.bool_))
    # Some versions of pyarrow wrap around silently outside of the years that int64 ns can hold; and Arrow reads
    # "0x10" as an integer.
    try:
        if least_most["min"] >= "1678" and least_most["max"] < "2262" and "-" in least_most["min"][:5]:
            zoned = bool(re.search(r"([Zz]|[ Tt].*[+-].*)$", least_most["min"]))
            array = text.cast(pa.timestamp("ns", "UTC" if zoned else None))
            return _Converted(_values(array, np.int64).copy(), null=_null(text))
        if time_unit is not None and not _has_letter(text, b"xX"):
            array = text.cast(pa.int64())
            found = _whole_units(_values(array, np.int64), TIME_UNIT_NS[time_unit], TIME_NS_MAX)
            found.null = _null(text)
            return found
    except pa.ArrowInvalid:
        pass
    if len(text) > _SORTED_ROWS:
        return _halves(text, lambda half: _text_times(half, time_unit))
    return _sorted_text_times(text, time_unit)


def _sorted_text_times(text: Any, time_unit: str | None) -> _Converted:
    text = pc.ascii_trim_whitespace(text)
    found = _Converted(np.zeros(len(text), np.int64), null=np.ones(len(text), np.bool_))
    if time_unit is not None:
        rows = np.flatnonzero(_matches(text, _INTEGER))
        found.put(rows, _integer_text_times(text.take(pa.array(rows)), TIME_UNIT_NS[time_unit]))
    rows = np.flatnonzero(_matches(text, _INSTANT))
    found.put(rows, _instant_text_times(text.take(pa.array(rows))))
    return found


def _integer_text_times(text: Any, factor: int) -> _Converted:
    negative = _matches(text, "^-")
    digits = pc.replace_substring_regex(text, pattern=r"^[+-]?0*", replacement="0")
    endless = _matches(digits, "^[0-9]{21}")  # more than 19 digits behind the zero
    magnitude = _values(pc.if_else(pa.array(endless), "0", digits).cast(pa.uint64()), np.uint64)
    out = endless | (magnitude > np.uint64(TIME_NS_MAX // factor))
    time_ns = np.where(out, np.uint64(0), magnitude).astype(np.int64) * factor
    return _Converted(np.where(negative, -time_ns, time_ns), out_of_range=out, null=np.zeros(len(text), np.bool_))


def _instant_text_times(text: Any) -> _Converted:
    parts = pc.extract_regex(text, _INSTANT)

    def part(name: str) -> Ints:
        found = parts.field(name)
        if name == "fraction":
            found = pc.utf8_rpad(found, 9, "0")
        return _values(pc.if_else(pc.equal(found, ""), "0", found).cast(pa.int64()), np.int64)

    year, month, day = part("year"), part("month"), part("day")
    hour, minute, second, fraction = part("hour"), part("minute"), part("second"), part("fraction")
    zone_hour, zone_minute = part("zone_hour"), part("zone_minute")
    first = (year - 1970) * 12 + np.clip(month, 1, 12) - 1
    day_0 = first.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    days = (first + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) - day_0
    real = (month >= 1) & (month <= 12) & (day >= 1) & (day <= days)
    real &= (hour < 24) & (minute < 60) & (second < 60) & (zone_hour < 24) & (zone_minute < 60)
    west = _mask(pc.equal(parts.field("sign"), "-"))
    zone = np.where(west, -1, 1) * (zone_hour * 3600 + zone_minute * 60)
    seconds = (day_0 + day - 1) * 86400 + hour * 3600 + minute * 60 + second - zone
    # The lowest and the highest second are only partly inside; the sum below may wrap there and comes out right.
    top, low = divmod(TIME_NS_MAX, 10**9), divmod(-TIME_NS_MAX, 10**9)
    inside = (seconds < top[0]) | ((seconds == top[0]) & (fraction <= top[1]))
    inside &= (seconds > low[0]) | ((seconds == low[0]) & (fraction >= low[1]))
    time_ns = np.where(inside, seconds, 0) * 10**9 + fraction
    return _Converted(time_ns, out_of_range=~inside & real, null=~real)


# --------------------------------------------------------------------------------------------------
# Times


def _times(array: Any, time_unit: str | None) -> _Converted:
    array = _plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        return _Converted(np.zeros(len(array), np.int64), null=np.ones(len(array), np.bool_))
    if pa.types.is_string(kind):
        return _text_times(array, time_unit)
    if pa.types.is_timestamp(kind):
        found = _whole_units(_values(array, np.int64), TIME_UNIT_NS[kind.unit], TIME_NS_MAX)
    elif pa.types.is_date32(kind):
        found = _whole_units(_values(array, np.int32), 86400 * 10**9, TIME_NS_MAX)
    elif pa.types.is_date64(kind):  # milliseconds, by its definition of whole days
        found = _whole_units(_values(array, np.int64) // 86_400_000, 86400 * 10**9, TIME_NS_MAX)
    else:
        assert time_unit is not None, "the schema was checked"
        found = _whole_units(_values(array, kind.to_pandas_dtype()), TIME_UNIT_NS[time_unit], TIME_NS_MAX)
    found.null = _null(array)
    return found


# --------------------------------------------------------------------------------------------------
# Sources

#: Bytes of a text file that are parsed at a time, and the most that one line of it may have.
_BLOCK_BYTES: Final = 2**21
_LINE_BYTES_MAX: Final = 2**26

_FORMATS: Final = {
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
    ".arrows": "Arrow",
    ".csv": "CSV",
    ".ndjson": "NDJSON",
    ".jsonl": "NDJSON",
    ".json": "NDJSON",
}
_COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_COMPRESSION_MAGIC: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
_SUPPORTED: Final = ".parquet, .arrow, .feather, .ipc, .arrows, .csv, .ndjson, .jsonl or .json (text also with .gz, .zst, .bz2 or .lz4)"


def read(data: Any, config: Config) -> Iterator[list[Any]]:
    """Record batches of any source, in the units that are applied whole or not at all.

    What is in memory and has a length (RecordBatch, Table, dict, frames) is one unit. Each batch of a stream
    (RecordBatchReader, files, objects without a length) is a unit of its own, and only a few of them are in
    memory at a time.

    Args:
        data: A RecordBatch, Table or RecordBatchReader; an object with `__arrow_c_stream__` or `__arrow_c_array__`; a dict of
            arrays; a path, glob or folder of Parquet, Arrow IPC, CSV or NDJSON files; a list of paths; or "-" for
            standard input.
        config: Column names and `time_unit`.

    Yields:
        Lists of record batches of at most `PIECE_ROWS` rows. The columns of text files are strings: user ids as
        written, an empty unquoted CSV field is null. In NDJSON, columns other than the three have the types
        that its first block shows; members that first appear later are left out.

    Raises:
        SchemaError: The source cannot be read, or its columns cannot be used. The first batch of each file
            comes only after its columns were checked.

    Example:
        >>> from engine.config import Config
        >>> rows = {"user_id": ["alice"], "amount": [1], "timestamp": [60]}
        >>> [batch.num_rows for unit in read(rows, Config.of(time_unit="s")) for batch in unit]
        [1]
    """
    if isinstance(data, str | os.PathLike):
        yield from _read_files(_files_of(data), config)
    elif isinstance(data, list | tuple):
        if not data or not all(isinstance(path, str | os.PathLike) for path in data):
            raise SchemaError("a list of transactions must be a non-empty list of paths; give a dict of columns, a table or a frame")
        yield from _read_files([file for path in data for file in _files_of(path)], config)
    elif isinstance(data, Mapping):
        yield _memory_unit(_table_of(data), config)
    elif isinstance(data, pa.RecordBatch | pa.Table):
        yield _memory_unit(data, config)
    elif isinstance(data, pa.RecordBatchReader):
        yield from _stream_units(data, config)
    elif hasattr(data, "__arrow_c_stream__"):
        try:
            reader = pa.RecordBatchReader.from_stream(data)
        except (pa.ArrowException, TypeError) as error:
            raise SchemaError(f"{_kind_of(data)} is not a table of columns: {error}") from error
        if hasattr(data, "__len__"):
            yield _memory_unit(reader.read_all(), config)
        else:
            yield from _stream_units(reader, config)
    elif hasattr(data, "__arrow_c_array__"):
        try:
            batch = pa.record_batch(data)
        except (pa.ArrowException, TypeError) as error:
            raise SchemaError(f"{_kind_of(data)} is not a table of columns: {error}") from error
        yield _memory_unit(batch, config)
    else:
        raise SchemaError(
            f"{_kind_of(data)} cannot be read; give an Arrow table, batch or reader, a polars, pandas or duckdb frame, "
            "a dict of arrays, a path or a list of paths"
        )


def _kind_of(data: Any) -> str:
    return f"{type(data).__module__}.{type(data).__qualname__}"


def _table_of(data: Mapping[Any, Any]) -> Any:
    arrays: dict[str, Any] = {}
    for name, values in data.items():
        if isinstance(values, str | bytes):
            raise SchemaError(f"column {str(name)!r} is one value, {values!r}; give a list or an array of one value per row")
        try:
            if isinstance(values, pa.Array | pa.ChunkedArray):
                arrays[str(name)] = values
            elif hasattr(values, "__arrow_c_stream__"):
                arrays[str(name)] = pa.chunked_array(values)
            else:
                arrays[str(name)] = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise SchemaError(f"column {str(name)!r} cannot be an Arrow array: {error}; give values of one type") from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"columns must have equal lengths, found {lengths}")
    return pa.table(arrays)


def _memory_unit(data: Any, config: Config) -> list[Any]:
    _check_schema(data.schema, config, "")
    batches = data.to_batches() if isinstance(data, pa.Table) else [data]
    return [piece for batch in batches for piece in _pieces(batch)] or [_empty(data.schema)]


def _stream_units(reader: Any, config: Config) -> Iterator[list[Any]]:
    _check_schema(reader.schema, config, "")
    for batch in reader:
        yield _pieces(batch)


def _pieces(batch: Any) -> list[Any]:
    if batch.num_rows <= PIECE_ROWS:
        return [batch]
    return [batch.slice(row, PIECE_ROWS) for row in range(0, batch.num_rows, PIECE_ROWS)]


def _empty(schema: Any) -> Any:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


# --------------------------------------------------------------------------------------------------
# Files


def _files_of(path: Any) -> list[str]:
    """The files that a path, a folder, a glob or "-" names."""
    name = os.fsdecode(path)
    if name == "-" or os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        names = (file for file in sorted(os.listdir(name)) if file[0] not in "._" and _suffixes(file)[0])
        files = [file for file in (os.path.join(name, file) for file in names) if os.path.isfile(file)]
        if not files:
            raise SchemaError(f"folder {name!r} has no data files; wanted files that end in {_SUPPORTED}")
        return files
    if os.path.exists(name):  # a named pipe or a device: readable once, from its start
        return [name]
    if glob.has_magic(name):
        files = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        if not files:
            raise SchemaError(f"no file matches {name!r}; check the pattern and the folder it starts from ({os.getcwd()})")
        return files
    folder = os.path.dirname(name) or "."
    near = difflib.get_close_matches(os.path.basename(name), os.listdir(folder) if os.path.isdir(folder) else [], n=1)
    guess = f"; did you mean {os.path.join(os.path.dirname(name), near[0])!r}?" if near else "; check the path"
    raise SchemaError(f"file {name!r} does not exist{guess}")


def _suffixes(name: str) -> tuple[str | None, str | None]:
    """Format and compression by the end of a file's name."""
    stem, last = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(last)
    if compression:
        last = os.path.splitext(stem)[1]
    return _FORMATS.get(last), compression


def _read_files(files: list[str], config: Config) -> Iterator[list[Any]]:
    for file in files:
        yield from _file_units(file, config)


def _file_units(file: str, config: Config) -> Iterator[list[Any]]:
    name = "standard input" if file == "-" else file
    rows = 0
    timed = False
    try:
        if file == "-":
            schema, batches = _open_pipe(sys.stdin.buffer, config, name)
        elif os.path.isfile(file):
            schema, batches = _open_file(file, config)
        else:
            schema, batches = _open_pipe(open(file, "rb"), config, name)  # noqa: SIM115 (closed by the stream around it)
        _check_schema(schema, config, f"{name}: ")
        empty = True
        for batch in batches:
            if not timed:
                timed = _check_text_times(batch, config, name)
            rows += batch.num_rows
            empty = False
            yield _pieces(batch)
        if empty:  # its columns are still worth knowing
            yield [_empty(schema)]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise SchemaError(_damage(name, rows, error)) from error


def _damage(name: str, rows: int, error: Exception) -> str:
    text = str(error).strip()
    width = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", text, re.DOTALL)
    if width:
        row, wanted, found, line = width.groups()
        return f"{name}: row {row} has {found} values, wanted {wanted}: {line[:200]!r}; correct that row or quote its commas"
    if "straddling object" in text:
        return f"{name}: a row after row {rows:,} is longer than {_BLOCK_BYTES:,} bytes; is a quote left open?"
    return f"{name} is damaged or not what its name says; {rows:,} rows were read before: {text}; write it again or leave it out"


def _check_text_times(batch: Any, config: Config, name: str) -> bool:
    """False if the batch has no time to look at. A text file whose times are all integers needs a unit like any other."""
    place = batch.schema.get_field_index(config.timestamp)
    column = batch.column(place)
    if column.null_count == len(column):
        return False
    if config.time_unit is None and _is_text(batch.schema.field(place)):
        present = column.drop_null()
        if _matches(present, _INTEGER).all():
            raise SchemaError(
                f"{name}: column {config.timestamp!r} holds integers such as {present[0].as_py()!r}, which have no unit; "
                "say which with time_unit='s', 'ms', 'us' or 'ns'"
            )
    return True


def _open_file(file: str, config: Config) -> tuple[Any, Iterator[Any]]:
    kind, compression = _suffixes(file)
    if os.path.getsize(file) == 0:
        raise SchemaError(f"{file} is empty (0 bytes); write it again or leave it out")
    if kind in ("Parquet", "Arrow") and compression:
        raise SchemaError(f"{file} is a compressed {kind} file; decompress it first ({kind} has compression of its own)")
    if kind is None:
        with open(file, "rb") as stream:
            magic = stream.read(8)
        kind = "Parquet" if magic.startswith(b"PAR1") else "Arrow" if magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")) else None
        if kind is None:
            raise SchemaError(f"{file}: its format cannot be told from its name; rename it to end in {_SUPPORTED}")
    if kind == "Parquet":
        return _open_parquet(file)
    if kind == "Arrow":
        return _open_arrow(file)
    stream = pa.input_stream(file, compression=compression)
    return (_open_csv if kind == "CSV" else _open_ndjson)(_Replay.of(b"", stream), config, file)


def _open_parquet(file: str) -> tuple[Any, Iterator[Any]]:
    # A buffered stream reads a row group page by page; without it a whole row group would be in memory.
    parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)

    def batches() -> Iterator[Any]:
        with parquet:
            yield from parquet.iter_batches(batch_size=PIECE_ROWS)

    return parquet.schema_arrow, batches()


def _open_arrow(file: str) -> tuple[Any, Iterator[Any]]:
    source = pa.OSFile(file, "rb")
    magic = source.read(8)
    source.seek(0)
    if not magic.startswith(b"ARROW1"):
        return _arrow_stream(source)
    reader = pa.ipc.open_file(source)

    def batches() -> Iterator[Any]:
        with source:
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                batch.validate(full=True)  # what follows, here and at the user's, reads offsets and indices unchecked
                yield batch

    return reader.schema, batches()


def _arrow_stream(source: Any) -> tuple[Any, Iterator[Any]]:
    reader = pa.ipc.open_stream(source)

    def batches() -> Iterator[Any]:
        with source:
            for batch in reader:
                batch.validate(full=True)
                yield batch

    return reader.schema, batches()


class _Replay(io.RawIOBase):
    """A stream whose first bytes were read already, in front of the rest of it."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head = head
        self._rest = rest
        # What a pipe holds now, where the stream can tell: rows are not to wait for a full buffer.
        self._read = getattr(rest, "read1", rest.read)

    @classmethod
    def of(cls, head: bytes, rest: Any) -> io.BufferedReader:
        return io.BufferedReader(cls(head, rest), 2**18)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        part = self._head[:size] if self._head else self._read(size)
        self._head = self._head[size:]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if not self.closed and self._rest is not sys.stdin.buffer:
            self._rest.close()
        super().close()


def _open_pipe(stream: Any, config: Config, name: str) -> tuple[Any, Iterator[Any]]:
    """What can be read only once and from its start: the format is told by the first bytes."""
    head = stream.read(8)
    for magic, compression in _COMPRESSION_MAGIC.items():
        if head.startswith(magic):
            stream = pa.CompressedInputStream(pa.PythonFile(_Replay.of(head, stream), "r"), compression)
            head = stream.read(8)
            break
    if not head:
        raise SchemaError(f"{name} is empty; write Arrow IPC, NDJSON or CSV into it")
    if head.startswith(b"PAR1"):
        raise SchemaError(f"{name} is a Parquet file, which cannot be read from a pipe; give the path of the file")
    if head.startswith(b"ARROW1"):
        # The file format is the stream format between eight bytes of magic and a footer.
        return _arrow_stream(pa.PythonFile(_Replay.of(b"", stream), "r"))
    source = _Replay.of(head, stream)
    if head.startswith(b"\xff\xff\xff\xff"):
        return _arrow_stream(pa.PythonFile(source, "r"))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return (_open_ndjson if text[:1] in (b"{", b"[") else _open_csv)(source, config, name)


def _open_csv(source: io.BufferedReader, config: Config, name: str) -> tuple[Any, Iterator[Any]]:
    """All columns are strings: a CSV file has no types, and what was not guessed cannot change from block to block."""
    header = source.readline(_LINE_BYTES_MAX)
    while header.count(b'"') % 2 and (line := source.readline(_LINE_BYTES_MAX)):
        header += line
    names = next(csv.reader(io.StringIO(header.decode("utf-8-sig"), newline="")), [])
    reader = pa_csv.open_csv(
        pa.PythonFile(_Replay.of(header, source), "r"),
        # Without threads, Arrow can tell the number of a row that is too short or too long.
        read_options=pa_csv.ReadOptions(block_size=max(_BLOCK_BYTES, 2 * len(header)), use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    schema = _marked(reader.schema, config)

    def batches() -> Iterator[Any]:
        with source:
            for batch in reader:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    return schema, batches()


def _marked(schema: Any, config: Config) -> Any:
    for place, field in enumerate(schema):
        if field.name in (config.amount, config.timestamp) and pa.types.is_string(field.type):
            schema = schema.set(place, field.with_metadata(_TEXT_MARK))
    return schema


def _open_ndjson(source: io.BufferedReader, config: Config, name: str) -> tuple[Any, Iterator[Any]]:
    """Blocks of whole lines, with the types of the first block for all of them.

    Arrow's JSON reader has no type that takes both numbers and strings and keeps what is written. So numbers
    under the names of the amount and the time are put into quotes first, and parsed as the texts of a CSV file are:
    exactly, and one malformed value costs one row. (A colon behind a quoted name makes it the name of a member;
    the same name inside a nested object is quoted too.)
    """
    number = rb"\s*:\s*)(-?(?:[0-9][0-9.eE+-]*|NaN|Inf(?:inity)?))(?=[\s,}])"
    keys = b"|".join(re.escape(json.dumps(key, ensure_ascii=False).encode()) for key in (config.amount, config.timestamp))
    unquoted = re.compile(rb"(?<!\\)((?:" + keys + rb")" + number)
    blocks = (unquoted.sub(rb'\1"\2"', block) for block in _line_blocks(source, name))
    first = next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
    if not first:
        raise SchemaError(f"{name} has no rows; wanted one JSON object per line")
    if first.lstrip()[:1] == b"[":
        raise SchemaError(f"{name} is a JSON array; wanted one JSON object per line (jq -c '.[]' makes that of it)")
    schema = _ndjson_schema(first, config)

    def batches() -> Iterator[Any]:
        rows = 0
        block: bytes | None = first
        with source:
            while block is not None:
                table = _parse_ndjson(block, schema, rows)
                rows += table.num_rows
                for batch in table.combine_chunks().to_batches():
                    yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)  # the reader drops the metadata
                block = next(blocks, None)

    return schema, batches()


def _parse_ndjson(block: bytes, schema: Any, rows: int) -> Any:
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore")
    try:
        return pa_json.read_json(
            pa.BufferReader(block), read_options=pa_json.ReadOptions(block_size=len(block) + 1, use_threads=False), parse_options=options
        )
    except pa.ArrowInvalid as error:
        # Arrow counts the rows of a block from 0; people count those of a file from 1.
        raise pa.ArrowInvalid(re.sub(r"in row (\d+)", lambda found: f"in row {rows + int(found[1]) + 1}", str(error))) from error


def _ndjson_schema(block: bytes, config: Config) -> Any:
    schema = _parse_ndjson(block, None, 0).schema
    for place, field in enumerate(schema):
        kind = field.type
        if pa.types.is_timestamp(kind) or (pa.types.is_null(kind) and field.name != config.user_id):
            kind = pa.string()  # Arrow guesses times; and a member that is null so far may still become a text
        if field.name == config.user_id and pa.types.is_floating(kind):
            kind = pa.uint64()  # what Arrow makes of integers beyond int64; true floats will not parse
        if field.name == config.user_id and pa.types.is_null(kind):
            kind = pa.string()
        schema = schema.set(place, field.with_type(kind))
    return _marked(schema, config)


def _line_blocks(source: io.BufferedReader, name: str) -> Iterator[bytes]:
    """Blocks of whole lines that are not blank, of about `_BLOCK_BYTES`."""
    rest = b""
    while part := source.read(_BLOCK_BYTES):
        end = part.rfind(b"\n") + 1
        if end:
            block, rest = rest + part[:end], part[end:]
            if block.strip():
                yield block
        else:
            rest += part
            if len(rest) > _LINE_BYTES_MAX:
                raise SchemaError(f"{name} has a line of more than {_LINE_BYTES_MAX:,} bytes; wanted one JSON object per line")
    if rest.strip():
        yield rest + b"\n"
