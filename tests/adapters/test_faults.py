"""Whatever breaks while rows flow: nothing is lost, nothing counted twice, and no older score is seen after a newer one.

Each test is a line of the table of faults. Sizes are small here; `python -m tests.adapters.faults` runs them at full size, for an hour or
so, and prints the table.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import Producer, TopicPartition

from engine import RiskEngine
from engine.messages import decode, encode_arrow
from tests.adapters.brokers import Cluster
from tests.adapters.nodes import (
    OPTIONS,
    Flow,
    NodeProcess,
    Row,
    batch_of,
    check_redis,
    check_states,
    ends_of,
    heartbeat,
    live_rows,
    log_of,
    metrics_at,
    partition,
    published,
    send,
)
from tests.adapters.processes import until
from tests.adapters.redis_servers import Redis

pytestmark = pytest.mark.servers

T = TypeVar("T")
Starts = Callable[..., NodeProcess]
Tell = Callable[[str, object], None]

FULL = os.environ.get("RISKRING_FAULTS") == "full"


def size(small: T, full: T) -> T:
    return full if FULL else small


def resident_mb(process: NodeProcess) -> int:
    """Resident memory; 0 where there is no /proc."""
    status = Path(f"/proc/{process.pid}/status")
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) // 1000 if status.exists() else 0


BROKERS = [(manner, role) for manner in ("kill", "suspend", "stop") for role in ("leader", "coordinator", "controller")]


@pytest.mark.parametrize(("manner", "role"), size([BROKERS[0], BROKERS[4], BROKERS[8]], BROKERS))
def test_a_broker_of_three_fails(node: Starts, kafka3: Cluster, tmp_path: Path, record_property: Tell, manner: str, role: str) -> None:
    """SIGKILL, SIGSTOP for 20 seconds, clean stop; nothing is lost, nothing doubled, each user in order."""
    name, group, rows = kafka3.new_topic(2), f"{manner}-{role}", size(40_000, 10_000_000)
    running = node(name, "--snapshot-every", "500ms", on=kafka3, group=group)
    running.wait_for("ready", 2)
    flow = Flow(kafka3, name, rows, 2)
    until(lambda: flow.sent >= rows // 4 or not flow.is_alive(), what="a quarter of the rows")
    chosen = {"leader": lambda: kafka3.leader(name), "coordinator": lambda: kafka3.coordinator(group), "controller": kafka3.controller}
    broker = kafka3.broker(chosen[role]())
    getattr(broker, manner)()
    if manner == "suspend":
        time.sleep(size(7, 20))
        broker.resume()
    assert flow.end() == rows
    kafka3.heal()
    until(lambda: ends_of(kafka3, name, 2) == flow.ends, what="all brokers know who leads")
    until(lambda: {each["position"] for each in running.events("snapshot")[-2:]} == set(flow.ends), 120, "snapshots of the ends")
    assert running.stop() == 0
    flow.check_log()
    assert check_states(tmp_path, kafka3, name, 2) == rows
    record_property("rows", rows)


def test_a_node_is_killed_again_and_again(
    node: Starts, kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path, record_property: Tell
) -> None:
    """SIGKILL at random times while rows flow."""
    name, client, choose, kills = topic(2), redis_server.client(), random.Random(5), size(3, 200)
    flags = ("--redis", redis_server.url, "--tick", "20ms", "--snapshot-every", "200ms")
    rows = live_rows(1000 * (kills + 1))
    for kill in range(kills):
        each = node(name, *flags, name=f"node{kill}")
        each.wait_for("ready", 2)
        feeding = threading.Thread(target=send, args=(kafka, name, rows[1000 * kill : 1000 * (kill + 1)], 2))
        feeding.start()
        time.sleep(choose.random())
        each.kill()
        feeding.join()
    last = node(name, *flags, name="last")
    send(kafka, name, rows[1000 * kills :], 2, "arrow")
    until(lambda: published(client, name, 2, ends_of(kafka, name, 2)), what="the last score")
    assert last.stop() == 0
    assert check_states(tmp_path, kafka, name, 2) == len(rows)
    assert check_redis(client, kafka, name, 2) == 200
    record_property("kills", kills)


def test_a_zombie_never_takes_a_newer_score_back(
    node: Starts, kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path, record_property: Tell
) -> None:
    """A node stands still past its session, another takes over, and the first goes on with what it was about to do."""
    name, client, zombies = topic(1), redis_server.client(), size(1, 20)
    flags = ("--redis", redis_server.url, "--tick", "20ms", "--snapshot-every", "300ms")
    # The sum of a user's amounts only grows, and with it the score; so an older one is a smaller one.
    now = time.time_ns() // 1_000_000
    rows: list[Row] = [(f"user {user}", float(place), now - 50_000 + place) for place in range(400 * zombies) for user in range(25)]
    stop = threading.Event()
    seen: dict[bytes, float] = {}
    back: list[Any] = []
    polls = 0

    def poll() -> None:
        nonlocal polls
        keys = [f"risk:user {user}".encode() for user in range(25)]
        while not stop.wait(0.002):
            polls += 1
            for key, value in zip(keys, client.mget(keys), strict=True):
                if value is not None:
                    if float(value) < seen.get(key, 0.0):
                        back.append((key, seen[key], float(value)))
                    seen[key] = float(value)

    owner = node(name, *flags, name="node0")
    owner.wait_for("ready")
    polling = threading.Thread(target=poll)
    polling.start()
    try:
        for number in range(zombies):
            zombie, more = owner, rows[10_000 * number : 10_000 * (number + 1)]
            send(kafka, name, more[:5000], 1)
            zombie.suspend()
            owner = node(name, *flags, name=f"node{number + 1}")
            owner.wait_for("ready")
            send(kafka, name, more[5000:], 1)
            until(lambda: published(client, name, 1, ends_of(kafka, name, 1)), what="the last score")
            zombie.resume()
            zombie.wait_for("lost")
            assert heartbeat(client, name, 0)["owner"] == f"node{number + 1}"
            assert zombie.stop() == 0
    finally:
        stop.set()
        polling.join()
    assert back == []
    assert len(seen) == 25
    assert owner.stop() == 0
    assert check_states(tmp_path, kafka, name, 1) == len(rows)
    assert check_redis(client, kafka, name, 1) == 25
    record_property("zombies", zombies)
    record_property("reads of all keys", polls)


def test_nodes_join_and_leave_every_second(
    node: Starts, kafka: Cluster, topic: Callable[..., str], redis_server: Redis, tmp_path: Path, record_property: Tell
) -> None:
    """A storm of rebalances; who leaves is killed or stops in order."""
    name, client, choose, seconds = topic(6), redis_server.client(), random.Random(7), size(6, 60)
    flags = ("--redis", redis_server.url, "--tick", "50ms", "--snapshot-every", "500ms")
    first = node(name, *flags, name="node0")
    first.wait_for("ready", 6)
    flow, there, ended = Flow(kafka, name, size(30_000, 1_000_000), 6, per_second=size(5_000, 15_000)), [first], []
    for second in range(1, seconds + 1):
        began = time.monotonic()
        if len(there) == 1 or (len(there) < 4 and choose.random() < 0.5):
            there.append(node(name, *flags, name=f"node{second}"))
        else:
            leaving = there.pop(choose.randrange(len(there)))
            if choose.random() < 0.5:
                leaving.kill()
            else:
                leaving.signal(15)
                ended.append(leaving)
        time.sleep(max(began + 1 - time.monotonic(), 0))
    rows = flow.end()
    until(lambda: published(client, name, 6, ends_of(kafka, name, 6)), 120, what="the last score")
    statuses = [(each.wait(), bool(each.events("node"))) for each in ended]
    assert all(status == 0 for status, began in statuses if began), statuses  # who was asked to end before it began just ends
    assert [each.stop() for each in there] == [0] * len(there)
    assert check_states(tmp_path, kafka, name, 6) == rows
    assert check_redis(client, kafka, name, 6) == 200
    record_property("joins and leaves", seconds)
    record_property("rows", rows)


@pytest.mark.parametrize("manner", ["flushed", "killed", "suspended"])
def test_redis_loses_its_scores_or_is_away(
    node: Starts,
    kafka: Cluster,
    topic: Callable[..., str],
    own_redis: Callable[..., Redis],
    free_port: int,
    manner: str,
    tmp_path: Path,
    record_property: Tell,
) -> None:
    """Rows go on, memory does not grow with the time; all scores are back when it is."""
    name, server, rows = topic(2), own_redis(), size(4_000, 4_000_000)
    running = node(name, "--redis", server.url, "--tick", "50ms", "--metrics", f"127.0.0.1:{free_port}")
    running.wait_for("ready", 2)
    users = size(200, 1_000_000)
    assert Flow(kafka, name, rows, 2, users).end() == rows
    until(lambda: published(server.client(), name, 2, ends_of(kafka, name, 2)), 120, what="the last score")
    keys, before_mb = server.client().dbsize(), resident_mb(running)
    if manner == "flushed":
        flow = Flow(kafka, name, rows, 2, users, size(0, 50_000))
        back = time.monotonic()
        server.client().flushall()
    else:
        server.kill() if manner == "killed" else server.suspend()
        flow = Flow(kafka, name, rows, 2, users, size(0, 50_000))
        running.wait_for("scores are not published")
        time.sleep(size(0, 60))
        sent = flow.sent
        until(lambda: metrics_at(free_port)['riskring_transactions_total{result="accepted"}'] >= rows + min(sent, 1), what="rows go on")
        until(lambda: metrics_at(free_port)['riskring_transactions_total{result="accepted"}'] >= sent, what="rows go on")
        record_property("resident MB, before and while away", f"{before_mb} {resident_mb(running)}")
        back = time.monotonic()
        server.start() if manner == "killed" else server.resume()
    client = server.client()
    until(lambda: client.dbsize() >= keys and heartbeat(client, name, 1), 120, what="every score")
    record_property("keys", keys)
    record_property("back after s", round(time.monotonic() - back, 1))
    flow.end()
    until(lambda: published(client, name, 2, ends_of(kafka, name, 2)), 120, what="the last score")
    assert running.stop() == 0
    assert check_redis(client, kafka, name, 2) >= keys - 2
    assert check_states(tmp_path, kafka, name, 2) == 2 * rows


def test_a_node_that_is_asked_to_end(
    node: Starts, kafka: Cluster, topic: Callable[..., str], free_port: int, tmp_path: Path, record_property: Tell
) -> None:
    """SIGTERM while rows flow: what was read is applied and saved, and the group knows where to go on."""
    name, users, rows = topic(2), size(500, 1_000_000), size(20_000, 5_000_000)
    running = node(name, "--snapshot-every", "1h", "--metrics", f"127.0.0.1:{free_port}")
    running.wait_for("ready", 2)
    flow = Flow(kafka, name, rows, 2, users)
    until(lambda: metrics_at(free_port)['riskring_transactions_total{result="accepted"}'] > rows // 2, 120, what="half of the rows")
    began = time.monotonic()
    assert running.stop() == 0
    record_property("seconds", round(time.monotonic() - began, 1))
    assert [each["saved"] for each in running.events("given up")] == [True, True]
    assert flow.end() == rows
    again = node(name, "--snapshot-every", "1h", name="again")
    assert sum(each["position"] for each in again.wait_for("snapshot loaded", 2)) > 0
    again.wait_for("ready", 2, 120)
    assert again.stop() == 0
    assert check_states(tmp_path, kafka, name, 2) == rows
    record_property("rows", rows)


@pytest.mark.parametrize("harm", ["damaged", "gone", "of another topic of the name", "position past the end", "log begins later"])
def test_states_that_are_of_no_use(node: Starts, kafka: Cluster, topic: Callable[..., str], tmp_path: Path, harm: str) -> None:
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
        kafka.create_topic(name, 1)
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


def test_what_cannot_be_applied_becomes_a_dead_letter(node: Starts, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
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


def test_hostile_bytes(node: Starts, kafka: Cluster, topic: Callable[..., str], tmp_path: Path, record_property: Tell) -> None:
    """Messages with bits turned over, cut, and far too large: each is applied as it says, or becomes a dead letter."""
    name, letters = topic(1, max_message_bytes="8000000"), topic(1)
    choose, rows, count = random.Random(3), live_rows(200, users=20), size(200, 5_000)
    whole = [encode_arrow(batch_of(rows)), json.dumps({"user_id": "a", "amount": 1.25, "timestamp": rows[-1][2]}).encode()]
    huge = [b'{"user_id":"' + b"u" * 5_000_000 + b'"}', b"{" * 3_000_000, b"\xff" * 3_000_000]
    values = [*whole, *huge]
    for _ in range(count):
        value = bytearray(choose.choice(whole))
        for _ in range(choose.choice([1, 1, 1, 3, 20])):
            value[choose.randrange(len(value))] ^= 1 << choose.randrange(8)
        values.append(bytes(value[: choose.choice([len(value), len(value), choose.randrange(len(value))])]))
    values.append(whole[0])
    running = node(name, "--dead-letter-topic", letters)
    running.wait_for("ready")
    producer = kafka.producer(message_max_bytes=8_000_000)
    for value in values:
        producer.produce(name, value, partition=0)
    assert producer.flush(60) == 0
    ends = ends_of(kafka, name, 1)
    assert ends == [len(values)]
    again = node(name, "--dead-letter-topic", letters, name="again")  # it is ready when the whole log is applied
    assert running.stop() == 0
    again.wait_for("ready")
    assert again.stop() == 0
    dead = 0
    with RiskEngine(**OPTIONS) as judge, RiskEngine.load(tmp_path / "state" / "0") as engine:
        for message in log_of(kafka, name, 0):
            arrival = np.array([message.timestamp()[1] * 10**6])
            decoded = decode([message.value()], np.array([message.offset()]), arrival, judge.config, judge.id_kind)
            dead += len(decoded.dead)
            for run in decoded.runs:
                if judge.id_kind in (None, run.kind):
                    dead += sum(judge.ingest(run.table, arrival=run.arrival_ns).rejected.values())
                else:
                    dead += len(run.table)
        assert engine.digest() == judge.digest()
    assert len(log_of(kafka, letters, 0)) == dead > count // 4
    record_property("messages", len(values))
    record_property("dead letters", dead)


def test_no_room_for_snapshots(node: Starts, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
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
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: running.events("snapshot")[-1]["position"] == 24_000, what="a snapshot")
    assert running.stop() == 0
    assert check_states(tmp_path, kafka, name, 1) == 24_000


def test_a_full_engine_stops_its_partition_and_no_other(
    node: Starts, kafka: Cluster, topic: Callable[..., str], redis_server: Redis
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
