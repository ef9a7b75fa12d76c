"""How much memory an engine will take, before there is one.

A model, not a measurement: all users are alike, and their transactions arrive independently of each other. Tests hold it against
what an engine takes when rows have come in steadily for some time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from engine.config import BLOCK_LINES

#: Users without a retained transaction are freed when expiry next comes round. Expired transactions of active users are held a while
#: longer, until their place is needed or expiry comes round. Busy users' rings are as large as the most transactions they had to hold at a
#: time, so many standard deviations above the mean.
SWEPT_RETENTIONS: Final = 1 + 1 / 32
HELD_RETENTIONS: Final = 1.3
HELD_DEVIATIONS: Final = 1.5

#: Ring memory for each byte in rings: expiry gathers them when more than a sixth of it has fallen free between them.
SCATTERED: Final = 1.1

#: Entries beside those of the largest ring: those it had in the smaller blocks it came through, which only together had room for it.
MOVED: Final = 2.25

_LINE_ENTRIES: Final = 4
_IN_LINE: Final = 4
_SLAB_ENTRIES: Final = _LINE_ENTRIES * BLOCK_LINES[-1]


def forecast(users: int, rate: float, retention_ns: int, id_bytes: int = 0) -> dict[str, float]:
    """Bytes of an engine's memory by part, when all users are alike.

    The transactions that an engine holds of a user are then Poisson distributed. A user of whom it holds any occupies a slot line of
    65 bytes with room for four; one with more, also a ring of 16 bytes an entry in blocks of certain sizes. A string id takes its bytes
    and 4 more, rounded up to 8. The index takes 4 bytes at a load of 0.7 for each user that there is room for.

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
        79
    """
    mean = rate * retention_ns / 1e9 / users
    held_mean = min(HELD_RETENTIONS * mean, mean + HELD_DEVIATIONS * math.sqrt(mean))
    slots = users * -math.expm1(-SWEPT_RETENTIONS * mean)
    ring_entries, held, largest = 0.0, _IN_LINE, 0
    for capacity in _capacities():
        more = _poisson_at_least(held_mean, held + 1)
        if more < 1e-12:
            break
        largest = capacity if users * more >= 0.5 else largest
        ring_entries += users * capacity * (more - _poisson_at_least(held_mean, capacity + 1))
        held = capacity
    rings = 16 * SCATTERED * ring_entries + (16 * MOVED * largest if largest > _SLAB_ENTRIES else 0)
    parts = {"slots": 65 * slots, "index": 4 / 0.7 * users, "rings": rings}
    parts["ids"] = slots * (-(-(id_bytes + 4) // 8) * 8) if id_bytes else 0.0
    return {"active_users": users * -math.expm1(-mean), "transactions": users * mean, **parts, "total": sum(parts.values())}


def share_of_machine(share: float) -> str:
    """What a forecast means here. An engine needs room beside its state: for batches, Python, and the system."""
    if share < 0.8:
        return f"of this machine: {share:.0%} is needed"
    return f"of this machine: too little; use {math.ceil(share / 0.8)} partitions on as many such machines, or a shorter window or lateness"


def _capacities() -> Iterator[int]:
    """Capacities of rings, from the least on."""
    yield from (_LINE_ENTRIES * lines for lines in BLOCK_LINES)
    slab = capacity = _SLAB_ENTRIES
    while True:
        capacity += max(slab, capacity // 4 // slab * slab)
        yield capacity


def _poisson_at_least(mean: float, count: int) -> float:
    """P(X >= count). Above 1000 the normal distribution is near enough for a forecast."""
    if mean > 1000:
        return 0.5 * math.erfc((count - 0.5 - mean) / math.sqrt(2 * mean))
    return 1.0 - math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)) if mean else 0.0
