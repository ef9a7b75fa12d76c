"""The partition that Kafka's own clients choose."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import ids_of
from engine.partitions import partition_of


def murmur2(data: bytes) -> int:
    """The Java client's `Utils.murmur2`, its result as an unsigned number."""
    m, word = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for place in range(0, whole, 4):
        k = int.from_bytes(data[place : place + 4], "little") * m & word
        k = (k ^ k >> 24) * m & word
        h = (h * m & word) ^ k
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & word
    h = (h ^ h >> 13) * m & word
    return h ^ h >> 15


#: From the tests of the Java client.
KNOWN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def expected(user: int | str | bytes | None, partitions: int) -> int:
    if user is None:
        return -1
    key = user if isinstance(user, bytes) else str(user).encode()
    return (murmur2(key) & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize("key", KNOWN)
def test_known_hashes(key: bytes) -> None:
    assert murmur2(key) == KNOWN[key] % 2**32
    for partitions in (1, 2, 7, 64, 1_000_003):
        chosen = partition_of(ids_of(pa.array([key]), "user_id"), partitions)
        assert chosen.tolist() == [(KNOWN[key] & 0x7FFFFFFF) % partitions]


@given(
    st.one_of(
        st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)).map(lambda users: pa.array(users, pa.int64())),
        st.lists(st.none() | st.integers(0, 2**64 - 1)).map(lambda users: pa.array(users, pa.uint64())),
        st.lists(st.none() | st.text()).map(lambda users: pa.array(users, pa.string())),
        st.lists(st.none() | st.binary(max_size=40)).map(lambda users: pa.array(users, pa.large_binary())),
    ),
    st.integers(1, 100),
    st.integers(0, 3),
)
def test_every_kind_of_id(users: pa.Array, partitions: int, first: int) -> None:
    users = users[first:]
    assert partition_of(ids_of(users, "user_id"), partitions).tolist() == [expected(user, partitions) for user in users.to_pylist()]


@pytest.mark.parametrize("user", [0, 9, 10, -1, -10, 2**63 - 1, -(2**63), 10**18, -(10**18)])
def test_decimal_texts_of_integers(user: int) -> None:
    assert partition_of(ids_of(pa.array([user]), "user_id"), 2**20).tolist() == [expected(user, 2**20)]
