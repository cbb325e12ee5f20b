"""Membership inference: can one tell from a model's probabilities that it was trained on a row?

Every attack gives a row one number, *larger where the row looks more like training data*; with l the mean negative
log-likelihood per answer token:
    loss        -l                                                   (Yeom et al., arXiv 1709.01604)
    zlib        -l / bytes of the zlib-compressed text               (Carlini et al., arXiv 2012.07805, section 5)
    min_k       mean of the lowest k share of log p(token)           (arXiv 2310.16789, equation 1)
    min_k++     the same of (log p(token) - mu) / sigma, where mu and sigma are mean and standard deviation of log p(z),
                z drawn from the model's own distribution at that position           (arXiv 2404.02936)
    reference   reference model's l - l                              (arXiv 2012.07805)
open-unlearning (arXiv 2506.12618) has the same five with the opposite sign, and turns its labels round to match.

auc: the chance that a row of the forget set (positive, "member") scores above a row of a holdout set that nobody was
trained on, ties counting half. 1 for a model that remembers, 0.5 where nothing can be told, below 0.5 where the forget
set has become *less* likely than unseen text, which tells just as much.

priv_leak (MUSE, arXiv 2407.06460): 100 (AUC_unlearned - AUC_retrained) / AUC_retrained, by min-k (MUSE: k = 0.4).
MUSE's code makes the *holdout* set the positive class, so its AUC is one minus ours (open-unlearning does the same
turn). We take AUCs in our sense, turn them, and so keep the sign of the published tables:
    below 0   the forget set is still recognised (under-unlearned); -100 for a target that tells every row apart
    0         as hard to tell as for a model that was retrained without the forget set
    above 0   the forget set stands out as unlikely (over-unlearned)
Forget and holdout rows must come from one distribution, or the AUC measures their difference instead.

Shapes: B batch   T tokens   V vocabulary   N answer tokens of a batch
    logits (B, T, V) any float dtype    labels (B, T) long, IGNORE (-100) where a position is not part of an answer
    log_probs (B, T) log p(label), as belief.token_log_probs gives it    every score is (B,) float32
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from belief import at_answers, in_place
from data.batches import IGNORE
from metrics.memorization import answer_lengths

# ---- attacks ----------------------------------------------------------------------------------------------------

def loss_score(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-l: mean log p over the answer tokens of each row. Raises ValueError for a row without an answer."""
    return log_probs.float().masked_fill(labels == IGNORE, 0).sum(-1) / answer_lengths(labels)


def zlib_score(log_probs: Tensor, labels: Tensor, texts: Sequence[str]) -> Tensor:
    """-l over the compressed size in bytes: a text that zlib shrinks well is likely without being memorised.

    texts: what the labels cover, one per row (open-unlearning: the answer, not the question).
    """
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts for {len(labels)} rows")
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return loss_score(log_probs, labels) / torch.tensor(sizes, device=log_probs.device)


def min_k(values: Tensor, labels: Tensor, k: float = 0.2) -> Tensor:
    """Mean of the lowest int(k n) of a row's n values at answer positions, at least one (arXiv 2310.16789, eq. 1).

    values (B, T): log_probs, or for min-k++ what standardised returns.  k: a share in (0, 1].
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is a share above 0 and at most 1, not {k}")
    count = (answer_lengths(labels).double() * k).long().clamp_min(1)
    lowest = values.float().masked_fill(labels == IGNORE, torch.inf).sort(-1).values
    taken = torch.arange(labels.shape[-1], device=labels.device) < count[:, None]
    broken = (values.isnan() & (labels != IGNORE)).any(-1)  # a NaN sorts last, and would look like certainty
    return (torch.where(taken, lowest, 0.0).sum(-1) / count).masked_fill(broken, torch.nan)


def standardised(logits: Tensor, labels: Tensor) -> Tensor:
    """(log p(label) - mu) / sigma at each answer position, (B, T) float32, 0 elsewhere (arXiv 2404.02936).

    mu = sum_v p_v log p_v, sigma^2 = sum_v p_v (log p_v - mu)^2 over the vocabulary. sigma^2 is at least 1e-6, as in
    open-unlearning: a uniform distribution scores 0, a certain one is no division by zero.
    """
    scored, answers = at_answers(logits, labels)
    log_p = scored.float().log_softmax(-1)  # (N, V)
    p = log_p.exp()
    finite = log_p.masked_fill(p == 0, 0)  # p log p -> 0, also where a filter left logits of -inf
    mu = (p * finite).sum(-1)
    variance = (p * (finite - mu[:, None]).square()).sum(-1)
    chosen = log_p.gather(-1, answers[:, None])[:, 0]
    return in_place((chosen - mu) / variance.clamp_min(1e-6).sqrt(), labels)


def min_k_plus_plus(logits: Tensor, labels: Tensor, k: float = 0.2) -> Tensor:
    """Min-k% of the standardised log-probabilities (arXiv 2404.02936)."""
    return min_k(standardised(logits, labels), labels, k)


# ---- from scores to one number ----------------------------------------------------------------------------------

def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """P(member > non-member) + P(equal) / 2 over all pairs, from ranks (Mann-Whitney U / (n m)).

    Raises ValueError where a side is empty or a score is NaN; -inf and inf are scores like others.
    """
    scores = np.concatenate([np.asarray(members, dtype=float), np.asarray(non_members, dtype=float)])
    n, m = len(members), len(non_members)
    if not n or not m or np.isnan(scores).any():
        raise ValueError("an AUC needs scores of members and of non-members, none of them NaN")
    return float((rankdata(scores)[:n].sum() - n * (n + 1) / 2) / (n * m))


def priv_leak(unlearned: float, retrained: float) -> float:
    """MUSE's PrivLeak in percent, from two AUCs as auc gives them: members are the forget set.

    Negative: still recognised. Positive: over-unlearned. See the top of this file. Raises ValueError for an AUC
    outside [0, 1], or where the retrained model tells every row apart, which leaves nothing to compare with.
    """
    for value in (unlearned, retrained):
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not an AUC: it lies outside 0 to 1")
    if retrained == 1:
        raise ValueError("the retrained model's AUC is 1: forget and holdout rows are not from one distribution")
    ours, theirs = 1 - unlearned, 1 - retrained  # holdout as the positive class, as in MUSE's code
    return 100 * (ours - theirs) / theirs
