"""Every Numba loop, one file per idea.

    compile   the one decorator, array types, prefetch          layout    words of a slot line, registers of a shard
    hashing   keyed hashes of ids, the split into shards         probing   the index: ids to slots
    exact     wide sums and correctly rounded quotients          blocks    memory of rings
    rows      guards of the clock, rows into lines and rings     convert   float amounts to whole units
    windows   scores and features at an instant                  upkeep    expiry, counting, listing users
    entries   entries out of memory as columns, their digest      changes   whose score is not what was reported

Kernels raise nothing, read no clock and no randomness, and know no Python objects; limits are arguments. Each says which of the
numbered invariants of `Shard` it needs and keeps, and how many random memory lines a row costs.
"""

from engine.kernels.changes import list_changed
from engine.kernels.compile import KERNELS
from engine.kernels.convert import NOT_FINITE, OUT_OF_RANGE, round_amounts
from engine.kernels.entries import count_entries, digest_entries, read_entries, read_ids
from engine.kernels.hashing import hash_one, partition
from engine.kernels.probing import find_slots, release_slots
from engine.kernels.rows import admit_rows, take_rows
from engine.kernels.upkeep import compact_arena, count_retained, expire_slots, list_retained
from engine.kernels.windows import user_features, window_features, window_score, window_scores

__all__ = [
    "KERNELS",
    "NOT_FINITE",
    "OUT_OF_RANGE",
    "admit_rows",
    "compact_arena",
    "count_entries",
    "count_retained",
    "digest_entries",
    "expire_slots",
    "find_slots",
    "hash_one",
    "list_changed",
    "list_retained",
    "partition",
    "read_entries",
    "read_ids",
    "release_slots",
    "round_amounts",
    "take_rows",
    "user_features",
    "window_features",
    "window_score",
    "window_scores",
]
