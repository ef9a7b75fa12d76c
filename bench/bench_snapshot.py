"""What does a snapshot cost: how long do rows wait for it, how long does it take, how large is it, and how long does loading take?

    python -m pytest bench/bench_snapshot.py -s

An engine in its steady state, one and a half transactions a user. While the snapshot is written rows go on in batches of 16,384, as fast
as they are taken; a pause is what a call of `ingest`, or of `start_save`, takes beyond the median call before the snapshot began.
Then the same snapshot is written with nothing beside it, and loaded. The disk is that of the temporary folder (`--basetemp`).

Prediction, for 10 million users on two cores: beginning copies 10 MB of marks, 3 ms. Reading a user is a line in order and some work,
10 ns an entry, 131,072 entries at a time: pauses of 2 to 5 ms, and as much again where both cores are busy. Encoding is some 60 ns an
entry, hashes and digest 60 more: two to three seconds. Loading is decoding, and rows into an engine whose memory is new: 100 ns a
transaction on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure import prove
from workload import SMOKE, USERS, Uniform

from engine import RiskEngine

SIZES = sorted({USERS if SMOKE else 1_000_000, USERS})
BATCH_ROWS = 16_384
BATCHES_BEFORE = 5 if SMOKE else 100


def test_answers_are_those_of_the_reference(tmp_path: Path) -> None:
    """Proven first: what was saved and loaded is the state of the reference."""
    engine, reference = prove(Uniform(USERS))
    engine.save(tmp_path)
    assert RiskEngine.load(tmp_path).digest() == reference.digest()


@pytest.mark.benchmark(group="snapshot")
@pytest.mark.parametrize("users", SIZES)
def test_snapshot(benchmark: Any, tmp_path: Path, users: int) -> None:
    """Saved while rows go on, saved alone, loaded; the loaded engine has the same digest."""
    engine = RiskEngine(users=2 * users, max_ahead=None)
    batches = Uniform(users).batches(2**62, BATCH_ROWS)
    for _ in range(-(-3 * users // (2 * BATCH_ROWS))):
        engine.ingest(next(batches))

    def ingest() -> float:
        batch = next(batches)
        start = time.perf_counter()
        engine.ingest(batch, scores=True)
        return time.perf_counter() - start

    before = np.median([ingest() for _ in range(BATCHES_BEFORE)])
    began = time.perf_counter()
    saving = engine.start_save(tmp_path / "beside")
    start = time.perf_counter() - began
    taken = [ingest()]
    while not saving.done():
        taken.append(ingest())
    beside = time.perf_counter() - began
    info = saving.result()
    began = time.perf_counter()
    saved = engine.save(tmp_path / "alone")
    alone = time.perf_counter() - began
    loaded: list[RiskEngine] = []

    def load() -> None:
        loaded.append(RiskEngine.load(tmp_path / "alone", users=2 * users))

    benchmark.pedantic(load, rounds=1)
    assert loaded[0].digest() == saved.digest == engine.digest()
    loaded[0].close()
    engine.close()
    benchmark.extra_info |= {
        "rows": info.transactions,
        "users": users,
        "figures": {
            "start_save ms": start * 1e3,
            "longest pause of a batch ms": (max(taken) - before) * 1e3,
            "median batch before ms": before * 1e3,
            "median batch meanwhile ms": float(np.median(taken)) * 1e3,
            "save while rows go on s": beside,
            "save alone s": alone,
            "per transaction B": info.bytes / info.transactions,
            "per transaction allowed B": 24 + 16 * info.users / info.transactions,
        },
    }
