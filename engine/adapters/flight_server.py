"""Arrow Flight over a `Service`: batches in and out, without a copy in between.

    DoPut       transactions               rows; for each batch what became of it, as JSON
    DoExchange  scores                     batches of user ids; each comes back with a column `score`
                transactions               rows; each batch comes back with a column `score`, null where a row was not applied
    DoGet       {"features": {"user_ids": [...], "at": "..."}}   or null for all users; {"top": 10, "by": "score", "at": "..."}
    DoAction    stats save digest explain ready

Each batch of a stream is applied whole or not at all, and acknowledged before the next is read. pyarrow decodes a batch, a compressed one,
too, before anybody can look at it; so whoever is let in can make the process take memory: give the token to those who are trusted so far.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
from pyarrow import flight

from engine.access import Address, Certificates, Token
from engine.answers import explanation_json, ingested_json, stats_json
from engine.errors import CapacityError, ConfigError, ConnectorError, SchemaError, StaleError
from engine.messages import checked_batch, checked_ids
from engine.results import IngestResult
from engine.service import Observer, Service

#: The most rows and bytes of a batch, and streams at a time.
_ROWS_MAX: Final = 1 << 22
_BYTES_MAX: Final = 256 << 20
_STREAMS_MAX: Final = 64
_ASKED_BYTES_MAX: Final = 64 << 20

#: How long streams may go on once the server is to end.
_END_SECONDS: Final = 10

_ACTIONS: Final = (
    ("stats", "what the engine holds and has seen, as JSON"),
    ("save", "write a snapshot, where the server has a folder for them"),
    ("digest", "hash of the state of each partition, as JSON"),
    ("explain", 'the transactions behind a score: {"user_id": ..., "at": ...}'),
    ("ready", "nothing if scores can be trusted; else why not"),
)

#: Names of the error classes, for clients that raise them again.
ERRORS: Final = ("TimeTooOldError", "SchemaError", "ConfigError", "CapacityError", "StaleError", "ConnectorError", "EngineError")


class _Guard(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets those in who show the token."""

    def __init__(self, token: Token | None) -> None:
        self._token = token

    def start_call(self, info: Any, headers: Any) -> None:
        if self._token is None:
            return
        shown = headers.get("authorization", [""])[0]
        if not self._token.matches(shown.encode() if isinstance(shown, str) else shown):
            raise flight.FlightUnauthenticatedError("show the token: authorization: Bearer TOKEN")


