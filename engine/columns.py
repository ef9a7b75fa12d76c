"""Arrow in, checked columns out: every type and unit that the engine accepts, and the reasons to refuse a row.

`columns_of` turns a record batch into the flat int64 arrays that kernels take. It knows no clock and no users: the first
six of `REASONS`, those that a row carries in itself, are set here, the others by the engine. Where batches come from
is the business of `sources`; how a number or a text becomes an integer, of `rounding` and `texts`.

Conversions are exact: amounts are rounded to the grid once, by their exact value, and times keep every nanosecond. All of
it is vectorised or done by a kernel.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import NO_BYTES, NO_INTS, Bools, Ints, bytes_of, dtype_of, frozen, null_rows, storage_of, valid_rows, values_of
from engine.config import AMOUNT_UNITS_MAX, REASONS, TIME_NS_MAX, TIME_UNIT_NS, Config
from engine.errors import SchemaError
from engine.rounding import Converted, decimal_units, float_units, whole_units
from engine.texts import text_amounts, text_times

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

#: Field metadata of columns that `sources.read` took from a text file: only those are parsed from strings.
TEXT_MARK: Final = {b"riskring": b"text"}


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

    Cost: about 1 ns per row for int64 ids, float64 amounts on the grid and timestamps of microseconds; 2.5 ns for amounts off it.

    Example:
        >>> import pyarrow as pa
        >>> from engine.config import Config
        >>> batch = pa.record_batch({"user_id": [7], "amount": [12.5], "timestamp": pa.array([60], pa.timestamp("s"))})
        >>> columns = columns_of(batch, Config.of())
        >>> columns.amount_units, columns.time_ns
        (array([125000]), array([60000000000]))
    """
    places = check_schema(batch.schema, config, "")
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


def _amounts(array: Any, decimals: int) -> Converted:
    array = storage_of(array)
    kind = array.type
    if pa.types.is_null(kind):
        return Converted(np.zeros(len(array), np.int64), null=np.ones(len(array), np.bool_))
    if pa.types.is_string(kind):
        return text_amounts(array, decimals)
    if pa.types.is_integer(kind):
        found = whole_units(values_of(array, dtype_of(kind)), 10**decimals, AMOUNT_UNITS_MAX)
    elif pa.types.is_floating(kind):
        found = float_units(values_of(array, dtype_of(kind)), 10**decimals)
    else:
        found = decimal_units(array, decimals)
    found.null = null_rows(array)
    return found


def _times(array: Any, time_unit: str | None) -> Converted:
    array = storage_of(array)
    kind = array.type
    if pa.types.is_null(kind):
        return Converted(np.zeros(len(array), np.int64), null=np.ones(len(array), np.bool_))
    if pa.types.is_string(kind):
        return text_times(array, time_unit)
    if pa.types.is_timestamp(kind):
        found = whole_units(values_of(array, np.int64), TIME_UNIT_NS[kind.unit], TIME_NS_MAX)
    elif pa.types.is_date32(kind):
        found = whole_units(values_of(array, np.int32), 86400 * 10**9, TIME_NS_MAX)
    elif pa.types.is_date64(kind):  # milliseconds, by its definition of whole days
        found = whole_units(values_of(array, np.int64) // 86_400_000, 86400 * 10**9, TIME_NS_MAX)
    else:
        assert time_unit is not None, "the schema was checked"
        found = whole_units(values_of(array, dtype_of(kind)), TIME_UNIT_NS[time_unit], TIME_NS_MAX)
    found.null = null_rows(array)
    return found


# --------------------------------------------------------------------------------------------------
# Schema


def check_schema(schema: Any, config: Config, where: str) -> tuple[int, int, int]:
    """Places of the three columns, after checking that each exists once and has a type that can be used."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise SchemaError(f"{where}the name of a column is not UTF-8 ({error}); write the data again") from None
    places = []
    for option, wanted in (("user_id", config.user_id), ("amount", config.amount), ("timestamp", config.timestamp)):
        found = schema.get_all_field_indices(wanted)
        if not found:
            raise SchemaError(_missing(names, option, wanted, where))
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
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_decimal(kind) or pa.types.is_null(kind) or is_text(amount)):
        raise SchemaError(f"{where}column {amount.name!r} has type {amount.type}; amounts are integers, floats or decimals; cast it to one")
    kind = _storage_type(time.type)
    if pa.types.is_integer(kind):
        if config.time_unit is None:
            raise SchemaError(
                f"{where}column {time.name!r} has type {time.type}, which has no unit; say which with time_unit='s', 'ms', 'us' or 'ns'"
            )
    elif not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind) or is_text(time)):
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


def is_text(field: Any) -> bool:
    """Whether a column came from a text file, so that amounts and times are to be parsed from it."""
    return bool(pa.types.is_string(field.type)) and (field.metadata or {}).get(b"riskring") == b"text"


# --------------------------------------------------------------------------------------------------
# User ids


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
    array = storage_of(array)
    if pa.types.is_dictionary(array.type):
        array = _decoded(array, column)
    kind = array.type
    if _is_view(kind):
        array = _unviewed(array, column)
        kind = array.type
    if not _is_id_type(kind):
        raise SchemaError(f"column {column!r} has type {kind}; user ids are integers, strings, binary or a dictionary of these")
    valid = valid_rows(array)
    if valid is not None:
        valid.flags.writeable = False
    if pa.types.is_null(kind):
        return Ids("int64", frozen(np.zeros(len(array), np.int64)), NO_INTS, NO_BYTES, valid)
    if pa.types.is_integer(kind):
        values = values_of(array, dtype_of(kind))
        unsigned = pa.types.is_uint64(kind)
        values = values.view(np.int64) if unsigned else values.astype(np.int64, copy=False)
        return Ids("uint64" if unsigned else "int64", frozen(values), NO_INTS, NO_BYTES, valid)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    offsets, data = bytes_of(array, column)
    return Ids("string" if text else "binary", NO_INTS, frozen(offsets), frozen(data), valid)


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
    values = storage_of(array.dictionary)
    if _is_view(values.type):
        values = _unviewed(values, column)
    try:
        return values.take(array.indices)
    except (pa.ArrowException, IndexError) as error:
        raise SchemaError(f"column {column!r} has dictionary indices without a value: {error}; write the data again") from error


def _unviewed(array: Any, column: str) -> Any:
    valid = valid_rows(array)
    if valid is not None:  # what stands at nulls is undefined, and Arrow's cast goes where it points
        views = values_of(array, np.int64, 2).copy()
        views.reshape(-1, 2)[~valid] = 0
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
        array = pa.Array.from_buffers(array.type, len(array), [bitmap, pa.py_buffer(views), *array.buffers()[2:]])
    try:
        return array.cast(pa.large_string() if pa.types.is_string_view(array.type) else pa.large_binary())
    except pa.ArrowNotImplementedError as error:
        raise SchemaError(
            f"column {column!r} has type {array.type}, which pyarrow {pa.__version__} cannot convert; "
            "install a newer pyarrow or cast the column to string or binary"
        ) from error
