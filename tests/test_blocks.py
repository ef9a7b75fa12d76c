"""Memory of rings: blocks, slabs, magazines; and users whose entries fit their slot line, then do not, then do again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RiskEngine
from engine.columns import Columns, ids_of
from engine.config import BLOCK_LINES, Config
from engine.index import random_keys, split_rows
from engine.kernels import KERNELS, blocks, probing
from engine.kernels import layout as at
from engine.kernels.compile import (
    _bits_set_plain,
    _lanes_equal_plain,
    _lowest_bit_plain,
    bits_set,
    lanes_equal,
    lowest_bit,
)
from engine.reference import Reference
from engine.shard import Shard
from tests.inlined import from_python
from tests.strategies import instant

np.seterr(over="ignore")  # uncompiled kernels wrap as compiled ones do, but NumPy would warn

block_add, block_remove, larger, lines_for = map(from_python, (blocks.block_add, blocks.block_remove, blocks.larger, blocks.lines_for))
holds, tag_matches = map(from_python, (probing.holds, probing.tag_matches))

SLAB_ENTRIES = at.SLAB_LINES * at.BLOCK_ENTRIES
SIZES = (*BLOCK_LINES, *(at.SLAB_LINES * slabs for slabs in (2, 3, 4, 7)))


class Blocks:
    """The ring memory of a shard, used by hand, and beside it a plain list of the blocks that were given out."""

    def __init__(self) -> None:
        self.shard = Shard(Config.of(users=4, shards=1), 4, random_keys(1))
        self.held: list[tuple[int, int]] = []  # (place, lines)

    def add(self, lines: int) -> None:
        shard = self.shard
        place = int(block_add(shard.memory, shard.control, shard.slabs, lines))
        assert place % at.BLOCK_ENTRIES == 0
        assert int(shard.control[at.RING_BASE]) <= place <= int(shard.control[at.RING_NEXT]) - lines * at.BLOCK_ENTRIES
        self.held.append((place, lines))

    def remove(self, index: int) -> None:
        place, lines = self.held.pop(index)
        block_remove(self.shard.control, self.shard.slabs, place, lines * at.BLOCK_ENTRIES)

    def check(self) -> None:
        behind = 0
        for place, lines in sorted(self.held):
            assert place >= behind, "two blocks overlap"
            behind = place + lines * at.BLOCK_ENTRIES
        self.shard._check_slabs([(place, lines * at.BLOCK_ENTRIES) for place, lines in self.held])
        assert all(0 <= count <= at.MAGAZINE_BLOCKS for count in self.magazines())

    def magazines(self) -> list[int]:
        """Blocks in the magazine of each size."""
        return [int(self.shard.control[at.MAGAZINES + size * at.MAGAZINE_WORDS]) for size in range(at.MAGAZINE_LINES)]

    @property
    def slabs_used(self) -> int:
        return int(self.shard.control[at.RING_NEXT] - self.shard.control[at.RING_BASE]) // SLAB_ENTRIES

    def pool(self) -> list[int]:
        """The slabs that any size may have."""
        slab, found = int(self.shard.control[at.SLAB_HEADS]) - 1, []
        while slab >= 0:
            found.append(slab)
            slab = int(self.shard.slabs[slab * at.SLAB_WORDS + at.SLAB_NEXT]) - 1
        return found


class TestBlocks:
    """Blocks against a plain list of them."""

    def test_a_block_holds_what_it_is_for_and_no_smaller_one_would(self) -> None:
        for entries in range(1, 5 * SLAB_ENTRIES):
            fitting = [lines for lines in (*BLOCK_LINES, *range(2 * at.SLAB_LINES, 700, at.SLAB_LINES)) if 4 * lines >= entries]
            assert lines_for(entries) == fitting[0], entries

    def test_rings_that_grow_take_no_more_than_was_checked_to_be_there(self) -> None:
        # `room_for` counts ten times the entries for all blocks that a ring passes through, as if none were ever used again.
        capacity, passed = at.BLOCK_ENTRIES, 2 * at.BLOCK_ENTRIES
        while capacity < 2**26:
            lines = int(larger(capacity))
            assert lines * at.BLOCK_ENTRIES > capacity
            assert lines in BLOCK_LINES or lines % at.SLAB_LINES == 0
            assert lines * at.BLOCK_ENTRIES < 2**27, "the header of a line holds no more"
            # Blocks of a slab that is not a multiple of them share its rest.
            passed += lines * at.BLOCK_ENTRIES if lines > at.SLAB_LINES else -(-SLAB_ENTRIES // (at.SLAB_LINES // lines))
            assert passed <= 10 * (capacity + 1)
            capacity = lines * at.BLOCK_ENTRIES

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=12), st.randoms())
    def test_blocks_come_and_go(self, steps: list[tuple[int, int, int]], random: Any) -> None:
        blocks = Blocks()
        for lines, count, share in steps:
            for _ in range(count):
                blocks.add(lines)
            blocks.check()
            for _ in range(len(blocks.held) * share // 100):
                blocks.remove(random.randrange(len(blocks.held)))
            blocks.check()
        while blocks.held:
            blocks.remove(random.randrange(len(blocks.held)))
        blocks.check()
        self.all_is_free(blocks)

    @staticmethod
    def all_is_free(blocks: Blocks) -> None:
        """Nothing is in use: what is not in a magazine can be had by any size, and by one of many slabs if they are side by side."""
        used, pool = blocks.slabs_used, blocks.pool()
        assert used - len(pool) <= sum(blocks.magazines())
        if blocks.magazines() == [0] * at.MAGAZINE_LINES and used > 1:
            assert sorted(pool) == list(range(used))
            blocks.add(used * at.SLAB_LINES)
            assert blocks.pool() == []
            blocks.remove(0)
        for _ in pool:
            blocks.add(at.SLAB_LINES)
        assert blocks.slabs_used == used
        blocks.add(at.SLAB_LINES)
        assert blocks.slabs_used == used + 1
        blocks.check()

    @pytest.mark.parametrize("lines", SIZES)
    def test_a_block_given_back_is_given_out_next(self, lines: int) -> None:
        blocks = Blocks()
        for _ in range(3):
            blocks.add(lines)
        used = blocks.slabs_used
        for index in (0, 1, 2, 1, 0):
            before = blocks.held[index][0]
            blocks.remove(index)
            blocks.check()
            blocks.add(lines)
            assert blocks.held[-1][0] == before
            blocks.check()
        assert blocks.slabs_used == used

    @pytest.mark.parametrize("lines", range(1, at.MAGAZINE_LINES + 1))
    def test_a_full_magazine_keeps_its_newest_half(self, lines: int) -> None:
        blocks = Blocks()
        for _ in range(at.MAGAZINE_BLOCKS + 9):
            blocks.add(lines)
        given_back = [place for place, _ in blocks.held]
        for count in range(1, at.MAGAZINE_BLOCKS + 9):
            blocks.remove(0)
            half = at.MAGAZINE_BLOCKS // 2
            held = count if count <= at.MAGAZINE_BLOCKS else count - half
            assert blocks.magazines()[lines - 1] == held
            blocks.check()
            magazine = at.MAGAZINES + (lines - 1) * at.MAGAZINE_WORDS
            assert blocks.shard.control[magazine + 1 : magazine + 1 + held].tolist() == given_back[count - held : count]

    @pytest.mark.parametrize("first", SIZES)
    def test_what_one_size_gives_up_serves_every_other(self, first: int) -> None:
        blocks = Blocks()
        for _ in range(max(12 * at.SLAB_LINES // first, 3)):
            blocks.add(first)
        used = blocks.slabs_used
        for lines in (*BLOCK_LINES, at.SLAB_LINES):
            while blocks.held:
                blocks.remove(len(blocks.held) - 1)
            blocks.check()
            pool = len(blocks.pool())
            assert pool >= used - sum(map(bool, blocks.magazines())) * (at.MAGAZINE_BLOCKS * at.MAGAZINE_LINES // at.SLAB_LINES + 1)
            for _ in range(pool * (at.SLAB_LINES // lines)):
                blocks.add(lines)
            assert blocks.slabs_used == used
            blocks.check()

    def test_large_blocks_take_slabs_that_are_side_by_side_and_only_those(self) -> None:
        blocks = Blocks()
        for _ in range(12):
            blocks.add(at.SLAB_LINES)
        for index in (10, 8, 7, 4, 3, 2, 0):  # leaves 1 5 6 9 11: free are 0, 2 to 4, 7 and 8, 10
            blocks.remove(index)
        blocks.check()
        base = int(blocks.shard.control[at.RING_BASE])
        for slabs, wanted in ((3, 2), (2, 7), (2, 12)):
            blocks.add(slabs * at.SLAB_LINES)
            assert (blocks.held[-1][0] - base) // SLAB_ENTRIES == wanted
            blocks.check()
        assert sorted(blocks.pool()) == [0, 10]
        assert blocks.slabs_used == 14

    @pytest.mark.parametrize("slabs", [2, 3, 9])
    def test_a_large_block_is_found_wherever_the_search_begins(self, slabs: int) -> None:
        blocks = Blocks()
        for _ in range(9):
            blocks.add(at.SLAB_LINES)
        for first in range(10 - slabs):
            for cursor in range(10):
                places = sorted(place for place, lines in blocks.held)[first : first + slabs]
                for place in places:
                    blocks.remove(blocks.held.index((place, at.SLAB_LINES)))
                blocks.shard.control[at.SLAB_CURSOR] = cursor
                blocks.add(slabs * at.SLAB_LINES)
                assert blocks.held[-1][0] == places[0]
                blocks.check()
                blocks.remove(len(blocks.held) - 1)
                for _ in range(slabs):
                    blocks.add(at.SLAB_LINES)
        assert blocks.slabs_used == 9

    def test_the_search_for_a_large_block_ends(self) -> None:
        # No two free slabs are side by side among the many that are looked at; two that are lie behind them, where the next search begins.
        blocks = Blocks()
        looked_at = at.SEARCHED_SLABS + 2
        for _ in range(looked_at + 10):
            blocks.add(at.SLAB_LINES)
        for index in range(looked_at // 2):
            blocks.remove(index)  # every other one
        blocks.remove(len(blocks.held) - 3)
        blocks.remove(len(blocks.held) - 3)
        used = blocks.slabs_used
        blocks.add(2 * at.SLAB_LINES)
        assert blocks.slabs_used == used + 2
        blocks.add(2 * at.SLAB_LINES)
        assert blocks.slabs_used == used + 2
        blocks.check()


@from_python
def compiled_lanes_equal(words, position, mask, wanted):  # type: ignore[no-untyped-def]
    return lanes_equal(words, position, mask, wanted)


@from_python
def compiled_lowest_bit(word):  # type: ignore[no-untyped-def]
    return lowest_bit(word)


@from_python
def compiled_bits_set(word):  # type: ignore[no-untyped-def]
    return bits_set(word)


class TestIndexLines:
    """A line of the index as one vector, and what stands in for it in plain Python."""

    @given(
        st.lists(st.sampled_from((0, 1, 2, 3, 2**31, 2**31 + 1, 2**32 - 1)) | st.integers(0, 2**32 - 1), min_size=48, max_size=48),
        st.sampled_from((0, 16, 32)),
        st.sampled_from((0, 1, at.DISPLACED, at.DISPLACED - 1, at.HALF_MASK)) | st.integers(0, 2**32 - 1),
        st.data(),
    )
    def test_lanes_equal(self, cells: list[int], position: int, mask: int, data: st.DataObject) -> None:
        words = np.array(cells, np.uint32)
        wanted = data.draw(st.sampled_from([cell & mask for cell in cells[position : position + 16]]) | st.integers(0, 2**32 - 1))
        equal = sum(1 << lane for lane in range(16) if cells[position + lane] & mask == wanted)
        assert compiled_lanes_equal(words, position, mask, wanted) == equal
        assert _lanes_equal_plain(words, position, mask, wanted) == equal

    @given(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 63).map(lambda bit: ((1 << bit) + 2**63) % 2**64 - 2**63))
    def test_bits(self, word: int) -> None:
        lowest = next((bit for bit in range(64) if word >> bit & 1), 64)
        count = sum(word >> bit & 1 for bit in range(64))
        for given_word in (word, np.int64(word)):
            assert compiled_lowest_bit(given_word) == _lowest_bit_plain(given_word) == lowest
            assert compiled_bits_set(given_word) == _bits_set_plain(given_word) == count

    @given(st.lists(st.sampled_from((0, 0, 1, 2, 9)), min_size=32, max_size=32), st.integers(0, 1), st.sampled_from((0, 0, 1, 2)))
    def test_an_empty_entry_has_no_tag(self, cells: list[int], line: int, tag: int) -> None:
        # An entry is a tag above 4 bits of slot + 1: 0 is empty, whatever the tag that is looked for.
        entries = [cell << 4 | 5 if cell else 0 for cell in cells]
        entries[3] = 7  # a slot whose tag is 0
        found, free = tag_matches(np.array(entries, np.uint32), line, 4, tag << 4)
        here = entries[16 * line : 16 * line + 16]
        assert found == sum(1 << lane for lane, entry in enumerate(here) if entry and entry >> 4 == tag)
        assert free == sum(1 << lane for lane, entry in enumerate(here) if entry == 0)

    def test_a_free_slot_is_no_users(self) -> None:
        # The ID word of a free slot names the next free one: here there is none, and 0 is not the user 0.
        shard = Shard(Config.of("10ns", users=4, shards=1), 4, random_keys(1))
        Rows(shard).take([5], [0])
        shard.expire(1, "int64")
        assert shard.memory[at.ID] == 0
        assert not holds(shard.memory, shard.index.arena, 0, np.uint64(0), 0, np.empty(0, np.uint8), 0, 0, False)


class Rows:
    """Rows into one shard, as an engine gives them to it."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.clock_ns: int | None = None

    def take(self, users: Any, times: Any, units: Any = None, *, located: bool = False) -> tuple[list[float], list[int]]:
        """Put in one batch; the clock is the greatest time so far. Returns the scores and the reasons of its rows."""
        shard, count = self.shard, len(users)
        ids = ids_of(pa.array(users), "user_id")
        times = np.asarray(times, np.int64)
        units = np.ones(count, np.int64) if units is None else np.asarray(units, np.int64)
        columns = Columns(None, ids, times, units, np.zeros(count, np.uint8), np.zeros(count, np.uint8))
        hashes, (rows,) = split_rows(ids, columns.reasons, shard.index.keys, 1)
        clock_ns = np.maximum.accumulate(times if self.clock_ns is None else np.maximum(times, self.clock_ns))
        self.clock_ns = int(clock_ns[-1])
        slots = None
        if located:
            slots, done = shard.reserve(ids, hashes, rows)
            assert done == count
        scores = np.full(count, np.nan)
        shard.take(columns, hashes, clock_ns, int(abs(units).max()), rows, slots, scores)
        return scores.tolist(), columns.reasons.tolist()

    def expire(self, kind: str = "int64", slots: int | None = None) -> None:
        assert self.clock_ns is not None
        floor_ns = self.clock_ns - self.shard.config.retention_ns
        if slots is None:
            self.shard.expire(floor_ns, kind)
        else:
            self.shard.sweep(kind, floor_ns, slots, most=1 << 30)


