"""A partition whose truth somebody else keeps, with checkpoints of his own: Flink. The engine is a cache, made anew after each restore.

What is kept of a partition are its messages of the last retention, as they came, and a few words: where the engine stood before the first
of them, and up to which message it has told its scores. A message is kept before anything else is done with it. So whenever a checkpoint is
taken, it has all that the engine is made of, and what was not told before it is told after it.

    state(partition, N) = f(clock and kind of ids before the kept messages, kept messages)

Messages are kept and dropped in groups that were applied at once, oldest first. A group goes when the clock at its end is so old that no
row of it, or before it, is retained. The clock at the end of the last group that went is that before the first that is kept: with it the
engine judges every row as it did the first time. (As in `partition`, a row that was refused as `sum_overflow` because of transactions that
are gone is the exception.)
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from engine.engine import RiskEngine
from engine.errors import CapacityError, ConfigError, ConnectorError
from engine.partition import FULL, Beginning, Log, Output, Partition, Topic

#: Messages, and their bytes, that wait at most until they are applied together.
_WAITING_MAX: Final = 1000
_WAITING_BYTES_MAX: Final = 1 << 20

#: Of what is kept of a partition besides its messages.
_VERSION: Final = 1


class Keeper(Protocol):
    """Keeps the truth of one partition."""

    def place(self) -> str | None:
        """The words that were kept last; None if there are none."""

    def keep_place(self, text: str) -> None:
        """Keep other words."""

    def keep(self, offset: int, arrival_ns: int, value: bytes | None) -> None:
        """Keep a message."""

    def drop(self, offset: int) -> None:
        """Forget a message."""

    def messages(self) -> Iterable[tuple[int, int, bytes | None]]:
        """Offset, Kafka time and bytes of those that are kept, in any order."""


@dataclass(frozen=True)
class Plan:
    """What all partitions of a job have in common.

    Attributes:
        topic: What is read.
        beginnings: Where each partition begins if nothing is kept of it.
        engine: Options of the engines.
        check_partition: Refuse rows of users who belong to other partitions.
    """

    topic: Topic
    beginnings: Mapping[int, Beginning]
    engine: Mapping[str, Any] = field(default_factory=dict)
    check_partition: bool = True


class Hosted:
    """One partition.

    Args:
        number: Which one.
        plan: Of all of them.
        keeper: Has the truth of it.
        output: Where dead letters and scores of rows go; None: nowhere.
        log, now: As in `Partition`.

    Attributes:
        partition: The engine and where it stands.

    Raises:
        ConfigError: What is kept is of another topic, or of other options.
        ConnectorError: The topic has more partitions than when the job began.
    """

    def __init__(self, number: int, plan: Plan, keeper: Keeper, output: Output | None, log: Log, now: Callable[[], int]) -> None:
        self._keeper, self._log = keeper, log
        self._waiting: list[tuple[int, int, bytes | None]] = []
        self._waiting_bytes = 0
        #: Offsets, and the clock and the kind of ids after them; before the first of these groups they were `_before`.
        self._groups: deque[tuple[list[int], int | None, str | None]] = deque()
        self._before: tuple[int | None, str | None] = None, None
        if number not in plan.beginnings:
            raise ConnectorError(
                f"topic {plan.topic.name} has a partition {number}; when this job began it had {len(plan.beginnings)}. Users may be "
                "in other partitions now: follow the procedure for adding partitions, then start a new job"
            )
        text = keeper.place()
        if text is None:
            self.partition = self._begun(number, plan, log, now)
            self._keep_place()
        else:
            self.partition = self._restored(number, plan, json.loads(text), log, now)
        self.partition.output = output

    @property
    def waiting(self) -> int:
        """Messages that are kept, and not yet applied."""
        return len(self._waiting)

    def take(self, offset: int, arrival_ns: int, value: bytes | None) -> None:
        """Keep a message; it is applied with others, by `apply` at the latest. One that was taken before is passed over."""
        if offset < self.partition.position or (self._waiting and offset <= self._waiting[-1][0]):
            return
        self._keeper.keep(offset, arrival_ns, value)
        self._waiting.append((offset, arrival_ns, value))
        self._waiting_bytes += len(value or b"")
        if len(self._waiting) >= _WAITING_MAX or self._waiting_bytes >= _WAITING_BYTES_MAX:
            self.apply()

    def apply(self) -> None:
        """Apply what waits, and tell what came of it to the output.

        Raises:
            CapacityError: The engine is full.
        """
        if not self._waiting:
            return
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if waiting[0][0] >= self.partition.target:  # messages lie behind it, so what there was then is applied, marks of transactions too
            self.partition.reach(self.partition.target)
        self._apply(waiting)
        self._drop_old()
        self._keep_place()

    def _apply(self, messages: list[tuple[int, int, bytes | None]]) -> None:
        offsets, arrival_ns, values = zip(*messages, strict=True)
        partition = self.partition
        partition.apply(list(values), np.array(offsets, np.int64), np.array(arrival_ns, np.int64))
        if partition.state == FULL:
            raise CapacityError(
                f"partition {partition.number}: the engine is full, from offset {partition.position} on; give more --users, or partitions"
            )
        self._groups.append((list(offsets), partition.engine.clock_ns, partition.engine.id_kind))

    def _drop_old(self) -> None:
        engine = self.partition.engine
        while self._groups:
            offsets, clock_ns, kind = self._groups[0]
            if clock_ns is not None and clock_ns >= (engine.clock_ns or 0) - engine.config.retention_ns:
                return
            for offset in offsets:
                self._keeper.drop(offset)
            self._before = clock_ns, kind
            self._groups.popleft()

    def _keep_place(self) -> None:
        partition = self.partition
        config = partition.engine.config
        place = {
            "version": _VERSION,
            "topic": {"name": partition.topic.name, "id": partition.topic.id, "partitions": partition.topic.partitions},
            "options": [config.window_ns, config.lateness_ns, config.closed, config.decimals],
            "before": self._before,
            "position": partition.position,
            "exact_from_ns": partition.exact_from_ns,
            "starts_at_first": partition.starts_at_first,
            "accepted": partition.accepted,
            "dead": dict(partition.dead),
        }
        self._keeper.keep_place(json.dumps(place))

    def _begun(self, number: int, plan: Plan, log: Log, now: Callable[[], int]) -> Partition:
        """From nothing: the log is read from the beginning that was found for it."""
        first = plan.beginnings[number]
        log("info", "begun", partition=number, position=first.position, end=first.target, exact_from=first.exact_from_ns)
        return Partition(
            *(number, plan.topic, RiskEngine(**plan.engine, now=now), first.position, first.exact_from_ns, first.target, None, None, log),
            check_partition=plan.check_partition,
            starts_at_first=first.is_first,
        )

    def _restored(self, number: int, plan: Plan, place: dict[str, Any], log: Log, now: Callable[[], int]) -> Partition:
        """From what is kept: as it was at `position`; what is kept beyond it waits."""
        topic = plan.topic
        if place["version"] != _VERSION:
            raise ConfigError(f"the checkpoint is of another riskring (version {place['version']}, here {_VERSION}); begin a new job")
        for name, wanted in (("name", topic.name), ("id", topic.id), ("partitions", topic.partitions)):
            if place["topic"][name] != wanted:
                raise ConfigError(f"the checkpoint is of a topic with {name}={place['topic'][name]!r}, not {wanted!r}; begin a new job")
        clock_ns, kind = self._before = tuple(place["before"])
        engine = RiskEngine(**plan.engine, now=now)
        config = engine.config
        for name, found in zip(("window_ns", "lateness_ns", "closed", "decimals"), place["options"], strict=True):
            if getattr(config, name) != found:
                raise ConfigError(f"the checkpoint is of a job with {name}={found!r}, not {getattr(config, name)!r}; give the same options")
        engine._core.restore(kind, clock_ns, ())
        messages = sorted(self._keeper.messages())
        position, target = place["position"], plan.beginnings[number].target
        first = messages[0][0] if messages else position
        self.partition = partition = Partition(
            *(number, topic, engine, min(first, position), place["exact_from_ns"], target, None, None, _silent),
            check_partition=plan.check_partition,
        )
        before = [message for message in messages if message[0] < position]
        for some in _groups_of(before):
            self._apply(some)
        partition.accepted, partition.dead, partition.log = place["accepted"], Counter(place["dead"]), log
        partition.starts_at_first = place["starts_at_first"]
        partition.reach(position)
        self._waiting = messages[len(before) :]
        self._waiting_bytes = sum(len(value or b"") for _, _, value in self._waiting)
        told = {"kept": len(messages), "waiting": len(self._waiting), "transactions": engine.stats().transactions}
        log("info", "restored", partition=number, position=position, exact_from=place["exact_from_ns"], **told)
        return partition


def _groups_of(messages: list[tuple[int, int, bytes | None]]) -> Iterable[list[tuple[int, int, bytes | None]]]:
    """Messages to be applied together: as many as are when they come."""
    some: list[tuple[int, int, bytes | None]] = []
    length = 0
    for message in messages:
        some.append(message)
        length += len(message[2] or b"")
        if len(some) >= _WAITING_MAX or length >= _WAITING_BYTES_MAX:
            yield some
            some, length = [], 0
    if some:
        yield some


def _silent(level: str, event: str, **fields: Any) -> None:
    """What is told once need not be told again."""
