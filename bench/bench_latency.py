"""How long do single calls take, the slow ones included, and what is the longest pause of a steady stream?

    python -m pytest bench/bench_latency.py -s

`add` and `score` are timed call by call against an engine of 10 million users; percentiles are those of all calls. The stream comes at a
steady 2 million rows a second in small batches, from the first row of a new engine through two retentions: every fresh page and all expiry
fall into some call. A call's pause is its time beyond that of the median call. Beside it stand calls of the same length with nothing but
random lines in them: what the machine itself (other tenants, interrupts, the scheduler) holds up.

Prediction: `add` is some microseconds of Python around 0.3 us of memory (three lines, not asked for ahead), `score` half of it. Expiry
looks at 2**18 slot lines after a batch at most, in order: 64 bytes at 10 GB/s and some work, 2 to 4 ms; at the share of a batch of 1,000
rows, far less. A fresh 2 MiB page is cleared in 0.1 to 0.3 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from measure import Steady, lines, prove
from workload import SMOKE, USERS, Uniform, user_ids

from engine import RiskEngine

UNIFORM = Uniform(USERS)
CALLS = 2_000 if SMOKE else 200_000
RATE = 2_000_000
BATCHES = [100, 1_000] if SMOKE else [1_000, 10_000]
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


def histogram(nanoseconds: np.ndarray) -> list[list[int]]:
    """[[ns, calls], ...]: every call, its time rounded to three digits, as HDR histograms keep them."""
    grain = 10 ** np.maximum(np.floor(np.log10(np.maximum(nanoseconds, 1))) - 2, 0).astype(np.int64)
    values, calls = np.unique((nanoseconds + grain // 2) // grain * grain, return_counts=True)
    return [[int(value), int(count)] for value, count in zip(values, calls, strict=True)]


def percentiles(nanoseconds: np.ndarray, unit: str, unit_ns: int) -> dict[str, float]:
    return {f"{name} {unit}": float(np.percentile(nanoseconds, share)) / unit_ns for name, share in PERCENTILES.items()}


@pytest.fixture(scope="module")
def steady() -> Iterator[Steady]:
    """As many shards as cores, which is what one gets without asking; integer times, so that `add` parses no text."""
    made = Steady(UNIFORM, shards=None, time_unit="us")
    yield made
    made.engine.close()


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: rows one by one, a lookup after each."""
    engine, reference = prove(UNIFORM)
    assert reference.clock_ns is not None
    ids = user_ids(np.arange(50)).to_pylist()
    for number, user in enumerate(ids):
        when_ns = reference.clock_ns + 1_000_000
        (row,) = reference.ingest([(user, number / 4, when_ns)])
        assert engine.add(user, number / 4, np.datetime64(when_ns, "ns")) == row.score
        assert engine.score(user) == reference.score(user)


@pytest.mark.benchmark(group="calls")
@pytest.mark.parametrize("call", ["add", "score"])
def test_single_calls(benchmark: Any, steady: Steady, call: str) -> None:
    """One user at a time, drawn at random."""
    engine = steady.engine
    ids = user_ids(np.random.default_rng(3).integers(0, USERS, CALLS)).to_pylist()
    times_us = (int(engine.stats().clock.astype(np.int64)) // 1000 + np.arange(1, CALLS + 1)).tolist()
    taken = np.empty(CALLS, np.int64)

    def add() -> None:
        clock, add = time.perf_counter_ns, engine.add
        for number, (user, when_us) in enumerate(zip(ids, times_us, strict=True)):
            start = clock()
            add(user, 12.5, when_us)
            taken[number] = clock() - start

    def score() -> None:
        clock, score = time.perf_counter_ns, engine.score
        for number, user in enumerate(ids):
            start = clock()
            score(user)
            taken[number] = clock() - start

    benchmark.pedantic(add if call == "add" else score, rounds=1)
    benchmark.extra_info |= {"rows": CALLS, "users": USERS, "histogram_ns": histogram(taken), "figures": percentiles(taken, "us", 1_000)}


def paced(run: Callable[[Any], object], batches: list[Any], rows_a_batch: int) -> np.ndarray:
    """Nanoseconds of each call; calls begin when their rows are due at RATE, or at once if they are behind."""
    taken = np.empty(len(batches), np.int64)
    clock, step_ns = time.perf_counter_ns, rows_a_batch * 1_000_000_000 // RATE
    due = clock()
    for number, batch in enumerate(batches):
        if (ahead_ns := due - clock()) > 200_000:  # a sleep may be 100 us too long; the rest is waited for in a loop
            time.sleep((ahead_ns - 150_000) / 1e9)
        while (start := clock()) < due:
            pass
        run(batch)
        taken[number] = clock() - start
        due += step_ns
    return taken


def pauses(taken: np.ndarray) -> dict[str, float]:
    median = float(np.median(taken))
    return {
        "median call us": median / 1e3,
        "p99.9 pause ms": (float(np.percentile(taken, 99.9)) - median) / 1e6,
        "max pause ms": (float(taken.max()) - median) / 1e6,
    }


def as_busy(rows: int, call_ns: float, calls: int) -> np.ndarray:
    """Nanoseconds of calls that touch random lines, so many that each takes about as long as the engine's."""
    few = lines(USERS, 1, rows)
    taken = paced(few.run, [few.prepare() for _ in range(20)], rows)
    work = lines(USERS, max(1, round(call_ns / float(np.median(taken)))), rows)
    drawn = [work.prepare() for _ in range(min(calls, 256))]  # more lines than a cache holds
    return paced(work.run, [drawn[number % len(drawn)] for number in range(calls)], rows)


@pytest.mark.benchmark(group="pauses")
@pytest.mark.parametrize("rows_a_batch", BATCHES)
def test_pauses(benchmark: Any, rows_a_batch: int) -> None:
    """2 M rows/s: growth (until the first transactions expire), then expiry at the rate of the rows."""
    rows = 4 * USERS
    pieces = list(UNIFORM.batches(rows, 1_000_000))
    batches = [piece.slice(first, rows_a_batch) for piece in pieces for first in range(0, len(piece), rows_a_batch)]
    half = len(batches) // 2
    with RiskEngine(users=2 * USERS, max_ahead=None) as engine:
        taken = benchmark.pedantic(paced, (lambda batch: engine.ingest(batch, scores=True), batches, rows_a_batch), rounds=1)
    machine = as_busy(rows_a_batch, float(np.median(taken)), half // 2)
    parts = {"growth": taken[:half], "steady": taken[half:], "machine alone": machine}
    benchmark.extra_info |= {
        "rows": rows,
        "users": USERS,
        "histogram_ns": histogram(taken),
        "figures": {f"{part}: {name}": value for part, times in parts.items() for name, value in pauses(times).items()},
    }
