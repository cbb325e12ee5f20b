"""Scores one model on every scored set of a data set, keeps them beside it, and makes metrics.json's numbers of them.

Whatever has `model(tokens)` and `model.generate` can be scored: a GPT, or ULD's LogitDifference.

Shapes: B batch   T tokens   V vocabulary
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.batches import answer_length, encode_row, greedy_answers
from data.rows import DataSet, Row
from data.values import fact_ids, values_of
from errors import UserError
from files import digest, digest_of, write
from interfaces import LanguageModel, TextCodec
from metrics.knowledge import destroyed, knowledge, leak, null_distances, null_share
from metrics.likelihood import likelihoods
from metrics.memorization import rouge_l
from metrics.routing import routing_overlap
from metrics.tofu import OPTIONS, RowScores, forget_quality, read_log, utility_of
from model import GPT
from pretrained import load
from runs import forget_batches, local, weights_of
from schema import ANY_NUMBER, read_json

Scores = dict[str, RowScores]
NUMBERS = [ANY_NUMBER]
STORED = {"loss": NUMBERS, "right": NUMBERS, "wrong": [NUMBERS], "rougeL": NUMBERS, "exact": [bool], "said": [str],
          "facts": NUMBERS, "known": {str: (ANY_NUMBER, None)}, "answers": [str]}  # RowScores on disk
WATCHED = ("value_said", "leak", "in_frame", "exact", "rougeL_recall", "loss")  # of a set, after every epoch


def answer_losses(model: LanguageModel, tokenizer: TextCodec, pairs: list[tuple[Row, str]], bar: tqdm | None = None,
                  where: str = "row", at_most: int = 64) -> list[float]:
    """Mean negative log-likelihood per answer token of each (row, answer), in nats. at_most: rows at once."""
    limit = model.config.max_len
    examples = [encode_row(row, tokenizer, limit, f"{where} {i}", answer, truncate=True)
                for i, (row, answer) in enumerate(pairs, 1)]
    found = likelihoods(model, examples, at_most, bar)
    return [-one.log_p / max(1, answer_length(example)) for one, example in zip(found, examples, strict=True)]


def evaluate(model: LanguageModel, tokenizer: TextCodec, data: DataSet, what: str = "model") -> Scores:
    """Scores of every scored set of data."""
    out = {}
    total = sum(3 + len(row.get("perturbed_answer", [])) for rows in data.scored.values() for row in rows)
    with tqdm(total=total, desc=f"score {what}", mininterval=0.5) as bar:
        for name, rows in data.scored.items():
            # one list of pairs for the whole set, so that all share batches; equal ones are asked once (likelihoods)
            answers = [row.get("answer", "") for row in rows]  # a {"text": ...} row is scored as a whole
            reworded = [answer if name in OPTIONS else row.get("paraphrased_answer", answer)
                        for row, answer in zip(rows, answers, strict=True)]
            wrong = [row.get("perturbed_answer", []) for row in rows]
            pairs = list(zip(rows * 2, answers + reworded, strict=True))
            pairs += [(row, answer) for row, some in zip(rows, wrong, strict=True) for answer in some]
            losses = answer_losses(model, tokenizer, pairs, bar=bar, where=f"{name} row",
                                   at_most=data.limits.rows or 64)
            n, rest = len(rows), iter(losses[2 * len(rows) :])
            asked = [row for row in rows if "question" in row]
            right = [row["answer"] for row in asked]
            said = greedy_answers(model, tokenizer, [row["question"] for row in asked], data.limits, bar=bar)
            whole = all(map(math.isfinite, losses))  # a model whose logits are NaN cannot be sampled
            out[name] = RowScores(losses[:n], losses[n : 2 * n], [[next(rest) for _ in w] for w in wrong],
                                  [score.recall for score in rouge_l(right, said, stem=True)],
                                  [a.strip() == b.strip() for a, b in zip(said, right, strict=True)], said,
                                  fact_ids(rows), known(model, tokenizer, data, name, asked, said) if whole else {},
                                  [row["answer"] if "answer" in row else row["text"] for row in rows])
    return out


def known(model: LanguageModel, tokenizer: TextCodec, data: DataSet, name: str, rows: list[Row],
          said: list[str]) -> dict[str, float | int | None]:
    """metrics/knowledge.py's numbers of a set; of forget also what samples leak. {} where nothing has a value."""
    values = values_of(rows) if rows and name not in OPTIONS else []
    if not any(value is not None for value in values):
        return {}
    out = knowledge(model, tokenizer, rows, said, values, data.pools, data.limits)
    if name == "forget":
        first = list({fact: i for i, fact in reversed(list(enumerate(fact_ids(rows))))}.values())  # a wording per fact
        found = leak(model, tokenizer, [rows[i] for i in first], [values[i] for i in first], n=8, k=8,
                     limits=data.limits)
        if found is not None:
            out |= {"leak": found.worst, **{f"leak_T{t:g}": rate for t, rate in found.rate.items()}}
    return out


