"""An ASGI application on a socket, by uvicorn, in a thread of its own: so that whoever starts it keeps the signals.

uvicorn has no limit for the head of a request, neither of bytes nor of time, nor for clients that do not take their answers; these are
added here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.access import Address, Certificates
from engine.adapters.http_server import Gate, Limits, Served
from engine.errors import ConnectorError

#: How long requests may go on once the server is to end.
_END_SECONDS: Final = 10


class HttpServer:
    """Answers HTTP until `stop`.

    Args:
        served: What it is made of.
        address: Where it listens; port 0 takes a free one.
        certificates: For TLS; None: without.

    Attributes:
        address: Where it listens.

    Raises:
        ConnectorError: The address is taken.
    """

    def __init__(self, served: Served, address: Address, certificates: Certificates | None = None) -> None:
        self._gate = Gate(served)
        self._socket = address.listen("http")
        self.address = Address(address.host, self._socket.getsockname()[1])
        tls: dict[str, Any] = {}
        if certificates is not None:
            tls = {"ssl_certfile": certificates.certificate, "ssl_keyfile": certificates.key, "ssl_ca_certs": certificates.clients}
            tls["ssl_cert_reqs"] = 2 if certificates.clients else 0  # a client's certificate is demanded, or not asked for
        config = uvicorn.Config(
            self._gate,
            http=_protocol(served.limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=served.limits.connections,
            timeout_keep_alive=int(served.limits.head_seconds),
            timeout_graceful_shutdown=_END_SECONDS,
            **tls,
        )
        logger = logging.getLogger("uvicorn.error")
        logger.handlers[:] = [_Told(served.failed)]
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="riskring-http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._server.run([self._socket])

    def stop(self) -> None:
        """Take no more requests, finish those that are there, and end."""
        self._gate.answers.ending.set()
        self._server.should_exit = True
        self._thread.join(_END_SECONDS + 5)
        self._gate.answers.close()
        self._socket.close()
        if self._thread.is_alive():
            raise ConnectorError("a request did not end in time; the server ends without it")


class _Told(logging.Handler):
    """Hands on what uvicorn says."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._tell(record.getMessage() if error is None else f"{record.getMessage().strip()}: {type(error).__name__}")


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with limits for the head of a request."""

    class Protocol(HttpToolsProtocol):
        """One connection."""

        _head: asyncio.TimerHandle | None = None  # while the head of a request is awaited
        _head_bytes = 0
        _stuck: asyncio.TimerHandle | None = None  # while the client takes nothing

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            self._goes_on()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            self._stuck = self.loop.call_later(limits.seconds, self.transport.abort)
            super().pause_writing()

        def resume_writing(self) -> None:
            self._goes_on()
            super().resume_writing()

        def _goes_on(self) -> None:
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None

        def _await_head(self) -> None:
            self._head_bytes = 0
            if self._head is None:
                self._head = self.loop.call_later(limits.head_seconds, self._too_slow)

        def _head_is_there(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _too_slow(self) -> None:
            self._head = None
            if not self.transport.is_closing():
                self.send_400_response(f"The head of a request must be there within {limits.head_seconds:g} s.")

        def data_received(self, data: bytes) -> None:
            if self._head is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head is not None and self._head_bytes > limits.head_bytes and not self.transport.is_closing():
                self.send_400_response(f"The head of a request must be shorter than {limits.head_bytes} bytes.")

        def on_message_begin(self) -> None:
            self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

    return Protocol
