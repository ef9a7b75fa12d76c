"""Saving an engine while it works, and loading one: between `Core`, which one thread at a time uses, and `snapshot`, which knows files.

What is saved is the state at one instant between two batches. It is copied out a few thousand users at a time, between later batches
(`copies` keeps what these would change), and encoded and written by a thread of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import TIME_NS_MAX, TIME_NS_MIN
from engine.core import Core
from engine.entries import Entries
from engine.errors import CapacityError, ConfigError, EngineError, SnapshotError
from engine.snapshot import (
    SnapshotInfo,
    State,
    Totals,
    checked_position,
    config_with,
    info_of,
    parts_of,
    read_manifest,
    snapshots,
    state_digest,
    write,
)
from engine.storage import Store, store_of


class Saver:
    """Saves one engine, one snapshot at a time.

    Args:
        core: What is saved.
        lock: Held by whoever uses it.
    """

    def __init__(self, core: Core, lock: threading.RLock) -> None:
        self._core = core
        self._lock = lock
        self._saving: Future[SnapshotInfo] | None = None
        self._copy: object = None  # stands for the copy that is being made
        self._asked: threading.Event | None = None  # set when the thread that saves has had its turn

    def start(self, uri: Any, position: Any, rooms: list[NDArray[np.bool_]]) -> Future[SnapshotInfo]:
        """Begin to save the state as it is now. The lock is held."""
        store, position = store_of(uri), checked_position(position)
        if self._saving is not None and not self._saving.done():
            raise EngineError("another snapshot of this engine is being written; wait for the result of `start_save`")
        core = self._core
        totals = Totals(core.rows, core.rounded, tuple(core.by_reason.tolist()))
        state = State(core.config, core.kind, core.clock_ns, totals, position)
        created_ns = min(max(core.now(), TIME_NS_MIN), TIME_NS_MAX)
        copy = self._copy = object()
        try:
            core.shards.begin_copy(core.clock_ns, core.kind or "int64", rooms)
            thread = ThreadPoolExecutor(1, thread_name_prefix="riskring-save")
            self._saving = thread.submit(self._write, store, state, created_ns, copy)
        except BaseException:  # no thread is to be had; or Ctrl-C came when there was one, which then finds its copy gone
            self._end(copy)
            raise
        thread.shutdown(wait=False)
        return self._saving

    def _write(self, store: Store, state: State, created_ns: int, copy: object) -> SnapshotInfo:
        try:
            return write(store, state, self._copied(copy), created_ns)
        finally:
            with self._turn():
                self._end(copy)

    def _end(self, copy: object) -> None:
        """Forget a copy, if it is still the one that is being made."""
        if self._copy is copy:
            self._copy = None
            self._core.shards.end_copy()

    def _copied(self, copy: object) -> Iterator[Entries]:
        """The state as it was when the copy began, some of it at a time."""
        while True:
            with self._turn():
                if self._copy is not copy:
                    raise SnapshotError("saving was interrupted when it began; save again")
                part = self._core.shards.copied()
            if part is None:
                return
            yield from part

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, which a thread that ingests without a break would hardly ever give away."""
        asked = self._asked = threading.Event()
        try:
            with self._lock:
                yield
        finally:
            self._asked = None
            asked.set()

    def let_pass(self) -> None:
        """Wait for the thread that saves, if it waits for the lock. Called without it, by those who would take it again and again."""
        asked = self._asked
        if asked is not None:
            asked.wait()

    def wait(self) -> None:
        """Wait until nothing is being saved."""
        if self._saving is not None:
            wait([self._saving])


def loaded(
    uri: Any, now: Callable[[], int], overrides: dict[str, Any], accept: Callable[[Any], str | None] | None = None
) -> tuple[Core, SnapshotInfo]:
    """The state of the newest snapshot that is whole and whose position is accepted, and which it was."""
    store, names = snapshots(uri)
    passed_over: list[tuple[str, str]] = []
    for name in names:
        try:
            return _loaded(store, name, now, overrides, accept, passed_over)
        except SnapshotError as error:
            passed_over.append((name, str(error)))
    if not passed_over:
        raise SnapshotError(f"{store.where}: holds no snapshot; save one, or replay the rows")
    raise SnapshotError("; ".join(why for _, why in passed_over))


def _loaded(
    store: Store,
    name: str,
    now: Callable[[], int],
    overrides: dict[str, Any],
    accept: Callable[[Any], str | None] | None,
    passed_over: list[tuple[str, str]],
) -> tuple[Core, SnapshotInfo]:
    manifest = read_manifest(store, name)
    why = None if accept is None else accept(manifest.state.position)
    if why is not None:
        raise SnapshotError(f"{store.where}/{name}: {why}")
    config, state = config_with(manifest.state.config, overrides), manifest.state
    if config.users < manifest.users:
        raise ConfigError(f"users={config.users:,} is fewer than the {manifest.users:,} of the snapshot; give at least so many")
    try:
        core = Core(config, now)
    except CapacityError as error:
        raise SnapshotError(f"{store.where}/{name}: does not fit: {error}") from error
    try:
        whole = core.restore(state.kind, state.clock_ns, parts_of(store, name, manifest))
        users, transactions = core.shards.retained(core.clock_ns)
        digest = state_digest(config, core.clock_ns, users, transactions, core.shards.digest(core.clock_ns, core.kind))
        if not whole or digest != manifest.digest or (users, transactions) != (manifest.users, manifest.transactions):
            raise SnapshotError(f"{store.where}/{name}: its transactions are not those that were saved; load an older snapshot")
    except BaseException as error:
        core.shards.close()
        if isinstance(error, CapacityError):
            raise SnapshotError(f"{store.where}/{name}: does not fit: {error}") from error
        raise
    core.rows, core.rounded = state.totals.rows, state.totals.rounded
    core.by_reason[:] = state.totals.by_reason
    return core, info_of(store, name, manifest, tuple(passed_over))
