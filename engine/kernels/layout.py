"""Where things lie in a shard's memory: words of a slot line, registers of the control array.

A shard is one flat int64 array. Its first part is slot lines of 64 bytes, one per user:

    word 0  ID      integer id; for byte ids: place in the arena (8-byte units) << 32 | high half of the hash
    word 1  META    0: the slot is free; 1: the line holds the entries; else capacity << PLACE_BITS | place of a ring

In a line that holds its entries, up to four of them:

    word 2-5  TIMES     their times, oldest first; EMPTY, which is before every time there is, in front where there are fewer
    word 6-7  AMOUNTS   their units, as four 32-bit integers, low half first; 0 where there is no entry

A line whose user has more retained entries, or one of units that do not fit, names a ring, behind the slot lines in the same array, and
tells what the next row needs of it:

    word 2  TOTAL        sum of all units this ring ever had, modulo 2**64: the `before` of its next entry
    word 3  LEFT_TIME    time and `before` of entry LEFT
    word 4  LEFT_BEFORE
    word 5  NEWEST       time of its newest entry, where that of a line's newest is too
    word 6  LEFT         index (from start) of the first entry that the window of the newest entry holds
    word 7  SPAN         count << 32 | start

Entry k of a ring is the words 2 * (place + k) and 2 * (place + k) + 1: (time, before). `before` is the prefix sum of the user's units
in front of the entry. The units of a span of entries are the difference of two of them, exact as long as the true sum fits int64: nothing
is ever subtracted on expiry, so nothing can drift. LEFT only moves forward with rows in order, so a hot user's row costs no search.

Rings lie in blocks of whole 64-byte lines (four entries), these in slabs of 64 lines. What is known of slab s stands in the array `slabs`
from word 4 * s on:

    word 0  SLAB_FREE      a bit for each of its blocks that is free
    word 1  SLAB_NEXT      next and previous slab of its list + 1, or 0
    word 2  SLAB_PREVIOUS
    word 3  SLAB_BLOCK     lines of its blocks; 0: none is in use, the slab is in the pool

The ID word of a free slot holds the next free slot + 1.
"""

LINE_WORDS = 8
ID, META = 0, 1
TIMES, AMOUNTS = 2, 6
TOTAL, LEFT_TIME, LEFT_BEFORE, NEWEST, LEFT, SPAN = 2, 3, 4, 5, 6, 7
INLINE_CAPACITY = 4
INLINE_UNITS = 2**31  # units in a line are at least -INLINE_UNITS and less than this

PLACE_BITS = 36
PLACE_MASK = (1 << PLACE_BITS) - 1
RING_FROM = 1 << PLACE_BITS  # META of a line with a ring is at least this
HALF_BITS = 32
HALF_MASK = (1 << HALF_BITS) - 1

# Rings.
BLOCK_ENTRIES = 4  # entries of a 64-byte line, the unit in which blocks are given out
SLAB_LINES = 64
SLAB_WORDS = 4
SLAB_FREE, SLAB_NEXT, SLAB_PREVIOUS, SLAB_BLOCK = 0, 1, 2, 3
SEARCHED_SLABS = 4096  # slabs looked at for a large ring before memory never used is taken

# Marks: a byte for each slot, 0 while it is free; else MARKED and, in epochs modulo MARKED, a time that its newest entry is not before. An
# epoch is 2**EPOCH_BITS ns, a 32nd to a 64th of the retention, so that the marks of what is retained are less than 64 epochs apart.
MARKED = 128
MARK_EPOCHS = 64
MARK_LANES = 64  # marks that are compared at once

# Registers of the control array.
SLOTS_MAX = 0  # slot lines reserved
SLOTS_USED = 1  # slot lines ever used; those above were never touched
SLOT_FREE = 2  # first free slot + 1, or 0
USERS = 3  # slots in use
ENTRIES = 4  # entries held in rings, expired ones included
UNITS_MAX = 5  # no |units| ever applied is greater
SAFE_COUNT = 6  # so many entries of UNITS_MAX cannot leave int64
COUNT_MAX = 7  # greatest count a ring has had since they were last counted
RING_BASE = 8  # place of the ring area's first entry
RING_NEXT = 9  # place behind the last slab ever used
RING_LIMIT = 10  # place behind the ring area
SLAB_CURSOR = 11  # slab where the next search for a large ring begins
TABLE_LINES = 12  # index lines of 16 entries
SLOT_BITS = 13  # low bits of an index entry that hold slot + 1
ARENA_NEXT = 14  # first arena unit (8 bytes) never used
ARENA_LIMIT = 15  # units reserved
ARENA_FREE = 16  # units in free records
SLAB_HEADS = 17  # first slab + 1 that has free blocks of so many lines; 0: the pool
ARENA_HEADS = SLAB_HEADS + SLAB_LINES + 1  # heads of free arena records: exact sizes below 64 units, then powers of two
ARENA_EXACT = 64
ARENA_CLASSES = ARENA_EXACT + 32
RING_LINES = ARENA_HEADS + ARENA_CLASSES  # lines of rings in use
POOL_SLABS = RING_LINES + 1  # slabs in the pool
MAGAZINES = POOL_SLABS + 1  # for each block of up to 8 lines: how many are in its magazine, and their places
MAGAZINE_LINES = 8
MAGAZINE_BLOCKS = 32
MAGAZINE_WORDS = 1 + MAGAZINE_BLOCKS
SWEPT = MAGAZINES + MAGAZINE_LINES * MAGAZINE_WORDS  # slot where the round of expiry goes on
EPOCH_BITS = SWEPT + 1
GONE = EPOCH_BITS + 1  # how many of the users that expiry emptied are listed
SCATTERED = GONE + 1  # whether much ring memory lay between rings in use when expiry last looked
CONTROL_WORDS = SCATTERED + 1

# Index lines.
BUCKET = 16
DISPLACED = 1 << 31

#: Rows that a prefetch runs ahead of its use.
AHEAD = 12

EMPTY = -(2**63)
TIME_MIN = -(2**63) + 1
INT64_MAX = 2**63 - 1
EXACT_FLOAT = 2**53
