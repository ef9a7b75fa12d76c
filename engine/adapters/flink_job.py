"""The engine inside Flink: a PyFlink job that keeps the scores of a Kafka topic, within the cluster's checkpoints.

    Kafka -> by partition -> [messages kept in Flink's state -> engine] -> Kafka (scores, changes, dead letters), Redis

A message is kept in keyed state when it comes, and applied with others, at a tick at the latest. What the engine tells goes out by
Flink's own Kafka sinks: none of it is lost, and with `--exactly-once` none is seen twice. Redis gets absolute scores behind a fence, as
from a node.

Timers make ticks. One that is on its way to Python while a checkpoint is taken is not in that checkpoint, nor is the one that it would set.
So each sets a spare one, too, some seconds later: a partition to which nothing comes is looked at again after any restore.

This file is read twice: by the client, which builds the job, and by the workers, which unpickle `EngineFunction`.
"""

from __future__ import annotations

import builtins
import importlib
import json
import logging
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyflink.common import Configuration, Row, Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext, StreamExecutionEnvironment
from pyflink.datastream.data_stream import KeyedStream
from pyflink.datastream.state import MapStateDescriptor, ValueStateDescriptor
from pyflink.java_gateway import get_gateway
from pyflink.table import StatementSet, StreamTableEnvironment

# Workers of PyFlink have a `print` of their own, which Numba does not find where it looks for it when it is imported.
_print = builtins.print
builtins.print = getattr(getattr(_print, "__self__", None), "_print", _print)
importlib.import_module("engine.kernels")
builtins.print = _print

from engine.adapters.kafka_producer import KafkaOutput
from engine.errors import ConfigError, ConnectorError
from engine.hosted import Hosted, Plan
from engine.messages import encode_arrow
from engine.partition import Log
from engine.publisher import Publisher
from engine.ticks import Lost, Published, Refused, Sink, Tick

#: From a timer to the spare one, and how often a worker looks whether who started it is alive.
_SPARE_MS: Final = 2_000
_ALIVE_SECONDS: Final = 1.0
_ALIVE: Final = "riskring-alive"

#: After how many ticks without a message the state of a partition is told in the log, once.
_RESTING_TICKS: Final = 8

#: Bytes of a value that is sent: what brokers take by default, with room for key and headers.
_VALUE_BYTES_MAX: Final = 990_000


@dataclass(frozen=True)
class Job:
    """What a job does.

    Attributes:
        name: Of the job.
        plan: Of the partitions.
        brokers: `host:port`, comma-separated.
        kafka: Options of Java's Kafka clients.
        scores_topic, changes_topic, dead_letter_topic: Where to; None: nowhere.
        partitions: How many the topic of the scores has.
        redis: URLs of Redis servers; `redis_file` has them instead, one a line, for workers to read.
        prefix: Of keys in Redis.
        tick_ms: How often scores are published, and what waits is applied.
        exactly_once: Kafka's transactions.
        jar: Flink's connector for Kafka.
        flink: Options of Flink.
    """

    name: str
    plan: Plan
    brokers: str
    kafka: Mapping[str, str]
    scores_topic: str | None
    changes_topic: str | None
    dead_letter_topic: str | None
    partitions: int
    redis: tuple[str, ...]
    redis_file: str | None
    prefix: str
    tick_ms: int
    exactly_once: bool
    jar: Path
    flink: Mapping[str, str]


def _out() -> Any:
    """The type of what goes out of the function: topic, key, value, headers."""
    value = Types.PRIMITIVE_ARRAY(Types.BYTE())
    return Types.ROW_NAMED(["topic", "k", "v", "headers"], [Types.STRING(), value, value, Types.MAP(Types.STRING(), value)])


class Outbox:
    """In the place of a producer: what is sent is handed to Flink."""

    brokers = "Flink"
    value_bytes_max = _VALUE_BYTES_MAX

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self.rows: list[Row] = []

    def partitions(self, topic: str) -> int:
        """Of the topic of scores; the sink chooses by the key."""
        return self._partitions

    def send(
        self, topic: str, value: bytes | None, key: bytes | None = None, partition: int = -1, headers: list[tuple[str, bytes]] | None = None
    ) -> None:
        """Take a message. One for a certain partition has its number as the key, so that all of them stay in order."""
        self.rows.append(Row(topic, str(partition).encode() if partition >= 0 else key, value, dict(headers or [])))

    def flush(self) -> None:
        """A checkpoint does it."""

    def emptied(self) -> Iterator[Row]:
        """All that was sent, once."""
        rows, self.rows = self.rows, []
        return iter(rows)


