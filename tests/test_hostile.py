"""Input that means harm: damaged memory and files, and ids chosen to collide. (Streams chosen to fill memory: `test_floods`.)

Damaged bytes are made by `tests/fuzz.py`, which also runs for as long as one likes; what it found stands here by example.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import RiskEngine, SchemaError, SnapshotError
from engine.columns import ids_of
from engine.config import Config
from engine.index import random_keys, split_rows
from engine.kernels import layout as at
from engine.reference import verify
from engine.shard import Shard
from engine.snapshot import _sealed
from tests.test_columns import VIEWS

ROOT = Path(__file__).parent.parent
WORD = 2**64 - 1


def make(**options: Any) -> RiskEngine:
    """A small engine in simulated time, with times in seconds."""
    return RiskEngine(**({"users": 100, "max_ahead": None, "time_unit": "s", "shards": 1} | options))


def rows(users: Any, amounts: Any = 1, times: Any = 0) -> dict[str, Any]:
    """Columns, a scalar standing for all rows."""
    count = len(users)
    return {"user_id": users, "amount": np.broadcast_to(amounts, count).copy(), "timestamp": np.broadcast_to(times, count).copy()}


def state(engine: RiskEngine) -> Any:
    return engine.digest(), engine.stats()


# ---- damaged bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["columns", "messages", "requests", "snapshot", "texts"])
def test_fuzzed_bytes(target: str) -> None:
    """Some rounds of the fuzzer, in a process of their own: a crash of it is a failure too."""
    if target == "requests":
        pytest.importorskip("starlette")
        pytest.importorskip("orjson")
    program = [sys.executable, "-X", "faulthandler", str(ROOT / "tests" / "fuzz.py"), target, "--plain", "--rounds", "300"]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{target}: 300 inputs, nothing found\n"


def damaged(array: Any, buffer: int, place: int, value: bytes) -> Any:
    """The array, one of whose buffers was overwritten after Arrow had found it in order."""
    memory = [None if part is None else np.frombuffer(part, np.uint8).copy() for part in array.buffers()]
    found = pa.Array.from_buffers(
        array.type, len(array), [None if part is None else pa.py_buffer(part) for part in memory], array.null_count
    )
    memory[buffer][place : place + len(value)] = np.frombuffer(value, np.uint8)
    return found


class TestDamagedColumns:
    """Arrow data in memory that points where it should not is refused whole, whichever way it comes in."""

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (damaged(pa.array(["ab", "cd"]), 2, 0, b"\xff"), "UTF8"),
            (damaged(pa.array(["ab", "cd"]), 1, 4, b"\xff\xff\xff\x7f"), "offset"),
            (damaged(pa.array([1, None]), 0, 0, b"\x03"), "null_count"),
            (pa.DictionaryArray.from_arrays(pa.array([0, 5], pa.int8()), pa.array(["a"]), safe=False), "out of bounds"),
            (
                pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), damaged(pa.array(["a", "b"]), 1, 4, b"\xff\xff\xff\x7f")),
                "offset",
            ),
        ],
        ids=["text", "offsets", "nulls", "indices", "dictionary"],
    )
    def test_nothing_of_it_is_applied_or_looked_up(self, array: Any, message: str) -> None:
        engine = make()
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        engine.ingest(rows(pa.array([7] if pa.types.is_integer(kind) else ["x"])))
        before = state(engine)
        batch = pa.record_batch(rows(array))
        for way in (
            lambda: batch,
            lambda: pa.Table.from_batches([batch]),
            lambda: pa.RecordBatchReader.from_batches(batch.schema, [batch]),
        ):
            with pytest.raises(SchemaError, match=rf"is damaged: (?s:.*){message}"):
                engine.ingest(way())
        for lookup in (engine.scores, engine.features):
            with pytest.raises(SchemaError, match=rf"user_ids is damaged: (?s:.*){message}"):
                lookup(array)
        assert state(engine) == before

    def test_a_column_that_is_only_handed_back(self) -> None:
        """It is read when rows are refused, after the others have been applied."""
        engine = make()
        batch = pa.record_batch({**rows(pa.array([1, None])), "note": damaged(pa.array(["ab", "cd"]), 1, 4, b"\xff\xff\xff\x7f")})
        before = state(engine)
        with pytest.raises(SchemaError, match="is damaged"):
            engine.ingest(batch)
        assert state(engine) == before

    @pytest.mark.skipif(not VIEWS, reason="pyarrow cannot cast views")
    def test_what_stands_at_nulls_of_views_is_not_read(self) -> None:
        array = damaged(pa.array(["ab", None, "x" * 20]).cast(pa.string_view()), 1, 16, b"\xff\x7f\xff\xff\xff\xff\xff\xff")
        assert ids_of(array, "user_id").data.tobytes() == b"ab" + b"x" * 20
        engine = make()
        assert engine.ingest(rows(array[:2])).rejected == {"null_user": 1}
        assert engine.scores(array).to_pylist() == [1.0, None, 0.0]

    def test_a_damaged_stream_says_what_of_it_is_applied(self) -> None:
        table = pa.table(rows([1, 2]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
            writer.write_table(table)
        whole = sink.getvalue().to_pybytes()
        last = whole.rindex(b"\xff\xff\xff\xff", 0, len(whole) - 8)
        engine = make()
        with pytest.raises(SchemaError, match="the stream is damaged or not what its name says; 2 rows were read before") as caught:
            engine.ingest(pa.ipc.open_stream(whole[: last + 40]))
        assert caught.value.__notes__ == ["2 rows of earlier batches of this source are applied"]
        assert engine.stats().rows == 2

    def test_names_of_columns_that_are_no_text(self) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, pa.schema({"user_id": pa.int64(), "amount_": pa.int64()})):
            pass
        with pytest.raises(SchemaError, match="the name of a column is not UTF-8"):
            make().ingest(pa.ipc.open_stream(sink.getvalue().to_pybytes().replace(b"amount_", b"amount\xff")))

    def test_other_columns_whose_types_have_names_that_are_no_text(self) -> None:
        """They are handed on with what is rejected, though nothing can be made of them."""
        table = pa.table(rows(pa.array([1, 1, 2])) | {"more": pa.array([{"member": 1}] * 3)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        damaged = sink.getvalue().to_pybytes().replace(b"member", b"memb\xa8r")
        result = make().ingest(pa.ipc.open_stream(damaged))
        assert (result.accepted, result.rejects().num_rows, result.rejects().num_columns) == (3, 0, 5)

    def test_amounts_of_half_precision_are_judged_as_such(self) -> None:
        """A changed bit makes them of others; the judge took them for float64."""
        amounts = pa.array(np.array([1.988, 2.1, 0.1, 0.00001], np.float16))
        found = verify(rows(pa.array([1, 1, 2, 3]), times=0) | {"amount": amounts}, Config.of(time_unit="s", users=10))
        assert found.equal, found.difference
        result = make().ingest(rows(pa.array([1, 1, 2, 3])) | {"amount": amounts})
        assert (result.accepted, result.rounded) == (4, 1)

    @pytest.mark.parametrize("kind", [pa.decimal128, pa.decimal256])
    @pytest.mark.parametrize("scale", [2**31 - 1, 16_777_236, 80, -18, -19, -(2**31)])
    def test_decimals_of_any_scale(self, kind: Callable[[int, int], Any], scale: int) -> None:
        """One that takes a digit at a time has no end: Arrow allows scales of 31 bits, far beyond the digits there are."""
        few, many = (10**18, 10**37) if scale > 0 else (1, 10**20)
        numbers = np.array(
            [[number & WORD, number >> 64 & WORD, *([0, 0] if kind is pa.decimal256 else [])] for number in (0, few, many)], np.uint64
        )
        amounts = pa.Array.from_buffers(kind(38, scale), 3, [None, pa.py_buffer(numbers)])
        result = make().ingest(rows(pa.array([1, 2, 3])) | {"amount": amounts})
        if scale > 0:  # all are nearest to 0, and two of them were changed to it
            assert (result.accepted, result.rounded) == (3, 2)
        else:
            assert (result.accepted, result.rejected) == (1, {"amount_out_of_range": 2})
        found = verify(rows(pa.array([1, 2, 3]), times=0) | {"amount": amounts}, Config.of(time_unit="s", users=10))
        assert found.equal, found.difference

    def test_half_of_a_surrogate_pair_is_no_id(self) -> None:
        engine, half = make(), "\ud800"
        engine.add("a", 1, 0)
        before = state(engine)
        calls: list[Callable[[], object]] = [
            *(lambda: engine.score(half), lambda: engine.scores([half]), lambda: engine.features([half]), lambda: engine.explain(half)),
            *(lambda: engine.add(half, 1, 0), lambda: engine.ingest(rows([half])), lambda: half in engine),
        ]
        for call in calls:
            with pytest.raises(SchemaError, match="surrogates not allowed"):
                call()
        assert state(engine) == before


class TestDamagedFiles:
    """Files whose bytes are not what their names promise."""

    def ndjson(self, *lines: bytes) -> bytes:
        return b"\n".join((*lines, b'{"user_id": "a", "amount": 1, "timestamp": 0}', b""))

    @pytest.mark.parametrize("first", [b"null", b" \t\r\nnull", b"\xef\xbb\xbfnull", b"\xef\xbb\xbf\xef\xbb\xbfnull", b"null\nnull"])
    def test_null_in_place_of_the_first_object(self, first: bytes, tmp_path: Path) -> None:
        """Arrow's reader takes null for an object everywhere else, and brings the process down here."""
        file = tmp_path / "rows.ndjson"
        file.write_bytes(self.ndjson(first))
        assert make().ingest(file).rejected == {"null_user": 1 + (first == b"null\nnull")}
        file.write_bytes(first)
        with pytest.raises(SchemaError, match="there are no columns"):
            make().ingest(file)

    def test_ndjson_that_is_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.ndjson"
        for bad in (b'{"user_id": "\xff", "amount": 1, "timestamp": 0}', b'{"user_id": "a", "amount": 1, "timestamp": "\xff"}'):
            file.write_bytes(self.ndjson(bad))
            with pytest.raises(SchemaError, match=r"rows\.ndjson is damaged"):
                make().ingest(file)

    def test_parquet_that_is_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.table(rows(["abcdefgh"])), file, use_dictionary=False, compression="none", write_statistics=False)
        data = file.read_bytes()
        assert data.count(b"abcdefgh") == 1
        file.write_bytes(data.replace(b"abcdefgh", b"abcdefg\xff"))
        with pytest.raises(SchemaError, match=r"rows\.parquet is damaged"):
            make().ingest(file)


