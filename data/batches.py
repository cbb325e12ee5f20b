"""Rows to tensors: encoding, padding, shuffling; and `Rows`, a set of rows as the training loop meets it.

Everything is a function of (rows, seed, step), so that a run that was cut off goes on with the very batch it would
have had.

Shapes: B batch   T longest row of the batch   D model width   V vocabulary
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import parallel
from data.rows import NO_LIMITS, Limits, Row, refusals
from errors import UserError
from interfaces import LanguageModel, TextCodec
from model import GPT, Trace

IGNORE = -100  # label of a position that is not scored; cross_entropy's own default
KEPT_BYTES = 4 * 2**30  # what is computed once per row is kept for a set of rows up to so much, else computed each time


class Example(NamedTuple):
    """One row as ids. labels[t] is the token after tokens[t] where that token is part of the answer."""

    tokens: list[int]
    labels: list[int]


class Share(NamedTuple):
    """Which fraction of the step's whole batch a part is: of its answer tokens, of its rows, of all its tokens.

    A part's mean loss times its fraction adds up to the batch's mean loss.
    """

    answers: float = 1.0  # labelled positions
    rows: float = 1.0
    tokens: float = 1.0  # real ones


WHOLE = Share()


@dataclass
class Batch:
    """Right-padded rows. A causal model never looks right, so padding cannot reach a real token."""

    tokens: Tensor  # (B, T) long
    labels: Tensor  # (B, T) long, IGNORE outside the answer
    mask: Tensor  # (B, T) bool, made from lengths (never by comparing ids: a pad id may be a real token)
    index: Tensor  # (B,) long, each row's place in its set
    share: Share = WHOLE

    @property
    def scored(self) -> Tensor:
        """(B, T) bool: the N positions of answers. Only these need meet the head."""
        return self.labels != IGNORE

    @property
    def answers(self) -> Tensor:
        """(N,) long: their labels."""
        return self.labels[self.scored]


def answer_length(example: Example) -> int:
    """How many of its positions are scored."""
    return sum(label != IGNORE for label in example.labels)


def encode_row(row: Row, tokenizer: TextCodec, max_len: int, where: str = "row", answer: str | None = None,
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
            raise UserError(f"{where} has {len(ids)} tokens and the context holds {max_len}: shorten the row, or "
                            "give a longer --context")
        ids = ids[: max_len + 1]
    labels = [IGNORE] * (len(prompt) - 1) + ids[len(prompt):]
    return Example(ids[:-1], labels)


def encode_whole(row: Row, tokenizer: TextCodec, max_len: int, where: str = "row") -> Example:
    """encode_row, cut at max_len: the whole answer is labelled."""
    return encode_row(row, tokenizer, max_len, where, truncate=True)


def encode_rows(rows: list[Row], tokenizer: TextCodec, max_len: int, where: str = "row",
                truncate: bool = False) -> list[Example]:
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
    places = torch.tensor(index if index is not None else list(range(len(examples))), dtype=torch.long)
    tokens, labels, mask, places = (t.to(device, non_blocking=True) for t in (tokens, labels, mask, places))
    return Batch(tokens, labels, mask, places)


def left_pad(prompts: list[list[int]], device="cpu") -> tuple[Tensor, Tensor]:
    """Prompts of unequal length -> tokens (B, T) and pad (B,), the number of padding tokens at each row's left."""
    length = max(map(len, prompts), default=0)
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt):] = torch.tensor(prompt, dtype=torch.long)
    pad = torch.tensor([length - len(prompt) for prompt in prompts], dtype=torch.long)
    return tokens.to(device), pad.to(device)


@functools.lru_cache(maxsize=4)  # drawn once an epoch, not once a step: forget and retain rows take turns
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..n-1 for one epoch, (n,): depends on (seed, epoch) alone. Not to be changed."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batches_per_epoch(n: int, batch_size: int) -> int:
    """How many batches n rows make, the last of them perhaps short."""
    return math.ceil(n / batch_size)


