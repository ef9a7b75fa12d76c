"""The plots of a report: one function each, from the report's JSON to a figure, or None if what it needs was not measured.

They are shown on white and on black pages alike: no background, grey text of about equal contrast to both, and colours that people who see
fewer of them can tell apart (Okabe and Ito, "Color Universal Design"). What a mark means stands next to it, not in a legend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.report import Bench, Report, middle, ns_per_row, parameters, readable_bytes, relative_speeds

GREY, FAINT = "#768390", "#8b949e"
BLUE, ORANGE, GREEN = "#2f86c8", "#d5712a", "#1d9e77"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": GREY,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "svg.hashsalt": "riskring",  # the same figure is the same file
}


def draw(report: Report, folder: Path) -> list[str]:
    """Write every plot there is data for, as SVG and PNG; returns their names."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(report)
            if figure is None:
                continue
            if report["smoke"]:
                figure.text(0.995, 0.005, "smoke sizes", ha="right", va="bottom", color=ORANGE)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=160)
            drawn.append(name)
    return drawn


def _benches(report: Report, file: str, name: str) -> list[Bench]:
    """Those of one test function that have times of rows."""
    found = report["files"].get(file, {"benchmarks": []})["benchmarks"]
    return [bench for bench in found if bench["name"].partition("[")[0] == name and "rows" in bench["info"]]


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_axisbelow(True)
    return figure, axes


def _note(axes: Axes, text: str, at: tuple[float, float], dx: float, dy: float = 0, **style: Any) -> None:
    """Text next to a point, so many typographic points away."""
    style.setdefault("va", "center" if dy == 0 else "bottom")
    axes.annotate(text, at, xytext=(dx, dy), textcoords="offset points", annotation_clip=False, **style)


