"""`riskring bench` and what it measures with: that it runs, says what it promises, and refuses what it cannot do. No time is judged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import benchmark, cli, doctor, measurements
from engine.adapters import peers as peers_module
from engine.engine import RiskEngine
from engine.kernels.roofline import touch_lines
from engine.measurements import Lines, Measured, Uniform, rounds

ROOT = Path(__file__).parent.parent
TINY = ("bench", "--users", "2000", "--seconds", "0.01", "--rows", "2000", "--shards", "1")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RISKRING_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def riskring(capsys: pytest.CaptureFixture[str]):
    """Runs a command; gives exit code, standard output and standard error."""

    def run(*words: object) -> SimpleNamespace:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring is a failure of the test."""

    def measure(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(benchmark, "_measure_engine", measure)


@pytest.fixture
def quick_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own figures are given, so that only peers take time."""
    steady = Measured("ingest", "ingest with scores, 1 shard", "rows/s", [1e6, 2e6, 3e6], {"shards": 1})
    steady.facts["of_lines"] = {"median": 0.5, "iqr": 0.1}
    monkeypatch.setattr(benchmark, "_measure_engine", lambda *_: [steady])


# The command


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The command as users run it, in a process of its own."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RISKRING_")}
    words = ["bench", "--users", "2000", "--seconds", "1", "--peers", "none", "--json", "-o", str(path)]
    command = [sys.executable, "-m", "engine.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment | {"RISKRING_SHARDS": "2"})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(result=json.loads(done.stdout), err=done.stderr, path=path)


def test_json_has_what_it_promises(tiny_run: SimpleNamespace) -> None:
    result = tiny_run.result
    assert list(result) == ["version", "settings", "machine", "measured", "peers", "missing", "failed"]
    assert result["settings"] == {"users": 2000, "seconds": 1.0, "shards": 2, "rows": 1_000_000}
    assert result["peers"] == result["missing"] == result["failed"] == []
    assert set(result["machine"]["versions"]) == {"python", "riskring", "numpy", "numba", "pyarrow"}
    names = [(found["name"], found.get("shards")) for found in result["measured"]]
    assert names == [
        *[("lines", 1), ("ingest", 1), ("lines", 1), ("lookup", 1), ("add", None), ("score", None)],
        *[("lines", 2), ("ingest", 2), ("lines", 2), ("lookup", 2), ("resident", None), ("first score", None)],
    ]


def test_figures_come_with_all_samples(tiny_run: SimpleNamespace) -> None:
    for found in tiny_run.result["measured"]:
        assert found["median"] == pytest.approx(np.median(found["samples"]))
        assert min(found["samples"]) > 0
        assert len(found["samples"]) >= (1 if found["name"] == "resident" else 3)
        assert found["unit"] in ("rows/s", "ns", "s", "bytes")
        assert ("p999" in found) == (found["unit"] == "ns")
        if found["name"] in ("ingest", "lookup"):
            assert set(found["of_lines"]) == {"median", "iqr"}


def test_output_is_the_same_json(tiny_run: SimpleNamespace) -> None:
    assert json.loads(tiny_run.path.read_text()) == tiny_run.result


def test_progress_goes_to_standard_error(tiny_run: SimpleNamespace) -> None:
    assert tiny_run.err.splitlines()
    assert all(line.startswith("riskring bench: ") for line in tiny_run.err.splitlines())


def test_table_for_people(riskring) -> None:
    """Everything measured, one peer beside it, nothing said about progress."""
    shown = riskring(*TINY, "--peers", "plain", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert "cores" in lines[0]
    assert "riskring 0." in lines[1]
    assert lines[2] == "2,000 users, one row each per minute; each thing measured for 0.01 s"
    for what in (
        "3 random lines a row, 1 thread",
        "ingest with scores, 1 shard",
        "scores() of a million users, 1 shard",
        "add() of one row",
    ):
        assert sum(line.startswith(what) for line in lines) == 1
    assert sum("of the lines above" in line for line in lines) == 2
    assert sum("p99.9" in line for line in lines) == 2
    (plain,) = (line for line in lines if line.startswith("plain"))
    assert plain.split()[1] == "200"
    assert plain.endswith("streaming: deque and running sum per user, plain Python")


@pytest.mark.usefixtures("quick_engine")
def test_missing_peer_is_named_and_the_rest_runs(riskring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    shown = riskring(*TINY, "--peers", "river,plain,flink")
    assert shown.code == 0
    assert "riskring bench: river is left out; it needs pip install river\n" in shown.err
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines[-4:] if line] == ["plain", "river", "flink"]
    assert lines[-2] == "river  left out; it needs pip install river"
    result = json.loads(riskring(*TINY, "--peers", "river,plain", "--json").out)
    assert result["missing"] == [{"name": "river", "needs": "pip install river"}]
    assert [found["name"] for found in result["peers"]] == ["plain"]


@pytest.mark.usefixtures("quick_engine")
def test_peer_in_json(riskring) -> None:
    (plain,) = json.loads(riskring(*TINY, "--peers", "plain", "--json").out)["peers"]
    assert (plain["name"], plain["rows"], plain["mode"], plain["tolerance"]) == ("plain", 200, "streaming", 1e-9)
    assert len(plain["samples"]) == len(plain["engine"]["samples"]) >= 3
    ratios = np.array(plain["engine"]["samples"]) / plain["samples"]
    assert plain["times_same_rows"]["median"] == pytest.approx(np.median(ratios))
    assert plain["times_steady"] == pytest.approx(2e6 / plain["median"])


@pytest.mark.usefixtures("quick_engine")
def test_peer_that_fails_is_named_and_the_rest_runs(riskring, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(table: object) -> None:
        raise RuntimeError("out of\npatience")

    everyone = peers_module.peers()
    wrong = dataclasses.replace(everyone["duckdb"], needs="", timed=lambda table: (np.ones(table.num_rows), 1.0))
    known = everyone | {"duckdb": wrong, "river": dataclasses.replace(everyone["river"], needs="", timed=broken)}
    monkeypatch.setattr(peers_module, "peers", lambda threads, flink_python: known)
    shown = riskring(*TINY, "--peers", "river,duckdb,plain")
    assert shown.code == 1
    assert "\nriver   failed: out of patience\nduckdb  failed: duckdb: score 1.0 instead of " in shown.out
    assert "\nplain" in shown.out


def test_engine_that_is_wrong_is_not_measured(riskring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "table_scores", lambda rows, shards: np.ones(rows.num_rows))
    shown = riskring(*TINY, "--quiet")
    assert (shown.code, shown.out) == (1, "")
    assert shown.err.startswith("riskring: error: the engine's scores are not those of the reference")


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--users", "99"], "--users 99 must be from 100 to 200,000,000"),
        (["--users", "many"], "'many' is not a size"),
        (["--users", "300M"], "--users 300,000,000 must be from 100"),
        (["--seconds", "0"], "--seconds 0 must be more than 0"),
        (["--seconds", "1M"], "at most 3600"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--shards", "0"], "shards=0 must be a whole number from 1"),
        (["--peers", "duckbd"], "'duckbd' is none; did you mean 'duckdb'? There are plain, pandas"),
        (["--peers", "plain,none"], "'none' is none; There are plain"),
        (["-o", "{folder}/no/result.json"], "the folder does not exist; make it first"),
        (["-o", "{folder}"], "cannot be written; give a file"),
        (["--speed", "3"], "--speed"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(riskring, words: list[str], text: str, tmp_path: Path) -> None:
    shown = riskring("bench", "--users", "2000", *(word.format(folder=tmp_path) for word in words))
    assert shown.code == 2
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("riskring: error: ")
    assert text in line


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("words", [["--users", "10M"], ["--users", "1M", "--rows", "100M"]])
def test_more_than_the_memory_is_refused_with_a_size_that_fits(riskring, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_available", lambda: 10**9)
    shown = riskring("bench", *words)
    assert shown.code == 2
    (line,) = shown.err.splitlines()
    assert "GB of memory, and 1.0 GB are available; try --users" in line
    proposed = line.partition("try ")[2].partition(", or free memory")[0].replace(",", "").split()
    assert benchmark.memory_bytes(int(proposed[1]), int(proposed[3])) < 10**9


@pytest.mark.usefixtures("quick_engine")
def test_flags_as_variables(riskring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("PEERS", "none"), ("USERS", "2k"), ("SHARDS", "1"), ("OUTPUT", str(tmp_path / "result.json")), ("QUIET", "1")):
        monkeypatch.setenv(f"RISKRING_{name}", value)
    assert riskring("bench").err == ""
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["users"] == 2000


def test_names_of_peers_are_those_there_are() -> None:
    assert set(benchmark.PEERS) == set(peers_module.peers())


def test_help_has_examples(riskring) -> None:
    shown = riskring("bench", "--help")
    assert shown.code == 0
    assert "examples:\n  riskring bench\n" in shown.out
    assert "RISKRING_FLINK_PYTHON" in " ".join(shown.out.split())


def test_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every system has these files."""
    monkeypatch.setattr(benchmark, "_first_line", lambda path: "")
    monkeypatch.setattr(doctor, "memory_available", lambda: None)
    found = benchmark.machine()
    assert (found["caches"], found["huge_pages"], found["available_bytes"]) == ({}, None, None)
    assert found["memory_bytes"] > 0


# What it measures with


def test_rows_of_the_workload() -> None:
    workload = Uniform(500)
    rows = workload.table(2_000)
    times = rows["timestamp"].cast("int64").to_numpy()
    assert times[-1] - times[0] == 1_999 * 120_000
    assert np.all(np.diff(times) > 0)
    assert len(set(workload.ids.tolist())) == 500
    assert set(rows["user_id"].to_pylist()) <= set(workload.ids.tolist())
    amounts = rows["amount"].to_numpy()
    assert np.array_equal(amounts, np.round(amounts, 2))
    assert rows.equals(Uniform(500).table(2_000))
    assert not rows.equals(Uniform(500, seed=2).table(2_000))
    assert [batch.num_rows for batch in workload.batches(25, 10)] == [10, 10, 5]


def test_steady_engine_has_seen_two_retentions() -> None:
    engine, batches = measurements.steady(Uniform(3_000), shards=1)
    with engine:
        stats = engine.stats()
        assert stats.rows == 65_536 >= 4 * 3_000
        assert stats.users <= 3_000
        before = next(batches)["timestamp"][0].as_py()
        assert before > stats.clock.astype("datetime64[us]").item().replace(tzinfo=before.tzinfo)


def test_one_by_one_adds_to_the_engine() -> None:
    workload = Uniform(1_000)
    with RiskEngine(users=2_000, shards=1, max_ahead=None, time_unit="us") as engine:
        adds, scores = measurements.one_by_one(engine, workload.ids, 0.0)
        assert len(adds.samples) == len(scores.samples) == 100
        assert engine.stats().accepted == 200  # the first hundred were to warm up


def test_resident_bytes_of_a_user() -> None:
    found = measurements.resident(3_000)
    assert 0 < found.facts["active"] <= 3_000
    assert found.unit == "bytes"


def test_process_of_its_own_that_fails_says_why() -> None:
    with pytest.raises(measurements.EngineError, match=r"ended with 1: .*no such thing"):
        measurements._fresh("raise SystemExit('no such thing')")


def test_touch_lines_reads_and_writes_each_line() -> None:
    """Against plain loops, lines in any order and more than once."""
    random = np.random.default_rng(3)
    memory = random.integers(0, 100, 8 * 50)
    lines = random.integers(0, 50, 200)
    wanted, total = memory.copy(), 0
    for line in lines.tolist():
        total += int(wanted[8 * line])
        wanted[8 * line + 1] = total
    for ahead in (0, 1, 24, 1_000):
        touched = memory.copy()
        assert touch_lines(lines, ahead, touched) == total
        assert np.array_equal(touched, wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_roofline_runs_on_each_thread(threads: int) -> None:
    lines = Lines(1_000, 2, 500, threads)
    assert lines.rate() > 0
    measured = lines.measured([1.0, 2.0, 4.0])
    assert (measured.median, measured.facts) == (2.0, {"lines": 2, "shards": threads})


def test_rounds_alternate_and_end() -> None:
    taken = []

    def measure(name: str):
        return lambda: taken.append(name) or float(len(taken))

    assert rounds(0.0, measure("a"), measure("b"), least=2) == [[1.0, 3.0], [2.0, 4.0]]
    assert taken == ["a", "b", "a", "b"]


def test_figures_of_samples() -> None:
    found = Measured("add", "add() of one row", "ns", [float(value) for value in range(1001)], {"shards": 1})
    assert (found.median, found.iqr) == (500.0, 500.0)
    shown = found.as_dict()
    assert (shown["p99"], shown["p999"], shown["shards"]) == (990.0, pytest.approx(999.0), 1)
    assert "p99" not in Measured("table", "", "rows/s", [1.0]).as_dict()
    with pytest.raises(ValueError, match="zip"):
        found.over(Measured("lines", "", "ns", [1.0]))


def test_an_ordinary_start_knows_nothing_of_it() -> None:
    """Neither compiled nor imported before it is asked for."""
    names = "{'engine.kernels.roofline', 'engine.measurements', 'engine.adapters', 'engine.benchmark'}"
    program = f"import sys, engine.engine, engine.kernels; print(*({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
