"""One day of India's UPI, replayed with a score per row: how long would one machine need for it?

    python bench/upi.py                                   the whole day: 700 M rows, 300 M users
    python bench/upi.py --rows 20_000_000 --from-hour 19  a piece of the same day

UPI is the payment system of India, with some 700 million payments a day in 2025. The rows are generated: users by Zipf's law with exponent
0.7 (the busiest, no human, pays seven times a second), amounts log-normal, and a rate that follows the day - a twentieth of its peak before
dawn, highest at midday and in the evening. Activity and shape are plausible ones, not measured ones.

The day does not fit a small disk at once, so a second process writes it part by part, a few parts ahead, and each part is removed when it
has been read. Engine time is the time in `ingest(batch, scores=True)` alone; writing and reading parts are not in it, and reading is shown
beside it. The two processes take turns with the processor, or else the generator's work would be measured with the engine's (--side-by-side
lets them run at once). In the end two things are checked: every row was accepted, and the scores of a sample of users, over all rows that
were replayed, are those of the reference, with ==.

Prediction: at 8,100 rows/s on average a million users are active at a time, so that all state, some 150 MB, is beyond the cache, and a row
costs what it does at 1 M users: 9 M rows/s on one shard, 15 M on two; the day, 50 to 80 s.

Prints progress on standard error, and one line of JSON with the result on standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from engine import RiskEngine, __version__  # noqa: E402 - found by the line above
from engine.config import Config  # noqa: E402
from engine.generate import mix, zipf  # noqa: E402
from engine.reference import Reference  # noqa: E402

BATCH_ROWS = 65_536
DAY_S = 86_400
DAY_START_US = 1_760_034_600_000_000  # 2025-10-10T00:00:00+05:30, midnight in India
#: Rate at each full hour, 1.0 at its peak; between hours it goes in a straight line.
DAY_SHAPE = (0.2, 0.1, 0.06, 0.05, 0.06, 0.12, 0.27, 0.45, 0.64, 0.8, 0.9, 0.97, 0.98, 0.94, 0.88, 0.85, 0.87, 0.93, 0.99, 1.0, 0.97, 0.83)
DAY_SHAPE += (0.6, 0.36, DAY_SHAPE[0])
RETENTION_S = 120
#: A row in so many is expected to be replayed by the reference, which takes some 10 us a row.
SAMPLED_ROWS = 200_000
SCHEMA = pa.schema({"user_id": pa.int64(), "amount": pa.float64(), "timestamp": pa.timestamp("us", "UTC")})


@dataclass(frozen=True)
class Day:
    """All rows of one day. Row number n is the same whichever part of the day is replayed."""

    rows: int
    users: int
    zipf: float
    seed: int
    part_rows: int

    def _reached(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the day, and the rows that there are until each."""
        seconds = np.arange(DAY_S + 1, dtype=np.float64)
        rates = np.interp(seconds, np.arange(25) * 3600.0, DAY_SHAPE)
        reached = np.concatenate(([0.0], np.cumsum((rates[1:] + rates[:-1]) / 2)))
        return seconds, reached * (self.rows / reached[-1])

    def first_row(self, hour: float) -> int:
        """The first row of an hour."""
        seconds, reached = self._reached()
        return int(np.interp(hour * 3600.0, seconds, reached))

    def rows_retained_max(self, first: int, last: int) -> int:
        """Most rows in one retention, between two rows of the day: so many users at the most are active at a time."""
        seconds, reached = self._reached()
        begins, ends = np.interp([first, last], reached, seconds)
        before = np.clip(seconds, begins, ends)
        after = np.minimum(before + RETENTION_S, ends)
        return math.ceil(float((np.interp(after, seconds, reached) - np.interp(before, seconds, reached)).max())) + 1

    def part(self, number: int) -> pa.Table:
        """Part `number` of the day: a pure function of the day and the number."""
        first = number * self.part_rows
        count = min(self.part_rows, self.rows - first)
        random = np.random.default_rng([self.seed, number])
        seconds, reached = self._reached()
        # One row in each unit of the reached count, anywhere in it: in order without a sort.
        times_us = np.interp(np.arange(first, first + count) + random.random(count), reached, seconds) * 1e6
        users = zipf(random, self.zipf, self.users, count) if self.zipf else random.integers(1, self.users + 1, count)
        amounts = np.maximum(np.rint(np.exp(random.normal(math.log(20_000), 1.4, count))), 1) / 100  # rupees and paise, median 200
        times = pa.array(times_us.astype(np.int64) + DAY_START_US).cast(SCHEMA.field("timestamp").type)
        return pa.Table.from_arrays([pa.array(mix(users).view(np.int64)), pa.array(amounts), times], schema=SCHEMA)


