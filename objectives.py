"""Forget and retain losses: each a formula, a pure function, and below it the class that the training loop calls.

    loss = FORGET["npo"](target, forget, args)      # made once, of the model before unlearning: what it must remember
    value = loss.of(model, forget, batch)           # every step, of what the model now makes of a batch of these rows

A new loss is a class of a few lines and an entry in FORGET or RETAIN at the end; its flags stand with it.

Shapes: B batch   T tokens   V vocabulary   D model width
    N answer positions of a batch, at least one: only these meet the head, so logits are (N, V), of any float dtype, and
    labels (N,) long are batch.answers; batch.labels (B, T) have them in their places, IGNORE (-100) elsewhere
    mask (B, T) bool, True on real tokens    every loss is a float32 scalar
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from belief import row_log_prob, strangers_belief
from data.batches import IGNORE
from errors import UserError
from flags import NATURAL, POSITIVE, WEIGHT, Flag
from interfaces import LanguageModel
from model import GPT, Trace

if TYPE_CHECKING:
    from data.batches import Batch, Rows


class Loss:
    """What the losses below share: nothing to remember, no flags."""

    FLAGS: tuple[Flag, ...] = ()  # read by this loss alone
    OVER = "answers"  # what it is a mean over, a field of data.batches.Share
    AS_STRANGERS = False  # of a forget loss: becomes like the world's strangers
    READS_TRACE = False  # hidden states or routing; if not, trace may be empty, and the last MLP run on answers alone
    RETAIN_WEIGHT: float | None = None  # of a forget loss: lambda beside it on small models; None: the method's, or 20

    def __init__(self, model: GPT, rows: Rows, args: argparse.Namespace):
        """model: as it was before unlearning, and it stays so; rows: those that the loss will be asked about."""

    def __call__(self, model: LanguageModel, logits: Tensor, trace: Trace, batch: Batch) -> Tensor:
        """The loss of a batch, a float32 scalar; logits (N, V) and trace are what model, as it is now, made of it."""
        raise NotImplementedError

    def of(self, model: LanguageModel, rows: Rows, batch: Batch) -> Tensor:
        """What a batch of these rows adds to a step's loss, from one pass of the model over it."""
        trace = Trace()
        logits = rows.run(model, batch, trace if self.READS_TRACE else None)
        return self(model, logits, trace, batch) * self.share(batch)

    def share(self, batch: Batch) -> float:
        """What to multiply the loss of a part of a step's batch by, so that the parts add up to the whole's loss."""
        return getattr(batch.share, self.OVER)


# ---- keep or learn ----------------------------------------------------------------------------------------------

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood per answer token: learns. As a retain loss it is GD."""
    return F.cross_entropy(logits.float(), labels)


class GD(Loss):
    """Go on learning the retain rows."""

    def __call__(self, model, logits, trace, batch):
        return cross_entropy(logits, batch.answers)


def kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || model) per answer token, over the whole vocabulary (TOFU, arXiv 2401.06121, section 4.2)."""
    log_p, log_q = reference_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()  # TOFU 4.2, KL


class KL(Loss):
    """Stay near the model as it was."""

    def __init__(self, model, rows, args):
        self.before, self.rows = model, rows

    def __call__(self, model, logits, trace, batch):
        with torch.no_grad():
            before = self.rows.run(self.before, batch)
        return kl(logits, before)


