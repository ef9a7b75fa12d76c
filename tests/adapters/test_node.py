"""The node on a real Kafka and a real Redis: nothing lost, nothing twice, no older score after a newer one, whatever dies."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Producer, TopicPartition

from engine import RiskEngine
from engine.messages import encode_arrow
from tests.adapters.nodes import (
    NodeProcess,
    Row,
    batch_of,
    check_redis,
    check_states,
    ends_of,
    heartbeat,
    judged,
    live_rows,
    log_of,
    partition,
    published,
    send,
)
from tests.adapters.servers import Cluster, Redis, free_ports, until

pytestmark = pytest.mark.servers

#: How often a node is killed.
KILLS = int(os.environ.get("RISKRING_NODE_KILLS", "3"))


@pytest.fixture
def node(tmp_path: Path, kafka: Cluster) -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes: `node(topic, *flags, name=...)`. They share a folder of states."""
    started: list[NodeProcess] = []

    def start(topic: str, *flags: str, **named: str) -> NodeProcess:
        started.append(NodeProcess(tmp_path, kafka, topic, *flags, **named))
        return started[-1]

    yield start
    for each in started:
        if each.alive:
            each.resume()
        each.kill()


def metrics_at(port: int) -> dict[str, float]:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def riskring(*words: str) -> str:
    command = [sys.executable, "-c", "from engine.cli import process; process()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_from_topic_to_redis_and_again(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path, protocol: str
) -> None:
    """Both formats in one topic; a stop saves; a second start goes on from there; each partition's state is that of its whole log."""
    name, client = topic(3), redis_server.client()
    (port,) = free_ports(1)
    shared = ("--redis", redis_server.url, "--group-protocol", protocol, "--tick", "50ms", "--metrics", f"127.0.0.1:{port}")
    first = node(name, *shared)
    first.wait_for("ready", 3)
    rows = live_rows(6000)
    send(kafka, name, rows[:2000], 3)
    send(kafka, name, rows[2000:4000], 3, "arrow")
    until(lambda: published(client, name, 3, ends_of(kafka, name, 3)), what="the last score")
    expected = {'riskring_transactions_total{result="accepted"}': 4000, 'riskring_transactions_total{result="rejected"}': 0}
    expected |= {"riskring_users": 200, "riskring_transactions_retained": 4000, "riskring_publish_pending": 0}
    for number in range(3):
        expected |= {f'riskring_kafka_lag{{partition="{number}"}}': 0, f'riskring_partition_ready{{partition="{number}"}}': 1}
    until(lambda: expected.items() <= metrics_at(port).items(), what="the metrics")
    metrics = metrics_at(port)
    assert metrics["riskring_state_bytes"] > 0
    assert metrics["riskring_ingest_seconds_count"] >= 3
    assert abs(metrics['riskring_clock_seconds{partition="0"}'] - time.time()) < 600
    table = riskring("node", "status", "--redis", redis_server.url)
    assert [line.split()[:2] for line in table.splitlines()] == [["topic", "partition"], [name, "0"], [name, "1"], [name, "2"]]
    told = json.loads(riskring("node", "status", "--redis", redis_server.url, "--json"))
    assert [(row["partition"], row["state"], row["owner"]) for row in told] == [(number, "ready", "node") for number in range(3)]
    began = time.monotonic()
    assert first.stop() == 0
    assert time.monotonic() - began < 10
    assert [each["saved"] for each in first.events("given up")] == [True] * 3
    assert check_states(tmp_path, kafka, name, 3) == 4000
    assert check_redis(client, kafka, name, 3) == 200
    second = node(name, *shared, name="second")
    assert {each["position"] for each in second.wait_for("snapshot loaded", 3)} == set(ends_of(kafka, name, 3))
    send(kafka, name, rows[4000:], 3)
    until(lambda: published(client, name, 3, ends_of(kafka, name, 3)), what="the last score")
    assert second.stop() == 0
    assert check_states(tmp_path, kafka, name, 3) == 6000
    assert check_redis(client, kafka, name, 3) == 200


