"""Folders of snapshots on disks that fail and lose power, and in object stores: the old or the new snapshot is there, whole."""

from __future__ import annotations

import copy
import os
import re
import threading
import tracemalloc
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.fs
import pytest

from engine import ConfigError, RiskEngine, SnapshotError
from engine import snapshot as snapshot_module
from engine.storage import ArrowStore, LocalStore, System, sync_folder, write_file
from tests.disks import MANNERS, Crash, Disk
from tests.objects import Objects
from tests.test_snapshot import batch, disk_store, load, make, same, smallest_steps, some_rows


def tell(engine: RiskEngine) -> Any:
    """The position an engine was loaded with."""
    assert engine.restored is not None
    return engine.restored.position


class TestFolders:
    """What lies in a folder of snapshots."""

    def test_the_last_three_are_kept(self) -> None:
        engine, disk = make(), Disk()
        for number in range(1, 7):
            engine.save(disk_store(disk), position=number)
            kept = sorted(disk.folder("/disk").names)
            assert kept == [f"snapshot-{which:020}" for which in range(max(1, number - 2), number + 1)]
            assert tell(load(disk_store(disk))) == number
            assert tell(load(disk_store(disk, f"/disk/{kept[0]}/.."[: len("/disk")]))) == number

    def test_a_position_that_is_not_accepted_is_passed_over(self) -> None:
        engine, disk = make(), Disk()
        for number in (1, 2, 3):
            engine.ingest(batch("int64", [(number, 1, number)]))
            engine.save(disk_store(disk), position={"offset": number})
        asked = []

        def accept(position: Any) -> str | None:
            asked.append(position["offset"])
            return None if position["offset"] == 2 else f"offset {position['offset']} is not in the log"

        loaded = load(disk_store(disk), accept=accept)
        assert (asked, tell(loaded), len(loaded), loaded.clock_ns, loaded.id_kind) == ([3, 2], {"offset": 2}, 2, 2, "int64")
        assert loaded.restored is not None
        ((name, why),) = loaded.restored.passed_over
        assert (name, why) == ("snapshot-00000000000000000003", "/disk/snapshot-00000000000000000003: offset 3 is not in the log")
        with pytest.raises(SnapshotError, match=r"3: no; .*2: no; .*1: no"):
            load(disk_store(disk), accept=lambda _: "no")

    def test_the_newest_whole_one_is_loaded_and_those_passed_over_are_named(self) -> None:
        engine, disk = make(), Disk()
        for number in (1, 2, 3):
            engine.ingest(batch("int64", [(number, 1, number)]))
            engine.save(disk_store(disk), position=number)
        del disk.folder("/disk/snapshot-00000000000000000003").names["transactions-00000.parquet"]
        disk.file("/disk/snapshot-00000000000000000002/manifest.json").data[40] ^= 1
        restored = load(disk_store(disk))
        assert tell(restored) == 1
        assert restored.restored is not None
        (newest, why), (next_one, why_next) = restored.restored.passed_over
        assert (newest, next_one) == ("snapshot-00000000000000000003", "snapshot-00000000000000000002")
        assert "snapshot-00000000000000000003/transactions-00000.parquet: No such file" in why
        assert "snapshot-00000000000000000002/manifest.json: is damaged" in why_next
        disk.file("/disk/snapshot-00000000000000000001/manifest.json").data[40] ^= 1
        with pytest.raises(SnapshotError, match=r"0003/transactions.*0002/manifest.*0001/manifest"):
            load(disk_store(disk))

    def test_after_a_damaged_one_saving_goes_on(self) -> None:
        """A folder that has lost its manifest is no snapshot, but its name is taken."""
        engine, disk = make(), Disk()
        for number in (1, 2):
            engine.save(disk_store(disk), position=number)
        del disk.folder("/disk/snapshot-00000000000000000002").names["manifest.json"]
        disk.root.names["disk"].names["snapshot-00000000000000000002"].names["left"] = copy.deepcopy(disk.root)  # type: ignore[union-attr]
        assert tell(load(disk_store(disk))) == 1
        assert engine.save(disk_store(disk), position=3).name == "snapshot-00000000000000000003"
        assert tell(load(disk_store(disk))) == 3

    def test_a_newer_version_is_refused(self) -> None:
        engine, disk = make(), Disk()
        engine.save(disk_store(disk))
        manifest = disk.file("/disk/snapshot-00000000000000000001/manifest.json")
        manifest.data = manifest.data.replace(b'"version": 1', b'"version": 2')
        with pytest.raises(SnapshotError, match="has version 2, this riskring knows 1"):
            load(disk_store(disk))

    def test_folders_without_a_snapshot(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("no folder")
        for name in ("empty", "missing", "missing/deeper", "file", "file/deeper"):
            with pytest.raises(SnapshotError, match="holds no snapshot"):
                load(tmp_path / name)

    def test_a_snapshots_own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = make()
        infos = [engine.save(str(tmp_path), position=number) for number in range(3)]
        assert [tell(load(tmp_path / info.name)) for info in infos] == [0, 1, 2]
        assert tell(load(f"{tmp_path}/{infos[1].name}/")) == 1
        monkeypatch.chdir(tmp_path)
        assert tell(load(infos[0].name)) == 0
        assert tell(load(".")) == 2
        with pytest.raises(SnapshotError, match=r"0009/manifest.json: No such file"):
            load(tmp_path / "snapshot-00000000000000000009")

    def test_what_is_no_folder_of_snapshots_at_all(self) -> None:
        for uri in (17, None, "", b"bytes", "nowhere://bucket/folder", pyarrow.fs.LocalFileSystem()):
            with pytest.raises(ConfigError):
                make().save(uri)
            with pytest.raises(ConfigError):
                load(uri)

    def test_left_over_parts_are_removed_and_never_read(self) -> None:
        engine, disk = make(), Disk()
        engine.save(disk_store(disk), position="whole")
        whole = disk.folder("/disk/snapshot-00000000000000000001")
        for left in (".riskring-snapshot-00000000000000000002.part", ".riskring-snapshot-00000000000000000000.removed"):
            disk.folder("/disk").names[left] = copy.deepcopy(whole)
        assert tell(load(disk_store(disk))) == "whole"
        engine.save(disk_store(disk), position="next")
        assert sorted(disk.folder("/disk").names) == ["snapshot-00000000000000000001", "snapshot-00000000000000000002"]
        assert tell(load(disk_store(disk))) == "next"

    def test_parts_and_remains_that_another_process_works_on_are_left_alone(self, tmp_path: Path) -> None:
        engine = make()
        engine.ingest(batch("int64", [(1, 1, 1)]))
        mine, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))
        other.begin("snapshot-00000000000000000001")
        other.put("snapshot-00000000000000000001", "transactions-00000.parquet", b"not done yet")
        for position in range(4):
            engine.save(mine, position=position)
        (working,) = (name for name in os.listdir(tmp_path) if name.startswith("."))
        assert os.listdir(tmp_path / working) == ["transactions-00000.parquet"]
        other.abandon("snapshot-00000000000000000001")
        assert sorted(os.listdir(tmp_path)) == [f"snapshot-{number:020}" for number in (2, 3, 4)]

    def test_two_processes_of_which_one_stands_still_both_save(self, tmp_path: Path) -> None:
        """The one that was stopped in the midst of it goes on when others have gone past it: its snapshot is there, or an error is."""
        engine = make()
        engine.ingest(batch("int64", [(1, 1, 1)]))
        stopped, may_go_on = threading.Event(), threading.Event()

        class Stopped(LocalStore):
            def publish(self, name: str, manifest: bytes) -> None:
                stopped.set()
                may_go_on.wait()
                super().publish(name, manifest)

        saving = engine.start_save(Stopped(str(tmp_path)), position="stopped")
        stopped.wait()
        other = make()
        other.ingest(batch("int64", [(1, 1, 1)]))
        other.save(tmp_path, position="other")
        may_go_on.set()
        with pytest.raises(SnapshotError, match="could not be written"):  # the other one has its number
            saving.result()
        assert tell(load(tmp_path)) == "other"
        engine.save(tmp_path, position="again")
        assert tell(load(tmp_path)) == "again"
        assert sorted(os.listdir(tmp_path)) == [f"snapshot-{number:020}" for number in (1, 2)]

    def test_what_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "snapshot-1").mkdir()
        (tmp_path / "snapshot-1" / "manifest.json").write_text("{}")
        (tmp_path / "snapshot-00000000000000000099").write_text("a file")
        (tmp_path / ".download.part").write_text("not done yet")
        (tmp_path / ".backup.removed").mkdir()
        (tmp_path / ".backup.removed" / "file").write_text("kept")
        (tmp_path / "notes.txt").write_text("notes")
        before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        engine = make()
        for number in range(5):
            engine.save(tmp_path, position=number)
        assert tell(load(tmp_path)) == 4
        assert {path: path.read_text() for path in before} == before
        assert len(list(tmp_path.iterdir())) == 5 + 3

    def test_folders_are_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make().save(tmp_path / "a" / "b" / "c")
        monkeypatch.chdir(tmp_path)
        make().save("d/e", position=5)
        make().save("d/e/", position=6)
        assert tell(load(tmp_path / "d" / "e")) == 6


