"""The command line: what it prints, what it writes, what it answers to mistakes, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest

from engine import cli, doctor, flags, reference, sources
from engine import generate as streams
from engine.config import REASONS
from engine.engine import RiskEngine
from engine.forecast import forecast

DATA = Path(__file__).parent.parent / "data"
COMMANDS = ("run", "score", "top", "explain", "verify", "generate", "plan", "bench", "doctor")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RISKRING_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RISKRING_SHARDS", "1")  # less to set up; results do not depend on it
    monkeypatch.setenv("RISKRING_USERS", "10k")


@pytest.fixture
def riskring(capsys: pytest.CaptureFixture[str]):
    """Runs a command; gives exit code, standard output and standard error."""

    def run(*words: object) -> SimpleNamespace:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        if code not in (0, 3, 130):
            lines = captured.err.splitlines()
            assert len(lines) <= 1
            assert not lines or lines[0].startswith("riskring: error: ")
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A small Parquet file with bad rows in it."""
    path = tmp_path / "sample.parquet"
    streams.write(path, 3000, users=40, rate=20, disorder="5s", ties=0.1, bad=0.05, ids="name")
    return path


def csv_file(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("user_id,amount,timestamp", *rows, "")))
    return path


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """Two users, one of them with two transactions in the last minute."""
    return csv_file(
        tmp_path / "alice.csv",
        "alice,1,2025-01-01T00:00:00Z",
        "alice,10,2025-01-01T00:00:30Z",
        "alice,15.5,2025-01-01T00:01:10Z",
        "bob,2,2025-01-01T00:01:10Z",
    )


def by_library(path: Path, **options: object) -> tuple[pa.Table, RiskEngine]:
    """The table of a Parquet file with its scores, by the library."""
    table = pa.parquet.read_table(path)
    engine = RiskEngine(shards=1, users=10_000, **options)
    return table.append_column("score", engine.ingest(table, scores=True).scores), engine


def read(path: Path) -> pa.Table:
    if path.suffix == ".arrow":
        return pa.ipc.open_file(path).read_all()
    if path.suffix == ".parquet":
        return pa.parquet.read_table(path)
    return pa.csv.read_csv(path) if path.suffix == ".csv" else pa.json.read_json(path)


# Help, version, usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(riskring, command: str) -> None:
    shown = riskring(command, "--help")
    assert shown.code == 0
    assert f"examples:\n  riskring {command}" in shown.out


def test_help_names_commands_exit_codes_and_variables(riskring) -> None:
    assert all(command in riskring("--help").out for command in (*COMMANDS, "exit codes: 0 done"))
    text = " ".join(riskring("run", "--help").out.split())
    for variable in ("WINDOW", "LATENESS", "CLOSED", "DECIMALS", "USERS", "SHARDS", "CLOCK", "MAX_AHEAD", "MAX_JUMP", "TIME_UNIT"):
        assert f"RISKRING_{variable}" in text


def test_without_a_command_help_is_shown(riskring) -> None:
    assert riskring().out == riskring("--help").out


def test_version(riskring) -> None:
    shown = riskring("--version")
    assert (shown.code, shown.out.split()[0]) == (0, "riskring")


