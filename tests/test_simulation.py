"""The life of an engine from one seed: rows, lookups, expiry, snapshots, failing disks, lost power, replays; compared with the definition.

Each seed decides everything: configuration, rows, what happens between which two calls on the disk, which of these fail and how. After
each step the engine equals `Reference`. After a crash, an engine is loaded from what is left of the disk, into another number of
shards, and is given the rows again that came after the snapshot's position; then it must be where it was.

A thousand seeds run by default. More, or one again:

    RISKRING_SEEDS=100_000 python -m pytest -n 2 tests/test_simulation.py
    RISKRING_SEED=123 python -m pytest tests/test_simulation.py
"""

from __future__ import annotations

import copy
import os
from random import Random
from typing import Any

import pyarrow as pa
import pytest

from engine import CapacityError, RiskEngine, SnapshotError, TimeTooOldError
from engine.config import Config
from engine.reference import Reference, plain_features
from tests.disks import MANNERS, Crash, Disk
from tests.strategies import UserRow, instant, to_batch
from tests.test_properties import bits, check, counts, outcomes
from tests.test_snapshot import disk_store, smallest_steps

SEEDS = int(os.environ.get("RISKRING_SEEDS", "1000").replace("_", ""))
SEED = os.environ.get("RISKRING_SEED")
PARTS = 8
WALL_NS = 1_000
WHERE = "/data/snapshots"

USERS: tuple[tuple[pa.DataType, tuple[Any, ...]], ...] = (
    (pa.int64(), (0, 1, -1, 2**63 - 1, 7, 8)),
    (pa.string(), ("", "a", "b", "né", "x" * 40, "c")),
)


