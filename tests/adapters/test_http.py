"""The HTTP server, asked over real connections: it answers what the engine says, and nothing that a stranger sends harms it."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")

import urllib3

from engine import RiskEngine
from engine.access import Address, Token
from engine.adapters.http_bodies import ARROW, JSON, NDJSON
from engine.adapters.http_listener import HttpServer
from engine.adapters.http_server import Limits, Served
from engine.adapters.metrics import Meters
from engine.messages import encode_arrow
from engine.service import Service
from tests.adapters.processes import LOOPBACK, until

SECOND = 10**9
NOW = 1_767_225_600 * SECOND  # 2026-01-01


class Answer:
    """What a server said."""

    def __init__(self, found: urllib3.BaseHTTPResponse) -> None:
        self.status, self.headers, self.body = found.status, found.headers, found.data

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def table(self) -> pa.Table:
        return pa.ipc.open_stream(self.body).read_all()


class Server:
    """A server of this process, and a client of it."""

    def __init__(self, service: Service, **options: Any) -> None:
        self.failures: list[str] = []
        self.service = service
        self.http = HttpServer(Served(service, failed=self.failures.append, **options), Address(LOOPBACK, 0))
        self.address = (LOOPBACK, self.http.address.port)
        self.url = f"http://{self.http.address}"
        self._pool = urllib3.PoolManager(retries=False, timeout=60)

    def __call__(self, method: str, path: str, body: bytes | None = None, content: str | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if content is not None:
            named["content-type"] = content
        return Answer(self._pool.request(method, self.url + path, body=body, headers=named))

    def get(self, path: str, **headers: str) -> Answer:
        return self("GET", path, **headers)

    def ingest(self, *rows: dict[str, Any], query: str = "") -> Answer:
        return self("POST", f"/v1/transactions{query}", b"\n".join(json.dumps(row).encode() for row in rows), NDJSON)

    def close(self) -> None:
        self._pool.clear()
        self.http.stop()
        assert self.failures == []


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(service: Service | None = None, **options: Any) -> Server:
            return stack.enter_context(contextlib.closing(Server(service or service_of(), **options)))

        yield start


def service_of(ids: tuple[Any, ...] = ("alice", "bob", "alice"), **options: Any) -> Service:
    """Three transactions, of 10, 3.5 and 15, at the seconds 0, 1 and 2."""
    engine = RiskEngine(**({"users": 1000, "clock": "event", "time_unit": "ms", "now": lambda: NOW + 2 * SECOND} | options))
    times = pa.array([NOW + second * SECOND for second in range(len(ids))], pa.timestamp("ns"))
    if ids:
        users = pa.array(ids, pa.uint64()) if 2**63 in ids else pa.array(ids)
        engine.ingest({"user_id": users, "amount": [10.0, 3.5, 15.0][: len(ids)], "timestamp": times})
    return Service.of(engine)


def row(user: Any, amount: Any, second: float = 2) -> dict[str, Any]:
    return {"user_id": user, "amount": amount, "timestamp": NOW // 10**6 + int(second * 1000)}


class TestAnswers:
    def test_a_user(self, serve: Callable[..., Server]) -> None:
        server = serve()
        assert server.get("/v1/scores/alice").json == {
            "user_id": "alice",
            "score": 12.5,
            "sum": "25.0000",
            "count": 2,
            "at": "2026-01-01T00:00:02Z",
            "newest": "2026-01-01T00:00:02Z",
            "valid_until": "2026-01-01T00:01:00Z",
            "zero_at": "2026-01-01T00:01:02.000000001Z",
        }
        assert server.get("/v1/scores/alice?at=2026-01-01T00:01:00.000000001Z").json["score"] == 15.0
        unknown = server.get("/v1/scores/carol").json
        assert (unknown["score"], unknown["sum"], unknown["count"], unknown["zero_at"]) == (0.0, "0.0000", 0, None)

    @pytest.mark.parametrize(
        ("ids", "asked", "told"),
        [
            ((42, 7, 42), "42", 42),
            ((-1, 7, -1), "-1", -1),
            ((2**63, 7, 2**63), str(2**63), 2**63),
            (("42", "7", "42"), "42", "42"),
            ((b"\0\xff", b"7", b"\0\xff"), "00ff", "00ff"),
            (("a/b", "", "a/b"), "a%2Fb", "a/b"),
            (("<b>&\"'", "x", "<b>&\"'"), urllib.parse.quote("<b>&\"'"), "<b>&\"'"),
            (("\0\n\x7f ü€😀", "x", "\0\n\x7f ü€😀"), urllib.parse.quote("\0\n\x7f ü€😀"), "\0\n\x7f ü€😀"),
            (("?at=x#", "x", "?at=x#"), "%3Fat%3Dx%23", "?at=x#"),
        ],
    )
    def test_ids_are_what_they_are(self, serve: Callable[..., Server], ids: tuple[Any, ...], asked: str, told: Any) -> None:
        server = serve(service_of(ids))
        for path in ("/v1/scores/", "/v1/explain/"):
            found = server.get(path + asked)
            assert (found.status, found.json["user_id"], found.json["score"]) == (200, told, 12.5)
        many = server("POST", "/v1/scores", json.dumps({"user_ids": [told, None]}).encode(), JSON).json
        assert many == {"scores": [12.5, None], "at": "2026-01-01T00:00:02Z"}
        assert server.get("/v1/top?k=1").json["users"][0]["user_id"] == told

    def test_many_users_in_both_forms(self, serve: Callable[..., Server]) -> None:
        server = serve()
        users = pa.table({"user_id": ["bob", "alice", None, "carol"]})
        told = server("POST", "/v1/scores", encode_arrow(users), ARROW, accept=ARROW)
        assert told.table.to_pydict() == {"user_id": ["bob", "alice", None, "carol"], "score": [3.5, 12.5, None, 0.0]}
        assert server("POST", "/v1/scores", encode_arrow(users), ARROW).json["scores"] == [3.5, 12.5, None, 0.0]
        asked = json.dumps({"user_ids": ["bob"], "at": "2026-01-01T00:00:00Z"}).encode()
        assert server("POST", "/v1/scores", asked, JSON).json == {"scores": [0.0], "at": "2026-01-01T00:00:00Z"}
        assert server("POST", "/v1/scores", asked, JSON + "; charset=utf-8", accept=ARROW).table["score"].to_pylist() == [0.0]
        assert server("POST", "/v1/scores", b'{"user_ids": []}', JSON).json["scores"] == []

    def test_explanations_and_the_greatest(self, serve: Callable[..., Server]) -> None:
        server = serve()
        assert server.get("/v1/explain/alice").json == {
            "user_id": "alice",
            "score": 12.5,
            "sum": "25.0000",
            "count": 2,
            "at": "2026-01-01T00:00:02Z",
            "window": {"from": "2025-12-31T23:59:02Z", "to": "2026-01-01T00:00:02Z"},
            "reason": "2 transactions in the window, sum 25.0000",
            "transactions": [
                {"timestamp": "2026-01-01T00:00:00Z", "amount": "10.0000"},
                {"timestamp": "2026-01-01T00:00:02Z", "amount": "15.0000"},
            ],
        }
        top = server.get("/v1/top?k=5&by=count").json
        assert [(user["user_id"], user["count"], user["sum"]) for user in top["users"]] == [("alice", 2, "25.0000"), ("bob", 1, "3.5000")]
        assert server.get("/v1/top?k=0").json["users"] == []

    @pytest.mark.parametrize("content", [JSON, NDJSON, ARROW])
    def test_transactions(self, serve: Callable[..., Server], content: str) -> None:
        server, offline = serve(), service_of()
        rows = (
            [row("alice", 0.1, 3)] if content == JSON else [row("alice", 0.1, 3), row(None, 1), row("bob", 0.123456, 4), row("bob", 1, -99)]
        )
        body = b"\r\n \n".join(json.dumps(each).encode() for each in rows)
        if content == ARROW:
            body = encode_arrow(pa.Table.from_pylist(rows))
        told = server("POST", "/v1/transactions?scores=true&rejects=true", body, content).json
        result = offline.ingest(pa.Table.from_pylist(rows), scores=True)
        assert told["scores"] == result.scores.to_pylist()
        assert {name: told[name] for name in ("rows", "accepted", "rejected", "rounded")} == {
            "rows": len(rows),
            "accepted": result.accepted,
            "rejected": result.rejected,
            "rounded": result.rounded,
        }
        assert [(each["request_row"], each["reason"]) for each in told["rejects"]] == [(1, "null_user"), (3, "late")][: len(rows) - 1]
        assert server.service.digests() == offline.digests()

    @pytest.mark.parametrize(
        ("kind", "beyond", "told"),
        [
            (pa.timestamp("s"), 2**62, "146138514283-06-19T07:45:04Z"),
            (pa.timestamp("ms", "UTC"), -(2**60), "-36532659-12-03T02:05:53.024Z"),
            (pa.timestamp("us"), 2**60, "38504-08-17T21:30:06.846976Z"),
            (pa.date32(), 2**31 - 1, "5881580-07-11T00:00:00Z"),
            (pa.date64(), 86_400_000 * 10**9, "2739877-01-03T00:00:00Z"),
        ],
    )
    def test_rejects_whose_times_are_out_of_range(self, serve: Callable[..., Server], kind: Any, beyond: int, told: str) -> None:
        """Nanoseconds cannot say them, and Python's dates cannot; the answer can."""
        server = serve()
        number = pa.array([beyond], pa.int32() if kind == pa.date32() else pa.int64())
        body = encode_arrow(
            pa.table({"user_id": ["alice"], "amount": [1.5], "timestamp": number.cast(kind) if "date" in str(kind) else number.view(kind)})
        )
        answer = server("POST", "/v1/transactions?rejects=true", body, ARROW).json
        assert answer["rejects"] == [
            {"user_id": "alice", "amount": 1.5, "timestamp": told, "request_row": 0, "reason": "timestamp_out_of_range"}
        ]

    @pytest.mark.parametrize(
        ("kind", "told"), [(pa.decimal128(12, -3), "7.5E+4"), (pa.decimal256(70, 60), None), (pa.decimal128(9, 38), "0." + 36 * "0" + "75")]
    )
    def test_rejects_whose_amounts_have_odd_scales(self, serve: Callable[..., Server], kind: Any, told: str | None) -> None:
        units = (75).to_bytes(kind.byte_width, "little")
        amount = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(units)])
        body = encode_arrow(pa.table({"user_id": ["alice"], "amount": amount, "timestamp": pa.array([0], pa.timestamp("ns"))}))
        (row,) = serve()("POST", "/v1/transactions?rejects=true", body, ARROW).json["rejects"]
        assert (row["amount"], row["reason"]) == (told or f"0.{75:060}", "late")

    def test_nothing_to_apply(self, serve: Callable[..., Server]) -> None:
        server = serve()
        for body, content in (
            (b"", NDJSON),
            (b"\n \n", NDJSON),
            (encode_arrow(pa.table({"user_id": ["a"], "amount": [1.0], "timestamp": [1]}).slice(1)), ARROW),
        ):
            assert server("POST", "/v1/transactions?rejects=true", body, content).json == {
                "rows": 0,
                "accepted": 0,
                "rejected": {},
                "rounded": 0,
                "rejects": [],
            }

    def test_the_first_rows_decide_the_kind_of_ids(self, serve: Callable[..., Server]) -> None:
        server = serve(service_of(()))
        assert server.get("/v1/scores/5").json["score"] == 0.0
        assert server.ingest(row(None, 1), row(5, 2), row(None, 1)).json["rejected"] == {"null_user": 2}
        assert server.get("/v1/scores/5").json == server.get("/v1/scores/5").json
        assert server.get("/v1/scores/5").json["user_id"] == 5
        refused = server.ingest(row("five", 1))
        assert refused.status == 422

    def test_stats_and_metrics(self, serve: Callable[..., Server]) -> None:
        service, meters = service_of(), Meters()
        meters.show_lookups(service)
        meters.show_engine(service, lambda: None)
        server = serve(service, observer=meters)
        server.ingest(row("bob", 1), row("bob", None))
        server.get("/v1/scores/alice")
        stats = server.get("/v1/stats").json
        assert (stats["users"], stats["transactions"], stats["accepted"], stats["rejected"]) == (2, 4, 4, {"null_amount": 1})
        assert stats["clock"] == "2026-01-01T00:00:02Z"
        lines = server.get("/metrics").body.decode().splitlines()
        assert {
            'riskring_transactions_total{result="accepted"} 4.0',
            'riskring_transactions_total{result="rejected"} 1.0',
            'riskring_rejected_total{reason="null_amount"} 1.0',
            "riskring_lookups_total 1.0",
            "riskring_users 2.0",
            "riskring_transactions_retained 4.0",
            "riskring_ingest_seconds_count 1.0",
            "riskring_lookup_seconds_count 1.0",
            "riskring_clock_seconds 1.767225602e+09",
        } <= set(lines)
        assert not [line for line in lines if "alice" in line or "bob" in line]

    def test_a_node_takes_no_transactions_and_knows_its_partitions_only(self, serve: Callable[..., Server]) -> None:
        engine = service_of()._engines()[0]
        server = serve(Service(engine.config, lambda: {}, lambda: NOW, partitions=3, why_not=lambda: "partition 1 is catching up"))
        assert server.ingest(row("a", 1)).status == 405
        for told in (server.get("/v1/scores/alice"), server.get("/v1/top"), server.get("/readyz")):
            assert (told.status, told.headers["retry-after"]) == (503, "1")
        assert server.get("/readyz").json["detail"] == "partition 1 is catching up"
        assert server.get("/healthz").status == 200

    def test_readers_and_a_writer_at_once(self, serve: Callable[..., Server]) -> None:
        """While a large request is applied, lookups go on, and each sees a state between two requests."""
        service = service_of((), users=10_000, max_ahead=None)
        server = serve(service)
        times = pa.array(np.full(200_000, NOW), pa.timestamp("ns"))
        body = encode_arrow(pa.table({"user_id": np.arange(200_000) % 5000, "amount": np.ones(200_000), "timestamp": times}))
        seen: list[int] = []
        ended = threading.Event()

        def read() -> None:
            while not ended.is_set():
                told = server.get("/v1/scores/17").json
                seen.append(told.get("count", told))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(5):
            assert server("POST", "/v1/transactions", body, ARROW).json["accepted"] == 200_000
        ended.set()
        reader.join()
        assert set(seen) <= {40 * times for times in range(6)} and seen == sorted(seen)