class TestDamagedSnapshots:
    """Snapshots whose hashes are right and whose contents are not."""

    def manifest(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        with make() as engine:
            engine.ingest(rows([1, 2, 3]))
            file = folder / engine.save(folder).name / "manifest.json"
        told = json.loads(file.read_bytes())
        del told["sha256"]
        return file, told

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            *(("closed", {}), ("closed", "left"), ("window_ns", 0), ("window_ns", -5), ("window_ns", 2**61), ("window_ns", 60.0)),
            *(("users", 0), ("users", 10**12), ("users", True), ("decimals", 9), ("amount", "user_id"), ("amount", ""), ("time_unit", "h")),
            *(("max_ahead_ns", -1), ("lateness_ns", None), ("clock", "sun"), ("users", 2)),
        ],
    )
    def test_options_that_no_engine_has(self, option: str, value: Any, tmp_path: Path) -> None:
        file, told = self.manifest(tmp_path)
        told["config"][option] = value
        file.write_bytes(_sealed(told))
        with pytest.raises(SnapshotError, match="is damaged"):
            RiskEngine.load(tmp_path)

    @pytest.mark.parametrize("created_ns", [2**63, -(2**63), 10**400])
    def test_instants_that_no_clock_shows(self, created_ns: int, tmp_path: Path) -> None:
        file, told = self.manifest(tmp_path)
        file.write_bytes(_sealed({**told, "created_ns": created_ns}))
        with pytest.raises(SnapshotError, match="is damaged"):
            RiskEngine.load(tmp_path)

    @pytest.mark.parametrize("member", ["bytes", "rows", "clock_ns", "users", "transactions", "created_ns"])
    def test_numbers_that_are_not_whole(self, member: str, tmp_path: Path) -> None:
        file, told = self.manifest(tmp_path)
        (part,) = told["files"]
        place = part if member in part else told
        for value in (0.5, float(place[member]), True):
            place[member] = value
            file.write_bytes(_sealed(told))
            with pytest.raises(SnapshotError, match="is no whole number"):
                RiskEngine.load(tmp_path)

    @pytest.mark.parametrize("rows_said", [1, 3, 60])
    def test_files_that_tell_of_rows_they_do_not_hold(self, rows_said: int, tmp_path: Path) -> None:
        file, told = self.manifest(tmp_path)
        (part,) = told["files"]
        where = file.parent / part["name"]
        with pq.ParquetWriter(where, pq.read_schema(where)):
            pass
        head, tail = where.read_bytes().rsplit(b"\x16\x00\x19\x0c", 1)  # the number of rows and no row groups, as Thrift writes them
        where.write_bytes(head + bytes([0x16, 2 * rows_said, 0x19, 0x0C]) + tail)
        assert pq.read_metadata(where).num_rows == rows_said
        part |= {"rows": rows_said, "bytes": where.stat().st_size, "sha256": hashlib.sha256(where.read_bytes()).hexdigest()}
        file.write_bytes(_sealed(told | {"users": 1, "transactions": rows_said}))
        with pytest.raises(SnapshotError, match=f"it has 0 rows instead of {rows_said}"):
            RiskEngine.load(tmp_path)