def test_killed_again_and_again(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path
) -> None:
    """SIGKILL at random times while rows flow."""
    name, client, choose = topic(2), redis_server.client(), random.Random(5)
    flags = ("--redis", redis_server.url, "--tick", "20ms", "--snapshot-every", "200ms")
    rows = live_rows(1000 * (KILLS + 1))
    for kill in range(KILLS):
        each = node(name, *flags, name=f"node{kill}")
        each.wait_for("ready", 2)
        feeding = threading.Thread(target=send, args=(kafka, name, rows[1000 * kill : 1000 * (kill + 1)], 2))
        feeding.start()
        time.sleep(choose.random())
        each.kill()
        feeding.join()
    last = node(name, *flags, name="last")
    send(kafka, name, rows[1000 * KILLS :], 2, "arrow")
    until(lambda: published(client, name, 2, ends_of(kafka, name, 2)), what="the last score")
    assert last.stop() == 0
    assert check_states(tmp_path, kafka, name, 2) == len(rows)
    assert check_redis(client, kafka, name, 2) == 200


def test_partitions_move_between_nodes(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path
) -> None:
    """One node, two, three, two, one, while rows flow: each is handed over with its state."""
    name, client = topic(6), redis_server.client()
    rows = live_rows(6000)
    flags = ("--redis", redis_server.url, "--tick", "50ms")
    nodes = [node(name, *flags, name="one")]
    nodes[0].wait_for("ready", 6)
    send(kafka, name, rows[:1000], 6)
    for more in ("two", "three"):
        feeding = threading.Thread(target=send, args=(kafka, name, rows[len(nodes) * 1000 : (len(nodes) + 1) * 1000], 6))
        feeding.start()
        nodes.append(node(name, *flags, name=more))
        nodes[-1].wait_for("ready", 2)
        feeding.join()
    assert nodes[1].events("snapshot loaded")
    for place in (0, 1):
        feeding = threading.Thread(target=send, args=(kafka, name, rows[(3 + place) * 1000 : (4 + place) * 1000], 6))
        feeding.start()
        assert nodes[place].stop() == 0
        feeding.join()
    send(kafka, name, rows[5000:], 6)
    until(lambda: published(client, name, 6, ends_of(kafka, name, 6)), what="the last score")
    assert nodes[2].stop() == 0
    assert check_states(tmp_path, kafka, name, 6) == 6000
    assert check_redis(client, kafka, name, 6) == 200


def test_a_zombie_never_takes_a_newer_score_back(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path
) -> None:
    """A node stands still past its session, another takes over, and the first goes on with what it was about to do."""
    name, client = topic(1), redis_server.client()
    flags = ("--redis", redis_server.url, "--tick", "20ms", "--snapshot-every", "300ms")
    zombie = node(name, *flags, name="zombie")
    zombie.wait_for("ready")
    # The sum of a user's amounts only grows, and with it the score; so an older one is a smaller one.
    now = time.time_ns() // 1_000_000
    rows: list[Row] = [(f"user {user}", float(place), now - 20_000 + place) for place in range(400) for user in range(25)]
    stop = threading.Event()
    seen: dict[bytes, float] = {}
    back: list[Any] = []

    def poll() -> None:
        keys = [f"risk:user {user}".encode() for user in range(25)]
        while not stop.is_set():
            for key, value in zip(keys, client.mget(keys), strict=True):
                if value is not None:
                    if float(value) < seen.get(key, 0.0):
                        back.append((key, seen[key], float(value)))
                    seen[key] = float(value)

    polling = threading.Thread(target=poll)
    polling.start()
    try:
        send(kafka, name, rows[:5000], 1)
        zombie.suspend()
        successor = node(name, *flags, name="successor")
        successor.wait_for("ready")
        send(kafka, name, rows[5000:], 1)
        until(lambda: published(client, name, 1, ends_of(kafka, name, 1)), what="the last score")
        zombie.resume()
        zombie.wait_for("lost")
        assert heartbeat(client, name, 0)["owner"] == "successor"
    finally:
        stop.set()
        polling.join()
    assert back == []
    assert len(seen) == 25
    assert zombie.stop() == 0
    assert successor.stop() == 0
    assert check_states(tmp_path, kafka, name, 1) == 10_000
    assert check_redis(client, kafka, name, 1) == 25


