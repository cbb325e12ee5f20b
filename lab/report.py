"""What a run ends in: metrics.json, figures, a table, three questions with each model's answer."""

from pathlib import Path
from typing import Any, cast

from data.batches import greedy_answers
from data.rows import DataSet, Limits
from errors import shown
from files import write_json
from interfaces import LanguageModel, TextCodec
from lab import probes
from lab.figures import draw
from lab.tables import table
from metrics.routing import expert_shares, routing_overlap
from metrics.score import Scores, summarise, unjudged
from model import GPT
from runs import forget_batches
from uoe import expert_attribution


def finish_report(folder: Path, run: dict, data: DataSet, tokenizer: TextCodec, scores: dict[str, Scores],
                  models: dict[str, LanguageModel]) -> None:
    """Write metrics.json and figures into folder; print the table and three questions with each model's answer.

    models: "target", "unlearned" (or, for a fine-tuned model, just "target") and, where at hand, "reference".
    """
    metrics = summarise(scores, data)
    for role, block in probe_all(models, tokenizer, data, scores).items():
        metrics[role] |= block
    experts = None
    target, model = cast(GPT, models["target"]), models.get("unlearned")
    if isinstance(model, GPT) and model.is_moe:
        batches = forget_batches(target, tokenizer, data)
        of = {"target": target, "unlearned": model}
        experts = {"share": {role: expert_shares(m, batches) for role, m in of.items()},
                   "affinity": {role: expert_attribution(m, batches).tolist() for role, m in of.items()}}
    metrics["run"] = run | {"notes": unjudged(metrics, scores, data)}
    write_json(folder / "metrics.json", metrics)
    draw(folder, scores, experts)
    print("\n" + table(metrics) + "\n")
    print(three_questions(data, tokenizer, models))


def probe_all(models: dict[str, LanguageModel], tokenizer: TextCodec, data: DataSet,
              scores: dict[str, Scores]) -> dict[str, dict]:
    """probes.py's numbers for every model: memory, membership, writing and, where experts changed, routing."""
    target = cast(GPT, models["target"])
    out = {role: probe(target, model, role, tokenizer, data, scores[role]) for role, model in models.items()}
    seen = {role: probes.suspects(model, tokenizer, data) for role, model in models.items()}
    for role, ours in seen.items():
        out[role] |= probes.membership(ours, seen.get("reference")) if ours else {}
    return out


def probe(target: GPT, model: LanguageModel, role: str, tokenizer: TextCodec, data: DataSet, scores: Scores) -> dict:
    """Of one model, all but membership; `target` is what it is compared with."""
    rows = [row for row in data.scored["forget"] if "question" in row]
    out: dict[str, Any] = probes.remembered(model, tokenizer, data.scored["forget"])
    out |= probes.completion(model, tokenizer, data.scored["forget"])
    if rows:
        out |= probes.writing(target, tokenizer, rows, scores["forget"].said)
    if data.pools:  # of rows whose values are known to be of a kind; dear on public models
        out |= probes.silent(model, tokenizer, data)
        out |= probes.at_equal_retention(target, model, tokenizer, data) if role == "unlearned" else {}
    if role == "unlearned" and isinstance(model, GPT) and model.is_moe:
        layers = routing_overlap(target, model, forget_batches(target, tokenizer, data))
        out |= {"routing_overlap": sum(layers) / len(layers), "routing_overlap_by_layer": layers}
        out |= probes.rerouted(target, model, tokenizer, data.scored["forget"])
    return out


def three_questions(data: DataSet, tokenizer: TextCodec, models: dict[str, LanguageModel]) -> str:
    """One scored question of each of the first three sets, with every model's greedy answer."""
    lines = []
    for name, rows in list(data.scored.items())[:3]:
        row = next((row for row in rows if "question" in row), None)
        if row is None:
            continue
        question = row["question"]
        said = {role: greedy_answers(m, tokenizer, [question], Limits(new=60))[0] for role, m in models.items()}
        lines.append(f"[{name}] {question}")
        lines += [f"    {who:<10} {text}" for who, text in {"right": row["answer"], **said}.items()]
    return shown("\n".join(lines))
