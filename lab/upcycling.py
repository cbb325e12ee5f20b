"""Dense to sparse: a public dense checkpoint as a mixture of experts, so that UOE can be tried on real text.

    python -m lab.upcycling out/target out/moe --experts 8 --top-k 2       # then train.py --method uoe --model out/moe
    moe = upcycle(model, n_expert=8, top_k=2)      # the same function to begin with

Shapes: D model width   E experts   F width of an MLP or expert
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from errors import UserError, one_line_errors
from flags import COUNT, NATURAL, Parser
from hub.checkpoint import empty_model, family_of
from model import GPT, MLP, count_parameters
from pretrained import load, save
from runs import weights_of


@torch.no_grad()
def upcycle(model: GPT, n_expert: int = 8, top_k: int = 2, noise: float = 0.01,
            generator: torch.Generator | None = None) -> GPT:
    """Sparse upcycling (arXiv 2212.05055): every MLP becomes n_expert copies of itself behind a fresh router.

    noise: each copy gets noise * std(matrix) * normal(0, 1) of its own, so that the experts can part.
    With noise 0 the function is the dense model's, whatever the router says, because the kept weights are
    renormalised to sum to 1 (the paper does so too, section 3). OLMoE's are not, and its q/k norm would change the
    attention; so the result is a MoE of Mixtral's shape.
    """
    if model.is_moe or family_of(model.config) not in ("llama", "mistral"):
        raise UserError("upcycling starts from a dense model: give a Llama, Mistral or SmolLM2 folder")
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
        moe, mlp = out.moe(layer), cast(MLP, block.mlp)  # of a dense model
        nn.init.zeros_(moe.router.weight).add_(normal(moe.router.weight.shape, 0.02))
        for gate_up, down in zip(moe.gate_up, moe.down, strict=True):  # (2F, D), (D, F)
            for into, weight in zip((*gate_up.chunk(2), down), (mlp.gate.weight, mlp.up.weight, mlp.down.weight),
                                    strict=True):
                into.copy_(weight)
                if noise:
                    into.add_(normal(weight.shape, noise * float(weight.float().std())))
    return out.train(model.training)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="a dense checkpoint as a mixture of experts")
    parser.add_argument("model", help="a Hugging Face folder, a hub name or a run folder, dense")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--experts", type=COUNT, default=8, help="per layer")
    parser.add_argument("--top-k", type=COUNT, default=2, help="experts per token")
    parser.add_argument("--seed", type=NATURAL, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args(argv)
    dense, tokenizer = load(weights_of(args.model), getattr(torch, args.dtype))
    sparse = upcycle(dense, args.experts, args.top_k, generator=torch.Generator().manual_seed(args.seed))
    save(sparse, tokenizer, args.out)
    print(f"{args.experts} experts, {args.top_k} per token: {count_parameters(dense):,} parameters became "
          f"{count_parameters(sparse):,}; the model is in {args.out}")


if __name__ == "__main__":
    main()
