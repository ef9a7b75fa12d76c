"""The command `flink`: the engine as a job of Flink, in this process or in a cluster."""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from engine.errors import ConfigError, ConnectorError, EngineError
from engine.flags import add_engine_flags, command, engine_options, extra, seconds, size
from engine.streaming import add_cluster, client_options, wanted
from engine.terminal import Terminated, heed_sigterm

#: Flink's connector for Kafka, by which Maven knows it; and the versions of Java that Flink runs on.
CONNECTOR: Final = "org.apache.flink:flink-sql-connector-kafka:5.0.0-2.2"
_JAVA: Final = (11, 17, 21)
_FLINK: Final = "2.2"

#: The longest transaction that brokers allow by default.
_TRANSACTION_SECONDS: Final = 900

_ANSWER_SECONDS: Final = 10.0

#: Names of librdkafka, which `--kafka` takes as `node` does, for Java's clients; of what is not named here both have the same.
_JAVA_NAMES: Final = {"ssl.ca.location": "ssl.truststore.location", "sasl.mechanisms": "sasl.mechanism"}
_NO_JAVA: Final = ("ssl.certificate.location", "ssl.key.location", "ssl.key.password")
_LOGINS: Final = {
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
}


def add_flink(commands: Any) -> None:
    """Add `riskring flink`."""
    parser = command(
        commands,
        "flink",
        _flink,
        "keep the scores of a Kafka topic inside Flink",
        "In this process, unless --cluster names a JobManager. `flink run -py` takes the file adapters/flink_job.py with the same flags.",
        "riskring flink --brokers localhost:9092 --topic payments --scores-topic scores --jar flink-sql-connector-kafka-5.0.0-2.2.jar",
        "riskring flink --cluster localhost:8081 --checkpoints s3://risk/checkpoints --redis redis://localhost --brokers ... --topic ...",
    )
    add_cluster(parser)
    group = parser.add_argument_group("flink")
    parser.flag("--cluster", group=group, metavar="HOST:PORT", help="JobManager of the cluster that shall run the job")
    parser.flag("--jar", group=group, metavar="FILE", help=f"Flink's connector for Kafka, {CONNECTOR.split(':')[1]}")
    parser.flag("--name", group=group, shown="riskring-TOPIC", metavar="NAME", help="of the job, and of its consumer group")
    parser.flag("--parallelism", group=group, type=size, default=1, metavar="N", help="partitions worked on at a time")
    parser.flag("--max-parallelism", group=group, type=size, default=128, metavar="N", help="the most that it can ever be raised to")
    parser.flag("--checkpoints", group=group, metavar="URI", help="folder of checkpoints, which all of the cluster can reach")
    parser.flag("--checkpoint-every", group=group, default="10s", metavar="DURATION", help="how often one is taken")
    parser.flag("--from-savepoint", group=group, metavar="URI", help="go on from a savepoint or checkpoint; latest: that of --checkpoints")
    parser.flag("--state-backend", group=group, choices=("hashmap", "rocksdb"), default="hashmap", help="where Flink keeps state")
    parser.flag("--restarts", group=group, type=size, default=10, metavar="N", help="how often the job is begun again after failures")
    parser.flag("--restart-delay", group=group, default="1s", metavar="DURATION", help="from a failure to that")
    parser.flag(
        "--exactly-once", group=group, action="store_true", default=False, help="messages to Kafka in transactions, one a checkpoint"
    )
    parser.flag("--flink-option", group=group, action="append", default=[], shown=False, metavar="NAME=VALUE", help="an option of Flink")
    parser.flag("--explain", group=group, action="store_true", default=False, help="print the plan, and end")
    group = parser.add_argument_group("in and out")
    parser.flag("--from-start", group=group, action="store_true", default=False, help="without a savepoint, read the whole log")
    parser.flag(
        "--no-check-partition", group=group, action="store_true", default=False, help="the producers do not partition as Kafka's own do"
    )
    parser.flag("--scores-topic", group=group, metavar="TOPIC", help="where each row goes with its score, as Arrow")
    parser.flag("--changes-topic", group=group, metavar="TOPIC", help="where users go whose scores have changed, as Arrow")
    parser.flag("--dead-letter-topic", group=group, metavar="TOPIC", help="where messages and rows go that were not applied")
    parser.flag("--redis", group=group, metavar="URL,...", help="where scores are published; partition p on server p mod n")
    parser.flag("--redis-file", group=group, metavar="FILE", help="has these URLs, one a line, on each machine: for passwords")
    parser.flag("--prefix", group=group, default="risk:", metavar="TEXT", help="of keys in Redis")
    parser.flag("--tick", group=group, default="250ms", metavar="DURATION", help="how often they are published")
    add_engine_flags(parser, shards=1, clock="wall", time_unit="ms")


