"""The engine inside Flink: on a real Flink, a real broker and a real Redis, while processes are killed.

`RISKRING_FLINK_KILLS=100` kills a hundred times; `python -m pytest -m flink tests/adapters` runs these tests at all.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Consumer, TopicPartition

from tests.adapters.brokers import Cluster
from tests.adapters.flink import FlinkCluster, connector, environment, python, run
from tests.adapters.nodes import OPTIONS, Flow, check_redis, ends_of, judged, live_rows, log_of, published, send
from tests.adapters.processes import LOOPBACK, Process, until
from tests.adapters.redis_servers import Redis

pytestmark = [pytest.mark.flink, pytest.mark.servers]

KILLS = int(os.environ.get("RISKRING_FLINK_KILLS", "10"))
ENGINE = ["--window", OPTIONS["window"], "--users", str(OPTIONS["users"])]


@pytest.fixture(scope="module")
def numba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of kernels for all workers."""
    given = os.environ.get("RISKRING_FLINK_NUMBA_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("numba")


@pytest.fixture
def flink(tmp_path: Path, numba: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FlinkCluster]]:
    """Starts stand-alone clusters for one test."""
    monkeypatch.setenv("RISKRING_FLINK_NUMBA_CACHE", str(numba))
    with ExitStack() as started:

        def make(**named: Any) -> FlinkCluster:
            return started.enter_context(closing(FlinkCluster(tmp_path / "flink", **named)))

        yield make


