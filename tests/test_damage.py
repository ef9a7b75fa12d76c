"""Snapshots that are not what was written, by decay or by intent: each is refused with `SnapshotError`, and nothing is believed.

Every bit of a manifest, every bit at both ends of the other files, every length, files of other snapshots; and manifests whose hash is
right but whose contents lie. RISKRING_FLIPS asks for more bits flipped at random than the usual two thousand:

    RISKRING_FLIPS=100_000 pytest tests/test_damage.py
"""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import RiskEngine, SnapshotError
from engine import snapshot as snapshot_module
from tests.disks import Disk
from tests.strategies import UserRow
from tests.test_snapshot import batch, disk_store, load, make, smallest_steps

FLIPS = int(os.environ.get("RISKRING_FLIPS", "2000").replace("_", ""))
NAME = "snapshot-00000000000000000001"
FOLDER = f"/disk/{NAME}"
MANIFEST = f"{FOLDER}/manifest.json"

ROWS: dict[str, list[UserRow]] = {
    "int64": [(1, 5, 100), (2, 7, 120), (1, 9, 150), (3, 2**40, 149), (1, 2, 160), (1, 3, 161), (1, 3, 161)],
    "string": [("alice", 5, 100), ("bob", 7, 120), ("alice", 9, 150), ("carol", -1, 149)],
}


def saved(kind: str = "int64", part_rows: int = 3) -> Disk:
    """A disk with one small snapshot, of two files or more."""
    disk = Disk()
    with make(shards=1) as engine, smallest_steps(part_rows):
        engine.ingest(batch(kind, ROWS[kind]))
        engine.save(disk_store(disk), position={"offset": 5})
    return disk


def parts(disk: Disk) -> list[str]:
    return sorted(path for path in disk.paths("/disk") if path.endswith(".parquet"))


def put(disk: Disk, path: str, data: bytes) -> None:
    disk.file(path).data = bytearray(data)


def load_one(disk: Disk) -> RiskEngine:
    return load(disk_store(disk), shards=1)


def is_refused(disk: Disk, path: str, data: bytes) -> None:
    """The snapshot is, with these bytes in a file; and the text says which file."""
    before = bytes(disk.file(path).data)
    assert data != before
    put(disk, path, data)
    with pytest.raises(SnapshotError) as caught:
        load_one(disk)
    assert path in str(caught.value)
    put(disk, path, before)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class TestDecay:
    """Bits and bytes change, and files get lost or mixed up."""

    @pytest.mark.parametrize("kind", ROWS)
    def test_every_bit_of_the_manifest(self, kind: str) -> None:
        disk = saved(kind)
        data = bytes(disk.file(MANIFEST).data)
        for bit in range(8 * len(data)):
            is_refused(disk, MANIFEST, flipped(data, bit))
        load_one(disk)

    @pytest.mark.parametrize("kind", ROWS)
    def test_every_bit_at_both_ends_of_the_other_files(self, kind: str) -> None:
        disk = saved(kind)
        assert len(parts(disk)) == 2
        for path in parts(disk):
            data = bytes(disk.file(path).data)
            for byte in [*range(100), *range(len(data) - 100, len(data))]:
                for bit in range(8 * byte, 8 * byte + 8):
                    is_refused(disk, path, flipped(data, bit))
        load_one(disk)

    def test_bits_at_random(self) -> None:
        disk = saved("string")
        paths = [MANIFEST, *parts(disk)]
        for number in range(FLIPS):
            draw = Random(number)
            path = draw.choice(paths)
            data = bytes(disk.file(path).data)
            for bit in draw.sample(range(8 * len(data)), draw.choice((1, 1, 2, 5))):
                data = flipped(data, bit)
            is_refused(disk, path, data)
        load_one(disk)

    @pytest.mark.parametrize("kind", ROWS)
    def test_every_length(self, kind: str) -> None:
        disk = saved(kind)
        for path in [MANIFEST, *parts(disk)]:
            data = bytes(disk.file(path).data)
            for length in range(len(data)):
                is_refused(disk, path, data[:length])
            for more in (b"\0", b"\n", b" ", data, bytes(5000)):
                is_refused(disk, path, data + more)

    def test_files_that_are_missing(self) -> None:
        for path in [MANIFEST, *parts(saved())]:
            disk = saved()
            disk.remove_file(path)
            with pytest.raises(SnapshotError, match="holds no snapshot" if path == MANIFEST else f"{path}: No such file"):
                load_one(disk)

    def test_folders_in_place_of_files(self) -> None:
        for path in [MANIFEST, *parts(saved())]:
            disk = saved()
            disk.remove_file(path)
            disk.make_folder(path)
            with pytest.raises(SnapshotError, match=f"{path}: Is a directory"):
                load_one(disk)

    def test_files_of_two_snapshots(self) -> None:
        """One bears an amount that the other does not; each file of one in place of the other's, and all but the manifest."""
        disk = saved()
        other = Disk()
        with make(shards=1) as engine, smallest_steps(3):
            engine.ingest(batch("int64", [(user, amount + 1, time) for user, amount, time in ROWS["int64"]]))
            engine.save(disk_store(other), position={"offset": 6})
        assert parts(disk) == parts(other)
        for path in [MANIFEST, *parts(disk)]:
            mixed = disk.restarted()
            put(mixed, path, bytes(other.file(path).data))
            with pytest.raises(SnapshotError):
                load_one(mixed)
        first, second = parts(disk)
        swapped = disk.restarted()
        put(swapped, first, bytes(disk.file(second).data))
        put(swapped, second, bytes(disk.file(first).data))
        with pytest.raises(SnapshotError):
            load_one(swapped)


