"""TOFU's measures (arXiv 2401.06121): probability, ROUGE-L recall, truth ratio, model utility, forget quality.

All functions take losses and strings, never a model.  l(a) is the mean negative log-likelihood per answer token
given the question (nats), p(a) = exp(-l(a)).

Two definitions of the truth ratio circulate; published tables use the first, and so do we unless asked:
    losses         exp( l(right) - mean_i l(wrong_i) )      TOFU's aggregation script, open-unlearning
    probabilities  mean_i p(wrong_i) / p(right)             the paper's formula
Both are wrong over right: near 0 where the model knows better, 1 where it cannot tell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from errors import UserError
from flags import Number
from schema import misfit, read_json

DEFINITIONS = ("losses", "probabilities")
OPTIONS = ("real_authors", "world_facts")  # sets whose probability is normalised over the options


class ForgetQuality(NamedTuple):
    """Two-sample Kolmogorov-Smirnov test. p depends on n as much as on D: compare p only at one n."""

    p: float
    D: float
    n: int


@dataclass
class RowScores:
    """What a model made of one scored set; one entry per row, losses in nats per token."""

    loss: list[float]  # of the answer
    right: list[float] = field(default_factory=list)  # of the paraphrased answer, or the answer where there is none
    wrong: list[list[float]] = field(default_factory=list)  # of each wrong answer; their number may differ by row
    rougeL: list[float] = field(default_factory=list)  # recall of the greedy answer
    exact: list[bool] = field(default_factory=list)  # greedy answer equals the answer
    said: list[str] = field(default_factory=list)  # the greedy answers
    facts: list[int] = field(default_factory=list)  # which fact each row is about (data/values.py); empty: its own
    known: dict[str, float | int | None] = field(default_factory=dict)  # metrics/knowledge.py's numbers of the set
    answers: list[str] = field(default_factory=list)  # the right answers: whether two models were asked the same

    def truth_ratios(self, definition: str = "losses") -> list[float]:
        """Of every row that has wrong answers."""
        pairs = zip(self.right, self.wrong, strict=True) if self.wrong else ()
        return [truth_ratio(r, w, definition) for r, w in pairs if w]

    def fact_ratios(self) -> list[float]:
        """Truth ratios, one per fact: the mean over its rows. Rows about one fact are no independent observations."""
        of: dict[int, list[float]] = {}
        for i, (right, wrong) in enumerate(zip(self.right, self.wrong, strict=True)):
            if wrong:
                of.setdefault(self.facts[i] if self.facts else i, []).append(truth_ratio(right, wrong))
        return [sum(ratios) / len(ratios) for ratios in of.values()]

    def summary(self, name: str, definition: str = "losses") -> dict[str, float | int | None]:
        """The set's numbers as metrics.json has them. name decides how truth ratio and probability are read."""
        ratios = self.truth_ratios(definition)
        wrong = self.wrong if name in OPTIONS and ratios else [None] * len(self.loss)
        out = {"loss": mean(self.loss),  # a row that has no options is read by its own probability
               "probability": mean([probability(r, w or None) for r, w in zip(self.loss, wrong, strict=True)]),
               "rougeL_recall": mean(self.rougeL),
               "truth_ratio": set_truth_ratio(ratios, name == "forget") if ratios else None}
        return self.known | out | ({"exact": mean(self.exact)} if self.exact else {})


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def probability(loss: float, wrong: Sequence[float] | None = None) -> float:
    """p(answer), or with wrong answers p(answer) / (p(answer) + sum_i p(wrong_i)) (section 2.2.1)."""
    if wrong is None:
        return math.exp(-loss)
    return 1 / (1 + sum(exp(loss - w) for w in wrong))


def exp(x: float) -> float:
    """math.exp, but inf where that overflows: a model that was driven to absurd losses is still to be scored."""
    return math.inf if x >= 700 else math.exp(x)  # in this order, so that NaN stays NaN


