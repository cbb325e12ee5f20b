"""What a mixture of experts routed where, and how far unlearning shifted it (UOE, arXiv 2411.18797, section 4).

Shapes: B batch   T tokens   K experts per token   E experts
"""

import torch
from torch import Tensor

from data.batches import Batch
from model import GPT, Trace


def overlap(chosen: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """Share of each token's top-k experts that it had before, (N,) float32, one entry per real token (Figure 3).

    chosen, before: (B, T, K) long, of one layer.  mask: (B, T) bool.
    """
    same = chosen[mask][:, :, None] == before[mask][:, None, :]  # (N, K, K): experts of a token are distinct
    return same.any(-1).float().mean(-1)  # UOE Fig. 3


@torch.no_grad()
def routing_overlap(before: GPT, model: GPT, batches: list[Batch]) -> list[float]:
    """Mean top-k overlap on the batches' real tokens, one number per layer that has experts (UOE, Figure 3)."""
    same: dict[int, list[Tensor]] = {layer: [] for layer in model.config.moe_layers}
    for batch in batches:
        traces = []
        for m in (before, model):
            trace = Trace()
            m.hidden(batch.tokens.to(m.device), trace=trace)  # the target may wait on the CPU
            traces.append(trace)
        for layer, values in same.items():
            was, now = (trace.routing[layer].chosen.cpu() for trace in traces)
            values.append(overlap(now, was, batch.mask.cpu()))
    return [float(torch.cat(values).mean()) for values in same.values()]


@torch.no_grad()
def expert_shares(model: GPT, batches: list[Batch]) -> list[list[float]]:
    """Share of the batches' tokens that each expert got (Figure 2), (L, E); NaN in layers without experts."""
    count = torch.zeros(model.config.n_layer, model.config.n_expert, device=model.device)
    for batch in batches:
        trace = Trace()
        model.hidden(batch.tokens, trace=trace)
        for layer, routing in trace.routing.items():
            count[layer] += torch.bincount(routing.chosen[batch.mask].reshape(-1), minlength=model.config.n_expert)
    return (count / count.sum(1, keepdim=True)).tolist()