class Simulation:
    """One life.

    Attributes:
        log: All batches there have been; a position is a number of these.
        durable: The position that a snapshot is known to be safe for; None: there is none.
        judges: The definition as it stood at each position for which a snapshot was begun.
    """

    def __init__(self, seed: int) -> None:
        self.draw = draw = Random(seed)
        self.id_type, self.users = draw.choice(USERS)
        window = draw.choice((1, 5, 20))
        self.options: dict[str, Any] = {
            "window": f"{window}ns",
            "lateness": f"{draw.choice((0, 3, window))}ns",
            "closed": draw.choice(("both", "right")),
            "decimals": 0,
            "users": draw.choice((2, 4, 100, 100)),
            "max_ahead": draw.choice((None, "0ns", "100ns")),
            "max_jump": draw.choice((None, None, "30ns")),
        }
        self.wall_ns = draw.choice((WALL_NS, 10))
        self.now = 0
        self.log: list[list[UserRow]] = []
        self.durable: int | None = None
        self.judges: dict[int, Reference] = {}
        self.disk = Disk()
        self.engine, self.judge = self.new_engine(), Reference(Config.of(**self.options))
        self.did = dict.fromkeys(("saved", "failed", "crashed", "restored", "refused"), 0)

    def new_engine(self) -> RiskEngine:
        return RiskEngine(**self.options, shards=self.draw.randint(1, 3), now=lambda: self.wall_ns)

    def run(self) -> None:
        steps = (*[self.rows] * 5, self.add, self.lookup, self.expire, self.save, self.save, self.crash)
        with smallest_steps(self.draw.choice((1, 1, 4))):
            for _ in range(self.draw.randint(5, 25)):
                self.draw.choice(steps)()
                self.compare()
            self.crash()
            self.compare()
        check(self.engine)
        assert self.engine.digest() == self.judge.digest()
        self.engine.close()

    # ---- steps ---------------------------------------------------------------------------------------------------------------

    def some_rows(self, most: int) -> list[UserRow]:
        draw, config = self.draw, self.judge.config
        rows: list[UserRow] = []
        for _ in range(draw.randint(1, most)):
            self.now += draw.choice((0, 0, 0, 1, 1, 3, config.window_ns))
            leap = draw.choice((0,) * 30 + (config.retention_ns + 1, 100))
            self.now += leap
            time = self.now - draw.choice((0, 0, 0, 0, 1, 2, config.lateness_ns, config.lateness_ns + 1, config.retention_ns))
            user = draw.choice(self.users) if draw.random() < 0.97 else None
            amount = draw.choice((draw.randint(-5, 20), draw.randint(-5, 20), 2**53, -(2**53), 2**40 + 1, 2**54))
            rows.extend([(user, amount, time)] * draw.choice((1,) * 20 + (7,)))
        return rows

    def rows(self) -> None:
        self.log.append(self.some_rows(8))
        self.apply(self.log[-1])

    def apply(self, rows: list[UserRow]) -> None:
        batch = to_batch(rows, self.id_type, pa.int64())
        try:
            wanted = self.judge.ingest(rows, wall_ns=self.wall_ns)
        except CapacityError:
            self.did["refused"] += 1
            with pytest.raises(CapacityError):
                self.engine.ingest(batch)
            return
        assert bits(outcomes(self.engine.ingest(batch, scores=True))) == bits(wanted)

    def add(self) -> None:
        [row, *_] = self.some_rows(1)
        self.log.append([row])
        user, amount, time_ns = row
        try:
            [wanted] = self.judge.ingest([row], wall_ns=self.wall_ns)
        except CapacityError:
            with pytest.raises(CapacityError):
                self.engine.add(user, amount, instant(time_ns))  # type: ignore[arg-type]
            return
        found = self.engine.add(user, amount, instant(time_ns))  # type: ignore[arg-type]
        assert found.hex() == (float("nan") if wanted.score is None else wanted.score).hex()

    def lookup(self) -> None:
        if self.judge.clock_ns is None:
            return
        config = self.judge.config
        at_ns = self.judge.clock_ns - config.lateness_ns + self.draw.randint(0, config.retention_ns + config.window_ns)
        wanted = [self.judge.score(user, at_ns) for user in self.users]
        assert self.engine.scores(list(self.users), at=instant(at_ns)).tolist() == wanted
        assert [self.engine.score(user, at=instant(at_ns)) for user in self.users] == wanted
        features = plain_features(self.engine.features(at=instant(at_ns)), 0)
        assert features == [(user, self.judge.features(user, at_ns)) for user in self.judge.users()]
        with pytest.raises(TimeTooOldError):
            self.engine.score(self.users[0], at=instant(self.judge.clock_ns - config.lateness_ns - 1))

    def expire(self) -> None:
        self.engine.expire()
        check(self.engine)

    def save(self) -> None:
        """A snapshot while other things happen, on a disk that may fail."""
        position = len(self.log)
        self.judges[position] = copy.deepcopy(self.judge)
        meanwhile = (*[self.rows] * 3, self.add, self.lookup, self.expire)
        often = self.draw.choice((0.0, 0.05, 0.3))

        def during(call: str) -> None:
            if self.draw.random() < often:
                self.draw.choice(meanwhile)()
                self.compare()

        self.disk.during = during
        if self.draw.random() < 0.4:
            self.disk.fail(self.draw.randrange(40), self.draw.choice(MANNERS), for_good=self.draw.random() < 0.3)
        try:
            info = self.engine.start_save(disk_store(self.disk, WHERE), position=position).result()
        except SnapshotError:
            self.did["failed"] += 1
        except Crash:
            self.crash()
        else:
            self.did["saved"] += 1
            assert (info.position, info.digest) == (position, self.judges[position].digest())
            self.durable = position
        self.disk.during = lambda call: None
        self.disk.fail(0, "")

    def crash(self) -> None:
        """Power is lost, or the process is killed; the next one loads what there is, and rows come again from its position on."""
        self.did["crashed"] += 1
        lost_power = self.draw.random() < 0.8
        self.disk = self.disk.crash(self.draw) if lost_power else self.disk.restarted()
        self.engine.close()
        before = self.judge
        try:
            store = disk_store(self.disk, WHERE)
            self.engine = RiskEngine.load(store, now=lambda: self.wall_ns, shards=self.draw.randint(1, 3))
        except SnapshotError as error:
            assert self.durable is None, error  # noqa: PT017 - else there is a snapshot
            position = 0
            self.engine, self.judge = self.new_engine(), Reference(before.config)
        else:
            self.did["restored"] += 1
            assert self.engine.restored is not None
            assert self.engine.restored.passed_over == ()
            position = self.engine.restored.position
            assert self.durable is None or position >= self.durable
            self.durable = position if lost_power else self.durable  # what is found after a loss of power is safe
            self.judge = copy.deepcopy(self.judges[position])
            check(self.engine)
            self.compare()
        for rows in self.log[position:]:
            self.apply(rows)
        assert self.judge.clock_ns == before.clock_ns
        assert (self.judge.accepted, self.judge.rejected, self.judge.rounded) == (before.accepted, before.rejected, before.rounded)

    # ---- comparison ----------------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Everything but lookups at other instants, which are steps of their own."""
        judge, engine = self.judge, self.engine
        assert engine.digest() == judge.digest()
        stats = engine.stats()
        assert (stats.accepted, stats.rounded, counts(stats.rejected)) == (judge.accepted, judge.rounded, judge.rejected)
        assert stats.users == len(judge.users())


def run(seed: int) -> dict[str, int]:
    simulation = Simulation(seed)
    try:
        simulation.run()
    except BaseException as error:
        error.add_note(f"once more: RISKRING_SEED={seed} python -m pytest tests/test_simulation.py")
        raise
    return simulation.did


@pytest.mark.skipif(SEED is not None, reason="RISKRING_SEED asks for one seed")
@pytest.mark.parametrize("part", range(PARTS))
def test_seeds(part: int) -> None:
    done: dict[str, int] = {}
    for seed in range(part, SEEDS, PARTS):
        for what, times in run(seed).items():
            done[what] = done.get(what, 0) + times
    assert SEEDS < 500 or all(times > SEEDS // 100 for times in done.values()), done


@pytest.mark.skipif(SEED is None, reason="RISKRING_SEED names no seed")
def test_one_seed() -> None:
    run(int(SEED or 0))


def test_a_failing_seed_says_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Simulation, "compare", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run(17)
    assert caught.value.__notes__ == ["once more: RISKRING_SEED=17 python -m pytest tests/test_simulation.py"]
