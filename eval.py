"""Scores a model, a run or a published log; compares runs; draws a run's figures.

    python eval.py out/uoe                                  # score that run again and print its table
    python eval.py --compare out/uoe out/uoe-seed1 ...      # mean and spread over seeds of runs of one kind
    python eval.py --tofu-log LOG.json --reference REF.json --json

Whatever has `model(tokens)` and `model.generate` can be scored: a GPT, or ULD's LogitDifference.

Shapes: B batch   T tokens   V vocabulary   E experts   K experts per token
"""

import argparse
import contextlib
import hashlib
import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

import probes
from data.batches import Batch, encode_row, in_order, left_pad, rows_that_fit
from data.rows import NO_LIMITS, DataSet, Limits, Row
from errors import UserError, one_line_errors
from metrics import choice
from metrics.routing import expert_count, overlap
from metrics.tofu import OPTIONS, RowScores, forget_quality, read_log, rouge_l_recall, utility_of
from model import GPT, Trace
from objectives import token_log_probs
from pretrained import load
from runs import Run, forget_batches, open_run, weights_of
from tables import by_kind, compare, compare_at, number, read_path, table
from uld import LogitDifference
from uoe import expert_attribution

Scores = dict[str, RowScores]


# ---- one model --------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer_losses(model, tokenizer, pairs: list[tuple[Row, str]], bar: tqdm | None = None,
                  where: str = "row") -> list[float]:
    """Mean negative log-likelihood per answer token of each (row, answer), in nats."""
    limit = model.config.max_len
    examples = [encode_row(row, tokenizer, limit, f"{where} {i}", answer, truncate=True)
                for i, (row, answer) in enumerate(pairs, 1)]
    losses = [0.0] * len(examples)
    for batch in in_order(examples, rows_that_fit(examples, model.config.vocab_size), model.device):
        log_p = token_log_probs(model(batch.tokens), batch.labels)
        count = (batch.labels >= 0).sum(1).clamp_min(1)
        for i, loss in zip(batch.index.tolist(), (-log_p.sum(1) / count).tolist(), strict=True):
            losses[i] = loss
        if bar is not None:
            bar.update(len(batch.index))
    return losses


def greedy_answers(model, tokenizer, questions: list[str], limits: Limits = NO_LIMITS, batch_size: int = 100,
                   bar: tqdm | None = None) -> list[str]:
    """The model's answers, prompts of like length together. They end where limits or the context say.

    Raises UserError for a prompt that leaves no room for an answer.
    """
    prompts = [tokenizer.prompt(question) for question in questions]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, pad = left_pad([prompts[i] for i in part], model.device)
        context = min(model.config.max_len, limits.total or model.config.max_len)
        rooms = [min(context - len(prompts[i]), limits.new or context) for i in part]
        if model.config.max_len - tokens.shape[1] < 1:
            raise UserError(f"the question {questions[part[-1]][:40]!r} has {tokens.shape[1]} tokens and the context "
                            f"holds {model.config.max_len}: shorten it")
        new = model.generate(tokens, max(0, *rooms), pad=pad, end=tokenizer.stops)
        for i, ids, room in zip(part, new.tolist(), rooms, strict=True):
            answers[i] = tokenizer.decode(ids[: max(room, 0)])  # by the row's own length, whatever it is batched with
        if bar is not None:
            bar.update(len(part))
    return answers


def evaluate(model, tokenizer, data: DataSet, what: str = "model") -> Scores:
    """Scores of every scored set of data."""
    out = {}
    total = sum(3 + len(row.get("perturbed_answer", [])) for rows in data.scored.values() for row in rows)
    with tqdm(total=total, desc=f"score {what}", mininterval=0.5) as bar:
        for name, rows in data.scored.items():
            # one list of pairs for the whole set: answer, right answer and wrong ones share batches
            answers = [row.get("answer", "") for row in rows]  # a {"text": ...} row is scored as a whole
            pairs = list(zip(rows, answers, strict=True))
            reworded = {i: row["paraphrased_answer"] for i, row in enumerate(rows)
                        if name not in OPTIONS and "paraphrased_answer" in row}  # elsewhere the answer stands for it
            pairs += [(rows[i], answer) for i, answer in reworded.items()]
            wrong = [row.get("perturbed_answer", []) for row in rows]
            pairs += [(row, answer) for row, answers in zip(rows, wrong, strict=True) for answer in answers]
            losses = answer_losses(model, tokenizer, pairs, bar=bar, where=f"{name} row")
            n, rest = len(rows), iter(losses[len(rows):])
            bar.update(n - len(reworded))
            paraphrased = losses[:n]
            for i in reworded:
                paraphrased[i] = next(rest)
            asked = [row for row in rows if "question" in row]
            right = [row["answer"] for row in asked]
            said = greedy_answers(model, tokenizer, [row["question"] for row in asked], data.limits, bar=bar)
            out[name] = RowScores(losses[:n], paraphrased, [[next(rest) for _ in w] for w in wrong],
                                  rouge_l_recall(right, said),
                                  [a.strip() == b.strip() for a, b in zip(said, right, strict=True)], said)
    return out


