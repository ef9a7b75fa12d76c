"""What servers answer: the same as one engine, however users are spread over partitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import ConfigError, RiskEngine, SchemaError, StaleError, TimeTooOldError
from engine.answers import features_json
from engine.columns import ids_of
from engine.partitions import partition_of
from engine.service import Service

SECOND = 10**9
PARTITIONS = 3


def rows(kind: str, count: int = 400, users: int = 40) -> pa.Table:
    random = np.random.default_rng(5)
    numbers = random.integers(0, users, count)
    ids = {
        "int64": pa.array(numbers - 7),
        "uint64": pa.array(numbers.astype(np.uint64) + np.uint64(2**63)),
        "string": pa.array([f"user {number}" for number in numbers]),
        "binary": pa.array([bytes([number, 255]) for number in numbers.tolist()], pa.binary()),
    }[kind]
    times = np.sort(random.integers(0, 90, count)) * SECOND
    return pa.table({"user_id": ids, "amount": random.integers(-50, 90, count) / 4, "timestamp": pa.array(times, pa.timestamp("ns"))})


def engine_of(table: pa.Table, **options: Any) -> RiskEngine:
    engine = RiskEngine(**({"users": 1000, "max_ahead": None} | options))
    engine.ingest(table)
    return engine


def spread(table: pa.Table, here: tuple[int, ...] = (0, 1, 2), **options: Any) -> Service:
    chosen = partition_of(ids_of(table["user_id"].combine_chunks(), "user_id"), PARTITIONS)
    engines = {number: engine_of(table.filter(pa.array(chosen == number)), **options) for number in here}
    return Service(engines[here[0]].config, lambda: engines, lambda: 100 * SECOND, PARTITIONS)


@pytest.mark.parametrize("kind", ["int64", "uint64", "string", "binary"])
@pytest.mark.parametrize("at", [None, "1970-01-01T00:01:25Z", "1970-01-01T00:01:45Z"])
def test_users_over_partitions_are_those_of_one_engine(kind: str, at: str | None) -> None:
    table = rows(kind)
    one, service = engine_of(table), spread(table)
    clock_ns = max(engine.clock_ns or 0 for engine in [one])
    at_ns = clock_ns if at is None else int(np.datetime64(at[:-1], "ns"))
    ids = pa.concat_arrays([table["user_id"].combine_chunks().slice(0, 30), pa.nulls(2, table["user_id"].type)])
    scores, when = service.scores(ids, at)
    assert (scores.to_pylist(), when) == (one.scores(ids, at=at).to_pylist(), at_ns)
    features, when = service.features(ids, at)
    assert (features.to_pylist(), when) == (one.features(ids, at=at).to_pylist(), at_ns)
    assert service.features(None, at)[0].to_pylist() == one.features(at=at).to_pylist()
    for by in ("score", "sum", "count", "newest"):
        assert service.top(7, by, at)[0].to_pylist() == one.top(7, by=by, at=at).to_pylist()
    asked = {"binary": lambda id: id.hex(), "string": str, "int64": str, "uint64": int}[kind](ids[3].as_py())
    found, when = service.explain(asked, at)
    assert (found.score, found.sum, found.transactions.to_pylist(), when) == (
        *((told := one.explain(ids[3].as_py(), at=at)).score, told.sum, told.transactions.to_pylist()),
        at_ns,
    )
    stats, whole = service.stats(), one.stats()
    assert (stats.users, stats.transactions, stats.rows, stats.clock) == (whole.users, whole.transactions, whole.rows, whole.clock)
    assert service.lookups == 2 * len(ids) + len(one)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("int64", ["-7", 5, None, 2**40, 7.0], [-7, 5, None, 2**40, 7]),
        ("uint64", ["9223372036854775808", 7], [2**63, 7]),
        ("string", ["a", "7", None, ""], ["a", "7", None, ""]),
        ("binary", ["00ff", None, ""], [b"\0\xff", None, b""]),
    ],
)
def test_users_as_texts_and_json_have_them(kind: str, given: list[Any], expected: list[Any]) -> None:
    assert Service.of(engine_of(rows(kind))).users_of(given).to_pylist() == expected


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *[("int64", wrong) for wrong in ("", "+7", "007", " 7", "7.0", 7.5, 2.0**60, True, 2**63, "9223372036854775808", [7], "٣")],
        *[("uint64", wrong) for wrong in (-1, "-1", 2**64)],
        *[("string", wrong) for wrong in (7, True, 1.5, {}, b"a", "\ud800")],
        *[("binary", wrong) for wrong in ("0", "zz", 7, "\ud800")],
    ],
)
def test_what_cannot_be_a_user(kind: str, wrong: Any) -> None:
    service = Service.of(engine_of(rows(kind)))
    with pytest.raises(SchemaError, match=r"user_ids\[1\]="):
        service.users_of([None, wrong])


def test_before_the_first_row() -> None:
    service = Service.of(RiskEngine(users=10))
    assert service.kind() is None
    assert service.users_of(["a", "7"]).to_pylist() == ["a", "7"]
    assert service.users_of([7, None]).to_pylist() == [7, None]
    scores, at_ns = service.scores(["a", "b"])
    assert (scores.tolist(), at_ns) == ([0.0, 0.0], None)
    assert service.top(3)[0].num_rows == service.features()[0].num_rows == 0
    assert service.explain("a")[0].score == 0.0


def test_an_engine_that_knows_no_kind_yet_beside_one_that_does() -> None:
    table = rows("int64", 50, 1)
    service = spread(table)
    assert service.features()[0].num_rows == 1
    assert service.top(5)[0]["user_id"].to_pylist() == [-7]


def test_users_of_another_node_are_not_known() -> None:
    table = rows("string")
    service = spread(table, here=(0, 2))
    users = table["user_id"].combine_chunks()
    chosen = partition_of(ids_of(users, "user_id"), PARTITIONS)
    foreign = users.filter(pa.array(chosen == 1))
    for ask in (service.scores, service.features):
        with pytest.raises(StaleError, match=r"user_ids\[1\] is in partition 1, which another node has; this one has \[0, 2\]"):
            ask(pa.concat_arrays([users.filter(pa.array(chosen == 0)).slice(0, 1), foreign]))
    with pytest.raises(StaleError):
        service.explain(foreign[0].as_py())
    nobody = Service(service.config, dict, lambda: 0, PARTITIONS)
    for ask in (lambda: nobody.scores(users), nobody.features, lambda: nobody.top(3)):
        with pytest.raises(StaleError):
            ask()


def test_instants() -> None:
    table = rows("string")
    now = [10 * SECOND]
    engine = engine_of(table)
    service = Service.of(engine, lambda: now[0])
    assert service.scores(["user 1"])[1] == engine.clock_ns
    walled = Service.of(engine_of(table, clock="wall", now=lambda: now[0]))
    assert walled.instant_ns() == engine.clock_ns  # it is ahead of the wall clock
    now[0] = 1000 * SECOND
    assert walled.scores(["user 1"])[0].tolist() == [0.0]
    assert walled.instant_ns() == walled.instant_ns("now") == 1000 * SECOND
    with pytest.raises(TimeTooOldError):
        service.scores(["user 1"], "1960-01-01")
    with pytest.raises(ConfigError):
        service.scores(["user 1"], "soon")


def test_a_clock_that_runs_away_between_taking_the_instant_and_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(rows("string"))
    service = Service.of(engine)
    ask, calls = engine.features, []

    def overtaken(ids: Any, at: Any) -> Any:
        calls.append(at)
        if len(calls) == 1:
            engine.add("later", 1, "1970-01-01T01:00:00Z")
        return ask(ids, at=at)

    monkeypatch.setattr(engine, "features", overtaken)
    assert service.features(pa.array(["later"]))[0]["score"].to_pylist() == [1.0]
    assert len(calls) == 2


def test_a_node_takes_no_transactions() -> None:
    with pytest.raises(ConfigError, match="send them to the topic"):
        spread(rows("string")).ingest(rows("string"))


def test_the_first_row_comes_while_ids_are_read() -> None:
    """Until then it is not known what a text stands for."""
    engine = RiskEngine(users=10, time_unit="s", max_ahead=None)
    service = Service.of(engine)
    came = iter([lambda: engine.add(17, 2.5, 0), lambda: None])

    def work() -> float:
        users = service.users_of(["17"])
        next(came)()
        return float(service.scores(users)[0][0].as_py())

    assert service.settled(work) == 2.5
    with pytest.raises(SchemaError, match="integer in decimal"):
        service.settled(lambda: service.users_of(["x"]))


@pytest.mark.parametrize("amounts", [[-12.5, 2.25], [9e11] * 500, [-9e11] * 500])
def test_sums_are_exact_texts(amounts: list[float]) -> None:
    engine = RiskEngine(users=10, max_ahead=None)
    engine.ingest({"user_id": ["a"] * len(amounts), "amount": amounts, "timestamp": np.zeros(len(amounts), "datetime64[s]")})
    features, at_ns = Service.of(engine).features_of_one("a")
    told = features_json("a", features, at_ns, 4)
    assert (told["sum"], told["count"]) == (f"{engine.features(['a'])['sum'][0].as_py():f}", len(amounts))
