"""Does it stay forgotten? Each attack asks an unlearned model again after a small push, and tells what comes back.

    python eval.py out/uoe --attack relearn int8 int4 paraphrase hint experts

    relearn      a few steps of fine-tuning on some forget facts; asked are the *other* facts, in all their wordings
    int8, int4   weights of all blocks rounded to 8 or 4 bits, one scale per output (round to nearest)
    paraphrase   a wording of the question that nobody taught
    hint         question and answer are given up to the value: cloze
    experts      the target's choice of experts is forced, in all layers or in one; also cloze

What comes back is judged by the fact's value (data/values.py), as share of facts; "exact" is the share of rows answered
word for word. The same is done to the target and to a reference that never knew: what the reference says after an
attack was learnt or guessed, not recalled, so only what lies above it came back.

Shapes: B batch   T tokens   V vocabulary   O outputs   D inputs
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import objectives
from data.batches import Rows, greedy_answers
from data.rows import DataSet, Limits, Row
from data.values import by_fact, fact_ids, value_said, values_of
from errors import UserError
from lab.probes import Forced
from loop import Weights
from metrics.knowledge import Cloze, Values, cloze
from metrics.tofu import mean
from model import GPT

Outcome = dict[str, float | None]  # value_said, exact; of experts also unforced and noise. None: cannot be asked


# ---- what is asked ----------------------------------------------------------------------------------------------

def outcome(said: Sequence[str], rows: Sequence[Row], either: bool = False) -> Outcome:
    """Of answers to the rows' questions: value_said, mean over facts, None where no row has a value; exact, over rows.

    either: the paraphrased answer is right as well.
    """
    spoken = [None if value is None else value_said(text, value)
              for text, value in zip(said, values_of(rows), strict=True)]
    exact = []
    for text, row in zip(said, rows, strict=True):
        right = [row["answer"]] + ([row["paraphrased_answer"]] if either and "paraphrased_answer" in row else [])
        exact.append(text.strip() in [answer.strip() for answer in right])
    return {"value_said": mean(by_fact(spoken, rows)), "exact": mean(exact)}


def ask(model, tokenizer, rows: list[Row], limits: Limits) -> Outcome:
    return outcome(greedy_answers(model, tokenizer, [row["question"] for row in rows], limits), rows)


def with_values(name: str, rows: list[Row]) -> Values:
    """The rows' values. Raises UserError where none has one."""
    values = values_of(rows)
    if all(value is None for value in values):
        raise UserError(f"--attack {name} asks for values, and no forget row has one: give rows a 'value'")
    return values


# ---- relearn ----------------------------------------------------------------------------------------------------

