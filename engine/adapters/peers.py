"""Other systems that do this job today, each given exactly the engine's task on the engine's rows.

The task: for each row of a table, the mean of its user's amounts in the last 60 seconds, the row itself and both ends included. The
table is Arrow, (user_id int64, amount float64 with two decimals, timestamp in microseconds, UTC), in the order of its times.

Each peer is written in the fastest form that was found for it. SQL engines get the times as integers, which is the same memory. Where it
costs nothing they compute in whole cents, which makes their answers exact; otherwise their sums are running floats, and a tolerance
says so. Conversion from and to Arrow is part of the time, as it is for the engine.

What they do not do: batch systems answer for a finished table and keep nothing for the next row, and none takes late rows or can be asked
about another instant. Rows of one user with equal times are one to SQL's RANGE, polars and Flink, which give all of them the value after
the last; the engine, pandas, River and the plain code go by arrival. Give them times that strictly increase.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import subprocess
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from engine.errors import EngineError

Scores: TypeAlias = NDArray[np.float64]

WINDOW_US: Final = 60_000_000

#: Relative difference allowed where amounts are added to and taken from a running float sum or mean: each step errs by about 1e-16 of the
#: largest value on the way, and thousands of them stay far below this.
DRIFT: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Peer:
    """One system and how to have it do the task.

    Attributes:
        name: What it is called on the command line.
        how: What it runs, in a few words.
        mode: "batch" needs the whole table, "streaming" answers row by row.
        package: What `pip install` calls it; "" for plain Python.
        share: Part of a table that it is given, from the front; less than 1 for systems that would take minutes.
        tolerance: Relative difference to the exact score that is allowed; 0.0: equal bits.
        needs: What is missing to run it, as one line with its fix; "" if nothing.
        timed: Table to scores, (n,) float64 in the order of the rows, and the seconds that took.
    """

    name: str
    how: str
    mode: str
    package: str
    share: float
    tolerance: float
    needs: str
    timed: Callable[[Any], tuple[Scores, float]]

    @property
    def version(self) -> str:
        """Of the package, "" if there is none to ask."""
        try:
            return metadata.version(self.package) if self.package else ""
        except metadata.PackageNotFoundError:
            return ""

    def part(self, table: Any) -> Any:
        """The rows of a table that it is given, at least one."""
        return table.slice(0, max(1, round(table.num_rows * self.share)))

    def run(self, table: Any) -> Scores:
        """Scores of all rows of a table, (n,) float64 in the order of the rows.

        Example:
            >>> times = pa.array([0, 60_000_000, 60_000_001], pa.timestamp("us", "UTC"))
            >>> table = pa.table({"user_id": [7, 7, 7], "amount": [1.0, 2.0, 4.0], "timestamp": times})
            >>> peers()["plain"].run(table)
            array([1. , 1.5, 3. ])
        """
        return self.timed(table)[0]

    def check(self, table: Any, wanted: Scores) -> None:
        """Prove that its answers are the wanted ones, within its tolerance.

        Args:
            table: Rows, all of which it is given.
            wanted: (n,) float64 exact scores of these rows.

        Raises:
            EngineError: One is not; the text names the first.
        """
        found = self.run(table)
        if found.shape != wanted.shape:
            raise EngineError(f"{self.name}: {len(found):,} scores for {len(wanted):,} rows")
        wrong = np.flatnonzero(~(np.abs(found - wanted) <= self.tolerance * np.abs(wanted)))
        if len(wrong):
            row = int(wrong[0])
            differ = f"score {float(found[row])!r} instead of {float(wanted[row])!r} in row {row:,}"
            raise EngineError(f"{self.name}: {differ}; {len(wrong):,} of {len(wanted):,} differ")


def peers(threads: int = 1, flink_python: str | None = None) -> dict[str, Peer]:
    """All peers by name, also those that are not installed.

    Args:
        threads: Threads, partitions or slots for those that can be told: DuckDB, DataFusion, chDB, Flink. Polars takes as many as there
            are cores (POLARS_MAX_THREADS); the others have one.
        flink_python: Interpreter that has apache-flink, which wants older libraries than the others and so an environment of its own.

    Example:
        >>> sorted(peers())
        ['chdb', 'datafusion', 'duckdb', 'flink', 'pandas', 'plain', 'polars', 'river']
        >>> peers()["flink"].needs
        'an interpreter with apache-flink (pip install apache-flink, and Java) given by --flink-python or RISKRING_FLINK_PYTHON'
    """

    def peer(name: str, how: str, mode: str, share: float, tolerance: float, run: Callable[..., Scores], *arguments: Any) -> Peer:
        package = "" if name == "plain" else name
        needs = "" if not package or importlib.util.find_spec(package) else f"pip install {package}"
        return Peer(name, how, mode, package, share, tolerance, needs, lambda table: _timed(run, table, *arguments))

    def flink(table: Any) -> tuple[Scores, float]:
        return _flink(table, threads, str(flink_python))

    # Kept open as long as the peer is: opening one takes up to a tenth of a second.
    duckdb_connection = functools.cache(functools.partial(_duckdb_connection, threads))
    everyone = [
        peer("plain", "deque and running sum per user, plain Python", "streaming", 0.1, DRIFT, _plain),
        peer("pandas", "groupby, rolling mean", "batch", 0.05, DRIFT, _pandas),
        peer("polars", "sum / len, rolling, over users", "batch", 1.0, 0.0, _polars),
        peer("duckdb", f"avg OVER RANGE, {_count(threads, 'thread')}", "batch", 1.0, 0.0, _duckdb, duckdb_connection),
        peer("datafusion", f"avg OVER RANGE, {_count(threads, 'partition')}", "batch", 0.2, DRIFT, _datafusion, threads),
        peer("chdb", f"ClickHouse, sum / count OVER RANGE, {_count(threads, 'thread')}", "batch", 1.0, 0.0, _chdb, threads),
        peer("river", "TimeRolling mean per user", "streaming", 0.02, DRIFT, _river),
        Peer(
            name="flink",
            how=f"Flink SQL, sum / count OVER RANGE, {_count(threads, 'slot')}; start of the job not counted",
            mode="streaming",
            package="apache-flink",
            share=0.1,
            tolerance=0.0,
            needs=_flink_needs(flink_python),
            timed=flink,
        ),
    ]
    return {peer.name: peer for peer in everyone}


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _timed(run: Callable[..., Scores], *arguments: Any) -> tuple[Scores, float]:
    began = time.perf_counter()
    scores = run(*arguments)
    return scores, time.perf_counter() - began


def _times_us(table: Any) -> Any:
    """The times as int64: the same memory under another name."""
    return table["timestamp"].cast(pa.timestamp("us", "UTC")).cast(pa.int64())


def _numbered(table: Any) -> Any:
    """With the place of each row, which SQL engines do not keep, and its time as an integer."""
    places = pa.array(np.arange(table.num_rows))
    return pa.table({"place": places, "user_id": table["user_id"], "amount": table["amount"], "time_us": _times_us(table)})


def _in_order(places: Any, scores: Any) -> Scores:
    ordered = np.empty(len(places), np.float64)
    ordered[np.asarray(places)] = np.asarray(scores)
    return ordered


def _plain(table: Any) -> Scores:
    """The code that the engine was asked to replace, with its window edge: older than 60 seconds is out."""
    transactions: dict[int, deque[tuple[int, float]]] = defaultdict(deque)
    amount_sum: dict[int, float] = defaultdict(float)
    count: dict[int, int] = defaultdict(int)
    scores = []
    rows = zip(table["user_id"].to_pylist(), table["amount"].to_pylist(), _times_us(table).to_pylist(), strict=True)
    for user, amount, time_us in rows:
        queue = transactions[user]
        queue.append((time_us, amount))
        amount_sum[user] += amount
        count[user] += 1
        while queue and time_us - queue[0][0] > WINDOW_US:
            _, left = queue.popleft()
            amount_sum[user] -= left
            count[user] -= 1
        scores.append(amount_sum[user] / count[user])
    return np.array(scores)


def _pandas(table: Any) -> Scores:
    frame = table.to_pandas()
    grouped = frame.groupby("user_id", sort=False)[["timestamp", "amount"]]
    means = grouped.rolling("60s", on="timestamp", closed="both").mean()
    return _in_order(means.index.get_level_values(1), means["amount"])


def _polars(table: Any) -> Scores:
    import polars as pl  # noqa: PLC0415 - a peer's library is loaded when the peer is run

    cents = (pl.col("amount") * 100).round().cast(pl.Int64)
    mean = (cents.sum() / (100 * pl.len())).rolling("timestamp", period="60s", closed="both").over("user_id")
    scores: Scores = pl.DataFrame(table).select(score=mean)["score"].to_numpy()
    return scores


_OVER: Final = f"OVER (PARTITION BY user_id ORDER BY time_us RANGE BETWEEN {WINDOW_US} PRECEDING AND CURRENT ROW)"


def _duckdb_connection(threads: int) -> Any:
    import duckdb  # noqa: PLC0415

    return duckdb.connect(config={"threads": threads})


def _duckdb(table: Any, connect: Callable[[], Any]) -> Scores:
    """Its avg of decimals divides two whole numbers: exact."""
    connection = connect()
    connection.register("transactions", _numbered(table))
    found = connection.execute(f"SELECT place, avg(amount::DECIMAL(18, 2)) {_OVER} AS score FROM transactions").fetchnumpy()
    connection.unregister("transactions")
    return _in_order(found["place"], found["score"])


def _datafusion(table: Any, threads: int) -> Scores:
    """A sum of cents and a count would be exact, and takes twice as long as this avg of floats."""
    import datafusion  # noqa: PLC0415

    context = datafusion.SessionContext(datafusion.SessionConfig().with_target_partitions(threads))
    context.from_arrow(_numbered(table), name="transactions")
    found = context.sql(f"SELECT place, avg(amount) {_OVER} AS score FROM transactions").to_arrow_table()
    return _in_order(found["place"], found["score"])


def _chdb(table: Any, threads: int) -> Scores:
    import chdb  # noqa: PLC0415

    transactions = _numbered(table)  # the query finds it by this name
    score = f"sum(toInt64(round(amount * 100))) {_OVER} / (100 * count() {_OVER})"
    query = f"SELECT place, {score} AS score FROM Python(transactions) SETTINGS max_threads = {threads}"
    found = chdb.query(query, "ArrowTable")
    assert transactions is not None
    return _in_order(found["place"], found["score"])


def _river(table: Any) -> Scores:
    """Its window is open at the left end: one microsecond more closes it."""
    from river import stats, utils  # noqa: PLC0415

    period = datetime.timedelta(microseconds=WINDOW_US + 1)
    means: dict[int, Any] = defaultdict(lambda: utils.TimeRolling(stats.Mean, period=period))
    scores = []
    times = table["timestamp"].cast(pa.timestamp("us")).to_pylist()
    for user, amount, when in zip(table["user_id"].to_pylist(), table["amount"].to_pylist(), times, strict=True):
        mean = means[user]
        mean.update(amount, t=when)
        scores.append(mean.get())
    return np.array(scores)


def _flink_needs(python: str | None) -> str:
    if python is None:
        return "an interpreter with apache-flink (pip install apache-flink, and Java) given by --flink-python or RISKRING_FLINK_PYTHON"
    probe = "import importlib.util, shutil, sys; sys.exit(importlib.util.find_spec('pyflink') is None or shutil.which('java') is None)"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        return f"an interpreter that starts: {python}: {error.strerror}"
    return "" if found else f"{python} -m pip install apache-flink, and Java"


#: Run by the interpreter that has Flink: a bounded file in, a folder of files out, on a cluster inside the process. Flink's event times
#: are whole milliseconds, so one of its milliseconds stands for a microsecond, and the window has 60,000 of its seconds. Each row carries
#: the wall clock before and after the window: the time taken is from the first of the former to the last of the latter.
_FLINK_JOB: Final = """
import json, sys
from pyflink.table import EnvironmentSettings, TableEnvironment

