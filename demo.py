"""What the demonstrations of uoe.py and uld.py share: the embedded world's target, its rows, a loop, colours.

    python uoe.py            # trains the small target once (minutes), unlearns, shows
    python uld.py out/uld    # shows a run that is there
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import loop
import pretrain
from data import load_data, values, world
from data.batches import Rows
from data.tokenizer import Tokenizer
from flags import Flag, Parser, defaults
from interfaces import Method, TextCodec
from model import GPT
from pretrained import load
from runs import DEVICE, Opened, check_device, read_run

COLOURS = {"red": "\033[31m", "grey": "\033[90m", "plain": ""}


def colour(text: str, name: str) -> str:
    """The text in a colour, where the terminal has them."""
    if not sys.stdout.isatty() or not COLOURS[name]:
        return text
    return f"{COLOURS[name]}{text}\033[0m"


def parser(what: str) -> Parser:
    out = Parser(description=what)
    out.add_argument("run", nargs="?", help="a run folder of this method; without it, a small model is unlearned now")
    out.add_argument("--device", default=DEVICE, help="cpu, cuda, cuda:1")
    return out


def unlearned(flags: list[Flag], method: Method, device: str,
              **others) -> tuple[GPT, Any, dict, TextCodec, dict[str, Rows]]:
    """Runs a method on the embedded world, seed 0, from the target that train.py caches too. others: more arguments.

    Returns (target, what was made of it, the method's report, tokenizer, rows of forget, retain and untouched).
    """
    task = "topic" if method.arch == "moe" else "world"
    args = defaults(flags, loop.FLAGS, values.FLAGS, world.FLAGS, pretrain.SMALL, pretrain.SMALL_MOE,
                    method="demonstration", arch=method.arch, data=task, forget=None, model=None, seed=0, out="out",
                    device=device, **others)
    check_device(device)
    pretrain.fill_in(args, on_world=True)
    data = load_data(args.data, seed=args.seed)
    tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
    target, _ = load(pretrain.cached_model(args, data, tokenizer, "target") / "model", device=device)
    forget, retain = loop.learning_rows(args, data, *method.rows(data, args), tokenizer)
    untouched = Rows(data.background, tokenizer, args.context, args.batch_size, args.seed, args.device)
    sets = {"forget": forget, "retain": retain, "untouched": untouched}
    stop = loop.until_strangers(target, forget.calibrating()) if "until" in args else None
    with tempfile.TemporaryDirectory() as scratch:  # where the loop keeps its state
        fit = loop.fitting(args, forget, Path(scratch), after_epoch=stop)
        model, _, report = method.unlearn(target, forget, retain, args, fit)
    return target, model, report, tokenizer, sets


def open_run(folder: str, device: str) -> tuple[Opened, dict[str, Rows]]:
    """A run's folder, read, and its sets. Raises UserError as runs.read_run does."""
    check_device(device)
    run = read_run(folder, device)
    context, seed = run.target.config.max_len, run.config["seed"]
    every = {"forget": run.data.forget, "retain": run.data.retain, "untouched": run.data.background}
    return run, {name: Rows(rows, run.tokenizer, context, 32, seed, device) for name, rows in every.items() if rows}
