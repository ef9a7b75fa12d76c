"""Nodes as processes, rows for them, and what their states and Redis must be: an engine over each partition's whole log."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from confluent_kafka import Consumer, Producer, TopicPartition

from engine import RiskEngine
from engine.columns import ids_of
from engine.messages import encode_arrow
from engine.partitions import partition_of
from engine.userids import ids_of_one
from tests.adapters.brokers import Cluster
from tests.adapters.processes import Process, until

Row = tuple[str, float, int]

#: Long enough that no transaction leaves the window while a test runs.
OPTIONS: dict[str, Any] = {"window": "30m", "users": 2_000_000, "time_unit": "ms"}


class NodeProcess(Process):
    """`riskring node`; with `file_kb` its files may not become larger than that."""

    def __init__(
        self, folder: Path, cluster: Cluster, topic: str, *flags: str, name: str = "node", group: str = "group", file_kb: int = 0
    ) -> None:
        program = "from engine.cli import process; process()"
        words = ["node", "--brokers", cluster.bootstrap, "--topic", topic, "--group", group, "--state", str(folder / "state")]
        engine = ["--window", OPTIONS["window"], "--users", str(OPTIONS["users"])]
        fast = ["--kafka", "session.timeout.ms=3000", "--kafka", "heartbeat.interval.ms=300"]
        fast = [] if "consumer" in flags else fast
        command = [sys.executable, "-c", program, *words, *engine, *fast, "--owner", name, "--log", "json", *flags]
        if file_kb:
            command = ["bash", "-c", f'ulimit -S -f {file_kb}; exec "$@"', "node", *command]
        super().__init__(command, folder / f"{name}.log")
        self.launch()

    def events(self, event: str = "") -> list[dict[str, Any]]:
        """Lines of the log, those of an event."""
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                told = json.loads(line)
                if event in ("", told["event"]):
                    found.append(told)
        return found

    def wait_for(self, event: str, count: int = 1, seconds: float = 60.0) -> list[dict[str, Any]]:
        """Until the log has an event so often."""

        def there() -> list[dict[str, Any]]:
            found = self.events(event)
            assert self.alive or len(found) >= count, self.log.read_text()[-3000:]
            return found if len(found) >= count else []

        return until(there, seconds, f"{event!r}")


def live_rows(count: int, users: int = 200, seed: int = 1) -> list[Row]:
    """Rows of the last minutes, nearly in order."""
    choose, now = random.Random(seed), time.time_ns() // 1_000_000
    return [
        (f"user {choose.randrange(users)}", choose.randrange(-50, 1000) / 4, now - 60_000 + place // 10 - choose.randrange(500))
        for place in range(count)
    ]


class Flow(threading.Thread):
    """Rows that are sent while something else happens: most in Arrow messages of a thousand, some as JSON, each user's in order.

    Attributes:
        sent: How many are on their way by now.
        hashes: Of each partition's messages, one after the other.
        ends: Of the log of each partition, when all is there.
    """

    def __init__(self, cluster: Cluster, topic: str, rows: int, partitions: int, users: int = 200, per_second: int = 0) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._cluster, self._topic, self._rows, self._partitions = cluster, topic, rows, partitions
        self._users, self._per_second = users, per_second
        self._failure: BaseException | None = None
        self._stopping = False
        self.hashes = [hashlib.sha256() for _ in range(partitions)]
        self.ends = [0] * partitions
        self.start()

    def run(self) -> None:
        try:
            self._send()
        except BaseException as failure:
            self._failure = failure

    def _send(self) -> None:
        producer, random = self._cluster.producer(linger_ms=5), np.random.default_rng(1)
        now_ms, began = time.time_ns() // 1_000_000, time.monotonic()
        names = np.array([f"user {number}" for number in range(self._users)])
        chosen = partition_of(ids_of(pa.array(names), "user_id"), self._partitions)
        size = min(50_000, max(self._rows // 20, 200), self._per_second // 5 or 50_000)
        while self.sent < self._rows and not self._stopping:
            places = np.arange(self.sent, min(self.sent + size, self._rows))
            users = random.integers(0, self._users, len(places))
            times = now_ms - 60_000 + places * 50_000 // self._rows - random.integers(0, 500, len(places))
            amounts = random.integers(-50, 1000, len(places)) / 4
            few = len(places) // 50
            for user, amount, time_ms in zip(users[:few], amounts[:few], times[:few], strict=True):
                text = json.dumps({"user_id": str(names[user]), "amount": amount, "timestamp": int(time_ms)})
                self._produce(producer, int(chosen[user]), text.encode())
            for number in range(self._partitions):
                mine = few + np.flatnonzero(chosen[users[few:]] == number)
                for first in range(0, len(mine), 1000):
                    some = mine[first : first + 1000]
                    columns = [pa.array(names[users[some]]), pa.array(amounts[some]), pa.array(times[some], pa.timestamp("ms"))]
                    self._produce(producer, number, encode_arrow(pa.record_batch(columns, names=["user_id", "amount", "timestamp"])))
            self.sent += len(places)
            if self._per_second:
                time.sleep(max(began + self.sent / self._per_second - time.monotonic(), 0))
        assert producer.flush(120) == 0, "messages are still on their way"

    def _produce(self, producer: Any, number: int, value: bytes) -> None:
        while True:
            try:
                producer.produce(self._topic, value, partition=number)
                break
            except BufferError:  # the brokers are behind
                producer.poll(0.05)
        producer.poll(0)
        self.hashes[number].update(value)
        self.ends[number] += 1

    def check_log(self) -> None:
        """The log has every message once, in order."""
        for number, expected in enumerate(self.hashes):
            found = hashlib.sha256()
            for message in log_of(self._cluster, self._topic, number):
                found.update(message.value())
            assert found.hexdigest() == expected.hexdigest()

    def end(self, at_once: bool = False) -> int:
        """When all is delivered, how many rows that are; `at_once`: those that were sent by now."""
        self._stopping = at_once
        self.join()
        if self._failure is not None:
            raise self._failure
        return self.sent


def metrics_at(port: int) -> dict[str, float]:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def partition(user: str, partitions: int) -> int:
    return int(partition_of(ids_of_one(user, "user_id"), partitions)[0])


def batch_of(rows: Iterable[Row]) -> pa.RecordBatch:
    users, amounts, times = zip(*rows, strict=True)
    return pa.record_batch({"user_id": pa.array(users), "amount": pa.array(amounts), "timestamp": pa.array(times, pa.timestamp("ms"))})


def send(cluster: Cluster, topic: str, rows: list[Row], partitions: int, form: str = "json") -> None:
    """Rows as messages, all delivered when this returns."""
    producer = Producer(
        {
            "bootstrap.servers": cluster.bootstrap,
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 5,
            "log_level": 0,
        }
    )
    if form == "json":
        for user, amount, time_ms in rows:
            value = json.dumps({"user_id": user, "amount": amount, "timestamp": time_ms})
            producer.produce(topic, value, key=user)
            producer.poll(0)
    else:
        chosen = [partition(row[0], partitions) for row in rows]
        for number in range(partitions):
            mine = [row for row, where in zip(rows, chosen, strict=True) if where == number]
            for first in range(0, len(mine), 500):
                producer.produce(topic, encode_arrow(batch_of(mine[first : first + 500])), partition=number)
    assert producer.flush(60) == 0


def log_of(cluster: Cluster, topic: str, number: int) -> list[Any]:
    """All messages of a partition."""
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "judge", "enable.auto.commit": False, "log_level": 0})
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=20)
        consumer.assign([TopicPartition(topic, number, low)])
        found: list[Any] = []
        end = time.monotonic() + 60
        while low < high and (not found or found[-1].offset() < high - 1):
            assert time.monotonic() < end
            found += [message for message in consumer.consume(10_000, 0.2) if message.error() is None]
        return found
    finally:
        consumer.close()


def judged(messages: list[Any], position: int, **options: Any) -> RiskEngine:
    """An engine over the messages before a position, one after the other, read with nothing of the node's."""
    engine = RiskEngine(**(OPTIONS | {"max_ahead": None} | options))
    for message in messages:
        if message.offset() >= position:
            break
        value = message.value()
        if value[:1] == b"{":
            row = json.loads(value)
            engine.add(row["user_id"], row["amount"], row["timestamp"])
        else:
            engine.ingest(pa.ipc.open_stream(value).read_all())
    return engine