def write_parts(day: Day, numbers: range, folder: str, written: Any, room: Any, turn: Any) -> None:
    """The second process: parts as files, no more of them at a time than there is room for."""
    for number in numbers:
        room.acquire()
        with turn:
            start = time.perf_counter()
            path = f"{folder}/part-{number:05d}.parquet"
            pq.write_table(day.part(number), path, compression="none", use_dictionary=False)
            seconds = time.perf_counter() - start
        written.put((number, path, seconds))


class NoTurns:
    """A lock that keeps nobody waiting."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Sample:
    """The rows and scores of a few users, to be replayed by the reference at the end."""

    def __init__(self, rows: int) -> None:
        # One user in so many. (Ids are hashes, so a remainder is a random choice.)
        self._one_in = np.uint64(max(rows // SAMPLED_ROWS, 1))
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, batch: pa.RecordBatch, scores: pa.Array) -> None:
        """Keep what belongs to these users."""
        users = batch["user_id"].to_numpy()
        chosen = np.flatnonzero(users.view(np.uint64) % self._one_in == 0)
        columns = (users, batch["amount"].to_numpy(), batch["timestamp"].cast(pa.int64()).to_numpy(), scores.to_numpy())
        self._parts.append(tuple(column[chosen] for column in columns))

    def check(self, users: int) -> int:
        """Number of rows compared; AssertionError if one differs. Times are in order, so other users change nothing."""
        user, amount, time_us, score = (np.concatenate(columns) for columns in zip(*self._parts, strict=True))
        reference = Reference(Config.of(max_ahead=None, users=users))
        rows = reference.ingest(list(zip(user.tolist(), amount.tolist(), (time_us * 1000).tolist(), strict=True)))
        for number, (row, found) in enumerate(zip(rows, score.tolist(), strict=True)):
            assert row.score == found, f"user {user[number]} at {time_us[number]} us: {found!r}, the reference says {row.score!r}"
        return len(rows)


@dataclass
class Totals:
    """What a replay adds up."""

    rows: int = 0
    accepted: int = 0
    engine_s: float = 0.0
    read_s: float = 0.0
    generate_s: float = 0.0
    users_active_max: int = 0


def replay(day: Day, first: int, rows: int, shards: int | None, users: int, ahead: int, side_by_side: bool) -> dict[str, Any]:
    """Replay `rows` rows of the day from row `first` on."""
    numbers = range(first // day.part_rows, -(-(first + rows) // day.part_rows))
    context = multiprocessing.get_context("spawn")
    written, room, turns = context.Queue(), context.Semaphore(ahead), context.Lock()
    turn: Any = NoTurns() if side_by_side else turns
    totals, sample = Totals(), Sample(rows)
    started = time.perf_counter()
    # Expiry and the first compiled call belong to the engine, starting the second process does not.
    with tempfile.TemporaryDirectory(prefix="riskring-upi-") as folder, RiskEngine(users=users, shards=shards, max_ahead=None) as engine:
        writer = context.Process(target=write_parts, args=(day, numbers, folder, written, room, turn), daemon=True)
        writer.start()
        try:
            for wanted in numbers:
                number, path, generate_s = next_part(written, writer)
                assert number == wanted
                with turn:
                    start = time.perf_counter()
                    table = pq.read_table(path)
                    totals.read_s += time.perf_counter() - start
                    os.remove(path)
                    room.release()
                    totals.generate_s += generate_s
                    skipped = max(first - number * day.part_rows, 0)
                    table = table.slice(skipped, min(len(table) - skipped, rows - totals.rows))
                    ingest(engine, table, totals, sample)
                totals.users_active_max = max(totals.users_active_max, len(engine))
                show(totals, rows, engine)
        finally:
            writer.terminate()
            writer.join()
        state_bytes = engine.stats().bytes
    wall_s = time.perf_counter() - started
    assert totals.rows == rows
    assert totals.accepted == rows, f"{rows - totals.accepted:,} rows were not accepted"
    rate = totals.rows / totals.engine_s
    return {
        **asdict(totals),
        "wall_s": wall_s,
        "rows_per_s": rate,
        "day_s": day.rows / rate,
        "state_bytes": state_bytes,
        "resident_bytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "scores_checked": sample.check(users),
    }


def next_part(written: Any, writer: Any) -> tuple[int, str, float]:
    """The next part, or an error if the process that writes them has died."""
    while True:
        try:
            return written.get(timeout=5)  # type: ignore[no-any-return]
        except Exception as error:  # queue.Empty, raised by the name of another module on some systems
            if not writer.is_alive() and written.empty():
                raise SystemExit(f"the process that writes the parts ended with exit code {writer.exitcode}; is the disk full?") from error


def ingest(engine: RiskEngine, table: pa.Table, totals: Totals, sample: Sample) -> None:
    """One part into the engine; only the calls of `ingest` are timed."""
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        start = time.perf_counter()
        result = engine.ingest(batch, scores=True)
        totals.engine_s += time.perf_counter() - start
        totals.rows += result.rows
        totals.accepted += result.accepted
        sample.add(batch, result.scores)


def show(totals: Totals, rows: int, engine: RiskEngine) -> None:
    rate = totals.rows / totals.engine_s / 1e6
    print(
        f"{totals.rows:>13,} of {rows:,} rows, engine {totals.engine_s:6.1f} s, {rate:5.2f} M rows/s, {len(engine):,} users active",
        file=sys.stderr,
        flush=True,
    )


def whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def commit() -> str:
    import subprocess  # noqa: PLC0415 - wanted once, at the end

    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Replay one day of India's UPI with a score per row.")
    parser.add_argument("--rows", type=whole, help="rows to replay; default: the day from --from-hour on")
    parser.add_argument("--day-rows", type=whole, default=700_000_000, help="rows of the whole day, which set the rate")
    parser.add_argument("--from-hour", type=float, default=0.0, help="hour of the day at which to begin")
    parser.add_argument("--users", type=whole, default=300_000_000, help="users who pay on that day")
    parser.add_argument("--zipf", type=float, default=0.7, help="exponent of the users' activity; 0: all alike")
    parser.add_argument("--shards", type=whole, help="default: one per core")
    parser.add_argument("--part-rows", type=whole, default=5_000_000, help="rows of a part; 24 bytes each on disk")
    parser.add_argument("--ahead", type=whole, default=2, help="parts on disk at a time")
    parser.add_argument("--side-by-side", action="store_true", help="generate while the engine works, not in turn with it")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    if not 0 <= args.from_hour < 24:
        parser.error("--from-hour must be from 0 to below 24")
    if not 0 <= args.zipf <= 10:
        parser.error("--zipf must be from 0 to 10")
    day = Day(args.day_rows, args.users, args.zipf, args.seed, args.part_rows)
    first = day.first_row(args.from_hour)
    rows = min(args.rows or day.rows, day.rows - first)
    # Twice those who can be active at a time: those whose rows have expired keep their places for a while.
    users = min(args.users, 2 * day.rows_retained_max(first, first + rows))
    found = replay(day, first, rows, args.shards, users, args.ahead, args.side_by_side)
    versions = {"python": platform.python_version(), "riskring": __version__, "numpy": np.__version__, "pyarrow": pa.__version__}
    setting = {
        "day": asdict(day),
        "from_hour": args.from_hour,
        "shards": args.shards,
        "users_max": users,
        "side_by_side": args.side_by_side,
    }
    print(json.dumps({"commit": commit(), "versions": versions, "cores": os.cpu_count(), **setting, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
