"""The methods that ULD and UOE are compared with, by the same interface as theirs: a function each, and a table.

    full         all weights                                              TOFU (arXiv 2401.06121), and everybody
    lora         low-rank changes of all linear layers                    arXiv 2106.09685
    esft         per layer the experts that carry a share of the affinity arXiv 2407.01906
    offset       an assistant trained through the target's logits         arXiv 2404.11045
    divergence   two assistants, one of which never saw the forget set    arXiv 2605.31293

What they forget and keep by is objectives.py's: --forget-loss and --retain-loss. To add a method, write a function
like `full` and give it a line in METHODS.

Shapes: B batch   T tokens   V vocabulary
"""

import argparse
import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

import uld
import uoe
from data.batches import Rows
from errors import UserError
from flags import COUNT, POSITIVE, SHARE, WEIGHT, Flag
from interfaces import LanguageModel, Method
from loop import UNTIL, Fit, Losses
from model import GPT, Config, Trace, sharing
from objectives import FORGET, RETAIN, cross_entropy

Unlearned = tuple[LanguageModel, dict[str, GPT], dict]  # what is scored, folder name -> what is kept, report


def training(lr: tuple[float, float], epochs: tuple[int, int]) -> list[Flag]:
    """The flags that every method here has: (small models, public models) each."""
    return [Flag("--lr", POSITIVE, *lr, "peak learning rate"),
            Flag("--epochs", COUNT, *epochs, "passes over the forget set, at most")]


def forget_and_keep(model: LanguageModel, target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace) -> Losses:
    """The losses(step) of most methods: forget + lambda * retain, whatever trains."""
    forget_loss = FORGET[args.forget_loss](target, forget, args)
    retain_loss = RETAIN[args.retain_loss](target, retain, args)

    def losses(step: int) -> Iterator[dict[str, Tensor]]:
        for batch in forget.parts(step):
            f = forget_loss.of(model, forget, batch)
            yield {"forget": f, "loss": f}
        for batch in retain.parts(step):
            r = retain_loss.of(model, retain, batch)
            yield {"retain": r, "loss": args.retain_weight * r}

    return losses


ON_CPU = Flag("--target-on-cpu", bool, False, False, "the target waits on the CPU; losses that ask it ask it there")


class OnCPU:
    """A model that waits on the CPU and is asked from another device, `of`: what losses need of the target."""

    def __init__(self, model: GPT, of: torch.device):
        self.model, self.config, self.device = model.cpu(), model.config, of

    def __call__(self, tokens: Tensor, trace: Trace | None = None, at: Tensor | None = None) -> Tensor:
        logits = self.model(tokens.cpu(), trace=trace, at=None if at is None else at.cpu())
        if trace is not None:
            trace.hidden = {layer: x.to(self.device) for layer, x in trace.hidden.items()}
        return logits.to(self.device)


def full(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
    """All weights: a second model beside the target, which can wait on the CPU."""
    device = target.device
    model = copy.deepcopy(target).requires_grad_(True)
    before = cast(GPT, OnCPU(target, device)) if args.target_on_cpu else target
    report = fit(model, list(model.parameters()), forget_and_keep(model, before, forget, retain, args))
    target.to(device)
    return model, {"model": model}, report


def lora(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit,
         targets: str = "all") -> Unlearned:
    """Low-rank changes; targets: all linear layers, or those of attn or mlp."""
    model = sharing(target)
    parameters = uld.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, targets)
    report = fit(model, parameters, forget_and_keep(model, target, forget, retain, args))
    merged = uld.merge_lora(model)
    return merged, {"model": merged}, report


