"""HTTP over a `Service`: routes, errors as problem JSON, and what keeps a stranger from harming the process.

    uvicorn -> Gate (who may ask, how much at once) -> scores at once, all else by starlette's router -> Service

Short lookups are answered in the thread of the event loop, where nobody else has the engine; everything that may take longer, or would
have to wait, goes to a few threads. A request is of one instant, and is applied whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from html.parser import HTMLParser
from importlib import resources
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router

from engine.access import Token
from engine.adapters.http_bodies import (
    ARROW,
    JSON,
    NDJSON,
    BodyError,
    TooLargeError,
    dumped,
    lookup,
    scores_arrow,
    transactions,
)
from engine.adapters.openapi import description
from engine.answers import explanation_json, features_json, ingested_json, stats_json, table_json, time_json
from engine.errors import (
    CapacityError,
    ConfigError,
    SchemaError,
    StaleError,
    TimeTooOldError,
)
from engine.service import Observer, Service

#: What each error answers with. The first class that fits counts.
_STATUS: Final[tuple[tuple[type[Exception], int], ...]] = (
    (BodyError, 400),
    (TooLargeError, 413),
    (TimeTooOldError, 409),
    (SchemaError, 422),
    (ConfigError, 400),
    (CapacityError, 503),
    (StaleError, 503),
)
_TITLES: Final = {
    400: "the request makes no sense",
    401: "a token is needed",
    404: "there is nothing here",
    405: "this cannot be done with that",
    406: "no such form of the answer",
    408: "the request came too slowly",
    409: "the instant is too old",
    413: "the request is too large",
    415: "no such form of a request",
    421: "another server is meant",
    422: "the data cannot be used",
    500: "an error of the server",
    503: "not now",
}

#: Lookups of so many users take some tens of microseconds: less than handing them to another thread.
_SHORT_USERS: Final = 4096

#: For everybody, without a token: the page (which asks for it), and whether the server lives.
_OPEN: Final = ("/", "/healthz", "/readyz")
_ALWAYS: Final = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
_TOP_MAX: Final = 10_000
_EXPLAIN: Final = "/v1/explain/"

#: Key of a request's scope: the answer is on its way.
_BEGUN: Final = "riskring.begun"


Headers = Mapping[bytes, bytes]
Receive = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Limits:
    """What a server takes from strangers.

    Attributes:
        body_bytes: Of one request.
        bodies_bytes: Of all requests at a time.
        users: Looked up by one request.
        requests: At a time; beyond that 503.
        streams: Of events at a time.
        connections: At a time; beyond that 503.
        seconds: In which a request must have come, and its answer be taken.
        head_bytes, head_seconds: Of a request's line and headers.
    """

    body_bytes: int = 64 << 20
    bodies_bytes: int = 256 << 20
    users: int = 1 << 20
    requests: int = 256
    streams: int = 64
    connections: int = 1024
    seconds: float = 60.0
    head_bytes: int = 64 << 10
    head_seconds: float = 10.0


@dataclass(frozen=True)
class Served:
    """What a server is made of.

    Attributes:
        service: Who answers.
        token: What clients must show; None: nothing.
        limits: What is taken from strangers.
        page: The live page, HTML; None: there is none.
        events: A JSON text for those who watch, each second; None: there are none.
        observer: Who counts.
        failed: Is told of errors of the server itself.
        hosts: Names by which it may be called, so that no web page reaches it by a name of its own; None: any.
    """

    service: Service
    token: Token | None = None
    limits: Limits = field(default_factory=Limits)
    page: str | None = None
    events: Callable[[], bytes] | None = None
    observer: Observer = field(default_factory=Observer)
    failed: Callable[[str], None] = lambda _: None
    hosts: frozenset[str] | None = None


def problem(status: int, detail: str, kind: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """An error as RFC 9457 has it."""
    title = _TITLES.get(status, "error")
    name = kind or title.replace(" ", "-")
    body = dumped({"type": f"urn:riskring:{name}", "title": title, "status": status, "detail": detail})
    more = {"retry-after": "1"} if status == 503 else {}
    if status in (401, 408, 413):
        more["connection"] = "close"  # what else there is of the request is not read
    if status == 401:
        more["www-authenticate"] = "Bearer"
    return Response(body, status, {**more, **(headers or {})}, "application/problem+json")


def problem_of(error: Exception) -> Response:
    """What an error answers with."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            name = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__)[1:].removesuffix("-error")
            return problem(status, _one_line(error), name)
    if isinstance(error, HTTPException):
        return problem(error.status_code, error.detail, headers=error.headers)
    raise error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.encode(errors="replace").decode()[:2000]


