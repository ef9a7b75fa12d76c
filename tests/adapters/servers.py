"""Real servers for tests: Kafka brokers from Maven's artifacts, and Redis. All on loopback and free ports; each ends what it started.

A broker is Apache Kafka itself in one Java process. Its jars (43 MB) are fetched by Maven once and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import redis
from confluent_kafka.admin import AdminClient, NewTopic

KAFKA = "4.2.0"
LOG4J = "2.24.3"
_START_SECONDS = 60.0


def missing() -> str:
    """What has to be installed before servers can be started; "" if nothing has."""
    commands = {"java": "openjdk-17-jre-headless", "mvn": "maven", "redis-server": "redis-server"}
    return " ".join(package for command, package in commands.items() if shutil.which(command) is None)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(true: Callable[[], Any], seconds: float = 30.0, what: str = "it") -> Any:
    """What a function gives once that is something. Servers are waited for, never slept for."""
    end = time.monotonic() + seconds
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < end, f"{what} has not come within {seconds:.0f} s"
        time.sleep(0.01)


def _die_with_parent() -> None:
    """So that no server stays when the tests are killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Server:
    """A process that can be ended in every manner."""

    def __init__(self, command: list[str], folder: Path, log: str) -> None:
        self.command, self.folder, self.log = command, folder, folder / log
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - takes no lock
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        if self.alive:
            assert self.process is not None
            self._signal(signal.SIGKILL)
            self.process.wait()

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM. Returns the exit code."""
        assert self.process is not None
        if self.alive:
            self._signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def suspend(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)


_DEPENDENCY = "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>"


def kafka_jars() -> Path:
    """The folder of Kafka's jars, fetched if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riskring-tests"
    jars = cache / f"kafka-{KAFKA}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:  # other workers wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():
            artifacts = [("org.apache.kafka", "kafka_2.13", KAFKA)]
            artifacts += [("org.apache.logging.log4j", name, LOG4J) for name in ("log4j-slf4j-impl", "log4j-core")]
            dependencies = "".join(map(_DEPENDENCY.format, *zip(*artifacts, strict=True)))
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                (Path(folder) / "pom.xml").write_text(
                    "<project><modelVersion>4.0.0</modelVersion><groupId>tests</groupId><artifactId>kafka</artifactId><version>1</version>"
                    f"<packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>"
                )
                copy = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=jars"]
                subprocess.run(copy, cwd=folder, check=True, timeout=600)
                (Path(folder) / "jars").rename(jars)
    return jars


_LOG4J = """
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %m (%c)%n
"""


class Cluster:
    """Kafka brokers, each a controller too.

    Args:
        folder: For their data and logs.
        count: How many; with three, each partition is on all of them, and two must have a message before it counts.
    """

    def __init__(self, folder: Path, count: int = 1) -> None:
        self.folder, self.count = folder, count
        ports = free_ports(2 * count)
        self.ports, controllers = ports[:count], ports[count:]
        voters = ",".join(f"{number + 1}@127.0.0.1:{port}" for number, port in enumerate(controllers))
        copies, least = min(count, 3), min(count, 2)
        (folder / "log4j2.properties").write_text(_LOG4J)
        java = ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*"]
        uuid = subprocess.run([*java, "kafka.tools.StorageTool", "random-uuid"], capture_output=True, text=True, check=True)
        self.brokers = []
        for number, (port, controller) in enumerate(zip(self.ports, controllers, strict=True)):
            file = folder / f"broker{number}.properties"
            settings = {
                "process.roles": "broker,controller",
                "node.id": number + 1,
                "controller.quorum.voters": voters,
                "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
                "controller.listener.names": "CONTROLLER",
                "inter.broker.listener.name": "PLAINTEXT",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "log.dirs": folder / f"data{number}",
                "default.replication.factor": copies,
                "min.insync.replicas": least,
                "offsets.topic.replication.factor": copies,
                "offsets.topic.num.partitions": 4,
                "transaction.state.log.replication.factor": copies,
                "transaction.state.log.min.isr": least,
                "group.initial.rebalance.delay.ms": 0,
                "group.min.session.timeout.ms": 1000,
                "group.consumer.min.session.timeout.ms": 1000,
                "group.consumer.min.heartbeat.interval.ms": 200,
                "auto.create.topics.enable": "false",
                "broker.session.timeout.ms": 6000,
                "log.retention.check.interval.ms": 1000,
                "log.initial.task.delay.ms": 500,
            }
            file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
            form = [*java, "kafka.tools.StorageTool", "format", "-t", uuid.stdout.split()[-1], "-c", str(file)]
            subprocess.run(form, check=True, capture_output=True)
            log4j = f"-Dlog4j2.configurationFile=file:{folder}/log4j2.properties"
            run = ["java", "-Xmx512m", log4j, *java[1:], "kafka.Kafka", str(file)]
            self.brokers.append(Server(run, folder, f"broker{number}.log"))
        for broker in self.brokers:
            broker.launch()
        self.wait()

    @property
    def bootstrap(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def wait(self) -> None:
        """Until all brokers are there."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

        def all_there() -> bool:
            assert all(broker.alive for broker in self.brokers), self.brokers[0].log.read_text()[-3000:]
            with suppress(Exception):
                return len(admin.list_topics(timeout=1).brokers) == self.count
            return False

        until(all_there, _START_SECONDS, "the cluster")
        self.admin = admin

    def make_topic(self, name: str, partitions: int, **config: str) -> None:
        wanted = {key.replace("_", "."): value for key, value in config.items()}
        self.admin.create_topics([NewTopic(name, partitions, min(self.count, 3), config=wanted)])[name].result()
        until(lambda: name in self.admin.list_topics(timeout=5).topics, what="the topic")

    def delete_topic(self, name: str) -> None:
        self.admin.delete_topics([name])[name].result()
        until(lambda: name not in self.admin.list_topics(timeout=5).topics, what="the end of the topic")

    def leader(self, topic: str, partition: int = 0) -> Server:
        """The broker that leads a partition."""
        return self.brokers[self.admin.list_topics(topic, timeout=5).topics[topic].partitions[partition].leader - 1]

    def close(self) -> None:
        for broker in self.brokers:
            with suppress(Exception):
                broker.resume()
            broker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Redis(Server):
    """A Redis server that keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        (self.port,) = free_ports(1)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options]
        super().__init__(command, folder, f"redis{self.port}.log")
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again, on its port; it holds nothing."""
        self.launch()

        def answers() -> bool:
            assert self.alive, self.log.read_text()[-2000:]
            with closing(socket.socket()) as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        until(answers, what="Redis")

    def client(self) -> Any:
        return redis.Redis(port=self.port)

    def close(self) -> None:
        with suppress(Exception):
            self.resume()
        self.kill()


def main() -> None:
    """Run a broker with a topic, and a Redis, until Ctrl-C: to try things out. `python -m tests.adapters.servers TOPIC PARTITIONS`."""
    topic, partitions = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        server = Redis(Path(folder))
        cluster.make_topic(topic, partitions)
        print(f"export RISKRING_BROKERS={cluster.bootstrap} RISKRING_TOPIC={topic} RISKRING_REDIS={server.url}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
        server.close()


if __name__ == "__main__":
    main()
