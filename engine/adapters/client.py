"""A client of `riskring serve` and of nodes that answer: the same calls over HTTP and Arrow Flight, with the engine's own errors.

What only asks is tried again when the server cannot be reached or says "not now": by urllib3 over HTTP, by tenacity over Flight.
Transactions are sent once, for nobody can tell whether those of a lost answer were applied; ConnectorError says so.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import tenacity
import urllib3
from pyarrow import flight

from engine import errors
from engine.access import Token
from engine.errors import ConfigError, ConnectorError, EngineError
from engine.instants import instant_ns, instant_text
from engine.messages import encode_arrow
from engine.userids import id_array

_ARROW: Final = "application/vnd.apache.arrow.stream"

#: How often what only asks is tried, and what is waited before the second time; later ones wait twice as long each.
_TRIES: Final = 4
_WAIT_SECONDS: Final = 0.2

#: Rows of a batch of transactions that is sent by Flight.
_BATCH_ROWS: Final = 1 << 16

T = TypeVar("T")


class RiskClient:
    """Asks a server, and sends it transactions.

    Args:
        url: `http://`, `https://`, `grpc://` or `grpc+tls://`, host and port.
        token: What the server wants to be shown.
        timeout: How long to wait for an answer, in seconds.
        ca: File of the authorities whose certificates are trusted, in PEM; default: the system's.
        certificate, key: Files of this client's certificate and key, in PEM, where the server demands one.

    Raises:
        ConfigError: The URL is none of these, or has a password in it; or a file cannot be used.

    Thread-safe. Every call raises the engine's errors, and ConnectorError if the server cannot be reached, refuses the token, or does not
    answer.

    Example:
        >>> from engine import RiskEngine
        >>> from engine.access import Address
        >>> from engine.adapters.flight_server import FlightServer
        >>> from engine.service import Service
        >>> server = FlightServer(Service.of(RiskEngine(users=100)), Address("127.0.0.1", 0))
        >>> with RiskClient(f"grpc://{server.address}") as client:
        ...     rows = pa.table({"user_id": ["alice"], "amount": [2.5], "timestamp": np.array(["2026-01-01"], "datetime64[s]")})
        ...     client.ingest(rows)["accepted"], client.score("alice"), client.scores(["alice", "bob"])
        (1, 2.5, array([2.5, 0. ]))
        >>> server.stop()
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
    ) -> None:
        scheme = _scheme(url)
        _check_files(ca, certificate, key)
        if token is not None:
            Token(token)  # whose error says what is wrong
        by = _Http if scheme.startswith("http") else _Flight
        self.url = url
        self._by: _Http | _Flight = by(url.rstrip("/"), token, timeout, ca, certificate, key)

    def score(self, user_id: Any, *, at: Any = None) -> float:
        """A user's score, at an instant or now. As `RiskEngine.score`."""
        return float(self.scores([user_id], at=at)[0])

    def scores(self, user_ids: Any, *, at: Any = None) -> Any:
        """Scores of many users. As `RiskEngine.scores`: lists and NumPy arrays give a NumPy array, Arrow arrays one of Arrow.

        `at` takes a request over HTTP in JSON, or by Flight one that gives all features: both some ten times slower than without.
        """
        array, is_arrow = id_array(user_ids)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        found = self._by.scores(_plain(array), _instant(at))
        return found if is_arrow else found.to_numpy(zero_copy_only=False)

    def ingest(self, data: Any, *, scores: bool = False) -> dict[str, Any]:
        """Apply transactions: a table, a record batch, or what exports one.

        Returns:
            `rows`, `accepted`, `rejected` by reason, `rounded`; and with `scores` those of the rows, a DoubleArray, null where not applied.

        Raises:
            ConnectorError: It is not known how much of it was applied. Over HTTP all of it or nothing; by Flight batch by batch.
            EngineError: Rows are refused. By Flight those of earlier batches were applied; then the error says how many.
        """
        table = pa.table(data) if not isinstance(data, pa.RecordBatch) else pa.Table.from_batches([data])
        columns = [pa.chunked_array([_plain(chunk) for chunk in column.chunks or [pa.nulls(0, column.type)]]) for column in table.columns]
        table = pa.table(columns, names=table.column_names)
        return self._by.ingest(table, scores)

    def explain(self, user_id: Any, *, at: Any = None) -> dict[str, Any]:
        """A user's score with the transactions behind it; amounts and instants are texts, exactly."""
        return self._by.explain(user_id, _instant(at))

    def close(self) -> None:
        """Close the connections."""
        self._by.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RiskClient({self.url!r})"