class TestOtherFileSystems:
    """Through pyarrow.fs: no rename, manifest last."""

    def test_file_uris_are_local_folders(self, tmp_path: Path) -> None:
        engine, uri = make(), f"file://{tmp_path}/snapshots"
        name = engine.save(uri, position=1).name
        assert tell(load(tmp_path / "snapshots")) == tell(load(uri)) == tell(load(f"{uri}/{name}")) == 1

    def test_local_folders_by_pyarrow_are_synced_too(self, tmp_path: Path) -> None:
        files = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
        make().save(files, position=1)
        assert tell(load(files)) == tell(load(tmp_path)) == 1
        assert isinstance(snapshot_module.store_of(files), LocalStore)

    @pytest.fixture
    def objects(self) -> Objects:
        return Objects()

    @pytest.fixture(params=["", "bucket/folder"])
    def files(self, request: pytest.FixtureRequest, objects: Objects) -> Any:
        files = pyarrow.fs.PyFileSystem(objects)
        return pyarrow.fs.SubTreeFileSystem(request.param, files) if request.param else files

    def test_round_trip_and_the_last_three(self, files: Any, objects: Objects) -> None:
        engine = make()
        for number in range(5):
            engine.ingest(batch("string", some_rows("string", number, base_ns=40 * number)))
            with smallest_steps(part_rows=30):
                info = engine.save(files, position=number)
            manifests = [path for path in objects.objects if path.endswith("manifest.json")]
            assert len(manifests) == min(number + 1, 3)
            restored = load(files)
            assert restored.restored == info
            same(engine, restored)
        assert len({path.split("/")[-2] for path in objects.objects}) == 3
        with pytest.raises(SnapshotError, match="holds no snapshot"):
            load(pyarrow.fs.PyFileSystem(Objects()))

    @pytest.mark.parametrize("for_good", [False, True])
    def test_every_call_fails(self, for_good: bool) -> None:
        """An older snapshot or the new one is loaded, the engine goes on, and names are never used again."""
        engine = make()
        engine.ingest(batch("int64", some_rows("int64", 1)))
        base = Objects()
        for number in range(3):
            engine.save(pyarrow.fs.PyFileSystem(base), position=number)
        number, failed = 0, 0
        while True:
            objects = Objects()
            objects.objects = dict(base.objects)
            files = pyarrow.fs.PyFileSystem(objects)
            objects.fail_at, objects.for_good = number, for_good
            with smallest_steps(part_rows=100):
                try:
                    engine.save(files, position="new")
                    saved = True
                except SnapshotError:
                    saved, failed = False, failed + 1
            over = len(objects.calls) <= number
            objects.fail_at = -1
            left = load(files)
            assert tell(left) in (["new"] if saved else ["new", 2])
            assert left.restored is not None and left.restored.passed_over == ()
            engine.save(files, position="next")
            restored = load(files)
            assert tell(restored) == "next"
            assert restored.restored is not None and restored.restored.passed_over == ()
            if over:
                break
            number += 1
        assert failed == number

    def test_reading_fails_at_every_call(self) -> None:
        engine, objects = make(), Objects()
        files = pyarrow.fs.PyFileSystem(objects)
        for number in range(2):
            engine.ingest(batch("int64", [(number, 1, 1)]))
            engine.save(files, position=number)
        objects.calls.clear()
        load(files)
        for number in range(len(objects.calls)):
            objects.calls.clear()
            objects.fail_at = number
            try:
                restored = load(files).restored
            except SnapshotError:
                continue
            assert restored is not None
            assert restored.position == 0
            assert "the network is down" in restored.passed_over[0][1]


