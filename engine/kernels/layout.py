"""Where things lie in a shard's memory: words of a slot line, registers of the control array.

A shard is one flat int64 array. Its first part is slot lines of 64 bytes, one per user:

    word 0  ID      integer id; for byte ids: place in the arena (8-byte units) << 32 | high half of the hash
    word 1  TOTAL   sum of all units this user ever had, modulo 2**64: the `before` of its next entry
    word 2  RING    capacity << PLACE_BITS | place of the ring's first entry (16-byte units in the flat array)
    word 3  SPAN    count << 32 | start
    word 4-7        with capacity 2: the ring itself, two entries of (time, before)
                    with a larger ring: NEWEST, LEFT_TIME, LEFT_BEFORE, LEFT - what the next row needs to know of it

A larger ring lies behind the slot lines in the same array; its capacity is a power of two from 4 on. Entries are
addressed alike in both cases: entry k of a ring is the words 2 * (place + k) and 2 * (place + k) + 1.

`before` is the prefix sum of the user's units before the entry. The units of a span of entries are the difference
of two of them, exact as long as the true sum fits int64: nothing is ever subtracted on expiry, so nothing can drift.

LEFT is the index (from start) of the first entry that the window of the newest entry holds; LEFT_TIME and LEFT_BEFORE
are that entry's words. It only moves forward with rows in order, so a hot user's row costs no search.

A free slot has RING = 0 and its ID word holds the next free slot + 1. A free ring block holds in its first word the
place of the next free block of its size.
"""

LINE_WORDS = 8
ID, TOTAL, RING, SPAN = 0, 1, 2, 3
NEWEST, LEFT_TIME, LEFT_BEFORE, LEFT = 4, 5, 6, 7
INLINE_CAPACITY = 2

PLACE_BITS = 36
PLACE_MASK = (1 << PLACE_BITS) - 1
HALF_BITS = 32
HALF_MASK = (1 << HALF_BITS) - 1

# Registers of the control array.
SLOTS_MAX = 0  # slot lines reserved
SLOTS_USED = 1  # slot lines ever used; those above were never touched
SLOT_FREE = 2  # first free slot + 1, or 0
USERS = 3  # slots in use
ENTRIES = 4  # entries held, expired ones included
UNITS_MAX = 5  # greatest |units| ever applied
SAFE_COUNT = 6  # so many entries of UNITS_MAX cannot leave int64
COUNT_MAX = 7  # greatest count a ring has had since the last whole sweep
RING_NEXT = 8  # place behind the last ring ever made
RING_LIMIT = 9  # place behind the ring area
TABLE_LINES = 10  # index lines of 16 entries
SLOT_BITS = 11  # low bits of an index entry that hold slot + 1
ARENA_NEXT = 12  # first arena unit (8 bytes) never used
ARENA_LIMIT = 13  # units reserved
ARENA_FREE = 14  # units in free records
RING_FREE = 15  # entries in free ring blocks
RING_HEADS = 16  # 28 heads of free ring blocks, by log2 of their capacity
RING_CLASSES = 28
ARENA_HEADS = RING_HEADS + RING_CLASSES  # heads of free arena records: exact sizes below 64 units, then powers of two
ARENA_EXACT = 64
ARENA_CLASSES = ARENA_EXACT + 32
CONTROL_WORDS = ARENA_HEADS + ARENA_CLASSES

# Index lines.
BUCKET = 16
DISPLACED = 1 << 31

#: Rows that a prefetch runs ahead of its use.
AHEAD = 24

TIME_MIN = -(2**63) + 1
INT64_MAX = 2**63 - 1
EXACT_FLOAT = 2**53