# ------------------------------------------------------------------------------------------------------- lies

Told = dict[str, Any]


def with_manifest(disk: Disk, lie: Callable[[Told], Any]) -> None:
    """A manifest that says something else, with a hash that is right."""
    told = json.loads(bytes(disk.file(MANIFEST).data))
    del told["sha256"]
    lie(told)
    put(disk, MANIFEST, snapshot_module._sealed(told))


def lies() -> dict[str, Callable[[Told], Any]]:
    """What may be said wrongly, by name."""
    found: dict[str, Callable[[Told], Any]] = {}

    def say(where: tuple[Any, ...], *values: Any) -> None:
        def lie(told: Told, value: Any) -> None:
            inner: Any = told
            for step in where[:-1]:
                inner = inner[step]
            inner[where[-1]] = value

        for value in values:
            found[f"{'.'.join(map(str, where))} is {str(value)[:40]!r} ({type(value).__name__})"] = lambda told, value=value: lie(
                told, value
            )

    def leave_out(*where: Any) -> None:
        def lie(told: Told) -> None:
            inner: Any = told
            for step in where[:-1]:
                inner = inner[step]
            del inner[where[-1]]

        found[f"without {'.'.join(map(str, where))}"] = lie

    no_counts = (-1, 2**63, 2**200, 1.5, 7.0, True, "7", None, [], {})
    no_durations = (-1, 2**60 + 1, 2**200, 1.5, 100.0, True, "100", "60s", [], {})
    no_times = (2**63, -(2**63), 2**200, 161.0, True, "161", [])
    told = json.loads(bytes(saved().file(MANIFEST).data))
    for key in told:
        if key != "sha256":
            leave_out(key)
    for key in told["config"]:
        leave_out("config", key)
    for key in told["rejected"]:
        leave_out("rejected", key)
    for key in told["files"][0]:
        leave_out("files", 0, key)
    say(("format",), "another", None)
    say(("version",), 0, -1, 1.0, True, "1", None, 2, 2**200)
    say(("created_ns",), *no_times, None)
    say(("config",), None, [], {}, "config")
    say(("config", "shards"), 1)
    say(("config", "window_ns"), 0, None, 99, *no_durations)
    say(("config", "lateness_ns"), None, 51, *no_durations)
    say(("config", "max_ahead_ns"), *no_durations)
    say(("config", "max_jump_ns"), *no_durations)
    say(("config", "closed"), "left", "right", None, [])
    say(("config", "decimals"), -1, 9, 1, True, 0.0, "0", None)
    say(("config", "users"), -1, 0, 2, 400_000_001, 2**200, 50.0, True, "50", None)
    say(("config", "clock"), "sun", None)
    say(("config", "time_unit"), "m", 1)
    say(("config", "user_id"), "", "amount", 5, None)
    say(("config", "amount"), "timestamp")
    say(("kind",), "uint64", "string", "float", None, ["int64"], {}, 0)
    say(("clock_ns",), *no_times, None, 160, 162, 2**62)
    say(("rows",), 0, 6, 8, *no_counts)
    say(("rounded",), 8, *no_counts)
    say(("accepted",), 6, 8, *no_counts)
    say(("rejected",), None, [], 0)
    say(("rejected", "late"), 1, *no_counts)
    say(("rejected", "boredom"), 0)
    say(("users",), 0, 2, 4, 51, *no_counts)
    say(("transactions",), 0, 6, 8, *no_counts)
    say(("digest",), "", "0" * 32, None, 5)
    say(("files",), None, {}, [], [None], "files", told["files"][:1], told["files"] * 2, [told["files"][0]] * 2)
    names = ("", "manifest.json", "../x", f"../{NAME}/transactions-00000.parquet", "/transactions-00000.parquet", "transactions-0.parquet")
    say(("files", 0, "name"), *names, "transactions-00001.parquet", "transactions-\u0660\u0660\u0660\u0660\u0660.parquet", None, 5)
    say(("files", 0, "bytes"), 0, 1, 2**34, 2**34 + 1, *no_counts)
    say(("files", 0, "rows"), 0, 1, 2**28, 2**28 + 1, *no_counts)
    say(("files", 0, "sha256"), "", "0" * 64, None, 5, told["files"][1]["sha256"])
    say(("files", 0, "more"), 1)

    def without_clock(told: Told) -> None:
        told.update(kind=None, clock_ns=None)

    def many_rows(told: Told) -> None:
        told["files"][0]["rows"] = 2**28
        told["transactions"] = 2**28 + told["files"][1]["rows"]

    def many_users(told: Told) -> None:
        many_rows(told)
        told["users"] = told["config"]["users"] = 400_000_000

    return found | {"no clock, but files": without_clock, "2**28 rows": many_rows, "400 million users": many_users}


