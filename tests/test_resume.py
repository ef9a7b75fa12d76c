"""Runs with a state folder: killed anywhere and started again, each scored row is there once; and snapshots by command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest

from engine import RiskEngine, generate, replay, storage
from engine.cli import main
from engine.outputs import FileWriter

KILLS = int(os.environ.get("RISKRING_KILLS", "20"))
ROWS, EVERY = 3_000, 1_100
OPTIONS = ("--max-ahead", "none", "--max-jump", "1h", "--window", "2s", "--users", "10k")


class Crash(BaseException):
    """What nothing catches."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    generate.write(path, ROWS, users=50, rate=100.0, disorder="1s", bad=0.02, seed=7)
    return path


def words(rows: Path, folder: Path, suffix: str = ".parquet", *more: str) -> list[str]:
    outputs = ["-o", f"{folder}/scored{suffix}", "--rejects", f"{folder}/rejects.csv"]
    return ["run", str(rows), "--state", f"{folder}/state", "--save-every", str(EVERY), *outputs, *OPTIONS, "--json", *more]


def parts(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".riskring-lock")


READ = {".parquet": pq.read_table, ".csv": pa.csv.read_csv, ".gz": lambda path: pa.json.read_json(pa.input_stream(path))}


def column(folder: Path, name: str) -> list[str]:
    """A column of the parts of an output as text (nan is not equal to nan); only visible files may be there."""
    assert all(part.startswith("part-") for part in parts(folder))
    tables = [READ[Path(part).suffix](folder / part) for part in parts(folder)]
    return [repr(value) for table in tables for value in table[name].to_pylist()]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    summary = json.loads(capsys.readouterr().out)
    return {name: value for name, value in summary.items() if name not in ("seconds", "rows_per_second", "bytes")}


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([*words(rows, folder), "--quiet"]) == 0
    return folder


def equals(found: Path, whole: Path) -> None:
    for name in ("scored.parquet", "rejects.csv"):
        assert parts(found / name) == parts(whole / name)
    for part in parts(whole / "rejects.csv"):
        assert (found / "rejects.csv" / part).read_bytes() == (whole / "rejects.csv" / part).read_bytes()
    for name in ("user_id", "amount", "timestamp", "score"):
        assert column(found / "scored.parquet", name) == column(whole / "scored.parquet", name)
    infos = [RiskEngine.load(folder / "state").restored for folder in (found, whole)]
    assert len({info.digest for info in infos if info}) == 1
    assert all(info and info.position["done"] for info in infos)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".ndjson.gz"])
