"""GRIP's repair after the fact (arXiv 2601.16905): routers score the new hidden states as they did the old ones.

    python -m lab.ablations uoe-grip          # UOE with it

Shapes: D model width   E experts   N real tokens
"""

import argparse
from collections.abc import Callable, Iterable

import torch

from baselines import Unlearned
from data.batches import Batch, Rows
from loop import Fit
from model import GPT, own


@torch.no_grad()
def repair_routers(target: GPT, model: GPT, batches: Iterable[Batch], ridge: float = 1e-2) -> None:
    """Refit all of model's routers by ridge regression, in place.

        Delta = Theta X X'^T (X' X'^T + lambda I)^-1 - Theta'

    Theta, X: the target's router and its inputs; Theta', X': the unlearned model's. batches: of retain rows. Layer by
    layer from below, since a repaired router changes what the next one sees. ridge: lambda, as a share of the mean
    diagonal of X' X'^T.
    """
    batches = list(batches)
    for layer in range(model.config.n_layer):
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