class StateKeeper:
    """Keeps a partition in the state of its key. To be asked only while that is Flink's current key."""

    def __init__(self, place: Any, messages: Any) -> None:
        self._place, self._messages = place, messages

    def place(self) -> str | None:
        """See `hosted.Keeper`, as for the others."""
        text: str | None = self._place.value()
        return text

    def keep_place(self, text: str) -> None:
        self._place.update(text)

    def keep(self, offset: int, arrival_ns: int, value: bytes | None) -> None:
        self._messages.put(offset, Row(arrival_ns, value))

    def drop(self, offset: int) -> None:
        self._messages.remove(offset)

    def messages(self) -> Iterable[tuple[int, int, bytes | None]]:
        for offset, (arrival_ns, value) in self._messages.items():
            yield offset, arrival_ns, value


class LateSink:
    """A Redis that is looked for when it is needed: the job does not end because it is away while workers start."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url, self._prefix = url, prefix
        self._sink: Any = None

    def _there(self) -> Any:
        if self._sink is None:
            from engine.adapters.redis_sink import RedisSink  # noqa: PLC0415 - not every job has one

            self._sink = RedisSink(self._url, self._prefix)
        return self._sink

    def begin(self, topic: str, partition: int, topic_id: str) -> None:
        """See `ticks.Sink`."""
        self._there().begin(topic, partition, topic_id)

    def publish(self, tick: Tick) -> Published | Refused | Lost:
        """See `ticks.Sink`."""
        outcome: Published | Refused | Lost = self._there().publish(tick)
        return outcome


class EngineFunction(KeyedProcessFunction):
    """Engines of the partitions that Flink gives to one worker.

    Input are rows of (offset, Kafka time, value), by partition; output are rows of `_out`.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def open(self, runtime_context: RuntimeContext) -> None:
        """Begin; engines are made when their partitions are first seen."""
        job = self._job
        # With names, since a worker has no Java to ask for them.
        message = Types.ROW_NAMED(["arrival_ns", "value"], [Types.LONG(), Types.PRIMITIVE_ARRAY(Types.BYTE())])
        self._keeper = StateKeeper(
            runtime_context.get_state(ValueStateDescriptor("place", Types.STRING())),
            runtime_context.get_map_state(MapStateDescriptor("messages", Types.LONG(), message)),
        )
        self._log = _log()
        self._hosted: dict[int, _Mine] = {}
        self._outbox = Outbox(job.partitions)
        self._output = KafkaOutput(self._outbox, job.plan.topic.name, job.dead_letter_topic, job.scores_topic)  # type: ignore[arg-type]
        urls = _urls_in(job.redis_file) if job.redis_file else job.redis
        sinks: list[Sink] = [LateSink(url, job.prefix) for url in urls]
        self._publishers = [Publisher(sink, job.tick_ms / 1000, time.time_ns, self._log, lambda _: None) for sink in sinks]
        for publisher in self._publishers:
            publisher.start()
        _end_with_task_manager()

    def close(self) -> None:
        """End without another word: who goes on has the checkpoint."""
        for publisher in self._publishers:
            publisher.stop()
        for mine in self._hosted.values():
            mine.hosted.partition.close()

    def process_element(self, value: Any, ctx: KeyedProcessFunction.Context) -> Iterator[Row]:
        """Keep a message, and apply those that wait when they are many."""
        number = ctx.get_current_key()
        mine = self._hosted.get(number)
        if mine is None:
            mine = self._new(number)
            self._set_timers(ctx)
        offset, arrival, message = value
        mine.hosted.take(offset, arrival.seconds * 1_000_000_000 + arrival.nanos, message)
        return self._outbox.emptied()

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Row]:
        """Apply what waits, and publish."""
        number = ctx.get_current_key()
        mine = self._hosted.get(number) or self._new(number)
        self._set_timers(ctx)
        for publisher in self._publishers:
            if publisher.failure is not None:
                raise publisher.failure
        if timestamp >= mine.done_ms:  # a spare one finds all done
            mine.done_ms = timestamp + self._job.tick_ms // 2
            mine.hosted.apply()
            self._rest(mine)
            if self._job.changes_topic is not None:
                self._tell_changes(mine, self._job.changes_topic)
        return self._outbox.emptied()

    def _new(self, number: int) -> _Mine:
        job = self._job
        mine = _Mine(Hosted(number, job.plan, self._keeper, self._output, self._log, time.time_ns))
        self._hosted[number] = mine
        if self._publishers:
            self._publishers[number % len(self._publishers)].add(mine.hosted.partition)
        return mine

    def _set_timers(self, ctx: Any) -> None:
        """The next tick and a spare one, on a grid, so that however many set them, there are two."""
        now_ms = time.time_ns() // 1_000_000
        timers = ctx.timer_service()
        timers.register_processing_time_timer((now_ms // self._job.tick_ms + 1) * self._job.tick_ms)
        timers.register_processing_time_timer((now_ms // _SPARE_MS + 2) * _SPARE_MS)

    def _rest(self, mine: _Mine) -> None:
        """Tell where a partition stands, once, when nothing has come for a while."""
        partition = mine.hosted.partition
        mine.resting = mine.resting + 1 if partition.position == mine.position else 0
        mine.position = partition.position
        if mine.resting == _RESTING_TICKS:
            engine = partition.engine
            transactions = engine.stats().transactions
            told = {"position": partition.position, "transactions": transactions, "digest": engine.digest()}
            self._log("info", "resting", partition=partition.number, accepted=partition.accepted, state=partition.state, **told)

    def _tell_changes(self, mine: _Mine, topic: str) -> None:
        """Users whose scores have changed, as Arrow messages; everybody after a restore."""
        tick = mine.hosted.partition.draw(time.time_ns(), mine.anew)
        if tick.users is None or (len(tick.users) == 0 and not mine.anew):
            return
        mine.anew = False
        parts = list(_parts(tick.users))
        for index, value in enumerate(parts):
            told = {"topic": tick.topic, "partition": tick.partition, "position": tick.position, "at": tick.at_ns, "state": tick.state}
            told |= {"exact_from": "" if tick.exact_from_ns is None else tick.exact_from_ns, "everybody": int(tick.everybody)}
            told |= {"part": index, "parts": len(parts)}
            headers = [(name, str(field).encode()) for name, field in told.items()]
            self._outbox.send(topic, value, partition=tick.partition, headers=headers)


@dataclass
class _Mine:
    """A partition of this worker: what was told of it, and what is due."""

    hosted: Hosted
    done_ms: int = 0
    position: int = -1
    resting: int = 0
    anew: bool = True


def _urls_in(file: str) -> tuple[str, ...]:
    try:
        return tuple(Path(file).read_text().split())
    except OSError as error:
        raise ConfigError(f"--redis-file {file}: {error.strerror}; it must be there on each machine that has workers") from None


def _parts(users: Any) -> Iterator[bytes]:
    """Rows of users as messages that brokers take."""
    from engine.messages import arrow_messages  # noqa: PLC0415

    if len(users) == 0:
        yield encode_arrow(users)
    else:
        for _, value in arrow_messages(users, 8192, _VALUE_BYTES_MAX):
            yield value


def _log() -> Log:
    """Lines into the log of the TaskManager: Flink takes what Python logs."""
    logger = logging.getLogger("riskring")
    logger.setLevel(logging.INFO)
    levels = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

    def write(level: str, event: str, **fields: Any) -> None:
        told = " ".join(
            f"{name}={value!r}" if isinstance(value, str) and " " in value else f"{name}={value}" for name, value in fields.items()
        )
        logger.log(levels[level], "riskring: %s %s", event, told)

    return write


def _end_with_task_manager() -> None:
    """End this process when the one that started it is gone: Beam's worker would wait for ever, and could publish on."""
    if not sys.platform.startswith("linux") or Path(sys.argv[0]).stem != "beam_boot":
        return  # the client's own process does the work
    if any(thread.name == _ALIVE for thread in threading.enumerate()):
        return

    def watch() -> None:
        while any(_name(pid) == "java" for pid in (os.getppid(), _parent(os.getppid()))):  # there may be a script between the two
            time.sleep(_ALIVE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name=_ALIVE, daemon=True).start()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


# ---- the job -------------------------------------------------------------------------------------------------------------------------


def environment(job: Job) -> tuple[StreamExecutionEnvironment, StreamTableEnvironment, StatementSet]:
    """The job, ready to be started.

    Raises:
        ConnectorError: Flink refuses it.
    """
    configuration = Configuration()
    for name, value in job.flink.items():
        configuration.set_string(name, value)
    configuration.set_string("pipeline.name", job.name)
    env = StreamExecutionEnvironment.get_execution_environment(configuration)
    env.add_jars(job.jar.resolve().as_uri())
    tables = StreamTableEnvironment.create(env)
    messages = _source(job, tables)
    told = messages.process(EngineFunction(job), _out()).name("engine").uid("engine")
    tables.create_temporary_view("told", tables.from_data_stream(told))
    statements = tables.create_statement_set()
    topics = [topic for topic in (job.scores_topic, job.changes_topic, job.dead_letter_topic) if topic is not None]
    for index, topic in enumerate(dict.fromkeys(topics)):
        tables.execute_sql(_sink(job, f"sink{index}", topic))
        statements.add_insert_sql(f"INSERT INTO sink{index} SELECT k, v, headers FROM told WHERE topic = {_quoted(topic)}")
    if not topics:
        tables.execute_sql("CREATE TEMPORARY TABLE nowhere (v BYTES) WITH ('connector' = 'blackhole')")
        statements.add_insert_sql("INSERT INTO nowhere SELECT v FROM told")
    return env, tables, statements


def _source(job: Job, tables: StreamTableEnvironment) -> KeyedStream:
    """Messages by partition. Rows of (key, message) are what PyFlink's operators take, so that none in Python is needed to make them."""
    offsets = ";".join(f"partition:{number},offset:{first.position}" for number, first in sorted(job.plan.beginnings.items()))
    options = {
        "connector": "kafka",
        "topic": job.plan.topic.name,
        "properties.bootstrap.servers": job.brokers,
        "properties.group.id": job.name,
        "properties.auto.offset.reset": "none",
        "scan.startup.mode": "specific-offsets",
        "scan.startup.specific-offsets": offsets,
        "scan.topic-partition-discovery.interval": "10 s",
        "format": "raw",
        **_properties(job),
    }
    tables.execute_sql(
        "CREATE TEMPORARY TABLE messages (v BYTES, p INT METADATA FROM 'partition' VIRTUAL, o BIGINT METADATA FROM 'offset' VIRTUAL, "
        f"t TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL) WITH ({_with(options)})"
    )
    message = Types.ROW([Types.LONG(), Types.INSTANT(), Types.PRIMITIVE_ARRAY(Types.BYTE())])
    stream = tables.to_append_stream(tables.sql_query("SELECT p, ROW(o, t, v) FROM messages"), Types.ROW([Types.INT(), message]))
    keyed = stream._j_data_stream.keyBy(get_gateway().jvm.KeyByKeySelector(), Types.ROW([Types.INT()]).get_java_type_info())
    return KeyedStream(keyed, message, stream)


def _sink(job: Job, name: str, topic: str) -> str:
    options = {
        "connector": "kafka",
        "topic": topic,
        "properties.bootstrap.servers": job.brokers,
        "properties.acks": "all",
        "properties.linger.ms": "20",
        "properties.max.request.size": "1048576",
        "key.format": "raw",
        "key.fields": "k",
        "value.format": "raw",
        "value.fields-include": "EXCEPT_KEY",
        "sink.delivery-guarantee": "exactly-once" if job.exactly_once else "at-least-once",
        **_properties(job),
    }
    if job.exactly_once:
        options["sink.transactional-id-prefix"] = f"{job.name}-{topic}"
        options["properties.transaction.timeout.ms"] = "900000"  # the most that brokers allow by default; Flink's default is an hour
    return f"CREATE TEMPORARY TABLE {name} (k BYTES, v BYTES, headers MAP<STRING, BYTES> METADATA) WITH ({_with(options)})"


def _properties(job: Job) -> dict[str, str]:
    return {f"properties.{name}": value for name, value in job.kafka.items()}


def _with(options: Mapping[str, str]) -> str:
    return ", ".join(f"{_quoted(name)} = {_quoted(value)}" for name, value in options.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def explained(job: Job) -> str:
    """What Flink will do: its operators, each with those it reads from, and the tables' part as Flink tells it."""
    env, _, statements = environment(job)
    tables = str(statements.explain())
    statements.attach_as_datastream()
    lines = []
    for node in json.loads(env.get_execution_plan())["nodes"]:
        before = ", ".join(str(each["id"]) for each in node.get("predecessors", ()))
        text = " ".join(node["contents"].split())
        lines.append(f"{node['id']}: {text} (parallelism {node['parallelism']}){f' <- {before}' if before else ''}")
    return "\n".join(["== Operators ==", *lines, "", tables])


def start(job: Job) -> Any:
    """Start a job, in the cluster that `flink run` has named, else in this process, which then prints its log; its client."""
    if "PYFLINK_GATEWAY_PORT" not in os.environ:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("riskring").addHandler(handler)
    _, _, statements = environment(job)
    try:
        return statements.execute().get_job_client()
    except Exception as error:
        raise ConnectorError(f"Flink does not take the job: {why(error)}") from error


def why(error: BaseException) -> str:
    """What Java says of a failure, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if "Exception" in line and not line.strip().startswith("at ")]
    return lines[-1].removeprefix("Caused by: ") if lines else str(error).partition("\n")[0]


if __name__ == "__main__":  # by `flink run -py`
    sys.argv.insert(1, "flink")
    runpy.run_module("engine.cli", run_name="__main__", alter_sys=True)
