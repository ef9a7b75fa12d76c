"""What strangers may send a Flight server that no Arrow library would send: record batches that lie about their memory.

The server is a process of its own, for a batch that it believes ends it; gRPC's own library sends the messages, made here of bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("grpc", reason="needs grpcio")

import grpc

from tests.adapters.processes import LOOPBACK, Process

#: Schemas with columns that are not asked for, whose offsets lead into each other's memory.
BATCHES = [
    pa.record_batch({"user_id": ["a"], "more": pa.array([[["x"]]])}),
    pa.record_batch({"user_id": ["a", "bb", None], "more": pa.array([[["x"]], [], None])}),
    pa.record_batch({"user_id": [7, 8, None], "more": pa.array([{"a": [1]}, None, {"a": []}])}),
    pa.record_batch({"user_id": pa.array([b"a", b"\xff", b""], pa.large_binary())}),
    pa.record_batch({"user_id": ["a", "b", "c"], "amount": ["1", "2.5", None], "timestamp": [1, 2, 3]}),
    pa.record_batch(
        {"user_id": [1, 2], "amount": pa.array([1, 2], pa.decimal128(20, 4)), "timestamp": pa.array([1, 2], pa.timestamp("ms"))}
    ),
    pa.record_batch({"user_id": pa.array(["a" * 20, "b"], pa.string_view()), "more": pa.array(["x", "y"]).dictionary_encode()}),
]
LENGTHS = (1, 100, 10**5, 10**8, 2**31 - 1, -1, -(2**30), -(2**31))


class Server:
    """A process that answers Flight."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "engine.cli", "serve", "--http", "none", "--flight", f"{LOOPBACK}:0"]
        command += ["--users", "10k", "--time-unit", "s", "--log", "json"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKRING_")}
        self.process = Process(command, folder / "server.log", kept)
        self.process.start('"ready"')
        told = [json.loads(line) for line in self.process.printed().splitlines() if line.startswith("{")]
        self.url = next(each["flight"] for each in told if "flight" in each)
        self._channel = grpc.insecure_channel(self.url.removeprefix("grpc://"))

    def send(self, path: bytes, messages: Sequence[tuple[bytes, bytes]], method: str = "DoExchange") -> str:
        """Messages of headers and bodies; empty if they were taken, else what was said."""
        call = self._channel.stream_stream(f"/arrow.flight.protocol.FlightService/{method}")
        sent = [_flight_data(*message, None if number else path) for number, message in enumerate(messages)]
        answers = call(iter(sent), timeout=60)
        with contextlib.suppress(grpc.RpcError):
            list(answers)
        told = f"{answers.code()}: {answers.details()}"
        assert answers.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN), f"{told}; {self.process.printed()[-3000:]}"
        return "" if answers.code() is grpc.StatusCode.OK else told

    def digest(self) -> Any:
        with flight.connect(self.url) as client:
            (found,) = client.do_action(flight.Action("digest", b""))
            return json.loads(found.body.to_pybytes())

    def close(self) -> None:
        self._channel.close()
        self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("flight"))
    yield server
    server.close()


def _field(number: int, value: bytes) -> bytes:
    """A member of a message of protobuf: its number, how long it is, and it."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _flight_data(header: bytes, body: bytes, path: bytes | None) -> bytes:
    """`FlightData` of Flight.proto; with a path the first of a stream."""
    descriptor = b"" if path is None else _field(1, b"\x08\x01" + _field(3, path))
    return descriptor + _field(2, header) + _field(1000, body)


def messages_of(batch: pa.RecordBatch) -> list[tuple[bytes, bytes]]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    read = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return [(message.metadata.to_pybytes(), b"" if message.body is None else message.body.to_pybytes()) for message in read]


def test_what_is_in_order_is_taken(server: Server) -> None:
    for batch in BATCHES[:4]:
        assert server.send(b"scores", messages_of(batch)) == ""


@pytest.mark.parametrize("length", LENGTHS)
def test_offsets_that_lead_anywhere(server: Server, length: int) -> None:
    """Each of them, also those of columns that are not asked for."""
    before = server.digest()
    schema, (header, body) = messages_of(BATCHES[0])
    places = [place for place in range(0, len(body) - 3, 4) if body[place : place + 4] == b"\1\0\0\0"]
    assert len(places) == 4, "of the ids, both lists, and the texts in them"
    for place in places:
        changed = body[:place] + length.to_bytes(4, "little", signed=True) + body[place + 4 :]
        said = server.send(b"scores", [schema, (header, changed)])
        assert ("binary" in said) == (place == places[0] and length != 1), "only ids are read, and those are looked through"
    assert server.digest() == before


@pytest.mark.parametrize("length", [-1, -(2**63), 10**5, 4_000_000, 2**40, 2**63 - 1])
@pytest.mark.parametrize("ids", [["a"], [7]])
def test_lengths_that_are_not_there(server: Server, ids: list[Any], length: int) -> None:
    schema, (header, body) = messages_of(pa.record_batch({"user_id": ids}))
    changed = header.replace((1).to_bytes(8, "little"), length.to_bytes(8, "little", signed=True))
    assert changed != header
    said = server.send(b"scores", [schema, (changed, body)])
    assert said and "unexpected" not in said and "Traceback" not in said
    assert server.digest()


def test_bytes_changed(server: Server) -> None:
    """Of headers and bodies of record batches, drawn from a seed; the server stays, and takes no memory for it."""
    random = np.random.default_rng(1)
    for number in range(1500):
        batch = BATCHES[number % len(BATCHES)]
        schema, *parts = messages_of(batch)
        changed = [(_changed(header, random), _changed(body, random)) for header, body in parts]
        is_rows = "amount" in batch.schema.names
        said = server.send(
            b"transactions" if is_rows else b"scores", [schema, *changed], "DoPut" if is_rows and number % 2 else "DoExchange"
        )
        assert "Traceback" not in said
    assert server.digest()
    kilobytes = int((Path("/proc") / str(server.process.pid) / "status").read_text().split("VmHWM:")[1].split()[0])
    assert kilobytes < 1_000_000


def _changed(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.integers(0, 3)) if data else 0):
        place = int(random.integers(0, len(data)))
        if random.random() < 0.5:
            changed[place] = int(random.integers(0, 256))
        else:
            place &= ~3
            changed[place : place + 4] = int(random.choice(LENGTHS)).to_bytes(4, "little", signed=True)[: len(data) - place]
    return bytes(changed)
