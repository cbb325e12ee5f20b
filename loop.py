"""The one training loop, under pretraining, fine-tuning and every unlearning method: minimise, log, keep, resume.

    report = minimise(parameters, lambda step: [{"loss": ...}], steps=100, lr=1e-3, folder=..., what="target", seed=0)
    fit = fitting(args, forget, folder)          # the same with all but what trains filled in: what a method calls
    report = fit(model, parameters, losses)

Weights in bf16 learn through float32 copies (mixed precision, arXiv 1710.03740, section 3.1): an update smaller than
bf16's rounding, 1/256 of the weight, would otherwise be lost.
"""

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import parallel
from belief import belief, strangers_belief
from data.batches import Rows, encode_whole, greedy_answers
from data.rows import NO_LIMITS, DataSet, Limits, Row
from data.values import encode_fact, encode_value
from errors import Stopped, UserError, held
from files import whole, write
from flags import COUNT, NATURAL, SHARE, WEIGHT, Flag, PerData, either
from interfaces import LanguageModel, TextCodec
from model import GPT
from schema import ANY_NUMBER, misfit, parse_json_lines

Terms = dict[str, Tensor]  # by name; "loss" is the one that is minimised
Losses = Callable[[int], Iterable[Terms]]  # of a step; they add up, and each lets go of its pass's memory
Fit = Callable[..., dict]  # fitting's: (model, parameters, losses, slow=(), slow_factor=1.0, deep=None) -> report
AfterEpoch = Callable[[LanguageModel, int, int, float], bool]  # (model, epoch, steps, seconds) -> is it enough?
until = either(SHARE, "strangers", "never")
NAME_ROOM = 32  # tokens by which made-up names may make a row longer
UNTIL = Flag("--until", until, PerData("strangers", 0.1), "never", "end once forget facts are believed no "
             "more than strangers'; or so small a share of forget rows is said word for word; or never")
FLAGS = [  # of everything that trains
    #     name              kind     small   public  what it is
    Flag("--batch-size",    COUNT,   32,     32,     "forget rows per step, and as many retain rows"),
    Flag("--save-every",    COUNT,   100,    100,    "steps between states that --resume can go on from"),
    Flag("--micro-batch",   NATURAL, 0,      0,      "rows that memory takes at once; the gradients of a batch's parts "
                                                     "are added up. 0: all"),
    Flag("--checkpointing", bool,    False,  False,  "recompute blocks in the backward pass: less memory, more time"),
]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a half cosine down to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Weights:
    """What the optimiser sees of `parameters`: themselves, or float32 copies of those of lower precision."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.full = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]

    def take_gradients(self) -> None:
        """Move the gradients of low-precision parameters to their copies, adding to what is there."""
        for p, full in zip(self.parameters, self.full, strict=True):
            if full is not p and p.grad is not None:
                full.grad = p.grad.float() if full.grad is None else full.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the copies into the parameters."""
        for p, full in zip(self.parameters, self.full, strict=True):
            if full is not p:
                p.copy_(full)