def _told(error: Exception) -> Any:
    """An error as Flight has it, with its class for clients; no traceback leaves the process."""
    if isinstance(error, flight.FlightError):
        return error
    name = next((name for name in ERRORS if name in {kind.__name__ for kind in type(error).__mro__}), None)
    if name is None:
        return flight.FlightInternalError(f"unexpected {type(error).__name__}; see the server's log")
    kind = flight.FlightUnavailableError if isinstance(error, CapacityError | StaleError) else flight.FlightServerError
    text = " ".join(str(error).split()).encode(errors="replace").decode()[:2000]
    return kind(text, extra_info=json.dumps({"type": name, "detail": text}).encode())


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Answers Arrow Flight until `stop`.

    Args:
        service: Who answers.
        address: Where it listens; port 0 takes a free one.
        token: What clients must show; None: nothing.
        certificates: For TLS; None: without.
        save: What the action `save` does; None: it is refused.
        observer: Who counts.
        failed: Is told of errors of the server itself.

    Attributes:
        address: Where it listens.

    Raises:
        ConnectorError: The address is taken.
    """

    def __init__(
        self,
        service: Service,
        address: Address,
        token: Token | None = None,
        certificates: Certificates | None = None,
        save: Callable[[], str] | None = None,
        observer: Observer | None = None,
        failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._service, self._save, self._failed = service, save, failed
        self._observer = Observer() if observer is None else observer
        self._streams = threading.Semaphore(_STREAMS_MAX)
        tls: dict[str, Any] = {}
        if certificates is not None:
            tls["tls_certificates"] = [(_read(certificates.certificate), _read(certificates.key))]
            if certificates.clients is not None:
                tls |= {"verify_client": True, "root_certificates": _read(certificates.clients)}
        address.listen("flight").close()  # whose error says what is wrong
        try:
            super().__init__(f"grpc{'+tls' if tls else ''}://{address}", middleware={"token": _Guard(token)}, **tls)
        except (pa.ArrowException, OSError) as error:
            raise ConnectorError(f"--flight {address}: {error}; give another address") from None
        self.address = Address(address.host, self.port)

    def stop(self) -> None:
        """Take no more streams, and finish those that are there."""
        ending = threading.Thread(target=self.shutdown, name="riskring-flight", daemon=True)  # which waits for streams without an end
        ending.start()
        ending.join(_END_SECONDS)
        if ending.is_alive():
            raise ConnectorError("a stream did not end in time; the server ends without it")

    # ---- what is asked -------------------------------------------------------------------------------------------------------

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Apply batches of transactions."""
        with _Stream(self):
            _named(descriptor, "transactions")
            for batch in _batches(reader):
                result = self._ingest(batch, scores=False)
                writer.write(pa.py_buffer(_json(ingested_json(result, False, False))))

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Look up batches of users, or apply batches of transactions, and give each back with its scores."""
        with _Stream(self):
            answer = self._scored if _named(descriptor, "scores", "transactions") == "scores" else self._applied
            begun = False
            for batch in _batches(reader):
                answered, told = answer(batch)
                if not begun:
                    writer.begin(answered.schema)
                    begun = True
                if told is None:
                    writer.write_batch(answered)
                else:
                    writer.write_with_metadata(answered, pa.py_buffer(told))

    def _scored(self, batch: Any) -> tuple[Any, bytes | None]:
        began = time.perf_counter()
        users = checked_ids(batch, self._service.config.user_id)
        scores, _ = self._service.scores(users)
        self._observer.looked_up(time.perf_counter() - began)
        return pa.record_batch([users, scores], names=["user_id", "score"]), None

    def _applied(self, batch: Any) -> tuple[Any, bytes | None]:
        result = self._ingest(batch, scores=True)
        scores = result.scores.combine_chunks() if isinstance(result.scores, pa.ChunkedArray) else result.scores
        return pa.record_batch([scores], names=["score"]), _json(ingested_json(result, False, False))

    def _ingest(self, batch: Any, scores: bool) -> IngestResult:
        began = time.perf_counter()
        result = self._service.ingest(checked_batch(batch, self._service.config), scores=scores)
        self._observer.ingested(time.perf_counter() - began)
        return result

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Features of users, or the greatest of them."""
        with _Stream(self):
            asked = _asked(ticket.ticket)
            if "features" in asked:
                _only(asked, "features")
                of = asked["features"]
                if not isinstance(of, dict):
                    raise SchemaError('features must be an object such as {"user_ids": ["alice"], "at": null}')
                _only(of, "user_ids", "at")
                users = of.get("user_ids")
                if not isinstance(users, list | None):
                    raise SchemaError("user_ids must be a list, or null for all users")
                table, _ = self._service.features(None if users is None else self._service.users_of(users), _at(of))
            elif "top" in asked:
                _only(asked, "top", "by", "at")
                table, _ = self._service.top(asked["top"], asked.get("by", "score"), _at(asked))
            else:
                raise SchemaError('a ticket is {"features": {...}} or {"top": 10}')
            return flight.RecordBatchStream(table)

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
        """See `list_actions`."""
        with _Stream(self):
            kind = action.type
            body = b"" if action.body is None else action.body.to_pybytes()
            if kind == "stats":
                return iter([_json(stats_json(self._service.stats(), self._service))])
            if kind == "digest":
                return iter([_json({str(number): digest for number, digest in self._service.digests().items()})])
            if kind == "ready":
                return iter([(self._service.ready() or "").encode()])
            if kind == "explain":
                asked = _asked(body)
                _only(asked, "user_id", "at")
                if "user_id" not in asked:
                    raise SchemaError('explain wants {"user_id": ..., "at": null}')
                return iter([_json(explanation_json(*self._service.explain(asked["user_id"], _at(asked))))])
            if kind == "save":
                if self._save is None:
                    raise ConfigError("this server has no folder for snapshots; start it with --state")
                return iter([_json({"name": self._save()})])
            raise SchemaError(f"there is no action {kind[:40]!r}; list_actions shows which there are")

    def list_actions(self, context: Any) -> Any:
        """What `do_action` can do."""
        return list(_ACTIONS)

    def list_flights(self, context: Any, criteria: Any) -> Iterator[Any]:
        """The streams that there are."""
        for name in ("scores", "transactions"):
            yield self._info(flight.FlightDescriptor.for_path(name))

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        """The schema of a stream."""
        with _Stream(self):
            _named(descriptor, "scores", "transactions")
            return self._info(descriptor)

    def _info(self, descriptor: Any) -> Any:
        kinds = {"int64": pa.int64(), "uint64": pa.uint64(), "binary": pa.binary()}
        user = pa.field("user_id", kinds.get(self._service.kind() or "", pa.string()))
        config = self._service.config
        schema = pa.schema([user, ("score", pa.float64())])
        if descriptor.path == [b"transactions"]:
            schema = pa.schema(
                [user.with_name(config.user_id), (config.amount, pa.float64()), (config.timestamp, pa.timestamp("ns", "UTC"))]
            )
        return flight.FlightInfo(schema, descriptor, [], -1, -1)


