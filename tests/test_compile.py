"""Compiled code on disk: where it goes, and what is said when it can go nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIRST_SCORE = "from engine import RiskEngine; print(RiskEngine(max_ahead=None, users=1000).add(7, 12.5, '2026-01-01'))"
NO_FOLDER = "from numba.core import caching; caching.CacheImpl._locator_classes = []; caching._CacheImpl = caching.CacheImpl; "


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that sees the checkout and nothing of this process's settings for Numba."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    kept["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-P", "-W", "always", "-c", program]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")
class TestCache:
    """Of machine code."""

    def test_it_goes_where_it_is_told(self, tmp_path: Path) -> None:
        done = run(FIRST_SCORE, NUMBA_CACHE_DIR=str(tmp_path))
        assert (done.stdout, done.stderr) == ("12.5\n", "")
        assert list(tmp_path.rglob("*.nbi"))

    def test_without_a_folder_there_is_one_warning_and_the_same_score(self) -> None:
        done = run(NO_FOLDER + FIRST_SCORE)
        assert done.stdout == "12.5\n"
        assert done.stderr.count("no folder for compiled code is writable; set NUMBA_CACHE_DIR") == 1
        assert done.stderr.count("Warning") == 1

    def test_a_change_of_any_kernel_file_compiles_anew(self, tmp_path: Path) -> None:
        """Kernels inline each other's helpers, and Numba looks only at the file that a kernel is in."""
        root = Path(__file__).parent.parent
        shutil.copytree(root / "engine", tmp_path / "copy" / "engine", ignore=shutil.ignore_patterns("__pycache__"))
        layout = tmp_path / "copy" / "engine" / "kernels" / "layout.py"
        assert run(FIRST_SCORE, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path / "copy")).stdout == "12.5\n"
        before = set((tmp_path / "cache").rglob("*.nbi"))
        layout.write_text(layout.read_text() + "# changed\n")
        assert run(FIRST_SCORE, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path / "copy")).stdout == "12.5\n"
        assert len(set((tmp_path / "cache").rglob("*.nbi")) - before) == len(before)
