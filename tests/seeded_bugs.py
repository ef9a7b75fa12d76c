"""A checker must be shown to fail: one-line bugs are put into copies of the engine, and the test suite must catch each of them.

    python tests/seeded_bugs.py [--only NAME ...] [--list] [-j 2]

Each bug is an exact piece of source that occurs once in its file, and what it becomes; when the source has changed so that it does not,
the run stops and says so. For each bug the engine and the tests are copied into a temporary folder, the bug is put in, and a quick
selection of the suite runs there. It must fail in a test: with an assertion, or because the engine raised what it must not. A module
that cannot be imported, a crash or a run without end does not count. The same selection must pass without any bug, first of all.

Left out on purpose are changes that no caller can notice: a tag that is not compared (full ids are), a slot's TOTAL that is not
reset (only differences of prefix sums mean anything), a prefetch of the wrong line.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

#: What runs for bugs in conversions of columns, and for all others; quickest first, because the first failure ends the run.
CONVERSIONS = ["tests/test_columns.py", "tests/test_rounding.py", "tests/test_texts.py", "tests/test_engine.py"]
CORE = [
    "tests/test_edges.py",
    "tests/test_engine.py",
    "tests/test_kernels.py",
    "tests/test_properties.py::test_engine_equals_reference",
    "tests/test_properties.py::test_one_large_batch_equals_reference",
    "tests/test_properties.py::test_lookups_at_any_instant_equal_reference",
    "tests/test_properties.py::test_batches_and_shards_do_not_matter",
    "tests/test_properties.py::TestHistory",
]
CONVERSION_FILES = ("arrays.py", "columns.py", "instants.py", "rounding.py", "texts.py")

#: A run that takes longer has no end.
SECONDS_MAX = 240

#: A failure is enough: nothing is made smaller, remembered or repeated.
RUN = """
import sys, pytest, engine
from hypothesis import Phase, settings
assert engine.__file__.startswith(sys.argv[1]), engine.__file__
settings.register_profile("seeded", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
options = ["-x", "-q", "-rfE", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=seeded"]
sys.exit(pytest.main([*options, *sys.argv[2:]]))
"""


class Bug(NamedTuple):
    """One line gone wrong."""

    name: str
    file: str  # below engine/
    old: str
    new: str
    why: str  # what goes wrong


#: Name, file and what goes wrong; then the source as it is (-) and with the bug (+).
CATALOGUE = r"""
==== windows and prefix sums

left-edge  kernels/exact.py  what is exactly one window old does not count
- middle)] < time_ns
+ middle)] <= time_ns

right-edge  kernels/exact.py  what happens at the very instant does not count
- middle)] <= time_ns
+ middle)] < time_ns

closed-right  config.py  closed="right" is closed on both sides
- else self.window_ns - 1
+ else self.window_ns

ring-wrap  kernels/exact.py  the entry behind a ring's end is another user's
- if at >= capacity:
+ if at > capacity:

least-time  kernels/exact.py  times before 1678 wrap around to the future
- if time_ns < TIME_MIN + duration_ns:
+ if False:

empty-left-edge  kernels/windows.py  a newest entry on the edge does not count
- if floor_ns > memory
+ if floor_ns >= memory

lookup-stale-left  kernels/windows.py  scores do not decay in silence
- if floor_ns <= memory[base + LEFT_TIME]:
+ if True:

lookup-in-the-past  kernels/windows.py  entries after the instant count
- if at_ns >= memory[base + NEWEST]:
+ if True:

valid-until  kernels/windows.py  a score is said to hold when the next entry has entered
- ] = following - 1
+ ] = following

zero-at  kernels/windows.py  an entry that enters as the last leaves is missed
- if time > empty_ns:
+ if time >= empty_ns:

==== exact arithmetic

safe-count  kernels/exact.py  a window's sum wraps at 2**63
- if last - first <= control[SAFE_COUNT]:
+ if True:

