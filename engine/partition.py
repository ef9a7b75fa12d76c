"""One partition of a topic: its engine, where that stands in the log, and how both are found again.

    state(partition, N) = f(configuration, records 0..N-1 of that partition)

Nothing else has an influence: not how records were grouped when they came, not when, not how often the process was started. The clock on
the wall by which `max_ahead` judges rows is the Kafka time of their record. So two ways to the same position give the same state, and a
state never has to be taken back.

A state is found again, in this order: the newest snapshot that is whole, of this very topic, and whose position is in the log; the one
before it; else the log itself, from the first record whose Kafka time is later than now - 2 x (window + lateness). What such a rebuild
lacks are records of Kafka times before some T, whose event times are less than T + `max_ahead`. They are out of every window and no longer
retained when the clock is at T + `max_ahead` + window + lateness: from that instant on, `exact_from`, scores and digest are those of the
whole log. This holds however late producers are. Without `max_ahead` it holds if no row's time is ahead of its Kafka time. (A row that
was refused as `sum_overflow` because of transactions that the rebuild lacks is an exception: that takes a sum of 2**62 units.)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.columns import ids_of
from engine.config import TIME_NS_MAX, Config
from engine.engine import RiskEngine
from engine.errors import CapacityError, ConfigError, SnapshotError
from engine.messages import OFFSET, ROW, decode, encode_json
from engine.partitions import partition_of
from engine.snapshot import SnapshotInfo, read_manifest, snapshots
from engine.ticks import Tick

READY: Final = "ready"
CATCHING_UP: Final = "catching_up"
FULL: Final = "full"

Log = Callable[..., None]


@dataclass(frozen=True)
class Topic:
    """What a node reads, and for whom.

    Attributes:
        name, id, partitions: The topic as the cluster describes it.
        group: The consumer group.
        owner: This process, for whoever looks.
    """

    name: str
    id: str
    partitions: int
    group: str
    owner: str


class Ends(NamedTuple):
    """How far the log of a partition goes.

    Attributes:
        low: First offset.
        high: The one that the next message will have.
        since: First offset whose Kafka time is at or after `since_ns`; `high` if there is none.
        since_ns: See there.
    """

    low: int
    high: int
    since: int
    since_ns: int


class Output(Protocol):
    """Where rows go besides the engine.

    Attributes:
        wants_dead_letters, wants_scores: What there is a place for.
    """

    wants_dead_letters: bool
    wants_scores: bool

    def dead_letter(self, partition: int, offset: int, row: int | None, reason: str, value: bytes | None) -> None:
        """A message, or a row of one, that was not applied."""

    def scores(self, partition: int, table: Any) -> None:
        """Rows that were applied, with columns `_offset`, `_row` and `score`."""

    def flush(self) -> None:
        """Return when all that was given is where it shall be."""


@dataclass
class Partition:
    """The engine of a partition. `apply` and `draw` may be called by threads of their own.

    Attributes:
        number: Which one.
        topic: Of what.
        engine: Its state.
        position: The first offset that is not applied.
        exact_from_ns: From this instant on scores are exact; None: from the beginning.
        target: The end of the log when it was assigned: who has got there is ready.
        state: READY, CATCHING_UP or FULL.
        folder: Of its snapshots; None: it has none.
        output: Where dead letters and scores of rows go; None: nowhere.
        check_partition: Whether rows of users that belong to other partitions are refused.
        starts_at_first: Whether it will begin with the first record that the log still has.
        accepted: Rows applied, and `dead`: dead letters by reason, since it was assigned.
        saving: The snapshot that is being written, and its position.
        saved: The last one that was written, at `saved_at` of the monotonic clock; `failed_saves` could not be.
        lag: Messages behind the end of the log, a second ago at most; None: not known yet.
    """

    number: int
    topic: Topic
    engine: RiskEngine
    position: int
    exact_from_ns: int | None
    target: int
    folder: str | None
    output: Output | None
    log: Log
    check_partition: bool = True
    state: str = CATCHING_UP
    starts_at_first: bool = False
    accepted: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    saving: tuple[Future[SnapshotInfo], int] | None = None
    saved: SnapshotInfo | None = None
    saved_at: float | None = None
    failed_saves: int = 0
    lag: int | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._save_began = 0.0
        self.save_seconds = 0.0
        self.reach(self.position)

    # ---- records in ----------------------------------------------------------------------------------------------------------

    def apply(self, values: list[bytes | None], offsets: NDArray[np.int64], arrival_ns: NDArray[np.int64]) -> None:
        """Apply records in the order of the log; those that were applied before are passed over.

        An engine that has no room stops here: `state` is FULL, `position` that of the first record that was not applied.

        Args:
            values: (n,) bytes of each record.
            offsets: (n,) int64, rising.
            arrival_ns: (n,) int64, the Kafka time of each.
        """
        seen = int(np.searchsorted(offsets, self.position))
        if seen == len(offsets) or self.state == FULL:
            return
        values, offsets, arrival_ns = values[seen:], offsets[seen:], arrival_ns[seen:]
        if self.starts_at_first:  # what the log no longer has came before its first record
            self.exact_from_ns, self.starts_at_first = exact_from(int(arrival_ns[0]), self.engine.config), False
        while len(values) and self.state != FULL:
            count = self._apply_first(values, offsets, arrival_ns)
            values, offsets, arrival_ns = values[count:], offsets[count:], arrival_ns[count:]
        self.reach(self.position)

    def _apply_first(self, values: list[bytes | None], offsets: NDArray[np.int64], arrival_ns: NDArray[np.int64]) -> int:
        """Apply records from the first on; how many. The first rows give the engine its kind of ids, by which the others are then read."""
        kind, end = self.engine.id_kind, int(offsets[-1]) + 1
        decoded = decode(values, offsets, arrival_ns, self.engine.config, kind)
        letters = _Letters(self, values, offsets)
        with self._lock:
            for run in decoded.runs:
                if self.engine.id_kind not in (None, run.kind):
                    letters.rows(run.table, "wrong_kind")
                    continue
                try:
                    self._apply_run(run.table, run.arrival_ns, letters)
                except CapacityError as error:
                    end, self.state = int(run.table[OFFSET][0].as_py()), FULL
                    self.log("error", "the engine is full", partition=self.number, position=end, error=str(error))
                    break
                if self.engine.id_kind != kind:
                    end = int(run.table[OFFSET][-1].as_py()) + 1
                    break
            self.position = end
        for offset, reason, _ in decoded.dead:
            if offset < end:
                letters.message(offset, reason)
        return int(np.searchsorted(offsets, end))

    def _apply_run(self, table: Any, arrival_ns: NDArray[np.int64], letters: _Letters) -> None:
        user_id = self.engine.config.user_id
        if self.check_partition:
            number = partition_of(ids_of(table[user_id].combine_chunks(), user_id), self.topic.partitions)
            foreign = (number != self.number) & (number >= 0)
            if foreign.any():
                letters.rows(table.filter(pa.array(foreign)), "wrong_partition")
                table, arrival_ns = table.filter(pa.array(~foreign)), arrival_ns[~foreign]
        wanted = self.output is not None and self.output.wants_scores
        result = self.engine.ingest(table, scores=wanted, arrival=arrival_ns)
        self.accepted += result.accepted
        if result.rejected:
            rejects = result.rejects()
            for reason in result.rejected:
                letters.rows(rejects.filter(pc.equal(rejects["reason"], reason)).drop(["reason"]), reason)
        if wanted and self.output is not None and result.accepted:
            scored = table.append_column("score", result.scores)
            self.output.scores(self.number, scored if result.accepted == result.rows else scored.filter(result.scores.is_valid()))

    def reach(self, offset: int) -> None:
        """Take note that all before an offset is applied, or holds no message: the log also has marks of transactions."""
        if self.state == FULL:
            return
        self.position = max(self.position, offset)
        if self.position >= self.target and self.state == CATCHING_UP:
            self.state = READY
            self.log("info", "ready", partition=self.number, position=self.position, users=len(self.engine))

    # ---- scores out ----------------------------------------------------------------------------------------------------------

    def draw(self, wall_ns: int, anew: bool) -> Tick:
        """What has changed since the last call, or everything, at the later of the engine's clock and the clock on the wall."""
        with self._lock:
            clock_ns = self.engine.clock_ns
            at_ns = wall_ns if clock_ns is None else max(wall_ns, clock_ns)
            users = None if clock_ns is None else self.engine.updates(at=np.datetime64(at_ns, "ns"), anew=anew)
            return Tick(
                topic=self.topic.name,
                topic_id=self.topic.id,
                partitions=self.topic.partitions,
                partition=self.number,
                owner=self.topic.owner,
                position=self.position,
                clock_ns=clock_ns,
                at_ns=at_ns,
                wall_ns=wall_ns,
                exact_from_ns=self.exact_from_ns,
                state=self.state,
                users=users,
                everybody=anew,
            )

    # ---- snapshots -----------------------------------------------------------------------------------------------------------

    def begin_save(self) -> None:
        """Begin to write a snapshot of the state as it is now. Nothing happens while one is being written, or without a folder."""
        if self.folder is None or self.saving is not None:
            return
        with self._lock:
            self.saving = self.engine.start_save(self.folder, position=self._place()), self.position
            self._save_began = time.monotonic()

    def end_save(self, wait: bool = False) -> int | None:
        """The position that a snapshot has made durable; None while it is being written, and if it could not be."""
        if self.saving is None or not (wait or self.saving[0].done()):
            return None
        (future, position), self.saving = self.saving, None
        try:
            self.saved = future.result()
        except SnapshotError as error:
            self.failed_saves += 1
            self.log("error", "no snapshot", partition=self.number, error=str(error))
            return None
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - self._save_began
        self.log("info", "snapshot", partition=self.number, position=position, name=self.saved.name, bytes=self.saved.bytes)
        return position

    def _place(self) -> dict[str, Any]:
        topic = self.topic
        return {
            "topic": topic.name,
            "topic_id": topic.id,
            "partitions": topic.partitions,
            "partition": self.number,
            "group": topic.group,
            "offset": self.position,
            "exact_from_ns": self.exact_from_ns,
        }

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self.engine.close()


