"""Seeded workloads that all benchmarks share: the same rows for every engine, and sizes that shrink to a smoke test.

`RISKRING_BENCH_USERS` sets the number of users (default 10,000,000); `RISKRING_BENCH_SMOKE=1` makes everything small, to see that it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SMOKE = os.environ.get("RISKRING_BENCH_SMOKE") == "1"
USERS = 10_000 if SMOKE else int(os.environ.get("RISKRING_BENCH_USERS", "10000000"))
BATCH_ROWS = 1_024 if SMOKE else 65_536
ROUNDS = 3 if SMOKE else 60


@dataclass(frozen=True)
class Uniform:
    """Users drawn uniformly from random 64-bit ids; amounts with two decimals; one row per user and window on average."""

    users: int
    window_us: int = 60_000_000
    seed: int = 1

    @property
    def ids(self) -> np.ndarray:
        """(users,) int64."""
        return np.random.default_rng(self.seed).integers(-(2**63), 2**63 - 1, self.users)

    def batches(self, rows: int, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """So many rows in event-time order."""
        ids = self.ids
        random = np.random.default_rng(self.seed + 1)
        step_us = self.window_us / self.users
        for first in range(0, rows, batch_rows):
            count = min(batch_rows, rows - first)
            times = ((first + np.arange(count)) * step_us).astype(np.int64)
            yield pa.record_batch(
                {
                    "user_id": ids[random.integers(0, self.users, count)],
                    "amount": np.round(random.lognormal(3, 1, count), 2),
                    "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
                }
            )


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
