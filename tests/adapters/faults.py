"""All faults at full size, on real servers, and a table of what came of them: `python -m tests.adapters.faults`, for an hour or so.

More words are pytest's: `python -m tests.adapters.faults -k zombie`. Ends with 1 if one of the promises was not kept.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from engine.terminal import show_aligned


class Table:
    """What pytest tells of each test, as a line."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = [("fault", "held", "seconds", "what was measured")]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            held = {"passed": "yes", "failed": "NO"}.get(report.outcome, report.outcome)
            figures = "; ".join(
                f"{what} {value:,}" if isinstance(value, int) else f"{what} {value}" for what, value in report.user_properties
            )
            self.rows.append((name, held, f"{report.duration:.0f}", figures))


def main() -> int:
    os.environ["RISKRING_FAULTS"] = "full"
    table = Table()
    code = pytest.main(["-q", "--no-header", os.path.join(os.path.dirname(__file__), "test_faults.py"), *sys.argv[1:]], [table])
    print()
    show_aligned(table.rows, (2,))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
