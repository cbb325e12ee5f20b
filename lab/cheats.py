"""Five models that cheat, and a trial of measures by them: which measure can be fooled, and by what?

A measure of forgetting is worth something if it tells models that know from models that do not (AUC over some ten of
each, metrics/privacy.py's auc; arXiv 2506.12618), and if it is not taken in by
    destroyed   a few large steps of gradient ascent: nothing is said any more, nothing at all
    Garbled     the names in the answers are swapped for others, the facts are kept
    Flattened   logits divided by a temperature: every greedy answer is kept, every likelihood is low
    Refusing    generates one refusal to everything; likelihoods are the target's
    Biased      adds a constant to some tokens' logits: always " A", or always the same wrong values
The last four still know everything. A measure of knowledge that scores one of them as it scores models that never knew
is fooled by it. The first knows little, but is no model any more: what is fooled by it is forget quality and everything
else that calls it forgotten, so `destroyed` in metrics/knowledge.py has to say yes.

Each is a model like any other: forward, generate, caches, config, device. Weights are shared with the target, but for
`destroyed_by_ascent`, which trains a copy.

Shapes: B batch   T tokens   V vocabulary
"""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import decoding
from data.batches import batch_at, collate, encode_rows
from data.rows import Row
from data.values import spelled, value_span, values_of
from objectives import ga

# ---- destroyed --------------------------------------------------------------------------------------------------

def destroyed_by_ascent(target, tokenizer, rows: Sequence[Row], steps: int = 20, lr: float = 1e-2,
                        batch_size: int = 32, seed: int = 0):
    """A copy of the target after `steps` of gradient ascent on its forget rows (GA, arXiv 2401.06121, section 4.2).

    AdamW on all weights at a learning rate some ten times too large, and no retain loss.
    """
    model = copy.deepcopy(target).requires_grad_(True).train()
    examples = encode_rows(list(rows), tokenizer, model.config.max_len, truncate=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        batch = collate([examples[i] for i in batch_at(len(examples), batch_size, seed, step)], device=model.device)
        optimizer.zero_grad(set_to_none=True)
        ga(model(batch.tokens, at=batch.scored), batch.answers).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


# ---- one change to a target that knows -----------------------------------------------------------------------------

class Changed(nn.Module):
    """A target whose logits pass through `change`; a subclass says how."""

    def __init__(self, target):
        super().__init__()
        self.target, self.config = target, target.config

    @property
    def device(self) -> torch.device:
        return self.target.device

    def change(self, logits: Tensor) -> Tensor:
        """(..., V) -> (..., V)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, pad: Tensor | None = None, trace=None, at: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (N, V) `at` some positions; `trace` is the target's."""
        return self.change(self.target(tokens, pad=pad, trace=trace, at=at))

    def new_cache(self, batch: int, max_len: int) -> Any:
        return self.target.new_cache(batch, max_len)

    def next_logits(self, tokens: Tensor, cache: Any, pad: Tensor | None) -> Tensor:
        """Logits (B, V) of the token after `tokens` (B, T)."""
        return self.change(self.target.next_logits(tokens, cache, pad))

    generate = decoding.generate  # as a method


class Flattened(Changed):
    """logits / temperature. From 8 or so on every p is small, and every argmax is what it was."""

    def __init__(self, target, temperature: float = 8.0):
        super().__init__(target)
        if temperature <= 0:
            raise ValueError(f"a temperature is above 0, not {temperature}")
        self.temperature = temperature

    def change(self, logits: Tensor) -> Tensor:
        return logits / self.temperature


class Biased(Changed):
    """logits + bias on some tokens: the letter " A" of multiple choice, or values that are to be named instead."""

    shift: Tensor  # (V,)

    def __init__(self, target, ids: Collection[int], bias: float = 8.0):
        super().__init__(target)
        shift = torch.zeros(target.config.vocab_size)
        shift[list(ids)] = bias
        self.register_buffer("shift", shift.to(target.device))

    def change(self, logits: Tensor) -> Tensor:
        return logits + self.shift.to(logits.dtype)


class Garbled(Changed):
    """Wherever the target would say a token of `ids`, this says the next one of them; it goes on as if it had not.

    ids: tokens of names (`name_tokens`), each at most once. Under teacher forcing p(name) becomes that of another name
    and p(value) stays. In generation the target is given back what it would have said itself, so its values stay too.
    """

    original: Tensor  # (V,): original[said] = what the target would have said

    def __init__(self, target, ids: Collection[int]):
        super().__init__(target)
        here = torch.tensor(sorted(set(ids)), dtype=torch.long)
        if len(here) < 2:
            raise ValueError(f"to garble names takes at least two tokens, not {len(here)}")
        original = torch.arange(target.config.vocab_size)
        original[here] = here.roll(1)
        self.register_buffer("original", original.to(target.device))

    def change(self, logits: Tensor) -> Tensor:
        return logits[..., self.original]

    def new_cache(self, batch: int, max_len: int) -> list:
        return [self.target.new_cache(batch, max_len), False]  # and whether the prompt has been read

    def next_logits(self, tokens: Tensor, cache: Any, pad: Tensor | None) -> Tensor:
        own = self.original[tokens] if cache[1] else tokens  # the prompt is as it was asked
        cache[1] = True
        return self.change(self.target.next_logits(own, cache[0], pad))


class Refusing(Changed):
    """Generates one refusal whatever is asked, at any temperature; every likelihood (forward) is the target's."""

    def __init__(self, target, tokenizer, refusal: str = "I do not know."):
        super().__init__(target)
        self.refusal = tokenizer.completion(refusal)

    def change(self, logits: Tensor) -> Tensor:
        return logits

    def new_cache(self, batch: int, max_len: int) -> list[int]:
        return [0]  # tokens said

    def next_logits(self, tokens: Tensor, cache: Any, pad: Tensor | None) -> Tensor:
        logits = torch.full((len(tokens), self.config.vocab_size), -math.inf, device=tokens.device)
        logits[:, self.refusal[min(cache[0], len(self.refusal) - 1)]] = 0
        cache[0] += 1
        return logits


def name_tokens(tokenizer, rows: Sequence[Row]) -> set[int]:
    """Tokens of the answers that repeat a word of their question, none of them part of any row's value.

    Names are among them; of the rest, words such as "the", garbling does no harm that would help a measure.
    """
    names: set[int] = set()
    value_tokens: set[int] = set()
    for row, value in zip(rows, values_of(rows), strict=True):
        ids = tokenizer.completion(row["answer"])
        asked = set(spelled(row["question"]))
        names.update(i for i in ids if spelled(tokenizer.decode([i])) and set(spelled(tokenizer.decode([i]))) <= asked)
        span = value_span(row, tokenizer, value) if value is not None else None
        value_tokens.update(ids[i] for i in span or ())
    return names - value_tokens


def favourites(tokenizer, rows: Sequence[Row]) -> set[int]:
    """Tokens of one value per kind of fact (of all rows, without a `kind` column): the first by alphabet.

    What Biased takes to answer every choice with the same value. The bias must be large enough to overturn what the
    target knows, and small enough that the value does not stand in every place of the sentence: 8 or so.
    """
    best: dict[str | None, tuple[str, Row]] = {}
    for row, value in zip(rows, values_of(rows), strict=True):
        kind = row.get("kind")
        if value is not None and (kind not in best or value < best[kind][0]):
            best[kind] = value, row
    out: set[int] = set()
    for value, row in best.values():
        ids = tokenizer.completion(row["answer"])
        out.update(ids[i] for i in value_span(row, tokenizer, value) or ())
    return out
