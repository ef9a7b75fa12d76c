"""How fast do rows go in and scores come out, beside what the memory of the machine can do?

    python -m pytest bench/bench_ingest.py --benchmark-columns=min,median,iqr,rounds

Prediction: a row of a sparse user touches two random lines (index, slot), one of a user with a larger ring two or three more. Equal
answers are proven before any time is taken: the first rows of the workload are compared with the reference, with ==.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from roofline import random_lines, touch_lines
from workload import BATCH_ROWS, ROUNDS, SMOKE, USERS, Uniform

from engine import RiskEngine
from engine.config import Config
from engine.reference import Reference

CHECKED_ROWS = 20_000


def warm(shards: int) -> tuple[RiskEngine, object]:
    """An engine in its steady state, after two retentions of the workload, and the rows that come next.

    Before that it still takes memory it has never touched, and the first touch of a page costs more than the row.
    """
    workload = Uniform(USERS)
    rows = 4 * USERS + (ROUNDS + 1) * BATCH_ROWS
    batches = workload.batches(rows)
    engine = RiskEngine(users=2 * USERS, shards=shards, max_ahead=None)
    for batch in itertools.islice(batches, 4 * USERS // BATCH_ROWS):
        engine.ingest(batch)
    return engine, batches


def test_answers_are_those_of_the_reference() -> None:
    """Proven first: same rows, same bits."""
    config = Config.of(max_ahead=None, users=USERS)
    reference, engine = Reference(config), RiskEngine(users=USERS, max_ahead=None)
    for batch in Uniform(min(USERS, 5_000)).batches(CHECKED_ROWS):
        users, amounts = batch["user_id"].to_pylist(), batch["amount"].to_pylist()
        times = (np.asarray(batch["timestamp"].cast("int64")) * 1000).tolist()
        wanted = [row.score for row in reference.ingest(list(zip(users, amounts, times, strict=True)))]
        assert engine.ingest(batch, scores=True).scores.to_pylist() == wanted
    assert engine.digest() == reference.digest()


@pytest.mark.benchmark(group="rows")
def test_three_random_lines(benchmark) -> None:
    """The roofline: three random lines a row, nothing else."""
    memory, lines = random_lines(USERS, 3 * BATCH_ROWS)
    benchmark.extra_info["rows"] = BATCH_ROWS
    benchmark.pedantic(touch_lines, (lines, 24, memory), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.benchmark(group="rows")
@pytest.mark.parametrize("shards", [1, 2])
def test_ingest_with_scores(benchmark, shards: int) -> None:
    """Batches of 65,536 rows into a warm engine, a score per row."""
    engine, batches = warm(shards)
    benchmark.extra_info["rows"] = BATCH_ROWS
    benchmark.pedantic(lambda batch: engine.ingest(batch, scores=True), setup=lambda: ((next(batches),), {}), rounds=ROUNDS)
    engine.close()


@pytest.mark.benchmark(group="lookups")
def test_two_random_lines(benchmark) -> None:
    """The roofline of a lookup: two random lines a user."""
    count = 10_000 if SMOKE else 1_000_000
    memory, lines = random_lines(USERS, 2 * count)
    benchmark.extra_info["rows"] = count
    benchmark.pedantic(touch_lines, (lines, 24, memory), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.benchmark(group="lookups")
@pytest.mark.parametrize("shards", [1, 2])
def test_scores_of_random_users(benchmark, shards: int) -> None:
    """`scores()` of a million random users."""
    engine, _ = warm(shards)
    count = 10_000 if SMOKE else 1_000_000
    users = np.random.default_rng(7).choice(Uniform(USERS).ids, count)
    benchmark.extra_info["rows"] = count
    benchmark.pedantic(engine.scores, (users,), rounds=ROUNDS, warmup_rounds=1)
    engine.close()


@pytest.mark.benchmark(group="single")
def test_add_one_row(benchmark) -> None:
    """`add` of one row."""
    engine = RiskEngine(users=1_000, max_ahead=None, time_unit="us")
    times = itertools.count()
    benchmark(lambda: engine.add(7, 12.5, next(times)))


@pytest.mark.benchmark(group="single")
def test_score_one_user(benchmark) -> None:
    """`score` of one user."""
    engine = RiskEngine(users=1_000, max_ahead=None, time_unit="us")
    engine.add(7, 12.5, 0)
    benchmark(lambda: engine.score(7))
