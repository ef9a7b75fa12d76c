"""The node on a real Kafka and a real Redis: nothing lost, nothing twice, no older score after a newer one, whatever dies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine import ConfigError, ConnectorError, RiskEngine, StaleError
from engine.adapters.client import RiskClient
from tests.adapters.brokers import Cluster
from tests.adapters.nodes import (
    OPTIONS,
    NodeProcess,
    check_redis,
    check_states,
    ends_of,
    judged,
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


def riskring(*words: str) -> str:
    command = [sys.executable, "-c", "from engine.cli import process; process()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_from_topic_to_redis_and_again(
    node: Callable[..., NodeProcess],
    kafka: Cluster,
    topic: Callable[..., str],
    redis_server: Redis,
    free_port: int,
    tmp_path: Path,
    protocol: str,
) -> None:
    """Both formats in one topic; a stop saves; a second start goes on from there; each partition's state is that of its whole log."""
    name, client = topic(3), redis_server.client()
    shared = ("--redis", redis_server.url, "--group-protocol", protocol, "--tick", "50ms", "--metrics", f"127.0.0.1:{free_port}")
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
    until(lambda: expected.items() <= metrics_at(free_port).items(), what="the metrics")
    metrics = metrics_at(free_port)
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


def test_nodes_answer_for_their_partitions(
    node: Callable[..., NodeProcess], kafka: Cluster, topic: Callable[..., str], tmp_path: Path
) -> None:
    """Over HTTP and by Flight: what one engine over all rows says, as far as the users are here; and nothing for the users of others."""
    pytest.importorskip("uvicorn")
    name, rows = topic(4), live_rows(3000)
    flags = ("--http", "127.0.0.1:0", "--flight", "127.0.0.1:0")
    first = node(name, *flags, name="one")
    first.wait_for("ready", 4)
    send(kafka, name, rows, 4)
    offline = RiskEngine(**OPTIONS)
    users, amounts, times = (list(column) for column in zip(*rows, strict=True))
    offline.ingest({"user_id": users, "amount": amounts, "timestamp": times})
    everybody, at = sorted(set(users)), np.datetime64(time.time_ns() // 10**6 * 10**6, "ns")
    urls = [told.get("http") or told["flight"] for told in first.wait_for("listening", 2)]
    assert [url.partition(":")[0] for url in urls] == ["http", "grpc"]
    for url in urls:
        with RiskClient(url) as client:
            until(lambda: client.scores(everybody, at=at).tolist() == offline.scores(everybody, at=at).tolist(), what="all is applied")
            explained = client.explain(everybody[0], at=at)
            assert (explained["score"], explained["count"]) == (
                offline.score(everybody[0], at=at),
                offline.explain(everybody[0], at=at).count,
            )
            with pytest.raises((ConnectorError, ConfigError), match="Kafka"):
                client.ingest(pa.table({"user_id": ["x"], "amount": [1], "timestamp": [1]}))
    with urllib.request.urlopen(f"{urls[0]}/readyz") as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{urls[0]}/metrics") as answer:
        assert b'riskring_partition_ready{partition="3"} 1.0' in answer.read()
    second = node(name, *flags, name="two")
    second.wait_for("ready", 2)
    numbers = {told["partition"] for told in second.events("ready")}
    url = next(told["http"] for told in second.events("listening") if "http" in told)
    with RiskClient(url) as client:
        for user in everybody[:6]:
            if partition(user, 4) in numbers:
                assert client.score(user, at=at) == offline.score(user, at=at)
            else:
                with pytest.raises(StaleError, match="another node has"):
                    client.score(user, at=at)
    assert first.stop() == 0 and second.stop() == 0
