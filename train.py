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
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import loop
import parallel
import pretrain
from data import WORLDS, is_tofu, tofu, values, world
from data.batches import Rows, encode_rows, is_cut
from data.rows import DataSet
from data.tokenizer import Tokenizer
from errors import UserError, one_line_errors
from files import digest, remove, write
from flags import NATURAL, WEIGHT, Flag, Parser
from hub.checkpoint import find_folder, load_tokenizer, read_config
from hub.tokenizer import NoTokenizer
from interfaces import LanguageModel, Method, TextCodec
from lab.memory import announce, measure_from_here, peak_memory
from lab.report import finish_report
from lab.tables import compare
from methods import METHODS
from metrics.score import Scores, as_read, evaluate, kept_scores, path_writer, scores_of
from model import GPT, count_parameters
from objectives import FORGET, RETAIN, Loss
from pretrained import load, save
from runs import ANYHOW, DEVICE, RunFolder, check_device, check_source, data_of, made_of, weights_of
from uoe import check_layer


def seeds(text: str) -> list[int]:
    """A kind of flag: one whole number below 2^32, or several with commas between."""
    if not all(part.isdecimal() and len(part) <= 10 and int(part) < 2**32 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number below 2^32, or several as in 0,1,2")
    out = [int(part) for part in text.split(",")]
    if len(set(out)) < len(out):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice")
    return out


RUN = [  # every run
    #     name          kind     small   public  what it is
    Flag("--seed",      seeds,   [0],    [0],    "of world, models and order of rows; 0,1,2: a run each, then mean and "
                                                 "spread"),
    Flag("--name",      str,     None,   None,   "of the run folder; default: what was chosen"),
    Flag("--out",       str,     "out",  "out",  "where run folders and the cache go"),
    Flag("--resume",    bool,    False,  False,  "go on with the cut-off run of this name"),
    Flag("--restart",   bool,    False,  False,  "discard the cut-off run of this name"),
    Flag("--device",    str,     DEVICE, DEVICE, "cpu, cuda, cuda:1"),
    Flag("--score-rows", NATURAL, 0,     0,      "score at most so many rows of each set; 0: the protocol's"),
    Flag("--score-batch", NATURAL, 0,    0,      "most questions and answers at once in scoring; 0: 256 and 64"),
]
WATCH = [Flag("--score-every-epoch", bool, False, False, "into path.jsonl; eval.py --compare draws it, --at reads it")]
PUBLIC = [  # with --model
    Flag("--template",  str,     None,   None,   "of prompts: llama2, llama3, smollm2, plain; default: its own"),
    Flag("--dtype",     ("float32", "bfloat16"), None, "bfloat16", "of its weights; what trains has float32 copies. "
                                                                   "float16 is too narrow to train in"),
    Flag("--context",   NATURAL, None,   0,      "longest sequence; 0: 512, or the model's if that is less"),
]
REFERENCE = [Flag("--reference", str, None, None, "for forget quality: a model or run that never saw the forget set, "
                                                  "or its published log")]
# Flags that a run's name has words for already, or that leave its outcome alone.
LONGEST = 150  # bytes of a run's name: file systems take 255, and -seed and suffixes follow
UNNAMED = {"method", "forget_loss", "retain_loss", "arch", "model", "data", "split", "seed", "forget", "retain", "name",
           "out", "resume", "restart", "score_batch", "micro_batch", "device", "score_every_epoch", "save_every",
           "checkpointing", "reference", "more_references", "augmented"}


# ---- the command line -------------------------------------------------------------------------------------------

def readers(first: argparse.Namespace) -> Iterator[tuple[str, list[Flag]]]:
    """(title, flags) of all that reads the command line, once it is known what was chosen."""
    yield "the run", RUN
    if first.tofu:
        yield "--data tofu", tofu.FLAGS
        if first.method == "uld":  # the only one that learns from paraphrased and perturbed rows
            yield "--data tofu --method uld", tofu.AUGMENTED
    if first.data in WORLDS and not first.forget:
        yield "--data world or topic", world.FLAGS
    if first.model:
        yield "--model", PUBLIC
    else:
        yield "the small models", pretrain.SMALL
        if first.arch == "moe":
            yield "--arch moe", pretrain.SMALL_MOE
    yield "training", loop.FLAGS
    if first.method == "finetune":
        yield "--method finetune", pretrain.FINETUNE
        return
    yield "unlearning", [*WATCH, *values.FLAGS]
    if first.model:
        yield "--model", REFERENCE
    yield f"--method {first.method}", METHODS[first.method].flags
    if METHODS[first.method].losses is None:
        forget, retain = FORGET[first.forget_loss], RETAIN[first.retain_loss]
        yield f"--forget-loss {first.forget_loss}", list(forget.FLAGS)
        yield f"--retain-loss {first.retain_loss}", [flag for flag in retain.FLAGS if flag not in forget.FLAGS]
        if first.retain_loss != "none":
            small, public = forget.RETAIN_WEIGHT
            if forget.RETAIN_WEIGHT == Loss.RETAIN_WEIGHT:
                small = METHODS[first.method].retain_weight or small
            yield "a retain loss", [Flag("--retain-weight", WEIGHT, small, public, "lambda")]


def all_readers() -> Iterator[tuple[str, list[Flag]]]:
    """Every reader there is, to say where a flag belongs that the chosen ones do not read."""
    yield "--data tofu", tofu.FLAGS
    yield "--data tofu with --method uld", tofu.AUGMENTED
    yield "--data world or topic", world.FLAGS
    yield "--model", [*PUBLIC, *REFERENCE]
    yield "the small models (no --model)", pretrain.SMALL
    yield "--arch moe", pretrain.SMALL_MOE
    yield "unlearning methods", [*WATCH, *values.FLAGS]
    for name, method in METHODS.items():
        yield f"--method {name}", method.flags
    for flag, losses in (("--forget-loss", FORGET), ("--retain-loss", RETAIN)):
        for name, loss in losses.items():
            yield f"{flag} {name}", list(loss.FLAGS)
    yield "a retain loss", [Flag("--retain-weight", WEIGHT, 0, 0, "")]


def first_choices(parser: Parser) -> None:
    """The flags that decide which others there are."""
    say = parser.add_argument_group("what to do").add_argument
    say("--method", choices=(*METHODS, "finetune"), default="uoe", help="what trains")
    say("--forget-loss", choices=tuple(FORGET), help="what it forgets by (default: npo)")
    say("--retain-loss", choices=tuple(RETAIN), help="what it keeps by (default: gd; beside rmu: hidden)")
    say("--data", help="world (some authors; the default), topic (all potions; with experts), tofu, or a folder of its")
    say("--forget", metavar="FILE", help="your own JSON lines to forget, instead of --data")
    say("--retain", metavar="FILE", help="your own JSON lines to keep")
    say("--model", help="a Hugging Face folder, a hub name, or a run folder: the target. Default: a small one")
    say("--arch", choices=("gpt", "moe"), help="of the small model: dense or with experts (default: the method's)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, each of which something reads. Raises UserError naming the first that makes no sense."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="unlearn part of what a model learnt, and score it", add_help=False)
    first_choices(parser)
    first, _ = parser.parse_known_args(argv)
    settle(first)
    on_world = first.data in WORLDS and not first.forget
    for title, flags in readers(first):
        parser.add(title, flags, bool(first.model), on_world)
    parser.add_argument("-h", "--help", action="help", help="print this")
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.partition("=")[0]
        owners = [title for title, flags in all_readers() if any(flag == f.name for f in flags)]
        if owners:
            raise UserError(f"{flag} does nothing here: it belongs to {', '.join(dict.fromkeys(owners))}")
        raise UserError(f"{word} is unknown: --help lists what --method {first.method} takes")
    given = {key: value for key, value in vars(args).items() if value != parser.get_default(key)}
    for key, value in vars(first).items():
        setattr(args, key, value)
    finish(args, on_world)
    args.named = args.name is not None
    args.name = args.name if args.named else name_of(args, given)
    check_name(args.name)
    if args.resume and args.restart:
        raise UserError("--resume goes on with a cut-off run and --restart discards it: give one of the two")
    return args


def check_name(name: str) -> None:
    """Raises UserError for what is no folder name, is one of ours for something else, or has no room for a suffix."""
    plain = name and Path(name).name == name and name != "cache"
    if not plain or name.startswith((".", "-")) or name.endswith(".partial"):
        raise UserError(f"--name {name} is not a plain folder name of its own: --out says where it goes")
    if not name.isprintable() or len(name.encode()) > LONGEST:
        raise UserError(f"--name {name[:40]!r}... is not one line of at most {LONGEST} bytes: shorten it")


def settle(first: argparse.Namespace) -> None:
    """Fill in the first choices, and refuse those that do not go together."""
    if bool(first.forget) != bool(first.retain):
        raise UserError("--forget and --retain go together: give both files, or neither")
    if first.forget and first.data:
        raise UserError(f"--data {first.data} does nothing beside --forget and --retain: leave it out")
    if first.model and first.arch:
        raise UserError(f"--arch {first.arch} is of the small model: --model brings its own")
    moe = first.method != "finetune" and (first.arch or METHODS[first.method].arch) == "moe" and not first.model
    first.data = first.data or ("topic" if moe else "world")
    first.tofu = not first.forget and is_tofu(first.data)
    losses = (first.forget_loss, first.retain_loss)
    if first.method == "finetune":
        if not first.model:
            raise UserError("--method finetune needs --model: a Hugging Face folder, a hub name or a run folder")
        if any(losses):
            raise UserError("--forget-loss and --retain-loss do nothing with --method finetune: it forgets nothing")
        return
    method = METHODS[first.method]
    first.arch = None if first.model else first.arch or method.arch
    if method.needs_experts and first.arch == "gpt":
        raise UserError(f"--method {first.method} needs a mixture of experts: leave out --arch gpt")
    if method.losses is None:
        first.forget_loss = first.forget_loss or "npo"
        first.retain_loss = first.retain_loss or ("hidden" if first.forget_loss == "rmu" else "gd")
    elif any(losses):
        raise UserError(f"--forget-loss and --retain-loss do nothing with --method {first.method}: its own are "
                        f"{' and '.join(method.losses)}")
    else:
        first.forget_loss, first.retain_loss = method.losses


def finish(args: argparse.Namespace, on_world: bool) -> None:
    """Values that depend on others. Raises UserError for what can be seen before anything is trained."""
    del args.tofu
    if args.method != "finetune" and args.forget_loss in ("stranger", "stranger-npo") and not on_world:
        raise UserError(f"--forget-loss {args.forget_loss}: only the embedded world has strangers to become like")
    args.retain_weight = getattr(args, "retain_weight", 0.0)  # beside --retain-loss none
    args.dtype = getattr(args, "dtype", "float32")
    args.keeps_only = getattr(args, "split", "forget").startswith("retain")
    if args.keeps_only:
        if args.method != "finetune":
            raise UserError(f"--split {args.split} is for --method finetune; to unlearn, give the forget split")
        args.split = next(forget for forget, retain in tofu.RETAIN.items() if retain == args.split)
    check_device(args.device)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made ({error.strerror}): give another folder") from None
    if not args.model:
        pretrain.fill_in(args, on_world)
        check_fit(args, pretrain.small_config(args, args.vocab_size))


def check_fit(args: argparse.Namespace, config: Any) -> None:
    """Raises UserError where the method's or the loss's flags ask for what this shape of model has not."""
    if getattr(args, "rmu_layer", None) is not None:
        check_layer("--rmu-layer", args.rmu_layer, config.n_layer)
    if args.method != "finetune":
        METHODS[args.method].check(args, config)


def name_of(args: argparse.Namespace, given: dict) -> str:
    """The run folder's name where none is given: method, losses, model, data, then every other flag given.

    So runs that were asked for differently mostly have different names; where not, runs.RunFolder refuses the second.
    """
    parts = [args.method]
    if args.method != "finetune" and METHODS[args.method].losses is None:
        parts += [args.forget_loss] if args.forget_loss != "npo" else []
        parts += [args.retain_loss] if args.retain_loss != ("hidden" if args.forget_loss == "rmu" else "gd") else []
    if args.method != "finetune" and args.arch and args.arch != METHODS[args.method].arch:
        parts.append(args.arch)
    if args.model:
        parts.append(Path(args.model).name)
    usual = "topic" if args.arch == "moe" else "world"
    if args.data != usual or args.forget:
        parts.append(Path(args.forget or args.data).stem)
    if "split" in args:
        parts.append(args.split.replace("forget", "without") if args.keeps_only else args.split)
    parts += ["augmented"] if getattr(args, "augmented", None) else []
    for key, value in given.items():
        if key not in UNNAMED:
            told = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            told = ".".join(map(str, value)) if isinstance(value, tuple) else told
            parts.append(key.replace("_", "-") + told)
    name = "-".join(parts)
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    if len(name.encode()) > LONGEST:
        name = name.encode()[: LONGEST - 17].decode(errors="ignore") + "-" + digest(name)
    return name


def settings(args: argparse.Namespace) -> str:
    """One line: what this run does, every value that something reads."""
    quiet = ("named", "resume", "restart", "out", "name")
    told = [f"{key.replace('_', '-')} {value}" for key, value in vars(args).items()
            if key not in quiet and value is not None and value is not False]
    return "settings: " + ", ".join(told)


# ---- the story --------------------------------------------------------------------------------------------------

@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with parallel.processes(args):
        folders = run_seeds(args)
    if len(folders) > 1 and args.method != "finetune":
        print("\n" + compare(folders))


def run_seeds(args: argparse.Namespace, method: Method | None = None, balance: float = pretrain.BALANCE) -> list[Path]:
    """A run per seed of args.seed. method: instead of the one that args names (lab/ablations.py)."""
    runs = []
    for seed in args.seed:
        this = copy.copy(args)
        this.seed = seed
        if len(args.seed) > 1 or (seed and not args.named):
            this.name = f"{args.name}-seed{seed}"
        runs.append(RunFolder(this))  # what is in the way of the last is said before the first is trained
    if args.resume and len(runs) == 1 and not runs[0].cut_off() and not parallel.rank():
        raise UserError(f"--resume: {runs[0].partial} holds no cut-off run; start it without --resume")
    for folder in runs:
        if args.resume and len(runs) > 1 and folder.finished() and not folder.cut_off():  # before the cut
            folder.check_same(folder.final, ANYHOW, "give the same options, or another --name")
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
    elif "reference" in places and not Path(args.reference).is_file():
        check_tokens(args, tokenizer, data)
    for flag in ("model", "reference"):
        if getattr(args, flag, None):
            check_source(flag, getattr(args, flag), data)
    of = made_of(data, tokenizer.vocab_size, places, args.device)
    partial = folder.open(of)
    config = {**vars(args), "made_of": of, **places}
    scores = {}
    for role, place in places.items():
        loaded = target if role == "target" else None
        scores[role] = scores_of(place, config, data, tokenizer, role, args.device, loaded, partial)

    # 2. Unlearn: the method's own file has the rest. A run that was cut off after this point goes on after it.
    dtype = target.embed.weight.dtype
    saved = folder.saved()
    if parallel.agreed(saved is not None, target.device) and parallel.rank():
        return folder.leave()
    if saved:
        config = saved
        parts = {part: load(partial / part, dtype, args.device)[0] for part in config["kept"]}
        model = method.reopen(target, parts, config)
    else:
        watch = path_writer(partial, tokenizer, data, scores, target) if args.score_every_epoch else None
        fit = loop.fitting(args, forget, partial, args.resume, after_epoch(args, target, forget, data, watch))
        torch.manual_seed(args.seed)
        began = time.perf_counter()
        measure_from_here(args.device)
        model, kept, report = method.unlearn(target, forget, retain, args, fit)
        spent = time.perf_counter() - began + report.pop("resumed_seconds", 0.0)
        config |= vars(args) | report | {"made_of": of, "total_parameters": count_parameters(target),
                                         "kept": list(kept)}
        if parallel.rank():
            return folder.leave()
        config |= {"setup_seconds": spent - report["train_seconds"],  # before training and after
                   "peak_memory_bytes": peak_memory(args.device)}
        for name, part in kept.items():
            remove(partial / name)  # of a run that was cut off after this point
            save(part, tokenizer, partial / name)
        if report["diverged"] and (partial / "path.jsonl").is_file():  # what was gone back on is no part of the path
            lines = (partial / "path.jsonl").read_text().splitlines(keepends=True)
            write(partial / "path.jsonl", "".join(x for x in lines if json.loads(x)["step"] <= report["steps"]))
        if "assistant" in kept and args.method == "uld":
            write(partial / "assistant" / "README.md", decoding_note(config, places["target"]))
        folder.save(config)

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
            return folder.leave()
        report.pop("resumed_seconds", None)
        save(model, tokenizer, partial / "model")
        config = {**vars(args), "made_of": of, "target": args.model, "kept": ["model"], **report,
                  "peak_memory_bytes": peak_memory(args.device)}
        folder.save(config)
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
    args.context = min(args.context or 512, model.config.max_len)
    if args.method != "finetune" and METHODS[args.method].needs_experts and not model.is_moe:
        raise UserError(f"--method {args.method} needs a mixture of experts, and {args.model} is dense: make it one "
                        "with python -m lab.upcycling, or use --method full")
    return model, tokenizer


def check_rows(args: argparse.Namespace, data: DataSet, tokenizer: TextCodec) -> None:
    """Says which rows are cut; raises UserError now, not after an hour, for one that cannot be scored."""
    for name, rows in (("forget", data.forget), ("retain", data.retain)):
        cut = sum(is_cut(row, tokenizer, args.context) for row in rows)
        if cut:
            print(f"{cut} of {len(rows)} {name} rows are longer than --context {args.context}: they are taught up to "
                  "there, and scored as far as the model's own context reaches")
    for name, rows in data.scored.items():
        encode_rows(rows, tokenizer, args.context, f"{name} row", truncate=bool(args.model))


def check_tokens(args: argparse.Namespace, tokenizer: TextCodec, data: DataSet) -> None:
    """Raises UserError where the reference reads text otherwise than the target: their scores would not compare."""
    folder = find_folder(weights_of(args.reference))
    theirs = load_tokenizer(folder, read_config(folder), args.template)
    if isinstance(theirs, NoTokenizer):
        return
    few = data.texts()[:20]
    if [theirs.encode(text) for text in few] != [tokenizer.encode(text) for text in few]:
        raise UserError(f"--reference {args.reference} has another tokenizer than --model {args.model}: their scores "
                        "do not compare, so give a model of the same family")
    told = [[*of.prompt(text), *of.completion(text)] for of in (theirs, tokenizer) for text in few]
    if told[: len(few)] != told[len(few) :]:
        raise UserError(f"--reference {args.reference} reads prompts or ends answers otherwise than --model "
                        f"{args.model}: give both one --template")


def decoding_note(config: dict, target: str) -> str:
    """What a saved assistant needs to be told by: its target, and how to decode with both."""
    here = "this folder"
    alpha, rate = f"{config['subtract']:g}", config["filter_rate"]
    return (f"ULD assistant (arXiv 2406.08607) of the target `{weights_of(target)}`. By itself it says what is to be "
            f"forgotten.\n\nDecode with both: logits = target - {alpha} * assistant, where the assistant is {here}; "
            f"tokens whose target probability is below {rate} of the likeliest are ruled out.\n\n"
            "```python\nfrom pretrained import load\nfrom uld import LogitDifference\n"
            f"target, tokenizer = load({str(weights_of(target))!r})\nassistant, _ = load({here!r})\n"
            f"model = LogitDifference(target, assistant, {alpha}, {rate})\n```\n")


if __name__ == "__main__":
    main()
