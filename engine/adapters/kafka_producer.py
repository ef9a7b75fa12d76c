"""Messages into Kafka: rows of files, dead letters, scores of rows. Each is there once, and all of a key in order, or an error is raised.

The producer is idempotent and waits for all replicas in sync (`acks=all`). Partitions are those of Kafka's own clients (murmur2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
from confluent_kafka import KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AdminClient

from engine.adapters.kafka_source import admin_options, told
from engine.errors import ConfigError, ConnectorError
from engine.messages import OFFSET, ROW, arrow_messages

#: What makes each message be there once, and no option may change.
_FIXED: Final = {"acks": "all", "enable.idempotence": True, "partitioner": "murmur2_random"}

#: How long the cluster may take to take everything that was given.
_FLUSH_SECONDS: Final = 60.0
_ANSWER_SECONDS: Final = 15.0

#: Rows of one message of scores.
_SCORES_ROWS: Final = 8192

#: What a message may have by default, in bytes, and how much of that is left for its key, its headers and what goes around them.
_MESSAGE_BYTES_MAX: Final = 1_000_000
_AROUND_BYTES: Final = 10_000

#: What waits for the brokers, at most. By default that is a gigabyte, of every node and every `produce`.
_QUEUE_KBYTES: Final = 1 << 16


class KafkaProducer:
    """Sends messages.

    Args:
        brokers: `host:port`, comma-separated.
        options: More options of librdkafka.

    Attributes:
        delivered: Messages that are where they shall be.
        value_bytes_max: How large values can be, as far as this side is concerned.

    Raises:
        ConfigError: An option is unknown or wrong.
    """

    def __init__(self, brokers: str, options: Mapping[str, Any]) -> None:
        for name in options:
            if name in _FIXED:
                raise ConfigError(f"--kafka {name}: is always {_FIXED[name]!r}, so that no message is lost or there twice; leave it out")
        self.brokers = brokers
        self._options = options
        self._failure: str | None = None
        self.delivered = 0
        with told(f"Kafka at {brokers}"):
            given = {"queue.buffering.max.kbytes": _QUEUE_KBYTES, "message.max.bytes": _MESSAGE_BYTES_MAX, **options}
            self._producer = Producer({"bootstrap.servers": brokers, "linger.ms": 20, "log_level": 3, **given, **_FIXED})
            self.value_bytes_max = max(int(given["message.max.bytes"]) - _AROUND_BYTES, 1)

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has.

        Raises:
            ConnectorError: No broker answers, or there is no such topic.
        """
        with told(f"Kafka at {self.brokers}"):
            admin = AdminClient({"bootstrap.servers": self.brokers, "log_level": 3, **admin_options(self._options)})
            try:
                described = admin.describe_topics(TopicCollection([topic]), request_timeout=_ANSWER_SECONDS)[topic].result()
            except KafkaException as error:
                if error.args[0].name() == "UNKNOWN_TOPIC_OR_PART":
                    raise ConnectorError(f"topic {topic!r} does not exist at {self.brokers}; create it, or name another") from None
                raise
        return len(described.partitions)

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        partition: int = -1,
        headers: list[tuple[str, bytes]] | None = None,
    ) -> None:
        """Take a message to be sent; waits while too many are on their way.

        Raises:
            ConnectorError: A message before this one could not be delivered.
        """
        while True:
            try:
                self._producer.produce(topic, value, key, partition, headers=headers or [], on_delivery=self._delivered)
                break
            except BufferError:
                self._producer.poll(0.05)
                self._check()
            except KafkaException as error:
                raise ConnectorError(f"topic {topic} at {self.brokers}: {_why(error.args[0])}") from None
        self._producer.poll(0)
        self._check()

    def _delivered(self, error: Any, message: Any) -> None:
        if error is None:
            self.delivered += 1
        elif self._failure is None:
            self._failure = f"topic {message.topic()} at {self.brokers}: {_why(error)}"

    def _check(self) -> None:
        if self._failure is not None:
            raise ConnectorError(f"{self._failure}; messages that came after it may be missing")

    def flush(self, seconds: float = _FLUSH_SECONDS) -> None:
        """Return when everything is where it shall be.

        Raises:
            ConnectorError: Something could not be delivered, or not in time.
        """
        left = self._producer.flush(seconds)
        self._check()
        if left:
            raise ConnectorError(f"Kafka at {self.brokers}: {left:,} messages were not taken within {seconds:.0f} s; check the brokers")

    @property
    def waiting(self) -> int:
        """Messages on their way."""
        return len(self._producer)


def _why(error: Any) -> str:
    fix = "; let it be larger (message.max.bytes here, max.message.bytes of the topic)"
    return f"{error.str()}{fix if error.name() == 'MSG_SIZE_TOO_LARGE' else ''}"


class KafkaOutput:
    """Where a node's dead letters and the scores of rows go.

    A dead letter has the bytes of its message, or its row as JSON where the message holds others, and in its headers `reason topic
    partition offset` and, for a row, `row`: these five name it, also where it comes again after a crash. What is too large to be sent is
    cut, and has its length in the header `cut_from`; the whole of it is where the others point. Scores are Arrow streams of the
    three columns, `score`, and `source_partition source_offset source_row`, which do the same.

    Args:
        producer: Sends them.
        topic: The topic that is read.
        dead_letter_topic, scores_topic: Where to; None: nowhere.
    """

    def __init__(self, producer: KafkaProducer, topic: str, dead_letter_topic: str | None, scores_topic: str | None) -> None:
        self._producer, self._topic = producer, topic.encode()
        self._dead_letters, self._scores = dead_letter_topic, scores_topic
        self.wants_dead_letters, self.wants_scores = dead_letter_topic is not None, scores_topic is not None
        for each in (dead_letter_topic, scores_topic):
            if each is not None:
                self._scores_partitions = producer.partitions(each)

    def dead_letter(self, partition: int, offset: int, row: int | None, reason: str, value: bytes | None) -> None:
        """Send a message or row that was not applied."""
        assert self._dead_letters is not None
        headers = [
            ("reason", reason.encode()),
            ("topic", self._topic),
            ("partition", str(partition).encode()),
            ("offset", str(offset).encode()),
        ]
        if row is not None:
            headers.append(("row", str(row).encode()))
        most = self._producer.value_bytes_max
        if value is not None and len(value) > most:
            headers.append(("cut_from", str(len(value)).encode()))
            value = value[:most]
        self._producer.send(self._dead_letters, value, headers=headers)

    def scores(self, partition: int, table: Any) -> None:
        """Send rows with their scores; all of a partition go to one partition, in order."""
        assert self._scores is not None
        table = table.append_column("source_partition", pa.array([partition] * len(table), pa.int32()))
        names = {OFFSET: "source_offset", ROW: "source_row"}
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        for _, value in arrow_messages(table, _SCORES_ROWS, self._producer.value_bytes_max):
            self._producer.send(self._scores, value, partition=partition % self._scores_partitions)

    def flush(self) -> None:
        """Return when all of it is where it shall be."""
        self._producer.flush()
