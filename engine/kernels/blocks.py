"""Memory of rings: blocks of whole 64-byte lines, given out and taken back in constant time.

The ring area is cut into slabs of 64 lines. A slab holds blocks of one size, and a bit for each that is free; slabs with a free
block are linked by size, slabs without any block in use are in one pool for all sizes (Bonwick, "The Slab Allocator", USENIX 1994).
So what one size gave up serves any other, a freed block is not touched, and what is known of slabs is a 128th of the memory they are.
A ring of more than 64 lines takes whole slabs side by side.

Small blocks pass through a magazine, a stack of those given back last (Bonwick and Adams, "Magazines and Vmem", USENIX 2001): what
one row gives up the next one takes while it is still cached, and the slabs of both are left alone.
"""

import numpy as np

from engine.config import BLOCK_LINES
from engine.kernels.compile import bits_set, inline, lowest_bit, natural, prefetch
from engine.kernels.layout import (
    BLOCK_ENTRIES,
    MAGAZINE_BLOCKS,
    MAGAZINE_LINES,
    MAGAZINE_WORDS,
    MAGAZINES,
    POOL_SLABS,
    RING_BASE,
    RING_LINES,
    RING_NEXT,
    SEARCHED_SLABS,
    SLAB_BLOCK,
    SLAB_CURSOR,
    SLAB_FREE,
    SLAB_HEADS,
    SLAB_LINES,
    SLAB_NEXT,
    SLAB_PREVIOUS,
    SLAB_WORDS,
)

SLAB_ENTRIES = SLAB_LINES * BLOCK_ENTRIES

#: Lines of the block that comes next that are asked for; the processor sees for itself how longer copies go on.
ASKED_LINES = 4

_FITTING = np.array([min(size for size in BLOCK_LINES if size >= lines) for lines in range(SLAB_LINES + 1)])


