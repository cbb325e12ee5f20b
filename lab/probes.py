"""Measures beyond TOFU's, taken of a model: what it still knows word for word, whether its training data shows, how it
writes, and for a mixture of experts whether what was forgotten was erased or only routed elsewhere.

The formulas are in metrics/; here models meet rows. Every function returns plain numbers by name for metrics.json.

Shapes: B batch   T tokens   V vocabulary   K experts per token
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from belief import all_right, row_log_prob, token_log_probs
from data.batches import IGNORE, Batch, Example, Rows, encode_row, encode_rows, in_order, rows_that_fit
from data.rows import DataSet, Row
from data.values import by_fact, encode_fact, encode_value, shared, values_of
from errors import UserError
from metrics import choice, fluency, memorization, privacy
from metrics.knowledge import at_alpha, depth, equal_retention, interpolate
from model import GPT, Trace

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


def passes(model, tokenizer, rows: list[Row]) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, logits (N, V) of its answer positions) over all rows, longest first."""
    examples = encode_rows(rows, tokenizer, model.config.max_len, truncate=True)
    for batch in in_order(examples, rows_that_fit(examples, model.config.vocab_size), model.device):
        yield batch, model(batch.tokens, at=batch.scored)


@torch.no_grad()
def remembered(model, tokenizer, rows: list[Row]) -> dict[str, float]:
    """Exact memorisation and extraction strength, means over rows (metrics/memorization.py)."""
    em, es = [], []
    for batch, logits in passes(model, tokenizer, rows):
        em.append(memorization.exact_memorization(logits, batch.labels))
        es.append(memorization.extraction_strength(logits, batch.labels))
    return {"exact_memorization": float(torch.cat(em).mean()), "extraction_strength": float(torch.cat(es).mean())}


@torch.no_grad()
def membership_scores(model, tokenizer, rows: list[Row]) -> dict[str, list[float]]:
    """Attack -> one score per row, in the rows' order; larger looks more like training data (metrics/privacy.py)."""
    out = {name: [0.0] * len(rows) for name in (*ATTACKS, "min_k_40")}
    texts = [row.get("answer", row.get("text")) for row in rows]
    for batch, logits in passes(model, tokenizer, rows):
        index, labels = batch.index.tolist(), batch.labels
        log_p = token_log_probs(logits, labels)
        scores = {"loss": privacy.loss_score(log_p, labels), "min_k": privacy.min_k(log_p, labels),
                  "zlib": privacy.zlib_score(log_p, labels, [texts[i] for i in index]),
                  "min_k_plus_plus": privacy.min_k_plus_plus(logits, labels),
                  "min_k_40": privacy.min_k(log_p, labels, 0.4)}
        for name, values in scores.items():
            for i, value in zip(index, values.tolist(), strict=True):
                out[name][i] = value
    return out


Suspects = tuple[dict[str, list[float]], dict[str, list[float]]]  # membership_scores of forget and of holdout rows


def suspects(model, tokenizer, data: DataSet) -> Suspects | None:
    """What `membership` compares; None where the data set has no rows that nobody saw."""
    if not data.holdout:
        return None
    return membership_scores(model, tokenizer, data.forget), membership_scores(model, tokenizer, data.holdout)


def membership(ours: Suspects, theirs: Suspects | None = None) -> dict[str, float | None]:
    """AUC of each attack, forget rows against rows that nobody saw.

    theirs: of a model that never saw the forget set; with it, also the reference attack and PrivLeak.
    """
    members, others = ours
    if any(math.isnan(score) for side in (*ours, *(theirs or ())) for of in side.values() for score in of):
        return {}  # a broken model's scores have no order
    out: dict[str, float | None] = {f"auc_{name}": privacy.auc(members[name], others[name]) for name in ATTACKS}
    if theirs is not None:
        out["auc_reference"] = privacy.auc(*([a - b for a, b in zip(of["loss"], ref["loss"], strict=True)]
                                             for of, ref in zip((members, others), theirs, strict=True)))
        retrained = privacy.auc(theirs[0]["min_k_40"], theirs[1]["min_k_40"])
        unlearned = privacy.auc(members["min_k_40"], others["min_k_40"])
        out["priv_leak"] = privacy.priv_leak(unlearned, retrained) if retrained < 1 else None  # nothing to divide by
    return out


