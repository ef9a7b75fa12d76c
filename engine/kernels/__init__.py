"""Every Numba loop, one file per idea.

    compile   the one decorator, array types, prefetch          layout    words of a slot line, registers of a shard
    hashing   keyed hashes of ids, the split into shards         probing   the index: ids to slots
    exact     wide sums and correctly rounded quotients          rows      guards of the clock, rows into rings
    windows   scores and features at an instant                  upkeep    expiry, counting, listing, digest

Kernels raise nothing, read no clock and no randomness, and know no Python objects; limits are arguments. Each says which of the
numbered invariants of `Shard` it needs and keeps, and how many random memory lines a row costs.
"""

from engine.kernels.compile import KERNELS
from engine.kernels.hashing import partition
from engine.kernels.probing import find_slots, release_slots, reserve_slots
from engine.kernels.rows import admit_rows, apply_rows
from engine.kernels.upkeep import compact_arena, count_retained, digest_lanes, expire_slots, list_retained, read_ids
from engine.kernels.windows import window_features, window_scores

__all__ = [
    "KERNELS",
    "admit_rows",
    "apply_rows",
    "compact_arena",
    "count_retained",
    "digest_lanes",
    "expire_slots",
    "find_slots",
    "list_retained",
    "partition",
    "read_ids",
    "release_slots",
    "reserve_slots",
    "window_features",
    "window_scores",
]
