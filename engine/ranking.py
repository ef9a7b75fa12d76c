"""The greatest users by a column: all users are looked at, a part after the other, so that others may have the engine in between."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import ConfigError
from engine.shard import Features, features_table
from engine.shards import Shards

TOP_BY: Final = ("score", "sum", "count", "newest")


class Ranking:
    """The greatest of the users looked at so far.

    Args:
        shards: Who has the users.
        k: How many.
        by: One of TOP_BY.
        decimals: Of the sums.
    Raises:
        ConfigError: `k` or `by` cannot be used.
    """

    def __init__(self, shards: Shards, k: Any, by: str, decimals: int) -> None:
        if by not in TOP_BY:
            raise ConfigError(f"by={by!r} must be one of {', '.join(map(repr, TOP_BY))}")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 0:
            raise ConfigError(f"k={k!r} must be a whole number, 0 or more")
        self._found = features_table(pa.array([], pa.string()), Features.empty(0), decimals)
        self._shards, self._k, self._by, self._decimals = shards, int(k), by, decimals
        self._order = [(by, "descending"), ("user_id", "ascending")]
        self._part = 0

    def look_on(self, kind: str, at_ns: int, clock_ns: int | None) -> bool:
        """Look at the next part of the users, at an instant; False if that was the last.

        Cost: some 65 ns for each of 32,768 users.
        """
        found = self._shards.greatest(self._part, max(self._k, 1), self._by, kind, at_ns, clock_ns)
        if found is None:
            return False
        self._part += 1
        part = features_table(*found, self._decimals)
        table = pa.concat_tables([self._found, part]) if len(self._found) else part
        if len(table) > self._k > 0:
            table = table.take(pc.select_k_unstable(table, self._k, sort_keys=self._order))
        self._found = table
        return True

    @property
    def table(self) -> Any:
        """At most `k` users with the columns of `RiskEngine.features`, greatest first, equals by user id."""
        return self._found.sort_by(self._order).slice(0, self._k)
