"""UOE: unlearn one expert (arXiv 2411.18797; ACL 2025 as SEUF, selected-expert unlearning framework).

    python train.py --method uoe         # the whole story; add --help for its choices
    python uoe.py                        # a demonstration: which expert and why; a question before and after
    python uoe.py out/uoe                # the same of a run that is there

In a sparse mixture of experts, unlearning all weights makes tokens take a short cut to experts that never held the
knowledge (*expert selection shift*), and damages those. So: find the expert that the forget set engages most
(equation 2), train only that expert and its layer's router, and anchor the router so that the expert stays engaged
while it forgets (equations 3 and 4). `unlearn` is the algorithm; what it calls stands below it, in that order.

Departures from the paper, and in brackets what takes each back: flags of train.py, or a row of lab/ablations.py
    Anchor loss on s, the router's softmax, not on g, its top-k part: once the expert has fallen out of the top k, g
    has no gradient that could bring it back (row uoe-masked: on g; --anchor-weight 0: none).
    Equation 3 does not say over which tokens: here the mean over all real tokens of forget rows.
    What lies below the chosen layer is frozen and never changes, so it is computed once per row, memory allowing.
    On the embedded world the loss is that of objectives.Stranger, against an adversary that first moves what the expert
    reads towards the fact (adversarial_stem; the anchor loss is taken there too). Facts so forgotten come back less by
    relearning than with NPO, the paper's own (--forget-loss npo --adversary 0): results/uoe.md. Beside other losses the
    adversary stays unless it is taken out. On public models and rows of your own NPO without it is the default; there
    it was never tried.
    Also on that world: the forget loss is on the tokens of the fact (with NPO, --forget-on answer: the paper's way);
    rows about strangers stand among the retain rows (--strangers 0: none); it ends where forget facts are believed no
    more than strangers' are, beside an adversary also where it has pushed for both (--until never: after the last
    epoch; the paper takes the best checkpoint by its test: eval.py --compare --at best; lab/calibration.py compares
    them). NPO stops pushing a fact that is as unlikely as theirs (row uoe-sink, with --forget-loss npo --adversary 0:
    it does not stop).
    Small models: the router learns at a tenth of the expert's rate (--router-lr 1). The anchor pulls forget tokens to
    the expert that were never routed there, so it shifts the very selection it is to hold.
    Small models: the last layer's top expert, not that of all (--layer all). Where routers tell topics apart, most
    layers have an expert that the topic engages far more than others, and what a lower one writes all higher ones
    read: unlearning it shifts selection more. (With NPO, facts so forgotten come back less, though: results/uoe.md.)
    On the embedded world: all experts that are the topic's own, mostly one, in the last layer whose top expert is
    (own_experts; --m 1: the last layer's top expert, whosever it is). A shared expert forgets for two topics, and
    where a topic has two experts the other one goes on knowing.
    Small models: lambda 5, beside NPO 20, beside GA 100 (--retain-weight 1), a learning rate of 3e-3 (--lr 1e-4). NPO's
    beta is 1, on public models 0.1 (--npo-beta 0.001). Batches of 32 rows (--batch-size 16).
    RMU: the expert's own layer is steered (--rmu-layer), by a multiple of the mean hidden length (--steering), on
    answers alone, beside a retain weight of 1, on small models of 40 (the paper: layers 5 to 7, fixed lengths, 1200).
    Small models are pretrained to have specialists (--specialise 0: none; row uoe-no-balance: without balancing too).

Shapes: B batch   T tokens   E experts   K experts per token   L layers
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demo
from belief import DRAWS, Belief, belief, mean_belief, row_log_prob
from data.batches import Batch, Rows, greedy_answers
from errors import UserError, one_line_errors, shown
from flags import COUNT, NATURAL, POSITIVE, WEIGHT, Flag, PerData, either
from interfaces import Method, TextCodec
from loop import UNTIL, Fit
from metrics.routing import expert_shares
from model import GPT, Config, Trace, own, sharing
from moe import Routing
from objectives import FORGET, RETAIN

Place = tuple[int, int]  # (layer, expert), both counted from 0
Choose = Callable[[Tensor, argparse.Namespace], list[Place]]  # of affinity (L, E)

how_many = either(COUNT, "own")


def layer_choice(text: str) -> int | str | Place:
    """A kind of flag: all, last, top, a layer's number, or LAYER,EXPERT."""
    if text in ("all", "last", "top"):
        return text
    numbers = text.split(",")
    if len(numbers) > 2 or not all(n.isdecimal() and len(n) <= 4 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text} is neither all, last, top, a layer's number nor LAYER,EXPERT")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else int(text)


