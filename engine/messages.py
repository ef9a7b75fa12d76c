"""Messages of a topic as rows, and rows as messages. No broker here: bytes in, tables out, and the other way round.

    arrow   one Arrow IPC stream, not compressed: record batches with the three columns, of any plain type that the engine takes; begins
            with 0xFF. Amounts and times are texts, to be read as those of a CSV file, where the field's metadata says `riskring: text`
    json    one JSON object, one row; begins with {

A message is taken whole or not at all, and what becomes of it depends on nothing but its own bytes and the kind of ids that is expected:
not on the messages that it happened to come with. Bytes come from anywhere: sizes are bounded before memory is taken, types are
those of a short list, and everything is looked through (`validate`) before a kernel reads it unchecked.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.columns import check_schema, ids_of
from engine.config import Config
from engine.errors import SchemaError
from engine.ndjson import marked, parsed, quoting
from engine.outputs import json_lines

#: Why a message is not taken: its bytes make no sense; its columns or types cannot be used; it is larger than the limits.
UNDECODABLE: Final = "undecodable"
WRONG_SCHEMA: Final = "wrong_schema"
TOO_LARGE: Final = "too_large"

#: Columns that `decode` adds: the offset of a row's message, and its place in that.
OFFSET: Final = "_offset"
ROW: Final = "_row"

#: The most bytes and rows of a message, and bytes of one object: its parts take some fifty times as much when Python reads it.
_BYTES_MAX: Final = 64 << 20
_ROWS_MAX: Final = 1 << 22
_OBJECT_BYTES_MAX: Final = 4 << 20

#: Between JSON messages. Each begins with a brace, so what one leaves open meets `{}` and then `{`, which no JSON allows.
_BETWEEN: Final = b"\n{}\n"

#: Digits of decimals, by their bits. Arrow takes any scale, and cannot even say what a value is if it has more places than digits.
_DIGITS_MAX: Final = {32: 9, 64: 18, 128: 38, 256: 76}

#: Batches of fewer rows than this, on average, are copied into one.
_FEW_ROWS: Final = 4096

#: So many JSON messages are parsed together, and so many where some of these are not in order.
_TOGETHER: Final = 1 << 14
_FEW: Final = 1 << 7

#: What ids of JSON messages can be, in the order in which it is tried.
_IDS: Final = {"string": pa.string(), "int64": pa.int64(), "uint64": pa.uint64()}


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of messages that follow each other in the log and have ids of one kind.

    Attributes:
        table: Arrow table of the user id, amount and timestamp, OFFSET (int64) and ROW (int32).
        kind: Kind of the ids.
        arrival_ns: (rows,) int64, when each row's message arrived.
    """

    table: Any
    kind: str
    arrival_ns: NDArray[np.int64]


class Decoded(NamedTuple):
    """What messages hold.

    Attributes:
        runs: Rows, in the order of the log.
        dead: (offset, reason, text) of each message that was not taken, in the order of the log.
    """

    runs: list[Run]
    dead: list[tuple[int, str, str]]


def decode(
    values: Sequence[bytes | None], offsets: NDArray[np.int64], arrival_ns: NDArray[np.int64], config: Config, kind: str | None
) -> Decoded:
    """Rows of messages.

    Args:
        values: (n,) their bytes; None for those without any.
        offsets: (n,) int64, rising.
        arrival_ns: (n,) int64, when each arrived.
        config: Names of the columns, and `time_unit`.
        kind: Kind of ids that is to be expected, if it is known. JSON integers from 0 on are uint64 where that is expected, else those of
            int64 are int64; and a JSON message without an id is of the kind that is expected, else "string".

    Returns:
        Decoded: each message is in a run, or dead.

    Cost: Arrow messages some 20 us each and what validating strings takes; JSON messages some 400 ns each, ten times that for each one
    that is dead.
    """
    found: list[_Rows] = []
    dead: list[tuple[int, str, str]] = []
    messages = _Json(values, config, kind)
    for is_json, group in groupby(range(len(values)), lambda place: (values[place] or b"")[:1] == b"{"):
        places = list(group)
        for rows in messages.rows(places) if is_json else _arrow_rows(values, places, config):
            if isinstance(rows, _MessageError):
                dead.append((int(offsets[rows.place]), rows.reason, str(rows)))
            else:
                found.append(rows)
    alike = groupby(found, lambda rows: (rows.kind, rows.batches[0].schema))
    return Decoded([_run(kind, list(group), offsets, arrival_ns) for (kind, _), group in alike], dead)


class _Rows(NamedTuple):
    """Rows of some messages: of each message at `places` the next `counts`; None: one."""

    kind: str
    batches: list[Any]
    places: list[int]
    counts: list[int] | None