# ---- ids chosen to collide ---------------------------------------------------------------------------------------------------


def unhashed(hashes: Any, keys: Any) -> Any:
    """The integers that `hash_integer` makes these of: it is a bijection."""
    k0, k1, k2, k3 = (int(key) for key in keys)
    found = []
    for value in hashes:
        value ^= value >> 32
        value = value * pow(k3, -1, 2**64) & WORD
        value ^= value >> 29 ^ value >> 58
        value = value * pow(k2, -1, 2**64) & WORD
        value ^= value >> 32
        found.append((value * pow(k1, -1, 2**64) & WORD) ^ k0)
    return np.array(found, np.uint64).view(np.int64)


def lines_read(shard: Shard, ids: Any) -> list[int]:
    """Index lines that the look-up of each of these ids reads, each of which has a slot: from its home line to the one it is in."""
    index = shard.index
    found, (own,) = split_rows(ids, np.zeros(len(ids), np.uint8), index.keys, 1)
    slots = index.find(ids, found, own, shard.memory)
    assert (slots >= 0).all()
    lines = int(shard.control[at.TABLE_LINES])
    cells = np.asarray(index.table).reshape(lines, at.BUCKET).astype(np.int64) & ((1 << int(shard.control[at.SLOT_BITS])) - 1)
    line_of = {int(cells[line, place]) - 1: int(line) for line, place in zip(*np.nonzero(cells), strict=True)}
    home = ((found >> np.uint64(32)) * np.uint64(lines) >> np.uint64(32)).astype(np.int64)
    return [(line_of[slot] - first) % lines + 1 for slot, first in zip(slots.tolist(), home.tolist(), strict=True)]


