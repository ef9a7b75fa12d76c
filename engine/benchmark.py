"""`riskring bench`: in two minutes, what the engine does on this machine, beside the machine's memory and beside other systems.

Equal answers come first: the engine's are compared with the reference's, and each peer's with the engine's, before any time is taken. What
is measured how is told in `measurements`, what a peer runs in `adapters/peers`. Here are the flags, the facts of the machine, the order of
the steps, and the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine import __version__, doctor
from engine.config import USERS_MAX, Config
from engine.errors import ConfigError
from engine.flags import Parser, quantity, size
from engine.forecast import forecast
from engine.terminal import bytes_text, one_line, show, show_aligned, show_json

if TYPE_CHECKING:
    from engine.adapters.peers import Peer
    from engine.measurements import Measured

SUMMARY: Final = "measure the engine on this machine, beside its memory and other systems"
MORE: Final = (
    "Takes some two minutes,\nand tells the truth only if nothing else is running. Peers that are not installed are named, and left out:\n"
    "pip install 'riskring[bench]' adds them."
)
EXAMPLES: Final = (
    "riskring bench",
    "riskring bench --users 1M --seconds 1 --peers duckdb,polars",
    "riskring bench --peers none --json -o result.json",
)

ROWS: Final = 1_000_000
PEERS: Final = ("plain", "pandas", "polars", "duckdb", "datafusion", "chdb", "river", "flink")


def add_flags(parser: Parser) -> None:
    """The flags of the command."""
    parser.flag("--users", type=size, default=10_000_000, shown="10M", metavar="N", help="users drawn from, a row each per minute")
    parser.flag("--seconds", type=quantity, default=3.0, shown=3, metavar="S", help="how long each thing is measured")
    parser.flag("--shards", type=size, shown="one per core", metavar="N", help="shards of the engine, and threads of peers")
    parser.flag("--peers", default=",".join(PEERS), shown="all", metavar="NAMES", help=f"of {' '.join(PEERS)}, with commas; or none")
    parser.flag("--rows", type=size, default=ROWS, shown="1M", metavar="N", help="rows of the peers' table; slow ones get its first part")
    parser.flag("--flink-python", metavar="PATH", help="interpreter that has apache-flink: Flink too, some two minutes more")
    parser.flag("-o", "--output", metavar="FILE", help="write everything measured, with all samples, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        0 done; 1 a peer failed or gave other answers, after everything else ran.

    Raises:
        ConfigError: A flag cannot be used, or the machine is too small; nothing was measured.
        EngineError: The engine's scores are not the reference's.
    """
    names = _checked(args)
    shards = Config.of(users=args.users, shards=args.shards).shards

    def say(text: str) -> None:
        if not args.quiet:
            print(f"riskring bench: {text}", file=sys.stderr, flush=True)

    from engine.adapters.peers import peers  # noqa: PLC0415 - imports pyarrow

    known = peers(shards, args.flink_python)
    chosen = [known[name] for name in names]
    missing = [peer for peer in chosen if peer.needs]
    for peer in missing:
        say(f"{peer.name} is left out; it needs {peer.needs}")
    facts = machine()
    measured = _measure_engine(args.users, shards, args.seconds, say)
    beside, failed = _measure_peers([peer for peer in chosen if not peer.needs], args, shards, say)
    steady = next(found for found in measured if found.name == "ingest" and found.facts["shards"] == shards)
    result = {
        "version": __version__,
        "settings": {"users": args.users, "seconds": args.seconds, "shards": shards, "rows": args.rows},
        "machine": facts,
        "measured": [found.as_dict() for found in measured],
        "peers": [_peer_dict(peer, table, found, steady) for peer, table, found in beside],
        "missing": [{"name": peer.name, "needs": peer.needs} for peer in missing],
        "failed": [{"name": name, "error": error} for name, error in failed],
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        show_json(result)
    else:
        _show(result)
    return 1 if failed else 0


# Before anything runs


def _checked(args: argparse.Namespace) -> list[str]:
    """The peers asked for; ConfigError for whatever would fail later."""
    if not 100 <= args.users <= USERS_MAX // 2:  # the engine is given room for twice as many
        raise ConfigError(f"--users {args.users:,} must be from 100 to {USERS_MAX // 2:,}")
    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows} must be at least 1")
    if not 0 < args.seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds:g} must be more than 0 and at most 3600")
    Config.of(shards=args.shards)
    _check_memory(args.users, args.rows)
    if args.output:
        folder = os.path.dirname(args.output) or "."
        if not os.path.isdir(folder):
            raise ConfigError(f"{args.output}: the folder does not exist; make it first")
        if os.path.isdir(args.output) or not os.access(folder, os.W_OK):
            raise ConfigError(f"{args.output} cannot be written; give a file in a folder of yours")
    return _peer_names(args.peers)


