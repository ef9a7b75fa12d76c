"""Streams chosen to fill memory: it stays below what was forecast, or the engine says that there is no room, and goes on.

`RISKRING_FLOOD_USERS=20_000_000` makes the floods larger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import CapacityError, RiskEngine
from engine.forecast import forecast
from engine.memory import Budget, machine_bytes, state_bytes_max

ROOT = Path(__file__).parent.parent
SECOND = 10**9
FLOOD_USERS = int(os.environ.get("RISKRING_FLOOD_USERS", "200_000"))


def make(**options: Any) -> RiskEngine:
    """A small engine in simulated time, with times in seconds."""
    return RiskEngine(**({"users": 100, "max_ahead": None, "time_unit": "s", "shards": 1} | options))


def rows(users: Any, amounts: Any = 1, times: Any = 0) -> dict[str, Any]:
    """Columns, a scalar standing for all rows."""
    count = len(users)
    return {"user_id": users, "amount": np.broadcast_to(amounts, count).copy(), "timestamp": np.broadcast_to(times, count).copy()}


def state(engine: RiskEngine) -> Any:
    return engine.digest(), engine.stats()


#: Run by a process of its own, so that what others have touched is not counted. It prints what it found as JSON.
FLOOD = """
import json, sys
import numpy as np
from engine import CapacityError, RiskEngine
from engine.memory import Budget

name, users, bytes_max = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ROWS = 20_000

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def columns(ids, times):
    return {"user_id": ids, "amount": np.ones(len(ids)), "timestamp": np.broadcast_to(times, len(ids)).copy()}