carry  kernels/exact.py  the low halves' carry is lost
- return high + (low >> HALF_BITS), low
+ return high, low

mean-ties  kernels/exact.py  a tie is rounded up, not to even
- if half == 1 and (rest > 0 or quotient & 1 == 1):
+ if half == 1:

==== the guards of the clock

late-edge  kernels/rows.py  a row exactly `lateness` behind is refused
- time < minus(clock_now
+ time <= minus(clock_now

jump-edge  kernels/rows.py  a row exactly `max_jump` ahead is refused
- jump_ns) > clock_now
+ jump_ns) >= clock_now

future-edge  kernels/rows.py  a row exactly `max_ahead` ahead is refused
- if time > latest_ns
+ if time >= latest_ns

overflow-clock  engine.py  a batch refused for sum_overflow does not move the clock
- self._kind, self._clock_ns = kind, clock_ns
+ self._kind, self._clock_ns = kind, clock_ns if any((piece.columns.reasons == 0).any() for piece in admitted) else self._clock_ns

==== rows into rings

late-lost  kernels/rows.py  late rows go last
- counted, left = insert_late(memory, base,
+ counted, left = append(memory, control, base,

late-tie  kernels/rows.py  a late row is put before its equals
- at = upper_bound(
+ at = lower_bound(

late-prefix  kernels/rows.py  sums after a late row do not know it
- wrapped_sum(memory[source + 1], units)
+ memory[source + 1]

late-left-in  kernels/rows.py  LEFT passes by a late row on the edge of the newest window
- if time >= minus(memory[base + NEWEST], reach_ns):
+ if time > minus(memory[base + NEWEST], reach_ns):

late-left-out  kernels/rows.py  LEFT ignores a late row before the newest window
-             left += 1
+             left += 0

row-left-edge  kernels/rows.py  a row's own window loses its left edge
- start, 0)] < floor_ns
+ start, 0)] <= floor_ns

gallop-from  kernels/rows.py  LEFT passes by an entry on the edge
- LEFT_TIME] < floor_ns
+ LEFT_TIME] <= floor_ns

gallop-edge  kernels/rows.py  LEFT leaps over an entry on the edge
- step - 1)] < floor_ns
+ step - 1)] <= floor_ns

refilled-ring  kernels/rows.py  LEFT of a ring that was emptied stays
-     if count == 1:
+     if count == 0:

growth-before  kernels/rows.py  a ring that grows forgets `before`
- memory[target + 1] = memory[source + 1]
+ memory[target + 1] = 0

drop-left  kernels/rows.py  LEFT does not move with dropped entries
- memory[base + LEFT] -= dropped
+ memory[base + LEFT] -= 0

drop-wrap  kernels/rows.py  a ring begins behind its own end
-     if start >= capacity:
+     if start > capacity:

block-twice  kernels/rows.py  two users share a ring
- control[RING_HEADS + larger] = memory[2 * place]
+ memory[2 * place] += 0

too-early  kernels/rows.py  what late lookups need is dropped
- minus(clock_ns[row], retention_ns)
+ minus(clock_ns[row], reach_ns)

==== the limit of sums

sum-limit-above  kernels/rows.py  2**62 + 1 is accepted
- SUM_LIMIT_HIGH and low > 0
+ SUM_LIMIT_HIGH and low > 1

sum-limit-below  kernels/rows.py  -2**62 itself is refused
- return high < -SUM_LIMIT_HIGH
+ return high <= -SUM_LIMIT_HIGH

sum-limit-unasked  kernels/rows.py  sums up to 2**63 are not looked at
- if 2 * (count + 1) <= control
+ if count + 1 <= control

sum-limit-expired  kernels/rows.py  expired amounts are limited
- memory[base + TOTAL], first, count)
+ memory[base + TOTAL], 0, count)

units-max  kernels/rows.py  negative amounts are taken for small
- if abs(amount) > control[UNITS_MAX]:
+ if amount > control[UNITS_MAX]:

==== ids to slots