class TestDisk:
    """The model: what is promised is there after every crash, and what is not is there after some."""

    def found(self, disk: Disk) -> list[dict[str, bytes]]:
        """Files after crashes of forty kinds."""
        after = [disk.crash(Random(seed)) for seed in range(40)]
        return [{path: bytes(each.file(path).data) for path in each.paths()} for each in after]

    def test_what_was_synced_stays(self) -> None:
        disk = Disk()
        disk.make_folder("/a")
        write_file("/a/b", b"bytes", disk)
        sync_folder("/a", disk)
        assert {frozenset(found) for found in self.found(disk)} == {frozenset(), frozenset({"/a/b"})}
        sync_folder("/", disk)
        assert self.found(disk) == [{"/a/b": b"bytes"}] * 40
        assert disk.open_handles == 0

    def test_what_was_not_may_be_anything(self) -> None:
        disk = Disk()
        handle = disk.create("/a")
        disk.write(handle, memoryview(b"old "))
        disk.sync(handle)
        sync_folder("/", disk)
        disk.write(handle, memoryview(b"new"))
        found = {files["/a"] for files in self.found(disk)}
        assert {b"old ", b"old n", b"old ne", b"old new"} < found
        assert all(data.startswith(b"old ") and len(data) <= 7 for data in found)
        assert any(data.endswith(b"\0") for data in found)

    def test_names_change_in_any_order(self) -> None:
        disk = Disk()
        for name in ("a", "b", "c"):
            write_file(f"/{name}", name.encode(), disk)
        sync_folder("/", disk)
        disk.rename("/a", "/x")
        disk.remove_file("/b")
        disk.rename("/x", "/c")
        found = {tuple(sorted(files.items())) for files in self.found(disk)}
        assert (("/a", b"a"), ("/c", b"c")) in found, "the removal alone"
        assert (("/b", b"b"), ("/c", b"a")) in found, "both renames without it"
        assert (("/a", b"a"), ("/b", b"b"), ("/c", b"c")) in found, "nothing"
        assert disk.restarted().folder("").names.keys() == {"c"}


