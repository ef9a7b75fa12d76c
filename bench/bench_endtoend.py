"""File to file: how long does `riskring run big.parquet -o scored.parquet` take, beside DuckDB doing the same?

    python -m pytest bench/bench_endtoend.py --benchmark-columns=min,median,rounds

Both are whole processes, with Python and library start-up, on the same file and on two processors: DuckDB with two threads, riskring
with two shards and its threads that read and write. riskring's compiled code is on disk already. Four rows a user, over four
minutes of event time; the two programs in turn, round by round.

Equal answers are proven before any time is taken, for every row, with ==. DuckDB is asked for sums of whole cents and counts for that: its
sums of floats depend on their order. (Times are distinct here; SQL's RANGE would count a later row of the same time, an engine that
answers row by row cannot.)

Prediction, in nanoseconds of one processor a row: reading 15, conversion 1, engine 60 to 90, writing 30, and half of it all with two
processors; plus 0.7 s to start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from measure import Work, take
from workload import SMOKE, USERS, Uniform

ROWS = 4 * USERS
FILE_ROUNDS = 1 if SMOKE else 5
THREADS = 2

WINDOW = "OVER (PARTITION BY user_id ORDER BY timestamp RANGE BETWEEN INTERVAL 60 SECONDS PRECEDING AND CURRENT ROW)"
CENTS = """
    SELECT (sum(round(amount * 100)::BIGINT) {window})::BIGINT AS cents, count(*) {window} AS count
    FROM read_parquet('{big}', file_row_number = true) ORDER BY file_row_number
"""
SCORED = "COPY (SELECT *, avg(amount) {window} AS score FROM '{big}') TO '{scored}' (FORMAT parquet)"
DUCKDB = "import duckdb, sys; duckdb.connect(config={'threads': int(sys.argv[1])}).execute(sys.argv[2])"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The rows as pyarrow writes them by default, in groups of 2**20."""
    path = tmp_path_factory.mktemp("endtoend") / "big.parquet"
    batches = Uniform(USERS).batches(ROWS, 2**20)
    first = next(batches)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    yield path
    for file in path.parent.iterdir():  # gigabytes, and pytest would keep those of three runs
        file.unlink()


def two_processors() -> None:
    """Keep this process to two processors, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def process(*command: object) -> None:
    """Run Python with these arguments, and wait for it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, *map(str, command)]
    subprocess.run(words, check=True, capture_output=True, text=True, env=environment, preexec_fn=two_processors)


def riskring(big: Path, *more: object) -> None:
    """`riskring run`, with its summary and all."""
    process("-m", "engine.cli", "run", big, "--max-ahead", "none", "--shards", THREADS, "--users", USERS, *more)


def test_answers_are_equal(big: Path) -> None:
    """Proven first: the same rows in the same order, and the score of each."""
    scored = big.with_name("scored.parquet")
    riskring(big, "-o", scored)
    given, found = pq.read_table(big), pq.read_table(scored)
    assert found.drop_columns(["score"]).equals(given)
    assert pc.count_distinct(given["timestamp"]).as_py() == ROWS
    with duckdb.connect(config={"threads": THREADS}) as connection:
        wanted = connection.execute(CENTS.format(window=WINDOW, big=big)).fetchnumpy()
    cents, count = wanted["cents"], wanted["count"]
    assert np.abs(cents).max() < 2**53 > 100 * count.max()  # both are exact floats, so that the quotient is correctly rounded
    assert (np.asarray(found["score"]) == cents / (100 * count)).all()


def work(run: Callable[[], None]) -> Work:
    """A whole process over all rows."""
    return Work(ROWS, lambda: None, lambda _: run())


@pytest.mark.benchmark(group="file to file")
def test_file_to_file(benchmark, big: Path) -> None:
    """`riskring run big.parquet -o scored.parquet` beside DuckDB, which copies all columns and the average of the window."""
    scored, by_duckdb = big.with_name("scored.parquet"), big.with_name("duckdb.parquet")
    query = SCORED.format(window=WINDOW, big=big, scored=by_duckdb)
    beside = {"duckdb": work(lambda: process("-c", DUCKDB, THREADS, query))}
    take(benchmark, work(lambda: riskring(big, "-o", scored)), users=USERS, rounds=FILE_ROUNDS, warmup=0, beside=beside)
    sizes = {"input_bytes": big, "output_bytes": scored, "duckdb_output_bytes": by_duckdb}
    benchmark.extra_info |= {name: path.stat().st_size for name, path in sizes.items()}


@pytest.mark.benchmark(group="file to summary")
def test_file_to_summary(benchmark, big: Path) -> None:
    """`riskring run big.parquet`, which writes nothing but its summary."""
    take(benchmark, work(lambda: riskring(big)), users=USERS, rounds=FILE_ROUNDS, warmup=0)
