"""Unlearning, whatever the method: what trains, by which forget loss, beside which retain loss; all three are tables.

`trainee` makes what trains (uoe.py and uld.py hold the two papers' parts), FORGET_LOSSES and RETAIN_LOSSES are the
objectives by name, `unlearn` puts them together over loop.fit. train.py is the command line.

Shapes: B batch   T tokens   V vocabulary   D model width
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import objectives
import uld
import uoe
from data.batches import Batch, Example, collate, encode_rows, in_order, rows_that_fit
from data.rows import DataSet, Row, augment, refusals
from errors import UserError
from eval import greedy_answers
from loop import collate_at, fit
from model import GPT, Trace, count_parameters


@dataclass
class Seen:
    """What a model made of a batch, with what the losses may want to compare it to."""

    labels: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    logits: Tensor  # (B, T, V)
    trace: Trace
    weights: Tensor | None = None  # (B, T) of retain tokens, with --balance-retain
    hidden: Tensor | None = None  # (B, T, D) after the layer that RMU steers
    control: Tensor | None = None  # (D,)
    reference_log_prob: Tensor | None = None  # (B,) of the model before unlearning; so are the next two
    reference_logits: Tensor | None = None  # (B, T, V)
    reference_hidden: Tensor | None = None  # (B, T, D)
    teacher_logits: Tensor | None = None  # (B, T, V) of --teacher, a finished run
    refusal_log_prob: Tensor | None = None  # (B,) of "I do not know" to the same questions
    refusal_reference_log_prob: Tensor | None = None  # (B,)

    def log_prob(self) -> Tensor:
        return objectives.row_log_prob(self.logits, self.labels)


FORGET_LOSSES: dict[str, Callable[[Seen, argparse.Namespace], Tensor]] = {
    "ga": lambda seen, args: objectives.ga(seen.logits, seen.labels),
    "npo": lambda seen, args: objectives.npo(seen.log_prob(), seen.reference_log_prob, args.npo_beta),
    "simnpo": lambda seen, args: objectives.simnpo(seen.log_prob(), (seen.labels >= 0).sum(-1), args.simnpo_beta,
                                                   args.simnpo_gamma),
    "dpo": lambda seen, args: objectives.dpo(seen.refusal_log_prob, seen.refusal_reference_log_prob, seen.log_prob(),
                                             seen.reference_log_prob, args.dpo_beta),
    "rmu": lambda seen, args: objectives.rmu(seen.hidden, seen.control, seen.mask),
    "uniform": lambda seen, args: objectives.uniform(seen.logits, seen.labels),
    "di": lambda seen, args: objectives.deliberate_imagination(seen.logits, seen.reference_logits, seen.labels,
                                                               args.di_offset),
    "ce": lambda seen, args: objectives.cross_entropy(seen.logits, seen.labels),  # ULD's: the sign is reversed
    "teacher": lambda seen, args: objectives.kl(seen.logits, seen.teacher_logits, seen.labels),  # --teacher's answers
}
RETAIN_LOSSES: dict[str, Callable[[Seen], Tensor] | None] = {
    "none": None,
    "gd": lambda seen: objectives.cross_entropy(seen.logits, seen.labels, seen.weights),
    "kl": lambda seen: objectives.kl(seen.logits, seen.reference_logits, seen.labels, seen.weights),
    "hidden": lambda seen: objectives.hidden_distance(seen.hidden, seen.reference_hidden, seen.mask),
    "uniform": lambda seen: objectives.uniform(seen.logits, seen.labels),  # ULD's
    "teacher": lambda seen: objectives.kl(seen.logits, seen.teacher_logits, seen.labels),
}


# ---- what trains ------------------------------------------------------------------------------------------------

@dataclass
class Trainee:
    """The part of a model that learns.

    start: the lowest layer that changes, where everything below its MLP is frozen; None: no such layer.
    slow: parameters that learn at --router-lr times the rate.
    finish: -> (what is scored, folder name -> model to keep).
    """

    model: GPT | uld.LogitOffset
    parameters: list[Tensor]
    finish: Callable[[], tuple[object, dict[str, GPT]]]
    start: int | None = None
    slow: tuple[Tensor, ...] = ()
    places: list[uoe.Place] = field(default_factory=list)
    anchored: bool = False
    losses: Callable[[Batch, Batch], dict[str, Tensor]] | None = None  # of a forget and a retain batch, in their stead
    scored: object = None  # what is scored before it is finished, where that is not `model`


def all_weights(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    return Trainee(target, list(target.parameters()), lambda: (target, {"model": target}))


def low_rank(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    parameters = uld.add_lora(target, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)

    def finish():
        merged = uld.merge_lora(target)
        return merged, {"model": merged}

    return Trainee(target, parameters, finish)


def experts(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    """UOE: one expert or M of them, with their routers. ESFT: per layer those that carry a share p of the affinity."""
    sample = uoe.calibration(forget, args.attribution_tokens, args.seed, target.device)
    affinity = uoe.expert_attribution(target, sample, args.attribution_tokens).cpu()
    esft = args.method == "esft"
    if esft:
        places = uoe.experts_reaching(affinity, args.esft_p)
    elif args.expert:
        places = [uoe.check_place(args.expert, target.config.n_layer, target.config.n_expert)]
    else:
        layer = None if args.layer == "all" or args.same_layer else (
            target.config.n_layer // 2 if args.layer == "middle" else int(args.layer))
        places = uoe.select_experts(affinity, args.m, args.same_layer, args.select,
                                    torch.Generator().manual_seed(args.seed), layer, args.affinity_rank)
    print(uoe.affinity_table(affinity, chosen=places))
    train_router = not (esft or args.freeze_router)
    parameters = uoe.isolate(target, places, train_router, args.with_shared)
    routers = {layer: target.moe(layer).router.weight for layer, _ in places} if train_router else {}

    def finish():
        uoe.restore(target)
        return target, {"model": target}

    return Trainee(target, parameters, finish, min(layer for layer, _ in places), tuple(routers.values()), places,
                   anchored=not esft and args.anchor_weight > 0)


def assistant_layers(args: argparse.Namespace, target: GPT) -> int:
    """K. The paper's quarter is of 32 layers; of our 4 it takes three quarters."""
    n = target.config.n_layer
    return args.assistant_layers or max(1, n // 4 if args.model else 3 * n // 4)


def assistant(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    """ULD: the target is not run while its assistant trains."""
    small = uld.build_assistant(target, assistant_layers(args, target), args.lora_rank, args.lora_alpha,
                                args.lora_dropout)

    def decoded(part: GPT) -> uld.LogitDifference:
        return uld.LogitDifference(target, part, args.subtract, args.filter_rate, centred=args.centre)

    def finish():
        merged = uld.merge_lora(small)
        return decoded(merged), {"assistant": merged}

    return Trainee(small, [p for p in small.parameters() if p.requires_grad], finish,
                   scored=decoded(small))


def offset(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    """Offset-X (arXiv 2404.11045): the usual losses on l_target + alpha (l_assistant - l_assistant at the start)."""
    target.requires_grad_(False)  # frozen, so that its pass keeps nothing for a gradient
    layers = assistant_layers(args, target)
    small = uld.build_assistant(target, layers, args.lora_rank, args.lora_alpha, args.lora_dropout)
    before = uld.first_layers(target, layers)

    def finish():
        merged = uld.merge_lora(small)
        return uld.LogitOffset(target, merged, before, args.offset_alpha), {"assistant": merged, "before": before}

    return Trainee(uld.LogitOffset(target, small, before, args.offset_alpha),
                   [p for p in small.parameters() if p.requires_grad], finish)


def two_assistants(args: argparse.Namespace, target: GPT, forget: list[Example]) -> Trainee:
    """Divergence decoding (arXiv 2605.31293): one assistant learns forget and retain rows, one the retain rows alone.

    Both learn in one run; the loss of a step is the sum of theirs.
    """
    parts = [uld.build_assistant(target, assistant_layers(args, target), args.lora_rank, args.lora_alpha,
                                 args.lora_dropout) for _ in range(2)]
    without, seen = parts

    def losses(forget: Batch, retain: Batch) -> dict[str, Tensor]:
        terms = {"forget": objectives.cross_entropy(seen(forget.tokens), forget.labels),
                 "retain": sum(objectives.cross_entropy(part(retain.tokens), retain.labels) for part in parts)}
        return terms | {"loss": terms["forget"] + args.retain_weight * terms["retain"]}

    def finish():
        merged = [uld.merge_lora(part) for part in parts]
        return uld.LogitOffset(target, *merged, args.offset_alpha), dict(zip(("without", "with"), merged, strict=True))

    return Trainee(uld.LogitOffset(target, without, seen, args.offset_alpha),
                   [p for part in parts for p in part.parameters() if p.requires_grad], finish, losses=losses)


TRAINEES = {"uoe": experts, "uld": assistant, "full": all_weights, "lora": low_rank, "esft": experts,
            "offset": offset, "divergence": two_assistants, "distill": all_weights, "distill-lora": low_rank}


# ---- what it sees -----------------------------------------------------------------------------------------------

class Side:
    """The forget or the retain rows of an unlearning run, and how the model sees them.

    start: the lowest layer that changes. What reaches its MLP never changes, so with a start it is computed once
    per row, and every step begins there.
    """

    def __init__(self, model, examples: list[Example], start: int | None, batch_size: int, seed: int):
        self.model, self.examples, self.start = model, examples, start
        self.batch_size, self.seed = batch_size, seed
        self.stem: list[Tensor] | None = None
        self.log_prob: Tensor | None = None  # (rows,) of the model as it was
        self.weights: list[Tensor] | None = None  # of each row's tokens
        if start is not None:
            self.stem = [None] * len(examples)
            with torch.no_grad():
                for batch in in_order(examples, 64, model.device):
                    for i, x, n in zip(batch.index.tolist(), model.stem(batch.tokens, start),
                                       batch.mask.sum(1).tolist(), strict=True):
                        self.stem[i] = x[:n].clone()

    def batch(self, step: int) -> Batch:
        return collate_at(self.examples, self.batch_size, self.seed, step, self.model.device)

    def of(self, index: list[int]) -> Batch:
        return collate([self.examples[i] for i in index], index, self.model.device)

    def see(self, model, batch: Batch, hidden_layer: int | None = None) -> Seen:
        trace = Trace()
        if self.stem is not None:
            x = torch.nn.utils.rnn.pad_sequence([self.stem[i] for i in batch.index.tolist()], True)
            logits = model.head(model.tail(x, self.start, trace=trace))
        else:
            logits = model(batch.tokens, trace=trace)
        weights = None if self.weights is None else torch.nn.utils.rnn.pad_sequence(
            [self.weights[i] for i in batch.index.tolist()], True)
        return Seen(batch.labels, batch.mask, logits, trace, weights, trace.hidden.get(hidden_layer))

    @torch.no_grad()
    def remember_log_prob(self) -> "Side":
        """Keep each row's log-probability under the model as it is now: NPO's and DPO's reference."""
        self.log_prob = torch.zeros(len(self.examples), device=self.model.device)
        for batch in in_order(self.examples, rows_that_fit(self.examples, self.model.config.vocab_size),
                              self.model.device):
            self.log_prob[batch.index] = self.see(self.model, batch).log_prob()
        return self


@torch.no_grad()
def steering_vector(side: Side, layer: int, coefficient: float, seed: int) -> Tensor:
    """RMU's control vector: a random direction, `coefficient` times as long as the mean hidden state there, (D,).

    The paper's coefficients (6.5 to 32,000) are absolute and fit one model each; a multiple fits every model.
    """
    uoe.check_layer("--rmu-layer", layer, side.model.config.n_layer)
    few = list(range(min(64, len(side.examples))))
    batch = side.of(few)
    length = side.see(side.model, batch, layer).hidden[batch.mask].float().norm(dim=-1).mean()
    u = torch.rand(side.model.config.d_model, generator=torch.Generator().manual_seed(seed)).to(side.model.device)
    return coefficient * length * u / u.norm()


def rows_of(args: argparse.Namespace, data: DataSet) -> tuple[list[Row], list[Row]]:
    """The rows to forget and to keep. ULD: D'_f and D'_r (section 3.3), each part of which a flag can leave out."""
    if args.method.startswith("distill"):  # as many wordings as there are: a teacher answers them all
        return data.forget + data.paraphrased, data.retain
    if args.method != "uld":
        return data.forget, data.retain
    drawn = np.random.default_rng([0xD, args.seed]).permutation(len(data.retain))
    kept = sorted(drawn[: round(args.uld_retain * len(data.forget))])
    forget = data.forget + ([] if args.no_paraphrased else data.paraphrased)
    retain = [data.retain[i] for i in kept] + ([] if args.no_perturbed else data.perturbed)
    asked = [data.retain[i] for i in drawn if data.retain[i].get("perturbed_answer")]
    stray = augment(asked[: round(args.stray_perturbed * len(data.forget))])[1]
    if args.stray_perturbed and not stray:
        raise UserError("--stray-perturbed: no retain row has a perturbed_answer (TOFU: try --augmented, forget01)")
    return forget, retain + stray


# ---- all together -----------------------------------------------------------------------------------------------

def unlearn(args: argparse.Namespace, target: GPT, tokenizer, data: DataSet, folder: Path, config: dict,
            watch: Callable[[dict, object], None] | None = None, teacher=None):
    """Train by args.method. `target` is changed, except where assistants learn in its place (uld, offset, divergence).

    watch(where, model): called after each epoch with the model as it would be scored then.
    teacher: whatever --teacher's run scores, for --method distill.

    Returns (what is scored, folder name -> model to keep, loop.fit's report). Adds to config what was chosen.
    """
    forget_rows, retain_rows = rows_of(args, data)
    if not retain_rows and args.retain_loss != "none":
        raise UserError("no retain rows are left: --retain-loss none, or leave out --no-perturbed or --uld-retain 0")
    forget = encode_rows(forget_rows, tokenizer, args.context, "forget row", truncate=True)
    retain = encode_rows(retain_rows, tokenizer, args.context, "retain row", truncate=True)
    if args.method == "uld" and args.uniform_on == "all":  # to be uniform takes no right answer, so any label does
        retain = [Example(row.tokens, [0] * len(row.labels)) for row in retain]

    torch.manual_seed(args.seed)
    total = count_parameters(target)  # before experts are taken out or adapters put in
    trainee = TRAINEES[args.method](args, target, forget)
    trained, parameters, start = trainee.model, trainee.parameters, trainee.start
    for part in trained.modules():
        if isinstance(part, GPT):
            part.checkpointing = args.checkpointing
    config |= {"trainable_parameters": sum(p.numel() for p in parameters), "total_parameters": total}
    if trainee.places:
        config["unlearned_experts"] = [list(place) for place in trainee.places]
    print(f"training {config['trainable_parameters']:,} parameters, "
          f"{100 * config['trainable_parameters'] / total:.2f}% of the target's {total:,}")

    sides = [Side(trained, forget, start, args.batch_size, args.seed),
             Side(trained, retain, start, args.batch_size, args.seed + 1)]
    if args.balance_retain:
        batches = list(in_order(retain, 64, target.device))
        by_row = uoe.balanced_weights(target, in_order(forget, 64, target.device), batches)
        sides[1].weights = [None] * len(retain)
        for batch, weights in zip(batches, by_row, strict=True):
            for i, row, n in zip(batch.index.tolist(), weights, batch.mask.sum(1).tolist(), strict=True):
                sides[1].weights[i] = row[:n]
    refusal = None
    if args.forget_loss in ("npo", "dpo"):
        sides[0].remember_log_prob()
    if args.forget_loss == "dpo":
        refusal = Side(trained, encode_rows(refusals(forget_rows), tokenizer, args.context, "refusal to row",
                                            truncate=True), start, args.batch_size, args.seed).remember_log_prob()
    frozen = None
    if args.retain_loss in ("kl", "hidden") or args.forget_loss == "di":
        frozen = copy.deepcopy(trained).requires_grad_(False).eval()
    hidden_layer, control = None, None
    if args.forget_loss == "rmu" or args.retain_loss == "hidden":
        highest = max((layer for layer, _ in trainee.places), default=target.config.n_layer // 2)
        hidden_layer = highest if args.rmu_layer is None else args.rmu_layer  # what lies above it learns nothing
        if start is not None and hidden_layer < start:
            raise UserError(f"--rmu-layer {hidden_layer} lies below the unlearned expert's layer {start}, so nothing "
                            "that trains could steer it")
        control = steering_vector(sides[0], hidden_layer, args.steering, args.seed)  # which only RMU uses
    forget_loss, retain_loss = FORGET_LOSSES[args.forget_loss], RETAIN_LOSSES[args.retain_loss]
    by_layer: dict[int, list[int]] = {}
    for layer, expert in trainee.places if trainee.anchored else []:
        by_layer.setdefault(layer, []).append(expert)

    def look(side: Side, batch: Batch, compare: bool) -> Seen:
        seen = side.see(trained, batch, hidden_layer)
        seen.control = control
        if side.log_prob is not None:
            seen.reference_log_prob = side.log_prob[batch.index]
        if compare:
            with torch.no_grad():
                was = side.see(frozen, batch, hidden_layer)
            seen.reference_logits, seen.reference_hidden = was.logits, was.hidden
        if teacher is not None:
            with torch.no_grad():
                seen.teacher_logits = teacher(batch.tokens)
        return seen

    def losses(step: int) -> dict[str, Tensor]:
        batch = sides[0].batch(step)
        if trainee.losses is not None:
            return trainee.losses(batch, sides[1].batch(step))
        seen = look(sides[0], batch, args.forget_loss == "di")
        if refusal is not None:
            polite = look(refusal, refusal.of(batch.index.tolist()), False)
            seen.refusal_log_prob, seen.refusal_reference_log_prob = polite.log_prob(), polite.reference_log_prob
        terms = {"forget": forget_loss(seen, args)}
        loss = terms["forget"]
        with torch.no_grad():
            terms["forget_ce"] = objectives.cross_entropy(seen.logits, seen.labels)
        if by_layer:
            terms["anchor"] = sum(uoe.anchor_loss(seen.trace.routing[layer], experts, seen.mask)
                                  for layer, experts in by_layer.items())
            loss = loss + args.anchor_weight * terms["anchor"]  # UOE, equation 4
        if retain_loss is not None:
            terms["retain"] = retain_loss(look(sides[1], sides[1].batch(step), frozen is not None))
            loss = loss + args.retain_weight * terms["retain"]
        return {**terms, "loss": loss}

    trained.train()
    per_epoch = -(-len(forget) // args.batch_size)
    asked = [row for row in forget_rows if "question" in row]
    asked = asked[:: -(-len(asked) // 100) or 1]  # at most 100 of the rows that are being forgotten

    def enough(done: int, spent: float) -> bool:
        """After each epoch. --stop-at: few enough of the *training* rows are still answered; no scored row is asked."""
        if done % per_epoch or (watch is None and (args.stop_at is None or args.stop_at < 0)):
            return False
        trained.eval()
        if watch is not None:
            watch({"epoch": done // per_epoch, "step": done, "seconds": spent}, trainee.scored or trained)
        stop = False
        if args.stop_at is not None and args.stop_at >= 0 and asked:
            said = greedy_answers(trained, tokenizer, [row["question"] for row in asked], data.limits)
            right = sum(a.strip() == row["answer"].strip() for a, row in zip(said, asked, strict=True))
            stop = right <= args.stop_at * len(asked)
        trained.train()
        return stop

    report = fit(parameters, losses, args.epochs * per_epoch, args.lr, folder, f"unlearn ({args.method})", args.seed,
                 weight_decay=args.weight_decay, save_every=args.save_every, resume=args.resume, enough=enough,
                 slow=trainee.slow, slow_factor=args.router_lr)
    trained.eval()
    return *trainee.finish(), report
