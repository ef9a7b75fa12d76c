"""The streaming node: source -> engine of each partition -> sinks. The order of effects is the guarantee, and stands here.

    consume -> ingest -> publish (fenced, idempotent) -> [due] snapshot durable -> commit the offset

- A record is applied once: the position is part of the snapshot, and records before it are passed over.
- Scores that were published are never taken back: they are absolute values of one state, and a fence refuses those of an older one.
- What the engine has told a sink is no part of a snapshot: after a restart everything is published anew.
- An offset is committed when the snapshot of that very position is on disk; but nothing depends on it.

An unexpected error ends the process. Starting again is the way to recover, and the one that is tested.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from engine.config import Config
from engine.errors import ConnectorError
from engine.partition import FULL, Ends, Log, Output, Partition, Topic, check_state, recover, saved_position
from engine.publisher import Publisher
from engine.ticks import Sink

#: How long one look for records waits: what a score is late by at most because of it.
_FETCH_SECONDS: Final = 0.02

#: How often dead letters that go nowhere are told.
_TELL_SECONDS: Final = 1.0


class Source(Protocol):
    """The records of some partitions. See `adapters.kafka_source`."""

    topic_id: str
    partitions: int

    def described(self) -> tuple[str, int]: ...
    def subscribe(
        self, assigned: Callable[[list[int]], dict[int, int]], revoked: Callable[[list[int]], None], lost: Callable[[list[int]], None]
    ) -> None: ...
    def fetch(self, seconds: float) -> Any: ...
    def ends(self, partition: int, since_ns: int, least: int = 0) -> Ends: ...
    def seek(self, partition: int, offset: int) -> None: ...
    def pause(self, partition: int) -> None: ...
    def lag(self, partition: int, position: int) -> int | None: ...
    def commit(self, offsets: Mapping[int, int], wait: bool = False) -> None: ...
    def close(self) -> None: ...


class Meters(Protocol):
    """Who counts."""

    def ingested(self, seconds: float) -> None:
        """A batch was applied."""

    def published(self, seconds: float) -> None:
        """A tick was published."""

    def saved(self, seconds: float) -> None:
        """A snapshot was written."""


class Unmetered:
    """Nobody counts."""

    def ingested(self, seconds: float) -> None:
        """A batch was applied."""

    def published(self, seconds: float) -> None:
        """A tick was published."""

    def saved(self, seconds: float) -> None:
        """A snapshot was written."""


@dataclass(frozen=True)
class Plan:
    """What a node does.

    Attributes:
        topic, group: What it reads, and as a member of what.
        owner: What it calls itself.
        engine: Options of the engines.
        state: Folder or URI of snapshots; None: none are written.
        from_start: Read the whole log where there is no snapshot.
        check_partition: Refuse rows of users who belong to other partitions.
        tick_seconds, snapshot_seconds: How often scores are published, and snapshots written.
        threads: Engines that work at a time.
    """

    topic: str
    group: str
    owner: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    state: str | None = None
    from_start: bool = False
    check_partition: bool = True
    tick_seconds: float = 0.25
    snapshot_seconds: float = 30.0
    threads: int = max(1, os.cpu_count() or 1)


class Node:
    """A member of the group, with the engines of the partitions that are its.

    Args:
        plan: What to do.
        source: Records.
        sinks: Where scores are published; partition p goes to sink p modulo their number.
        output: Where dead letters and scores of rows go; None: nowhere.
        log: A line for whoever runs it: level, event, and fields.
        now: The wall clock, nanoseconds.
        meters: Who counts.

    Attributes:
        partitions: Those that are its, by number.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        sinks: list[Sink],
        output: Output | None,
        log: Log,
        now: Callable[[], int],
        meters: Meters | None = None,
    ) -> None:
        self.plan = plan
        self.partitions: dict[int, Partition] = {}
        self._source, self._output, self._log, self._now = source, output, log, now
        self._meters: Meters = Unmetered() if meters is None else meters
        self._topic = Topic(plan.topic, source.topic_id, source.partitions, plan.group, plan.owner)
        self._publishers = [Publisher(sink, plan.tick_seconds, now, log, self._meters.published) for sink in sinks]
        self._retention_ns = Config.of(**plan.engine).retention_ns
        self._threads = ThreadPoolExecutor(plan.threads, thread_name_prefix="riskring-partition")
        self._applying: list[Future[None]] = []
        self._save_due: dict[int, float] = {}
        self._told: dict[tuple[int, str], int] = {}
        self._tell_due = 0.0
        self._stopping = threading.Event()
        self._gone_accepted, self._gone_dead = 0, Counter[str]()

    def stop(self) -> None:
        """Let `run` end: with what was read applied, published and saved. May be called by a signal handler."""
        self._stopping.set()

    @property
    def accepted(self) -> int:
        """Rows applied since the start, those of partitions that are gone included."""
        return self._gone_accepted + sum(partition.accepted for partition in list(self.partitions.values()))

    @property
    def dead(self) -> Counter[str]:
        """Rows and messages not applied since the start, by reason."""
        return sum((partition.dead for partition in list(self.partitions.values())), self._gone_dead)

    @property
    def pending(self) -> int:
        """Users whose scores could not be published so far."""
        return sum(publisher.pending for publisher in self._publishers)

    def run(self) -> None:
        """Read until `stop` is called.

        Raises:
            ConnectorError: Kafka refuses, or the topic has changed.
            ConfigError: The states are those of another topic or group.
        """
        if self.plan.state is not None:
            check_state(self.plan.state, self._topic)
        for publisher in self._publishers:
            publisher.start()
        self._source.subscribe(self._assigned, self._revoked, self._lost)
        try:
            while not self._stopping.is_set():
                self.step()
            self._source.close()  # which gives up all partitions
        finally:
            for publisher in self._publishers:
                publisher.stop()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def step(self) -> None:
        """Fetch records while those fetched before are applied; then see what else is due."""
        fetch = self._source.fetch(_FETCH_SECONDS)
        self._wait()
        for number in fetch.messages.keys() | fetch.ended.keys():
            partition = self.partitions.get(number)
            if partition is not None:  # else it was given up while these were under way
                records, end = fetch.messages.get(number), fetch.ended.get(number, -1)
                self._applying.append(self._threads.submit(self._apply, partition, records, end))
        for number in fetch.out_of_range:
            self._restart(number)
        self._look_after()

    def _apply(self, partition: Partition, records: Any, end: int) -> None:
        began = time.monotonic()
        if records is not None:
            partition.apply(*records)
            self._meters.ingested(time.monotonic() - began)
        partition.reach(end)

    def _wait(self) -> None:
        """Until all that was fetched is applied."""
        applying, self._applying = self._applying, []
        for work in applying:
            work.result()

    def _look_after(self) -> None:
        for publisher in self._publishers:
            if publisher.failure is not None:
                raise publisher.failure
        now = time.monotonic()
        done: dict[int, int] = {}
        for number, partition in self.partitions.items():
            position = partition.end_save()
            if position is not None:
                done[number] = position
                self._meters.saved(partition.save_seconds)
            if partition.state == FULL:
                self._source.pause(number)
            if partition.folder is not None and now >= self._save_due[number] and partition.saving is None:
                self._save_due[number] = now + self.plan.snapshot_seconds
                self._begin_save(partition)
        if done:
            self._source.commit(done)
        if now >= self._tell_due:
            self._tell_due = now + _TELL_SECONDS
            self._tell()

    def _begin_save(self, partition: Partition) -> None:
        if self._output is not None:
            self._output.flush()  # what a snapshot covers is never read again
        partition.begin_save()

    def _tell(self) -> None:
        for number, partition in self.partitions.items():
            partition.lag = self._source.lag(number, partition.position)
            for reason, count in list(partition.dead.items()):
                new = count - self._told.get((number, reason), 0)
                if new:
                    self._told[number, reason] = count
                    self._log("warning", "not applied", partition=number, reason=reason, count=new, dead_letters=self._has_letters)

    @property
    def _has_letters(self) -> bool:
        return self._output is not None and self._output.wants_dead_letters

    # ---- partitions come and go ----------------------------------------------------------------------------------------------

    def _assigned(self, numbers: list[int]) -> dict[int, int]:
        topic_id, partitions = self._source.described()
        if (topic_id, partitions) != (self._topic.id, self._topic.partitions):
            raise ConnectorError(
                f"topic {self._topic.name} has {partitions} partitions and id {topic_id}; when this node began it had "
                f"{self._topic.partitions} and {self._topic.id}. Users may be in other partitions now: follow the procedure for adding "
                "partitions, then start again"
            )
        ends = [self._ends(number, self._saved_position(number)) for number in numbers]  # in this thread: the client lets no other ask now
        for partition in self._threads.map(self._recover, numbers, ends):
            self._take(partition)
        return {number: self.partitions[number].position for number in numbers}

    def _ends(self, number: int, least: int) -> Ends:
        return self._source.ends(number, self._now() - 2 * self._retention_ns, least)

    def _saved_position(self, number: int) -> int:
        return 0 if self.plan.state is None else saved_position(self.plan.state, number, self._topic)

    def _recover(self, number: int, ends: Ends) -> Partition:
        plan = self.plan
        return recover(
            number,
            self._topic,
            ends,
            plan.state,
            plan.engine,
            self._now,
            plan.from_start,
            self._output,
            plan.check_partition,
            self._log,
        )

    def _take(self, partition: Partition) -> None:
        number = partition.number
        self.partitions[number] = partition
        spread = self.plan.snapshot_seconds * (number % 8 + 1) / 8  # not all at once
        self._save_due[number] = time.monotonic() + spread
        if self._publishers:
            self._publishers[number % len(self._publishers)].add(partition)

    def _restart(self, number: int) -> None:
        """The log no longer has what is to be read next: go on as after a restart."""
        if number not in self.partitions:
            return
        position = self.partitions[number].position
        self._log("error", "position is not in the log", partition=number, position=position)
        ends = self._ends(number, position)
        self._drop([number])
        self._take(self._recover(number, ends))
        self._source.seek(number, self.partitions[number].position)

    def _revoked(self, numbers: list[int]) -> None:
        self._wait()
        mine = [self.partitions[number] for number in numbers if number in self.partitions]
        if self._output is not None:
            self._output.flush()
        saved = [self._threads.submit(self._give_up, partition) for partition in mine]
        done = {partition.number: position for partition, work in zip(mine, saved, strict=True) if (position := work.result()) is not None}
        if done:
            self._source.commit(done, wait=True)
        self._drop(numbers)

    def _give_up(self, partition: Partition) -> int | None:
        if self._publishers:
            self._publishers[partition.number % len(self._publishers)].last(partition.number)
        partition.end_save(wait=True)
        partition.begin_save()
        position = partition.end_save(wait=True)
        self._log("info", "given up", partition=partition.number, position=partition.position, saved=position is not None)
        return position

    def _lost(self, numbers: list[int]) -> None:
        """Somebody else has them by now: forget them, without any effect."""
        self._wait()
        self._drop(numbers)
        self._log("warning", "lost", partitions=numbers)

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._publishers:
                self._publishers[number % len(self._publishers)].drop(number)
            partition = self.partitions.pop(number, None)
            if partition is not None:
                self._gone_accepted += partition.accepted
                self._gone_dead += partition.dead
                partition.close()
                for key in [key for key in self._told if key[0] == number]:
                    del self._told[key]