class _MessageError(Exception):
    """A message cannot be taken."""

    def __init__(self, reason: str, text: object) -> None:
        super().__init__(str(text))
        self.place, self.reason = -1, reason


def _run(kind: str, parts: list[_Rows], offsets: NDArray[np.int64], arrival_ns: NDArray[np.int64]) -> Run:
    places = np.concatenate([np.array(part.places) for part in parts])
    rows = np.zeros(len(places), np.int32)
    table = pa.Table.from_batches([batch for part in parts for batch in part.batches])
    if any(part.counts is not None for part in parts):
        counts = np.concatenate([np.ones(len(part.places), np.int64) if part.counts is None else np.array(part.counts) for part in parts])
        ends = np.cumsum(counts)
        rows = (np.arange(len(table)) - np.repeat(ends - counts, counts)).astype(np.int32)
        places = np.repeat(places, counts)
    if len(table) < _FEW_ROWS * table[0].num_chunks:
        table = table.combine_chunks()
    table = table.append_column(OFFSET, pa.array(offsets[places])).append_column(ROW, pa.array(rows))
    return Run(table, kind, arrival_ns[places])


# ---- JSON ------------------------------------------------------------------------------------------------------------------------


class _Json:
    """Messages that begin with a brace: together by Arrow's parser where all of them are in order, else one by one by Python's.

    What Arrow's takes Python's takes too, with the same values, so that it does not matter which of them has read a message.
    """

    def __init__(self, values: Sequence[bytes | None], config: Config, kind: str | None) -> None:
        self._values, self._config, self._kind = values, config, kind
        self._quoted = quoting(config)

    def rows(self, places: list[int]) -> Iterator[_Rows | _MessageError]:
        for together in _chunks(places, _TOGETHER):
            batch = self._together(together)
            if batch is not None:
                yield batch
                continue
            for few in _chunks(together, _FEW):
                batch = self._together(few) if len(few) < len(together) else None
                if batch is not None:
                    yield batch
                else:
                    yield from self._one_by_one(few)

    def _together(self, places: list[int]) -> _Rows | None:
        """A row of each message; None if any of them is not one object with an id of this kind, or might not be when it is alone."""
        values = [self._values[place] or b"" for place in places]
        if self._kind in _IDS:
            return self._parsed(values, places, self._kind)
        kind = self._kind_of_first(values[0])
        rows = self._parsed(values, places, kind)
        # Where no kind of JSON is expected, a small integer is none of uint64, and no id is none of the first message's kind.
        is_sure = rows is not None and kind != "uint64" and rows.batches[0].column(0).null_count == 0
        return rows if is_sure else None

    def _parsed(self, values: list[bytes], places: list[int], kind: str) -> _Rows | None:
        config = self._config
        schema = pa.schema([(config.user_id, _IDS[kind]), (config.amount, pa.string()), (config.timestamp, pa.string())])
        block = _BETWEEN.join([*values, b""])
        too_large = len(block) > _BYTES_MAX or max(map(len, values)) > _OBJECT_BYTES_MAX
        if too_large or ((b"NaN" in block or b"Inf" in block) and _NOT_PYTHONS.search(block)):
            return None
        try:
            str(block, "utf-8")  # also of members that are left out
            table = parsed(self._quoted(block), schema, 0).combine_chunks()
        except (pa.ArrowException, UnicodeError):
            return None
        if len(table) != 2 * len(places):
            return None
        batch = table.take(np.arange(0, len(table), 2)).combine_chunks().to_batches()[0]
        return _Rows(kind, [pa.RecordBatch.from_arrays(batch.columns, schema=marked(schema, config))], places, None)

    def _kind_of_first(self, value: bytes) -> str:
        try:
            return self._row(value)[0] or "string"
        except _MessageError:
            return "string"

    def _one_by_one(self, places: list[int]) -> Iterator[_Rows | _MessageError]:
        read: list[tuple[int, str, tuple[Any, str | None, str | None]]] = []
        for place in places:
            try:
                kind, row = self._row(self._values[place] or b"")
            except _MessageError as error:
                error.place = place
                yield error
            else:
                read.append((place, kind or self._kind or "string", row))
        for kind, group in groupby(read, lambda each: each[1]):
            mine = list(group)
            columns = zip(*(row for _, _, row in mine), strict=True)
            config, types = self._config, (_IDS.get(kind, pa.string()), pa.string(), pa.string())
            names = (config.user_id, config.amount, config.timestamp)
            schema = marked(pa.schema(list(zip(names, types, strict=True))), config)
            arrays = [pa.array(column, each) for column, each in zip(columns, types, strict=True)]
            yield _Rows(kind, [pa.RecordBatch.from_arrays(arrays, schema=schema)], [place for place, _, _ in mine], None)

    def _row(self, value: bytes) -> tuple[str | None, tuple[Any, str | None, str | None]]:
        """The kind of a message's id, None if it is null, and the row."""
        if len(value) > _OBJECT_BYTES_MAX:
            raise _MessageError(TOO_LARGE, f"{len(value):,} bytes, more than {_OBJECT_BYTES_MAX:,}")
        config = self._config
        try:
            members = _LOADER.decode(str(self._quoted(value), "utf-8"))
        except ValueError as error:
            raise _MessageError(UNDECODABLE, error) from None
        except RecursionError:  # then what the other parser says, to which depth is nothing
            for kind in sorted(_IDS, key=lambda each: each != self._kind):
                alone = self._parsed([value], [0], kind)
                if alone is not None:
                    return kind, tuple(alone.batches[0].to_pylist()[0].values())
            raise _MessageError(UNDECODABLE, "it is nested too deeply, and not in order") from None
        names = (config.user_id, config.amount, config.timestamp)
        found = [[member for name, member in members if name == wanted] for wanted in names]
        if any(len(each) > 1 for each in found):
            raise _MessageError(WRONG_SCHEMA, f"a member is there twice, of {', '.join(names)}")
        user_id, amount, time = (each[0] if each else None for each in found)
        for name, member in ((config.amount, amount), (config.timestamp, time)):
            if not isinstance(member, str | None):
                raise _MessageError(WRONG_SCHEMA, f"{name!r} is {_shown(member)}, wanted a number or a string")
        texts = (_text(amount), _text(time))
        if isinstance(user_id, _Number):
            number = int(user_id) if _INTEGER.fullmatch(user_id) else 2**64
            if not -(2**63) <= number < 2**64:
                raise _MessageError(WRONG_SCHEMA, f"{config.user_id!r} is {_shown(user_id)}, wanted a string or an integer of 64 bits")
            kind = "uint64" if number >= 2**63 or (self._kind == "uint64" and number >= 0) else "int64"
            return kind, (number, *texts)
        if not isinstance(user_id, str | None):
            raise _MessageError(WRONG_SCHEMA, f"{config.user_id!r} is {_shown(user_id)}, wanted a string or an integer")
        return None if user_id is None else "string", (_text(user_id), *texts)


