"""How much memory does a user take? Resident bytes of a process of its own, not the sum of array sizes.

    python -m pytest bench/bench_memory.py -s

Prediction: 64 bytes of slot line and 4 / 0.7 of index for a user of up to two transactions; beyond, 16 bytes an entry in rings of powers
of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from workload import SMOKE, USERS

PROGRAM = """
import sys
from workload import Uniform, resident_bytes
from engine import RiskEngine
users, rows = int(sys.argv[1]), int(sys.argv[2])
with RiskEngine(users=1000, max_ahead=None) as first:
    for batch in Uniform(1000).batches(70_000):
        first.ingest(batch, scores=True)
batches = Uniform(users).batches(rows)
ahead = next(batches)
engine = RiskEngine(users=users, max_ahead=None)
before = resident_bytes()
engine.ingest(ahead)
for batch in batches:
    engine.ingest(batch)
after, stats = resident_bytes(), engine.stats()
print(stats.users, stats.transactions, after - before)
"""


@pytest.mark.parametrize("rows_per_user", [1, 2])
@pytest.mark.parametrize("users", [USERS] if SMOKE else [1_000_000, USERS])
def test_resident_bytes_per_user(users: int, rows_per_user: int) -> None:
    """Rows of uniformly drawn users, as many as users or twice as many."""
    command = [sys.executable, "-c", PROGRAM, str(users), str(users * rows_per_user)]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    active, transactions, resident = map(int, done.stdout.split())
    print(f"\n{users:,} users, {active:,} active, {transactions:,} transactions: {resident / active:.1f} bytes per active user")
    assert active > 0
    assert transactions >= active
