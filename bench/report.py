"""The whole result of the benchmarks in one folder: all samples, tables and plots.

    python -m bench.report [--smoke] [--only ingest,peers] [-o FOLDER] [--figures FOLDER]

Each `bench_*.py` runs as a pytest of its own, one after another; one that fails or cannot run costs a line in the report, and the others
still run. The folder then holds `report.json` (commit, machine, versions, every sample), `report.md` (tables), `*.svg` and `*.png` (plots,
if matplotlib is there: `pip install 'riskring[bench]'`) and `*.log` (what pytest said). `--render report.json` makes tables and plots anew
from an earlier run. Exit code: 0; 1 if nothing ran; 2 if the arguments cannot be used.

A full run takes long, since every file first brings engines of 10 million users into their steady state; leave the machine alone meanwhile.
Sizes are set as for a single file: RISKRING_BENCH_USERS, RISKRING_BENCH_HUGE.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

PACKAGES = ["riskring", "numpy", "numba", "llvmlite", "pyarrow", "pytest-benchmark", "matplotlib"]
PACKAGES += ["duckdb", "polars", "pandas", "datafusion", "chdb", "river", "apache-flink"]
#: What the largest of the benchmarks takes: two engines, their rows and the random lines. At 10 million users, 4 GB.
BYTES_PER_USER = 400

Bench = dict[str, Any]
Report = dict[str, Any]


class UsageError(Exception):
    """What was asked for cannot be done; the text says why and what to do."""


# Running


def benchmarks() -> dict[str, Path]:
    """Every benchmark file by its name."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def question(path: Path) -> str:
    """The first line of the file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).splitlines()[0]


def run(name: str, path: Path, folder: Path, smoke: bool) -> dict[str, Any]:
    """One benchmark file as a process of its own."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    # Wide lines, so that pytest does not cut off why something failed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "COLUMNS": "240"}
    for inherited in [variable for variable in environment if variable.startswith("PYTEST_")]:
        del environment[inherited]  # under a worker of pytest-xdist nothing would be timed
    if smoke:
        environment["RISKRING_BENCH_SMOKE"] = "1"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-rsfE", "--tb=short", f"--benchmark-json={result}"]
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    began = time.perf_counter()
    with log.open("w") as out:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False).returncode
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        found = json.loads(result.read_text())["benchmarks"]
    except (OSError, ValueError, KeyError):
        found = []
    result.unlink(missing_ok=True)
    return {
        "question": question(path),
        "seconds": round(time.perf_counter() - began, 1),
        "exit_code": code,
        "notes": [line.strip() for line in said if line.startswith(("FAILED", "ERROR", "SKIPPED"))] or (said[-1:] if code else []),
        "benchmarks": [_bench(entry) for entry in found],
    }


def _bench(entry: dict[str, Any]) -> Bench:
    return {
        "name": entry["name"],
        "group": entry["group"],
        "params": entry["params"] or {},
        "info": entry["extra_info"],
        "seconds": entry["stats"]["data"],
    }