class _Letters:
    """Dead letters of some records: the record as it came where it is a row of its own, else the row alone as JSON."""

    def __init__(self, partition: Partition, values: list[bytes | None], offsets: NDArray[np.int64]) -> None:
        self._partition, self._values, self._offsets = partition, values, offsets

    def _value(self, offset: int) -> bytes | None:
        return self._values[int(np.searchsorted(self._offsets, offset))]

    def message(self, offset: int, reason: str) -> None:
        partition = self._partition
        partition.dead[reason] += 1
        if partition.output is not None and partition.output.wants_dead_letters:
            partition.output.dead_letter(partition.number, offset, None, reason, self._value(offset))

    def rows(self, table: Any, reason: str) -> None:
        partition = self._partition
        partition.dead[reason] += len(table)
        if partition.output is None or not partition.output.wants_dead_letters:
            return
        texts = encode_json(table.drop([OFFSET, ROW]).combine_chunks())
        places = zip(table[OFFSET].to_pylist(), table[ROW].to_pylist(), texts, strict=True)
        for offset, row, text in places:
            value = self._value(offset)
            alone = value is not None and value[:1] == b"{"
            partition.output.dead_letter(partition.number, offset, None if alone else row, reason, value if alone else text)


def exact_from(arrival_ns: int, config: Config) -> int:
    """The instant from which on nothing is amiss with a state that lacks records of a Kafka time before `arrival_ns`, or at it."""
    return min(arrival_ns + 1 + (config.max_ahead_ns or 0) + config.retention_ns, TIME_NS_MAX)