def _scheme(url: str) -> str:
    """That of a URL which can be shown and asked."""
    if "@" in url:  # such a text may have a password in it, and is not shown
        raise ConfigError("url has an @ in it; leave out user and password, and give the server's token as token=...")
    scheme = url.partition("://")[0]
    if scheme not in ("http", "https", "grpc", "grpc+tls"):
        raise ConfigError(f"url={url!r} must begin with http://, https://, grpc:// or grpc+tls://")
    try:
        parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
        parts = urllib3.util.Url()
    if not parts.host or (scheme.startswith("grpc") and parts.port is None):
        raise ConfigError(f"url={url!r} must be {scheme}://HOST:PORT")
    return scheme


def _check_files(ca: str | None, certificate: str | None, key: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        given = f"ca={ca!r}, certificate={certificate!r}, key={key!r}"
        raise ConfigError(f"{given}: no files of certificates and of a key that fit, in PEM: {error}") from None


def _plain(array: Any) -> Any:
    """Of a plain type, as servers demand it: no dictionary, no view."""
    if pa.types.is_dictionary(array.type):
        return _plain(array.dictionary).take(array.indices)
    name = str(array.type)
    return array.cast("large_" + name.removesuffix("_view")) if name.endswith("_view") else array


def _instant(at: Any) -> str | None:
    if at is None or (isinstance(at, str) and at == "now"):
        return None if at is None else "now"
    return instant_text(instant_ns(at, "at", time_unit=None, error=ConfigError))


def _raised(name: str, text: str) -> EngineError:
    """The engine's error of that name."""
    kind = getattr(errors, name, None)
    return kind(text) if isinstance(kind, type) and issubclass(kind, EngineError) else ConnectorError(text)


class _Http:
    """Over HTTP."""

    #: Classes of errors, by the last part of a problem's type.
    KINDS: Final = {
        "time-too-old": "TimeTooOldError",
        "schema": "SchemaError",
        "config": "ConfigError",
        "capacity": "CapacityError",
        "stale": "StaleError",
        "body": "SchemaError",
        "too-large": "ConfigError",
    }

    def __init__(self, url: str, token: str | None, timeout: float, ca: str | None, certificate: str | None, key: str | None) -> None:
        self._url = url
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._again = urllib3.Retry(
            _TRIES - 1,
            redirect=False,
            allowed_methods=None,  # of those calls that only ask
            status_forcelist=[503],
            backoff_factor=_WAIT_SECONDS,
            respect_retry_after_header=False,
            raise_on_status=False,
        )
        self._pool = urllib3.PoolManager(timeout=timeout, maxsize=8, ca_certs=ca, cert_file=certificate, key_file=key)

    def _request(self, method: str, path: str, body: bytes | None = None, again: bool = True, **headers: str) -> Any:
        named = self._headers | {name.replace("_", "-"): value for name, value in headers.items()}
        retries: Any = self._again if again else False
        try:
            found = self._pool.request(method, self._url + path, body=body, headers=named, retries=retries, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            lost = "" if again else "; it is not known whether the transactions were applied"
            reason = getattr(error, "reason", None) or error
            raise ConnectorError(f"{self._url}: {type(reason).__name__}{lost}") from None
        if found.status == 200:
            told, wanted = found.headers.get("content-type", ""), headers.get("accept", "application/json")
            if told.partition(";")[0] != wanted:
                raise ConnectorError(f"{self._url}: answers with {told[:60]!r}, wanted {wanted}; is this the address of a riskring server?")
            return found
        try:
            told = json.loads(found.data)
            name, text = told["type"].removeprefix("urn:riskring:"), told["detail"]
        except (ValueError, KeyError, TypeError, AttributeError):
            name, text = "", f"{self._url}: {found.status} {found.reason}"
        raise _raised(self.KINDS.get(name, ""), text)

    def scores(self, users: Any, at: str | None) -> Any:
        if at is None:
            body = encode_arrow(pa.record_batch([users], names=["user_id"]))
            found = self._request("POST", "/v1/scores", body, content_type=_ARROW, accept=_ARROW)
            return pa.ipc.open_stream(found.data).read_all()["score"].combine_chunks()
        ids = [id.hex() if isinstance(id, bytes) else id for id in users.to_pylist()]
        body = json.dumps({"user_ids": ids, "at": at}).encode()
        return pa.array(json.loads(self._request("POST", "/v1/scores", body, content_type="application/json").data)["scores"], pa.float64())

    def ingest(self, table: Any, scores: bool) -> dict[str, Any]:
        query = "?scores=true" if scores else ""
        found = self._request("POST", f"/v1/transactions{query}", encode_arrow(table), again=False, content_type=_ARROW)
        told: dict[str, Any] = json.loads(found.data)
        if scores:
            told["scores"] = pa.array(told.get("scores", []), pa.float64())
        return told

    def explain(self, user_id: Any, at: str | None) -> dict[str, Any]:
        text = user_id.hex() if isinstance(user_id, bytes) else str(user_id)
        query = "" if at is None else f"?at={quote(at, safe='')}"
        told: dict[str, Any] = json.loads(self._request("GET", f"/v1/explain/{quote(text, safe='')}{query}").data)
        return told

    def close(self) -> None:
        self._pool.clear()


class _Flight:
    """By Arrow Flight."""

    def __init__(self, url: str, token: str | None, timeout: float, ca: str | None, certificate: str | None, key: str | None) -> None:
        self._url, self._timeout = url, timeout
        headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        self._options = flight.FlightCallOptions(timeout=timeout, headers=headers)
        tls: dict[str, Any] = {}
        for name, file in (("tls_root_certs", ca), ("cert_chain", certificate), ("private_key", key)):
            if file is not None:
                with open(file, "rb") as opened:
                    tls[name] = opened.read()
        self._client = flight.connect(url, **tls)

    def _asked(self, work: Callable[[], T]) -> T:
        """What only asks, tried again."""
        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_exponential(multiplier=_WAIT_SECONDS),
            retry=tenacity.retry_if_exception_type(flight.FlightUnavailableError),
            reraise=True,
        )
        return self._told(lambda: again(work))

    def _told(self, work: Callable[[], T], lost: Callable[[], str] = str, refused: Callable[[], str] = str) -> T:
        """What `work` gives; errors end in what is told by `lost`, or by `refused` if the server itself says what is wrong."""
        try:
            return work()
        except (pa.ArrowException, OSError) as error:
            info = getattr(error, "extra_info", b"")
            try:
                told = json.loads(info)
                raised = _raised(told["type"], told["detail"] + refused())
            except (ValueError, KeyError, TypeError):
                raised = ConnectorError(f"{self._url}: {str(error).partition(chr(10))[0][:300]}{lost()}")
            raise raised from None

    def scores(self, users: Any, at: str | None) -> Any:
        if at is not None:
            ids = [id.hex() if isinstance(id, bytes) else id for id in users.to_pylist()]
            ticket = flight.Ticket(json.dumps({"features": {"user_ids": ids, "at": at}}).encode())
            table = self._asked(lambda: self._client.do_get(ticket, self._options).read_all())
            nulls = np.asarray(users.is_null())
            return pa.array(table["score"].to_numpy(), mask=nulls)
        batch = pa.record_batch([users], names=["user_id"])

        def ask() -> Any:
            writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_path("scores"), self._options)
            with writer:
                writer.begin(batch.schema)
                writer.write_batch(batch)
                writer.done_writing()
                return reader.read_all()["score"].combine_chunks()

        return self._asked(ask)

    def ingest(self, table: Any, scores: bool) -> dict[str, Any]:
        table = table.combine_chunks()
        told: dict[str, Any] = {"rows": 0, "accepted": 0, "rejected": {}, "rounded": 0}
        parts: list[Any] = []

        def send() -> None:
            descriptor = flight.FlightDescriptor.for_path("transactions")
            if scores:
                writer, reader = self._client.do_exchange(descriptor, self._options)
            else:
                writer, reader = self._client.do_put(descriptor, table.schema, self._options)
            with writer:
                if scores:
                    writer.begin(table.schema)
                for batch in table.to_batches(_BATCH_ROWS):
                    writer.write_batch(batch)
                    if scores:
                        chunk = reader.read_chunk()
                        parts.append(chunk.data.column(0))
                        answer = chunk.app_metadata
                    else:
                        answer = reader.read()
                    _add(told, json.loads(answer.to_pybytes()))
                writer.done_writing()

        def refused() -> str:
            """Or whoever reads that nothing of a batch was applied sends all again, and earlier rows count twice."""
            rows = told["rows"]
            return (
                f"; this is of the batch that begins at row {rows:,}: send only from there on, rows before it were applied" if rows else ""
            )

        self._told(send, lambda: f"; {told['rows']:,} rows are known to be applied, of the next batch it is not known", refused)
        if scores:
            told["scores"] = pa.concat_arrays(parts) if parts else pa.array([], pa.float64())
        return told

    def explain(self, user_id: Any, at: str | None) -> dict[str, Any]:
        text = user_id.hex() if isinstance(user_id, bytes) else user_id
        action = flight.Action("explain", json.dumps({"user_id": text, "at": at}).encode())
        found = self._asked(lambda: list(self._client.do_action(action, self._options)))
        told: dict[str, Any] = json.loads(found[0].body.to_pybytes())
        return told

    def close(self) -> None:
        self._client.close()


def _add(told: dict[str, Any], more: dict[str, Any]) -> None:
    for name in ("rows", "accepted", "rounded"):
        told[name] += more[name]
    for reason, count in more["rejected"].items():
        told["rejected"][reason] = told["rejected"].get(reason, 0) + count