def _flink(args: argparse.Namespace) -> int:
    wanted(args, "brokers", "topic")
    _check_flags(args)
    home = _flink_home()
    _check_java()
    jar = _jar(args.jar)
    if args.cluster and "PYFLINK_GATEWAY_PORT" not in os.environ:
        return _submitted(args, home)
    job = _job(args, jar)
    from engine.adapters import flink_job  # noqa: PLC0415 - only where Flink is installed

    if args.explain:
        print(flink_job.explained(job))
        return 0
    heed_sigterm()
    client = flink_job.start(job)
    print(f"riskring: job {client.get_job_id()} of {args.topic} is started", file=sys.stderr)
    if "PYFLINK_GATEWAY_PORT" in os.environ:
        return 0  # `flink run` waits for it, or does not
    try:
        client.get_job_execution_result().result()
    except (KeyboardInterrupt, Terminated):
        with contextlib.suppress(Exception):
            client.cancel().result()
        raise
    except Exception as error:
        raise ConnectorError(f"the job has failed: {flink_job.why(error)}") from error
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    if not (args.redis or args.redis_file or args.scores_topic or args.changes_topic):
        raise ConfigError("flink needs somewhere to put scores: --redis, --scores-topic or --changes-topic")
    if args.redis and args.redis_file:
        raise ConfigError("--redis and --redis-file: give one of them")
    if (args.redis or args.redis_file) and args.changes_topic:
        raise ConfigError("--redis and --changes-topic: changes are told once; run two jobs for two places")
    if (args.redis or args.redis_file) and (args.clock or "wall") != "wall":
        raise ConfigError("--clock event: scores in Redis expire by the clock on the wall; leave --redis or --clock out")
    if args.parallelism < 1 or args.max_parallelism < args.parallelism:
        raise ConfigError(f"--parallelism {args.parallelism}: must be from 1 to --max-parallelism {args.max_parallelism}")
    if args.from_savepoint == "latest" and not args.checkpoints:
        raise ConfigError("--from-savepoint latest: needs --checkpoints, the folder to look into")
    if args.exactly_once and seconds(args.checkpoint_every, "checkpoint-every") >= _TRANSACTION_SECONDS:
        raise ConfigError(f"--checkpoint-every {args.checkpoint_every}: must be less than 15 minutes, after which brokers end transactions")
    topics = [topic for topic in (args.topic, args.scores_topic, args.changes_topic, args.dead_letter_topic) if topic]
    if len(set(topics)) < len(topics):
        raise ConfigError("--topic, --scores-topic, --changes-topic and --dead-letter-topic must be different topics")


# ---- what has to be there ------------------------------------------------------------------------------------------------------------


def _flink_home() -> Path:
    """The folder of PyFlink, which has Flink's scripts."""
    found = importlib.util.find_spec("pyflink")
    if found is None or not found.submodule_search_locations:
        raise EngineError(
            "Flink is not installed beside this riskring; it wants an environment of its own: "
            "python3 -m venv flink && flink/bin/pip install 'riskring[flink]' && flink/bin/riskring flink ..."
        )
    version = importlib.metadata.version("apache-flink")
    if version.split(".")[:2] != _FLINK.split("."):
        raise EngineError(f"apache-flink {version} is installed, and the job is made for {_FLINK}; pip install 'riskring[flink]'")
    return Path(found.submodule_search_locations[0])


