"""The same calls over HTTP, by Flight and in the process: equal answers, states and errors; and what strangers may send by Flight."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("tenacity", reason="needs the extra `client`")

from engine import CapacityError, ConfigError, ConnectorError, RiskEngine, SchemaError, StaleError, TimeTooOldError
from engine.access import Address, Certificates, Token
from engine.adapters.client import RiskClient
from engine.adapters.flight_server import FlightServer
from engine.adapters.http_listener import HttpServer
from engine.adapters.http_server import Served
from engine.service import Service
from tests.adapters.needs import need
from tests.adapters.processes import LOOPBACK, until

SECOND = 10**9
KINDS = ["int64", "uint64", "string", "binary"]


def rows(kind: str, count: int = 3000) -> pa.Table:
    random = np.random.default_rng(7)
    numbers = random.integers(0, 50, count)
    users = {
        "int64": pa.array(numbers - 9),
        "uint64": pa.array(numbers.astype(np.uint64) + np.uint64(2**63)),
        "string": pa.array([f"user {number}/?ü" for number in numbers]),
        "binary": pa.array([bytes([number, 255]) for number in numbers.tolist()], pa.binary()),
    }[kind]
    times = (np.arange(count) // 20 - random.integers(0, 70, count)) * SECOND
    amounts = pa.array(random.integers(-50, 900, count) / 7, mask=random.random(count) < 0.01)
    return pa.table({"user_id": users, "amount": amounts, "timestamp": pa.array(times, pa.timestamp("ns"))})


def engine_of(**options: Any) -> RiskEngine:
    return RiskEngine(**({"users": 1000, "max_ahead": None, "time_unit": "s"} | options))


@contextlib.contextmanager
def serving(scheme: str, service: Service, token: Token | None = None) -> Iterator[str]:
    """The URL of a server of this process."""
    address = Address(LOOPBACK, 0)
    server: Any = HttpServer(Served(service, token), address) if scheme == "http" else FlightServer(service, address, token)
    try:
        yield f"{scheme}://{server.address}"
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_does_not_matter(scheme: str, kind: str) -> None:
    table, here, there = rows(kind), engine_of(), engine_of()
    with serving(scheme, Service.of(there)) as url, RiskClient(url) as client:
        for first in range(0, len(table), 700):
            part = table.slice(first, 700)
            wanted = here.ingest(part, scores=True)
            told = client.ingest(part, scores=True)
            assert told.pop("scores").equals(wanted.scores)
            assert told == {"rows": wanted.rows, "accepted": wanted.accepted, "rejected": wanted.rejected, "rounded": wanted.rounded}
        wanted = here.ingest(table)
        assert client.ingest(table.to_batches()[0])["rejected"] == wanted.rejected
        assert there.digest() == here.digest()
        users = pa.concat_arrays([table["user_id"].combine_chunks().slice(0, 100), pa.nulls(2, table["user_id"].type)])
        at = np.datetime64((here.clock_ns or 0) + 31 * SECOND + 1, "ns")
        for when in (None, at, str(at)):
            assert client.scores(users, at=when).equals(here.scores(users, at=when))
            listed = users.to_pylist()[:5]
            assert client.scores(listed, at=when).tolist() == here.scores(listed, at=when).tolist()
            assert client.score(listed[0], at=when) == here.score(listed[0], at=when)
            explained, wanted = client.explain(listed[0], at=when), here.explain(listed[0], at=when)
            assert (explained["score"], explained["sum"], explained["reason"]) == (wanted.score, f"{wanted.sum:f}", wanted.reason)
            assert [each["amount"] for each in explained["transactions"]] == [
                f"{each:f}" for each in wanted.transactions["amount"].to_pylist()
            ]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
class TestErrors:
    def test_are_those_of_the_engine(self, scheme: str) -> None:
        engine = engine_of(users=3)
        engine.add("alice", 2.5, 100)
        before = engine.digest()
        with serving(scheme, Service.of(engine)) as url, RiskClient(url) as client:
            for kind, match, call in [
                (TimeTooOldError, "lateness", lambda: client.scores(["alice"], at="1970-01-01")),
                (TimeTooOldError, "lateness", lambda: client.explain("alice", at="1970-01-01")),
                (SchemaError, "string", lambda: client.scores([7])),
                (SchemaError, "amount", lambda: client.ingest(pa.table({"user_id": ["a"]}))),
                (SchemaError, "string", lambda: client.ingest(pa.table({"user_id": [7], "amount": [1], "timestamp": [100]}))),
                (
                    CapacityError,
                    "users",
                    lambda: client.ingest(pa.table({"user_id": list("abcd"), "amount": [1] * 4, "timestamp": [100] * 4})),
                ),
                (ConfigError, "tomorrow", lambda: client.scores(["alice"], at="tomorrow")),
            ]:
                with pytest.raises(kind, match=match) as error:
                    call()
                assert "Traceback" not in str(error.value)
            assert engine.digest() == before
            assert client.score("alice") == 2.5

    def test_tokens(self, scheme: str) -> None:
        with serving(scheme, Service.of(engine_of()), Token("s3cret")) as url:
            for token in (None, "guess"):
                with RiskClient(url, token=token) as client:
                    for call in (lambda: client.score(1), lambda: client.ingest(rows("int64")), lambda: client.explain(1)):
                        with pytest.raises(ConnectorError, match="token"):
                            call()
            with RiskClient(url, token="s3cret") as client:
                assert client.score(1) == 0.0 and "s3cret" not in repr(client)

    def test_what_only_asks_is_tried_again(self, scheme: str) -> None:
        engine, away = engine_of(), iter([True, True])

        def engines() -> dict[int, RiskEngine]:
            if next(away, False):
                raise StaleError("the snapshot is being loaded")
            return {0: engine}

        service = Service(engine.config, engines, engine.wall_ns, writable=True)
        with serving(scheme, service) as url, RiskClient(url) as client:
            assert client.score(1) == 0.0
            away = iter([True] * 100)
            with pytest.raises(StaleError, match="being loaded"):
                client.ingest(rows("int64"))
            assert sum(1 for _ in away) == 99, "transactions are sent once"

    def test_nobody_there(self, scheme: str) -> None:
        with socket.socket() as held:
            held.bind((LOOPBACK, 0))
            with RiskClient(f"{scheme}://{LOOPBACK}:{held.getsockname()[1]}", timeout=2) as client:
                with pytest.raises(ConnectorError, match=r"127\.0\.0\.1"):
                    client.score(1)
                with pytest.raises(ConnectorError, match="not known"):
                    client.ingest(rows("int64"))


def test_a_server_that_is_another() -> None:
    """A proxy's page with status 200 is no answer."""
    with socket.create_server((LOOPBACK, 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(
                            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<p>0"
                        )

        threading.Thread(target=answer, daemon=True).start()
        with RiskClient(f"http://{LOOPBACK}:{listening.getsockname()[1]}", timeout=10) as client:
            for call in (lambda: client.score("a"), lambda: client.explain("a"), lambda: client.ingest(rows("int64", 5))):
                with pytest.raises(ConnectorError, match="text/html"):
                    call()


def test_frames_of_other_libraries() -> None:
    polars = pytest.importorskip("polars")
    table = rows("string", 200)
    here, there = engine_of(), engine_of()
    here.ingest(table)
    with serving("grpc", Service.of(there)) as url, RiskClient(url) as client:
        frame = polars.from_arrow(table).with_columns(polars.col("user_id").cast(polars.Categorical))
        client.ingest(frame)
        assert there.digest() == here.digest()
        users = frame["user_id"].cast(polars.String).head(3)
        assert client.scores(users).to_pylist() == here.scores(users).to_pylist()


def test_examples_of_the_readme() -> None:
    """With a server in the place of the one on port 8080."""
    for library in ("polars", "duckdb"):
        pytest.importorskip(library)
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    section = readme.split("## A server")[1].split("\n## ")[0]
    programs = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(programs) == 3
    engine = engine_of()
    names: dict[str, Any] = {"now_ms": 1_767_225_600_000}
    with serving("http", Service.of(engine)) as url:
        for program in programs:
            exec(program.replace("http://localhost:8080", url), names)
    assert names["frame"]["score"].to_list() == names["scored"]["score"].to_pylist() == [12.5, 3.0, 0.0]


def test_curl_examples_of_the_readme() -> None:
    need({"curl": "curl"}, {})
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    section = readme.split("## A server")[1].split("\n## ")[0]
    lines = re.findall(r"^curl (.*)$", section, re.MULTILINE)
    assert len(lines) == 5
    service = Service.of(RiskEngine(users=100, time_unit="ms", max_ahead=None))
    said = []
    with serving("http", service) as url:
        for line in lines:
            command = "curl --silent --fail-with-body " + line.replace("localhost:8080", url)
            said.append(json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout))
    assert [each.get("accepted", each.get("score", each.get("scores"))) for each in said] == [1, 12.5, [12.5, 0.0], 0.0, None]
    assert said[4]["users"][0]["user_id"] == "alice"


@pytest.mark.parametrize("scores", [False, True])
def test_rows_refused_behind_those_of_earlier_batches(scores: bool) -> None:
    """By Flight a table is many batches: whoever sends what was not applied, and only that, has all rows once."""
    first, count = 65_536, 70_000
    table = pa.table({"user_id": np.arange(count), "amount": np.ones(count), "timestamp": np.full(count, 100)})
    engine, offline = engine_of(users=first + 1), engine_of(users=first + 1)
    with serving("grpc", Service.of(engine)) as url, RiskClient(url) as client:
        with pytest.raises(CapacityError, match="of the batch that begins at row 65,536: send only from there on"):
            client.ingest(table, scores=scores)
        offline.ingest(table.slice(0, first))
        assert engine.digest() == offline.digest()
        with pytest.raises(CapacityError) as error:
            client.ingest(table.slice(first), scores=scores)
        assert "begins at row" not in str(error.value), "nothing of these was applied"


@pytest.mark.parametrize(
    ("url", "match"),
    [
        *[(url, "must begin with") for url in ("", "localhost:80", "ftp://x")],
        *[(url, "HOST:PORT") for url in ("http://", "grpc://", "grpc://x", "http://x:99999", "http://[::1")],
        *[(f"{scheme}://me:s3cret@x:1", "token=") for scheme in ("http", "grpc", "grpc+tls", "ftp")],
    ],
)
def test_urls_that_are_none(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        RiskClient(url)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("scheme", ["https", "grpc+tls"])
def test_files_that_are_no_certificates(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no certificate")
    for files in ({"ca": "/nowhere"}, {"ca": str(tmp_path / "text")}, {"certificate": str(tmp_path / "text"), "key": "/nowhere"}):
        with pytest.raises(ConfigError, match="in PEM"):
            RiskClient(f"{scheme}://localhost:1", **files)


# ---- Flight ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> RiskEngine:
    engine = engine_of()
    engine.ingest(pa.table({"user_id": ["alice", "bob", "alice"], "amount": [10.0, 3.5, 15.0], "timestamp": [0, 1, 2]}))
    return engine


@pytest.fixture
def connect(engine: RiskEngine) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Any:
            server = FlightServer(Service.of(engine), Address(LOOPBACK, 0), **options)
            stack.callback(server.stop)
            return stack.enter_context(flight.connect(f"grpc://{server.address}"))

        yield make


def put(client: Any, *batches: Any, path: str = "transactions") -> list[dict[str, Any]]:
    """Send batches; what is said of each."""
    writer, reader = client.do_put(flight.FlightDescriptor.for_path(path), batches[0].schema)
    told = []
    with writer:
        for batch in batches:
            writer.write_batch(batch)
            told.append(json.loads(reader.read().to_pybytes()))
        writer.done_writing()
    return told


class TestFlight:
    def test_what_can_be_asked(self, connect: Callable[..., Any], engine: RiskEngine) -> None:
        client = connect(save=lambda: "snapshot-1")

        def got(asked: Any) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = client.do_get(flight.Ticket(json.dumps(asked).encode())).read_all().to_pylist()
            return found

        assert got({"features": {"user_ids": ["alice", "carol"]}}) == engine.features(["alice", "carol"]).to_pylist()
        assert got({"features": {"user_ids": None, "at": "1970-01-01T00:01:01Z"}}) == engine.features(at="1970-01-01T00:01:01Z").to_pylist()
        assert got({"top": 1, "by": "count"}) == engine.top(1, by="count").to_pylist()

        def done(kind: str, body: bytes = b"") -> Any:
            return b"".join(result.body.to_pybytes() for result in client.do_action(flight.Action(kind, body)))

        assert json.loads(done("stats"))["accepted"] == 3
        assert json.loads(done("digest")) == {"0": engine.digest()}
        assert json.loads(done("save")) == {"name": "snapshot-1"}
        assert done("ready") == b""
        assert json.loads(done("explain", b'{"user_id": "alice"}'))["sum"] == "25.0000"
        assert {action.type for action in client.list_actions()} == {"stats", "digest", "save", "ready", "explain"}
        assert [info.descriptor.path for info in client.list_flights()] == [[b"scores"], [b"transactions"]]
        assert client.get_flight_info(flight.FlightDescriptor.for_path("scores")).schema.names == ["user_id", "score"]

    def test_each_batch_is_applied_or_not(self, connect: Callable[..., Any], engine: RiskEngine) -> None:
        client, offline = connect(), engine_of()
        offline.ingest(pa.table({"user_id": ["alice", "bob", "alice"], "amount": [10.0, 3.5, 15.0], "timestamp": [0, 1, 2]}))
        parts = rows("string", 500).to_batches(100)
        told = put(client, *parts)
        assert [each["accepted"] for each in told] == [offline.ingest(part).accepted for part in parts]
        assert engine.digest() == offline.digest()

    def test_a_batch_that_is_refused_ends_the_stream_and_nothing_else(self, connect: Callable[..., Any], engine: RiskEngine) -> None:
        client, before = connect(), engine.digest()
        for wrong, match in [
            (pa.record_batch({"user_id": ["a"]}), "amount"),
            (pa.record_batch({"user_id": [1.5], "amount": [1], "timestamp": [1]}), "double"),
            (pa.record_batch({"user_id": pa.array(["a"]).dictionary_encode(), "amount": [1], "timestamp": [1]}), "dictionary"),
            (pa.record_batch({"user_id": pa.nulls(1), "amount": [1], "timestamp": [1]}), "null"),
            (pa.record_batch({"user_id": ["a"], "amount": [[1]], "timestamp": [1]}), "amount"),
        ]:
            with pytest.raises(flight.FlightServerError, match=match) as error:
                put(client, wrong)
            assert "Traceback" not in str(error.value)
            assert json.loads(error.value.extra_info)["type"] == "SchemaError"
        assert engine.digest() == before
        with pytest.raises(flight.FlightServerError, match="wanted transactions"):
            put(client, rows("string").to_batches()[0], path="scores")

    @pytest.mark.parametrize(
        ("ticket", "match"),
        [
            (b"\xff", "JSON"),
            (b"[]", "object"),
            (b"{}", "ticket"),
            (b"[" * 100_000, "JSON"),
            (b'{"features": 7}', "features"),
            (b'{"features": {"user_ids": "alice"}}', "list"),
            (b'{"features": {"user_ids": [7]}}', "user_ids"),
            (b'{"features": {"at": 7}}', "at=7"),
            (b'{"features": {"At": null}}', "'At'"),
            (b'{"features": {"at": "1950-01-01"}}', "lateness"),
            (b'{"top": -1}', "k=-1"),
            (b'{"top": "x"}', "k='x'"),
            (b'{"top": 3, "by": "name"}', "'name'"),
            (b'{"top": 3, "user": "name"}', "'user'"),
        ],
    )
    def test_tickets_that_make_no_sense(self, connect: Callable[..., Any], ticket: bytes, match: str) -> None:
        with pytest.raises(flight.FlightServerError, match=match) as error:
            connect().do_get(flight.Ticket(ticket)).read_all()
        assert "Traceback" not in str(error.value)

    @pytest.mark.parametrize(
        ("action", "body"), [("nothing", b""), ("save", b""), ("explain", b""), ("explain", b"{}"), ("explain", b'{"user_id": 7}')]
    )
    def test_actions_that_make_no_sense(self, connect: Callable[..., Any], action: str, body: bytes) -> None:
        with pytest.raises(flight.FlightServerError) as error:
            list(connect().do_action(flight.Action(action, body)))
        assert "Traceback" not in str(error.value)

    def test_too_many_streams(self, connect: Callable[..., Any]) -> None:
        client = connect()
        users = pa.record_batch({"user_id": ["alice"]})
        open_ = []
        for _ in range(64):
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("scores"))
            writer.begin(users.schema)
            writer.write_batch(users)
            assert reader.read_chunk().data["score"].to_pylist() == [12.5]
            open_.append((writer, reader))
        with pytest.raises(flight.FlightUnavailableError, match="64 streams"):
            list(client.do_action(flight.Action("stats", b"")))
        for writer, _ in open_:
            writer.close()
        until(lambda: self._answers(client), what="the streams are gone")

    @staticmethod
    def _answers(client: Any) -> bool:
        with contextlib.suppress(flight.FlightUnavailableError):
            return bool(list(client.do_action(flight.Action("stats", b""))))
        return False


def test_tls_by_flight(tmp_path: Any) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    mine, theirs = authority.issue_cert("localhost"), authority.issue_cert("client")
    files = {}
    for name, pem in {
        "ca": authority.cert_pem,
        "cert": mine.cert_chain_pems[0],
        "key": mine.private_key_pem,
        "client": theirs.cert_chain_pems[0],
        "client-key": theirs.private_key_pem,
    }.items():
        files[name] = str(tmp_path / name)
        pem.write_to_path(files[name])
    certificates = Certificates(files["cert"], files["key"], files["ca"])
    server = FlightServer(Service.of(engine_of()), Address("localhost", 0), certificates=certificates)
    url = f"grpc+tls://localhost:{server.address.port}"
    with RiskClient(url, ca=files["ca"], certificate=files["client"], key=files["client-key"]) as client:
        assert client.score("alice") == 0.0
    with RiskClient(url, ca=files["ca"], timeout=3) as client, pytest.raises(ConnectorError):
        client.score("alice")
    server.stop()
