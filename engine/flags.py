"""Flags of the command line, each of which can also be an environment variable; and how people write sizes."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any, Final, NoReturn

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
