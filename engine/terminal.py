"""What commands say on standard output and error, and standard input that Ctrl-C can end.

Data goes to standard output through `show`; nothing here knows what a command does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from engine.errors import EngineError


def show(text: str, end: str = "\n") -> None:
    """Print to standard output.

    A reader that has seen enough, such as `head`, closes the pipe. That is no failure: the command goes on to an exit code of its own,
    and what it still prints goes nowhere.
    """
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # What Python could not write it would try to write again at exit, and complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def one_line(error: BaseException) -> str:
    """The text of an error as the one line that a command says about it."""
    if isinstance(error, OSError) and not isinstance(error, EngineError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def show_table(table: Any, *, as_json: bool) -> None:
    """Print an Arrow table for people, or as a JSON list of objects."""
    if as_json:
        show_json(records(table))
    else:
        _show_text_table(table)


def show_json(value: Any) -> None:
    """Print one line of JSON."""
    show(json.dumps(value, ensure_ascii=False, allow_nan=False))


def records(table: Any) -> list[dict[str, Any]]:
    """Rows as plain values: times and exact sums as text, ids as they are."""
    columns = {name: _plain(column) for name, column in zip(table.column_names, table.columns, strict=True)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(column: Any) -> list[Any]:
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    kind = column.type
    if pa.types.is_timestamp(kind):
        return [time_text(value) for value in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if value is None else str(value) for value in column.to_pylist()]
    return [f"0x{value.hex()}" if isinstance(value, bytes) else value for value in column.to_pylist()]


def time_text(instant: Any) -> str | None:
    """ISO text of nanoseconds since the epoch, an int or a numpy.datetime64[ns]."""
    if instant is None:
        return None
    from engine.instants import instant_text  # noqa: PLC0415 - imports pyarrow

    return instant_text(instant if isinstance(instant, int) else int(instant.astype("int64")))


def _show_text_table(table: Any) -> None:
    names = table.column_names
    texts = [["" if value is None else str(value) for value in record.values()] for record in records(table)]
    right = [place for place, name in enumerate(names) if name in ("count", "sum", "score", "amount")]
    heading = [f"\x1b[1m{name}\x1b[0m" for name in names] if colour(sys.stdout) else names
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    lines = []
    for shown, line in ((heading, names), *((text, text) for text in texts)):
        cells = []
        for place, (cell, plain) in enumerate(zip(shown, line, strict=True)):
            gap = " " * (widths[place] - len(plain))
            cells.append(gap + cell if place in right else cell + gap)
        lines.append("  ".join(cells).rstrip())
    show("\n".join(lines))


def show_aligned(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    """Print texts in columns; those at the places in `right` end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        show("  ".join(cells).rstrip())


def colour(stream: Any) -> bool:
    """Whether to colour what goes there."""
    return bool(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def bytes_text(size_bytes: float) -> str:
    """A size as people read it, such as "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def heed_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, which removes what is half written; a second one ends it at once."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


class _Interruptible(io.RawIOBase):
    """Standard input that ends when a signal arrives.

    Arrow reads ahead in a thread of its own and makes the main thread wait for it, where no signal handler of Python's can
    run: without this, Ctrl-C would do nothing until the next line of input. The end of input lets the main thread go on.
    """

    def __init__(self, input_fd: int, signal_fd: int) -> None:
        self.input_fd, self.signal_fd = input_fd, signal_fd
        self.ended = False
        self.signal = 0  # the one that ended it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.ended:
            ready, _, _ = select.select((self.input_fd, self.signal_fd), (), ())
            if self.signal_fd in ready and not self.ended:
                self.ended, self.signal = True, os.read(self.signal_fd, 1)[0]
        return 0 if self.ended else os.readv(self.input_fd, (buffer,))


@contextlib.contextmanager
def interruptible_input(files: list[str]) -> Iterator[Callable[[], None]]:
    """Make standard input end at a signal, and when the function that this gives is called."""
    if "-" not in files:
        yield lambda: None
        return
    signal_fd, wakeup_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    before, standard_input = signal.set_wakeup_fd(wakeup_fd), sys.stdin
    source = _Interruptible(standard_input.fileno(), signal_fd)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(source))

    def end_input() -> None:
        source.ended = True
        os.write(wakeup_fd, b"\0")

    try:
        yield end_input
    except Exception as error:
        if source.signal:  # what comes of a line cut in two
            raise (Terminated if source.signal == signal.SIGTERM else KeyboardInterrupt) from error
        raise
    finally:
        end_input()
        sys.stdin = standard_input
        signal.set_wakeup_fd(before)
        os.close(wakeup_fd)
        os.close(signal_fd)


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal and rich is installed; to be told the rows so far."""
    bar: Any = None
    if not quiet and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich import console  # noqa: PLC0415 - optional, slow to import
            from rich import progress as bars  # noqa: PLC0415

            columns = (bars.SpinnerColumn(), bars.TextColumn("{task.description}"), bars.TimeElapsedColumn())
            bar = bars.Progress(*columns, console=console.Console(stderr=True), transient=True)
    if bar is None:
        yield lambda rows: None
        return
    began = time.perf_counter()
    with bar:
        task = bar.add_task("starting")
        yield lambda rows: bar.update(task, description=f"{rows:,} rows  {rows / (time.perf_counter() - began):,.0f} rows/s")
