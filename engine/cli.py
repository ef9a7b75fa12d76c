"""The command `riskring`: files through the engine, and what there is to know before trusting it with them.

Data goes to standard output, everything else to standard error. A command imports what it needs when it runs, so
that `--help` answers at once. Each flag can also be given as an environment variable, `RISKRING_` and its name in
capitals; the flag wins.

This is the only module that reads the environment and the terminal. It holds no semantics: what a row means is decided
by the engine, and the flags are handed to it as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from engine import __version__
from engine.config import Config
from engine.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from engine.engine import RiskEngine

DONE, FAILED, USAGE, REJECTED, INTERRUPTED = 0, 1, 2, 3, 130
#: What a shell reports for a program that a closed pipe has ended.
PIPE_CLOSED: Final = 141

#: Users that `run` shows at the end.
TOP_ROWS: Final = 5

_SIZE: Final = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kmgb]?)", re.IGNORECASE)
_SIZES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The words after `riskring`; None takes them from the process.

    Returns:
        0 done, 1 failed, 2 usage, 3 rows rejected under --strict, 130 interrupted.

    Example:
        >>> main(["plan", "--users", "10M", "--rate", "100k", "--json"])  # doctest: +ELLIPSIS
        {"users": 10000000, ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or _is_on(os.environ.get("RISKRING_DEBUG", ""))
    try:
        args = _settle(_parser(), words)
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: help, version, usage
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        print("riskring: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, and Python would complain again when it flushes standard output at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (EngineError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"riskring: error: {_one_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED
    except Exception as error:
        if debug:
            raise
        print(
            f"riskring: error: unexpected {type(error).__name__}: {_one_line(error)}; --debug shows where, please report it",
            file=sys.stderr,
        )
        return FAILED


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, EngineError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# Flags


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)
        self.flags: list[tuple[argparse.Action, Any]] = []

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"riskring: error: {message} (see `{self.prog} --help`)\n")

    def flag(self, *names: str, default: Any = None, help: str, group: Any = None, shown: Any = None, **kwargs: Any) -> None:
        """Add a flag that can also be an environment variable.

        Args:
            names: As for `add_argument`; the last one names the variable.
            default: Used when neither is given.
            help: One line.
            group: Argument group to add it to.
            shown: What help shows as the default; None: `default`.
            kwargs: As for `add_argument`.
        """
        shown = default if shown is None else shown
        extra = [] if shown is None or shown is False else [f"default {shown}"]
        extra.append(f"env {_variable(names[-1])}")
        action = (group or self).add_argument(*names, default=argparse.SUPPRESS, help=f"{help} ({'; '.join(extra)})", **kwargs)
        self.flags.append((action, default))


def _variable(flag: str) -> str:
    return "RISKRING_" + flag.lstrip("-").replace("-", "_").upper()


def _settle(parser: _Parser, words: list[str]) -> argparse.Namespace:
    """Parse; what was not given as a flag comes from the environment, or else from the default."""
    args = parser.parse_args(words)
    if not hasattr(args, "parser"):
        parser.print_help()
        raise SystemExit(DONE)
    for action, default in args.parser.flags:
        if hasattr(args, action.dest):
            continue
        variable = _variable(action.option_strings[-1])
        text = os.environ.get(variable, "")
        value = default
        if text and action.nargs == 0:
            value = _is_on(text)
        elif text:
            try:
                value = action.type(text) if callable(action.type) else text
            except (argparse.ArgumentTypeError, ValueError) as error:
                args.parser.error(f"{variable}={text!r}: {error}")
            if action.choices and value not in action.choices:
                args.parser.error(f"{variable}={text!r}: choose from {', '.join(action.choices)}")
            value = [value] if isinstance(default, list) else value
        setattr(args, action.dest, value)
    return args


def _is_on(text: str) -> bool:
    return text.strip().lower() not in ("", "0", "no", "off", "false")


def _size(text: str) -> int:
    value = _quantity(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _quantity(text: str) -> float:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one such as 500, 10k or 2.5M")
    number = found[1].replace("_", "")
    factor = _SIZES[found[2].lower()]
    return int(number) * factor if number.isdigit() else float(number) * factor


def _optional(text: str) -> str | None:
    return None if text.strip().lower() == "none" else text


def _parser() -> _Parser:
    parser = _Parser(
        prog="riskring",
        description="Exact rolling risk scores per user over a stream of transactions:\n"
        "sum of a user's amounts in the last 60 seconds / number of them.",
        epilog=_examples(
            "riskring generate sample.parquet --rows 1M --skew 1.1 --bad 0.001",
            "riskring run sample.parquet -o scored.parquet",
            "riskring top sample.parquet -k 3",
        )
        + "\n\nexit codes: 0 done, 1 failed, 2 usage, 3 rows rejected under --strict, 130 interrupted",
    )
    parser.add_argument("--version", action=_Version)
    _add_global_flags(parser)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for add in (_add_run, _add_score, _add_top, _add_explain, _add_verify, _add_generate, _add_plan, _add_doctor):
        add(commands)
    return parser


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str, *examples: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}", epilog=_examples(*examples)
    )
    parser.set_defaults(parser=parser, command=run)
    _add_global_flags(parser)
    return parser


def _add_global_flags(parser: _Parser) -> None:
    group = parser.add_argument_group("everywhere")
    parser.flag("--json", group=group, action="store_true", default=False, help="machine output")
    parser.flag("--strict", group=group, action="store_true", default=False, help="exit with 3 if rows were rejected")
    parser.flag("--quiet", group=group, action="store_true", default=False, help="no progress, no notes, no summary")
    parser.flag("--debug", group=group, action="store_true", default=False, help="show the traceback of an error")


def _add_files(parser: _Parser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="Parquet, Arrow IPC, CSV or NDJSON file, folder, glob, or - for standard input"
    )
    group = parser.add_argument_group("engine")

    def flag(name: str, shown: object, help: str, **kwargs: Any) -> None:
        parser.flag(name, group=group, shown=shown, help=help, **kwargs)

    flag("--window", "60s", "what a score covers", metavar="DURATION")
    flag("--lateness", "the window", "how far behind the clock a row is still applied", metavar="DURATION")
    flag("--closed", "both", "whether a transaction exactly `window` old counts (both) or not (right)", choices=("both", "right"))
    flag("--decimals", 4, "amounts are held in units of 10**-N", type=_size, metavar="N")
    flag("--users", "10M", "most users with a retained transaction at a time", type=_size, metavar="N")
    flag("--shards", "one per core", "parts worked on by a thread each; changes no result", type=_size, metavar="N")
    flag("--clock", "event", "what a lookup without --at takes for now", choices=("event", "wall"))
    flag("--max-ahead", "10s", "reject rows further ahead of the wall clock, or none", metavar="DURATION")
    flag("--max-jump", "none", "reject rows further ahead of the engine's clock", metavar="DURATION")
    flag("--time-unit", None, "unit of an integer time column", choices=("s", "ms", "us", "ns"))
    flag("--user-id", "user_id", "column of the users", metavar="COLUMN")
    flag("--amount", "amount", "column of the amounts", metavar="COLUMN")
    flag("--timestamp", "timestamp", "column of the event times", metavar="COLUMN")


def _add_run(commands: Any) -> None:
    parser = _command(
        commands,
        "run",
        _run,
        "replay files through the engine",
        "The files are one stream, in the order given; those of a folder or glob in the order of their names.",
        "riskring run payments.parquet",
        "riskring run day1.csv day2.csv --window 5m --rejects rejected.csv",
        "riskring run payments.parquet -o scored.parquet   # all columns and `score`",
        "zcat payments.csv.gz | riskring run - --json",
    )
    parser.flag("-o", "--output", metavar="FILE", help="write all rows with their score, as the suffix says: .parquet .arrow .csv .ndjson")
    parser.flag("--rejects", metavar="FILE", help="write the rows that were not applied with their reason")
    _add_files(parser)


def _add_score(commands: Any) -> None:
    parser = _command(
        commands,
        "score",
        _score,
        "run files, then show the score of users",
        "",
        "riskring score payments.parquet --user alice",
        "riskring score payments.parquet --user 17 --user 4 --at 2025-01-01T00:01:00Z --json",
    )
    parser.flag("--user", action="append", default=[], shown=False, metavar="ID", help="whose score; may be given again")
    _add_at(parser)
    _add_files(parser)


def _add_top(commands: Any) -> None:
    parser = _command(
        commands,
        "top",
        _top,
        "run files, then show the greatest users",
        "",
        "riskring top payments.parquet",
        "riskring top payments.parquet -k 100 --by count --json",
    )
    parser.flag("-k", "--count", type=_size, default=10, metavar="N", help="how many")
    parser.flag("--by", choices=("score", "sum", "count", "newest"), default="score", help="greatest in what")
    _add_at(parser)
    _add_files(parser)


def _add_explain(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        _explain,
        "run files, then show the transactions behind a user's score",
        "",
        "riskring explain payments.parquet --user alice",
        "riskring explain payments.parquet --user alice --at 2025-01-01T00:01:00Z",
    )
    parser.flag("--user", metavar="ID", help="whose score")
    _add_at(parser)
    _add_files(parser)


def _add_at(parser: _Parser) -> None:
    parser.flag("--at", metavar="TIME", shown="the clock", help="instant of the answer, such as 2025-01-31T12:00:00Z, or now")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        _verify,
        "compare the engine with its definition in plain Python, row by row",
        "Takes some microseconds per row.",
        "riskring verify payments.parquet",
        "riskring verify payments.csv --window 5m --closed right",
    )
    _add_files(parser)


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "make a stream of transactions",
        "The same flags make the same rows.",
        "riskring generate sample.parquet",
        "riskring generate sample.csv --rows 20k --users 500 --rate 100 --skew 1.1 --bursts 0.05 --disorder 2s --bad 0.01",
    )
    parser.add_argument("out", metavar="OUT", help="file to write: .parquet .arrow .csv .ndjson, the last two also with .gz or .zst")
    parser.flag("--rows", type=_size, default=1_000_000, shown="1M", metavar="N", help="length of the stream")
    parser.flag("--users", type=_size, default=1_000_000, shown="1M", metavar="N", help="users drawn from")
    parser.flag("--rate", type=_quantity, default=100_000.0, shown="100k", metavar="N", help="rows per second of event time")
    parser.flag("--skew", type=float, default=0.0, metavar="S", help="exponent of Zipf's law; 0: all users alike")
    parser.flag("--bursts", type=float, default=0.0, metavar="SHARE", help="share of rows in bursts of one user within seconds")
    parser.flag("--disorder", default="0s", metavar="DURATION", help="standard deviation of the delay before a row arrives")
    parser.flag("--ties", type=float, default=0.0, metavar="SHARE", help="share of rows with the time of the row before")
    parser.flag("--bad", type=float, default=0.0, metavar="SHARE", help="share of rows that will be rejected")
    parser.flag("--ids", choices=("int", "uuid", "name"), default="int", help="kind of user ids")
    parser.flag("--start", default="2025-01-01", metavar="TIME", help="where arrivals begin")
    parser.flag("--seed", type=_size, default=0, metavar="N", help="another seed gives other rows of the same users")


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "forecast the memory of an engine",
        "Assumes that all users are alike.",
        "riskring plan --users 10M --rate 100k",
        "riskring plan --users 50M --rate 1M --window 5m --lateness 10s --id-bytes 36",
    )
    parser.flag("--users", type=_size, metavar="N", help="users that transact")
    parser.flag("--rate", type=_quantity, metavar="N", help="transactions per second, all users together")
    parser.flag("--window", default="60s", metavar="DURATION", help="what a score covers")
    parser.flag("--lateness", shown="the window", metavar="DURATION", help="how far behind the clock a row is still applied")
    parser.flag("--id-bytes", type=_size, default=0, metavar="N", help="length of a string id; 0: integers")


def _add_doctor(commands: Any) -> None:
    _command(
        commands, "doctor", _doctor, "check that this machine is fit to run the engine", "", "riskring doctor", "riskring doctor --json"
    )


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"riskring {__version__}")
        parser.exit(DONE)


def _version(distribution: str) -> str | None:
    from importlib import metadata  # noqa: PLC0415 - slow to import

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# Files through the engine

_ENGINE_FLAGS: Final = (
    "window",
    "lateness",
    "closed",
    "decimals",
    "users",
    "shards",
    "clock",
    "max_ahead",
    "max_jump",
    "time_unit",
    "user_id",
    "amount",
    "timestamp",
)


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Only what was given: the defaults are the engine's own."""
    given = {name: getattr(args, name) for name in _ENGINE_FLAGS if getattr(args, name) is not None}
    for name in ("max_ahead", "max_jump"):
        if name in given:
            given[name] = _optional(given[name])
    return given


