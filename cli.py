"""train.py's command line: which flags there are depends on what was chosen, and one that nothing reads is refused.

    args = parse(["--method", "uoe", "--seed", "0,1"])

What was chosen comes first (method, losses, data, model), then every file that will read a flag puts in its own list.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import loop
import pretrain
from data import WORLDS, is_tofu, tofu, values, world
from errors import UserError
from files import digest
from flags import NATURAL, WEIGHT, Flag, Parser, named
from methods import METHODS
from objectives import FORGET, RETAIN, Loss
from runs import DEVICE, check_device
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
    Flag("--out",       named,   "out",  "out",  "where run folders and the cache go"),
    Flag("--resume",    bool,    False,  False,  "go on with the cut-off run of this name"),
    Flag("--restart",   bool,    False,  False,  "discard the cut-off run of this name"),
    Flag("--device",    str,     DEVICE, DEVICE, "cpu, cuda, cuda:1"),
    Flag("--score-rows", NATURAL, 0,     0,      "most rows of each set to score; 0: the protocol's (200 of your "
                                                 "own)"),
    Flag("--score-batch", NATURAL, 0,    0,      "most questions and answers at once in scoring; 0: 256 and 64"),
]
WATCH = [Flag("--score-every-epoch", bool, False, False, "into path.jsonl; eval.py --compare draws it, --at reads it")]
PUBLIC = [  # with --model
    Flag("--template",  str,     None,   None,   "of prompts: llama2, llama3, smollm2, plain; default: its own"),
    Flag("--dtype",     ("float32", "bfloat16"), None, "bfloat16", "of its weights; what trains has float32 copies. "
                                                                   "float16 is too narrow to train in"),
    Flag("--context",   NATURAL, None,   0,      "longest sequence; 0: 512, or the model's if that is less"),
]
REFERENCE = [Flag("--reference", named, None, None, "for forget quality: a model or run that never saw the forget set, "
                                                  "or its published log")]
NEVER_READ = Flag("--never-read", named, None, None, "a model that never read the forget set, such as the one that the "
                  "target was tuned from; forgetting ends (ULD: alpha is chosen) once facts are no likelier than to it")
LONGEST = 150  # bytes of a run's name: file systems take 255, and -seed and suffixes follow
# Flags that a run's name has words for already (name_of), or that leave its outcome alone.
UNNAMED = {"method", "forget_loss", "retain_loss", "arch", "model", "data", "split", "seed", "forget", "retain", "name",
           "out", "resume", "restart", "score_batch", "micro_batch", "device", "score_every_epoch", "save_every",
           "checkpointing", "reference", "never_read", "more_references", "augmented"}


# ---- who reads what -----------------------------------------------------------------------------------------------

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
    own = METHODS[first.method].flags
    if first.model:
        yield "--model", REFERENCE
        if {"--until", "--subtract"} & {flag.name for flag in own}:
            yield "--model beside a method with --until or --subtract", [NEVER_READ]
    yield f"--method {first.method}", own
    if METHODS[first.method].losses is None:
        forget, retain = FORGET[first.forget_loss], RETAIN[first.retain_loss]
        yield f"--forget-loss {first.forget_loss}", list(forget.FLAGS)
        yield f"--retain-loss {first.retain_loss}", [flag for flag in retain.FLAGS if flag not in forget.FLAGS]
        if first.retain_loss != "none":
            small = forget.RETAIN_WEIGHT or METHODS[first.method].retain_weight or 20.0
            yield "a retain loss", [Flag("--retain-weight", WEIGHT, small, 1.0, "lambda")]


@functools.cache
def all_readers() -> dict[str, list[Flag]]:
    """Every reader there is, whatever is chosen: to say where a flag belongs that the chosen ones do not read."""
    losses = [(forget, "none") for forget in FORGET] + [("npo", retain) for retain in RETAIN]
    found: dict[str, dict[str, Flag]] = {}
    for method, arch, model, data, (forget, retain) in product((*METHODS, "finetune"), ("gpt", "moe"), (None, "folder"),
                                                               ("world", "tofu"), losses):
        first = argparse.Namespace(method=method, arch=arch, model=model, data=data, tofu=data == "tofu", forget=None,
                                   forget_loss=forget, retain_loss=retain)
        for title, flags in readers(first):
            found.setdefault(title, {}).update({flag.name: flag for flag in flags})
    return {title: list(flags.values()) for title, flags in found.items()}


def first_choices(parser: Parser) -> None:
    """The flags that decide which others there are."""
    say = parser.add_argument_group("what to do").add_argument
    say("--method", choices=(*METHODS, "finetune"), default="uoe", help="what trains")
    say("--forget-loss", choices=tuple(FORGET), help="what it forgets by (default: npo; uoe's on the world: stranger)")
    say("--retain-loss", choices=tuple(RETAIN), help="what it keeps by (default: gd; beside rmu: hidden)")
    say("--data", type=named, help="world (some authors; usual if dense), topic (potions; with experts), tofu, or a "
                                   "folder of its files")
    say("--forget", type=named, metavar="FILE", help="your own JSON lines to forget, instead of --data")
    say("--retain", type=named, metavar="FILE", help="your own JSON lines to keep")
    say("--model", type=named, help="a Hugging Face folder, a hub name, or a run folder: the target. Default: a small "
                                    "one")
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
        parser.add(title, flags, bool(first.model), first.data if on_world else "other")
    parser.add_argument("-h", "--help", action="help", help="print this")
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.partition("=")[0]
        owners = [title for title, flags in all_readers().items() if any(flag == f.name for f in flags)]
        if owners:
            raise UserError(f"{flag} does nothing here: it belongs to {', '.join(owners)}")
        raise UserError(f"{word} is unknown: --help lists what --method {first.method} takes")
    given = {key: value for key, value in vars(args).items() if value != parser.get_default(key)}
    for key, value in vars(first).items():
        setattr(args, key, value)
    finish(args, on_world, argv)
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
        first.forget_loss = first.forget_loss or usual_loss(first)
        first.retain_loss = first.retain_loss or ("hidden" if first.forget_loss == "rmu" else "gd")
    elif any(losses):
        raise UserError(f"--forget-loss and --retain-loss do nothing with --method {first.method}: its own are "
                        f"{' and '.join(method.losses)}")
    else:
        first.forget_loss, first.retain_loss = method.losses


def usual_loss(first: argparse.Namespace) -> str:
    """What a method forgets by where --forget-loss does not say."""
    small_world = first.data in WORLDS and not first.forget and not first.model
    return METHODS[first.method].on_world if small_world else "npo"


def finish(args: argparse.Namespace, on_world: bool, argv: list[str]) -> None:
    """Values that depend on others. Raises UserError for what can be seen before anything is trained."""
    del args.tofu
    if FORGET.get(args.forget_loss, Loss).AS_STRANGERS:
        if not on_world:
            raise UserError(f"--forget-loss {args.forget_loss}: only the embedded world has strangers to become like")
        if args.forget_on == "answer":
            raise UserError(f"--forget-on answer: --forget-loss {args.forget_loss} (uoe's default) would teach "
                            "strangers' names with the rest of the answer: take --forget-loss npo")
    if getattr(args, "m", None) == "own" and not on_world:
        raise UserError("--m own: only the embedded world has strangers of other topics to tell by: leave it out, or "
                        "give a number")
    if getattr(args, "never_read", None):
        how = "subtract" if args.method == "uld" else "until"
        if any(word.partition("=")[0] == f"--{how}" for word in argv):
            raise UserError(f"--{how} {getattr(args, how)} does nothing beside --never-read, which decides that: give "
                            "one of the two")
        if args.never_read == args.model:
            raise UserError(f"--never-read {args.never_read} is the --model, which read it: give one that did not")
        setattr(args, how, "strangers")  # by belief; train.run puts that model's in the place of strangers'
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
        parts += [args.forget_loss] if args.forget_loss != usual_loss(args) else []
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
    parts += [word for word in ("augmented", "never-read") if getattr(args, word.replace("-", "_"), None)]
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