def check_states(folder: Path, cluster: Cluster, topic: str, partitions: int) -> int:
    """The last snapshots are of the ends of the logs, and each is what an engine makes of its log. Returns their transactions."""
    transactions = 0
    for number in range(partitions):
        messages = log_of(cluster, topic, number)
        with RiskEngine.load(folder / "state" / str(number)) as engine, judged(messages, 2**62) as judge:
            assert engine.restored is not None
            end = messages[-1].offset() + 1 if messages else 0
            assert engine.restored.position["offset"] == end
            assert engine.digest() == judge.digest()
            transactions += judge.stats().transactions
    return transactions


def heartbeat(client: Any, topic: str, number: int) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in client.hgetall(f"risk:~{topic}:{number}").items()}


def check_redis(client: Any, cluster: Cluster, topic: str, partitions: int) -> int:
    """Every score in Redis is that of the tick its partition tells, and there are no others. Returns how many there are."""
    expected: dict[bytes, float] = {}
    for number in range(partitions):
        beat = heartbeat(client, topic, number)
        with judged(log_of(cluster, topic, number), int(beat["position"])) as judge:
            if judge.clock_ns is not None:
                table = judge.features(at=np.datetime64(int(beat["at"]), "ns"))
                expected |= {
                    b"risk:" + user.encode(): score
                    for user, score, count in zip(*(table[name].to_pylist() for name in ("user_id", "score", "count")), strict=True)
                    if count
                }
    keys = [key for key in client.scan_iter(count=10_000) if not key.startswith(b"risk:~")]
    found = dict(zip(keys, map(float, client.mget(keys)), strict=True)) if keys else {}
    assert found == expected
    return len(found)


def published(client: Any, topic: str, partitions: int, ends: list[int]) -> bool:
    """Whether the last tick of each partition covers its log."""
    beats = [heartbeat(client, topic, number) for number in range(partitions)]
    return all(beat and int(beat["position"]) >= end for beat, end in zip(beats, ends, strict=True))


def ends_of(cluster: Cluster, topic: str, partitions: int) -> list[int]:
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "judge", "log_level": 0})
    try:
        return [consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=20)[1] for number in range(partitions)]
    finally:
        consumer.close()
