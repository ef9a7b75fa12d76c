"""Files through an engine in stretches that outlive a crash: every scored row is there once, and final when it is visible.

A stretch is so many rows of the input; its scored rows are one part of the output. At its end, in this order:

    the part is written under a hidden name and made durable
    the state is saved with the position behind the stretch: durable too
    the part gets its name

So a crash leaves the last stretch undone (its part is hidden and no snapshot knows of it: the next run removes it), or done (the snapshot
covers it: the next run gives it its name). A part depends on rows only, not on when the run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import pyarrow as pa

from engine.config import Config
from engine.engine import RiskEngine
from engine.errors import ConfigError, EngineError
from engine.outputs import FileWriter, file_format
from engine.snapshot import snapshots
from engine.sources import files_of, read
from engine.storage import locked

#: What of a file is looked at to tell whether it is the same: so many bytes at either end.
_LOOKED_AT: Final = 1 << 16

#: Options that may be others when a run goes on: they change no row.
_FREE: Final = ("users", "shards", "clock")


class PartFolder:
    """A folder of part files, `part-00000.parquet` and so on.

    Hidden names that are not the run's, and whatever they name, are left alone.

    Args:
        path: The folder; its suffix names the format of the parts, as for `FileWriter`.

    Raises:
        ConfigError: The suffix names no format.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        _, compression = file_format(path)
        self._suffix = "".join(self.path.suffixes[-2:] if compression else self.path.suffixes[-1:])
        self._writer: FileWriter | None = None
        self._visible: set[int] = set()
        self._hidden: set[int] = set()
        self._left: list[str] = []

    def _look(self) -> None:
        """See what there is."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: is a file; with --state an output is a folder of parts: give another name, or remove the file")
        names = os.listdir(self.path) if self.path.is_dir() else []
        number = re.compile(rf"(\.?)part-(\d{{5,}}){re.escape(self._suffix)}")
        left = re.compile(rf"\.\.part-\d{{5,}}{re.escape(self._suffix)}\.\d+\.part")
        self._visible, self._hidden = set(), set()
        self._left = [name for name in names if left.fullmatch(name)]
        for name in names:
            found = number.fullmatch(name)
            if found:
                (self._hidden if found[1] else self._visible).add(int(found[2]))
            elif not name.startswith("."):
                raise ConfigError(f"{self.path}: holds {name!r}, which is no part of a run; give another folder")

    def check(self, parts: int, known: bool) -> None:
        """See whether the folder can be that of a state that covers so many parts; `known` says whether there is a state at all.

        Raises:
            ConfigError: It is a file, holds files of others or parts of another run, or a part is missing.
        """
        self._look()
        if self._visible and not known:
            raise ConfigError(f"{self.path}: holds parts of a run whose state is elsewhere; give its --state, or remove the folder")
        missing = sorted(set(range(parts)) - self._visible - self._hidden)
        if missing:
            raise ConfigError(
                f"{self._name(missing[0])}: is missing, though the state says it was written; remove state and output to begin anew"
            )

    def recover(self, parts: int) -> None:
        """Make the folder, which was checked, agree with a state that covers so many parts."""
        for name in self._left:
            (self.path / name).unlink()
        for part in sorted(self._hidden):
            if part < parts and part not in self._visible:
                self.publish(part)
            else:
                self._name(part, hidden=True).unlink()
        for part in sorted(number for number in self._visible if number >= parts):  # of stretches whose snapshot was lost
            self._name(part).unlink()
        _sync(self.path)

    def _name(self, part: int, hidden: bool = False) -> Path:
        return self.path / f"{'.' if hidden else ''}part-{part:05}{self._suffix}"

    def write(self, part: int, table: Any, schema: Any, distinct: tuple[str, ...]) -> None:
        """Add rows to a part, whose columns are those of the schema."""
        if self._writer is None:
            self._writer = FileWriter(self._name(part, hidden=True), schema, distinct)
        self._writer.write(table)

    def finish(self, part: int) -> None:
        """End a part: it is durable, and hidden."""
        if self._writer is not None:
            self._writer.finish()
            self._writer = None
            _sync(self._name(part, hidden=True))
            _sync(self.path)

    def publish(self, part: int) -> None:
        """Give a part its name."""
        os.replace(self._name(part, hidden=True), self._name(part))
        _sync(self.path)

    def abandon(self) -> None:
        """Remove the part that is being written."""
        if self._writer is not None:
            self._writer.abandon()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Replay:
    """A run over files whose state is in a folder; to be used in a `with` block.

    Args:
        files: Paths, folders or globs, one stream in this order.
        state: Folder of snapshots, and of the lock.
        options: Of `RiskEngine`.
        every: Rows of a stretch.
        output: Folder for the rows with their scores.
        rejects: Folder for the rows that were not applied.
        now: Wall clock, nanoseconds since the epoch. Rows are judged by what it says when the run first begins.

    Attributes:
        engine: With the state of the last stretch that was done.
        rows: Rows of the input that were taken so far, those of earlier runs included.

    Raises:
        ConfigError: The state is that of other files, options or outputs, or an output holds something else.
        SnapshotError: There are snapshots, but none is whole.
        EngineError: Another process uses the state.
    """

    def __init__(
        self,
        files: list[str],
        state: str,
        options: Mapping[str, Any],
        every: int,
        output: str | None,
        rejects: str | None,
        now: Callable[[], int],
    ) -> None:
        if every < 1:
            raise ConfigError(f"--save-every {every} must be at least 1 row")
        self._files = [file for name in files for file in files_of(name)]
        for file in self._files:
            if not os.path.isfile(file):
                shown = "standard input" if file == "-" else file
                raise ConfigError(f"{shown}: cannot be read again from where a run stopped; with --state give files")
        if "://" in state:
            raise ConfigError(f"--state {state}: is no local folder; give one")
        self.rows = self._parts = 0
        self._state, self._every = state, every
        self._done = False
        if os.path.exists(state) and not os.path.isdir(state):
            raise ConfigError(f"--state {state}: is a file; give a folder")
        if os.path.basename(os.path.normpath(state)) in snapshots(state)[1]:
            raise ConfigError(f"--state {state}: is one snapshot; give the folder that it is in")
        self._paths = {name: path for name, path in (("output", output), ("rejects", rejects)) if path}
        if len({os.path.realpath(path) for path in (state, *self._paths.values())}) <= len(self._paths):
            raise ConfigError("two of --state, --output and --rejects are the same folder; give each its own")
        names = {name: os.path.basename(os.path.normpath(path)) for name, path in self._paths.items()}
        self._told = {"files": [_identity(file) for file in self._files], "output": None, "rejects": None, **names}
        self._outputs = {name: PartFolder(path) for name, path in self._paths.items()}
        self._stack = contextlib.ExitStack()
        self._options = options
        self._schema: Any = None
        self._clock = _Clock(now)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._state))
            _, names = snapshots(self._state)
            self.engine = self._loaded() if names else RiskEngine(**self._options, now=self._clock)
            stack.enter_context(self.engine)
            for folder in self._outputs.values():
                folder.check(self._parts, bool(names))
            for folder in self._outputs.values():  # nothing was touched so far
                stack.enter_context(locked(str(folder.path)))
                folder.check(self._parts, bool(names))  # as it is now that nobody else changes it
            for folder in self._outputs.values():
                folder.recover(self._parts)
                stack.callback(folder.abandon)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _loaded(self) -> RiskEngine:
        free = {name: self._options[name] for name in _FREE if name in self._options}
        engine = RiskEngine.load(self._state, now=self._clock, **free)
        try:
            self._check(engine)
        except BaseException:
            engine.close()
            raise
        return engine

    def _check(self, engine: RiskEngine) -> None:
        assert engine.restored is not None
        where, told = f"--state {self._state}", engine.restored.position
        if not isinstance(told, dict) or not {*self._told, "began_ns", "rows", "parts", "done"} <= set(told):
            raise ConfigError(f"{where}: its snapshots are not those of a run over files; give another folder")
        for name, wanted in self._told.items():
            if told[name] != wanted:
                shown = [_shown(value) for value in (told[name], wanted)]
                raise ConfigError(f"{where}: is the state of a run with {name} {shown[0]}, not {shown[1]}; give these, or another --state")
        config = Config.of(**self._options)
        for option in Config.__dataclass_fields__:
            was, now = getattr(engine.config, option), getattr(config, option)
            if option not in _FREE and was != now:
                raise ConfigError(f"{where}: is the state of a run with {option}={was!r}, not {now!r}; give that, or another --state")
        self.rows, self._parts, self._done = told["rows"], told["parts"], told["done"]
        self._clock.began_ns = told["began_ns"]

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Each batch that was not taken before, with what the engine made of it; when this ends, all is durable and visible."""
        if self._done:
            return
        begun = self.rows
        for batch in self._batches(self.rows):
            result = self.engine.ingest(batch, scores="output" in self._outputs)
            self._write(batch, result)
            self.rows += batch.num_rows
            yield batch, result
            if self.rows % self._every == 0 and self.rows > begun:
                self._end_stretch(wrote=True)
                begun = self.rows
        self._done = True
        self._end_stretch(wrote=self.rows > begun or self._parts == 0)

    def _batches(self, skipped: int) -> Iterator[Any]:
        """The rows behind the first so many, in batches that do not reach over the end of a stretch."""
        with contextlib.closing(read(self._files, self.engine.config)) as units:
            first = 0
            for batch in (batch for unit in units for batch in unit):
                if self._schema is None:  # of the first file: parts do not depend on where a run went on
                    self._schema = batch.schema
                start = min(max(skipped - first, 0), batch.num_rows)
                while start < batch.num_rows or first == skipped == batch.num_rows == 0:
                    count = min(batch.num_rows - start, self._every - (first + start) % self._every)
                    yield batch.slice(start, count)
                    start += max(count, 1)
                    if batch.num_rows == 0:
                        break
                first += batch.num_rows

    def _write(self, batch: Any, result: Any) -> None:
        if "output" in self._outputs:
            if "score" in batch.schema.names:
                raise EngineError("the input has a column 'score' already, which --output would add; rename it")
            scored = pa.Table.from_batches([batch]).append_column("score", result.scores)
            schema = self._schema.append(pa.field("score", pa.float64()))
            self._outputs["output"].write(self._parts, scored, schema, (self.engine.config.user_id, "score"))
        if "rejects" in self._outputs:
            self._outputs["rejects"].write(self._parts, result.rejects(), self._schema.append(pa.field("reason", pa.string())), ())

    def _end_stretch(self, wrote: bool) -> None:
        # The order of these three is the guarantee.
        part = self._parts
        for folder in self._outputs.values():
            folder.finish(part)
        self._parts += wrote and bool(self._outputs)
        position = {**self._told, "began_ns": self._clock.began_ns, "rows": self.rows, "parts": self._parts, "done": self._done}
        with self._clock.running():
            self.engine.save(self._state, position=position)
        if self._parts > part:
            for folder in self._outputs.values():
                folder.publish(part)


class _Clock:
    """The wall clock of a run. It stands where it stood when the run first began: which rows are ahead of it must not depend on how often
    the run was interrupted. Only snapshots bear the time at which they are written.

    Attributes:
        began_ns: When the run first began.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self._runs = False
        self.began_ns = now()

    def __call__(self) -> int:
        return self._now() if self._runs else self.began_ns

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._runs = True
        try:
            yield
        finally:
            self._runs = False


def _identity(file: str) -> dict[str, Any]:
    """What tells whether a file is the same: its name, size, and a hash of both ends. (Copies have other times, and are the same.)"""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        ends = stream.read(_LOOKED_AT)
        stream.seek(max(size - _LOOKED_AT, 0))
        ends += stream.read(_LOOKED_AT)
    return {"name": os.path.basename(file), "bytes": size, "ends": hashlib.sha256(ends).hexdigest()}


def _shown(told: Any) -> str:
    """Files, or the name of an output, as an error names them."""
    if isinstance(told, list):
        return ", ".join(f"{file['name']} ({file['bytes']:,} bytes, {file['ends'][:8]})" for file in told)
    return "none" if told is None else repr(told)
