"""The whole story: pretrain a small model or open a public one, unlearn part of what it learnt, score it.

    python train.py --method uoe                      # small MoE, one expert unlearned      (uoe.py)
    python train.py --method uld                      # small GPT, assistant and difference  (uld.py)
    python train.py --method full --forget-loss ga    # a baseline, on either model: --arch gpt | moe  (baselines.py)
    python train.py --method uld --data tofu --split forget10
    python train.py --method uoe --help               # the flags of one method; so of one --data, one --forget-loss

    python train.py --method finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data tofu --name target
    python train.py --method finetune --model ... --data tofu --split retain90 --name reference
    python train.py --method uld --model out/target --reference out/reference --data tofu

Without --model, target (saw everything) and reference (never saw the forget set) are trained once and kept in
out/cache. A run is a folder out/<name> (runs.py), written under <name>.partial and renamed when whole; --resume goes
on with a run that was cut off, from its last kept step, its saved weights or its scores, and on CPU ends with the very
same bits. Ctrl-C and SIGTERM finish the step and keep it.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

import loop
import parallel
import pretrain
from belief import unread_belief
from cli import check_fit, parse, settings
from data.batches import Rows, encode_rows
from data.rows import DataSet
from data.tokenizer import Tokenizer
from errors import UserError, one_line_errors
from files import remove, write
from hub.checkpoint import find_folder, load_tokenizer, read_config
from hub.tokenizer import NoTokenizer
from interfaces import LanguageModel, Method, TextCodec
from lab.memory import announce, context_of, large_blocks, measure_from_here, peak_memory
from lab.report import finish_report
from lab.tables import compare
from methods import METHODS
from metrics.score import Scores, as_read, evaluate, kept_scores, path_writer, scores_of
from model import GPT, count_parameters
from pretrained import load, save
from runs import ANYHOW, RunFolder, check_source, data_of, made_of, weights_of


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with parallel.processes(args):
        folders = run_seeds(args)
        if len(folders) > 1 and args.method != "finetune" and not parallel.rank():
            print("\n" + compare(folders))


def run_seeds(args: argparse.Namespace, method: Method | None = None, balance: float = pretrain.BALANCE) -> list[Path]:
    """A run per seed of args.seed. method: instead of the one that args names (lab/ablations.py)."""
    if args.model:
        large_blocks()
    runs = []
    for seed in args.seed:
        this = copy.copy(args)
        this.seed = seed
        if len(args.seed) > 1 or (seed and not args.named):
            this.name = f"{args.name}-seed{seed}"
        runs.append(RunFolder(this))  # all are checked before the first trains
    if args.resume and len(runs) == 1 and not runs[0].cut_off() and not parallel.rank():
        if runs[0].finished():
            raise UserError(f"--resume: {runs[0].final} is finished; without --resume it is made anew")
        raise UserError(f"--resume: {runs[0].partial} holds no cut-off run; start it without --resume")
    for folder in runs:
        done = args.resume and len(runs) > 1 and folder.finished() and not folder.cut_off()  # it ended before the cut
        if done:
            folder.check_same(folder.final, ANYHOW, "give the same options, or another --name")
        if parallel.agreed(done, torch.device(args.device)):
            continue
        with folder:
            print(settings(folder.args))
            run(folder.args, folder, method or METHODS.get(args.method), balance)
    return [folder.final for folder in runs]


def run(args: argparse.Namespace, folder: RunFolder, method: Method | None, balance: float = pretrain.BALANCE) -> Path:
    """One run, from data to figures; returns its folder."""
    # 1. What is to be forgotten and kept; a model that knows it, a reference that never did.
    data = data_of(vars(args))
    print(f"{data.name}: {len(data.forget)} rows to forget, {len(data.retain)} to keep, {len(data.background)} beside")
    if args.model:
        announce(read_config(find_folder(weights_of(args.model))), args, data.forget + data.retain)
        target, tokenizer = open_public(args)
        places = {"target": args.model} | ({"reference": args.reference} if getattr(args, "reference", None) else {})
        check_fit(args, target.config)
    else:
        tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
    check_rows(args, data, tokenizer)
    if method is None:
        return run_finetune(args, folder, data, target, tokenizer)
    forget, retain = loop.learning_rows(args, data, *method.rows(data, args), tokenizer)
    if not args.model:
        roles = ["target", "reference", *(f"reference-{i + 2}" for i in range(args.more_references))]
        places = {role: str(pretrain.cached_model(args, data, tokenizer, role, balance)) for role in roles}
        target, _ = load(weights_of(places["target"]), device=args.device)
    unread = getattr(args, "never_read", None)
    for flag, place in (("model", args.model), ("reference", getattr(args, "reference", None)), ("never-read", unread)):
        if not place:
            continue
        log = flag == "reference" and Path(place).is_file()  # a published one stands in for that model
        if flag != "model" and not log:
            check_tokens(args, flag, place, tokenizer, data)
        check_source(flag, place, data)
    of = made_of(data, tokenizer.vocab_size, places | ({"never_read": unread} if unread else {}), args.device)
    partial = folder.open(of)
    config = {**vars(args), "made_of": of, **places}
    scores = {}
    for role, place in places.items():
        loaded = target if role == "target" else None
        scores[role] = scores_of(place, config, data, tokenizer, role, args.device, loaded, partial)

    # 2. Unlearn: the method's own file has the rest. A run that was cut off once its weights were saved skips this.
    dtype = target.embed.weight.dtype
    saved = folder.saved()
    if parallel.agreed(saved is not None, target.device) and parallel.rank():
        return folder.leave()
    if saved:
        config = saved
        parts = {part: load(partial / part, dtype, args.device)[0] for part in config["kept"]}
        model = method.reopen(target, parts, config)
    else:
        if unread:
            print(f"--never-read {unread}: it is in memory beside the target while it is asked, before training")
            unread_belief(forget.calibrating(), load(weights_of(unread), dtype, args.device, args.template)[0])
        watch = path_writer(partial, tokenizer, data, scores, target) if args.score_every_epoch else None
        fit = loop.fitting(args, forget, partial, args.resume, after_epoch(args, target, forget, data, watch))
        torch.manual_seed(args.seed)
        began = time.perf_counter()
        measure_from_here(args.device)
        model, kept, report = method.unlearn(target, forget, retain, args, fit)
        spent = time.perf_counter() - began + report.pop("resumed_seconds", 0.0)
        config |= vars(args) | report | {"total_parameters": count_parameters(target), "kept": list(kept)}
        if parallel.rank():
            parallel.agreed(False, target.device)  # waits: the others keep their state until the first has saved
            return folder.leave()
        config |= {"setup_seconds": spent - report["train_seconds"],  # before training and after
                   "peak_memory_bytes": peak_memory(args.device)}
        for name, part in kept.items():
            remove(partial / name)  # of a run that was cut off after this point
            save(part, tokenizer, partial / name)
        if report["diverged"] and (partial / "path.jsonl").is_file():  # what was gone back on is no part of the path
            lines = (partial / "path.jsonl").read_text().splitlines(keepends=True)
            write(partial / "path.jsonl", "".join(x for x in lines if json.loads(x)["step"] <= report["steps"]))
        if args.method == "uld":
            write(partial / "assistant" / "README.md", decoding_note(config, places["target"]))
        folder.save(config)
        parallel.agreed(False, target.device)

    # 3. Score, draw.
    how = as_read(dtype, tokenizer, *(partial / part for part in config["kept"]))
    scores["unlearned"] = kept_scores(partial / "scores.json", data, how,
                                      lambda: evaluate(model, tokenizer, data, "unlearned"))
    told = ("method", "forget_loss", "retain_loss", "seed", "trainable_parameters", "total_parameters", "steps",
            "train_seconds", "setup_seconds", "diverged", "peak_memory_bytes", "made_of")
    outcome = {key: config[key] for key in told}
    outcome["seconds"] = config["train_seconds"] + config["setup_seconds"]
    models: dict[str, LanguageModel] = {"target": target}
    if "reference" in places and not Path(places["reference"]).is_file():
        models["reference"] = load(weights_of(places["reference"]), dtype, args.device,
                                   getattr(args, "template", None))[0]
    finish_report(partial, outcome, data, tokenizer, scores, models | {"unlearned": model})
    return folder.close()


def after_epoch(args: argparse.Namespace, target: GPT, forget: Rows, data: DataSet, watch) -> loop.AfterEpoch | None:
    """What is looked at after each epoch: --score-every-epoch, then --until."""
    until: Any = getattr(args, "until", "never")
    stop = None
    if until == "strangers":
        stop = loop.until_strangers(target, forget.calibrating())
    elif until != "never":
        stop = loop.stop_at(until, forget.rows, forget.tokenizer, data.limits)
    if watch is None:
        return stop

    def look(model: LanguageModel, epoch: int, steps: int, seconds: float) -> bool:
        watch({"epoch": epoch, "step": steps, "seconds": seconds}, model)
        return stop is not None and stop(model, epoch, steps, seconds)

    return look


def run_finetune(args: argparse.Namespace, folder: RunFolder, data: DataSet, model: GPT, tokenizer: TextCodec) -> Path:
    """--method finetune: the target, or with a retain split the reference, from a base checkpoint."""
    check_source("model", args.model, data)
    of = made_of(data, tokenizer.vocab_size, {"target": args.model}, args.device)
    partial = folder.open(of)
    saved = folder.saved()
    if parallel.agreed(saved is not None, model.device) and parallel.rank():
        return folder.leave()
    if saved:
        config = saved
        model, _ = load(partial / "model", model.embed.weight.dtype, args.device, args.template)
    else:
        measure_from_here(args.device)
        report = pretrain.finetune(args, model, tokenizer, data, partial)
        if parallel.rank():
            parallel.agreed(False, model.device)  # as in run
            return folder.leave()
        report.pop("resumed_seconds", None)
        save(model, tokenizer, partial / "model")
        config = {**vars(args), "made_of": of, "target": args.model, "kept": ["model"], **report,
                  "peak_memory_bytes": peak_memory(args.device)}
        folder.save(config)
        parallel.agreed(False, model.device)
    how = as_read(model.embed.weight.dtype, tokenizer, partial / "model")
    scores: dict[str, Scores] = {"target": kept_scores(partial / "scores.json", data, how,
                                                       lambda: evaluate(model, tokenizer, data, "fine-tuned"))}
    size = count_parameters(model)
    told = ("seed", "steps", "train_seconds", "diverged", "peak_memory_bytes", "made_of")
    outcome = {"method": "finetune", "forget_loss": None, "retain_loss": None, "trainable_parameters": size,
               "total_parameters": size, **{key: config[key] for key in told}}
    finish_report(partial, outcome, data, tokenizer, scores, {"target": model})
    return folder.close()


def open_public(args: argparse.Namespace) -> tuple[GPT, TextCodec]:
    """The model of --model and its tokenizer. Sets args.context where the command line did not."""
    model, tokenizer = load(weights_of(args.model), getattr(torch, args.dtype), args.device, args.template)
    args.context = context_of(args, model.config)
    if args.method != "finetune" and METHODS[args.method].needs_experts and not model.is_moe:
        raise UserError(f"--method {args.method} needs a mixture of experts, and {args.model} is dense: make it one "
                        "with python -m lab.upcycling, or use --method full")
    return model, tokenizer


def check_rows(args: argparse.Namespace, data: DataSet, tokenizer: TextCodec) -> None:
    """Says which rows are cut; raises UserError now, not after an hour, for one that cannot be scored."""
    for name, rows in (("forget", data.forget), ("retain", data.retain)):
        whole = encode_rows(rows, tokenizer, 2**31, f"{name} row")  # longer than any row: nothing is cut yet
        cut = sum(len(example.tokens) > args.context for example in whole)
        if cut:
            print(f"{cut} of {len(rows)} {name} rows are longer than --context {args.context}: they are taught up to "
                  "there, and scored as far as the model's own context reaches")
    for name, rows in data.scored.items():
        encode_rows(rows, tokenizer, args.context, f"{name} row", truncate=bool(args.model))


def check_tokens(args: argparse.Namespace, flag: str, place: str, tokenizer: TextCodec, data: DataSet) -> None:
    """Raises UserError where the model at `place` reads text otherwise than the target: they would not compare."""
    folder = find_folder(weights_of(place))
    theirs = load_tokenizer(folder, read_config(folder), args.template)
    if isinstance(theirs, NoTokenizer):
        return
    few = data.texts()[:20]
    if [theirs.encode(text) for text in few] != [tokenizer.encode(text) for text in few]:
        raise UserError(f"--{flag} {place} has another tokenizer than --model {args.model}: they do not compare, so "
                        "give a model of the same family")
    told = [[*of.prompt(text), *of.completion(text)] for of in (theirs, tokenizer) for text in few]
    if told[: len(few)] != told[len(few) :]:
        raise UserError(f"--{flag} {place} reads prompts or ends answers otherwise than --model {args.model}: give "
                        "both one --template")


def decoding_note(config: dict, target: str) -> str:
    """What a saved assistant needs to be told by: its target, and how to decode with both."""
    alpha, rate = config["subtract"], config["filter_rate"]
    filtered = f"; tokens whose target probability is below {rate} of the likeliest are ruled out" if rate else ""
    return (f"ULD assistant (arXiv 2406.08607) of the target `{weights_of(target)}`. By itself it says what is to be "
            f"forgotten.\n\nDecode with both: logits = target - {alpha} * assistant, where the assistant is this "
            f"folder{filtered}.\n\n"
            "```python\nfrom pretrained import load\nfrom uld import LogitDifference\n"
            f"target, tokenizer = load({str(weights_of(target))!r})\nassistant, _ = load('this folder')\n"
            f"model = LogitDifference(target, assistant, {alpha}, {rate}, {config['centred']})\n```\n")


if __name__ == "__main__":
    main()