def _peer_names(text: str) -> list[str]:
    names = [name for name in text.lower().replace(" ", "").split(",") if name]
    if names in (["none"], []):
        return []
    for name in names:
        if name not in PEERS:
            close = difflib.get_close_matches(name, PEERS, 1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"--peers: {name!r} is none; {meant}There are {', '.join(PEERS)}, and none")
    return list(dict.fromkeys(names))


def memory_bytes(users: int, rows: int) -> int:
    """About what `riskring bench` takes at most at a time, without the peers' own memory.

    The engine with a row per user and minute, the random lines beside it, ids, and the peers' table.

    Example:
        >>> 10**9 < memory_bytes(10_000_000, 1_000_000) < 4 * 10**9
        True
    """
    engine = forecast(users, users / 60, Config.of(users=users, shards=1).retention_ns)
    return round(engine["total"]) + (64 + 16) * users + 24 * rows


def _check_memory(users: int, rows: int) -> None:
    from engine.memory import machine_bytes  # noqa: PLC0415 - imports numpy

    needed, found = memory_bytes(users, rows), doctor.memory_available() or machine_bytes()
    if needed > found:
        raise ConfigError(
            f"--users {users:,} and --rows {rows:,} need about {bytes_text(needed)} of memory, and {bytes_text(found)} are available; "
            f"try --users {_rounded_down(users * found / needed * 0.8):,} --rows {min(rows, ROWS):,}, or free memory"
        )


