"""Ctrl-C just as a thread starts: nobody knows the thread by then, but it is at work, and nothing may be pulled from under it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine import RiskEngine, SnapshotError, outputs, sources
from engine.storage import LocalStore


@pytest.fixture(autouse=True)
def _started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads start, and then the one who started them is interrupted."""
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        plain(thread)
        if thread.name.startswith("riskring"):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)


class Work:
    """What a thread does: it begins, and goes on when it may."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.under_way = False

    def do(self, *_: Any) -> None:
        self.under_way = True
        self.begun.set()
        self.may_go_on.wait()
        self.under_way = False


@pytest.fixture(name="work")
def _work() -> Iterator[Work]:
    work = Work()
    yield work
    work.may_go_on.set()


class LetGoOn:
    """A lock; whoever of the main thread waits for it lets the work go on."""

    def __init__(self, work: Work) -> None:
        self.work, self.lock = work, threading.Lock()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.work.begun.wait()
            self.work.may_go_on.set()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_a_file_is_not_closed_while_it_is_written(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sink:
        write_table = staticmethod(work.do)

        def close(self) -> None:
            work.begun.wait()
            assert not work.under_way

    monkeypatch.setattr(outputs, "GROUP_ROWS", 1)
    table = pa.table({"n": [1]})
    with pytest.raises(KeyboardInterrupt), outputs.FileWriter(tmp_path / "out.parquet", table.schema) as writer:  # noqa: PT012
        writer._open()
        writer._sink.close()
        writer._sink, writer._encoding = Sink(), LetGoOn(work)
        writer.write(table)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_closed_while_it_is_read(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> Iterator[int]:
        work.do()
        yield 1

    monkeypatch.setattr(sources, "Lock", lambda: LetGoOn(work))
    with pytest.raises(KeyboardInterrupt):
        next(sources._ahead(batches()))
    assert work.begun.is_set() and not work.under_way


def test_a_snapshot_whose_copy_is_gone_is_not_written(tmp_path: Path) -> None:
    """Otherwise it would be of fewer users than there were, or of none, and pass for whole."""
    may_begin = threading.Event()

    class Slow(LocalStore):
        def begin(self, name: str) -> None:
            may_begin.wait()
            super().begin(name)

    engine = RiskEngine(users=10, shards=1, max_ahead=None)
    engine.add("alice", 1, "2025-01-01")
    store = Slow(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        engine.save(store, position=1)
    (saving,) = (thread for thread in threading.enumerate() if thread.name.startswith("riskring-save"))
    may_begin.set()
    saving.join()
    assert store.names() == []
    with pytest.raises(SnapshotError, match="holds no snapshot"):
        RiskEngine.load(tmp_path)
    engine.add("bob", 2, "2025-01-01")
    assert engine.score("alice") == 1.0
