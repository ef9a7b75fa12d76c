"""Readers and savers beside a writer: each answer is that of a state between two batches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import EngineError, RiskEngine
from engine.config import Config
from engine.reference import Reference

SECOND = 10**9


def make(**options: Any) -> RiskEngine:
    """A small engine in simulated time, with times in seconds."""
    return RiskEngine(**({"users": 100, "max_ahead": None, "time_unit": "s", "shards": 1} | options))


def rows(users: Any, amounts: Any = 1, times: Any = 0) -> dict[str, Any]:
    """Columns, a scalar standing for all rows."""
    count = len(users)
    return {"user_id": users, "amount": np.broadcast_to(amounts, count).copy(), "timestamp": np.broadcast_to(times, count).copy()}


class TestThreads:
    """What many threads see while one ingests.

    Each batch gives all users one transaction of the same amount, so in a state between two batches all users are alike, and
    their score tells which state it is.
    """

    @pytest.mark.parametrize(("count", "shards", "last"), [(16, 1, 100), (16, 3, 100), (4_200, 2, 40)])
    def test_no_answer_is_torn(self, count: int, shards: int, last: int, tmp_path: Path) -> None:
        options = {"window": "10s", "users": count, "shards": shards}
        users = [f"user {k}" for k in range(count)]
        batches = [rows(pa.array(users), amounts=k * k, times=k) for k in range(1, last + 1)]
        with make(**options) as alone:  # what each state is, from an engine that nobody disturbs
            wanted = [(0.0, 0, alone.digest())]
            for batch in batches:
                alone.ingest(batch)
                wanted.append((alone.score(users[0]), alone.stats().transactions, alone.digest()))
        state_of = {score: number for number, (score, _, _) in enumerate(wanted)}
        assert len(state_of) == len(wanted)
        transactions_of = {number: transactions for number, (_, transactions, _) in enumerate(wanted)}
        number_of_digest = {digest: number for number, (_, _, digest) in enumerate(wanted)}
        engine, done = make(**options), threading.Event()
        faults: list[BaseException] = []
        saved: list[Any] = []

        def at_scores(scores: Any) -> int:
            (score,) = np.unique(scores).tolist()
            return state_of[score]

        def at_features() -> int:
            table = engine.features()
            assert len(table) in (0, count)
            assert all(len(table[name].unique()) <= 1 for name in table.schema.names[1:])
            return at_scores(table["score"].to_numpy()) if len(table) else 0

        def at_top() -> int:
            table = engine.top(3)
            return at_scores(table["score"].to_numpy()) if len(table) else 0

        def at_explain() -> int:
            found = engine.explain(users[-1])
            amounts = found.transactions["amount"].to_pylist()
            assert (found.count, found.sum) == (len(amounts), sum(amounts))
            assert found.score == (float(sum(amounts)) / len(amounts) if amounts else 0.0)
            return state_of[found.score]

        def at_stats() -> int:
            found = engine.stats()
            number, rest = divmod(found.rows, count)
            assert (rest, found.accepted, found.transactions) == (0, found.rows, transactions_of[number])
            assert found.users == (count if number else 0)
            return number

        looks: list[Callable[[], int]] = [
            *(lambda: state_of[engine.score(users[count // 2])], lambda: at_scores(engine.scores(users)), at_features),
            *(at_top, at_explain, at_stats, lambda: number_of_digest[engine.digest()]),
        ]

        def read(look: Callable[[], int]) -> None:
            seen, rounds = 0, 0
            try:
                while not done.is_set() or rounds < 3:
                    found = look()
                    assert found >= seen, "it went back"
                    seen, rounds = found, rounds + 1
                assert look() == last
            except BaseException as error:
                faults.append(error)

        def save() -> None:
            try:
                while not done.is_set() or len(saved) < 3:
                    saved.append(engine.save(tmp_path))
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=read, args=[look]) for look in looks] + [threading.Thread(target=save)]
        for thread in threads:
            thread.start()
        started = []
        try:
            for number, batch in enumerate(batches, 1):
                engine.ingest(batch)
                try:
                    started.append((number, engine.start_save(tmp_path / "positions", position=number)))
                except EngineError as error:
                    assert "another snapshot" in str(error)  # noqa: PT017 - the other one is allowed to be there, or not
        finally:
            done.set()
            for thread in threads:
                thread.join()
        faults = [error for error in faults if "another snapshot" not in str(error)]
        assert not faults, faults
        for number, future in started:
            info = future.result()
            assert (info.position, info.digest) == (number, wanted[number][2])
        assert {info.digest for info in saved} <= set(number_of_digest)
        for shard in engine._core.shards:
            shard.check("string")
        self._judge(engine, started, batches, options, tmp_path, full=count < 100)

    def _judge(self, engine: RiskEngine, started: Any, batches: Any, options: Any, folder: Path, *, full: bool) -> None:
        """The last snapshots and the state at the end are those of the definition."""
        assert engine.stats().rows == sum(len(batch["amount"]) for batch in batches)
        if not full:
            return
        kept = {info.position: info for info in (future.result() for _, future in started[-3:])}
        judge = Reference(Config.of(**{"max_ahead": None, "time_unit": "s"} | options))
        for number, batch in enumerate(batches, 1):
            times = (batch["timestamp"] * SECOND).tolist()
            judge.ingest(list(zip(batch["user_id"].to_pylist(), batch["amount"].tolist(), times, strict=True)))
            if number in kept:
                assert kept[number].digest == judge.digest()
                with RiskEngine.load(folder / "positions" / kept[number].name) as loaded:
                    assert loaded.digest() == judge.digest()
        assert engine.digest() == judge.digest()