@pytest.mark.parametrize("manner", ["flushed", "killed", "suspended"])
def test_redis_loses_its_scores_or_is_away(
    node: Callable[..., NodeProcess],
    kafka: Cluster,
    topic: Callable[..., str],
    own_redis: Callable[..., Redis],
    manner: str,
    tmp_path: Path,
) -> None:
    """Rows go on; all scores are back when it is."""
    name, server = topic(2), own_redis()
    rows = live_rows(4000)
    running = node(name, "--redis", server.url, "--tick", "50ms")
    running.wait_for("ready", 2)
    send(kafka, name, rows[:2000], 2)
    until(lambda: published(server.client(), name, 2, ends_of(kafka, name, 2)), what="the last score")
    if manner == "flushed":
        server.client().flushall()
    elif manner == "killed":
        server.kill()
        running.wait_for("scores are not published")
        send(kafka, name, rows[2000:], 2)
        server.start()
    else:
        server.suspend()
        send(kafka, name, rows[2000:], 2)
        running.wait_for("scores are not published")
        server.resume()
    until(lambda: published(server.client(), name, 2, ends_of(kafka, name, 2)), what="the last score")
    until(lambda: server.client().dbsize() == 202, what="every score")
    assert running.stop() == 0
    assert check_redis(server.client(), kafka, name, 2) == 200
    assert check_states(tmp_path, kafka, name, 2) == (2000 if manner == "flushed" else 4000)


@pytest.mark.parametrize("harm", ["damaged", "gone", "of another topic of the name", "position past the end", "log begins later"])
def test_states_that_are_of_no_use(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], tmp_path: Path, harm: str
) -> None:
    """The next way of recovery is taken, which is told, and the state is that of the log."""
    name = topic(1)
    rows = live_rows(3000)
    for number, more in enumerate((rows[:1000], rows[1000:1500])):
        send(kafka, name, more, 1)
        each = node(name, name=f"before{number}")
        each.wait_for("ready")  # it has applied all that was there when it came
        assert each.stop() == 0
    states = tmp_path / "state" / "0"
    assert len(list(states.iterdir())) == 2
    if harm == "damaged":
        newest = max(states.iterdir())
        (newest / "manifest.json").write_text("{}")
    elif harm == "gone":
        shutil.rmtree(states)
    elif harm in ("of another topic of the name", "position past the end"):
        kafka.delete_topic(name)
        kafka.make_topic(name, 1)
        if harm == "of another topic of the name":
            send(kafka, name, rows[:2000], 1)
    else:
        for future in kafka.admin.delete_records([TopicPartition(name, 0, 1500)]).values():
            future.result()
        send(kafka, name, rows[1500:1600], 1)
    send(kafka, name, rows[2000:], 1)
    after = node(name, name="after")
    after.wait_for("ready")
    assert after.stop() == 0
    events = [each["event"] for each in after.events()]
    if harm == "damaged":
        assert "snapshot passed over" in events
        assert "snapshot loaded" in events
    elif harm == "log begins later":
        assert "snapshot loaded" in events
    else:
        assert "rebuild from the log" in events
    if harm != "log begins later":
        assert check_states(tmp_path, kafka, name, 1) > 0


def scored(cluster: Cluster, name: str) -> list[tuple[Any, ...]]:
    """The rows of a topic of scores."""
    tables = [pa.ipc.open_stream(message.value()).read_all() for message in log_of(cluster, name, 0)]
    shown = ("user_id", "score", "source_partition", "source_offset", "source_row")
    return [tuple(row[each] for each in shown) for table in tables for row in table.to_pylist()]


