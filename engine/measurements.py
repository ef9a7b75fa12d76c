"""How fast and how small the engine is on this machine: a seeded workload, and one function for each question.

Each function measures and returns samples; none judges them. `riskring bench` runs them in turn; `bench/` takes its rows from the same
workload and its roofline from the same lines. Durations are those of a monotonic clock.

A virtual machine is not the same from one minute to the next. What a figure is compared with (random lines of memory, a peer) is therefore
measured in the same rounds, one after the other, and ratios are taken round by round. The engine is measured in its steady state: after two
retentions of the workload its rows no longer meet memory that was never touched, whose first touch costs more than a row.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.adapters.peers import Peer
from engine.config import Config
from engine.engine import RiskEngine
from engine.errors import EngineError
from engine.generate import mix
from engine.memory import reserved
from engine.reference import Reference, plain_rows

BATCH_ROWS: Final = 65_536
LOOKUP_USERS: Final = 1_000_000

#: Rows by which equal answers are proven: ten windows of a thousand users, with rows on the very edge of a window.
PROOF_USERS: Final = 1_000
PROOF_ROWS: Final = 10_000

#: Lines to ask for ahead of the one in work. The more are under way the faster it is, up to here: 24 take twice as long.
AHEAD: Final = 96


@dataclass(frozen=True)
class Uniform:
    """Users drawn uniformly from random 64-bit ids; amounts with two decimals; evenly spaced times, in order.

    Attributes:
        users: Number of users. Number n has the n-th output of the generator SplitMix64 for its id, so that ids need no table.
        window_us: The window in microseconds.
        seed: Another seed gives other rows of the same users.
        rows_per_user: Rows per user and window, on average.

    Example:
        >>> Uniform(1_000).table(3)["timestamp"].cast("int64").to_pylist()
        [0, 60000, 120000]
    """

    users: int
    window_us: int = 60_000_000
    seed: int = 1
    rows_per_user: float = 1.0

    @property
    def ids(self) -> NDArray[np.int64]:
        """(users,) int64, made anew each time."""
        return mix(np.arange(self.users)).view(np.int64)

    def user_ids(self, numbers: NDArray[np.int64]) -> Any:
        """(n,) Arrow ids of so many user numbers."""
        return pa.array(mix(numbers).view(np.int64))

    def numbers(self, random: np.random.Generator, rows: int) -> NDArray[np.int64]:
        """(rows,) int64: whose row it is."""
        return random.integers(0, self.users, rows)

    def times_us(self, random: np.random.Generator, first: int, rows: int) -> NDArray[np.int64]:
        """(rows,) int64: event times of the rows from number `first` on."""
        return ((first + np.arange(rows)) * (self.window_us / (self.users * self.rows_per_user))).astype(np.int64)

    def batches(self, rows: int, batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        """So many rows as record batches, in order of arrival."""
        random = np.random.default_rng(self.seed)
        for first in range(0, rows, batch_rows):
            count = min(batch_rows, rows - first)
            yield pa.record_batch(
                {
                    "user_id": self.user_ids(self.numbers(random, count)),
                    "amount": np.round(random.lognormal(3, 1, count), 2),
                    "timestamp": pa.array(self.times_us(random, first, count), pa.timestamp("us", "UTC")),
                }
            )

    def table(self, rows: int) -> Any:
        """The first rows as one Arrow table."""
        return pa.Table.from_batches(self.batches(rows)).combine_chunks()


@dataclass(frozen=True, slots=True)
class Measured:
    """One question and all answers to it.

    Attributes:
        name: Of the question: "lines", "ingest", "lookup", "add", "score", "resident", "first score", "table", or a peer.
        what: In words.
        unit: "rows/s", "ns", "s", "bytes", or "x" for a ratio.
        samples: Each measurement, in the order taken.
        facts: What else there is to know: rows, shards, lines.
    """

    name: str
    what: str
    unit: str
    samples: list[float]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The middle sample."""
        return self.percentile(50)

    @property
    def iqr(self) -> float:
        """Interquartile range: how wide the middle half of the samples is."""
        return self.percentile(75) - self.percentile(25)

    def percentile(self, percent: float) -> float:
        """So many percent of the samples are less; between two samples, interpolated."""
        return float(np.percentile(self.samples, percent))

    def over(self, other: Measured) -> Measured:
        """Ratios to what was measured in the same rounds.

        Example:
            >>> Measured("a", "", "rows/s", [4.0, 9.0]).over(Measured("b", "", "rows/s", [2.0, 3.0])).samples
            [2.0, 3.0]
        """
        ratios = [mine / its for mine, its in zip(self.samples, other.samples, strict=True)]
        return Measured(self.name, f"{self.what}, over {other.what}", "x", ratios, {**self.facts, "over": other.name})

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with all samples.

        Example:
            >>> Measured("add", "add() of one row", "ns", [1.0, 2.0, 3.0]).as_dict()["median"]
            2.0
        """
        tails = {"p99": self.percentile(99), "p999": self.percentile(99.9)} if self.unit == "ns" else {}
        figures = {"median": self.median, "iqr": self.iqr, **tails}
        return {"name": self.name, "what": self.what, "unit": self.unit, **self.facts, **figures, "samples": self.samples}


def rounds(seconds: float, *measures: Callable[[], float], least: int = 3) -> list[list[float]]:
    """Take one sample of each in turn, again and again until it took so long, and at least `least` times.

    Example:
        >>> rounds(0, lambda: 1.0, lambda: 2.0)
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    samples: list[list[float]] = [[] for _ in measures]
    ends = time.perf_counter() + seconds
    while len(samples[0]) < least or time.perf_counter() < ends:
        for taken, measure in zip(samples, measures, strict=True):
            taken.append(measure())
    return samples