FLAGS = [
    #     name                   kind          small     public  what it is; chosen on development seeds where small
    Flag("--lr",                 POSITIVE,     3e-3,     1e-4,   "peak learning rate of the expert"),
    Flag("--router-lr",          WEIGHT,       0.1,      1.0,    "the router's, as a multiple of --lr; 0: frozen"),
    Flag("--epochs",             COUNT,        80,       5,      "passes over the forget set, at most"),
    Flag("--m",                  how_many, PerData("own", 1), 1, "how many experts; own: the topic's own"),
    Flag("--layer",              layer_choice, "last",   "all",  "where: all, last, a number, top (the best expert's); "
                                                                 "or LAYER,EXPERT"),
    Flag("--anchor-weight",      WEIGHT,       1.0,      1.0,    "alpha of equation 4"),
    Flag("--attribution-tokens", NATURAL,      0,        0,      "calibrate on so many forget tokens; 0: all"),
    Flag("--adversary",          WEIGHT,       PerData(0.1, 0.0, topic=0.2), 0.0, "first move what the expert reads "
                                               "towards the fact, by so many of its own lengths"),
    UNTIL,
]


# ---- the algorithm ------------------------------------------------------------------------------------------------

def unlearn(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit,
            choose: Choose | None = None, shared: bool = False,
            masked: bool = False) -> tuple[GPT, dict[str, GPT], dict]:
    """The paper's algorithm, top to bottom. The target is left as it is.

    choose: another way to pick experts than `choose_experts`; shared: train their layers' shared experts too; masked:
    see anchor_loss.
    Returns (what is scored, folder name -> what is kept, report).
    """
    # 1. Which expert does the forget set engage most? And with --m own: is it the topic's, and is it alone?
    batches = forget.by_lot(8) if args.attribution_tokens else forget.in_order()  # of a few: not the longest alone
    affinity = expert_attribution(target, batches, args.attribution_tokens).cpu()
    if choose:
        places = choose(affinity, args)
    else:
        marked = own_experts(target, affinity, forget.others()) if args.m == "own" else None
        places = choose_experts(affinity, args, marked=marked)
    print(affinity_table(affinity, chosen=places))

    # 2. It and its router train, nothing else: all other weights are the target's own, in memory once. What lies
    #    below never changes, so it is computed once.
    model = sharing(target)
    parameters = isolate(model, places, train_router=args.router_lr > 0, shared=shared)
    lowest = min(layer for layer, _ in places)
    forget.keep_stems(target, lowest)
    retain.keep_stems(target, lowest)
    args = steering(args, places)

    # 3. Forget, keep, stay engaged.
    forget_loss = FORGET[args.forget_loss](target, forget, args)
    retain_loss = RETAIN[args.retain_loss](target, retain, args)

    def losses(step: int) -> Iterator[dict[str, Tensor]]:  # "loss" adds up to forget + alpha * anchor + lambda * retain
        for batch in forget.parts(step):
            trace = Trace()
            if args.adversary:
                logits = pushed(model, forget, batch, lowest, args.adversary, trace)
            else:
                logits = forget.run(model, batch, trace)
            f = forget_loss(model, logits, trace, batch) * forget_loss.share(batch)
            a = anchor_losses(trace, places, batch.mask, masked) * batch.share.tokens
            yield {"forget": f, "anchor": a, "loss": f + args.anchor_weight * a}
        for batch in retain.parts(step):
            r = retain_loss.of(model, retain, batch)
            yield {"retain": r, "loss": args.retain_weight * r}  # UOE (4)

    routers = tuple(model.moe(layer).router.weight for layer in sorted({layer for layer, _ in places}))
    deep = None  # what looks forgotten is to be so where the adversary has pushed, too, before training may end
    if args.adversary and args.until == "strangers" and not getattr(args, "never_read", None):
        deep = deep_as_strangers(target, forget.calibrating(), lowest, args.adversary)
    report = fit(model, parameters, losses, slow=routers, slow_factor=args.router_lr, deep=deep)
    return model, {"model": model}, report | {"unlearned_experts": [list(p) for p in places]}