def completion(model, tokenizer, rows: list[Row], prefix: int = 200) -> dict[str, float]:
    """How passages are gone on with from their first tokens: BLEU and ROUGE-L, means over rows; {} without passages.

    prefix: tokens that are given, half of a passage that has not twice as many (ULD: 200 of 512).
    """
    said, right = [], []
    for row in rows:
        ids = tokenizer.passage(row["text"])[: model.config.max_len] if "text" in row else []
        if len(ids) < 4:
            continue
        given, rest = memorization.split_prefix(ids, min(prefix, len(ids) // 2))
        new = model.generate(torch.tensor([given], device=model.device), len(rest), end=tokenizer.stops)
        said.append(tokenizer.decode(new[0].tolist()))
        right.append(tokenizer.decode(rest))
    if not said:
        return {}
    rouge = memorization.rouge_l(right, said)
    return {"completion_bleu": sum(memorization.bleu(right, said)) / len(said),
            "completion_rougeL_f1": sum(score.f1 for score in rouge) / len(said),
            "completion_rougeL_recall": sum(score.recall for score in rouge) / len(said)}


@torch.no_grad()
def choice_log_probs(model, tokenizer, rows: list[dict], batch_size: int = 16) -> list[list[float]] | None:
    """log p of every letter of every multiple-choice question (metrics/choice.py); no template.

    In front stands what the tokenizer itself puts in front of running text. None for a model whose logits are NaN.
    Raises UserError where two choices are the same tokens, so that none of them could be told from the other.
    """
    pairs = []  # one example per choice, labels on the letter alone
    for number, row in enumerate(rows, 1):
        asked = tokenizer.encode(choice.prompt(row))
        # as one text: a space alone may be another token
        whole = [tokenizer.encode(choice.prompt(row) + letter) for letter in choice.letters(row)]
        before = min(shared(asked, ids) for ids in whole)  # shorter than asked where its end merges with the letter
        letters = [tuple(ids[before:]) for ids in whole]
        if () in letters or len(set(letters)) < len(letters):
            raise UserError(f"choices of question {number} have no tokens of their own in this tokenizer, so its "
                            "answers cannot be told apart: use a model whose tokenizer has the letters")
        for ids in whole:
            after = ids[before:]
            ids = [*tokenizer.front, *ids]
            ids = ids[-(model.config.max_len + 1) :]  # a long question loses its beginning, not its letter
            pairs.append(Example(ids[:-1], [IGNORE] * (len(ids) - 1 - len(after)) + after))
    log_p = [0.0] * len(pairs)
    for batch in in_order(pairs, rows_that_fit(pairs, model.config.vocab_size, batch_size), model.device):
        values = row_log_prob(model(batch.tokens, at=batch.scored), batch.labels).tolist()
        for i, value in zip(batch.index.tolist(), values, strict=True):
            log_p[i] = value
    if any(map(math.isnan, log_p)):
        return None
    rest = iter(log_p)
    return [[next(rest) for _ in row["choices"]] for row in rows]


def choice_accuracy(model, tokenizer, rows: list[dict], batch_size: int = 16) -> float | None:
    """Share of multiple-choice questions whose right letter is the likeliest; None where logits are NaN."""
    log_p = choice_log_probs(model, tokenizer, rows, batch_size)
    return None if log_p is None else choice.accuracy(log_p, [row["answer"] for row in rows])


@torch.no_grad()
def writing(target, tokenizer, rows: list[Row], said: list[str]) -> dict[str, float | None]:
    """Perplexity under the target of what a model said to the rows' questions, and the share of repeated 4-grams."""
    pairs = [(row, text) for row, text in zip(rows, said, strict=True) if text.strip()]
    examples = [encode_row(row, tokenizer, target.config.max_len, answer=text, truncate=True) for row, text in pairs]
    log_p, counts = [], []
    for batch in in_order(examples, rows_that_fit(examples, target.config.vocab_size), target.device):
        log_p += row_log_prob(target(batch.tokens, at=batch.scored), batch.labels).tolist()
        counts += (batch.labels >= 0).sum(-1).tolist()
    repeats = fluency.repetition_rate([tokenizer.encode(text) for text in said])
    return {"perplexity": fluency.perplexity(log_p, counts) if counts else None, "repetition": repeats.rate,
            "empty": repeats.empty}


def silent(model, tokenizer, data: DataSet) -> dict[str, float]:
    """Can a linear probe name the forget values at some layer, though the model need not say them? The best layer's
    accuracy, and guessing's; {} where no forget value is one of the retain facts', on which it learns to read."""
    learnt, asked = values_of(data.retain), values_of(data.scored["forget"])
    if not ({*learnt} & {*asked}) - {None}:
        return {}
    found = depth(model, tokenizer, data.retain, data.scored["forget"], learnt, asked)
    return {"depth": max(found.accuracy), "depth_chance": found.chance}


def at_equal_retention(target: GPT, model, tokenizer, data: DataSet, share: float = 0.99) -> dict[str, float]:
    """What is left where a method has kept as much as all others have (UWC, arXiv 2406.09179).

    From target to model goes a line of weights, or of alpha where logits are combined. Taken is the point furthest
    along it, kept_at (1: the model itself), at which so large a share of what the target knows of the kept sets is
    still known; kept_cloze is how much of the forget set is known there. By cloze, which takes one pass a set.
    """
    def rows(name: str) -> Rows:
        return Rows(data.scored[name], tokenizer, target.config.max_len, 1, 0, target.device, encode=encode_fact)

    forget, kept = rows("forget"), [rows(name) for name in data.utility]

    def retention(one) -> float:
        return float(torch.cat([of.each(one, all_right) for of in kept]).mean())

    def weights(a: float):
        return interpolate(target, model, a) if isinstance(model, GPT) else at_alpha(model, a * model.alpha)

    found = equal_retention(weights, retention, share * retention(target))
    return {"kept_at": found.a, "kept_cloze": float(forget.each(weights(found.a), all_right).mean())}


class Forced:
    """A model with the target's choice of experts forced on every token, in the given layers; weights are its own.

    How much of a forced expert is taken the model's own router says. For likelihoods alone: it generates nothing.
    """

    def __init__(self, target: GPT, model: GPT, layers: Iterable[int]):
        self.target, self.model, self.layers = target, model, list(layers)
        self.config, self.device = model.config, model.device

    @torch.no_grad()
    def __call__(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (N, V) `at` some positions."""
        own = Trace()
        self.target.hidden(tokens, trace=own)
        forced = Trace(forced={layer: own.routing[layer].chosen for layer in self.layers})
        return self.model(tokens, trace=forced, at=at)


@torch.no_grad()
def rerouted(target: GPT, model: GPT, tokenizer, rows: list[Row]) -> dict[str, float]:
    """Rerouted or erased? The unlearned weights with the target's choice of experts forced on every token.

    free_*: with its own routing, forced_*: with the target's. Asked is the value where a row has one (cloze), else the
    whole answer. known: share of facts each token of which is the argmax, as greedy decoding would have it;
    probability: its mean over facts, of a token in the geometric mean. What comes back was never erased.
    """
    limit = model.config.max_len
    examples = [encode_value(row, tokenizer, limit, value) or encode_row(row, tokenizer, limit, truncate=True)
                for row, value in zip(rows, values_of(rows), strict=True)]
    out = {}
    for how, one in (("free", model), ("forced", Forced(target, model, model.config.moe_layers))):
        known, probability = [0.0] * len(rows), [0.0] * len(rows)
        for batch in in_order(examples, rows_that_fit(examples, model.config.vocab_size), model.device):
            logits = one(batch.tokens, at=batch.scored)
            right = all_right(logits, batch.labels)
            p = (row_log_prob(logits, batch.labels) / memorization.answer_lengths(batch.labels)).exp()
            for i, hit, likely in zip(batch.index.tolist(), right.tolist(), p.tolist(), strict=True):
                known[i], probability[i] = hit, likely
        for name, values in (("known", known), ("probability", probability)):
            per_fact = by_fact(values, rows)
            out[f"{how}_{name}"] = sum(per_fact) / len(per_fact)
    return out
