"""The partitions that Kafka's own clients choose for keys: murmur2, as its Java client has it (Austin Appleby's MurmurHash2, 32 bits)."""

import numpy as np

from engine.kernels.compile import I32, I64_IN, U8, U8_IN, boolean, i64, inline, kernel, natural

U = np.uint64
WORD = U(0xFFFFFFFF)
M, SEED = U(0x5BD1E995), U(0x9747B28C)
TEN = U(10)


@inline
def murmur2(data, first, last):
    """32 bits of the bytes from `first` to before `last`."""
    h = SEED ^ (U(last - first) & WORD)
    at = first
    while at + 4 <= last:
        place = natural(at)
        k = U(data[place]) | (U(data[place + 1]) << U(8)) | (U(data[place + 2]) << U(16)) | (U(data[place + 3]) << U(24))
        k = (k * M) & WORD
        k = ((k ^ (k >> U(24))) * M) & WORD
        h = ((h * M) & WORD) ^ k
        at += 4
    if at < last:
        place, rest = natural(at), U(0)
        for byte in range(last - at):
            rest |= U(data[natural(place + byte)]) << U(8 * byte)
        h = ((h ^ rest) * M) & WORD
    h = ((h ^ (h >> U(13))) * M) & WORD
    return h ^ (h >> U(15))


@inline
def write_decimal(value, is_signed, digits):
    """The decimal text of an integer at the end of `digits`, 20 bytes. Returns where it begins."""
    negative = is_signed and value < 0
    rest = U(0) - U(value) if negative else U(value)
    first = np.int64(20)
    while True:
        first -= 1
        digits[natural(first)] = np.uint8(U(48) + rest % TEN)
        rest = rest // TEN
        if rest == U(0):
            break
    if negative:
        first -= 1
        digits[natural(first)] = np.uint8(45)
    return first


@kernel(i64, boolean, boolean, I64_IN, I64_IN, U8_IN, i64, U8, I32)
def choose_partitions(
    is_bytes,  # ()     bool   in   ids are byte strings, else integers
    is_signed,  # ()     bool   in   integers are int64, else the bits of uint64
    values,  # (n,)   int64  in   integer ids
    offsets,  # (n+1,) int64  in   byte ids: the i-th is data[offsets[i]:offsets[i + 1]]
    data,  # (m,)   uint8  in
    partitions,  # ()     int64  in   how many there are
    digits,  # (20,)  uint8  out  scratch
    chosen,  # (n,)   int32  out  the partition of each id: of its bytes, or of its decimal text
):
    """Partition of each id as Kafka's default partitioner chooses it. Returns 0. Sequential; no random lines."""
    for row in range(len(chosen)):
        if is_bytes:
            h = murmur2(data, offsets[row], offsets[row + 1])
        else:
            h = murmur2(digits, write_decimal(values[row], is_signed, digits), np.int64(20))
        chosen[row] = np.int32(np.int64(h & U(0x7FFFFFFF)) % partitions)
    return 0
