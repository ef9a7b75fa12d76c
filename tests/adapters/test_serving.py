"""`riskring serve` as a process: what it keeps, who may ask, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")

import urllib3

from engine import RiskEngine, SnapshotError
from tests.adapters.processes import LOOPBACK, Port, Process, until


class ServerProcess(Process):
    """A server, what it logs, and a client of it."""

    def __init__(
        self, folder: Path, *flags: str, port: int = 0, http: str | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.port = port
        http = f"{LOOPBACK}:{port}" if http is None else http
        command = [
            sys.executable,
            "-m",
            "engine.cli",
            "serve",
            "--http",
            http,
            "--flight",
            "none",
            "--users",
            "10k",
            "--log",
            "json",
            *flags,
        ]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKRING_")}
        super().__init__(command, folder / "server.log", kept | (environment or {}))
        self.pool = urllib3.PoolManager(retries=False, timeout=30)

    def events(self, event: str) -> list[dict[str, Any]]:
        return [told for line in self.printed().splitlines() if line.startswith("{") and (told := json.loads(line))["event"] == event]

    def ready(self) -> dict[str, Any]:
        """Wait until it is; what it said then."""
        self.wait_ready('"ready"')
        self.url = next(told["http"] for told in self.events("listening") if "http" in told)
        return self.events("ready")[-1]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Any:
        method = "GET" if body is None else "POST"
        found = self.pool.request(method, self.url + path, body=body, headers={"content-type": "application/json", **headers})
        return {**json.loads(found.data), "http": found.status}

    def add(self, user: str, amount: float) -> None:
        row = {"user_id": user, "amount": amount, "timestamp": time.time_ns() // 1_000_000}
        assert self.ask("/v1/transactions", json.dumps(row).encode())["accepted"] == 1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []
    ports: list[Port] = []

    def make(*flags: str, ready: bool = True, **named: Any) -> ServerProcess:
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        if "port" not in named:
            ports.append(Port())
            named["port"] = ports[-1].number
        started.append(ServerProcess(folder, *flags, **named))
        started[-1].launch()
        if ready:
            started[-1].ready()
        return started[-1]

    yield make
    for each in started:
        each.kill()
    for port in ports:
        port.close()


class TestState:
    def test_it_saves_when_it_is_ended_and_goes_on_from_there(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        state = str(tmp_path / "state")
        server = start("--state", state, "--window", "1h")
        server.add("alice", 2.5)
        server.add("alice", 7.5)
        assert server.stop() == 0
        saved = server.events("saved")[0]["digest"]
        with RiskEngine.load(state) as engine:
            assert engine.digest() == saved
        server.launch()
        assert server.ready()["digest"] == saved
        assert server.ask("/v1/scores/alice")["score"] == 5.0
        assert server.ask("/v1/stats")["accepted"] == 2
        assert server.stop() == 0
        assert server.events("saved")[0]["digest"] == saved

    def test_it_saves_now_and_then(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        state = str(tmp_path / "state")
        server = start("--state", state, "--window", "1h", "--snapshot-every", "100ms")
        server.add("alice", 2.5)

        def saved() -> bool:
            try:
                with RiskEngine.load(state) as engine:
                    return engine.score("alice") == 2.5
            except SnapshotError:
                return False

        until(saved, what="the row is in a snapshot")
        server.kill()
        server.launch()
        server.ready()
        assert server.ask("/v1/scores/alice")["score"] == 2.5

    def test_two_servers_with_one_state(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        state = str(tmp_path / "state")
        start("--state", state)
        second = start("--state", state, ready=False)
        assert second.wait() == 1
        assert "another process uses this folder" in second.printed()

    @pytest.mark.parametrize(
        ("position", "flags", "status", "named"),
        [
            ({"offset": 7}, (), 4, "run over files or of a node"),
            (None, ("--window", "5m"), 2, "window"),
        ],
    )
    def test_states_that_are_not_its_own(
        self, start: Callable[..., ServerProcess], tmp_path: Path, position: Any, flags: tuple[str, ...], status: int, named: str
    ) -> None:
        state = str(tmp_path / "state")
        with RiskEngine(users=10) as engine:
            engine.save(state, position=position)
        server = start("--state", state, *flags, ready=False)
        assert server.wait() == status
        assert named in server.printed() and "Traceback" not in server.printed()

    def test_a_state_of_a_program_is_taken(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        state = str(tmp_path / "state")
        with RiskEngine("1h", users=10) as engine:
            engine.add("alice", 2.5, np.datetime64(time.time_ns(), "ns"))
            engine.save(state)
        assert start("--state", state).ask("/v1/scores/alice")["score"] == 2.5


def test_a_stream_without_an_end_does_not_hold_it_up(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Whoever keeps a stream open is cut off, after what was sent is saved."""
    flight = pytest.importorskip("pyarrow.flight")
    state = str(tmp_path / "state")
    server = start("--state", state, "--flight", f"{LOOPBACK}:0")
    url = next(told["flight"] for told in server.events("listening") if "flight" in told)
    row = pa.record_batch({"user_id": ["alice"], "amount": [2.5], "timestamp": [time.time_ns() // 1_000_000]})
    with flight.connect(url) as client:
        writer, reader = client.do_put(flight.FlightDescriptor.for_path("transactions"), row.schema)
        writer.write_batch(row)
        assert json.loads(reader.read().to_pybytes())["accepted"] == 1
        began = time.monotonic()
        assert server.stop(seconds=30) == 0
        assert time.monotonic() - began < 20
    with RiskEngine.load(state) as engine:
        assert engine.digest() == server.events("saved")[0]["digest"] and engine.stats().accepted == 1


class TestAccess:
    def test_beyond_this_machine_there_must_be_a_token(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        refused = start(ready=False, http=":0")
        assert refused.wait() == 2
        assert "--token-file" in refused.printed()
        assert start("--insecure", http=":0").stop() == 0
        assert start(http="0.0.0.0:0", environment={"RISKRING_TOKEN": "s3cret"}).stop() == 0

    def test_a_token_is_read_again(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        file = tmp_path / "token"
        file.write_text("first-s3cret\n")
        server = start("--token-file", str(file))

        def status(token: str) -> int:
            found: int = server.ask("/v1/stats", authorization=f"Bearer {token}")["http"]
            return found

        assert (status("first-s3cret"), status("second-s3cret"), server.ask("/readyz")["http"]) == (200, 401, 200)
        file.write_text("second-s3cret\n")
        server.signal(signal.SIGHUP)
        until(lambda: server.events("token read again"), what="it is read")
        assert (status("first-s3cret"), status("second-s3cret")) == (401, 200)
        file.write_text("")
        server.signal(signal.SIGHUP)
        until(lambda: server.events("token not read again, the one so far stays"), what="it is refused")
        assert status("second-s3cret") == 200
        shown = Path(f"/proc/{server.pid}/cmdline").read_text() if Path("/proc").exists() else ""
        server.stop()
        assert "s3cret" not in server.printed() + shown

    def test_tls_and_certificates_of_clients(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        trustme = pytest.importorskip("trustme")
        authority, other = trustme.CA(), trustme.CA()
        mine, theirs, strangers = (each.issue_cert(LOOPBACK) for each in (authority, authority, other))
        for name, pem in (("ca", authority.cert_pem), ("cert", mine.cert_chain_pems[0]), ("key", mine.private_key_pem)):
            pem.write_to_path(tmp_path / name)
        flags = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
        server = start(*flags, "--tls-client-ca", str(tmp_path / "ca"))
        assert server.url.startswith("https://")
        for certificate, taken in ((theirs, True), (strangers, False), (None, False)):
            context = ssl.create_default_context()
            authority.configure_trust(context)
            if certificate is not None:
                certificate.configure_cert(context)
            server.pool = urllib3.PoolManager(retries=False, timeout=30, ssl_context=context)
            if taken:
                assert server.ask("/v1/scores/alice")["score"] == 0.0
            else:
                with pytest.raises(urllib3.exceptions.HTTPError):
                    server.ask("/v1/scores/alice")
        assert server.stop() == 0
        for wrong in (flags[:2], flags[2:], ("--tls-client-ca", str(tmp_path / "ca")), (*flags[:2], "--tls-key", str(tmp_path / "ca"))):
            refused = start(*wrong, ready=False)
            assert refused.wait() == 2
            assert "--tls-" in refused.printed() and "Traceback" not in refused.printed()

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--http", "nowhere"), "HOST:PORT"),
            (("--http", "127.0.0.1:99999"), "HOST:PORT"),
            (("--http", "none"), "nothing to serve"),
            (("--token-file", "/no/such/token"), "No such file"),
            (("--snapshot-every", "0s"), "more than 0"),
        ],
    )
    def test_flags_that_make_no_sense(self, start: Callable[..., ServerProcess], flags: tuple[str, ...], named: str) -> None:
        server = start(*flags, ready=False)
        assert server.wait() == 2
        assert named in server.printed() and "Traceback" not in server.printed()

    def test_an_address_that_is_taken(self, start: Callable[..., ServerProcess]) -> None:
        first = start()
        second = start(ready=False, port=first.port)
        assert second.wait() == 1
        assert "Address already in use" in second.printed()
