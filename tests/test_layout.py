"""The shape of the project: who imports whom, how large a file may be, what is compiled how often, and that each benchmark runs."""

from __future__ import annotations

import ast
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import engine
from engine import RiskEngine
from engine.kernels import KERNELS

ROOT = Path(__file__).parent.parent
LINES_MAX = 700

ADAPTERS_ORDER = ["__init__", "peers", "kafka_source", "kafka_producer", "redis_sink", "redis_cache", "logs", "metrics"]
ADAPTERS_ORDER += ["openapi", "http_bodies", "http_server", "http_listener", "flight_server", "client", "flink_job"]
#: The client libraries that adapters may import.
CLIENTS = {"chdb", "confluent_kafka", "datafusion", "duckdb", "polars", "prometheus_client", "redis", "river", "structlog", "tenacity"}
CLIENTS |= {"orjson", "pyflink", "starlette", "urllib3", "uvicorn"}

#: A file imports only from files to its left. `__init__` hands out names of `engine` and `results` when they are first asked for.
ORDER = [
    *["errors", "access", "config", "memory", "arrays", "kernels"],
    *["rounding", "texts", "instants", "capacity", "results", "columns", "userids", "ndjson", "sources", "outputs"],
    *["entries", "copies", "index", "watch", "shard", "shards", "ranking", "core", "storage", "snapshot", "saving", "engine", "replay"],
    *["partitions", "service", "answers", "pulse", "messages", "ticks", "partition", "publisher", "node", "hosted", "produce"],
    *[
        "reference",
        "generate",
        "demo",
        "flags",
        "terminal",
        "forecast",
        "doctor",
        "adapters",
        "measurements",
        "benchmark",
        "__init__",
        "serving",
        "streaming",
        "hosting",
        "cli",
    ],
]
KERNELS_ORDER = [
    *["layout", "compile", "convert", "exact", "hashing", "probing", "blocks", "entries", "rows"],
    *["upkeep", "windows", "changes", "murmur2", "quoting", "integers", "roofline", "__init__"],
]