@pytest.fixture
def job(tmp_path: Path, numba: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    """Starts `riskring flink` in a process of its own, which is all of Flink."""
    monkeypatch.setenv("RISKRING_FLINK_NUMBA_CACHE", str(numba))
    started: list[Process] = []

    def start(cluster: Cluster, topic: str, *flags: str) -> Process:
        folder = tmp_path / f"local-{len(started)}"
        (folder / "log").mkdir(parents=True)
        words = ["flink", "--brokers", cluster.bootstrap, "--topic", topic, "--jar", str(connector()), *ENGINE, *flags]
        process = Process([python(), "-m", "engine.cli", *words], folder / "out", local(folder))
        started.append(process)
        process.launch()
        return process

    yield start
    for process in started:
        process.kill()


def local(folder: Path) -> dict[str, str]:
    """Without a cluster, Flink's configuration is that of the wheel."""
    return {name: value for name, value in environment(folder).items() if name != "FLINK_CONF_DIR"}


def resting(text: str) -> dict[int, dict[str, str]]:
    """What each partition told when it last rested, by partition."""
    found = {}
    for line in sorted(re.findall(r"(.*riskring: resting .*)", text)):  # each begins with its time, and there may be several logs
        told = dict(re.findall(r"(\w+)=(\S+)", line))
        found[int(told["partition"])] = told
    return found


def wait_resting(log: Callable[[], str], ends: list[int], seconds: float = 120) -> dict[int, dict[str, str]]:
    """Until all partitions rest at the ends of their logs."""

    def there() -> dict[int, dict[str, str]]:
        found = resting(log())
        return found if all(number in found and int(found[number]["position"]) == end for number, end in enumerate(ends)) else {}

    try:
        return until(there, seconds, f"partitions that rest at {ends}")
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{resting(log())}\n{log()[-3000:]}") from None


def check_digests(found: dict[int, dict[str, str]], cluster: Cluster, topic: str, **options: Any) -> None:
    """Each partition is what an engine makes of its log."""
    for number, told in found.items():
        with judged(log_of(cluster, topic, number), 2**62, **options) as judge:
            assert told["digest"] == judge.digest()
            assert int(told["transactions"]) == judge.stats().transactions


def committed(cluster: Cluster, topic: str) -> list[Any]:
    """Messages of partition 0 that a reader of committed ones sees."""
    settings = {"bootstrap.servers": cluster.bootstrap, "group.id": "judge", "enable.auto.commit": False, "log_level": 0}
    consumer = Consumer({**settings, "isolation.level": "read_committed", "enable.partition.eof": True})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        found: list[Any] = []
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for message in consumer.consume(10_000, 0.2):
                if message.error() is not None:
                    return found
                found.append(message)
        raise TimeoutError(f"{topic}: no end")
    finally:
        consumer.close()


def scored(messages: list[Any]) -> tuple[dict[tuple[int, int, int], float], int]:
    """Scores by partition, offset and row; and how many came again. Those that did are the same."""
    found: dict[tuple[int, int, int], float] = {}
    again = 0
    for message in messages:
        table = pa.ipc.open_stream(message.value()).read_all()
        places = zip(*(table[name].to_pylist() for name in ("source_partition", "source_offset", "source_row")), strict=True)
        for place, score in zip(places, table["score"].to_pylist(), strict=True):
            again += place in found
            assert found.setdefault(place, score) == score
    return found, again


def expected_scores(cluster: Cluster, topic: str, partitions: int, **options: Any) -> dict[tuple[int, int, int], float]:
    """What each row's score must be, by an engine that reads the logs."""
    found = {}
    for number in range(partitions):
        with judged([], 0, **options) as judge:
            for message in log_of(cluster, topic, number):
                value = message.value()
                if value[:1] == b"{":
                    row = json.loads(value)
                    scores = [judge.add(row["user_id"], row["amount"], row["timestamp"])]
                else:
                    scores = judge.ingest(pa.ipc.open_stream(value).read_all(), scores=True).scores.to_pylist()
                found |= {(number, message.offset(), row): score for row, score in enumerate(scores)}
    return found


class TestLocal:
    def test_whole_messages_in_both_formats(self, job: Callable[..., Process], kafka: Cluster, redis_server: Redis) -> None:
        topic, scores, letters = kafka.new_topic(2), kafka.new_topic(1), kafka.new_topic(1)
        send(kafka, topic, live_rows(1500), 2)
        send(kafka, topic, live_rows(3000), 2, "arrow")
        out = ["--scores-topic", scores, "--dead-letter-topic", letters, "--redis", redis_server.url]
        running = job(kafka, topic, "--from-start", "--parallelism", "2", "--checkpoint-every", "1s", *out)
        found = wait_resting(running.printed, ends_of(kafka, topic, 2))
        assert {told["state"] for told in found.values()} == {"ready"}
        assert sum(int(told["accepted"]) for told in found.values()) == 4500
        check_digests(found, kafka, topic)
        until(lambda: published(redis_server.client(), topic, 2, ends_of(kafka, topic, 2)), what="scores in Redis")
        assert check_redis(redis_server.client(), kafka, topic, 2) == 200
        until(lambda: len(scored(log_of(kafka, scores, 0))[0]) == 4500, what="scores of rows")
        assert scored(log_of(kafka, scores, 0)) == (expected_scores(kafka, topic, 2), 0)

        bad = [b"{", b'{"user_id": "x", "amount": "much", "timestamp": 1}', b"\xff", None]
        producer = kafka.producer()
        for value in bad:
            producer.produce(topic, value, partition=0)
        assert producer.flush(60) == 0
        until(lambda: len(log_of(kafka, letters, 0)) >= len(bad), what="dead letters")
        assert running.stop() == 143
        told = [(dict(message.headers()), message.value()) for message in log_of(kafka, letters, 0)]
        assert sorted(value or b"" for _, value in told) == sorted(value or b"" for value in bad)
        assert {(headers["topic"].decode(), headers["partition"]) for headers, _ in told} == {(topic, b"0")}
        assert sorted(headers["reason"].decode() for headers, _ in told) == ["null_amount", *["undecodable"] * 3]

    def test_changes(self, job: Callable[..., Process], kafka: Cluster) -> None:
        """Whoever takes the last message of each user has every score."""
        topic, changes = kafka.new_topic(2), kafka.new_topic(2)
        send(kafka, topic, live_rows(1000), 2)
        running = job(kafka, topic, "--from-start", "--changes-topic", changes, "--checkpoint-every", "1s", "--state-backend", "rocksdb")
        wait_resting(running.printed, ends_of(kafka, topic, 2))
        send(kafka, topic, live_rows(1000, users=50, seed=2), 2)
        wait_resting(running.printed, ends_of(kafka, topic, 2))

        def last() -> tuple[dict[str, float], dict[str, bytes]]:
            found: dict[str, float] = {}
            headers: dict[str, bytes] = {}
            for message in log_of(kafka, changes, 0) + log_of(kafka, changes, 1):
                table = pa.ipc.open_stream(message.value()).read_all()
                found |= dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))
                headers = dict(message.headers())
            return found, headers

        expected = {}
        for number in range(2):
            with judged(log_of(kafka, topic, number), 2**62) as judge:
                table = judge.features()
                expected |= dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))
        until(lambda: last()[0] == expected, what="all changes")
        names = {"topic", "partition", "position", "at", "state", "exact_from", "everybody", "part", "parts"}
        assert set(last()[1]) == names
        assert running.stop() == 143

    def test_the_plan(self, kafka: Cluster, tmp_path: Path) -> None:
        topic, scores = kafka.new_topic(2), kafka.new_topic(1)
        words = ["--brokers", kafka.bootstrap, "--topic", topic, "--scores-topic", scores, "--jar", str(connector()), "--explain"]
        done = run([python(), "-m", "engine.cli", "flink", *words], local(tmp_path), 120)
        assert done.returncode == 0, done.stderr
        assert "== Operators ==" in done.stdout and "engine (parallelism 1) <-" in done.stdout and "sink0" in done.stdout

    def test_addresses_at_which_nobody_is(self, kafka: Cluster, free_port: int, tmp_path: Path) -> None:
        topic, nobody = kafka.new_topic(1), f"{LOOPBACK}:{free_port}"
        here = ["--brokers", kafka.bootstrap, "--topic", topic, "--scores-topic", kafka.new_topic(1)]
        for words, told in (
            (["--brokers", nobody, "--topic", topic, "--scores-topic", "scores"], f"Kafka at {nobody}"),
            ([*here[:3], "no-topic", *here[4:]], "topic 'no-topic' does not exist"),
            ([*here[:5], "no-topic"], "topic 'no-topic' does not exist"),
            ([*here, "--redis", f"redis://{nobody}"], f"Redis at {nobody}"),
            ([*here, "--cluster", nobody], f"--cluster {nobody}: no JobManager answers there"),
        ):
            done = run([python(), "-m", "engine.cli", "flink", *words, "--jar", str(connector())], local(tmp_path), 120)
            lines = [line for line in done.stderr.splitlines() if "rdkafka" not in line]
            assert (done.returncode, len(lines), told in lines[-1]) == (1, 1, True), done.stderr


