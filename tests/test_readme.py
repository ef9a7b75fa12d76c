"""The README: its Python session and its commands are run, and print what it says they print."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from engine import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
#: What differs from run to run.
TIMES = re.compile(r"[\d,]+ rows/s|in \d+\.\d s|memory +[0-9.]+ GB  of this machine: .*")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Each `$ riskring ...` and what it prints."""
    parts = "".join(blocks("console")).split("$ riskring ")[1:]
    return [(line, shown) for line, _, shown in (part.partition("\n") for part in parts)]


def test_python_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are one session."""
    pytest.importorskip("polars")
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest("".join(block for block in blocks("python") if ">>>" in block), {}, "README.md", None, 0)
    report = io.StringIO()
    result = doctest.DocTestRunner().run(session, out=report.write)
    assert result.attempted > 15
    assert result.failed == 0, report.getvalue()


def test_the_commands_are_found() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize(("line", "shown"), commands(), ids=[line.split()[0] for line, _ in commands()])
def test_command(line: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RISKRING_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.redirect_stderr(found):
        assert cli.main(shlex.split(line)) == 0
    assert TIMES.sub("...", found.getvalue()) == TIMES.sub("...", shown)
