"""Keyed hashing of user ids, and the split of a batch into shards.

Integers: three rounds of multiplication by a secret odd number and a xor-shift (multiply-shift hashing after Dietzfelbinger,
Hagerup, Katajainen and Penttonen 1997, repeated so that every output bit depends on every input bit). It is a bijection, so two integers
never share all 64 bits; which ones share an index line depends on the secret multipliers.
Byte strings: SipHash-1-3 (Aumasson and Bernstein 2012), because cheaper word-at-a-time hashes have collisions that
no key removes. Full ids are compared in any case.
"""

import numpy as np

from engine.kernels.compile import I32, I64, I64_IN, U8_IN, U64, U64_IN, boolean, i64, inline, kernel, natural, u64

U = np.uint64
U0, U1, U3, U4, U8_, U13, U15, U16, U17, U21, U29, U32, U56 = (U(n) for n in (0, 1, 3, 4, 8, 13, 15, 16, 17, 21, 29, 32, 56))
U0xFF, U0xFFFF = U(0xFF), U(0xFFFF)
R51, R48, R47, R43 = U(51), U(48), U(47), U(43)
SIP_0, SIP_1, SIP_2, SIP_3 = U(0x736F6D6570736575), U(0x646F72616E646F6D), U(0x6C7967656E657261), U(0x7465646279746573)


@inline
def hash_integer(value, keys):
    """64 keyed bits of one integer id."""
    h = (U(value) ^ keys[0]) * keys[1]
    h = (h ^ (h >> U32)) * keys[2]
    h = (h ^ (h >> U29)) * keys[3]
    return h ^ (h >> U32)


@inline
def sip_round(v0, v1, v2, v3):
    """One SipRound."""
    v0 = v0 + v1
    v1 = ((v1 << U13) | (v1 >> R51)) ^ v0
    v0 = (v0 << U32) | (v0 >> U32)
    v2 = v2 + v3
    v3 = ((v3 << U16) | (v3 >> R48)) ^ v2
    v0 = v0 + v3
    v3 = ((v3 << U21) | (v3 >> R43)) ^ v0
    v2 = v2 + v1
    v1 = ((v1 << U17) | (v1 >> R47)) ^ v2
    v2 = (v2 << U32) | (v2 >> U32)
    return v0, v1, v2, v3


@inline
def sip_start(k0, k1):
    """The four words of SipHash's state before any input."""
    return k0 ^ SIP_0, k1 ^ SIP_1, k0 ^ SIP_2, k1 ^ SIP_3


@inline
def sip_word(v0, v1, v2, v3, word):
    """Take in one word."""
    v3 = v3 ^ word
    v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    return v0 ^ word, v1, v2, v3


@inline
def sip_end(v0, v1, v2, v3, last):
    """Take in the last word (length in its top byte) and give the hash."""
    v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, last)
    v2 = v2 ^ U0xFF
    v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    v0, v1, v2, v3 = sip_round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


@inline
def load_word(data, at):
    """Eight bytes as a little-endian word; LLVM makes one load of it."""
    at = natural(at)
    word = U(data[at]) | (U(data[at + 1]) << U(8)) | (U(data[at + 2]) << U(16)) | (U(data[at + 3]) << U(24))
    high = U(data[at + 4]) | (U(data[at + 5]) << U(8)) | (U(data[at + 6]) << U(16)) | (U(data[at + 7]) << U(24))
    return word | (high << U32)


@inline
def hash_bytes(data, first, last, k0, k1):
    """SipHash-1-3 of data[first:last]."""
    v0, v1, v2, v3 = sip_start(k0, k1)
    at = first
    while at + 8 <= last:
        v0, v1, v2, v3 = sip_word(v0, v1, v2, v3, load_word(data, at))
        at += 8
    word = U(last - first) << U56
    if last - first >= 8:  # the bytes that are left, behind some that were taken in
        if at < last:
            word |= load_word(data, last - 8) >> U(8 * (8 - (last - at)))
    else:
        shift = U0
        while at < last:
            word |= U(data[natural(at)]) << shift
            shift += U8_
            at += 1
    return sip_end(v0, v1, v2, v3, word)


@inline
def shard_of(h, shards):
    """Which shard a hash belongs to: 16 bits of it, spread evenly."""
    return np.int64((((h >> U16) & U0xFFFF) * U(shards)) >> U16)


@kernel(i64, I64_IN, I64_IN, U8_IN, boolean, U8_IN, U64_IN, i64, U64, I32, I64)
def partition(
    values,  # (n,)    int64   in   integer ids
    offsets,  # (n+1,)  int64   in   byte ids: where each begins in data
    data,  # (b,)    uint8   in   byte ids: their bytes
    is_bytes,  # ()      bool    in   which of the two it is
    reasons,  # (n,)    uint8   in   rows with a reason are left out
    keys,  # (4,)    uint64  in   the secret of this engine
    shards,  # ()      int64   in   how many parts
    hashes,  # (n,)    uint64  out  hash of each row that is not left out
    rows,  # (n,)    int32   out  row numbers: those of shard 0 in arrival order, then those of shard 1, ...
    bounds,  # (s+1,)  int64   out  rows[bounds[s]:bounds[s+1]] are those of shard s
):
    """Hash the ids of a batch and sort its rows by shard, keeping arrival order within each. Returns the rows kept.

    Sequential but for `shards` write streams. Shards are chosen by other hash bits than index lines.
    """
    count = len(reasons)
    for shard in range(shards + 1):
        bounds[shard] = 0
    for row in range(count):
        if reasons[row] == 0:
            if is_bytes:
                h = hash_bytes(data, offsets[row], offsets[row + 1], keys[0], keys[1])
            else:
                h = hash_integer(values[row], keys)
            hashes[row] = h
            bounds[shard_of(h, shards)] += 1
    kept = 0
    for shard in range(shards):
        here = bounds[shard]
        bounds[shard] = kept
        kept += here
    bounds[shards] = kept
    for row in range(count):
        if reasons[row] == 0:
            shard = shard_of(hashes[row], shards)
            rows[bounds[shard]] = row
            bounds[shard] += 1
    for shard in range(shards, 0, -1):
        bounds[shard] = bounds[shard - 1]
    bounds[0] = 0
    return kept


@kernel(u64, i64, U8_IN, boolean, U64_IN)
def hash_one(
    value,  # ()    int64   in   an integer id
    data,  # (b,)  uint8   in   or the bytes of one
    is_bytes,  # ()    bool    in   which of the two it is
    keys,  # (4,)  uint64  in   the secret of this engine
):
    """Hash of one id, as `partition` gives it."""
    if is_bytes:
        return hash_bytes(data, np.int64(0), np.int64(len(data)), keys[0], keys[1])
    return hash_integer(np.int64(value), keys)