class TestCluster:
    def test_whatever_is_killed(self, flink: Callable[..., FlinkCluster], own_kafka: Callable[..., Cluster], redis_server: Redis) -> None:
        """TaskManagers at random, a broker, the JobManager; each partition is what its log makes it, and each score is there once."""
        kafka, choose = own_kafka(), random.Random(KILLS)
        topic, scores = kafka.new_topic(4), kafka.new_topic(1)
        cluster = flink(managers=2, slots=1)
        words = ["flink", "--cluster", cluster.address, "--brokers", kafka.bootstrap, "--topic", topic, "--scores-topic", scores, *ENGINE]
        words += ["--redis", redis_server.url, "--exactly-once", "--checkpoints", str(cluster.checkpoints), "--checkpoint-every", "1s"]
        words += ["--jar", str(connector()), "--restarts", "100000", "--restart-delay", "500ms"]
        submit(cluster, *words, "--from-start", "--parallelism", "2")
        job = cluster.wait_running()
        flow = Flow(kafka, topic, 10**9, 4, per_second=2000)
        cluster.wait_checkpoint(job)
        for kill in range(KILLS):
            time.sleep(choose.random())
            victim = choose.choice(cluster.task_managers)
            victim.kill()
            victim.launch()
            if kill == KILLS // 2:
                kafka.broker(0).kill()
                time.sleep(2)
                kafka.heal()
            assert cluster.wait_running() == job
            if choose.random() < 0.7:
                cluster.wait_checkpoint(job)
        cluster.wait_checkpoint(job)
        cluster.job_manager.kill()
        cluster.job_manager.launch()
        cluster.wait_ready()
        submit(cluster, *words, "--parallelism", "1", "--from-savepoint", "latest")
        job = cluster.wait_running()
        cluster.wait_checkpoint(job)
        sent = flow.end(at_once=True)
        found = wait_resting(cluster.log, ends_of(kafka, topic, 4))
        check_digests(found, kafka, topic)
        until(lambda: published(redis_server.client(), topic, 4, ends_of(kafka, topic, 4)), what="scores in Redis")
        assert check_redis(redis_server.client(), kafka, topic, 4) == 200
        cluster.stop(job)
        expected = expected_scores(kafka, topic, 4)
        assert len(expected) == sent
        assert scored(committed(kafka, scores)) == (expected, 0)
        # None of the workers whose TaskManagers were killed is left.
        until(lambda: workers(cluster) == [], what="the end of all workers")

    def test_without_transactions(self, flink: Callable[..., FlinkCluster], kafka: Cluster) -> None:
        """Scores come again as they were. Messages leave the state. Savepoints, another parallelism; and nothing comes after a restore."""
        window = {"window": "5s", "lateness": "2s"}
        topic, scores = kafka.new_topic(3), kafka.new_topic(1)
        cluster = flink(managers=1, slots=2)
        words = ["--brokers", kafka.bootstrap, "--topic", topic, "--scores-topic", scores, "--window", "5s", "--lateness", "2s"]
        words += ["--checkpoints", str(cluster.checkpoints), "--checkpoint-every", "1s", "--jar", str(connector()), "--restarts", "1000"]
        words += ["--state-backend", "rocksdb"]
        script = str(Path(__file__).parents[2] / "engine" / "adapters" / "flink_job.py")
        done = cluster.flink("run", "-d", "-pyclientexec", python(), "-py", script, *words, "--from-start", "--parallelism", "2")
        assert done.returncode == 0, done.stderr
        job = cluster.wait_running()
        flow = Flow(kafka, topic, 10**9, 3, per_second=2000)
        cluster.wait_checkpoint(job)
        cluster.task_managers[0].kill()
        cluster.task_managers[0].launch()
        cluster.wait_running()
        cluster.wait_checkpoint(job)
        point = cluster.stop(job)
        submit(cluster, "flink", "--cluster", cluster.address, *words, "--parallelism", "1", "--from-savepoint", point)
        job = cluster.wait_running()
        sent = flow.end(at_once=True)
        found = wait_resting(cluster.log, ends_of(kafka, topic, 3))
        check_digests(found, kafka, topic, **window)
        cluster.wait_checkpoint(job)
        expected = expected_scores(kafka, topic, 3, **window)
        assert len(expected) == sent
        assert scored(log_of(kafka, scores, 0))[0] == expected
        for _ in range(2):
            cluster.wait_checkpoint(job)
            cluster.cancel(job)
            before = len(cluster.log())
            submit(cluster, "flink", "--cluster", cluster.address, *words, "--parallelism", "2", "--from-savepoint", "latest")
            job = cluster.wait_running()
            assert wait_resting(lambda before=before: cluster.log()[before:], ends_of(kafka, topic, 3)).keys() == found.keys()


def submit(cluster: FlinkCluster, *words: str) -> None:
    done = cluster.riskring(*words)
    assert done.returncode == 0, done.stderr


def workers(cluster: FlinkCluster) -> list[int]:
    """Workers of Python that belong to a cluster, dead or alive, by what is in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(cluster.folder / "log").encode() in path.read_bytes() and b"beam" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
