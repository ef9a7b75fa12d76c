"""Whether this machine is fit to run the engine: versions, cores, memory, a folder for compiled code, and a sum in the head."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from engine import __version__
from engine.terminal import bytes_text, colour, one_line, show, show_json


class Check(NamedTuple):
    """One thing looked at."""

    check: str
    state: str  # "ok", "warn" or "fail"
    found: str
    fix: str = ""


def checks() -> list[Check]:
    """Look at everything. Takes seconds where kernels have to be compiled."""
    return [*_check_versions(), _check_cores(), _check_memory(), _check_huge_pages(), _check_cache(), _check_engine()]


def show_checks(*, as_json: bool) -> bool:
    """Look at everything and print what was found. False if something fails."""
    looked_at = checks()
    if as_json:
        show_json([check._asdict() for check in looked_at])
    else:
        paint = {"ok": "32", "warn": "33", "fail": "31"} if colour(sys.stdout) else {}
        for name, state, found, fix in looked_at:
            mark = f"\x1b[{paint[state]}m{state:<4}\x1b[0m" if paint else f"{state:<4}"
            show(f"{mark}  {name:<13} {found}" + (f"; {fix}" if fix else ""))
    return not any(check.state == "fail" for check in looked_at)


def _check_versions() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok", found) if sys.version_info >= (3, 11) else Check("python", "fail", found, "install Python 3.11 or newer")
    yield Check("riskring", "ok", __version__)
    for name in ("numpy", "numba", "pyarrow"):
        version = version_of(name)
        yield Check(name, "ok", version) if version else Check(name, "fail", "missing", f"pip install {name}")
    version = version_of("rich")
    yield Check("rich", "ok", version) if version else Check("rich", "warn", "missing: no progress bar", "pip install rich")


def _check_cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", "ok", str(cores)) if cores > 1 else Check("cores", "warn", "1", "two or more let shards work side by side")


def _check_memory() -> Check:
    free_bytes = memory_available()
    if free_bytes is None:
        return Check("memory", "warn", "unknown on this system", "compare `riskring plan` with what is free")
    found = f"{bytes_text(free_bytes)} available"
    if free_bytes < 2**30:
        return Check("memory", "warn", found, "10 million users need about 1 GB; see `riskring plan`")
    return Check("memory", "ok", found)


def memory_available() -> int | None:
    """What the machine has left, or what the control group allows if that is less."""
    available = []
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        available.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(_file_text(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
        available.append(limit - used)
    return min(available, default=None)


def _check_huge_pages() -> Check:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    try:
        chosen = re.search(r"\[(\w+)\]", _file_text(path))
    except OSError:
        return Check("huge pages", "warn", "unknown on this system", "scores are the same, a large engine is slower without them")
    state = chosen[1] if chosen else "unknown"
    if state in ("always", "madvise"):
        return Check("huge pages", "ok", state)
    return Check("huge pages", "warn", state, f"echo madvise | sudo tee {path}")


def _file_text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _check_cache() -> Check:
    """Where Numba keeps compiled code: next to the source, or else in the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels", "__pycache__")
    users = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba")
    folders = [chosen] if chosen else [beside, users]
    for folder in folders:
        nearest = os.path.abspath(folder)
        while not os.path.exists(nearest):
            nearest = os.path.dirname(nearest)
        if os.access(nearest, os.W_OK):
            return Check("kernel cache", "ok", folder)
    fix = "set NUMBA_CACHE_DIR to a folder that can, or each start compiles anew"
    return Check("kernel cache", "warn", f"{folders[0]} cannot be written", fix)


def _check_engine() -> Check:
    """Compile the kernels and compare three rows with a sum in the head."""
    began = time.perf_counter()
    try:
        from engine.engine import RiskEngine  # noqa: PLC0415 - compiles kernels

        with RiskEngine("60s", users=8, shards=1, max_ahead=None) as engine:
            given = (("a", 0.1, "1970-01-01T00:00:00Z"), ("a", 0.2, "1970-01-01T00:01:00Z"), ("b", 1.0, "1970-01-01T00:01:01Z"))
            scores = [engine.add(*row) for row in given]
            scores.append(engine.score("a"))
    except Exception as error:
        return Check("engine", "fail", one_line(error), "run `riskring doctor` in a fresh virtual environment: pip install riskring")
    wanted = [0.1, 0.15, 1.0, 0.2]
    if scores != wanted:
        return Check("engine", "fail", f"scores {scores} instead of {wanted}", "please report this, with the lines above")
    return Check("engine", "ok", f"exact; first result after {time.perf_counter() - began:.1f} s")


def version_of(distribution: str) -> str | None:
    from importlib import metadata  # noqa: PLC0415 - slow to import

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
