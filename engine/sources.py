"""Where transactions come from: files, frames and streams in, record batches of a bounded size out.

`read` takes every source that the engine accepts and checks its columns before the first batch comes. It converts nothing
but text files, whose fields stay text until `columns_of` parses them; a stream is read only as far as it is asked for.

Limits: a line of a text file is at most 64 MiB.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import os
import re
import sys
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from engine.arrays import check_whole, matches
from engine.columns import check_schema, is_text
from engine.config import Config
from engine.errors import SchemaError
from engine.ndjson import guessed_schema, marked, parsed, quoting
from engine.texts import INTEGER

#: Rows handed to the engine at a time. With 65,536, four threads on two cores spend a fifth of their time on waiting for each other.
PIECE_ROWS: Final = 2**18

#: Pieces of a Parquet file that are decoded while others are worked on.
_AHEAD_PIECES: Final = 2

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


def read(data: Any, config: Config) -> Generator[list[Any], None, None]:
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
        yield from _read_files(files_of(data), config)
    elif isinstance(data, list | tuple):
        if not data or not all(isinstance(path, str | os.PathLike) for path in data):
            raise SchemaError("a list of transactions must be a non-empty list of paths; give a dict of columns, a table or a frame")
        yield from _read_files([file for path in data for file in files_of(path)], config)
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
    check_schema(data.schema, config, "")
    batches = data.to_batches() if isinstance(data, pa.Table) else [data]
    for batch in batches:
        check_whole(batch, "the data")
    return [piece for batch in batches for piece in _pieces(batch)] or [_empty(data.schema)]


def _stream_units(reader: Any, config: Config) -> Iterator[list[Any]]:
    check_schema(reader.schema, config, "")
    rows = 0
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise SchemaError(_damage("the stream", rows, error)) from error
        check_whole(batch, f"the batch after row {rows:,}")
        rows += batch.num_rows
        yield _pieces(batch)


def _pieces(batch: Any) -> list[Any]:
    if batch.num_rows <= PIECE_ROWS:
        return [batch]
    return [batch.slice(row, PIECE_ROWS) for row in range(0, batch.num_rows, PIECE_ROWS)]


def _empty(schema: Any) -> Any:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


# --------------------------------------------------------------------------------------------------
# Files


def files_of(path: Any) -> list[str]:
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
        check_schema(schema, config, f"{name}: ")
        empty = True
        for batch in batches:
            batch.validate(full=True)  # what follows, here and at the user's, reads offsets, indices and UTF-8 unchecked
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
    if config.time_unit is None and is_text(batch.schema.field(place)):
        present = column.drop_null()
        if matches(present, INTEGER).all():
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
            # One thread decodes all columns: what Arrow gains by a thread per column costs others the processor.
            yield from _ahead(parquet.iter_batches(batch_size=PIECE_ROWS, use_threads=False))

    return parquet.schema_arrow, batches()


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a thread of its own fetches the next few while one is worked on.

    What `batches` raises is raised in its turn. Nothing is fetched any more when this is exhausted or closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="riskring-read")
    fetching, ended = Lock(), False

    def fetch() -> Any:
        with fetching:
            return None if ended else next(batches, None)

    try:
        fetched = deque(pool.submit(fetch) for _ in range(_AHEAD_PIECES))
        while (batch := fetched.popleft().result()) is not None:
            fetched.append(pool.submit(fetch))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
        with fetching:  # `shutdown` does not know a thread whose start was interrupted, by Ctrl-C say
            ended = True


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
                yield reader.get_batch(index)

    return reader.schema, batches()


def _arrow_stream(source: Any) -> tuple[Any, Iterator[Any]]:
    reader = pa.ipc.open_stream(source)

    def batches() -> Iterator[Any]:
        with source:
            yield from reader

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
    schema = marked(reader.schema, config)

    def batches() -> Iterator[Any]:
        with source:
            for batch in reader:
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    return schema, batches()


def _open_ndjson(source: io.BufferedReader, config: Config, name: str) -> tuple[Any, Iterator[Any]]:
    """Blocks of whole lines, with the types of the first block for all of them."""
    blocks = map(quoting(config), _line_blocks(source, name))
    first = next(blocks, b"").removeprefix(b"\xef\xbb\xbf")
    if not first:
        raise SchemaError(f"{name} has no rows; wanted one JSON object per line")
    if first.lstrip()[:1] == b"[":
        raise SchemaError(f"{name} is a JSON array; wanted one JSON object per line (jq -c '.[]' makes that of it)")
    schema = guessed_schema(first, config)

    def batches() -> Iterator[Any]:
        rows = 0
        block: bytes | None = first
        with source:
            while block is not None:
                table = parsed(block, schema, rows)
                rows += table.num_rows
                for batch in table.combine_chunks().to_batches():
                    yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)  # the reader drops the metadata
                block = next(blocks, None)

    return schema, batches()


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
