"""How much of an answer or a passage a model still knows word for word.

Two ways to ask. Under teacher forcing, one forward pass per row and no generation:
    exact memorization    share of answer tokens y^k with argmax p(. | x, y^<k) = y^k
    extraction strength   1 - k/n, k the fewest of the n answer tokens to be given so that greedy decoding adds the rest
The first is Tirumala et al.'s (arXiv 2205.10770), the second Carlini et al.'s (arXiv 2012.07805), both brought to
unlearning by Wang et al. (arXiv 2406.09179); formulas as in open-unlearning (arXiv 2506.12618, appendix C.3). The
second needs no decoding: as long as every token is right, greedy decoding walks along the answer itself, so it adds
the rest of the answer exactly where every argmax of the rest is right. In other words: the share of the right tail.

By completion: cut a passage (split_prefix), let the model go on greedily from the prefix, compare the strings:
    bleu      0 to 100, as ULD scores Harry Potter after a prefix of 200 tokens (arXiv 2406.08607)
    rouge_l   0 to 1; F1 is ULD's there and the verbatim memorization of MUSE (arXiv 2407.06460), recall is TOFU's

All of them: larger is more memory, so after unlearning small on the forget set. What a model scores that never saw
the rows is the mark to reach, not 0. All are per row; an average over rows is the caller's.

Where others differ. open-unlearning scores the answer without its end token: pass labels through without_end first.
Its code stops one short of k = n, so that a row whose last token is wrong has extraction strength 1/n where the
formula has 0: pass floor=True to compare with its numbers. Its ROUGE stems words, MUSE's own and ULD's do not.

Shapes: B batch   T tokens   V vocabulary
    logits (B, T, V) any float dtype    labels (B, T) long, IGNORE (-100) where a position is not part of an answer
"""

from collections.abc import Sequence
from typing import NamedTuple

import sacrebleu
import torch
from rouge_score import rouge_scorer
from torch import Tensor

from belief import at_answers, in_place
from data.batches import IGNORE


class RougeL(NamedTuple):
    """Longest common subsequence in words, as a share of the reference (recall), and with the generation's (F1)."""

    recall: float
    f1: float


# ---- under teacher forcing --------------------------------------------------------------------------------------

def exact_memorization(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of each row's answer tokens whose argmax is right, (B,) float32 (arXiv 2506.12618, C.3, EM).

    Raises ValueError for a row without an answer.
    """
    lengths = answer_lengths(labels)
    return right_tokens(logits, labels).sum(-1) / lengths


def extraction_strength(logits: Tensor, labels: Tensor, floor: bool = False) -> Tensor:
    """1 - k/n per row, (B,) float32: 1 where nothing has to be given, 0 where the last token is wrong (C.3, ES).

    floor: at least 1/n, as open-unlearning's code has it.  Raises ValueError for a row without an answer.
    """
    lengths = answer_lengths(labels)
    # from the right: 1 until the first wrong answer token, 0 from there on; what is no answer breaks nothing
    unbroken = (right_tokens(logits, labels) | (labels == IGNORE)).flip(-1).long().cumprod(-1).flip(-1)
    tail = (unbroken * (labels != IGNORE)).sum(-1)
    return (tail.clamp_min(1) if floor else tail) / lengths


def right_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the argmax is the label, (B, T) bool; False outside the answer. Of equal logits the first is taken.

    logits: of all positions (B, T, V), or of the answers alone (N, V).
    """
    scored, answers = at_answers(logits, labels)
    return in_place((scored.argmax(-1) == answers).float(), labels).bool()


def answer_lengths(labels: Tensor) -> Tensor:
    """Answer tokens of each row, (B,) long. Raises ValueError naming the first row that has none."""
    lengths = (labels != IGNORE).sum(-1)
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise ValueError(f"row {int(empty[0])} of the batch has no answer token: nothing to score")
    return lengths


def without_end(labels: Tensor) -> Tensor:
    """Labels with the last answer token of each row (its end token) set to IGNORE, (B, T)."""
    kept = labels != IGNORE
    is_last = kept & (kept.flip(-1).long().cumsum(-1).flip(-1) == 1)
    return torch.where(is_last, IGNORE, labels)


# ---- by completion ----------------------------------------------------------------------------------------------

def split_prefix(ids: Sequence[int], prefix_tokens: int) -> tuple[list[int], list[int]]:
    """A passage as what is given and what is to be completed. Raises ValueError where one of them would be empty."""
    if not 0 < prefix_tokens < len(ids):
        raise ValueError(f"a prefix of {prefix_tokens} tokens leaves nothing to complete or nothing to begin with: "
                         f"the passage has {len(ids)}")
    return list(ids[:prefix_tokens]), list(ids[prefix_tokens:])


def bleu(references: Sequence[str], generations: Sequence[str]) -> list[float]:
    """BLEU-4 of each generation against its reference, 0 to 100 (sacrebleu's defaults, a corpus of one row each).

    Its mean over rows is the number in ULD's tables; BLEU of all rows as one corpus is another number. 0 for a
    generation of fewer than four words, however right it is: BLEU is for passages, not for short answers.
    """
    return [sacrebleu.corpus_bleu([g], [[r]]).score for r, g in zip(references, generations, strict=True)]


def rouge_l(references: Sequence[str], generations: Sequence[str], stem: bool = False) -> list[RougeL]:
    """ROUGE-L of each generation, recall and F1, 0 to 1; words in lower case. stem: Porter's stems, as TOFU does."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(r, g)["rougeL"] for r, g in zip(references, generations, strict=True)]
    return [RougeL(score.recall, score.fmeasure) for score in scores]