class Beginning(NamedTuple):
    """Where a state that is read from the log alone begins.

    Attributes:
        position: The first offset that is read.
        exact_from_ns: As in `Partition`, as far as it is known before a record was read.
        is_first: Whether the log has nothing before it, but had once: its first record says how late that was.
        target: The end of the log at that time.
    """

    position: int
    exact_from_ns: int | None
    is_first: bool
    target: int


def beginning(ends: Ends, from_start: bool, now_ns: int, config: Config) -> Beginning:
    """Where to begin in a log with these ends, without a snapshot: at its start, or as far back as a rebuild goes."""
    low = ends.low
    first = low if from_start else max(low, ends.since)
    exact_from_ns = None if first == 0 else exact_from(now_ns if first == low else ends.since_ns, config)
    return Beginning(first, exact_from_ns, 0 < first == low, ends.high)


def recover(
    number: int,
    topic: Topic,
    ends: Ends,
    state: str | None,
    options: Mapping[str, Any],
    now: Callable[[], int],
    from_start: bool,
    output: Output | None,
    check_partition: bool,
    log: Log,
) -> Partition:
    """The engine of a partition as it stood at some position, which is in the log.

    Args:
        number: The partition.
        topic: Of what.
        ends: Of its log now; `since_ns` is as far back as a rebuild goes.
        state: Folder or URI of the states of all partitions; None: there are none.
        options: Of the engine.
        now: The wall clock.
        from_start: Read the whole log where there is no snapshot.
        output, check_partition, log: Of `Partition`.

    Raises:
        ConfigError: The states are those of another topic or group, or of other options.
    """
    low, high = ends.low, ends.high
    folder = None if state is None else f"{state.rstrip('/')}/{number}"
    shared: dict[str, Any] = {"folder": folder, "output": output, "log": log, "check_partition": check_partition, "target": high}

    def accept(place: Any) -> str | None:
        return _unfit(place, number, topic, low, high, str(state))

    if folder is not None:
        try:
            engine = RiskEngine.load(folder, now=now, accept=accept, **_overrides(options))
        except SnapshotError as error:
            log(
                "warning" if "holds no snapshot" not in str(error) else "info",
                "no snapshot to go on from",
                partition=number,
                why=str(error),
            )
        else:
            return _restored(engine, number, topic, options, shared, log)
    engine = RiskEngine(**options, now=now)
    first = beginning(ends, from_start, now(), engine.config)
    log("info", "rebuild from the log", partition=number, position=first.position, end=high, exact_from=first.exact_from_ns)
    return Partition(number, topic, engine, first.position, first.exact_from_ns, starts_at_first=first.is_first, **shared)


