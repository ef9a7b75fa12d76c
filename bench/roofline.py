"""What the memory of this machine can do: random 64-byte lines read and written one after another, with prefetch.

Kernel and memory are the engine's own, which `riskring bench` measures too; here are their names for the benchmarks.
"""

from __future__ import annotations

from engine.kernels.roofline import touch_lines
from engine.measurements import line_costs, random_lines

__all__ = ["line_costs", "random_lines", "touch_lines"]
