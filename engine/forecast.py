"""How much memory an engine will take, before there is one.

A model, not a measurement: all users are alike, and their transactions arrive independently of each other.
"""

from __future__ import annotations

import math


def forecast(users: int, rate: float, retention_ns: int, id_bytes: int = 0) -> dict[str, float]:
    """Bytes of an engine's memory by part, when all users are alike.

    A user's retained transactions are then Poisson distributed with mean `rate * retention / users`. Who has any
    occupies a slot line of 64 bytes with room for two, and an index entry of 4 bytes at a load of 0.7; who has more
    than two, also a ring of 16 bytes an entry whose capacity is a power of two from 4. A string id takes its bytes
    rounded up to 8, and 8 more.

    Args:
        users: Users that transact.
        rate: Transactions per second of all users together.
        retention_ns: How long a transaction is retained.
        id_bytes: Length of a string id; 0 for integers.

    Returns:
        "active_users", "transactions" (retained), and bytes: "slots", "index", "rings", "ids", "total".

    Example:
        >>> parts = forecast(10_000_000, 100_000.0, 120 * 10**9)
        >>> round(parts["total"] / parts["active_users"])
        81
    """
    mean = rate * retention_ns / 1e9 / users
    active = users * -math.expm1(-mean)
    ring_bytes, capacity, least = 0.0, 4, 3
    # Whole capacities at a time; a few steps beyond the mean nothing is left.
    while (share := _poisson_at_least(mean, least)) > 1e-12:
        ring_bytes += users * (share - _poisson_at_least(mean, capacity + 1)) * capacity * 16
        capacity, least = capacity * 2, capacity + 1
    parts = {"slots": 64.0 * active, "index": 4 / 0.7 * active, "rings": ring_bytes}
    parts["ids"] = active * (-(-id_bytes // 8) * 8 + 8) if id_bytes else 0.0
    return {"active_users": active, "transactions": users * mean, **parts, "total": sum(parts.values())}


def _poisson_at_least(mean: float, count: int) -> float:
    """P(X >= count). Above 1000 the normal distribution is near enough for a forecast."""
    if mean > 1000:
        return 0.5 * math.erfc((count - 0.5 - mean) / math.sqrt(2 * mean))
    return 1.0 - math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)) if mean else 0.0
