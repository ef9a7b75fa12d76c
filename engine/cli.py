"""The command `riskring`: files through the engine, and what there is to know before trusting it with them.

Data goes to standard output, everything else to standard error. A command imports what it needs when it runs, so
that `--help` answers at once. Each flag can also be given as an environment variable, `RISKRING_` and its name in
capitals; the flag wins.

What it is not: it holds no semantics. What a row means is decided by the engine, and flags are handed to it as they are. How flags
are parsed is told in `flags`, how answers are printed in `terminal`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from engine import __version__, benchmark, hosting, serving, streaming
from engine.config import Config
from engine.errors import ConfigError, EngineError, SnapshotError
from engine.flags import USAGE, Parser, add_engine_flags, add_global_flags, command, engine_options, examples, is_on, quantity, settle, size
from engine.terminal import (
    Terminated,
    bytes_text,
    heed_sigterm,
    interruptible_input,
    one_line,
    progress,
    records,
    show,
    show_aligned,
    show_json,
    show_table,
    time_text,
)

if TYPE_CHECKING:
    from engine.engine import RiskEngine

DONE, FAILED, REJECTED, DAMAGED, INTERRUPTED, TERMINATED = 0, 1, 3, 4, 130, 143

#: Users that `run` shows at the end.
TOP_ROWS: Final = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The words after `riskring`; None takes them from the process.

    Returns:
        0 done, 1 failed, 2 usage, 3 rows rejected under --strict, 4 a snapshot is damaged or cannot be written, 130 interrupted,
        143 terminated.

    Example:
        >>> main(["plan", "--users", "10M", "--rate", "100k", "--json"])  # doctest: +ELLIPSIS
        {"users": 10000000, ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or is_on(os.environ.get("RISKRING_DEBUG", ""))
    try:
        args = settle(_parser(), words)
        return int(args.command(args))
    except SystemExit as stop:  # argparse: help, version, usage
        show("", end="")  # what it printed may still be on its way
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        if debug:
            raise
        print(f"riskring: {'terminated' if isinstance(stop, Terminated) else 'interrupted'}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except (EngineError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"riskring: error: {one_line(error)}", file=sys.stderr)
        return DAMAGED if isinstance(error, SnapshotError) else USAGE if isinstance(error, ConfigError) else FAILED
    except Exception as error:
        if debug:
            raise
        text = f"unexpected {type(error).__name__}: {one_line(error)}; --debug shows where, please report it"
        print(f"riskring: error: {text}", file=sys.stderr)
        return FAILED


# Flags


def _parser() -> Parser:
    parser = Parser(
        prog="riskring",
        description="Exact rolling risk scores per user over a stream of transactions:\n"
        "sum of a user's amounts in the last 60 seconds / number of them.",
        epilog=examples(
            "riskring generate sample.parquet --rows 1M --skew 1.1 --bad 0.001",
            "riskring run sample.parquet -o scored.parquet",
            "riskring top sample.parquet -k 3",
        )
        + "\n\nexit codes: 0 done, 1 failed, 2 usage, 3 rows rejected under --strict,\n"
        "4 a snapshot is damaged or cannot be written, 130 interrupted, 143 terminated",
    )
    parser.add_argument("--version", action=_Version)
    add_global_flags(parser)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    several = (
        *(_add_run, _add_score, _add_top, _add_explain, _add_snapshot, _add_verify, _add_generate, _add_plan, _add_doctor, _add_bench),
        *(streaming.add_node, streaming.add_produce, hosting.add_flink, serving.add_serve),
    )
    for add in several:
        add(commands)
    return parser


def _add_files(parser: Parser, state: str = "") -> None:
    if state:
        parser.flag("--state", metavar="DIR", help=state)
    parser.add_argument(
        "files",
        nargs="*" if state else "+",
        metavar="FILE",
        help="Parquet, Arrow IPC, CSV or NDJSON file, folder, glob, or - (standard input)",
    )
    add_engine_flags(parser)


def _add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        _run,
        "replay files through the engine",
        "The files are one stream, in the order given; those of a folder or glob in the order of their names.",
        "riskring run payments.parquet",
        "riskring run day1.csv day2.csv --window 5m --rejects rejected.csv",
        "riskring run payments.parquet -o scored.parquet   # all columns and `score`",
        "zcat payments.csv.gz | riskring run - --json",
        "riskring run payments.parquet -o scored.parquet --state state   # again after a crash: it goes on",
    )
    parser.flag("-o", "--output", metavar="FILE", help="write all rows with their score, as the suffix says: .parquet .arrow .csv .ndjson")
    parser.flag("--rejects", metavar="FILE", help="write the rows that were not applied with their reason")
    parser.flag(
        "--save-every", type=size, default=10_000_000, shown="10M", metavar="ROWS", help="with --state: rows from one snapshot to the next"
    )
    _add_files(parser, "keep snapshots there and go on from the last; outputs are then folders of parts")


def _add_score(commands: Any) -> None:
    parser = command(
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
    _add_files(parser, "ask the newest snapshot there instead of files")


def _add_top(commands: Any) -> None:
    parser = command(
        commands,
        "top",
        _top,
        "run files, then show the greatest users",
        "",
        "riskring top payments.parquet",
        "riskring top payments.parquet -k 100 --by count --json",
    )
    parser.flag("-k", "--count", type=size, default=10, metavar="N", help="how many")
    parser.flag("--by", choices=("score", "sum", "count", "newest"), default="score", help="greatest in what")
    _add_at(parser)
    _add_files(parser, "ask the newest snapshot there instead of files")


def _add_explain(commands: Any) -> None:
    parser = command(
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
    _add_files(parser, "ask the newest snapshot there instead of files")


def _add_at(parser: Parser) -> None:
    parser.flag("--at", metavar="TIME", shown="the clock", help="instant of the answer, such as 2025-01-31T12:00:00Z, or now")


def _add_snapshot(commands: Any) -> None:
    parser = command(
        commands,
        "snapshot",
        _snapshot,
        "show what a snapshot says, or check that it is whole",
        "`info` reads the manifest, `verify` all of it.",
        "riskring snapshot info state",
        "riskring snapshot verify s3://bucket/state --json",
    )
    parser.add_argument("action", choices=("info", "verify"), help="what to do")
    parser.add_argument("uri", metavar="URI", help="folder of snapshots, or of one: a path, or a URI such as s3://bucket/folder")


def _add_verify(commands: Any) -> None:
    parser = command(
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
    parser = command(
        commands,
        "generate",
        _generate,
        "make a stream of transactions",
        "The same flags make the same rows.",
        "riskring generate sample.parquet",
        "riskring generate sample.csv --rows 20k --users 500 --rate 100 --skew 1.1 --bursts 0.05 --disorder 2s --bad 0.01",
    )
    parser.add_argument("out", metavar="OUT", help="file to write: .parquet .arrow .csv .ndjson, the last two also with .gz or .zst")
    parser.flag("--rows", type=size, default=1_000_000, shown="1M", metavar="N", help="length of the stream")
    parser.flag("--users", type=size, default=1_000_000, shown="1M", metavar="N", help="users drawn from")
    parser.flag("--rate", type=quantity, default=100_000.0, shown="100k", metavar="N", help="rows per second of event time")
    parser.flag("--skew", type=float, default=0.0, metavar="S", help="exponent of Zipf's law; 0: all users alike")
    parser.flag("--bursts", type=float, default=0.0, metavar="SHARE", help="share of rows in bursts of one user within seconds")
    parser.flag("--disorder", default="0s", metavar="DURATION", help="standard deviation of the delay before a row arrives")
    parser.flag("--ties", type=float, default=0.0, metavar="SHARE", help="share of rows with the time of the row before")
    parser.flag("--bad", type=float, default=0.0, metavar="SHARE", help="share of rows that will be rejected")
    parser.flag("--ids", choices=("int", "uuid", "name"), default="int", help="kind of user ids")
    parser.flag("--start", default="2025-01-01", metavar="TIME", help="where arrivals begin; now: as if they came from now on")
    parser.flag("--seed", type=size, default=0, metavar="N", help="another seed gives other rows of the same users")


def _add_plan(commands: Any) -> None:
    parser = command(
        commands,
        "plan",
        _plan,
        "forecast the memory of an engine",
        "Assumes that all users are alike.",
        "riskring plan --users 10M --rate 100k",
        "riskring plan --users 50M --rate 1M --window 5m --lateness 10s --id-bytes 36",
    )
    parser.flag("--users", type=size, metavar="N", help="users that transact")
    parser.flag("--rate", type=quantity, metavar="N", help="transactions per second, all users together")
    parser.flag("--window", default="60s", metavar="DURATION", help="what a score covers")
    parser.flag("--lateness", shown="the window", metavar="DURATION", help="how far behind the clock a row is still applied")
    parser.flag("--id-bytes", type=size, default=0, metavar="N", help="length of a string id; 0: integers")


def _add_doctor(commands: Any) -> None:
    command(
        commands, "doctor", _doctor, "check that this machine is fit to run the engine", "", "riskring doctor", "riskring doctor --json"
    )


def _add_bench(commands: Any) -> None:
    parser = command(commands, "bench", benchmark.run, benchmark.SUMMARY, benchmark.MORE, *benchmark.EXAMPLES)
    benchmark.add_flags(parser)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        show(f"riskring {__version__}")
        parser.exit(DONE)


# Files through the engine


class _Replay:
    """Files on their way through an engine, and what was seen of them."""

    def __init__(self, args: argparse.Namespace, engine: RiskEngine, end_input: Callable[[], None]) -> None:
        self.args = args
        self.engine = engine
        self.end_input = end_input
        self.rows = 0
        self.rows_now: int | None = None  # of this run, when others went before
        self.seconds = 0.0
        self.id_type: Any = None

    def results(self, *, scores: bool) -> Iterator[tuple[Any, Any]]:
        """Each batch with what the engine made of it, under a progress bar."""
        from engine import sources  # noqa: PLC0415 - imports pyarrow

        began = time.perf_counter()
        units = sources.read(self.args.files, self.engine.config)
        try:
            with progress(quiet=self.args.quiet) as advance:
                for unit in units:
                    for batch in unit:
                        if self.id_type is None:
                            self.id_type = batch.schema.field(self.engine.config.user_id).type
                        result = self.engine.ingest(batch, scores=scores)
                        self.rows += result.rows
                        yield batch, result
                        advance(self.rows)
        finally:
            self.end_input()  # before `units` is closed, which would wait for the next line of input
            units.close()
        self.seconds = time.perf_counter() - began

    def finish(self) -> _Replay:
        if not self.args.files:
            return self
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
        restored = self.engine.restored
        if kind is None and restored is not None and restored.kind is not None:
            kind = {"string": pa.string(), "binary": pa.binary()}.get(restored.kind, pa.int64())
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

    state = getattr(args, "state", None)
    if bool(state) == bool(args.files):
        raise ConfigError("give FILE or --state DIR, not both" if state else "give FILE or --state DIR")
    if state:
        with RiskEngine.load(state, **engine_options(args)) as engine:
            _show_passed_over(engine, args)
            yield _Replay(args, engine, lambda: None)
        return
    with interruptible_input(args.files) as end_input, RiskEngine(**engine_options(args)) as engine:
        yield _Replay(args, engine, end_input)


def _show_passed_over(engine: RiskEngine, args: argparse.Namespace) -> None:
    for name, why in engine.restored.passed_over if engine.restored and not args.quiet else ():
        print(f"riskring: {name} is passed over: {why}", file=sys.stderr)


def _run_with_state(args: argparse.Namespace) -> int:
    from engine.replay import Replay  # noqa: PLC0415 - compiles kernels

    if not args.files:
        raise ConfigError("run needs FILE")
    began = time.perf_counter()
    with Replay(args.files, args.state, engine_options(args), args.save_every, args.output, args.rejects, time.time_ns) as run:
        _show_passed_over(run.engine, args)
        replay = _Replay(args, run.engine, lambda: None)
        before = run.rows
        with progress(quiet=args.quiet) as advance:
            for _ in run.results():
                advance(run.rows - before)
        replay.rows, replay.seconds, replay.rows_now = run.rows, time.perf_counter() - began, run.rows - before
        if not args.quiet or args.json:
            _show_summary(replay, args)
        return replay.exit_code()


def _run(args: argparse.Namespace) -> int:
    if args.state:
        return _run_with_state(args)
    from engine.outputs import check_outputs  # noqa: PLC0415 - imports pyarrow

    check_outputs([path for path in (args.output, args.rejects) if path], args.files)
    with _replay(args) as replay:
        _replay_into_files(replay, args)
        if not args.quiet or args.json:
            _show_summary(replay, args)
        return replay.exit_code()


def _replay_into_files(replay: _Replay, args: argparse.Namespace) -> None:
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    from engine.outputs import FileWriter  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        scored: Any = None
        rejects: Any = None
        for batch, result in replay.results(scores=bool(args.output)):
            if args.output:
                if scored is None:
                    if "score" in batch.schema.names:
                        raise EngineError("the input has a column 'score' already, which --output would add; rename it")
                    schema = batch.schema.append(pa.field("score", pa.float64()))
                    distinct = (replay.engine.config.user_id, "score")
                    scored = stack.enter_context(FileWriter(args.output, schema, distinct))
                scored.write(pa.Table.from_batches([batch]).append_column("score", result.scores))
            if args.rejects:
                table = result.rejects()
                if rejects is None:
                    rejects = stack.enter_context(FileWriter(args.rejects, table.schema))
                rejects.write(table)


def _show_summary(replay: _Replay, args: argparse.Namespace) -> None:
    stats = replay.engine.stats()
    rows_now = replay.rows if replay.rows_now is None else replay.rows_now
    rate = round(rows_now / replay.seconds) if replay.seconds else 0
    top = replay.engine.top(TOP_ROWS)
    if args.json:
        show_json(
            {
                "rows": replay.rows,
                "accepted": stats.accepted,
                "rejected": replay.rejected(),
                "rounded": stats.rounded,
                "users": stats.users,
                "transactions": stats.transactions,
                "clock": time_text(stats.clock),
                "bytes": stats.bytes,
                "seconds": round(replay.seconds, 3),
                "rows_per_second": rate,
                "top": records(top),
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
    show_aligned(lines, right=(1,))
    show(f"clock  {time_text(stats.clock) or 'none: no row was accepted'}")
    if top.num_rows:
        show(f"\ntop {top.num_rows} by score")
        show_table(top, as_json=False)


def _score(args: argparse.Namespace) -> int:
    if not args.user:
        raise ConfigError("score needs --user ID")
    with _replay(args) as replay:
        replay.finish()
        show_table(replay.engine.features([replay.user(text) for text in args.user], at=args.at), as_json=args.json)
        return replay.exit_code()


def _top(args: argparse.Namespace) -> int:
    with _replay(args) as replay:
        replay.finish()
        show_table(replay.engine.top(args.count, by=args.by, at=args.at), as_json=args.json)
        return replay.exit_code()


def _explain(args: argparse.Namespace) -> int:
    if args.user is None:
        raise ConfigError("explain needs --user ID")
    with _replay(args) as replay:
        replay.finish()
        explanation = replay.engine.explain(replay.user(args.user), at=args.at)
        begin, end = map(time_text, explanation.window)
        if args.json:
            show_json(
                {
                    "user_id": args.user,
                    "score": explanation.score,
                    "sum": str(explanation.sum),
                    "count": explanation.count,
                    "window": [begin, end],
                    "reason": explanation.reason,
                    "transactions": records(explanation.transactions),
                }
            )
        else:
            show(f"user    {args.user}\nscore   {explanation.score!r} = {explanation.sum} / {explanation.count}")
            show(f"window  {begin} to {end}\n{explanation.reason}")
            if explanation.count:
                show("")
                show_table(explanation.transactions, as_json=False)
        return replay.exit_code()


def _snapshot(args: argparse.Namespace) -> int:
    from engine.engine import RiskEngine  # noqa: PLC0415 - compiles kernels
    from engine.snapshot import described, snapshots  # noqa: PLC0415 - imports pyarrow

    store, names = snapshots(args.uri)
    if not names:
        raise SnapshotError(f"{args.uri}: holds no snapshot")
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            told = described(store, name)
            if args.action == "verify":
                RiskEngine.load(f"{store.where}/{name}", shards=1).close()
            found.append({"name": name, "state": "ok", **told})
        except SnapshotError as error:
            found.append({"name": name, "state": "damaged", "why": one_line(error)})
        if args.action == "info":
            break
    if args.json:
        show_json({"snapshots": found, "names": names})
    else:
        for told in found:
            show_aligned([(key, value if isinstance(value, str) else json.dumps(value)) for key, value in told.items()], right=())
            show("")
        if args.action == "info" and len(names) > 1:
            show(f"older  {', '.join(names[1:])}")
    return DAMAGED if any(told["state"] == "damaged" for told in found) else DONE


def _verify(args: argparse.Namespace) -> int:
    from engine.reference import verify  # noqa: PLC0415 - imports pyarrow

    began = time.perf_counter()
    with interruptible_input(args.files), progress(quiet=args.quiet) as advance:
        found = verify(args.files, Config.of(**engine_options(args)), wall_ns=time.time_ns(), progress=advance)
    seconds = time.perf_counter() - began
    if args.json:
        shown = {"equal": found.equal, "rows": found.rows, "users": found.users, "difference": found.difference}
        show_json({**shown, "seconds": round(seconds, 3)})
    elif found.equal:
        show(f"equal: {found.rows:,} rows and {found.users:,} users in {seconds:.1f} s")
    else:
        show(f"different after {found.rows:,} rows: {found.difference}")
    return DONE if found.equal else FAILED


def _generate(args: argparse.Namespace) -> int:
    from engine import generate  # noqa: PLC0415 - imports pyarrow

    names = ("users", "rate", "skew", "bursts", "disorder", "ties", "bad", "ids", "start", "seed")
    began = time.perf_counter()
    options = {name: getattr(args, name) for name in names}
    if args.start == "now":
        options["start"] = datetime.datetime.now(datetime.UTC)
    size_bytes = generate.write(args.out, args.rows, **options)
    seconds = time.perf_counter() - began
    if args.json:
        show_json({"path": args.out, "rows": args.rows, "bytes": size_bytes, "seconds": round(seconds, 3)})
    elif not args.quiet:
        print(f"{args.out}: {args.rows:,} rows, {bytes_text(size_bytes)}, {args.rows / seconds:,.0f} rows/s", file=sys.stderr)
    return DONE


def _plan(args: argparse.Namespace) -> int:
    from engine.forecast import forecast, share_of_machine  # noqa: PLC0415 - only here
    from engine.memory import machine_bytes  # noqa: PLC0415 - imports NumPy

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
        show_json({"users": args.users, "rate": args.rate, "retention_seconds": retention_ns / 1e9, **whole, **in_bytes})
        return DONE
    show(f"{args.rate:,.0f} transactions/s retained for {retention_ns / 1e9:g} s")
    show(f"{parts['transactions']:,.0f} transactions of {parts['active_users']:,.0f} users\n")
    lines = [(name, bytes_text(parts[name]), "") for name in ("slots", "index", "rings", "ids") if parts[name]]
    lines.append(("total", bytes_text(parts["total"]), f"{per_user:.0f} bytes per user with a retained transaction"))
    lines.append(("memory", bytes_text(machine_bytes()), share_of_machine(parts["total"] / machine_bytes())))
    show_aligned(lines, right=(1,))
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    from engine.doctor import show_checks  # noqa: PLC0415 - looks at the machine

    return DONE if show_checks(as_json=args.json) else FAILED


def process() -> NoReturn:
    """Run the command that this process is for, and end it at once.

    Files and threads are closed by then, and what was shown is flushed. Taking down the interpreter would cost a quarter of a second for
    collecting what Numba keeps; and it would abort the process where the thread in which Arrow reads standard input ahead waits for it.
    """
    gc.set_threshold(200_000, 20, 20)  # imports make a million objects and no garbage; by default they are looked through again and again
    heed_sigterm()
    os._exit(main())


if __name__ == "__main__":
    process()
