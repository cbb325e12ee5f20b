"""Decoding: answers of a model, token by token, and what it keeps of the tokens before.

    generate(model, tokens, max_new_tokens=20)     # (B, T) -> (B, 20); every model here has it as a method
    first, parts = behind(model, prompts, ...)     # logits of several answers to each prompt, which is read once

A model is a module with `device`, `new_cache` and `next_logits`: a GPT, or ULD's LogitDifference, which keeps one cache
per part.

Shapes: B batch   R answers   T tokens   S tokens seen so far   N new tokens   V vocabulary
    G key-value heads   C width of one
"""

import copy
import math
from collections.abc import Collection

import torch
from torch import Tensor

from moe import MoE

Parts = list[tuple[slice, Tensor]]  # which rows, and their logits (N, V)


class Cache:
    """Keys and values of all layers for the tokens seen so far, (B, G, room, C) per layer; room grows with them."""

    def __init__(self, layers: int, groups: int, widths: tuple[int, int], batch: int, max_len: int, device, dtype):
        self.k, self.v = ([torch.empty(batch, groups, 0, width, device=device, dtype=dtype)] * layers
                          for width in widths)
        self.length, self.max_len = 0, max_len
        self.visible: Tensor | None = None  # (B, 1, 1, max_len) bool, False on padding, where there is some
        self.place: Tensor | None = None  # (1,) long, `length` in the device's own memory: see Replay

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, C) keys and values of `layer`; returns all of that layer's, (B, G, S, C)."""
        if self.place is not None:
            return self.k[layer].index_copy_(2, self.place, k), self.v[layer].index_copy_(2, self.place, v)
        end = self.length + k.shape[2]
        if end > self.k[layer].shape[2]:
            self.grow(layer, max(end, min(self.max_len, max(end, 32) * 3 // 2)))
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def grow(self, layer: int, room: int) -> None:
        for kept in (self.k, self.v):
            old = kept[layer]
            # zeros, for a place not yet written weighs 0 in attention, and 0 * NaN would be NaN
            kept[layer] = old.new_zeros(*old.shape[:2], room, old.shape[3])
            kept[layer][:, :, : self.length] = old[:, :, : self.length]

    def settle(self, tokens: int) -> None:
        """Room for so many more tokens, one at a time: memory stays, and the device counts where the next one goes."""
        room = min(self.max_len, self.length + tokens)
        for layer in range(len(self.k)):
            # a multiple of 8: a row of the mask is as long, and one that is not whole 16 bytes is copied
            self.grow(layer, room + -room % 8)
        self.place = torch.tensor([self.length], device=self.k[0].device)

    def taken(self, rows: Tensor) -> "Cache":
        """A cache of these rows alone, (R,) long; one may be there several times. This one stays as it is."""
        new = copy.copy(self)
        new.k, new.v = ([layer[rows] for layer in layers] for layers in (self.k, self.v))
        new.visible = None if self.visible is None else self.visible[rows]
        return new


def parts_of(cache) -> list:
    """A model's one cache, or those of its parts."""
    return cache if isinstance(cache, list) else [cache]


def taken(cache, rows: Tensor):
    """Cache.taken, of a model's one cache or of all of its parts'."""
    new = [part.taken(rows) if isinstance(part, Cache) else part for part in parts_of(cache)]
    return new if isinstance(cache, list) else new[0]


class Replay:
    """Decoding on a GPU: what one token sets off is recorded once and played back for every other (a CUDA graph).

    Python starts a few hundred kernels a token, and few rows' kernels are done before the next is started; a recording
    is started as one. It reads and writes the same memory each time: hence Cache.settle. What it gains: results/gpu.md.
    """

    ROOM, LEAST = 8192, 64  # tokens of all rows together, and at least of each, until another recording is made

    def __init__(self, model, cache, pad: Tensor | None):
        self.model, self.cache, self.pad = model, cache, pad
        self.left = 0  # tokens of each row until then

    @staticmethod
    def works(model, cache, rows: int) -> bool:
        """On one GPU, the current one, where all that is kept is caches and no layer waits for a number from it."""
        if model.device.type != "cuda" or torch.distributed.is_initialized():
            return False
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        return (model.device.index in (None, torch.cuda.current_device())  # a recording listens to the current one
                and all(isinstance(part, Cache) for part in parts_of(cache))
                and not any(layer.waits(rows) for layer in layers))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token after `tokens` (B, 1); the next call writes them anew in the same memory."""
        if self.left == 0:
            return self.record(tokens)
        self.left -= 1
        self.tokens.copy_(tokens)
        self.graph.replay()
        for part in parts_of(self.cache):
            part.length += 1
        return self.logits

    def record(self, tokens: Tensor) -> Tensor:
        """As __call__, kernel by kernel; then records what the next tokens will set off, which runs nothing."""
        room = max(self.LEAST, self.ROOM // len(tokens))
        for part in parts_of(self.cache):
            part.settle(room)
        self.left = room - 1
        first = self.model.next_logits(tokens, self.cache, self.pad)  # also makes what is made once, such as angles
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.model.next_logits(self.tokens, self.cache, self.pad)
        for part in parts_of(self.cache):
            part.length -= 1  # Python ran, the device did not
        return first


@torch.no_grad()
def generate(model, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, pad: Tensor | None = None,
             end: int | Collection[int] | None = None, generator: torch.Generator | None = None,
             of: Tensor | None = None) -> Tensor:
    """Continue each row of tokens (B, T), left-padded by pad (B,), by up to max_new_tokens: LongTensor (R, N).

    of: (R,) the row that each answer continues, so that a prompt is read once however many answers it gets; default:
    one each. temperature 0 is greedy, otherwise softmax(logits / temperature) is sampled. Once a row has given `end`
    (or one of several), the rest of it is that token; the loop stops when all rows have, and once half of them have it
    goes on with the others (not where it is a Replay, which has recorded all rows).
    """
    B, T = tokens.shape
    device = tokens.device
    if T == 0:
        raise ValueError("generate needs at least one prompt token per row")
    R = B if of is None else len(of)
    said = tokens.new_zeros(R, max_new_tokens)
    if max_new_tokens == 0:
        return said
    end = [] if end is None else [end] if isinstance(end, int) else sorted(end)
    ends = torch.tensor(end, dtype=torch.long, device=device)
    look = 1 if device.type == "cpu" else 8  # tokens between two looks at who has ended: to look stops a GPU
    cache = model.new_cache(B, T + max_new_tokens)
    logits = model.next_logits(tokens, cache, pad).float()  # (B, V)
    if of is not None:
        cache = taken(cache, of)
        logits, pad = logits[of], None if pad is None else pad[of]
    # a few tokens are not worth a recording
    replay = Replay(model, cache, pad) if max_new_tokens > 8 and Replay.works(model, cache, R) else None
    rows = torch.arange(R, device=device)  # those that go on
    done = torch.zeros(R, dtype=torch.bool, device=device)  # of them, those that have ended since
    # of all rows, those that have ended too, so that what the generator draws for one does not depend on who has ended
    spread = torch.ones_like(logits) if temperature > 0 else None
    for step in range(max_new_tokens):
        if spread is None:
            chosen = logits.argmax(-1)
        else:
            spread[rows] = (logits / temperature).softmax(-1)
            chosen = draw(spread, generator)[rows]
        said[rows, step] = chosen
        done |= torch.isin(chosen, ends)
        if step + 1 == max_new_tokens:
            break
        if len(ends) and step % look == look - 1:
            left = (~done).nonzero()[:, 0]
            if not len(left):
                return ended(said[:, : step + 1], ends)
            if replay is None and len(left) <= len(rows) // 2:
                cache = taken(cache, left)
                rows, done, chosen, pad = rows[left], done[left], chosen[left], None if pad is None else pad[left]
        logits = (replay(chosen[:, None]) if replay else model.next_logits(chosen[:, None], cache, pad)).float()
    return ended(said, ends)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token of each row of weights (R, V), as likely as its weight: (R,).

    torch.multinomial draws a random number for every token of the vocabulary. Of a public model's that takes a CPU
    longer than the model itself (135M parameters, 256 rows: 0.33 s and 0.25 s). There the running sum of a row's
    weights says which token one random number falls on. Small models keep multinomial: results/ was drawn with it.
    """
    if weights.device.type != "cpu" or weights.shape[-1] < 2**14:
        return torch.multinomial(weights, 1, generator=generator)[:, 0]
    reached = weights.cumsum(-1)
    return torch.searchsorted(reached, reached[:, -1:] * torch.rand(len(weights), 1, generator=generator))[:, 0]


def behind(model, prompts: Tensor, pad: Tensor, of: Tensor, tails: Tensor, at: Tensor) -> tuple[Tensor, Parts]:
    """Logits of several answers to each prompt, which is read once: (B, V) after prompts, (N, V) of some answers each.

    prompts (B, P), left-padded by pad (B,). Row r of tails (R, T), right-padded, follows prompt of[r]; at (R, T) bool:
    its N positions that are wanted, those of its first tokens. The longest rows have to come first: then little is
    padding where a CPU reads some 1,024 tokens at a time, enough for its products to be as quick as they get.
    Also for ULD's LogitDifference, as in `generate`.
    """
    cache = model.new_cache(len(prompts), prompts.shape[1] + tails.shape[1])
    last = torch.zeros_like(prompts, dtype=torch.bool)
    last[:, -1] = True
    first = model(prompts, pad=pad, at=last, cache=cache)
    lengths, parts, start = at.sum(1).tolist(), [], 0
    while start < len(of) and lengths[start]:  # answers of one token have nothing here
        rows = math.ceil(1024 / lengths[start]) if prompts.device.type == "cpu" else len(of)
        some, width = slice(start, start + rows), lengths[start]
        logits = model(tails[some, :width], pad=pad[of[some]], at=at[some, :width], cache=taken(cache, of[some]))
        parts.append((some, logits))
        start += rows
    return first, parts


def ended(said: Tensor, ends: Tensor) -> Tensor:
    """Answers (R, N), each with its first end token to its end, cut where the last one ends."""
    if not len(ends):
        return said
    here = torch.isin(said, ends)
    last = said.shape[1] - 1
    first = torch.where(here.any(1), here.int().argmax(1), last)  # (R,)
    places = torch.arange(last + 1, device=said.device).minimum(first[:, None])  # (R, N)
    return said.gather(1, places)[:, : int(first.max()) + 1 if len(said) else 0]