def batches():
    if name == "users":  # four transactions each, and then one user more
        for first in range(0, 4 * users, ROWS):
            yield columns(np.arange(first, first + ROWS) % users, 0)
        yield columns(np.arange(users, users + 1), 0)
    if name == "one user":
        for first in range(0, 10 * users, ROWS):
            yield columns(np.full(ROWS, 7), 0)
    if name.startswith("rings"):  # all users just over a block
        each = int(name.split()[1])
        some = 5 * users // each // ROWS * ROWS or ROWS // 5
        for first in range(0, each * some, ROWS):
            yield columns(np.arange(first, first + ROWS) % some, 0)
    if name == "churn":  # as many users as fit within the retention, never the same
        for first in range(0, 5 * users, ROWS):
            yield columns(np.arange(first, first + ROWS), first * 130 // users)
    if name == "times":  # as far as they go; from the second one on all others are late
        far = np.array([0, 2**33, -(2**33), 2**62, -(2**62)])
        for first in range(0, 2 * users, ROWS):
            yield columns(np.arange(first, first + ROWS), far[np.arange(ROWS) % 5])
    if name == "ids":
        for first in range(0, 100_000, 100):
            yield columns([f"{k:010}" + "x" * 65_000 for k in range(first, first + 100)], 0)
    if name == "everything":
        for first in range(0, 1000 * users, ROWS):
            yield columns(np.arange(first, first + ROWS) % (users // 2) * 3, 0)

def make():
    return RiskEngine(users=users, max_ahead=None, time_unit="s", shards=2)

with make() as engine:  # compiled code and what Arrow keeps are not of this flood
    engine.ingest(columns(np.arange(5000), 0), scores=True)
with make() as engine:
    if bytes_max:
        engine._core.shards.share(Budget(bytes_max))
    before = resident()
    ended, same = "", True
    for batch in batches():
        try:
            engine.ingest(batch)
        except CapacityError as error:
            ended = str(error)
            break
    stats = engine.stats()
    found = {"ended": ended, "resident": resident() - before, "bytes": stats.bytes, "rejected": stats.rejected}
    found |= {"users": stats.users, "transactions": stats.transactions}
    if ended:
        digest = engine.digest()
        for again in range(3):
            try:
                engine.ingest(batch)
                same = False
            except CapacityError:
                same &= engine.digest() == digest and engine.stats() == stats
        # When all that has gone, as many rows as before are taken again.
        kind = type(batch["user_id"][0])
        user = "a" if kind is str else 1
        engine.add(user, 1, 10_000)
        engine.ingest(columns([user] * ROWS, 10_001))
        found |= {"later": engine.stats().transactions}
    found |= {"same": same}
    print(json.dumps(found))
"""

#: Beside the state: a batch on its way, and pages of 2 MiB of which not all is used.
BESIDE_BYTES = 40 << 20


def flood(name: str, bytes_max: int = 0, users: int = FLOOD_USERS) -> dict[str, Any]:
    program = [sys.executable, "-c", FLOOD, name, str(users), str(bytes_max)]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the resident memory")
class TestFloods:
    """However rows are chosen, memory stays below what `riskring plan` says for them, or the engine says that there is no room."""

    @pytest.mark.parametrize("name", ["users", "one user", "rings 9", "rings 129"])
    def test_memory_is_what_plan_says(self, name: str) -> None:
        found = flood(name)
        most = forecast(found["users"], found["transactions"] / 120, 120 * SECOND)["total"]
        most += 4 / 0.7 * (FLOOD_USERS - found["users"])  # the engine has room for more users
        assert found["bytes"] <= most
        assert found["resident"] <= most + BESIDE_BYTES
        assert found["transactions"] >= 2.5 * FLOOD_USERS
        assert found["same"]
        if name == "users":
            assert "needs room for" in found["ended"]
            assert found["users"] == FLOOD_USERS

    @pytest.mark.parametrize("name", ["churn", "times"])
    def test_users_who_come_and_go_take_the_memory_of_those_who_stay(self, name: str) -> None:
        found = flood(name)
        most = forecast(FLOOD_USERS, 4 * FLOOD_USERS / 120, 120 * SECOND)["total"]  # with four transactions all users are active
        assert found["bytes"] <= most
        assert found["resident"] <= most + BESIDE_BYTES
        assert found["users"] <= FLOOD_USERS
        if name == "times":
            assert set(found["rejected"]) == {"late", "timestamp_out_of_range"} or "needs room for" in found["ended"]

    @pytest.mark.parametrize(
        ("name", "bytes_max"), [("one user", 40_000_000), ("everything", 40_000_000), ("churn", 8_000_000), ("ids", 50_000_000)]
    )
    def test_a_full_memory_is_an_error_and_not_the_end(self, name: str, bytes_max: int) -> None:
        found = flood(name, bytes_max, users=200_000)
        assert found["ended"].startswith("memory is full"), found
        assert "riskring plan" in found["ended"]
        assert found["bytes"] <= bytes_max * 8 // 7  # the eighth of the memory that is left is for rings on the move
        assert found["bytes"] > bytes_max // 4
        assert found["resident"] <= bytes_max * 8 // 7 + BESIDE_BYTES
        assert found["same"]
        assert found["later"] == 20_001


class TestMemoryLimit:
    """The limit that a flood meets."""

    def test_it_is_part_of_the_machine(self) -> None:
        assert make()._core.shards.budget.bytes_max == state_bytes_max() <= machine_bytes() * 7 // 8 + 1

    @pytest.mark.parametrize(
        ("groups", "limits", "wanted"),
        [
            ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": "8000000\n"}, 7_000_000),
            ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "16000"}, 14_000),
            ("0::/../x\n", {"sys/fs/cgroup/memory.max": "800"}, 700),
            ("5:cpu:/\n4:memory:/c:d\n0::/\n", {"sys/fs/cgroup/memory/c:d/memory.limit_in_bytes": "1600"}, 1_400),
            ("4:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
            ("4:cpu:/\n", {"sys/fs/cgroup/memory.max": "800"}, None),
            (None, {}, None),
        ],
    )
    def test_control_groups(self, groups: str | None, limits: dict[str, str], wanted: int | None, tmp_path: Path) -> None:
        if groups is not None:
            limits = {**limits, "proc/self/cgroup": groups}
        for name, text in limits.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        machine = machine_bytes()
        assert state_bytes_max(str(tmp_path)) == (machine - machine // 8 if wanted is None else wanted)

    def test_what_fits_is_not_refused(self) -> None:
        """Up to the last batch before the limit, and rows for memory that was taken before."""
        engine = make(users=100_000, shards=2)
        shards = engine._core.shards
        users = np.arange(20_000)
        engine.ingest(rows(users))
        shards.share(Budget(shards.bytes_used + 64 * len(users) + (4 << 20)))
        for time in range(1, 50):
            engine.ingest(rows(users, times=200 * time))
        assert engine.stats().transactions == 20_000
        for user in range(2_000):
            engine.add(user, 1, 9_801)
        assert engine.stats().transactions == 22_000

    def test_engines_share_it(self) -> None:
        """What one has taken is missing to the other, until it is closed."""
        budget, fed = Budget(16_000_000), [0, 0]
        engines = [make(users=1_000_000), make(users=1_000_000)]
        empty = sum(engine._core.shards.bytes_used for engine in engines)
        for number, engine in enumerate(engines):
            engine._core.shards.share(budget)
            with pytest.raises(CapacityError, match="that the others leave"):  # noqa: PT012 - some of the rows are taken
                while True:
                    engine.ingest(rows(np.arange(fed[number], fed[number] + 5_000)))
                    fed[number] += 5_000
        assert fed[0] > 100_000 > 10 * fed[1]
        assert sum(engine._core.shards.bytes_used for engine in engines) <= budget.bytes_max + empty
        engines[0].close()
        while fed[1] < fed[0]:
            engines[1].ingest(rows(np.arange(fed[1], fed[1] + 5_000)))
            fed[1] += 5_000

    def test_a_flood_of_one_kind_leaves_room_for_the_other(self) -> None:
        engine = make(users=1_000_000)
        engine._core.shards.share(Budget(32_000_000))
        fed = 0
        for some in (5_000, 10):  # until not even ten have a place
            with pytest.raises(CapacityError, match="memory is full"):  # noqa: PT012 - some of the rows are taken
                while True:
                    engine.ingest(rows(np.arange(fed, fed + some)))
                    fed += some
        assert fed > 300_000
        engine.ingest(rows([1], times=500))
        engine.ingest(rows(np.arange(5_000) % 200, times=501))  # rings, for which users had taken nothing
        assert engine.stats().transactions == 5_001
        with pytest.raises(CapacityError, match="memory is full"):  # noqa: PT012
            for _ in range(1000):
                engine.ingest(rows(np.arange(5_000) % 200, times=501))
        for shard in engine._core.shards:
            shard.check("int64")

    def test_rings_that_were_given_back_serve_again(self) -> None:
        engine = make(users=5_000)
        engine._core.shards.share(Budget(16_000_000))
        users = np.arange(5_000)
        fed = 0
        with pytest.raises(CapacityError, match="memory is full"):  # noqa: PT012
            while True:
                engine.ingest(rows(users))
                fed += 1
        assert fed > 60
        engine.ingest(rows([1], times=500))
        for _ in range(fed // 2):
            engine.ingest(rows(users, times=501))
        assert engine.stats().transactions == 1 + fed // 2 * 5_000

    def test_a_full_engine_goes_on_when_the_clock_does(self) -> None:
        """Though there is no room for a row more at the clock as it stands."""
        engine = make(users=5_000)
        shards = engine._core.shards
        engine.ingest(rows(np.arange(5_000)))
        shards.share(Budget(shards.bytes_used))
        shards._uncounted_bytes = 0
        for _ in range(2):
            with pytest.raises(CapacityError, match="memory is full"):
                engine.ingest(rows([1], times=120))  # all are retained at 120
        assert engine.ingest(rows([1], times=121)).accepted == 1
        assert engine.stats().transactions == 1

    def test_add_meets_it_too(self) -> None:
        engine = make(users=100_000)
        shards = engine._core.shards
        shards.share(Budget(shards.bytes_used + 100_000))
        with pytest.raises(CapacityError, match="memory is full"):  # noqa: PT012
            for user in range(100_000):
                engine.add(user, 1, 0)
        before = state(engine)
        assert 500 < before[1].users < 2_000
        with pytest.raises(CapacityError, match="memory is full"):
            engine.add(-1, 1, 0)
        assert state(engine) == before
        assert engine.score(3) == 1.0