def commit() -> str:
    """Commit of the checkout; "-dirty" if files differ from it."""
    git = shutil.which("git")
    done = git and subprocess.run([git, "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done and done.returncode == 0 else "unknown"


def machine() -> dict[str, Any]:
    """Processor, caches and memory, as far as the system says."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    with contextlib.suppress(OSError, IndexError):
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        found["processor"] = names[0]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    caches = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(cache / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            caches[f"L{level}"] = int(size[:-1]) * 1024
    return found | {"caches_bytes": caches}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Of Python and of every package that a figure depends on and that is there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Numbers


def parameters(bench: Bench) -> str:
    """Of one measurement, in words: {"form": "reader", "shards": 2} is "reader, 2 shards"."""
    parts = []
    for name, value in bench["params"].items():
        noun = name.replace("_", " ")
        if isinstance(value, str):
            parts.append(value.replace("_", " "))
        else:
            parts.append(f"{value:,} {noun.removesuffix('s') if value == 1 else noun}")
    return ", ".join(parts)


def label(bench: Bench) -> str:
    """What was measured, in words: test_sources[reader-2] is "sources: reader, 2 shards"."""
    words = bench["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
    return f"{words}: {parameters(bench)}" if bench["params"] else words


def ns_per_row(bench: Bench) -> np.ndarray:
    """One value a round."""
    return np.asarray(bench["seconds"]) * 1e9 / bench["info"]["rows"]


def relative_speeds(bench: Bench) -> dict[str, np.ndarray]:
    """Speed over that of what was timed in the same rounds, round by round: 1.0 is as fast, 0.5 takes twice as long."""
    mine = ns_per_row(bench)
    found = {}
    for name, other in bench["info"].get("beside", {}).items():
        its = np.asarray(other["seconds"]) * 1e9 / other["rows"]
        rounds = min(len(mine), len(its))
        found[name] = its[:rounds] / mine[:rounds]
    return found


def middle(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(low), float(median), float(high)


# Tables


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# Benchmarks", "", *_heading(report), ""]
    for name, file in report["files"].items():
        lines += [f"## {name}", "", file["question"], ""]
        times = [bench for bench in file["benchmarks"] if "rows" in bench["info"] and "figures" not in bench["info"]]
        figures = [bench for bench in file["benchmarks"] if "figures" in bench["info"]]
        others = [bench for bench in file["benchmarks"] if bench not in times and bench not in figures]
        for table in (_times(times), _figures(figures), _seconds(others)):
            lines += [*table, ""] if table else []
        lines += [f"- {_plain(note)}" for note in file["notes"]]
        lines += [""] if file["notes"] else []
    return "\n".join(lines).rstrip() + "\n"


def _heading(report: Report) -> Iterator[str]:
    about = report["machine"]
    parts = [about["processor"], f"{about['cores']} cores"]
    parts += [f"{name} {readable_bytes(size)}" for name, size in about.get("caches_bytes", {}).items()]
    parts += [f"{readable_bytes(about['memory_bytes'])} of memory"] if "memory_bytes" in about else []
    yield f"Commit {report['commit']}, {report['taken']}. {', '.join(parts)}. {about['system']}."
    yield ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."
    if report["smoke"]:
        yield "\n**Smoke sizes: these figures show that the benchmarks run, and nothing else.**"
    yield ""
    yield "Figures are medians, with the middle half of the rounds in brackets. Ratios are taken round by round: what a figure is compared"
    yield "with was timed in the same rounds. Speed 1.0 is as fast."


def _times(benches: list[Bench]) -> list[str]:
    if not benches:
        return []
    lines = ["| what | users | ns a row | M rows/s | speed | against | rounds |", "|-|-:|-:|-:|-:|-|-:|"]
    for bench in benches:
        low, median, high = middle(ns_per_row(bench))
        users = f"{bench['info']['users']:,}" if "users" in bench["info"] else ""
        row = f"| {label(bench)} | {users} | {median:,.1f} ({low:,.1f} to {high:,.1f}) | {1e3 / median:,.2f} "
        speeds = relative_speeds(bench) or {"": None}
        for number, (name, speed) in enumerate(speeds.items()):
            ratio = "" if speed is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*middle(speed))
            lines.append((row if number == 0 else "| | | | ") + f"| {ratio} | {name} | {len(bench['seconds']) if number == 0 else ''} |")
    return lines


def _figures(benches: list[Bench]) -> list[str]:
    if not benches:
        return []
    lines = ["| what | users | figures |", "|-|-:|-|"]
    for bench in benches:
        named = [(*name.rpartition(" ")[::2], value) for name, value in bench["info"]["figures"].items()]
        figures, part = "", ""
        for name, unit, value in named:  # what stands before a colon is a part, which begins a line
            before = name.rpartition(": ")[0]
            figures += ("; " if before == part else "<br>") * bool(figures) + f"{name} **{_number(value)}** {unit}"
            part = before
        users = f"{bench['info']['users']:,}" if "users" in bench["info"] else ""
        lines.append(f"| {label(bench)} | {users} | {figures} |")
    return lines


def _seconds(benches: list[Bench]) -> list[str]:
    if not benches:
        return []
    lines = ["| what | seconds | rounds |", "|-|-:|-:|"]
    for bench in benches:
        low, median, high = middle(np.asarray(bench["seconds"]))
        lines.append(f"| {label(bench)} | {median:.3f} ({low:.3f} to {high:.3f}) | {len(bench['seconds'])} |")
    return lines


def _number(value: float) -> str:
    """Three digits or all of the whole ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def readable_bytes(size: int) -> str:
    """1048576 is "1 MiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size} B"


def _plain(note: str) -> str:
    """A line of pytest's in Markdown: on one line, without this machine's folders."""
    return note.replace(f"{ROOT}{os.sep}", "").replace("|", "\\|").replace("<", "\\<")


# The command


def write(report: Report, folder: Path, figures: Path | None) -> None:
    """JSON, Markdown and plots."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'riskring[bench]')", file=sys.stderr)
        return
    from bench import plots  # noqa: PLC0415 - needs matplotlib

    drawn = plots.draw(report, folder)
    missing = sorted(set(plots.PLOTS) - set(drawn))
    if missing:
        print(f"no plot of {', '.join(missing)}: their benchmarks did not run", file=sys.stderr)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for name in drawn:
            shutil.copy(folder / f"{name}.svg", figures / f"{name}.svg")


def chosen(only: str | None) -> dict[str, Path]:
    """The benchmarks asked for."""
    known = benchmarks()
    names = list(known) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"--only {only}: there is no benchmark {', '.join(unknown) or '(none named)'}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def check_size(smoke: bool) -> None:
    """Find out before the run, not an hour later."""
    from engine.memory import machine_bytes  # noqa: PLC0415 - imports take a while; --help needs none

    text = os.environ.get("RISKRING_BENCH_USERS", "10000000")
    if smoke or os.environ.get("RISKRING_BENCH_SMOKE") == "1":
        return
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"RISKRING_BENCH_USERS={text!r} must be a whole number from 1")
    if int(text) * BYTES_PER_USER > machine_bytes():
        wanted, there = int(text) * BYTES_PER_USER / 1e9, machine_bytes() / 1e9
        raise UsageError(f"RISKRING_BENCH_USERS={text} takes some {wanted:,.0f} GB, this machine has {there:,.0f} GB; give fewer users")