def test_the_same_rows_as_without_a_state(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    plain = ["run", str(rows), "-o", str(tmp_path / "plain.parquet"), "--rejects", str(tmp_path / "plain.csv"), *OPTIONS, "--json"]
    assert main(plain) == 0
    wanted = told(capsys)
    assert main(words(rows, tmp_path, suffix)) == 0
    assert told(capsys) == wanted
    assert len(parts(tmp_path / f"scored{suffix}")) == -(-ROWS // EVERY)
    wanted_scores = list(map(repr, pq.read_table(tmp_path / "plain.parquet")["score"].to_pylist()))
    assert column(tmp_path / f"scored{suffix}", "score") == wanted_scores
    assert column(tmp_path / "rejects.csv", "reason") == list(map(repr, pa.csv.read_csv(tmp_path / "plain.csv")["reason"].to_pylist()))
    before = {name: (tmp_path / f"scored{suffix}" / name).stat().st_mtime_ns for name in parts(tmp_path / f"scored{suffix}")}
    assert main(words(rows, tmp_path, suffix)) == 0
    assert told(capsys) == wanted, "a run that is done does nothing more"
    assert before == {name: (tmp_path / f"scored{suffix}" / name).stat().st_mtime_ns for name in before}


class TestColumns:
    """All parts are one table, whose columns are those of the first file; as without a state."""

    def both(self, tmp_path: Path, files: list[Path]) -> tuple[int, int]:
        """Exit codes of a run without a state and with one, whose parts end where files do."""
        paths = [str(file) for file in files]
        plain = main(["run", *paths, "-o", f"{tmp_path}/plain.parquet", "--rejects", f"{tmp_path}/plain.csv", "--quiet"])
        outputs = ["-o", f"{tmp_path}/scored.parquet", "--rejects", f"{tmp_path}/rejects.csv"]
        return plain, main(["run", *paths, "--state", f"{tmp_path}/state", "--save-every", "2", *outputs, "--quiet"])

    def test_types_of_the_first_file(self, tmp_path: Path) -> None:
        instants = pa.array([0, 1], pa.timestamp("s"))
        for name, kind in (("a", pa.int32()), ("b", pa.int64())):
            pq.write_table(pa.table({"user_id": pa.array([1, 2], kind), "amount": [1.0, None], "timestamp": instants}), tmp_path / name)
        assert self.both(tmp_path, [tmp_path / "a", tmp_path / "b"]) == (0, 0)
        schema = pq.read_schema(tmp_path / "plain.parquet")
        assert [pq.read_schema(tmp_path / "scored.parquet" / part) for part in parts(tmp_path / "scored.parquet")] == [schema, schema]

    def test_a_file_with_other_columns(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.csv").write_text("user_id,amount,timestamp\n1,1,2025-01-01\n2,x,2025-01-01\n")
        (tmp_path / "b.csv").write_text("user_id,amount,timestamp,shop\n1,1,2025-01-01,7\n2,x,2025-01-01,8\n")
        assert self.both(tmp_path, [tmp_path / "a.csv", tmp_path / "b.csv"]) == (1, 1)
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2 and all("names are not matching" in error for error in errors)
        assert parts(tmp_path / "scored.parquet") == ["part-00000.parquet"]


def test_what_is_future_does_not_depend_on_when_a_run_was_interrupted(tmp_path: Path) -> None:
    """Rows are judged by the time at which the run began, as if it had taken no time; snapshots bear the time of the machine."""
    instants = [2_000_000_000 + second for second in (0, 5, 40, 7, 11, 10)]
    rows = {"user_id": [1, 2, 3, 1, 2, 3], "amount": [1.0] * 6, "timestamp": pa.array(instants, pa.timestamp("s"))}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    found = []
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        for step in range(steps):
            now_ns = (2_000_000_000 + 3600 * step) * 10**9
            outputs = {"output": f"{folder}/scored.parquet", "rejects": None}
            with replay.Replay([f"{tmp_path}/rows.parquet"], f"{folder}/state", {"users": 10}, 2, now=lambda: now_ns, **outputs) as run:  # noqa: B023
                for _ in run.results():
                    if step < steps - 1 and run.rows == 4:
                        break  # of four rows, two are in a snapshot
                found.append((run.engine.digest(), run.engine.stats().rejected))
        created = [RiskEngine.load(snapshot).restored.created for snapshot in sorted((folder / "state").glob("snapshot-*"))]
        assert [int(instant.astype(int)) // 10**9 - 2_000_000_000 for instant in created] == [0, *[3600 * (steps - 1)] * 3][-3:]
    assert found[0] == found[2] and found[0][1] == {"future": 2}
    assert column(tmp_path / "1" / "scored.parquet", "score") == column(tmp_path / "2" / "scored.parquet", "score")


def counted(monkeypatch: pytest.MonkeyPatch, crash_at: int, after: bool) -> list[str]:
    """Crash at one of the effects of a run: of those on files, and of taking rows. Returns the effects so far."""
    effects: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def effect(*args: Any, **kwargs: Any) -> Any:
            effects.append(name)
            number = len(effects)  # effects have others within
            if number == crash_at and not after:
                raise Crash
            result = plain(*args, **kwargs)
            if number == crash_at:
                raise Crash
            return result

        monkeypatch.setattr(owner, name, effect)

    for owner, name in (
        (FileWriter, "finish"),
        (RiskEngine, "ingest"),
        (replay.PartFolder, "publish"),
        (replay, "_sync"),
        (storage.LocalStore, "publish"),
        (storage.LocalStore, "remove"),
        (os, "rename"),
        (os, "replace"),
    ):
        wrap(owner, name)
    return effects


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_every_effect(rows: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    with monkeypatch.context() as patch:
        effects = counted(patch, 0, after)
        (tmp_path / "count").mkdir()
        assert main([*words(rows, tmp_path / "count"), "--quiet"]) == 0
    assert len(effects) > 40
    for crash_at in range(1, len(effects) + 1):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        with monkeypatch.context() as patch:
            counted(patch, crash_at, after)
            with pytest.raises(Crash):
                main([*words(rows, folder), "--quiet"])
        assert main([*words(rows, folder), "--quiet"]) == 0
        equals(folder, whole)


#: A run that kills itself at one of its calls of the operating system.
KILLED = """
import os, signal, sys
from engine import cli
calls = 0
def wrap(name):
    plain = getattr(os, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(os, name, call)
for name in ("fsync", "rename", "replace", "write", "mkdir", "unlink", "open", "close", "listdir"):
    wrap(name)
sys.exit(cli.main(sys.argv[2:]))
"""


def test_killed_again_and_again(rows: Path, whole: Path, tmp_path: Path) -> None:
    """A process that gets SIGKILL at some call on files, and is started again until it is done; so often that there are KILLS of them."""
    choose, kills, run = random.Random(5), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(run)
        folder.mkdir()
        run += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            command = [sys.executable, "-c", KILLED, str(choose.randrange(1, 150)), *words(rows, folder), "--quiet"]
            code = subprocess.run(command, check=False, capture_output=True).returncode
            kills += code == -signal.SIGKILL
        assert code == 0
        equals(folder, whole)


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    """What is half written goes; with a state, the parts behind its last snapshot stay, and the run goes on from there."""
    table = pa.table({"user_id": [1, 2] * 500_000, "amount": [1.0] * 1_000_000, "timestamp": pa.array([0] * 1_000_000, pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "rows.parquet")
    files, output, more = [f"{tmp_path}/rows.parquet"] * 30, tmp_path / "scored.parquet", [*OPTIONS[:2], "--users", "10", "--quiet"]
    for state in ([], ["--state", f"{tmp_path}/state", "--save-every", "1M"]):
        command = [sys.executable, "-m", "engine.cli", "run", *files, "-o", str(output), *state, *more]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        working = "scored.parquet/part-00001.parquet" if state else ".scored.parquet.*.part"
        while not any(tmp_path.glob(working)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate()[1] == "riskring: terminated\n"
        assert process.returncode == 143
        assert sorted(os.listdir(tmp_path)) == ["rows.parquet", *(["scored.parquet", "state"] if state else [])]
    left = RiskEngine.load(tmp_path / "state").restored.position
    assert left["rows"] == 1_000_000 * left["parts"] < 30_000_000
    assert set(range(left["parts"] - 1)) <= {int(name[5:10]) for name in parts(output) if name[0] != "."} <= set(range(left["parts"]))
    assert not [name for name in parts(output) if name.startswith("..")], "what was half written is removed"


def test_sigterm_while_standard_input_is_read(tmp_path: Path) -> None:
    """Also when a line was cut in two, which is what the reader then sees first."""
    command = [sys.executable, "-m", "engine.cli", "run", "-", "-o", f"{tmp_path}/scored.csv"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        # More than a pipe holds: when all is written, the process is at work.
        process.stdin.write("user_id,amount,timestamp\n" + "alice,1,2025-01-01\n" * 60_000 + "ali")
        process.stdin.flush()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "riskring: terminated\n"
        assert process.wait() == 143
    assert os.listdir(tmp_path) == []


class TestRefused:
    """What would mix two runs, or lose what somebody else wrote."""

    @pytest.fixture
    def done(self, rows: Path, tmp_path: Path) -> Iterator[Path]:
        assert main([*words(rows, tmp_path), "--quiet"]) == 0
        self.before = self.files(tmp_path)
        yield tmp_path
        assert self.files(tmp_path) == self.before, "nothing was touched"

    def files(self, folder: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def refused(self, capsys: pytest.CaptureFixture[str], command: list[str], *texts: str, code: int = 2) -> None:
        capsys.readouterr()
        assert main(command) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for text in texts:
            assert text in error

    def test_other_files(self, rows: Path, done: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any) -> None:
        other = tmp_path_factory.mktemp("other") / "rows.parquet"
        generate.write(other, ROWS, users=50, rate=100.0, seed=8)
        self.refused(capsys, words(other, done), "files rows.parquet", "another --state")

    def test_a_copy_of_the_files_is_the_same(self, rows: Path, done: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        copy = tmp_path_factory.mktemp("copy") / "rows.parquet"
        copy.write_bytes(rows.read_bytes())
        assert main([*words(copy, done), "--quiet"]) == 0

    @pytest.mark.parametrize("more", [("--window", "3s"), ("--max-jump", "2h"), ("--closed", "right"), ("--lateness", "9s")])
    def test_other_options(self, rows: Path, done: Path, capsys: Any, more: tuple[str, str]) -> None:
        self.refused(capsys, words(rows, done, ".parquet", *more), more[0][2:].replace("-", "_"), "another --state")

    def test_other_outputs(self, rows: Path, done: Path, capsys: Any) -> None:
        self.refused(capsys, words(rows, done, ".csv"), "scored.parquet", "scored.csv")

    def test_more_users_and_shards_are_no_other_run(self, rows: Path, done: Path) -> None:
        assert main([*words(rows, done, ".parquet", "--users", "20k", "--shards", "3"), "--quiet"]) == 0

    def test_a_part_that_is_gone(self, rows: Path, done: Path, capsys: Any) -> None:
        (done / "scored.parquet" / "part-00001.parquet").rename(done / "elsewhere")
        self.before = self.files(done)
        self.refused(capsys, words(rows, done), "part-00001.parquet: is missing")

    def test_outputs_without_their_state(self, rows: Path, done: Path, capsys: Any) -> None:
        (done / "state").rename(done / "lost")
        self.before = self.files(done)
        self.refused(capsys, words(rows, done), "whose state is elsewhere")
        (done / "state" / ".riskring-lock").unlink()

    def test_foreign_files(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "scored.parquet").mkdir()
        (tmp_path / "scored.parquet" / "mine").write_text("")
        self.refused(capsys, words(rows, tmp_path), "holds 'mine'")
        assert parts(tmp_path / "scored.parquet") == ["mine"]

    def test_a_file_where_a_folder_is_needed(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "scored.parquet").write_text("mine")
        self.refused(capsys, words(rows, tmp_path), "is a file")
        assert (tmp_path / "scored.parquet").read_text() == "mine"

    def test_a_state_of_something_else(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        RiskEngine(users=10).save(tmp_path / "state", position={"offset": 3})
        self.refused(capsys, words(rows, tmp_path), "not those of a run over files")

    @pytest.mark.parametrize(
        ("command", "text"),
        [
            (["run", "-", "--state", "{}"], "standard input"),
            (["run", "/dev/null", "--state", "{}"], "cannot be read again"),
            (["run", "{rows}", "--state", "s3://bucket/state"], "no local folder"),
            (["run", "{rows}", "--state", "{}", "--save-every", "0"], "--save-every 0"),
            (["run", "--state", "{}"], "needs FILE"),
            (["run", "{rows}", "--state", "{}", "-o", "{}.csv", "--rejects", "{}.csv"], "the same folder"),
            (["run", "{rows}", "--state", "{}.csv", "-o", "{}.csv/"], "the same folder"),
            (["run", "{rows}", "--state", "{rows}"], "is a file; give a folder"),
            (["top", "{rows}", "--state", "{}"], "not both"),
            (["top"], "give FILE or --state"),
            (["run"], "give FILE"),
        ],
    )
    def test_usage(self, rows: Path, tmp_path: Path, capsys: Any, command: list[str], text: str) -> None:
        self.refused(capsys, [word.replace("{}", f"{tmp_path}/state").replace("{rows}", str(rows)) for word in command], text)
        assert os.listdir(tmp_path) == []

    def test_a_single_snapshot_is_no_state(self, rows: Path, done: Path, capsys: Any) -> None:
        snapshot = max((done / "state").glob("snapshot-*"))
        self.refused(capsys, ["run", str(rows), "--state", f"{snapshot}/", *OPTIONS], "is one snapshot")

    def test_two_at_a_time(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        with storage.locked(f"{tmp_path}/state"):
            self.refused(capsys, words(rows, tmp_path), "another process uses", code=1)

    def test_two_states_with_one_output_at_a_time(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        """The other one has no part yet that is visible; what it has begun must stay."""
        begun = tmp_path / "scored.parquet" / "..part-00000.parquet.17.part"
        with storage.locked(f"{tmp_path}/scored.parquet"):
            begun.write_text("half a part")
            self.refused(capsys, words(rows, tmp_path), "scored.parquet: another process uses", code=1)
        assert begun.read_text() == "half a part"

    def test_nothing_of_one_output_is_touched_when_the_other_is_refused(self, rows: Path, done: Path, capsys: Any) -> None:
        newest = max((done / "state").glob("snapshot-*"))
        (newest / "manifest.json").write_text("{}")  # so that the last part of each output would be removed
        (done / "rejects.csv" / "mine").write_text("")
        self.before = self.files(done)
        self.refused(capsys, words(rows, done), "holds 'mine'")


def test_outputs_are_made_with_the_folders_above_them(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of these names are made durable."""
    synced: list[str] = []
    plain = storage.sync_folder
    monkeypatch.setattr(storage, "sync_folder", lambda folder, system: (synced.append(folder), plain(folder, system)))
    output, state = tmp_path / "a" / "b" / "SCORED.CSV.GZ", tmp_path / "c" / "d" / "state"
    assert main(["run", str(rows), "--state", f"{state}/", "-o", f"{output}/", *OPTIONS, "--quiet"]) == 0
    assert parts(output) == ["part-00000.CSV.GZ"]
    wanted = {str(parent) for path in (output, state) for parent in path.parents if parent.is_relative_to(tmp_path)}
    assert wanted <= set(synced)


def test_hidden_names_of_others_are_left_alone(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scored.parquet"
    folder.mkdir()
    (folder / ".DS_Store").write_text("mine")
    (folder / ".part-00007.parquet").write_text("of a run that was killed")
    assert main([*words(rows, tmp_path), "--quiet"]) == 0
    assert parts(folder) == [".DS_Store", *(f"part-{number:05}.parquet" for number in range(3))]


class TestDamage:
    """Snapshots that are not whole."""

    def damage(self, snapshot: Path) -> None:
        manifest = snapshot / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-7])

    def test_an_older_snapshot_is_taken_and_parts_are_written_again(self, rows: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
        assert main([*words(rows, tmp_path), "--quiet"]) == 0
        for number in (2, 1):
            self.damage(sorted((tmp_path / "state").glob("snapshot-*"))[number])
        capsys.readouterr()
        assert main(words(rows, tmp_path)) == 0
        assert capsys.readouterr().err.count("is passed over") == 2
        equals(tmp_path, whole)

    def test_none_is_whole(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        assert main([*words(rows, tmp_path), "--quiet"]) == 0
        for snapshot in (tmp_path / "state").glob("snapshot-*"):
            self.damage(snapshot)
        before = parts(tmp_path / "scored.parquet")
        assert main(words(rows, tmp_path)) == 4
        assert "is damaged" in capsys.readouterr().err
        assert parts(tmp_path / "scored.parquet") == before

    def test_info_and_verify(self, rows: Path, tmp_path: Path, capsys: Any) -> None:
        assert main([*words(rows, tmp_path), "--quiet"]) == 0
        state = str(tmp_path / "state")
        for action in ("info", "verify"):
            capsys.readouterr()
            assert main(["snapshot", action, state, "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert [told["state"] for told in found["snapshots"]] == ["ok"] * (1 if action == "info" else 3)
            assert found["snapshots"][0]["position"]["rows"] == found["snapshots"][0]["rows"] == ROWS
            assert main(["snapshot", action, state]) == 0
            assert found["snapshots"][0]["digest"] in capsys.readouterr().out
        newest = sorted((tmp_path / "state").glob("snapshot-*"))[-1]
        part = newest / "transactions-00000.parquet"
        part.write_bytes(part.read_bytes()[:-1] + b"!")
        assert main(["snapshot", "verify", state, "--json"]) == 4
        found = json.loads(capsys.readouterr().out)["snapshots"]
        assert [told["state"] for told in found] == ["damaged", "ok", "ok"]
        assert "transactions-00000.parquet" in found[0]["why"]
        assert main(["snapshot", "verify", str(newest)]) == 4
        assert main(["snapshot", "info", str(tmp_path)]) == 4
        assert "holds no snapshot" in capsys.readouterr().err


@pytest.mark.parametrize("ids", ["int", "name"])
def test_questions_to_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: str) -> None:
    rows = tmp_path / "rows.parquet"
    generate.write(rows, ROWS, users=50, rate=100.0, ids=ids, seed=7)
    assert main([*words(rows, tmp_path), "--quiet"]) == 0
    user = str(pq.read_table(rows)["user_id"][-1].as_py())
    for question in (["top", "-k", "5"], ["score", "--user", user], ["explain", "--user", user]):
        capsys.readouterr()
        assert main([*question, str(rows), *OPTIONS, "--json"]) == 0
        wanted = capsys.readouterr().out
        assert main([*question, "--state", str(tmp_path / "state"), "--json"]) == 0
        assert capsys.readouterr().out == wanted