@torch.no_grad()
def routing_overlap(before: GPT, model: GPT, batches: list[Batch]) -> list[float]:
    """Mean top-k overlap on the batches' real tokens, one number per layer (UOE, Figure 3)."""
    same = [[] for _ in range(model.config.n_layer)]
    for batch in batches:
        traces = []
        for m in (before, model):
            trace = Trace()
            m.hidden(batch.tokens, trace=trace)
            traces.append(trace)
        for layer, values in enumerate(same):
            values.append(overlap(traces[1].routing[layer].chosen, traces[0].routing[layer].chosen, batch.mask))
    return [float(torch.cat(values).mean()) for values in same]


@torch.no_grad()
def expert_shares(model: GPT, batches: list[Batch]) -> list[list[float]]:
    """Share of the batches' tokens that each expert got, (layers, E)."""
    count = torch.zeros(model.config.n_layer, model.config.n_expert, device=model.device)
    for batch in batches:
        trace = Trace()
        model.hidden(batch.tokens, trace=trace)
        for layer, routing in trace.routing.items():
            count[layer] += expert_count(routing.chosen, batch.mask, model.config.n_expert)
    return (count / count.sum(1, keepdim=True)).tolist()


def as_read(dtype: torch.dtype, tokenizer) -> str:
    """What scores depend on beside the weights on disk: their dtype in memory, and the template of prompts."""
    return f"{dtype} {getattr(tokenizer, 'template', None)}"


