"""Whether a batch fits into a full engine: the exact number of users with a retained transaction, row by row.

Only asked when the batch's users do not fit beside those that are held already. Users may leave while the batch comes in, so the
answer depends on the order of its rows, and is worked out for all of them before the first is applied (S13).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def users_peak(
    users: NDArray[np.int64], times_ns: NDArray[np.int64], clock_ns: NDArray[np.int64], retention_ns: int, newest_ns: NDArray[np.int64]
) -> int:
    """Most users with a retained transaction just after any row of a batch.

    Args:
        users: (n,) user of each row: k < len(newest_ns) is the k-th user that is held already, greater numbers are new users.
        times_ns: (n,) event times.
        clock_ns: (n,) the clock just after each row; never falls.
        retention_ns: How far behind the clock a transaction is retained.
        newest_ns: (h,) newest event time of each user that is held.

    Returns:
        The greatest number of users retained at a time. Cost: a sort of n + h numbers.

    Example:
        >>> import numpy as np
        >>> users_peak(np.array([1, 2]), np.array([100, 200]), np.array([100, 200]), 50, np.array([60]))
        2
    """
    rows, held = len(users), len(newest_ns)
    if rows == 0:
        return held
    # A user's newest time after each of its rows: a running maximum per user, taken over ranks so that users cannot mix.
    who = np.concatenate([np.arange(held), users])
    when = np.concatenate([np.full(held, -1), np.arange(rows)])
    times, rank = np.unique(np.concatenate([newest_ns, times_ns]), return_inverse=True)
    order = np.lexsort((when, who))
    who, when, rank = who[order], when[order], rank.reshape(-1)[order]
    newest = np.maximum.accumulate(who * len(times) + rank) - who * len(times)
    # It is retained from that row until the clock has left the time behind, or its next row says anew.
    latest_clock = np.minimum(times[newest], np.iinfo(np.int64).max - retention_ns) + retention_ns
    gone = np.searchsorted(clock_ns, latest_clock, side="right")
    following = np.full(len(who), rows)
    same = who[1:] == who[:-1]
    following[:-1][same] = when[1:][same]
    steps = np.zeros(rows + 2, np.int64)
    np.add.at(steps, np.maximum(when, 0), 1)
    np.add.at(steps, np.minimum(gone, following), -1)
    return int(np.cumsum(steps)[:rows].max())
