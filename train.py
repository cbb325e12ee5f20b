"""The one training loop: pretrain a small model, then unlearn part of what it learnt, then score it.

    python train.py --method uoe                      # small MoE, one expert unlearned      (uoe.py)
    python train.py --method uld                      # small GPT, assistant and difference  (uld.py)
    python train.py --method full --forget-loss ga    # all weights, the usual way, on either: --arch gpt | moe
    python train.py --method uld --data tofu --split forget10

A method is three independent choices: what trains (--method), what it forgets by (--forget-loss), what it keeps by
(--retain-loss). Target (saw everything) and reference (never saw the forget set) are trained once and kept in
out/cache, keyed by what made them. A run is a folder out/<name>: config.json, model/ or assistant/, log.jsonl,
metrics.json, figures/. It is written under <name>.partial and renamed when whole; --resume goes on with a run that
was cut off, and on CPU ends with the very same bits.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import objectives
import uld
import uoe
from data import load_data
from data.batches import Batch, Example, batch_at, collate, encode_rows, in_order
from data.rows import DataSet, Row
from data.tokenizer import Tokenizer
from errors import UserError, one_line_errors
from eval import evaluate, finish_report, greedy_answers, save_scores, stored_scores
from model import GPT, Config, Trace, count_parameters
from moe import load_balancing_loss
from pretrained import load, save

# What a cached model rests on.
SOURCES = ("model.py", "moe.py", "objectives.py", "data/tokenizer.py", "data/batches.py")

# What each method takes where the command line is silent; how it was found: README, "Honest limits".
METHODS = {
    # NPO sums over an answer's tokens and GD averages over them, so GD needs a weight to be heard
    "uoe": {"arch": "moe", "forget_loss": "npo", "retain_loss": "gd", "lr": 4e-3, "epochs": 32,
            "retain_weight": 40.0, "stop_at": 0.1},
    "uld": {"arch": "gpt", "forget_loss": "ce", "retain_loss": "uniform", "lr": 3e-3, "epochs": 20,
            "retain_weight": 6.5},
    "full": {"arch": "moe", "forget_loss": "npo", "retain_loss": "gd", "lr": 1e-4, "epochs": 24,
             "retain_weight": 40.0, "stop_at": 0.1},
}
PRETRAIN_EPOCHS = {"moe": 8, "gpt": 6}  # enough for every held-out wording; more only makes a target surer of itself
FORGET_LOSSES = {  # name -> loss of what the model made of a batch of forget rows
    "ga": lambda seen, args: objectives.ga(seen.logits, seen.labels),
    "npo": lambda seen, args: objectives.npo(objectives.row_log_prob(seen.logits, seen.labels),
                                             seen.reference_log_prob, args.npo_beta),
    "rmu": lambda seen, args: objectives.rmu(seen.hidden, seen.control, seen.mask),
    "ce": lambda seen, args: objectives.cross_entropy(seen.logits, seen.labels),
}
RETAIN_LOSSES = {
    "none": None,
    "gd": lambda seen: objectives.cross_entropy(seen.logits, seen.labels),
    "kl": lambda seen: objectives.kl(seen.logits, seen.reference_logits, seen.labels),
    "hidden": lambda seen: objectives.hidden_distance(seen.hidden, seen.reference_hidden, seen.mask),
    "uniform": lambda seen: objectives.uniform(seen.logits, seen.labels),
}


# ---- the loop ---------------------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a half cosine down to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fit(parameters: list[Tensor], losses: Callable[[int], dict[str, Tensor]], steps: int, lr: float, folder: Path,
        what: str, seed: int, weight_decay: float = 0.01, save_every: int = 100, resume: bool = False,
        enough: Callable[[int], bool] = lambda done: False, slow: tuple[Tensor, ...] = (),
        slow_factor: float = 1.0) -> dict:
    """Minimise losses(step)["loss"] over `parameters`. Every step depends on (seed, step) and the state alone.

    Logs each step to folder/log.jsonl; every save_every steps keeps folder/state.pt, from which `resume` goes on.
    A step whose loss or gradient is not finite ends the run: the last kept state comes back. So does
    enough(steps done), asked after each step, with the state as it is. Parameters in `slow` learn at slow_factor * lr.
    Returns {"steps", "train_seconds", "diverged"}.
    """
    groups = [{"params": [p for p in parameters if not any(p is q for q in slow)], "factor": 1.0}]
    if slow:
        groups.append({"params": list(slow), "factor": slow_factor})
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    start, seconds, log = 0, 0.0, ""

    def keep(step: int) -> None:
        state = {"step": step, "seconds": seconds + time.perf_counter() - began, "log": log, "what": what,
                 "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(state_file)

    def bring_back() -> tuple[int, float, str]:
        state = torch.load(state_file, weights_only=True, map_location=parameters[0].device)
        with torch.no_grad():
            for p, kept in zip(parameters, state["parameters"], strict=True):
                p.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"], state["log"]

    if resume and state_file.is_file():
        start, seconds, log = bring_back()
    began, diverged = time.perf_counter(), False
    if not start:
        keep(0)
    with tqdm(range(start, steps), desc=what, initial=start, total=steps, mininterval=0.5, leave=True) as bar:
        for step in bar:
            torch.manual_seed(seed * 1_000_003 + step)  # dropout: a function of the step, so that resuming is exact
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(step, steps, lr)
            terms = losses(step)
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (torch.isfinite(terms["loss"]) and torch.isfinite(norm)):
                diverged = True
                kept, seconds, log = bring_back()
                tqdm.write(f"{what}: the loss is no longer finite at step {step}; "
                           f"going back to step {kept} and stopping there (a lower --lr may hold)")
                steps = kept
                break
            optimizer.step()
            values = {name: float(value.detach()) for name, value in terms.items()}
            log += json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n"
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            if enough(step + 1):
                steps = step + 1
                break
            if (step + 1) % save_every == 0 and step + 1 < steps:
                keep(step + 1)
    seconds += time.perf_counter() - began
    log_file.write_text(log)
    state_file.unlink(missing_ok=True)
    return {"steps": steps, "train_seconds": seconds, "diverged": diverged}


# ---- pretraining ------------------------------------------------------------------------------------------------

def small_config(args: argparse.Namespace, vocab_size: int) -> Config:
    """The small GPT is a Llama, the small MoE an OLMoE (q/k norm over all heads, kept weights not renormalised)."""
    moe = dict(n_expert=args.experts, top_k=args.top_k, qk_norm="full") if args.arch == "moe" else {}
    try:
        return Config(vocab_size=vocab_size, n_layer=args.layers, n_head=args.heads, n_kv_head=args.heads,
                      d_model=args.width, d_ff=args.ff or (64 if moe else 384), max_len=args.context, **moe)
    except ValueError as error:
        raise UserError(str(error)) from None


def pretrain(args: argparse.Namespace, rows: list[Row], tokenizer: Tokenizer, seed: int, folder: Path,
             what: str) -> GPT:
    """A small model trained from scratch on rows: cross entropy on answers, plus load balancing for a MoE."""
    torch.manual_seed(seed)
    model = GPT(small_config(args, tokenizer.vocab_size)).to(args.device)
    examples = encode_rows(rows, tokenizer, args.context, "row", truncate=True)
    size = args.pretrain_batch_size
    steps = args.pretrain_epochs * -(-len(examples) // size)

    def losses(step: int) -> dict[str, Tensor]:
        batch = collate_at(examples, size, seed, step, args.device)
        trace = Trace()
        loss = objectives.cross_entropy(model(batch.tokens, trace=trace), batch.labels)
        terms = {"ce": loss, "loss": loss}
        if model.is_moe:
            terms["balance"] = load_balancing_loss(list(trace.routing.values()), batch.mask)
            terms["loss"] = loss + args.balance * terms["balance"]
        return terms

    model.train()
    report = fit(list(model.parameters()), losses, steps, args.pretrain_lr, folder, what, seed, weight_decay=0.1,
                 resume=True)
    if report["diverged"]:
        raise UserError(f"pretraining the {what} diverged: lower --pretrain-lr (now {args.pretrain_lr})")
    return model.eval()


def collate_at(examples: list[Example], size: int, seed: int, step: int, device) -> Batch:
    """Batch number `step` of an endless run of shuffled epochs."""
    index = batch_at(len(examples), size, seed, step)
    return collate([examples[i] for i in index], index, device)


def cached_model(args: argparse.Namespace, data: DataSet, tokenizer: Tokenizer, role: str) -> Path:
    """Folder of the target, the reference or a further reference (`reference-2`...), trained now if it is not there."""
    rows = data.retain + data.background + (data.forget if role == "target" else [])
    seed = args.seed + 1000 * int(role.rpartition("-")[2]) if "-" in role else args.seed
    shape = {key: getattr(args, key) for key in (
        "arch", "layers", "heads", "width", "ff", "experts", "top_k", "context", "vocab_size", "pretrain_epochs",
        "pretrain_batch_size", "pretrain_lr", "balance")}
    here = Path(__file__).parent
    made_of = [shape, seed, rows, data.texts(), *((here / name).read_text() for name in SOURCES)]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(args.out) / "cache" / f"{args.arch}-{data.name}-{role}-{key}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        model = pretrain(args, rows, tokenizer, seed, partial, role)
        save(model, tokenizer, partial / "model")
        partial.rename(folder)
    return folder


# ---- unlearning -------------------------------------------------------------------------------------------------

@dataclass
class Seen:
    """What a model made of a batch, with what the losses may want to compare it to."""

    labels: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    logits: Tensor  # (B, T, V)
    trace: Trace
    hidden: Tensor | None = None  # (B, T, D) after the layer that RMU steers
    control: Tensor | None = None  # (D,)
    reference_log_prob: Tensor | None = None  # (B,)
    reference_logits: Tensor | None = None  # (B, T, V)
    reference_hidden: Tensor | None = None  # (B, T, D)


class Side:
    """The forget or the retain rows of an unlearning run, and how the model sees them.

    start: the lowest layer that changes. What reaches its MLP never changes, so with start > 0 it is computed once
    per row, and every step begins there.
    """

    def __init__(self, model: GPT, examples: list[Example], start: int | None, batch_size: int, seed: int):
        self.model, self.examples, self.start = model, examples, start
        self.batch_size, self.seed = batch_size, seed
        self.stem: list[Tensor] | None = None
        self.log_prob: Tensor | None = None  # (rows,) of the model as it was
        if start is not None:
            self.stem = [None] * len(examples)
            with torch.no_grad():
                for batch in in_order(examples, 64, model.device):
                    for i, x, n in zip(batch.index.tolist(), model.stem(batch.tokens, start),
                                       batch.mask.sum(1).tolist(), strict=True):
                        self.stem[i] = x[:n].clone()

    def batch(self, step: int) -> Batch:
        return collate_at(self.examples, self.batch_size, self.seed, step, self.model.device)

    def hidden_before(self, model: GPT, batch: Batch, trace: Trace) -> tuple[Tensor, int]:
        """The residual stream where training begins (B, T, D), and at which layer."""
        if self.stem is None:
            return model.stem(batch.tokens, 0, trace=trace), 0
        return torch.nn.utils.rnn.pad_sequence([self.stem[i] for i in batch.index.tolist()], True), self.start

    def see(self, model: GPT, batch: Batch, hidden_layer: int | None = None) -> Seen:
        trace = Trace()
        logits = model.head(model.tail(*self.hidden_before(model, batch, trace), trace=trace))
        return Seen(batch.labels, batch.mask, logits, trace, trace.hidden.get(hidden_layer))

    @torch.no_grad()
    def remember_log_prob(self) -> None:
        """Each row's log-probability under the model as it is now: NPO's reference."""
        self.log_prob = torch.zeros(len(self.examples), device=self.model.device)
        for batch in in_order(self.examples, 64, self.model.device):
            self.log_prob[batch.index] = objectives.row_log_prob(self.see(self.model, batch).logits, batch.labels)


def unlearn(args: argparse.Namespace, model: GPT, tokenizer, data: DataSet, folder: Path, config: dict):
    """Train by args.method. `model` starts as the target; for ULD it stays the target.

    Returns (what is evaluated, what is saved, the training report). Adds the chosen experts to config.
    """
    forget_rows, retain_rows = data.forget, data.retain
    if args.method == "uld":
        rng = np.random.default_rng([0xD, args.seed])
        some = rng.permutation(len(retain_rows))[: len(forget_rows)]  # as many retain rows as forget rows
        retain_rows = [retain_rows[i] for i in sorted(some)] + data.perturbed
        forget_rows = forget_rows + data.paraphrased
    forget = encode_rows(forget_rows, tokenizer, args.context, "forget row", truncate=True)
    retain = encode_rows(retain_rows, tokenizer, args.context, "retain row", truncate=True)

    torch.manual_seed(args.seed)
    places, start, trained, routers = [], None, model, ()
    if args.method == "uoe":
        affinity = uoe.expert_attribution(model, in_order(forget, 64, args.device), args.attribution_tokens)
        generator = torch.Generator().manual_seed(args.seed)
        places = ([uoe.check_place(model, args.expert)] if args.expert else
                  uoe.select_experts(affinity.cpu(), args.m, args.same_layer, args.select, generator,
                                     uoe_layer(args, model)))
        config["unlearned_experts"] = [list(place) for place in places]
        print(uoe.affinity_table(affinity, chosen=places))
        parameters = uoe.isolate(model, places, not args.freeze_router)
        start = min(layer for layer, _ in places)
        routers = () if args.freeze_router else tuple({layer: model.moe(layer).router.weight for layer, _ in places}
                                                      .values())
    elif args.method == "uld":
        layers = args.assistant_layers or max(1, 3 * model.config.n_layer // 4)
        trained = uld.build_assistant(model, layers, args.lora_rank, args.lora_alpha, args.lora_dropout)
        parameters = [p for p in trained.parameters() if p.requires_grad]
    else:
        parameters = list(model.parameters())
    trained.checkpointing = args.checkpointing
    total = count_parameters(model) + (count_parameters(trained) if trained is not model else 0)
    config |= {"trainable_parameters": sum(p.numel() for p in parameters), "total_parameters": count_parameters(model)}
    print(f"training {config['trainable_parameters']:,} parameters, "
          f"{100 * config['trainable_parameters'] / total:.2f}% of {total:,}")

    sides = [Side(trained, forget, start, args.batch_size, args.seed),
             Side(trained, retain, start, args.batch_size, args.seed + 1)]
    if args.forget_loss == "npo":
        sides[0].remember_log_prob()
    frozen = None
    if args.retain_loss in ("kl", "hidden"):
        frozen = copy.deepcopy(trained).requires_grad_(False)
    hidden_layer, control = None, None
    if args.forget_loss == "rmu":
        hidden_layer = start if args.rmu_layer is None and start is not None else args.rmu_layer
        hidden_layer = model.config.n_layer // 2 if hidden_layer is None else hidden_layer
        if start is not None and hidden_layer < start:
            raise UserError(f"--rmu-layer {hidden_layer} lies below the unlearned expert's layer {start}, so nothing "
                            "that trains could steer it")
        control = steering_vector(sides[0], hidden_layer, args.steering, args.seed)
    forget_loss, retain_loss = FORGET_LOSSES[args.forget_loss], RETAIN_LOSSES[args.retain_loss]
    by_layer: dict[int, list[int]] = {}
    for layer, expert in places:
        by_layer.setdefault(layer, []).append(expert)

    def losses(step: int) -> dict[str, Tensor]:
        batch = sides[0].batch(step)
        seen = sides[0].see(trained, batch, hidden_layer)
        seen.control = control
        if sides[0].log_prob is not None:
            seen.reference_log_prob = sides[0].log_prob[batch.index]
        terms = {"forget": forget_loss(seen, args)}
        loss = terms["forget"]
        with torch.no_grad():
            terms["forget_ce"] = objectives.cross_entropy(seen.logits, seen.labels)
        if by_layer and args.anchor_weight:
            terms["anchor"] = sum(uoe.anchor_loss(seen.trace.routing[layer], experts, seen.mask)
                                  for layer, experts in by_layer.items())
            loss = loss + args.anchor_weight * terms["anchor"]  # UOE, equation 4
        if retain_loss is not None:
            batch = sides[1].batch(step)
            seen = sides[1].see(trained, batch, hidden_layer)
            if frozen is not None:
                with torch.no_grad():
                    was = sides[1].see(frozen, batch, hidden_layer)
                seen.reference_logits, seen.reference_hidden = was.logits, was.hidden
            terms["retain"] = retain_loss(seen)
            loss = loss + args.retain_weight * terms["retain"]
        return {**terms, "loss": loss}

    trained.train()
    per_epoch = -(-len(forget) // args.batch_size)
    asked = [row for row in forget_rows if "question" in row]
    asked = asked[:: -(-len(asked) // 100) or 1]  # at most 100 of the rows that are being forgotten

    def enough(done: int) -> bool:
        """--stop-at: few enough of the *training* rows are still answered. Looks at nothing that scores."""
        if args.stop_at is None or not asked or done % per_epoch:
            return False
        trained.eval()
        said = greedy_answers(trained, tokenizer, [row["question"] for row in asked])
        trained.train()
        return sum(a == row["answer"] for a, row in zip(said, asked, strict=True)) <= args.stop_at * len(asked)

    report = fit(parameters, losses, args.epochs * per_epoch, args.lr, folder, f"unlearn ({args.method})", args.seed,
                 weight_decay=args.weight_decay, save_every=args.save_every, resume=args.resume, enough=enough,
                 slow=routers, slow_factor=args.router_lr)
    trained.eval()
    if args.method == "uld":
        assistant = uld.merge_lora(trained)
        return uld.LogitDifference(model, assistant, args.subtract, args.filter_rate), assistant, report
    if args.method == "uoe":
        uoe.restore(model)
    return model, model, report


def uoe_layer(args: argparse.Namespace, model: GPT) -> int | None:
    """The layer that --layer restricts the choice of experts to; None: no layer in particular."""
    if args.layer == "all" or args.same_layer:
        return None
    return model.config.n_layer // 2 if args.layer == "middle" else int(args.layer)


@torch.no_grad()
def steering_vector(side: Side, layer: int, coefficient: float, seed: int) -> Tensor:
    """RMU's control vector: a random direction, `coefficient` times as long as the mean hidden state there, (D,).

    The paper's coefficients (6.5 to 32,000) are absolute and fit one model each; a multiple fits every model.
    """
    if not 0 <= layer < side.model.config.n_layer:
        raise UserError(f"--rmu-layer {layer} does not exist: layers go from 0 to {side.model.config.n_layer - 1}")
    batch = collate(side.examples[:64], device=side.model.device)
    batch.index = torch.arange(len(batch.tokens))
    length = side.see(side.model, batch, layer).hidden[batch.mask].float().norm(dim=-1).mean()
    u = torch.rand(side.model.config.d_model, generator=torch.Generator().manual_seed(seed)).to(side.model.device)
    return coefficient * length * u / u.norm()


# ---- command line -----------------------------------------------------------------------------------------------

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="unlearn part of what a small model learnt, and score it",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    say = parser.add_argument_group("what to do").add_argument
    say("--method", default="uoe", help="what trains: " + ", ".join(METHODS))
    say("--forget-loss", help="what it forgets by: " + ", ".join(FORGET_LOSSES) + " (default: the method's)")
    say("--retain-loss", help="what it keeps by: " + ", ".join(RETAIN_LOSSES) + " (default: the method's)")
    say("--seed", type=int, default=0, help="of the world, the models and the order of rows")
    say("--name", help="of the run folder; default: what was chosen")
    say("--out", default="out", help="where run folders and the cache go")
    say("--resume", action="store_true", help="go on with the cut-off run of this name")
    say("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    say = parser.add_argument_group("data").add_argument
    say("--data", default="world", help="world, tofu, or a folder with either's JSON files")
    say("--split", default="forget10", help="of TOFU: forget01, forget05, forget10")
    say("--augmented", help="folder with the ULD authors' CSV files, for --data tofu")
    say("--protocol", default="tofu", help="of TOFU's scoring: tofu (first 300 rows, 200 tokens) or openunlearning")
    say("--forget", help="your own JSON lines to forget")
    say("--retain", help="your own JSON lines to keep")
    say = parser.add_argument_group("the small model and its pretraining").add_argument
    say("--arch", choices=("gpt", "moe"), help="dense or mixture of experts (default: the method's)")
    say("--layers", type=int, default=4)
    say("--heads", type=int, default=4)
    say("--width", type=int, default=128, help="of the residual stream")
    say("--ff", type=int, default=0, help="width of an MLP or expert; 0: 384 dense, 64 per expert")
    say("--experts", type=int, default=16, help="per layer")
    say("--top-k", type=int, default=4, help="experts per token")
    say("--context", type=int, default=0, help="longest sequence; 0: 64 for the world, 256 otherwise")
    say("--vocab-size", type=int, default=0, help="of the tokenizer; 0: 1024 for the world, 4096 otherwise")
    say("--pretrain-epochs", type=int, default=0, help="0: " + ", ".join(f"{n} for {a}" for a, n in
                                                                          PRETRAIN_EPOCHS.items()))
    say("--pretrain-batch-size", type=int, default=32)
    say("--pretrain-lr", type=float, default=3e-3)
    say("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    say("--references", type=int, default=1, help="retain-only models; a second one gives the null of forget quality")
    say = parser.add_argument_group("unlearning").add_argument
    say("--epochs", type=int, help="passes over the forget set (default: the method's)")
    say("--stop-at", type=float, help="stop after the epoch in which the share of forget rows that are still answered "
                                      "word for word falls to this, so that methods compare at one level of "
                                      "forgetting; -1: never (default: the method's)")
    say("--lr", type=float, help="peak learning rate (default: the method's)")
    say("--batch-size", type=int, default=32, help="forget rows per step, and as many retain rows")
    say("--retain-weight", type=float, help="lambda of UOE, beta of ULD (default: the method's)")
    say("--weight-decay", type=float, default=0.01)
    say("--npo-beta", type=float, default=0.1)
    say("--steering", type=float, default=4.0, help="RMU: length of the control vector, in mean hidden lengths")
    say("--rmu-layer", type=int, help="RMU: whose output is steered (default: the unlearned expert's, or the middle)")
    say("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, more time")
    say("--save-every", type=int, default=100, help="steps between states that --resume can go on from")
    say = parser.add_argument_group("UOE").add_argument
    say("--m", type=int, default=1, help="how many experts to unlearn")
    say("--layer", default="middle", help="choose within this layer (a number or 'middle'), or 'all'")
    say("--same-layer", action="store_true", help="all of them from the layer with the highest affinity")
    say("--select", choices=("top", "random", "bottom"), default="top", help="by affinity")
    say("--expert", help="layer,expert by hand, both counted from 0")
    say("--anchor-weight", type=float, default=1.0, help="alpha of equation 4")
    say("--attribution-tokens", type=int, default=0, help="calibrate on so many forget tokens; 0: all")
    say("--router-lr", type=float, default=0.5, help="the router's learning rate, as a multiple of --lr")
    say("--freeze-router", action="store_true", help="train the expert alone")
    say = parser.add_argument_group("ULD").add_argument
    say("--assistant-layers", type=int, default=0, help="K; 0: three quarters of the target's")
    say("--lora-rank", type=int, default=32)
    say("--lora-alpha", type=float, default=32.0)
    say("--lora-dropout", type=float, default=0.05)
    say("--subtract", type=float, default=0.7, help="alpha of equation 2")
    say("--filter-rate", type=float, default=0.0, help="tokens less likely than this share of the likeliest are out "
                                                            "of the assistant's reach; 0: none are")
    args = parser.parse_args(argv)
    return check(args)


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the method decides; raises UserError naming the first flag that makes no sense."""
    if args.method not in METHODS:
        raise UserError(f"--method {args.method} is unknown: choose one of {', '.join(METHODS)}")
    if args.forget_loss == "rmu" and args.retain_loss is None:
        args.retain_loss = "hidden"  # its own
    for key, value in METHODS[args.method].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for flag, table in (("forget_loss", FORGET_LOSSES), ("retain_loss", RETAIN_LOSSES)):
        if getattr(args, flag) not in table:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is unknown: "
                            f"choose one of {', '.join(table)}")
    if not (args.method == "uld") == (args.forget_loss == "ce") == (args.retain_loss == "uniform"):
        raise UserError(f"--method {args.method} with --forget-loss {args.forget_loss} and --retain-loss "
                        f"{args.retain_loss}: ce and uniform are ULD's reversed objectives, for it and it alone")
    if args.method == "uoe" and args.arch != "moe":
        raise UserError("--method uoe needs a mixture of experts: leave out --arch gpt, or use --method full")
    if args.expert:
        try:
            layer, expert = map(int, args.expert.split(","))
        except ValueError:
            raise UserError(f"--expert {args.expert} is not layer,expert: two whole numbers, as in 2,7") from None
        args.expert = (layer, expert)
    if args.layer not in ("middle", "all") and not args.layer.isdigit():
        raise UserError(f"--layer {args.layer} is not a layer's number, 'middle' or 'all'")
    args.pretrain_epochs = args.pretrain_epochs or PRETRAIN_EPOCHS.get(args.arch, 0)
    for flag in ("layers", "heads", "width", "experts", "top_k", "pretrain_epochs", "pretrain_batch_size", "epochs",
                 "batch_size", "references", "m", "save_every", "lr", "pretrain_lr",
                 "npo_beta", "router_lr"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not above 0")
    for flag in ("seed", "ff", "context", "vocab_size", "balance", "retain_weight", "weight_decay", "anchor_weight",
                 "attribution_tokens"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is below 0")
    if args.stop_at is not None and (args.method == "uld" or not -1 <= args.stop_at < 1):
        raise UserError(f"--stop-at {args.stop_at} is not a share below 1 (-1: never stop), or the method is uld, "
                        "whose assistant learns the forget rows")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout {args.lora_dropout} is not at least 0 and below 1")
    if not 0 <= args.filter_rate <= 1:
        raise UserError(f"--filter-rate {args.filter_rate} is not between 0 and 1")
    on_world = args.data == "world" and not args.forget
    args.context = args.context or (64 if on_world else 256)
    args.vocab_size = args.vocab_size or (1024 if on_world else 4096)
    if args.vocab_size < 300:
        raise UserError(f"--vocab-size {args.vocab_size} is below 300: 256 bytes and the special tokens come first")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not here: try --device cpu") from None
    if not args.name:
        args.name = "-".join([args.method] + [str(getattr(args, key)) for key, value in METHODS[args.method].items()
                                              if key in ("arch", "forget_loss", "retain_loss") and
                                              getattr(args, key) != value])
        if args.data != "world" or args.forget:
            args.name += f"-{Path(args.forget or args.data).stem}" + ("" if args.forget else f"-{args.split}")
        if args.seed:
            args.name += f"-seed{args.seed}"
    if Path(args.name).name != args.name:
        raise UserError(f"--name {args.name} is not a plain folder name: --out says where it goes")
    return args


def revision() -> str | None:
    """The git commit this code stands at, if it is a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    return None


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = {**vars(args), "torch": torch.__version__, "revision": revision()}
    out = Path(args.out) / args.name
    partial = out.with_name(out.name + ".partial")
    asked = json.dumps({key: value for key, value in vars(args).items() if key != "resume"}, sort_keys=True)
    if args.resume:
        if not (partial / "asked.json").is_file():
            raise UserError(f"--resume: {partial} holds no cut-off run; start it without --resume")
        if (partial / "asked.json").read_text() != asked:
            raise UserError(f"--resume: {partial} was started with other options; give the same, or leave --resume out")

    data = load_data(args.data, args.split, args.seed, args.augmented, args.protocol, args.forget, args.retain)
    print(f"{data.name}: {len(data.forget)} rows to forget, {len(data.retain)} to keep, {len(data.background)} beside")
    tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
    for name, rows in data.scored.items():  # a row that cannot be scored is said now, not after an hour
        encode_rows(rows, tokenizer, args.context, f"{name} row")

    folders, scores = {}, {}
    for role in ["target", "reference", *(f"reference-{i}" for i in range(2, args.references + 1))]:
        folders[role] = cached_model(args, data, tokenizer, role)
        scores[role] = stored_scores(folders[role], data)
        if scores[role] is None:
            scores[role] = evaluate(load(folders[role] / "model", device=args.device)[0], tokenizer, data, role)
            save_scores(folders[role], data, scores[role])

    if not args.resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "asked.json").write_text(asked)
    config |= {role: str(folder) for role, folder in folders.items()}
    target, _ = load(folders["target"] / "model", device=args.device)
    model, to_save, report = unlearn(args, copy.deepcopy(target), tokenizer, data, partial, config)
    memory = (torch.cuda.max_memory_allocated() if args.device.startswith("cuda")
              else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    save(to_save, tokenizer, partial / ("assistant" if args.method == "uld" else "model"))
    scores["unlearned"] = evaluate(model, tokenizer, data, "unlearned")
    run = {key: config[key] for key in ("method", "forget_loss", "retain_loss", "trainable_parameters",
                                        "total_parameters", "seed")} | report | {"peak_memory_bytes": memory}
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    finish_report(partial, run, data, tokenizer, scores, target, load(folders["reference"] / "model",
                                                                      device=args.device)[0], model)
    (partial / "asked.json").unlink()
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"\nthe run is in {out}")


if __name__ == "__main__":
    main()