# ---- bad input -------------------------------------------------------------------------------------------------------------------

LOOKUP = json.dumps({"user_ids": ["alice"]}).encode()
IDS = encode_arrow(pa.table({"user_id": ["alice"]}))
OLD = "1990-01-01T00:00:00Z"
ONE = json.dumps(row("alice", 1)).encode()
ROWS = encode_arrow(pa.Table.from_pylist([row("alice", 1)]))


def scaled(kind: Any) -> bytes:
    """A row with an amount of 0."""
    amount = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(bytes(kind.byte_width))])
    return encode_arrow(pa.table({"user_id": ["alice"], "amount": amount, "timestamp": [1]}))


#: (method, path, body, content type, status, what the text names)
BAD: list[tuple[str, str, bytes | None, str | None, int, str]] = [
    # a user's score
    ("GET", "/v1/scores/", None, None, 404, "USER"),
    ("GET", "/v1/scores/%ff", None, None, 400, "UTF-8"),
    ("GET", "/v1/scores/alice?at=", None, None, 400, "at=''"),
    ("GET", "/v1/scores/alice?at=yesterday", None, None, 400, "'yesterday'"),
    ("GET", "/v1/scores/alice?at=17", None, None, 400, "'17'"),
    ("GET", "/v1/scores/alice?at=9999-01-01T00:00:00Z", None, None, 400, "2262"),
    ("GET", f"/v1/scores/alice?at={OLD}", None, None, 409, "lateness"),
    ("GET", "/v1/scores/alice?At=now", None, None, 400, "'At'"),
    ("GET", "/v1/scores/alice?at=now&at=now", None, None, 400, "twice"),
    ("GET", "/v1/scores/alice?at=%ff", None, None, 400, "UTF-8"),
    ("POST", "/v1/scores/alice", b"", None, 405, "Not Allowed"),
    # many
    ("GET", "/v1/scores", None, None, 405, "Not Allowed"),
    ("POST", "/v1/scores", b"", JSON, 400, "JSON"),
    ("POST", "/v1/scores", LOOKUP, None, 415, JSON),
    ("POST", "/v1/scores", LOOKUP, "text/plain", 415, "text/plain"),
    ("POST", "/v1/scores", LOOKUP, NDJSON, 415, NDJSON),
    ("POST", "/v1/scores", LOOKUP, ARROW, 422, "0xFF"),
    ("POST", "/v1/scores", IDS, JSON, 400, "UTF-8"),
    ("POST", "/v1/scores", LOOKUP[:-2], JSON, 400, "JSON"),
    ("POST", "/v1/scores", b'{"user_ids": ["\xff"]}', JSON, 400, "UTF-8"),
    ("POST", "/v1/scores", b'{"user_ids": ["\\ud800"]}', JSON, 400, "JSON"),
    ("POST", "/v1/scores", b"null", JSON, 422, "user_ids"),
    ("POST", "/v1/scores", b"{}", JSON, 422, "user_ids"),
    ("POST", "/v1/scores", b'{"user_ids": "alice"}', JSON, 422, "user_ids"),
    ("POST", "/v1/scores", b'{"user_ids": null}', JSON, 422, "user_ids"),
    ("POST", "/v1/scores", b'{"user_ids": ["a", 7]}', JSON, 422, "user_ids[1]=7"),
    ("POST", "/v1/scores", b'{"user_ids": ["a", true]}', JSON, 422, "user_ids[1]=True"),
    ("POST", "/v1/scores", b'{"user_ids": ["a", 1.5]}', JSON, 422, "user_ids[1]=1.5"),
    ("POST", "/v1/scores", b'{"user_ids": ["a", ["b"]]}', JSON, 422, "user_ids[1]"),
    ("POST", "/v1/scores", b'{"user_ids": ["a"], "when": 1}', JSON, 422, "'when'"),
    ("POST", "/v1/scores", b'{"user_ids": ["a"], "at": 17}', JSON, 400, "at=17"),
    ("POST", "/v1/scores", b'{"user_ids": ["a"], "at": "soon"}', JSON, 400, "'soon'"),
    ("POST", "/v1/scores", b'{"user_ids": ["a"], "at": "1990-01-01"}', JSON, 409, "lateness"),
    ("POST", "/v1/scores?at=now", LOOKUP, JSON, 400, "'at'"),
    ("POST", "/v1/scores", b"[" * 4000, JSON, 400, "JSON"),
    ("POST", "/v1/scores", json.dumps({"user_ids": ["a"] * 11}).encode(), JSON, 413, "11 users"),
    ("POST", "/v1/scores", encode_arrow(pa.table({"user_id": ["a"] * 11})), ARROW, 413, "11 users"),
    ("POST", "/v1/scores", IDS[:-40], ARROW, 422, ""),
    ("POST", "/v1/scores", encode_arrow(pa.table({"user": ["a"]})), ARROW, 422, "'user_id'"),
    ("POST", "/v1/scores", encode_arrow(pa.table({"user_id": [7]})), ARROW, 422, "string"),
    ("POST", "/v1/scores", encode_arrow(pa.table({"user_id": [1.5]})), ARROW, 422, "double"),
    ("POST", "/v1/scores", encode_arrow(pa.table({"user_id": pa.array(["a"]).dictionary_encode()})), ARROW, 422, "dictionary"),
    ("POST", "/v1/scores", b"x" * 5000, JSON, 413, "4,096"),
    # transactions
    ("GET", "/v1/transactions", None, None, 405, "Not Allowed"),
    ("POST", "/v1/transactions", ONE, None, 415, JSON),
    ("POST", "/v1/transactions", ONE, "text/csv", 415, "text/csv"),
    ("POST", "/v1/transactions", b"", JSON, 400, "no JSON object"),
    ("POST", "/v1/transactions", b"[" + ONE + b"]", JSON, 400, "no JSON object"),
    ("POST", "/v1/transactions", ONE[:-3], JSON, 400, "the body"),
    ("POST", "/v1/transactions", ONE + b"\n" + ONE[:-3], NDJSON, 400, "line 2"),
    ("POST", "/v1/transactions", ONE + b"\n" + b'{"user_id":"\xff"}', NDJSON, 400, "line 2"),
    ("POST", "/v1/transactions", ONE + b"\n7", NDJSON, 400, "line 2"),
    ("POST", "/v1/transactions", ONE + b"\n" + b'{"user_id":7,"amount":1,"timestamp":1}', NDJSON, 422, "line 2"),
    ("POST", "/v1/transactions", b'{"user_id":[1],"amount":1,"timestamp":1}', JSON, 422, "user_id"),
    ("POST", "/v1/transactions", b'{"user_id":"a","amount":{},"timestamp":1}', JSON, 422, "amount"),
    ("POST", "/v1/transactions", b'{"user_id":"a","user_id":"b"}', JSON, 422, "twice"),
    ("POST", "/v1/transactions", ONE, ARROW, 400, "0xFF"),
    ("POST", "/v1/transactions", ROWS[:-40], ARROW, 400, "the body"),
    ("POST", "/v1/transactions", encode_arrow(pa.table({"user_id": ["a"]})), ARROW, 422, "amount"),
    ("POST", "/v1/transactions", encode_arrow(pa.table({"user_id": [7], "amount": [1], "timestamp": [1]})), ARROW, 422, "string"),
    ("POST", "/v1/transactions", scaled(pa.decimal128(12, 65538)), ARROW, 422, "scale"),
    ("POST", "/v1/transactions", scaled(pa.decimal128(38, 39)), ARROW, 422, "-38 to 38"),
    ("POST", "/v1/transactions", scaled(pa.decimal256(76, -77)), ARROW, 422, "-76 to 76"),
    ("POST", "/v1/transactions?scores=yes", ONE, JSON, 400, "scores='yes'"),
    ("POST", "/v1/transactions?reject=true", ONE, JSON, 400, "'reject'"),
    ("POST", "/v1/transactions", b" " * 5000, NDJSON, 413, "4,096"),
    # the rest
    ("GET", "/v1/explain/", None, None, 404, "USER"),
    ("GET", "/v1/explain/%ff", None, None, 400, "UTF-8"),
    ("GET", "/v1/explain/alice?at=x", None, None, 400, "'x'"),
    ("GET", f"/v1/explain/alice?at={OLD}", None, None, 409, "lateness"),
    ("GET", "/v1/top?k=", None, None, 400, "k=''"),
    ("GET", "/v1/top?k=-1", None, None, 400, "k='-1'"),
    ("GET", "/v1/top?k=1.5", None, None, 400, "k='1.5'"),
    ("GET", "/v1/top?k=%D9%A3", None, None, 400, "k="),
    ("GET", "/v1/top?k=10001", None, None, 400, "10000"),
    ("GET", "/v1/top?by=name", None, None, 400, "'name'"),
    ("GET", f"/v1/top?at={OLD}", None, None, 409, "lateness"),
    ("GET", "/v1/stats?x=1", None, None, 400, "'x'"),
    ("GET", "/v1/nothing", None, None, 404, "Not Found"),
    ("GET", "/", None, None, 404, "page"),
    ("GET", "/v1/events", None, None, 404, "events"),
    ("DELETE", "/v1/stats", None, None, 405, "Not Allowed"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "content", "status", "named"), BAD, ids=[f"{each[0]} {each[1]} {n}" for n, each in enumerate(BAD)]
)
def test_bad_input(bad_input: Server, method: str, path: str, body: bytes | None, content: str | None, status: int, named: str) -> None:
    before = bad_input.service.digests()
    told = bad_input(method, path, body, content)
    assert (told.status, told.headers["content-type"]) == (status, "application/problem+json"), told.body
    problem = told.json
    assert set(problem) == {"type", "title", "status", "detail"} and problem["status"] == status
    assert named in problem["detail"]
    assert problem["detail"].isprintable() and "Traceback" not in problem["detail"]
    assert bad_input.service.digests() == before
    assert bad_input.get("/v1/scores/alice").json["score"] == 12.5


