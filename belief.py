"""What a model believes: how likely it finds labelled tokens, facts, and the same facts asked about strangers.

Shapes: B batch   T tokens   V vocabulary   N answer positions of a batch: only these need meet the head
    logits (B, T, V) or (N, V), any float dtype    labels (B, T) long, IGNORE (-100) where no answer's token is due
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.batches import IGNORE
from interfaces import LanguageModel
from model import GPT

if TYPE_CHECKING:
    from data.batches import Batch, Rows


def at_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of answer positions and their labels (N,), from logits of all positions or of these alone."""
    kept = labels != IGNORE
    return logits[kept] if logits.dim() > 2 else logits, labels[kept]


def in_place(values: Tensor, labels: Tensor) -> Tensor:
    """Values (N,) of answer positions where they belong, (B, T); 0 elsewhere."""
    return values.new_zeros(labels.shape).masked_scatter(labels != IGNORE, values)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at each position in float32, (B, T); 0 where the label is IGNORE. logits: (B, T, V) or (N, V)."""
    scored, answers = at_answers(logits, labels)
    return in_place(scored.float().log_softmax(-1).gather(-1, answers[:, None])[:, 0], labels)


def row_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(answer | prompt) of each row: the *sum* over its answer tokens, (B,). logits: (B, T, V) or (N, V)."""
    return token_log_probs(logits, labels).sum(-1)


def all_right(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where every labelled token is the argmax, else 0, of each row: (B,). logits: (B, T, V) or (N, V)."""
    scored, answers = at_answers(logits, labels)
    return (in_place((scored.argmax(-1) != answers).float(), labels).sum(-1) == 0).float()


DRAWS = 5  # of strangers, each fact with a name of its own


class Belief(NamedTuple):
    """What a model makes of facts whose sentences it is given up to the value."""

    p: float  # mean probability of the value
    hit: float  # share whose value is the likeliest continuation
    in_three: float  # mean chance that one of three samples says the value, given the sentence up to it

    def __str__(self) -> str:
        return f"probability {self.p:.3f}, likeliest {self.hit:.3f}, in three samples {self.in_three:.3f}"

    def at_most(self, other: Belief) -> bool:
        """Whether no more is believed, by mean probability and likeliest value: a few certain facts move p little."""
        return self.p <= other.p and self.hit <= other.hit


def belief(model: LanguageModel, rows: Rows, run: Callable[[Batch], Tensor] | None = None) -> Belief:
    """Of rows whose labels are on the value (data/values.py, encode_fact). run: see Rows.each."""
    def of_batch(logits: Tensor, labels: Tensor) -> Tensor:  # (B, 3)
        p = row_log_prob(logits, labels).exp()
        return torch.stack([p, all_right(logits, labels), 1 - (1 - p) ** 3], dim=1)

    return Belief(*(float(column.mean()) for column in rows.each(model, of_batch, run).T.contiguous()))


def mean_belief(each: Sequence[Belief]) -> Belief:
    return Belief(*(sum(values) / len(each) for values in zip(*each, strict=True)))


def strangers_belief(target: GPT, known: Rows) -> Belief:
    """The target's belief when the same questions are asked about strangers: what not knowing looks like.

    Kept with the rows, because both the stopping rule and NPO ask for it.
    """
    asked, level = known.strangers
    if level is None or asked not in (None, target):
        level = mean_belief([belief(target, known.as_strangers(draw)) for draw in range(DRAWS)])
        print(f"of strangers: {level}; forget facts are to get there")
        known.strangers = target, level
    return level


def unread_belief(known: Rows, other: GPT) -> None:
    """Put the belief of a model that never read the facts in the place of strangers' (--never-read), whoever asks."""
    level = belief(other, known)
    print(f"of a model that never read them: {level}; forget facts are to get there")
    known.strangers = None, level