LIES = lies()


class TestLies:
    """The hashes are right, the contents are not."""

    @pytest.mark.parametrize("lie", LIES)
    def test_manifests(self, lie: str) -> None:
        disk = saved()
        with_manifest(disk, LIES[lie])
        tracemalloc.start()
        try:
            with pytest.raises(SnapshotError, match=NAME):
                load_one(disk)
            assert tracemalloc.get_traced_memory()[1] < 1 << 22, "nothing is made as large as the manifest says"
        finally:
            tracemalloc.stop()

    def test_the_truth_is_believed(self) -> None:
        disk = saved()
        data = bytes(disk.file(MANIFEST).data)
        with_manifest(disk, lambda told: None)
        assert bytes(disk.file(MANIFEST).data) == data
        load_one(disk)

    @pytest.mark.parametrize(
        "data",
        [b"", b"{}", b"[]", b"null", b"1", b'"version"', b"[" * 100_000, b'{"version": 1}', b"\xff\xfe", b'{"version": NaN}', b"1" * 5000],
        ids=lambda data: data[:15].decode("latin-1"),
    )
    def test_other_manifests(self, data: bytes) -> None:
        is_refused(saved(), MANIFEST, data)

    def test_the_same_json_in_another_form(self) -> None:
        """There is one form of it, so no bit can change and mean the same."""
        told = json.loads(bytes(saved().file(MANIFEST).data))
        for text in (json.dumps(told), json.dumps(told, indent=1), json.dumps(told, indent=2), json.dumps(told, indent=1) + "\n\n"):
            is_refused(saved(), MANIFEST, text.encode())


def with_part(disk: Disk, data: bytes, rows: int, **lie: Any) -> None:
    """One file of transactions in place of all others, with a manifest that fits."""
    path = parts(disk)[0]
    put(disk, path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    files = [{"name": path.rpartition("/")[2], "bytes": len(data), "rows": rows, "sha256": sha256}]
    with_manifest(disk, lambda told: told.update(files=files, transactions=rows, **lie))


def encoded(table: pa.Table, **options: Any) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, **options)
    data: bytes = stream.getvalue().to_pybytes()
    return data


def truth() -> pa.Table:
    """What the files of the snapshot hold, as one table."""
    disk = saved()
    return pa.concat_tables([pq.read_table(pa.BufferReader(bytes(disk.file(path).data))) for path in parts(disk)])


def column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    """A table with another column in place of one."""
    return lambda table: table.set_column(table.column_names.index(name), name, values(table[name].to_pylist()))


