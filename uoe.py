"""UOE: unlearn one expert (arXiv 2411.18797; ACL 2025 as SEUF, selected-expert unlearning framework).

    python train.py --method uoe         # the whole story; --help lists the choices
    python uoe.py out/uoe                # the affinity table of that run's target, and what unlearning did to it

In a sparse mixture of experts, unlearning all weights makes tokens take a short cut to experts that never held the
knowledge (*expert selection shift*), and damages those. So: find the expert that the forget set engages most
(equation 2), train only that expert and its layer's router, and anchor the router so that the expert stays engaged
while it forgets (equations 3 and 4). Any forget and retain loss of objectives.py goes in; NPO + GD by default.

Departures from the paper
    Anchor loss on s, the router's softmax, not on g, its top-k part: once the expert has fallen out of the top k, g
    has no gradient that could bring it back. `anchor_loss(..., masked=True)` is the other reading.
    Equation 3 does not say over which tokens: here the mean over all real tokens of forget rows.
    What lies below the chosen layer is frozen and never changes, so it is computed once (unlearn.py).
    On the small models, the router learns at a tenth of the expert's rate. The anchor pulls forget tokens to the expert
    that were never routed there, so it shifts the very selection it is to hold (results/uoe.md, ablations).
    On the small models, NPO's beta is 1 (paper: 0.001; with --model 0.1, TOFU's). A row is then let go once its answer
    is a few nats less likely than it was; a small beta pushes on (results/uoe.md, ablations).
    Batches are of 32 rows (paper: 16). On the small models lambda is 20 beside NPO (paper: 1), since NPO sums over an
    answer's tokens and GD averages; and the learning rate is 1.2e-2 (paper: 1e-4, for billions of parameters).
    On the small models, the expert is the top one of the middle layer, not of all layers (`--layer all`). They see no
    topic in layer 0, only words; where its top expert wins, as on some seeds, expert selection shifts more.

Shapes: B batch   T tokens   E experts   L layers
"""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from data.batches import Batch, Example, encode_rows, in_order
from errors import UserError, one_line_errors
from loop import collate_at
from model import GPT, Trace
from moe import Routing

Place = tuple[int, int]  # (layer, expert)


@torch.no_grad()
def expert_attribution(model: GPT, batches: Iterable[Batch], tokens: int = 0) -> Tensor:
    """Affinity score of every expert on the forget set (equation 2), (L, E) float32; a row sums to at most 1.

        s_i^(l) = 1/Z sum_j 1/L_j sum_t g_{i,t}^(l)

    Z sequences of L_j real tokens.  tokens: stop after that many tokens, 0 for all (the paper: 100k are enough).
    Raises UserError where the model has no experts or there is nothing to look at.
    """
    if not model.is_moe:
        raise UserError("expert attribution needs a mixture of experts, and this model is dense: use --method full")
    config = model.config
    total, rows, seen = torch.zeros(config.n_layer, config.n_expert, device=model.device), 0, 0
    for batch in batches:
        trace = Trace()
        model.hidden(batch.tokens, trace=trace)
        share = batch.mask / batch.mask.sum(1, keepdim=True)  # (B, T): 1 / L_j on real tokens
        for layer, routing in trace.routing.items():
            total[layer] += torch.einsum("bte,bt->e", routing.gates(), share)
        rows, seen = rows + len(batch.tokens), seen + int(batch.mask.sum())
        if tokens and seen >= tokens:
            break
    if not rows:
        raise UserError("expert attribution has no forget rows to look at: give a forget set of at least one row")
    return total / rows