def _short(value: float, _: object = None) -> str:
    """1,000 as 1 k."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _log(axis: Any, *, between: bool = True) -> None:
    """Ticks at 1, 2, 5, 10, or at powers of ten."""
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if between else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


# Engine and peers


SPELLED = {"plain": "plain Python", "duckdb": "DuckDB", "datafusion": "DataFusion", "chdb": "chDB", "river": "River", "flink": "Flink SQL"}


def times_slower(times: float, word: str = "slower") -> str:
    """2.34 is "2.3x slower"."""
    return f"{times:,.1f}x {word}" if times < 10 else f"{times:,.0f}x {word}"


def peers(report: Report) -> Figure | None:
    """Rows per second of the engine and of other systems on the same rows."""
    measured = _benches(report, "peers", "test_peer") + _benches(report, "peers", "test_flink")
    measured = [bench for bench in measured if "peer" in bench["info"]]
    if not measured:
        return None
    bars = []
    for bench in measured:
        peer, speeds = bench["info"]["peer"], relative_speeds(bench)
        times = 1 / middle(speeds["engine, new"])[1] if "engine, new" in speeds else None
        slower = "" if times is None else "   " + (times_slower(times) if times >= 1 else times_slower(1 / times, "faster"))
        name = SPELLED.get(peer["name"], peer["name"])
        bars.append((f"{name} {peer['version']}".strip(), 1e9 / ns_per_row(bench), slower, GREY))
    # The engine ran before every round of every peer; on the small parts of slow peers its start would weigh more.
    largest = max(measured, key=lambda bench: bench["info"]["rows"])["info"].get("beside", {})
    for name, words in (("engine, new", "riskring, new each time"), ("engine, steady", "riskring, in a stream")):
        if name in largest:
            bars.append((words, largest[name]["rows"] / np.asarray(largest[name]["seconds"]), "", BLUE))
    bars.sort(key=lambda bar: float(np.median(bar[1])))

    figure, axes = _axes(8.4, 1.2 + 0.42 * len(bars), "A score for each row: rows per second")
    for place, (_, rates, slower, colour) in enumerate(bars):
        low, median, high = middle(rates)
        axes.barh(place, median, height=0.62, color=colour, alpha=0.9 if colour == BLUE else 0.5)
        axes.plot([low, high], [place, place], color=GREY, linewidth=1.6, solid_capstyle="butt")
        _note(axes, f"{_short(median)}{slower}", (high, place), 6)
    medians = [float(np.median(rates)) for _, rates, _, _ in bars]
    axes.set_xscale("log")
    _log(axes.xaxis, between=False)
    axes.set_xlim(10 ** np.floor(np.log10(min(medians)) - 0.05), max(medians) * 4)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("slower: than a new engine on the same rows, in the same rounds; ticks: middle half of the rounds", fontsize=9.5, x=0.4)
    return figure


# Cost per row over users


def scale(report: Report) -> Figure | None:
    """Nanoseconds per row over users, beside what the memory alone would cost."""
    engine = sorted(_benches(report, "scale", "test_scale"), key=lambda bench: bench["info"]["users"])
    lines = sorted(_benches(report, "scale", "test_cost_of_a_line"), key=lambda bench: bench["info"]["users"])
    if len(engine) < 2:
        return None
    figure, axes = _axes(8.4, 4.6, "What a row costs, over the number of users: nanoseconds, one core")
    users = [bench["info"]["users"] for bench in engine]
    spread = np.array([middle(ns_per_row(bench)) for bench in engine])
    axes.fill_between(users, spread[:, 0], spread[:, 2], color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(users, spread[:, 1], color=BLUE, marker="o", linewidth=2.2)
    for x, y in zip(users, spread[:, 1], strict=True):
        _note(axes, f"{y:.0f}", (x, y), 0, 8, ha="center", color=BLUE)
    _note(axes, "riskring,\na score per row", (users[-1], spread[-1, 1]), 22, color=BLUE)
    if lines:
        at = np.array([bench["info"]["users"] for bench in lines])
        cost = np.array([3 * middle(ns_per_row(bench))[1] for bench in lines])
        shown = (at >= users[0] * 0.5) & (at <= users[-1] * 2)
        axes.plot(at[shown], cost[shown], color=ORANGE, linewidth=2.2)
        end = at[shown][-1], cost[shown][-1]
        _note(axes, "three random\nlines of memory", end, 12, color=ORANGE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log(axes.xaxis, between=False)
    _log(axes.yaxis)
    axes.set_xlim(users[0] * 0.5, users[-1] * 8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.5)
    for name, size in report["machine"].get("caches_bytes", {}).items():
        if users[0] * 0.5 < size / 64 < users[-1] * 4:
            axes.axvline(size / 64, color=FAINT, linestyle=(0, (4, 4)), linewidth=1, alpha=0.7)
            _note(axes, f"{name} cache\n{readable_bytes(size)}", (size / 64, axes.get_ylim()[1]), 5, -2, va="top", fontsize=9.5)
    axes.set_xlabel("users")
    axes.grid(axis="y", color=FAINT, alpha=0.2)
    return figure


# Memory per user


def memory(report: Report) -> Figure | None:
    """Resident bytes per user over transactions per user."""
    found = _benches(report, "memory", "test_bytes_of_a_user") + _benches(report, "memory", "test_bytes_of_further_transactions")
    largest: dict[float, tuple[int, float]] = {}
    for bench in found:
        info = bench["info"]
        per_user = info["transactions"] / info["users"]
        if per_user not in largest or info["users"] > largest[per_user][0]:
            largest[per_user] = (info["users"], info["resident"] / info["users"])
    if len(largest) < 2:
        return None
    figure, axes = _axes(8.4, 4.2, "Resident bytes per user, over the transactions that each has")
    x = np.array(sorted(largest))
    y = np.array([largest[count][1] for count in x])
    axes.plot(x, 24 * x, color=GREY, linewidth=1.6, linestyle=(0, (4, 3)))
    middling = x[len(x) // 2]
    _note(axes, "the rows themselves,\n24 bytes each", (middling, 24 * middling), 6, -6, va="top")
    axes.plot(x, y, color=BLUE, marker="o", linewidth=2.2)
    for count, size in zip(x, y, strict=True):
        _note(axes, f"{size:,.0f}", (count, size), 0, 9, ha="center", color=BLUE)
    _note(axes, "riskring", (x[-1], y[-1]), 12, color=BLUE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{count:g}" for count in x])
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000, 5000], ["20", "50", "100", "200", "500", "1,000", "2,000", "5,000"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    axes.set_xlim(x[0] * 0.8, x[-1] * 2.2)
    axes.set_ylim(20, max(float(y.max()), 24 * float(x[-1])) * 1.7)
    axes.set_xlabel("transactions per user")
    axes.grid(axis="y", color=FAINT, alpha=0.2)
    return figure


# How much other cases cost

#: File, test, what it is beside (None: whatever it is), the heading under which it is shown, and words before its parameters.
COMPARED = (
    ("ingest", "test_ingest_with_scores", "three random lines", "Share of what the memory does at all", "ingest, "),
    ("lookup", "test_scores", "two random lines", "Share of what the memory does at all", "scores(), "),
    ("ids", "test_ids", "int64", "Ids, beside 64-bit integers", ""),
    ("skew", "test_skew", "uniform", "Users and order, beside uniform and in order", ""),
    ("ingest", "test_batch_sizes", None, "Smaller batches, beside the largest", ""),
)


CASES = {
    "uuid": "UUIDs, 36 characters",
    "name": "short names",
    "binary16": "16 bytes",
    "dictionary": "UUIDs, dictionary-encoded",
    "zipf": "Zipf's law, exponent 1.1",
    "out of order": "one row in ten out of order",
    "hot user": "one user with a tenth of the rows",
    "twelve rows per user": "twelve rows per user and window",
}


def relative(report: Report) -> Figure | None:
    """Speed of every case over that of the one it is compared with."""
    groups: dict[str, list[tuple[str, tuple[float, float, float]]]] = {}
    for file, test, beside, heading, call in COMPARED:
        for bench in _benches(report, file, test):
            speeds = relative_speeds(bench)
            speed = next(iter(speeds.values()), None) if beside is None else speeds.get(beside)
            if speed is not None:
                text = parameters(bench)
                groups.setdefault(heading, []).append((call + CASES.get(text, text), middle(speed)))
    if not groups:
        return None
    rows = sum(len(cases) + 1.3 for cases in groups.values())
    figure, axes = _axes(8.4, 0.9 + 0.29 * rows, "Relative speed, measured side by side")
    place, ticks = 0.0, []
    for heading, cases in groups.items():
        _note(axes, heading, (0, place), 4, weight="bold")
        place += 1
        for text, (low, median, high) in cases:
            axes.plot([low, high], [place, place], color=BLUE, alpha=0.5, linewidth=5, solid_capstyle="round")
            axes.plot(median, place, "o", color=BLUE)
            _note(axes, f"{median:.2f}", (high, place), 9, color=BLUE, fontsize=10)
            ticks.append((place, text))
            place += 1
        place += 0.3
    axes.axvline(1, color=FAINT, linewidth=1.2)
    axes.set_xlim(0, max(1.15, 1.08 * max(high for cases in groups.values() for _, (_, _, high) in cases)))
    axes.set_ylim(place - 0.4, -0.8)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, alpha=0.2)
    axes.spines["left"].set_visible(False)
    return figure


# Latency


def latency(report: Report) -> Figure | None:
    """Percentiles of single calls, with as much room for each further nine."""
    calls = _benches(report, "latency", "test_single_calls")
    if not calls:
        return None
    figure, axes = _axes(8.4, 4.2, "Single calls, all of them: microseconds over percentile")
    ends = []
    for bench, colour in zip(calls, (BLUE, ORANGE, GREEN), strict=False):
        nanoseconds, counts = np.array(bench["info"]["histogram_ns"]).T
        slower = 1 - (np.cumsum(counts) - counts / 2) / counts.sum()  # share of the calls that took longer
        nines = -np.log10(slower)
        axes.plot(nines, nanoseconds / 1e3, color=colour, linewidth=2.2)
        median = float(nanoseconds[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]) / 1e3
        _note(axes, f"{median:.3g}", (0.301, median), 0, 8, ha="center", color=colour)
        _note(axes, f"{bench['params']['call']}()", (nines[-1], nanoseconds[-1] / 1e3), 8, color=colour)
        ends.append(nines[-1])
    axes.set_yscale("log")
    _log(axes.yaxis)
    marks = [(0.301, "50 %"), (1, "90 %"), (2, "99 %"), (3, "99.9 %"), (4, "99.99 %"), (5, "99.999 %")]
    marks = [mark for mark in marks if mark[0] <= max(ends)]
    axes.set_xticks([nines for nines, _ in marks], [text for _, text in marks])
    axes.set_xlim(0, max(ends) + 0.7)
    axes.grid(color=FAINT, alpha=0.2)
    return figure


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "peers": peers,
    "scale": scale,
    "memory": memory,
    "relative": relative,
    "latency": latency,
}