def scores_key(data: DataSet, how: str) -> str:
    """Changes with the scored rows, with as_read's answer, and with the code that scores."""
    here = Path(__file__).parent
    sources = ("eval.py", "model.py", "moe.py", "objectives.py", "uld.py", "metrics/tofu.py", "data/batches.py",
               "data/tokenizer.py", "data/hub_tokenizer.py")
    made_of = [data.scored, data.limits, how, *((here / name).read_text() for name in sources)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def save_scores(folder: Path, data: DataSet, scores: Scores, how: str) -> None:
    """Into folder/scores.json, with the key of what was scored."""
    text = json.dumps({"key": scores_key(data, how), "scores": {name: asdict(s) for name, s in scores.items()}})
    (folder / "scores.tmp").write_text(text)
    (folder / "scores.tmp").replace(folder / "scores.json")


def stored_scores(folder: Path, data: DataSet, how: str) -> Scores | None:
    """What save_scores wrote, if it was for the same rows and code."""
    path = Path(folder) / "scores.json"
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    if stored["key"] != scores_key(data, how):
        return None
    return {name: RowScores(**fields) for name, fields in stored["scores"].items()}


# ---- a run ------------------------------------------------------------------------------------------------------

def scores_of(path: str, config: dict, data: DataSet, tokenizer, role: str, device: str = "cpu",
              model: GPT | None = None) -> Scores:
    """Scores of a model by its folder, hub name or published log; kept beside it where it is a run of ours.

    model: the same, where it is in memory already.
    """
    if Path(path).is_file():
        return read_log(Path(path))
    dtype = getattr(torch, config["dtype"])
    how = as_read(dtype, tokenizer)
    scores = stored_scores(path, data, how)
    if scores is None:
        model = model or load(weights_of(path), dtype, device, config["template"])[0]
        scores = evaluate(model, tokenizer, data, role)
        if (Path(path) / "model").is_dir():
            save_scores(Path(path), data, scores, how)
    return scores


def summarise(scores: dict[str, Scores], data: DataSet) -> dict[str, dict]:
    """metrics.json's blocks: per model its sets' numbers, model utility, and forget quality against the reference."""
    out = {}
    reference = scores["reference"]["forget"].truth_ratios() if "reference" in scores else []
    null = null_distances(scores) if reference else []
    for role, of in scores.items():
        block = {name: s.summary(name) for name, s in of.items()}
        whole = all(name in of for name in data.utility)  # a published log may lack sets
        block["model_utility"] = utility_of(block, data.utility) if whole else None
        block["forget_quality"] = block["forget_quality_D"] = block["forget_quality_n"] = None
        with contextlib.suppress(ValueError):  # no reference, no wrong answers, a NaN: then there is nothing to compare
            quality = forget_quality(of["forget"].truth_ratios(), [] if role == "reference" else reference)
            block["forget_quality"], block["forget_quality_D"], block["forget_quality_n"] = quality
            if null and not role.startswith("reference"):
                block["forget_quality_null"] = sum(d >= quality.D for d in null) / len(null)
        out[role] = block
    return out


def null_distances(scores: dict[str, Scores]) -> list[float]:
    """D of every pair of retain-only models: what forget quality sees where nothing was ever known."""
    ratios = [of["forget"].truth_ratios() for role, of in scores.items() if role.startswith("reference")]
    return [forget_quality(a, b).D for a, b in combinations(ratios, 2)]


def finish_report(folder: Path, run: dict, data: DataSet, tokenizer, scores: dict[str, Scores],
                  models: dict[str, object]) -> None:
    """Write metrics.json and figures into folder; print the table and three questions with each model's answer.

    models: "target", "unlearned" (or, for a fine-tuned model, just "target") and, where at hand, "reference".
    """
    from figures import draw  # matplotlib only where something is drawn

    metrics = summarise(scores, data)
    for role, block in probe_all(models, tokenizer, data, scores).items():
        metrics[role] |= block
    experts = None
    target, model = models["target"], models.get("unlearned")
    if isinstance(model, GPT) and model.is_moe:
        batches = forget_batches(target, tokenizer, data)
        of = {"target": target, "unlearned": model}
        experts = {"share": {role: expert_shares(m, batches) for role, m in of.items()},
                   "affinity": {role: expert_attribution(m, batches).tolist() for role, m in of.items()}}
    metrics["run"] = run
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    last = "unlearned" if "unlearned" in scores else "target"
    save_scores(folder, data, scores[last], as_read(target.embed.weight.dtype, tokenizer))
    draw(folder, scores, experts)
    print("\n" + table(metrics) + "\n")
    print(three_questions(data, tokenizer, models))


def probe_all(models: dict[str, object], tokenizer, data: DataSet, scores: dict[str, Scores]) -> dict[str, dict]:
    """probes.py's numbers for every model: memory, membership, writing and, where experts changed, routing."""
    out = {role: probe(models["target"], model, role, tokenizer, data, scores[role]) for role, model in models.items()}
    seen = {role: probes.suspects(model, tokenizer, data) for role, model in models.items()}
    for role, ours in seen.items():
        out[role] |= probes.membership(ours, seen.get("reference")) if ours else {}
    return out


def probe(target: GPT, model, role: str, tokenizer, data: DataSet, scores: Scores) -> dict:
    """Of one model, all but membership; `target` is what it is compared with."""
    rows = [row for row in data.scored["forget"] if "question" in row]
    out = probes.remembered(model, tokenizer, data.scored["forget"])
    out |= probes.completion(model, tokenizer, data.scored["forget"])
    if rows:
        out |= probes.writing(target, tokenizer, rows, scores["forget"].said)
    if role == "unlearned" and isinstance(model, GPT) and model.is_moe:
        layers = routing_overlap(target, model, forget_batches(target, tokenizer, data))
        out |= {"routing_overlap": sum(layers) / len(layers), "routing_overlap_by_layer": layers}
        out |= probes.rerouted(target, model, tokenizer, data.scored["forget"])
    return out


def three_questions(data: DataSet, tokenizer, models: dict) -> str:
    """One scored question of each of the first three sets, with every model's greedy answer."""
    lines = []
    for name, rows in list(data.scored.items())[:3]:
        row = next((row for row in rows if "question" in row), None)
        if row is None:
            continue
        question = row["question"]
        lines += [f"[{name}] {question}", f"    {'right':<10} {row['answer']}"]
        lines += [f"    {role:<10} {greedy_answers(m, tokenizer, [question], Limits(new=60))[0]}"
                  for role, m in models.items()]
    return "\n".join(lines)


# ---- command line -----------------------------------------------------------------------------------------------

def score_log(log: str, reference: str | None) -> dict:
    """The same functions on a published log: per-set numbers, both definitions' model utility, forget quality."""
    scores = read_log(Path(log))
    sets = ("retain", "real_authors", "world_facts")
    out = {name: s.summary(name) for name, s in scores.items()}
    if all(name in scores for name in sets):  # open-unlearning's logs may hold the forget set alone
        out["model_utility"] = utility_of(out, sets)
        other = {name: s.summary(name, "probabilities") for name, s in scores.items()}
        out["model_utility_mean_of_probabilities"] = utility_of(other, sets)
    if reference:
        theirs = read_log(Path(reference))["forget"].truth_ratios()
        try:
            quality = forget_quality(scores["forget"].truth_ratios(), theirs)
        except ValueError as error:
            raise UserError(f"{log} against {reference}: {error}") from None
        out |= {"forget_quality": quality.p, "forget_quality_D": quality.D, "forget_quality_n": quality.n}
    return out


def models_of(run: Run) -> dict[str, object]:
    """Role -> model: target, unlearned, and the reference where the run has one that is a model."""
    models = {"target": run.target} | ({"unlearned": run.model} if run.config["method"] != "finetune" else {})
    if run.config.get("reference") and not Path(run.config["reference"]).is_file():
        models["reference"] = load(weights_of(run.config["reference"]), run.target.embed.weight.dtype)[0]
    return models


def score_again(folder: Path, run: Run, args: argparse.Namespace) -> None:
    """Score a run anew and print its table; --save keeps the new metrics.json elsewhere."""
    metrics = json.loads((folder / "metrics.json").read_text())
    models = models_of(run)
    scores = {role: evaluate(models[role], run.tokenizer, run.data, role) if role in ("target", "unlearned") else
              scores_of(run.config[role], run.config, run.data, run.tokenizer, role)
              for role in metrics if role != "run"}
    fresh = summarise(scores, run.data)
    for role, block in probe_all(models, run.tokenizer, run.data, scores).items():
        fresh[role] |= block
    fresh["run"] = metrics["run"]
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        (Path(args.save) / "metrics.json").write_text(json.dumps(fresh, indent=1))
    print(json.dumps(fresh, indent=1) if args.json else table(fresh))


def choices_table(run: Run, path: str) -> str:
    """Accuracy of target, unlearned and reference on a file of multiple-choice questions."""
    rows = choice.read_choices(Path(path))
    lines = [f"{len(rows)} questions, guessing gets {choice.chance(rows):.3f}"]
    return "\n".join([*lines, *(f"{role:<12}{probes.choice_accuracy(model, run.tokenizer, rows):.3f}"
                                for role, model in models_of(run).items())])


def level_of(at: str, by: str) -> tuple[str, float | None]:
    """--at and --by as tables.compare_at takes them."""
    if at == "best":
        return at, None
    try:
        return by, float(at)
    except ValueError:
        raise UserError(f"--at {at} is neither a number, as 0.15, nor 'best'") from None


def attack_run(folder: Path, run: Run, args: argparse.Namespace) -> None:
    """Every attack on target, reference (where the run has one) and unlearned; prints a table, writes attacks.json."""
    from attacks import attack, attack_table, check_attack  # stands on this file

    for name in args.attack:
        check_attack(name)
    if min(args.relearn_rows, args.relearn_steps) < 1 or args.relearn_lr <= 0:
        raise UserError("--relearn-rows, --relearn-steps and --relearn-lr are above 0")
    models = models_of(run)
    how = {"rows": args.relearn_rows, "steps": args.relearn_steps, "lr": args.relearn_lr}
    decoding = {name: getattr(run.model, name) for name in ("alpha", "filter_rate", "centred")
                if hasattr(run.model, name)}
    outcomes = {}
    with tqdm(total=(1 + len(args.attack)) * len(models), desc="attack") as bar:
        for name in ["none", *args.attack]:
            outcomes[name] = {}
            for role, model in models.items():
                outcomes[name][role] = attack(name, model, run.tokenizer, run.data.forget, run.data.scored["forget"],
                                              run.data.limits, **how)
                bar.update()
    before = json.loads((folder / "attacks.json").read_text()) if (folder / "attacks.json").is_file() else {}
    kept = before["outcomes"] if (before.get("relearn"), before.get("decoding", {})) == (how, decoding) else {}
    (folder / "attacks.json").write_text(json.dumps(
        {"relearn": how, "decoding": decoding, "outcomes": kept | outcomes}, indent=1))
    print(json.dumps(outcomes, indent=1) if args.json else attack_table(outcomes))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="score a run, compare runs, score a published log")
    parser.add_argument("run", nargs="?", help="a run folder to score again")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print mean and spread over runs")
    parser.add_argument("--at", metavar="LEVEL", help="with --compare, of runs with --path: read every run where so "
                                                      "many forget answers are left, as 0.15; or 'best': at the epoch "
                                                      "of its best forget quality, as ULD's paper does")
    parser.add_argument("--by", choices=("exact", "D"), default="exact", help="what --at is a level of: forget exact "
                                                                              "answers, or forget quality's D")
    parser.add_argument("--figures", metavar="DIR", help="with --compare, of runs with --path: draw into this folder")
    parser.add_argument("--tofu-log", help="an eval_log_aggregated.json to score")
    parser.add_argument("--reference", help="the retain-only model's log")
    parser.add_argument("--attack", nargs="+", metavar="HOW", help="with a run: relearn, int8, int4, paraphrase, hint; "
                                                                   "what comes back goes into attacks.json")
    parser.add_argument("--choices", metavar="FILE", help="with a run: accuracy on multiple-choice questions, JSON "
                                                          "lines with question, choices, answer (as WMDP, MMLU)")
    parser.add_argument("--relearn-rows", type=int, default=20)
    parser.add_argument("--relearn-steps", type=int, default=20)
    parser.add_argument("--relearn-lr", type=float, default=1e-4)
    parser.add_argument("--subtract", type=float, help="with a run of ULD: another alpha than it was made with")
    parser.add_argument("--filter-rate", type=float, help="with a run of ULD: another filter")
    parser.add_argument("--centre", action="store_true", help="with a run of ULD: take its assistant's logits from "
                                                              "their mean")
    parser.add_argument("--save", metavar="DIR", help="with a run: write its new metrics.json there")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON, in full")
    args = parser.parse_args(argv)
    for flag in ("save", "figures"):
        if getattr(args, flag) and Path(getattr(args, flag)).is_file():
            raise UserError(f"--{flag} {getattr(args, flag)} is a file: give a folder")
    if args.compare:
        print(compare(args.compare) if args.at is None else compare_at(args.compare, *level_of(args.at, args.by)))
        if args.figures:
            from figures import draw_paths

            paths = {kind: [read_path(folder) for folder in of] for kind, of in by_kind(args.compare).items()}
            print("drew " + ", ".join(map(str, draw_paths(paths, Path(args.figures)))))
    elif args.tofu_log:
        out = score_log(args.tofu_log, args.reference)
        if args.json:
            print(json.dumps(out, indent=1))
            return
        for key, value in out.items():
            print(f"{key}: " + (", ".join(f"{k} {number(v)}" for k, v in value.items()) if isinstance(value, dict)
                                else str(value)))
    elif args.run:
        run = open_run(args.run)
        for flag, name in (("subtract", "alpha"), ("filter_rate", "filter_rate"), ("centre", "centred")):
            value = getattr(args, flag)
            if value is None or value is False:  # not 0.0, which is a value
                continue
            if not isinstance(run.model, LogitDifference):
                raise UserError(f"--{flag.replace('_', '-')} is for runs of --method uld")
            setattr(run.model, name, value)
        if args.attack:
            attack_run(Path(args.run), run, args)
        elif args.choices:
            print(choices_table(run, args.choices))
        else:
            score_again(Path(args.run), run, args)
    else:
        raise UserError("nothing to score: give a run folder, --compare RUN..., or --tofu-log LOG")


if __name__ == "__main__":
    main()