def times(change: Callable[[list[int]], list[int | None]]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        array = pa.array(change(table["timestamp"].cast(pa.int64()).to_pylist()), pa.int64())
        return table.set_column(1, "timestamp", array.cast(pa.timestamp("ns", "UTC")))

    return changed


NOT_THOSE = "its transactions are not those that were saved"
PARTS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a column less": (lambda table: table.drop_columns(["amount_units"]), "its columns are others"),
    "a column more": (lambda table: table.append_column("more", table["user_id"]), "its columns are others"),
    "columns in another order": (lambda table: table.select([1, 0, 2]), "its columns are others"),
    "a column of another name": (lambda table: table.rename_columns(["user", "timestamp", "amount_units"]), "its columns are others"),
    "no user": (column("user_id", lambda ids: pa.array([None, *ids[1:]], pa.int64())), "its columns are others"),
    "no time": (times(lambda all_times: [None, *all_times[1:]]), "its columns are others"),
    "no amount": (column("amount_units", lambda units: pa.array([*units[:-1], None])), "its columns are others"),
    "users of another kind": (column("user_id", lambda ids: pa.array([f"user {user}" for user in ids])), "is no part of a snapshot"),
    "users as lists": (column("user_id", lambda ids: pa.array([[user] for user in ids])), "is no part of a snapshot"),
    "users beyond int64": (column("user_id", lambda ids: pa.array([2**64 - 1, *ids[1:]], pa.uint64())), "is no part of a snapshot"),
    "times as text": (column("timestamp", lambda all_times: pa.array(["now"] * len(all_times))), "is no part of a snapshot"),
    "times beyond int64": (
        column("timestamp", lambda all_times: pa.array([2**60] * len(all_times)).cast(pa.timestamp("us"))),
        "is no part of a snapshot",
    ),
    "a time before the retention": (times(lambda all_times: [10, *all_times[1:]]), "a time is not within the retention"),
    "a time after the clock": (times(lambda all_times: [*all_times[1:], 162]), "a time is not within the retention"),
    "another time": (times(lambda all_times: [all_times[0] + 1, *all_times[1:]]), NOT_THOSE),
    "amounts with fractions": (column("amount_units", lambda units: pa.array([1.5] * len(units))), "is no part of a snapshot"),
    "too great an amount": (column("amount_units", lambda units: pa.array([2**53 + 1, *units[1:]])), "an amount is out of range"),
    "too small an amount": (column("amount_units", lambda units: pa.array([-(2**63), *units[1:]])), "an amount is out of range"),
    "another amount": (column("amount_units", lambda units: pa.array([units[0] + 1, *units[1:]])), NOT_THOSE),
    "another user": (column("user_id", lambda ids: pa.array([9, *ids[1:]])), NOT_THOSE),
    "a user twice": (lambda table: pa.concat_tables([table, table.slice(0, 5)]), NOT_THOSE),
    "a row less": (lambda table: table.slice(1), NOT_THOSE),
    "a sum out of range": (
        lambda table: pa.concat_tables([column("amount_units", lambda units: pa.array([2**53] * len(units)))(table)] * 128),
        NOT_THOSE,
    ),
    "too many users": (
        lambda table: column("user_id", lambda ids: pa.array(range(len(ids))))(pa.concat_tables([table] * 20)),
        "does not fit",
    ),
}


class TestFalseParts:
    """Files of transactions that are none, with hashes that are right."""

    def test_the_truth_is_believed(self) -> None:
        """In one file instead of two, in two row groups, compressed: what counts is what it says."""
        table, disk = truth(), saved()
        for options in ({}, {"row_group_size": 2}, {"compression": "gzip"}, {"use_dictionary": False}):
            with_part(disk, encoded(table, **options), len(table))
            load_one(disk)

    @pytest.mark.parametrize("name", PARTS)
    def test_other_tables(self, name: str) -> None:
        change, text = PARTS[name]
        table, disk = change(truth()), saved()
        with_part(disk, encoded(table), len(table))
        with pytest.raises(SnapshotError, match=text):
            load_one(disk)

    @pytest.mark.parametrize("rows", [1, 6, 8, 2**28])
    def test_another_number_of_rows(self, rows: int) -> None:
        disk = saved()
        with_part(disk, encoded(truth()), rows, users=1)
        with pytest.raises(SnapshotError, match=f"it has 7 rows instead of {rows}"):
            load_one(disk)

    @pytest.mark.parametrize("data", [b"PAR1", b"PAR1PAR1", b"PAR1\0\0\0\0PAR1", b"PAR1\xff\xff\xff\x7fPAR1", bytes(1000), b"no Parquet"])
    def test_other_files(self, data: bytes) -> None:
        disk = saved()
        with_part(disk, data, 7)
        with pytest.raises(SnapshotError, match="is no part of a snapshot"):
            load_one(disk)

    def test_bits_at_random_behind_a_hash_that_is_right(self) -> None:
        """Whatever a reader of Parquet makes of it: it is refused, or is the state that was saved."""
        wanted = load_one(saved()).digest()
        data = encoded(truth(), compression="none", write_page_checksum=False)
        refused, tries = 0, FLIPS // 4
        for number in range(tries):
            disk, draw = saved(), Random(number)
            with_part(disk, flipped(data, draw.randrange(8 * len(data))), 7)
            try:
                assert load_one(disk).digest() == wanted
            except SnapshotError:
                refused += 1
        assert refused > tries // 2

    def test_a_copy_of_the_digest_is_needed(self) -> None:
        """What would be a snapshot of another state is refused for its digest alone."""
        disk, other = saved(), saved()
        table = column("amount_units", lambda units: pa.array([units[0] + 1, *units[1:]]))(truth())
        with_part(disk, encoded(table), len(table))
        with pytest.raises(SnapshotError, match=NOT_THOSE):
            load_one(disk)
        with make(shards=1) as engine:
            instants = table["timestamp"].cast(pa.int64()).to_pylist()
            rows = list(zip(table["user_id"].to_pylist(), table["amount_units"].to_pylist(), instants, strict=True))
            engine.ingest(batch("int64", sorted(rows, key=lambda row: row[2])))
            digest = engine.digest()
        with_part(other, encoded(table), len(table), digest=digest)
        assert load_one(other).digest() == digest