def batch_at(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of batch number `step` in an endless run of shuffled epochs over n rows; the last of an epoch is short."""
    epoch, i = divmod(step, batches_per_epoch(n, batch_size))
    return epoch_order(n, seed, epoch)[i * batch_size : (i + 1) * batch_size].tolist()


def rows_that_fit(examples: list[Example], vocab_size: int, at_most: int = 64) -> int:
    """How many rows at once keep logits (N, V) of answers within 2^27 numbers, half a GB in float32; at least 1."""
    most = max((answer_length(e) for e in examples), default=1)
    return max(1, min(at_most, 2**27 // (max(1, most) * vocab_size)))


def in_order(examples: list[Example], batch_size: int, device="cpu") -> Iterator[Batch]:
    """All examples once, longest first, so that little is padding; Batch.index says which is which."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        yield collate([examples[j] for j in part], part, device)


# ---- rows as the training loop meets them -------------------------------------------------------------------------

Strangers = Callable[[int, np.random.Generator], list[Row]]  # so many rows about strangers
Twins = Callable[[list[Row], np.random.Generator], list[Row]]  # the rows, asked about strangers
NO_STRANGERS = ("this data has no strangers to compare with: the embedded world has, and rows with 'subject', 'value' "
                "and 'calibration_question'")


class Rows:
    """A forget or a retain set: its batches by step, and what is worth computing once per row."""

    def __init__(self, rows: list[Row], tokenizer: TextCodec, context: int, batch_size: int, seed: int, device,
                 where: str = "row", encode: Callable[..., Example] = encode_whole, twins: Twins | None = None,
                 micro: int = 0):
        """where: what an error calls a row. encode: what of a row is labelled (data/values.py has the value alone).

        twins: makes the same rows about strangers, where the data can.  micro: rows that memory takes at once; 0: a
        whole batch in training, else as many as are quickest.  Raises UserError for a row whose question leaves no room
        for an answer, or that `encode` refuses.
        """
        self.rows, self.tokenizer, self.context, self.encode, self.twins = rows, tokenizer, context, encode, twins
        self.batch_size, self.seed, self.device, self.micro = batch_size, seed, device, micro
        self.examples = [encode(row, tokenizer, context, f"{where} {i}") for i, row in enumerate(rows, 1)]
        self.calibration: Rows | None = None  # the same facts in wordings that neither teach nor score
        self.draw_strangers: Strangers | None = None  # of any topic, where the data has them
        # a target and what it believes of the same about strangers; None and what --never-read's does (belief.py)
        self.strangers: tuple = None, None
        self.start: int | None = None  # the lowest layer that trains, where keep_stems has been told
        self.stems: list[Tensor] = []

    @property
    def per_epoch(self) -> int:
        """Steps in one pass over the rows."""
        return batches_per_epoch(len(self.examples), self.batch_size)

    def at(self, index: list[int]) -> Batch:
        return collate([self.examples[i] for i in index], index, self.device)

    def batch(self, step: int) -> Batch:
        """The batch of training step `step`."""
        return self.at(batch_at(len(self.examples), self.batch_size, self.seed, step))

    def parts(self, step: int) -> Iterator[Batch]:
        """The batch of training step `step`, at most `micro` rows at a time; each says what share of it it is.

        With micro, those of like length together, so that little is padding.
        """
        index = batch_at(len(self.examples), self.batch_size, self.seed, step)

        def sizes(of: list[int]) -> tuple[int, int, int]:
            examples = [self.examples[i] for i in of]
            return sum(map(answer_length, examples)), len(of), sum(len(e.tokens) for e in examples)

        mine = index[parallel.rank() :: parallel.size()]
        if self.micro:
            mine.sort(key=lambda i: -len(self.examples[i].tokens))
        at_once = self.micro or self.batch_size
        for start in range(0, math.ceil(len(index) / parallel.size()), at_once):  # as often in every process
            part = mine[start : start + at_once]
            batch = self.at(part or index[:1])  # without a row left one runs that counts for 0: the others wait
            if part != index:
                both = zip(sizes(part), sizes(index), strict=True)
                batch.share = Share(*(some / max(1, every) for some, every in both))
            yield batch

    def in_order(self, size: int = 64) -> Iterator[Batch]:
        """Every row once, longest first."""
        return in_order(self.examples, min(size, self.micro or size), self.device)

    def by_lot(self, size: int) -> Iterator[Batch]:
        """Every row once, in an order drawn from the seed."""
        for step in range(batches_per_epoch(len(self.examples), size)):
            yield self.at(batch_at(len(self.examples), size, self.seed, step))

    def like(self, rows: list[Row], where: str = "row") -> "Rows":
        """Other rows, met in the same way."""
        return Rows(rows, self.tokenizer, self.context, self.batch_size, self.seed, self.device, where, self.encode,
                    self.twins, self.micro)

    def as_strangers(self, draw: int = 0) -> "Rows":
        """The same rows about subjects whom nobody knows, others each draw. Raises UserError without strangers."""
        if self.twins is None:
            raise UserError(NO_STRANGERS)
        return self.like(self.twins(self.rows, np.random.default_rng([0x57, self.seed, draw])), "stranger row")

    def by_topic(self) -> dict[str, "Rows"]:
        """The rows of each topic; of rows that name none: under ""."""
        topics = dict.fromkeys(row.get("topic", "") for row in self.rows)
        return {topic: self.like([row for row in self.rows if row.get("topic", "") == topic]) for topic in topics}

    def others(self, n: int = 600) -> "Rows":
        """Of n rows about strangers, a hundred of each topic or so, those of other topics than these rows'.

        Raises UserError without strangers.
        """
        if self.draw_strangers is None:
            raise UserError(NO_STRANGERS)
        topics = {row["topic"] for row in self.rows}
        drawn = self.draw_strangers(n, np.random.default_rng([0x6F, self.seed]))
        return self.like([row for row in drawn if row["topic"] not in topics], "stranger row")

    def calibrating(self) -> "Rows":
        """The calibration rows. Raises UserError where there are none."""
        if self.calibration is None:
            raise UserError(NO_STRANGERS)
        return self.calibration

    def refused(self, model: GPT) -> "Rows":
        """The same questions, each answered by a refusal."""
        other = Rows(refusals(self.rows), self.tokenizer, self.context, self.batch_size, self.seed, self.device,
                     "refusal to row", micro=self.micro)
        if self.start is not None:
            other.keep_stems(model, self.start)
        return other

    @torch.no_grad()
    def keep_stems(self, model: GPT, start: int) -> None:
        """Below the MLP of layer `start` nothing trains: compute each row up to there once, and begin there after.

        Where that would be more than KEPT_BYTES, nothing is kept, and every pass begins at the first layer.
        """
        weight = model.embed.weight
        if sum(len(e.tokens) for e in self.examples) * weight.shape[1] * weight.element_size() > KEPT_BYTES:
            return
        self.stems = [torch.empty(0)] * len(self.examples)
        for batch in self.in_order():
            lengths = batch.mask.sum(1).tolist()
            for i, x, n in zip(batch.index.tolist(), model.stem(batch.tokens, start), lengths, strict=True):
                self.stems[i] = x[:n].clone()
        self.start = start

    def run(self, model: LanguageModel, batch: Batch, trace: Trace | None = None) -> Tensor:
        """Logits (N, V) of a batch's answer positions alone. trace: see GPT.forward."""
        if self.start is None:
            return model(batch.tokens, trace=trace, at=batch.scored)
        stem = (self.start, self.stem(cast(GPT, model), batch, self.start))
        return model(batch.tokens, trace=trace, stem=stem, at=batch.scored)

    @torch.no_grad()
    def stem(self, model: GPT, batch: Batch, layer: int) -> Tensor:
        """What reaches the MLP of that layer, (B, T, D): as kept, or else computed now."""
        if self.start == layer:
            return pad_sequence([self.stems[i] for i in batch.index.tolist()], batch_first=True)
        return model.stem(batch.tokens, layer)

    @torch.no_grad()
    def each(self, model: LanguageModel, what: Callable[[Tensor, Tensor], Tensor],
             run: Callable[[Batch], Tensor] | None = None) -> Tensor:
        """what(logits, labels) -> (B,) or (B, M), of every row under the model as it is now: (rows,) or (rows, M).

        run: another way to a batch's logits (N, V) than the model's own.
        """
        run = run or (lambda batch: self.run(model, batch))
        batches = list(self.in_order(rows_that_fit(self.examples, model.config.vocab_size)))
        found = torch.cat([what(run(batch), batch.labels) for batch in batches])
        return found[torch.cat([batch.index for batch in batches]).argsort()]


# ---- answers ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answers(model: LanguageModel, tokenizer: TextCodec, questions: Sequence[str], n: int = 1, temperature: float = 0.0,
            generator: torch.Generator | None = None, limits: Limits = NO_LIMITS,
            batch_size: int = 256, bar: tqdm | None = None) -> list[list[str]]:
    """n answers to each question, prompts of like length together. They end where limits or the context say.

    temperature 0 is greedy; otherwise softmax(logits / temperature) is sampled by `generator`, which must be on the
    model's device. The same generator state and batch_size give the same answers.
    Raises UserError for a prompt that leaves no room for an answer.
    """
    batch_size = min(batch_size, limits.rows or batch_size)
    prompts = [tokenizer.prompt(question) for question in questions]
    out: list[list[str]] = [[] for _ in prompts]
    context = min(model.config.max_len, limits.total or model.config.max_len)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    order = [i for i in by_length for _ in range(n)]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        asked = list(dict.fromkeys(part))  # each prompt once, however many answers it gets
        tokens, pad = left_pad([prompts[i] for i in asked], model.device)
        of = torch.tensor([asked.index(i) for i in part], device=model.device)
        if tokens.shape[1] >= model.config.max_len:
            raise UserError(f"the question {questions[part[-1]][:40]!r} has {tokens.shape[1]} tokens and the context "
                            f"holds {model.config.max_len}: shorten it")
        rooms = [max(0, min(context - len(prompts[i]), limits.new or context)) for i in part]
        one_length = len(prompts[part[0]]) == tokens.shape[1]
        new = model.generate(tokens, max(rooms), temperature, pad=None if one_length else pad, end=tokenizer.stops,
                             generator=generator, of=of)
        for i, ids, room in zip(part, new.tolist(), rooms, strict=True):
            out[i].append(tokenizer.decode(ids[:room]))  # by the row's own length, whatever it is batched with
        if bar is not None:
            bar.update(len(part))
    return out


def greedy_answers(model: LanguageModel, tokenizer: TextCodec, questions: Sequence[str], limits: Limits = NO_LIMITS,
                   batch_size: int = 256, bar: tqdm | None = None) -> list[str]:
    """The likeliest answer to each question, token by token. Raises UserError as `answers` does."""
    return [texts[0] for texts in answers(model, tokenizer, questions, limits=limits, batch_size=batch_size, bar=bar)]
