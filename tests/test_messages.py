"""Messages to rows: each by itself, whole or not at all, whatever came with it; and rows to messages and back."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import RiskEngine
from engine.columns import TEXT_MARK, ids_of
from engine.config import Config
from engine.messages import OFFSET, ROW, TOO_LARGE, UNDECODABLE, WRONG_SCHEMA, Decoded, decode, encode_arrow, encode_json
from engine.partitions import partition_of

CONFIG = Config.of(time_unit="ms", users=10)


def read(values: list[bytes | None], kind: str | None = None, config: Config = CONFIG) -> Decoded:
    return decode(values, np.arange(len(values)) * 3 + 5, np.arange(len(values)) * 1000, config, kind)


def _plain(table: Any) -> Any:
    """A type of times that Python can have whatever they are."""
    kind = table.schema.field("timestamp").type
    return pa.int64() if pa.types.is_timestamp(kind) else kind


def told(values: list[bytes | None], kind: str | None = None) -> list[Any]:
    """What became of each message: a reason, or kind and rows."""
    decoded = read(values, kind)
    became: dict[int, Any] = {(offset - 5) // 3: reason for offset, reason, _ in decoded.dead}
    order = []
    for run in decoded.runs:
        assert run.table.column_names == ["user_id", "amount", "timestamp", OFFSET, ROW]
        run.table.validate(full=True)
        plain = run.table.set_column(2, "timestamp", run.table["timestamp"].cast(_plain(run.table)))
        for *row, offset, number in (tuple(each.values()) for each in plain.to_pylist()):
            place = (offset - 5) // 3
            order.append((place, number))
            rows = became.setdefault(place, [run.kind])
            assert len(rows) == number + 1
            rows.append(tuple(str(value) for value in row))
        assert run.arrival_ns.tolist() == [(offset - 5) // 3 * 1000 for offset in run.table[OFFSET].to_pylist()]
    assert order == sorted(order)
    assert [offset for offset, *_ in decoded.dead] == sorted(offset for offset, *_ in decoded.dead)
    return [became.get(place, []) for place in range(len(values))]


def arrow(table: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def some(count: int = 2, ids: Any = None) -> Any:
    return pa.table(
        {
            "user_id": pa.array(range(count), pa.int64()) if ids is None else ids,
            "amount": pa.array([1.5] * count, pa.float64()),
            "timestamp": pa.array(range(count), pa.timestamp("ms")),
        }
    )


GOOD = b'{"user_id":"a","amount":1,"timestamp":5}'
JSON = {
    GOOD: ["string", ("a", "1", "5")],
    b'{"user_id":7,"amount":1.25,"timestamp":5}': ["int64", ("7", "1.25", "5")],
    b'{"user_id":-9223372036854775808,"amount":"1.25","timestamp":"2025-01-01"}': ["int64", (str(-(2**63)), "1.25", "2025-01-01")],
    b'{"user_id":18446744073709551615}': ["uint64", (str(2**64 - 1), "None", "None")],
    b'{"user_id":null}': [None, ("None", "None", "None")],  # of the kind that is expected
    b"{}": [None, ("None", "None", "None")],
    b'{"other":{"user_id":3,"amount":[4]},"user_id":"b"} \r\n': ["string", ("b", "None", "None")],
    b'{\n"user_id"\t:\n"c\\n\\u00e9\\u0000",\n"amount" :\n 2}': ["string", ("c\né\0", "2", "None")],
    b'{"user_id":"a","amount":NaN,"x":Infinity}': ["string", ("a", "NaN", "None")],
    b'{"user_id":"a","amount":1e400}': ["string", ("a", "1e400", "None")],
    b'{"user_id":"NaN, Inf"}': ["string", ("NaN, Inf", "None", "None")],
    b'{"x":' + b"[" * 5000 + b"]" * 5000 + b',"user_id":"deep"}': ["string", ("deep", "None", "None")],
    b'{"x":' + b"[" * 5000 + b"]" * 4999 + b',"user_id":"deep"}': UNDECODABLE,
    b'{"user_id":true}': WRONG_SCHEMA,
    b'{"user_id":1.0}': WRONG_SCHEMA,
    b'{"user_id":18446744073709551616}': WRONG_SCHEMA,
    b'{"user_id":-9223372036854775809}': WRONG_SCHEMA,
    b'{"user_id":["a"]}': WRONG_SCHEMA,
    b'{"user_id":"a","amount":true}': WRONG_SCHEMA,
    b'{"user_id":"a","amount":{}}': WRONG_SCHEMA,
    b'{"user_id":"a","timestamp":[5]}': WRONG_SCHEMA,
    b'{"user_id":"a","user_id":"b"}': WRONG_SCHEMA,
    b'{"user_id":null,"user_id":"b"}': WRONG_SCHEMA,
    b'{"amount":1,"amount":1}': WRONG_SCHEMA,
    b'{"user_id":"a"}{"user_id":"b"}': UNDECODABLE,
    b'{"user_id":"a"}\n{"user_id":"b"}': UNDECODABLE,
    b'{"user_id":"a"},': UNDECODABLE,
    b'{"user_id":"a"}null': UNDECODABLE,
    b'{"user_id":"a"}\0': UNDECODABLE,
    b'{"user_id":"a"': UNDECODABLE,
    b'{"user_id":"a","x":': UNDECODABLE,
    b'{"user_id":"a","x":[': UNDECODABLE,
    b'{"user_id":"a","x":"': UNDECODABLE,
    b'{"user_id":"a","': UNDECODABLE,
    b'{"user_id":"a","x":{"y":1}': UNDECODABLE,
    b'{"user_id":"a",}': UNDECODABLE,
    b"{": UNDECODABLE,
    b"{}}": UNDECODABLE,
    b'{"user_id":"a","x":Inf}': UNDECODABLE,
    b'{"user_id":"a","x":-NaN}': UNDECODABLE,
    b'{"user_id":"a","x":01}': UNDECODABLE,
    b'{"user_id":"\xff"}': UNDECODABLE,
    b'{"user_id":"a","x":"\xff"}': UNDECODABLE,
    b'{"user_id":"\\ud800"}': UNDECODABLE,
    b'{"user_id":"a\tb"}': UNDECODABLE,
    b"\xef\xbb\xbf{}": UNDECODABLE,
    b'"user_id"': UNDECODABLE,
    b"[]": UNDECODABLE,
    b"null": UNDECODABLE,
    b"": UNDECODABLE,
    None: UNDECODABLE,
}


@pytest.mark.parametrize("value", JSON, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("kind", [None, "string", "int64", "binary"])
def test_json_by_example(value: bytes | None, kind: str | None) -> None:
    """Alone, between others that are in order, and between others that are not."""
    expected = [kind or "string", *JSON[value][1:]] if JSON[value][0] is None else JSON[value]
    assert told([value], kind) == [expected]
    assert told([GOOD, value, GOOD], kind)[1] == expected
    assert told([b"{", value, b'{"user_id":"a"}}'], kind) == [UNDECODABLE, expected, UNDECODABLE]


@pytest.mark.parametrize("kind", [None, "string", "int64", "uint64", "binary"])
@pytest.mark.parametrize("first", [b"18446744073709551615", b"7", b'"a"', b"null"])
@pytest.mark.parametrize("second", [b"18446744073709551615", b"7", b"-7", b'"a"', b"null"])
def test_the_kind_of_an_id_does_not_depend_on_the_message_before(first: bytes, second: bytes, kind: str | None) -> None:
    values: list[bytes | None] = [b'{"user_id":%s}' % each for each in (first, second)]
    alone = {b"null": kind or "string", b'"a"': "string", b"-7": "int64", b"7": "uint64" if kind == "uint64" else "int64"}
    for together in (values, [values[0], b"{", values[1]]):
        assert [told(together, kind)[place][0] for place in (0, -1)] == [alone.get(each, "uint64") for each in (first, second)]


_PIECES = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b'"', b":", b",", b" ", b"\n", b"\\", b"\xff", b"\0", b"{}", b"\n{}\n"),
        *(b'"user_id"', b'"amount":', b'"timestamp":', b"1", b"-2.5", b"e3", b"5", b"NaN", b"Inf", b"null", b"true", b'"a"'),
    ]
)


@st.composite
def _edited(draw: Any) -> bytes | None:
    """A message in order, with some pieces of it replaced."""
    value = bytearray(draw(st.sampled_from([each for each in JSON if each is not None and len(each) < 200])))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(value)))
        value[start : start + draw(st.integers(0, 6))] = draw(_PIECES)
    return bytes(value)


@given(st.lists(_edited(), min_size=1, max_size=6), st.sampled_from([None, "string", "int64", "uint64", "binary"]), st.integers(1, 5))
@example([b'{"x":', b"{}", b'{"y":1}'], "string", 2)
@example([b'{"x":[{}', b"{}]}", b'{"y":1}'], "string", 1)
@settings(max_examples=1500)
def test_a_message_is_what_it_is_alone(values: list[bytes | None], kind: str | None, size: int) -> None:
    together = told(values, kind)
    assert together == [told([value], kind)[0] for value in values]
    apart = [told(values[first : first + size], kind) for first in range(0, len(values), size)]
    assert together == list(itertools.chain.from_iterable(apart))


@pytest.mark.parametrize("bad", [0, 1, 127, 128, 129, 20_000])
def test_many_messages_of_which_one_is_bad(bad: int) -> None:
    values: list[bytes | None] = [b'{"user_id":%d,"amount":%d.5,"timestamp":%d}' % (each % 7, each, each) for each in range(20_001)]
    values[bad] = b'{"user_id":{}}'
    decoded = read(values, "int64")
    assert [(offset, reason) for offset, reason, _ in decoded.dead] == [(3 * bad + 5, WRONG_SCHEMA)]
    found = pa.concat_tables([run.table for run in decoded.runs])
    kept = [each for each in range(20_001) if each != bad]
    assert found[OFFSET].to_pylist() == [3 * each + 5 for each in kept]
    assert found["user_id"].to_pylist() == [each % 7 for each in kept]
    assert found["amount"].to_pylist() == [f"{each}.5" for each in kept]
    assert set(found[ROW].to_pylist()) == {0}


def test_arrow_messages_of_several_batches_and_types() -> None:
    two = pa.concat_tables([some(3), some(2)])
    texts = some(2, pa.array(["x", None]))
    decoded = read([arrow(some(3)), arrow(two), GOOD, arrow(texts), arrow(some(0)), arrow(some(1, pa.array([b"\0"])))])
    assert decoded.dead == []
    assert [(run.kind, len(run.table)) for run in decoded.runs] == [("int64", 8), ("string", 1), ("string", 2), ("binary", 1)]
    assert decoded.runs[0].table[OFFSET].to_pylist() == [5, 5, 5, 8, 8, 8, 8, 8]
    assert decoded.runs[0].table[ROW].to_pylist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert decoded.runs[0].arrival_ns.tolist() == [0] * 3 + [1000] * 5


BOMB = pa.table(
    {"user_id": [1], "amount": [1], "timestamp": pa.array([1], pa.timestamp("s")), "x": pa.array(["z" * 10_000]).dictionary_encode()}
)
BAD_ARROW = {
    "compressed": (arrow(some(), compression="zstd"), WRONG_SCHEMA),
    "a compressed dictionary": (arrow(BOMB, compression="lz4"), WRONG_SCHEMA),
    "dictionary": (arrow(some(2, pa.array(["a", "b"]).dictionary_encode())), WRONG_SCHEMA),
    "null type": (arrow(some(2, pa.nulls(2))), WRONG_SCHEMA),
    "no amount": (arrow(some().drop(["amount"])), WRONG_SCHEMA),
    "text amounts": (arrow(some().set_column(1, "amount", pa.array(["1", "2"]))), WRONG_SCHEMA),
    "two users": (arrow(some().append_column("user_id", pa.array([1, 2]))), WRONG_SCHEMA),
    "cut off": (arrow(some())[:-30], UNDECODABLE),
    "first bytes": (b"\xff\xff\xff\xff", UNDECODABLE),
    "nothing but": (b"\xff" * 400, UNDECODABLE),
    "not UTF-8": (arrow(some(2, pa.array(["abc", "defg"]))).replace(b"abcdefg", b"abc\xff\xfe\xfdg"), UNDECODABLE),
    "fewer rows than none": (arrow(some(777)).replace((777).to_bytes(8, "little"), b"\xff" * 8), UNDECODABLE),
}


@pytest.mark.parametrize("name", BAD_ARROW)
def test_arrow_messages_that_are_not_taken(name: str) -> None:
    value, reason = BAD_ARROW[name]
    good = arrow(some())
    assert told([value]) == [reason]
    assert told([good, value, good]) == [told([good])[0], reason, told([good])[0]]


def test_other_columns_are_not_read() -> None:
    """Whatever they are, they cost nothing: here, one whose values would lie far outside of the message."""
    value = arrow(some().append_column("x", pa.array([b"x" * 999, b"y" * 999], pa.binary(999))))
    place = value.index(struct.pack("<q", 1998)) - 8
    assert told([value[:place] + struct.pack("<q", 2**40) + value[place + 8 :]]) == told([arrow(some())])


def test_texts_that_are_marked_are_read_as_those_of_files() -> None:
    """Exactly, and one that is none costs one row; beside JSON, where they are texts too."""
    table = some().drop(["amount", "timestamp"])
    for name, texts in (("amount", ["0.12345", "much"]), ("timestamp", ["2025-01-01T00:00:00.123456789Z", "5"])):
        table = table.append_column(pa.field(name, pa.string(), metadata=TEXT_MARK), [texts])
    decoded = read([arrow(table), b'{"user_id":7,"amount":1,"timestamp":1735689600123}', encode_arrow(table)])
    assert [(run.kind, len(run.table)) for run in decoded.runs] == [("int64", 5)]
    with RiskEngine(users=10, max_ahead=None, time_unit="ms") as engine:
        result = engine.ingest(decoded.runs[0].table)
        assert (result.accepted, sum(result.rejected.values()), result.rounded) == (3, 2, 2)
        assert engine.features([0])["newest"].cast(pa.int64()).to_pylist() == [1735689600123456789]


@pytest.mark.parametrize("zone", [None, "Europe/Berlin", "Europe/Nowhere"])
def test_names_of_zones_do_not_matter(zone: str | None) -> None:
    """Not even those that are no text."""
    times = pa.array([0, None], pa.timestamp("ms", zone))
    value = arrow(some().set_column(2, "timestamp", times))
    for each in (value, value.replace(b"Europe/", b"\xff\xff\xff\xff\xff\xff\xff")):
        (run,) = read([each]).runs
        assert run.table.schema.field("timestamp").type == pa.timestamp("ms", "UTC")
        assert run.table["timestamp"].cast(pa.int64()).to_pylist() == [0, None]
        assert json.loads(encode_json(run.table)[0])["timestamp"] == "1970-01-01 00:00:00.000Z"


def test_extension_types_are_not_taken() -> None:
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, b"1" * 16], pa.binary(16)))
    assert told([arrow(some(2, ids))]) == [WRONG_SCHEMA]
    assert told([arrow(some(2, ids.storage))])[0][0] == "binary"


def test_messages_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.messages._BYTES_MAX", 900)
    monkeypatch.setattr("engine.messages._OBJECT_BYTES_MAX", 100)
    monkeypatch.setattr("engine.messages._ROWS_MAX", 9)
    fits, long = (b'{"user_id":"%s"}' % (b"x" * count) for count in (86, 87))
    assert told([long, fits, long]) == [TOO_LARGE, ["string", ("x" * 86, "None", "None")], TOO_LARGE]
    assert told([long, arrow(some(9)), arrow(some(2).replace_schema_metadata({"x": "y" * 900}))])[::2] == [TOO_LARGE] * 2
    assert told([arrow(some(10).select(["user_id", "amount", "timestamp"]).cast(some(1).schema))]) == [TOO_LARGE]


@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(max_examples=400)
def test_arrow_messages_with_changed_bytes_never_harm(seed: int, edits: int) -> None:
    random = np.random.default_rng(seed)
    ids = [None, pa.array(["a", None]), pa.array([b"\0\1", b""], pa.large_binary())][seed % 3]
    value = bytearray(arrow(some(2, ids)))
    for _ in range(edits):
        value[random.integers(len(value))] = random.integers(256)
    damaged = bytes(value)
    assert told([GOOD, damaged, GOOD]) == [JSON[GOOD], told([damaged])[0], JSON[GOOD]]
    engine = RiskEngine(users=10, max_ahead=None, time_unit="ms")
    for run in read([damaged]).runs:
        partition_of(ids_of(run.table["user_id"].combine_chunks(), "user_id"), 3)
        engine.ingest(run.table)


@pytest.mark.parametrize("ids", [pa.array(['é\n"', "", None]), pa.array([-(2**63), 2**63 - 1, None])])
def test_there_and_back(ids: Any) -> None:
    table = some(3, ids).set_column(1, "amount", pa.array([0.1, -1e20, None]))
    for value in ([encode_arrow(table)], encode_json(table.set_column(2, "timestamp", pa.array([0, 1, 2])))):
        engines = [RiskEngine(users=10, max_ahead=None, time_unit="ms", decimals=2) for _ in range(2)]
        engines[0].ingest(table)
        for run in read(list(value)).runs:
            engines[1].ingest(run.table)
        assert engines[0].digest() == engines[1].digest()
        assert engines[0].stats().rejected == engines[1].stats().rejected
    assert encode_json(table.slice(0, 0)) == []
    assert encode_json(table.to_batches()[0]) == encode_json(table)
    assert [json.loads(text)["user_id"] for text in encode_json(table)] == ids.to_pylist()


@pytest.mark.parametrize("scale", [0, 5, 38, 39, 2**31 - 1, -1, -38, -39, -(2**31)])
@pytest.mark.parametrize("bits", [128, 256])
def test_decimals_of_any_scale_are_numbers_in_json(scale: int, bits: int) -> None:
    """Which Python reads as they are; Arrow makes no text of all of them."""
    kind = getattr(pa, f"decimal{bits}")(5, scale)
    values = b"".join(value.to_bytes(bits // 8, "little", signed=True) for value in (123, 7, -99999))
    decimals = pa.Array.from_buffers(kind, 3, [pa.py_buffer(b"\x05"), pa.py_buffer(values)])
    (first, second, third) = (
        json.loads(text, parse_float=str, parse_int=str)["amount"] for text in encode_json(pa.table([decimals], ["amount"]))
    )
    assert second is None
    for text, digits in ((first, 123), (third, -99999)):
        mantissa, _, exponent = text.partition("E")
        whole, _, fraction = mantissa.partition(".")
        assert (int(whole + fraction), int(exponent or 0) - len(fraction)) == (digits, -scale)


def test_bytes_and_zones_in_json() -> None:
    """Ids of bytes need not be text, and the name of a zone need not be one."""
    ids = pa.array([b"\xff\0", None, b"", b"a"])
    times = pa.array([0, 1500, None, -1], pa.timestamp("ms", "No/Where"))
    for kind in (pa.binary(), pa.large_binary()):
        found = [json.loads(text) for text in encode_json(pa.table({"user_id": ids.cast(kind), "timestamp": times}).slice(1))]
        assert [row["user_id"] for row in found] == [None, "", "61"]
        assert [row["timestamp"] for row in found] == ["1970-01-01 00:00:01.500Z", None, "1969-12-31 23:59:59.999Z"]
    assert encode_json(pa.table({"user_id": pa.array([b"\x01\x02", b"\xfe\xff"], pa.binary(2))}).slice(1)) == [b'{"user_id":"feff"}']