#: Numbers that only Arrow's parser takes, and members that look like them.
_NOT_PYTHONS: Final = re.compile(rb"[:\[,\s]-?(?:NaN|Inf)")


class _Number(str):
    """A number as it was written."""

    __slots__ = ()


#: Members as pairs, so that those that are there twice are seen; numbers as they are written.
_LOADER: Final = json.JSONDecoder(object_pairs_hook=tuple, parse_float=_Number, parse_int=_Number, parse_constant=_Number)
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}")


def _text(member: str | None) -> str | None:
    try:
        return None if member is None else str(member.encode(), "utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise _MessageError(UNDECODABLE, error) from None


def _shown(member: object) -> str:
    text = repr(member)
    return text if len(text) <= 200 else text[:200] + "..."


def _chunks(places: list[int], count: int) -> Iterator[list[int]]:
    return (places[first : first + count] for first in range(0, len(places), count))


# ---- Arrow -----------------------------------------------------------------------------------------------------------------------


def _arrow_rows(values: Sequence[bytes | None], places: list[int], config: Config) -> Iterator[_Rows | _MessageError]:
    """Rows of messages that are Arrow streams; all others are dead."""
    for place in places:
        value = values[place]
        try:
            if not value or value[:1] != b"\xff":
                raise _MessageError(UNDECODABLE, "it begins neither with 0xFF, as an Arrow stream does, nor with {, as a JSON object does")
            rows = _arrow_message(value, place, config)
            if rows is not None:
                yield rows
        except _MessageError as error:
            error.place = place
            yield error


def _arrow_message(value: bytes, place: int, config: Config) -> _Rows | None:
    def chosen(found: Any) -> tuple[Sequence[int], Any]:
        wanted = check_schema(found, config, "")
        return wanted, marked(_plain_schema(found, wanted), config)

    try:
        batches = _read_arrow(value, chosen)
    except SchemaError as error:
        raise _MessageError(WRONG_SCHEMA, error) from None
    rows = sum(batch.num_rows for batch in batches)
    return _Rows(_kind_of(batches[0].schema.field(0).type), batches, [place], [rows]) if rows else None


def decode_ids(value: bytes, column: str) -> Any:
    """User ids of an Arrow stream: a ChunkedArray of one of its columns, of a plain type.

    Raises:
        SchemaError: It is no such stream, lacks the column, or that has another type. What is said of `decode`'s Arrow messages holds here.

    Example:
        >>> decode_ids(encode_arrow(pa.record_batch({"user_id": [7, 8]})), "user_id").to_pylist()
        [7, 8]
    """

    def chosen(found: Any) -> tuple[Sequence[int], Any]:
        wanted = _one_column(found, column)
        return wanted, _plain_schema(found, wanted)

    if value[:1] != b"\xff":
        raise SchemaError("this is no Arrow IPC stream, which begins with 0xFF; nor is a file of that format one")
    try:
        batches = _read_arrow(value, chosen)
    except _MessageError as error:
        raise SchemaError(str(error)) from None
    return pa.chunked_array([batch.column(0) for batch in batches], batches[0].schema.field(0).type if batches else pa.string())


def checked_batch(batch: Any, config: Config) -> Any:
    """The user id, amount and timestamp of a record batch from anywhere, looked through.

    Raises:
        SchemaError: They are not there, or not of plain types; or what the batch says of its memory is not so.

    Example:
        >>> batch = pa.record_batch({"user_id": [7], "amount": [1.5], "timestamp": [0], "more": ["x"]})
        >>> checked_batch(batch, Config.of(time_unit="s")).num_columns
        3
    """
    wanted = check_schema(batch.schema, config, "")
    try:
        return _plain(batch, marked(_plain_schema(batch.schema, wanted), config))
    except (_MessageError, pa.ArrowException, MemoryError, UnicodeError) as error:
        raise SchemaError(str(error)) from None


def checked_ids(batch: Any, column: str) -> Any:
    """The user ids of a record batch from anywhere, looked through. Raises as `checked_batch`."""
    try:
        return _plain(batch, _plain_schema(batch.schema, _one_column(batch.schema, column))).column(0)
    except (_MessageError, pa.ArrowException, MemoryError, UnicodeError) as error:
        raise SchemaError(str(error)) from None


def _one_column(found: Any, column: str) -> Sequence[int]:
    wanted: Sequence[int] = found.get_all_field_indices(column)
    if len(wanted) != 1:
        raise SchemaError(f"column {column!r} is there {len(wanted)} times, wanted once; found columns {found.names[:20]}")
    return wanted


def _plain(batch: Any, schema: Any) -> Any:
    if batch.num_rows < 0:  # as it says itself; pyarrow reads that, and fails later
        raise _MessageError(UNDECODABLE, f"a batch of {batch.num_rows} rows")
    plain = pa.RecordBatch.from_arrays([batch.column(field.name).view(field.type) for field in schema], schema=schema)
    plain.validate(full=True)
    return plain


def _plain_schema(found: Any, wanted: Sequence[int]) -> Any:
    for index in wanted:
        _check_type(found.field(index))
    return pa.schema([(found.field(index).name, _in_utc(found.field(index).type)) for index in wanted])


def _read_arrow(value: bytes, chosen: Callable[[Any], tuple[Sequence[int], Any]]) -> list[Any]:
    """Batches of a stream from anywhere: those columns, as that schema, that are chosen when its own schema is seen."""
    if len(value) > _BYTES_MAX:
        raise _MessageError(TOO_LARGE, f"{len(value):,} bytes, more than {_BYTES_MAX:,}")
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(value)):
            if _is_compressed(message.metadata):
                raise _MessageError(
                    WRONG_SCHEMA, "its buffers are compressed; send them as they are, and let Kafka compress messages (compression.type)"
                )
        wanted, schema = chosen(pa.ipc.open_stream(pa.py_buffer(value)).schema)
        # Other columns are not even read: dictionaries that grow from batch to batch take time and memory by the square of the bytes.
        options = pa.ipc.IpcReadOptions(included_fields=sorted(wanted))
        batches, rows = [], 0
        for batch in pa.ipc.open_stream(pa.py_buffer(value), options=options):
            rows += batch.num_rows
            if rows > _ROWS_MAX:
                raise _MessageError(TOO_LARGE, f"more than {_ROWS_MAX:,} rows")
            batches.append(_plain(batch, schema))
    except SchemaError:
        raise
    except (pa.ArrowException, OSError, MemoryError, UnicodeError, struct.error, IndexError) as error:
        raise _MessageError(UNDECODABLE, error) from None
    return batches


