"""The command `serve`: an engine that others ask, and feed, over HTTP and Arrow Flight; and the flags of servers, which a node has, too."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from engine.access import Address, Certificates, Token
from engine.errors import ConfigError, EngineError, StaleError
from engine.flags import Parser, add_engine_flags, command, engine_options, extra, optional, seconds

if TYPE_CHECKING:
    from engine.engine import RiskEngine
    from engine.service import Service

Log = Callable[..., None]

#: Position of a server's snapshots, which tells them from those of runs and nodes.
_POSITION: Final = {"source": "server"}


def add_server_flags(parser: Parser, http: str | None, flight: str | None) -> None:
    """Add where to listen, and who may ask."""
    group = parser.add_argument_group("server")
    parser.flag("--http", group=group, default=http, shown=http or "none", metavar="HOST:PORT", help="for HTTP, or none")
    parser.flag("--flight", group=group, default=flight, shown=flight or "none", metavar="HOST:PORT", help="for Arrow Flight, or none")
    parser.flag(
        "--token-file", group=group, metavar="FILE", help="clients must show what stands there; or in RISKRING_TOKEN. SIGHUP: read again"
    )
    parser.flag("--insecure", group=group, action="store_true", default=False, help="listen beyond this machine without a token")
    parser.flag("--tls-cert", group=group, metavar="FILE", help="certificate in PEM, for TLS")
    parser.flag("--tls-key", group=group, metavar="FILE", help="its key")
    parser.flag("--tls-client-ca", group=group, metavar="FILE", help="clients must show a certificate of these authorities")


class Servers:
    """The servers that flags ask for.

    Args:
        args: The flags of `add_server_flags`.
        environment: Variables of the process.
        log: A line for whoever runs it.

    Raises:
        ConfigError: What they ask for cannot be had, or is not safe.
    """

    def __init__(self, args: argparse.Namespace, environment: Any, log: Log) -> None:
        self._log = log
        self._http, self._flight = (
            None if text is None or optional(text) is None else Address.of(text, flag)
            for text, flag in ((args.http, "http"), (args.flight, "flight"))
        )
        text = environment.get("RISKRING_TOKEN")
        self.token = Token(file=args.token_file) if args.token_file else Token(text) if text else None
        if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_client_ca and not args.tls_cert):
            raise ConfigError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")
        self.certificates = Certificates(args.tls_cert, args.tls_key, args.tls_client_ca) if args.tls_cert else None
        for flag, address in (("http", self._http), ("flight", self._flight)):
            if address is not None and not address.is_loopback and self.token is None and not args.insecure:
                raise ConfigError(
                    f"--{flag} {address} can be reached from outside, where everybody could ask; give --token-file (or RISKRING_TOKEN), or "
                    "--insecure"
                )
        self._open: list[Any] = []

    @property
    def wanted(self) -> bool:
        """Whether there is one."""
        return self._http is not None or self._flight is not None

    def start(self, service: Service, meters: Any, events: Callable[[], bytes] | None, save: Callable[[], str] | None = None) -> None:
        """Answer from now on.

        Args:
            service: Who answers.
            meters: Who counts.
            events: What watchers are told each second.
            save: What a client's wish for a snapshot does.

        Raises:
            ConnectorError: An address is taken.
            EngineError: An extra is not installed.
        """
        if self._http is not None:
            with extra("serve"):
                from engine.adapters.http_listener import HttpServer  # noqa: PLC0415 - an extra
                from engine.adapters.http_server import Served, page  # noqa: PLC0415 - an extra
            own = frozenset({"localhost", "127.0.0.1", "[::1]", self._http.host.lower()})
            served = Served(
                service,
                token=self.token,
                page=page(),
                events=events,
                observer=meters,
                failed=lambda text: self._log("error", "http", error=text),
                hosts=own if self.token is None and self._http.is_loopback else None,
            )
            server = HttpServer(served, self._http, self.certificates)
            self._open.append(server)
            self._log("info", "listening", http=f"http{'s' if self.certificates else ''}://{server.address}")
        if self._flight is not None:
            from engine.adapters.flight_server import FlightServer  # noqa: PLC0415 - start-up

            flight = FlightServer(
                service,
                self._flight,
                self.token,
                self.certificates,
                save,
                meters,
                failed=lambda text: self._log("error", "flight", error=text),
            )
            self._open.append(flight)
            self._log("info", "listening", flight=f"grpc{'+tls' if self.certificates else ''}://{flight.address}")

    def read_token_again(self) -> None:
        """Take the file's token from now on."""
        if self.token is None:
            return
        try:
            self.token.read_again()
            self._log("info", "token read again")
        except ConfigError as error:
            self._log("error", "token not read again, the one so far stays", error=str(error))

    def stop(self) -> None:
        """Take no more requests, and finish those that are there."""
        for server in self._open:
            try:
                server.stop()
            except EngineError as error:
                self._log("warning", "stop", error=str(error))


