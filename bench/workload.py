"""Seeded workloads that all benchmarks share: the same rows for every engine, and sizes that shrink to a smoke test.

`RISKRING_BENCH_USERS` sets the number of users (default 10,000,000); `RISKRING_BENCH_SMOKE=1` makes everything small, to see that it runs;
`RISKRING_BENCH_HUGE=1` adds what takes minutes and most of a 24 GiB machine: 100 million users.

The uniform workload is that of `riskring bench`; here are the sizes, and the workloads that are less tame.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.generate import mix, zipf
from engine.measurements import Uniform

SMOKE = os.environ.get("RISKRING_BENCH_SMOKE") == "1"
HUGE = os.environ.get("RISKRING_BENCH_HUGE") == "1" and not SMOKE
USERS = 10_000 if SMOKE else int(os.environ.get("RISKRING_BENCH_USERS", "10000000"))
BATCH_ROWS = 1_024 if SMOKE else 65_536
ROUNDS = 3 if SMOKE else 60

ID_KINDS = ("int64", "uuid", "name", "binary16", "dictionary")


class Zipf(Uniform):
    """Users drawn by Zipf's law with exponent 1.1: at 10 million users the first has an eighth of all rows."""

    def numbers(self, random: np.random.Generator, rows: int) -> np.ndarray:
        """(rows,) int64."""
        return zipf(random, 1.1, self.users, rows) - 1


class OutOfOrder(Uniform):
    """One row in ten comes up to one window late, which is within the lateness: each is still applied."""

    def times_us(self, random: np.random.Generator, first: int, rows: int) -> np.ndarray:
        """(rows,) int64."""
        times = super().times_us(random, first, rows)
        delayed = np.flatnonzero(random.random(rows) < 0.1)
        times[delayed] -= random.integers(1, self.window_us, delayed.size)
        return times


class OneHot(Uniform):
    """One user has a tenth of all rows: a million in its window, if there are 10 million users."""

    def numbers(self, random: np.random.Generator, rows: int) -> np.ndarray:
        """(rows,) int64."""
        return np.where(random.random(rows) < 0.1, 0, super().numbers(random, rows))


@dataclass(frozen=True)
class Ids(Uniform):
    """The uniform case with ids of another kind, one of ID_KINDS."""

    kind: str = "uuid"

    def user_ids(self, numbers: np.ndarray) -> Any:
        """(n,) Arrow ids."""
        return user_ids(numbers, self.kind)


_HEX = np.frombuffer(bytes(range(256)).hex().encode(), np.uint8).reshape(256, 2)
_DIGIT_PLACES = np.array([place for place in range(36) if place not in (8, 13, 18, 23)])  # of a UUID, between its hyphens


def user_ids(numbers: np.ndarray, kind: str = "int64") -> Any:
    """Ids of user numbers, as an Arrow array.

    Args:
        numbers: (n,) int64.
        kind: One of ID_KINDS: "int64"; "uuid", 36 characters; "name", such as user-1234567; "binary16", 16 bytes of fixed size;
            "dictionary", UUIDs behind 32-bit codes, with a dictionary of its own for each batch as Parquet files have them.
    """
    if kind == "int64":
        return pa.array(mix(numbers).view(np.int64))
    if kind == "name":
        return pc.binary_join_element_wise("user-", pa.array(numbers).cast(pa.string()), "")
    words = np.stack((mix(numbers), mix(numbers + 2**62)), axis=1)
    if kind == "binary16":
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(numbers), [None, pa.py_buffer(words)])
    text = np.full((len(numbers), 36), ord("-"), np.uint8)
    text[:, _DIGIT_PLACES] = _HEX[words.view(np.uint8)].reshape(-1, 32)
    offsets = np.arange(0, 36 * len(numbers) + 1, 36, dtype=np.int32)
    uuids = pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(text))
    return uuids.dictionary_encode() if kind == "dictionary" else uuids