def test_what_cannot_be_applied_becomes_a_dead_letter(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    """Each with its reason and place, and everything else goes on; scores of rows say where they come from."""
    name, letters, scores = topic(2), topic(1), topic(1)
    running = node(name, "--dead-letter-topic", letters, "--scores-topic", scores, "--max-ahead", "10s")
    running.wait_for("ready", 2)
    now = time.time_ns() // 1_000_000
    mine = [user for user in map(str, range(50)) if partition(user, 2) == 0]
    foreign = next(user for user in map(str, range(50)) if partition(user, 2) == 1)
    good = json.dumps({"user_id": mine[0], "amount": 5, "timestamp": now}).encode()
    future = json.dumps({"user_id": mine[0], "amount": 7, "timestamp": now + 3_600_000}).encode()
    late = json.dumps({"user_id": mine[0], "amount": 7, "timestamp": now - 7_200_000}).encode()
    stray = json.dumps({"user_id": foreign, "amount": 7, "timestamp": now}).encode()
    number = json.dumps({"user_id": 7, "amount": 7, "timestamp": now}).encode()
    arrow = encode_arrow(batch_of([(mine[1], 1.5, now), (foreign, 2.5, now), (mine[2], 3.5, now + 3_600_000)]))
    values = [good, b"\xff\xff\xff\xff\x00", b"{", None, future, late, stray, number, arrow, b'{"amount":1}', good]
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for value in values:
        producer.produce(name, value, partition=0)
    assert producer.flush(30) == 0
    until(lambda: len(log_of(kafka, letters, 0)) == 10, what="the dead letters")
    until(lambda: len(scored(kafka, scores)) == 3, what="the scores")
    assert running.stop() == 0
    found = []
    for message in log_of(kafka, letters, 0):
        headers = {key: value.decode() for key, value in message.headers()}
        assert (headers["topic"], headers["partition"]) == (name, "0")
        found.append((int(headers["offset"]), headers.get("row"), headers["reason"], message.value()))
    rows_alone = {row: value for _, row, _, value in found if row is not None}
    assert sorted(found, key=lambda letter: (letter[0], letter[1] or "")) == [
        (1, None, "undecodable", values[1]),
        (2, None, "undecodable", b"{"),
        (3, None, "undecodable", None),
        (4, None, "future", future),
        (5, None, "late", late),
        (6, None, "wrong_partition", stray),
        (7, None, "wrong_kind", number),
        (8, "1", "wrong_partition", rows_alone["1"]),
        (8, "2", "future", rows_alone["2"]),
        (9, None, "null_user", values[9]),
    ]
    alone = json.loads(rows_alone["2"])
    assert (alone["user_id"], alone["amount"]) == (mine[2], 3.5)
    assert scored(kafka, scores) == [(mine[0], 5.0, 0, 0, 0), (mine[1], 1.5, 0, 8, 0), (mine[0], 5.0, 0, 10, 0)]
    with RiskEngine.load(tmp_path / "state" / "0") as engine:
        assert engine.restored is not None and engine.restored.position["offset"] == len(values)
        assert engine.scores([*mine[:3], foreign]).tolist() == [5.0, 1.5, 0.0, 0.0]


def test_no_room_for_snapshots(node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
    """Rows go on, older snapshots stay, it is told; and when there is room again, so are new ones."""
    name = topic(1)
    rows = live_rows(24_000)
    running = node(name, "--snapshot-every", "1s", file_kb=80)
    running.wait_for("snapshot")
    send(kafka, name, rows[:18_000], 1)
    (first, *_) = running.wait_for("no snapshot")
    assert "could not be written" in first["error"]
    before = sorted((tmp_path / "state" / "0").iterdir())
    assert before
    send(kafka, name, rows[18_000:], 1)
    running.wait_for("no snapshot", len(running.events("no snapshot")) + 2)
    assert sorted((tmp_path / "state" / "0").iterdir()) == before
    assert running.process is not None
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: running.events("snapshot")[-1]["position"] == 24_000, what="a snapshot")
    assert running.stop() == 0
    assert check_states(tmp_path, kafka, name, 1) == 24_000


def test_a_full_engine_stops_its_partition_and_no_other(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], redis_server: Redis
) -> None:
    name, client = topic(2), redis_server.client()
    running = node(name, "--users", "10", "--redis", redis_server.url, "--tick", "50ms")
    running.wait_for("ready", 2)
    now = time.time_ns() // 1_000_000
    many = [user for user in map(str, range(200)) if partition(user, 2) == 0][:40]
    few = [user for user in map(str, range(200)) if partition(user, 2) == 1][:5]
    send(kafka, name, [(user, 1.0, now) for user in many], 2)
    running.wait_for("the engine is full")
    send(kafka, name, [(user, 2.0, now) for user in few], 2)
    until(lambda: [client.get(f"risk:{user}") for user in few] == [b"2"] * 5, what="the others")
    until(lambda: heartbeat(client, name, 0)["state"] == "full", what="the state")
    assert heartbeat(client, name, 1)["state"] == "ready"
    assert running.stop() == 0


def test_the_engine_of_the_log_is_that_of_a_replay(kafka: Cluster, topic: Callable[..., str]) -> None:
    """The judge itself: every row that was sent is in the log once."""
    name = topic(2)
    rows = live_rows(500)
    send(kafka, name, rows, 2)
    total = 0
    for number in range(2):
        with judged(log_of(kafka, name, number), 2**62) as judge:
            mine = [row for row in rows if partition(row[0], 2) == number]
            total += judge.stats().transactions
            assert judge.stats().transactions == len(mine)
    assert total == 500