# ---- serve -----------------------------------------------------------------------------------------------------------------------


def add_serve(commands: Any) -> None:
    """Add `riskring serve`."""
    parser = command(
        commands,
        "serve",
        _serve,
        "keep an engine that others ask and feed over HTTP and Arrow Flight, with a live page",
        "Without a token it listens on this machine only. SIGTERM ends it, with a snapshot if there is --state.",
        "riskring serve --demo   # then open http://127.0.0.1:8080",
        "riskring serve --state state --token-file token --http :8443 --tls-cert cert.pem --tls-key key.pem",
        "curl localhost:8080/v1/transactions -H 'Content-Type: application/x-ndjson' --data-binary @rows.ndjson",
    )
    add_server_flags(parser, "127.0.0.1:8080", "127.0.0.1:8815")
    group = parser.add_argument_group("engine of the server")
    parser.flag("--state", group=group, metavar="DIR", help="folder or URI of snapshots: go on from the newest, and save there")
    parser.flag("--snapshot-every", group=group, default="30s", metavar="DURATION", help="how often it is saved")
    parser.flag("--demo", group=group, action="store_true", default=False, help="feed it a stream that is made up")
    parser.flag("--log", group=group, choices=("logfmt", "json"), default="logfmt", help="form of the log, on standard error")
    add_engine_flags(parser, clock="wall", time_unit="ms")


def _serve(args: argparse.Namespace) -> int:
    every = seconds(args.snapshot_every, "snapshot-every")
    options = {"clock": "wall", "time_unit": "ms"} | engine_options(args)
    with extra("serve"):
        from engine.adapters.logs import logger  # noqa: PLC0415 - an extra
        from engine.adapters.metrics import Meters  # noqa: PLC0415 - an extra
    log = logger(args.log == "json")
    servers = Servers(args, os.environ, log)
    if not servers.wanted:
        raise ConfigError("--http none and --flight none leave nothing to serve; give one an address")
    from engine.measurements import resident_bytes  # noqa: PLC0415 - start-up
    from engine.pulse import Pulse  # noqa: PLC0415 - compiles kernels
    from engine.service import Service  # noqa: PLC0415 - compiles kernels

    with contextlib.ExitStack() as stack:
        kept = Kept(args.state, options, log)
        stack.enter_context(kept.locked())
        ending = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.set())
        signal.signal(signal.SIGHUP, lambda *_: servers.read_token_again())
        meters = Meters()
        service = Service(kept.config, kept.engines, time.time_ns, why_not=kept.why_not, writable=True)
        meters.show_lookups(service)
        meters.show_engine(service, lambda: kept.saved_at)
        pulse = Pulse(service, time.time_ns, time.monotonic, resident_bytes, lambda: kept.saved_at)
        servers.start(service, meters, pulse.text, kept.save if args.state else None)
        stack.callback(servers.stop)
        failed = kept.start(service, ending, every, meters.saved)
        if args.demo:
            threading.Thread(target=_demonstrate, args=(service, ending, log), name="riskring-demo", daemon=True).start()
        ending.wait()
        log("info", "ending")
        servers.stop()
        stack.pop_all()
        if failed:
            raise failed[0]
        kept.stop()
    log("info", "ended")
    return 0


def _demonstrate(service: Service, ending: threading.Event, log: Log) -> None:
    """Feed a made-up stream, once the engine is there."""
    from engine.demo import feed  # noqa: PLC0415 - start-up

    while service.ready() is not None:
        if ending.wait(0.1):
            return
    try:
        feed(service.ingest, service.config, service.kind(), time.time_ns, ending.wait)
    except EngineError as error:
        if not ending.is_set():
            log("error", "the demonstration ends", error=str(error))


