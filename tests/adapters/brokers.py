"""Kafka clusters of one or three brokers as processes of the test run, on ports of their own.

Each broker is a controller, too (KRaft). A broker's index is its `node.id`, from 0.
"""

from __future__ import annotations

import base64
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.kafka_jars import jars
from tests.adapters.processes import Port, Process, until

confluent_kafka = pytest.importorskip("confluent_kafka")
admin = pytest.importorskip("confluent_kafka.admin")

JAVA = ["java", "-Xmx512m", "-XX:TieredStopAtLevel=1"]
OFFSETS = "__consumer_offsets"
READY = "Kafka Server started"
# A log to the very end: Java would stop logging as soon as a broker is asked to stop.
LOGGING = """
shutdownHook = disable
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{ISO8601} %p %m (%c{1})%n
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""

#: Each default that would make a test slow or let it pass by accident.
CONFIG = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    # Nobody else gets the partitions of a broker that died, nor does it itself when it is back, before its session has ended.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "offsets.topic.num.partitions": "3",
    "transaction.state.log.num.partitions": "3",
    # Messages of any Kafka time are kept, unless a topic is made with `retention.ms`; then old ones are gone within seconds, not minutes.
    "log.retention.ms": "-1",
    "log.retention.check.interval.ms": "1000",
    "log.initial.task.delay.ms": "500",
    # A member that died is missed after 6 s, or sooner if a test's clients ask for it: 45 s by default, and no less than 6.
    "group.min.session.timeout.ms": "500",
    "group.consumer.min.session.timeout.ms": "500",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "100",
    "group.consumer.heartbeat.interval.ms": "500",
}
CONFIG_OF_ONE = {
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
}
CONFIG_OF_THREE = {
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
}
#: The clients made here: they find a broker that came back at once, and one that stands still costs them two seconds.
CLIENT = {"reconnect.backoff.max.ms": 200, "socket.timeout.ms": 2_000, "log_level": 0}
PRODUCER = {"enable.idempotence": True, "linger.ms": 0, "request.timeout.ms": 5_000}
CONSUMER = {"enable.auto.commit": False, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 20}


class Broker:
    """One broker of a cluster, with the data in its folder."""

    def __init__(self, folder: Path, config: Mapping[str, str], lib: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.log = folder / "log"
        self._properties = folder / "broker.properties"
        lines = {**config, "log.dirs": str(folder / "data")}
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        (folder / "log4j2.properties").write_text(LOGGING)
        self._java = [*JAVA, f"-Dlog4j2.configurationFile=file:{folder / 'log4j2.properties'}", "-cp", f"{lib}/*"]
        self.process = Process([*self._java, "kafka.Kafka", str(self._properties)], self.log)

    def format(self, cluster_id: str) -> Process:
        """Begin to lay out the empty folder of data; the process ends when that is done."""
        command = [*self._java, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(self._properties)]
        process = Process(command, self.folder / "format.log")
        process.launch()
        return process

    @property
    def alive(self) -> bool:
        """Whether it runs, be it suspended."""
        return self.process.alive

    def start(self) -> None:
        """Start it on its data, and wait until it serves."""
        self.process.start(READY)

    def kill(self) -> None:
        """End it by SIGKILL: what it did not write is lost."""
        self.process.kill()

    def stop(self) -> None:
        """End it in order: it hands its partitions over first."""
        self.process.stop()

    def suspend(self) -> None:
        """Let it stand still, all connections open."""
        self.process.suspend()

    def resume(self) -> None:
        self.process.resume()


class Cluster:
    """One or three brokers below `folder`, serving when this returns; `config` goes into each broker's properties.

    Attributes:
        bootstrap: `HOST:PORT,...` of all brokers, for clients.
        brokers: the brokers, by index.
        admin: a `confluent_kafka.admin.AdminClient`.
    """

    def __init__(self, folder: Path, count: int = 1, config: Mapping[str, str] | None = None) -> None:
        lib = jars()
        self._ports = [(Port(), Port()) for _ in range(count)]
        self.bootstrap = ",".join(clients.address for clients, _ in self._ports)
        voters = ",".join(f"{index}@{control.address}" for index, (_, control) in enumerate(self._ports))
        common = CONFIG | (CONFIG_OF_ONE if count == 1 else CONFIG_OF_THREE) | {"controller.quorum.voters": voters} | dict(config or {})
        self.brokers = []
        for index, (clients, control) in enumerate(self._ports):
            own = {
                "node.id": str(index),
                "listeners": f"PLAINTEXT://{clients.address},CONTROLLER://{control.address}",
                "advertised.listeners": f"PLAINTEXT://{clients.address}",
            }
            self.brokers.append(Broker(folder / f"broker-{index}", common | own, lib))
        self._topics = 0
        self._producer: Any = None
        self.admin = admin.AdminClient(CLIENT | {"bootstrap.servers": self.bootstrap})
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        # In base64 it must not begin with "-", which StorageTool would take for an option.
        cluster_id = base64.urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("=")
        formats = [broker.format(cluster_id) for broker in self.brokers]
        for process in formats:
            if status := process.wait():
                raise RuntimeError(f"StorageTool ended with status {status}:\n{process.printed()}")
        self.heal()

    def broker(self, index: int) -> Broker:
        return self.brokers[index]

    def heal(self) -> None:
        """Whatever was done to the brokers: all run and know of each other when this returns."""
        for broker in self.brokers:
            broker.resume()
            if not broker.alive:
                broker.process.launch()
        for broker in self.brokers:
            broker.process.wait_ready(READY)
        until(lambda: set(self.metadata().brokers) == set(range(len(self.brokers))), what="all brokers are known")

    def close(self) -> None:
        """End all brokers for good; logs stay, data goes."""
        self.admin = self._producer = None  # they would go on looking for brokers, and the ports may soon be another cluster's
        for broker in self.brokers:
            broker.kill()
            shutil.rmtree(broker.folder / "data", ignore_errors=True)
        for port in (port for ports in self._ports for port in ports):
            port.close()

    # Who does what.

    def metadata(self, topic: str | None = None) -> Any:
        """A `confluent_kafka.admin.ClusterMetadata`, of all topics or one; as long as no broker answers, it is asked for again."""

        def ask() -> Any:
            try:
                return self.admin.list_topics(topic, timeout=2.0)
            except confluent_kafka.KafkaException:
                return None

        return until(ask, what="a broker answers")

    def partitions(self, topic: str) -> dict[int, Any]:
        """The `PartitionMetadata` of a topic's partitions, empty if there is no such topic."""
        return dict(self.metadata(topic).topics[topic].partitions)

    def leader(self, topic: str, partition: int = 0) -> int:
        """Index of the broker that leads a partition. A dead one is still said to until it has been missed, after some seconds."""

        def known() -> list[int]:
            found = self.partitions(topic).get(partition)
            return [found.leader] if found is not None and found.leader >= 0 else []

        return until(known, what=f"partition {partition} of {topic} has a leader")[0]

    def coordinator(self, group: str) -> int:
        """Index of the broker that coordinates a group, be there such a group or not: who leads the partition of its offsets.

        A client that is asked remembers a coordinator that died, and goes on asking it.
        """

        def count() -> int:
            partitions = len(self.partitions(OFFSETS))
            if not partitions:  # Kafka makes the topic when it is first asked for a coordinator
                asked = self.admin.describe_consumer_groups([group], request_timeout=2.0)
                asked[group].exception()
            return partitions

        partitions = until(count, what=f"the topic {OFFSETS}")
        return self.leader(OFFSETS, abs(_java_hash(group)) % partitions)

    def controller(self) -> int:
        """Index of the broker that was last to become the active controller.

        Clients are told a random broker instead, so it is read from the logs.
        """
        became = re.compile(r"Becoming the active controller at epoch (\d+)")
        epochs = [(int(epoch), index) for index, broker in enumerate(self.brokers) for epoch in became.findall(broker.log.read_text())]
        return max(epochs)[1]

    # Topics and what is in them.

    def create_topic(
        self, name: str, partitions: int = 1, *, replication: int | None = None, config: Mapping[str, str] | None = None
    ) -> None:
        """Make a topic, and wait until each of its partitions has a leader. `replication` is by default on all brokers."""
        replication = len(self.brokers) if replication is None else replication
        made = admin.NewTopic(name, partitions, replication, config=dict(config or {}))
        self.admin.create_topics([made])[name].result()

        def led() -> bool:
            found = self.partitions(name).values()
            return len(found) == partitions and all(partition.leader >= 0 for partition in found)

        until(led, what=f"{name} has its {partitions} partitions")

    def new_topic(self, partitions: int = 1, *, replication: int | None = None, config: Mapping[str, str] | None = None) -> str:
        """Make a topic with a name that no other topic of this cluster has, and return the name."""
        self._topics += 1
        name = f"topic-{self._topics}"
        self.create_topic(name, partitions, replication=replication, config=config)
        return name

    def delete_topic(self, name: str) -> None:
        """Delete a topic, and wait until it is no longer told of."""
        self.admin.delete_topics([name])[name].result()
        until(lambda: not self.partitions(name), what=f"{name} is gone")

    def producer(self, **options: Any) -> Any:
        """A new `confluent_kafka.Producer` that is idempotent and waits for all replicas; options with `_` for `.`."""
        return confluent_kafka.Producer(CLIENT | PRODUCER | {"bootstrap.servers": self.bootstrap} | _dotted(options))

    def send(self, topic: str, values: Iterable[bytes], *, partition: int = 0, key: bytes | None = None, timestamp_ms: int = 0) -> None:
        """Put messages into a partition and wait until all are safe; `timestamp_ms` is their Kafka time, 0 for now."""
        if self._producer is None:
            self._producer = self.producer()  # kept: an idempotent one needs half a second to begin
        errors: list[Any] = []
        for value in values:
            self._producer.produce(topic, value, key, partition, on_delivery=lambda error, _: errors.append(error), timestamp=timestamp_ms)
        assert self._producer.flush(60) == 0, "messages are still on their way after 60 s"
        assert not any(errors), errors

    def consumer(self, group: str, **options: Any) -> Any:
        """A new `confluent_kafka.Consumer` that commits nothing by itself and starts at the beginning; options with `_` for `.`."""
        own = {"bootstrap.servers": self.bootstrap, "group.id": group}
        return confluent_kafka.Consumer(CLIENT | CONSUMER | own | _dotted(options))

    def read(self, topic: str) -> list[Any]:
        """All messages of a topic (`confluent_kafka.Message`), partition by partition, in order."""
        consumer = self.consumer("reader", enable_partition_eof=True)
        found: dict[int, list[Any]] = {partition: [] for partition in self.partitions(topic)}
        unread = set(found)
        # Offset 0 is there at once, or out of range and the earliest then; OFFSET_BEGINNING is asked for, which takes half a second.
        consumer.assign([confluent_kafka.TopicPartition(topic, partition, 0) for partition in found])

        def read_on() -> bool:
            for message in consumer.consume(1_000, 0.05):
                if message.error() is None:
                    found[message.partition()].append(message)
                elif message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
                elif not message.error().retriable():
                    raise confluent_kafka.KafkaException(message.error())
            return not unread

        try:
            until(read_on, what=f"the end of {topic}")
        finally:
            consumer.close()
        return [message for partition in sorted(found) for message in found[partition]]


def _dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "."): value for name, value in options.items()}


def _java_hash(text: str) -> int:
    """What Java's `String.hashCode` is, of ASCII text."""
    value = 0
    for byte in text.encode("ascii"):
        value = (31 * value + byte) & 0xFFFF_FFFF
    return value - (value >> 31 << 32)
