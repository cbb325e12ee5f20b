"""Rows to tensors: encoding, padding, shuffling. Everything is a function of (rows, seed, epoch), so that a run
that was cut off can go on with the very batch it would have had.

Shapes: B batch   T longest row of the batch
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.rows import Row
from errors import UserError

IGNORE = -100  # label of a position that is not scored; cross_entropy's own default


class Example(NamedTuple):
    """One row as ids. labels[t] is the token after tokens[t] where that token is part of the answer."""

    tokens: list[int]
    labels: list[int]


@dataclass
class Batch:
    """Right-padded rows. A causal model never looks right, so padding cannot reach a real token."""

    tokens: Tensor  # (B, T) long
    labels: Tensor  # (B, T) long, IGNORE outside the answer
    mask: Tensor  # (B, T) bool, made from lengths (never by comparing ids: a pad id may be a real token)
    index: Tensor  # (B,) long, each row's place in its set

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.mask, self.index)))


def encode_row(row: Row, tokenizer, max_len: int, where: str = "row", answer: str | None = None,
               truncate: bool = False) -> Example:
    """A row as prompt + answer ids, shifted by one. Labels cover the answer and its end token, never the prompt.

    answer: stands in for row["answer"].  truncate: cut at max_len instead of raising UserError (TOFU's own
    protocol cuts at 200 tokens).
    """
    if "text" in row:
        ids = tokenizer.passage(row["text"])
        prompt, completion = ids[:1], ids[1:]  # the first token has nothing before it to predict it
    else:
        prompt, completion = tokenizer.prompt(row["question"]), tokenizer.completion(answer or row["answer"])
    ids = prompt + completion
    if len(ids) < 2:
        raise UserError(f"{where} is a text of one token, which nothing comes before to predict it from: lengthen it")
    if len(ids) - 1 > max_len:
        if not truncate or len(prompt) > max_len:
            raise UserError(f"{where} has {len(ids)} tokens and the context holds {max_len}: shorten the row")
        ids = ids[: max_len + 1]
    labels = [IGNORE] * (len(prompt) - 1) + ids[len(prompt):]
    return Example(ids[:-1], labels)


def is_cut(row: Row, tokenizer, max_len: int) -> bool:
    """Whether encode_row(..., truncate=True) leaves some of the row out."""
    ids = tokenizer.passage(row["text"]) if "text" in row else (
        tokenizer.prompt(row["question"]) + tokenizer.completion(row["answer"]))
    return len(ids) - 1 > max_len


def encode_rows(rows: list[Row], tokenizer, max_len: int, where: str = "row", truncate: bool = False) -> list[Example]:
    """encode_row for a whole set; errors name the row by its number in the set, from 1."""
    return [encode_row(row, tokenizer, max_len, f"{where} {i}", truncate=truncate) for i, row in enumerate(rows, 1)]


def collate(examples: list[Example], index: list[int] | None = None, device="cpu") -> Batch:
    """Right-pad a list of examples (may be empty) into one Batch."""
    length = max((len(e.tokens) for e in examples), default=0)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    for i, e in enumerate(examples):
        n = len(e.tokens)
        tokens[i, :n] = torch.tensor(e.tokens)
        labels[i, :n] = torch.tensor(e.labels)
        mask[i, :n] = True
    index = torch.tensor(index if index is not None else list(range(len(examples))), dtype=torch.long)
    return Batch(tokens, labels, mask, index).to(device)


def left_pad(prompts: list[list[int]], device="cpu") -> tuple[Tensor, Tensor]:
    """Prompts of unequal length -> tokens (B, T) and pad (B,), the number of padding tokens at each row's left."""
    length = max(map(len, prompts), default=0)
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt):] = torch.tensor(prompt, dtype=torch.long)
    pad = torch.tensor([length - len(prompt) for prompt in prompts], dtype=torch.long)
    return tokens.to(device), pad.to(device)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation of 0..n-1 for one epoch: depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def batch_at(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of batch number `step` in an endless run of shuffled epochs over n rows; the last of an epoch is short."""
    per_epoch = -(-n // batch_size)
    epoch, i = divmod(step, per_epoch)
    return epoch_order(n, seed, epoch)[i * batch_size : (i + 1) * batch_size]


def rows_that_fit(examples: list[Example], vocab_size: int, at_most: int = 64) -> int:
    """How many rows at once keep logits (B, T, V) within 2^27 numbers, half a gigabyte in float32; at least 1."""
    longest = max((len(e.tokens) for e in examples), default=1)
    return max(1, min(at_most, 2**27 // (longest * vocab_size)))


def in_order(examples: list[Example], batch_size: int, device="cpu") -> Iterator[Batch]:
    """All examples once, longest first, so that little is padding; Batch.index says which is which."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        yield collate([examples[j] for j in part], part, device)
