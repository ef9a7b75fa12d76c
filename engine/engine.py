"""RiskEngine: the public face of an engine. It checks what it is asked, takes the lock, and hands on.

What it is not: it keeps no state (`Core` and `Shard` do), loops over no rows (kernels do), and reads no clock but the one it was given for
"now".

Limits: 2**26 retained transactions per user; `users` users at a time; memory of the machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import NO_BYTES, array_of
from engine.columns import Columns, Ids, columns_of, ids_of, ids_to_arrow
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.core import KINDS, Core
from engine.errors import ConfigError, EngineError, SchemaError, TimeTooOldError
from engine.instants import amount_units, arrival_times, instant_ns, instant_text
from engine.ranking import Ranking
from engine.results import Explanation, IngestResult, Stats, reason_counts
from engine.saving import Saver, loaded
from engine.shard import Features, UserFeatures, features_table
from engine.snapshot import SnapshotInfo, state_digest
from engine.sources import read
from engine.userids import asked_ids, bytes_of_one, id_array, ids_of_one, unknown_ids


class RiskEngine:
    """Exact rolling scores per user: sum of the amounts in the window / their number, at any instant (S1-S15).

    Args:
        window: What a score covers, such as "60s", `timedelta` or `numpy.timedelta64`.
        lateness: How far behind the clock a row is still applied; default: `window`.
        closed: "both" counts a transaction exactly `window` old, "right" does not.
        decimals: Amounts are held exactly in units of 10**-decimals; 0 to 8.
        users: Most users with a retained transaction at a time. Memory is taken as users come, not beforehand.
        shards: Parts worked on by a thread each; default: one per core. Never changes a result.
        clock: What a lookup without `at` takes for now: "event" time, or the later of it and the "wall" clock.
        max_ahead: Rows further ahead of the wall clock are rejected as `future`; None: never.
        max_jump: Rows further ahead of the engine's clock are rejected as `jump`; None: never.
        time_unit: Unit of integer times: "s", "ms", "us" or "ns". Without it integer times are refused.
        user_id, amount, timestamp: Column names.
        now: Wall clock, a callable that returns nanoseconds since the Unix epoch; default: `time.time_ns`.

    Raises:
        ConfigError: An option cannot be used.

    Thread-safe: calls from several threads take their turns, and each sees the state between two batches.

    Example:
        >>> engine = RiskEngine("60s", users=1000)
        >>> rows = {"user_id": ["alice", "bob", "alice"], "amount": [10.0, 3.5, 15.0], "timestamp": [0, 1, 2]}
        >>> engine = RiskEngine("60s", users=1000, time_unit="s")
        >>> engine.ingest(rows, scores=True).scores.to_pylist()
        [10.0, 3.5, 12.5]
        >>> engine.scores(["alice", "bob", "carol"])
        array([12.5,  3.5,  0. ])
        >>> engine.score("alice", at="1970-01-01T00:01:01")
        15.0
    """

    def __init__(
        self,
        window: Any = "60s",
        *,
        lateness: Any = None,
        closed: str = "both",
        decimals: int = 4,
        users: int = 10_000_000,
        shards: int | None = None,
        clock: str = "event",
        max_ahead: Any = "10s",
        max_jump: Any = None,
        time_unit: str | None = None,
        user_id: str = "user_id",
        amount: str = "amount",
        timestamp: str = "timestamp",
        now: Callable[[], int] | None = None,
    ) -> None:
        config = Config.of(
            window,
            lateness=lateness,
            closed=closed,
            decimals=decimals,
            users=users,
            shards=shards,
            clock=clock,
            max_ahead=max_ahead,
            max_jump=max_jump,
            time_unit=time_unit,
            user_id=user_id,
            amount=amount,
            timestamp=timestamp,
        )
        self._begin(Core(config, time.time_ns if now is None else now))

    def _begin(self, core: Core) -> None:
        self._core = core
        self.config = core.config
        self._lock = threading.RLock()
        self._saver = Saver(core, self._lock)
        self._closed = False
        self.restored: SnapshotInfo | None = None

    # ---- rows in -------------------------------------------------------------------------------------------------------------

    def ingest(self, data: Any, *, scores: bool = False, arrival: Any = None) -> IngestResult:
        """Apply transactions in the order in which they come.

        Args:
            data: A RecordBatch, Table, RecordBatchReader, polars, pandas or duckdb frame, dict of arrays, or a path, glob or list of paths
                of Parquet, Arrow IPC, CSV or NDJSON. What is in memory is applied whole or not at all (S13), which takes some 40 bytes
                a row meanwhile; streams and files are applied batch by batch, each whole or not at all.
            scores: Also give each row its user's score at the row's own time, itself included (S9).
            arrival: What the wall clock showed when each row arrived, (rows,) datetime64 or int64 nanoseconds since the epoch, for data in
                memory: `max_ahead` is measured from it instead of from now, so that rows that come again are judged as the first time.

        Returns:
            IngestResult: counts, scores, and the rows that were not applied.

        Raises:
            SchemaError: Columns or types cannot be used, or the source cannot be read.
            CapacityError: More than `users` users would have a retained transaction, or memory is short.

        Cost: two random memory lines a row for users of up to four retained transactions, up to four for others.

        Example:
            >>> engine = RiskEngine(time_unit="ms", users=1000)
            >>> engine.ingest({"user_id": [1, 1, None], "amount": [2.5, 3.5, 1.0], "timestamp": [0, 5, 9]}).rejected
            {'null_user': 1}
        """
        parts: list[IngestResult] = []
        schema = None
        try:
            for unit in read(data, self.config):
                arrival_ns = None if arrival is None else arrival_times(arrival, sum(batch.num_rows for batch in unit))
                schema = unit[0].schema if unit else schema
                pieces = [columns_of(batch, self.config) for batch in unit]  # while others may ask
                self._saver.let_pass()
                with self._lock:
                    self._check_open()
                    parts.append(self._core.ingest(pieces, scores, arrival_ns))
        except EngineError as error:
            applied = sum(part.rows for part in parts)
            if applied:
                error.add_note(f"{applied:,} rows of earlier batches of this source are applied")
            raise
        return IngestResult.merged(parts, scores, schema)

    def add(self, user_id: Any, amount: Any, timestamp: Any) -> float:
        """Apply one transaction.

        Args:
            user_id: int, str or bytes, the kind of id the engine has.
            amount: int, float or Decimal.
            timestamp: datetime, numpy.datetime64, Arrow scalar or ISO 8601 text; an integer if the engine has a `time_unit`.

        Returns:
            The user's score at the transaction's time, itself included; nan if the row was rejected, which `stats()` counts.

        Raises:
            SchemaError: A value has a type that cannot be used.
            CapacityError: There is no room for another user.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z"), engine.add("alice", 15, "2026-01-01T00:00:02Z")
            (10.0, 12.5)
        """
        self._saver.let_pass()
        units, rounded, amount_reason = amount_units(amount, self.config)
        when_ns, time_reason = (0, "null_timestamp") if timestamp is None else self._row_time_ns(timestamp)
        if amount_reason is None and time_reason is None:
            with self._lock:
                self._check_open()
                score = self._core.add_plain(user_id, units, when_ns, rounded)
                if score is not None:
                    return score
        ids = ids_of_one(user_id, self.config.user_id)
        reasons = [reason for reason in ("null_user" if user_id is None else None, amount_reason, time_reason) if reason]
        reason = min((REASONS.index(reason) + 1 for reason in reasons), default=0)
        columns = Columns(
            batch=None,
            ids=ids,
            time_ns=np.array([0 if reason else when_ns]),
            amount_units=np.array([0 if reason else units]),
            reasons=np.array([reason], np.uint8),
            rounded=np.array([0 if reason else rounded], np.uint8),
        )
        with self._lock:
            self._check_open()
            return self._core.add(columns)

    def _row_time_ns(self, timestamp: Any) -> tuple[int, str | None]:
        when_ns = instant_ns(timestamp, self.config.timestamp, time_unit=self.config.time_unit, error=SchemaError)
        if TIME_NS_MIN <= when_ns <= TIME_NS_MAX:
            return when_ns, None
        return 0, "timestamp_out_of_range"

    # ---- scores out ----------------------------------------------------------------------------------------------------------

    def score(self, user_id: Any, *, at: Any = None) -> float:
        """A user's score at an instant; 0.0 for a user without transactions in the window, or unknown.

        Args:
            user_id: int, str or bytes.
            at: datetime, numpy.datetime64, Arrow scalar, ISO 8601 text or "now"; default: the clock (S6).

        Raises:
            TimeTooOldError: `at` is before clock - lateness.
            SchemaError: The id is of another kind than the engine's.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> engine.score("alice"), engine.score("alice", at="2026-01-01T00:01:01Z")
            (10.0, 0.0)
        """
        with self._lock:
            kind = self._core.kind
            id_kind = KINDS.get(type(user_id))
            if kind is None or id_kind != kind or (id_kind == "int64" and not -(2**63) <= user_id < 2**63):
                return float(self._scores(ids_of_one(user_id, self.config.user_id), at)[0][0])
            if self._closed or self._core.torn:
                self._check_open()
            at_ns = self._core.clock_ns if at is None and self.config.clock == "event" else self._at_ns(at)
            assert at_ns is not None, "an engine that has a kind of ids has a clock"
            if id_kind == "int64":
                return self._core.shards.score(user_id, NO_BYTES, False, at_ns)
            return self._core.shards.score(0, bytes_of_one(user_id, self.config.user_id), True, at_ns)

    def scores(self, user_ids: Any, *, at: Any = None) -> Any:
        """Scores of many users at an instant.

        Args:
            user_ids: (n,) list, NumPy array, or Arrow array or anything that exports one (polars, pandas series).
            at: As in `score`.

        Returns:
            (n,) float64 `ndarray`, nan for a null id; or for Arrow data a `pyarrow.DoubleArray`, null for a null id.

        Raises:
            TimeTooOldError, SchemaError: As in `score`.

        Cost: two random memory lines a user.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add(7, 10, "2026-01-01T00:00:00Z")
            10.0
            >>> engine.scores([7, 8])
            array([10.,  0.])
        """
        return self.scores_and_instant(user_ids, at=at)[0]

    def scores_and_instant(self, user_ids: Any, *, at: Any = None) -> tuple[Any, int | None]:
        """As `scores`, and of which instant they are, ns; None without one. Costs and raises as that."""
        ids, is_arrow = asked_ids(user_ids, self.config.user_id)
        with self._lock:
            scores, at_ns = self._scores(ids, at)
        nulls = None if ids.valid is None else ~ids.valid
        if is_arrow:
            return array_of(scores, pa.float64(), nulls), at_ns
        if nulls is not None:
            scores[nulls] = np.nan
        return scores, at_ns

    def _scores(self, ids: Ids, at: Any) -> tuple[NDArray[np.float64], int | None]:
        self._check_open()
        at_ns = self._at_ns(at)
        unknown = unknown_ids(ids, self._core.kind)
        if at_ns is None or self._core.kind is None:
            return np.zeros(len(ids), np.float64), at_ns
        return self._core.shards.scores(ids, unknown, at_ns), at_ns

    def features(self, user_ids: Any = None, *, at: Any = None) -> Any:
        """What is known of users' windows at an instant.

        Args:
            user_ids: As in `scores`; default: all users with a retained transaction, by id.
            at: As in `score`.

        Returns:
            Arrow table, a row a user: `user_id`; `count` int64; `sum` decimal128(38, decimals), exact; `score` float64; and timestamps
            in ns, UTC: `newest`, the newest transaction that counts, null if none does; `valid_until`, the last instant with the same
            transactions in the window if nothing more arrives, null if that is for ever; `zero_at`, the first instant after `at` at
            which the window is empty, null if it is empty already.

        Raises:
            TimeTooOldError, SchemaError: As in `score`.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> engine.features(["alice"]).select(["count", "sum", "score"]).to_pylist()
            [{'count': 1, 'sum': Decimal('10.0000'), 'score': 10.0}]
        """
        with self._lock:
            self._check_open()
            at_ns = self._at_ns(at)
            if user_ids is None:
                return features_table(*self._features_of_all(at_ns), self.config.decimals).sort_by("user_id")
            array = id_array(user_ids)[0]
            ids = ids_of(array, self.config.user_id)
            unknown = unknown_ids(ids, self._core.kind)
            if at_ns is None or self._core.kind is None:
                features = Features.empty(len(ids))
            else:
                features = self._core.shards.features(ids, unknown, at_ns, self._core.clock_ns)
            return features_table(ids_to_arrow(ids), features, self.config.decimals)

    def features_of_one(self, user_id: Any, *, at: Any = None) -> tuple[UserFeatures, int | None]:
        """What `features` says of one user, as numbers of Python, and of which instant, ns. Cost: some 4 us. Raises as `score`."""
        with self._lock:
            self._check_open()
            at_ns, kind = self._at_ns(at), self._core.kind
            found = KINDS.get(type(user_id))
            if found is None or found != kind or (found == "int64" and not -(2**63) <= user_id < 2**63):
                ids = ids_of_one(user_id, self.config.user_id)
                if at_ns is None or kind is None or unknown_ids(ids, kind)[0]:
                    return UserFeatures(), at_ns
                user_id = int(ids.values[0])  # an integer that the engine keeps as another kind
            assert at_ns is not None, "an engine that has a kind of ids has a clock"
            plain = (user_id, NO_BYTES, False) if isinstance(user_id, int) else (0, bytes_of_one(user_id, self.config.user_id), True)
            return self._core.shards.features_of_one(*plain, at_ns, self._core.clock_ns), at_ns

    def top(self, k: int = 10, *, by: str = "score", at: Any = None) -> Any:
        """The `k` users with the greatest `score`, `sum`, `count` or `newest` among those with a transaction in the window.

        Returns:
            Arrow table with the columns of `features`, greatest first, equals by user id.

        Raises:
            ConfigError: `k` or `by` cannot be used.
            TimeTooOldError: As in `score`.

        Cost: a pass over all users.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z"), engine.add("bob", 20, "2026-01-01T00:00:00Z")
            (10.0, 20.0)
            >>> engine.top(1)["user_id"].to_pylist()
            ['bob']
        """
        ranking = Ranking(self._core.shards, k, by, self.config.decimals)
        with self._lock:
            self._check_open()
            at_ns = self._at_ns(at)
            while self._look_on(ranking, at_ns):
                pass
            return ranking.table

    def top_in_parts(self, k: int = 10, *, by: str = "score") -> Iterator[Any]:
        """As `top` without `at`, but rows and lookups of other threads go on meanwhile: gives the greatest of the users looked at so far.

        Users are looked at some 32,768 at a time, each at the instant that is then now. `features` tells how those found stand together.
        """
        ranking, more = Ranking(self._core.shards, k, by, self.config.decimals), True
        while more:
            with self._lock:
                self._check_open()
                more = self._look_on(ranking, self._at_ns(None))
            yield ranking.table

    def _look_on(self, ranking: Ranking, at_ns: int | None) -> bool:
        kind = self._core.kind
        return at_ns is not None and kind is not None and ranking.look_on(kind, at_ns, self._core.clock_ns)

    def changes(self, *, at: Any = None) -> Any:
        """Users whose score at `at` is another than what the previous call reported, or than 0.0 if none has.

        So the first call reports every user with a score that is not 0.0; each further one those whose scores are others since, be it that
        they had transactions, or that some left or entered the window. What was reported is no part of a snapshot: a loaded engine
        reports every user again.

        Args:
            at: As in `score`. Each call that goes back in time looks at all users.

        Returns:
            Arrow table with the columns of `features`, by user id.

        Raises:
            TimeTooOldError: As in `score`; then nothing counts as reported.

        Cost: a byte for each user, and some 100 ns for each who changed. 9 bytes more memory a user from the first call on.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> engine.changes()["user_id"].to_pylist(), engine.changes()["user_id"].to_pylist()
            (['alice'], [])
            >>> engine.changes(at="2026-01-01T00:01:01Z").select(["user_id", "score"]).to_pylist()
            [{'user_id': 'alice', 'score': 0.0}]
        """
        return self._changed(at, False).sort_by("user_id")

    def updates(self, *, at: Any = None, anew: bool = False) -> Any:
        """As `changes`, for a cache that also keeps how long a score is valid.

        It lists every user with a transaction in the window of whom any feature is another at `at` than when this or `changes` was last
        called, and sometimes one of whom none is; and who has none any more, if their score was not 0.0.

        Args:
            at: As in `changes`.
            anew: As if neither was ever called: list every user with a transaction in the window.

        Returns:
            Arrow table with the columns of `features`, in no order.

        Raises:
            TimeTooOldError: As in `score`.

        Cost: as `changes`, without sorting.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z"), len(engine.updates())
            (10.0, 1)
            >>> engine.add("alice", 10, "2026-01-01T00:00:30Z"), len(engine.changes()), len(engine.updates(anew=True))
            (10.0, 0, 1)
        """
        with self._lock:
            if anew:
                self._core.shards.forget_reports()
            return self._changed(at, True)

    def _changed(self, at: Any, touched: bool) -> Any:
        with self._lock:
            self._check_open()
            at_ns = self._at_ns(at)
            if at_ns is None or self._core.kind is None:
                return features_table(pa.array([], pa.string()), Features.empty(0), self.config.decimals)
            parts = self._core.shards.changed(self._core.kind, at_ns, self._core.clock_ns, touched)
            tables = [features_table(ids, features, self.config.decimals) for ids, features in parts]
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()

    def _features_of_all(self, at_ns: int | None) -> tuple[Any, Features]:
        if at_ns is None or self._core.kind is None:
            return pa.array([], pa.string()), Features.empty(0)
        return self._core.shards.features_of_all(self._core.kind, at_ns, self._core.clock_ns)

    def explain(self, user_id: Any, *, at: Any = None) -> Explanation:
        """A user's score with the very transactions behind it.

        Raises:
            TimeTooOldError, SchemaError: As in `score`.

        Example:
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> engine.explain("alice").reason
            '1 transaction in the window, sum 10.0000'
        """
        ids = ids_of_one(user_id, self.config.user_id)
        with self._lock:
            scores, at_ns = self._scores(ids, at)
            times, units = self._entries(ids)
        return Explanation.of(user_id, float(scores[0]), times, units, 0 if at_ns is None else at_ns, self.config)

    def _entries(self, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Times and units of one user's retained transactions."""
        unknown = unknown_ids(ids, self._core.kind)
        if self._core.kind is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return self._core.shards.entries(ids, unknown, self._core.clock_ns)

    # ---- snapshots -----------------------------------------------------------------------------------------------------------

    def save(self, uri: Any, *, position: Any = None) -> SnapshotInfo:
        """Write a snapshot and wait until it is durable. Rows and lookups of other threads go on meanwhile.

        Args:
            uri: Folder of snapshots: a path, a URI of pyarrow.fs such as `s3://bucket/folder`, or a `pyarrow.fs.FileSystem`. The last
                three snapshots in it are kept.
            position: Where the source goes on after the rows applied so far; any JSON value, given back by `load`.

        Raises:
            SnapshotError: It could not be written; the engine and the older snapshots are as they were.
            ConfigError: `uri` or `position` cannot be used.

        Cost: some 60 ns a transaction; pauses of a few milliseconds; memory for two files of a million transactions.

        Example:
            >>> import tempfile
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     info = engine.save(folder, position={"offset": 17})
            ...     RiskEngine.load(folder).restored.position, info.transactions
            ({'offset': 17}, 1)
        """
        return self.start_save(uri, position=position).result()

    def start_save(self, uri: Any, *, position: Any = None) -> Future[SnapshotInfo]:
        """As `save`, but return at once. The snapshot is of the state as it is now, whatever is applied while it is written.

        Returns:
            Future: its `result()` waits for what `save` returns or raises.

        Raises:
            EngineError: Another snapshot of this engine is being written.
            ConfigError: As in `save`.
        """
        rooms = self._core.shards.copy_rooms()
        with self._lock:
            self._check_open()
            return self._saver.start(uri, position, rooms)

    @classmethod
    def load(
        cls, uri: Any, *, now: Callable[[], int] | None = None, accept: Callable[[Any], str | None] | None = None, **overrides: Any
    ) -> Self:
        """An engine with the state of a snapshot. What it was loaded from is in its attribute `restored`, the position among it.

        Args:
            uri: As in `save`: the newest snapshot that is whole is taken, and those passed over are named in `restored`; or the folder of
                one snapshot.
            now: As in `RiskEngine`.
            accept: Is told the position of a snapshot, and says why that cannot be used, so that an older one is tried; None if it can.
            overrides: Other options of `RiskEngine` than those that were saved: more `users`, another number of `shards` (it is not saved:
                the default is one per core), guards, column names. What the state depends on cannot be changed.

        Raises:
            SnapshotError: There is none that is whole and accepted.
            ConfigError: An option contradicts the state.

        Cost: some 200 ns a transaction; memory for a file of a million transactions beside the engine.
        """
        core, info = loaded(uri, time.time_ns if now is None else now, overrides, accept)
        engine = cls.__new__(cls)
        engine._begin(core)
        engine.restored = info
        return engine

    # ---- the whole -----------------------------------------------------------------------------------------------------------

    def expire(self, *, at: Any = None) -> int:
        """Free what no exact lookup can need any more. It happens little by little with every batch; this does all of it at once.

        Args:
            at: As if the clock stood there, if that is earlier than the clock; default: the clock.

        Returns:
            Transactions freed. No answer changes by it.

        Cost: a pass over all slots.
        """
        with self._lock:
            self._check_open()
            if self._core.clock_ns is None:
                return 0
            at_ns = self._core.clock_ns if at is None else min(self._core.clock_ns, self._instant_ns(at))
            return self._core.shards.expire(at_ns, self._core.kind)

    @property
    def clock_ns(self) -> int | None:
        """Greatest event time accepted (S6), nanoseconds since the epoch; None before the first row."""
        return self._core.clock_ns

    def wall_ns(self) -> int:
        """The wall clock, or what `now` gives in its place, nanoseconds since the epoch."""
        return self._core.now()

    @property
    def is_busy(self) -> bool:
        """Whether another thread has the lock, so that a call might have to wait."""
        if not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

    @property
    def id_kind(self) -> str | None:
        """Kind of the user ids: "int64", "uint64", "string" or "binary"; None before the first row."""
        return self._core.kind

    def stats(self) -> Stats:
        """What the engine holds and has seen. Cost: a pass over all slots."""
        with self._lock:
            self._check_open()
            users, transactions = self._core.shards.retained(self._core.clock_ns)
            return Stats(
                users=users,
                transactions=transactions,
                clock=None if self._core.clock_ns is None else np.datetime64(self._core.clock_ns, "ns"),
                bytes=self._core.shards.bytes_used,
                rows=self._core.rows,
                accepted=int(self._core.by_reason[0]),
                rejected=reason_counts(self._core.by_reason),
                rounded=self._core.rounded,
            )

    def digest(self) -> str:
        """Hash of the logical state: clock, configuration of the window and all retained transactions, in hex.

        Independent of the order of users, of shards, memory layout, capacity and totals. Cost: a pass over all transactions.
        """
        with self._lock:
            self._check_open()
            users, transactions = self._core.shards.retained(self._core.clock_ns)
            lanes = self._core.shards.digest(self._core.clock_ns, self._core.kind)
            return state_digest(self.config, self._core.clock_ns, users, transactions, lanes)

    def __len__(self) -> int:
        """Users with a retained transaction. Cost: a pass over all slots."""
        with self._lock:
            self._check_open()
            return self._core.shards.retained(self._core.clock_ns)[0]

    def __bool__(self) -> bool:
        """An engine is true, also when it is empty."""
        return True

    def __contains__(self, user_id: object) -> bool:
        """Whether a user has a retained transaction."""
        with self._lock:
            self._check_open()
            return len(self._entries(ids_of_one(user_id, self.config.user_id))[0]) > 0

    def __reduce__(self) -> str:
        raise TypeError("an engine cannot be pickled or copied; use save() and load()")

    def __repr__(self) -> str:
        if self._closed:
            return "RiskEngine(closed)"
        clock = "no rows yet" if self._core.clock_ns is None else f"clock {instant_text(self._core.clock_ns)}"
        config = self.config
        return (
            f"RiskEngine(window={config.window_ns / 1e9:g}s, closed={config.closed!r}, "
            f"users={self._core.shards.users:,} of {config.users:,}, {clock}, {self._core.rows:,} rows)"
        )

    def _repr_html_(self) -> str:
        return self.stats()._repr_html_()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """All users with a retained transaction, as `features()` gives them."""
        return self.features().__arrow_c_stream__(requested_schema)

    def close(self) -> None:
        """Free memory and threads, after a snapshot that is being written is. The engine cannot be used afterwards."""
        self._saver.wait()
        with self._lock:
            self._core.shards.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- shared --------------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        if self._core.torn:
            raise EngineError("a batch was interrupted half-way, so scores would be wrong; make a new engine and replay")

    def _instant_ns(self, at: Any) -> int:
        when_ns = self._core.now() if isinstance(at, str) and at == "now" else instant_ns(at, "at", time_unit=None, error=ConfigError)
        if not TIME_NS_MIN <= when_ns <= TIME_NS_MAX:
            raise ConfigError(f"at={at!r} is beyond what int64 nanoseconds can say (1677 to 2262)")
        return when_ns

    def _at_ns(self, at: Any) -> int | None:
        """The instant of a lookup (S6, S10); None while there is no clock and no instant was given."""
        clock_ns = self._core.clock_ns
        if at is not None:
            at_ns = self._instant_ns(at)
        elif self.config.clock == "wall":
            at_ns = self._core.now() if clock_ns is None else max(clock_ns, self._core.now())
        elif clock_ns is None:
            return None
        else:
            at_ns = clock_ns
        if clock_ns is not None and at_ns < clock_ns - self.config.lateness_ns:
            oldest_ns = max(clock_ns - self.config.lateness_ns, TIME_NS_MIN)
            raise TimeTooOldError(
                f"at={instant_text(at_ns)} is before {instant_text(oldest_ns)}, the oldest instant that is still exact (clock - lateness); "
                "ask for a later one, or make the engine with more lateness"
            )
        return at_ns