class TestHashFlooding:
    """Nobody can choose ids that collide without the secret; who has it makes n of them cost n / 16 lines each, and no wrong answer."""

    @pytest.fixture
    def known(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The secret of all engines that are made meanwhile."""
        monkeypatch.setattr("engine.shards.random_keys", lambda: random_keys(7))
        return random_keys(7)

    def test_integers_of_one_home_line_and_tag(self, known: Any) -> None:
        count = 10_000
        engine = make(users=2 * count)
        (shard,) = engine._core.shards
        lines, slot_bits = int(shard.control[at.TABLE_LINES]), int(shard.control[at.SLOT_BITS])
        line = lines - 100  # so that they go round the end of the table
        high = -(-(line << 32) // lines)
        low_bits = 31 - slot_bits  # of the hash, that are the tag
        users = unhashed([high << 32 | k << low_bits | 5 for k in range(count)], known)
        assert len(set(users.tolist())) == count
        for first in range(0, count, 1000):
            engine.ingest(rows(users[first : first + 1000], amounts=np.arange(first, first + 1000)))
        read = lines_read(shard, ids_of(pa.array(users), "user_id"))
        # The k-th that came is in the k/16-th line, and so many were read to find that it is new: a bound that holds for any ids.
        assert read == [k // at.BUCKET + 1 for k in range(count)]
        assert engine.scores(users).tolist() == list(range(count))
        assert engine.scores(users + 1).tolist() == [0.0] * count
        shard.check("int64")
        ordinary = np.arange(count)
        engine.ingest(rows(ordinary))
        assert engine.scores(ordinary).tolist() == [1.0] * count
        assert engine.scores(users).tolist() == list(range(count))
        # Of the others only those whose home is among the full lines pay, with no more than these lines.
        theirs = lines_read(shard, ids_of(pa.array(ordinary), "user_id"))
        assert max(theirs) <= 2 * count // at.BUCKET
        assert np.mean(np.array(theirs) == 1) > 0.3
        engine.ingest(rows(ordinary, times=500))
        assert engine.expire() + len(engine) >= count
        shard.check("int64")
        assert engine.stats().users == count
        assert engine.scores(users).tolist() == [0.0] * count

    @pytest.mark.parametrize("kind", ["string", "binary"])
    def test_bytes_of_one_home_line(self, kind: str, known: Any) -> None:
        """They have to be searched for: the hash cannot be turned round."""
        engine = make(users=2_000)
        (shard,) = engine._core.shards
        lines = int(shard.control[at.TABLE_LINES])
        tried = pa.array([f"user {k}" for k in range(200_000)], pa.string()).cast(pa.string() if kind == "string" else pa.binary())
        found, _ = split_rows(ids_of(tried, "user_id"), np.zeros(len(tried), np.uint8), known, 1)
        chosen = tried.filter(pa.array((found >> np.uint64(32)) * np.uint64(lines) >> np.uint64(32) == lines - 1))
        assert len(chosen) > 900
        amounts = np.arange(len(chosen))
        engine.ingest(rows(chosen, amounts=amounts))
        assert lines_read(shard, ids_of(chosen, "user_id")) == [k // at.BUCKET + 1 for k in range(len(chosen))]
        assert engine.scores(chosen).to_pylist() == amounts.tolist()
        shard.check(kind)
        engine.ingest(rows(chosen[:1], times=500))
        engine.expire()
        shard.check(kind)
        assert len(engine) == 1

    def test_with_an_unknown_secret_they_are_ordinary_ids(self) -> None:
        """What was made for one secret spreads like any ids with another: so do the seeds 1 to 5."""
        count, lines = 10_000, 1787
        made = unhashed([(900 << 32) // lines << 32 | k << 16 for k in range(count)], random_keys(7))
        for seed in range(1, 6):
            found, _ = split_rows(ids_of(pa.array(made), "user_id"), np.zeros(count, np.uint8), random_keys(seed), 1)
            home = ((found >> np.uint64(32)) * np.uint64(lines) >> np.uint64(32)).astype(np.int64)
            assert np.bincount(home, minlength=lines).max() < 24  # 5.6 on average

    def test_the_secret_is_one_of_each_engine_and_stays_in_it(self, tmp_path: Path) -> None:
        engines = [make(), make()]
        first, second = (engine._core.shards._keys for engine in engines)
        assert not set(first.tolist()) & set(second.tolist())
        for engine in engines:
            engine.ingest(rows(["a", "b"]))
        assert engines[0].digest() == engines[1].digest()
        told = repr(engines[0]) + str(engines[0].stats()) + engines[0]._repr_html_() + repr(engines[0].config) + repr(vars(engines[0]))
        folder = tmp_path / engines[0].save(tmp_path).name
        files = b"".join(file.read_bytes() for file in folder.iterdir())
        for key in first.tolist():
            assert str(key) not in told and f"{key:x}" not in told
            assert str(key).encode() not in files and key.to_bytes(8, "little") not in files and key.to_bytes(8, "big") not in files
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(engines[0])
        assert not set(RiskEngine.load(tmp_path)._core.shards._keys.tolist()) & set(first.tolist())
