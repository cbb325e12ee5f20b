"""Dense to sparse: a public dense checkpoint as a mixture of experts, so that UOE can be tried on real text.

    python train.py --method upcycle --model DIR --experts 8 --top-k 2
    moe = upcycle(model, n_expert=8, top_k=2)      # the same function to begin with

Shapes: D model width   E experts   F width of an MLP or expert
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from errors import UserError
from hub.checkpoint import empty_model, family_of
from model import GPT


@torch.no_grad()
def upcycle(model: GPT, n_expert: int = 8, top_k: int = 2, noise: float = 0.01,
            generator: torch.Generator | None = None) -> GPT:
    """Sparse upcycling (arXiv 2212.05055): every MLP becomes n_expert copies of itself behind a fresh router.

    noise: each copy gets noise * std(matrix) * normal(0, 1) of its own, so that the experts can part.
    With noise 0 the function is the dense model's, whatever the router says, because the kept weights are
    renormalised to sum to 1 (the paper does so too, section 3). OLMoE's are not, and its q/k norm would change the
    attention; so the result is a MoE of Mixtral's shape.
    """
    if model.is_moe or family_of(model.config) != "llama":
        raise UserError("upcycling starts from a dense model: give --model a Llama, Mistral or SmolLM2 folder")
    try:
        config = replace(model.config, n_expert=n_expert, top_k=top_k, norm_topk_prob=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    out = empty_model(config, model.embed.weight.dtype, model.device)
    dense = dict(model.named_parameters())
    for name, p in out.named_parameters():
        if name in dense:
            p.copy_(dense[name])

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(std).to(model.device)

    for layer, block in enumerate(model.blocks):
        moe, mlp = out.moe(layer), block.mlp
        nn.init.zeros_(moe.router.weight).add_(normal(moe.router.weight.shape, 0.02))
        for gate_up, down in zip(moe.gate_up, moe.down, strict=True):  # (2F, D), (D, F)
            for into, weight in zip((*gate_up.chunk(2), down), (mlp.gate.weight, mlp.up.weight, mlp.down.weight),
                                    strict=True):
                into.copy_(weight)
                if noise:
                    into.add_(normal(weight.shape, noise * float(weight.float().std())))
    return out.train(model.training)
