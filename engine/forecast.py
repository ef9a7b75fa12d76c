"""How much memory an engine will take, before there is one.

A model, not a measurement: all users are alike, and their transactions arrive independently of each other. Tests hold it against
what an engine takes when rows have come in steadily for some time.
"""

from __future__ import annotations

import math
from typing import Final

#: Expiry goes round all users twice while the clock moves by one retention, so a transaction is held for at most so many retentions.
HELD_RETENTIONS: Final = 1.5


def forecast(users: int, rate: float, retention_ns: int, id_bytes: int = 0) -> dict[str, float]:
    """Bytes of an engine's memory by part, when all users are alike.

    The transactions that an engine holds of a user are then Poisson distributed. A user of whom it holds any occupies a slot line of
    64 bytes with room for two; one with more than two, also a ring of 16 bytes an entry whose capacity is a power of two from 4 on,
    and which left behind blocks of all smaller capacities as it grew. A string id takes its bytes and 4 more, rounded up to 8. The
    index takes 4 bytes at a load of 0.7 for each user that there is room for.

    Args:
        users: Users that transact, and that the engine has room for.
        rate: Transactions per second of all users together.
        retention_ns: How long a transaction is retained.
        id_bytes: Length of a string id; 0 for integers.

    Returns:
        "active_users" (with a retained transaction), "transactions" (retained), and bytes: "slots", "index", "rings", "ids", "total".

    Example:
        >>> parts = forecast(10_000_000, 100_000.0, 120 * 10**9)
        >>> round(parts["total"] / parts["active_users"])
        116
    """
    mean = rate * retention_ns / 1e9 / users
    held_mean = HELD_RETENTIONS * mean
    slots = users * -math.expm1(-held_mean)
    ring_entries, capacity, least = 0.0, 4, 3
    # Whole capacities at a time; a few steps beyond the mean nothing is left.
    while (share := _poisson_at_least(held_mean, least)) > 1e-12:
        ring_entries += users * (share - _poisson_at_least(held_mean, capacity + 1)) * (2 * capacity - 4)
        capacity, least = capacity * 2, capacity + 1
    parts = {"slots": 64 * slots, "index": 4 / 0.7 * users, "rings": 16 * ring_entries}
    parts["ids"] = slots * (-(-(id_bytes + 4) // 8) * 8) if id_bytes else 0.0
    return {"active_users": users * -math.expm1(-mean), "transactions": users * mean, **parts, "total": sum(parts.values())}


def _poisson_at_least(mean: float, count: int) -> float:
    """P(X >= count). Above 1000 the normal distribution is near enough for a forecast."""
    if mean > 1000:
        return 0.5 * math.erfc((count - 0.5 - mean) / math.sqrt(2 * mean))
    return 1.0 - math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)) if mean else 0.0