order = json.loads(sys.argv[1])
tables = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
tables.get_config().set("parallelism.default", str(order["slots"]))
tables.execute_sql(f'''
    CREATE TABLE transactions (
        place BIGINT, user_id BIGINT, cents BIGINT, time_ms BIGINT,
        event_time AS TO_TIMESTAMP_LTZ(time_ms, 3), WATERMARK FOR event_time AS event_time
    ) WITH ('connector' = 'filesystem', 'path' = '{order["rows"]}', 'format' = 'csv')
''')
tables.execute_sql(f'''
    CREATE TABLE scores (place BIGINT, cents BIGINT, transactions BIGINT, before BIGINT, after BIGINT)
    WITH ('connector' = 'filesystem', 'path' = '{order["scores"]}', 'format' = 'csv')
''')
now = "CAST(1000 * EXTRACT(EPOCH FROM CURRENT_ROW_TIMESTAMP()) + EXTRACT(MILLISECOND FROM CURRENT_ROW_TIMESTAMP()) AS BIGINT)"
tables.execute_sql(f'''
    INSERT INTO scores
    SELECT place, SUM(cents) OVER past, COUNT(*) OVER past, before, {now}
    FROM (SELECT *, {now} AS before FROM transactions)
    WINDOW past AS (
        PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '16:40' HOUR TO MINUTE PRECEDING AND CURRENT ROW
    )
''').wait()
"""


def _flink(table: Any, slots: int, python: str) -> tuple[Scores, float]:
    """Flink SQL over a bounded file; the seconds are those of the rows inside the job, without its start."""
    numbered = _numbered(table)
    cents = pc.round(pc.multiply(numbered["amount"], 100)).cast(pa.int64())
    times = pc.subtract(numbered["time_us"], pc.subtract(pc.min(numbered["time_us"]), 1))  # from 1 on: it takes time 0 for done already
    rows = pa.table([numbered["place"], numbered["user_id"], cents, times], names=["place", "user_id", "cents", "time_ms"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pyarrow.csv.write_csv(rows, folder / "rows.csv", pyarrow.csv.WriteOptions(include_header=False))
        order = json.dumps({"slots": slots, "rows": str(folder / "rows.csv"), "scores": str(folder / "scores")})
        job = subprocess.run([python, "-c", _FLINK_JOB, order], capture_output=True, text=True, check=False)
        if job.returncode:
            said = [line.strip() for line in job.stderr.splitlines() if line.strip() and not line.startswith("\t")]
            raise EngineError(f"flink: {said[-1] if said else 'the job ended with ' + str(job.returncode)}")
        columns = pyarrow.csv.ReadOptions(column_names=["place", "cents", "count", "before", "after"])
        parts = [path for path in (folder / "scores").rglob("*") if path.stat().st_size and path.is_file()]
        found = pa.concat_tables([pyarrow.csv.read_csv(path, columns) for path in parts])
    scores = np.asarray(found["cents"]) / (100 * np.asarray(found["count"]))
    seconds = (pc.max(found["after"]).as_py() - pc.min(found["before"]).as_py()) / 1000
    return _in_order(found["place"], scores), seconds
