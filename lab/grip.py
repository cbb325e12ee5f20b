"""GRIP (arXiv 2601.16905): routing of retain tokens stays as it was, by projection while training or by repair after.

    python -m lab.ablations uoe-grip          # UOE, its routers repaired at the end
    python -m lab.ablations uoe-grip-train    # UOE, its router trained off the span of what retain tokens bring it
    python -m lab.ablations uoe-grip-expert   # the same of the expert, whose outputs for retain tokens then stay too

The paper's abstract projects router updates, expert by expert; of its method section nothing was at hand, so which
tokens span an expert's space (those that choose it) and how much of it is held (`keep`) are ours.

Shapes: B batch   T tokens   N real tokens   D model width   E experts   K experts per token   F width of an expert
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from baselines import Unlearned
from data.batches import Batch, Rows
from loop import Fit
from model import GPT, own

# ---- after training ---------------------------------------------------------------------------------------------

@torch.no_grad()
def repair_routers(target: GPT, model: GPT, batches: Iterable[Batch], ridge: float = 1e-2) -> None:
    """Refit all of model's routers by ridge regression, in place.

        Delta = Theta X X'^T (X' X'^T + lambda I)^-1 - Theta'

    Theta, X: the target's router and its inputs; Theta', X': the unlearned model's. batches: of retain rows. Layer by
    layer from below, since a repaired router changes what the next one sees. ridge: lambda, as a share of the mean
    diagonal of X' X'^T.
    """
    batches = list(batches)
    for layer in model.config.moe_layers:
        gram = torch.zeros(model.config.d_model, model.config.d_model, dtype=torch.double, device=model.device)
        cross = torch.zeros_like(gram)
        for batch in batches:
            x, x_new = (m.blocks[layer].mlp_norm(m.stem(batch.tokens, layer))[batch.mask].double()  # (N, D)
                        for m in (target, model))
            gram += x_new.T @ x_new
            cross += x_new.T @ x
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        theta = target.moe(layer).router.weight.double()  # (E, D)
        fitted = torch.linalg.solve(gram, cross @ theta.T).T
        own(model.moe(layer).router)  # it may be the target's
        model.moe(layer).router.weight.copy_(fitted)


def with_repair(unlearn: Callable[..., Unlearned]) -> Callable[..., Unlearned]:
    """The same method, its routers repaired at the end."""
    def repaired(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
        model, kept, report = unlearn(target, forget, retain, args, fit)
        repair_routers(target, kept["model"], retain.in_order())
        return model, kept, report

    return repaired


# ---- while training ---------------------------------------------------------------------------------------------

class Spans(NamedTuple):
    """Of one layer, per expert: projections off what the retain tokens that choose it bring to its matrices."""

    inputs: Tensor  # (E, D, D), of router and gate_up
    hidden: Tensor  # (E, F, F), of down


@torch.no_grad()
def spans(target: GPT, batches: Iterable[Batch], layer: int, keep: float) -> Spans:
    """See off_span. batches: of retain rows."""
    moe = target.moe(layer)
    n, width, inner = len(moe.gate_up), moe.gate_up.shape[-1], moe.down.shape[-1]
    inputs, hidden = (torch.zeros(n, d, d, dtype=torch.float64, device=target.device) for d in (width, inner))
    for batch in batches:
        x = target.blocks[layer].mlp_norm(target.stem(batch.tokens, layer))  # (B, T, D)
        chosen = moe.route(x).chosen[batch.mask]  # (N, K)
        for e in chosen.unique().tolist():
            of = x[batch.mask][(chosen == e).any(-1)]
            gate, up = F.linear(of, moe.gate_up[e]).chunk(2, dim=-1)
            for gram, seen in ((inputs, of), (hidden, F.silu(gate) * up)):
                gram[e] += seen.double().T @ seen.double()
    return Spans(off_span(inputs, keep), off_span(hidden, keep))


def off_span(gram: Tensor, keep: float) -> Tensor:
    """P = I - U U^T, U the fewest principal directions that hold the share `keep` of the trace; gram, P: (E, D, D).

    I where a gram is 0: what no token chooses may go anywhere.
    """
    values, vectors = torch.linalg.eigh(gram)  # (E, D), the smallest first; (E, D, D), a column each
    left = values.clamp_min(0).cumsum(-1) / values.sum(-1, keepdim=True).clamp_min(1e-30)
    free = vectors * (left <= 1 - keep)[:, None]
    return (free @ free.mT).float()


class Held(nn.Module):
    """A parametrisation W -> W0 + (W - W0) P: whatever an optimiser does to W, what P takes out still meets W0.

    W (O, D) with P (D, D), W (E, O, D) with P (E, D, D), or a router's W (E, D) with P (E, D, D), a row each.
    """

    def __init__(self, weight: Tensor, projection: Tensor):
        super().__init__()
        self.start, self.projection = weight.detach().clone(), projection

    def forward(self, weight: Tensor) -> Tensor:
        change = (weight - self.start).float()
        rows = change[:, None] if self.projection.dim() > change.dim() else change
        return self.start + (rows @ self.projection).view_as(change).to(weight.dtype)


def held(model: GPT, of_layers: dict[int, Spans], experts: bool) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, its weight's name, projection) of each that trains: of routers, or of experts."""
    for layer, of in of_layers.items():
        moe = model.moe(layer)
        found: list[tuple[nn.Module, str, Tensor]] = [(moe.router, "weight", of.inputs)]
        if experts:
            found = [(moe, "gate_up", of.inputs), (moe, "down", of.hidden)]
            for number, expert in moe.taken.items():
                found += [(expert, "gate_up", of.inputs[int(number)]), (expert, "down", of.hidden[int(number)])]
        yield from (one for one in found if getattr(one[0], one[1]).requires_grad)


def with_projection(unlearn: Callable[..., Unlearned], experts: bool = False, keep: float = 0.99
                    ) -> Callable[..., Unlearned]:
    """The same method, whose routers (experts: whose experts) train off the span of what retain tokens bring them."""
    def projected(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
        batches = list(retain.in_order())
        of_layers = {layer: spans(target, batches, layer, keep) for layer in target.config.moe_layers}

        def held_fit(model: GPT, *how, **more) -> dict:
            parts = list(held(model, of_layers, experts))
            for module, name, projection in parts:
                parametrize.register_parametrization(module, name, Held(getattr(module, name), projection))
            report = fit(model, *how, **more)
            for module, name, _ in parts:
                parametrize.remove_parametrizations(module, name)
            return report

        return unlearn(target, forget, retain, args, held_fit)

    return projected