def saved_position(state: str, number: int, topic: Topic) -> int:
    """The position of a partition's newest snapshot, if it is of this very topic and can be read; else 0. Cost: a small file."""
    with contextlib.suppress(SnapshotError):
        store, names = snapshots(f"{state.rstrip('/')}/{number}")
        for name in names[:1]:
            place = read_manifest(store, name).state.position
            return int(place["offset"]) if _unfit(place, number, topic, 0, 2**63, state) is None else 0
    return 0


def check_state(state: str, topic: Topic) -> None:
    """Look at the newest snapshot of each partition, before the group is joined.

    Raises:
        ConfigError: It belongs to another topic or group, or is none of a node.
        SnapshotError: The folder cannot be read.
    """
    if "://" not in state:
        try:
            os.makedirs(state, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--state {state}: no folder is there, and none can be made ({error.strerror}); give another") from None
        if not os.access(state, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"--state {state}: may not be read and written; give another, or the rights")
    for number in range(topic.partitions):
        store, names = snapshots(f"{state.rstrip('/')}/{number}")
        for name in names[:1]:
            with contextlib.suppress(SnapshotError):  # an older one will do, or the log
                _unfit(read_manifest(store, name).state.position, number, topic, 0, 0, state)


def _overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("window", "lateness", "closed", "decimals")}


def _restored(engine: RiskEngine, number: int, topic: Topic, options: Mapping[str, Any], shared: dict[str, Any], log: Log) -> Partition:
    assert engine.restored is not None
    try:
        wanted = Config.of(**{**options, "shards": 1})
        for name in ("window_ns", "lateness_ns", "closed", "decimals"):
            if getattr(wanted, name) != getattr(engine.config, name):
                raise ConfigError(
                    f"{shared['folder']}: is the state of a node with {name}={getattr(engine.config, name)!r}, "
                    f"not {getattr(wanted, name)!r}; give the same options, or another --state"
                )
    except BaseException:
        engine.close()
        raise
    for name, why in engine.restored.passed_over:
        log("warning", "snapshot passed over", partition=number, name=name, why=why)
    place = engine.restored.position
    told = {"position": place["offset"], "exact_from": place["exact_from_ns"]}
    log("info", "snapshot loaded", partition=number, name=engine.restored.name, **told)
    return Partition(number, topic, engine, place["offset"], place["exact_from_ns"], **shared)


_PLACE: Final = {"topic": str, "topic_id": str, "partitions": int, "partition": int, "group": str, "offset": int}


def _unfit(place: Any, number: int, topic: Topic, low: int, high: int, state: str) -> str | None:
    """Why a snapshot of this position is of no use here; None if it is.

    Raises:
        ConfigError: It is none of this node's at all.
    """
    if not isinstance(place, dict) or any(not isinstance(place.get(name), kind) for name, kind in _PLACE.items()):
        raise ConfigError(f"--state {state}: holds snapshots that are not those of a node; give another folder")
    for name, found, wanted in (("topic", place["topic"], topic.name), ("group", place["group"], topic.group)):
        if found != wanted:
            raise ConfigError(f"--state {state}: belongs to {name} {found!r}, not {wanted!r}; give each {name} a folder of its own")
    if place["partition"] != number:
        return f"it is of partition {place['partition']}"
    if place["topic_id"] != topic.id:
        return f"it is of a topic of the same name that was deleted ({place['topic_id']}, now {topic.id})"
    if place["partitions"] != topic.partitions:
        return f"the topic had {place['partitions']} partitions then, and now has {topic.partitions}, so that users are in others"
    if not low <= place["offset"] <= high:
        return f"its position {place['offset']} is not in the log, which goes from {low} to {high}"
    return None