class Kept:
    """The engine of a server, which is loaded and saved beside the requests.

    Args:
        state: Folder or URI of snapshots; None: there are none.
        options: Of the engine, those that were given.
        log: A line for whoever runs it.

    Attributes:
        config: Of the engine; of a loaded one once that is there.
        saved_at: When the last snapshot was written, by `time.monotonic`.
    """

    def __init__(self, state: str | None, options: dict[str, Any], log: Log) -> None:
        from engine.config import Config  # noqa: PLC0415 - start-up

        self.config = Config.of(**options)
        self.saved_at: float | None = None
        self._state, self._options, self._log = state, options, log
        self._engine: RiskEngine | None = None
        self._saved_rows = -1
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """No other server may use a folder of this machine's disks; of object stores nobody can tell."""
        from engine.storage import locked  # noqa: PLC0415 - start-up

        return contextlib.nullcontext() if self._state is None or "://" in self._state else locked(self._state)

    def engines(self) -> dict[int, RiskEngine]:
        """The engine, as a `Service` wants it.

        Raises:
            StaleError: It is not there yet.
        """
        if self._engine is None:
            raise StaleError(f"{self.why_not()}; try again in a second")
        return {0: self._engine}

    def why_not(self) -> str | None:
        """Why scores are not to be had yet."""
        return None if self._engine is not None else "the snapshot is being loaded"

    def start(self, service: Service, ending: threading.Event, every: float, saved: Callable[[float], None]) -> list[BaseException]:
        """Load the engine, and save it now and then, in a thread; what it fails with is put into the list, and all ends."""
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self._load(service)
                while not self._ending.wait(every):
                    self._save(saved)
            except BaseException as error:
                failed.append(error)
                ending.set()

        self._thread = threading.Thread(target=run, name="riskring-state", daemon=True)
        self._thread.start()
        return failed

    def _load(self, service: Service) -> None:
        from engine.engine import RiskEngine  # noqa: PLC0415 - compiles kernels
        from engine.snapshot import snapshots  # noqa: PLC0415 - start-up

        began = time.monotonic()
        if self._state is not None and snapshots(self._state)[1]:
            engine = RiskEngine.load(self._state, accept=_refused, **self._options)
            assert engine.restored is not None
            told: dict[str, Any] = {"users": len(engine), "passed_over": list(engine.restored.passed_over) or None}
            self.saved_at, self._saved_rows = began, engine.stats().rows
        else:
            engine, told = RiskEngine(**self._options), {}
        service.config = self.config = engine.config
        self._engine = engine
        self._log("info", "ready", state=self._state, digest=engine.digest(), seconds=round(time.monotonic() - began, 3), **told)

    def _save(self, saved: Callable[[float], None]) -> None:
        """Save what is new. A failure is told, and the next time it is tried again."""
        if self._state is None or self._engine is None:
            return
        rows = self._engine.stats().rows
        if rows == self._saved_rows:
            self.saved_at = time.monotonic()  # there is nothing to add
            return
        began = time.monotonic()
        try:
            self._engine.save(self._state, position=_POSITION)
        except EngineError as error:
            self._log("error", "snapshot failed", state=self._state, error=str(error))
            return
        self._saved_rows, self.saved_at = rows, time.monotonic()
        saved(time.monotonic() - began)

    def save(self) -> str:
        """Save now, and say under which name."""
        return self.engines()[0].save(self._state, position=_POSITION).name

    def stop(self) -> None:
        """Save for the last time, when nobody asks any more."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if self._engine is None:
            return
        if self._state is not None and self._engine.stats().rows != self._saved_rows:
            self._engine.save(self._state, position=_POSITION)
        self._log("info", "saved" if self._state is not None else "not saved: there is no --state", digest=self._engine.digest())
        self._engine.close()


def _refused(position: Any) -> str | None:
    """Why a server cannot go on from a snapshot with this position."""
    if position is None or position == _POSITION:
        return None
    return "is the state of a run over files or of a node, which would not find their place any more; give another folder"