def _check_type(field: Any) -> None:
    """Types whose values are no larger than their bytes: with dictionaries and views a small message can hold a huge column."""
    kind = field.type
    if pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType) or str(kind).endswith("_view") or pa.types.is_null(kind):
        plain = "integers, decimals, floats, timestamps, strings or binary"
        raise _MessageError(WRONG_SCHEMA, f"column {field.name!r} is {kind}; send plain {plain}")
    most = _DIGITS_MAX[kind.bit_width] if pa.types.is_decimal(kind) else 0
    if most and not -most <= kind.scale <= most:
        raise _MessageError(
            WRONG_SCHEMA, f"column {field.name!r} is {kind}; send decimals of this width with a scale from -{most} to {most}"
        )


def _in_utc(kind: Any) -> Any:
    """The type with which times say the same instants, but not the name of their zone, which can be anything."""
    return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) else kind


def _kind_of(kind: Any) -> str:
    if pa.types.is_integer(kind):
        return "uint64" if pa.types.is_uint64(kind) else "int64"
    return "string" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else "binary"


def _is_compressed(metadata: Any) -> bool:
    """Whether the header of a message says that its buffers are compressed: table `Message`, its `header`, that one's `compression`.

    Reading such a message takes as much memory as it says, whatever its size.
    """
    data = metadata.to_pybytes()
    message = struct.unpack_from("<I", data)[0]
    kind, header = _field(data, message, 1), _field(data, message, 2)
    if not kind or not header or data[kind] not in (_DICTIONARY, _RECORD_BATCH):
        return False
    batch = _table(data, header)
    if data[kind] == _DICTIONARY:  # which has a record batch in it
        inner = _field(data, batch, 1)
        batch = _table(data, inner) if inner else 0
    return batch != 0 and _field(data, batch, 3) != 0