class Answers:
    """The routes. Each takes a request and gives a response, or raises."""

    def __init__(self, served: Served) -> None:
        self._served, self._service, self._limits = served, served.service, served.limits
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="riskring-http")
        self._held = 0  # bytes of bodies
        self._page = None if served.page is None else (served.page.encode(), _policy(served.page))
        self._watch = None if served.events is None else _Watch(served.events, self._threads, self.ends)
        self.ending = threading.Event()

    def ends(self) -> bool:
        """Whether the server is about to end."""
        return self.ending.is_set()

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/scores/{user:path}", self.score),
            Route("/v1/scores", self.scores, methods=["POST"]),
            Route("/v1/transactions", self.transactions, methods=["POST"]),
            Route(_EXPLAIN + "{user}", self.explain),
            Route("/v1/top", self.top),
            Route("/v1/stats", self.stats),
            Route("/v1/events", self.events),
            Route("/healthz", self.health),
            Route("/readyz", self.readiness),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/", self.page),
        ]

    async def _by_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def score(self, request: Request) -> Response:
        """A user's score."""
        return Response(await self.score_json(request.scope), media_type=JSON)

    async def score_json(self, scope: Mapping[str, Any]) -> bytes:
        """A user's score, as JSON."""
        began, service = time.perf_counter(), self._service
        user, at = _user(scope, "/v1/scores/"), _query(scope, at=None)["at"]
        ask = service.features_of_one
        features, at_ns = await self._by_thread(lambda: ask(user, at)) if service.is_busy() else ask(user, at)
        answer = dumped(features_json(service.user_of(user), features, at_ns, service.config.decimals))
        self._served.observer.looked_up(time.perf_counter() - began)
        return answer

    async def scores(self, request: Request) -> Response:
        """Scores of many users."""
        body, media = await self.scores_body(request.scope, request.receive)
        return Response(body, media_type=media)

    async def scores_body(self, scope: Mapping[str, Any], receive: Receive) -> tuple[bytes, str]:
        """Scores of many users, and in which form."""
        _query(scope)
        headers = dict(scope["headers"])
        content, wanted = _content(headers, (JSON, ARROW)), _accepted(headers)
        body = await self._body(headers, receive)
        began = time.perf_counter()

        def answer() -> bytes:
            users, at = lookup(body, content, self._service, self._limits.users)
            scores, at_ns = self._service.scores(users, at)
            if wanted == ARROW:
                return scores_arrow(users, scores)
            return dumped({"scores": np.asarray(scores), "at": time_json(at_ns)})

        is_short = len(body) <= 16 * _SHORT_USERS and not self._service.is_busy()
        found = await self._worked(body, lambda: self._service.settled(answer), is_short)
        self._served.observer.looked_up(time.perf_counter() - began)
        return found, wanted

    async def transactions(self, request: Request) -> Response:
        """Apply transactions."""
        asked = _query(request.scope, scores="false", rejects="false")
        scores, rejects = (_flag(name, asked[name]) for name in ("scores", "rejects"))
        headers = dict(request.scope["headers"])
        content = _content(headers, (JSON, NDJSON, ARROW))
        service = self._service
        if not service.writable:
            raise HTTPException(405, "this server reads its transactions from Kafka; send them to the topic", {"allow": ""})
        body = await self._body(headers, request.receive)
        began = time.perf_counter()

        def answer() -> bytes:
            table = transactions(body, content, service.config, service.kind(), rejects)
            return dumped(ingested_json(None if table is None else service.ingest(table, scores), rejects))

        found = await self._worked(body, answer)
        self._served.observer.ingested(time.perf_counter() - began)
        return Response(found, media_type=JSON)

    async def explain(self, request: Request) -> Response:
        """A user's score with the transactions behind it."""
        user, at = _user(request.scope, _EXPLAIN), _query(request.scope, at=None)["at"]
        answer = await self._by_thread(lambda: dumped(explanation_json(*self._service.explain(user, at))))
        return Response(answer, media_type=JSON)

    async def top(self, request: Request) -> Response:
        """The greatest users."""
        asked = _query(request.scope, k="10", by="score", at=None)
        if not (asked["k"].isascii() and asked["k"].isdigit() and len(asked["k"]) < 9 and int(asked["k"]) <= _TOP_MAX):
            raise ConfigError(f"k={asked['k'][:40]!r} must be a whole number from 0 to {_TOP_MAX}")

        def answer() -> bytes:
            table, at_ns = self._service.top(int(asked["k"]), asked["by"], asked["at"])
            return dumped({"users": table_json(table), "at": time_json(at_ns)})

        return Response(await self._by_thread(answer), media_type=JSON)

    async def stats(self, request: Request) -> Response:
        """What the engine holds and has seen."""
        _query(request.scope)
        return Response(await self._by_thread(lambda: dumped(stats_json(self._service.stats(), self._service))), media_type=JSON)

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return Response(dumped({"status": "alive"}), media_type=JSON)

    async def readiness(self, request: Request) -> Response:
        """Whether scores can be trusted."""
        why = "the server is about to end" if self.ends() else self._service.ready()
        return Response(dumped({"status": "ready"}), media_type=JSON) if why is None else problem(503, why, "not-ready")

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text, kind = await self._by_thread(self._served.observer.text)
        return Response(text, headers={"content-type": kind})

    async def openapi(self, request: Request) -> Response:
        """The description of all this."""
        return Response(dumped(description(self._service, self._limits.users, _TOP_MAX)), media_type=JSON)

    async def page(self, request: Request) -> Response:
        """The live page."""
        if self._page is None:
            raise HTTPException(404, "this server has no page")
        body, policy = self._page
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
        return Response(body, headers=headers, media_type="text/html")

    async def events(self, request: Request) -> Response:
        """What the page shows, each second, as server-sent events."""
        _query(request.scope)
        if self._watch is None:
            raise HTTPException(404, "this server has no events")
        if len(self._watch.streams) >= self._limits.streams:
            raise StaleError(f"{self._limits.streams} streams of events are open already; close one, or wait")
        return StreamingResponse(self._watch.stream(), media_type="text/event-stream")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The body of a request, of which no more is kept than the limits allow. It is held until it is worked on."""
        limits = self._limits
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told) > limits.body_bytes:
            raise TooLargeError(f"the body has {told[:20].decode('latin-1')} bytes, more than {limits.body_bytes:,}; send it in parts")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise HTTPException(415, "a body must come as it is, without Content-Encoding")
        parts: list[bytes] = []
        length, more = 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part, more = message.get("body", b""), message.get("more_body", False)
                length += len(part)
                self._held += len(part)
                parts.append(part)
                if length > limits.body_bytes:
                    raise TooLargeError(f"the body has more than {limits.body_bytes:,} bytes; send it in parts")
                if self._held > limits.bodies_bytes:
                    raise StaleError("too much is being sent by all clients together; try again in a second")
        except BaseException:
            self._held -= length
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _worked(self, body: bytes, work: Callable[[], bytes], at_once: bool = False) -> bytes:
        """What is made of a body, here or in a thread; afterwards it is no longer held."""
        try:
            return work() if at_once else await self._by_thread(work)
        finally:
            self._held -= len(body)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)


class _Watch:
    """One sampler for all who watch, who get each text as it comes; a slow one gets the newest only."""

    def __init__(self, sample: Callable[[], bytes], threads: ThreadPoolExecutor, ends: Callable[[], bool]) -> None:
        self._sample, self._threads, self._ends = sample, threads, ends
        self.streams: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None

    async def stream(self) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(1)
        self.streams.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield b"retry: 1000\n\n"
            while not self._ends():
                with contextlib.suppress(TimeoutError):
                    yield b"data: " + await asyncio.wait_for(queue.get(), 0.5) + b"\n\n"
        finally:
            self.streams.discard(queue)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self.streams and not self._ends():
            began = loop.time()
            text = await loop.run_in_executor(self._threads, self._sample)
            for queue in self.streams:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(text)
            await asyncio.sleep(max(1.0 - (loop.time() - began), 0.1))


def _user(scope: Mapping[str, Any], prefix: str) -> str:
    """The user id of a path, which may have any character, percent-encoded."""
    path: bytes = scope["raw_path"].partition(b"?")[0]
    try:
        text = unquote_to_bytes(path[len(scope.get("root_path", "")) + len(prefix) :]).decode()
    except UnicodeDecodeError:
        raise ConfigError("the user id in the path is not UTF-8; percent-encode its bytes in UTF-8") from None
    if not text:
        raise HTTPException(404, f"the path lacks the user id; ask for {prefix}USER")
    return text


def _query(scope: Mapping[str, Any], **defaults: str | None) -> dict[str, Any]:
    """Values of the query; a name that is not known, or is there twice, is an error: an instant misspelt would be a wrong score."""
    text: bytes = scope["query_string"]
    if not text:
        return defaults
    try:
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=16)
    except ValueError:  # not UTF-8, or too many
        raise ConfigError("the query is not percent-encoded UTF-8") from None
    found: dict[str, Any] = dict(defaults)
    names = [name for name, _ in pairs]
    for name, value in pairs:
        if name not in defaults:
            wanted = ", ".join(defaults) or "none"
            raise ConfigError(f"the query has the parameter {name[:40]!r}; known here: {wanted}")
        if names.count(name) > 1:
            raise ConfigError(f"the query has the parameter {name!r} twice")
        found[name] = value
    return found


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(f"{name}={text[:40]!r} must be true or false")
    return text == "true"


def _content(headers: Headers, known: tuple[str, ...]) -> str:
    """What the body says it is."""
    told = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if told not in known:
        raise HTTPException(415, f"Content-Type {told[:60]!r} cannot be read here; send {' or '.join(known)}")
    return told


def _accepted(headers: Headers) -> str:
    """The form of the answer that is asked for."""
    told = headers.get(b"accept", b"*/*").decode("latin-1").lower()
    if told == "*/*":
        return JSON
    kinds = [kind.partition(";")[0].strip() for kind in told.split(",")]
    if ARROW in kinds:
        return ARROW
    if any(kind in (JSON, "*/*", "application/*", "") for kind in kinds):
        return JSON
    raise HTTPException(406, f"Accept: {told[:60]!r} is not to be had; ask for {JSON} or {ARROW}")


def page() -> str | None:
    """The live page."""
    file = resources.files("engine.adapters") / "page.html"
    return file.read_text("utf-8") if file.is_file() else None


class _Inline(HTMLParser):
    """Collects the texts of inline scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag if tag in self.texts else None
        if self._open:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data