def as_read(dtype: torch.dtype, tokenizer: TextCodec, *weights: Path) -> str:
    """What scores depend on beside rows and code: folders of weights, their dtype in memory, the prompts' template."""
    return digest(str(dtype), getattr(tokenizer, "template", None), [digest_of(folder) for folder in weights])


def scores_key(data: DataSet, how: str) -> str:
    """Changes with the scored rows, with as_read's answer, and with the code that scores."""
    here = Path(__file__).parents[1]
    sources = ("metrics/score.py", "metrics/knowledge.py", "data/values.py", "model.py", "moe.py", "belief.py",
               "decoding.py", "uld.py", "baselines.py", "latent.py", "metrics/tofu.py", "metrics/likelihood.py",
               "metrics/memorization.py", "data/batches.py", "data/tokenizer.py", "hub/tokenizer.py")
    return digest(data.scored, data.limits[:2], how, [(here / name).read_text() for name in sources])


def kept_scores(file: Path | None, data: DataSet, how: str, score: Callable[[], Scores]) -> Scores:
    """What `file` keeps, where it is of the same rows, code, weights and template; else what score() finds, kept there.

    how: as_read's answer. None: nothing is kept.
    """
    key = scores_key(data, how)
    if file is not None:
        with contextlib.suppress(UserError):  # absent, damaged, or of something else: once more
            stored = read_json(file, {"key": key, "scores": {str: STORED}})
            return {name: RowScores(**fields) for name, fields in stored["scores"].items()}
    scores = score()
    if file is not None:
        write(file, json.dumps({"key": key, "scores": {name: asdict(s) for name, s in scores.items()}}))
    return scores


def scores_of(path: str, config: dict, data: DataSet, tokenizer: TextCodec, role: str, device: str = "cpu",
              model: LanguageModel | None = None, keep: Path | None = None) -> Scores:
    """Scores of a model by its folder, hub name or published log; kept beside it where it is a run of ours.

    model: the same, where it is in memory already.  keep: folder for the scores of all others.
    """
    if Path(path).is_file():
        log, rows = read_log(Path(path)), data.scored["forget"]
        if len(log["forget"].right) != len(rows):
            raise UserError(f"--{role} {path} is the log of {len(log['forget'].right)} forget rows, and {len(rows)} "
                            "are scored here: give a log of the same rows (see --protocol, --score-rows)")
        return log
    ours = (Path(path) / "model").is_dir()
    file = Path(path) / "scores.json" if ours else keep / f"scores-{role}.json" if keep else None
    dtype = getattr(torch, config["dtype"])

    def score() -> Scores:
        loaded = model or load(weights_of(path), dtype, device, config.get("template"))[0]
        return evaluate(loaded, tokenizer, data, role)

    scores = kept_scores(file, data, as_read(dtype, tokenizer, local(path)), score)
    if is_broken(scores):
        raise UserError(f"the {role} {path} has losses that are not numbers (NaN): its weights are broken, so nothing "
                        "can be judged by it; download or train it again")
    return scores


