"""How fast does a server answer, beside what its frameworks take for answering nothing? Server and load share this machine.

    python -m pytest bench/bench_serve.py -s

Needs `wrk` (Debian's package) and the extras `serve` and `client`. The server is a process of its own, and so are its bare counterparts:
starlette with a route that gives a constant, and a Flight server that gives back what it gets. They take turns, round by round.

Prediction: uvicorn and starlette take 45 us for a request from one connection; a user's features 9 us, their JSON 3 us. A thousand integer
ids are read from the bytes of their JSON in 8 us, looked up in 20 us, and orjson writes as many scores in 14 us; each function of Python on
the way is cold and takes up to three times what it does in a loop, and to wake the client takes some 20 us of the kernel. Flight passes
2 GB/s, so a lookup of 16 bytes costs some 15 ns beside the engine's 10 to 20 ns.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from workload import SMOKE

pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("tenacity", reason="needs the extra `client`")

import orjson
import urllib3
from pyarrow import flight

from engine import RiskEngine
from engine.access import Address
from engine.adapters.client import RiskClient
from engine.messages import encode_arrow
from tests.adapters.needs import need

USERS = 2_000 if SMOKE else 1_000_000
ROUNDS = 1 if SMOKE else 7
SECONDS = 0.3 if SMOKE else 3
MANY = 1_000 if SMOKE else 100_000
BATCH_ROWS = 2_000 if SMOKE else 65_536
BATCHES = 3 if SMOKE else 60
RATE = 50_000 if SMOKE else 2_000_000
BEGAN_S = 1_767_225_600


def history() -> Iterator[pa.RecordBatch]:
    """A window of transactions, two a user."""
    random = np.random.default_rng(1)
    for number in range(10):
        yield rows_at(random, number, USERS // 5)


def rows_at(random: np.random.Generator, second: float, count: int) -> pa.RecordBatch:
    times = np.full(count, np.datetime64(int((BEGAN_S + second) * 1e6), "us"))
    names = ["user_id", "amount", "timestamp"]
    return pa.record_batch([random.integers(0, USERS, count), random.integers(0, 10**6, count) / 100, times], names=names)


def filled() -> RiskEngine:
    engine = RiskEngine(users=2 * USERS, max_ahead=None)
    for batch in history():
        engine.ingest(batch)
    return engine


# ---- the servers, each a process: `python bench/bench_serve.py engine` ---------------------------------------------------------------


def serve_engine() -> tuple[str, str]:
    from engine.adapters.flight_server import FlightServer  # noqa: PLC0415 - only in that process
    from engine.adapters.http_listener import HttpServer  # noqa: PLC0415
    from engine.adapters.http_server import Served  # noqa: PLC0415
    from engine.adapters.metrics import Meters  # noqa: PLC0415
    from engine.service import Service  # noqa: PLC0415

    service, meters = Service.of(filled()), Meters()
    http = HttpServer(Served(service, observer=meters), Address("127.0.0.1", 0))
    by_flight = FlightServer(service, Address("127.0.0.1", 0), observer=meters)
    return f"http://{http.address}", f"grpc://{by_flight.address}"


def serve_nothing() -> tuple[str, str]:
    """The frameworks alone: constants, and what came."""
    import uvicorn  # noqa: PLC0415
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.responses import Response  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    one, many = b"x" * 250, orjson.dumps({"scores": [1.5] * 1000})

    async def score(_: Request) -> Response:
        return Response(one, media_type="application/json")

    async def scores(request: Request) -> Response:
        await request.body()
        return Response(many, media_type="application/json")

    class Bare(flight.FlightServerBase):  # type: ignore[misc]
        def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            for _ in reader:
                writer.write(pa.py_buffer(b"{}"))

        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            begun = False
            for chunk in reader:
                if not begun:
                    writer.begin(chunk.data.schema)
                    begun = True
                writer.write_batch(chunk.data)

    routes = [Route("/v1/scores/{user}", score), Route("/v1/scores", scores, methods=["POST"])]
    socket = Address("127.0.0.1", 0).listen("http")
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), lifespan="off", access_log=False, log_level="error"))
    threading.Thread(target=server.run, args=([socket],), daemon=True).start()
    return f"http://127.0.0.1:{socket.getsockname()[1]}", f"grpc://127.0.0.1:{Bare('grpc://127.0.0.1:0').port}"


@contextlib.contextmanager
def started(what: str) -> Iterator[tuple[str, str]]:
    """The URLs of a server in a process of its own, HTTP and Flight."""
    with subprocess.Popen([sys.executable, __file__, what], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield tuple(json.loads(process.stdout.readline()))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def ours() -> Iterator[tuple[str, str]]:
    with started("engine") as urls:
        yield urls


@pytest.fixture(scope="module")
def bare() -> Iterator[tuple[str, str]]:
    with started("nothing") as urls:
        yield urls


# ---- load ----------------------------------------------------------------------------------------------------------------------------

LUA = """
done = function(summary, latency, requests)
  io.write(string.format("{%q:%d,%q:%d,%q:%f,%q:%d}\\n", "p50", latency:percentile(50), "p99", latency:percentile(99),
    "rate", summary.requests / summary.duration * 1e6, "errors", summary.errors.status + summary.errors.read + summary.errors.timeout))