SOURCE_FILES = sorted((ROOT / "engine").rglob("*.py"))
PROJECT_FILES = sorted(
    path
    for part in ("engine", "tests", "bench", "data", ".ci")
    for path in (ROOT / part).rglob("*")
    if path.is_file() and path.suffix in ("", ".md", ".py", ".typed", ".csv") and "__pycache__" not in path.parts
) + [ROOT / name for name in ("README.md", "pyproject.toml", ".gitignore") if (ROOT / name).exists()]
BENCHMARKS = sorted((ROOT / "bench").glob("bench_*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            # `from engine import sources` imports a module, `from engine import __version__` a name of `engine` itself.
            found |= {f"{module}.{alias.name}" if module in ("engine", "engine.kernels") else module for alias in node.names}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def own_imports(path: Path) -> set[str]:
    """Modules of this project that a file imports; a name of a package counts as the package."""
    own = {name for name in imported(path) if name.split(".")[0] == "engine"}
    return {name if is_module(name) else name.rpartition(".")[0] for name in own}


@pytest.mark.parametrize("path", SOURCE_FILES, ids=label)
def test_a_file_imports_only_from_files_to_its_left(path: Path) -> None:
    *_, folder, _ = path.parts
    if folder == "kernels":
        order, prefix = KERNELS_ORDER, "engine.kernels."
        allowed = {prefix + name for name in order[: order.index(path.stem)]} | {"engine.config"}
    else:
        left = ORDER[: ORDER.index(folder if folder == "adapters" else path.stem)]
        allowed = {f"engine.{name}" for name in left if name != "__init__"}
        if path.stem != "__init__":
            allowed.add("engine")  # the version, and public names that come lazily
        if "kernels" in left:
            allowed |= {"engine.kernels.layout", "engine.kernels.murmur2", "engine.kernels.quoting", "engine.kernels.integers"}
        if folder == "adapters":
            allowed |= {f"engine.adapters.{name}" for name in ADAPTERS_ORDER[: ADAPTERS_ORDER.index(path.stem)]}
        if "adapters" in left:
            allowed |= {f"engine.adapters.{name}" for name in ADAPTERS_ORDER} | {"engine.kernels.roofline"}
    assert own_imports(path) <= allowed


def test_order_names_each_file_once() -> None:
    names = [path.stem for path in SOURCE_FILES if path.parent.name == "engine"] + ["kernels", "adapters"]
    assert sorted(ORDER) == sorted(names)
    assert sorted(ADAPTERS_ORDER) == sorted(path.stem for path in SOURCE_FILES if path.parent.name == "adapters")
    assert sorted(KERNELS_ORDER) == sorted(path.stem for path in SOURCE_FILES if path.parent.name == "kernels")


@pytest.mark.parametrize("path", SOURCE_FILES, ids=label)
def test_only_kernels_import_numba_and_kernels_import_little_else(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - {"engine"}
    if path.parent.name == "kernels":
        assert outside <= {"__future__", "collections", "hashlib", "pathlib", "typing", "warnings", "numba", "numpy"}
    else:
        assert not outside & {"numba", "llvmlite"}
    clients = CLIENTS if path.parent.name == "adapters" else set()
    assert outside <= {*sys.stdlib_module_names, "numba", "numpy", "pyarrow", "rich", *clients}, "core dependencies are few"


@pytest.mark.parametrize("path", SOURCE_FILES, ids=label)
def test_files_stay_readable_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", PROJECT_FILES, ids=label)
def test_nothing_is_left_lying_about(path: Path) -> None:
    """No notes to self, no folders of one machine."""
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
    folders = "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me", "tm" + "p", "Us" + "ers"))
    text = path.read_text()
    assert not re.findall(rf"\b(?:{marks})\b", text)
    assert not re.findall(rf"(?<![\w.)}}$\"'])/(?:{folders})/\w+", text)


def test_public_names() -> None:
    assert engine.__all__ == sorted(engine.__all__)
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    assert set(engine.__all__) == {
        *("RiskEngine", "IngestResult", "Explanation", "Stats", "__version__"),
        *("EngineError", "ConfigError", "SchemaError", "TimeTooOldError", "CapacityError", "SnapshotError", "ConnectorError", "StaleError"),
        "SnapshotInfo",
    }
    with pytest.raises(AttributeError, match="has no attribute 'Riskengine'"):
        engine.Riskengine  # noqa: B018


@pytest.mark.parametrize("module", ["engine", "engine.cli"])
def test_what_starts_first_imports_no_heavy_library(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{'numba', 'numpy', 'pyarrow', 'rich', 'asyncio'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.skipif(not KERNELS, reason="kernels are not compiled in this run")
def test_one_signature_per_kernel() -> None:
    """Read-only and writable columns, ids of both kinds, and every way to ask: no kernel is compiled a second time."""
    times = np.arange(8, dtype=np.int64)
    integers = np.array([1, 2, 3, 1, 2, 3, 1, 2], np.int64)
    read_only = integers.copy()
    read_only.flags.writeable = False
    amounts = integers * 0.5
    columns = [integers, read_only, pa.array(integers), pa.array(integers.astype("U")), pa.array(integers.astype("S"))]
    for users in columns:
        for shards in (1, 2):
            ids = users if isinstance(users, np.ndarray) else users.to_pylist()
            tested = RiskEngine(users=16, shards=shards, max_ahead=None, time_unit="s")
            for scores in (True, False):
                tested.ingest({"user_id": users, "amount": amounts, "timestamp": times}, scores=scores)
            tested.add(ids[0], 1.5, datetime.datetime(1970, 1, 1, 0, 0, 30))
            assert tested.score(ids[0]) > 0
            assert np.asarray(tested.scores(users)).shape == (8,)
            tested.features()
            tested.features(users)
            tested.top(2)
            tested.explain(ids[0])
            tested.digest()
            tested.add(ids[0], 1.5, datetime.datetime(1970, 1, 2))
            tested.expire()
            assert len(tested) == 1
    for name, dispatcher in KERNELS.items():
        assert len(dispatcher.signatures) == 1, name


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.flink] * (path.stem == "bench_flink")) for path in BENCHMARKS], ids=label
)
def test_benchmarks_run_in_smoke_size(path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name.startswith("RISKRING_FLINK_")}
    environment = kept | {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RISKRING_"))}
    marks = ["-m", "flink"] if path.stem == "bench_flink" else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *marks, str(path)],
        cwd=ROOT,
        env=environment | {"RISKRING_BENCH_SMOKE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