def workload(seed: int, kind: str) -> list[tuple[list[Any], list[int], list[int]]]:
    """Batches of a few users, some busy and some not, that come, go silent, and come again; late and equal times; amounts of all sizes."""
    draw = np.random.default_rng(seed)
    clock, batches = 0, []
    for _ in range(12):
        count = int(draw.integers(1, 300))
        clock += int(draw.choice([0, 5, 40, 300]))
        steps = draw.integers(0, int(draw.choice([2, 3, 12])), count)
        times = clock + np.cumsum(steps) - np.where(draw.random(count) < 0.3, draw.integers(0, 16, count), 0)
        clock += int(steps.sum())
        users = (draw.pareto(0.7, count) % 40).astype(np.int64) + int(draw.integers(0, 3)) * 20
        units = np.where(draw.random(count) < 0.1, draw.choice([-(2**53), 2**53], count), draw.integers(-100, 10_000, count))
        names = users.tolist() if kind == "int64" else [f"{'u' * (user % 19)}{user}" for user in users.tolist()]
        batches.append((names, times.tolist(), units.tolist()))
    return batches


def a_shard(users: int = 100) -> Shard:
    """A shard of a window of 20 ns and a lateness of 15 ns."""
    return Shard(Config.of("20ns", lateness="15ns", users=users, shards=1, decimals=0), users, random_keys(1))


