"""Rows into a real Kafka and out of it; brokers that die; and what is wrong with a command is told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka.admin import NewPartitions

from engine import ConfigError, ConnectorError, RiskEngine
from engine.adapters.kafka_producer import KafkaOutput, KafkaProducer
from engine.adapters.kafka_source import KafkaSource
from engine.columns import ids_of
from engine.messages import OFFSET, ROW, decode
from engine.partitions import partition_of
from tests.adapters.brokers import Cluster
from tests.adapters.nodes import OPTIONS, NodeProcess, check_states, ends_of, judged, live_rows, log_of, send
from tests.adapters.processes import until
from tests.adapters.redis_servers import Redis

pytestmark = pytest.mark.servers

#: Rows that flow while a broker of three dies.
ROWS = int(os.environ.get("RISKRING_BROKER_ROWS", "6000"))


def riskring(*words: Any, **variables: str) -> tuple[int, str, str]:
    program = "from engine.cli import process; process()"
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **variables}, check=False)
    return done.returncode, done.stdout, done.stderr


def test_partitions_are_those_that_librdkafka_chooses(kafka: Cluster, topic: Callable[..., str]) -> None:
    name, users = topic(7), [f"user-{number}" for number in range(300)] + ["", "é", "a" * 1000]
    producer = KafkaProducer(kafka.bootstrap, {})
    for user in users:
        producer.send(name, user.encode(), key=user.encode())
    producer.flush()
    expected = dict(zip(users, partition_of(ids_of(pa.array(users), "user_id"), 7).tolist(), strict=True))
    del expected[""]  # no key is a key to librdkafka when it is empty
    found = {message.value().decode(): number for number in range(7) for message in log_of(kafka, name, number)}
    assert {user: found[user] for user in expected} == expected


class TestProduce:
    @pytest.mark.parametrize("form", ["arrow", "json"])
    @pytest.mark.parametrize("kind", ["string", "int64", "binary"])
    def test_rows_arrive_once_and_in_the_order_of_their_user(
        self, kafka: Cluster, topic: Callable[..., str], tmp_path: Path, form: str, kind: str
    ) -> None:
        if (form, kind) == ("json", "binary"):
            return  # JSON has no bytes
        name, rows = topic(3), live_rows(2000)
        ids = {"string": [row[0] for row in rows], "int64": [int(row[0][5:]) for row in rows], "binary": [row[0].encode() for row in rows]}[
            kind
        ]
        times = pa.array([row[2] for row in rows], pa.int64() if form == "json" else pa.timestamp("ms"))
        table = pa.table({"x": range(2000), "user_id": ids, "amount": [row[1] for row in rows], "timestamp": times})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=700)
        flags = ["--brokers", kafka.bootstrap, "--topic", name, "--format", form, "--rows-per-message", 100, "--time-unit", "ms"]
        code, out, errors = riskring("produce", tmp_path / "rows.parquet", *flags)
        assert (code, out) == (0, "")
        assert "2,000 rows in" in errors
        chosen = partition_of(ids_of(table["user_id"].combine_chunks(), "user_id"), 3)
        for number in range(3):
            mine = table.filter(pa.array(chosen == number))
            messages = log_of(kafka, name, number)
            with RiskEngine(window="30m", max_ahead=None, time_unit="ms", users=500) as engine, judged(messages, 2**62) as judge:
                engine.ingest(mine)
                assert engine.digest() == judge.digest()
            if form == "json":
                assert [json.loads(message.value())["user_id"] for message in messages] == mine["user_id"].to_pylist()
                assert [message.key().decode() for message in messages] == [str(user) for user in mine["user_id"].to_pylist()]
            else:
                assert [len(pa.ipc.open_stream(message.value()).read_all()) for message in messages][:-1] == [100] * (len(mine) // 100)

    def test_text_files_arrive_as_they_are_written(self, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
        name, rows = topic(2), live_rows(300)
        text = "".join(f'"{user}",{amount},{time_ms}\n' for user, amount, time_ms in rows)
        (tmp_path / "rows.csv").write_text("user_id,amount,timestamp\n" + text + "bad,much,1\n")
        flags = ["--brokers", kafka.bootstrap, "--topic", name, "--time-unit", "ms"]
        code, _, errors = riskring("produce", tmp_path / "rows.csv", *flags)
        assert code == 0, errors
        assert "301 rows in 2 messages" in errors
        accepted = rejected = 0
        for number in range(2):
            with RiskEngine(**OPTIONS, max_ahead=None) as engine:
                for message in log_of(kafka, name, number):
                    (run,) = decode([message.value()], np.array([0]), np.array([0]), engine.config, None).runs
                    engine.ingest(run.table)
                stats = engine.stats()
                accepted, rejected = accepted + stats.accepted, rejected + sum(stats.rejected.values())
        assert (accepted, rejected) == (300, 1)

    def test_an_interrupt_lets_arrive_what_was_sent_and_says_how_much_that_is(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(1)
        words = ["produce", "-", "--brokers", kafka.bootstrap, "--topic", name, "--format", "json", "--rate", "500", "--time-unit", "ms"]
        command = [sys.executable, "-c", "from engine.cli import process; process()", *words]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            text = "".join(f'{{"user_id":"u{number % 9}","amount":1,"timestamp":{number}}}\n' for number in range(10_000))
            process.stdin.write(text)
            process.stdin.close()
            process.stdin = None
            until(lambda: ends_of(kafka, name, 1)[0] > 50, what="the first messages")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        (there,) = ends_of(kafka, name, 1)
        assert 50 < there < 10_000
        assert f"{there:,} rows in {there:,} messages to {name}, " in errors
        assert [json.loads(message.value())["timestamp"] for message in log_of(kafka, name, 0)] == [str(each) for each in range(there)]

    def test_from_standard_input_at_a_rate(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(1)
        text = "".join(f'{{"user_id":"u","amount":{number},"timestamp":{number}}}\n' for number in range(50))
        words = ["produce", "-", "--brokers", kafka.bootstrap, "--topic", name, "--format", "json", "--rate", "100", "--time-unit", "ms"]
        began = time.monotonic()
        command = [sys.executable, "-c", "from engine.cli import process; process()", *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began > 0.4
        assert [json.loads(message.value())["amount"] for message in log_of(kafka, name, 0)] == [str(number) for number in range(50)]


class TestBadInput:
    """One line that names the value and the fix, no traceback, and no exit code 0."""

    def refused(self, *words: Any, **variables: str) -> str:
        code, out, errors = riskring(*words, **variables)
        assert code in (1, 2) and out == "", errors
        lines = [line for line in errors.splitlines() if line.startswith("riskring: ")]
        assert len(lines) == 1, errors
        assert "Traceback" not in errors
        return lines[0]

    @pytest.mark.parametrize("command", ["node", "produce"])
    def test_clusters_and_topics(self, kafka: Cluster, topic: Callable[..., str], free_port: int, tmp_path: Path, command: str) -> None:
        pq.write_table(pa.table({"user_id": [1], "amount": [1], "timestamp": pa.array([1], pa.timestamp("s"))}), tmp_path / "a.parquet")
        words = [command, tmp_path / "a.parquet"] if command == "produce" else [command, "--group", "g"]
        assert f"{command} needs --brokers" in self.refused(*words)
        assert f"{command} needs --topic" in self.refused(*words, "--brokers", kafka.bootstrap)
        nobody = self.refused(*words, "--brokers", f"127.0.0.1:{free_port}", "--topic", "t")
        assert f"127.0.0.1:{free_port}: no broker answers; check --brokers" in nobody
        assert "topic 'nowhere' does not exist" in self.refused(*words, "--brokers", kafka.bootstrap, "--topic", "nowhere")
        there = [*words, "--brokers", kafka.bootstrap, "--topic", topic()]
        assert "no.such.option" in self.refused(*there, "--kafka", "no.such.option=1")
        assert "NAME=VALUE" in self.refused(*there, "--kafka", "secret")
        assert "cannot" in (text := self.refused(*there, "--kafka-config", tmp_path / "none")) or "No such file" in text
        fixed = "acks=0" if command == "produce" else "auto.offset.reset=earliest"
        assert "leave it out" in self.refused(*there, "--kafka", fixed)

    def test_secrets_are_not_shown(self, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "secrets").write_text("# of the cluster\nsasl.password=hush hush\nno.such.option=1\n")
        words = ["node", "--group", "g", "--brokers", kafka.bootstrap, "--topic", topic(), "--kafka-config", tmp_path / "secrets"]
        assert "hush" not in self.refused(*words)

    def test_nodes(
        self, kafka: Cluster, topic: Callable[..., str], own_redis: Callable[..., Redis], free_port: int, tmp_path: Path
    ) -> None:
        there = ["node", "--group", "g", "--brokers", kafka.bootstrap, "--topic", topic()]
        assert "node needs --group" in self.refused("node", "--brokers", kafka.bootstrap, "--topic", topic())
        assert "URL of Redis" in self.refused(*there, "--redis", "localhost")
        assert f"Redis at 127.0.0.1:{free_port}" in self.refused(*there, "--redis", f"redis://127.0.0.1:{free_port}")
        evicting = own_redis({"maxmemory": "50mb", "maxmemory-policy": "volatile-ttl"})
        assert "set it to noeviction" in self.refused(*there, "--redis", evicting.url)
        assert "--clock event" in self.refused(*there, "--redis", own_redis().url, "--clock", "event")
        assert "'soon'" in self.refused(*there, "--tick", "soon")
        assert "must be more than 0" in self.refused(*there, "--snapshot-every", "0s")
        assert "--metrics" in self.refused(*there, "--metrics", "somewhere")
        assert "topic 'letters' does not exist" in self.refused(*there, "--dead-letter-topic", "letters")
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in self.refused(*there, "--state", tmp_path / "file")

    def test_states_of_others(self, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
        name, state = topic(), tmp_path / "state"
        first = NodeProcess(tmp_path, kafka, name)
        first.wait_for("ready")
        assert first.stop() == 0
        words = ["node", "--brokers", kafka.bootstrap, "--state", state, "--window", "30m", "--users", "20000"]
        assert "belongs to group 'group', not 'other'" in self.refused(*words, "--group", "other", "--topic", name)
        assert f"belongs to topic '{name}', not" in self.refused(*words, "--group", "group", "--topic", topic())
        assert "is the state of a node with window_ns" in self.refused(*words, "--group", "group", "--topic", name, "--window", "60s")
        with RiskEngine(users=10) as engine:
            engine.save(tmp_path / "alien" / "0", position="a text")
        words[4] = tmp_path / "alien"
        assert "not those of a node" in self.refused(*words, "--group", "group", "--topic", name)


class TestSource:
    def test_an_offset_that_the_log_does_not_have_is_told(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        name = topic(1)
        send(kafka, name, live_rows(10), 1)
        source = KafkaSource(kafka.bootstrap, name, "source", "classic", {}, lambda *_, **__: None)
        source.subscribe(lambda numbers: dict.fromkeys(numbers, 99), lambda _: None, lambda _: None)
        until(lambda: source.fetch(0.05).out_of_range == [0], what="the event")
        source.seek(0, 4)
        found = until(lambda: source.fetch(0.05).messages.get(0), what="messages")
        assert found.offsets.tolist() == list(range(4, 10))
        assert (np.abs(found.arrival_ns - time.time_ns()) < 60 * 10**9).all()
        assert source.ends(0, time.time_ns() + 10**12)[:3] == (0, 10, 10)
        assert source.ends(0, 0)[:3] == (0, 10, 0)
        assert (source.lag(0, 7), source.lag(0, 10)) == (3, 0)
        source.close()

    def test_an_end_before_what_was_read_is_asked_for_again(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        """A broker that stood still tells an old one. Here the log grows while it is asked for."""
        name, warned = topic(1), []

        def warn(event: str, **told: Any) -> None:
            warned.append((event, told))
            if len(warned) == 1:
                send(kafka, name, live_rows(2), 1)

        send(kafka, name, live_rows(10), 1)
        source = KafkaSource(kafka.bootstrap, name, "source", "classic", {}, warn)
        assert source.ends(0, 0, 10)[:2] == (0, 10)
        assert warned == []
        assert source.ends(0, 0, 12)[:2] == (0, 12)
        assert {event for event, _ in warned} == {"the log seems to end before what was read of it"}
        assert source.ends(0, 0, 13)[:2] == (0, 12)  # believed in the end
        source.close()

    def test_options(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        with pytest.raises(ConfigError, match=r"--kafka group\.id: is decided by the node"):
            KafkaSource(kafka.bootstrap, topic(), "g", "classic", {"group.id": "x"}, lambda *_, **__: None)

    def test_what_is_too_large_to_be_sent(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        """A dead letter is cut, scores become several messages: the node goes on."""
        letters, scores = topic(), topic()
        producer = KafkaProducer(kafka.bootstrap, {"message.max.bytes": "20000"})
        output = KafkaOutput(producer, "source", letters, scores)
        for length in (producer.value_bytes_max, producer.value_bytes_max + 1):
            output.dead_letter(7, length, None, "too_large", b"x" * length)
        columns = {"user_id": ["u" * 3000] * 9, OFFSET: range(9), ROW: pa.array([0] * 9, pa.int32()), "score": [1.5] * 9}
        output.scores(7, pa.table(columns))
        output.flush()
        whole, cut = log_of(kafka, letters, 0)
        assert len(whole.value()) == len(cut.value()) == producer.value_bytes_max
        assert dict(cut.headers())["cut_from"] == dict(cut.headers())["offset"] == str(producer.value_bytes_max + 1).encode()
        assert "cut_from" not in dict(whole.headers())
        tables = [pa.ipc.open_stream(message.value()).read_all() for message in log_of(kafka, scores, 0)]
        assert len(tables) > 1
        assert pa.concat_tables(tables)["source_offset"].to_pylist() == list(range(9))

    def test_messages_that_are_too_large_are_an_error_of_the_producer(self, kafka: Cluster, topic: Callable[..., str]) -> None:
        producer = KafkaProducer(kafka.bootstrap, {"message.max.bytes": "2000000"})
        producer.send(topic(), b"x" * 1_500_000)
        with pytest.raises(ConnectorError, match=r"too large; let it be larger \(message\.max\.bytes here"):
            producer.flush()

    def test_a_topic_that_gets_partitions_ends_the_node(self, kafka: Cluster, topic: Callable[..., str], tmp_path: Path) -> None:
        """Users are in other partitions from then on. The procedure of the README: stop, add, start."""
        name = topic(2)
        flags = ("--kafka", "topic.metadata.refresh.interval.ms=500", "--snapshot-every", "300ms")
        node = NodeProcess(tmp_path, kafka, name, *flags)
        node.wait_for("ready", 2)
        send(kafka, name, live_rows(200), 2)
        node.wait_for("snapshot", 4)
        kafka.admin.create_partitions([NewPartitions(name, 3)])[name].result()
        assert node.wait() == 1
        assert "has 3 partitions" in node.log.read_text()
        again = NodeProcess(tmp_path, kafka, name, *flags, "--from-start", "--no-check-partition", name="again")
        again.wait_for("ready", 3)
        assert any("partitions then" in each["why"] for each in again.events("no snapshot to go on from"))
        assert again.stop() == 0
        assert check_states(tmp_path, kafka, name, 3) == 200
