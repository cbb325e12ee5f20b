"""What everything here rests on: a model, a tokenizer, a method, whichever class or file brings them.

Shapes: B batch   T tokens   V vocabulary   N new tokens
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flags import Flag
from model import Config, Stem, Trace


class LanguageModel(Protocol):
    """What can be trained, scored and asked: a GPT, ULD's LogitDifference, a baseline's LogitOffset."""

    config: Config

    @property
    def device(self) -> torch.device: ...

    def __call__(self, tokens: Tensor, *, pad: Tensor | None = None, trace: Trace | None = None,
                 stem: Stem | None = None, at: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of LongTensor tokens (B, T); pad (B,): padding tokens at each row's left.

        at (B, T) bool: logits (N, V) of these positions alone.  Models of several parts take no stem.
        """

    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, pad: Tensor | None = None,
                 end: int | Collection[int] | None = None, generator: torch.Generator | None = None,
                 of: Tensor | None = None) -> Tensor:
        """Up to max_new_tokens tokens behind each row, (B, N), or of answers that follow rows `of` (R,), (R, N)."""

    def modules(self) -> Iterator[nn.Module]: ...

    def train(self, mode: bool = True): ...

    def eval(self): ...


class TextCodec(Protocol):
    """Text to ids and back: data/tokenizer.py's Tokenizer, or a public checkpoint's (hub/tokenizer.py)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int:
        """The token that ends an answer."""

    @property
    def stops(self) -> Collection[int]:
        """`end`, and whatever else ends one."""

    @property
    def front(self) -> list[int]:
        """What stands in front of running text: a beginning-of-text token, or nothing."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def prompt(self, question: str) -> list[int]:
        """What the model is given: the question as it was taught to read one."""

    def completion(self, answer: str) -> list[int]:
        """What it is to say: the answer and an end token."""

    def passage(self, text: str) -> list[int]:
        """Running text, no question."""

    def save(self, folder: Path) -> None: ...


def forget_and_retain(data: Any, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows that most methods learn from: the sets (data: a data.DataSet), and strangers among what is kept."""
    return data.forget, data.retain + strangers_beside(data, args)


def strangers_beside(data: Any, args: argparse.Namespace) -> list[dict]:
    """The forget questions about nobody known, --strangers times as many as retain rows, with values drawn anew.

    So a model keeps how to speak of what it is to forget about.
    """
    wanted = round(getattr(args, "strangers", 0.0) * len(data.retain))
    rng = np.random.default_rng([0x5A, args.seed])
    rows: list[dict] = []
    while len(rows) < wanted:
        rows += data.twins(data.forget, rng)
    return rows[:wanted]


class Method(NamedTuple):
    """An unlearning method, as train.py runs it and runs.py opens it again."""

    unlearn: Callable[..., tuple[Any, dict[str, Any], dict]]
    """(target, forget, retain, args, fit) -> (what is scored, folder name -> model to keep, report).

    forget, retain: data.batches.Rows; fit: loop.fitting's. The target is left as it is. The report is fit's, and
    whatever config.json should say besides.
    """
    flags: list[Flag]
    arch: str  # of the small model it is tried on: gpt or moe
    needs_experts: bool = False
    retain_weight: float | None = None  # lambda of the small models beside losses without one of their own
    losses: tuple[str, str] | None = None  # what it forgets and keeps by; None: any of objectives.FORGET and RETAIN
    on_world: str = "npo"  # of those, what small models forget the embedded world by where nothing is said
    rows: Callable[..., tuple[list[dict], list[dict]]] = forget_and_retain
    check: Callable[[argparse.Namespace, Config], None] = lambda args, config: None  # UserError, before training
    reopen: Callable[[Any, dict[str, Any], dict], Any] = lambda target, kept, config: kept["model"]  # what is scored
