"""Command-line flags, each a line in the file that reads it; cli.py puts together those that one command needs.

    FLAGS = [
        #    name      kind      small   public   what it is
        Flag("--lr",   POSITIVE, 3e-3,   1e-4,    "peak learning rate of the expert"),
    ]

A flag that the chosen method, data or model does not read is not there, so giving it is an error, not a no-op.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from errors import UserError


class PerData(NamedTuple):
    """A default of the small models that depends on the rows."""

    world: object  # the embedded world
    other: object  # rows of any other source
    topic: object = None  # --data topic, if not as world


class Flag(NamedTuple):
    """One flag: its kind is a function of the text, a tuple of choices, or bool for a switch."""

    name: str
    kind: Callable[[str], object] | tuple[str, ...]
    small: object  # default for the small models trained here; may be PerData
    public: object  # default for a public checkpoint (--model)
    help: str

    @property
    def key(self) -> str:
        """The attribute of the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    def default(self, public: bool = False, task: str = "topic") -> object:
        """task: which of the embedded world's, topic or world; other: of other rows."""
        if public:
            return self.public
        if not isinstance(self.small, PerData):
            return self.small
        return self.small.world if task == "topic" and self.small.topic is None else getattr(self.small, task)


class Number:
    """A kind of flag, or of a file's entry: a number from `low` to `high`, so neither nan nor what no machine holds."""

    def __init__(self, low: float, high: float, whole: bool = False, above: bool = False):
        self.low, self.high, self.whole, self.above = low, high, whole, above

    def __call__(self, text: str) -> float:
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = math.nan
        if not self.holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {self}")
        return value

    def holds(self, value: float) -> bool:
        """Whether a number lies within the bounds; what is read from files is held to them too (schema.py)."""
        enough = value > self.low if self.above else value >= self.low  # false for NaN
        return enough and value <= self.high and not (self.whole and isinstance(value, float))

    def __str__(self) -> str:
        least = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        return f"{'a whole number' if self.whole else 'a number'} {least} to {self.high:g}"


def either(number: Number, *words: str) -> Callable[[str], object]:
    """A kind of flag: one of the words, or such a number."""
    def kind(text: str) -> object:
        try:
            return text if text in words else number(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor {' nor '.join(words)}") from None

    return kind


def named(text: str) -> str:
    """A kind of flag: a text that is not empty, as a shell variable that was never set is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give it a value, or leave the flag out")
    return text


COUNT = Number(1, 1_000_000, whole=True)
NATURAL = Number(0, 1_000_000_000, whole=True)
POSITIVE = Number(0, 1e9, above=True)
WEIGHT = Number(0, 1e9)
SHARE = Number(0, 1)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit 2 (errors.py)."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": Help, "usage": "%(prog)s [flags]"} | options)

    def error(self, message: str):
        raise UserError(message)

    def add(self, title: str, flags: Iterable[Flag], public: bool = False, task: str = "topic") -> None:
        group = self.add_argument_group(title)
        for flag in flags:
            default = flag.default(public, task)
            if flag.kind is bool:
                group.add_argument(flag.name, action="store_true", help=flag.help)
            elif isinstance(flag.kind, tuple):
                group.add_argument(flag.name, choices=flag.kind, default=default, help=flag.help)
            else:
                name = "N" if isinstance(flag.kind, Number) else flag.key.rpartition("_")[2].upper()
                group.add_argument(flag.name, type=flag.kind, default=default, help=flag.help, metavar=name)


def defaults(*lists: Iterable[Flag], **others) -> argparse.Namespace:
    """What these flags are for a small model on the embedded world where no command line speaks; others are added."""
    values = {flag.key: False if flag.kind is bool else flag.default() for flags in lists for flag in flags}
    return argparse.Namespace(**values | others)
