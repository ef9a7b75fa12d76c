"""The job in Flink SQL, on a real Flink and a real broker: each row is as an exact model of Flink's operator says, and differs from the
engine as the header of the job says.

`RISKRING_FLINK_SQL_ROWS=1000000` sends so many.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import RiskEngine
from engine.adapters.kafka_producer import KafkaProducer
from tests.adapters.brokers import Cluster
from tests.adapters.flink import FLINK, FlinkCluster, connector, home, jar_of, run
from tests.adapters.nodes import log_of
from tests.adapters.processes import until

pytestmark = [pytest.mark.flink, pytest.mark.servers]

ROWS = int(os.environ.get("RISKRING_FLINK_SQL_ROWS", "100000"))
SCRIPT = Path(__file__).parents[2] / "engine" / "adapters" / "flink_sql.sql"
WINDOW_MS, LATENESS_MS, UNIT = 60_000, 1_000, 10_000
START_MS = 1_700_000_000_000

Row = tuple[str, int, int]


class User:
    """What the operator keeps of a user: rows by time, when it last looked, and when it may forget."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.looked = self.forget = 0
        self.summed: list[int] = []


class Operator:
    """Flink's operator of RANGE windows in event time, for one input whose watermark follows each row.

    Attributes:
        out: By place of a row: sum of units and number.
        dropped: Places of rows that came too late.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.out: dict[int, tuple[int, int]] = {}
        self.dropped: set[int] = set()
        self._rows = rows
        self._users: dict[str, User] = {}
        self._timers: list[tuple[int, str]] = []
        self._set: set[tuple[int, str]] = set()
        watermark = 0
        for place, (name, _, time_ms) in enumerate(rows):
            self._take(place, name, time_ms)
            watermark = max(watermark, time_ms - LATENESS_MS)
            self._advance(watermark)
        self._advance(2**62)  # the end of a bounded topic

    def _take(self, place: int, name: str, time_ms: int) -> None:
        user = self._users.setdefault(name, User())
        if time_ms <= user.looked:
            self.dropped.add(place)
            return
        user.rows.setdefault(time_ms, []).append(place)
        self._timer(time_ms, name)
        if user.forget < time_ms + WINDOW_MS + 1:
            user.forget = time_ms + WINDOW_MS * 3 // 2 + 1
            self._timer(user.forget, name)

    def _timer(self, time_ms: int, name: str) -> None:
        if (time_ms, name) not in self._set:
            self._set.add((time_ms, name))
            heapq.heappush(self._timers, (time_ms, name))

    def _advance(self, watermark: int) -> None:
        while self._timers and self._timers[0][0] <= watermark:
            time_ms, name = heapq.heappop(self._timers)
            self._set.discard((time_ms, name))
            self._fire(time_ms, self._users[name])

    def _fire(self, time_ms: int, user: User) -> None:
        if 0 < user.forget <= time_ms:
            user.__init__()  # type: ignore[misc]
            return
        if time_ms in user.rows:
            user.summed = [place for place in user.summed if self._rows[place][2] >= time_ms - WINDOW_MS]
            for old in [old for old in user.rows if old < time_ms - WINDOW_MS]:
                del user.rows[old]
            user.summed += user.rows[time_ms]
            told = sum(self._rows[place][1] for place in user.summed), len(user.summed)
            self.out |= dict.fromkeys(user.rows[time_ms], told)
        user.looked = time_ms


def rows_of(count: int) -> list[Row]:
    """Some users often and some seldom; equal times, late rows, and users who are silent for a while and come back with old rows."""
    choose = random.Random(5)
    rows, now = [], START_MS
    for _ in range(count):
        now += choose.choice((0, 1, 2, 5, 7))
        name = f"u{int(choose.random() ** 3 * count / 100)}"
        behind = choose.choice((0, 0, 0, 0, 3, 40, 900, 1500, 40_000, 100_000)) if choose.random() < 0.1 else 0
        rows.append((name, choose.randrange(-(10**6), 10**9), now - behind))
        if choose.random() < 20 / count:
            now += choose.choice((61_000, 91_000, 200_000))
    return rows


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FlinkCluster]:
    with closing(FlinkCluster(tmp_path / "flink", slots=1)) as started:
        yield started


def submit(cluster: FlinkCluster, script: str) -> None:
    """By Flink's own `sql-client.sh`, which needs a jar that the wheel lacks."""
    opt = cluster.folder / "opt"
    opt.mkdir()
    for path in (*(home() / "opt").glob("*.jar"), jar_of(f"org.apache.flink:flink-sql-gateway:{FLINK}")):
        shutil.copy(path, opt)
    (cluster.folder / "job.sql").write_text(script)
    command = [str(home() / "bin" / "sql-client.sh"), "--jar", str(connector()), "-f", str(cluster.folder / "job.sql")]
    done = run(command, cluster.environment | {"FLINK_OPT_DIR": str(opt)}, 120)
    assert done.returncode == 0 and "[ERROR]" not in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def script_for(kafka: Cluster, topic: str, scores: str) -> str:
    """The job for this broker; it ends at the end of the topic, and its watermark follows each row, so that it does the same each time."""
    text = SCRIPT.read_text().replace("localhost:9092", kafka.bootstrap)
    text = text.replace("'topic' = 'transactions'", f"'topic' = '{topic}', 'scan.bounded.mode' = 'latest-offset'")
    text = text.replace("'scan.startup.mode'", "'scan.watermark.emit.strategy' = 'on-event', 'scan.startup.mode'")
    return text.replace("'topic' = 'scores'", f"'topic' = '{scores}'")