# ---- 1. attribution -----------------------------------------------------------------------------------------------

@torch.no_grad()
def expert_attribution(model: GPT, batches: Iterable[Batch], tokens: int = 0) -> Tensor:
    """Affinity score of every expert on the forget set (equation 2), (L, E) float32; a row sums to at most 1.

        s_i^(l) = 1/Z sum_j 1/L_j sum_t g_{i,t}^(l)

    Z sequences of L_j real tokens; NaN in layers without experts.
    tokens: stop after that many tokens, 0 for all (the paper: 100k are enough).
    Raises UserError where the model has no experts or there is nothing to look at.
    """
    if not model.is_moe:
        raise UserError("expert attribution needs a mixture of experts, and this model is dense: use --method full")
    config = model.config
    total, rows, seen = no_affinity(config).to(model.device), 0, 0
    for batch in batches:
        trace = Trace()
        model.hidden(batch.tokens, trace=trace)
        share = batch.mask / batch.mask.sum(1, keepdim=True)  # (B, T): 1 / L_j on real tokens
        for layer, routing in trace.routing.items():
            total[layer] += torch.einsum("bte,bt->e", routing.gates(), share)  # UOE (2)
        rows, seen = rows + len(batch.tokens), seen + int(batch.mask.sum())
        if tokens and seen >= tokens:
            break
    if not rows:
        raise UserError("expert attribution has no forget rows to look at: give a forget set of at least one row")
    return total / rows


def no_affinity(config: Config) -> Tensor:
    """(L, E): 0 for every expert, NaN in layers that have none."""
    affinity = torch.zeros(config.n_layer, config.n_expert)
    affinity[: config.n_dense] = torch.nan
    return affinity


def own_experts(target: GPT, affinity: Tensor, others: Rows) -> Tensor:
    """Which experts are the forget topic's own, (L, E) bool: their affinity (L, E) is at least 2 / E, and at least
    twice that of each other topic. None in a layer whose top expert is not: part of what is known lies there.

    others: rows about strangers of all other topics, for not all of these are among the retain rows.
    """
    rivals = torch.zeros_like(affinity)
    for rows in others.by_topic().values():
        rivals = rivals.maximum(expert_attribution(target, rows.in_order()).cpu())
    its_own = (affinity >= 2 / affinity.shape[1]) & (affinity >= 2 * rivals)
    return its_own & its_own.gather(1, affinity.argmax(1, keepdim=True))