def minimise(parameters: list[Tensor], losses: Losses, steps: int, lr: float, folder: Path, what: str, seed: int,
             weight_decay: float = 0.01, save_every: int = 100, resume: bool = False,
             enough: Callable[[int, float], bool] = lambda done, spent: False, slow: tuple[Tensor, ...] = (),
             slow_factor: float = 1.0) -> dict:
    """Minimise over `parameters` the sum of "loss" in all that losses(step) gives (Losses).

    Every step depends on (seed, step) and the state alone.

    Every save_every steps, when it is told to stop and at the end keeps folder/state.pt, from which `resume` goes on.
    Whoever has saved the weights may remove it. At the end writes folder/log.jsonl, a line per step.
    A step whose loss or gradient is not finite ends the run: the last kept state comes back.
    enough(steps done, seconds trained), asked after each step, ends it too, with the weights as they are. Parameters in
    `slow` learn at slow_factor * lr.
    Returns {"steps", "train_seconds", "diverged"}, and where it went on "resumed_seconds", those trained before.
    Raises UserError for a state that is damaged or of other weights, errors.Stopped after Ctrl-C or SIGTERM.
    """
    weights = Weights(parameters)
    slowly = [any(p is q for q in slow) for p in parameters]
    groups = [{"params": [w for w, s in zip(weights.full, slowly, strict=True) if s == which], "factor": factor}
              for which, factor in ((False, 1.0), (True, slow_factor))]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    start, seconds, log, ended = 0, 0.0, "", None

    def keep(step: int, report: dict | None = None) -> None:
        state = {"step": step, "seconds": seconds + time.perf_counter() - began, "log": log, "report": report,
                 "parameters": [w.detach() for w in weights.full]}
        if report is None:  # once training has ended nothing goes on from the optimiser
            state["optimizer"] = optimizer.state_dict()
        with whole(state_file) as file:
            torch.save(state, file)

    def bring_back() -> tuple[int, float, str, dict | None]:
        state = read_state(state_file, weights.full, optimizer)
        with torch.no_grad():
            for w, kept in zip(weights.full, state["parameters"], strict=True):
                w.copy_(kept)
        weights.give_back()
        if state["report"] is None:
            optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"], state["log"], state["report"]

    if resume and state_file.is_file():
        start, seconds, log, ended = bring_back()
    device = weights.full[0].device
    if parallel.total([start], device) != [start * parallel.size()]:
        raise UserError(f"{state_file}: other processes kept another step than {start}: start again with --restart")
    if ended is not None:
        write(log_file, log)
        return ended | {"resumed_seconds": seconds}
    began, diverged, before = time.perf_counter(), False, seconds
    if not start:
        keep(0)
    with (held() as stops, tqdm(range(start, steps), desc=what, initial=start, total=steps, mininterval=0.5,
                                leave=True) as bar):
        for step in bar:
            # dropout: a function of the step, so that resuming is exact; other masks in each process
            torch.manual_seed(seed * 1_000_003 + step + parallel.rank() * 2**40)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(step, steps, lr)
            optimizer.zero_grad(set_to_none=True)
            terms: Terms = {}
            for part in losses(step):
                if part["loss"].requires_grad:  # it does not where an expert alone trains and no token came to it
                    part["loss"].backward()
                weights.take_gradients()
                terms |= {name: terms.get(name, 0) + value.detach() for name, value in part.items()}
            parallel.add_up(weights.full)
            norm = parallel.in_one_piece(torch.nn.utils.clip_grad_norm_(weights.full, 1.0))
            values = dict(zip(terms, parallel.total([float(value) for value in terms.values()], device), strict=True))
            if not (math.isfinite(values["loss"]) and torch.isfinite(norm)):
                diverged = True
                kept, _, log, _ = bring_back()  # the time was spent all the same
                tqdm.write(f"{what}: the loss is no longer finite at step {step}; "
                           f"going back to step {kept} and stopping there (a lower --lr may hold)")
                steps = kept
                break
            optimizer.step()
            weights.give_back()
            log += json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n"
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            asked = time.perf_counter()
            stop = parallel.agreed(enough(step + 1, seconds + asked - began), device)
            began += time.perf_counter() - asked  # looking is not training
            told = parallel.agreed(bool(stops), device)  # to stop, this process or another: all do after this step
            if stop:
                steps = step + 1
                break
            if (told or (step + 1) % save_every == 0) and step + 1 < steps:
                keep(step + 1)
                if told:
                    raise Stopped((stops or [signal.SIGTERM])[0],
                                  f"{what} stopped after step {step + 1} of {steps}, and that is kept")
        seconds, began = seconds + time.perf_counter() - began, time.perf_counter()
        report = {"steps": steps, "train_seconds": seconds, "diverged": diverged}
        keep(steps, report)
        write(log_file, log)
        if parallel.agreed(bool(stops), device):
            raise Stopped((stops or [signal.SIGTERM])[0], f"{what} stopped after its last step, and that is kept")
    return report | ({"resumed_seconds": before} if start else {})


STATE = {"step": NATURAL, "seconds": WEIGHT, "log": str, "parameters": list,  # state.pt
         "report": ({"steps": NATURAL, "train_seconds": WEIGHT, "diverged": bool}, None),
         "optimizer?": {"state": dict, "param_groups": [dict]}}


