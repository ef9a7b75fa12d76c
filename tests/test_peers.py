"""Peers: each that is installed gives the engine's answers, one that is not says how to get it, and a wrong one is found out."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.adapters import peers as module
from engine.adapters.peers import Peer, peers
from engine.config import Config
from engine.errors import EngineError
from engine.measurements import PROOF_ROWS, proven, table_scores
from engine.reference import Reference, plain_rows

ROOT = Path(__file__).parent.parent
NAMES = list(peers())
WINDOW_US = 60_000_000


@pytest.fixture(params=NAMES)
def peer(request: pytest.FixtureRequest) -> Peer:
    found = peers(threads=2, flink_python=os.environ.get("RISKRING_FLINK_PYTHON"))[request.param]
    if found.needs:
        pytest.skip(f"{found.name} needs {found.needs}")
    return found


def table(users, amounts, times_us) -> pa.Table:
    columns = {"user_id": pa.array(users, pa.int64()), "amount": pa.array(amounts, pa.float64())}
    return pa.table(columns | {"timestamp": pa.array(times_us, pa.timestamp("us", "UTC"))})


def busy_rows(rows: int) -> pa.Table:
    """Users with many rows in the window, a third of them exactly 60 s, or a microsecond more or less, after one of their own."""
    random = np.random.default_rng(11)
    start = 1_735_689_600_000_000
    free = np.unique(start + random.integers(0, 10 * WINDOW_US, rows))
    users = random.integers(-4, 4, len(free))
    chosen = random.choice(len(free), rows // 3, replace=False)
    times = np.concatenate([free, free[chosen] + WINDOW_US + random.integers(-1, 2, len(chosen))])
    times, first = np.unique(times, return_index=True)
    users = np.concatenate([users, users[chosen]])[first]
    return table(users, np.round(random.lognormal(3, 2, len(times)), 2), times)


def reference_scores(rows: pa.Table) -> np.ndarray:
    config = Config.of(max_ahead=None)
    reference = Reference(config)
    return np.array([row.score for batch in rows.to_batches() for row in reference.ingest(plain_rows(batch, config))])


def test_window_includes_both_ends(peer: Peer) -> None:
    """Worked by hand: exactly 60 s old counts, a microsecond older does not; other users' rows in between."""
    times = [0, 1, WINDOW_US, WINDOW_US + 1, WINDOW_US + 2, 3 * WINDOW_US]
    rows = table([7, -(2**63), 7, 7, 2**63 - 1, 7], [1.0, 0.1, 2.0, 4.0, 0.35, 8.0], times)
    wanted = [1.0, 0.1, 1.5, 3.0, 0.35, 8.0]
    assert peer.run(rows).tolist() == pytest.approx(wanted, rel=peer.tolerance, abs=0)
    assert table_scores(rows, 1).tolist() == wanted


def test_answers_are_the_engine_s_and_the_reference_s(peer: Peer) -> None:
    rows = busy_rows(3_000)
    wanted = reference_scores(rows)
    assert table_scores(rows, 1).tolist() == table_scores(rows, 2).tolist() == wanted.tolist()
    peer.check(rows, wanted)


def test_answers_on_the_rows_that_are_proven(peer: Peer) -> None:
    peer.check(*proven(shards=1))


def test_shape_of_the_table_changes_nothing(peer: Peer) -> None:
    """One row; and a table in pieces, cut out of a greater one."""
    assert peer.run(table([3], [12.34], [5])).tolist() == [12.34]
    rows = busy_rows(300)
    pieces = pa.concat_tables([rows.slice(0, 100), rows.slice(100, 150)])
    peer.check(pieces, reference_scores(pieces))


def test_scores_are_fresh_float64(peer: Peer) -> None:
    scores, seconds = peer.timed(busy_rows(300))
    assert scores.dtype == np.float64
    assert scores.ndim == 1
    assert seconds >= 0.0


def test_rows_that_are_proven_lie_on_edges() -> None:
    rows, scores = proven(shards=1)
    users, times = rows["user_id"].to_pylist(), rows["timestamp"].cast("int64").to_pylist()
    seen = set(zip(users, times, strict=True))
    assert sum((user, time - WINDOW_US) in seen for user, time in seen) >= 5
    assert len(scores) == len(set(times)) == PROOF_ROWS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("plain", "flink")])
def test_missing_peer_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert peers()[name].needs == f"pip install {name}"
    assert peers()["plain"].needs == ""


def test_missing_flink_says_how_to_get_it() -> None:
    assert "--flink-python" in peers()["flink"].needs
    assert peers(flink_python="no-such-python")["flink"].needs.startswith("an interpreter that starts: no-such-python: ")
    if importlib.util.find_spec("pyflink") is None:
        assert peers(flink_python=sys.executable)["flink"].needs == f"{sys.executable} -m pip install apache-flink, and Java"


def test_flink_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLINK_JOB", "raise ValueError('no cluster')")
    with pytest.raises(EngineError, match=r"^flink: ValueError: no cluster$"):
        module._flink(table([1], [1.0], [0]), 1, sys.executable)


def test_slow_peers_get_the_first_part() -> None:
    rows = busy_rows(3_000)
    for peer in peers().values():
        part = peer.part(rows)
        assert part.equals(rows.slice(0, part.num_rows))
        assert part.num_rows == max(1, round(rows.num_rows * peer.share))
        assert peer.part(rows.slice(0, 1)).num_rows == 1


def test_settings_of_peers() -> None:
    for name, peer in peers(threads=3).items():
        assert name == peer.name
        assert peer.mode in ("batch", "streaming")
        assert 0 < peer.share <= 1
        assert 0 <= peer.tolerance <= 1e-9
    assert peers(threads=3)["duckdb"].how.endswith("3 threads")
    assert peers(threads=1)["flink"].how.endswith("1 slot; start of the job not counted")
    assert peers()["plain"].version == ""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda scores: np.nextafter(scores, np.inf), "plain: score 12.340000000000002 instead of 12.34 in row 0; 2 of 2 differ"),
        (lambda scores: scores[:1], "plain: 1 scores for 2 rows"),
        (lambda scores: np.array([scores[0], np.nan]), "plain: score nan instead of 0.01 in row 1; 1 of 2 differ"),
        (lambda scores: scores[::-1], "plain: score 0.01 instead of 12.34 in row 0"),
    ],
)
def test_wrong_answers_are_found_out(change, text: str) -> None:
    rows, wanted = table([1, 2], [12.34, 0.01], [0, 1]), np.array([12.34, 0.01])
    exact = dataclasses.replace(peers()["plain"], tolerance=0.0)
    exact.check(rows, wanted)
    wrong = dataclasses.replace(exact, timed=lambda rows: (change(wanted), 0.0))
    with pytest.raises(EngineError, match=text):
        wrong.check(rows, wanted)


def test_tolerance_is_relative_to_the_score() -> None:
    rows, wanted = table([1, 2], [1e6, 0.01], [0, 1]), np.array([1e6, 0.01])
    off = dataclasses.replace(peers()["plain"], timed=lambda rows: (wanted * (1 + 2e-10), 0.0))
    off.check(rows, wanted)
    with pytest.raises(EngineError, match="2 of 2 differ"):
        dataclasses.replace(off, tolerance=1e-10).check(rows, wanted)


def test_peers_libraries_are_loaded_only_when_run() -> None:
    program = "import sys, engine.adapters.peers as p; p.peers(); print(*{*p.peers(), 'pyflink'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
