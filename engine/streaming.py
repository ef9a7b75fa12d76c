"""The commands of the streaming node: `node`, and `produce`, which fills its topic."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from engine.errors import ConfigError
from engine.flags import Parser, add_engine_flags, command, engine_options, extra, optional, seconds, size
from engine.serving import Servers, add_server_flags
from engine.terminal import progress, show_aligned, show_json

if TYPE_CHECKING:
    from engine.adapters.metrics import Meters
    from engine.engine import RiskEngine
    from engine.node import Node

#: Rows of an Arrow message: a few hundred kilobytes, below the megabyte that brokers take by default.
_ROWS_PER_MESSAGE: Final = 8192


def add_cluster(parser: Parser) -> None:
    """Add the flags that say where Kafka is."""
    group = parser.add_argument_group("Kafka")
    parser.flag("--brokers", group=group, metavar="HOST:PORT,...", help="where to find the cluster")
    parser.flag("--topic", group=group, metavar="TOPIC", help="which topic")
    parser.flag("--kafka", group=group, action="append", default=[], shown=False, metavar="NAME=VALUE", help="an option of librdkafka")
    parser.flag(
        "--kafka-config", group=group, metavar="FILE", help="options of librdkafka, a NAME=VALUE a line: for passwords and the like"
    )


def client_options(args: argparse.Namespace) -> dict[str, str]:
    """Options of librdkafka: those of the file, and those given one by one.

    Raises:
        ConfigError: One is no NAME=VALUE, or the file cannot be read. Values are not shown.
    """
    lines = list(args.kafka)
    if args.kafka_config:
        try:
            with open(args.kafka_config, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip() and not line.startswith("#")] + lines
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--kafka-config {args.kafka_config}: {error}") from None
    options = {}
    for line in lines:
        name, is_there, value = line.partition("=")
        if not is_there:
            raise ConfigError("--kafka and the lines of --kafka-config are NAME=VALUE; one has no '='")
        options[name.strip()] = value.strip()
    return options


def wanted(args: argparse.Namespace, *names: str) -> None:
    """Demand flags.

    Raises:
        ConfigError: One was not given.
    """
    for name in names:
        if not getattr(args, name.replace("-", "_")):
            raise ConfigError(f"{args.parser.prog.split()[-1]} needs --{name}")


# ---- node ------------------------------------------------------------------------------------------------------------------------


def add_node(commands: Any) -> None:
    """Add `riskring node`."""
    parser = command(
        commands,
        "node",
        _node,
        "keep the scores of a Kafka topic, as a member of a group, and publish them in Redis",
        "`node status` shows what the partitions of a topic say of themselves in Redis.",
        "riskring node --brokers localhost:9092 --topic payments --group risk --state state --redis redis://localhost",
        "riskring node status --redis redis://localhost",
    )
    parser.add_argument("what", nargs="?", choices=("status",), help="show the heartbeats in Redis, and end")
    add_cluster(parser)
    group = parser.add_argument_group("node")
    parser.flag("--group", group=group, metavar="GROUP", help="consumer group; its members share the partitions")
    parser.flag("--group-protocol", group=group, choices=("classic", "consumer"), default="classic", help="how they do (consumer: KIP-848)")
    parser.flag("--state", group=group, metavar="DIR", help="folder or URI of snapshots, the same for all of the group")
    parser.flag("--snapshot-every", group=group, default="30s", metavar="DURATION", help="how often each partition is saved")
    parser.flag("--from-start", group=group, action="store_true", default=False, help="without a snapshot, read the whole log")
    parser.flag(
        "--no-check-partition", group=group, action="store_true", default=False, help="the producers do not partition as Kafka's own do"
    )
    parser.flag("--dead-letter-topic", group=group, metavar="TOPIC", help="where messages and rows go that were not applied")
    parser.flag("--scores-topic", group=group, metavar="TOPIC", help="where each row goes with its score")
    parser.flag("--redis", group=group, metavar="URL,...", help="where scores are published; partition p on server p mod n")
    parser.flag("--prefix", group=group, default="risk:", metavar="TEXT", help="of keys in Redis")
    parser.flag("--tick", group=group, default="250ms", metavar="DURATION", help="how often they are published")
    parser.flag("--owner", group=group, shown="host:process", metavar="NAME", help="what this node calls itself")
    parser.flag("--metrics", group=group, metavar="HOST:PORT", help="answer Prometheus there")
    parser.flag("--log", group=group, choices=("logfmt", "json"), default="logfmt", help="form of the log, on standard error")
    add_server_flags(parser, None, None)
    add_engine_flags(parser, shards=1, clock="wall", time_unit="ms")


def _node(args: argparse.Namespace) -> int:
    if args.what == "status":
        return _status(args)
    wanted(args, "brokers", "topic", "group")
    from engine.node import Node, Plan  # noqa: PLC0415 - compiles kernels

    options: dict[str, Any] = {"clock": "wall", "time_unit": "ms", "shards": 1} | engine_options(args)
    if args.redis and options["clock"] != "wall":
        raise ConfigError("--clock event: scores in Redis expire by the clock on the wall; leave --redis or --clock out")
    if args.no_check_partition and (optional(args.http or "none") or optional(args.flight or "none")):
        raise ConfigError(
            "--no-check-partition: whose users are in which partition is not known, so that --http and --flight cannot answer"
        )
    plan = Plan(
        topic=args.topic,
        group=args.group,
        owner=args.owner or f"{socket.gethostname()}:{os.getpid()}",
        engine=options,
        state=args.state,
        from_start=args.from_start,
        check_partition=not args.no_check_partition,
        tick_seconds=seconds(args.tick, "tick"),
        snapshot_seconds=seconds(args.snapshot_every, "snapshot-every"),
    )
    with extra("kafka"):
        from engine.adapters.kafka_producer import KafkaOutput, KafkaProducer  # noqa: PLC0415 - an extra
        from engine.adapters.kafka_source import KafkaSource  # noqa: PLC0415 - an extra
        from engine.adapters.logs import logger  # noqa: PLC0415 - an extra
        from engine.adapters.metrics import Meters  # noqa: PLC0415 - an extra
    log = logger(args.log == "json")
    servers = Servers(args, os.environ, log)
    meters, sinks = Meters(), _sinks(args)
    kafka = client_options(args)
    source = KafkaSource(
        args.brokers, args.topic, args.group, args.group_protocol, kafka, lambda event, **told: log("warning", event, **told)
    )
    output = None
    if args.dead_letter_topic or args.scores_topic:
        output = KafkaOutput(KafkaProducer(args.brokers, kafka), args.topic, args.dead_letter_topic, args.scores_topic)
    node = Node(plan, source, sinks, output, log, time.time_ns, meters)
    meters.show(node)
    if args.metrics:
        meters.serve(args.metrics)
    if servers.wanted:
        _answer(servers, node, source.partitions, options, meters)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    told = {"topic": args.topic, "topic_id": source.topic_id, "partitions": source.partitions, "group": args.group, "state": args.state}
    log("info", "node", owner=plan.owner, redis=[sink.where for sink in sinks], **told)
    try:
        node.run()
    finally:
        servers.stop()
    log("info", "ended", owner=plan.owner)
    return 0


def _answer(servers: Servers, node: Node, partitions: int, options: dict[str, Any], meters: Meters) -> None:
    """Let others ask the partitions that are here and have caught up."""
    from engine.config import Config  # noqa: PLC0415 - start-up
    from engine.measurements import resident_bytes  # noqa: PLC0415 - start-up
    from engine.partition import READY  # noqa: PLC0415 - compiles kernels
    from engine.pulse import Pulse  # noqa: PLC0415 - compiles kernels
    from engine.service import Service  # noqa: PLC0415 - compiles kernels

    def engines() -> dict[int, RiskEngine]:
        return {number: partition.engine for number, partition in list(node.partitions.items()) if partition.state == READY}

    def why_not() -> str | None:
        for number, partition in sorted(node.partitions.items()):
            if partition.state != READY:
                behind = "" if partition.lag is None else f", {partition.lag:,} messages behind"
                return f"partition {number} is {partition.state.replace('_', ' ')}{behind}"
        return None if node.partitions else "this node has no partition"

    service = Service(Config.of(**options), engines, time.time_ns, partitions, why_not)
    meters.show_lookups(service)
    servers.start(service, meters, Pulse(service, time.time_ns, time.monotonic, resident_bytes).text)
    signal.signal(signal.SIGHUP, lambda *_: servers.read_token_again())


def _sinks(args: argparse.Namespace) -> list[Any]:
    if not args.redis:
        return []
    with extra("redis"):
        from engine.adapters.redis_sink import RedisSink  # noqa: PLC0415 - an extra
    return [RedisSink(url.strip(), args.prefix) for url in args.redis.split(",")]


def _status(args: argparse.Namespace) -> int:
    wanted(args, "redis")
    with extra("redis"):
        from engine.adapters.redis_cache import heartbeats  # noqa: PLC0415 - an extra

    rows = heartbeats([url.strip() for url in args.redis.split(",")], args.prefix, time.time_ns())
    if args.json:
        show_json(rows)
    elif rows:
        show_aligned([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)], (1, 2, 4))
    else:
        print("riskring: no partition has published anything there", file=sys.stderr)
    return 0


# ---- produce ---------------------------------------------------------------------------------------------------------------------


def add_produce(commands: Any) -> None:
    """Add `riskring produce`."""
    parser = command(
        commands,
        "produce",
        _produce,
        "send the rows of files to a Kafka topic",
        "A user's rows go to one partition, in order, each once. Texts, and integer times in JSON, are sent as they are: the node needs "
        "the same --time-unit for them.",
        "riskring produce payments.parquet --brokers localhost:9092 --topic payments",
        "riskring generate --rows 1M -o - | riskring produce - --brokers localhost:9092 --topic payments --format json --rate 50k",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="Parquet, Arrow IPC, CSV or NDJSON file, folder, glob, or -")
    add_cluster(parser)
    group = parser.add_argument_group("messages")
    parser.flag("--format", group=group, choices=("arrow", "json"), default="arrow", help="many rows a message, or one")
    parser.flag(
        "--rows-per-message", group=group, type=size, default=_ROWS_PER_MESSAGE, shown="8192", metavar="N", help="of --format arrow"
    )
    parser.flag("--rate", group=group, type=size, metavar="N", help="rows a second at most")
    add_engine_flags(parser)


def _produce(args: argparse.Namespace) -> int:
    wanted(args, "brokers", "topic")
    if args.rows_per_message < 1 or (args.rate is not None and args.rate < 1):
        raise ConfigError("--rows-per-message and --rate must be at least 1")
    with extra("kafka"):
        from engine.adapters.kafka_producer import KafkaProducer  # noqa: PLC0415 - an extra
    from engine.config import Config  # noqa: PLC0415 - start-up
    from engine.produce import messages_of  # noqa: PLC0415 - imports pyarrow

    config = Config.of(**engine_options(args))
    producer = KafkaProducer(args.brokers, client_options(args))
    partitions = producer.partitions(args.topic)
    sent = rows = 0
    began = time.monotonic()
    try:
        with progress(quiet=args.quiet) as advance:
            limits = args.rows_per_message, producer.value_bytes_max
            for count, key, partition, value in messages_of(args.files, config, partitions, args.format, *limits):
                if args.rate:
                    time.sleep(max(began + rows / args.rate - time.monotonic(), 0))
                producer.send(args.topic, value, key, partition)
                rows, sent = rows + count, sent + 1
                advance(rows)
    finally:
        try:
            producer.flush()
        finally:
            if not args.quiet:
                seconds = max(time.monotonic() - began, 1e-9)
                missing = f", of which {producer.delivered:,} have arrived" if producer.delivered < sent else ""
                done = f"{rows:,} rows in {sent:,} messages to {args.topic}{missing}, {rows / seconds:,.0f} rows/s"
                print(f"riskring: {done}", file=sys.stderr)
    return 0