def _rounded_down(value: float) -> int:
    """To one digit: 7,654 is 7,000."""
    step = int("1" + "0" * (len(str(int(value))) - 1))
    return max(100, int(value) // step * step)


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, memory, caches, versions.

    Example:
        >>> sorted(machine())
        ['available_bytes', 'caches', 'cores', 'cpu', 'huge_pages', 'memory_bytes', 'system', 'versions']
    """
    from engine.memory import machine_bytes  # noqa: PLC0415 - imports numpy

    huge_pages = re.search(r"\[(\w+)\]", _first_line("/sys/kernel/mm/transparent_hugepage/enabled"))
    versions = {"python": platform.python_version(), "riskring": __version__}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": machine_bytes(),
        "available_bytes": doctor.memory_available(),
        "caches": _caches(),
        "huge_pages": huge_pages[1] if huge_pages else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions | {name: doctor.version_of(name) for name in ("numpy", "numba", "pyarrow")},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    """Bytes of the caches that hold data, as the first core sees them; empty where the system does not say."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, text = (_first_line(cache / name) for name in ("level", "type", "size"))
        if kind in ("Data", "Unified") and text[:-1].isdigit():
            found[f"L{level}"] = int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    return found


def _first_line(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# The steps


def _measure_engine(users: int, shards: int, seconds: float, say: Callable[[str], None]) -> list[Measured]:
    from engine import measurements as measure  # noqa: PLC0415 - compiles kernels

    say("compare with the reference")
    measure.proven(shards)
    workload = measure.Uniform(users)
    found: list[Measured] = []
    for count in sorted({1, shards}):
        say(f"{count} of {shards} shards: two retentions of {users:,} users, then rows and lookups beside random lines")
        engine, batches = measure.steady(workload, count)
        with engine:
            for lines, mine in (
                measure.ingest(engine, batches, users, seconds),
                measure.lookup(engine, workload.ids, seconds),
            ):
                mine.facts["of_lines"] = _ratio(mine.over(lines))
                found += [lines, mine]
            if count == 1:
                say("one row, one user at a time")
                found += measure.one_by_one(engine, workload.ids, seconds)
    say("resident memory, in a process of its own")
    found.append(measure.resident(users))
    say("first score of a fresh process")
    found.append(measure.first_score(users, seconds))
    return found


def _measure_peers(
    chosen: Iterable[Peer], args: argparse.Namespace, shards: int, say: Callable[[str], None]
) -> tuple[list[tuple[Peer, Measured, Measured]], list[tuple[str, str]]]:
    """Each peer with the engine on the same rows and itself; and those that failed, with why."""
    from engine import measurements as measure  # noqa: PLC0415 - compiles kernels

    measured, failed = [], []
    rows: Any = None
    for peer in chosen:
        rows = measure.Uniform(args.users).table(args.rows) if rows is None else rows
        say(f"{peer.name}, {peer.part(rows).num_rows:,} rows: equal answers, then times")
        try:
            measured.append((peer, *measure.beside_peer(peer, rows, shards, args.seconds)))
        except Exception as error:  # a library of others may raise anything, and the rest is still to run
            failed.append((peer.name, one_line(error)))
    return measured, failed


def _peer_dict(peer: Peer, table: Measured, found: Measured, steady: Measured) -> dict[str, Any]:
    return {
        **found.as_dict(),
        **{"mode": peer.mode, "package": peer.package, "version": peer.version, "tolerance": peer.tolerance},
        "engine": table.as_dict(),
        "times_same_rows": _ratio(table.over(found)),
        "times_steady": steady.median / found.median,
    }


def _ratio(found: Measured) -> dict[str, float]:
    return {"median": found.median, "iqr": found.iqr}


# The tables


def _show(result: dict[str, Any]) -> None:
    facts, settings = result["machine"], result["settings"]
    caches = ", ".join(f"{name} {_binary(found)}" for name, found in facts["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    show(f"{facts['cpu']}, {facts['cores']} cores, {bytes_text(facts['memory_bytes'])}" + (f", {caches}" if caches else ""))
    show(f"{facts['system']}, {versions}")
    show(f"{settings['users']:,} users, one row each per minute; each thing measured for {settings['seconds']:g} s\n")
    lines = [("", "median", "IQR", "")]
    for found in result["measured"]:
        of_lines = found.get("of_lines")
        note = f"{of_lines['median']:.2f} of the lines above (IQR {of_lines['iqr']:.2f})" if of_lines else ""
        if "p999" in found:
            note = f"p99 {_figure(found['p99'], 'ns')}, p99.9 {_figure(found['p999'], 'ns')}"
        spread = _figure(found["iqr"], found["unit"]) if len(found["samples"]) > 1 else ""
        lines.append((found["what"], _figure(found["median"], found["unit"]), spread, note))
    show_aligned(lines, right=(1, 2))
    if result["peers"]:
        show("\nThe engine and its peers, from a table in memory to a score per row; equal answers were proven first.")
        show("On the same rows: a new engine, made and closed each time. Steady: the engine above, that holds all users.\n")
        shown = [("", "rows", "median", "IQR", "engine, same rows", "steady", "")]
        for found in result["peers"]:
            same, steady = found["times_same_rows"], found["times_steady"]
            title = f"{found['name']} {found['version']}".strip()
            times = (f"{_times(same['median'])} (IQR {_times(same['iqr'])})", _times(steady))
            figures = (_figure(found["median"], "rows/s"), _figure(found["iqr"], "rows/s"))
            shown.append((title, f"{found['rows']:,}", *figures, *times, f"{found['mode']}: {found['what']}"))
        show_aligned(shown, right=(1, 2, 3, 4, 5))
    absent = [(found["name"], f"left out; it needs {found['needs']}") for found in result["missing"]]
    absent += [(found["name"], f"failed: {found['error']}") for found in result["failed"]]
    if absent:
        show("")
        show_aligned(absent, right=())


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _binary(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} kiB"


def _figure(value: float, unit: str) -> str:
    """A figure as people read it.

    Example:
        >>> _figure(14_200_000, "rows/s"), _figure(0.52, "s"), _figure(1740, "ns"), _figure(71.3, "bytes")
        ('14.20 M rows/s', '520 ms', '1.74 us', '71.3 B')
    """
    if unit == "rows/s":
        return f"{value / 1e6:.2f} M rows/s" if value >= 1e5 else f"{value / 1e3:.1f} k rows/s"
    if unit == "bytes":
        return f"{value:.1f} B"
    seconds = value * (1e-9 if unit == "ns" else 1)
    scale, name = next((pair for pair in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= pair[0]), (1e-9, "ns"))
    return f"{seconds / scale:.3g} {name}"
