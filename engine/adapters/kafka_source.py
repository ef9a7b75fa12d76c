"""A Kafka topic as a source: the messages of the partitions that the group gives to this process, from offsets of one's own.

Offsets live in snapshots. What is committed to Kafka is for tools that show the lag; nothing here reads it. An offset that the log does not
have is told to the caller and never skipped.

Limits: one topic. Both rebalance protocols take partitions over one by one (classic `cooperative-sticky`, and `consumer`, KIP-848).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import tenacity
from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from numpy.typing import NDArray

from engine.errors import ConfigError, ConnectorError
from engine.partition import Ends

#: Messages of one `fetch` at most; it mostly ends by its time.
_MESSAGES_MAX: Final = 100_000

#: How long a log that seems to be too short is asked for again: a broker that went on after standing still learns the truth within seconds.
_STALE_SECONDS: Final = 5.0

#: How long the cluster may take to answer a question.
_ANSWER_SECONDS: Final = 15.0

#: How long brokers may be away when a partition is assigned; a leader that died has a successor within seconds.
_AWAY_SECONDS: Final = 60.0

#: What a slow look at the queue costs a consumer of small messages by default: most of its speed.
_FAST: Final = {"queued.min.messages": 1_000_000, "fetch.queue.backoff.ms": 5}

#: What the node decides and no option may change.
_FIXED: Final = (
    "enable.auto.commit",
    "enable.auto.offset.store",
    "auto.offset.reset",
    "enable.partition.eof",
    "group.id",
    "group.protocol",
)


#: Options with these beginnings are of consumers or producers, and an admin client would complain of them.
_NOT_ADMIN: Final = ("queued.", "fetch.", "session.", "max.poll", "linger", "batch.", "compression", "queue.", "message.", "transactional")


class Fetched(NamedTuple):
    """Messages of one partition, in the order of the log.

    Attributes:
        values: Their bytes; None for those without any.
        offsets: (n,) int64.
        arrival_ns: (n,) int64, the time that Kafka gives each, nanoseconds since the epoch.
    """

    values: list[bytes | None]
    offsets: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]


class Fetch(NamedTuple):
    """What one `KafkaSource.fetch` has brought.

    Attributes:
        messages: By partition.
        ended: The offset at the end of the log, of each partition whose end was reached.
        out_of_range: Partitions whose log does not have the offset that was to be read.
    """

    messages: dict[int, Fetched]
    ended: dict[int, int]
    out_of_range: list[int]


class KafkaSource:
    """A member of a consumer group.

    Args:
        brokers: `host:port`, comma-separated.
        topic: To read from.
        group: The consumer group.
        protocol: "classic" or "consumer" (KIP-848).
        options: More options of librdkafka, such as those of security.
        warn: Called with a text and fields for what is worth a line in a log.

    Attributes:
        topic_id: What tells this topic from one of the same name that was deleted.
        partitions: How many it has.

    Raises:
        ConnectorError: No broker answers, or there is no such topic.
        ConfigError: An option is unknown or wrong.
    """

    def __init__(self, brokers: str, topic: str, group: str, protocol: str, options: Mapping[str, Any], warn: Callable[..., None]) -> None:
        for name in options:
            if name in _FIXED:
                raise ConfigError(f"--kafka {name}: is decided by the node; leave it out")
        self.brokers, self.topic = brokers, topic
        self._warn = warn
        shared = {"bootstrap.servers": brokers, "error_cb": self._trouble, "log_level": 3, **options}
        self.topic_id, self.partitions = self._describe(shared)
        rebalance = {"partition.assignment.strategy": "cooperative-sticky"} if protocol == "classic" else {}
        settings = {
            **_FAST,
            **rebalance,
            "group.id": group,
            "group.protocol": protocol,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            **shared,
        }
        with told(f"Kafka at {brokers}"):
            self._consumer = Consumer(settings)
        self._shared = shared

    def _trouble(self, error: Any) -> None:
        self._warn("kafka", error=error.str())

    def _describe(self, settings: dict[str, Any]) -> tuple[str, int]:
        with told(f"Kafka at {self.brokers}"):
            admin = AdminClient(admin_options(settings))
            futures = admin.describe_topics(TopicCollection([self.topic]), request_timeout=_ANSWER_SECONDS)
            try:
                described = futures[self.topic].result()
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise ConnectorError(f"topic {self.topic!r} does not exist at {self.brokers}; create it, or name another") from None
                raise
        return str(described.topic_id), len(described.partitions)

    def described(self) -> tuple[str, int]:
        """The topic's id and number of partitions as they are now. Waits for a cluster that is without a leader for a while."""
        found: tuple[str, int] = self._patiently(self._describe, self._shared)
        return found

    def _patiently(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """Ask again while brokers are away: that is why partitions move, and another is about to take over."""

        def wait(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            self._warn("waiting for Kafka", error=str(state.outcome.exception()))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AwayError),
            stop=tenacity.stop_after_delay(_AWAY_SECONDS),
            wait=tenacity.wait_exponential(0.05, max=1),
            before_sleep=wait,
            reraise=True,
        )
        return retrying(ask, *arguments)

    def subscribe(
        self, assigned: Callable[[list[int]], dict[int, int]], revoked: Callable[[list[int]], None], lost: Callable[[list[int]], None]
    ) -> None:
        """Join the group. All three are called from within `fetch` and `close`.

        Args:
            assigned: Is told partitions that are this process's from now on; gives the offset at which to go on in each.
            revoked: Is told partitions that are given up when it returns.
            lost: Is told partitions that somebody else may have by now.
        """

        def on_assign(consumer: Any, parts: list[Any]) -> None:
            offsets = assigned([part.partition for part in parts]) if parts else {}
            consumer.incremental_assign([TopicPartition(self.topic, part, offset) for part, offset in offsets.items()])

        def on_revoke(consumer: Any, parts: list[Any]) -> None:
            if parts:
                revoked([part.partition for part in parts])
            consumer.incremental_unassign(parts)

        def on_lost(consumer: Any, parts: list[Any]) -> None:
            if parts:
                lost([part.partition for part in parts])
            consumer.incremental_unassign(parts)

        with told(f"topic {self.topic}"):
            self._consumer.subscribe([self.topic], on_assign=on_assign, on_revoke=on_revoke, on_lost=on_lost)

    def fetch(self, seconds: float) -> Fetch:
        """Messages that have come, after waiting for so long at most.

        Raises:
            ConnectorError: The topic is gone, or this process may not read it.
        """
        with told(f"topic {self.topic}"):
            messages = self._consumer.consume(_MESSAGES_MAX, seconds)
        ended: dict[int, int] = {}
        out_of_range: list[int] = []
        if any(message.error() is not None for message in messages):
            for message in messages:
                if message.error() is not None:
                    self._note(message, ended, out_of_range)
            messages = [message for message in messages if message.error() is None]
        return Fetch(dict(_by_partition(messages)), ended, out_of_range)

    def _note(self, message: Any, ended: dict[int, int], out_of_range: list[int]) -> None:
        error = message.error()
        if error.code() == KafkaError._PARTITION_EOF:
            ended[message.partition()] = message.offset()
        elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            out_of_range.append(message.partition())
        elif error.fatal() or error.code() in (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise ConnectorError(f"topic {self.topic} at {self.brokers}: {error.str()}")
        else:
            self._warn("kafka", error=error.str())

    def ends(self, partition: int, since_ns: int, least: int = 0) -> Ends:
        """How far the log of a partition goes now, and where in it an instant of Kafka's time is.

        A broker that stood still, and does not know yet that another is the leader by now, tells an end of then. So an end before `least`,
        up to which the log was read once, is asked for again for some seconds, until it is believed.

        To be called by the thread that fetches, also from within its callbacks. Waits for a cluster that is without a leader for a while.
        """

        def wait(_: object) -> None:
            self._warn("the log seems to end before what was read of it", partition=partition, position=least)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda ends: ends.high < least),
            stop=tenacity.stop_after_delay(_STALE_SECONDS),
            wait=tenacity.wait_exponential(0.1, max=1),
            before_sleep=wait,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        found: Ends = retrying(self._patiently, self._ends, partition, since_ns)
        return found

    def _ends(self, partition: int, since_ns: int) -> Ends:
        since = TopicPartition(self.topic, partition, max(since_ns // 1_000_000, 0))
        with told(f"partition {partition} of {self.topic}"):
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=_ANSWER_SECONDS)
            (found,) = self._consumer.offsets_for_times([since], timeout=_ANSWER_SECONDS)
            if found.error is not None:
                raise KafkaException(found.error)
        return Ends(low, high, high if found.offset < 0 else found.offset, since_ns)

    def lag(self, partition: int, position: int) -> int | None:
        """Messages behind the end of the log as far as it is known; None before the first message.

        To be called by the thread that fetches: others wait for the client until they happen to come between two fetches.
        """
        _, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), cached=True)
        return None if high < 0 else max(high - position, 0)

    def seek(self, partition: int, offset: int) -> None:
        """Go on at another offset of a partition."""
        where = TopicPartition(self.topic, partition, offset)
        with told(f"partition {partition} of {self.topic}"):
            self._consumer.incremental_unassign([where])
            self._consumer.incremental_assign([where])

    def pause(self, partition: int) -> None:
        """Fetch nothing more of a partition."""
        self._consumer.pause([TopicPartition(self.topic, partition)])

    def commit(self, offsets: Mapping[int, int], wait: bool = False) -> None:
        """Tell Kafka where each partition stands, for tools that show the lag. Failures are no matter: nothing depends on it."""
        parts = [TopicPartition(self.topic, part, offset) for part, offset in offsets.items()]
        try:
            if wait:
                self._consumer.commit(offsets=parts, asynchronous=False)
            else:
                self._consumer.commit(offsets=parts, asynchronous=True)
        except KafkaException as error:
            self._warn("commit", error=error.args[0].str())

    def close(self) -> None:
        """Leave the group. Cost: until the group has been told, some milliseconds."""
        began = time.monotonic()
        self._consumer.close()
        if time.monotonic() - began > _ANSWER_SECONDS:
            self._warn("leaving the group took long", seconds=time.monotonic() - began)