class TestWaysIn:
    """The same rows by another way are the same bits in memory."""

    @pytest.mark.parametrize("kind", ["int64", "string"])
    @pytest.mark.parametrize("seed", range(10))
    def test_slots_known_beforehand_do_not_matter(self, seed: int, kind: str) -> None:
        ways = [Rows(a_shard()) for _ in range(2)]
        for batch in workload(seed, kind):
            found = [way.take(*batch, located=located) for way, located in zip(ways, (False, True), strict=True)]
            assert found[0] == found[1]
            for way in ways:
                way.shard.check(kind)
                way.expire(kind, None if len(batch[0]) % 3 == 0 else 7)
                way.shard.check(kind)
            self.same_memory(*[way.shard for way in ways])

    @staticmethod
    def same_memory(first: Shard, second: Shard) -> None:
        words = int(first.control[at.RING_NEXT]) * 2
        slabs = (words // 2 - int(first.control[at.RING_BASE])) // SLAB_ENTRIES * at.SLAB_WORDS
        arena = 8 * int(first.control[at.ARENA_NEXT])
        assert (first.control == second.control).all()
        assert (first.memory[:words] == second.memory[:words]).all()
        assert (first.slabs[:slabs] == second.slabs[:slabs]).all()
        assert (first.index.table == second.index.table).all()
        assert (first.index.arena[:arena] == second.index.arena[:arena]).all()

    @pytest.mark.parametrize("seed", range(10))
    def test_how_rows_are_cut_into_batches_does_not_matter_to_a_shard(self, seed: int) -> None:
        # Stages run ahead of the rows they are for only within a batch: one row at a time there is nothing to run ahead of.
        whole, single = Rows(a_shard()), Rows(a_shard())
        for users, times, units in workload(seed, "int64"):
            scores, reasons = whole.take(users, times, units)
            alone = [single.take([user], [time], [unit]) for user, time, unit in zip(users, times, units, strict=True)]
            assert [answer for answers, _ in alone for answer in answers] == pytest.approx(scores, rel=0, abs=0, nan_ok=True)
            assert [reason for _, given in alone for reason in given] == reasons
            whole.shard.check("int64")
            # All but what the greatest amount so far lets a batch take for granted.
            for register in (at.UNITS_MAX, at.SAFE_COUNT):
                single.shard.control[register] = whole.shard.control[register]
            self.same_memory(whole.shard, single.shard)


def to_judge(judge: Reference, users: list[Any], times: list[int]) -> list[float]:
    """Scores of rows of one unit, as the definition has them."""
    scores = [row.score for row in judge.ingest([(user, 1, time) for user, time in zip(users, times, strict=True)])]
    assert None not in scores
    return scores  # type: ignore[return-value]


class TestLinesAndRings:
    """Users whose entries fit their line, then do not, then do again."""

    @pytest.mark.parametrize("lateness", ["0ns", "15ns"])
    def test_from_line_to_ring_and_back(self, lateness: str) -> None:
        engine = RiskEngine("20ns", lateness=lateness, users=8, shards=1, decimals=0, max_ahead=None)
        judge, (shard,) = Reference(engine.config), engine._core.shards
        crossings: Counter[tuple[bool, bool]] = Counter()
        draw, clock, in_ring = np.random.default_rng(3), 0, False
        # Now and then one of units that a line just holds, or just does not.
        edges = [2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**53, -(2**53)]
        for turn in range(300):
            for _ in range(int(draw.integers(1, 8))):  # some rows in one window
                clock += int(draw.integers(0, 4))
                late = int(draw.choice([0, 0, min(engine.config.lateness_ns, 7)]))
                units = int(draw.choice(edges[: 2 if turn % 3 else 6]) if draw.random() < 0.2 else draw.integers(-(2**31), 2**31))
                row = ("a", units, clock - late)
                assert engine.add(row[0], row[1], instant(row[2])) == judge.ingest([row])[0].score
                if len(judge.retained("a")) == 1:
                    in_ring = False  # its slot may be another one
                slot = next(slot for slot in range(shard.slots_used) if shard.memory[slot * at.LINE_WORDS + at.META])
                now = bool(shard.memory[slot * at.LINE_WORDS + at.META] >= at.RING_FROM)
                crossings[in_ring, now] += 1
                in_ring = now
                shard.check("string")
                assert engine.digest() == judge.digest()
            clock += engine.config.retention_ns * int(draw.choice([3, 5, 6, 8, 9, 20])) // 10
            if turn % 5 == 0:
                engine.expire()
                shard.check("string")
                assert engine.digest() == judge.digest()
        assert min(crossings[False, True], crossings[True, False], crossings[True, True], crossings[False, False]) >= 5
        assert shard.bytes_used < 64 + 16 * SLAB_ENTRIES * 6 + shard.index.bytes_used

    @pytest.mark.parametrize("count", range(1, 9))
    @pytest.mark.parametrize("gone", range(8))
    def test_expiry_leaves_what_is_retained_where_it_fits(self, count: int, gone: int) -> None:
        # `gone` rows of 0 ns, then `count` that are retained.
        rows = Rows(Shard(Config.of("10ns", lateness="0ns", users=4, shards=1, decimals=0), 4, random_keys(1)))
        times = [0] * gone + list(range(10, 10 + count))
        rows.take([1] * (gone + count), times, [2**number for number in range(gone + count)])
        rows.take([2], [11])
        before = int(rows.shard.control[at.ENTRIES])
        rows.expire()
        retained = [time for time in times if time >= 1 + max(count - 2, 0)]
        found, units = rows.shard.entries(0)
        assert found.tolist() == retained
        assert units.tolist() == [2**number for number in range(gone + count)][len(times) - len(retained) :]
        in_ring = rows.shard.memory[at.META] >= at.RING_FROM
        assert in_ring == (len(retained) > 4)
        assert rows.shard.control[at.ENTRIES] == (len(retained) if in_ring else 0) <= before
        rows.shard.check("int64")

    def test_a_million_rows_in_a_window(self) -> None:
        # 40 us apart, 1.5 million of them are 60 s; then the oldest leave as fast as new ones come.
        count = 2_000_000 if KERNELS else 4_000
        step = 60_000_000_000 // (count * 3 // 4)
        draw = np.random.default_rng(1)
        units = draw.integers(-100_000, 1_000_000, count)
        times = 1_700_000_000_000_000_000 + np.arange(count) * step + draw.integers(0, step, count)
        engine = RiskEngine(users=4, shards=1, decimals=2, max_ahead=None, time_unit="ns")
        found = []
        for first in range(0, count, 1 << 16):
            part = slice(first, first + (1 << 16))
            columns = {"user_id": np.full(len(times[part]), 7), "amount": units[part] / 100, "timestamp": times[part]}
            found.append(engine.ingest(columns, scores=True).scores.to_numpy())
        left = np.searchsorted(times, times - engine.config.reach_ns)
        sums = np.concatenate([[0], np.cumsum(units)])
        counted = np.arange(1, count + 1) - left
        assert counted.max() >= count * 3 // 4 - 2
        assert (np.concatenate(found) == (sums[1:] - sums[left]) / (counted * 100)).all()
        (shard,) = engine._core.shards
        shard.check("int64")
        for back in (0, 10**9, 59 * 10**9):  # lookups in the past, and a row that goes behind most others
            at_ns = int(times[-1]) - back
            first, last = np.searchsorted(times, at_ns - engine.config.reach_ns), np.searchsorted(times, at_ns, side="right")
            assert engine.score(7, at=instant(at_ns)) == (sums[last] - sums[first]) / ((last - first) * 100)
        late_ns = int(times[-1]) - 59 * 10**9
        first, last = np.searchsorted(times, late_ns - engine.config.reach_ns), np.searchsorted(times, late_ns, side="right")
        assert engine.add(7, 1, instant(late_ns)) == (sums[last] - sums[first] + 100) / ((last - first + 1) * 100)
        assert engine.score(7) == (sums[-1] - sums[left[-1]] + 100) / ((counted[-1] + 1) * 100)
        shard.check("int64")
        assert engine.add(7, 1, instant(int(times[-1]) + 200 * 10**9)) == 1.0
        engine.expire()
        shard.check("int64")
        assert shard.memory[at.META] < at.RING_FROM
        assert shard.control[at.ENTRIES] == 0

    @pytest.mark.parametrize("seed", range(4))
    def test_rings_of_more_than_a_slab(self, seed: int) -> None:
        # Two users take turns in being busy; rings pass 64 lines, wrap, take late rows, and become short again.
        engine = RiskEngine("700ns", lateness="90ns", users=4, shards=1, decimals=0, max_ahead=None, time_unit="ns")
        judge, (shard,) = Reference(engine.config), engine._core.shards
        draw, clock, largest = np.random.default_rng(seed), 0, 0
        for turn in range(16):
            count = 250
            clock += int(draw.choice([0, 0, 300, 2_000]))
            steps = draw.integers(0, 3, count)
            times = clock + np.cumsum(steps) - np.where(draw.random(count) < 0.1, draw.integers(0, 90, count), 0)
            clock += int(steps.sum())
            users = np.where(draw.random(count) < 0.9, turn // 4 % 2, 1 - turn // 4 % 2)
            units = draw.integers(-(2**50), 2**50, count)
            rows = list(zip(users.tolist(), units.tolist(), times.tolist(), strict=True))
            found = engine.ingest({"user_id": users, "amount": units, "timestamp": times}, scores=True).scores.to_pylist()
            assert found == [row.score for row in judge.ingest(rows)]
            shard.check("int64")
            largest = max(largest, *(int(shard.memory[slot * at.LINE_WORDS + at.META]) >> at.PLACE_BITS for slot in range(2)))
            if turn % 3 == 0:
                engine.expire()
                shard.check("int64")
            assert engine.digest() == judge.digest()
        assert largest > SLAB_ENTRIES


class TestMemory:
    """What users who left had, others have; and what was checked to be there suffices."""

    def test_everybody_leaves(self) -> None:
        rows = Rows(a_shard(3_000))
        touched = []
        for turn in range(6):
            # Each time most users have rings of another size.
            length = (1, 3, 4, 9, 17, 30)[(turn * 5) % 6]
            users = np.repeat(np.arange(1_000) + 1_000 * turn, length)
            rows.take(users, np.full(len(users), 1_000 * turn))
            rows.shard.check("int64")
            rows.take([-1], [1_000 * turn + 500])
            rows.expire(slots=None if turn % 2 else 1_000_000)
            rows.shard.check("int64")
            assert rows.shard.users == 1
            assert rows.shard.control[at.ENTRIES] == 0
            touched.append(int(rows.shard.control[at.RING_NEXT] - rows.shard.control[at.RING_BASE]))
        most = 30 * 1_000
        assert touched[-1] <= 1.2 * most + SLAB_ENTRIES * at.MAGAZINE_LINES * at.MAGAZINE_BLOCKS

    @pytest.mark.parametrize("lengths", [(4,), (5,), (9,), (13, 4), (30, 6, 5)])
    def test_rings_leave_slabs_of_which_little_is_in_use(self, lengths: tuple[int, ...]) -> None:
        # One user in 30 stays, spread over all slabs; expiry moves their rings together, and nothing else about them changes.
        rows = Rows(Shard(Config.of("100ns", lateness="50ns", users=20_000, shards=1, decimals=0), 20_000, random_keys(1)))
        draw = np.random.default_rng(len(lengths))
        users = np.repeat(np.arange(6_000), np.resize(lengths, 6_000))
        units = draw.integers(-(2**50), 2**50, len(users))
        rows.take(users, np.sort(draw.integers(0, 60, len(users))), units)
        staying = users[users % 30 == 0]
        more = draw.integers(-(2**50), 2**50, len(staying))
        rows.take(staying, np.sort(draw.integers(190, 240, len(staying))), more)
        shard = rows.shard
        shard.check("int64")
        rows.take([0], [260])
        held, kept = self.slabs_held(shard), shard.entries(0)
        digest = shard.digest(260 - 150, "int64").tolist()
        places = shard.memory[at.META : at.LINE_WORDS * 6_000 : at.LINE_WORDS].copy()
        for _ in range(40):
            rows.expire(slots=16 * 997)
            shard.check("int64")
            assert shard.digest(260 - 150, "int64").tolist() == digest
        now = shard.memory[at.META : at.LINE_WORDS * 6_000 : at.LINE_WORDS]
        moved = (places != now) & (now >= at.RING_FROM) & (places >> at.PLACE_BITS == now >> at.PLACE_BITS)
        assert moved.sum() > 20
        assert [column.tolist() for column in shard.entries(0)] == [column.tolist()[-len(kept[0]) :] for column in kept]
        # A sixth of them may be free, and a fifth of a MiB: 51 slabs.
        assert self.slabs_held(shard) <= 1.2 * int(shard.control[at.RING_LINES]) / at.SLAB_LINES + 52 < held

    @staticmethod
    def slabs_held(shard: Shard) -> int:
        """Slabs that are not in the pool."""
        return int(shard.control[at.RING_NEXT] - shard.control[at.RING_BASE]) // SLAB_ENTRIES - int(shard.control[at.POOL_SLABS])

    @pytest.mark.parametrize("seed", range(12))
    def test_what_was_checked_to_be_there_suffices(self, seed: int) -> None:
        rows = Rows(a_shard(4_000))
        shard, draw = rows.shard, np.random.default_rng(seed)
        plenty, clock = int(shard.control[at.RING_LIMIT]), 0
        for _ in range(14):
            count = int(draw.choice([1, 40, 900]))
            users = draw.integers(0, int(draw.choice([1, 30, 1_000])), count)
            clock += int(draw.choice([0, 0, 0, 10, 60]))
            assert shard.room_for(count, count)
            # The least limit at which the batch is let in.
            low, high = int(shard.control[at.RING_NEXT]), plenty
            while low < high:
                shard.control[at.RING_LIMIT] = (low + high) // 2
                low, high = (low, (low + high) // 2) if shard.room_for(count, count) else ((low + high) // 2 + 1, high)
            rows.take(users, np.full(count, clock))
            assert shard.control[at.RING_NEXT] <= low
            rows.expire()
            assert shard.control[at.RING_NEXT] <= low
            shard.control[at.RING_LIMIT] = plenty
            shard.check("int64")


class TestRounds:
    """Expiry by marks: users go when they are due, whatever the clock does."""

    @pytest.mark.parametrize("seed", range(20))
    def test_a_round_frees_whom_it_must(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        config = Config.of("3us", lateness=("0s", "2us")[seed % 2], users=5_000, shards=1, decimals=0)
        rows = Rows(Shard(config, 5_000, random_keys(1)))
        shard, clock = rows.shard, int(draw.integers(-(10**9), 10**9))
        newest: dict[int, int] = {}
        for _ in range(60):
            # Now and then the clock leaps so far that marks mean another time.
            clock += int(draw.choice([3, 40, 90, 700, 9_000, 400_000], p=[0.3, 0.3, 0.15, 0.1, 0.1, 0.05]))
            users = draw.integers(0, 600, int(draw.integers(1, 120)))
            times = clock - draw.integers(0, config.lateness_ns // 2 + 1, len(users))
            times[0] = clock
            rows.take(users, times)
            for user, time in zip(users.tolist(), times.tolist(), strict=True):
                newest[user] = max(newest.get(user, time), time)
            while True:  # the rest of a round, then a whole one
                begun = shard.control[at.SWEPT] > 0
                rows.expire(slots=int(draw.integers(1, 400)) if begun else 1_000_000)
                shard.check("int64")
                if not begun:
                    break
            epoch = 1 << int(shard.control[at.EPOCH_BITS])
            floor_ns = clock - config.retention_ns
            # No mark is left that was due; all of them can still be told apart.
            slots = shard.slots_retained(-(2**63))
            newest_epochs = shard.newest(slots) // epoch
            marked = newest_epochs - (newest_epochs - shard.marks[slots]) % at.MARKED
            assert (marked >= floor_ns // epoch).all()
            held = set(shard.ids_of(shard.slots_retained(-(2**63)), "int64").values.tolist())
            assert {user for user, time in newest.items() if time >= floor_ns} <= held
            late = [user for user in held if newest[user] < floor_ns - epoch]
            assert not late, f"users {late} should have gone"
            newest = {user: time for user, time in newest.items() if user in held}

    def test_a_round_by_lines_marks_anew(self) -> None:
        rows = Rows(a_shard())
        rows.take([7] * 10, np.arange(10))
        assert rows.shard.marks[0] == at.MARKED | 3  # that of its last row in the line; an epoch is a nanosecond here
        rows.expire(slots=10_000)
        assert rows.shard.marks[0] == at.MARKED | 9

    def test_it_ends_when_enough_was_looked_into(self) -> None:
        rows = Rows(a_shard(10_000))
        rows.take(np.arange(5_000), np.zeros(5_000))
        rows.take([-1], [1_000])
        shard = rows.shard
        while shard.users > 1:
            before = shard.users
            shard.sweep("int64", 1_000 - 35, 1_000_000, most=1)
            shard.check("int64")
            assert 0 < before - shard.users <= 1_024

    def test_a_quiet_ring_is_shortened(self) -> None:
        rows = Rows(a_shard(100))
        rows.take([7] * 200, np.arange(200) // 20)
        for clock in range(10, 200):
            rows.take([7, 8], [clock, clock])
            rows.expire(slots=64)
            rows.shard.check("int64")
        assert int(rows.shard.control[at.RING_LINES]) < 30


class TestUnitsOfLines:
    """A line holds units of 32 bits; what is larger makes the user's entries a ring, wherever it comes."""

    @pytest.mark.parametrize("large", [2**31 - 1, 2**31, 2**53, -(2**31), -(2**31) - 1, -(2**53)])
    @pytest.mark.parametrize("position", range(6))
    @pytest.mark.parametrize("order", ["in order", "late", "equal"])
    def test_one_large_amount(self, large: int, position: int, order: str) -> None:
        rows = Rows(a_shard())
        times = {"in order": list(range(6)), "late": [5, 1, 4, 0, 3, 2], "equal": [3] * 6}[order]
        units = [10**number for number in range(6)]
        units[position] = large
        for at_once in (1, 2, 6):
            rows = Rows(a_shard())
            for first in range(0, 6, at_once):
                part = slice(first, first + at_once)
                rows.take([9] * at_once, times[part], units[part])
                rows.shard.check("int64")
                in_ring = rows.shard.memory[at.META] >= at.RING_FROM
                held = units[: first + at_once]
                assert in_ring == (len(held) > 4 or any(not -(2**31) <= each < 2**31 for each in held))
            found = [column.tolist() for column in rows.shard.entries(0)]
            assert list(zip(*found, strict=True)) == sorted(zip(times, units, strict=True), key=lambda entry: entry[0])

    def test_a_large_amount_leaves_and_the_line_comes_back(self) -> None:
        rows = Rows(a_shard())
        scores = rows.take([9], [0], [2**40])[0]
        scores += rows.take([9] * 3, [36, 37, 38], [1, 2, 3])[0]
        rows.shard.check("int64")
        scores += rows.take([9] * 3, [80, 81, 82], [4, 5, -(2**31)])[0]
        rows.shard.check("int64")
        assert rows.shard.memory[at.META] == 1
        assert scores == [2.0**40, 1.0, 1.5, 2.0, 4.0, 4.5, (9 - 2**31) / 3]

    @pytest.mark.parametrize("large", [2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1])
    @pytest.mark.parametrize("by_expiry", [True, False])
    def test_the_last_of_a_ring(self, large: int, by_expiry: bool) -> None:
        # Seven of 0 ns go at 36 ns, by expiry or because the ring is full of them and the next row comes; the one of 30 ns stays.
        rows = Rows(a_shard())
        rows.take([9] * 8, [0] * 7 + [30], [1] * 7 + [large])
        if by_expiry:
            rows.take([8], [36])
            rows.expire()
        else:
            assert rows.take([9], [36], [3])[0] == [(large + 3) / 2]
        rows.shard.check("int64")
        assert rows.shard.entries(0)[1].tolist() == [large] + [3] * (not by_expiry)
        assert (rows.shard.memory[at.META] == 1) == (-(2**31) <= large < 2**31)

    @pytest.mark.parametrize("large", [2**31 - 1, 2**31, -(2**31), -(2**31) - 1])
    @pytest.mark.parametrize("stay", range(4))
    def test_a_large_row_comes_when_a_ring_is_full_of_what_goes(self, large: int, stay: int) -> None:
        rows = Rows(a_shard())
        rows.take([9] * 8, [0] * (8 - stay) + [30] * stay, [1] * 8)
        assert rows.take([9], [36], [large])[0] == [(large + stay) / (1 + stay)]
        rows.shard.check("int64")
        assert rows.shard.entries(0)[1].tolist() == [1] * stay + [large]
        assert (rows.shard.memory[at.META] == 1) == (-(2**31) <= large < 2**31)