def _check_java() -> None:
    found = os.environ.get("JAVA_HOME")
    java = shutil.which(f"{found}/bin/java" if found else "java")
    fix = f"install a JRE of version {', '.join(map(str, _JAVA))} (Debian: openjdk-17-jre-headless), or set JAVA_HOME to one"
    if java is None:
        raise EngineError(f"Flink needs Java, and {f'JAVA_HOME={found} has none' if found else 'there is none'}; {fix}")
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr)
    number = 0 if version is None else int(version[2] or 0) if version[1] == "1" else int(version[1])
    if number < _JAVA[0]:
        raise EngineError(f"{java} is Java {number or 'of an unknown version'}, which Flink does not run on; {fix}")


def _jar(given: str | None) -> Path:
    _, artifact, version = CONNECTOR.split(":")
    fix = f"mvn dependency:copy -Dartifact={CONNECTOR} -DoutputDirectory=. && riskring flink --jar {artifact}-{version}.jar ..."
    if not given:
        raise ConfigError(f"flink needs --jar, Flink's connector for Kafka: {fix}")
    jar = Path(given)
    if not jar.is_file() or jar.read_bytes()[:2] != b"PK":
        raise ConfigError(f"--jar {given}: no jar is there; get it by: {fix}")
    return jar


def _submitted(args: argparse.Namespace, home: Path) -> int:
    """Hand the job over to a cluster by Flink's own client, which runs this command once more."""
    host, _, port = args.cluster.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, ValueError):
        raise ConnectorError(f"--cluster {args.cluster}: no JobManager answers there; start one, or give HOST:PORT of its REST") from None
    words = sys.argv[sys.argv.index("flink") + 1 :]
    point = ["-s", _savepoint(args)] if args.from_savepoint else []
    script = Path(__file__).parent / "adapters" / "flink_job.py"
    run = [str(home / "bin" / "flink"), "run", "-d", "-m", args.cluster, *point, "-pyclientexec", sys.executable, "-py", str(script)]
    done = subprocess.run([*run, *words], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout, end="")
        return 0
    text = done.stdout + done.stderr
    own = re.findall(r"^riskring: error: (.*)$", text, re.MULTILINE)
    if own:  # it has said all
        raise ConnectorError(own[-1])
    causes = re.findall(r"^Caused by: (.*)$", text, re.MULTILINE)
    raise ConnectorError(f"Flink does not take the job: {causes[-1] if causes else text.strip()[-500:]}")


def _savepoint(args: argparse.Namespace) -> str:
    """Where to go on; the newest checkpoint that is complete for "latest"."""
    if args.from_savepoint != "latest":
        return str(args.from_savepoint)
    folder = args.checkpoints.removeprefix("file://")
    found = glob.glob(os.path.join(glob.escape(folder), "*", "chk-*", "_metadata"))
    if not found:
        raise ConfigError(f"--from-savepoint latest: {args.checkpoints} holds no complete checkpoint")
    return os.path.dirname(max(found, key=lambda path: (os.stat(path).st_mtime_ns, path)))


# ---- the job -------------------------------------------------------------------------------------------------------------------------


