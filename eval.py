"""Scores a run, compares runs, attacks one, scores a published log.

    python eval.py out/uoe                                  # score that run again and print its table
    python eval.py --compare out/uoe out/uoe-seed1 ...      # mean and spread over seeds of runs of one kind
    python eval.py out/uoe --attack relearn int8 paraphrase # what comes back?
    python eval.py --verify out/uoe                         # does all that it claims hold?
    python eval.py --tofu-log LOG.json --reference REF.json --json
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import UserError, one_line_errors
from files import alone, write_json
from flags import COUNT, POSITIVE, SHARE, WEIGHT, Parser, either
from interfaces import LanguageModel
from lab import probes
from lab.attacks import ATTACKS, Outcome, attack, attack_table, check_experts
from lab.figures import draw_kinds, draw_paths
from lab.report import probe_all
from lab.tables import SCORED, by_kind, compare, compare_at, number, read_metrics, read_path, table
from methods import Run, open_run
from metrics import choice
from metrics.score import evaluate, scores_of, summarise, unjudged
from metrics.tofu import check_comparable, forget_quality, read_log, utility_of
from pretrained import load
from runs import DEVICE, MUST_FIT, changes, check_device, differences, made_of, weights_of
from schema import ANY_NUMBER, read_bytes, read_json
from uld import LogitDifference


def score_log(log: str, reference: str | None) -> dict:
    """The same functions on a published log: per-set numbers, both definitions' model utility, forget quality."""
    scores = read_log(Path(log))
    sets = ("retain", "real_authors", "world_facts")
    out: dict[str, Any] = {name: s.summary(name) for name, s in scores.items()}
    if all(name in scores for name in sets):  # open-unlearning's logs may hold the forget set alone
        out["model_utility"] = utility_of(out, sets)
        other = {name: s.summary(name, "probabilities") for name, s in scores.items()}
        out["model_utility_mean_of_probabilities"] = utility_of(other, sets)
    if reference:
        theirs = read_log(Path(reference))["forget"]
        check_comparable(scores["forget"], theirs, f"{log} against {reference}")
        try:
            quality = forget_quality(scores["forget"].truth_ratios(), theirs.truth_ratios())
        except ValueError as error:
            raise UserError(f"{log} against {reference}: {error}") from None
        out |= {"forget_quality": quality.p, "forget_quality_D": quality.D, "forget_quality_n": quality.n}
    return out


def models_of(run: Run) -> dict[str, LanguageModel]:
    """Role -> model: target, unlearned, and the reference where the run has one that is a model."""
    models = {"target": run.target} | ({"unlearned": run.model} if run.config["method"] != "finetune" else {})
    if run.config.get("reference") and not Path(run.config["reference"]).is_file():
        models["reference"] = load(weights_of(run.config["reference"]), run.target.embed.weight.dtype,
                                   run.target.device, run.config.get("template"))[0]
    return models


def fresh_metrics(folder: Path, run: Run, trust: bool = True) -> dict:
    """metrics.json as it comes out now. trust: take references' scores from beside their weights."""
    metrics = read_metrics(folder, SCORED)
    if lost := [role for role in metrics if role not in ("run", "unlearned") and role not in run.config]:
        raise UserError(f"{folder / 'metrics.json'} has a {lost[0]} that config.json does not name: run train.py again")
    models = models_of(run)
    asked, scores = dict(models), {}
    if not trust:
        asked |= {role: load(weights_of(run.config[role]), device=run.target.device)[0]
                  for role in metrics if role.startswith("reference-")}
    for role in metrics:
        if role in asked and (role in ("target", "unlearned") or not trust):
            scores[role] = evaluate(asked[role], run.tokenizer, run.data, role)
        elif role != "run":
            scores[role] = scores_of(run.config[role], run.config, run.data, run.tokenizer, role,
                                     str(run.target.device), models.get(role))
    fresh = summarise(scores, run.data)
    for role, block in probe_all(models, run.tokenizer, run.data, scores).items():
        fresh[role] |= block
    fresh["run"] = metrics["run"] | {"notes": unjudged(fresh, scores, run.data)}
    return fresh


def score_again(folder: Path, run: Run, args: argparse.Namespace) -> None:
    """Score a run anew and print its table; --save keeps the new metrics.json elsewhere."""
    fresh = fresh_metrics(folder, run)
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.save) / "metrics.json", fresh)
    print(json.dumps(fresh, indent=1) if args.json else table(fresh))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number, word and None of nested dicts and lists by its path."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, of in items for key, leaf in flat(of, f"{name} {part}".strip()).items()}