def test_help_needs_no_engine() -> None:
    program = "import sys; from engine.cli import main; main(['run', '--help']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "pyarrow", "numba", "rich"} & set(modules)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "FILE"),
        (["run", "{sample}", "--speed", "3"], "--speed"),
        (["run", "{sample}", "--window", "60"], "window='60'"),
        (["run", "{sample}", "--window", "-5s"], "--window"),
        (["run", "{sample}", "--lateness", "soon"], "lateness='soon'"),
        (["run", "{sample}", "--closed", "left"], "closed"),
        (["run", "{sample}", "--decimals", "9"], "decimals=9"),
        (["run", "{sample}", "--users", "many"], "'many' is not a size"),
        (["run", "{sample}", "--users", "1.5"], "'1.5' is not a whole number"),
        (["run", "{sample}", "--users", "0"], "users=0"),
        (["run", "{sample}", "--time-unit", "min"], "time-unit"),
        (["run", "{sample}", "--amount", "user_id"], "three different columns"),
        (["run", "{sample}", "-o", "scored.txt"], "names no format"),
        (["run", "{sample}", "-o", "nowhere/scored.csv"], "nowhere/scored.csv: the folder does not exist"),
        (["run", "{sample}", "-o", "{sample}"], "is one of the files to read"),
        (["run", "{sample}", "-o", "a.csv", "--rejects", "a.csv"], "same file"),
        (["score", "{sample}"], "--user"),
        (["explain", "{sample}"], "--user"),
        (["score", "{sample}", "--user", "alice", "--at", "yesterday"], "yesterday"),
        (["top", "{sample}", "--by", "name"], "name"),
        (["generate", "stream.txt"], "names no format"),
        (["generate", "stream.csv", "--skew", "-1"], "skew=-1.0"),
        (["generate", "stream.csv", "--ids", "float"], "float"),
        (["plan", "--users", "1M"], "--rate"),
        (["plan", "--users", "0", "--rate", "1"], "at least 1"),
    ],
)
def test_usage_errors(riskring, sample: Path, words: list[str], text: str) -> None:
    answer = riskring(*(word.replace("{sample}", str(sample)) for word in words))
    assert (answer.code, answer.out) == (2, "")
    assert text in answer.err


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("10k", 10_000), ("2.5M", 2_500_000), ("1_000", 1000), ("1e3", 1000), ("1G", 10**9), ("2b", 2 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert flags.size(text) == size


# run


def test_run_prints_a_summary(riskring, alice: Path) -> None:
    shown = riskring("run", alice)
    assert (shown.code, shown.err) == (0, "")
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["accepted", "4"] in lines
    assert ["rejected", "0"] in lines
    assert ["clock", "2025-01-01T00:01:10Z"] in lines
    assert lines[-2][:4] == ["alice", "2", "25.5000", "12.75"]
    assert lines[-1][:4] == ["bob", "1", "2.0000", "2.0"]


def test_run_as_json_equals_the_library(riskring, sample: Path) -> None:
    shown = json.loads(riskring("run", sample, "--json").out)
    table, engine = by_library(sample)
    stats = engine.stats()
    assert shown["rows"] == stats.rows == table.num_rows
    assert shown["accepted"] == stats.accepted
    assert shown["rejected"] == {reason: count for reason, count in stats.rejected.items() if count}
    assert {"future", "late", "null_user"} < set(shown["rejected"])
    assert (shown["users"], shown["transactions"]) == (stats.users, stats.transactions)
    assert np.datetime64(shown["clock"][:-1], "ns") == stats.clock
    assert [row["user_id"] for row in shown["top"]] == engine.top(5)["user_id"].to_pylist()
    assert [row["score"] for row in shown["top"]] == engine.top(5)["score"].to_pylist()


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "ndjson"])
def test_scored_file_equals_the_library(riskring, sample: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"scored.{suffix}"
    assert riskring("run", sample, "-o", out, "--quiet").out == ""
    wanted, _ = by_library(sample)
    found = read(out)
    assert found.column_names == ["user_id", "amount", "timestamp", "score"]
    assert found["score"].cast(pa.float64()).to_pylist() == wanted["score"].to_pylist()
    assert found["score"].null_count > 50
    if suffix in ("parquet", "arrow"):
        assert found.select(["user_id", "timestamp"]).equals(wanted.select(["user_id", "timestamp"]))
        assert found.schema.equals(wanted.schema)
    assert sorted(os.listdir(tmp_path)) == ["sample.parquet", f"scored.{suffix}"]


def test_rejected_rows_are_written_with_their_reason(riskring, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "rejects.parquet"
    counts = json.loads(riskring("run", sample, "--rejects", out, "--json").out)["rejected"]
    found = read(out)
    assert found.column_names == ["user_id", "amount", "timestamp", "reason"]
    assert Counter(found["reason"].to_pylist()) == counts


def test_rejects_of_a_clean_file_are_an_empty_file(riskring, alice: Path, tmp_path: Path) -> None:
    riskring("run", alice, "--rejects", tmp_path / "rejects.csv")
    assert (tmp_path / "rejects.csv").read_text().strip() == '"user_id","amount","timestamp","reason"'


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_of_a_csv_is_plain_text_in_the_files_written(riskring, alice: Path, tmp_path: Path, suffix: str) -> None:
    """What `sources` marks as text of a file, to be parsed, is not marked so in another file."""
    scored, rejects = tmp_path / f"scored.{suffix}", tmp_path / f"rejects.{suffix}"
    riskring("run", alice, "-o", scored, "--rejects", rejects)
    for path in (scored, rejects):
        assert all(field.metadata is None or b"riskring" not in field.metadata for field in read(path).schema)
    answer = riskring("run", scored)
    assert answer.code == 1
    assert "column 'amount' has type string" in answer.err


def test_several_files_are_one_stream(riskring, tmp_path: Path) -> None:
    first = csv_file(tmp_path / "b.csv", "alice,1,2025-01-01T00:00:00Z")
    second = csv_file(tmp_path / "a.csv", "alice,2,2025-01-01T00:00:01Z")
    out = tmp_path / "scored.csv"
    riskring("run", first, second, "-o", out)
    assert read(out)["score"].to_pylist() == [1.0, 1.5]
    assert json.loads(riskring("run", second, first, "--json").out)["rows"] == 2


@pytest.mark.parametrize("shape", ["header", "parquet"])
def test_file_without_rows(riskring, tmp_path: Path, shape: str) -> None:
    path = csv_file(tmp_path / "none.csv")
    if shape == "parquet":
        path = tmp_path / "none.parquet"
        streams.write(path, 0)
    shown = riskring("run", path, "-o", tmp_path / "scored.csv")
    assert shown.code == 0
    assert "no row was accepted" in shown.out
    assert read(tmp_path / "scored.csv").column_names == ["user_id", "amount", "timestamp", "score"]
    assert riskring("score", path, "--user", "7", "--json").out.startswith('[{"user_id": ')
    assert json.loads(riskring("top", path, "--json").out) == []


REASON_ROWS = {
    "null_user": (["", "1", "2025-01-01"], []),
    "null_amount": (["alice", "12.5O", "2025-01-01"], []),
    "null_timestamp": (["alice", "1", "31/12/2024"], []),
    "amount_not_finite": (["alice", "nan", "2025-01-01"], []),
    "amount_out_of_range": (["alice", "1e18", "2025-01-01"], []),
    "timestamp_out_of_range": (["alice", "1", "9999-12-31T23:59:59Z"], []),
    "future": (["alice", "1", "2200-01-01"], []),
    "jump": (["alice", "1", "2025-01-02T00:00:00.000000001Z"], ["--max-jump", "1d"]),
    "late": (["alice", "1", "2024-12-31T23:58:59.999999999Z"], []),
}


@pytest.mark.parametrize("reason", REASON_ROWS)
def test_each_reason(riskring, tmp_path: Path, reason: str) -> None:
    row, flags = REASON_ROWS[reason]
    path = csv_file(tmp_path / "rows.csv", "bob,1,2025-01-01", ",".join(row))
    shown = riskring("run", path, "--json", "--rejects", tmp_path / "rejects.csv", *flags)
    assert json.loads(shown.out)["rejected"] == {reason: 1}
    assert (tmp_path / "rejects.csv").read_text().splitlines()[1] == ",".join(f'"{cell}"' if cell else "" for cell in (*row, reason))


def test_sum_overflow(riskring, tmp_path: Path) -> None:
    path = csv_file(tmp_path / "rows.csv", *[f"alice,{2**53},2025-01-01"] * 513)
    assert json.loads(riskring("run", path, "--json", "--decimals", 0).out)["rejected"] == {"sum_overflow": 1}


def test_every_reason_is_tested() -> None:
    assert {*REASON_ROWS, "sum_overflow"} == set(REASONS)


def test_max_ahead_none_accepts_the_future(riskring, tmp_path: Path) -> None:
    path = csv_file(tmp_path / "rows.csv", "alice,1,2200-01-01")
    assert json.loads(riskring("run", path, "--json", "--max-ahead", "none").out)["accepted"] == 1


def test_strict(riskring, sample: Path, alice: Path) -> None:
    assert [riskring(command, sample, "--strict").code for command in ("run", "top")] == [3, 3]
    assert riskring("run", alice, "--strict").code == 0


def test_global_flags_stand_before_and_after_the_command(riskring, sample: Path) -> None:
    before, after = riskring("--json", "--strict", "run", sample), riskring("run", sample, "--json", "--strict")
    assert before.code == after.code == 3
    assert json.loads(before.out)["rejected"] == json.loads(after.out)["rejected"]


def test_quiet(riskring, sample: Path) -> None:
    shown = riskring("run", sample, "--quiet")
    assert (shown.code, shown.out, shown.err) == (0, "", "")


# Input that cannot be read


def truncated(path: Path) -> Path:
    content = path.read_bytes()
    broken = path.with_name("broken.parquet")
    broken.write_bytes(content[: len(content) // 2])
    return broken


@pytest.mark.parametrize("command", [["run"], ["score", "--user", "1"], ["top"], ["explain", "--user", "1"], ["verify"]])
def test_bad_input(riskring, sample: Path, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "empty.csv").touch()
    near = tmp_path / "near.csv"
    near.write_text("userid,amount,timestamp\nalice,1,2025-01-01\n")
    whole = tmp_path / "whole.parquet"
    pa.parquet.write_table(pa.table({"user_id": [1], "amount": [1.0], "timestamp": [60]}), whole)
    for path, texts in (
        (tmp_path / "missing.parquet", ["missing.parquet"]),
        (truncated(sample), ["broken.parquet"]),
        (tmp_path / "folder", ["folder"]),
        (tmp_path / "empty.parquet", ["empty.parquet"]),
        (tmp_path / "empty.csv", ["empty.csv"]),
        (near, ["user_id", "userid"]),
        (whole, ["timestamp", "time_unit"]),
    ):
        answer = riskring(*command, path)
        assert (answer.code, answer.out) == (1, ""), path
        assert all(text in answer.err for text in texts), answer.err


def test_full_engine(riskring, sample: Path) -> None:
    answer = riskring("run", sample, "--users", 3)
    assert answer.code == 1
    assert "3" in answer.err


def test_failed_run_leaves_no_file_and_keeps_the_old_one(riskring, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.csv"
    out.write_text("old")
    broken = truncated(sample)
    answer = riskring("run", sample, broken, "-o", out, "--rejects", tmp_path / "rejects.csv")
    assert answer.code == 1
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["broken.parquet", "sample.parquet", "scored.csv"]


def test_interrupted_run_leaves_no_file(riskring, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sources.read

    def read_some(*arguments: object) -> object:
        yield next(real(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "read", read_some)
    answer = riskring("run", sample, "-o", tmp_path / "scored.parquet")
    assert (answer.code, answer.err) == (130, "riskring: interrupted\n")
    assert os.listdir(tmp_path) == ["sample.parquet"]


def test_interrupt_while_files_are_read_and_written_leaves_nothing(tmp_path: Path) -> None:
    rows = 2_000_000
    table = pa.table(
        {"user_id": np.arange(rows) % 999, "amount": np.ones(rows), "timestamp": pa.array(np.arange(rows), pa.timestamp("us"))}
    )
    pa.parquet.write_table(table, tmp_path / "long.parquet")
    files = [tmp_path / "long.parquet"] * 20
    process = start("run", *files, "-o", tmp_path / "scored.parquet", "--rejects", tmp_path / "rejects.parquet")
    while not any(name.startswith(".scored") for name in os.listdir(tmp_path)):  # then it is at work
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate()
    assert (process.returncode, shown, errors) == (130, "", "riskring: interrupted\n")
    assert os.listdir(tmp_path) == ["long.parquet"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "ndjson"])
def test_file_that_cannot_be_written_to_its_end(sample: Path, tmp_path: Path, suffix: str) -> None:
    """A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    out = tmp_path / f"scored.{suffix}"
    process = start("run", *[sample] * 50, "-o", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    shown, errors = process.communicate()
    assert (process.returncode, shown) == (1, "")
    assert errors.startswith("riskring: error: ")
    assert "File too large" in errors
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["sample.parquet"]


def test_column_score_in_the_input(riskring, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("user_id,amount,timestamp,score\nalice,1,2025-01-01,3\n")
    answer = riskring("run", path, "-o", tmp_path / "scored.csv")
    assert (answer.code, os.listdir(tmp_path)) == (1, ["rows.csv"])
    assert "column 'score'" in answer.err
    assert riskring("run", path).code == 0


def test_debug_shows_the_traceback(sample: Path) -> None:
    with pytest.raises(ValueError, match="window='60'"):
        cli.main(["run", str(sample), "--window", "60", "--debug"])


def test_unexpected_error_is_one_line(riskring, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_nothing(*_: object) -> object:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(sources, "read", read_nothing)
    answer = riskring("run", sample)
    assert answer.code == 1
    assert "unexpected RuntimeError: a bug in two lines" in answer.err


# The environment


def test_environment_gives_options(riskring, alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted() -> float:
        return json.loads(riskring("score", alice, "--user", "alice", "--json").out)[0]["score"]

    assert accepted() == 12.75
    monkeypatch.setenv("RISKRING_WINDOW", "30s")
    assert accepted() == 15.5
    assert json.loads(riskring("score", alice, "--user", "alice", "--json", "--window", "2m").out)[0]["count"] == 3


def test_environment_gives_every_kind_of_flag(riskring, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RISKRING_JSON", "1")
    monkeypatch.setenv("RISKRING_STRICT", "yes")
    monkeypatch.setenv("RISKRING_QUIET", "0")
    monkeypatch.setenv("RISKRING_OUTPUT", str(tmp_path / "scored.parquet"))
    shown = riskring("run", sample)
    assert shown.code == 3
    assert json.loads(shown.out)["rows"] == 3000
    assert (tmp_path / "scored.parquet").exists()
    monkeypatch.setenv("RISKRING_USER", "user-1")
    assert json.loads(riskring("score", sample).out)[0]["user_id"] == "user-1"


@pytest.mark.parametrize(("variable", "text"), [("RISKRING_USERS", "many"), ("RISKRING_CLOSED", "left"), ("RISKRING_WINDOW", "60")])
def test_environment_that_cannot_be_used(riskring, sample: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(variable, text)
    answer = riskring("run", sample)
    assert answer.code == 2
    assert text in answer.err


# score, top, explain


def test_score(riskring, alice: Path) -> None:
    lines = riskring("score", alice, "--user", "bob", "--user", "alice", "--user", "nobody").out.splitlines()
    assert lines[0].split() == ["user_id", "count", "sum", "score", "newest", "valid_until", "zero_at"]
    assert lines[1].split()[:4] == ["bob", "1", "2.0000", "2.0"]
    assert lines[2].split() == [
        "alice",
        "2",
        "25.5000",
        "12.75",
        "2025-01-01T00:01:10Z",
        "2025-01-01T00:01:30Z",
        "2025-01-01T00:02:10.000000001Z",
    ]
    assert lines[3].split() == ["nobody", "0", "0.0000", "0.0"]


def test_score_at_an_instant(riskring, alice: Path) -> None:
    def at(instant: str) -> float:
        return json.loads(riskring("score", alice, "--user", "alice", "--json", "--at", instant).out)[0]["score"]

    assert at("2025-01-01T00:00:30Z") == 5.5
    assert at("2025-01-01T00:02:10Z") == 15.5
    assert at("2025-01-01T00:02:10.000001Z") == 0.0
    assert at("now") == 0.0
    too_old = riskring("score", alice, "--user", "alice", "--at", "2025-01-01T00:00:09Z")
    assert (too_old.code, too_old.out) == (1, "")


def test_score_of_integer_and_binary_ids(riskring, tmp_path: Path) -> None:
    instant = pa.array([0], pa.timestamp("s"))
    for ids, user, shown in (
        (pa.array([-7]), "-7", -7),
        (pa.array([7], pa.uint8()), "7", 7),
        (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1), 2**64 - 1),
        (pa.array([b"\x00\xff"]), "0x00ff", "0x00ff"),
        (pa.array([b"alice"]), "alice", "0x616c696365"),
        (pa.array(["alice"]).dictionary_encode(), "alice", "alice"),
    ):
        path = tmp_path / "rows.parquet"
        pa.parquet.write_table(pa.table({"user_id": ids, "amount": [2.5], "timestamp": instant}), path)
        found = json.loads(riskring("score", path, f"--user={user}", "--json").out)[0]
        assert (found["user_id"], found["score"]) == (shown, 2.5)


def test_user_that_is_no_number(riskring, tmp_path: Path) -> None:
    streams.write(tmp_path / "rows.parquet", 10)
    answer = riskring("score", tmp_path / "rows.parquet", "--user", "alice")
    assert answer.code == 2
    assert "'alice' is not a whole number" in answer.err


@pytest.mark.parametrize("by", ["score", "sum", "count", "newest"])
def test_top(riskring, sample: Path, by: str) -> None:
    shown = json.loads(riskring("top", sample, "-k", 7, "--by", by, "--json").out)
    wanted = by_library(sample)[1].top(7, by=by)
    assert [row["user_id"] for row in shown] == wanted["user_id"].to_pylist()
    assert [row["sum"] for row in shown] == [str(value) for value in wanted["sum"].to_pylist()]


def test_explain(riskring, alice: Path) -> None:
    text = riskring("explain", alice, "--user", "alice").out
    assert "12.75 = 25.5000 / 2" in text
    assert "2025-01-01T00:00:10Z to 2025-01-01T00:01:10Z" in text
    found = json.loads(riskring("explain", alice, "--user", "alice", "--json", "--at", "2025-01-01T00:00:30Z").out)
    assert (found["user_id"], found["score"], found["sum"], found["count"]) == ("alice", 5.5, "11.0000", 2)
    assert found["transactions"] == [
        {"timestamp": "2025-01-01T00:00:00Z", "amount": "1.0000"},
        {"timestamp": "2025-01-01T00:00:30Z", "amount": "10.0000"},
    ]
    assert "0.0 = 0.0000 / 0" in riskring("explain", alice, "--user", "nobody").out


# verify, generate, plan, doctor


def test_verify(riskring, sample: Path) -> None:
    shown = riskring("verify", sample)
    assert shown.code == 0
    assert shown.out.startswith("equal: 3,000 rows and ")
    found = json.loads(riskring("verify", sample, "--json").out)
    assert (found["equal"], found["rows"], found["difference"]) == (True, 3000, None)


def test_verify_that_finds_a_difference(riskring, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reference.Verification(rows=17, users=3, equal=False, difference="row 16: found 1.0, wanted 2.0")
    monkeypatch.setattr(reference, "verify", lambda *_, **__: found)
    shown = riskring("verify", sample)
    assert (shown.code, shown.out) == (1, "different after 17 rows: row 16: found 1.0, wanted 2.0\n")


def test_generate(riskring, tmp_path: Path) -> None:
    path = tmp_path / "stream.parquet"
    flags = (
        "--rows 2k --users 50 --rate 1k --skew 1.1 --bursts 0.1 --disorder 2s --ties 0.1 --bad 0.02 --ids uuid --seed 4 --start 2025-02-01"
    )
    shown = riskring("generate", path, *flags.split())
    assert (shown.code, shown.out) == (0, "")
    assert f"{path}: 2,000 rows" in shown.err
    options = {"skew": 1.1, "bursts": 0.1, "disorder": "2s", "ties": 0.1, "bad": 0.02, "ids": "uuid", "seed": 4, "start": "2025-02-01"}
    wanted = pa.Table.from_batches(list(streams.transactions(2000, users=50, rate=1000, **options)))
    assert read(path).select(["user_id", "timestamp"]).equals(wanted.select(["user_id", "timestamp"]))
    found = json.loads(riskring("generate", path, *flags.split(), "--json").out)
    assert (found["rows"], found["bytes"]) == (2000, path.stat().st_size)


@pytest.mark.parametrize(("mean", "ids"), [(0.5, "int"), (3.0, "uuid"), (12.0, "int"), (100.0, "int")])
def test_plan_agrees_with_an_engine(riskring, mean: float, ids: str) -> None:
    """The forecast against an engine that has taken in rows steadily for six retentions."""
    users = 20_000
    rate = mean * users / 120
    flags = ("--users", users, "--rate", rate, "--id-bytes", 36 if ids == "uuid" else 0)
    found = json.loads(riskring("plan", *flags, "--json").out)
    with RiskEngine(users=users, shards=1, max_ahead=None) as engine:
        for batch in streams.transactions(int(6 * mean * users), users=users, rate=rate, ids=ids, batch_rows=1024):
            engine.ingest(batch)
        stats = engine.stats()
    assert found["active_users"] == pytest.approx(stats.users, rel=0.02)
    assert found["transactions"] == pytest.approx(stats.transactions, rel=0.02)
    assert found["total_bytes"] == pytest.approx(stats.bytes, rel=0.25)
    assert found["total_bytes"] == pytest.approx(sum(found[f"{part}_bytes"] for part in ("slots", "index", "rings", "ids")), abs=3)


def test_plan_is_readable(riskring) -> None:
    text = riskring("plan", "--users", "10M", "--rate", "1M").out
    assert "120,000,000 transactions" in text
    assert "GB" in text
    assert "bytes per user" in text


def test_plan_of_busy_users_and_of_none() -> None:
    busy = forecast(10, 1e6, 120 * 10**9)
    # A ring is at most a quarter too large, and one of the ten may have left its smaller blocks behind.
    assert 1.0 < busy["rings"] / (16 * busy["transactions"]) < 1.25 * (1.1 + 2.25 / 10)
    none = forecast(10, 0.0, 120 * 10**9)
    assert none["total"] == none["index"] < 100


def test_doctor(riskring) -> None:
    shown = riskring("doctor")
    assert shown.code == 0
    assert all(line.split()[0] in ("ok", "warn") for line in shown.out.splitlines())
    states = {check["check"]: check["state"] for check in json.loads(riskring("doctor", "--json").out)}
    assert states["engine"] == states["numba"] == "ok"


def test_doctor_reports_a_broken_engine(riskring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RiskEngine, "score", lambda *_, **__: 0.25)
    shown = riskring("doctor")
    assert shown.code == 1
    assert "instead of" in shown.out.splitlines()[-1]
    monkeypatch.setattr(RiskEngine, "score", None)
    assert riskring("doctor").out.splitlines()[-1].startswith("fail  engine")


def test_doctor_gives_the_fix(riskring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    monkeypatch.setattr(doctor, "memory_available", lambda: 10**8)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    lines = riskring("doctor").out
    assert "fail  numpy         missing; pip install numpy" in lines
    assert "warn  memory        100.0 MB available; " in lines
    assert "set NUMBA_CACHE_DIR" in lines
    assert "warn  cores" in lines


# Terminals and pipes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal_only(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["run", str(sample)]) == 0
    assert "3,000 rows" in terminal.getvalue()
    terminal.truncate(0)
    assert cli.main(["run", str(sample), "--quiet"]) == 0
    assert terminal.getvalue().strip("\0") == ""


def test_no_progress_bar_without_rich(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["run", str(sample)]) == 0
    assert sys.stderr.getvalue() == ""


def test_colour_on_a_terminal_only(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for no_colour in ("", "1"):
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("NO_COLOR", no_colour)
        assert cli.main(["top", str(sample)]) == 0
        assert cli.main(["doctor"]) == 0
        shown.append(sys.stdout.getvalue())
    assert "\x1b[1muser_id\x1b[0m" in shown[0]
    assert "\x1b[32mok" in shown[0]
    assert "\x1b" not in shown[1]


def test_closed_pipe_does_not_change_the_exit_code(alice: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["top", str(alice)]) == 0
    assert cli.main(["run", str(sample), "--strict"]) == 3


def test_standard_input_in_process(riskring, alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, wanted in ((["score", "--user", "alice"], "12.75"), (["verify"], "equal: 4 rows")):
        with alice.open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert wanted in riskring(*command, "-").out
            assert sys.stdin is stream


# A process of its own


def start(*words: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "engine.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_exit_codes_of_the_process(sample: Path, tmp_path: Path) -> None:
    for words, code in (
        (["run", sample], 0),
        (["run", tmp_path / "missing.csv"], 1),
        (["run", sample, "--window", "60"], 2),
        (["run", sample, "--strict"], 3),
    ):
        process = start(*words)
        _, errors = process.communicate()
        assert process.returncode == code
        assert errors.count("\n") == (0 if code in (0, 3) else 1)


def test_standard_input(alice: Path) -> None:
    process = start("score", "-", "--user", "alice", "--json", stdin=subprocess.PIPE)
    shown, _ = process.communicate(alice.read_text())
    assert json.loads(shown)[0]["score"] == 12.75


def test_interrupt_is_130_and_leaves_no_file(tmp_path: Path) -> None:
    # Several at once: Arrow's reading ahead, slowed down, would be within Python when that is taken down, and abort the process.
    processes = [start("run", "-", "-o", tmp_path / f"scored{number}.csv", stdin=subprocess.PIPE) for number in range(6)]
    for process in processes:
        # More than a pipe holds: when all is written, the process is at work, and soon it waits for more that never comes.
        process.stdin.write("user_id,amount,timestamp\n" + "alice,1,2025-01-01\n" * 60_000)
        process.stdin.flush()
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        errors = process.stderr.read()
        assert (process.wait(), errors) == (130, "riskring: interrupted\n")
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
    assert os.listdir(tmp_path) == []


def test_error_does_not_wait_for_more_input() -> None:
    process = start("run", "-", "--users", "1", stdin=subprocess.PIPE)
    process.stdin.write("user_id,amount,timestamp\n" + "alice,1,2025-01-01\nbob,1,2025-01-01\n" * 200_000)
    process.stdin.flush()
    assert "users=1" in process.stderr.read()
    assert process.wait() == 1
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.close()


@pytest.mark.parametrize(
    ("words", "code"), [(["top", "{sample}", "-k", "100k", "--json"], 0), (["run", "{sample}", "--strict"], 3), (["run", "--help"], 0)]
)
def test_closed_pipe_is_quiet(sample: Path, words: list[str], code: int) -> None:
    process = start(*(word.replace("{sample}", str(sample)) for word in words))
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (code, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_full_disk_behind_standard_output(sample: Path) -> None:
    command = [sys.executable, "-m", "engine.cli", "top", str(sample)]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert "No space left" in process.stderr


# The files in data/


@pytest.mark.parametrize("name", ["transactions.parquet", "transactions.csv"])
def test_data_gives_what_its_page_says(riskring, name: str) -> None:
    page = (DATA / "README.md").read_text()
    shown = riskring("run", DATA / name, "--users", "10k").out.splitlines()
    assert shown[0].split()[:2] == ["rows", "20,000"]
    for line in shown[1:]:
        assert line in page
    assert riskring("verify", DATA / name).code == 0


def test_data_parquet_is_made_by_its_command(riskring, tmp_path: Path) -> None:
    page = (DATA / "README.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("riskring generate data/transactions.parquet")).split()[3:]
    riskring("generate", tmp_path / "again.parquet", *command)
    again, kept = read(tmp_path / "again.parquet"), read(DATA / "transactions.parquet")
    assert again.schema.equals(kept.schema)
    for name in kept.column_names:
        assert pc.all(pc.equal(again[name].cast(pa.string()), kept[name].cast(pa.string()))).as_py()


def test_streams_that_begin_now(riskring, tmp_path: Path) -> None:
    before = time.time_ns()
    assert riskring("generate", "--rows", "10", "--start", "now", tmp_path / "live.parquet").code == 0
    first = pa.parquet.read_table(tmp_path / "live.parquet")["timestamp"][0].value * 1000
    assert before - 10**6 <= first <= time.time_ns() + 10**9