id-not-compared  kernels/probing.py  users with the same tag are one
- elif word == value:
+ else:

bytes-not-compared  kernels/probing.py  strings of one hash are one user
-  and same_bytes(arena, word >> HALF_BITS, data, first, last)

length-not-compared  kernels/probing.py  a prefix is taken for the whole id
- if length != last - first:
+ if length < last - first:

home-line-only  kernels/probing.py  users displaced from a full line are not found
-         if not full:
+         if True:

displaced-unmarked  kernels/probing.py  displaced users are never pulled back
-         entry |= DISPLACED
-         line
+         line

no-pull-back  kernels/probing.py  a removal leaves a gap before displaced users
-     while full:
+     while False:

pull-back-mark  kernels/probing.py  an entry back at home is still marked displaced
- table[moved]) & ENTRY_MASK
+ table[moved])

pull-back-home  kernels/probing.py  an entry pulled half the way home loses its mark
- if moved_home != hole_line:
+ if False:

stale-slot  kernels/probing.py  a slot whose user is gone still counts as one
-     memory[base + RING] = 0
+     pass

release-nothing  kernels/probing.py  slots made for a refused batch are not undone
- HALF_BITS == 0:
+ HALF_BITS < 0:

record-lost  kernels/probing.py  memory of ids is never used again
- ] = place + 1
+ ] = 0

record-twice  kernels/probing.py  two users share the bytes of their ids
- ] = arena_load(arena, place)
+ ] += 0

siphash-length  kernels/hashing.py  the hash of "a" is that of "a\0"
- word = U(last - first) << U56
+ word = U0

rows-out-of-order  kernels/hashing.py  a shard gets its rows last first
- for row in range(count):
-         if reasons[row] == 0:
-             shard
+ for row in range(count - 1, -1, -1):
+         if reasons[row] == 0:
+             shard

==== upkeep

expired-too-early  kernels/upkeep.py  a user is forgotten 1 ns too early
- if newest_of(memory, base) < floor_ns:
-             if
+ if newest_of(memory, base) <= floor_ns:
+             if

expire-shortens  kernels/upkeep.py  expired entries are taken for retained
- LEFT_TIME] >= floor_ns
+ LEFT_TIME] >= 0

digest-position  kernels/upkeep.py  the digest does not know the order of a user's transactions
- U(index - first)
+ U(0)

digest-kinds  kernels/upkeep.py  an integer hashes as its bytes do
- sip_start(DIGEST_KEY, lane + U2)
+ sip_start(DIGEST_KEY, lane)

compaction-place  kernels/upkeep.py  ids stay where the old arena had them
- = following << HALF_BITS | (word & HALF_MASK)
+ = word

compaction-heads  index.py  free records of the old arena
-         self.control[at.ARENA_HEADS : at.ARENA_HEADS + at.ARENA_CLASSES] = 0
+         pass

==== shards