def _job(args: argparse.Namespace, jar: Path) -> Any:
    from engine.config import Config  # noqa: PLC0415 - start-up
    from engine.hosted import Plan  # noqa: PLC0415 - compiles kernels
    from engine.partition import Topic, beginning  # noqa: PLC0415 - compiles kernels

    with extra("flink"):
        from engine.adapters.flink_job import Job  # noqa: PLC0415 - only where Flink is installed
        from engine.adapters.kafka_producer import KafkaProducer  # noqa: PLC0415 - an extra
        from engine.adapters.kafka_source import KafkaSource  # noqa: PLC0415 - an extra
    options: dict[str, Any] = {"clock": "wall", "time_unit": "ms", "shards": 1} | engine_options(args)
    config = Config.of(**options)
    kafka = client_options(args)
    java = java_options(kafka)
    name = args.name or f"riskring-{args.topic}"
    source = KafkaSource(args.brokers, args.topic, name, "classic", kafka, lambda event, **told: None)
    now_ns = time.time_ns()
    try:
        ends = {number: source.ends(number, now_ns - 2 * config.retention_ns) for number in range(source.partitions)}
    finally:
        source.close()
    producer = KafkaProducer(args.brokers, kafka)
    partitions = [producer.partitions(topic) for topic in (args.scores_topic, args.changes_topic, args.dead_letter_topic) if topic]
    if args.redis:
        with extra("redis"):
            from engine.adapters.redis_sink import RedisSink  # noqa: PLC0415 - an extra
        for url in args.redis.split(","):
            RedisSink(url.strip(), args.prefix).close()
    return Job(
        name=name,
        plan=Plan(
            topic=Topic(args.topic, source.topic_id, source.partitions, name, name),
            beginnings={number: beginning(each, args.from_start, now_ns, config) for number, each in ends.items()},
            engine=options,
            check_partition=not args.no_check_partition,
        ),
        brokers=args.brokers,
        kafka=java,
        scores_topic=args.scores_topic,
        changes_topic=args.changes_topic,
        dead_letter_topic=args.dead_letter_topic,
        partitions=partitions[0] if partitions else 1,
        redis=tuple(url.strip() for url in args.redis.split(",")) if args.redis else (),
        redis_file=args.redis_file,
        prefix=args.prefix,
        tick_ms=max(1, round(1000 * seconds(args.tick, "tick"))),
        exactly_once=args.exactly_once,
        jar=jar,
        flink=_flink_options(args) | ({"execution.state-recovery.path": _savepoint(args)} if args.from_savepoint else {}),
    )


def _flink_options(args: argparse.Namespace) -> dict[str, str]:
    """Options of Flink that the flags stand for; those that were given by their own names win."""
    options = {
        "parallelism.default": str(args.parallelism),
        "pipeline.max-parallelism": str(args.max_parallelism),
        "pipeline.object-reuse": "true",
        "execution.checkpointing.interval": f"{round(1000 * seconds(args.checkpoint_every, 'checkpoint-every'))} ms",
        "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
        "state.backend.type": args.state_backend,
        "restart-strategy.type": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": str(args.restarts),
        "restart-strategy.fixed-delay.delay": f"{round(1000 * seconds(args.restart_delay, 'restart-delay'))} ms",
        # Rows wait for the end of a bundle; a second by default.
        "python.fn-execution.bundle.time": "100",
        "python.executable": sys.executable,
        "python.client.executable": sys.executable,
    }
    if args.checkpoints:
        uri = args.checkpoints if "://" in args.checkpoints else Path(args.checkpoints).resolve().as_uri()
        options["execution.checkpointing.dir"] = uri
    for text in args.flink_option:
        name, is_there, value = text.partition("=")
        if not is_there:
            raise ConfigError(f"--flink-option {text}: must be NAME=VALUE")
        options[name.strip()] = value.strip()
    return options


def java_options(options: dict[str, str]) -> dict[str, str]:
    """Options of librdkafka for Java's clients.

    Raises:
        ConfigError: Java has nothing of the kind.

    Example:
        >>> java_options({"security.protocol": "SSL", "ssl.ca.location": "ca.pem"})
        {'security.protocol': 'SSL', 'ssl.truststore.location': 'ca.pem', 'ssl.truststore.type': 'PEM'}
    """
    found = {_JAVA_NAMES.get(name, name): value for name, value in options.items()}
    for name in _NO_JAVA:
        if name in options:
            raise ConfigError(f"--kafka {name}: Java's clients want a keystore; give --kafka ssl.keystore.location=FILE and the like")
    if "ssl.ca.location" in options:
        found["ssl.truststore.type"] = "PEM"
    user, password = found.pop("sasl.username", None), found.pop("sasl.password", None)
    if user is not None:
        mechanism = found.get("sasl.mechanism", "")
        if mechanism not in _LOGINS:
            raise ConfigError(f"--kafka sasl.mechanism={mechanism}: must be one of {', '.join(_LOGINS)}")
        quoted = [text.replace("\\", "\\\\").replace('"', '\\"') for text in (user, password or "")]
        found["sasl.jaas.config"] = f'{_LOGINS[mechanism]} required username="{quoted[0]}" password="{quoted[1]}";'
    return found
