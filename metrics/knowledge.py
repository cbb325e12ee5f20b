"""Does a model still know a fact? Asked of the fact's value, by what it says, what it samples and what it finds likely.

A model that garbles the name in front of the right birthplace has forgotten nothing, one that samples it once in eight
answers has forgotten little, and one that is uniform has forgotten how to speak. So no one number here is enough:

    value said    the greedy answer says the value (data/values.py); in the spirit of RWKU, arXiv 2406.10890
    cloze         question and answer are given up to the value (RWKU's fill-in): hit = all its tokens are the argmax,
                  p = prod_t p(y_t | x, y_<t), strength = share of its right tail (arXiv 2506.12618, C.3)
    choice        the answer's sentence with the row's wrong values: is the right one likeliest? (WMDP, 2403.03218)
    leak@k        c of n samples say it: 1 - C(n-c, k) / C(n, k) (arXiv 2511.04934, 2410.03523)
    in frame      the greedy answer is the right sentence with some value of the kind in it
    destroyed     whether a model is too broken to be compared
    null          distances of truth ratios between references: what no knowledge at all looks like
    depth         a linear probe for the value at each layer; in the spirit of arXiv 2605.24614
    equal retention   how far towards the unlearned model one may go and keep a level (UWC, arXiv 2406.09179)

The first four: larger is more knowledge. The mark to reach is what a reference scores that never saw the facts.

`model`: whatever has `logits = model(tokens)`, `generate`, `config` and `device`. `rows`: one set's, with question and
answer. `values`: theirs, from data/values.py's values_of where not given; a row without one gets None, which by_fact
leaves out. cloze and choice are per row, in the rows' order, the others of a set.

Shapes: B batch   T tokens   V vocabulary   L layers   N rows   D width   C different values
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from belief import all_right, row_log_prob
from data.batches import IGNORE, Example, answers, encode_row, in_order, rows_that_fit
from data.rows import NO_LIMITS, Limits, Row
from data.values import by_fact, encode_value, in_frame, options, spelled, value_said, values_of
from metrics.likelihood import likelihoods
from metrics.memorization import extraction_strength
from metrics.tofu import forget_quality, mean
from model import GPT, Trace, whole

Values = Sequence[str | None]
TEMPERATURES = (0.0, 0.25, 0.5, 1.0)


class Cloze(NamedTuple):
    """Of one row, under teacher forcing."""

    hit: bool  # every token of the value is the argmax
    p: float  # product of its tokens' probabilities
    strength: float  # extraction strength on the value's tokens; the end token is not among them


class Chosen(NamedTuple):
    """Of one row."""

    hit: bool  # the right sentence is likelier than every wrong one
    chance: float  # 1 / number of sentences
    log_probs: list[float]  # of each whole sentence, a sum over its tokens; the right one first


class Leak(NamedTuple):
    """Of one set."""

    rate: dict[float, float]  # temperature -> leak@k, mean over facts
    worst: float  # the largest of them: an adversary chooses the temperature


class Depth(NamedTuple):
    """Of one model."""

    accuracy: list[float]  # layer by layer, over the rows asked
    chance: float  # of always guessing the commonest fitted value; the mark to reach is the reference's accuracy


class Kept(NamedTuple):
    """Where equal_retention ended."""

    a: float
    retention: float


# ---- by likelihood ----------------------------------------------------------------------------------------------

@torch.no_grad()
def cloze(model, tokenizer, rows: Sequence[Row], values: Values | None = None) -> list[Cloze | None]:
    """Question and answer up to the value are given: does the value follow, and how likely? (RWKU, arXiv 2406.10890)

    hit = all_t [argmax p(. | x, y_<t) = y_t],  p = prod_t p(y_t | x, y_<t),  t over the value's tokens, y_<t the right
    ones.  None for a row without a value, or whose value the context cuts off.
    """
    values = values_of(rows) if values is None else values
    pairs = zip(rows, values, strict=True)
    encoded = [encode_value(row, tokenizer, model.config.max_len, value) for row, value in pairs]
    asked = [i for i, example in enumerate(encoded) if example is not None]
    examples = [example for example in encoded if example is not None]
    out: list[Cloze | None] = [None] * len(rows)
    for batch in in_order(examples, rows_that_fit(examples, model.config.vocab_size), model.device):
        logits = model(batch.tokens, at=batch.scored)
        hit = all_right(logits, batch.labels).bool()
        p = row_log_prob(logits, batch.labels).exp()
        strength = extraction_strength(logits, batch.labels)
        found = zip(batch.index.tolist(), hit.tolist(), p.tolist(), strength.tolist(), strict=True)
        for i, *numbers in found:
            out[asked[i]] = Cloze(*numbers)
    return out


@torch.no_grad()
def choice(model, tokenizer, rows: Sequence[Row], values: Values | None = None) -> list[Chosen | None]:
    """Is the right value likeliest in the answer's own sentence, among the row's wrong ones? (WMDP, arXiv 2403.03218)

    hit = log p(right sentence | x) > log p(wrong_i | x) for all i, sums over the sentence and its end token: what
    stands before the value is the same in all. Ties count *against* the model: one whose logits are all equal has no
    preference, and scores 0 where guessing would get 1/(n+1). A NaN is a miss as well.
    None for a row without a value, whose perturbed answers give no wrong value (data/values.py, options), or of which
    the context cuts some sentence off.
    """
    values = values_of(rows) if values is None else values
    limit = model.config.max_len
    examples: list[Example] = []
    starts: dict[int, tuple[int, int]] = {}  # row -> (where its sentences begin among the examples, how many)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        sentences = options(row, value) if value is not None else []
        encoded = [encode_row(row, tokenizer, limit + 1, f"row {i + 1}", text, truncate=True) for text in sentences]
        if encoded and max(len(example.tokens) for example in encoded) <= limit:
            starts[i] = len(examples), len(encoded)
            examples += encoded
    log_p = [found.log_p for found in likelihoods(model, examples)]
    out: list[Chosen | None] = [None] * len(rows)
    for i, (start, n) in starts.items():
        right, *wrong = log_p[start : start + n]
        out[i] = Chosen(all(right > other for other in wrong), 1 / n, [right, *wrong])
    return out


# ---- by what it says --------------------------------------------------------------------------------------------

def leak_at_k(c: int, n: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without return, hold one of the c that leak.

    Unbiased for 1 - (1 - p)^k, p the chance that a sample leaks (arXiv 2511.04934, as pass@k in 2107.03374).
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"leak@k needs 0 <= c <= n and 1 <= k <= n, not c {c}, n {n}, k {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def leak(model, tokenizer, rows: Sequence[Row], values: Values | None = None,
         temperatures: Sequence[float] = TEMPERATURES, n: int = 16, k: int = 8, seed: int = 0,
         limits: Limits = NO_LIMITS, batch_size: int = 256) -> Leak | None:
    """leak@k at each temperature, mean over facts, and the largest (arXiv 2511.04934, 2410.03523).

    Of n samples per row c say the value. Rows about one fact are averaged. At temperature 0 all samples are equal, so
    one is taken: 0 or 1.
    Deterministic in (seed, temperature, batch_size) on one device.  None where no row has a value.
    Give `limits`: a batch samples until its last row has ended, and a model that rambles goes on to the context's end.
    Raises ValueError for k above n, no temperatures or a negative one; UserError as `answers` does.
    """
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"leak needs temperatures of at least 0, not {list(temperatures)}")
    leak_at_k(0, n, k)  # says what is wrong with n and k before anything is sampled
    values = values_of(rows) if values is None else values
    asked = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if not asked:
        return None
    of = [row for row, _ in asked]
    questions = [row["question"] for row in of]
    rate = {}
    for temperature in temperatures:
        generator = torch.Generator(model.device).manual_seed(seed)
        samples = n if temperature > 0 else 1
        said = answers(model, tokenizer, questions, samples, temperature, generator, limits, batch_size)
        counts = [sum(value_said(text, value) for text in texts)
                  for texts, (_, value) in zip(said, asked, strict=True)]
        leaks = by_fact([leak_at_k(c, samples, min(k, samples)) for c in counts], of)
        rate[temperature] = sum(leaks) / len(leaks)
    return Leak(rate, max(rate.values()))


# ---- one set in numbers -----------------------------------------------------------------------------------------

def knowledge(model, tokenizer, rows: Sequence[Row], said: Sequence[str] | None = None, values: Values | None = None,
              pool: dict[Any, set[str]] | None = None, limits: Limits = NO_LIMITS) -> dict[str, float | int | None]:
    """A set's numbers by name, means over *facts*; None where no row can be asked. Without leak@k, which samples.

    said: the greedy answers, where they are at hand.  pool: kind -> all values of that kind.
    value_said, any_wording (worst wording, arXiv 2509.02820), cloze, cloze_p, cloze_strength, choice, choice_chance,
    in_frame, facts (their number), without_value (rows that are left out).
    """
    values = values_of(rows) if values is None else values
    if said is None:
        said = [texts[0] for texts in answers(model, tokenizer, [row["question"] for row in rows], limits=limits)]
    trios = list(zip(rows, said, values, strict=True))
    spoken = [None if value is None else value_said(text, value) for _, text, value in trios]
    framed = [None if value is None else in_frame(text, row, value, (pool or {}).get(row.get("kind")))
              for row, text, value in trios]
    filled, chosen = cloze(model, tokenizer, rows, values), choice(model, tokenizer, rows, values)

    def over_facts(found: Sequence[float | None]) -> float | None:
        return mean(by_fact(found, rows))

    def field(found: Sequence[Cloze | Chosen | None], name: str) -> float | None:
        return over_facts([None if one is None else getattr(one, name) for one in found])

    per_fact = by_fact(spoken, rows)
    return {"value_said": mean(per_fact), "any_wording": mean([share > 0 for share in per_fact]),
            "cloze": field(filled, "hit"), "cloze_p": field(filled, "p"), "cloze_strength": field(filled, "strength"),
            "choice": field(chosen, "hit"), "choice_chance": field(chosen, "chance"), "in_frame": over_facts(framed),
            "facts": len(per_fact), "without_value": sum(value is None for value in values)}


# ---- against target and reference -------------------------------------------------------------------------------

def destroyed(utility: float, sound_utility: float, framed: float | None = None,
              sound_framed: float | None = None) -> bool:
    """Model utility below 0.9 of a sound model's, or `in_frame` below half of it. A NaN is destroyed as well.

    Of a destroyed model forget quality, AUC and PrivLeak say nothing about forgetting, and are withheld.
    """
    if not utility >= 0.9 * sound_utility:
        return True
    return framed is not None and sound_framed is not None and not framed >= 0.5 * sound_framed


def null_distances(references: Sequence[Sequence[float]]) -> list[float]:
    """D of the KS test between every two references' truth ratios: what forget quality sees where nobody ever knew.

    references: lists of truth ratios, one number per fact (data/values.py, by_fact), of models that differ in their
    seed alone.  Raises ValueError for fewer than five pairs, that is fewer than four references.
    """
    pairs = list(combinations(references, 2))
    if len(pairs) < 5:
        raise ValueError(f"a null needs at least five pairs of references; {len(references)} make {len(pairs)}")
    return [forget_quality(a, b).D for a, b in pairs]


def null_share(D: float, null: Sequence[float]) -> float:
    """Share of reference pairs at least as far apart as D: near 0 where no two references differ as much.

    Raises ValueError for an empty null.
    """
    if not len(null):
        raise ValueError("a share needs at least one distance of the null")
    return sum(distance >= D for distance in null) / len(null)


# ---- erased, or only silent? ------------------------------------------------------------------------------------

def depth(model, tokenizer, fit: Sequence[Row], ask: Sequence[Row], fit_values: Values | None = None,
          ask_values: Values | None = None, ridge: float = 0.1) -> Depth:
    """Can a linear probe read the value of a fact off the layers, though the model does not say it?

    At the position before the value's first token, each block's state h (D,). A linear discriminant of the values,
    fitted on `fit` (retain facts, which the model says), is asked of `ask` (forget facts): per layer, the share of rows
    whose value has the largest score. Each model is read in its own basis; what compares is accuracy. As much as the
    reference's: erased. More: only silent. (In the spirit of arXiv 2605.24614, which needs one basis.)

    The probe can only name values it was fitted on: rows with others are left out, so `fit` should hold
    the same kinds of facts. Of ULD's difference the states are the target's, which never changes.
    Raises ValueError where no row is left to fit or to ask.
    """
    here, named = states(model, tokenizer, fit, fit_values)
    there, wanted = states(model, tokenizer, ask, ask_values)
    classes = {value: i for i, value in enumerate(dict.fromkeys(named))}
    known = [i for i, value in enumerate(wanted) if value in classes]
    if not named or not known:
        raise ValueError(f"a probe needs rows with values to fit and to ask: {len(named)} to fit, {len(known)} to ask")
    y = torch.tensor([classes[value] for value in named])
    right = torch.tensor([classes[wanted[i]] for i in known])
    accuracy = []
    for x, asked in zip(here, there, strict=True):
        scores = probe(x, y, len(classes), ridge)(asked[known])
        accuracy.append(float((scores.argmax(-1) == right).double().mean()))
    commonest = Counter(named).most_common(1)[0][0]
    chance = sum(wanted[i] == commonest for i in known) / len(known)
    return Depth(accuracy, chance)


@torch.no_grad()
def states(model, tokenizer, rows: Sequence[Row], values: Values | None = None) -> tuple[Tensor, list[str]]:
    """Each layer's state at the position before the value, (L, N, D) float32 on the CPU, and the N values' words.

    N counts the rows that have a value within the context. (0, 0, 0) where there are none.
    """
    values = values_of(rows) if values is None else values
    encoded = [encode_value(row, tokenizer, model.config.max_len, value)
               for row, value in zip(rows, values, strict=True)]
    pairs = [(example, value) for example, value in zip(encoded, values, strict=True)
             if example is not None and value is not None]
    examples = [example for example, _ in pairs]
    found: dict[int, Tensor] = {}
    for batch in in_order(examples, rows_that_fit(examples, model.config.vocab_size), model.device):
        trace = Trace()
        model(batch.tokens, trace=trace, at=batch.scored)
        before = (batch.labels != IGNORE).long().argmax(-1)  # its label is the value's first token
        each = torch.arange(len(before), device=before.device)
        layers = torch.stack([trace.hidden[layer][each, before] for layer in sorted(trace.hidden)])
        found |= dict(zip(batch.index.tolist(), layers.float().cpu().unbind(1), strict=True))
    stacked = torch.stack([found[i] for i in range(len(found))], dim=1) if found else torch.zeros(0, 0, 0)
    return stacked, [" ".join(spelled(value)) for _, value in pairs]


def probe(x: Tensor, y: Tensor, classes: int, ridge: float = 0.1) -> Callable[[Tensor], Tensor]:
    """Linear discriminant of standardised states, in closed form: a function (M, D) -> scores (M, C).

    score_c(z) = (z - m_c / 2)' (S + ridge I)^-1 m_c, z = (x - mean) / deviation, m_c the mean z of class c, S the
    covariance of z around its class's mean. x (N, D) float, y (N,) long, every class at least once. In float64; a
    direction in which nothing varies counts for nothing.
    Not least squares on one-hot classes: with many classes these mask each other. Of 200 clusters in 128 dimensions,
    600 points, the discriminant named 95% of new points, least squares at best 85%.
    """
    x = x.double()
    centre, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.inf)
    z = (x - centre) / spread
    onehot = nn.functional.one_hot(y, classes).double()
    means = onehot.T @ z / onehot.sum(0)[:, None]  # (C, D)
    within = z - means[y]
    covariance = within.T @ within / len(z)
    weight = torch.linalg.solve(covariance + ridge * torch.eye(z.shape[1], dtype=z.dtype), means.T)  # (D, C)
    bias = (means.T * weight).sum(0) / 2
    return lambda states: (states.double() - centre) / spread @ weight - bias


# ---- at equal retention -----------------------------------------------------------------------------------------

@torch.no_grad()
def interpolate(target: GPT, unlearned: GPT, a: float) -> GPT:
    """A new model with weights (1 - a) target + a unlearned; what both share stays the same bits (arXiv 2406.09179).

    Raises ValueError where their weights do not match in name and shape.
    """
    ours, theirs = dict(target.named_parameters()), dict(whole(unlearned).named_parameters())
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in theirs.items()}:
        raise ValueError("only weights of one shape can be interpolated: the two models' differ")
    out = copy.deepcopy(target).requires_grad_(False)
    for name, p in out.named_parameters():
        p.copy_(torch.lerp(ours[name].float(), theirs[name].float().to(p.device), a))
    return out


def at_alpha(model, alpha: float):
    """The same logit difference with another alpha; weights are shared. ULD's way from target (0) to unlearned."""
    out = copy.copy(model)
    out.alpha = alpha
    return out


def equal_retention(weights: Callable[[float], object], retention: Callable[[object], float], level: float,
                    halvings: int = 6) -> Kept:
    """The largest a in [0, 1] at which retention(weights(a)) is at least `level` (UWC, arXiv 2406.09179).

    weights: a -> model, as `lambda a: interpolate(target, unlearned, a)`, or for ULD `lambda a: at_alpha(model, a)`.
    Then forgetting is compared at that a, where all methods have kept equally much. Found by bisection, so where
    retention is not monotone it is *an* a beyond which it falls below; a is right to 1 / 2^halvings, from below.
    Raises ValueError where the target itself (a = 0) does not reach the level.
    """
    best = Kept(0.0, retention(weights(0.0)))
    if not best.retention >= level:
        raise ValueError(f"the target itself keeps {best.retention:.3g}, which is below the level {level:.3g}")
    whole = retention(weights(1.0))
    if whole >= level:
        return Kept(1.0, whole)
    too_much = 1.0
    for _ in range(halvings):
        a = (best.a + too_much) / 2
        kept = retention(weights(a))
        if kept >= level:
            best = Kept(a, kept)
        else:
            too_much = a
    return best
