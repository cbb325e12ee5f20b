"""Forget and retain losses: pure functions of logits, log-probabilities or hidden states, formula and source beside
each. None of them knows a model or a trainer; unlearn.py's two tables give them their names on the command line.

Shapes: B batch   T tokens   V vocabulary   D model width
    logits (B, T, V) any float dtype    labels (B, T) long, IGNORE (-100) where a position is not part of an answer
    mask (B, T) bool, True on real tokens    every loss is a float32 scalar; 0 where nothing is labelled
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import IGNORE


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at each position in float32, (B, T); 0 where the label is IGNORE."""
    kept = labels != IGNORE
    chosen = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return torch.where(kept, chosen, 0.0)


def row_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(answer | prompt) of each row: the *sum* over its answer tokens, (B,)."""
    return token_log_probs(logits, labels).sum(-1)


def answer_mean(values: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of (B, T) values over answer positions only, weighted by weights (B, T) where given; 0 where there are none.

    Divided by the number of positions either way: weights whose mean over the whole set is 1 leave the scale alone.
    """
    kept = labels != IGNORE
    return torch.where(kept, values if weights is None else weights * values, 0.0).sum() / kept.sum().clamp_min(1)


# ---- keep or learn ----------------------------------------------------------------------------------------------

def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood per answer token: learns. GD as a retain loss; ULD's equation 4 on D'_f."""
    return answer_mean(-token_log_probs(logits, labels), labels, weights)


def kl(logits: Tensor, reference_logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """KL(reference || model) per answer token, over the whole vocabulary (TOFU, arXiv 2401.06121, section 4.2)."""
    log_p, log_q = reference_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return answer_mean((log_p.exp() * (log_p - log_q)).sum(-1), labels, weights)


def uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution, -1/V sum_v log p(v), per answer token (ULD, arXiv 2406.08607, eq. 5).

    Never below log V, which it reaches where all logits are equal.
    """
    return answer_mean(-logits.float().log_softmax(-1).mean(-1), labels)


def hidden_distance(hidden: Tensor, reference_hidden: Tensor, mask: Tensor) -> Tensor:
    """RMU's own retain loss: mean squared distance to the frozen model's hidden states (arXiv 2403.03218, eq. 3)."""
    squared = (hidden.float() - reference_hidden.float()).square().mean(-1)  # (B, T)
    return squared[mask].sum() / mask.sum().clamp_min(1)


# ---- forget -----------------------------------------------------------------------------------------------------

def ga(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient ascent: minus the cross entropy. Not bounded below (TOFU, section 4.2). GA + GD is GDIFF."""
    return -cross_entropy(logits, labels)


def npo(log_prob: Tensor, reference_log_prob: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta log(p / p_ref)), mean over rows (NPO, arXiv 2404.05868, equation 3).

    log_prob, reference_log_prob: (B,) sums over answer tokens. At the reference: (2/beta) log 2. As beta -> 0 the
    gradient becomes that of GA on summed log-probabilities; a large beta stops pushing once p < p_ref.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (log_prob - reference_log_prob)).sum() / max(len(log_prob), 1)


def simnpo(log_prob: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2/beta) log sigmoid(-(beta/|y|) log p - gamma), mean over rows (SimNPO, arXiv 2410.07163).

    NPO without a reference: log-probability per token takes its place. log_prob (B,) sums; lengths (B,) tokens.
    """
    margin = -beta * log_prob / lengths.clamp_min(1) - gamma
    return -(2 / beta) * F.logsigmoid(margin).sum() / max(len(log_prob), 1)


def dpo(wanted: Tensor, wanted_reference: Tensor, unwanted: Tensor, unwanted_reference: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(beta (log-ratio of wanted - log-ratio of unwanted)), mean over rows.

    DPO (arXiv 2305.18290, equation 7) with a refusal wanted and the answer not, times 2/beta, so that without the
    wanted half it is NPO. All (B,): sums of log-probabilities over answer tokens.
    """
    ratio = (wanted - wanted_reference) - (unwanted - unwanted_reference)
    return -(2 / beta) * F.logsigmoid(beta * ratio).sum() / max(len(ratio), 1)


def deliberate_imagination(logits: Tensor, reference_logits: Tensor, labels: Tensor, offset: float) -> Tensor:
    """Cross entropy to the model's own earlier distribution with the right token pushed down (arXiv 2402.10052).

    `offset` is added to the reference's logits of all tokens but the label, per answer token; bounded below.
    """
    right = F.one_hot(labels.clamp_min(0), logits.shape[-1])
    imagined = (reference_logits.float() + offset * (1 - right)).softmax(-1)
    return answer_mean(-(imagined * logits.float().log_softmax(-1)).sum(-1), labels)


def rmu(hidden: Tensor, control: Tensor, mask: Tensor) -> Tensor:
    """Mean squared distance of hidden states to one fixed random direction (RMU, arXiv 2403.03218, equation 2).

    hidden (B, T, D) after one block; control (D,) = steering coefficient times a random unit vector.
    """
    return hidden_distance(hidden, control.expand_as(hidden), mask)