def _duration(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# The roofline


def random_lines(users: int) -> NDArray[np.int64]:
    """Memory of one line a user, touched."""
    memory = reserved(users * 8, np.int64)
    memory[::8] = 1
    return memory


class Lines:
    """The roofline: rows that are so many random lines of memory and nothing else.

    Args:
        users: Lines of memory, shared out to the threads.
        per_row: Random lines that a row reads and writes.
        rows: Rows of one sample, for each thread.
        threads: Threads at work at the same time, each on lines of its own.

    Example:
        >>> Lines(1_000, 3, 1_000, 1).rate() > 0
        True
    """

    def __init__(self, users: int, per_row: int, rows: int, threads: int) -> None:
        from engine.kernels.roofline import touch_lines  # noqa: PLC0415 - compiled only for who measures

        self._touch = touch_lines
        self._memories = [random_lines(max(1, users // threads)) for _ in range(threads)]
        self._random = np.random.default_rng(5)
        self._rows, self._per_row, self._threads = rows, per_row, threads
        self._pool = ThreadPoolExecutor(threads)
        self.rate()

    def rate(self) -> float:
        """One sample, rows per second of all threads."""
        numbers = self.draw()
        return self._threads * self._rows / _duration(lambda: self.run(numbers))

    def draw(self) -> list[NDArray[np.int64]]:
        """Numbers of the lines of one sample, for each thread. Others each time: the same ones again would be in a cache."""
        return [self._random.integers(0, len(memory) // 8, self._per_row * self._rows) for memory in self._memories]

    def run(self, numbers: list[NDArray[np.int64]]) -> None:
        """Touch these lines."""
        if self._threads == 1:
            self._touch(numbers[0], AHEAD, self._memories[0])
        else:
            for part in [self._pool.submit(self._touch, mine, AHEAD, memory) for mine, memory in zip(numbers, self._memories, strict=True)]:
                part.result()

    def measured(self, samples: list[float]) -> Measured:
        """Samples of it with their name."""
        what = f"{self._per_row} random lines a row, {_count(self._threads, 'thread')}"
        return Measured("lines", what, "rows/s", samples, {"lines": self._per_row, "shards": self._threads})


def line_costs(sizes: Sequence[int], *, samples: int = 5) -> list[Measured]:
    """Nanoseconds per random line, read and written with prefetch, of working sets of so many bytes: the caches of the machine as steps.

    Args:
        sizes: Bytes, at least 64; the memory of each is taken and given back.
        samples: Of each size.

    Returns:
        One `Measured` a size, in "ns", with the size in `facts["bytes"]`. Cost: two to four seconds for a size of 4 GB.

    Example:
        >>> [cost.facts["bytes"] for cost in line_costs([2**14, 2**16], samples=1)]
        [16384, 65536]
    """
    costs = []
    for size in sizes:
        lines = Lines(max(1, size // 64), 1, 2**20, 1)
        costs.append(Measured("line", "one random line", "ns", [1e9 / lines.rate() for _ in range(samples)], {"bytes": size}))
    return costs


# The engine


def steady(workload: Uniform, shards: int) -> tuple[RiskEngine, Iterator[Any]]:
    """An engine after two retentions of the workload, and the rows that come next.

    It has room for twice the users: one that is nearly full makes sure of the room for each batch first.
    """
    batches = workload.batches(2**62)
    engine = RiskEngine(users=2 * workload.users, shards=shards, max_ahead=None, time_unit="us")
    for batch in itertools.islice(batches, -(-int(4 * workload.users * workload.rows_per_user) // BATCH_ROWS)):
        engine.ingest(batch)
    return engine, batches


def ingest(engine: RiskEngine, batches: Iterator[Any], users: int, seconds: float) -> tuple[Measured, Measured]:
    """Rows per second with a score per row, in batches that are made beforehand; and the roofline of three lines a row."""
    shards = engine.config.shards
    lines = Lines(users, 3, BATCH_ROWS, shards)

    def measure() -> float:
        batch = next(batches)
        return float(batch.num_rows / _duration(lambda: engine.ingest(batch, scores=True)))

    samples = rounds(seconds, lines.rate, measure)
    found = Measured("ingest", f"ingest with scores, {_count(shards, 'shard')}", "rows/s", samples[1], {"shards": shards})
    return lines.measured(samples[0]), found


def lookup(engine: RiskEngine, ids: NDArray[np.int64], seconds: float) -> tuple[Measured, Measured]:
    """Users per second of `scores()` of a million random users; and the roofline of two lines a user."""
    shards = engine.config.shards
    users = np.random.default_rng(7).choice(ids, LOOKUP_USERS)
    lines = Lines(len(ids), 2, LOOKUP_USERS // shards, shards)
    engine.scores(users)
    samples = rounds(seconds, lines.rate, lambda: len(users) / _duration(lambda: engine.scores(users)))
    found = Measured("lookup", f"scores() of a million users, {_count(shards, 'shard')}", "rows/s", samples[1], {"shards": shards})
    return lines.measured(samples[0]), found


def one_by_one(engine: RiskEngine, ids: NDArray[np.int64], seconds: float) -> tuple[Measured, Measured]:
    """Nanoseconds of each `add` of a row and each `score` of a user, in turn, of random users."""
    clock = engine.stats().clock
    next_us = 0 if clock is None else int(clock.astype("datetime64[us]").astype(np.int64)) + 1
    chosen = np.random.default_rng(8).choice(ids, 100_000).tolist()
    users, asked, times = itertools.cycle(chosen), itertools.cycle(reversed(chosen)), itertools.count(next_us)

    def add() -> float:
        user, when = next(users), next(times)
        return 1e9 * _duration(lambda: engine.add(user, 12.5, when))

    def score() -> float:
        user = next(asked)
        return 1e9 * _duration(lambda: engine.score(user))

    rounds(0, add, score, least=100)
    adds, scores = rounds(seconds, add, score, least=100)
    return Measured("add", "add() of one row", "ns", adds), Measured("score", "score() of one user", "ns", scores)


# The engine beside its peers


def table_scores(rows: Any, shards: int) -> NDArray[np.float64]:
    """(n,) scores of the rows of a table, by a new engine with room for as many users as rows."""
    with RiskEngine(users=max(1, rows.num_rows), shards=shards, max_ahead=None) as engine:
        return np.asarray(engine.ingest(rows, scores=True).scores)


def proven(shards: int) -> tuple[Any, NDArray[np.float64]]:
    """A small table with rows on the edges of windows, and the engine's scores, which are the reference's.

    Raises:
        EngineError: They are not.

    Example:
        >>> rows, scores = proven(shards=1)
        >>> rows.num_rows, len(scores)
        (10000, 10000)
    """
    rows = Uniform(PROOF_USERS).table(PROOF_ROWS)
    config = Config.of(max_ahead=None, users=PROOF_USERS)
    reference = Reference(config)
    wanted = [row.score for batch in rows.to_batches() for row in reference.ingest(plain_rows(batch, config))]
    found = table_scores(rows, shards)
    if found.tolist() != wanted:
        raise EngineError("the engine's scores are not those of the reference; run `riskring doctor` and report this")
    return rows, found


def beside_peer(peer: Peer, rows: Any, shards: int, seconds: float) -> tuple[Measured, Measured]:
    """Rows per second of a whole table through a new engine, made and closed each time, and through a peer.

    Raises:
        EngineError: The peer's scores are not the engine's, of these rows or of those that are proven.
    """
    proof, wanted = proven(shards)
    peer.check(proof, wanted)
    part = peer.part(rows)
    peer.check(part, table_scores(part, shards))
    count = part.num_rows
    samples = rounds(seconds, lambda: count / _duration(lambda: table_scores(part, shards)), lambda: count / peer.timed(part)[1])
    facts = {"rows": count, "shards": shards}
    what = f"a table through a new engine, {_count(shards, 'shard')}"
    return Measured("table", what, "rows/s", samples[0], facts), Measured(peer.name, peer.how, "rows/s", samples[1], {"rows": count})


# Processes of their own

_RESIDENT: Final = """
import sys
from engine.engine import RiskEngine
from engine.measurements import Uniform, resident_bytes

users = int(sys.argv[1])
with RiskEngine(users=1000, max_ahead=None) as first:  # compiled code and pools are not the users'
    for batch in Uniform(1000).batches(70_000):
        first.ingest(batch, scores=True)
batches = Uniform(users).batches(users)
ahead = next(batches)
engine = RiskEngine(users=users, max_ahead=None)
before = resident_bytes()
engine.ingest(ahead)
for batch in batches:
    engine.ingest(batch)
print(resident_bytes() - before, engine.stats().users)
"""

_FIRST_SCORE: Final = """
import sys
from engine import RiskEngine

print(RiskEngine(users=int(sys.argv[1]), max_ahead=None).add("alice", 12.5, "2026-01-01T00:00:00Z"))
"""


def _fresh(program: str, *words: object) -> str:
    """What a program prints in a process of its own, which finds this very engine in its folder."""
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise EngineError(f"a process of its own ended with {done.returncode}: {done.stderr.strip() or 'no message'}")
    return done.stdout


def resident(users: int) -> Measured:
    """Resident bytes per active user, in a process of its own after as many rows as users: most of the active then have one or two."""
    grown, active = map(int, _fresh(_RESIDENT, users).split())
    return Measured("resident", "resident bytes per active user", "bytes", [grown / active], {"active": active})


def resident_bytes() -> int:
    """Resident memory of this process.

    Example:
        >>> resident_bytes() > 0
        True
    """
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024


def first_score(users: int, seconds: float) -> Measured:
    """Seconds from the start of Python to the first score. Code was compiled before."""
    _fresh(_FIRST_SCORE, users)
    (samples,) = rounds(seconds, lambda: _duration(lambda: _fresh(_FIRST_SCORE, users)))
    return Measured("first score", "first score of a fresh process", "s", samples)