def truth_ratio(right: float, wrong: Sequence[float], definition: str = "losses") -> float:
    """Wrong over right of one row (section 2.2.1, equation 1), by either definition at the top of this file.

    Raises ValueError for no wrong answers or another definition.
    """
    if not len(wrong):
        raise ValueError("a truth ratio needs at least one wrong answer")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r} is not one of {', '.join(DEFINITIONS)}")
    if definition == "losses":
        return exp(right - sum(wrong) / len(wrong))
    return sum(exp(right - w) for w in wrong) / len(wrong)  # TOFU (1)


def set_truth_ratio(ratios: Sequence[float], forget: bool) -> float:
    """mean min(r, 1/r) on the forget set, 1 where it cannot tell; mean max(0, 1 - r) elsewhere, 1 where it knows."""
    r = np.asarray(ratios, dtype=float)
    if forget:
        with np.errstate(divide="ignore"):
            return float(np.minimum(r, 1 / r).mean())
    return float(np.maximum(0, 1 - r).mean())


def forget_quality(unlearned: Sequence[float], reference: Sequence[float]) -> ForgetQuality:
    """Two-sided KS test between truth ratios of the unlearned and of the retain-only model (section 2.2.2).

    Raises ValueError where a list is empty or holds a NaN: scipy would return a number.
    """
    for values in (unlearned, reference):
        if not len(values) or np.isnan(values).any():
            raise ValueError("forget quality needs truth ratios of both models, none of them NaN")
    test = ks_2samp(unlearned, reference)  # TOFU 2.2.2
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(unlearned))


def model_utility(numbers: Sequence[float]) -> float:
    """Harmonic mean (section 2.2.1); 0 as soon as one is. TOFU: 3 measures x retain, real authors, world facts."""
    if not len(numbers) or min(numbers) < 0:
        raise ValueError("model utility needs numbers of at least 0")
    if any(math.isnan(x) for x in numbers):
        return math.nan
    return 0.0 if min(numbers) == 0 else len(numbers) / sum(1 / x for x in numbers)  # TOFU 2.2.1


def utility_of(summaries: dict[str, dict], sets: Sequence[str]) -> float:
    """Model utility over the three measures of the given sets, leaving out what a set has no rows for."""
    numbers = [summaries[name][key] for name in sets for key in ("probability", "rougeL_recall", "truth_ratio")]
    return model_utility([x for x in numbers if x is not None])


# ---- published logs ---------------------------------------------------------------------------------------------

LOG_SETS = {"retain": "eval_log.json", "forget": "eval_log_forget.json",
            "real_authors": "eval_real_author_wo_options.json", "world_facts": "eval_real_world_wo_options.json"}
LOSS, SHARE = Number(0, 1e9), Number(0, 1)  # nats per token
LOG_SET = {"avg_gt_loss": ([LOSS], {str: LOSS}), "avg_paraphrased_loss": ([LOSS], {str: LOSS}),
           "average_perturb_loss": ([[LOSS]], {str: [LOSS]}), "rougeL_recall": ([SHARE], {str: SHARE}),
           "generated_text?": ([[str]], {str: [str]})}  # prompt, generation, right answer
LOG = {key: LOG_SET for key in LOG_SETS.values()}
BY_INDEX = {"value_by_index": {str: {"avg_loss?": (LOSS, [LOSS]), "rougeL_recall?": SHARE}}}
OPEN_SETS = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
OPEN_LOG = {f"{short}_Q_A_{what}?": BY_INDEX for short in OPEN_SETS.values()
            for what in ("Prob", "PARA_Prob", "PERT_Prob", "ROUGE")}


