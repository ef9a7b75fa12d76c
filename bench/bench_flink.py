"""Inside Flink: how fast is the engine beside Flink's own SQL, how large is what each keeps, and how long does a checkpoint take?

    RISKRING_FLINK_PYTHON=flink/bin/python python -m pytest -m flink bench/bench_flink.py -s

One stand-alone Flink with two slots, one broker, all on this machine. Both jobs get the same rows, of integer ids, from topics of four
partitions: SQL as JSON, which is what it reads, the engine as JSON and as Arrow messages. The rate is that of the middle half of the rows,
by what Flink counts into each operator. Scores of all rows go out to Kafka. Where both have scored a row they agree.

Prediction: SQL takes 80 us for a row on two slots: two lookups of state, a timer and JSON both ways. A message of 8,192 rows costs the
engine 160 kB to Python and as much back into state, some 1 ms, 2 ms for the engine and the score column, and 250 kB out: 1 to 2 M rows/s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from workload import SMOKE

from engine.adapters.kafka_producer import KafkaProducer
from engine.columns import ids_of
from engine.messages import encode_arrow
from engine.partitions import partition_of
from tests.adapters.brokers import Cluster
from tests.adapters.flink import FlinkCluster, connector
from tests.adapters.needs import need_flink, need_kafka
from tests.adapters.nodes import log_of
from tests.adapters.processes import until
from tests.adapters.test_flink_sql import SCRIPT, submit

pytestmark = [pytest.mark.flink, pytest.mark.servers]

PARTITIONS = 4
USERS = 100_000
#: Rows for each; one row of the time of all is a seventh of a millisecond, so that a million are within two windows.
ROWS = {"sql": 20_000, "json": 20_000, "arrow": 200_000} if SMOKE else {"sql": 400_000, "json": 1_000_000, "arrow": 24_000_000}
ROWS_A_SECOND = 8_333
ROWS_A_MESSAGE = 500 if SMOKE else 8_192
START_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_flink()
    need_kafka()
    with closing(Cluster(tmp_path_factory.mktemp("kafka"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def flink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    need_flink()
    settings = {"taskmanager.memory.process.size": "4g", "taskmanager.memory.managed.size": "512m"}
    with closing(FlinkCluster(tmp_path_factory.mktemp("bench") / "flink", slots=2, config=settings, quick=SMOKE)) as cluster:
        yield cluster


def fill(cluster: Cluster, topic: str, form: str, rows: int) -> None:
    """The same rows whatever their form, each partition's in order."""
    producer, random = KafkaProducer(cluster.bootstrap, {"queue.buffering.max.messages": "2000000"}), np.random.default_rng(1)
    for first in range(0, rows, 1 << 17):
        count = min(rows - first, 1 << 17)
        users, cents = random.integers(0, USERS, 1 << 17)[:count], random.integers(0, 10**6, 1 << 17)[:count]
        times = START_MS + (first + np.arange(count)) * 1000 // ROWS_A_SECOND
        chosen = partition_of(ids_of(pa.array(users), "user_id"), PARTITIONS)
        for partition in range(PARTITIONS):
            mine = np.flatnonzero(chosen == partition)
            if form == "arrow":
                for begin in range(0, len(mine), ROWS_A_MESSAGE):
                    some = mine[begin : begin + ROWS_A_MESSAGE]
                    columns = {"user_id": users[some], "amount": cents[some] / 100, "timestamp": times[some]}
                    producer.send(topic, encode_arrow(pa.record_batch(columns)), partition=partition)
            else:
                for user, amount, time_ms in zip(users[mine].tolist(), cents[mine].tolist(), times[mine].tolist(), strict=True):
                    text = f'{{"user_id": {user}, "amount": {amount // 100}.{amount % 100:02}, "timestamp": {time_ms}}}'
                    producer.send(topic, text.encode(), partition=partition)
    producer.flush()


def read(flink: FlinkCluster, job: str, vertex: str) -> int:
    """Records that an operator has taken."""
    for each in flink.get(f"/jobs/{job}")["vertices"]:
        if vertex in each["name"]:
            return int(each["metrics"]["read-records"])
    raise LookupError(vertex)


