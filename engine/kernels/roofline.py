"""What the memory of this machine can do: random 64-byte lines read and written one after another, with prefetch.

No part of the engine. The package does not import it, so only who measures compiles it.
"""

from __future__ import annotations

from engine.kernels.compile import I64, I64_IN, i64, kernel, prefetch


@kernel(i64, I64_IN, i64, I64)
def touch_lines(
    lines,  # (n,)   int64  in     line numbers, from 0 to m - 1
    ahead,  # ()     int64  in     how far ahead to prefetch
    memory,  # (8 m,) int64  inout  8 words a line; the first is read, the second written
):
    """Read and write a word of each line, in the order given; the sum of what was read.

    Needs and keeps no invariant. Cost: n random lines, and n numbers in sequence.
    """
    total = 0
    for position in range(len(lines)):
        if position + ahead < len(lines):
            prefetch(memory, lines[position + ahead] * 8)
        total += memory[lines[position] * 8]
        memory[lines[position] * 8 + 1] = total
    return total