#: Types of a message's header, in Arrow's `Message.fbs`.
_DICTIONARY: Final = 2
_RECORD_BATCH: Final = 3


def _table(data: bytes, place: int) -> int:
    """Where the flatbuffers table lies to which a field points."""
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffers table lies; 0 if it is not there."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise struct.error("a table points before the message")
    slot = 4 + 2 * number
    place = struct.unpack_from("<H", data, vtable + slot)[0] if slot < struct.unpack_from("<H", data, vtable)[0] else 0
    if place and table + place >= len(data):
        raise struct.error("a table points behind the message")
    return table + place if place else 0


# ---- rows to messages ------------------------------------------------------------------------------------------------------------


def encode_arrow(batch: Any) -> bytes:
    """An Arrow stream of a batch, not compressed.

    Example:
        >>> encode_arrow(pa.record_batch({"user_id": [1]}))[:4].hex()
        'ffffffff'
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch) if isinstance(batch, pa.RecordBatch) else writer.write_table(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def arrow_messages(table: Any, rows_max: int, bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """Arrow streams of a table, in order: of so many rows at most, and of fewer where they would be too large.

    Yields:
        Rows of the message, and its bytes. A row that is too large alone is a message all the same.
    """
    for first in range(0, len(table), rows_max):
        some = table.slice(first, rows_max).combine_chunks()
        value = encode_arrow(some)
        if len(value) > bytes_max and len(some) > 1:
            yield from arrow_messages(some, -(-len(some) // 2), bytes_max)
        else:
            yield len(some), value


def encode_json(rows: Any) -> list[bytes]:
    """A JSON object of each row, with all columns; values are exact, times in UTC, bytes hexadecimal, what is not finite is null.

    Example:
        >>> encode_json(pa.table({"user_id": ["alice"], "amount": [1.5]}))
        [b'{"user_id":"alice","amount":1.5}']
        >>> encode_json(pa.table({"user_id": [b"\\xff\\0"]}))
        [b'{"user_id":"ff00"}']
    """
    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    if not len(table):
        return []
    columns = {name: _for_json(table[name].combine_chunks(), name) for name in table.column_names}
    return bytes(json_lines(pa.table(columns))).split(b"\n")[:-1]


_DIGITS: Final = np.frombuffer(b"".join(b"%02x" % value for value in range(256)), np.uint16)


def _for_json(column: Any, name: str) -> Any:
    """A column of which JSON can be made whatever is in it."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return column.view(_in_utc(kind))
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        return column
    ids = ids_of(column, name)
    first, last = int(ids.offsets[0]), int(ids.offsets[-1])
    bitmap = None if ids.valid is None else pa.py_buffer(np.packbits(ids.valid, bitorder="little"))
    buffers = [bitmap, pa.py_buffer((ids.offsets - first) * 2), pa.py_buffer(_DIGITS[ids.data[first:last]])]
    return pa.Array.from_buffers(pa.large_string(), len(ids), buffers)