retention  shards.py  lateness is not retained
- max(clock_ns - self.config.retention_ns
+ max(clock_ns - self.config.reach_ns

sweep-floor  shards.py  the sweep frees what counts
-         floor_ns = self._floor_ns(clock_ns)
-         shares
+         floor_ns = clock_ns
+         shares

users-limit  shards.py  a full engine refuses its last user
- if complete and self.users <= self
+ if complete and self.users < self

no-undo  shards.py  users of a refused batch keep slots
-         self._release([slots[:done] for slots, done in found], kind)
+         pass

no-undo-before  shards.py  users of earlier pieces of a refused batch keep slots
- self._release(done, kind)
+ continue

peak-limit  shards.py  a batch that just fits is refused
- if peak > self
+ if peak >= self

seat-freed-early  capacity.py  a user is gone 1 ns before its time, and a batch seems to fit
- side="right"
+ side="left"

seat-kept  capacity.py  users that leave within a batch keep their seats
- np.minimum(gone, following)
+ following

lookup-parts  shards.py  long lookups write all scores over those of the first part
- , scores[first : first + rows_each]
+ , scores[:rows_each]

entries-edge  shards.py  the oldest retained transaction is not shown
- retained = times >= self
+ retained = times > self

==== the engine

clock-before-capacity  engine.py  a batch that did not fit has moved the clock
-                 self._shards.apply(admitted, kind, self._clock_ns)
+                 before_ns, self._clock_ns = self._clock_ns, clock_ns
+                 self._shards.apply(admitted, kind, before_ns)

rounded-refused  engine.py  `rounded` counts rows that were refused
- columns.rounded[~refused].sum()
+ columns.rounded.sum()

add-reason  engine.py  `add` gives the last of several reasons
- reason = min((REASONS
+ reason = max((REASONS

too-old  engine.py  the oldest exact instant is refused
- at_ns < clock_ns - self
+ at_ns <= clock_ns - self

wall-clock  engine.py  a wall clock that lags hides the newest rows
- max(clock_ns, self._now())
+ self._now()

top-ties  engine.py  equals in `top` come in any order
- , ("user_id", "ascending")]
+ ]

unsigned  userids.py  2**64 - 1 is taken for the user -1
- unknown[ids.values < 0] = 1
+ unknown[ids.values < 0] = 0

==== conversions

reason-order  columns.py  the last of several reasons wins
- in reversed(faults)
+ in faults

refused-rounded  columns.py  `rounded` counts rows with a fault
-         rounded[refused] = 0
+         pass

ties-below  rounding.py  a float half a unit above an even one is rounded up
- (error == above) & odd
+ (error == above)

ties-decimal  rounding.py  decimals are rounded half up
- (left == divisor) & (units & 1).astype(np.bool_)
+ (left == divisor)

ties-wide  rounding.py  decimals beyond int64 are rounded half up
- (last == 5) & (sticky
+ (last == 5) & (True

amount-limit  rounding.py  an amount of 2**53 units is refused
- np.abs(units) > AMOUNT
+ np.abs(units) >= AMOUNT

multiplied-first  rounding.py  times and amounts wrap around in the multiplication
- out = wide > limit
+ out = wide > most

leap-days  texts.py  the 31st of June is the 1st of July
- (day <= days)
+ (day <= 31)

west-of-utc  texts.py  zones are applied the wrong way round
- second - zone
+ second + zone
"""


def _bugs(catalogue: str) -> Iterator[Bug]:
    """Read the list above: blocks of a head line, old lines and new lines."""
    for block in catalogue.strip().split("\n\n"):
        head, *lines = block.split("\n")
        if not head.startswith("===="):
            name, file, why = head.split("  ")
            old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
            yield Bug(name, file, old, new, why)


BUGS = list(_bugs(CATALOGUE))


def check_texts(bugs: list[Bug]) -> None:
    """Each bug's source must be there exactly once, and names be different."""
    faults = []
    for bug in BUGS:
        found = (ROOT / "engine" / bug.file).read_text().count(bug.old)
        if found != 1:
            faults.append(f"{bug.name}: its text occurs {found} times in engine/{bug.file}, must once: {bug.old!r}")
    if len({bug.name for bug in BUGS}) < len(BUGS):
        faults.append("two bugs have the same name")
    if not bugs:
        faults.append("no bug has such a name; see --list")
    if faults:
        sys.exit("\n".join(["seeded_bugs: bring the list up to date", *faults]))


def compiled_with(folder: Path, stem: str) -> set[str]:
    """The kernel files whose machine code holds something of this one: itself and all that import it, at any remove."""
    imports = {path.stem: set(re.findall(r"^from engine\.kernels\.(\w+) import", path.read_text(), re.M)) for path in folder.glob("*.py")}
    found = {stem}
    while more := {name for name, used in imports.items() if used & found} - found:
        found |= more
    return found


class Lane:
    """A temporary copy of engine and tests, in which one bug is tried at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.compiled = folder, folder / "cache", folder / "compiled"
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for part in ("engine", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def run(self, tests: list[str]) -> tuple[int, str]:
        """Exit code of pytest (-1: no end) and what it printed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "RISKRING_", "HYPOTHESIS_"))}
        environment |= {
            "PYTHONPATH": str(self.folder),
            "NUMBA_CACHE_DIR": str(self.cache),
            # Python would take the compiled old source for the new one when both have the same size and second.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-c", RUN, str(self.folder), *tests]
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            printed, _ = process.communicate(timeout=SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            return -1, process.communicate()[0]
        return process.returncode, printed

    def prepare(self, selections: list[list[str]]) -> list[tuple[int, str]]:
        """Run tests without a bug, and keep the machine code of the kernels for runs that do not change them."""
        done = [self.run(tests) for tests in selections]
        shutil.copytree(self.cache, self.compiled)
        return done

    def attempt(self, bug: Bug) -> tuple[bool, str]:
        """Whether the tests catch a bug, and which test did; or what happened instead."""
        path = self.folder / "engine" / bug.file
        source, status = path.read_text(), path.stat()
        # Numba looks only at the file in which a kernel itself stands, so all that a change is part of must go.
        stems = compiled_with(path.parent, path.stem) if path.parent.name == "kernels" else ()
        shutil.rmtree(self.cache)
        shutil.copytree(self.compiled, self.cache, ignore=shutil.ignore_patterns(*(f"{stem}.*.nb?" for stem in stems)))
        path.write_text(source.replace(bug.old, bug.new))
        try:
            code, printed = self.run(CONVERSIONS if bug.file in CONVERSION_FILES else CORE)
        finally:
            path.write_text(source)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that the machine code kept is not out of date
        failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", printed, re.M)
        if code == 1 and failed:
            return True, failed[1].removeprefix("tests/")
        return False, {0: "SURVIVED", -1: "NO END"}.get(code, f"NO TEST FAILED, exit code {code}: {printed.strip()[-300:]}")


def outcomes(bugs: list[Bug], lanes: list[Lane]) -> Iterator[tuple[Bug, bool, str, float]]:
    """Try bugs on several lanes at a time; in their order."""
    free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def attempt(bug: Bug) -> tuple[Bug, bool, str, float]:
        lane = free.get()
        start = time.monotonic()
        try:
            return bug, *lane.attempt(bug), time.monotonic() - start
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(lanes)) as pool:
        yield from pool.map(attempt, bugs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only bugs of this name; may be a pattern such as 'late-*', and given again"
    )
    parser.add_argument("--list", action="store_true", help="show the bugs and run nothing")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="so many at a time (default: 2)")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if options.only is None or any(fnmatch(bug.name, name) for name in options.only)]
    check_texts(bugs)
    width = max(len(bug.name) for bug in bugs)
    if options.list:
        for bug in bugs:
            print(f"{bug.name:{width}}  {bug.file:20}  {bug.why}")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seeded-bugs-") as folder:
        lanes = [Lane(Path(folder).resolve() / f"lane{number}") for number in range(max(1, options.j))]
        with ThreadPoolExecutor(len(lanes)) as pool:
            # Both selections are shared out; each compiles all kernels, so further lanes take one of them again.
            shares = [[CORE, CONVERSIONS]] if len(lanes) == 1 else [[CORE], *[[CONVERSIONS]] * (len(lanes) - 1)]
            plain = [run for runs in pool.map(Lane.prepare, lanes, shares) for run in runs]
        for code, printed in plain:
            print("without a bug:", printed.strip().splitlines()[-1] if printed.strip() else "nothing printed", flush=True)
            if code:
                print(printed)
                return 1
        passed = 0
        for bug, caught, by, seconds in outcomes(bugs, lanes):
            passed += caught
            print(f"{bug.name:{width}}  {'caught by' if caught else 'NOT CAUGHT:'} {by}  {seconds:.1f} s", flush=True)
    print(f"{passed} passed, {len(bugs) - passed} failed in {time.monotonic() - start:.0f} s")
    return 0 if passed == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
