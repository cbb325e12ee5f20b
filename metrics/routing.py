"""What a mixture of experts routed where, and how far unlearning shifted it (UOE, arXiv 2411.18797, section 4).

Shapes: B batch   T tokens   K experts per token   E experts
"""

import torch
from torch import Tensor


def overlap(chosen: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """Share of each token's top-k experts that it had before, (N,) float32, one entry per real token (Figure 3).

    chosen, before: (B, T, K) long, of one layer.  mask: (B, T) bool.
    """
    same = chosen[mask][:, :, None] == before[mask][:, None, :]  # (N, K, K): experts of a token are distinct
    return same.any(-1).float().mean(-1)


def expert_count(chosen: Tensor, mask: Tensor, n_expert: int) -> Tensor:
    """How many assignments of real tokens each expert got, (E,) long (Figure 2 shows shares of them)."""
    return torch.bincount(chosen[mask].reshape(-1), minlength=n_expert)
