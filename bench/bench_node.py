"""How fast is a node: rows out of Kafka, scores into Redis, and how long from one to the other? All of it shares this machine.

    python -m pytest bench/bench_node.py -s

Needs what the tests with real servers need. Catching up: a node starts with the log full, and logs when each partition begins and when it
is ready. Publishing: a sink against `redis-benchmark` with one of the very scripts that it sends, in the same minute. Freshness: rows come
at a rate, and some users of their own are looked for in Redis until their score is there.

Prediction, two cores: consuming an Arrow message of 8,192 rows takes 160 us, decoding it 130 us, applying it 600 us, of which two run at a
time beside the broker: 8 to 12 M rows/s. A JSON message takes 500 ns to consume, 600 ns to decode in another thread: 0.8 M rows/s beside
the broker. Redis takes 2.5 us for a key of a script.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from workload import SMOKE

from engine import RiskEngine
from engine.adapters.kafka_producer import KafkaProducer
from engine.adapters.redis_sink import RedisSink
from engine.columns import ids_of
from engine.messages import encode_arrow, encode_json
from engine.partitions import partition_of
from engine.ticks import Tick
from tests.adapters.brokers import Cluster
from tests.adapters.needs import need_kafka, need_redis
from tests.adapters.nodes import NodeProcess, check_states, ends_of
from tests.adapters.redis_servers import Redis

PARTITIONS = 2
NAMES = ("user_id", "amount", "timestamp")
USERS = 500 if SMOKE else 1_000_000
ROWS = {"arrow": 20_000 if SMOKE else 20_000_000, "json": 5_000 if SMOKE else 1_500_000}
RATE = 2_000 if SMOKE else 50_000
SECONDS = 1 if SMOKE else 20
MARKERS = 5 if SMOKE else 200


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_kafka()
    with closing(Cluster(tmp_path_factory.mktemp("kafka"))) as cluster:
        yield cluster


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Redis]:
    need_redis()
    with closing(Redis(tmp_path)) as server:
        yield server


def fill(cluster: Cluster, topic: str, form: str, rows: int) -> None:
    """Rows of the last seconds, each partition's in messages of its own."""
    producer, random = KafkaProducer(cluster.bootstrap, {"queue.buffering.max.messages": "2000000"}), np.random.default_rng(1)
    now_ms = time.time_ns() // 1_000_000
    for first in range(0, rows, 1 << 18):
        count = min(rows - first, 1 << 18)
        users = random.integers(0, USERS, count)
        names = ["user_id", "amount", "timestamp"]
        table = pa.table([users, random.integers(0, 10_000, count) / 100, np.full(count, now_ms + first * 1000 // rows)], names=names)
        chosen = partition_of(ids_of(table["user_id"].combine_chunks(), "user_id"), PARTITIONS)
        for partition in range(PARTITIONS):
            mine = table.filter(pa.array(chosen == partition)).combine_chunks()
            if form == "json":
                for value in encode_json(mine):
                    producer.send(topic, value, partition=partition)
            else:
                for start in range(0, len(mine), 8192):
                    producer.send(topic, encode_arrow(mine.slice(start, 8192)), partition=partition)
    producer.flush()


def instant(event: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(event["timestamp"]).timestamp()


@pytest.mark.benchmark(group="node")
@pytest.mark.parametrize("form", ["arrow", "json"])
def test_catching_up(benchmark: Any, kafka: Cluster, tmp_path: Path, form: str) -> None:
    """Rows per second of a node that finds the log full, no Redis; its states are those of the log."""
    small = f"proof-{form}"
    kafka.create_topic(small, PARTITIONS)
    fill(kafka, small, form, 5_000)
    (tmp_path / "proof").mkdir()
    proof = NodeProcess(tmp_path / "proof", kafka, small, "--users", "10000")
    proof.wait_for("ready", PARTITIONS)
    assert proof.stop() == 0
    assert check_states(tmp_path / "proof", kafka, small, PARTITIONS) == 5_000
    topic = f"topic-{form}"
    kafka.create_topic(topic, PARTITIONS)
    fill(kafka, topic, form, ROWS[form])
    rates: list[float] = []

    def catch_up(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        node = NodeProcess(folder, kafka, topic, "--users", str(2 * USERS), "--snapshot-every", "1h", group=f"group{number}")
        ready = node.wait_for("ready", PARTITIONS, 300)
        began = min(instant(each) for each in node.events("rebuild from the log"))
        rates.append(ROWS[form] / (max(instant(each) for each in ready) - began))
        node.kill()

    numbers = iter(range(100))
    benchmark.pedantic(lambda: catch_up(next(numbers)), rounds=1 if SMOKE else 3)
    benchmark.extra_info |= {
        "rows": ROWS[form],
        "users": USERS,
        "figures": {"rows/s, median": float(np.median(rates)), "rows/s, best": max(rates)},
    }


@pytest.mark.benchmark(group="publish")
def test_publishing(benchmark: Any, redis_server: Redis) -> None:
    """All users of a partition, against redis-benchmark with the scripts that this sends: as many users, in no order either."""
    now = time.time_ns()
    engine = RiskEngine(users=2 * USERS, max_ahead=None)
    names = [f"{number:012d}" for number in np.random.default_rng(0).permutation(USERS)]  # as redis-benchmark makes them
    users = pa.array(names)
    engine.ingest({"user_id": users, "amount": np.arange(USERS) % 9973 / 100, "timestamp": np.full(USERS, now).astype("datetime64[ns]")})
    sink = RedisSink(redis_server.url)
    at = iter(range(1000))

    def tick() -> Tick:
        at_ns = now + next(at)
        table = engine.updates(at=np.datetime64(at_ns, "ns"), anew=True)
        return Tick("topic", "id", 1, 0, "me", 1, now, at_ns, at_ns, None, "ready", table, True)

    sink.publish(tick())
    client = redis_server.client()
    some = names[:100]
    assert [float(value) for value in client.mget([f"risk:{user}" for user in some])] == engine.scores(some).tolist()
    first = [part.decode() if isinstance(part, bytes) else str(part) for part in next(sink._chunks(tick(), None))]
    keys = int(first[0]) - 1
    first[2 : 2 + keys] = ["risk:__rand_int__"] * keys
    alone: list[float] = []
    rates: list[float] = []

    def both() -> None:
        calls = max(USERS // keys, 1)
        client.hdel(first[1], "fence")
        command = [
            "redis-benchmark",
            "-p",
            str(redis_server.port),
            "-c",
            "2",
            "-P",
            "8",
            "-r",
            str(USERS),
            "-n",
            str(calls),
            "--csv",
            "EVALSHA",
            sink._script,
        ]
        said = subprocess.run([*command, *first], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        alone.append(float(said.split('","')[1]) * keys)
        client.hdel(first[1], "fence")
        wanted = tick()
        began = time.perf_counter()
        sink.publish(wanted)
        rates.append(USERS / (time.perf_counter() - began))

    benchmark.pedantic(both, rounds=2 if SMOKE else 7)
    figures = {"users/s, median": float(np.median(rates)), "redis-benchmark users/s, median": float(np.median(alone))}
    figures["share of redis-benchmark, median"] = float(np.median(np.array(rates) / np.array(alone)))
    benchmark.extra_info |= {"rows": USERS, "users": USERS, "figures": figures}


@pytest.mark.benchmark(group="freshness")
def test_freshness(benchmark: Any, kafka: Cluster, redis_server: Redis, tmp_path: Path) -> None:
    """From sending a row to its score being in Redis, while JSON rows come at a rate."""
    kafka.create_topic("fresh", PARTITIONS)
    node = NodeProcess(tmp_path, kafka, "fresh", "--redis", redis_server.url, "--users", str(2 * USERS))
    node.wait_for("ready", PARTITIONS)
    stop, client, waits = threading.Event(), redis_server.client(), []

    def load() -> None:
        producer, random = KafkaProducer(kafka.bootstrap, {"linger.ms": "5"}), np.random.default_rng(2)
        due, part = time.monotonic(), RATE // 100
        while not stop.is_set():
            users, amounts = random.integers(0, USERS, part).tolist(), random.integers(0, 99, part).tolist()
            now_ms = time.time_ns() // 1_000_000
            for user, amount in zip(users, amounts, strict=True):
                producer.send("fresh", b'{"user_id":"%d","amount":%d,"timestamp":%d}' % (user, amount, now_ms), key=b"%d" % user)
            due += 0.01
            time.sleep(max(due - time.monotonic(), 0))
        producer.flush()

    def measure() -> None:
        loading = threading.Thread(target=load)
        loading.start()
        producer, began = KafkaProducer(kafka.bootstrap, {"linger.ms": "0"}), time.monotonic()
        for number in range(MARKERS):
            time.sleep(max(began + number * SECONDS / MARKERS - time.monotonic(), 0))
            sent = time.monotonic()
            row = {"user_id": f"marker {number}", "amount": 1, "timestamp": time.time_ns() // 1_000_000}
            producer.send("fresh", json.dumps(row).encode(), key=row["user_id"].encode())
            producer.flush()
            while client.get(f"risk:marker {number}") is None:
                time.sleep(0.002)
            waits.append(time.monotonic() - sent)
        stop.set()
        loading.join()

    benchmark.pedantic(measure, rounds=1)
    rows = sum(ends_of(kafka, "fresh", PARTITIONS))
    node.kill()
    p50, p99 = np.quantile(waits, [0.5, 0.99]) * 1e3
    figures = {"from row to Redis p50 ms": float(p50), "from row to Redis p99 ms": float(p99), "rows/s": rows / max(sum(waits), SECONDS)}
    benchmark.extra_info |= {"rows": rows, "users": USERS, "figures": figures}


@pytest.mark.benchmark(group="decay")
def test_decay(benchmark: Any, kafka: Cluster, redis_server: Redis, tmp_path: Path) -> None:
    """From the instant at which a score changes because time passes, or is 0.0 again, to Redis saying so; others come and go meanwhile."""
    kafka.create_topic("decay", PARTITIONS)
    node = NodeProcess(tmp_path, kafka, "decay", "--redis", redis_server.url, "--users", str(2 * USERS), "--window", "4s")
    node.wait_for("ready", PARTITIONS)
    client, window_ms = redis_server.client(), 4_000
    late: dict[str, list[float]] = {"falls": [], "is gone": []}

    def changed_ms(user: int, before: bytes | None) -> tuple[int, bytes | None]:
        end = time.monotonic() + 60
        while (found := client.get(f"risk:{user}")) == before:
            assert time.monotonic() < end
            time.sleep(0.001)
        return time.time_ns() // 1_000_000, found

    sent, stop = [0], threading.Event()

    def load() -> None:
        producer, random = KafkaProducer(kafka.bootstrap, {"linger.ms": "0"}), np.random.default_rng(2)
        due, part = time.monotonic(), RATE // 100
        while not stop.is_set():
            users, now = random.integers(0, USERS, part), np.datetime64(time.time_ns() // 1_000_000, "ms")
            chosen = partition_of(ids_of(pa.array(users), "user_id"), PARTITIONS)
            for partition in range(PARTITIONS):
                mine = users[chosen == partition]
                rows = pa.record_batch([mine, np.full(len(mine), 1.5), np.full(len(mine), now)], names=list(NAMES))
                producer.send("decay", encode_arrow(rows), partition=partition)
            sent[0] += part
            due += 0.01
            time.sleep(max(due - time.monotonic(), 0))
        producer.flush()

    def measure() -> None:
        loading, producer = threading.Thread(target=load), KafkaProducer(kafka.bootstrap, {"linger.ms": "0"})
        loading.start()
        time.sleep(0 if SMOKE else 6)  # as many leave the window as come by then
        for user in range(USERS, USERS + (5 if SMOKE else 40)):
            time.sleep(0.1)
            now_ms = time.time_ns() // 1_000_000
            for amount, time_ms in ((1, now_ms - 2_500), (3, now_ms - 2_000)):
                producer.send("decay", json.dumps({"user_id": user, "amount": amount, "timestamp": time_ms}).encode(), key=b"%d" % user)
            producer.flush()
            _, found = changed_ms(user, None)
            if found == b"2":
                fell_ms, found = changed_ms(user, found)
                late["falls"].append(fell_ms - (now_ms - 2_500 + window_ms))
            assert found == b"3"
            gone_ms, found = changed_ms(user, found)
            assert found is None
            late["is gone"].append(gone_ms - (now_ms - 2_000 + window_ms))
        stop.set()
        loading.join()

    benchmark.pedantic(measure, rounds=1)
    assert node.stop() == 0
    figures = {
        f"{what} after ms, {name}": float(np.quantile(found, q))
        for what, found in late.items()
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }
    benchmark.extra_info |= {"rows": sent[0], "users": USERS, "figures": figures}


@pytest.mark.benchmark(group="hand-over")
def test_hand_over(benchmark: Any, kafka: Cluster, redis_server: Redis, tmp_path: Path) -> None:
    """A partition of a million users goes from a node that ends to one that is there already."""
    kafka.create_topic("hand-over", 1)
    flags = ("--redis", redis_server.url, "--users", str(2 * USERS))
    nodes = [NodeProcess(tmp_path, kafka, "hand-over", *flags, name="node0")]
    nodes[0].wait_for("ready")
    producer, now = KafkaProducer(kafka.bootstrap, {}), np.datetime64(time.time_ns() // 1_000_000, "ms")
    for first in range(0, 2 * USERS, 8192):
        users = np.arange(first, min(first + 8192, 2 * USERS)) % USERS
        producer.send("hand-over", encode_arrow(pa.record_batch([users, np.ones(len(users)), np.full(len(users), now)], names=list(NAMES))))
    producer.flush()
    took: list[float] = []

    def hand_over(number: int) -> None:
        nodes.append(NodeProcess(tmp_path, kafka, "hand-over", *flags, name=f"node{number}"))
        nodes[-1].wait_for("node")
        time.sleep(0 if SMOKE else 5)  # it is a member of the group by then
        began = time.time()
        assert nodes[-2].stop() == 0
        took.append(instant(nodes[-1].wait_for("ready")[0]) - began)

    numbers = iter(range(1, 100))
    benchmark.pedantic(lambda: hand_over(next(numbers)), rounds=1 if SMOKE else 5)
    assert nodes[-1].stop() == 0
    assert check_states(tmp_path, kafka, "hand-over", 1) == 2 * USERS
    figures = {"seconds, median": float(np.median(took)), "seconds, worst": max(took)}
    benchmark.extra_info |= {"rows": 2 * USERS, "users": USERS, "figures": figures}