def measured(flink: FlinkCluster, vertex: str, records: int) -> tuple[float, str]:
    """Records a second in the middle half of them, and the job."""
    job = flink.wait_running()
    seen: list[tuple[float, int]] = []

    def all_read() -> bool:
        seen.append((time.monotonic(), read(flink, job, vertex)))
        time.sleep(0.1)
        return seen[-1][1] >= records

    until(all_read, 600, "all records")
    middle = [(when, count) for when, count in seen if records // 4 <= count <= records * 3 // 4] or seen[-2:]
    (first, few), (last, many) = middle[0], seen[seen.index(middle[-1]) + 1] if middle[-1] != seen[-1] else middle[-1]
    return (many - few) / (last - first), job


def checkpointed(flink: FlinkCluster, job: str) -> tuple[float, int]:
    """Seconds and bytes of a checkpoint that began when all was read."""
    flink.wait_checkpoint(job, 2, 300)
    latest = flink.get(f"/jobs/{job}/checkpoints")["latest"]["completed"]
    return latest["end_to_end_duration"] / 1000, latest["checkpointed_size"]


def hosted(flink: FlinkCluster, kafka: Cluster, topic: str, scores: str) -> None:
    words = [
        "--cluster",
        flink.address,
        "--brokers",
        kafka.bootstrap,
        "--topic",
        topic,
        "--scores-topic",
        scores,
        "--jar",
        str(connector()),
    ]
    words += ["--parallelism", "2", "--checkpoints", str(flink.checkpoints), "--checkpoint-every", "2s", "--max-ahead", "none"]
    done = flink.riskring("flink", *words, "--from-start")
    assert done.returncode == 0, done.stderr


def by_sql(flink: FlinkCluster, kafka: Cluster, topic: str, scores: str) -> None:
    text = SCRIPT.read_text().replace("localhost:9092", kafka.bootstrap)
    text = text.replace("'topic' = 'transactions'", f"'topic' = '{topic}'").replace("'topic' = 'scores'", f"'topic' = '{scores}'")
    options = {"parallelism.default": "2", "pipeline.object-reuse": "true", "execution.checkpointing.dir": flink.checkpoints.as_uri()}
    settings = "".join(f"\nSET '{name}' = '{value}';" for name, value in options.items())
    text = text.replace("'10 s';", f"'2 s';{settings}", 1)
    submit(flink, text)


def scores_of(messages: list[Any]) -> dict[tuple[int, int], tuple[int, float]]:
    """User and score of rows, by partition and number of the row in it."""
    found = {}
    for message in messages:
        if message.value()[:1] == b"{":
            told = json.loads(message.value())
            found[told["source_partition"], told["source_offset"]] = int(told["user_id"]), told["score"]
        else:
            table = pa.ipc.open_stream(message.value()).read_all()
            names = ("source_partition", "source_offset", "user_id", "score")
            for partition, offset, user, score in zip(*(table[name].to_pylist() for name in names), strict=True):
                found[partition, offset] = user, score
    return found


def test_hosted_beside_sql(flink: FlinkCluster, kafka: Cluster, tmp_path: Path) -> None:
    jobs: list[tuple[str, str, str, Callable[..., None], int]] = [
        ("sql, JSON", "json", "OverAggregate", by_sql, ROWS["sql"]),
        ("engine, JSON", "json", "engine", hosted, ROWS["json"]),
        ("engine, Arrow", "arrow", "engine", hosted, ROWS["arrow"]),
    ]
    rates, found = {}, {}
    print()
    for name, form, vertex, start, rows in jobs:
        topic, scores = kafka.new_topic(PARTITIONS), kafka.new_topic(1)
        fill(kafka, topic, form, rows)
        records = sum(len(log_of(kafka, topic, number)) for number in range(PARTITIONS))
        start(flink, kafka, topic, scores)
        rate, job = measured(flink, vertex, records)
        rates[name] = rate * rows / records
        seconds, size = checkpointed(flink, job)
        retained = min(rows, int((90 if start is by_sql else 120) * ROWS_A_SECOND))
        flink.cancel(job)
        if form == "json":
            found[name] = scores_of(log_of(kafka, scores, 0)[: ROWS["sql"]])
        times = rates[name] / rates["sql, JSON"]
        kept = f"{size / 1e6:,.1f} MB, {size / retained:.0f} bytes for each of {retained:,} retained transactions"
        print(f"{name:14} {rates[name]:12,.0f} rows/s {times:7.1f}x   checkpoint {seconds:.2f} s, {kept}")
    both = found["sql, JSON"].keys() & found["engine, JSON"].keys()
    same = sum(found["sql, JSON"][place] == found["engine, JSON"][place] for place in both)
    print(f"of {len(both):,} rows that both have scored, {same:,} have the same score; the others have peers")
    assert same > 0.99 * len(both) > 0
