"""Core: the clock, the totals and the shards of an engine, and the steps that rows pass on their way in. One thread at a time.

    check and convert (columns) -> guards of the clock -> split by shard -> a slot for each user -> rows into rings

Nothing of a batch is applied before the fourth step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import NO_BYTES, array_of
from engine.columns import Columns
from engine.config import REASONS, TIME_NS_MAX, TIME_NS_MIN, Config
from engine.errors import CapacityError
from engine.kernels import admit_rows
from engine.results import IngestResult, joined, reason_counts, rows_with_reasons
from engine.shards import Piece, Shards
from engine.userids import bytes_of_one, check_kinds

_FUTURE: Final = REASONS.index("future") + 1

#: Kinds of the ids that are looked up without an array around them.
KINDS: Final = {int: "int64", str: "string", bytes: "binary"}


class Core:
    """What an engine holds and has seen.

    Attributes:
        config: What it was asked to be.
        now: The wall clock.
        shards: Its users.
        kind: Kind of their ids; None before the first row.
        clock_ns: Greatest event time accepted; None before the first.
        rows, rounded: Rows seen, and applied with a rounded amount.
        by_reason: Rows not applied, by reason; element 0 counts those that were.
        torn: Whether a batch was interrupted, so that some of its rows are applied and others are not.
    """

    def __init__(self, config: Config, now: Callable[[], int]) -> None:
        self.config: Final = config
        self.now: Final = now
        self.shards: Final = Shards(config)
        self.kind: str | None = None
        self.clock_ns: int | None = None
        self.rows = self.rounded = 0
        self.by_reason: NDArray[np.int64] = np.zeros(len(REASONS) + 1, np.int64)
        self.torn = False

    def ingest(self, pieces: list[Columns], wanted: bool, arrival_ns: NDArray[np.int64] | None = None) -> IngestResult:
        """Apply checked batches, all or nothing; `arrival_ns`, a time of each row, takes the place of the wall clock."""
        kind = self._kind_after(pieces)
        admitted = self._apply(pieces, kind, wanted, arrival_ns)
        return self._count(admitted, wanted)

    def _apply(self, pieces: list[Columns], kind: str | None, wanted: bool, arrival_ns: NDArray[np.int64] | None = None) -> list[Piece]:
        """Let rows pass the guards and into the shards, whole or not at all; then move the clock."""
        clock_ns, first, ahead_ns = self.clock_ns, 0, self.config.max_ahead_ns
        if arrival_ns is None or ahead_ns is None:
            each = None
            latest_ns = np.array([self._latest_ns()])
        else:
            each = np.minimum(arrival_ns, TIME_NS_MAX - ahead_ns) + ahead_ns
        admitted = []
        for columns in pieces:
            if each is not None:
                latest_ns = each[first : first + len(columns)]
            piece, clock_ns = self._admit(columns, clock_ns, latest_ns, wanted)
            admitted.append(piece)
            first += len(columns)
        if kind is not None and clock_ns is not None:
            try:
                self.shards.apply(admitted, kind, self.clock_ns)
            except CapacityError:
                raise
            except BaseException:  # such as Ctrl-C: some rows are applied, others are not
                self.torn = True
                raise
            self.kind, self.clock_ns = kind, clock_ns
        return admitted

    def _kind_after(self, pieces: list[Columns]) -> str | None:
        """The kind of ids the engine will have with these batches; SchemaError if they do not go together."""
        kind = self.kind
        for columns in pieces:
            ids = columns.ids
            if len(ids) == 0 or (ids.valid is not None and not ids.valid.any()):
                continue
            kind = kind or ids.kind
            if ids.kind != kind:
                check_kinds(ids, kind, self.config.user_id)
        return kind

    def _latest_ns(self) -> int:
        """The latest time that a row may have now (S8)."""
        if self.config.max_ahead_ns is None:
            return TIME_NS_MAX
        return max(min(self.now() + self.config.max_ahead_ns, TIME_NS_MAX), TIME_NS_MIN - 1)

    def _admit(self, columns: Columns, clock_ns: int | None, latest_ns: NDArray[np.int64], wanted: bool) -> tuple[Piece, int | None]:
        """Let rows pass the guards of the clock (S6-S8), and split those that do by shard."""
        count = len(columns)
        after_ns, units_max = np.empty(count, np.int64), np.zeros(1, np.int64)
        jump_ns = self.config.max_jump_ns
        admitted = admit_rows(
            columns.time_ns,
            columns.amount_units,
            columns.reasons,
            clock_ns is not None,
            clock_ns or 0,
            latest_ns,
            -1 if jump_ns is None else jump_ns,
            self.config.lateness_ns,
            _FUTURE,
            after_ns,
            units_max,
        )
        piece = self.shards.route(columns, after_ns, admitted, int(units_max[0]), wanted)
        return piece, int(after_ns[-1]) if admitted else clock_ns

    def _count(self, pieces: list[Piece], wanted: bool) -> IngestResult:
        counts = np.zeros(len(REASONS) + 1, np.int64)
        rounded = 0
        scores, rejects = [], []
        for piece in pieces:
            columns = piece.columns
            rounded_rows = columns.rounded.view(np.bool_)
            refused = None
            if piece.applied == len(columns):
                counts[0] += len(columns)
            else:
                refused = columns.reasons != 0
                counts += np.bincount(columns.reasons, minlength=len(REASONS) + 1)
                rounded_rows = rounded_rows[~refused]
            rounded += int(np.count_nonzero(rounded_rows))
            if piece.scores is not None:
                scores.append(array_of(piece.scores, pa.float64(), refused))
            if refused is not None:
                rejects.append(rows_with_reasons(columns.batch, columns.reasons))
        self.by_reason += counts
        self.rows += int(counts.sum())
        self.rounded += rounded
        return IngestResult(
            rows=int(counts.sum()),
            accepted=int(counts[0]),
            rejected=reason_counts(counts),
            rounded=rounded,
            scores=joined(scores) if scores else None,
            _rejects=tuple(rejects),
        )

    def add(self, columns: Columns) -> float:
        """Apply one row. Returns its score, nan if it was rejected."""
        kind = self._kind_after([columns])
        (piece,) = self._apply([columns], kind, True)
        self.by_reason[columns.reasons[0]] += 1
        self.rows += 1
        accepted = columns.reasons[0] == 0 and piece.scores is not None
        self.rounded += int(columns.rounded[0]) if accepted else 0
        return float(piece.scores[0]) if accepted and piece.scores is not None else float("nan")

    def add_plain(self, user_id: Any, units: int, when_ns: int, rounded: bool) -> float | None:
        """As `add`, without arrays around the row; None, and nothing done, if it is not plain that the row will be applied."""
        id_kind, clock_ns, config = KINDS.get(type(user_id)), self.clock_ns, self.config
        if id_kind is None or id_kind != self.kind or clock_ns is None:
            return None
        jump_ns = config.max_jump_ns
        late = when_ns < clock_ns - config.lateness_ns
        if late or when_ns > self._latest_ns() or (jump_ns is not None and when_ns > clock_ns + jump_ns):
            return None
        value, data = 0, NO_BYTES
        if id_kind == "int64":
            if not -(2**63) <= user_id < 2**63:
                return None
            value = user_id
        else:
            data = bytes_of_one(user_id, config.user_id)
        try:
            score = self.shards.add(value, data, id_kind, units, when_ns, clock_ns)
        except BaseException:  # such as Ctrl-C: the row may be applied
            self.torn = True
            raise
        if score is None:
            return None
        self.clock_ns = max(clock_ns, when_ns)
        self.by_reason[0] += 1
        self.rows += 1
        self.rounded += rounded
        return score

    def restore(self, kind: str | None, clock_ns: int | None, parts: Iterable[Columns]) -> bool:
        """Take over the transactions of a snapshot. False if a sum is out of range, which only a damaged one can do."""
        self.kind, self.clock_ns = kind, clock_ns
        for columns in parts:
            count, units_max = len(columns), int(np.abs(columns.amount_units).max())
            piece = self.shards.route(columns, np.full(count, clock_ns), count, units_max, False)
            self.shards.apply([piece], str(kind), clock_ns)
            if piece.applied != count:
                return False
        return True
