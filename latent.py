"""What DeepSeek-V2 has beyond model.py: multi-head latent attention and YaRN.

Of other models only those with YaRN need this file.

Keys and values of all heads are made of one narrow latent per token, and the cache holds that latent alone: 576 numbers
per token and layer in DeepSeek-V2-Lite, where keys and values of its 16 heads would be 5,120.

Shapes: B batch   T tokens   S tokens seen so far (cache included)   D model width   H heads
    R width of the latent   C width of the rotated part of a head   N of its other part   W of a head's values
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from decoding import Cache
    from model import Config


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1). Positions turn C of each head's C + N numbers.

    The rotated part of the keys is one for all heads, since a rotation does not commute with making keys of latents.
    """

    def __init__(self, config: "Config"):
        super().__init__()
        self.heads, self.rank = config.n_head, config.kv_rank
        self.rotated, self.plain, self.value = config.d_head, config.d_nope, config.d_value
        width = self.heads * (self.plain + self.rotated)
        if config.q_rank:  # queries are made of a latent too
            self.q_a = nn.Linear(config.d_model, config.q_rank, bias=False)
            self.q_a_norm = nn.RMSNorm(config.q_rank, eps=1e-6)
            self.q_b = nn.Linear(config.q_rank, width, bias=False)
        else:
            self.q = nn.Linear(config.d_model, width, bias=False)
        self.kv_a = nn.Linear(config.d_model, self.rank + self.rotated, bias=False)
        self.kv_a_norm = nn.RMSNorm(self.rank, eps=1e-6)
        self.kv_b = nn.Linear(self.rank, self.heads * (self.plain + self.value), bias=False)
        self.out = nn.Linear(self.heads * self.value, config.d_model, bias=False)
        scaling = config.rope_scaling or {}
        sharper = yarn_log(scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0.0))
        self.scale = sharper**2 / math.sqrt(self.plain + self.rotated)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: "Cache | None", layer: int):
        B, T, _ = x.shape
        q = self.q_b(self.q_a_norm(self.q_a(x))) if hasattr(self, "q_a") else self.q(x)
        q, q_turned = q.view(B, T, self.heads, -1).transpose(1, 2).split([self.plain, self.rotated], -1)
        latent, k_turned = self.kv_a(x)[:, None].split([self.rank, self.rotated], -1)  # (B, 1, T, R), (B, 1, T, C)
        latent = self.kv_a_norm(latent)
        q_turned, k_turned = rotate_neighbours(q_turned, cos, sin), rotate_neighbours(k_turned, cos, sin)
        if cache is not None:
            latent, k_turned = cache.extend(layer, latent, k_turned)  # (B, 1, S, R), (B, 1, S, C)
        k, v = (self.kv_b(latent[:, 0]).view(B, -1, self.heads, self.plain + self.value).transpose(1, 2)
                .split([self.plain, self.value], -1))  # (B, H, S, N), (B, H, S, W)
        q = torch.cat([q, q_turned], -1)
        k = torch.cat([k, k_turned.expand(-1, self.heads, -1, -1)], -1)
        causal = mask is None and T == k.shape[2]  # one query after the last key sees all of them
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        return self.out(x.transpose(1, 2).reshape(B, T, -1))


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As model.rotate, but pairs are neighbours (x_2c, x_2c+1). x: (B, H, T, C); cos, sin: (B or 1, 1, T, C/2)."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


# ---- YaRN: longer contexts than a model was trained with (arXiv 2309.00071) -----------------------------------------

def yarn(frequency: Tensor, scaling: dict, theta: float) -> Tensor:
    """Rotary frequencies (C/2,) of a longer context: fast pairs keep theirs, slow ones are slowed by `factor`.

    Fast: more than beta_fast turns within the original context; slow: less than beta_slow; between, blended (section
    3.2). The borders are rounded outwards unless `truncate` is false.
    """
    pairs, original = len(frequency), scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """Which pair (not a whole number) makes so many turns within the original context."""
        return pairs * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    first, last = pair_of(scaling.get("beta_fast", 32)), pair_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    slow = ((torch.arange(pairs) - first) / max(last - first, 1e-3)).clamp(0, 1)  # 0: leave alone, 1: slow down
    return (1 - slow) * frequency + slow * frequency / scaling["factor"]


def yarn_log(factor: float, weight: float) -> float:
    """0.1 * weight * ln(factor) + 1: by how much longer contexts want larger attention logits."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def yarn_magnitude(scaling: dict) -> float:
    """What rotated queries and keys are multiplied by (section 3.4), or what the checkpoint says instead."""
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    factor, turned, all_of_it = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if turned and all_of_it:
        return yarn_log(factor, turned) / yarn_log(factor, all_of_it)
    return yarn_log(factor, 1.0)