class _Replay:
    """Files on their way through an engine, and what was seen of them."""

    def __init__(self, args: argparse.Namespace, engine: RiskEngine, end_input: Callable[[], None]) -> None:
        self.args = args
        self.engine = engine
        self.end_input = end_input
        self.config = Config.of(**_engine_options(args))
        self.rows = 0
        self.seconds = 0.0
        self.id_type: Any = None

    def results(self, *, scores: bool) -> Iterator[tuple[Any, Any]]:
        """Each batch with what the engine made of it, under a progress bar."""
        from engine import sources  # noqa: PLC0415 - imports pyarrow

        began = time.perf_counter()
        units = sources.read(self.args.files, self.config)
        try:
            with _progress(self.args) as show:
                for unit in units:
                    for batch in unit:
                        if self.id_type is None:
                            self.id_type = batch.schema.field(self.config.user_id).type
                        result = self.engine.ingest(batch, scores=scores)
                        self.rows += result.rows
                        yield batch, result
                        show(self.rows)
        finally:
            self.end_input()  # before `units` is closed, which would wait for the next line of input
        self.seconds = time.perf_counter() - began

    def finish(self) -> _Replay:
        for _ in self.results(scores=False):
            pass
        return self

    def exit_code(self) -> int:
        return REJECTED if self.args.strict and self.rejected() else DONE

    def rejected(self) -> dict[str, int]:
        return {reason: count for reason, count in self.engine.stats().rejected.items() if count}

    def user(self, text: str) -> int | str | bytes:
        """A user as written on the command line, as the kind of id that the files have."""
        import pyarrow as pa  # noqa: PLC0415 - slow to import

        kind = self.id_type
        if kind is not None and pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind is not None and pa.types.is_integer(kind):
            try:
                return int(text)
            except ValueError:
                raise ConfigError(f"--user {text!r} is not a whole number, and the ids in the files are ({kind})") from None
        if kind is not None and "binary" in str(kind):
            try:
                return bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()
            except ValueError:
                raise ConfigError(f"--user {text!r} is not hexadecimal; write binary ids as 0x00ff or as text") from None
        return text