@inline
def lines_for(entries):
    """Lines of the smallest block that holds so many entries."""
    lines = (entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
    if lines <= SLAB_LINES:
        return _FITTING[lines]
    return (lines + SLAB_LINES - 1) // SLAB_LINES * SLAB_LINES


@inline
def larger(capacity):
    """Lines of the block that a full ring moves to: the next size, beyond whole slabs a quarter more."""
    if capacity < SLAB_ENTRIES:
        return lines_for(capacity + 1)
    return lines_for(capacity + (capacity >> 2))


@inline
def all_free(lines):
    """The bits of a slab of which all blocks are free."""
    count = SLAB_LINES // lines
    if count == SLAB_LINES:
        return np.int64(-1)
    return (np.int64(1) << count) - 1


@inline
def link(control, slabs, slab, lines):
    """Put a slab in front of the list of its size; 0 is the pool."""
    control[POOL_SLABS] += np.int64(lines == 0)
    at = natural(slab) * SLAB_WORDS
    head = control[SLAB_HEADS + lines]
    slabs[at + SLAB_NEXT] = head
    slabs[at + SLAB_PREVIOUS] = 0
    if head != 0:
        slabs[(head - 1) * SLAB_WORDS + SLAB_PREVIOUS] = slab + 1
    control[SLAB_HEADS + lines] = slab + 1


@inline
def unlink(control, slabs, slab, lines):
    """Take a slab out of the list of its size."""
    control[POOL_SLABS] -= np.int64(lines == 0)
    following = slabs[natural(slab) * SLAB_WORDS + SLAB_NEXT]
    previous = slabs[slab * SLAB_WORDS + SLAB_PREVIOUS]
    if following != 0:
        slabs[(following - 1) * SLAB_WORDS + SLAB_PREVIOUS] = previous
    if previous != 0:
        slabs[(previous - 1) * SLAB_WORDS + SLAB_NEXT] = following
    else:
        control[SLAB_HEADS + lines] = following


@inline
def slabs_beside(control, slabs, count):
    """First of so many slabs side by side that are in the pool, or -1. Looks at few slabs, from where the last search ended."""
    end = (control[RING_NEXT] - control[RING_BASE]) // SLAB_ENTRIES
    slab = control[SLAB_CURSOR]
    held = 0
    for _ in range(SEARCHED_SLABS + count):
        if slab >= end:
            slab = 0
            held = 0
        held = held + 1 if slab < end and slabs[slab * SLAB_WORDS + SLAB_BLOCK] == 0 else 0
        slab += 1
        if held == count:
            control[SLAB_CURSOR] = slab
            return slab - count
    control[SLAB_CURSOR] = slab - held
    return np.int64(-1)


@inline
def large_add(control, slabs, lines):
    """Place of a block of whole slabs."""
    count = lines // SLAB_LINES
    first = slabs_beside(control, slabs, count)
    if first < 0:
        first = (control[RING_NEXT] - control[RING_BASE]) // SLAB_ENTRIES
        control[RING_NEXT] += count * SLAB_ENTRIES
    else:
        for slab in range(first, first + count):
            unlink(control, slabs, slab, 0)
    for slab in range(first, first + count):
        slabs[slab * SLAB_WORDS + SLAB_BLOCK] = SLAB_LINES
        slabs[slab * SLAB_WORDS + SLAB_FREE] = 0
    return control[RING_BASE] + first * SLAB_ENTRIES


@inline
def new_slab(control, slabs, lines):
    """A slab of free blocks of this size: from the pool, or memory never used (checked to be there)."""
    if control[SLAB_HEADS] != 0:
        slab = control[SLAB_HEADS] - 1
        unlink(control, slabs, slab, 0)
    else:
        slab = (control[RING_NEXT] - control[RING_BASE]) // SLAB_ENTRIES
        control[RING_NEXT] += SLAB_ENTRIES
    slabs[slab * SLAB_WORDS + SLAB_BLOCK] = lines
    slabs[slab * SLAB_WORDS + SLAB_FREE] = all_free(lines)
    link(control, slabs, slab, lines)
    return slab


@inline
def slab_take(memory, control, slabs, lines):
    """Place of a free block of a slab. Asks for the memory of the block that comes next."""
    slab = control[SLAB_HEADS + lines] - 1
    if slab < 0:
        slab = new_slab(control, slabs, lines)
    free = slabs[natural(slab) * SLAB_WORDS + SLAB_FREE]
    block = lowest_bit(free)
    free &= ~(np.int64(1) << block)
    slabs[slab * SLAB_WORDS + SLAB_FREE] = free
    place = control[RING_BASE] + slab * SLAB_ENTRIES + block * lines * BLOCK_ENTRIES
    if free == 0:
        unlink(control, slabs, slab, lines)
        slab = control[SLAB_HEADS + lines] - 1
        if slab >= 0:
            free = slabs[slab * SLAB_WORDS + SLAB_FREE]
    if free != 0:
        following = control[RING_BASE] + slab * SLAB_ENTRIES + lowest_bit(free) * lines * BLOCK_ENTRIES
        for line in range(min(lines, ASKED_LINES)):
            prefetch(memory, 2 * (following + line * BLOCK_ENTRIES))
    return place


@inline
def slab_give(control, slabs, place, lines):
    """Give a block back to its slab."""
    slab = natural((place - control[RING_BASE]) // SLAB_ENTRIES)
    block = (place - control[RING_BASE]) % SLAB_ENTRIES // (lines * BLOCK_ENTRIES)
    held = slabs[slab * SLAB_WORDS + SLAB_FREE]
    free = held | np.int64(1) << block
    slabs[slab * SLAB_WORDS + SLAB_FREE] = free
    if free == all_free(lines):
        if held != 0:
            unlink(control, slabs, slab, lines)
        slabs[slab * SLAB_WORDS + SLAB_BLOCK] = 0
        link(control, slabs, slab, 0)
    elif held == 0:
        link(control, slabs, slab, lines)


@inline
def block_add(memory, control, slabs, lines):
    """Place of a block of so many lines."""
    control[RING_LINES] += lines
    if lines > SLAB_LINES:
        return large_add(control, slabs, lines)
    if lines <= MAGAZINE_LINES:
        magazine = MAGAZINES + (lines - 1) * MAGAZINE_WORDS
        held = natural(control[magazine])
        if held > 0:
            control[magazine] = held - 1
            return control[magazine + held]
    return slab_take(memory, control, slabs, lines)


@inline
def block_remove(control, slabs, place, capacity):
    """Give a block back."""
    lines = capacity // BLOCK_ENTRIES
    control[RING_LINES] -= lines
    if lines > SLAB_LINES:
        slab = natural((place - control[RING_BASE]) // SLAB_ENTRIES)
        for each in range(slab, slab + lines // SLAB_LINES):
            slabs[each * SLAB_WORDS + SLAB_BLOCK] = 0
            link(control, slabs, each, 0)
        return
    if lines > MAGAZINE_LINES:
        slab_give(control, slabs, place, lines)
        return
    magazine = MAGAZINES + (lines - 1) * MAGAZINE_WORDS
    held = natural(control[magazine])
    if held == MAGAZINE_BLOCKS:  # the half that has been there longest makes room
        held = MAGAZINE_BLOCKS // 2
        for at in range(1, held + 1):
            slab_give(control, slabs, control[magazine + at], lines)
            control[magazine + at] = control[magazine + held + at]
    control[magazine] = held + 1
    control[magazine + held + 1] = place


@inline
def scattered(control):
    """Whether more than a sixth of the slabs that are not in the pool is free blocks (and more than a MiB)."""
    held = (control[RING_NEXT] - control[RING_BASE]) // BLOCK_ENTRIES - control[POOL_SLABS] * SLAB_LINES
    return 5 * held > 6 * control[RING_LINES] + (SLAB_LINES << 8)


@inline
def sparse(control, slabs, place, capacity):
    """Whether a block is in a slab of which less than half is in use, and which is not the one that is being filled."""
    lines = capacity // BLOCK_ENTRIES
    slab = natural((place - control[RING_BASE]) // SLAB_ENTRIES)
    if lines > SLAB_LINES or control[SLAB_HEADS + lines] == slab + 1 or control[SLAB_HEADS + lines] == 0:
        return False
    return 2 * bits_set(slabs[slab * SLAB_WORDS + SLAB_FREE]) > SLAB_LINES // lines
