"""What the engine answers with: small frozen records around NumPy and Arrow data."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa


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
        return (pa.schema([]) if self._schema is None else self._schema).append(pa.field("reason", pa.string())).empty_table()

    def _repr_html_(self) -> str:
        counts = [("rows", self.rows), ("accepted", self.accepted), *self.rejected.items(), ("rounded", self.rounded)]
        return _html_table([(name, f"{count:,}") for name, count in counts])


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

    def _repr_html_(self) -> str:
        rows = zip(self.transactions["timestamp"].to_pylist(), self.transactions["amount"].to_pylist(), strict=True)
        return f"<p>{html.escape(self.reason)}</p>" + _html_table([(str(time), amount) for time, amount in rows])


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
