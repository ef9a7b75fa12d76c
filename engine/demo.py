"""The stream of `riskring serve --demo`: made-up transactions with bursts, disorder and bad rows, at the pace of the wall clock.

It begins a window ago (a minute, if that is shorter), so that the engine is full when somebody first looks. Whoever was held up for longer
than that (a machine that slept) begins anew instead of catching up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa

from engine.config import Config
from engine.generate import transactions

#: Transactions a second.
RATE: Final = 20_000
#: Of whom.
USERS: Final = 100_000
#: Transactions that are sent at a time: those of a tenth of a second.
_BATCH_ROWS: Final = RATE // 10
_BATCH_NS: Final = 10**9 * _BATCH_ROWS // RATE
_LEAD_NS: Final = 60 * 10**9
_YEARS_ROWS: Final = RATE * 10 * 366 * 86_400


def feed(
    ingest: Callable[[Any], Any],
    config: Config,
    kind: str | None,
    now: Callable[[], int],
    wait: Callable[[float], bool],
    seed: int = 0,
) -> None:
    """Send transactions until `wait` says that it is enough.

    Args:
        ingest: Takes a RecordBatch of the columns that the engine expects.
        config: Of the engine.
        kind: Of its user ids so far: integers get integers, all others names.
        now: The wall clock, nanoseconds.
        wait: Waits so many seconds, and tells whether to end.
        seed: Other seeds make other transactions.

    Example:
        >>> sent = []
        >>> feed(sent.append, Config.of(), None, lambda: 1767225600 * 10**9, lambda seconds: True)
        >>> sum(batch.num_rows for batch in sent)  # of 60 s
        1200000
    """
    names = [config.user_id, config.amount, config.timestamp]
    lead_ns = min(config.window_ns, _LEAD_NS)
    while True:
        begins_ns = now() - lead_ns
        stream = transactions(
            _YEARS_ROWS,
            users=USERS,
            rate=RATE,
            skew=0.6,
            bursts=0.05,
            disorder="300ms",
            bad=0.002,
            ids="int" if kind == "int64" else "name",
            start=np.datetime64(begins_ns, "ns"),
            seed=seed,
            batch_rows=_BATCH_ROWS,
        )
        for number, batch in enumerate(stream, 1):
            due_ns = begins_ns + number * _BATCH_NS  # when the last of its rows has arrived
            while (early_ns := due_ns - now()) > 0:
                if wait(early_ns / 1e9):
                    return
            if -early_ns > 2 * lead_ns:
                break
            ingest(pa.RecordBatch.from_arrays(batch.columns, names=names))
        seed += 1