def read_log(path: Path) -> dict[str, RowScores]:
    """Set name -> scores, from TOFU's eval_log_aggregated.json or open-unlearning's TOFU_EVAL.json.

    Raises UserError naming the file and what is wrong.
    """
    way_out = "give an eval_log_aggregated.json or a TOFU_EVAL.json"
    log = read_json(path, dict, way_out)
    is_open = any("Q_A_" in key for key in log)
    if fault := misfit(log, OPEN_LOG if is_open else LOG):
        raise UserError(f"{path} {fault}: {way_out}")
    try:
        out = _open_sets(log) if is_open else _sets(log)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {error}: {way_out}") from None
    for name, scores in out.items():
        lengths = {len(scores.right), len(scores.wrong)}
        lengths |= {len(of) for of in (scores.loss, scores.rougeL, scores.answers) if of}
        if len(lengths) != 1 or not all(scores.wrong):
            raise UserError(f"{path}: '{name}' has {len(scores.right)} right and {len(scores.wrong)} wrong answers, "
                            f"{len(scores.loss)} losses and {len(scores.rougeL)} answers given, and each row "
                            "needs one: it is cut off")
    return out


def check_comparable(ours: RowScores, theirs: RowScores, what: str) -> None:
    """Raises UserError, beginning with `what`, for scores of other rows, or of one model with themselves."""
    if len(ours.right) != len(theirs.right):
        raise UserError(f"{what}: {len(ours.right)} forget rows against {len(theirs.right)}: give logs of the same "
                        "rows")
    if ours.answers and theirs.answers and ours.answers != theirs.answers:
        place = next(i for i, (a, b) in enumerate(zip(ours.answers, theirs.answers, strict=True)) if a != b)
        raise UserError(f"{what}: forget row {place + 1} is another in each: give logs of the same rows")
    if (ours.right, ours.wrong) == (theirs.right, theirs.wrong):
        raise UserError(f"{what}: the very same losses, so one model is compared with itself: give another's")


def _in_order(values: dict | list) -> list:
    """Some logs hold {"0": ..., "1": ...} where others hold a list. Raises ValueError for a key that is no number."""
    return [values[key] for key in sorted(values, key=int)] if isinstance(values, dict) else values


def _sets(log: dict) -> dict[str, RowScores]:
    """Of an eval_log_aggregated.json."""
    out = {}
    for name, key in LOG_SETS.items():
        # on the two real sets "paraphrased" is the answer itself, scored a second time in another batch
        loss, right, wrong, rouge = (_in_order(log[key][field]) for field in (
            "avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall"))
        answers = [texts[-1] for texts in _in_order(log[key].get("generated_text", [])) if texts]
        out[name] = RowScores(loss, right, wrong, rouge, answers=answers)
    return out


def _open_sets(log: dict) -> dict[str, RowScores]:
    """TOFU_EVAL.json: per measure {"value_by_index": {"0": {"avg_loss": ...}}}; sets that it lacks are left out."""
    def values(name: str, key: str) -> list:
        if name not in log:
            raise KeyError(f"it lacks {name}")
        return [row[key] for row in _in_order(log[name]["value_by_index"])]

    def plain(losses: list) -> list[float]:  # one paraphrase per row, as itself or as a list of one
        return [float(np.mean(loss)) for loss in losses]

    out = {}
    for name, short in OPEN_SETS.items():
        right = f"{short}_Q_A_Prob" if name in OPTIONS else f"{short}_Q_A_PARA_Prob"
        if name != "forget" and not {right, f"{short}_Q_A_PERT_Prob", f"{short}_Q_A_Prob"} <= log.keys():
            continue
        rights = plain(values(right, "avg_loss"))
        wrong = [list(np.atleast_1d(loss)) for loss in values(f"{short}_Q_A_PERT_Prob", "avg_loss")]
        loss = plain(values(f"{short}_Q_A_Prob", "avg_loss")) if f"{short}_Q_A_Prob" in log else []
        rouge = values(f"{short}_Q_A_ROUGE", "rougeL_recall") if f"{short}_Q_A_ROUGE" in log else []
        out[name] = RowScores(loss, rights, wrong, rouge)
    return out