def uniform(logits: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution, -1/V sum_v log p(v), per answer token (ULD, arXiv 2406.08607, eq. 5).

    Never below log V, which it reaches where all logits are equal.
    """
    return -logits.float().log_softmax(-1).mean(-1).mean()


def uniform_beside(logits: Tensor, labels: Tensor) -> Tensor:
    """`uniform` over all tokens but the label, as if that could not be said.

    Never below log(V - 1). So a model may be sure of the label, and of nothing else in its place.
    """
    label = F.one_hot(labels, logits.shape[-1]).bool()
    log_p = logits.float().masked_fill(label, -math.inf).log_softmax(-1)
    return -log_p.masked_fill(label, 0.0).sum(-1).mean() / (logits.shape[-1] - 1)


class Uniform(Loss):
    """As a forget loss: every token alike. (ULD calls the function itself, on what is to be kept.)"""

    def __call__(self, model, logits, trace, batch):
        return uniform(logits)


# ---- forget -----------------------------------------------------------------------------------------------------

def ga(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient ascent: minus the cross entropy. Not bounded below (TOFU, section 4.2). GA + GD is GDIFF."""
    return -cross_entropy(logits, labels)  # TOFU 4.2, GA


class GA(Loss):
    """Alone, or with GD beside it as GDIFF."""

    RETAIN_WEIGHT = 100.0  # it never lets go, so what is kept has to be louder

    def __call__(self, model, logits, trace, batch):
        return ga(logits, batch.answers)


def npo(log_prob: Tensor, reference_log_prob: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta log(p / p_ref)), mean over rows (NPO, arXiv 2404.05868, equation 3).

    log_prob, reference_log_prob: (B,) sums over answer tokens. At the reference: (2/beta) log 2. As beta -> 0 the
    gradient becomes that of GA on summed log-probabilities; a large beta stops pushing once p < p_ref.
    """
    ratio = log_prob - reference_log_prob
    return -(2 / beta) * F.logsigmoid(-beta * ratio).mean()  # NPO (3)


class NPO(Loss):
    """A bounded GA. NPO sums over an answer's tokens and GD averages, so GD needs a weight to be heard.

    beta: UOE's paper has 0.001, NPO's on TOFU 0.1. On the small models 1: a row is let go once its answer is a few nats
    less likely than it was, where a small beta pushes on.
    --until strangers, with --forget-on value: a fact at or below the mean probability of strangers' has no gradient.
    Training ends with the slowest facts; those that went first would have sunk far below what a model thinks of facts
    that it never knew.
    """

    OVER = "rows"
    FLAGS: tuple[Flag, ...] = (Flag("--npo-beta", POSITIVE, 1.0, 0.1, "how soon a row that got less likely is let go"),)

    def __init__(self, model, rows, args):
        self.before, self.beta, self.enough = rows.each(model, row_log_prob), args.npo_beta, -math.inf
        if getattr(args, "until", "never") == "strangers" and args.forget_on == "value":
            self.enough = math.log(max(strangers_belief(model, rows.calibrating()).p, 1e-30))  # p may underflow to 0

    def __call__(self, model, logits, trace, batch):
        log_prob = row_log_prob(logits, batch.labels).clamp_min(self.enough)
        return npo(log_prob, self.before[batch.index], self.beta)


def simnpo(log_prob: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2/beta) log sigmoid(-(beta/|y|) log p - gamma), mean over rows (SimNPO, arXiv 2410.07163).

    NPO without a reference: log-probability per token takes its place. log_prob (B,) sums; lengths (B,) tokens.
    """
    return -(2 / beta) * F.logsigmoid(-beta * log_prob / lengths - gamma).mean()  # SimNPO


class SimNPO(Loss):
    """No reference, so nothing to remember."""

    OVER = "rows"
    FLAGS = (Flag("--simnpo-beta", POSITIVE, 2.5, 2.5, "as NPO's, per token"),
             Flag("--simnpo-gamma", WEIGHT, 0.0, 0.0, "margin by which an answer is to be unlikely"))

    def __init__(self, model, rows, args):
        self.beta, self.gamma = args.simnpo_beta, args.simnpo_gamma

    def __call__(self, model, logits, trace, batch):
        lengths = batch.scored.sum(-1)  # (B,)
        return simnpo(row_log_prob(logits, batch.labels), lengths, self.beta, self.gamma)


def dpo(wanted: Tensor, wanted_reference: Tensor, unwanted: Tensor, unwanted_reference: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(beta (log-ratio of wanted - log-ratio of unwanted)), mean over rows.

    DPO (arXiv 2305.18290, equation 7) with a refusal wanted and the answer not, times 2/beta, so that without the
    wanted half it is NPO. All (B,): sums of log-probabilities over answer tokens.
    """
    ratio = (wanted - wanted_reference) - (unwanted - unwanted_reference)
    return -(2 / beta) * F.logsigmoid(beta * ratio).mean()  # DPO (7)


class DPO(Loss):
    """A refusal ("I do not know.") is wanted, the answer is not: two passes a step, of the model that trains."""

    OVER = "rows"
    FLAGS = (Flag("--preference-beta", POSITIVE, 0.1, 0.1, "as NPO's"),)

    def __init__(self, model, rows, args):
        self.beta, self.refused = args.preference_beta, rows.refused(model)
        self.before, self.refused_before = rows.each(model, row_log_prob), self.refused.each(model, row_log_prob)

    def __call__(self, model, logits, trace, batch):
        refusal = self.refused.at(batch.index.tolist())
        wanted = row_log_prob(self.refused.run(model, refusal), refusal.labels)
        return dpo(wanted, self.refused_before[batch.index], row_log_prob(logits, batch.labels),
                   self.before[batch.index], self.beta)


def deliberate_imagination(logits: Tensor, reference_logits: Tensor, labels: Tensor, offset: float) -> Tensor:
    """Cross entropy to the model's own earlier distribution with the right token pushed down (arXiv 2402.10052).

    `offset` is added to the reference's logits of all tokens but the label, per answer token; bounded below.
    """
    right = F.one_hot(labels, logits.shape[-1])
    imagined = (reference_logits.float() + offset * (1 - right)).softmax(-1)
    return -(imagined * logits.float().log_softmax(-1)).sum(-1).mean()  # DI


class DI(Loss):
    """The distribution before, imagined without the right token."""

    FLAGS = (Flag("--di-offset", WEIGHT, 10.0, 10.0, "added to the logits of all tokens but the right one"),)

    def __init__(self, model, rows, args):
        self.before, self.rows, self.offset = model, rows, args.di_offset

    def __call__(self, model, logits, trace, batch):
        with torch.no_grad():
            before = self.rows.run(self.before, batch)
        return deliberate_imagination(logits, before, batch.answers, self.offset)


def hidden_distance(hidden: Tensor, reference_hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked-in tokens of the mean squared distance (arXiv 2403.03218, eq. 3); both (B, T, D)."""
    return (hidden.float() - reference_hidden.float()).square().mean(-1)[mask].mean()  # RMU (3)


def rmu(hidden: Tensor, control: Tensor, mask: Tensor) -> Tensor:
    """Mean squared distance of hidden states to one fixed random direction (RMU, arXiv 2403.03218, equation 2).

    hidden (B, T, D) after one block; control (D,) = steering coefficient times a random unit vector.
    """
    return hidden_distance(hidden, control.expand_as(hidden), mask)  # RMU (2)


STEERED = Flag("--rmu-layer", NATURAL, None, None, "whose output is steered; default: the expert's, or the middle")


def steered_layer(model: GPT, args: argparse.Namespace) -> int:
    return model.config.n_layer // 2 if args.rmu_layer is None else args.rmu_layer


class RMU(Loss):
    """The control vector: a random direction, so many times as long as the mean hidden state there. On answers alone:
    the first token's state is a hundred times as long as the others' in real models, and would own the mean.

    The paper's coefficients (6.5 to 32,000) are absolute and fit one model each; a multiple fits every model.
    """

    RETAIN_WEIGHT = 40.0
    READS_TRACE = True
    FLAGS = (Flag("--steering", POSITIVE, 4.0, 4.0, "length of the control vector, in mean hidden lengths"), STEERED)

    @torch.no_grad()
    def __init__(self, model, rows, args):
        self.layer = steered_layer(model, args)
        few, lengths = list(range(min(64, len(rows.examples)))), []
        for start in range(0, len(few), rows.micro or 64):
            batch, trace = rows.at(few[start : start + (rows.micro or 64)]), Trace()
            rows.run(model, batch, trace)
            lengths.append(trace.hidden[self.layer][batch.scored].float().norm(dim=-1))
        length = torch.cat(lengths).mean()
        u = torch.rand(model.config.d_model, generator=torch.Generator().manual_seed(args.seed)).to(model.device)
        self.control = args.steering * length * u / u.norm()  # (D,)

    def __call__(self, model, logits, trace, batch):
        return rmu(trace.hidden[self.layer], self.control, batch.scored)


class Hidden(Loss):
    """RMU's own retain loss: hidden states of retain rows stay where they were (equation 3)."""

    READS_TRACE = True
    FLAGS = (STEERED,)

    def __init__(self, model, rows, args):
        self.before, self.rows, self.layer = model, rows, steered_layer(model, args)

    def __call__(self, model, logits, trace, batch):
        before = Trace()
        with torch.no_grad():
            self.rows.run(self.before, batch, before)
        return hidden_distance(trace.hidden[self.layer], before.hidden[self.layer], batch.scored)


class Nothing(Loss):
    """No retain term: GA alone, NPO alone. The model is not even run."""

    def of(self, model, rows, batch):
        return torch.zeros((), device=batch.tokens.device)


class Stranger(Loss):
    """Become what the target is about a stranger: a forget loss that names its destination.

    KL(target on the row with a name nobody has || model on the row), per labelled token. Each row has a stranger of its
    own, not the mean of many: a model is surer of some than of others, and so it is to be of forgotten facts.
    Bounded. Positions agree because a stranger's name has as many tokens; it is not to be labelled itself, or it would
    be taught. Kin: Who's Harry Potter (arXiv 2310.02238).
    """

    RETAIN_WEIGHT = 5.0
    AS_STRANGERS = True

    def __init__(self, model, rows, args):
        twins, self.wanted = rows.as_strangers(), {}
        theirs, ours = ([[label == IGNORE for label in of.labels] for of in some.examples] for some in (twins, rows))
        if theirs != ours:
            raise UserError(f"--forget-loss {args.forget_loss} (uoe's default) needs names and values of one token a "
                            "word: leave out --vocab-size or --model, or take --forget-loss npo")
        for batch in twins.in_order():
            with torch.no_grad():
                probs = twins.run(model, batch).float().softmax(-1)  # (N, V)
            each = probs.split(batch.scored.sum(1).tolist())
            self.wanted |= dict(zip(batch.index.tolist(), each, strict=True))  # row number -> (its labelled tokens, V)

    def __call__(self, model, logits, trace, batch):
        log_q = logits.float().log_softmax(-1)  # (N, V)
        p = torch.cat([self.wanted[i] for i in batch.index.tolist()])  # (N, V)
        return (p * (p.clamp_min(1e-9).log() - log_q)).sum(-1).mean()  # Stranger


class StrangerNPO(NPO):
    """NPO away from the answer, and the stranger loss towards where it should end."""

    NPO_SHARE = 0.1
    AS_STRANGERS = True

    def __init__(self, model, rows, args):
        super().__init__(model, rows, args)
        self.towards = Stranger(model, rows, args)

    def __call__(self, model, logits, trace, batch):
        away = super().__call__(model, logits, trace, batch)
        towards = self.towards(model, logits, trace, batch) * (batch.share.answers / (batch.share.rows or 1.0))
        return towards + self.NPO_SHARE * away


# ---- by name ------------------------------------------------------------------------------------------------------

FORGET: dict[str, type[Loss]] = {"npo": NPO, "ga": GA, "simnpo": SimNPO, "dpo": DPO, "rmu": RMU, "di": DI,
                                 "uniform": Uniform, "stranger": Stranger, "stranger-npo": StrangerNPO}
RETAIN: dict[str, type[Loss]] = {"gd": GD, "kl": KL, "hidden": Hidden, "none": Nothing}