end
"""


def wrk(url: str, folder: Path, connections: int = 1, seconds: float = SECONDS, body: bytes = b"") -> dict[str, float]:
    """Requests for some seconds: microseconds at p50 and p99, and how many a second."""
    need({"wrk": "wrk"}, {})
    script = LUA
    if body:
        (folder / "body").write_bytes(body)
        file = json.dumps(str(folder / "body"))
        script += f'wrk.method="POST" wrk.headers["Content-Type"]="application/json" wrk.body=io.open({file}):read("*a")'
    (folder / "load.lua").write_text(script)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(round(seconds), 1)}s", "-s", str(folder / "load.lua"), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    assert found["errors"] == 0, said
    return found


def rate_of(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - began)


def told(benchmark: Any, rows: int, figures: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> None:
    """Keep medians with their spread, and quotients round by round."""
    kept: dict[str, float] = {}
    for name, values in figures.items():
        kept |= {name: statistics.median(values), f"{name}, least": min(values), f"{name}, most": max(values)}
    for name, (above, below) in ratios.items():
        quotients = [a / b for a, b in zip(figures[above], figures[below], strict=True)]
        kept |= {name: statistics.median(quotients), f"{name}, least": min(quotients), f"{name}, most": max(quotients)}
    benchmark.extra_info |= {"rows": rows, "users": USERS, "figures": kept}


# ---- equal answers first -------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(ours: tuple[str, str]) -> None:
    users = pa.array(np.random.default_rng(3).integers(0, 2 * USERS, MANY))
    with filled() as engine:
        wanted = engine.scores(users)
        for url in ours:
            with RiskClient(url) as client:
                assert client.scores(users).equals(wanted)
        one = urllib3.request("GET", f"{ours[0]}/v1/scores/{users[0].as_py()}").json()
        assert one["score"] == wanted[0].as_py()


@pytest.mark.benchmark(group="serve: one user")
def test_one_user(benchmark: Any, ours: tuple[str, str], bare: tuple[str, str], tmp_path: Path) -> None:
    figures: dict[str, list[float]] = {name: [] for name in ("p50 us", "bare p50 us", "p99 us", "bare p99 us", "requests/s, 8 connections")}
    figures["bare requests/s, 8 connections"] = []

    def measure() -> None:
        for url, name in ((bare[0], "bare "), (ours[0], "")):
            found = wrk(f"{url}/v1/scores/12345", tmp_path)
            figures[f"{name}p50 us"].append(found["p50"])
            figures[f"{name}p99 us"].append(found["p99"])
            figures[f"{name}requests/s, 8 connections"].append(wrk(f"{url}/v1/scores/12345", tmp_path, 8)["rate"])

    benchmark.pedantic(measure, rounds=ROUNDS)
    told(benchmark, 1, figures, {"p50, times the bare framework's": ("p50 us", "bare p50 us")})


@pytest.mark.benchmark(group="serve: a thousand users in JSON")
def test_a_thousand_users(benchmark: Any, ours: tuple[str, str], bare: tuple[str, str], tmp_path: Path) -> None:
    """Beside orjson alone, which reads such a request and writes such an answer, and the framework alone, which does neither."""
    body = orjson.dumps({"user_ids": np.random.default_rng(4).integers(0, USERS, 1000).tolist(), "at": None})
    answer = {"scores": np.random.default_rng(5).integers(0, 10**6, 1000) / 100, "at": "2026-01-01T00:00:00Z"}
    count = 20 if SMOKE else 20_000

    def json_alone() -> int:
        for _ in range(count):
            orjson.loads(body)
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return count

    figures: dict[str, list[float]] = {name: [] for name in ("requests/s", "orjson alone/s", "bare framework requests/s")}

    def measure() -> None:
        figures["bare framework requests/s"].append(wrk(f"{bare[0]}/v1/scores", tmp_path, 4, body=body)["rate"])
        figures["requests/s"].append(wrk(f"{ours[0]}/v1/scores", tmp_path, 4, body=body)["rate"])
        figures["orjson alone/s"].append(rate_of(json_alone))

    benchmark.pedantic(measure, rounds=ROUNDS)
    ratios = {
        "share of orjson alone": ("requests/s", "orjson alone/s"),
        "share of the bare framework": ("requests/s", "bare framework requests/s"),
        "bare framework's share of orjson alone": ("bare framework requests/s", "orjson alone/s"),
    }
    told(benchmark, 1000, figures, ratios)


@pytest.mark.benchmark(group="serve: many users in Arrow")
def test_many_users(benchmark: Any, ours: tuple[str, str], bare: tuple[str, str]) -> None:
    """A hundred thousand users a request: over HTTP, by Flight in one stream, and by a Flight server that gives back what it gets."""
    users = pa.record_batch([pa.array(np.random.default_rng(6).integers(0, USERS, MANY))], names=["user_id"])
    body, times = encode_arrow(users), 2 if SMOKE else 50
    arrow = "application/vnd.apache.arrow.stream"
    pool = urllib3.PoolManager(headers={"content-type": arrow, "accept": arrow})

    def over_http() -> int:
        for _ in range(times):
            found = pool.request("POST", f"{ours[0]}/v1/scores", body=body)
            assert len(pa.ipc.open_stream(found.data).read_all()) == MANY
        return times * MANY

    def by_flight(url: str) -> int:
        with flight.connect(url) as client:
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("scores"))
            with writer:
                writer.begin(users.schema)
                sending = threading.Thread(target=lambda: [writer.write_batch(users) for _ in range(times)] and writer.done_writing())
                sending.start()
                count = sum(chunk.data.num_rows for chunk in reader)
                sending.join()
        assert count == times * MANY
        return count

    with filled() as engine:

        def in_process() -> int:
            for _ in range(times):
                engine.scores(users.column(0))
            return times * MANY

        ways = {"HTTP users/s": over_http, "Flight users/s": lambda: by_flight(ours[1]), "bare Flight users/s": lambda: by_flight(bare[1])}
        ways["in process users/s"] = in_process
        figures: dict[str, list[float]] = {name: [] for name in ways}

        def measure() -> None:
            for name, way in ways.items():
                figures[name].append(rate_of(way))

        benchmark.pedantic(measure, rounds=ROUNDS)
    told(benchmark, MANY, figures, {"Flight's share of bare Flight": ("Flight users/s", "bare Flight users/s")})


def batches_from(second: float) -> list[pa.RecordBatch]:
    random = np.random.default_rng(8)
    return [rows_at(random, second + number / BATCHES, BATCH_ROWS) for number in range(BATCHES)]


def put(url: str, batches: list[pa.RecordBatch]) -> int:
    """Send batches by Flight, and read what is said of each."""
    with flight.connect(url) as client:
        writer, reader = client.do_put(flight.FlightDescriptor.for_path("transactions"), batches[0].schema)
        with writer:
            sending = threading.Thread(target=lambda: [writer.write_batch(batch) for batch in batches] and writer.done_writing())
            sending.start()
            for _ in batches:
                reader.read()
            sending.join()
    return sum(batch.num_rows for batch in batches)


@pytest.mark.benchmark(group="serve: ingest by Flight")
def test_ingest(benchmark: Any, ours: tuple[str, str], bare: tuple[str, str]) -> None:
    """Beside the same batches in the process, and a Flight server that only reads them."""
    figures: dict[str, list[float]] = {name: [] for name in ("Flight rows/s", "bare Flight rows/s", "in process rows/s")}
    seconds = iter(range(20, 10_000))

    with filled() as engine:

        def in_process(batches: list[pa.RecordBatch]) -> int:
            return sum(engine.ingest(batch).rows for batch in batches)

        def measure() -> None:
            batches = batches_from(next(seconds))
            figures["bare Flight rows/s"].append(rate_of(lambda: put(bare[1], batches)))
            figures["Flight rows/s"].append(rate_of(lambda: put(ours[1], batches)))
            figures["in process rows/s"].append(rate_of(lambda: in_process(batches)))

        benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=0 if SMOKE else 1)
        with RiskClient(ours[1]) as client:  # both have had the same rows
            users = pa.array(np.arange(min(USERS, 10_000)))
            assert client.scores(users).equals(engine.scores(users))
    kept = {name: values[-ROUNDS:] for name, values in figures.items()}
    ratios = {
        "share of in process": ("Flight rows/s", "in process rows/s"),
        "share of bare Flight": ("Flight rows/s", "bare Flight rows/s"),
    }
    told(benchmark, BATCHES * BATCH_ROWS, kept, ratios)


@pytest.mark.benchmark(group="serve: lookups while rows come")
def test_lookups_while_rows_come(benchmark: Any, ours: tuple[str, str], tmp_path: Path) -> None:
    """Two million rows a second by Flight, in batches of ten milliseconds, and a connection that asks for one user after the other."""
    part, random = RATE // 100, np.random.default_rng(9)
    figures: dict[str, list[float]] = {name: [] for name in ("p50 us", "p99 us", "rows/s meanwhile")}
    batches = [rows_at(random, 10_000 + number / 100, part) for number in range(200)]

    def ingest(stop: threading.Event, sent: list[int]) -> None:
        began, due = time.perf_counter(), time.perf_counter()
        with flight.connect(ours[1]) as client:
            writer, reader = client.do_put(flight.FlightDescriptor.for_path("transactions"), batches[0].schema)
            with writer:
                while not stop.is_set():
                    writer.write_batch(batches[len(sent) % len(batches)])
                    reader.read()
                    sent.append(part)
                    due += 0.01
                    time.sleep(max(due - time.perf_counter(), 0))
                writer.done_writing()
        figures["rows/s meanwhile"].append(sum(sent) / (time.perf_counter() - began))

    def measure() -> None:
        stop, sent = threading.Event(), [0][:0]
        thread = threading.Thread(target=ingest, args=(stop, sent))
        thread.start()
        found = wrk(f"{ours[0]}/v1/scores/12345", tmp_path, 2)
        stop.set()
        thread.join()
        for name in ("p50", "p99"):
            figures[f"{name} us"].append(found[name])

    benchmark.pedantic(measure, rounds=ROUNDS)
    told(benchmark, 1, figures, {})


if __name__ == "__main__":
    print(json.dumps({"engine": serve_engine, "nothing": serve_nothing}[sys.argv[1]]()), flush=True)
    sys.stdin.read()