@contextlib.contextmanager
def _replay(args: argparse.Namespace) -> Iterator[_Replay]:
    from engine.engine import RiskEngine  # noqa: PLC0415 - compiles kernels

    with _interruptible_input(args.files) as end_input, RiskEngine(**_engine_options(args)) as engine:
        yield _Replay(args, engine, end_input)


class _Interruptible(io.RawIOBase):
    """Standard input that ends when a signal arrives.

    Arrow reads ahead in a thread of its own and makes the main thread wait for it, where no signal handler of Python's can
    run: without this, Ctrl-C would do nothing until the next line of input. The end of input lets the main thread go on.
    """

    def __init__(self, input_fd: int, signal_fd: int) -> None:
        self.input_fd, self.signal_fd = input_fd, signal_fd
        self.ended = self.interrupted = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.ended:
            ready, _, _ = select.select((self.input_fd, self.signal_fd), (), ())
            if self.signal_fd in ready and not self.ended:
                self.ended = self.interrupted = True
        return 0 if self.ended else os.readv(self.input_fd, (buffer,))


@contextlib.contextmanager
def _interruptible_input(files: list[str]) -> Iterator[Callable[[], None]]:
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
        if source.interrupted:  # what comes of a line cut in two
            raise KeyboardInterrupt from error
        raise
    finally:
        end_input()
        sys.stdin = standard_input
        signal.set_wakeup_fd(before)
        os.close(wakeup_fd)
        os.close(signal_fd)


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal and rich is installed; to be told the rows so far."""
    bar: Any = None
    if not args.quiet and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich import console, progress  # noqa: PLC0415 - optional, slow to import

            columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
            bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    if bar is None:
        yield lambda rows: None
        return
    began = time.perf_counter()
    with bar:
        task = bar.add_task("starting")
        yield lambda rows: bar.update(task, description=f"{rows:,} rows  {rows / (time.perf_counter() - began):,.0f} rows/s")


def _run(args: argparse.Namespace) -> int:
    outputs = [path for path in (args.output, args.rejects) if path]
    _check_outputs(outputs, args.files)
    with _replay(args) as replay:
        _replay_into_files(replay, args)
        if not args.quiet or args.json:
            _show_summary(replay, args)
        return replay.exit_code()


def _check_outputs(outputs: list[str], files: list[str]) -> None:
    """Find out before the run, not after it."""
    from engine.generate import file_format  # noqa: PLC0415 - imports pyarrow

    for path in outputs:
        file_format(path)
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"{path}: the folder does not exist; make it first")
        if any(os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file) for file in files):
            raise ConfigError(f"{path}: is one of the files to read; write to another name")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise ConfigError("--output and --rejects are the same file; give two names")


def _replay_into_files(replay: _Replay, args: argparse.Namespace) -> None:
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    from engine.generate import FileWriter  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        scored: Any = None
        rejects: Any = None
        for batch, result in replay.results(scores=bool(args.output)):
            if args.output:
                if scored is None:
                    if "score" in batch.schema.names:
                        raise EngineError("the input has a column 'score' already, which --output would add; rename it")
                    scored = stack.enter_context(FileWriter(args.output, batch.schema.append(pa.field("score", pa.float64()))))
                scored.write(pa.Table.from_batches([batch]).append_column("score", result.scores))
            if args.rejects:
                table = result.rejects()
                if rejects is None:
                    rejects = stack.enter_context(FileWriter(args.rejects, table.schema))
                rejects.write(table)


def _show_summary(replay: _Replay, args: argparse.Namespace) -> None:
    stats = replay.engine.stats()
    rate = round(replay.rows / replay.seconds) if replay.seconds else 0
    top = replay.engine.top(TOP_ROWS)
    if args.json:
        _print_json(
            {
                "rows": replay.rows,
                "accepted": stats.accepted,
                "rejected": replay.rejected(),
                "rounded": stats.rounded,
                "users": stats.users,
                "transactions": stats.transactions,
                "clock": _time_text(stats.clock),
                "bytes": stats.bytes,
                "seconds": round(replay.seconds, 3),
                "rows_per_second": rate,
                "top": _records(top),
            }
        )
        return
    rejected = replay.rejected()
    lines = [
        ("rows", f"{replay.rows:,}", f"{rate:,} rows/s"),
        ("accepted", f"{stats.accepted:,}", f"{stats.rounded:,} rounded to the grid" if stats.rounded else ""),
        ("rejected", f"{sum(rejected.values()):,}", ""),
        *((f"  {reason}", f"{count:,}", "") for reason, count in rejected.items()),
        ("users", f"{stats.users:,}", "with a retained transaction"),
        ("retained", f"{stats.transactions:,}", "transactions"),
    ]
    _print_aligned(lines, right=(1,))
    print(f"clock  {_time_text(stats.clock) or 'none: no row was accepted'}")
    if top.num_rows:
        print(f"\ntop {top.num_rows} by score")
        _print_table(top)


def _score(args: argparse.Namespace) -> int:
    if not args.user:
        raise ConfigError("score needs --user ID")
    with _replay(args) as replay:
        replay.finish()
        _show_table(replay.engine.features([replay.user(text) for text in args.user], at=args.at), args)
        return replay.exit_code()


def _top(args: argparse.Namespace) -> int:
    with _replay(args) as replay:
        replay.finish()
        _show_table(replay.engine.top(args.count, by=args.by, at=args.at), args)
        return replay.exit_code()


def _explain(args: argparse.Namespace) -> int:
    if args.user is None:
        raise ConfigError("explain needs --user ID")
    with _replay(args) as replay:
        replay.finish()
        explanation = replay.engine.explain(replay.user(args.user), at=args.at)
        begin, end = map(_time_text, explanation.window)
        if args.json:
            _print_json(
                {
                    "user_id": args.user,
                    "score": explanation.score,
                    "sum": str(explanation.sum),
                    "count": explanation.count,
                    "window": [begin, end],
                    "reason": explanation.reason,
                    "transactions": _records(explanation.transactions),
                }
            )
        else:
            print(f"user    {args.user}\nscore   {explanation.score!r} = {explanation.sum} / {explanation.count}")
            print(f"window  {begin} to {end}\n{explanation.reason}")
            if explanation.count:
                print()
                _print_table(explanation.transactions)
        return replay.exit_code()


def _verify(args: argparse.Namespace) -> int:
    from engine.reference import verify  # noqa: PLC0415 - imports pyarrow

    began = time.perf_counter()
    with _interruptible_input(args.files), _progress(args) as show:
        found = verify(args.files, Config.of(**_engine_options(args)), wall_ns=time.time_ns(), progress=show)
    seconds = time.perf_counter() - began
    if args.json:
        shown = {"equal": found.equal, "rows": found.rows, "users": found.users, "difference": found.difference}
        _print_json({**shown, "seconds": round(seconds, 3)})
    elif found.equal:
        print(f"equal: {found.rows:,} rows and {found.users:,} users in {seconds:.1f} s")
    else:
        print(f"different after {found.rows:,} rows: {found.difference}")
    return DONE if found.equal else FAILED


def _generate(args: argparse.Namespace) -> int:
    from engine import generate  # noqa: PLC0415 - imports pyarrow

    names = ("users", "rate", "skew", "bursts", "disorder", "ties", "bad", "ids", "start", "seed")
    began = time.perf_counter()
    size_bytes = generate.write(args.out, args.rows, **{name: getattr(args, name) for name in names})
    seconds = time.perf_counter() - began
    if args.json:
        _print_json({"path": args.out, "rows": args.rows, "bytes": size_bytes, "seconds": round(seconds, 3)})
    elif not args.quiet:
        print(f"{args.out}: {args.rows:,} rows, {_bytes_text(size_bytes)}, {args.rows / seconds:,.0f} rows/s", file=sys.stderr)
    return DONE


# Forecast


def forecast(users: int, rate: float, retention_ns: int, id_bytes: int = 0) -> dict[str, float]:
    """Bytes of an engine's memory by part, when all users are alike.

    A user's retained transactions are then Poisson distributed with mean `rate * retention / users`. Who has any
    occupies a slot line of 64 bytes with room for two, and an index entry of 4 bytes at a load of 0.7; who has more
    than two, also a ring of 16 bytes an entry whose capacity is a power of two from 4. A string id takes its bytes
    rounded up to 8, and 8 more.

    Args:
        users: Users that transact.
        rate: Transactions per second of all users together.
        retention_ns: How long a transaction is retained.
        id_bytes: Length of a string id; 0 for integers.

    Returns:
        "active_users", "transactions" (retained), and bytes: "slots", "index", "rings", "ids", "total".

    Example:
        >>> parts = forecast(10_000_000, 100_000.0, 120 * 10**9)
        >>> round(parts["total"] / parts["active_users"])
        81
    """
    mean = rate * retention_ns / 1e9 / users
    active = users * -math.expm1(-mean)
    ring_bytes, capacity, least = 0.0, 4, 3
    # Whole capacities at a time; a few steps beyond the mean nothing is left.
    while (share := _poisson_at_least(mean, least)) > 1e-12:
        ring_bytes += users * (share - _poisson_at_least(mean, capacity + 1)) * capacity * 16
        capacity, least = capacity * 2, capacity + 1
    parts = {"slots": 64.0 * active, "index": 4 / 0.7 * active, "rings": ring_bytes}
    parts["ids"] = active * (-(-id_bytes // 8) * 8 + 8) if id_bytes else 0.0
    return {"active_users": active, "transactions": users * mean, **parts, "total": sum(parts.values())}


def _poisson_at_least(mean: float, count: int) -> float:
    """P(X >= count). Above 1000 the normal distribution is near enough for a forecast."""
    if mean > 1000:
        return 0.5 * math.erfc((count - 0.5 - mean) / math.sqrt(2 * mean))
    return 1.0 - math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)) if mean else 0.0


def _plan(args: argparse.Namespace) -> int:
    if args.users is None or args.rate is None:
        raise ConfigError("plan needs --users and --rate")
    if args.users < 1 or args.rate < 0:
        raise ConfigError(f"--users {args.users} and --rate {args.rate} must be at least 1 and 0")
    retention_ns = Config.of(args.window, lateness=args.lateness, users=args.users, shards=1).retention_ns
    parts = forecast(args.users, args.rate, retention_ns, args.id_bytes)
    per_user = parts["total"] / parts["active_users"] if parts["active_users"] else 0.0
    if args.json:
        whole = {name: round(value) for name, value in parts.items() if name not in ("slots", "index", "rings", "ids", "total")}
        in_bytes = {f"{name}_bytes": round(parts[name]) for name in ("slots", "index", "rings", "ids", "total")}
        _print_json({"users": args.users, "rate": args.rate, "retention_seconds": retention_ns / 1e9, **whole, **in_bytes})
        return DONE
    print(f"{args.rate:,.0f} transactions/s retained for {retention_ns / 1e9:g} s")
    print(f"{parts['transactions']:,.0f} transactions of {parts['active_users']:,.0f} users\n")
    lines = [(name, _bytes_text(parts[name]), "") for name in ("slots", "index", "rings", "ids") if parts[name]]
    lines.append(("total", _bytes_text(parts["total"]), f"{per_user:.0f} bytes per user with a retained transaction"))
    _print_aligned(lines, right=(1,))
    return DONE


# Doctor


def _doctor(args: argparse.Namespace) -> int:
    checks = [*_check_versions(), _check_cores(), _check_memory(), _check_huge_pages(), _check_cache(), _check_engine()]
    if args.json:
        _print_json([{"check": name, "state": state, "found": found, "fix": fix} for name, state, found, fix in checks])
    else:
        paint = {"ok": "32", "warn": "33", "fail": "31"} if _colour(sys.stdout) else {}
        for name, state, found, fix in checks:
            mark = f"\x1b[{paint[state]}m{state:<4}\x1b[0m" if paint else f"{state:<4}"
            print(f"{mark}  {name:<13} {found}" + (f"; {fix}" if fix else ""))
    return FAILED if any(state == "fail" for _, state, _, _ in checks) else DONE


_Check = tuple[str, str, str, str]  # name, ok | warn | fail, what was found, the fix


def _check_versions() -> Iterator[_Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield ("python", "ok", found, "") if sys.version_info >= (3, 11) else ("python", "fail", found, "install Python 3.11 or newer")
    yield "riskring", "ok", __version__, ""
    for name in ("numpy", "numba", "pyarrow"):
        version = _version(name)
        yield (name, "ok", version, "") if version else (name, "fail", "missing", f"pip install {name}")
    version = _version("rich")
    yield ("rich", "ok", version, "") if version else ("rich", "warn", "missing: no progress bar", "pip install 'riskring[cli]'")


def _check_cores() -> _Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ("cores", "ok", str(cores), "") if cores > 1 else ("cores", "warn", "1", "two or more let shards work side by side")


def _check_memory() -> _Check:
    free_bytes = _memory_available()
    if free_bytes is None:
        return "memory", "warn", "unknown on this system", "compare `riskring plan` with what is free"
    found = f"{_bytes_text(free_bytes)} available"
    return (
        ("memory", "ok", found, "")
        if free_bytes >= 2**30
        else ("memory", "warn", found, "10 million users need about 1 GB; see `riskring plan`")
    )


def _memory_available() -> int | None:
    """What the machine has left, or what the control group allows if that is less."""
    available = []
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        available.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(_file_text(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
        available.append(limit - used)
    return min(available, default=None)


def _check_huge_pages() -> _Check:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    try:
        chosen = re.search(r"\[(\w+)\]", _file_text(path))
    except OSError:
        return "huge pages", "warn", "unknown on this system", "scores are the same, a large engine is slower without them"
    state = chosen[1] if chosen else "unknown"
    return (
        ("huge pages", "ok", state, "")
        if state in ("always", "madvise")
        else ("huge pages", "warn", state, f"echo madvise | sudo tee {path}")
    )


def _file_text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _check_cache() -> _Check:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = chosen or os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels", "__pycache__")
    nearest = folder
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if os.access(nearest, os.W_OK):
        return "kernel cache", "ok", folder, ""
    return "kernel cache", "warn", f"{folder} cannot be written", "set NUMBA_CACHE_DIR to a folder that can, or each start compiles anew"


def _check_engine() -> _Check:
    """Compile the kernels and compare three rows with a sum in the head."""
    began = time.perf_counter()
    try:
        from engine.engine import RiskEngine  # noqa: PLC0415 - compiles kernels

        with RiskEngine("60s", users=8, shards=1, max_ahead=None) as engine:
            given = (("a", 0.1, "1970-01-01T00:00:00Z"), ("a", 0.2, "1970-01-01T00:01:00Z"), ("b", 1.0, "1970-01-01T00:01:01Z"))
            scores = [engine.add(*row) for row in given]
            scores.append(engine.score("a"))
    except Exception as error:
        return "engine", "fail", _one_line(error), "run `riskring doctor` in a fresh virtual environment: pip install riskring"
    wanted = [0.1, 0.15, 1.0, 0.2]
    if scores != wanted:
        return "engine", "fail", f"scores {scores} instead of {wanted}", "please report this, with the lines above"
    return "engine", "ok", f"exact; first result after {time.perf_counter() - began:.1f} s", ""


# Output


def _show_table(table: Any, args: argparse.Namespace) -> None:
    if args.json:
        _print_json(_records(table))
    else:
        _print_table(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _records(table: Any) -> list[dict[str, Any]]:
    """Rows as plain values: times and exact sums as text, ids as they are."""
    columns = {name: _plain(column) for name, column in zip(table.column_names, table.columns, strict=True)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(column: Any) -> list[Any]:
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    kind = column.type
    if pa.types.is_timestamp(kind):
        return [_time_text(value) for value in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if value is None else str(value) for value in column.to_pylist()]
    return [f"0x{value.hex()}" if isinstance(value, bytes) else value for value in column.to_pylist()]


def _time_text(instant: Any) -> str | None:
    """ISO text of nanoseconds since the epoch (int or numpy.datetime64[ns]), with as many decimals as it needs."""
    if instant is None:
        return None
    import numpy as np  # noqa: PLC0415 - slow to import

    whole, dot, decimals = str(np.datetime64(instant, "ns")).partition(".")
    decimals = decimals.rstrip("0")
    return f"{whole}{dot if decimals else ''}{decimals}Z"


def _print_table(table: Any) -> None:
    records = _records(table)
    names = table.column_names
    texts = [["" if record[name] is None else str(record[name]) for name in names] for record in records]
    right = [place for place, name in enumerate(names) if name in ("count", "sum", "score", "amount")]
    heading = [f"\x1b[1m{name}\x1b[0m" for name in names] if _colour(sys.stdout) else names
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    for shown, line in ((heading, names), *((text, text) for text in texts)):
        cells = []
        for place, (cell, plain) in enumerate(zip(shown, line, strict=True)):
            gap = " " * (widths[place] - len(plain))
            cells.append(gap + cell if place in right else cell + gap)
        print("  ".join(cells).rstrip())


def _print_aligned(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width) for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _colour(stream: Any) -> bool:
    return bool(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def _bytes_text(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