@pytest.fixture(scope="module")
def bad_input() -> Iterator[Server]:
    with contextlib.closing(Server(service_of(), limits=Limits(body_bytes=4096, users=10))) as server:
        yield server


def test_other_ways_to_ask_wrongly(serve: Callable[..., Server]) -> None:
    server = serve()
    assert server("POST", "/v1/scores", LOOKUP, JSON, content_encoding="gzip").status == 415
    assert server("POST", "/v1/scores", LOOKUP, JSON, accept="text/html").status == 406
    long = "x" * (1 << 20)
    assert server("POST", "/v1/scores", json.dumps({"user_ids": [long]}).encode(), JSON).json["scores"] == [0.0]
    shown = server("POST", "/v1/scores", json.dumps({"user_ids": ["a", [long]]}).encode(), JSON)
    assert shown.status == 422 and len(shown.body) < 1000
    assert server.ingest(row("x" * 100_000, 5)).json["accepted"] == 1
    assert server.get("/v1/top?k=1&by=newest").status == 200


def test_a_full_engine_takes_nothing_of_a_request(serve: Callable[..., Server]) -> None:
    server = serve(service_of(users=3))
    before = server.service.digests()
    told = server.ingest(*(row(f"user {number}", 1) for number in range(5)))
    assert (told.status, told.headers["retry-after"], told.json["type"]) == (503, "1", "urn:riskring:capacity")
    assert server.service.digests() == before
    assert server.ingest(row("carol", 1)).status == 200