WHERE = "/data/snapshots"


def some(older: int) -> tuple[RiskEngine, Disk, dict[Any, str]]:
    """An engine with a few users, a disk with so many older snapshots of it, and digests by position."""
    engine, disk, digests = make(), Disk(), {}
    for number in range(older):
        engine.ingest(batch("int64", [(user, number, number) for user in range(3)]))
        engine.save(disk_store(disk, WHERE), position=number)
        digests[number] = engine.digest()
    engine.ingest(batch("int64", [(user, 9, 9) for user in range(1, 5)]))
    digests["new"] = digests["next"] = engine.digest()
    return engine, disk, digests


def found(disk: Disk, digests: dict[Any, str]) -> Any:
    """Position of what is loaded, which is whole and was not chosen for want of another; None: there is no snapshot."""
    store = disk_store(disk, WHERE)
    if not store.names():
        with pytest.raises(SnapshotError, match="holds no snapshot"):
            load(store)
        return None
    engine = load(store)
    assert engine.restored is not None
    assert engine.restored.passed_over == ()
    assert digests[engine.restored.position] == engine.digest()
    return engine.restored.position


class TestFailures:
    """Every call on the disk fails in every manner."""

    @pytest.mark.parametrize("for_good", [False, True])
    @pytest.mark.parametrize("manner", MANNERS)
    @pytest.mark.parametrize("older", [0, 1, 3])
    def test_saving(self, older: int, manner: str, for_good: bool) -> None:
        engine, base, digests = some(older)
        for number in count():
            disk = base.restarted()
            disk.fail(number, manner, for_good)
            with smallest_steps(part_rows=3):
                try:
                    engine.save(disk_store(disk, WHERE), position="new")
                    outcome = "saved"
                except SnapshotError:
                    outcome = "failed"
                except Crash:
                    outcome = "crashed"
            if len(disk.calls) <= number:
                assert outcome == "saved"
                break
            assert outcome in {"error": ("failed",), "full": ("failed",), "short": ("saved", "failed")}.get(manner, ("crashed",))
            allowed = ["new"] if outcome == "saved" else ["new", older - 1 if older else None]
            if outcome != "crashed":
                assert disk.open_handles == 0
            later = [disk.restarted(), *(disk.crash(Random(f"{number} {seed}")) for seed in range(4))]
            for each in later:
                assert found(each, digests) in allowed, (number, disk.calls[number])
            self.goes_on(engine, later[number % len(later)], digests)
        assert number > 20

    def goes_on(self, engine: RiskEngine, disk: Disk, digests: dict[Any, str]) -> None:
        """The next save is durable, and nothing is left of the one before but what was whole."""
        engine.save(disk_store(disk, WHERE), position="next")
        assert len(disk.folder(WHERE).names) <= 3
        assert all(name.startswith("snapshot-") for name in disk.folder(WHERE).names)
        for seed in range(2):
            assert found(disk.crash(Random(seed)), digests) == "next"

    def test_the_same_process_goes_on_after_a_failure(self) -> None:
        """Also where a failed call may have left a name that is not durable yet."""
        engine, base, digests = some(0)
        for number in count():
            disk = base.restarted()
            disk.fail(number, "error")
            try:
                engine.save(disk_store(disk, WHERE), position="new")
                break
            except SnapshotError:
                self.goes_on(engine, disk, digests)
        assert number > 20

    @pytest.mark.parametrize("manner", ["error", "short", "full"])
    def test_loading(self, manner: str) -> None:
        engine, disk, digests = some(2)
        with smallest_steps(part_rows=3):
            engine.save(disk_store(disk, WHERE), position="new")
        disk.calls.clear()
        load(disk_store(disk, WHERE))
        reads = len(disk.calls)
        for number in range(reads):
            disk.fail(number, manner)
            short_of_nothing = manner == "short" and disk.calls[number][0] != "read"
            try:
                restored = load(disk_store(disk, WHERE))
            except SnapshotError:
                assert not short_of_nothing
                continue
            assert restored.restored is not None
            position = restored.restored.position
            assert restored.digest() == digests[position]
            assert (position == "new") == (restored.restored.passed_over == ()) == short_of_nothing
        assert reads > 8

    def test_a_full_disk_says_how_much_is_needed(self) -> None:
        engine, base, _ = some(1)
        with smallest_steps(part_rows=3):
            needed = engine.save(disk_store(base.restarted(), WHERE), position="new").bytes
        tried = set()
        for number in count():
            disk = base.restarted()
            disk.free = 1_234
            disk.fail(number, "full")
            try:
                with smallest_steps(part_rows=3):
                    engine.save(disk_store(disk, WHERE), position="new")
                break
            except SnapshotError as error:
                if disk.calls[number][0] in ("make_folder", "create", "write", "sync", "rename") and "is written" not in str(error):
                    tried.add(disk.calls[number][0])
                    wanted = f"No space left on device; it needs {needed:,} bytes, and 1,234 are free; make room, or save elsewhere"
                    assert str(error).endswith(wanted), disk.calls[number]  # noqa: PT017 - of some calls only
        assert tried == {"make_folder", "create", "write", "sync", "rename"}

    def test_a_disk_that_does_not_say_how_much_is_free(self) -> None:
        engine, disk, _ = some(1)
        writes = Disk()
        engine.save(disk_store(writes, WHERE))
        first_write = [name for name, _ in writes.calls].index("write")
        disk.fail(first_write, "full", for_good=True)
        with pytest.raises(SnapshotError, match="bytes, and an unknown number is free"):
            engine.save(disk_store(disk, WHERE))

    def test_an_fsync_that_failed_is_not_tried_again(self) -> None:
        engine, base, _ = some(1)
        tried = 0
        for number in count():
            disk = base.restarted()
            disk.fail(number, "error")
            try:
                engine.save(disk_store(disk, WHERE), position="new")
                break
            except SnapshotError:
                name, path = disk.calls[number]
                if name == "sync":
                    tried += 1
                    assert ("sync", path) not in disk.calls[number + 1 :]
        assert tried == 5, "the parent, two files, their folder, and the root"

    def test_each_file_is_synced_before_the_names_and_these_before_they_show(self) -> None:
        engine, disk, _ = some(3)
        disk.calls.clear()
        engine.save(disk_store(disk, WHERE), position="new")
        part, old = (
            next(path for _, path in disk.calls if re.fullmatch(rf"{WHERE}/\.riskring-snapshot-0*{number}\.[0-9a-f]+\.{end}", path))
            for number, end in ((4, "part"), (1, "removed"))
        )
        effects = [call for call in disk.calls if call[0] in ("make_folder", "sync", "rename", "remove_file", "remove_folder")]
        assert effects == [
            ("sync", "/data"),
            ("make_folder", part),
            ("sync", f"{part}/transactions-00000.parquet"),
            ("sync", f"{part}/manifest.json"),
            ("sync", part),
            ("rename", part),
            ("sync", WHERE),
            ("rename", f"{WHERE}/snapshot-00000000000000000001"),
            ("sync", WHERE),
            ("remove_file", f"{old}/transactions-00000.parquet"),
            ("remove_file", f"{old}/manifest.json"),
            ("remove_folder", old),
        ]

    def test_who_may_not_look_into_the_parent_can_save(self) -> None:
        class Private(Disk):
            def open_folder(self, folder: str) -> int:
                if folder == "/data":
                    raise PermissionError(13, "Permission denied")
                return super().open_folder(folder)

        _, base, digests = some(1)
        engine, _, _ = some(1)
        disk = Private(base.root)
        engine.save(disk_store(disk, WHERE), position="new")
        assert found(Disk(disk.root), digests) == "new"