def amount_of(units: int) -> str:
    sign, units = "-" * (units < 0), abs(units)
    return f"{sign}{units // UNIT}.{units % UNIT:04}"


def test_each_row_is_as_the_header_says(cluster: FlinkCluster, kafka: Cluster) -> None:
    topic, scores = kafka.new_topic(1), kafka.new_topic(1)
    rows = rows_of(ROWS)
    bad = ["{", "7", '{"user_id": null, "amount": 1, "timestamp": 1}', '{"user_id": "u0", "timestamp": 1}']
    bad += ['{"user_id": "u0", "amount": 1}', f'{{"user_id": "u0", "amount": {10**14}, "timestamp": {START_MS + 10**9}}}']
    good = [f'{{"user_id": "{name}", "amount": {amount_of(units)}, "timestamp": {time_ms}}}' for name, units, time_ms in rows]
    producer = KafkaProducer(kafka.bootstrap, {})
    for text in [*good, *bad]:
        producer.send(topic, text.encode(), partition=0)
    producer.flush()
    submit(cluster, script_for(kafka, topic, scores))
    until(lambda: cluster.jobs("FINISHED") or cluster.jobs("FAILED"), 600, "the end of the job")
    assert not cluster.jobs("FAILED"), cluster.why(cluster.jobs("FAILED")[0])

    found: dict[int, Any] = {}
    for message in log_of(kafka, scores, 0):
        told = json.loads(message.value(), parse_float=str)
        assert told["source_partition"] == 0 and told["source_offset"] not in found
        found[told["source_offset"]] = told
    model = Operator(rows)
    assert found.keys() == model.out.keys()
    for place, (units, count) in model.out.items():
        name, own, time_ms = rows[place]
        told = found[place]
        assert (told["user_id"], Fraction(told["amount"]), told["timestamp"]) == (name, Fraction(own, UNIT), time_ms)
        assert (Fraction(told["sum"]), told["count"]) == (Fraction(units, UNIT), count)
        assert float(told["score"]) == float(Fraction(units, UNIT * count))
    check_against_the_engine(rows, model)


def check_against_the_engine(rows: list[Row], model: Operator) -> None:
    """Equal where the header says so, and each of its differences is there."""
    engine = RiskEngine(time_unit="ms", max_ahead=None, lateness="1000s", users=len(rows), shards=1)
    names, units, times = zip(*rows, strict=True)
    result = engine.ingest({"user_id": list(names), "amount": np.array(units) / UNIT, "timestamp": list(times)}, scores=True)
    assert result.accepted == len(rows)
    by_user: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        by_user.setdefault(name, []).append(place)
    scores, seen = result.scores.to_pylist(), Counter[str]()
    for mine in by_user.values():
        mine.sort(key=lambda place: (times[place], place))
        place_of, time_of = np.array(mine), np.array([times[place] for place in mine])
        first, last = np.searchsorted(time_of, time_of - WINDOW_MS), np.searchsorted(time_of, time_of, "right")
        peer = last - np.searchsorted(time_of, time_of) > 1
        sums = np.concatenate([[0], np.cumsum([units[place] for place in mine])])
        missing = np.concatenate([[0], np.cumsum([place not in model.out for place in mine])])
        for place, begin, end, peers in zip(mine, first.tolist(), last.tolist(), peer.tolist(), strict=True):
            seen["dropped"] += place in model.dropped
            if place not in model.out:
                continue
            same = scores[place] == float(Fraction(model.out[place][0], UNIT * model.out[place][1]))
            hidden = missing[end] > missing[begin]
            unordered = place_of[begin:end].max() > place
            forgotten = not hidden and end - begin != model.out[place][1]
            if not (hidden or forgotten):  # what the engine answers afterwards
                assert (int(sums[end] - sums[begin]), end - begin) == model.out[place]
            if not (hidden or peers or unordered or forgotten):
                assert same
                seen["equal"] += 1
            for what, is_so in (("peers", peers), ("sorted", unordered and not peers), ("dropped", hidden), ("forgotten", forgotten)):
                seen[f"{what} differs"] += bool(is_so) and not same
    assert seen["equal"] > len(rows) // 4, seen
    assert all(seen[what] for what in ("dropped", "peers differs", "sorted differs", "dropped differs", "forgotten differs")), seen


def test_the_model_itself() -> None:
    """By hand, what the header says in 5 and 6."""
    seconds = [("a", 1, 0), ("a", 2, 40), ("b", 9, 95), ("a", 4, 90), ("a", 8, 95), ("b", 9, 300), ("a", 16, 40)]
    rows = [(name, units, START_MS + 1000 * second) for name, units, second in seconds]
    model = Operator(rows)
    assert model.out[0] == (1, 1) and model.out[1] == (3, 2)
    # The timer of the first row was at 90.001 s, and b had moved the watermark to 94 s; the second row had set another, at 130.001 s.
    assert model.dropped == {3}
    assert model.out[4] == (10, 2)
    assert model.out[6] == (16, 1)  # a was forgotten at 185.001 s, so 40 s is not late any more