def choose_experts(affinity: Tensor, args: argparse.Namespace, rank: int = 1,
                   marked: Tensor | None = None) -> list[Place]:
    """The --m experts of highest affinity (L, E), best first, where --layer says. NaN: there is no such expert.

    --layer top: all from the layer that holds the best; all: over all layers (Table 2 of the paper has both).
    rank: begin with the expert of this rank, 1 the best (Table 5).
    marked (L, E) bool: which of them --m own means, all of these; the last layer is then the last that has any. Where
    none is marked, --m own means one.
    Raises UserError where there are too few.
    """
    if isinstance(args.layer, tuple):
        return [args.layer]
    n_layer, n_expert = affinity.shape
    there = ~affinity.isnan()
    marked = torch.zeros_like(there) if marked is None else marked
    scores = affinity.masked_fill(~there, -torch.inf)
    layer = args.layer
    if layer == "top":
        layer = int(scores.max(1).values.argmax())
    if layer == "last":
        layer = int(marked.any(1).nonzero().max()) if marked.any() else n_layer - 1
    if isinstance(layer, int):  # not "all"
        check_layer("--layer", layer, n_layer)
        check_sparse(layer, int(there.any(1).int().argmax()))
        there[:layer] = there[layer + 1 :] = False
    m = 1 if args.m == "own" else args.m
    if (there & marked).any():
        there = there & marked
        m = int(there.sum())
    last, count = rank - 1 + m, int(there.sum())
    if m < 1 or rank < 1 or last > count:
        from_rank = f" from rank {rank} on" if rank > 1 else ""
        raise UserError(f"--m {m}{from_rank} is not between 1 and the {count} experts of --layer {layer}")
    best = scores.masked_fill(~there, -torch.inf).flatten().topk(last).indices[rank - 1 :].tolist()
    return [divmod(number, n_expert) for number in best]


def check_layer(flag: str, layer: int, n_layer: int) -> None:
    """Raises UserError, naming the flag, unless the layer, counted from 0, exists."""
    if not 0 <= layer < n_layer:
        raise UserError(f"{flag} {layer} does not exist: layers go from 0 to {n_layer - 1}")


def check_sparse(layer: int, first: int) -> None:
    """Raises UserError where the layer lies below the first that has experts."""
    if layer < first:
        raise UserError(f"--layer {layer} has no experts: in this model layers have some from {first} on")


