"""One measurement of resident memory, in a process of its own: `python bench/resident.py CASE USERS [ROWS_PER_USER]`.

    exact    each user has exactly so many transactions, in an order as if drawn, all within one window
    drawn    rows of uniformly drawn users, so many per user on average
    churn    an engine with room for USERS, after an hour in which five times as many came and went
    young    the same, after the last six minutes of that hour
    fresh    a new engine that was given just the rows which the first still retains

The last line of standard output is JSON. Bytes are what the process grew by between the first row and the last; code, libraries and the
buffers of one batch are there before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from workload import user_ids

from engine import RiskEngine
from engine.measurements import Uniform, resident_bytes

BATCH_ROWS = 65_536
WINDOW_US = 60_000_000
HOUR_MINUTES = 60
#: A step through all users that are not a multiple of it looks random enough for memory; each pass takes another.
PRIMES = (2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263, 374_761_393)


def batch(numbers: np.ndarray, times_us: np.ndarray, random: np.random.Generator) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "user_id": user_ids(numbers),
            "amount": np.round(random.lognormal(3, 1, len(numbers)), 2),
            "timestamp": pa.array(times_us, pa.timestamp("us", "UTC")),
        }
    )


def exact(users: int, rows_per_user: int) -> Iterator[pa.RecordBatch]:
    """Every user once, then every user a second time in another order, and so on."""
    random = np.random.default_rng(1)
    for turn in range(rows_per_user):
        prime = PRIMES[turn % len(PRIMES)]
        for first in range(0, users, BATCH_ROWS):
            place = np.arange(first, min(first + BATCH_ROWS, users))
            times_us = (turn * users + place) * (WINDOW_US - 1) // (users * rows_per_user)
            yield batch((place * prime + turn) % users, times_us, random)


def churn(capacity: int, minutes: range) -> Iterator[pa.RecordBatch]:
    """Seven tenths of the capacity are active at a time, a row a minute each on average; in an hour they move on through all users."""
    active = capacity * 7 // 10
    for minute in minutes:
        random = np.random.default_rng([2, minute])
        for first in range(0, active, BATCH_ROWS):
            place = np.arange(first, min(first + BATCH_ROWS, active))
            moved = (minute * active + place) * (5 * capacity - active) // (HOUR_MINUTES * active)
            times_us = minute * WINDOW_US + place * WINDOW_US // active
            yield batch(moved + random.integers(0, active, len(place)), times_us, random)


def batches(case: str, users: int, rows_per_user: int) -> Iterator[pa.RecordBatch]:
    if case == "exact":
        return exact(users, rows_per_user)
    if case == "drawn":
        return Uniform(users).batches(users * rows_per_user, BATCH_ROWS)
    # The last two minutes are what an engine with 60 s of window and 60 s of lateness still retains at the end.
    return churn(users, range({"churn": 0, "young": HOUR_MINUTES - 6, "fresh": HOUR_MINUTES - 2}[case], HOUR_MINUTES))


def main(case: str, users: int, rows_per_user: int = 1) -> None:
    with RiskEngine(users=1000, max_ahead=None) as first:  # loads code, and makes the buffers of one batch
        for rows in Uniform(1000).batches(70_000):
            first.ingest(rows)
    stream = batches(case, users, rows_per_user)
    ahead = next(stream)
    # closed="right": a row exactly two minutes old is gone, so that what is retained in the end is two whole minutes.
    engine = RiskEngine(users=users, closed="right", max_ahead=None)
    before = resident_bytes()
    engine.ingest(ahead)
    for rows in stream:
        engine.ingest(rows)
    resident, stats = resident_bytes() - before, engine.stats()
    found = {"users": stats.users, "transactions": stats.transactions, "resident": resident, "touched": stats.bytes}
    print(json.dumps(found | {"digest": engine.digest()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