def made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; give another folder with -o") from error
    return folder


def earlier(path: Path) -> Report:
    try:
        report = json.loads(path.read_text())
        markdown(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a report.json of this program ({type(error).__name__}: {error})") from error
    return report  # type: ignore[no-any-return]


def measured(files: dict[str, Path], folder: Path, smoke: bool) -> Report:
    """Run the benchmarks, telling how far it got."""
    smoke = smoke or os.environ.get("RISKRING_BENCH_SMOKE") == "1"
    results = {}
    for number, (name, path) in enumerate(files.items(), 1):
        print(f"[{number}/{len(files)}] {name}: ", end="", file=sys.stderr, flush=True)
        results[name] = result = run(name, path, folder, smoke)
        print(f"{len(result['benchmarks'])} measured in {result['seconds']:.0f} s", file=sys.stderr)
        for note in result["notes"]:
            print(f"    {note}", file=sys.stderr)
    taken = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"commit": commit(), "taken": taken, "smoke": smoke, "machine": machine(), "versions": versions(), "files": results}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Run the benchmarks; write tables, plots and all samples.")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(benchmarks())}, separated by commas")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also put the SVG plots there")
    parser.add_argument("--render", type=Path, metavar="FILE", help="run nothing; tables and plots of an earlier report.json")
    args = parser.parse_args(arguments)
    try:
        if args.render is not None:
            report, folder = earlier(args.render), made(args.output)
        else:
            files = chosen(args.only)
            check_size(args.smoke)
            folder = made(args.output)
            report = measured(files, folder, args.smoke)
    except UsageError as error:
        parser.error(str(error))
    write(report, folder, args.figures)
    print(folder / "report.md")
    return 0 if any(file["benchmarks"] for file in report["files"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