def _policy(page: str) -> str:
    """A content security policy under which the page's own scripts and styles run and nothing else does."""
    inline = _Inline()
    inline.feed(page)
    hashes = {
        tag: " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts) or "'none'"
        for tag, texts in inline.texts.items()
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Gate:
    """The outermost application: who may ask, how many at a time, for how long; and scores by the shortest way."""

    def __init__(self, served: Served) -> None:
        self._served, self._limits = served, served.limits
        self.answers = Answers(served)
        self._app = Router(self.answers.routes(), redirect_slashes=False)
        self._running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            return
        scope["app"] = self  # then what no route takes is an exception, too
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        self._running += 1
        try:
            if scope["method"] == "GET" and scope["path"].startswith("/v1/scores/"):
                await self._send(await self.answers.score_json(scope), JSON, scope, send)
            elif scope["method"] == "POST" and scope["path"] == "/v1/scores":
                async with asyncio.timeout(self._limits.seconds):
                    await self._send(*await self.answers.scores_body(scope, receive), scope, send)
            elif scope["path"] == "/v1/events":
                await self._route(scope, receive, send)
            else:
                async with asyncio.timeout(self._limits.seconds):
                    await self._route(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            if scope.get(_BEGUN):  # too late to tell: the connection is closed
                raise
            await self._response_of(error)(scope, receive, _with_headers(send))
        finally:
            self._running -= 1

    async def _send(self, body: bytes, media: str, scope: Any, send: Any) -> None:
        head = [(b"content-type", media.encode()), (b"content-length", b"%d" % len(body)), *_ALWAYS]
        scope[_BEGUN] = True
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: Any, receive: Any, send: Any) -> None:
        sending = _with_headers(send)

        async def beginning(message: Any) -> None:
            scope[_BEGUN] = True
            await sending(message)

        if scope["path"].startswith(_EXPLAIN):
            scope["path"] = _EXPLAIN + "user"  # who it is is read from the raw path: no pattern takes all that an id may have
        await self._app(scope, receive, beginning)

    def _response_of(self, error: Exception) -> Response:
        if isinstance(error, TimeoutError):
            return problem(408, f"the request was not there after {self._limits.seconds:g} s")
        try:
            return problem_of(error)
        except Exception as unexpected:
            self._served.failed(f"{type(unexpected).__name__}: {_one_line(unexpected)}")
            return problem(500, f"unexpected {type(unexpected).__name__}; see the server's log")

    def _refusal(self, scope: Any) -> Response | None:
        headers = dict(scope["headers"])
        served = self._served
        if served.hosts is not None and _host(headers.get(b"host", b"")) not in served.hosts:
            return problem(421, "the server was called by a name that is not its own; call it by its address, or start it with a token")
        if served.token is not None and scope["path"] not in _OPEN and not served.token.matches(headers.get(b"authorization", b"")):
            return problem(401, "show the token: Authorization: Bearer TOKEN")
        if self._running >= self._limits.requests:
            return problem(503, f"{self._limits.requests} requests are being answered already; try again")
        return None


def _host(header: bytes) -> str:
    text = header.decode("latin-1").lower()
    return text.partition("]")[0] + "]" if text.startswith("[") else text.partition(":")[0]


def _with_headers(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_ALWAYS]
        await send(message)

    return sending