def calibration(examples: list[Example], tokens: int, seed: int, device) -> Iterable[Batch]:
    """Batches to attribute on: all rows; where `tokens` of them are enough (above 0), by lot, not the longest first."""
    if not tokens:
        return in_order(examples, 64, device)
    return (collate_at(examples, 8, seed, i, device) for i in range(-(-len(examples) // 8)))


def check_layer(flag: str, layer: int, n_layer: int) -> None:
    """Raises UserError, naming the flag, unless the layer, counted from 0, exists."""
    if not 0 <= layer < n_layer:
        raise UserError(f"{flag} {layer} does not exist: layers go from 0 to {n_layer - 1}")


def select_experts(affinity: Tensor, m: int = 1, same_layer: bool = False, rule: str = "top",
                   generator: torch.Generator | None = None, layer: int | None = None, rank: int = 1) -> list[Place]:
    """The M experts to unlearn, (layer, expert) each, most wanted first. affinity: (L, E).

    rule: top (highest affinity), bottom (lowest) or random (drawn with `generator`).
    layer: all M from this layer.  same_layer: all M from the layer that holds the first.  Neither: over all layers
    (Table 2 of the paper has both).  rank: begin with the expert of this rank, 1 the most wanted (Table 5).
    """
    n_layer, n_expert = affinity.shape
    if layer is not None:
        check_layer("--layer", layer, n_layer)
        within = select_experts(affinity[layer : layer + 1], m, True, rule, generator, rank=rank)
        return [(layer, expert) for _, expert in within]
    most = n_expert if same_layer else n_layer * n_expert
    if not 1 <= m <= most:
        raise UserError(f"--m {m} is not between 1 and the {most} experts of {'one layer' if same_layer else 'all'}")
    last = rank - 1 + m
    if rank < 1 or last > most:
        raise UserError(f"--affinity-rank {rank} with --m {m} goes past the last expert")
    if rule not in ("top", "bottom", "random"):
        raise UserError(f"--select {rule} is unknown: choose top, bottom or random")
    if rule == "random":
        score = torch.rand(affinity.shape, generator=generator)
    else:
        score = affinity if rule == "top" else -affinity
    if same_layer:
        layer = int(score.max(1).values.argmax())
        return [(layer, int(e)) for e in score[layer].topk(last).indices[rank - 1 :]]
    return [divmod(int(i), n_expert) for i in score.flatten().topk(last).indices[rank - 1 :]]


def experts_reaching(affinity: Tensor, p: float) -> list[Place]:
    """ESFT's choice (arXiv 2407.01906, section 3.3): per layer the fewest experts whose shares of affinity sum to p."""
    places = []
    for layer, row in enumerate(affinity):
        share, order = (row / row.sum().clamp_min(1e-12)).sort(descending=True)
        enough = int((share.cumsum(0) < p - 1e-6).sum()) + 1
        places += [(layer, int(e)) for e in order[:enough]]
    return places


def check_place(place: Place, n_layer: int, n_expert: int) -> Place:
    """Raises UserError unless (layer, expert), both counted from 0, exists."""
    layer, expert = place
    if not (0 <= layer < n_layer and 0 <= expert < n_expert):
        raise UserError(f"--expert {layer},{expert} does not exist: layers go from 0 to {n_layer - 1}, "
                        f"experts from 0 to {n_expert - 1}")
    return layer, expert


def anchor_loss(routing: Routing, experts: Iterable[int], mask: Tensor, masked: bool = False) -> Tensor:
    """|| g - a ||^2 summed over experts, mean over real tokens (equation 3); a is 1 on the target experts, else 0.

    routing: of the chosen layer; mask (B, T) bool.  masked: g is 0 outside the top k (see Departures).
    """
    g = routing.gates() if masked else routing.probs  # (B, T, E)
    a = torch.zeros(g.shape[-1], device=g.device)
    a[list(experts)] = 1.0
    squared = (g - a).square().sum(-1)  # (B, T)
    return squared[mask].sum() / mask.sum().clamp_min(1)


def isolate(model: GPT, places: list[Place], train_router: bool = True, shared: bool = False) -> list[nn.Parameter]:
    """Freeze everything but the given experts and their layers' routers; returns what trains.

    The experts leave their stacks, so that no gradient or optimiser state is kept for the others.
    shared: train those layers' shared experts too (the paper's section 5.3: the worst to unlearn).
    Raises UserError where shared is asked for and there are none.
    """
    model.requires_grad_(False)
    for layer, expert in places:
        model.moe(layer).take_out(expert)
        model.moe(layer).router.requires_grad_(train_router)
        if shared:
            if model.moe(layer).shared is None:
                raise UserError("--with-shared: this model has no shared experts")
            model.moe(layer).shared.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def restore(model: GPT) -> None:
    """Put all experts back into their stacks; everything may train again."""
    for layer in range(model.config.n_layer):
        model.moe(layer).put_back()
    model.requires_grad_(True)


@torch.no_grad()
def balanced_weights(model: GPT, forget: Iterable[Batch], retain: list[Batch], rounds: int = 20) -> list[Tensor]:
    """TRACE (arXiv 2606.10338): weights of retain tokens under which experts are as busy as on the forget set.

    An expert that forget tokens engage and retain tokens seldom do is changed by the one loss and protected by
    nothing. Iterative scaling: a token's weight is multiplied by wanted / current share of its experts, geometric mean
    over experts and layers, until the shares match. Returns one (B, T) float32 per retain batch, mean 1 over real
    tokens, 0 on padding. Shares that cannot be reached (an expert no retain token engages) are left as near as it gets.
    """
    def assignments(batches: Iterable[Batch]) -> list[Tensor]:  # per layer (N, E), each row sums to 1
        out: list[list[Tensor]] = [[] for _ in range(model.config.n_layer)]
        for batch in batches:
            trace = Trace()
            model.hidden(batch.tokens, trace=trace)
            for layer, routing in trace.routing.items():
                hit = torch.zeros_like(routing.probs).scatter(-1, routing.chosen, 1 / routing.chosen.shape[-1])
                out[layer].append(hit[batch.mask])
        return [torch.cat(parts) for parts in out]

    wanted = [hit.mean(0) for hit in assignments(forget)]  # (E,)
    theirs = assignments(retain)
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
        out, start = [*out, padded], start + n
    return out


@torch.no_grad()
def repair_routers(target: GPT, model: GPT, batches: Iterable[Batch], ridge: float = 1e-2) -> None:
    """GRIP's repair after the fact (arXiv 2601.16905): routers score the new hidden states as they did the old ones.

        Delta = Theta X X'^T (X' X'^T + lambda I)^-1 - Theta'

    Theta, X: the target's router and its inputs; Theta', X': the unlearned model's. batches: of retain rows. Layer by
    layer from below, since a repaired router changes what the next one sees. ridge: lambda, as a share of the mean
    diagonal of X' X'^T. Changes model in place.
    """
    batches = list(batches)
    for layer in range(model.config.n_layer):
        old, new = [], []
        for batch in batches:
            for m, into in ((target, old), (model, new)):
                x = m.blocks[layer].mlp_norm(m.stem(batch.tokens, layer))  # (B, T, D)
                into.append(x[batch.mask].double())
        x, x_new = torch.cat(old), torch.cat(new)  # (N, D)
        gram = x_new.T @ x_new
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        theta = target.moe(layer).router.weight.double()  # (E, D)
        fitted = torch.linalg.solve(gram, x_new.T @ (x @ theta.T)).T
        model.moe(layer).router.weight.copy_(fitted)


def affinity_table(affinity: Tensor, after: Tensor | None = None, chosen: list[Place] = (), top: int = 6) -> str:
    """Per layer, the experts the forget set engages most, e.g. `E7 0.412 -> 0.398 *`; * marks the unlearned."""
    even = float(affinity.sum(1).mean()) / affinity.shape[1]
    lines = [f"affinity of the forget set (equation 2), top {top} of {affinity.shape[1]} experts per layer; "
             f"evenly spread, each would have {even:.3f}"]
    for layer, row in enumerate(affinity):
        cells = []
        for e in row.argsort(descending=True)[:top].tolist():
            cell = f"E{e:<2d} {row[e]:.3f}"
            if after is not None:
                cell += f" -> {after[layer, e]:.3f}"
            cells.append(cell + (" *" if (layer, e) in chosen else "  "))
        lines.append(f"layer {layer}:  " + "  ".join(cells))
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    from eval import expert_shares  # only this script needs these two: importing uoe must not pull evaluation in
    from runs import open_run

    parser = argparse.ArgumentParser(description="print the affinity table of a run's target")
    parser.add_argument("run", help="a run folder of a mixture of experts, e.g. out/uoe")
    parser.add_argument("--tokens", type=int, default=0, help="calibrate on this many forget tokens (0: all)")
    args = parser.parse_args()
    run = open_run(args.run)
    examples = encode_rows(run.data.forget, run.tokenizer, run.target.config.max_len, truncate=True)

    def affinity(model: GPT) -> Tensor:
        batches = calibration(examples, args.tokens, run.config["seed"], model.device)
        return expert_attribution(model, batches, args.tokens)

    before, after = affinity(run.target), affinity(run.model) if isinstance(run.model, GPT) else None
    chosen = [tuple(place) for place in run.config.get("unlearned_experts", [])]
    print(affinity_table(before, after, chosen))
    rows = {"forget": run.data.forget, "retain": run.data.retain, "background": run.data.background}
    shares = {name: expert_shares(run.target, list(in_order(encode_rows(of, run.tokenizer, run.target.config.max_len,
                                                                       truncate=True), 64, run.target.device)))
              for name, of in rows.items() if of and chosen}
    for layer, expert in chosen:  # a specialist serves the forget set and little else
        print(f"of the target's tokens, expert {expert} of layer {layer} serves " + ", ".join(
            f"{100 * of[layer][expert]:.1f}% of {name}" for name, of in shares.items())
            + f"; evenly spread it would be {100 / run.target.config.n_expert:.1f}%")


if __name__ == "__main__":
    main()