def verify(folder: Path, device: str) -> None:
    """What a run's files claim, computed anew: what it was made of, how many steps it trained, every score.

    Seconds and bytes are taken on trust. Prints a line for each claim that does not hold; raises UserError where there
    is one.
    """
    run = open_run(folder, device, check=False)
    metrics = read_metrics(folder, SCORED)
    if "made_of" not in run.config:
        raise UserError(f"{folder} was written by an older version, which noted no hashes: run train.py again")
    wrong = [f"{name}: not what the run was made of" for name in differences(folder, run.config, run.data)]
    fresh, ran = fresh_metrics(folder, run, trust=False), metrics["run"]
    claimed, found = (flat(of | {"run": {"notes": of["run"].get("notes", [])}}) for of in (metrics, fresh))
    claimed |= {f"run {key}": run.config.get(key) for key in ("made_of", "diverged", "steps")}
    found |= {f"run {key}": ran.get(key) for key in ("made_of", "diverged")}
    found["run steps"] = len(read_bytes(folder / "log.jsonl", "run train.py again").splitlines())
    for key in sorted(claimed.keys() | found.keys()):
        ours, theirs = found.get(key), claimed.get(key)
        same = ours == theirs
        if isinstance(ours, float | int) and isinstance(theirs, float | int):
            same = math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9)
        if not same:
            wrong.append(f"{key}: {theirs} is claimed, {ours} comes out")
    was = run.config["made_of"]
    if other := changes(was, made_of(run.data, run.tokenizer.vocab_size, {}, device), ("code", "versions", "threads",
                                                                                         "processor")):
        print(f"computed anew with other {', '.join(other)}")
    print("\n".join(wrong) or f"all {len(claimed)} claims of {folder} hold")
    if wrong:
        raise UserError(f"{len(wrong)} of {len(claimed)} claims of {folder} do not hold: run train.py again")


def choices_table(run: Run, path: str) -> str:
    """Accuracy of target, unlearned and reference on a file of multiple-choice questions."""
    rows = choice.read_choices(Path(path))
    lines = [f"{len(rows)} questions, guessing gets {choice.chance(rows):.3f}"]
    return "\n".join([*lines, *(f"{role:<12}{number(probes.choice_accuracy(model, run.tokenizer, rows))}"
                                for role, model in models_of(run).items())])


def attack_run(folder: Path, run: Run, args: argparse.Namespace) -> None:
    """Every attack on target, reference (where the run has one) and unlearned; prints a table, writes attacks.json."""
    file = folder / "attacks.json"
    before = read_json(file, ATTACKED, "remove it") if file.exists() else {}
    models = models_of(run)
    if "experts" in args.attack:  # before anything is asked
        check_experts(run.target, list(models.values()))
    how = {"rows": args.relearn_rows or 20, "steps": args.relearn_steps or 20, "lr": args.relearn_lr or 1e-4}
    decoding = {name: getattr(run.model, name) for name in ("alpha", "filter_rate", "centred")
                if hasattr(run.model, name)}
    outcomes: dict[str, dict[str, Outcome]] = {}
    with tqdm(total=(1 + len(args.attack)) * len(models), desc="attack") as bar:
        for name in ["none", *args.attack]:
            outcomes[name] = {}
            for role, model in models.items():
                outcomes[name][role] = attack(name, model, run.tokenizer, run.data, run.target, **how)
                bar.update()
    of = {key: run.config.get("made_of", {}).get(key) for key in MUST_FIT}
    kept = before.get("outcomes", {}) if (before.get("decoding", {}), before.get("made_of")) == (decoding, of) else {}
    if "relearn" in kept and "relearn" not in args.attack:
        how = before["relearn"]  # of the outcome that stays
    write_json(file, {"relearn": how, "decoding": decoding, "made_of": of, "outcomes": kept | outcomes})
    print(json.dumps(outcomes, indent=1) if args.json else attack_table(outcomes))


