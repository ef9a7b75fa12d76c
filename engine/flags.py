"""Flags of the command line, each of which can also be an environment variable; and how people write sizes."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from engine.errors import ConfigError, EngineError

USAGE: Final = 2

_SIZE: Final = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kmgb]?)", re.IGNORECASE)
_SIZES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


class Parser(argparse.ArgumentParser):
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


def settle(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Parse words; what was not given as a flag comes from the environment, or else from the default."""
    args = parser.parse_args(words)
    if not hasattr(args, "parser"):
        parser.print_help()
        raise SystemExit(0)
    for action, default in args.parser.flags:
        if hasattr(args, action.dest):
            continue
        variable = _variable(action.option_strings[-1])
        text = os.environ.get(variable, "")
        value = default
        if text and action.nargs == 0:
            value = is_on(text)
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


def is_on(text: str) -> bool:
    """Whether a variable that stands for a flag without a value is set."""
    return text.strip().lower() not in ("", "0", "no", "off", "false")


def size(text: str) -> int:
    """A whole number as people write it: 500, 10k, 2.5M, 1_000.

    Example:
        >>> size("2.5M")
        2500000
    """
    value = quantity(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def quantity(text: str) -> float:
    """As `size`, and may have a fraction."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one such as 500, 10k or 2.5M")
    number = found[1].replace("_", "")
    factor = _SIZES[found[2].lower()]
    return int(number) * factor if number.isdigit() else float(number) * factor


def optional(text: str) -> str | None:
    """A value of which there may be none."""
    return None if text.strip().lower() == "none" else text


def seconds(text: str, name: str) -> float:
    """A duration of a flag, more than none.

    Raises:
        ConfigError: It is no duration, or not more than 0.

    Example:
        >>> seconds("250ms", "tick")
        0.25
    """
    from engine.config import duration_ns  # noqa: PLC0415 - start-up

    found = duration_ns(text, name) / 1e9
    if found <= 0:
        raise ConfigError(f"--{name} {text} must be more than 0")
    return found


class extra:  # noqa: N801 - reads as a word of the statement
    """`with extra("kafka"):` around imports: an extra that is not there is told as what to install."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("engine"):
            raise EngineError(f"{error.name} is not installed; pip install 'riskring[{self._name}]'") from None


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str, *lines: str) -> Parser:
    """Add a command: what it does in a few words, and more about it."""
    parser: Parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}", epilog=examples(*lines)
    )
    parser.set_defaults(parser=parser, command=run)
    add_global_flags(parser)
    return parser


def add_global_flags(parser: Parser) -> None:
    """Add the flags that every command has."""
    group = parser.add_argument_group("everywhere")
    parser.flag("--json", group=group, action="store_true", default=False, help="machine output")
    parser.flag("--strict", group=group, action="store_true", default=False, help="exit with 3 if rows were rejected")
    parser.flag("--quiet", group=group, action="store_true", default=False, help="no progress, no notes, no summary")
    parser.flag("--debug", group=group, action="store_true", default=False, help="show the traceback of an error")


def add_engine_flags(parser: Parser, **shown: object) -> None:
    """Add the options of an engine; `shown` are defaults that are others here than the engine's."""
    group = parser.add_argument_group("engine")

    def flag(name: str, default: object, help: str, **kwargs: Any) -> None:
        parser.flag(name, group=group, shown=shown.get(name.lstrip("-").replace("-", "_"), default), help=help, **kwargs)

    flag("--window", "60s", "what a score covers", metavar="DURATION")
    flag("--lateness", "the window", "how far behind the clock a row is still applied", metavar="DURATION")
    flag("--closed", "both", "whether a transaction exactly `window` old counts (both) or not (right)", choices=("both", "right"))
    flag("--decimals", 4, "amounts are held in units of 10**-N", type=size, metavar="N")
    flag("--users", "10M", "most users with a retained transaction at a time", type=size, metavar="N")
    flag("--shards", "one per core", "parts worked on by a thread each; changes no result", type=size, metavar="N")
    flag("--clock", "event", "what a lookup without --at takes for now", choices=("event", "wall"))
    flag("--max-ahead", "10s", "reject rows further ahead of the wall clock, or none", metavar="DURATION")
    flag("--max-jump", "none", "reject rows further ahead of the engine's clock", metavar="DURATION")
    flag("--time-unit", None, "unit of an integer time column", choices=("s", "ms", "us", "ns"))
    flag("--user-id", "user_id", "column of the users", metavar="COLUMN")
    flag("--amount", "amount", "column of the amounts", metavar="COLUMN")
    flag("--timestamp", "timestamp", "column of the event times", metavar="COLUMN")


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


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Only what was given: the defaults are the engine's own."""
    given = {name: getattr(args, name) for name in _ENGINE_FLAGS if getattr(args, name) is not None}
    for name in ("max_ahead", "max_jump"):
        if name in given:
            given[name] = optional(given[name])
    return given
