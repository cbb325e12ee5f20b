"""How fast, side by side: what one training step or one greedy answer costs, as a ratio.

    python -m lab.bench                                   # medians of 7 rounds; everything takes its turn in each
    python -m lab.bench --rounds 3 --depth 8 --width 256  # flags of train.py that shape both small models

Two questions. What does a method's training step cost against training all parameters (NPO + GD)? And, where
`transformers` is installed, what does the same model cost here and there: the same weights and tokens, checked to give
the same logits first? Ratios only: absolute times mean little on a machine that nobody else has.

Shapes: B batch   T tokens
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import loop
from data.batches import Batch, collate, encode_rows, left_pad
from data.tokenizer import Tokenizer
from errors import one_line_errors
from flags import COUNT, Parser
from interfaces import TextCodec
from methods import METHODS as ALL
from model import GPT
from objectives import cross_entropy
from pretrain import small_config
from pretrained import save
from runs import data_of
from train import parse

try:
    from transformers import AutoModelForCausalLM
except ImportError:  # then nothing is compared with it, and the table says so
    AutoModelForCausalLM = None  # type: ignore[assignment, misc]

METHODS = {  # against all parameters of the same model, NPO + GD
    "moe": {"UOE, one expert": ["--method", "uoe"], "ESFT": ["--method", "esft"],
            "LoRA": ["--method", "lora"], "all parameters": ["--method", "full"]},
    "gpt": {"ULD, assistant of three quarters": ["--method", "uld"],
            "Offset": ["--method", "offset"], "all parameters, GDIFF": ["--method", "full", "--forget-loss", "ga"],
            "all parameters, KL": ["--method", "full", "--retain-loss", "kl"], "all parameters": ["--method", "full"]},
}


def in_turn(what: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Each callable's own seconds, `rounds` times, all of them in every round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in tqdm(range(rounds + 1), desc=title):
        for name, measure in what.items():
            spent = measure()
            if turn:
                seconds[name].append(spent)
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the GPU's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def step_of(flags: list[str], extra: list[str], arch: str, target: GPT, tokenizer: TextCodec,
            epochs: int) -> Callable[[], float]:
    """A callable: seconds per training step of the method that `flags` name, on a copy of target."""
    args = parse([*extra, *flags, "--arch", arch, "--epochs", str(epochs), "--name", "bench"])
    args.seed, method, data = 0, ALL[args.method], data_of(vars(args) | {"seed": 0})
    rows = method.rows(data, args)

    def measure() -> float:
        quiet = io.StringIO()
        with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet),
              contextlib.redirect_stderr(quiet)):
            forget, retain = loop.learning_rows(args, data, *rows, tokenizer)
            _, _, report = method.unlearn(target, forget, retain, args, loop.fitting(args, forget, Path(folder)))
        return report["train_seconds"] / report["steps"]

    return measure


def here_and_there(model: GPT, tokenizer: TextCodec, batch: Batch) -> dict[str, tuple[Callable, Callable]]:
    """What -> (ours, transformers'), on the same weights and tokens. {} where transformers is not installed.

    Raises AssertionError where the two disagree on the logits by more than 1e-4.
    """
    if AutoModelForCausalLM is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, Path(folder))
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs.to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch.tokens, use_cache=False).logits, model(batch.tokens), rtol=0, atol=1e-4)
    prompts, pad = left_pad([[t for t, label in zip(row, marks, strict=True) if label < 0][:12] for row, marks in
                             zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)], model.device)
    mask = torch.arange(prompts.shape[1], device=model.device) >= pad[:, None]

    def train_step(forward: Callable, parameters) -> Callable:
        def work() -> None:
            for p in parameters:
                p.grad = None
            cross_entropy(forward(batch.tokens), batch.labels).backward()
        return work

    def generate_theirs() -> None:
        theirs.generate(prompts, attention_mask=mask.long(), max_new_tokens=32, min_new_tokens=32, do_sample=False,
                        pad_token_id=0)

    return {"training step": (train_step(model, list(model.parameters())),
                              train_step(lambda t: theirs(t, use_cache=False).logits, list(theirs.parameters()))),
            "32 greedy tokens": (lambda: model.generate(prompts, 32, pad=pad), generate_theirs)}


def line(name: str, ours: list[float], other: list[float]) -> str:
    """Ratio of medians, and the least and largest ratio within a round."""
    each = [a / b for a, b in zip(ours, other, strict=True)]
    middle = statistics.median(ours) / statistics.median(other)
    return f"    {name:<34}{middle:6.2f}   ({min(each):.2f} to {max(each):.2f})"


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="speed, side by side, as ratios; other flags are train.py's")
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--epochs-per-round", type=COUNT, default=1)
    own, extra = parser.parse_known_args(argv)
    args = parse(extra)
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; ratios of medians of {own.rounds} rounds, in brackets the least and largest in one round")
    for arch, methods in METHODS.items():
        args = parse([*extra, "--method", "full", "--arch", arch])
        data = data_of(vars(args) | {"seed": 0})
        tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
        torch.manual_seed(0)
        target = GPT(small_config(args, tokenizer.vocab_size)).to(device).eval()
        rows = encode_rows(data.retain, tokenizer, args.context, truncate=True)[:32]
        pairs = here_and_there(target, tokenizer, collate(rows, list(range(len(rows))), device))
        seconds = in_turn({f"{name} {i}": partial(timed, work, device) for name, both in pairs.items()
                           for i, work in enumerate(both)}, own.rounds, f"{arch}, transformers")
        steps = in_turn({name: step_of(flags, extra, arch, target, tokenizer, own.epochs_per_round)
                         for name, flags in methods.items()}, own.rounds, f"{arch}, methods")
        kind = "mixture of experts" if arch == "moe" else "dense model"
        print(f"\n{kind}: seconds here / seconds in transformers")
        for name in pairs:
            print(line(name, seconds[f"{name} 0"], seconds[f"{name} 1"]))
        if not pairs:
            print("    (transformers is not installed: pip install -r requirements-test.txt)")
        print(f"{kind}: seconds per training step / of all parameters, NPO + GD")
        for name in list(methods)[:-1]:
            print(line(name, steps[name], steps["all parameters"]))


if __name__ == "__main__":
    main()