# ---- who may ask, and how much ---------------------------------------------------------------------------------------------------


class TestAccess:
    def test_a_token(self, serve: Callable[..., Server]) -> None:
        server = serve(token=Token("s3cret"), page="<p>")
        for path in ("/v1/scores/alice", "/v1/stats", "/metrics", "/openapi.json", "/nothing"):
            told = server.get(path)
            assert (told.status, told.headers["www-authenticate"]) == (401, "Bearer")
            for wrong in ("Bearer guess", "Bearer ", "s3cret", "bearer s3cret", "Bearer s3cret2", "Basic s3cret"):
                refused = server.get(path, authorization=wrong)
                assert refused.status == 401 and b"s3cret" not in refused.body
        assert server("POST", "/v1/transactions", ONE, JSON).status == 401
        assert server.get("/v1/scores/alice", authorization="Bearer s3cret").json["score"] == 12.5
        assert [server.get(path).status for path in ("/healthz", "/readyz", "/")] == [200, 200, 200]

    def test_names_that_are_not_its_own(self, serve: Callable[..., Server]) -> None:
        """A web page somewhere whose name is made to lead here."""
        server = serve(hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
        for host, status in (
            ("localhost:80", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.example", 421),
            ("", 421),
            ("127.0.0.1.evil", 421),
        ):
            assert server.get("/v1/scores/alice", host=host).status == status

    def test_the_page_may_run_its_own_script_only(self, serve: Callable[..., Server]) -> None:
        page = "<style>p{}</style><script>1</script><p>ü"
        told = serve(page=page).get("/")
        assert (told.body.decode(), told.headers["content-type"]) == (page, "text/html; charset=utf-8")
        policy = told.headers["content-security-policy"]
        assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='; " in policy
        assert "default-src 'none'" in policy and "unsafe" not in policy


def raw(server: Server, *parts: bytes, close: bool = False, seconds: float = 60) -> bytes:
    """All that a server says to these bytes, until it closes the connection."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        for part in parts:
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
        if close:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(1 << 16):
                said += more
        return said


POST = b"POST /v1/transactions HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"


class TestLimits:
    def test_a_head_that_does_not_come(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(head_seconds=0.3))
        assert raw(server, b"").startswith(b"HTTP/1.1 400") and raw(server, b"GET / HT").startswith(b"HTTP/1.1 400")
        with socket.create_connection(server.address, timeout=60) as connection, contextlib.suppress(ConnectionError):
            for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 10_000:  # a byte now and then
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            raise AssertionError("it was let go on")
        assert server.get("/v1/scores/alice").status == 200

    def test_a_head_that_does_not_end(self, serve: Callable[..., Server]) -> None:
        server = serve()
        for head in (b"GET /" + b"x" * 300_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 60_000, b"GET / HTTP/1.1\r\nx: " + b"y" * 300_000):
            assert b"65536 bytes" in raw(server, head)

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", b"400"),
            (POST + b"Content-Length: 99999999999\r\n\r\n", b"413"),
            (POST + b"Content-Length: -5\r\n\r\n", b"400"),
            (POST + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n{}", b"400"),
            (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
            (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"400"),
            (b"GET /\xff HTTP/1.1\r\n\r\n", b"400"),
            (b"BREW / HTTP/1.1\r\n\r\n", b"400"),
        ],
    )
    def test_requests_that_lie(self, serve: Callable[..., Server], request_: bytes, status: bytes) -> None:
        server = serve()
        before = server.service.digests()
        assert raw(server, request_).startswith(b"HTTP/1.1 " + status)
        assert server.service.digests() == before

    def test_a_body_that_does_not_come(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(seconds=0.3))
        before = server.service.digests()
        assert raw(server, POST + b"Content-Length: 100\r\n\r\n" + ONE[:20]).startswith(b"HTTP/1.1 408")
        assert raw(server, POST + b"Content-Length: 100\r\n\r\n" + ONE, close=True) == b""  # truncated
        assert server.service.digests() == before

    def test_a_body_without_an_end(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(body_bytes=1 << 20))
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        assert b" 413 " in raw(server, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)

    def test_bodies_of_all_together(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(bodies_bytes=1 << 20, seconds=30))
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                connection = stack.enter_context(socket.create_connection(server.address, timeout=60))
                connection.sendall(POST + b"Content-Length: 600000\r\n\r\n" + b" " * 500_000)
            until(lambda: server.http._gate.answers._held >= 1_000_000, what="both bodies are held")
            told = server("POST", "/v1/transactions", b" " * 200_000, NDJSON)
            assert (told.status, told.headers["retry-after"]) == (503, "1")
        until(lambda: server.http._gate.answers._held == 0, what="nothing is held")
        assert server.ingest(row("alice", 1)).status == 200
        assert server.http._gate.answers._held == 0

    def test_requests_at_a_time(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(requests=2, seconds=30))
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                connection = stack.enter_context(socket.create_connection(server.address, timeout=60))
                connection.sendall(POST + b"Content-Length: 100\r\n\r\n")
            until(lambda: server.http._gate._running == 2, what="both are read")
            assert server.get("/v1/scores/alice").status == 503
        until(lambda: server.http._gate._running == 0, what="both are gone")
        assert server.get("/v1/scores/alice").status == 200

    def test_an_answer_that_nobody_takes(self, serve: Callable[..., Server]) -> None:
        server = serve(limits=Limits(seconds=0.5))
        users = encode_arrow(pa.table({"user_id": ["x" * 1000] * 30_000}))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(server.address)
            head = b"POST /v1/scores HTTP/1.1\r\nHost: x\r\nAccept: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % (ARROW.encode(), ARROW.encode(), len(users)) + users)
            until(lambda: not server.http._server.server_state.connections, what="the connection is cut")
        server.failures.clear()  # that an answer was not taken is told

    def test_hostile_arrow(self, serve: Callable[..., Server]) -> None:
        """Each byte of a stream changed in some way: an answer of the documented statuses, and the process lives."""
        server = serve()
        random = np.random.default_rng(3)
        for body, path in ((IDS, "/v1/scores"), (ROWS, "/v1/transactions")):
            for place in random.permutation(len(body))[:150].tolist():
                changed = bytearray(body)
                changed[place] = int(random.integers(0, 256))
                assert server("POST", path, bytes(changed), ARROW).status in (200, 400, 413, 422)
        assert server.get("/v1/scores/bob").json["score"] == 3.5


def test_events(serve: Callable[..., Server]) -> None:
    samples = iter(range(1_000_000))
    server = serve(events=lambda: b'{"sample":%d}' % next(samples), limits=Limits(streams=2))
    pool = urllib3.PoolManager(retries=False, timeout=60)
    streams = [pool.request("GET", server.url + "/v1/events", preload_content=False) for _ in range(2)]
    assert {stream.headers["content-type"] for stream in streams} == {"text/event-stream; charset=utf-8"}
    for stream in streams:
        assert stream.readline() == b"retry: 1000\n" and stream.readline() == b"\n"
        assert json.loads(stream.readline().removeprefix(b"data: "))["sample"] in (0, 1)
    assert server.get("/v1/events").status == 503
    for stream in streams:
        stream.close()
    until(lambda: not server.http._gate.answers._watch.streams, what="the streams are gone")
    assert math.isfinite(next(samples))


class TestToken:
    def test_of_a_file(self, tmp_path: Any) -> None:
        file = tmp_path / "token"
        file.write_text("first\n")
        token = Token(file=str(file))
        assert token.matches(b"Bearer first")
        for wrong in ("", "  ", "ü", "two words", "x\0"):
            file.write_text(wrong)
            with pytest.raises(ValueError, match="token") as error:
                token.read_again()
            assert wrong.strip() == "" or wrong not in str(error.value)
            assert token.matches(b"Bearer first")
        file.write_text("second")
        token.read_again()
        assert token.matches(b"Bearer second") and not token.matches(b"Bearer first")
        assert "second" not in repr(token)
        file.unlink()
        with pytest.raises(ValueError, match="No such file"):
            token.read_again()