def relearn(model, tokenizer, taught: list[Row], asked: list[Row], limits: Limits, steps: int = 20, lr: float = 1e-4,
            batch_size: int = 16, seed: int = 0) -> Outcome:
    """Fine-tune a copy on `taught` for so many steps of AdamW, all weights; then ask `asked`, about other facts.

    A model of several parts (target and assistant) learns in all of them. bf16 weights learn as in loop.minimise.
    """
    model = copy.deepcopy(model).requires_grad_(True).train()
    weights = Weights(list(model.parameters()))
    rows = Rows(taught, tokenizer, model.config.max_len, batch_size, seed, model.device)
    optimizer = torch.optim.AdamW(weights.full, lr=lr, weight_decay=0.0)
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        batch = rows.batch(step)
        loss = objectives.cross_entropy(model(batch.tokens, at=batch.scored), batch.answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights.take_gradients()
        torch.nn.utils.clip_grad_norm_(weights.full, 1.0)
        optimizer.step()
        weights.give_back()
    return ask(model.eval(), tokenizer, asked, limits)


def taught_and_asked(forget: list[Row], scored: list[Row], rows: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Whole facts of `forget`, drawn until they make `rows` rows; and the rows of `scored` about other facts.

    Rows are about one fact by fact_ids; also where question or answer are the same, which own files go by.
    """
    ids = fact_ids([*forget, *scored])
    here, there = ids[: len(forget)], ids[len(forget) :]
    drawn: set[int] = set()
    for fact in np.random.default_rng(seed).permutation(list(dict.fromkeys(here))).tolist():
        if sum(i in drawn for i in here) >= rows:
            break
        drawn.add(fact)
    taught = [row for row, fact in zip(forget, here, strict=True) if fact in drawn]
    known = {row[key] for row in taught for key in ("question", "answer")}
    told = drawn | {fact for row, fact in zip(scored, there, strict=True) if known & {row["question"], row["answer"]}}
    return taught, [row for row, fact in zip(scored, there, strict=True) if fact not in told]


# ---- rounding ---------------------------------------------------------------------------------------------------

def rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest of the 2^bits - 1 levels symmetric around 0, one scale per output: weight (..., O, D)."""
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


@torch.no_grad()
def quantised(model, bits: int):
    """A copy whose every matrix inside a block is rounded, routers too; embeddings, norms and the head are not."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "blocks." in name and p.dim() >= 2:
            p.copy_(rounded(p, bits))
    return model


# ---- other wordings ---------------------------------------------------------------------------------------------

def untaught(data: DataSet) -> list[Row]:
    """Forget facts asked in wordings that taught nobody: the calibration rows, or else paraphrased questions.

    Raises UserError where there are none.
    """
    if data.calibration:
        return data.calibration
    taught = {row.get("question") for row in data.taught()}
    rows = [row | {"question": row["paraphrased_question"]} for row in data.scored["forget"]
            if row.get("paraphrased_question") not in {None, *taught}]
    if not rows:
        raise UserError("--attack paraphrase: every paraphrased_question of the forget rows teaches, or they have none")
    return rows


# ---- experts ----------------------------------------------------------------------------------------------------

def forced_experts(target: GPT, model: GPT, tokenizer, rows: list[Row], seed: int = 0) -> Outcome:
    """An adversary who chooses which experts serve: the target's choice, in all layers or in a single one.

    Which of these brings back most p(value) is found on one half of the facts; on the other half is reported how often
    the value is then the argmax (cloze). Then the halves are swapped, and both reports averaged.
    value_said: that; unforced: the same without forcing; noise: how far the halves differ unforced, that is how large
    a difference means nothing.  Raises UserError for rows that make fewer than two facts with a value.
    """
    values = with_values("experts", rows)
    layers = model.config.moe_layers
    free = cloze(model, tokenizer, rows, values)
    forced = [cloze(Forced(target, model, some), tokenizer, rows, values) for some in (layers, *([i] for i in layers))]
    ids = fact_ids(rows)
    asked = list(dict.fromkeys(fact for fact, one in zip(ids, free, strict=True) if one is not None))
    if len(asked) < 2:
        raise UserError("--attack experts halves the facts, and only one forget fact has a value")
    drawn = np.random.default_rng(seed).permutation(asked).tolist()
    found, halves = [], (set(drawn[: len(drawn) // 2]), set(drawn[len(drawn) // 2 :]))
    for chosen_on, told_on in (halves, halves[::-1]):
        best = max(forced, key=lambda one: over_half(one, "p", rows, ids, chosen_on))
        found.append(over_half(best, "hit", rows, ids, told_on))
    one, other = (over_half(free, "hit", rows, ids, half) for half in halves)
    return {"value_said": sum(found) / 2, "exact": None, "unforced": (one + other) / 2, "noise": abs(one - other)}


def over_half(found: Sequence[Cloze | None], field: str, rows: Sequence[Row], ids: Sequence[int],
              half: set[int]) -> float:
    """Mean over the facts in `half` of one field of Cloze."""
    kept = [getattr(one, field) if one is not None and fact in half else None
            for one, fact in zip(found, ids, strict=True)]
    per_fact = by_fact(kept, rows)
    return sum(per_fact) / len(per_fact)


def check_experts(target, models: Sequence) -> None:
    """Raises UserError where an adversary cannot choose experts: dense models, ULD, a reference of another shape."""
    for model in models:
        if not isinstance(model, GPT) or not model.is_moe:
            raise UserError("--attack experts chooses experts: it is for runs of one mixture of experts, not of a "
                            "dense model and not of several models together (ULD)")
        ours, theirs = ((of.config.moe_layers, of.config.n_expert, of.config.top_k) for of in (target, model))
        if ours != theirs:
            raise UserError("--attack experts forces the target's choice of experts, and another model has other "
                            f"layers, experts, top-k: {theirs}, the target {ours}")


# ---- by name ----------------------------------------------------------------------------------------------------

def attack(name: str, model, tokenizer, data: DataSet, target=None, **relearning) -> Outcome:
    """One attack of the list above on one model. Raises UserError for rows or models that do not allow it.

    target: whose experts `experts` forces.  relearning: rows, and what `relearn` takes.
    """
    asked = [row for row in data.scored["forget"] if "question" in row]
    if not asked:
        raise UserError("--attack asks questions, and the forget set has passages only")
    return ATTACKS[name](model, tokenizer, data, asked, target, **relearning)


def _relearn(model, tokenizer, data, asked, target, rows: int = 20, **how):
    taught, others = taught_and_asked([row for row in data.forget if "question" in row], asked, rows)
    if not taught:
        raise UserError("--attack relearn teaches questions, and the rows that were forgotten are passages only")
    if not others:
        raise UserError(f"--attack relearn: no forget fact is left to ask after {rows} rows are taught; lower "
                        "--relearn-rows")
    return relearn(model, tokenizer, taught, others, data.limits, **how)


def _paraphrase(model, tokenizer, data, asked, target, **_):
    rows = untaught(data)
    said = greedy_answers(model, tokenizer, [row["question"] for row in rows], data.limits)
    return outcome(said, rows, either=True)


def _hint(model, tokenizer, data, asked, target, **_):
    found = cloze(model, tokenizer, asked, with_values("hint", asked))
    hits = [None if one is None else one.hit for one in found]
    return {"value_said": mean(by_fact(hits, asked)), "exact": None}


def _experts(model, tokenizer, data, asked, target, **_):
    check_experts(target, [model])
    return forced_experts(target, model, tokenizer, asked)


ATTACKS: dict[str, Callable[..., Outcome]] = {  # (model, tokenizer, data, rows to ask, target, relearning)
    "none": lambda model, tokenizer, data, asked, target, **_: ask(model, tokenizer, asked, data.limits),
    "relearn": _relearn,
    "int8": lambda model, tokenizer, data, asked, target, **_: ask(quantised(model, 8), tokenizer, asked, data.limits),
    "int4": lambda model, tokenizer, data, asked, target, **_: ask(quantised(model, 4), tokenizer, asked, data.limits),
    "paraphrase": _paraphrase,
    "hint": _hint,
    "experts": _experts,
}


def attack_table(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """outcomes: attack -> role -> what it answers."""
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    roles = list(next(iter(outcomes.values())))
    lines = [f"{'forget set, value said (exact)':<32}" + "".join(f"{role:>18}" for role in roles)]
    for name, of in outcomes.items():
        cells = [f"{cell(of[role]['value_said'])} ({cell(of[role]['exact'])})" for role in roles]
        lines.append(f"{name:<32}" + "".join(f"{text:>18}" for text in cells))
        for key in ("unforced", "noise"):
            if key in of[roles[0]]:
                lines.append(f"{'  ' + key:<32}" + "".join(f"{cell(of[role][key]):>12}{'':6}" for role in roles))
    return "\n".join(lines)