class _Stream:
    """One call, of which there are not too many; its errors are told as Flight has them."""

    def __init__(self, server: FlightServer) -> None:
        self._server = server

    def __enter__(self) -> None:
        if not self._server._streams.acquire(blocking=False):
            raise _told(StaleError(f"{_STREAMS_MAX} streams are open already; close one, or wait"))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._server._streams.release()
        if isinstance(error, Exception):
            told = _told(error)
            if isinstance(told, flight.FlightInternalError):
                self._server._failed(f"flight: {type(error).__name__}: {error}")
            raise told from None


def _batches(reader: Any) -> Iterator[Any]:
    """Batches of a stream from anywhere."""
    while True:
        try:
            batch = reader.read_chunk().data
        except StopIteration:
            return
        except MemoryError as error:  # it may be told a false length, or there may be too little: the sender's rows need not be at fault
            raise CapacityError(f"there is no memory for the next batch of the stream: {error}; send smaller ones, or try again") from None
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowSerializationError, OSError, UnicodeError) as error:
            raise SchemaError(f"the stream cannot be read: {error}") from None
        if batch is None:
            continue
        size = batch.get_total_buffer_size()  # not `nbytes`, which follows offsets that nobody has looked at yet, to wherever they point
        if batch.num_rows > _ROWS_MAX or size > _BYTES_MAX:
            raise SchemaError(
                f"a batch of {batch.num_rows:,} rows and {size:,} bytes; send {_ROWS_MAX:,} rows and {_BYTES_MAX:,} bytes at most"
            )
        yield batch


def _named(descriptor: Any, *names: str) -> str:
    path: list[str] = [part.decode(errors="replace") for part in descriptor.path or []]
    if len(path) != 1 or path[0] not in names:
        raise SchemaError(f"the descriptor's path is {path[:3]!r}; wanted {' or '.join(names)}")
    return path[0]


def _asked(data: bytes) -> dict[str, Any]:
    if len(data) > _ASKED_BYTES_MAX:
        raise SchemaError(f"{len(data):,} bytes; send {_ASKED_BYTES_MAX:,} at most")
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):
        raise SchemaError("this is no JSON in UTF-8") from None
    if not isinstance(asked, dict):
        raise SchemaError("this is no JSON object")
    return asked


def _only(asked: dict[str, Any], *names: str) -> None:
    for name in asked:
        if name not in names:
            raise SchemaError(f"there is a member {name[:40]!r}; known here: {', '.join(names)}")


def _at(asked: dict[str, Any]) -> str | None:
    at = asked.get("at")
    if not isinstance(at, str | None):
        raise ConfigError(f"at={str(at)[:40]} is no instant; write it as in '2026-01-31T12:00:00Z', or null for now")
    return at


def _json(answer: Any) -> bytes:
    return json.dumps(answer).encode()


def _read(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()