ATTACKED = {"relearn": dict, "decoding": dict, "outcomes": {str: {str: {str: (ANY_NUMBER, None)}}}}  # attacks.json
PUSHES = sorted(set(ATTACKS) - {"none"})
OF_COMPARE, OF_LOG = ["at", "by", "figures"], ["reference"]
OF_MODELS, OF_RELEARN = ["device"], ["relearn_rows", "relearn_steps", "relearn_lr"]
OF_RUN = ["attack", "choices", *OF_RELEARN, "subtract", "filter_rate", "save"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="score a run, compare runs, score a published log")
    say = parser.add_argument
    say("run", nargs="?", help="a run folder to score again")
    say("--json", action="store_true", help="print numbers as JSON, in full")
    say("--compare", nargs="+", metavar="RUN", help="print mean and spread over runs")
    say("--verify", metavar="RUN", help="compute all that a run claims anew, and say what differs")
    say("--tofu-log", metavar="LOG", help="an eval_log_aggregated.json to score")
    say("--reference", metavar="LOG", help="with --tofu-log: the retain-only model's log")
    say = parser.add_argument_group("with --compare").add_argument
    say("--at", type=either(SHARE, "best"), metavar="LEVEL", help="of runs with --score-every-epoch: read every run "
        "where so many forget answers are left, as 0.15; or 'best': at the epoch of its best forget quality, as ULD's "
        "paper does")
    say("--by", choices=("value", "exact", "D"), help="what --at is a level of: forget values said (default), forget "
                                                      "exact answers, or forget quality's D")
    say("--figures", metavar="DIR", help="draw into this folder what leaks, what is kept; of --score-every-epoch also "
                                          "what happens along the way")
    say = parser.add_argument_group("with a run").add_argument
    say("--attack", nargs="+", choices=PUSHES, metavar="HOW", help=f"{', '.join(PUSHES)}; what comes back goes "
                                                                    "into attacks.json")
    say("--relearn-rows", type=COUNT, help="of --attack relearn: facts are taught until they make so many rows "
                                           "(default 20)")
    say("--relearn-steps", type=COUNT, help="(default 20)")
    say("--relearn-lr", type=POSITIVE, help="(default 1e-4)")
    say("--choices", metavar="FILE", help="accuracy on multiple-choice questions, JSON lines with question, choices, "
                                          "answer (as WMDP, MMLU)")
    say("--subtract", type=WEIGHT, help="of a run of ULD: another alpha than it was made with")
    say("--filter-rate", type=SHARE, help="of a run of ULD: another filter")
    say("--save", metavar="DIR", help="write its new metrics.json there")
    say("--device", help=f"cpu, cuda, cuda:1; also of --verify (default {DEVICE})")
    args = parser.parse_args(argv)
    if (args.run is not None) + bool(args.compare) + bool(args.tofu_log) + (args.verify is not None) != 1:
        raise UserError("give one thing to score: a run folder, --compare RUN..., --verify RUN, or --tofu-log LOG")
    for nothing, flags, where in (
            (not args.compare, OF_COMPARE, "without --compare"),
            (not args.tofu_log, OF_LOG, "without --tofu-log"),
            (args.compare or args.choices or args.verify, ["json"], "beside --compare, --verify or --choices"),
            (args.run is None, OF_RUN, "without a run folder"),
            (args.run is None and not args.verify, OF_MODELS, "without a run folder or --verify"),
            ("relearn" not in (args.attack or []), OF_RELEARN, "without --attack relearn"),
            (args.at in (None, "best"), ["by"], "without --at LEVEL"),
            (args.attack, ["choices"], "beside --attack"),
            (args.attack or args.choices, ["save"], "beside --attack or --choices")):
        for flag in flags:
            if nothing and getattr(args, flag) is not None and getattr(args, flag) is not False:  # 0 is a value
                raise UserError(f"--{flag.replace('_', '-')} does nothing {where}: leave it out")
    for flag in ("save", "figures"):
        if getattr(args, flag) and Path(getattr(args, flag)).is_file():
            raise UserError(f"--{flag} {getattr(args, flag)} is a file: give a folder")
    if args.save and (Path(args.save) / "config.json").is_file():
        raise UserError(f"--save {args.save} is a run, which keeps its own metrics.json: give another folder")
    args.device = args.device or DEVICE
    if args.run is not None or args.verify:
        check_device(args.device)
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.compare:
        by = args.by or "value"
        print(compare(args.compare) if args.at is None else compare_at(args.compare, by, args.at))
        if args.figures:
            kinds = by_kind(args.compare)
            metrics = {kind: [read_metrics(folder) for folder in of] for kind, of in kinds.items()}
            drawn = draw_kinds(metrics, Path(args.figures))
            paths = {kind: [read_path(folder) for folder in of if (folder / "path.jsonl").is_file()]
                     for kind, of in kinds.items()}
            if any(paths.values()):
                drawn += draw_paths(paths, Path(args.figures))
            if drawn:
                print("drew " + ", ".join(map(str, drawn)))
    elif args.verify:
        verify(Path(args.verify), args.device)
    elif args.tofu_log:
        print_log(score_log(args.tofu_log, args.reference), args.json)
    else:
        run = open_run(args.run, args.device)
        for flag, name in (("subtract", "alpha"), ("filter_rate", "filter_rate")):
            value = getattr(args, flag)
            if value is None:  # not 0.0, which is a value
                continue
            if not isinstance(run.model, LogitDifference):
                raise UserError(f"--{flag.replace('_', '-')} is for runs of --method uld")
            setattr(run.model, name, value)
        if args.attack:
            with alone(Path(args.run)):
                attack_run(Path(args.run), run, args)
        elif args.choices:
            print(choices_table(run, args.choices))
        else:
            score_again(Path(args.run), run, args)


def print_log(out: dict, as_json: bool) -> None:
    """Of --tofu-log."""
    if as_json:
        print(json.dumps(out, indent=1))
        return
    for key, value in out.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {number(v)}" for k, v in value.items())
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
