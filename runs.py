"""A run is a folder: how train.py writes one, and how everything else opens it.

    out/uoe/                  written as out/uoe.partial, renamed when whole
        asked.json            all arguments, as they were given or filled in
        config.json           the same and what came of them: versions, the git revision, target and reference
        model/ or assistant/  weights and tokenizer, a Hugging Face folder each
        log.jsonl             a line per training step
        path.jsonl            with --score-every-epoch, a line per epoch
        metrics.json          what eval.py made of it; attacks.json after --attack
        figures/*.png
"""

import argparse
import contextlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from data import load_data
from data.batches import Batch, encode_rows, in_order
from data.rows import DataSet
from errors import UserError
from interfaces import TextCodec
from model import GPT
from pretrained import load

# ---- writing one ------------------------------------------------------------------------------------------------

def revision() -> str | None:
    """The git commit this code stands at, if it is a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    return None


# Flags that leave the outcome alone.
ANYHOW = {"out", "device", "score_every_epoch", "more_references", "save_every", "checkpointing", "micro_batch"}


class RunFolder:
    """out/<name>, written under <name>.partial and renamed when whole."""

    def __init__(self, args: argparse.Namespace):
        self.final = Path(args.out) / args.name
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.asked = json.loads(json.dumps({key: value for key, value in vars(args).items()
                                            if key not in ("resume", "named")}))
        if self.final.exists() and not (self.final / "config.json").is_file():
            raise UserError(f"{self.final} exists and is no run: give another --name or --out")
        for flag in ("model", "reference"):
            given = getattr(args, flag, None)
            if given and Path(given).exists() and Path(given).resolve().is_relative_to(self.final.resolve()):
                raise UserError(f"--name {args.name} would overwrite --{flag} {given}: give another name")
        if self.finished() and not args.named:  # two runs may come to one name; who gave a name may use it again
            self.check_same()
        self.resume = False

    def go_on(self) -> None:
        """Resume the cut-off run of this name. Raises UserError where there is none or it was asked for otherwise."""
        if not self.cut_off():
            raise UserError(f"--resume: {self.partial} holds no cut-off run; start it without --resume")
        if json.loads((self.partial / "asked.json").read_text()) != self.asked:
            raise UserError(f"--resume: {self.partial} was started with other options; give the same, or leave "
                            "--resume out")
        self.resume = True

    def check_same(self) -> None:
        """Raises UserError unless the finished run of this name was asked for alike."""
        was = json.loads((self.final / "asked.json").read_text())
        for key in sorted(set(was) & set(self.asked) - ANYHOW):
            if was[key] != self.asked[key]:
                raise UserError(f"{self.final} is a run with --{key.replace('_', '-')} {was[key]}, not "
                                f"{self.asked[key]}: give this one a --name of its own")

    def finished(self) -> bool:
        return (self.final / "asked.json").is_file()

    def cut_off(self) -> bool:
        return (self.partial / "asked.json").is_file()

    def open(self) -> Path:
        if not self.resume:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        (self.partial / "asked.json").write_text(json.dumps(self.asked))
        return self.partial

    def close(self) -> Path:
        shutil.rmtree(self.final, ignore_errors=True)
        self.partial.rename(self.final)
        print(f"\nthe run is in {self.final}")
        return self.final


# ---- opening one ------------------------------------------------------------------------------------------------

@dataclass
class Opened:
    """A finished run's folder, read. A fine-tuned run has its model as target and nothing else."""

    config: dict
    data: DataSet
    tokenizer: TextCodec
    target: GPT
    parts: dict[str, GPT]  # folder name -> what was kept: "model", or ULD's "assistant"


def weights_of(path: str | Path) -> str | Path:
    """Where a run or a cached model keeps its weights; any other folder or hub name is what it is."""
    return Path(path) / "model" if (Path(path) / "model").is_dir() else path


def read_run(folder: str | Path, device: str = "cpu") -> Opened:
    """Raises UserError for a folder that is not a finished run or whose target has gone."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} is not a run folder (no config.json and metrics.json): give one that train.py "
                        "wrote, such as out/uoe")
    config = json.loads((folder / "config.json").read_text())
    if "kept" not in config:
        raise UserError(f"{folder} was written by an older version of this code: run train.py again")
    for part in config["kept"]:
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part} is missing, so the run has no weights: run train.py again")
    if not config["model"] and not (Path(config["target"]) / "model").is_dir():
        raise UserError(f"{config['target']} is missing, so the run's target has no weights: run train.py again")
    dtype, template = getattr(torch, config["dtype"]), config.get("template")
    tuned = config["method"] == "finetune"  # its own model is what there is to look at
    target, tokenizer = load(folder / "model" if tuned else weights_of(config["target"]), dtype, device, template)
    parts = {part: load(folder / part, dtype, device)[0] for part in config["kept"]}
    return Opened(config, data_of(config), tokenizer, target, parts)


def data_of(config: dict) -> DataSet:
    """The data set that a run's config (or train.py's arguments) names."""
    keys = ("data", "split", "seed", "augmented", "protocol", "forget", "retain", "authors",
            "subjects")
    data = load_data(**{key: config[key] for key in keys if key in config})
    if config["score_rows"]:
        data.scored = {name: rows[: config["score_rows"]] for name, rows in data.scored.items()}
    return data


def forget_batches(model: GPT, tokenizer, data: DataSet) -> list[Batch]:
    """The forget set, every row as long as the model holds: what routing is measured on."""
    examples = encode_rows(data.forget, tokenizer, model.config.max_len, truncate=True)
    return list(in_order(examples, 64, model.device))
