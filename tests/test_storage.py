"""Folders of snapshots on disks that fail and lose power, and in object stores: the old or the new snapshot is there, whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from engine import ConfigError, RiskEngine, SnapshotError
from engine import snapshot as snapshot_module
from engine.storage import LocalStore
from tests.disks import Disk
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

    def test_every_call_fails(self) -> None:
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
            objects.fail_at = number
            with smallest_steps(part_rows=100):
                try:
                    engine.save(files, position="new")
                    saved = True
                except SnapshotError:
                    saved, failed = False, failed + 1
            over = len(objects.calls) <= number
            objects.fail_at = -1
            assert tell(load(files)) in (["new"] if saved else ["new", 2])
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