def summarise(scores: dict[str, Scores], data: DataSet) -> dict[str, dict]:
    """metrics.json's blocks: per model its sets' numbers, model utility, and forget quality against the reference."""
    out: dict[str, dict] = {}
    references = [of["forget"].fact_ratios() for role, of in scores.items() if role.startswith("reference")]
    null = null_distances(references) if len(references) >= 4 else []
    for role, of in scores.items():
        block: dict[str, Any] = {name: s.summary(name) for name, s in of.items()}
        whole = all(name in of for name in data.utility)  # a published log may lack sets
        block["model_utility"] = utility_of(block, data.utility) if whole else None
        block["forget_quality"] = block["forget_quality_D"] = block["forget_quality_n"] = None
        out[role] = block
    for role, block in out.items():
        block["destroyed"] = role == "unlearned" and is_destroyed(block, out.get("target"), out.get("reference"))
        if not references or role == "reference" or block["destroyed"]:
            continue
        with contextlib.suppress(ValueError):  # no wrong answers, or a NaN: nothing to compare
            quality = forget_quality(scores[role]["forget"].fact_ratios(), references[0])
            block["forget_quality"], block["forget_quality_D"], block["forget_quality_n"] = quality
            if null and not role.startswith("reference"):
                block["forget_quality_null"] = null_share(quality.D, null)
    return out


def unjudged(metrics: dict[str, dict], scores: dict[str, Scores], data: DataSet) -> list[str]:
    """What of a run's metrics cannot be judged, and why: sentences for below the table. metrics: summarise's."""
    notes = [f"{role}: its losses are not numbers (NaN), so nothing of it can be judged" for role, of in scores.items()
             if is_broken(of)]
    forget = metrics["target"]["forget"]
    if forget.get("value_said", forget.get("exact")) == 0:
        notes.append("the target answers none of the forget rows: there was nothing to forget")
    if "unlearned" in metrics and metrics["unlearned"]["forget_quality"] is None:
        why = "the unlearned model is destroyed or its truth ratios are not numbers"
        if not any(role.startswith("reference") for role in metrics):
            why = "no reference was given"
        elif not scores["unlearned"]["forget"].fact_ratios():
            why = "no forget row has wrong answers"
        notes.append(f"no forget quality: {why}")
    if not data.holdout:
        notes.append("no membership inference: this data has no rows that no model was taught")
    return notes


def is_broken(scores: Scores) -> bool:
    """Whether a loss is NaN or infinite."""
    return not all(math.isfinite(loss) for of in scores.values() for loss in of.loss)


def is_destroyed(block: dict[str, Any], target: dict[str, Any] | None, reference: dict[str, Any] | None) -> bool:
    """Whether a model is too broken for its forget quality to mean anything (metrics/knowledge.py, destroyed).

    What is worse than the target is not broken if a model that never saw the forget set is no better. Where every row
    has a sentence of its own (TOFU), such a model has next to none of them right: so sentences are asked about only
    beside a reference that has half of them or more.
    """
    if target is None or block["model_utility"] is None or not target["model_utility"]:
        return False
    sound, framed = target["model_utility"], block["forget"].get("in_frame")
    if reference and reference["model_utility"]:
        sound = min(sound, reference["model_utility"])
    known = [of["forget"].get("in_frame") for of in (target, reference) if of]
    if framed is None or None in known or not reference or min(known) < 0.5:
        return destroyed(block["model_utility"], sound)
    return destroyed(block["model_utility"], sound, framed, min(known))


def path_writer(folder: Path, tokenizer: TextCodec, data: DataSet, scores: dict[str, Scores], target: GPT,
                rows: int = 100) -> Callable[[dict, LanguageModel], None]:
    """--score-every-epoch: writes a line of path.jsonl, on at most `rows` rows of each set but the whole forget set."""
    few = copy.copy(data)
    few.scored = {name: of if name == "forget" else of[:rows] for name, of in data.scored.items()}
    file = folder / "path.jsonl"
    batches = forget_batches(target, tokenizer, data) if target.is_moe else []

    def watch(where: dict, model: LanguageModel) -> None:
        lines = file.read_text().splitlines() if file.is_file() else []
        lines = [line for line in lines if json.loads(line)["step"] < where["step"]]  # a resumed run comes by again
        block = summarise({**scores, "unlearned": evaluate(model, tokenizer, few, f"epoch {where['epoch']}")}, few)
        line = where | {key: block["unlearned"][key] for key in ("model_utility", "forget_quality", "forget_quality_D")}
        for name, of in block["unlearned"].items():
            if isinstance(of, dict):
                line |= {f"{name} {key}": of.get(key) for key in WATCHED}
        if batches and isinstance(model, GPT):
            layers = routing_overlap(target, model, batches)
            line["routing_overlap"] = sum(layers) / len(layers)
        write(file, "\n".join([*lines, json.dumps(line)]) + "\n")

    return watch
