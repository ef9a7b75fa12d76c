"""The public interface by example: what a user of the library can do, and what happens when the input is wrong."""

from __future__ import annotations

import datetime
import math
import threading
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engine import CapacityError, ConfigError, EngineError, RiskEngine, SchemaError, TimeTooOldError
from engine.config import REASONS
from engine.shard import UserFeatures

SECOND = 10**9

#: polars strings are views, which pyarrow can cast from 18 on.
VIEWS = int(pa.__version__.split(".")[0]) >= 18


def make(**options: Any) -> RiskEngine:
    """A small engine in simulated time, with times in seconds."""
    return RiskEngine(**({"users": 100, "max_ahead": None, "time_unit": "s"} | options))


def rows(*rows: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Columns of (user, amount, second) rows."""
    users, amounts, times = zip(*rows, strict=True)
    return {"user_id": pa.array(users), "amount": pa.array(amounts), "timestamp": pa.array(times)}


def second(count: float) -> np.datetime64:
    """An instant so many seconds after the epoch."""
    return np.datetime64(int(count * SECOND), "ns")


class TestRowsIn:
    """ingest and add."""

    def test_row_scores_include_the_row_itself(self) -> None:
        result = make().ingest(rows(("a", 10.0, 0), ("b", 3.5, 1), ("a", 15.0, 2)), scores=True)
        assert result.scores.equals(pa.array([10.0, 3.5, 12.5]))
        assert (result.rows, result.accepted, result.rejected, result.rounded) == (3, 3, {}, 0)

    def test_scores_are_left_out_unless_asked_for(self) -> None:
        assert make().ingest(rows(("a", 1, 0))).scores is None

    def test_add_and_ingest_are_the_same(self) -> None:
        stream = [("a", 1.25, 0), ("a", 2.5, 30), ("b", -1.0, 60), ("a", 4.0, 61), ("a", 8.0, 59)]
        one, other = make(), make()
        scores = [one.add(*row) for row in stream]
        assert scores == other.ingest(rows(*stream), scores=True).scores.to_pylist()
        assert one.digest() == other.digest()
        assert one.stats().accepted == other.stats().accepted == 5

    @pytest.mark.parametrize(
        "instant",
        [
            datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            datetime.datetime(2026, 1, 1),
            datetime.datetime(2026, 1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
            datetime.date(2026, 1, 1),
            np.datetime64("2026-01-01"),
            np.datetime64("2026-01-01T00:00:00.000000000"),
            pd.Timestamp("2026-01-01T00:00:00Z"),
            pd.Timestamp("2026-01-01T01:00:00+01:00"),
            pa.scalar(1767225600, pa.timestamp("s")),
            pa.scalar(1767225600000000000, pa.timestamp("ns", "UTC")),
            "2026-01-01T00:00:00Z",
            "2026-01-01T02:00:00.000000000+02:00",
            "2026-01-01",
            1767225600,
        ],
    )
    def test_add_takes_every_kind_of_instant(self, instant: object) -> None:
        engine = make()
        engine.add("a", 1, instant)
        assert engine.stats().clock == np.datetime64("2026-01-01T00:00:00", "ns")

    @pytest.mark.parametrize(
        ("amount", "units", "rounded"),
        [
            (1, 10_000, 0),
            (np.int8(-1), -10_000, 0),
            (0.1, 1_000, 0),
            (0.12345, 1_235, 1),  # the float lies above the tie
            (np.float32(0.1), 1_000, 0),
            (Decimal("0.00005"), 0, 1),  # a tie goes to the even
            (Decimal("0.00015"), 2, 1),
            (-0.0, 0, 0),
            (5e-324, 0, 1),
            (pa.scalar(Decimal("1.5")), 15_000, 0),
        ],
    )
    def test_add_puts_amounts_on_the_grid(self, amount: object, units: int, rounded: int) -> None:
        engine = make()
        engine.add("a", amount, 0)
        assert engine.explain("a").sum == Decimal(units).scaleb(-4)
        assert engine.stats().rounded == rounded

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ((None, None, None), "null_user"),
            (("a", None, None), "null_amount"),
            (("a", math.nan, None), "null_timestamp"),
            (("a", math.nan, 0), "amount_not_finite"),
            (("a", math.inf, 0), "amount_not_finite"),
            (("a", Decimal("-Infinity"), 0), "amount_not_finite"),
            (("a", 2**53, 2**62), "amount_out_of_range"),
            (("a", Decimal("1e999999"), 0), "amount_out_of_range"),
            (("a", 1, 2**62), "timestamp_out_of_range"),
        ],
    )
    def test_add_of_a_bad_row_gives_nan_and_counts_the_reason(self, row: tuple[Any, Any, Any], reason: str) -> None:
        engine = make()
        assert math.isnan(engine.add(*row))
        assert engine.stats().rejected == {reason: 1}
        assert engine.stats().clock is None

    @pytest.mark.parametrize(
        ("row", "text"),
        [
            (("a", "1", 0), "amount='1' is no amount"),
            (("a", True, 0), "amount=True is no amount"),
            ((1.5, 1, 0), "column 'user_id' has type double"),
            ((True, 1, 0), "column 'user_id' has type bool"),
            (("a", 1, 1.5), "timestamp=1.5 is no instant"),
            (("a", 1, "yesterday"), "timestamp='yesterday' is no instant"),
            (("a", 1, "2026-01-01T00:00:00.1234567890"), "one to nine digits"),
            (("a", 1, np.datetime64("NaT")), "not a time"),
        ],
    )
    def test_add_of_a_wrong_type_raises_and_changes_nothing(self, row: tuple[Any, Any, Any], text: str) -> None:
        engine = make()
        with pytest.raises(SchemaError, match=text):
            engine.add(*row)
        assert engine.stats().rows == 0

    def test_add_of_a_number_without_unit_is_refused(self) -> None:
        with pytest.raises(SchemaError, match="number without a unit"):
            RiskEngine(users=1).add("a", 1, 5)

    def test_every_reason_has_its_rows_in_rejects(self) -> None:
        """One row for each reason of S12, in an engine whose wall clock stands at 1000 s."""
        engine = make(max_ahead="10s", max_jump="500s", now=lambda: 1000 * SECOND, decimals=0)
        most = 2**53
        stream = {
            "user_id": pa.array(["a", None, "a", "a", "a", "a", "a", "a", "b", "a", "c"]),
            "amount": pa.array([1.0, 1.0, None, 1.0, math.nan, 1e300, 1.0, 1.0, 1.0, 1.0, 1.0]),
            "timestamp": pa.array([500, 500, 500, None, 500, 500, 2**62, 1011, 1001, 439, 440]),
            "note": pa.array([f"row {row}" for row in range(11)]),
        }
        result = engine.ingest(stream, scores=True)
        assert result.rejected == {reason: 1 for reason in REASONS if reason not in ("sum_overflow",)}
        assert result.accepted == 2
        assert result.scores.to_pylist() == [1.0, *[None] * 9, 1.0]
        rejects = result.rejects()
        assert rejects.column_names == ["user_id", "amount", "timestamp", "note", "reason"]
        assert rejects["note"].to_pylist() == [f"row {row}" for row in range(1, 10)]
        assert rejects["reason"].to_pylist() == [
            "null_user", "null_amount", "null_timestamp", "amount_not_finite", "amount_out_of_range",
            "timestamp_out_of_range", "future", "jump", "late",
        ]  # fmt: skip
        # 512 rows of 2**53 are 2**62 and fit; one unit more does not, but moves the clock (S6).
        full = engine.ingest(rows(*[("d", most, 500)] * 512, ("d", 1, 501)), scores=True)
        assert full.rejected == {"sum_overflow": 1}
        assert full.scores.to_pylist()[510:] == [float(most), float(most), None]
        assert engine.stats().clock == second(501)
        assert engine.stats().rejected == dict.fromkeys(REASONS, 1)

    def test_rejects_of_a_clean_batch_have_the_columns(self) -> None:
        rejects = make().ingest(rows(("a", 1, 0))).rejects()
        assert rejects.num_rows == 0
        assert rejects.column_names == ["user_id", "amount", "timestamp", "reason"]

    def test_future_is_measured_from_the_wall_clock_at_its_edge(self) -> None:
        engine = make(max_ahead="10s", now=lambda: 0)
        assert engine.ingest(rows(("a", 1, 10), ("a", 1, 11))).rejected == {"future": 1}
        wall = [0]
        engine = make(max_ahead="0s", now=lambda: wall[0])
        assert math.isnan(engine.add("a", 1, 5))
        wall[0] = 5 * SECOND
        assert engine.add("a", 1, 5) == 1.0

    def test_empty_batches_are_nothing(self) -> None:
        engine = make()
        empty = pa.table({"user_id": pa.array([], pa.string()), "amount": pa.array([], pa.int64()), "timestamp": pa.array([], pa.int64())})
        result = engine.ingest(empty, scores=True)
        assert (result.rows, result.scores.to_pylist()) == (0, [])
        assert engine.ingest(pa.RecordBatchReader.from_batches(empty.schema, []), scores=True).scores.to_pylist() == []
        assert engine.add(7, 1, 0) == 1.0  # the empty strings did not decide the kind

    def test_a_batch_of_null_ids_does_not_decide_the_kind(self) -> None:
        engine = make()
        assert engine.ingest({"user_id": [None], "amount": [1], "timestamp": [0]}).rejected == {"null_user": 1}
        assert engine.add("a", 1, 0) == 1.0


class TestAllOrNothing:
    """S13: what raises has changed nothing, and the engine goes on."""

    @pytest.mark.parametrize(
        ("data", "error", "text"),
        [
            (rows((1, 1, 5)), SchemaError, "int64 ids, but the engine's users have string ids"),
            (rows((b"a", 1, 5)), SchemaError, "binary ids"),
            ({"user": ["a"], "amount": [1], "timestamp": [5]}, SchemaError, "user_id"),
            ({"user_id": ["a"], "amount": ["1"], "timestamp": [5]}, SchemaError, "amount"),
            ({"user_id": ["a"], "amount": [1], "timestamp": [1.5]}, SchemaError, "timestamp"),
            (pa.table({}), SchemaError, "user_id"),
            (rows(*[(f"new {n}", 1, 5) for n in range(9)]), CapacityError, "10 users"),
            (42, SchemaError, "cannot be read"),
            ("no such file.parquet", SchemaError, "no such file"),
        ],
    )
    @pytest.mark.parametrize("shards", [1, 3])
    def test_nothing_is_applied(self, data: Any, error: type[EngineError], text: str, shards: int) -> None:
        engine = make(users=9, shards=shards)
        engine.ingest(rows(("a", 1, 0)))
        before, stats = engine.digest(), engine.stats()
        with pytest.raises(error, match=text):
            engine.ingest(data)
        assert engine.digest() == before
        assert replace(engine.stats(), bytes=0) == replace(stats, bytes=0)  # touched memory stays touched
        for shard in engine._core.shards:
            shard.check("string")
        assert engine.add("b", 2, 1) == 2.0

    def test_a_whole_table_is_one_unit(self) -> None:
        engine = make(users=2)
        table = pa.concat_tables([pa.table(rows(("a", 1, 0))), pa.table(rows(("b", 1, 0), ("c", 1, 0)))])
        with pytest.raises(CapacityError, match="nothing of it was applied"):
            engine.ingest(table)
        assert len(engine) == 0
        assert engine.stats().clock is None

    def test_a_stream_is_applied_batch_by_batch_and_says_how_far(self) -> None:
        engine = make(users=2)
        first, other = pa.table(rows(("a", 1, 0))), pa.table(rows(("b", 1, 0), ("c", 1, 0)))
        reader = pa.RecordBatchReader.from_batches(first.schema, [*first.to_batches(), *other.to_batches()])
        with pytest.raises(CapacityError) as caught:
            engine.ingest(reader)
        assert caught.value.__notes__ == ["1 rows of earlier batches of this source are applied"]
        assert "a" in engine
        assert "b" not in engine

    @pytest.mark.parametrize("one", [True, False])
    def test_an_interrupted_batch_makes_the_engine_unusable(self, monkeypatch: pytest.MonkeyPatch, one: bool) -> None:
        """Ctrl-C between two shards: half of the batch is in, and no score may be given from that."""
        engine = make()
        engine.add("a", 1, 0)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine._core.shards, "add" if one else "apply", interrupted)
        apply = (lambda: engine.add("a", 1, 1)) if one else (lambda: engine.ingest(rows(("a", 1, 1))))
        with pytest.raises(KeyboardInterrupt):
            apply()
        for use in (lambda: engine.score("a"), lambda: engine.add("a", 1, 2), engine.stats):
            with pytest.raises(EngineError, match="interrupted half-way"):
                use()

    @pytest.mark.parametrize("kind", ["int64", "string", "binary"])
    def test_rows_one_by_one_are_rows_of_a_batch(self, kind: str) -> None:
        """The short way of `add` and `score` gives what arrays give: scores, totals, reasons and state."""
        random = np.random.default_rng(11)
        count = 3_000
        numbers = random.integers(-5, 12, count)
        users = {"int64": numbers.tolist(), "string": [f"u{n}" for n in numbers], "binary": [b"\xff" * (n + 5) for n in numbers]}[kind]
        amounts = np.round(random.normal(0, 100, count), random.integers(0, 7)).tolist()
        amounts[7], amounts[8], amounts[9] = math.nan, 1e300, 900_719_925_474.0992
        times = (np.arange(count) * 700 + random.integers(-90_000, 20_000, count)).tolist()
        for shards in (1, 3):
            options = {"shards": shards, "max_jump": "15s", "time_unit": "ms", "users": 17}
            one, all_ = RiskEngine(max_ahead=None, **options), RiskEngine(max_ahead=None, **options)
            singly = [one.add(*row) for row in zip(users, amounts, times, strict=True)]
            batch = {"user_id": users, "amount": amounts, "timestamp": times}
            together = all_.ingest(batch, scores=True).scores.to_pylist()
            assert [None if math.isnan(score) else score for score in singly] == together
            assert one.digest() == all_.digest()
            ours, theirs = one.stats(), all_.stats()
            assert (ours.rejected, ours.rounded, ours.rows, ours.users) == (theirs.rejected, theirs.rounded, theirs.rows, theirs.users)
            assert {"late", "jump", "amount_not_finite", "amount_out_of_range"} <= set(ours.rejected)
            known = sorted(set(users))
            for at in (None, np.datetime64(max(times) + 40_000, "ms")):
                assert [one.score(user, at=at) for user in known] == all_.scores(known, at=at).tolist()
            for shard in one._core.shards:
                shard.check(kind)

    def test_users_may_come_and_go_within_one_batch(self) -> None:
        """Two seats, five users: each is gone before the next one but one comes."""
        stream = rows(*[(name, 1, 200 * n) for n, name in enumerate("abcde")])
        for shards in (1, 2, 3):
            engine = make(users=1, shards=shards)
            assert engine.ingest(stream, scores=True).scores.to_pylist() == [1.0] * 5
            assert engine.features()["user_id"].to_pylist() == ["e"]
            for shard in engine._core.shards:
                shard.check("string")

    def test_mixed_integers(self) -> None:
        engine = make()
        engine.ingest({"user_id": pa.array([2**63], pa.uint64()), "amount": [1], "timestamp": [0]})
        with pytest.raises(SchemaError, match="row 1: -1 does not fit the engine's uint64 ids"):
            engine.ingest({"user_id": [5, -1], "amount": [1, 1], "timestamp": [0, 0]})
        engine.ingest({"user_id": pa.array([5, None], pa.int8()), "amount": [1, 1], "timestamp": [0, 0]})
        assert engine.features()["user_id"].to_pylist() == [5, 2**63]
        assert engine.scores(pa.array([5, -1, None])).to_pylist() == [1.0, 0.0, None]
        engine = make()
        engine.add(-1, 1, 0)
        with pytest.raises(SchemaError, match=f"row 0: {2**63} does not fit the engine's int64 ids"):
            engine.ingest({"user_id": pa.array([2**63], pa.uint64()), "amount": [1], "timestamp": [0]})
        assert engine.scores(np.array([2**64 - 1], np.uint64)).tolist() == [0.0]  # not the user -1


class TestScoresOut:
    """score, scores, features, top, explain."""

    @pytest.fixture
    def engine(self) -> RiskEngine:
        engine = make()
        engine.ingest(rows(("a", 10, 0), ("a", 20, 30), ("b", 40, 30), ("c", -5, 60), ("d", 1, 60), ("d", -1, 60)))
        return engine

    def test_scores_decay_with_nothing_arriving(self, engine: RiskEngine) -> None:
        at = [second(60), second(60) + 1, second(90), second(90) + 1]
        assert [engine.score("a", at=instant) for instant in at] == [15.0, 20.0, 20.0, 0.0]
        assert engine.score("a") == 15.0  # reads change nothing

    def test_lookups_in_every_form(self, engine: RiskEngine) -> None:
        wanted = [15.0, 0.0, 40.0]
        users = ["a", "unknown", "b"]
        assert engine.scores(users).tolist() == wanted
        assert engine.scores(np.array(users)).tolist() == wanted
        assert engine.scores(tuple(users)).tolist() == wanted
        for arrow in (
            pa.array(users),
            pa.array(users, pa.large_string()),
            pa.chunked_array([users[:1], users[1:]]),
            pa.array(users).dictionary_encode(),
            *([pl.Series(users)] if VIEWS else []),
            *([pd.Series(users, dtype="string[pyarrow]")] if hasattr(pd.Series, "__arrow_c_stream__") else []),
        ):
            answer = engine.scores(arrow)
            assert isinstance(answer, pa.DoubleArray)
            assert answer.to_pylist() == wanted

    def test_nulls_in_a_lookup_give_nulls(self, engine: RiskEngine) -> None:
        assert engine.scores(pa.array(["a", None])).to_pylist() == [15.0, None]
        assert math.isnan(engine.scores(["a", None])[1])
        assert engine.scores(pa.array([None, None])).to_pylist() == [None, None]
        assert engine.scores([]).tolist() == []

    def test_lookups_of_another_kind_are_refused(self, engine: RiskEngine) -> None:
        for look in (lambda: engine.score(7), lambda: engine.scores([7]), lambda: engine.features([b"a"]), lambda: engine.explain(7)):
            with pytest.raises(SchemaError, match="string ids"):
                look()
        with pytest.raises(SchemaError, match="not a list of ids"):
            engine.scores("a")
        with pytest.raises(SchemaError):
            engine.scores(["a", 7])

    def test_the_oldest_exact_instant(self, engine: RiskEngine) -> None:
        assert engine.score("a", at=second(0)) == 10.0
        with pytest.raises(TimeTooOldError, match=r"at=1969-12-31T23:59:59\.999999999Z is before 1970-01-01T00:00:00Z"):
            engine.score("a", at=second(0) - 1)

    @pytest.mark.parametrize(
        ("at", "text"), [(60, "without a unit"), ("soon", "is no instant"), ("9999-01-01", "beyond"), (None, ""), (1.5, "is no instant")]
    )
    def test_bad_instants(self, engine: RiskEngine, at: Any, text: str) -> None:
        if at is None:
            assert engine.score("b", at=None) == 40.0
        else:
            with pytest.raises(ConfigError, match=text):
                engine.score("a", at=at)

    def test_the_wall_clock(self) -> None:
        wall = [50 * SECOND]
        engine = make(clock="wall", now=lambda: wall[0])
        engine.add("a", 10, 60)
        assert engine.score("a") == 10.0  # the clock is the later of the two
        wall[0] = 121 * SECOND
        assert engine.score("a") == 0.0
        assert make(now=lambda: wall[0]).score("a", at="now") == 0.0

    def test_features(self, engine: RiskEngine) -> None:
        table = engine.features(["a", "nobody", "d"], at=second(60))
        assert table.schema == pa.schema(
            {
                "user_id": pa.string(),
                "count": pa.int64(),
                "sum": pa.decimal128(38, 4),
                "score": pa.float64(),
                "newest": pa.timestamp("ns", "UTC"),
                "valid_until": pa.timestamp("ns", "UTC"),
                "zero_at": pa.timestamp("ns", "UTC"),
            }
        )
        times = [table[name].cast(pa.int64()).to_pylist() for name in ("newest", "valid_until", "zero_at")]
        assert table["count"].to_pylist() == [2, 0, 2]
        assert table["sum"].to_pylist() == [Decimal("30.0000"), Decimal("0.0000"), Decimal("0.0000")]
        assert table["score"].to_pylist() == [15.0, 0.0, 0.0]
        assert times[0] == [30 * SECOND, None, 60 * SECOND]
        assert times[1] == [60 * SECOND, None, 120 * SECOND]
        assert times[2] == [90 * SECOND + 1, None, 120 * SECOND + 1]

    def test_features_of_all_are_ordered_by_user_whatever_the_shards(self) -> None:
        tables = []
        for shards in (1, 2, 7):
            engine = make(shards=shards)
            engine.ingest(rows(*[(f"user {n}", n, n) for n in range(50)]))
            tables.append(engine.features())
        assert tables[0]["user_id"].to_pylist() == sorted(f"user {n}" for n in range(50))
        assert tables[0].equals(tables[1])
        assert tables[0].equals(tables[2])

    def test_top(self, engine: RiskEngine) -> None:
        engine.add("e", 15, 60)
        assert engine.top(3)["user_id"].to_pylist() == ["b", "a", "e"]  # a and e are equal: by id
        assert engine.top()["user_id"].to_pylist() == ["b", "a", "e", "d", "c"]
        assert engine.top(2, by="count")["user_id"].to_pylist() == ["a", "d"]
        assert engine.top(1, by="sum")["user_id"].to_pylist() == ["b"]
        assert engine.top(3, by="newest")["user_id"].to_pylist() == ["c", "d", "e"]
        assert engine.top(0).num_rows == 0
        assert engine.top(5, at=second(121)).num_rows == 0
        assert make().top().num_rows == 0
        with pytest.raises(ConfigError, match="by='risk'"):
            engine.top(by="risk")
        with pytest.raises(ConfigError, match="k=-1"):
            engine.top(-1)

    def test_top_in_parts_lets_others_in_and_finds_what_top_does(self) -> None:
        engine = make(users=200_000, shards=1)
        users = 100_000  # more than three parts
        ids = np.arange(users)
        amounts = ids * 7919 % users
        engine.ingest({"user_id": ids, "amount": amounts, "timestamp": np.full(users, second(0))})
        found = engine.top_in_parts(5, by="sum")
        greatest = np.argsort(-amounts).tolist()
        assert next(found)["user_id"].to_pylist() == np.argsort(-amounts[:16384])[:5].tolist()
        engine.add(99_999, 10**9, second(1))  # of a part that was not looked at yet
        engine.add(0, 10**9, second(1))  # was looked at
        *_, last = found
        assert last["user_id"].to_pylist() == [99_999, *greatest[:4]]
        assert engine.top(5, by="sum")["user_id"].to_pylist() == [99_999, 0, *greatest[:3]]
        *_, last = engine.top_in_parts(5, by="sum")
        assert last.equals(engine.top(5, by="sum"))

    def test_top_in_parts_passes_over_users_who_are_gone(self) -> None:
        engine = make(users=200_000, shards=1)
        engine.ingest(
            {"user_id": [f"{user:06}" for user in range(50_000)], "amount": np.ones(50_000), "timestamp": np.full(50_000, second(0))}
        )
        found = engine.top_in_parts(2)
        next(found)
        engine.add("000001", 5, second(1_000))
        engine.expire()
        *_, last = found
        assert last["user_id"].to_pylist() == ["000000", "000001"]  # as they stood when they were looked at
        *_, last = engine.top_in_parts(2)
        assert last["user_id"].to_pylist() == ["000001"]
        assert [len(table) for table in make().top_in_parts()] == [0]
        with pytest.raises(ConfigError, match="by='risk'"):
            next(engine.top_in_parts(by="risk"))

    def test_equals_in_top_are_ordered_by_user(self) -> None:
        engine = make()
        engine.ingest(rows(*[(f"{user:02}", 1, 0) for user in reversed(range(30))]))
        assert engine.top(7)["user_id"].to_pylist() == [f"{user:02}" for user in range(7)]

    def test_explain(self, engine: RiskEngine) -> None:
        explanation = engine.explain("a", at=second(60))
        assert (explanation.score, explanation.sum, explanation.count) == (15.0, Decimal("30.0000"), 2)
        assert explanation.window == (second(0), second(60))
        assert explanation.transactions["amount"].to_pylist() == [Decimal("10.0000"), Decimal("20.0000")]
        assert explanation.transactions["timestamp"].cast(pa.int64()).to_pylist() == [0, 30 * SECOND]
        assert explanation.reason == "2 transactions in the window, sum 30.0000"
        assert engine.explain("b").reason == "1 transaction in the window, sum 40.0000"
        assert "newest before it is of 1970-01-01T00:00:30Z" in engine.explain("a", at=second(91)).reason
        assert "first after it is of 1970-01-01T00:00:30Z" in engine.explain("b", at=second(1)).reason
        assert engine.explain("nobody").reason == "0.0: the user has no retained transaction"
        assert make().explain("a").count == 0
        assert "&lt;" not in explanation._repr_html_()

    def test_explain_is_of_one_instant(self) -> None:
        """Though the wall clock goes on meanwhile."""
        walls = iter(range(0, 10**6, 61))
        engine = make(clock="wall", now=lambda: next(walls) * SECOND)
        engine.add("a", 10, second(0))
        explanation = engine.explain("a")
        assert explanation.score * explanation.count == float(explanation.sum) == 10.0

    def test_right_closed_windows_leave_out_the_old_edge(self) -> None:
        engine = make(closed="right")
        engine.ingest(rows(("a", 10, 0), ("a", 20, 60)), scores=True)
        assert engine.score("a") == 20.0
        assert engine.features(["a"])["valid_until"].cast(pa.int64()).to_pylist() == [120 * SECOND - 1]
        assert engine.explain("a").window[0] == second(0) + 1


class TestTheWhole:
    """Expiry, statistics, digest, representations, threads."""

    def test_expire_frees_and_changes_no_answer(self) -> None:
        engine = make()
        engine.ingest(rows(("a", 1, 0), ("b", 2, 100), ("c", 3, 121)))
        before = engine.digest(), engine.stats().users, engine.features().to_pylist()
        assert before[1] == 2  # a is no longer retained, freed or not
        assert engine.expire(at=second(120)) == 0
        assert engine.expire(at="2200-01-01") == 1  # never later than the clock
        assert engine.expire() == 0
        assert (engine.digest(), engine.stats().users, engine.features().to_pylist()) == before
        assert make().expire() == 0

    def test_memory_follows_activity(self) -> None:
        """A hundred thousand users in turn through an engine of a thousand: slots, rings, index and id bytes are used again (S15)."""
        engine = make(users=1_000, time_unit="ms", shards=2)
        used = []
        for turn in range(100):
            users = [f"user {turn * 1000 + n} {'x' * (n % 90)}" for n in range(1_000)]
            engine.ingest(rows(*[(users[n % 1000], 1, turn * 200_000 + n // 10) for n in range(4_000)]))
            used.append(engine.stats().bytes)
        assert engine.stats().users == 1_000
        assert used[-1] <= 1.1 * used[4]
        for shard in engine._core.shards:
            shard.check("string")

    def test_the_arena_is_compacted_when_most_of_it_is_free(self) -> None:
        engine = make(users=30_000, shards=1)
        long, short = "long" * 25, "s"
        engine.ingest(rows(*[(f"{n} {long}", 1, 0) for n in range(30_000)]))
        before = engine.stats().bytes
        engine.ingest(rows(*[(f"{n} {short}", 1, 500) for n in range(3_000)]))
        engine.expire()
        assert engine.stats().bytes < before - 2_000_000
        assert engine.score("2999 s") == 1.0
        for shard in engine._core.shards:
            shard.check("string")

    def test_hot_user(self) -> None:
        """One user with many transactions in the window, some of them late: each score is the plain mean."""
        engine = make(time_unit="ns", window="1us", lateness="1us", users=1)
        random = np.random.default_rng(3)
        times = np.arange(3_000) * 2 - random.integers(0, 900, 3_000) * (random.random(3_000) < 0.2)
        amounts = random.integers(-1000, 1000, 3_000)
        kept: list[tuple[int, int]] = []
        wanted = []
        for time, amount in zip(times.tolist(), amounts.tolist(), strict=True):
            kept.append((time, amount))
            window = [value for when, value in kept if time - 1000 <= when <= time]
            wanted.append(sum(window) / len(window))
        got = engine.ingest({"user_id": np.full(3_000, 7), "amount": amounts, "timestamp": times}, scores=True)
        assert got.scores.to_pylist() == wanted

    def test_stats_and_representations(self) -> None:
        engine = make()
        assert "no rows yet" in repr(engine)
        result = engine.ingest(rows(("<b>", 1.23456, 0), (None, 1.0, 0)))
        assert repr(engine) == ("RiskEngine(window=60s, closed='both', users=1 of 100, clock 1970-01-01T00:00:00Z, 2 rows)")
        stats = engine.stats()
        assert (stats.users, stats.transactions, stats.rows, stats.accepted, stats.rounded) == (1, 1, 2, 1, 1)
        assert stats.rejected == {"null_user": 1}
        assert stats.bytes > 0
        assert "null_user" in result._repr_html_()
        assert "null_user" in engine._repr_html_()
        assert "<b>" not in engine.explain("<b>")._repr_html_()

    def test_length_membership_truth(self) -> None:
        engine = make()
        assert len(engine) == 0
        assert engine
        assert "a" not in engine
        engine.add("a", 1, 0)
        assert len(engine) == 1
        assert "a" in engine
        engine.add("b", 1, 121)
        assert "a" not in engine
        assert len(engine) == 1

    def test_arrow_stream_of_the_engine(self) -> None:
        engine = make()
        engine.add("a", 1, 0)
        assert pa.table(engine).equals(engine.features())
        assert pl.DataFrame(engine)["user_id"].to_list() == ["a"]

    def test_closed_engine(self) -> None:
        with make(shards=2) as engine:
            engine.ingest(rows(*[(n, 1, 0) for n in range(100)] * 100))
        assert repr(engine) == "RiskEngine(closed)"
        engine.close()
        for use in (lambda: engine.score(1), lambda: engine.add(1, 1, 0), engine.stats, lambda: engine.ingest(rows((1, 1, 0)))):
            with pytest.raises(EngineError, match="closed"):
                use()

    def test_digest_does_not_depend_on_order_of_users_shards_or_capacity(self) -> None:
        stream = [(n % 10, n, n // 10) for n in range(200)]
        digests = set()
        for shards, users in ((1, 10), (2, 100), (7, 5_000)):
            engine = make(shards=shards, users=users)
            engine.ingest(rows(*sorted(stream, key=lambda row: (row[2], -row[0]))))
            digests.add(engine.digest())
        assert len(digests) == 1
        assert make().digest() != make(window="61s").digest()

    def test_readers_see_whole_batches(self) -> None:
        """Each batch adds 1 and -1 to a user at one time: a reader that saw half of one would find a sum other than 0."""
        engine = make(users=4_000, shards=2)
        users = np.repeat(np.arange(4_000), 2)
        stop, wrong = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                if engine.scores(np.arange(4_000)).any() or engine.score(7) or (engine.features()["sum"].to_numpy() != 0).any():
                    wrong.append("half a batch")

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for turn in range(60):
            engine.ingest({"user_id": users, "amount": np.tile([1, -1], 4_000), "timestamp": np.full(8_000, turn)})
        stop.set()
        for reader in readers:
            reader.join()
        assert wrong == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 60}, "has no unit"),
        ({"window": "60"}, "is not a duration"),
        ({"window": "0s"}, "is empty"),
        ({"window": "-1s"}, "is not a duration"),
        ({"window": "0.5ns"}, "whole number of nanoseconds"),
        ({"window": "40000d"}, "36 years"),
        ({"window": np.timedelta64("NaT")}, "not a duration"),
        ({"lateness": datetime.timedelta(seconds=-1)}, "between 0 and"),
        ({"closed": "left"}, "closed='left' must be one of"),
        ({"decimals": 9}, "decimals=9"),
        ({"decimals": True}, "decimals=True"),
        ({"users": 0}, "users=0"),
        ({"users": 1.5}, "users=1.5"),
        ({"shards": 0}, "shards=0"),
        ({"clock": "sun"}, "clock='sun'"),
        ({"time_unit": "minutes"}, "time_unit='minutes'"),
        ({"user_id": ""}, "name of a column"),
        ({"amount": "timestamp"}, "three different columns"),
        ({"max_jump": 5}, "max_jump=5 has no unit"),
    ],
)
def test_bad_configuration(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RiskEngine(**options)


@pytest.mark.parametrize("window", ["1m", "60s", "60000ms", "0.5m30s", datetime.timedelta(minutes=1), np.timedelta64(60, "s")])
def test_durations(window: Any) -> None:
    assert make(window=window).config.window_ns == 60 * SECOND


class TestFoundByUsers:
    """Each of these was a bug once."""

    def test_rejected_rows_of_a_polars_frame(self) -> None:
        """Arrow cannot take rows of string views; the error came after the rows were applied."""
        engine = make()
        frame = pa.table(
            {
                "user_id": pa.array(["a", None, None, "b", None]).cast(pa.string_view())
                if VIEWS
                else pa.array(["a", None, None, "b", None]),
                "amount": [1, 2, 3, 4, 5],
                "timestamp": [0, 0, 0, 0, 0],
            }
        )
        result = engine.ingest(frame)
        assert result.rejects()["amount"].to_pylist() == [2, 3, 5]
        assert engine.stats().rows == 5

    def test_a_stream_of_several_batches_without_scores(self) -> None:
        """Scores that nobody had asked for were put together all the same."""
        table = pa.table(rows(("a", 1, 0), (None, 1, 0), ("b", 1, 0), (None, 2, 0)))
        engine = make()
        result = engine.ingest(table.to_reader(1))
        assert (result.rows, result.accepted, result.rejected, result.scores) == (4, 2, {"null_user": 2}, None)
        assert result.rejects()["amount"].to_pylist() == [1, 2]
        assert make().ingest(table.to_reader(1), scores=True).scores.to_pylist() == [1.0, None, 1.0, None]


@pytest.mark.parametrize("kind", ["int64", "uint64", "string", "binary"])
def test_features_of_one_user_are_those_of_many(kind: str) -> None:
    """Users with a line and with a ring, unknown ones, sums below zero, instants before and after the clock."""
    random = np.random.default_rng(11)
    numbers = np.minimum(random.integers(0, 300, 3000), random.integers(0, 300, 3000))
    ids: dict[str, Any] = {
        "int64": pa.array(numbers - 3),
        "uint64": pa.array(numbers.astype(np.uint64) + np.uint64(2**63 - 2)),
        "string": pa.array([f"u{number}" for number in numbers]),
        "binary": pa.array([bytes([number % 256, 0]) for number in numbers.tolist()], pa.binary()),
    }
    strangers: dict[str, Any] = {"int64": [-99, 2**63], "uint64": [-1, 0, 2**64 - 1], "string": ["", "x"], "binary": [b"", b"\0"]}
    engine = RiskEngine(users=1000, max_ahead=None, time_unit="s")
    assert engine.features_of_one("anyone")[0] == UserFeatures()
    times = np.sort(random.integers(0, 150, 3000))
    engine.ingest({"user_id": ids[kind], "amount": random.integers(-900, 500, 3000) / 8, "timestamp": times})
    for user in [*pc.unique(ids[kind]).to_pylist()[:80], *strangers[kind]]:
        for at in (None, "1970-01-01T00:01:45.5Z", "1970-01-01T00:02:29Z", "1970-01-01T00:03:20Z", "1970-01-01T00:09:00Z"):
            found, at_ns = engine.features_of_one(user, at=at)
            asked = pa.array([user], ids[kind].type) if user in pc.unique(ids[kind]).to_pylist() else [user]
            table = engine.features(asked, at=at)
            (row,) = table.select(["count", "sum", "score"]).to_pylist()
            assert (found.count, Decimal(found.sum_units).scaleb(-4), found.score) == (row["count"], row["sum"], row["score"])
            for name in ("newest", "valid_until", "zero_at"):
                assert getattr(found, f"{name}_ns") == table[name].cast(pa.int64())[0].as_py()
            assert at is None or at_ns == int(np.datetime64(at[:-1], "ns"))
    with pytest.raises(SchemaError):
        engine.features_of_one(1.5)
    with pytest.raises(SchemaError, match="ids"):
        engine.features_of_one("u1" if kind != "string" else 7)
    with pytest.raises(TimeTooOldError):
        engine.features_of_one(strangers[kind][0], at="1970-01-01")
