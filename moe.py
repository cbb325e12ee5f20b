"""The sparse mixture-of-experts layer: a router sends each token to its top-k experts.

    moe = MoE(d_model=128, d_ff=96, n_expert=16, top_k=2)
    y, routing = moe(x)      # x, y: (B, T, D); routing.probs (B, T, E), routing.chosen (B, T, K)

The layer hands back what it routed where: attribution, anchor loss, load balancing and the figures read that,
so that nothing has to hook into it from outside.

Shapes: B batch   T tokens   N = B * T   D model width   E experts   K experts per token   F width of an expert
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE: Mapping[str, Any] = {}


class Routing(NamedTuple):
    """What one MoE layer did with each token."""

    probs: Tensor  # (B, T, E) float32, softmax over all experts: s in UOE
    chosen: Tensor  # (B, T, K) long, the top-k experts, most probable first
    weights: Tensor  # (B, T, K) float32, what their outputs were scaled by

    def gates(self) -> Tensor:
        """g in UOE (arXiv 2411.18797, section 3): s_i where expert i is in the top k, else 0. (B, T, E)."""
        return torch.zeros_like(self.probs).scatter(-1, self.chosen, self.probs.gather(-1, self.chosen))


class Expert(nn.Module):
    """One expert's weights as parameters of their own, gate_up (2F, D) and down (D, F), outside the stack."""

    def __init__(self, gate_up: Tensor, down: Tensor):
        super().__init__()
        self.gate_up = nn.Parameter(gate_up.detach().clone())
        self.down = nn.Parameter(down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D), not weighted."""
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class MoE(nn.Module):
    """Router and stacked experts, with an optional always-on shared expert.

    router (E, D); gate_up (E, 2F, D), first F rows gate, then up; down (E, D, F).
    """

    def __init__(self, d_model: int, d_ff: int, n_expert: int, top_k: int, norm_topk_prob: bool = False,
                 shared: nn.Module | None = None, shared_gate: bool = False):
        super().__init__()
        self.n_expert, self.top_k, self.norm_topk_prob = n_expert, top_k, norm_topk_prob
        self.router = nn.Linear(d_model, n_expert, bias=False)
        self.gate_up = nn.Parameter(torch.empty(n_expert, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_expert, d_model, d_ff))
        self.shared = shared
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared is not None and shared_gate else None
        # experts taken out of the stack, by number (as a string); a ModuleDict cannot say what it holds
        self.taken = cast(dict[str, Expert], nn.ModuleDict())
        self.low_rank = cast(dict[str, Any], nn.ModuleDict())  # what is added to "gate_up", "down": uld.py, LoRAStack

    def route(self, x: Tensor, forced: Tensor | None = None) -> Routing:
        """Softmax over all experts in float32, then top-k. x: (B, T, D).

        forced (B, T, K): these experts instead, weighted by what the router thinks of them.
        """
        probs = self.router(x).float().softmax(-1)  # UOE 3
        weights, chosen = (probs.gather(-1, forced), forced) if forced is not None else probs.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(probs, chosen, weights)

    def forward(self, x: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.route(x, forced)
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.chosen.reshape(-1, self.top_k),
                         routing.weights.reshape(-1, self.top_k)).view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return y, routing

    def experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts. x (N, D); chosen, weights (N, K). Returns (N, D) in x's dtype."""
        way = self.way(len(x), x.dtype)
        if way is experts_loop:
            return experts_loop(x, chosen, weights, *self.expert_weights())
        taken = []
        for number, expert in self.taken.items():  # on every token, weighing 0 where it was not chosen
            own = chosen == int(number)  # (N, K)
            taken.append((weights * own).sum(-1, keepdim=True).to(x.dtype) * expert(x))
            weights = weights.masked_fill(own, 0.0)  # what the stack still holds of it counts for nothing
        given = x, chosen, weights, self.gate_up, self.down
        # with low-rank changes that way is experts_grouped
        y = experts_grouped(*given, self.low_rank) if self.low_rank else way(*given)
        return sum(taken, start=y)

    def way(self, tokens: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Which of the three functions below computes so many tokens: the same values up to rounding.

        One grouped product per projection where it can be: it wants rows of whole 16 bytes. Forward and backward on two
        threads of an Intel Xeon with AMX, torch 2.13 (lab.bench.moe_layers), times what the grouped products take:
                                                                       loop   transformers 5.24
            D 128,  F 64,   16 experts, top 4, float32,   800 tokens   1.36   1.56
            D 2048, F 1024,  8 experts, top 2, float32,   512 tokens   1.41   1.09
            D 2048, F 1024, 64 experts, top 8, bfloat16,  512 tokens   2.20   1.01
        Where experts were taken out to train alone, a CPU takes the loop: each runs on just the tokens that chose it.
        On a GPU the loop stalls until Python knows how many those are, and so does a grouped product that is not one
        kernel. Of few tokens it is quicker to run every expert on every token: in results/gpu.md for 64 of OLMoE's
        shape in float32, 5 * 10^10 operations, not for SmolLM2's in 8 experts, 9 * 10^10. The bound lies between.
        """
        widths = [*self.down.shape[1:], *(lora.a.shape[1] for lora in self.low_rank.values())]
        aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
        if self.down.device.type == "cpu":
            return experts_grouped if aligned and not self.taken else experts_loop
        if aligned and one_kernel(self.down.device, dtype):
            return experts_grouped
        operations = 2 * tokens * 3 * self.down.numel()  # of every expert on every token; gate_up is twice down
        if operations <= 2**36 and not self.low_rank:
            return experts_all
        return experts_grouped if aligned else experts_loop

    def waits(self, tokens: int) -> bool:
        """Whether a GPU has to hand Python a number on the way."""
        device, dtype = self.down.device, self.down.dtype
        way = self.way(tokens, dtype)
        return way is experts_loop or (way is experts_grouped and not one_kernel(device, dtype))

    def expert_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each expert's gate_up (2F, D) and down (D, F), those taken out of the stack in their places.

        unbind, not indexing: the gradient of E indexings is E full-size stacks, that of one unbind is one.
        """
        stacks = {"gate_up": self.gate_up, "down": self.down}
        stacks |= {name: lora.added(stacks[name]) for name, lora in self.low_rank.items()}
        gate_up, down = (list(stack.unbind(0)) for stack in stacks.values())
        for number, expert in self.taken.items():
            gate_up[int(number)], down[int(number)] = expert.gate_up, expert.down
        return gate_up, down

    def take_out(self, number: int) -> Expert:
        """Make expert `number` a module of its own, to be trained alone; `put_back` returns it to the stack."""
        if not 0 <= number < self.n_expert:
            raise IndexError(f"expert {number} does not exist: this layer has {self.n_expert}, counted from 0")
        self.taken[str(number)] = Expert(self.gate_up[number], self.down[number])
        return self.taken[str(number)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write all experts that were taken out back into the stack."""
        for number, expert in self.taken.items():
            self.gate_up[int(number)] = expert.gate_up
            self.down[int(number)] = expert.down
        self.taken.clear()


def experts_loop(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    """Weighted sum of each token's chosen experts, one expert at a time; experts without tokens are skipped.

    Weighted before `down`: that is linear, so the sum is the same, and a row has F numbers there, not D.
    x (N, D); chosen, weights (N, K); gate_up and down: a matrix per expert. Returns (N, D) in x's dtype.
    """
    k = chosen.shape[1]
    order = chosen.reshape(-1).argsort(stable=True)  # (N * K,), the assignments sorted by expert
    counts = torch.bincount(chosen.reshape(-1), minlength=len(gate_up)).tolist()
    token = order // k
    rows = x.index_select(0, token)  # (N * K, D); x[token] has a gradient that threads add up in any order
    scales = weights.reshape(-1)[order, None].to(x.dtype)  # (N * K, 1)
    pieces = []
    for count, part, scale, wi, wo in zip(counts, rows.split(counts), scales.split(counts), gate_up, down, strict=True):
        if count:
            gate, up = F.linear(part, wi).chunk(2, dim=-1)
            pieces.append(F.linear(F.silu(gate) * up * scale, wo))
    if not pieces:  # an empty batch
        return torch.zeros_like(x)
    return torch.zeros_like(x).index_add(0, token, torch.cat(pieces))


def one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether F.grouped_mm is one kernel there. Elsewhere it is a loop, for which a GPU hands Python the group sizes.

    So PyTorch's source has it (tried on an H200): bfloat16 on NVIDIA's Hopper and data-center Blackwell.
    """
    return (device.type == "cuda" and dtype == torch.bfloat16 and torch.version.hip is None
            and torch.cuda.get_device_capability(device)[0] in (9, 10))


class ToExperts(torch.autograd.Function):
    """x (N, D) -> a row for each assignment, (N * K, D), the one of token[i] at place i.

    places (N, K): where each token's rows are. With plain indexing this one's gradient would be index_add, as would the
    next one's value: on an H200 those took a fifth of the GPU's time in a training step of UOE on OLMoE's shape.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return F.embedding_bag(ctx.saved_tensors[0], gradient, mode="sum"), None, None


class FromExperts(torch.autograd.Function):
    """The other way: rows (N * K, D) -> each token's sum, (N, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return F.embedding_bag(places, rows, mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def experts_grouped(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
                    low_rank: Mapping[str, Any] = NONE) -> Tensor:
    """The same with one grouped product per projection; nothing is asked of the device where that is `one_kernel`.

    x (N, D); chosen, weights (N, K); gate_up (E, 2F, D), down (E, D, F), D and F multiples of 16 bytes.
    low_rank: as in MoE.
    """
    def product(rows: Tensor, stack: Tensor) -> Tensor:  # (N * K, narrow), (E, wide, narrow) -> (N * K, wide)
        return F.grouped_mm(rows, stack.transpose(1, 2), offs=ends)

    def changed(rows: Tensor, stack: Tensor, name: str) -> Tensor:
        y = product(rows, stack)
        return y + low_rank[name](rows, product) if name in low_rank else y

    # (N * K,), the assignments sorted by expert; of 16 bits, which a GPU sorts in fewer rounds
    experts, order = chosen.reshape(-1).short().sort(stable=True)
    token = order // chosen.shape[1]
    numbers = torch.arange(len(gate_up), device=x.device, dtype=torch.short)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # (E,), one past each expert's last row
    plainly = x.device.type == "cpu" and x.dtype == torch.float32  # there index_add is as quick, of few rows quicker
    if not plainly:
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        places = places.view_as(chosen).sort(-1).values  # (N, K), of each token's rows, added up in this order
    rows = x.index_select(0, token) if plainly else ToExperts.apply(x, token, places)  # (N * K, D)
    gate, up = changed(rows, gate_up, "gate_up").chunk(2, dim=-1)
    inner = F.silu(gate) * up * weights.reshape(-1)[order, None].to(x.dtype)  # (N * K, F)
    y = changed(inner, down, "down")
    return torch.zeros_like(x).index_add(0, token, y) if plainly else FromExperts.apply(y, token, places)


def experts_all(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same with every expert on every token, weighing 0 where not chosen: two products, E / K times the work.

    Shapes as for experts_grouped, of any width.
    """
    gates = x.new_zeros(len(x), len(gate_up)).scatter(1, chosen, weights.to(x.dtype))  # (N, E)
    inner = F.linear(x, gate_up.flatten(0, 1)).unflatten(1, gate_up.shape[:2])  # (N, E, 2F)
    gate, up = inner.chunk(2, dim=-1)
    weighed = gates[:, :, None]  # (N, E, 1)
    inner = (F.silu(gate) * up).masked_fill(weighed == 0, 0.0) * weighed  # (N, E, F); 0 * infinity would be NaN
    return inner.flatten(1) @ down.transpose(1, 2).flatten(0, 1)


def load_balancing_loss(routings: list[Routing], mask: Tensor) -> Tensor:
    """E * sum_i f_i * P_i, mean over layers: 1 when tokens spread evenly (arXiv 2101.03961, equation 4).

    f_i: share of assignments that expert i got; P_i: its mean router probability. Only real tokens count:
    mask (B, T) bool, False on padding. Differentiable through P.
    """
    losses = []
    for probs, chosen, _ in routings:
        probs, chosen = probs[mask], chosen[mask]  # (N', E), (N', K)
        n_expert = probs.shape[-1]
        share = torch.bincount(chosen.reshape(-1), minlength=n_expert) / max(chosen.numel(), 1)
        losses.append(n_expert * (share * probs.sum(0) / max(len(probs), 1)).sum())  # Switch (4)
    return torch.stack(losses).mean()


def topic_information(routings: list[Routing], mask: Tensor, topics: Tensor) -> Tensor:
    """I(topic; expert) in nats, mean over layers: what a token's expert says about what its row is about.

    The quantity that Mod-Squad (arXiv 2212.08066) maximises in pretraining, with our topics for its tasks: 0 when all
    topics spread over the experts alike, log(topics) when no two share one. With p(e|t) the mean router probability of
    expert e over the tokens of topic t, and every topic present counted alike:
    mean_t sum_e p(e|t) log(p(e|t) / mean_t' p(e|t')).
    mask (B, T) bool: the tokens that count. topics (B,) long: each row's topic. Differentiable through the router.
    """
    topic = topics[:, None].expand_as(mask)[mask]  # (N',)
    layers = []
    for probs, _, _ in routings:
        given = torch.stack([probs[mask][topic == t].mean(0) for t in topic.unique()])  # (topics present, E)
        given = given.clamp_min(1e-12)  # a softmax may round to 0, whose logarithm has no gradient
        layers.append((given * (given / given.mean(0)).log()).sum(-1).mean())
    return torch.stack(layers).mean()