class TestSystem:
    """The calls of the operating system itself."""

    def test_a_file_takes_no_more_memory_than_it_has_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"bytes")
        objects = Objects()
        objects.objects["folder/file"] = b"bytes"
        store = ArrowStore(pyarrow.fs.PyFileSystem(objects), "", "")
        tracemalloc.start()
        try:
            assert System().read(str(tmp_path / "file"), 1 << 40) == b"bytes"
            assert store.get("folder", "file", 1 << 40) == b"bytes"
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert System().read(str(tmp_path / "file"), 2) == b"by"
        assert store.get("folder", "file", 2) == b"byt", "one more, so that it shows"

    def test_what_cannot_be_told_is_no_no(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert System().is_folder(str(tmp_path))
        assert not System().is_folder(str(tmp_path / "file"))
        assert not System().is_folder(str(tmp_path / "file" / "below"))
        assert not System().is_folder(str(tmp_path / "missing"))
        with pytest.raises(OSError, match="too long"):
            System().is_folder(str(tmp_path / ("x" * 10_000)))

    def test_on_a_real_disk(self, tmp_path: Path) -> None:
        """All calls there are, once."""
        system, folder = System(), str(tmp_path / "folder")
        system.make_folder(folder)
        write_file(f"{folder}/a", b"bytes", system)
        sync_folder(folder, system)
        system.rename(f"{folder}/a", f"{folder}/b")
        assert system.names(folder) == ["b"]
        assert system.read(f"{folder}/b", 10) == b"bytes"
        assert system.free_bytes(folder) > 0
        with pytest.raises(FileExistsError):
            write_file(f"{folder}/b", b"others", system)
        system.remove_file(f"{folder}/b")
        system.remove_folder(folder)
        assert not system.is_folder(folder)
