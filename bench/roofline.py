"""What the memory of this machine can do: random 64-byte lines read and written one after another, with prefetch."""

from __future__ import annotations

import numpy as np

from engine.kernels.compile import I64, I64_IN, i64, kernel, prefetch
from engine.memory import reserved


@kernel(i64, I64_IN, i64, I64)
def touch_lines(
    lines,  # (n,)  int64  in     line numbers, random
    ahead,  # ()    int64  in     how far ahead to prefetch
    memory,  # ...   int64  inout  8 words a line
):
    """Read and write a word of each line."""
    total = 0
    for position in range(len(lines)):
        if position + ahead < len(lines):
            prefetch(memory, lines[position + ahead] * 8)
        total += memory[lines[position] * 8]
        memory[lines[position] * 8 + 1] = total
    return total


def random_lines(users: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory of one line a user, touched, and `count` random line numbers."""
    memory = reserved(users * 8, np.int64)
    memory[::8] = 1
    return memory, np.random.default_rng(5).integers(0, users, count)
