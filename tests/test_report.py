"""The benchmarks' report: the files it promises, its numbers, and what it says when something is missing or wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import report

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RISKRING_"))}


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, check=False)


def bench(name: str, seconds: list[float], **info: Any) -> report.Bench:
    return {"name": name, "group": None, "params": {}, "info": info, "seconds": seconds}


@pytest.fixture
def written() -> report.Report:
    """A report as it is written, with one measurement of each sort."""
    benches = [
        bench("test_scale[10]", [2e-6, 4e-6, 3e-6], rows=10, users=10),
        bench("test_scale[100]", [6e-6, 6e-6, 6e-6], rows=10, users=100, beside={"lines": {"rows": 10, "seconds": [3e-6, 3e-6, 1.5e-6]}}),
        bench("test_churn", [1.0], figures={"churned / fresh x": 1.05, "fresh per user B": 71.4}),
        bench("test_help", [0.05, 0.06, 0.07]),
    ]
    file = {
        "question": "Does it?",
        "seconds": 1.0,
        "exit_code": 1,
        "notes": ["FAILED bench/bench_scale.py::test_a|b"],
        "benchmarks": benches,
    }
    machine = {"processor": "AMD", "cores": 2, "system": "Linux", "caches_bytes": {"L2": 1 << 20}}
    return {"commit": "abc", "taken": "today", "smoke": False, "machine": machine, "versions": {"numpy": "2"}, "files": {"scale": file}}


def test_a_smoke_run_gives_the_promised_files(tmp_path: Path) -> None:
    done = python("-m", "bench.report", "--smoke", "--only", "lookup", "-o", tmp_path, "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "report.md")]
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["smoke"] is True
    assert {"commit", "taken", "machine", "versions", "files"} <= set(found)
    assert {"python", "numpy", "numba", "pyarrow"} <= set(found["versions"])
    (file,) = found["files"].values()
    assert file["exit_code"] == 0, file["notes"]
    assert not file["notes"]
    known = next(bench for bench in file["benchmarks"] if bench["params"] == {"case": "known", "shards": 1})
    assert known["info"]["users"] > 0
    assert len(known["seconds"]) == len(known["info"]["beside"]["two random lines"]["seconds"]) > 0
    text = (tmp_path / "report.md").read_text()
    assert "| scores: known, 1 shard | 10,000 | " in text
    assert "Smoke sizes" in text
    assert str(ROOT) not in text
    assert (tmp_path / "lookup.log").stat().st_size > 0
    assert (tmp_path / "relative.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "relative.svg").read_bytes() == (tmp_path / "figures" / "relative.svg").read_bytes()


def test_tables_and_plots_come_from_the_samples(written: report.Report, tmp_path: Path) -> None:
    report.write(written, tmp_path, None)
    text = (tmp_path / "report.md").read_text()
    assert "| scale | 10 | 300.0 (250.0 to 350.0) | 3.33 |  |  | 3 |" in text
    assert "| scale | 100 | 600.0 (600.0 to 600.0) | 1.67 | 0.50 (0.38 to 0.50) | lines | 3 |" in text
    assert "| churn |  | churned / fresh **1.05** x; fresh per user **71.4** B |" in text
    assert "| help | 0.060 (0.055 to 0.065) | 3 |" in text
    assert "- FAILED bench/bench_scale.py::test_a\\|b" in text
    assert "L2 1 MiB" in text
    svg = tmp_path / "scale.svg"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert svg.stat().st_size < 300_000
    assert not (tmp_path / "peers.svg").exists()
    again = tmp_path / "again"
    assert report.main(["--render", str(tmp_path / "report.json"), "-o", str(again)]) == 0
    for name in ("report.md", "report.json", "scale.svg"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_plot_is_drawn_from_what_the_benchmarks_write(tmp_path: Path) -> None:
    """Shapes of all five, with numbers made up; the benchmarks themselves are run elsewhere."""
    from bench import plots  # noqa: PLC0415 - needs matplotlib

    peer = bench(
        "test_peer[duckdb]", [0.2], rows=10, peer={"name": "duckdb", "version": "1"}, beside={"engine, new": {"rows": 10, "seconds": [0.1]}}
    )
    beside = {"three random lines": {"rows": 10, "seconds": [1e-7]}}
    memory = [bench(f"test_bytes_of_a_user[{rows}]", [1.0], rows=rows, transactions=rows, users=1, resident=70 * rows) for rows in (1, 2)]
    calls = bench("test_single_calls[add]", [1.0], rows=4, histogram_ns=[[900, 3], [12_000, 1]]) | {"params": {"call": "add"}}
    files = {
        "peers": [peer],
        "scale": [bench("test_scale", [1e-6], rows=10, users=users, beside=beside) for users in (10_000, 10_000_000)]
        + [bench("test_cost_of_a_line", [1e-7], rows=10, users=users) for users in (10_000, 100_000)],
        "memory": memory,
        "ingest": [bench("test_ingest_with_scores", [2e-7], rows=10, beside=beside)],
        "latency": [calls],
    }
    made = {
        "smoke": True,
        "machine": {"caches_bytes": {"L3": 1 << 25}},
        "files": {name: {"benchmarks": found} for name, found in files.items()},
    }
    assert plots.draw(made, tmp_path) == list(plots.PLOTS)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in plots.PLOTS for kind in ("svg", "png")}


def test_ratios_are_taken_round_by_round() -> None:
    found = bench("test_x", [4.0, 2.0], rows=2, beside={"a": {"rows": 1, "seconds": [1.0, 1.0]}})
    assert report.ns_per_row(found).tolist() == [2e9, 1e9]
    assert report.relative_speeds(found)["a"].tolist() == [0.5, 1.0]
    assert report.middle(np.array([1.0, 2.0, 3.0])) == (1.5, 2.0, 2.5)


def test_labels() -> None:
    found = bench("test_sources[reader-1]", [1.0]) | {"params": {"form": "table_of_batches", "shards": 1}}
    assert report.label(found) == "sources: table of batches, 1 shard"
    assert report.label(bench("test_help", [1.0])) == "help"


def test_a_benchmark_that_fails_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken, whole = tmp_path / "bench_broken.py", tmp_path / "bench_whole.py"
    broken.write_text('"""Why?"""\nimport pytest\ndef test_wrong(): assert 1 == 2\ndef test_missing(): pytest.skip("flink needs java")\n')
    whole.write_text('"""How?"""\ndef test_right(benchmark): benchmark.pedantic(int, rounds=2)\n')
    monkeypatch.setattr(report, "benchmarks", lambda: {"broken": broken, "whole": whole})
    monkeypatch.setattr(report, "check_size", lambda smoke: None)
    assert report.main(["-o", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().err
    assert "test_wrong - assert 1 == 2" in said
    assert "flink needs java" in said
    text = (tmp_path / "both" / "report.md").read_text()
    assert "| right | " in text
    assert "Why?" in text
    assert "test_wrong" in text
    assert report.main(["--only", "broken", "-o", str(tmp_path / "one")]) == 1, "nothing was measured"


def test_without_matplotlib_there_are_tables(
    written: report.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.write(written, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    assert "no plots: matplotlib is not installed (pip install 'riskring[bench]')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--only", "ingest,nonsense"], {}, "there is no benchmark nonsense; there are "),
        (["--only", ","], {}, "there is no benchmark (none named)"),
        (["-o", "pyproject.toml"], {}, "cannot write to pyproject.toml: File exists"),
        (["--render", "README.md"], {}, "README.md is not a report.json of this program"),
        (["--render", "missing.json"], {}, "missing.json is not a report.json of this program"),
        ([], {"RISKRING_BENCH_USERS": "many"}, "RISKRING_BENCH_USERS='many' must be a whole number from 1"),
        ([], {"RISKRING_BENCH_USERS": "1000000000000"}, "takes some 400,000 GB, this machine has "),
    ],
)
def test_bad_input_is_a_clear_message(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = python("-m", "bench.report", *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_piece_of_the_day_is_replayed_and_proven() -> None:
    done = python("bench/upi.py", "--rows", "20_000", "--part-rows", "8_000", "--from-hour", "4.5", "--shards", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == found["accepted"] == found["scores_checked"] == 20_000
    assert found["day"]["rows"] == 700_000_000
    assert found["day_s"] == pytest.approx(700_000_000 / found["rows_per_s"])


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--from-hour", "24"], ["--zipf", "-1"], ["--users", "x"]])
def test_a_day_that_cannot_be_is_a_clear_message(arguments: list[str]) -> None:
    done = python("bench/upi.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {arguments[0]}" in done.stderr or f"{arguments[0]} must be" in done.stderr
    assert "Traceback" not in done.stderr
