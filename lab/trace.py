"""TRACE (arXiv 2606.10338): retain tokens weighed until every expert is as busy on them as on the forget set.

An expert that forget tokens engage and retain tokens seldom do is changed by the one loss and protected by nothing.

    python -m lab.ablations uoe-trace          # UOE with it

Shapes: B batch   T tokens   E experts   N real tokens of a set
"""

import argparse
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baselines import Unlearned
from data.batches import Batch, Rows
from errors import UserError
from loop import Fit
from model import GPT, Trace
from objectives import RETAIN, Loss


@torch.no_grad()
def balanced_weights(model: GPT, forget: Iterable[Batch], retain: list[Batch], rounds: int = 20) -> list[Tensor]:
    """Weights of retain tokens under which experts are as busy as on the forget set.

    Iterative scaling: a token's weight is multiplied by wanted / current share of its experts, geometric mean over
    experts and layers, until the shares match. Returns one (B, T) float32 per retain batch, mean 1 over real tokens, 0
    on padding. Shares that cannot be reached (an expert no retain token engages) are left as near as it gets.
    """
    wanted = [hit.mean(0) for hit in assignments(model, forget)]  # (E,)
    theirs = assignments(model, retain)
    weight = torch.ones(len(theirs[0]), device=model.device)
    for _ in range(rounds):
        step = torch.zeros_like(weight)
        for want, hit in zip(wanted, theirs, strict=True):
            share = (weight[:, None] * hit).mean(0)
            ratio = (want.clamp_min(1e-4) / share.clamp_min(1e-4)).clamp(0.1, 10)
            step += hit @ ratio.log() / len(wanted)
        weight = weight * step.exp()
        weight = weight / weight.mean()
    out, start = [], 0
    for batch in retain:
        n = int(batch.mask.sum())
        padded = torch.zeros(batch.mask.shape, device=model.device)
        padded[batch.mask] = weight[start : start + n]
        out.append(padded)
        start += n
    return out


def assignments(model: GPT, batches: Iterable[Batch]) -> list[Tensor]:
    """Which experts each real token has, per layer that has some (N, E); each row sums to 1."""
    out: dict[int, list[Tensor]] = {layer: [] for layer in model.config.moe_layers}
    for batch in batches:
        trace = Trace()
        model.hidden(batch.tokens, trace=trace)
        for layer, routing in trace.routing.items():
            hit = torch.zeros_like(routing.probs).scatter(-1, routing.chosen, 1 / routing.chosen.shape[-1])
            out[layer].append(hit[batch.mask])
    return [torch.cat(parts) for parts in out.values()]


class Weighted(Loss):
    """GD or KL with a weight per retain token."""

    weights: ClassVar[list[Tensor]]  # row number -> (T,); with_trace fills it in

    def __init__(self, model, rows, args):
        self.before, self.rows = model, rows

    def mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Of (N,) values."""
        weights = pad_sequence([self.weights[i] for i in batch.index.tolist()], batch_first=True)
        return (weights[batch.scored] * values).mean()


class WeightedGD(Weighted):
    def __call__(self, model, logits, trace, batch):
        return self.mean(F.cross_entropy(logits.float(), batch.answers, reduction="none"), batch)


class WeightedKL(Weighted):
    def __call__(self, model, logits, trace, batch):
        with torch.no_grad():
            before = self.rows.run(self.before, batch)
        log_p, log_q = before.float().log_softmax(-1), logits.float().log_softmax(-1)
        return self.mean((log_p.exp() * (log_p - log_q)).sum(-1), batch)


WEIGHTED = {"gd": WeightedGD, "kl": WeightedKL}


def with_trace(unlearn: Callable[..., Unlearned]) -> Callable[..., Unlearned]:
    """The same method, its GD or KL weighed."""
    def weighed(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
        if args.retain_loss not in WEIGHTED:
            raise UserError(f"TRACE weighs the retain losses gd and kl, not --retain-loss {args.retain_loss}")
        batches = list(retain.in_order())
        Weighted.weights = [torch.empty(0)] * len(retain.examples)
        for batch, weights in zip(batches, balanced_weights(target, forget.in_order(), batches), strict=True):
            for i, row, n in zip(batch.index.tolist(), weights, batch.mask.sum(1).tolist(), strict=True):
                Weighted.weights[i] = row[:n]
        usual = args.retain_loss
        RETAIN["trace"] = WEIGHTED[usual]
        args.retain_loss = "trace"
        out = unlearn(target, forget, retain, args, fit)
        args.retain_loss = f"{usual}, weighed"
        return out

    return weighed
