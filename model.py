"""One decoder for everything here: a small GPT, the Llama family, and (with moe.py) sparse mixtures of experts.

    from model import Config, GPT
    model = GPT(Config(vocab_size=1024, n_layer=4, n_head=4, n_kv_head=2, d_model=128, d_ff=384))
    logits = model(tokens)                              # (B, T) -> (B, T, V)
    answer = model.generate(tokens, max_new_tokens=20)  # (B, 20)

Shapes, one letter per size:
    B batch   T tokens   S tokens seen so far (cache included)   D model width   V vocabulary
    H query heads   G key-value heads (G divides H)   C width of one head   F width of an MLP
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decoding
from decoding import Cache
from latent import LatentAttention, yarn, yarn_magnitude
from moe import MoE, Routing


@dataclass
class Config:
    """The shape of a decoder. With n_expert = 0 every block has a dense MLP of width d_ff.

    With n_expert > 0 every block from n_dense on has a sparse MoE layer: n_expert experts of width d_ff each, top_k per
    token. The small models (pretrain.small_config) leave much at its default: that is for public ones.
    """

    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4
    d_model: int = 128
    d_ff: int = 384
    d_head: int = 0  # 0: d_model / n_head
    max_len: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "yarn", "factor": 8.0, ...}
    tie_head: bool = False  # LM head and token embedding share one matrix
    qkv_bias: bool = False
    qk_norm: str = "none"  # none | full (over all heads together, OLMoE) | head (per head)
    n_expert: int = 0
    top_k: int = 0
    norm_topk_prob: bool = False  # renormalise the kept router weights to sum to 1 (Mixtral yes, OLMoE no)
    d_shared: int = 0  # width of an always-on shared expert beside the routed ones, 0: none
    shared_gate: bool = False  # Qwen1.5-MoE: the shared expert is scaled by a sigmoid of its own
    n_shared: int = 0  # DeepSeek-V2: so many shared experts, each as wide as a routed one, computed as one
    n_dense: int = 0  # DeepSeek-V2: so many first blocks have a dense MLP, of width d_dense, and no experts
    d_dense: int = 0
    kv_rank: int = 0  # DeepSeek-V2: keys and values are made of a latent of this width (latent.py), 0: not so
    q_rank: int | None = None  # and queries of one of this width, None: directly
    d_nope: int = 0  # width of the part of a latent head that no position turns; d_head is that of the turned one
    d_value: int = 0  # width of a latent head's values
    window: int | None = None  # Mistral 7B v0.1: a token sees so many tokens, itself included; None: all before it
    norm_after: bool = False  # OLMo 2: what attention and MLP give is normalised, not what they take
    embed_scale: float = 1.0  # Granite: embeddings times this,
    residual_scale: float = 1.0  # what attention and MLP add times this,
    attention_scale: float = 0.0  # attention logits times this, 0: 1 / sqrt(d_head),
    logit_divisor: float = 1.0  # logits divided by this

    def __post_init__(self):
        if not self.d_head:
            if self.d_model % self.n_head:
                raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}; set d_head")
            self.d_head = self.d_model // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.d_head % 2:
            raise ValueError(f"d_head {self.d_head} is odd; rotary embedding turns pairs")
        if self.n_expert and not 1 <= self.top_k <= self.n_expert:
            raise ValueError(f"top_k {self.top_k} is not between 1 and n_expert {self.n_expert}")
        if self.rope_scaling and self.rope_scaling.get("rope_type") not in ("llama3", "yarn"):
            raise ValueError(f"rope_scaling {self.rope_scaling} is not of type llama3 or yarn")
        if self.qk_norm not in ("none", "full", "head"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is not none, full or head")

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        return range(self.n_dense, self.n_layer) if self.n_expert else range(0)


@dataclass
class Trace:
    """What a forward pass leaves behind for whoever asks: pass `trace=Trace()` and read it afterwards.

    routing[layer]: that MoE layer's Routing.  hidden[layer]: the residual stream after block `layer`, (B, T, D).
    forced[layer] goes in: (B, T, K) experts to use there instead of the router's choice.
    """

    routing: dict[int, Routing] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    forced: dict[int, Tensor] = field(default_factory=dict)


Stem = tuple[int, Tensor]  # (layer, (B, T, D)): a pass that is already there, see GPT.hidden


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position for each of the C/2 rotated pairs, float32 (arXiv 2104.09864, section 3.2.2).

    Llama 3.x stretches the slow ones: wavelengths longer than the original context are slowed by `factor`,
    short ones left alone, those between blended. YaRN: see latent.py.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.d_head, 2).float() / config.d_head)
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "yarn":
        return yarn(frequency, scaling, config.rope_theta)
    if scaling:
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: leave alone, 0: slow down
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_c, x_{c + C/2}) by its angle. x: (B, H, T, C); cos, sin: (B or 1, 1, T, C), see GPT.turns."""
    # roll swaps the halves a and b, and sin is negative in the first: (a cos - b sin, b cos + a sin)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Linear(nn.Linear):
    """A linear layer, x W^T. Of few rows, as in decoding, some CPUs have (W x^T)^T quicker, and it is computed so.

    Seconds of F.linear over those of this, whole decoding steps of a model of 135M parameters, two threads, torch 2.13:
        rows                                2     8    16    32    64
        AMD EPYC, float32                 1.9   1.4   1.4   1.1   1.2
        Intel Xeon, bfloat16              1.1   1.2   1.1     -   1.0
        Intel Xeon, float32               0.5   0.9   0.9   0.9   1.0
    Hence: on AMD, and in bfloat16.
    """

    AMD = os.access("/proc/cpuinfo", os.R_OK) and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__(d_in, d_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        few = 1 < x.shape[:-1].numel() <= 64 and self.bias is None and x.device.type == "cpu"
        if few and (self.AMD or x.dtype == torch.bfloat16):
            return (self.weight @ x.reshape(-1, x.shape[-1]).T).T.view(*x.shape[:-1], -1)
        return super().forward(x)


class Attention(nn.Module):
    """Grouped-query causal attention (arXiv 2305.13245) with rotary positions and optional q/k norm."""

    def __init__(self, config: Config):
        super().__init__()
        heads, groups, width = config.n_head, config.n_kv_head, config.d_head
        self.heads, self.groups, self.width, self.qk_norm = heads, groups, width, config.qk_norm
        self.scale = config.attention_scale or None
        self.q = Linear(config.d_model, heads * width, bias=config.qkv_bias)
        self.k = Linear(config.d_model, groups * width, bias=config.qkv_bias)
        self.v = Linear(config.d_model, groups * width, bias=config.qkv_bias)
        self.out = Linear(heads * width, config.d_model)
        if config.qk_norm != "none":  # full: over the whole projection, before it is split into heads
            many = (heads, groups) if config.qk_norm == "full" else (1, 1)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * width, eps=config.norm_eps) for n in many)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, layer: int):
        B, T, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.heads, self.width)
        k = k.view(B, T, self.groups, self.width)
        v = v.view(B, T, self.groups, self.width).transpose(1, 2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos, sin)  # (B, H, T, C)
        k = rotate(k.transpose(1, 2), cos, sin)  # (B, G, T, C)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S, C)
        grouped = self.groups != self.heads
        causal = mask is None and T == k.shape[2]  # one query after the last key sees all of them
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        return self.out(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = Linear(d_model, d_ff)
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


WIDE = 512  # the width from which products take most of the time


def needed_by(at: Tensor, width: int) -> Tensor | None:
    """Indices (R,) in the flattened (B, T) of each row's positions up to its last one `at` which something is wanted.

    None where leaving out the others would not pay: in a narrow model, on a GPU, which would have to be waited for, or
    where there are few. They are padding, or the rest of a sentence, and no wanted position reads them. With this (and
    pages of 2 MB, lab/memory.py) a training step of SmolLM2-135M went from 0.88 of transformers' time to 0.77
    (lab.bench, Intel Xeon).
    """
    if width < WIDE or at.device.type != "cpu":
        return None
    seen = at.flip(1).cumsum(1).flip(1) > 0
    places = seen.flatten().nonzero()[:, 0]
    return places if len(places) <= 0.95 * seen.numel() else None


class Block(nn.Module):
    """Attention, then MLP or MoE, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()

        def norm(here: bool) -> nn.Module:
            return nn.RMSNorm(config.d_model, eps=config.norm_eps) if here else nn.Identity()

        self.attn_norm = norm(not config.norm_after)
        self.attn = LatentAttention(config) if config.kv_rank else Attention(config)
        self.attn_after = norm(config.norm_after)
        self.mlp_norm = norm(not config.norm_after)
        self.mlp: MLP | MoE
        self.mlp_after = norm(config.norm_after)
        self.scale = config.residual_scale
        if layer in config.moe_layers:
            d_shared = config.d_shared or config.n_shared * config.d_ff
            shared = MLP(config.d_model, d_shared) if d_shared else None
            self.mlp = MoE(config.d_model, config.d_ff, config.n_expert, config.top_k, config.norm_topk_prob,
                           shared, config.shared_gate)
        else:
            self.mlp = MLP(config.d_model, config.d_dense or config.d_ff)

    def attend(self, x: Tensor, *context) -> Tensor:
        return x.add(self.attn_after(self.attn(self.attn_norm(x), *context)), alpha=self.scale)

    def forward(self, layer: int, x: Tensor, context: tuple, cache: Cache | None = None, forced: Tensor | None = None,
                only_mlp: bool = False, at: Tensor | None = None,
                needed: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """x (B, T, D) -> the same after this block, and what a MoE routed where. context: of GPT.positions.

        at: (B, T) bool, the N positions that are wanted; x then comes back as (N, D).
        needed: of `needed_by`; the MLP leaves the others as they are.
        """
        if not only_mlp:
            x = self.attend(x, *context, cache, layer)
        if at is not None:
            x = x[at]
        some = x if needed is None else x.flatten(0, 1).index_select(0, needed)  # (R, D)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(self.mlp_norm(some), forced)
        else:
            y, routing = self.mlp(self.mlp_norm(some)), None
        y = self.mlp_after(y)
        if needed is not None:
            return x.flatten(0, 1).index_add(0, needed, y, alpha=self.scale).view_as(x), routing
        return x.add(y, alpha=self.scale), routing


class GPT(nn.Module):
    """The decoder. `model(tokens)`: LongTensor (B, T) -> logits (B, T, V) in the weights' dtype."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        # a ModuleList cannot say what it holds
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config, i) for i in range(config.n_layer)))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_head:
            self.head.weight = self.embed.weight
        self.rotary: tuple[Tensor, Tensor] | None = None  # of the positions met so far, see `positions`
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its insides
        self.init_weights()

    def init_weights(self):
        """Normal(0, 0.02); projections into the residual stream shrunk by sqrt(2 * layers), as in GPT-2.

        Routers: 1/sqrt(D), so that their logits start with spread 1. From 0.02 a small model's routers are still
        nearly even after training (top-1 probability 0.2 of 16 experts), and experts hardly specialise.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
            elif name.endswith("router.weight"):
                nn.init.normal_(p, std=self.config.d_model**-0.5)
            else:
                into_residual = name.endswith(("out.weight", "down.weight", "mlp.down"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def is_moe(self) -> bool:
        return len(self.config.moe_layers) > 0

    def moe(self, layer: int) -> MoE:
        """The MoE layer of block `layer`, one of config.moe_layers."""
        return cast(MoE, self.blocks[layer].mlp)

    def turns(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of positions 0 to length - 1 or more, (length, C), made once and kept.

        Each stands twice, for both halves of a pair, the sine negated for the first: see `rotate`. With latent
        attention (length, C/2), one for each pair of neighbours.
        """
        weight = self.embed.weight
        kept = self.rotary
        if kept is None or len(kept[0]) < length or kept[0].device != weight.device or kept[0].dtype != weight.dtype:
            positions = torch.arange(2 * length, device=weight.device).float()
            angle = positions[:, None] * rope_frequencies(self.config).to(weight.device)
            scaling = self.config.rope_scaling or {}
            by = yarn_magnitude(scaling) if scaling.get("rope_type") == "yarn" else 1.0
            cos, sin = (angle.cos() * by).to(weight.dtype), (angle.sin() * by).to(weight.dtype)
            if not self.config.kv_rank:
                cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self.rotary = kept = cos, sin
        return kept

    def positions(self, length: int, cache: Cache | None, pad: Tensor | None):
        """Rotary cos and sin (B or 1, 1, T, C or C/2), and the attention mask (B or 1, 1, T, S), None where causal.

        pad: (B,) number of padding tokens at the left of each row; a row's first real token has position 0.
        """
        start = cache.length if cache is not None else 0
        end, window = start + length, self.config.window
        if cache is not None and cache.place is not None:
            room = cache.k[0].shape[2]
            cos, sin = self.turns(room)
            left = torch.zeros_like(cache.place) if pad is None else pad
            position = (cache.place - left).clamp_min(0)[:, None]  # (B or 1, 1)
            key = torch.arange(room, device=self.device)
            seen = (key <= cache.place) & (key >= left[:, None]) | (key == cache.place)  # (B or 1, room)
            if window:
                seen = seen & (key > cache.place - window)
            # 0 or -inf: of a bool mask attention would make this anew in each layer
            added = torch.zeros_like(seen, dtype=cos.dtype).masked_fill(~seen, -math.inf)
            return cos[position][:, None], sin[position][:, None], added[:, None, None]
        cos, sin = self.turns(end)
        if pad is None:
            cos, sin = cos[None, None, start:end], sin[None, None, start:end]
        else:
            query = torch.arange(start, end, device=self.device)  # (T,)
            position = (query - pad[:, None]).clamp_min(0)  # (B, T)
            cos, sin = cos[position][:, None], sin[position][:, None]
        sees_all = not window or end <= window
        if cache is not None and start > 0 and length == 1 and sees_all:  # a token that is decoded: all but the padding
            if pad is None:
                return cos, sin, None
            if cache.visible is None:
                cache.visible = (torch.arange(cache.max_len, device=self.device) >= pad[:, None])[:, None, None]
            visible = cache.visible[..., :end].clone()
            visible[..., -1] = True  # and itself, which matters where it is padding: see below
            return cos, sin, visible
        mask = None
        if pad is not None or start > 0 or not sees_all:
            query, key = torch.arange(start, end, device=self.device), torch.arange(end, device=self.device)
            left = torch.zeros(1, dtype=torch.long, device=self.device) if pad is None else pad
            mask = (key[None, None, :] <= query[None, :, None]) & (key[None, None, :] >= left[:, None, None])
            if window:
                mask = mask & (key > query[:, None] - window)
            # a padding query sees itself: a row that may attend to nothing would be a softmax over nothing, NaN
            mask = (mask | (key[None, None, :] == query[None, :, None]))[:, None]
        return cos, sin, mask

    def embedded(self, tokens: Tensor) -> Tensor:
        """The residual stream (B, T, D) below the first block."""
        x = self.embed(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def forward(self, tokens: Tensor, cache: Cache | None = None, pad: Tensor | None = None,
                trace: Trace | None = None, stem: Stem | None = None, at: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of LongTensor tokens (B, T).

        at: (B, T) bool. The head runs on these N positions alone, and logits are (N, V).
        cache: keys and values of earlier tokens, extended in place.  pad: (B,) left padding per row.
        trace: filled with each layer's routing and hidden states.  stem: see `hidden`.
        """
        return self.head(self.hidden(tokens, cache, pad, trace, stem, at))

    def hidden(self, tokens: Tensor, cache: Cache | None = None, pad: Tensor | None = None,
               trace: Trace | None = None, stem: Stem | None = None, at: Tensor | None = None,
               context: tuple | None = None) -> Tensor:
        """The normalised last hidden states, logit_divisor taken off: (B, T, D), or (N, D) `at` some positions.

        stem: (layer, what `stem` gave for these tokens and that layer). The pass then begins at that layer's MLP.
        context: what `positions` gives for these tokens, where it is there already.
        """
        context = context or self.positions(tokens.shape[1], cache, pad)
        needed = needed_by(at, self.config.d_model) if at is not None and cache is None and trace is None else None
        first, x = stem if stem is not None else (0, self.embedded(tokens))
        for layer in range(first, self.config.n_layer):
            forced = trace.forced.get(layer) if trace is not None else None
            only_mlp = stem is not None and layer == first
            # no attention follows the last MLP, so that it too runs on the wanted positions alone
            wanted, some = (at, None) if trace is None and layer == self.config.n_layer - 1 else (None, needed)
            x, routing = self.block(layer, x, context, cache, forced, only_mlp, wanted, some)
            if trace is not None:
                trace.hidden[layer] = x
                if routing is not None:
                    trace.routing[layer] = routing
        if cache is not None:
            cache.length += tokens.shape[1]
            if cache.place is not None:
                cache.place += 1
        x = self.norm(x if at is None or x.dim() == 2 else x[at])
        return x if self.config.logit_divisor == 1 else x / self.config.logit_divisor

    def block(self, layer: int, *inputs) -> tuple[Tensor, Routing | None]:
        """Block.forward, its insides recomputed in the backward pass where `checkpointing` is on."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self.blocks[layer], layer, *inputs, use_reentrant=False)
        return self.blocks[layer](layer, *inputs)

    def stem(self, tokens: Tensor, layer: int) -> Tensor:
        """The residual stream of tokens (B, T) after the attention of block `layer`, (B, T, D): its MLP's input."""
        context = self.positions(tokens.shape[1], None, None)
        x = self.embedded(tokens)
        for below in range(layer):
            x, _ = self.blocks[below](below, x, context)
        return self.blocks[layer].attend(x, *context, None, layer)

    def new_cache(self, batch: int, max_len: int) -> Cache:
        """Of keys and values; with latent attention of the latents and the rotated keys that all heads share."""
        c = self.config
        groups, widths = (1, (c.kv_rank, c.d_head)) if c.kv_rank else (c.n_kv_head, (c.d_head, c.d_head))
        return Cache(c.n_layer, groups, widths, batch, max_len, self.device, self.embed.weight.dtype)

    def next_logits(self, tokens: Tensor, cache: Cache, pad: Tensor | None) -> Tensor:
        """Logits (B, V) of the token after `tokens` (B, T). The head runs on the last position only."""
        return self.head(self.hidden(tokens, cache, pad)[:, -1])

    generate, behind = decoding.generate, decoding.behind  # as methods; every model here has the first


def of_state(config: Config, state: Mapping[str, Tensor]) -> GPT:
    """A model whose weights are these very tensors, by their names in a state_dict; more names are left alone."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    if config.tie_head:
        model.head.weight = model.embed.weight
    return model


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of one storage."""
    # by its address in torch: Tensor.is_set_to and data_ptr know no meta device, and Parameters of one storage differ
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def sharing(model: GPT) -> GPT:
    """A model of its own on the same weights in memory, frozen. Whoever changes some of them copies these first."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def own(module: nn.Module) -> None:
    """Give a module of a `sharing` model a copy of its weights, to be trained."""
    for p in module.parameters():
        p.data = p.data.clone()


def whole(model: GPT) -> GPT:
    """A copy on weights of its own, every expert that was taken out back in its stack."""
    out = copy.deepcopy(model)
    for layer in out.config.moe_layers:
        out.moe(layer).put_back()
    return out


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, shared ones once; with trainable=True only those that get a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
