"""Batches of rows out into files: the formats, their encodings, and a file that appears only when it is complete.

Encoding costs more than many a score, so it is done by a thread of the writer's own while the next rows are worked on. Memory is bounded:
a few groups of rows wait, then `write` waits.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from engine.errors import ConfigError, SchemaError

#: Rows, and bytes of rows, that are encoded at a time: in Parquet a row group. DuckDB takes 122,880 for the least worth a thread.
GROUP_ROWS: Final = 2**18
GROUP_BYTES: Final = 2**25

#: Groups that wait for the thread before `write` waits. With the one that is encoded and the one that fills up, four are in memory.
_GROUPS_WAITING: Final = 2


class FileWriter:
    """Writes batches to one file whose suffix names the format; the file appears under its name only when complete.

    `.parquet` and `.pq`, `.arrow`, `.ipc` and `.feather` (Arrow IPC file), `.csv`, `.ndjson` and `.jsonl`; the text formats also with
    `.gz` or `.zst` behind. Everything goes to a temporary sibling, which is renamed when the `with` block ends and removed when it ends
    with an error. NDJSON has no NaN or infinity: they become null.

    Rows are encoded and written by a thread that ends with the `with` block. What goes wrong there is raised by a later
    `write`, or by `finish`.

    Args:
        path: Where to write; a file of that name is replaced.
        schema: Columns of the batches.
        distinct: Columns whose values seldom repeat. Parquet then spends no time on finding those that do.

    Raises:
        ConfigError: The suffix is none of these.
        SchemaError: A column's type cannot be written in this format.
        OSError: The folder is missing or cannot be written.

    Cost: memory of four groups of 2**18 rows or 32 MiB, whichever is less.

    Example:
        >>> import tempfile
        >>> batch = pa.record_batch({"n": [1, 2]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with FileWriter(f"{folder}/n.ndjson", batch.schema) as writer:
        ...         writer.write(batch)
        ...     Path(folder, "n.ndjson").read_text()
        '{"n":1}\\n{"n":2}\\n'
    """

    def __init__(self, path: str | os.PathLike[str], schema: Any, distinct: Collection[str] = ()) -> None:
        self.path = Path(path)
        self.schema = pa.schema([pa.field(field.name, _plain_type(field.type)) for field in schema])
        self._kind, self._compression = file_format(self.path)
        self._options = _parquet_options(self.schema, distinct) if self._kind == "parquet" else {}
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._group: list[Any] = []
        self._group_rows = self._group_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="riskring-write")
        self._waiting: deque[Future[None]] = deque()
        self._encoding = threading.Lock()  # held by the thread while it encodes a group
        self._abandoned = False
        self._stream: Any = None
        self._sink: Any = None

    def _open(self) -> None:
        # Not before there is somebody who will call `abandon`, whatever happens from here on.
        self._stream = pa.output_stream(str(self._temporary), compression=self._compression)
        try:
            if self._kind == "parquet":
                self._sink = pa.parquet.ParquetWriter(self._stream, self.schema, **self._options)
            elif self._kind == "arrow":
                self._sink = pa.ipc.new_file(self._stream, self.schema)
            elif self._kind == "csv":
                self._sink = pa.csv.CSVWriter(self._stream, self.schema)
        except pa.ArrowException as error:
            raise SchemaError(f"{self.path}: {error}") from error

    def write(self, batch: Any) -> None:
        """Add a RecordBatch or Table (columns as in the schema). It is kept until it is written, not copied."""
        if self._stream is None:
            self._open()
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        if not table.num_rows:
            return
        self._group.append(table)
        self._group_rows += table.num_rows
        self._group_bytes += table.nbytes
        if self._group_rows >= GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._hand_over()
            if len(self._waiting) > _GROUPS_WAITING:
                self._waiting.popleft().result()

    def _hand_over(self) -> None:
        self._waiting.append(self._thread.submit(self._encode, self._group))
        self._group = []
        self._group_rows = self._group_bytes = 0

    def _encode(self, group: list[Any]) -> None:
        with self._encoding:
            if self._abandoned:
                return
            try:
                table = pa.concat_tables([self._plain_table(table) for table in group])
                if self._sink is None:
                    self._stream.write(json_lines(table))
                else:
                    self._sink.write_table(table)
            except (pa.ArrowException, ValueError) as error:
                raise SchemaError(f"{self.path}: {error}") from error

    def _plain_table(self, table: Any) -> Any:
        return pa.table([_plain_column(column) for column in table.columns], names=table.column_names).cast(self.schema)

    def finish(self) -> None:
        """Write what is left, close the file and give it its name."""
        try:
            if self._stream is None:
                self._open()
            if self._group:
                self._hand_over()
            while self._waiting:
                self._waiting.popleft().result()
            self._thread.shutdown()
            if self._sink is not None:
                self._sink.close()
            self._stream.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Close and remove what was written so far."""
        try:
            self._thread.shutdown(cancel_futures=True)
            with self._encoding, contextlib.suppress(pa.ArrowException, OSError):
                # `shutdown` does not know a thread whose start was interrupted, by Ctrl-C say.
                self._abandoned = True
                if self._sink is not None:
                    self._sink.close()
                if self._stream is not None:
                    self._stream.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def _parquet_options(schema: Any, distinct: Collection[str]) -> dict[str, Any]:
    """Encodings that cost little for what they save and that readers know (BYTE_STREAM_SPLIT, which some do not, is not among them).

    bench/bench_endtoend.py has the measure: with a dictionary for all columns and zstd, as pyarrow would have it by itself, writing
    costs four times as much. Times become differences, most of which need no bits. Where values seldom repeat, a
    dictionary is looked up for nothing; and such floats shrink little for what it takes to try.
    """
    if any(pa.types.is_nested(field.type) for field in schema):  # options go by the names of leaves
        return {"compression": "zstd"}
    times = [field.name for field in schema if pa.types.is_timestamp(field.type)]
    compression = {field.name: "snappy" if pa.types.is_primitive(field.type) else "zstd" for field in schema}
    compression |= {field.name: "none" for field in schema if pa.types.is_floating(field.type) and field.name in distinct}
    return {
        "compression": compression,
        "use_dictionary": [name for name in schema.names if name not in times and name not in distinct],
        "column_encoding": dict.fromkeys(times, "DELTA_BINARY_PACKED"),
    }


_FORMATS: Final = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
}
_COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}