def esft(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
    """In every layer the fewest experts that carry a share p of the affinity; no router, no anchor."""
    affinity = uoe.expert_attribution(target, forget.in_order()).cpu()
    places = experts_reaching(affinity, args.esft_p)
    print(uoe.affinity_table(affinity, chosen=places))
    model = sharing(target)
    parameters = uoe.isolate(model, places, train_router=False)
    lowest = min(layer for layer, _ in places)
    forget.keep_stems(target, lowest)
    retain.keep_stems(target, lowest)
    args = uoe.steering(args, places)
    report = fit(model, parameters, forget_and_keep(model, target, forget, retain, args))
    return model, {"model": model}, report | {"unlearned_experts": [list(place) for place in places]}


def experts_reaching(affinity: Tensor, p: float) -> list[uoe.Place]:
    """ESFT's choice (section 3.3): per layer the fewest experts whose shares of affinity (L, E) sum to p."""
    places = []
    for layer, row in enumerate(affinity):
        if row.isnan().any():  # no experts there
            continue
        share, order = (row / row.sum().clamp_min(1e-12)).sort(descending=True)
        enough = int((share.cumsum(0) < p - 1e-6).sum()) + 1  # ESFT 3.3
        places += [(layer, int(expert)) for expert in order[:enough]]
    return places


def offset(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
    """The usual losses on l_target + alpha (l_assistant - l_assistant at the start), whose assistant alone trains."""
    layers = uld.assistant_depth(args, target.config)
    assistant = uld.build_assistant(target, layers, args.lora_rank, args.lora_alpha, args.lora_dropout)
    before = uld.first_layers(target, layers)
    frozen = sharing(target)  # so that its pass keeps nothing for a gradient
    model = LogitOffset(frozen, assistant, before, args.offset_alpha)
    parameters = [p for p in assistant.parameters() if p.requires_grad]
    report = fit(model, parameters, forget_and_keep(model, target, forget, retain, args))
    merged = uld.merge_lora(assistant)
    return LogitOffset(target, merged, before, args.offset_alpha), {"assistant": merged, "before": before}, report


def divergence(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
    """Two assistants learn, one from the retain rows alone and one from both sets; their difference is added."""
    layers = uld.assistant_depth(args, target.config)
    without, seen = (uld.build_assistant(target, layers, args.lora_rank, args.lora_alpha, args.lora_dropout)
                     for _ in range(2))

    def losses(step: int) -> Iterator[dict[str, Tensor]]:
        for batch in forget.parts(step):
            f = cross_entropy(seen(batch.tokens, at=batch.scored), batch.answers) * batch.share.answers
            yield {"forget": f, "loss": f}
        for batch in retain.parts(step):
            for part in (without, seen):
                r = cross_entropy(part(batch.tokens, at=batch.scored), batch.answers) * batch.share.answers
                yield {"retain": r, "loss": args.retain_weight * r}

    parameters = [p for part in (without, seen) for p in part.parameters() if p.requires_grad]
    report = fit(LogitOffset(target, without, seen, args.offset_alpha), parameters, losses)
    kept = {"without": uld.merge_lora(without), "with": uld.merge_lora(seen)}
    return LogitOffset(target, kept["without"], kept["with"], args.offset_alpha), kept, report


class LogitOffset(uld.SeveralModels):
    """l = l_target + alpha (l_plus - l_minus), a model like any other.

    Offset unlearning (equation 2): plus is an assistant, minus the same before it unlearnt.
    Divergence decoding: plus has not seen the forget set, minus has.
    """

    def __init__(self, target: GPT, plus: GPT, minus: GPT, alpha: float = 1.0):
        super().__init__(target, plus, minus)
        self.alpha = alpha

    def combine(self, target: Tensor, plus: Tensor, minus: Tensor, said: bool = False) -> Tensor:
        return target + self.alpha * (plus - minus)  # Offset (2)


def no_hidden_states(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError where an offset model would be steered: it has no hidden states of its own."""
    uld.check(args, config)
    if args.forget_loss == "rmu" or args.retain_loss == "hidden":
        raise UserError("--method offset has no hidden states of its own to steer: --forget-loss npo, say")


OFFSET_ALPHA = Flag("--offset-alpha", WEIGHT, 1.0, 1.0, "weight of the difference that is added")
METHODS = {
    "full": Method(full, [*training((1e-4, 1e-5), (80, 5)), UNTIL, ON_CPU], arch="moe", retain_weight=5.0),
    "lora": Method(lora, [*training((1e-3, 1e-4), (80, 5)), UNTIL, *uld.LORA], arch="moe", retain_weight=5.0),
    "esft": Method(esft, [*training((1e-3, 1e-5), (80, 5)), UNTIL,
                          Flag("--esft-p", SHARE, 0.15, 0.15, "share of a layer's affinity that its experts reach")],
                   arch="moe", needs_experts=True, retain_weight=5.0),
    "offset": Method(offset, [*training((3e-3, 1e-4), (80, 5)), UNTIL, uld.DEPTH, *uld.LORA, OFFSET_ALPHA], arch="gpt",
                     check=no_hidden_states,
                     reopen=lambda target, parts, config: LogitOffset(target, parts["assistant"], parts["before"],
                                                                      config["offset_alpha"])),
    "divergence": Method(divergence, [*training((3e-3, 1e-3), (20, 10)), uld.DEPTH, *uld.LORA, OFFSET_ALPHA,
                                      Flag("--retain-weight", WEIGHT, 1.0, 1.0, "of what both assistants learn")],
                         arch="gpt", losses=("ce", "gd"), check=uld.check,
                         reopen=lambda target, parts, config: LogitOffset(target, parts["without"], parts["with"],
                                                                          config["offset_alpha"])),
}
