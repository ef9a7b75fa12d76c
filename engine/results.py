"""What the engine answers with: small frozen records around NumPy and Arrow data."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.arrays import array_of, taken
from engine.config import REASONS, TIME_NS_MIN, Config
from engine.instants import instant_text


def _html_table(rows: Sequence[tuple[str, object]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of the rows of one `ingest`.

    Attributes:
        rows: Rows read.
        accepted: Rows applied.
        rejected: Rows not applied, by reason; reasons that did not occur are left out.
        rounded: Rows applied whose amount had to be rounded to the grid.
        scores: (rows,) float64 Arrow array, null for rows not applied; None unless asked for.
    """

    rows: int
    accepted: int
    rejected: dict[str, int]
    rounded: int
    scores: Any = None
    _rejects: tuple[Any, ...] = field(default=(), repr=False)
    _schema: Any = field(default=None, repr=False)

    def rejects(self) -> Any:
        """The rows not applied, as an Arrow table of the original columns and `reason`."""
        if self._rejects:
            return pa.Table.from_batches(self._rejects)
        schema = pa.schema([]) if self._schema is None else self._schema
        return pa.Table.from_batches([], schema.append(pa.field("reason", pa.string())))

    @classmethod
    def merged(cls, parts: list[IngestResult], wanted: bool, schema: Any) -> IngestResult:
        """One result of the results of a source's batches."""
        scores = None
        if wanted:
            scores = joined([part.scores for part in parts]) if parts else pa.array([], pa.float64())
        return cls(
            rows=sum(part.rows for part in parts),
            accepted=sum(part.accepted for part in parts),
            rejected={reason: count for reason in REASONS if (count := sum(part.rejected.get(reason, 0) for part in parts))},
            rounded=sum(part.rounded for part in parts),
            scores=scores,
            _rejects=tuple(batch for part in parts for batch in part._rejects),
            _schema=schema,
        )

    def _repr_html_(self) -> str:
        counts = [("rows", self.rows), ("accepted", self.accepted), *self.rejected.items(), ("rounded", self.rounded)]
        return _html_table([(name, f"{count:,}") for name, count in counts])


def joined(arrays: list[Any]) -> Any:
    """Arrow arrays as one; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)


@dataclass(frozen=True, slots=True)
class Explanation:
    """A score and the transactions behind it.

    Attributes:
        user_id: Whose score it is.
        score: float64, as `RiskEngine.score` gives it.
        sum: Exact sum of the amounts that count.
        count: How many count.
        window: First and last instant that count, as numpy.datetime64[ns], both included.
        transactions: Arrow table `timestamp, amount` of those that count, oldest first.
        reason: Why the score is what it is, in a sentence.
    """

    user_id: Any
    score: float
    sum: Decimal
    count: int
    window: tuple[np.datetime64, np.datetime64]
    transactions: Any
    reason: str

    @classmethod
    def of(cls, user_id: Any, score: float, times: NDArray[np.int64], units: NDArray[np.int64], at_ns: int, config: Config) -> Explanation:
        """The explanation of a user's score at an instant from all of the user's retained transactions."""
        first_ns = max(at_ns - config.reach_ns, TIME_NS_MIN)
        first, last = int(np.searchsorted(times, first_ns)), int(np.searchsorted(times, at_ns, side="right"))
        counted = [Decimal(unit).scaleb(-config.decimals) for unit in units[first:last].tolist()]
        total = Decimal(sum(units[first:last].tolist())).scaleb(-config.decimals)
        return cls(
            user_id=user_id,
            score=score,
            sum=total,
            count=len(counted),
            window=(np.datetime64(first_ns, "ns"), np.datetime64(at_ns, "ns")),
            transactions=pa.table(
                {
                    "timestamp": pa.array(times[first:last], pa.timestamp("ns", "UTC")),
                    "amount": pa.array(counted, pa.decimal128(38, config.decimals)),
                }
            ),
            reason=_reason(times, first, last, total),
        )

    def _repr_html_(self) -> str:
        rows = zip(self.transactions["timestamp"].to_pylist(), self.transactions["amount"].to_pylist(), strict=True)
        return f"<p>{html.escape(self.reason)}</p>" + _html_table([(str(time), amount) for time, amount in rows])


def _reason(times: NDArray[np.int64], first: int, last: int, total: Decimal) -> str:
    if last > first:
        return f"{last - first:,} transaction{'s' if last - first > 1 else ''} in the window, sum {total}"
    if len(times) == 0:
        return "0.0: the user has no retained transaction"
    if first > 0:
        return f"0.0: no transaction in the window; the newest before it is of {instant_text(int(times[first - 1]))}"
    return f"0.0: no transaction in the window; the first after it is of {instant_text(int(times[0]))}"


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine holds and has seen.

    Attributes:
        users: Users with a retained transaction.
        transactions: Transactions retained.
        clock: Greatest event time accepted, numpy.datetime64[ns]; None before the first.
        bytes: Memory of the state that has been touched.
        rows, accepted, rejected, rounded: Totals since the engine was made, as in `IngestResult`.
    """

    users: int
    transactions: int
    clock: np.datetime64 | None
    bytes: int
    rows: int
    accepted: int
    rejected: dict[str, int]
    rounded: int

    def _repr_html_(self) -> str:
        return _html_table(
            [
                ("users", f"{self.users:,}"),
                ("transactions", f"{self.transactions:,}"),
                ("clock", self.clock),
                ("bytes", f"{self.bytes:,}"),
                ("rows", f"{self.rows:,}"),
                ("accepted", f"{self.accepted:,}"),
                *((reason, f"{count:,}") for reason, count in self.rejected.items()),
                ("rounded", f"{self.rounded:,}"),
            ]
        )


def reason_counts(counts: NDArray[np.int64]) -> dict[str, int]:
    """Counts per reason from counts per code, without the code 0 of rows applied and without zeros."""
    return {reason: int(count) for reason, count in zip(REASONS, counts[1:], strict=True) if count}


def rows_with_reasons(batch: Any, reasons: NDArray[np.uint8]) -> Any:
    """The rows of a batch that have a reason, with the column `reason`."""
    places = np.flatnonzero(reasons)
    names = pa.array(REASONS, pa.string()).take(array_of(reasons[places].astype(np.int64) - 1, pa.int64()))
    return pa.RecordBatch.from_arrays(
        [*(taken(column, places) for column in batch.columns), names], schema=batch.schema.append(pa.field("reason", pa.string()))
    )
