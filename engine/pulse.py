"""What whoever watches a server is told each second: whether it lives and how fast, who is risky now, what was refused.

What it is not: it keeps no history but that of the last seconds, and decides nothing. It is to cost next to nothing with ten million
users: looking at all of them for the greatest is spread over as many samples as it takes, `BUDGET_SECONDS` each, with the engine free in
between; the candidates found so far are looked up anew in each sample, so that what is shown of them is right at its instant.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import EngineError, StaleError
from engine.instants import instant_text
from engine.results import Stats
from engine.service import Service

#: Users that are shown.
SHOWN: Final = 10
#: Users who are kept in mind, so that somebody moves up when the score of one shown falls.
_CANDIDATES: Final = 50
#: In each sample so long the users are searched for the greatest: 3 % of a core at a sample a second, 10 million users in some 20 s.
BUDGET_SECONDS: Final = 0.03
#: After each part, for a lock that is taken again at once is given to nobody who waits for it.
_PAUSE_SECONDS: Final = 0.0005
#: Rates are of so many seconds, and ranks are compared with those of so many seconds ago.
_RATE_NS: Final = 5 * 10**9
_MOVED_NS: Final = 10 * 10**9


class Pulse:
    """Samples a service. For one thread.

    Args:
        service: Which.
        now: The wall clock, nanoseconds.
        ticks: A clock that never goes back, seconds.
        resident: Gives the memory of the process, bytes.
        saved_at: When the last snapshot was written, in `ticks`; None: never.
    """

    def __init__(
        self,
        service: Service,
        now: Callable[[], int],
        ticks: Callable[[], float],
        resident: Callable[[], int] | None = None,
        saved_at: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._service, self._now, self._ticks, self._resident, self._saved_at = service, now, ticks, resident, saved_at
        self._totals: deque[tuple[int, Stats, int]] = deque()
        self._ranks: deque[tuple[int, dict[Any, tuple[int, float]]]] = deque()
        self._search: Iterator[Any] | None = None
        self._known: Any = None  # user ids, an Arrow array
        self._began = 0.0
        self._took: float | None = None

    def sample(self) -> dict[str, Any]:
        """All of it, as JSON has it. User ids are texts, whatever they are, for a browser's numbers are not exact beyond 2**53.

        Example:
            >>> from engine.engine import RiskEngine
            >>> engine = RiskEngine(users=1000)
            >>> engine.add("alice", 10, "2026-01-01T00:00:00Z")
            10.0
            >>> found = Pulse(Service.of(engine), lambda: 1767225602 * 10**9, lambda: 0.0).sample()
            >>> found["clock"], found["lag_seconds"], found["top"]["users"][0]["score"]
            ('2026-01-01T00:00:00Z', 2.0, 10.0)
        """
        now_ns, service = self._now(), self._service
        config = service.config
        found: dict[str, Any] = {
            "at": instant_text(now_ns),
            "ready": service.ready(),
            "writable": service.writable,
            "window_ns": str(config.window_ns),
            "lateness_ns": str(config.lateness_ns),
            "closed": config.closed,
            "decimals": config.decimals,
            "clock_kind": config.clock,
            "resident_bytes": None if self._resident is None else self._resident(),
        }
        try:
            stats = service.stats()
            top = self._top(now_ns)
        except StaleError as error:  # it is being loaded, or has no partition
            self._search = self._known = None
            return found | {"ready": found["ready"] or str(error)}
        return found | self._figures(now_ns, stats) | {"top": top}

    def text(self) -> bytes:
        """A sample as JSON text, which has no line ends; what went wrong is in `error`."""
        try:
            found = self.sample()
        except EngineError as error:
            found = {"at": instant_text(self._now()), "ready": None, "error": str(error)}
        return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()

    def _figures(self, now_ns: int, stats: Stats) -> dict[str, Any]:
        """Totals, and what is new in a second."""
        lookups = self._service.lookups
        totals = self._totals
        if totals and (now_ns <= totals[-1][0] or stats.rows < totals[-1][1].rows):
            totals.clear()  # the clock was set back, or a partition went
        totals.append((now_ns, stats, lookups))
        while now_ns - totals[0][0] > _RATE_NS and now_ns - totals[1][0] >= _RATE_NS:
            totals.popleft()
        since_ns, before, lookups_before = totals[0]
        seconds = (now_ns - since_ns) / 1e9

        def rate(count: int, count_before: int) -> float | None:
            return (count - count_before) / seconds if seconds else None

        clock_ns = None if stats.clock is None else int(stats.clock.astype(np.int64))
        saved_at = self._saved_at()
        return {
            "clock": None if clock_ns is None else instant_text(clock_ns),
            "lag_seconds": None if clock_ns is None else (now_ns - clock_ns) / 1e9,
            "users": stats.users,
            "transactions": stats.transactions,
            "bytes": stats.bytes,
            "rows": stats.rows,
            "accepted": stats.accepted,
            "rounded": stats.rounded,
            "rejected": {
                reason: {"count": count, "per_second": rate(count, before.rejected.get(reason, 0))}
                for reason, count in stats.rejected.items()
            },
            "lookups": lookups,
            "rows_per_second": rate(stats.rows, before.rows),
            "lookups_per_second": rate(lookups, lookups_before),
            "snapshot_age_seconds": None if saved_at is None else self._ticks() - saved_at,
        }

    # ---- the greatest --------------------------------------------------------------------------------------------------------

    def _top(self, now_ns: int) -> dict[str, Any]:
        """The greatest of the users known to be great, by what they are at one instant, and how they moved."""
        self._look_around()
        answer: dict[str, Any] = {"at": None, "users": [], "searched_in_seconds": self._took}
        if self._known is None:
            return answer
        table, at_ns = self._service.features(self._known, counted=False)
        order = pc.sort_indices(table, [("score", "descending"), ("user_id", "ascending")])
        table = table.take(order).filter(pc.greater(table["count"].take(order), 0))
        self._known = table["user_id"].combine_chunks().slice(0, _CANDIDATES) if len(table) else None
        rows = table.slice(0, SHOWN).to_pylist()  # ten of them
        before = self._ranks_before(now_ns, {row["user_id"]: (rank, row["score"]) for rank, row in enumerate(rows, 1)})
        for rank, row in enumerate(rows, 1):
            rank_before, score_before = (None, None) if before is None else before.get(row["user_id"], (None, None))
            answer["users"].append(
                {
                    "user_id": row["user_id"].hex() if isinstance(row["user_id"], bytes) else str(row["user_id"]),
                    "rank": rank,
                    "score": row["score"],
                    "sum": f"{row['sum']:f}",
                    "count": row["count"],
                    "rank_before": rank_before,
                    "score_before": score_before,
                    "is_new": before is not None and rank_before is None,
                }
            )
        return answer | {"at": None if at_ns is None else instant_text(at_ns)}

    def _look_around(self) -> None:
        """Search on for as long as the budget lasts; who is found is kept in mind at once."""
        began = self._ticks()
        while True:
            if self._search is None:
                self._search, self._began = self._service.top_in_parts(_CANDIDATES), began
            part = next(self._search, None)
            if part is None:
                self._search, self._took = None, self._ticks() - self._began
            elif len(part):
                found = part["user_id"].combine_chunks()
                known = [self._known] if self._known is not None and self._known.type == found.type else []
                self._known = pc.unique(pa.concat_arrays([*known, found]))
            if part is None or self._ticks() - began >= BUDGET_SECONDS:
                return
            time.sleep(_PAUSE_SECONDS)

    def _ranks_before(self, now_ns: int, ranks: dict[Any, tuple[int, float]]) -> dict[Any, tuple[int, float]] | None:
        """Who had which rank and score some seconds ago; None if that is not known."""
        if self._ranks and now_ns <= self._ranks[-1][0]:
            self._ranks.clear()
        self._ranks.append((now_ns, ranks))
        while now_ns - self._ranks[0][0] > _MOVED_NS and now_ns - self._ranks[1][0] >= _MOVED_NS:
            self._ranks.popleft()
        return self._ranks[0][1] if len(self._ranks) > 1 else None