def read_state(path: Path, weights: list[Tensor], optimizer: torch.optim.Optimizer) -> dict:
    """A state.pt of minimise's. Raises UserError where it is damaged or of other weights than these."""
    try:
        state = torch.load(path, weights_only=True, map_location=weights[0].device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # a file that is cut or changed: many kinds
        state = None
    way_out = f"remove {path.parent} and start again"
    if misfit(state, STATE) or not is_of(state, weights, optimizer):
        raise UserError(f"{path} is damaged, or the state of another model: {way_out}")
    lines = parse_json_lines(state["log"].encode(), {"step": NATURAL, str: ANY_NUMBER}, str(path), way_out)
    if state["report"] is None and len(lines) != state["step"]:
        raise UserError(f"{path} has a log of {len(lines)} steps and was kept after {state['step']}: {way_out}")
    return state


def is_of(state: dict, weights: list[Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether what was kept is of just these weights and this optimiser, with no infinity or NaN in it."""
    if len(state["parameters"]) != len(weights):
        return False
    pairs = list(zip(state["parameters"], weights, strict=True))
    if state["report"] is None:
        kept = state.get("optimizer", {"state": {}, "param_groups": []})
        groups = optimizer.state_dict()["param_groups"]
        if [group | {"lr": 0.0} for group in kept["param_groups"]] != [group | {"lr": 0.0} for group in groups]:
            return False
        order = dict(enumerate(w for group in optimizer.param_groups for w in group["params"]))
        for i, of in kept["state"].items():  # of weights that had a gradient
            if i not in order or misfit(of, {"step": Tensor, "exp_avg": Tensor, "exp_avg_sq": Tensor}):
                return False
            pairs += [(of["exp_avg"], order[i]), (of["exp_avg_sq"], order[i]), (of["step"], torch.zeros(()))]
    return all(isinstance(found, Tensor) and found.shape == w.shape and found.dtype == w.dtype
               and bool(torch.isfinite(found).all()) for found, w in pairs)


def until_strangers(target: GPT, known: Rows) -> AfterEpoch:
    """--until strangers: it is enough once the model believes no more of forget facts than the target of strangers'.

    With --never-read: no more than that model believes of the facts themselves.
    known: forget facts in wordings that neither teach nor score. No reference is needed and no scored row is asked.
    UOE asks more beside an adversary (uoe.deep_as_strangers).
    """
    level = strangers_belief(target, known)
    return lambda model, *_: belief(model, known).at_most(level)


def stop_at(share: float, rows: list[Row], tokenizer: TextCodec, limits: Limits = NO_LIMITS) -> AfterEpoch:
    """--until SHARE: it is enough once at most this share of the rows that are being forgotten is said word for word.

    At most 100 of them are asked, as they are taught. Rows of TOFU and a user's own score in that wording too.
    """
    asked = [row for row in rows if "question" in row]
    asked = asked[:: math.ceil(len(asked) / 100) or 1]
    if not asked:
        print(f"--until {share:g}: no forget row has a question to ask, so training ends after its last epoch")

    def after_epoch(model: LanguageModel, epoch: int, steps: int, seconds: float) -> bool:
        said = greedy_answers(model, tokenizer, [row["question"] for row in asked], limits)
        right = sum(a.strip() == row["answer"].strip() for a, row in zip(said, asked, strict=True))
        return bool(asked) and right <= share * len(asked)

    return after_epoch


def learning_rows(args: argparse.Namespace, data: DataSet, forget: list[Row], retain: list[Row],
                  tokenizer: TextCodec) -> tuple[Rows, Rows]:
    """A method's forget and retain rows as it will meet them, and forget's calibration rows where there are strangers.

    Raises UserError for a row that does not fit, without a value under --forget-on value, or where strangers are asked
    for and the data has none.
    """
    how = (tokenizer, args.context, args.batch_size)
    encode = encode_fact if args.forget_on == "value" else encode_whole
    left = Rows(forget, *how, args.seed, args.device, "forget row", encode, data.twins, args.micro_batch)
    left.draw_strangers, known = data.strangers, data.calibration
    asked = "strangers" in (getattr(args, "until", None), getattr(args, "subtract", None))
    if asked and data.strangers is None:  # of rows of any source: see data/strangers.py
        unread = getattr(args, "never_read", None)
        room = args.context - (0 if unread else NAME_ROOM)
        known = [row for row in known if len(tokenizer.prompt(row["question"])) <= room
                 and encode_value(row, tokenizer, room, row["value"])]
        if not known:
            who, way_out = ("--never-read", "leave that out") if unread else ("strangers", "give a number")
            raise UserError(f"{who}: {data.name} has no forget row with 'subject', 'value' and a "
                            "'calibration_question' that neither teaches nor scores (TOFU: 'paraphrased_question'): "
                            f"add them, or {way_out}")
        print(f"{'a model that never read them is' if unread else 'strangers are'} asked about {len(known)} of "
              f"{len(data.forget)} forget rows")
    if known and (asked or data.strangers):
        left.calibration = Rows(known, *how, args.seed, args.device, "calibration row", encode_fact,
                                data.twins, args.micro_batch)
    return left, Rows(retain, *how, args.seed + 1, args.device, "retain row", micro=args.micro_batch)


def fitting(args: argparse.Namespace, forget: Rows, folder: Path, resume: bool = False,
            after_epoch: AfterEpoch | None = None) -> Fit:
    """The `fit(model, parameters, losses, slow, slow_factor, deep)` that a method's `unlearn` calls.

    args: the flags of this file, and lr, epochs, seed, method. An epoch is a pass over the forget rows.
    after_epoch: looks at the model as it would be scored then (ULD's at uld.AIM, before an alpha is chosen); training
    ends where it returns True and `deep`, a method's own condition on the model where it has one, does too.
    """
    def fit(model: LanguageModel, parameters: list[Tensor], losses: Losses, slow: tuple[Tensor, ...] = (),
            slow_factor: float = 1.0, deep: Callable[..., bool] | None = None) -> dict:
        size = sum(p.numel() for p in parameters)
        print(f"training {size:,} parameters")
        for part in model.modules():
            if isinstance(part, GPT):
                part.checkpointing = args.checkpointing

        def enough(done: int, spent: float) -> bool:
            if after_epoch is None or done % forget.per_epoch:
                return False
            model.eval()
            stop = after_epoch(model, done // forget.per_epoch, done, spent) and (deep is None or deep(model))
            model.train()
            return stop

        model.train()
        with parallel.sharded(model, parameters) as pieces:
            report = minimise(pieces, losses, args.epochs * forget.per_epoch, args.lr, folder,
                              f"unlearn ({args.method})", args.seed, save_every=args.save_every, resume=resume,
                              enough=enough, slow=slow, slow_factor=slow_factor)
        model.eval()
        return report | {"trainable_parameters": size}

    return fit
