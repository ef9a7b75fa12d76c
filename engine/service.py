"""What a server answers, whatever the protocol: one engine, or those of a node's partitions, as whoever asks over a network sees them.

A request is of one instant: what was not told is taken once, the later of the engines' clocks and, with `clock="wall"`, the wall clock.
Users of a partition that this process does not have are not known here, which is an error and never 0.0.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import array_of
from engine.columns import ids_of
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.engine import RiskEngine
from engine.errors import ConfigError, SchemaError, StaleError, TimeTooOldError
from engine.instants import instant_ns
from engine.partitions import partition_of
from engine.results import Explanation, IngestResult, Stats
from engine.shard import UserFeatures
from engine.snapshot import SnapshotInfo
from engine.userids import id_array

T = TypeVar("T")

#: Up to here floats have each integer.
_FLOATS_EXACT: Final = 2.0**53

_SMALL: Final = re.compile(r"0|-?[1-9][0-9]{0,17}")
_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")


class Service:
    """Engines, and what can be asked of them. Thread-safe: any thread may call anything.

    Args:
        config: Of the engines.
        engines: Gives those that are here now, by partition. One engine that has all users is that of partition 0 of 1.
        now: The wall clock, nanoseconds.
        partitions: Over how many partitions users are spread.
        why_not: Gives the reason for which scores are not to be trusted yet, or None.
        writable: Whether transactions are taken.

    Attributes:
        config, writable: See above.
        lookups: Users looked up so far.

    Example:
        >>> engine = RiskEngine(users=1000)
        >>> service = Service.of(engine)
        >>> service.ingest({"user_id": [7], "amount": [2.5], "timestamp": np.array(["2026-01-01"], "datetime64[s]")}).accepted
        1
        >>> scores, at_ns = service.scores(service.users_of(["7", 8]))
        >>> scores.to_pylist(), at_ns
        ([2.5, 0.0], 1767225600000000000)
    """

    def __init__(
        self,
        config: Config,
        engines: Callable[[], Mapping[int, RiskEngine]],
        now: Callable[[], int],
        partitions: int = 1,
        why_not: Callable[[], str | None] = lambda: None,
        writable: bool = False,
    ) -> None:
        self.config, self.writable = config, writable
        self.lookups = 0
        self._engines, self._now, self._partitions, self._why_not = engines, now, partitions, why_not
        self._lock = threading.Lock()

    @classmethod
    def of(cls, engine: RiskEngine, now: Callable[[], int] | None = None) -> Service:
        """All users are in one engine, and transactions are taken. `now` is by default the engine's."""
        return cls(engine.config, lambda: {0: engine}, engine.wall_ns if now is None else now, writable=True)

    def ready(self) -> str | None:
        """None if scores can be trusted, else why not."""
        return self._why_not()

    def kind(self) -> str | None:
        """Kind of the user ids; None as long as there was no row."""
        return next((engine.id_kind for engine in self._engines().values() if engine.id_kind is not None), None)

    def settled(self, work: Callable[[], T]) -> T:
        """What `work` gives, which reads ids and asks for them; once more if the first row came meanwhile and made them another kind."""
        known = self.kind() is not None
        try:
            return work()
        except SchemaError:
            if known or self.kind() is None:
                raise
            return work()

    def users_of(self, values: Sequence[Any]) -> Any:
        """User ids as texts and JSON have them, as an Arrow array of the kind that the engines have.

        Args:
            values: (n,) texts, integers and None. Where users are integers, a text is one in decimal; where they are bytes, in hex.

        Raises:
            SchemaError: One cannot be an id, or not one of this kind. Says which.
        """
        kind = self.kind()
        if kind == "string" or (kind is None and not all(isinstance(value, int | None) for value in values)):
            return self._array(values, pa.string(), str, lambda text: text)
        if kind == "binary":
            return self._array(values, pa.binary(), bytes, bytes.fromhex)
        return self._array(values, pa.uint64() if kind == "uint64" else pa.int64(), int, _integer)

    def user_of(self, value: Any) -> Any:
        """One user id, of those that `users_of` takes, as the engines have it. Raises as that."""
        kind = self.kind()
        if type(value) is str and kind == "string":
            return value
        if type(value) is str and kind == "int64" and _SMALL.fullmatch(value):
            return int(value)
        return self.users_of([value])[0].as_py()

    def _array(self, values: Sequence[Any], kind: Any, plain: type, read: Callable[[Any], Any]) -> Any:
        """Those of the type `plain` are taken as they are, texts are read."""
        try:
            types = set(map(type, values))
            if types == {int} and kind != pa.string():
                return pa.array(np.array(values, kind.to_pandas_dtype()))
            if types <= {plain, type(None)}:
                return pa.array(values, kind)
        except (pa.ArrowException, UnicodeError, OverflowError):
            pass  # it will be told which
        made = []
        for place, value in enumerate(values):
            try:
                is_whole = plain is int and isinstance(value, float) and value.is_integer() and abs(value) <= _FLOATS_EXACT
                if not is_whole and (isinstance(value, bool) or not isinstance(value, plain | str | None)):
                    raise ValueError(f"it is a {type(value).__name__}")
                found = read(value) if isinstance(value, str) else int(value) if is_whole else value  # to JSON 7.0 is 7
                pa.scalar(found, kind)
                made.append(found)
            except (ValueError, OverflowError, pa.ArrowException) as error:
                shown = repr(value) if len(repr(value)) < 80 else repr(value)[:76] + "..."
                raise SchemaError(f"user_ids[{place}]={shown} cannot be a user id here, where they are {kind}: {error}") from None
        return pa.array(made, kind)

    def instant_ns(self, at: Any = None) -> int | None:
        """The instant of a request, nanoseconds since the epoch; None if none is told and there was no row yet.

        Raises:
            ConfigError: `at` is no instant.
        """
        if isinstance(at, str) and at == "now":
            return self._now()
        if at is not None:
            at_ns = instant_ns(at, "at", time_unit=None, error=ConfigError)
            if not TIME_NS_MIN <= at_ns <= TIME_NS_MAX:
                raise ConfigError(f"at={at!r} is beyond what int64 nanoseconds can say (1677 to 2262)")
            return at_ns
        clocks = [clock for engine in self._engines().values() if (clock := engine.clock_ns) is not None]
        return max([*clocks, *([self._now()] if self.config.clock == "wall" else [])], default=None)

    def _asked(self, at: Any, ask: Callable[[np.datetime64 | None], Any]) -> tuple[Any, int | None]:
        """What is answered for an instant, and that. An instant that was not told is taken anew when an engine's clock has run away."""
        for last in (False, False, True):
            at_ns = self.instant_ns(at)
            try:
                return ask(None if at_ns is None else np.datetime64(at_ns, "ns")), at_ns
            except TimeTooOldError:
                if at is not None or last:
                    raise
        raise AssertionError

    def scores(self, user_ids: Any, at: Any = None) -> tuple[Any, int | None]:
        """As `RiskEngine.scores`, and the instant, ns.

        Raises:
            StaleError: A user's partition is not here.
        """
        engine = self._only_engine()
        if at is None and engine is not None:  # the shortest way
            scores, at_ns = engine.scores_and_instant(user_ids)
            with self._lock:
                self.lookups += len(scores)
            return scores, at_ns
        array, is_arrow = id_array(user_ids)
        with self._lock:
            self.lookups += len(array)

        def ask(when: np.datetime64 | None) -> Any:
            found = np.full(len(array), np.nan)
            for engine, places in self._spread(array):
                mine = array if places is None else array.take(pa.array(places))
                scores = engine.scores(mine, at=when).to_numpy(zero_copy_only=False)
                if places is None:
                    return scores
                found[places] = scores
            return found

        scores, at_ns = self._asked(at, ask)
        if not is_arrow:
            return np.array(scores), at_ns
        return array_of(np.array(scores), pa.float64(), np.asarray(array.is_null()) if array.null_count else None), at_ns

    def features(self, user_ids: Any = None, at: Any = None, counted: bool = True) -> tuple[Any, int | None]:
        """As `RiskEngine.features`, and the instant, ns. Raises as `scores`. What is not `counted` is not among `lookups`."""
        array = None if user_ids is None else id_array(user_ids)[0]

        def ask(when: np.datetime64 | None) -> Any:
            if array is None:
                return self._one_table([engine.features(at=when) for engine in self._engines().values()]).sort_by("user_id")
            tables, order = [], []
            for engine, places in self._spread(array):
                if places is None:
                    return engine.features(array, at=when)
                tables.append(engine.features(array.take(pa.array(places)), at=when))
                order.append(places)
            return self._one_table(tables).take(pa.array(np.argsort(np.concatenate(order), kind="stable")))

        table, at_ns = self._asked(at, ask)
        with self._lock:
            self.lookups += len(table) if counted else 0
        return table, at_ns

    def features_of_one(self, user_id: Any, at: Any = None) -> tuple[UserFeatures, int | None]:
        """As `RiskEngine.features_of_one`, and the instant, ns. `user_id` as in `users_of`. Raises as `scores`."""
        known = self.user_of(user_id)
        self.lookups += 1  # one may be lost to another thread, which is no harm
        engine = self._engine_of(known)
        if at is None and self._partitions == 1 and engine.id_kind is not None:
            return engine.features_of_one(known)

        def ask(when: np.datetime64 | None) -> UserFeatures:
            return engine.features_of_one(self.user_of(user_id), at=when)[0]

        found, at_ns = self.settled(lambda: self._asked(at, ask))
        return found, at_ns

    def top(self, k: int, by: str = "score", at: Any = None) -> tuple[Any, int | None]:
        """As `RiskEngine.top`, and the instant, ns."""

        def ask(when: np.datetime64 | None) -> Any:
            table = self._one_table([engine.top(k, by=by, at=when) for engine in self._engines().values()])
            return table.take(pc.sort_indices(table, [(by, "descending"), ("user_id", "ascending")])).slice(0, k)

        return self._asked(at, ask)

    def top_in_parts(self, k: int, by: str = "score") -> Iterator[Any]:
        """As `RiskEngine.top_in_parts`, of one engine after the other: the last table of each has the greatest of its users."""
        for engine in self._engines().values():
            yield from engine.top_in_parts(k, by=by)

    def explain(self, user_id: Any, at: Any = None) -> tuple[Explanation, int | None]:
        """As `RiskEngine.explain`, and the instant, ns. `user_id` as in `users_of`."""
        engine = self._engine_of(self.user_of(user_id))
        found: tuple[Explanation, int | None] = self.settled(
            lambda: self._asked(at, lambda when: engine.explain(self.user_of(user_id), at=when))
        )
        return found

    def ingest(self, data: Any, scores: bool = False) -> IngestResult:
        """As `RiskEngine.ingest`.

        Raises:
            ConfigError: Transactions come from Kafka here.
        """
        if not self.writable:
            raise ConfigError("this server reads its transactions from Kafka; send them to the topic")
        return self._engines()[0].ingest(data, scores=scores)

    def is_busy(self) -> bool:
        """Whether a lookup might have to wait for something else that is done."""
        return any(engine.is_busy for engine in self._engines().values())

    def stats(self) -> Stats:
        """What all engines here hold and have seen."""
        parts = [engine.stats() for engine in self._engines().values()]
        return Stats(
            users=sum(part.users for part in parts),
            transactions=sum(part.transactions for part in parts),
            clock=max((part.clock for part in parts if part.clock is not None), default=None),
            bytes=sum(part.bytes for part in parts),
            rows=sum(part.rows for part in parts),
            accepted=sum(part.accepted for part in parts),
            rejected={reason: count for reason in REASONS if (count := sum(part.rejected.get(reason, 0) for part in parts))},
            rounded=sum(part.rounded for part in parts),
        )

    def digests(self) -> dict[int, str]:
        """The digest of each engine, by partition."""
        return {number: engine.digest() for number, engine in sorted(self._engines().items())}

    def save(self, folder: str) -> SnapshotInfo:
        """Save the one engine of a service that takes transactions."""
        if not self.writable:
            raise ConfigError("a node saves its partitions by itself")
        return self._engines()[0].save(folder)

    # ---- shared --------------------------------------------------------------------------------------------------------------

    def _one_table(self, tables: list[Any]) -> Any:
        if not tables:
            raise StaleError("no partition is here; ask the nodes that have them")
        return pa.concat_tables(self._of_kind(table) for table in tables)

    def _of_kind(self, table: Any) -> Any:
        """An engine without rows does not know the kind of ids yet."""
        kinds = {"int64": pa.int64(), "uint64": pa.uint64(), "string": pa.string(), "binary": pa.binary()}
        wanted = kinds.get(self.kind() or "", table.schema.field("user_id").type)
        return table if len(table) else table.set_column(0, "user_id", pa.chunked_array([], wanted))

    def _only_engine(self) -> RiskEngine | None:
        """The engine that has all users, if there is one."""
        return self._engines().get(0) if self._partitions == 1 else None

    def _engine_of(self, user_id: Any) -> RiskEngine:
        only = self._only_engine()
        if only is not None:
            return only
        ((engine, _),) = self._spread(self.users_of([user_id]))
        return engine

    def _spread(self, array: Any) -> list[tuple[RiskEngine, Any]]:
        """Engines, and the places of the users that each has, (m,) int64; None: all."""
        engines, only = self._engines(), self._only_engine()
        if only is not None:
            return [(only, None)]
        chosen = partition_of(ids_of(array, self.config.user_id), self._partitions)
        chosen[chosen < 0] = next(iter(engines), -1)  # a null is nobody's
        there = np.unique(chosen).tolist()
        missing = [number for number in there if number not in engines]
        if missing:
            row = int(np.argmax(np.isin(chosen, missing)))
            raise StaleError(
                f"user_ids[{row}] is in partition {chosen[row]}, which another node has; this one has {sorted(engines) or 'none'}: ask "
                "the other, or Redis"
            )
        if not there and not engines:
            raise StaleError("no partition is here; ask the nodes that have them")
        return [(engines[number], np.flatnonzero(chosen == number)) for number in there] or [(next(iter(engines.values())), None)]


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError("it is no integer in decimal")
    return int(text)


class Observer:
    """Who counts what a server does; this one does not."""

    def looked_up(self, seconds: float) -> None:
        """A lookup was answered."""

    def ingested(self, seconds: float) -> None:
        """Transactions were applied."""

    def text(self) -> tuple[bytes, str]:
        """All figures, and the type of that text."""
        return b"", "text/plain"
