"""Entries out of memory, as flat columns; and their digest.

The columns of some users are: their ids, how many retained entries each has, and the times and units of these, user after user, oldest
first. Snapshots are made of them, and the digest is defined on them, so that it can be had from memory and from files alike.
"""

import numpy as np

from engine.kernels.compile import I32_IN, I64, I64_IN, U8, U8_IN, U64, boolean, i64, inline, kernel, natural, prefetch
from engine.kernels.exact import count_of, line_before, line_units, lower_bound, ring_of, time_of, units_of
from engine.kernels.hashing import U56, hash_bytes, sip_end, sip_start, sip_word
from engine.kernels.layout import AHEAD, HALF_BITS, ID, INLINE_CAPACITY, LEFT, LEFT_TIME, LINE_WORDS, META, NEWEST, RING_FROM, TIMES

U = np.uint64
DIGEST_KEY = U(0x7269736B72696E67)
ENTRY_LENGTH = U(24) << U56
INTEGER_LENGTH = U(8) << U56
U2 = U(2)


@inline
def expired(memory, base, floor_ns):
    """How many of a user's entries, the EMPTY ones of a line included, are before `floor_ns`. Costs a ring line only if some may be."""
    if memory[base + META] < RING_FROM:
        return line_before(memory, base, floor_ns)
    # With LEFT = 0 the left edge of the newest entry's window is the oldest entry.
    if memory[base + LEFT] == 0 and memory[base + LEFT_TIME] >= floor_ns:
        return np.int64(0)
    place, capacity, start, count = ring_of(memory, base)
    return lower_bound(memory, place, capacity, start, 0, count, floor_ns)


@kernel(i64, I32_IN, i64, I64, I64)
def count_entries(
    slots,  # (m,)  int32  in   slots in use
    floor_ns,  # ()    int64  in   entries before it are no longer retained
    memory,  # ...   int64  in   see Shard
    counts,  # (m,)  int64  out  retained entries of each
):
    """Count the retained entries of some users. Reads only. Returns how many these are. Cost: a slot line each, seldom a ring line."""
    total = np.int64(0)
    for position in range(len(slots)):
        if position + AHEAD < len(slots):
            prefetch(memory, np.int64(slots[position + AHEAD]) * LINE_WORDS)
        base = natural(np.int64(slots[position])) * LINE_WORDS
        counts[position] = 0
        if memory[base + META] != 0 and memory[base + NEWEST] >= floor_ns:
            counts[position] = count_of(memory, base) - expired(memory, base, floor_ns)
        total += counts[position]
    return total


@kernel(i64, I32_IN, I64_IN, I64, I64, I64)
def read_entries(
    slots,  # (m,)  int32  in   slots in use
    counts,  # (m,)  int64  in   as `count_entries` gives them
    memory,  # ...   int64  in   see Shard
    time_ns,  # (n,)  int64  out  times of their retained entries; n is the sum of counts
    units,  # (n,)  int64  out  and units
):
    """Read the retained entries of some users. Reads only. Returns how many they are. Cost: a slot line each, and the lines of rings."""
    position = np.int64(0)
    for index in range(len(slots)):
        if index + AHEAD < len(slots):
            prefetch(memory, np.int64(slots[index + AHEAD]) * LINE_WORDS)
        base = natural(np.int64(slots[index])) * LINE_WORDS
        if counts[index] == 0:
            continue
        if memory[base + META] < RING_FROM:
            for entry in range(INLINE_CAPACITY - counts[index], INLINE_CAPACITY):
                time_ns[position] = memory[natural(base + TIMES + entry)]
                units[position] = line_units(memory, base, entry)
                position += 1
            continue
        held = count_of(memory, base)
        for entry in range(held - counts[index], held):
            time_ns[position] = time_of(memory, base, entry)
            units[position] = units_of(memory, base, entry)
            position += 1
    return position


@kernel(i64, I32_IN, i64, i64, I64, U8, I64, I64, U8)
def read_ids(
    slots,  # (m,)    int32  in     slots in use
    count,  # ()      int64  in     so many of them are read
    stage,  # ()      int64  in     0: integer ids into values; 1: lengths of byte ids into offsets; 2: their bytes into data
    memory,  # ...     int64  in     see Shard
    arena,  # ...     uint8  in
    values,  # (m,)    int64  out    stage 0
    offsets,  # (m+1,)  int64  inout  stage 1: where each id begins in data
    data,  # (b,)    uint8  out    stage 2
):
    """Read the ids of slots. Returns the bytes that byte ids take. Cost per row: slot line, for byte ids also the arena's."""
    total = 0
    for position in range(count):
        word = memory[natural(np.int64(slots[position])) * LINE_WORDS + ID]
        if stage == 0:
            values[position] = word
            continue
        at = natural((word >> HALF_BITS) * 8)
        length = np.int64(arena[at]) | np.int64(arena[at + 1]) << 8 | np.int64(arena[at + 2]) << 16 | np.int64(arena[at + 3]) << 24
        if stage == 1:
            offsets[position] = total
            offsets[position + 1] = total + length
        else:
            for k in range(length):
                data[offsets[position] + k] = arena[at + 4 + k]
        total += length
    return total


@inline
def user_hash(value, data, first, last, is_bytes, lane):
    """Hash of a user's id for the digest: not keyed, the same everywhere."""
    if is_bytes:
        return hash_bytes(data, first, last, DIGEST_KEY, lane)
    v0, v1, v2, v3 = sip_start(DIGEST_KEY, lane + U2)
    v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(value))
    return sip_end(v0, v1, v2, v3, INTEGER_LENGTH)


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, I64_IN, I64_IN, I64_IN, U64)
def digest_entries(
    values,  # (m,)    int64   in     integer ids
    offsets,  # (m+1,)  int64   in     byte ids: where each begins in data
    data,  # (b,)    uint8   in     byte ids: their bytes
    is_bytes,  # ()      bool    in     which of the two it is
    counts,  # (m,)    int64   in     entries of each user
    time_ns,  # (n,)    int64   in     their times
    units,  # (n,)    int64   in     and units
    lanes,  # (2,)    uint64  inout  sums of the hashes of all entries, in two lanes, are added to these
):
    """Hash (user, position, time, units) of each entry, added up so that the order of users does not matter. Sequential.

    Returns the entries hashed.
    """
    hashed = np.int64(0)
    for user in range(len(counts)):
        value = np.int64(0) if is_bytes else values[user]
        first = offsets[user] if is_bytes else np.int64(0)
        last = offsets[user + 1] if is_bytes else np.int64(0)
        for lane in range(2):
            key = user_hash(value, data, first, last, is_bytes, U(lane))
            for index in range(counts[user]):
                v0, v1, v2, v3 = sip_start(key, U(lane))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(index))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(time_ns[natural(hashed + index)]))
                v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, U(units[natural(hashed + index)]))
                lanes[lane] += sip_end(v0, v1, v2, v3, ENTRY_LENGTH)
        hashed += counts[user]
    return hashed