def file_format(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The format ("parquet", "arrow", "csv", "ndjson") and the compression of the stream that a file name asks for.

    Raises:
        ConfigError: The suffix is not known, or a binary format (which compresses by itself) is asked for as `.gz`.

    Example:
        >>> file_format("scored.csv.gz")
        ('csv', 'gzip')
    """
    name = Path(path)
    compression = _COMPRESSIONS.get(name.suffix.lower())
    kind = _FORMATS.get((name.with_suffix("") if compression else name).suffix.lower())
    if kind is None or (compression and kind in ("parquet", "arrow")):
        raise ConfigError(f"{os.fspath(path)!r} names no format; use {', '.join(_FORMATS)} (.csv and .ndjson also with .gz or .zst)")
    return kind, compression


def check_outputs(outputs: list[str], files: list[str]) -> None:
    """Find out before a run, not after it, whether its outputs can be written.

    Raises:
        ConfigError: One names no format, lies in no folder, or is one of the files to read; or two are the same.
    """
    for path in outputs:
        file_format(path)
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"{path}: the folder does not exist; make it first")
        if any(os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file) for file in files):
            raise ConfigError(f"{path}: is one of the files to read; write to another name")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise ConfigError("--output and --rejects are the same file; give two names")


def _plain_type(kind: Any) -> Any:
    """What a file holds instead of a dictionary, of which each batch may bring its own, or of views, which few formats know."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _plain_column(column: Any) -> Any:
    """A column of any type as its plain type. (Arrow casts views, but no dictionary of them.)"""
    plain = _plain_type(column.type)
    if not pa.types.is_dictionary(column.type):
        return column.cast(plain)
    return pa.chunked_array([chunk.dictionary.cast(plain).take(chunk.indices) for chunk in column.chunks], plain)


def json_lines(table: Any) -> Any:
    """One JSON object per line, as a buffer. pyarrow reads NDJSON but does not write it."""
    parts: list[Any] = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        parts += [("," if parts else "{") + _json_quoted(pa.array([name]))[0].as_py() + ":", _json_texts(column.combine_chunks())]
    lines = pc.binary_join_element_wise(*parts, "}\n", "")
    lines = lines.combine_chunks() if isinstance(lines, pa.ChunkedArray) else lines
    return pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), "")[0].as_buffer() or b""


#: Up to these scales Arrow makes texts of decimals, by their bits.
_SCALE_MAX: Final = {32: 9, 64: 18, 128: 38, 256: 76}


def _json_texts(column: Any) -> Any:
    """Each value as JSON text; "null" where there is none."""
    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
    exponent = ""
    if pa.types.is_decimal(kind) and abs(kind.scale) > _SCALE_MAX[kind.bit_width]:  # Arrow makes no text of these
        column, exponent = column.view(getattr(pa, f"decimal{kind.bit_width}")(kind.precision, 0)), f"E{-kind.scale:+}"
    text = column.cast(pa.string())
    if exponent:
        text = pc.binary_join_element_wise(text, exponent, "")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)):
        text = _json_quoted(text)
    return text.fill_null("null")


#: What JSON does not allow in a string: quote, backslash and control characters.
_JSON_ESCAPED: Final = re.compile(r'["\\\x00-\x1f]')
_JSON_SHORT: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _json_quoted(text: Any) -> Any:
    if pc.any(pc.match_substring_regex(text, _JSON_ESCAPED.pattern)).as_py():
        for character in ("\\", '"', *map(chr, range(32))):  # the backslash first: the others bring some in
            text = pc.replace_substring(text, character, _JSON_SHORT.get(character, f"\\u{ord(character):04x}"))
    return pc.binary_join_element_wise('"', text, '"', "")
