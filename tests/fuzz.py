"""Hostile bytes at the doors of the engine: Arrow data, snapshots, text files, messages of a topic, requests.

    python tests/fuzz.py columns --seconds 600
    python tests/fuzz.py snapshot --replay crash-0123abcd

An input is a program: its bytes choose something that is valid and then edits that damage it, so that any bytes are an input, and a small
change of them is a small change of what the engine reads. Atheris (libFuzzer) looks for inputs that reach new lines, where it is installed;
elsewhere, and with `--plain`, inputs are drawn from a seeded generator, which the tests do for some rounds.

What is allowed is a right answer or an error that the engine raises on purpose, after which its state is what it was before. Anything else
ends the run: another exception, a crash of the process, more resident memory than `MEMORY_MAX_MB`, or an answer that differs from the
definition in `engine.reference`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import decimal
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

try:
    import atheris
except ImportError:
    atheris = None


@contextlib.contextmanager
def _instrumented(wanted: bool) -> Iterator[None]:
    """Imports whose branches libFuzzer sees. Kernels are left alone: Numba compiles their bytecode."""
    if wanted:
        kernels = [f"engine.kernels.{file.stem}" for file in (ROOT / "engine" / "kernels").glob("*.py")]
        with atheris.instrument_imports(include=["engine"], exclude=["engine.kernels", *kernels]):
            yield
    else:
        yield


with _instrumented(__name__ == "__main__" and atheris is not None and "--plain" not in sys.argv):
    from engine import CapacityError, EngineError, RiskEngine, SchemaError, SnapshotError
    from engine.columns import TEXT_MARK, columns_of
    from engine.config import Config
    from engine.messages import arrow_messages, encode_arrow
    from engine.partition import Partition, Topic
    from engine.reference import verify
    from engine.snapshot import _sealed
    from engine.sources import read
    from tests.strategies import AMOUNT_TYPES, ID_TYPES, to_batch

#: Far above what any input needs: an engine that is made anew touches some 10 MiB.
MEMORY_MAX_MB = 3072

EDITS_MAX = 6
SECOND = 10**9
TIME_TYPES = (
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC")),
    pa.int64(),
    pa.date32(),
    pa.date64(),
)
VIEWS = int(pa.__version__.split(".")[0]) >= 18
OPTIONS = {"users": 7, "shards": 2, "max_ahead": None, "time_unit": "s"}


class Choices:
    """Decisions drawn from bytes; zeros when these are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def bytes(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        self._at += count
        return part.ljust(count, b"\0")

    def number(self, below: int) -> int:
        width = max(1, ((below - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.bytes(width), "little") % below

    def of(self, options: Any) -> Any:
        return options[self.number(len(options))]

    def whole(self) -> int:
        """A number at or near an edge, or any of 64 bits."""
        edges = (0, 1, 2, 7, 8, 127, 128, 255, 2**15, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64)
        kind = self.number(4)
        if kind == 3:
            return int.from_bytes(self.bytes(8), "little", signed=True)
        value = self.of(edges) + (-1, 0, 1)[self.number(3)]
        return -value if kind == 2 else value


def damage(choices: Choices, memory: Any, places: list[tuple[int, int]] | None = None) -> None:
    """Overwrite some of a writable array of bytes, in place; anywhere, or in one of some spans."""
    for _ in range(1 + choices.number(EDITS_MAX)):
        first, last = (0, len(memory)) if not places else choices.of(places)
        if last <= first:
            continue
        where = first + choices.number(last - first)
        kind = choices.number(4)
        if kind == 0:
            memory[where] ^= 1 << choices.number(8)
        elif kind == 1:
            memory[where] = choices.number(256)
        else:
            width = (1, 2, 4, 8)[choices.number(4)]
            where -= (where - first) % width
            value = (choices.whole() % (1 << 8 * width)).to_bytes(width, "little")[: last - where]
            memory[where : where + len(value)] = value if isinstance(memory, bytearray) else np.frombuffer(value, np.uint8)


def altered(choices: Choices, data: bytes, words: tuple[bytes, ...] = ()) -> bytes:
    """Damaged bytes that may also have another length: cut, doubled in part, or with words put in."""
    memory = bytearray(data)
    kind = choices.number(4)
    if kind == 0:
        del memory[choices.number(len(memory) + 1) :]
    elif kind == 1:
        first = choices.number(len(memory) + 1)
        part = memory[first : first + choices.number(64)]
        memory[first:first] = part * (1 + choices.number(3))
    elif kind == 2 and words:
        for _ in range(1 + choices.number(EDITS_MAX)):
            where = choices.number(len(memory) + 1)
            memory[where : where + choices.number(9)] = choices.of(words)
    if kind == 3 and memory:
        damage(choices, memory)
    return bytes(memory)


# ---- columns -----------------------------------------------------------------------------------------------------------------


def _ids(id_type: Any, count: int) -> list[Any]:
    """So many ids of a type, five of them different, one row in eight null."""
    value_type = id_type.value_type if pa.types.is_dictionary(id_type) else id_type
    if pa.types.is_integer(value_type):
        users: list[Any] = [0, 1, 7, 100, 127]
    else:
        users = ["", "a", "alice", "böb", "x" * 40] if "string" in str(value_type) else [b"", b"a", b"abcd", b"\xff\0" * 9, b"e"]
    if pa.types.is_fixed_size_binary(value_type):
        users = [user.ljust(value_type.byte_width, b"\1")[: value_type.byte_width] for user in users]
    return [None if row % 8 == 5 else users[row * row % 5] for row in range(count)]


def _amounts(amount_type: Any, count: int) -> list[Any]:
    cents = [125, -50, 100, 0, 1200, 75, 99, 2500]
    if pa.types.is_integer(amount_type):
        return [None if row % 9 == 7 else abs(cents[row % 8]) % 100 for row in range(count)]
    if pa.types.is_floating(amount_type):
        return [None if row % 9 == 7 else cents[row % 8] / 100 for row in range(count)]
    return [None if row % 9 == 7 else decimal.Decimal(cents[row % 8]) / 100 for row in range(count)]


def _payload(choices: Choices, count: int) -> Any:
    """A column that the engine only hands back, with the rows that it refuses."""
    return choices.of(
        (
            None,
            pa.array([f"note {row}" for row in range(count)]),
            pa.array([[row, row + 1] for row in range(count)]),
            pa.array(["a", "b"] * count, pa.dictionary(pa.int8(), pa.string()))[:count],
            pa.array([{"k": row, "t": "x" * row} for row in range(count)]),
        )
    )


def some_batch(choices: Choices) -> Any:
    """A valid batch of one of the types that the engine accepts."""
    count = 1 + choices.number(24)
    plain = [kind for kinds in ID_TYPES.values() for kind in kinds]
    more = [pa.binary(16), pa.binary(0), *([pa.string_view(), pa.binary_view()] if VIEWS else [])]
    id_type = choices.of(plain + more)
    view = id_type in more[2:]
    amount_type = choices.of((*AMOUNT_TYPES, pa.float64()))
    time_type = choices.of(TIME_TYPES)
    stored = time_type if pa.types.is_timestamp(time_type) else pa.timestamp("s")
    times = [None if row % 11 == 9 else (row * 20 - (70 if row % 5 == 4 else 0)) * SECOND for row in range(count)]
    text = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}[id_type] if view else id_type
    rows = list(zip(_ids(text, count), _amounts(amount_type, count), times, strict=True))
    batch = to_batch(rows, text, amount_type, stored)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    if view:
        columns["user_id"] = columns["user_id"].cast(id_type)
    if pa.types.is_date(time_type):
        columns["timestamp"] = pa.array([datetime.date(1970, 1, 1 + row % 3) for row in range(count)], time_type)
    elif time_type == pa.int64():
        columns["timestamp"] = columns["timestamp"].cast(pa.int64())
    payload = _payload(choices, count)
    if payload is not None:
        columns["payload"] = payload
    return pa.record_batch(columns)


def columns(choices: Choices) -> None:
    """Arrow data whose bytes are damaged, before Arrow has read them or behind its back."""
    mode = choices.number(4)
    sink = pa.BufferOutputStream()
    batch = some_batch(choices)
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for part in (batch, batch.slice(len(batch) // 2)):
            writer.write_batch(part)
    memory = np.frombuffer(bytearray(sink.getvalue()), np.uint8)
    if mode == 0:
        damage(choices, memory)
    reader: Any = None
    with contextlib.suppress(pa.ArrowException, OSError):
        reader = pa.ipc.open_stream(pa.py_buffer(memory))
    if reader is None:
        return
    if mode == 0:
        _check_ingest(lambda: pa.ipc.open_stream(pa.py_buffer(memory)))
        return
    batches = list(reader)
    damage(choices, memory, _spans(batches, memory))  # what Arrow found to be in order is so no longer
    whole = pa.Table.from_batches(batches) if mode == 1 else batches[0] if mode == 2 else batches[0].slice(choices.number(len(batches[0])))
    _check_ingest(lambda: whole)
    _check_lookups(batches[0].column(0))


def _spans(batches: list[Any], memory: Any) -> list[tuple[int, int]]:
    """Where the buffers of all columns lie in the memory of a stream."""
    base = memory.ctypes.data
    found = []
    for batch in batches:
        for column in batch.columns:
            dictionary = column.dictionary.buffers() if pa.types.is_dictionary(column.type) else []
            for buffer in [*column.buffers(), *dictionary]:
                places = (buffer.address - base, buffer.address - base + buffer.size) if buffer is not None else (-1, -1)
                if 0 <= places[0] < places[1] <= len(memory):
                    found.append(places)
    return found


def _state(engine: RiskEngine) -> tuple[str, Any]:
    """All but the memory that is taken: a batch that is refused has needed some."""
    return engine.digest(), replace(engine.stats(), bytes=0)


def _check_ingest(source: Callable[[], Any]) -> None:
    """Rows are taken and are those of the definition, or are refused whole."""
    with RiskEngine(**OPTIONS) as engine:
        engine.add(*_first(source()))
        before = _state(engine)
        try:
            result = engine.ingest(source(), scores=True)
            result.rejects().validate(full=True)
        except EngineError as error:
            earlier = any("of earlier batches" in note for note in getattr(error, "__notes__", ()))
            if not earlier:
                assert _state(engine) == before, "rows were applied by a call that raised"
            return
        finally:
            for shard in engine._core.shards:
                shard.check(engine._core.kind)
        engine.features().validate(full=True)
    if any(abs(getattr(kind, "scale", 0)) > 1000 for kind in source().schema.types):
        return  # Python has no decimals of such scales, or takes minutes for them
    with contextlib.suppress(CapacityError):
        found = verify(source(), Config.of(**OPTIONS))
        assert found.equal, found.difference


def _first(source: Any) -> tuple[Any, float, Any]:
    """A row that makes an engine of the kind of ids that a source has."""
    place = source.schema.get_field_index("user_id")
    kind = source.schema.field(place).type if place >= 0 else pa.int64()
    value = str(getattr(kind, "value_type", kind))
    user: Any = "first" if "string" in value else b"first" if "binary" in value else 3
    return user, 1.0, datetime.datetime(1970, 1, 1)


def _check_lookups(ids: Any) -> None:
    with RiskEngine(**OPTIONS) as engine:
        engine.add(*_first(pa.table({"user_id": pa.array([], ids.type)})))
        before = engine.digest()
        with contextlib.suppress(SchemaError):
            assert len(engine.scores(ids)) == len(ids)
            engine.features(ids).validate(full=True)
        assert engine.digest() == before


# ---- snapshots ---------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {"int64": pa.int64(), "uint64": pa.uint64(), "string": pa.string(), "binary": pa.binary()}


class Snapshots:
    """A valid snapshot of each kind of ids, made once, and what becomes of them when they are damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole: list[dict[str, bytes]] = []
        for number, kind in enumerate((*_KINDS.values(), None)):
            with RiskEngine(**OPTIONS) as engine:
                if kind is not None:
                    rows = [(user, row % 7 + 0.25, row * SECOND) for row, user in enumerate(_ids(kind, 40)) if user is not None]
                    engine.ingest(to_batch(rows, kind))
                made = folder / f"whole-{number}" / engine.save(folder / f"whole-{number}", position={"offset": 7}).name
            self._whole.append({file.name: file.read_bytes() for file in made.iterdir()})

    def damaged(self, choices: Choices) -> None:
        """Load one whose files are damaged; sealed again, so that hashes tell nothing, or as it is."""
        files = dict(choices.of(self._whole))
        manifest = json.loads(files["manifest.json"])
        parts = [name for name in files if name != "manifest.json"]
        mode = choices.number(5)
        if mode == 0:  # no seal: any change at all must be seen
            name = choices.of(sorted(files))
            damaged = altered(choices, files[name])
            if damaged == files[name]:
                return
            self._load({**files, name: damaged}, must_fail=True)
            return
        if mode == 1:
            self._alter(choices, manifest)
        if mode == 2 and parts:
            files[parts[0]] = altered(choices, files[parts[0]])
        if mode >= 3 and parts:
            files[parts[0]] = self._other_rows(choices, files[parts[0]], manifest)
        for told in manifest["files"] if mode > 1 else ():
            told["bytes"] = len(files[told["name"]])
            told["sha256"] = hashlib.sha256(files[told["name"]]).hexdigest()
        try:
            files["manifest.json"] = _sealed({name: value for name, value in manifest.items() if name != "sha256"})
        except (ValueError, RecursionError):  # JSON cannot say it
            return
        self._load(files)

    def _alter(self, choices: Choices, manifest: dict[str, Any]) -> None:
        """Put something else at some places of a manifest."""
        for _ in range(1 + choices.number(3)):
            place: Any = manifest
            while True:
                keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
                if not keys:
                    break
                key = choices.of(keys)
                if isinstance(place[key], dict | list) and place[key] and choices.number(4):
                    place = place[key]
                    continue
                kind = choices.number(6)
                if kind == 0:
                    del place[key]
                elif kind == 1:
                    place[key] = choices.of(
                        (None, True, False, "", "x", "int64", "string", [], {}, 0.5, 1e400, "60s", "wall", "../x", "\0")
                    )
                elif kind == 2 and isinstance(place[key], int):
                    place[key] += (-1, 1)[choices.number(2)]
                else:
                    place[key] = choices.whole()
                break

    def _other_rows(self, choices: Choices, data: bytes, manifest: dict[str, Any]) -> bytes:
        """A Parquet file in order, of rows that are not those that were saved; or with other columns."""
        table = pq.read_table(pa.BufferReader(data))
        for _ in range(1 + choices.number(3)):
            kind = choices.number(6)
            rows = np.arange(len(table))
            if kind == 0 and len(rows) > 1:
                rows = np.roll(rows, 1 + choices.number(len(rows)))
            elif kind == 1:
                rows = np.repeat(rows, 1 + choices.number(3))
            elif kind == 2:
                rows = rows[: choices.number(len(rows) + 1)]
            table = table.take(pa.array(rows))
            if kind >= 3 and len(table):
                place = choices.number(table.num_columns)
                values = table.column(place).to_pylist() if place == 0 else table.column(place).cast(pa.int64()).to_pylist()
                if kind == 3:
                    values[choices.number(len(values))] = choices.of((None, choices.whole())) if place or type(values[0]) is int else None
                    column_type = pa.int64() if place else choices.of((table.schema.field(0).type, pa.int64(), pa.uint64()))
                    with contextlib.suppress(pa.ArrowException, OverflowError, TypeError):
                        column = pa.array(values, column_type)
                        table = table.set_column(
                            place, table.schema.names[place], column.cast(table.schema.field(place).type) if place else column
                        )
                elif kind == 4:
                    table = table.rename_columns([choices.of(("user_id", "timestamp", "amount_units", "x")) for _ in table.schema.names])
                else:
                    table = table.append_column("more", pa.array([0] * len(table)))
        sink = pa.BufferOutputStream()
        compression = choices.of(("none", "zstd", "snappy"))
        pq.write_table(
            table, sink, compression=compression, row_group_size=choices.of((1, 7, 1000)), use_dictionary=bool(choices.number(2))
        )
        if choices.number(4):
            manifest["files"][0]["rows"] = len(table)
            manifest["transactions"] = len(table)
        encoded = sink.getvalue().to_pybytes()
        return altered(choices, encoded) if choices.number(4) == 3 else encoded

    def _load(self, files: dict[str, bytes], must_fail: bool = False) -> None:
        where = self._folder / "damaged" / "snapshot-00000000000000000001"
        where.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (where / name).write_bytes(data)
        for old in where.iterdir():
            if old.name not in files:
                old.unlink()
        try:
            engine = RiskEngine.load(where.parent, shards=2)
        except SnapshotError:
            return
        with engine:
            assert not must_fail, "a change of its bytes was not seen"
            assert engine.restored is not None
            assert engine.digest() == engine.restored.digest == json.loads(files["manifest.json"])["digest"]
            for shard in engine._core.shards if engine.config.users <= 1000 else ():  # it copies the whole index
                shard.check(engine._core.kind)
            engine.features().validate(full=True)


# ---- texts -------------------------------------------------------------------------------------------------------------------

_CSV = b"""user_id,amount,timestamp,note
alice,10.00,2025-01-01T00:00:00Z,"first, quoted"
bob,2.5,2025-01-01T00:00:20.123456789+01:00,
,1.0,2025-01-01 00:00:21,no user
alice,-0.00005,2025-01-01T00:00:30,"two
lines"
"7",1e3,2025-01-01,x
"""
_NDJSON = b"""{"user_id": "alice", "amount": 10.00, "timestamp": "2025-01-01T00:00:00Z", "note": {"deep": [1, null]}}
{"user_id": "bob", "amount": "2.5", "timestamp": "2025-01-01T00:00:20.123456789"}
{"user_id": null, "amount": -1e-5, "timestamp": 1735689630}

{"note": null, "amount": 1, "user_id": "alice", "timestamp": "2025-01-01"}
"""
_WORDS = (
    *(b"nan", b"-inf", b"1e999", b"1e-999", b"0x10", b"1e+-5", b"9" * 40, b"0." + b"0" * 40 + b"1", b"-0", b"+1", b".5", b"5.", b"1_0"),
    *(b"null", b'""', b'"', b"\\", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\r\n", b" ", b"\t", b"\0"),
    *(b"2025-02-30", b"0000-01-01", b"9999-12-31T23:59:59.999999999", b"2262-04-11T23:47:16.854775807", b"1677-09-21T00:12:43", b"+23:59"),
    *(b"user_id", b"amount", b"timestamp", b'"amount": NaN', b'"timestamp": -9223372036854775808', b'"user_id": 1', b'"user_id": 1.5'),
    *(
        "\u0661".encode(),
        "\u00e9".encode(),
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1f\x8b",
        b"PAR1",
        b"[" * 400,
        b'{"a":' * 200,
    ),
)


class Texts:
    """Damaged text files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def damaged(self, choices: Choices) -> None:
        suffix, data = choices.of(((".csv", _CSV), (".ndjson", _NDJSON)))
        for _ in range(1 + choices.number(4)):
            data = altered(choices, data, _WORDS)
        file = self._folder / f"damaged{suffix}"
        file.write_bytes(data)
        config = replace(Config.of(**OPTIONS), time_unit=choices.of((None, "s", "ns")))
        batches = []
        with contextlib.suppress(SchemaError):
            batches = [batch for unit in read(file, config) for batch in unit]
        for batch in batches:
            assert len(columns_of(batch, config)) == batch.num_rows
        with contextlib.suppress(SchemaError, CapacityError):
            found = verify(file, config)
            assert found.equal, found.difference


# ---- messages ----------------------------------------------------------------------------------------------------------------


class _Output:
    """Makes what would be sent, and keeps what is said about dead letters."""

    wants_dead_letters = wants_scores = True

    def __init__(self) -> None:
        self.letters: list[tuple[int, int, str]] = []

    def dead_letter(self, partition: int, offset: int, row: int | None, reason: str, value: bytes | None) -> None:
        assert value is not None
        self.letters.append((offset, -1 if row is None else row, reason))
        if row is not None:
            json.loads(value)

    def scores(self, partition: int, table: Any) -> None:
        for count, value in arrow_messages(table, 5, 2000):
            sent = pa.ipc.open_stream(value).read_all()
            sent.validate(full=True)
            assert len(sent) == count

    def flush(self) -> None:
        pass


def _message(choices: Choices) -> bytes:
    kind = choices.number(8)
    if kind < 3:
        data = choices.of(_NDJSON.split(b"\n"))
        for _ in range(choices.number(3)):
            data = altered(choices, data, _WORDS)
        return bytes(data)
    batch = some_batch(choices)
    if kind == 3:
        texts = [batch.column(name).cast(pa.string()) for name in ("amount", "timestamp")]
        fields = [pa.field(name, pa.string(), metadata=TEXT_MARK) for name in ("amount", "timestamp")]
        batch = pa.record_batch([batch.column("user_id"), *texts], schema=pa.schema([batch.schema.field("user_id"), *fields]))
    memory = bytearray(encode_arrow(batch))
    if choices.number(2):
        damage(choices, memory)
    return bytes(memory)


def _applied(values: list[bytes], size: int, check: bool) -> Any:
    """What becomes of messages that come so many at a time."""
    output, offsets = _Output(), np.arange(len(values))
    options = OPTIONS | {"users": 1000, "max_ahead": "40s"}
    topic = Topic("topic", "id", 2, "group", "me")
    with RiskEngine(**options) as engine:
        partition = Partition(0, topic, engine, 0, None, len(values), None, output, lambda *_, **__: None, check_partition=check)
        for first in range(0, len(values), size):
            some = slice(first, first + size)
            partition.apply(list(values[some]), offsets[some], offsets[some] * 20 * SECOND)
        for shard in engine._core.shards:
            shard.check(engine._core.kind)
        assert (partition.position, partition.state) == (len(values), "ready")
        return engine.digest(), engine.id_kind, engine.stats().rejected, partition.accepted, partition.dead, sorted(output.letters)


def messages(choices: Choices) -> None:
    """Messages of which some are damaged: every one of them is applied or dead, the same however they come."""
    check = choices.number(2) == 1
    values = [_message(choices) for _ in range(1 + choices.number(6))]
    together = _applied(values, len(values), check)
    assert together == _applied(values, 1, check)
    assert together == _applied(values, 2, check)


# ---- requests ------------------------------------------------------------------------------------------------------------------

_PATHS = (
    *("/v1/scores", "/v1/transactions", "/v1/transactions?scores=true&rejects=true", "/v1/scores/a", "/v1/scores/5", "/v1/explain/%ff"),
    *("/v1/explain/a?at=1970-01-01T00:00:10Z", "/v1/top?k=3&by=sum", "/v1/stats", "/openapi.json", "/v1/scores/%00%0a?at=now"),
)
_ASKED = (
    *(b'{"user_ids": ["a", "b", null, ""], "at": "1970-01-01T00:00:09.5Z"}', b'{"user_ids": [5, -1, 18446744073709551615, 7.0]}'),
    *(b'{"user_id": "a", "amount": 0.1, "timestamp": 3}\n{"user_id": "b", "amount": "1e3", "timestamp": 2}', _NDJSON),
)
_STATUSES = {200, 400, 404, 405, 406, 409, 413, 415, 421, 422, 503}


class Requests:
    """Requests as a web server hands them on, some of them damaged: an answer that says what is so, or an error and nothing is changed."""

    def __init__(self) -> None:
        from engine.adapters.http_server import Gate, Limits, Served  # noqa: PLC0415 - an extra
        from engine.service import Service  # noqa: PLC0415 - only here

        self._engine = RiskEngine(**OPTIONS)
        self._failures: list[str] = []
        service = Service(Config.of(**OPTIONS), lambda: {0: self._engine}, lambda: 100 * SECOND, writable=True)
        self._gate = Gate(Served(service, limits=Limits(body_bytes=1 << 20, users=1000), failed=self._failures.append))
        self._loop = asyncio.new_event_loop()

    def damaged(self, choices: Choices) -> None:
        """One request."""
        self._engine = RiskEngine(**OPTIONS)
        with self._engine as engine:
            ids = choices.of((["a", "b"], [5, 7], [b"a", b"b"], []))
            if ids:
                engine.ingest({"user_id": ids, "amount": [1, 2.5], "timestamp": [3, 9]})
            before = _state(engine)
            path, _, query = choices.of(_PATHS).partition("?")
            path, query = (altered(choices, part.encode(), _WORDS) if not choices.number(4) else part.encode() for part in (path, query))
            kind = choices.of((b"application/json", b"application/x-ndjson", b"application/vnd.apache.arrow.stream", b"text/plain"))
            if kind.endswith(b"stream"):
                batch = some_batch(choices)
                memory = bytearray(encode_arrow(batch))
                damage(choices, memory)
                body = bytes(memory)
            else:
                body = choices.of(_ASKED)
                body = altered(choices, body, _WORDS) if choices.number(4) else body
            headers = [(b"content-type", kind), (b"accept", choices.of((b"*/*", b"application/vnd.apache.arrow.stream", b"x")))]
            status, said = self._loop.run_until_complete(self._ask(choices, b"/" + path.lstrip(b"/"), query, headers, body))
            assert not self._failures, self._failures
            assert status in _STATUSES, (status, said)
            told = pa.ipc.open_stream(said).read_all() if said[:1] == b"\xff" else json.loads(said)
            for shard in engine._core.shards:
                shard.check(engine._core.kind)
            if status != 200:
                assert set(told) == {"type", "title", "status", "detail"} and _state(engine) == before
            elif "rejected" in told and "users" not in told:
                assert told["accepted"] + sum(told["rejected"].values()) == told["rows"]

    async def _ask(self, choices: Choices, path: bytes, query: bytes, headers: Any, body: bytes) -> tuple[int, bytes]:
        method = choices.of(("POST", "POST", "GET", "PUT"))
        text = unquote(path.decode("latin-1"))
        scope = {"type": "http", "http_version": "1.1", "method": method, "path": text, "raw_path": path, "query_string": query}
        scope |= {"headers": headers, "root_path": ""}
        parts = [body[: len(body) // 2], body[len(body) // 2 :]]
        said: list[Any] = []

        async def receive() -> Any:
            part = parts.pop(0) if parts else b""
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            said.append(message)

        await self._gate(scope, receive, send)
        return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


# ---- runs --------------------------------------------------------------------------------------------------------------------


def target(name: str, folder: Path) -> Callable[[bytes], None]:
    """What is done with the bytes of an input."""
    test: Callable[[Choices], None] = {
        "columns": lambda: columns,
        "messages": lambda: messages,
        "requests": lambda: Requests().damaged,
        "snapshot": lambda: Snapshots(folder).damaged,
        "texts": lambda: Texts(folder).damaged,
    }[name]()
    return lambda data: test(Choices(data))


def plain(test: Callable[[bytes], None], seed: int, rounds: int | None, seconds: float) -> int:
    """Inputs of a seeded generator, for so many rounds or seconds. Returns how many."""
    done, until = 0, time.monotonic() + seconds
    while done < rounds if rounds is not None else time.monotonic() < until:
        data = random.Random(f"{seed} {done}").randbytes(96)
        try:
            test(data)
        except BaseException:
            print(f"the input of seed {seed}, round {done}: {data.hex()}", file=sys.stderr)
            raise
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
        assert peak_mb <= MEMORY_MAX_MB, f"{peak_mb} MiB resident: seed {seed}, round {done}"
        done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("target", choices=("columns", "messages", "requests", "snapshot", "texts"))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help="inputs of a seeded generator instead of libFuzzer's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="with --plain: so many inputs, however long they take")
    parser.add_argument("--replay", type=Path, help="run one input that was kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        test = target(options.target, Path(folder))
        if options.replay:
            test(options.replay.read_bytes())
        elif options.plain or atheris is None:
            print(f"{options.target}: {plain(test, options.seed, options.rounds, options.seconds):,} inputs, nothing found")
        else:
            limits = [f"-rss_limit_mb={MEMORY_MAX_MB}", "-timeout=60"]
            flags = [
                f"-max_total_time={options.seconds}",
                f"-seed={options.seed}",
                f"-rss_limit_mb={MEMORY_MAX_MB}",
                "-max_len=256",
                "-len_control=0",
            ]
            atheris.Setup([sys.argv[0], *flags, *limits, "-print_final_stats=1"], test)
            atheris.Fuzz()


if __name__ == "__main__":
    main()
