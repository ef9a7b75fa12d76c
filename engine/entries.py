"""Users and their retained transactions as flat columns: what leaves the memory of shards, for snapshots and for the digest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.columns import Ids
from engine.kernels import digest_entries


@dataclass(frozen=True, slots=True)
class Entries:
    """Some users and all their retained transactions.

    Attributes:
        ids: (m,) the users.
        counts: (m,) transactions of each, at least one.
        time_ns: (n,) their times, user after user, oldest first.
        units: (n,) and units.
    """

    ids: Ids
    counts: NDArray[np.int64]
    time_ns: NDArray[np.int64]
    units: NDArray[np.int64]

    def digest(self) -> NDArray[np.uint64]:
        """(2,) sums of the hashes of all transactions, in two lanes, which add up over any parts of a state."""
        lanes = np.zeros(2, np.uint64)
        ids = self.ids
        by_bytes = ids.kind in ("string", "binary")
        digest_entries(ids.values, ids.offsets, ids.data, by_bytes, self.counts, self.time_ns, self.units, lanes)
        return lanes