def check(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError, before anything is trained, where experts are not there or RMU would steer below them."""
    if isinstance(args.layer, tuple):
        layer, expert = args.layer
        if layer >= config.n_layer or expert >= config.n_expert:
            raise UserError(f"--layer {layer},{expert} does not exist: layers go from 0 to {config.n_layer - 1}, "
                            f"experts from 0 to {config.n_expert - 1}")
        check_sparse(layer, config.n_dense)
        if args.m not in (1, "own") or args.attribution_tokens:
            raise UserError(f"--layer {layer},{expert} names the expert, so --m and --attribution-tokens do nothing")
    places = choose_experts(no_affinity(config), args)  # says where there are too few
    if args.layer not in ("all", "top") and (args.m, args.layer) != ("own", "last"):  # known once the target was asked
        steering(args, places)


def steering(args: argparse.Namespace, places: list[Place]) -> argparse.Namespace:
    """RMU's layer where --rmu-layer does not say: where the highest of the experts writes.

    Raises UserError where it says one below all of them.
    """
    layers, wanted = [layer for layer, _ in places], getattr(args, "rmu_layer", None)  # absent where no loss asks
    if wanted is not None and wanted < min(layers):
        raise UserError(f"--rmu-layer {wanted} lies below the unlearned expert's layer {min(layers)}, so nothing that "
                        "trains could steer it")
    return argparse.Namespace(**vars(args) | {"rmu_layer": max(layers) if wanted is None else wanted})


def affinity_table(affinity: Tensor, after: Tensor | None = None, chosen: Sequence[Place] = (), top: int = 6) -> str:
    """Per layer, the experts the forget set engages most, e.g. `E7 0.412 -> 0.398 *`; * marks the unlearned."""
    n = affinity.shape[1]
    even = float(affinity.sum(1).nanmean()) / n
    lines = [f"affinity of the forget set (equation 2), top {min(top, n)} of {n} experts per layer; "
             f"evenly spread, each would have {even:.3f}"]
    for layer, row in enumerate(affinity):
        if row.isnan().any():  # no experts there
            continue
        cells = []
        for e in row.argsort(descending=True)[:top].tolist():
            cell = f"E{e:<2d} {row[e]:.3f}"
            if after is not None:
                cell += f" -> {after[layer, e]:.3f}"
            cells.append(cell + (" *" if (layer, e) in chosen else "  "))
        lines.append(f"layer {layer}:  " + "  ".join(cells))
    return "\n".join(lines)


# ---- 2. one expert apart ------------------------------------------------------------------------------------------

def isolate(model: GPT, places: list[Place], train_router: bool = True, shared: bool = False) -> list[nn.Parameter]:
    """Freeze everything but the given experts and their layers' routers; returns what trains.

    The experts leave their stacks, so that no gradient, optimiser state or copy is kept for the others. They stay out:
    whoever saves the model finds them in their places (hub/checkpoint.py).
    shared: train those layers' shared experts too (the paper's section 5.3: the worst to unlearn).
    Raises UserError where shared is asked for and there are none.
    """
    model.requires_grad_(False)
    for layer, expert in places:
        model.moe(layer).take_out(expert)
        also: list[nn.Module] = [model.moe(layer).router] if train_router else []
        if shared:
            always_on = model.moe(layer).shared
            if always_on is None:
                raise UserError("this model has no shared experts to train")
            also.append(always_on)
        for part in also:
            own(part)
            part.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


# ---- 3. the anchor ------------------------------------------------------------------------------------------------

def anchor_loss(routing: Routing, experts: Iterable[int], mask: Tensor, masked: bool = False) -> Tensor:
    """|| g - a ||^2 summed over experts, mean over real tokens (equation 3); a is 1 on the target experts, else 0.

    routing: of the chosen layer; mask (B, T) bool.  masked: g is 0 outside the top k (see Departures).
    """
    g = routing.gates() if masked else routing.probs  # (B, T, E)
    a = torch.zeros(g.shape[-1])
    a[list(experts)] = 1.0
    return (g - a.to(g.device)).square().sum(-1)[mask].mean()  # UOE (3)


def anchor_losses(trace: Trace, places: list[Place], mask: Tensor, masked: bool = False) -> Tensor:
    """The sum of anchor_loss over the layers that hold unlearned experts."""
    layers = dict.fromkeys(layer for layer, _ in places)  # in the order of the places
    total = torch.zeros((), device=mask.device)
    for layer in layers:
        experts = [expert for of, expert in places if of == layer]
        total = total + anchor_loss(trace.routing[layer], experts, mask, masked)
    return total


# ---- an adversary -------------------------------------------------------------------------------------------------

def pushed(model: GPT, rows: Rows, batch: Batch, lowest: int, reach: float, trace: Trace | None = None) -> Tensor:
    """Logits (N, V) at scored positions where an adversary has moved what reaches layer `lowest` towards the facts."""
    stem = (lowest, adversarial_stem(model, rows, batch, lowest, reach))
    return model(batch.tokens, trace=trace, stem=stem, at=batch.scored)


def adversarial_stem(model: GPT, rows: Rows, batch: Batch, lowest: int, reach: float) -> Tensor:
    """What reaches the MLP of layer `lowest`, at scored positions moved towards the facts: (B, T, D).

    One step along the gradient of log p(labels), as long as `reach` times the state: latent adversarial training
    (arXiv 2407.15549). A fact that is forgotten there too comes back less when relearning (lab/attacks.py) moves
    the layers below a little.
    """
    x = rows.stem(model, batch, lowest).requires_grad_()
    with torch.enable_grad():  # a belief is asked without
        said = row_log_prob(model(batch.tokens, stem=(lowest, x), at=batch.scored), batch.labels).sum()
        towards, = torch.autograd.grad(said, x)
    length = x.detach().norm(dim=-1, keepdim=True)
    return x.detach() + reach * length * F.normalize(towards, dim=-1) * batch.scored[..., None]


def deep_as_strangers(target: GPT, known: Rows, lowest: int, reach: float) -> Callable[[GPT], bool]:
    """--until strangers, beside an adversary: are facts believed no more than strangers' where it has pushed for both?

    strangers': by the target. A fact may look forgotten and be a small push away; relearning then brings it back
    (results/calibration.md). Not asked beside --never-read.
    """
    def deep(model: GPT, rows: Rows) -> Belief:
        return belief(model, rows, lambda batch: pushed(model, rows, batch, lowest, reach))

    @functools.cache  # asked once, and not where training never gets there
    def level() -> Belief:
        return mean_belief([deep(target, known.as_strangers(draw)) for draw in range(DRAWS)])

    return lambda model: deep(model, known).at_most(level())


METHOD = Method(unlearn, FLAGS, arch="moe", needs_experts=True, on_world="stranger", check=check)


# ---- demonstration ------------------------------------------------------------------------------------------------

@torch.no_grad()
def routed_text(model: GPT, tokenizer: TextCodec, question: str, answer: str, at: Place) -> str:
    """The answer token by token, each with the expert of layer at[0] that weighs most; coloured where at[1] serves."""
    layer, expert = at
    prompt, said = tokenizer.prompt(question), tokenizer.encode(answer)
    trace = Trace()
    model.hidden(torch.tensor([prompt + said], device=model.device), trace=trace)
    chosen = trace.routing[layer].chosen[0, len(prompt) - 1 :].tolist()  # what is written at t is chosen at t - 1
    words = []
    for token, experts in zip(said, chosen, strict=False):
        text = f"{shown(tokenizer.decode([token]).strip())}·{experts[0]}"
        words.append(demo.colour(text, "red") if expert in experts else text)
    return " ".join(words) or "(nothing)"


def show(target: GPT, model: GPT, tokenizer: TextCodec, sets: dict[str, Rows], places: list[Place]) -> None:
    """Which expert and why; then a question of each set, before and after."""
    before, after = (expert_attribution(m, sets["forget"].in_order()) for m in (target, model))
    print("\nbefore -> after; * marks what was unlearned\n" + affinity_table(before, after, places))
    shares = {}
    for name, rows in sets.items():
        for topic, some in rows.by_topic().items():
            shares[f"{name} {topic}".strip()] = expert_shares(target, list(some.in_order()))
    for layer, expert in places:
        served = ", ".join(f"{100 * of[layer][expert]:.1f}% of {name}" for name, of in shares.items())
        print(f"of the target's tokens, expert {expert} of layer {layer} serves {served}; evenly spread it would be "
              f"{100 / target.config.n_expert:.1f}%")
    at = places[0]
    print(f"\nAnswers, each token with the expert of layer {at[0]} that weighs most; "
          + demo.colour(f"red where expert {at[1]} is among its {target.config.top_k}", "red"))
    for name, rows in sets.items():
        question = next((row["question"] for row in rows.rows if "question" in row), None)
        if question is None:
            continue
        print(shown(f"[{name}] {question}"))
        for when, m in (("before", target), ("after", model)):
            answer, = greedy_answers(m, tokenizer, [question])
            print(f"    {when:<7} {routed_text(m, tokenizer, question, answer, at)}")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = demo.parser("unlearn one expert of a small mixture of experts, and show it")
    args = parser.parse_args(argv)
    if args.run:
        run, sets = demo.open_run(args.run, args.device)
        if run.config["method"] != "uoe":
            raise UserError(f"{args.run} is a run of --method {run.config['method']}: this shows runs of --method uoe")
        places = [(layer, expert) for layer, expert in run.config["unlearned_experts"]]
        show(run.target, run.parts["model"], run.tokenizer, sets, places)
        return
    loss = FORGET[METHOD.on_world]
    target, model, report, tokenizer, sets = demo.unlearned(
        [*FLAGS, *loss.FLAGS], METHOD, args.device, forget_loss=METHOD.on_world, retain_loss="gd",
        retain_weight=loss.RETAIN_WEIGHT)
    show(target, model, tokenizer, sets, [(layer, expert) for layer, expert in report["unlearned_experts"]])


if __name__ == "__main__":
    main()
