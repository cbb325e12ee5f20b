"""Does it stay forgotten? Each attack asks an unlearned model again after a small push, and tells what comes back.

    python eval.py out/uoe --attack relearn int8 int4 paraphrase hint

    relearn      a few steps of fine-tuning on a few forget rows; asked are the *other* forget rows
    int8, int4   weights of all blocks rounded to 8 or 4 bits, one scale per output (round to nearest)
    paraphrase   another wording of the question
    hint         the answer's first tokens are given

The same is done to the target and to a reference that never knew: what the reference answers after an attack was
learnt or guessed, not recalled, so only what lies above it came back.

Shapes: B batch   T tokens   V vocabulary   O outputs   D inputs
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import objectives
from data.batches import Rows, greedy_answers, left_pad
from data.rows import Limits, Row
from errors import UserError
from loop import Weights
from metrics.tofu import rouge_l_recall

Outcome = dict[str, float]  # exact, rougeL_recall


def outcome(said: list[str], *right: list[str]) -> Outcome:
    """Means over rows; each of `right` holds one right answer per row, and the one that fits best counts."""
    exact = [[a.strip() == b.strip() for a, b in zip(said, of, strict=True)] for of in right]
    rouge = [rouge_l_recall(of, said) for of in right]
    n = max(1, len(said))
    return {"exact": sum(map(max, zip(*exact, strict=True))) / n,
            "rougeL_recall": sum(map(max, zip(*rouge, strict=True))) / n}


def ask(model, tokenizer, rows: list[Row], limits: Limits) -> Outcome:
    said = greedy_answers(model, tokenizer, [row["question"] for row in rows], limits)
    return outcome(said, [row["answer"] for row in rows])


def relearn(model, tokenizer, taught: list[Row], asked: list[Row], limits: Limits, steps: int = 20, lr: float = 1e-4,
            batch_size: int = 16, seed: int = 0) -> Outcome:
    """Fine-tune a copy on `taught` for so many steps of AdamW, all weights; then ask `asked`, other rows of the set.

    A model of several parts (target and assistant) learns in all of them. bf16 weights learn as in loop.minimise.
    """
    model = copy.deepcopy(model).requires_grad_(True).train()
    weights = Weights(list(model.parameters()))
    rows = Rows(taught, tokenizer, model.config.max_len, batch_size, seed, model.device)
    optimizer = torch.optim.AdamW(weights.full, lr=lr, weight_decay=0.0)
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        batch = rows.batch(step)
        loss = objectives.cross_entropy(model(batch.tokens), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights.take_gradients()
        torch.nn.utils.clip_grad_norm_(weights.full, 1.0)
        optimizer.step()
        weights.give_back()
    return ask(model.eval(), tokenizer, asked, limits)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest of the 2^bits - 1 levels symmetric around 0, one scale per output: weight (..., O, D)."""
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


@torch.no_grad()
def quantised(model, bits: int):
    """A copy whose every matrix inside a block is rounded; embeddings, norms, routers' inputs and the head are not."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "blocks." in name and p.dim() >= 2:
            p.copy_(rounded(p, bits))
    return model


def hinted(model, tokenizer, rows: list[Row], tokens: int = 3, batch_size: int = 100) -> Outcome:
    """The answer's first `tokens` tokens are put behind the prompt. Judged is the rest, so the gift does not count."""
    right, said = [], []
    cut = []
    for row in rows:
        answer = tokenizer.completion(row["answer"])
        if len(answer) > tokens + 1:  # something must be left to say besides the end
            cut.append((tokenizer.prompt(row["question"]) + answer[:tokens], answer[tokens:]))
    cut.sort(key=lambda pair: len(pair[0]))
    for i in range(0, len(cut), batch_size):
        part = cut[i : i + batch_size]
        ids, pad = left_pad([given for given, _ in part], model.device)
        new = model.generate(ids, max(len(rest) for _, rest in part) + 8, pad=pad, end=tokenizer.stops)
        said += [tokenizer.decode(out) for out in new.tolist()]
        right += [tokenizer.decode(rest) for _, rest in part]
    return outcome(said, right)


def attack(name: str, model, tokenizer, forget: list[Row], scored: list[Row], limits: Limits, **relearning) -> Outcome:
    """One attack of the list above on one model. Raises UserError for rows that do not allow it."""
    asked = [row for row in scored if "question" in row]
    if not asked:
        raise UserError("--attack asks questions, and the forget set has passages only")
    return ATTACKS[name](model, tokenizer, forget, asked, limits, **relearning)


def _relearn(model, tokenizer, forget, scored, limits, rows: int = 20, **how):
    """The first rows that are taught and whatever asks for the same answers are left out of the questions."""
    taught = [row for row in forget if "question" in row][:rows]
    known = {row["answer"] for row in taught}
    asked = [row for row in scored if row["answer"] not in known]
    if not asked:
        raise UserError(f"--attack relearn: all forget rows are among the {rows} that it teaches; lower --relearn-rows")
    return relearn(model, tokenizer, taught, asked, limits, **how)


def _paraphrase(model, tokenizer, forget, scored, limits, **_):
    rows = [row for row in scored if "paraphrased_question" in row] or [
        row for row in forget if "paraphrased_question" in row]
    if not rows:
        raise UserError("--attack paraphrase: no forget row has a paraphrased_question")
    said = greedy_answers(model, tokenizer, [row["paraphrased_question"] for row in rows], limits)
    usual = [row["answer"] for row in rows]
    return outcome(said, usual, [row.get("paraphrased_answer", row["answer"]) for row in rows])  # either will do


ATTACKS: dict[str, Callable[..., Outcome]] = {
    "none": lambda model, tokenizer, forget, scored, limits, **_: ask(model, tokenizer, scored, limits),
    "relearn": _relearn,
    "int8": lambda model, tokenizer, forget, scored, limits, **_: ask(quantised(model, 8), tokenizer, scored, limits),
    "int4": lambda model, tokenizer, forget, scored, limits, **_: ask(quantised(model, 4), tokenizer, scored, limits),
    "paraphrase": _paraphrase,
    "hint": lambda model, tokenizer, forget, scored, limits, **_: hinted(model, tokenizer, scored),
}


def attack_table(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """outcomes: attack -> role -> what it answers."""
    roles = list(next(iter(outcomes.values())))
    lines = [f"{'forget set, exact (ROUGE-L)':<30}" + "".join(f"{role:>18}" for role in roles)]
    for name, of in outcomes.items():
        lines.append(f"{name:<30}" + "".join(f"{of[r]['exact']:>9.3f} ({of[r]['rougeL_recall']:.3f})" for r in roles))
    return "\n".join(lines)