def _by_partition(messages: list[Any]) -> Iterator[tuple[int, Fetched]]:
    count = len(messages)
    if count == 0:
        return
    parts = np.fromiter((message.partition() for message in messages), np.int32, count)
    offsets = np.fromiter((message.offset() for message in messages), np.int64, count)
    stamps = [message.timestamp() for message in messages]
    arrival_ns = np.fromiter((0 if kind == TIMESTAMP_NOT_AVAILABLE else stamp for kind, stamp in stamps), np.int64, count) * 1_000_000
    values = [message.value() for message in messages]
    first = int(parts[0])
    if (parts == first).all():
        yield first, Fetched(values, offsets, arrival_ns)
        return
    for part in np.unique(parts).tolist():
        mine = np.flatnonzero(parts == part)
        yield part, Fetched([values[place] for place in mine.tolist()], offsets[mine], arrival_ns[mine])


def admin_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a client's options that are not of consuming or producing alone."""
    return {name: value for name, value in options.items() if not name.startswith(_NOT_ADMIN)}


class _AwayError(ConnectorError):
    """Brokers are away, which may pass."""


#: Errors that time does not mend; librdkafka has a great many others for brokers that come and go.
_LASTING: Final = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._SSL,
)


@contextmanager
def told(where: str) -> Iterator[None]:
    """Errors of the client as errors that say where."""
    try:
        yield
    except KafkaException as error:
        inner = error.args[0]
        if inner.code() in (KafkaError._INVALID_ARG, KafkaError._CONFLICT):
            raise ConfigError(f"{where}: {inner.str()}; look at the options of librdkafka") from None
        away = not inner.fatal() and inner.code() not in _LASTING
        silent = inner.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN)
        why = "no broker answers" if silent else inner.str()
        raise (_AwayError if away else ConnectorError)(f"{where}: {why}; check --brokers and the options given with --kafka") from error
