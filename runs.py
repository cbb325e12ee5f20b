"""A run is a folder: how train.py writes one, and how everything else opens it.

    out/uoe/                  written as out/uoe.partial, renamed when whole
        nanounlearn.json      that this program made it, and of what: hashes of rows, weights, code; versions; machine
        asked.json            all arguments, as they were given or filled in
        config.json           the same and what came of them: made_of, target and reference
        model/ or assistant/  weights and tokenizer, a Hugging Face folder each
        log.jsonl             a line per training step
        path.jsonl            with --score-every-epoch, a line per epoch
        metrics.json          all scores; scores.json what they are made of; attacks.json after eval.py --attack
        figures/*.png

A run that is cut off goes on from the last of: state.pt, every --save-every steps and at the end of training;
config.json, once the weights are saved; scores.json, once they are scored.
"""

import argparse
import contextlib
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import load_data
from data.batches import Batch, encode_rows, in_order
from data.rows import DataSet
from errors import UserError
from files import MARK, alone, check_ours, digest, digest_of, publish, remove, write_json
from flags import NATURAL, SHARE, WEIGHT, Number
from hub.checkpoint import find_folder
from interfaces import TextCodec
from model import GPT
from pretrained import load
from schema import read_json

# ---- writing one ------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MUST_FIT = ("rows", "weights")  # of made_of: what a run that goes on or is opened must find as it was


def git(*words: str) -> str | None:
    """What git says of this code, if it is a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    return None


def code_digest() -> str:
    """Of every file that can have a say in a run's outcome."""
    files = sorted(file for of in (".", "data", "hub", "metrics", "lab") for file in (HERE / of).glob("*.py"))
    return digest([file.read_text(encoding="utf-8") for file in files])


def rows_digests(data: DataSet) -> dict[str, str]:
    """By what the rows are for: what is taught, what is held out, what is scored."""
    taught = {name: getattr(data, name) for name in ("forget", "retain", "background", "paraphrased", "perturbed",
                                                     "calibration", "holdout")}
    scored = {f"scored {name}": rows for name, rows in data.scored.items()}
    return {name: digest(rows) for name, rows in (taught | scored).items() if rows}


def local(place: str | Path) -> Path:
    """Where weights or a published log lie on this disk, of a run, a folder, a hub name or a file."""
    return Path(place) if Path(place).is_file() else find_folder(weights_of(place))


def check_device(device: str) -> None:
    """Raises UserError, naming the flag, where nothing can be computed there."""
    if device == "cpu":  # always there; and a tensor would come before lab.memory.large_blocks
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {device} is not here: try --device cpu") from None


def processor(device: str) -> str:
    """The GPU's name, or the CPU's where the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


def made_of(data: DataSet, vocabulary: int, places: dict[str, str], device: str) -> dict:
    """What a run is made of, so that whatever goes on with it, opens it or compares it can tell that it is the same.

    places: role -> folder, hub name or log of the models it begins from.
    """
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "rows": rows_digests(data), "vocabulary": vocabulary,
        "weights": {role: digest_of(local(place)) for role, place in places.items()},
        "code": code_digest(), "command": shlex.join(sys.argv),
        "revision": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(), "processor": processor(device),
    }


def changes(was: dict, now: dict, keys: tuple[str, ...] = MUST_FIT) -> list[str]:
    """What differs between two made_of, in words."""
    out = []
    for key in keys:
        if isinstance(was.get(key), dict):
            names = was[key].keys() | now[key].keys()
            out += [f"{name} {key}" for name in sorted(names) if was[key].get(name) != now[key].get(name)]
        elif was.get(key) != now.get(key):
            out.append(key)
    return out


# Flags that leave the outcome alone.
ANYHOW = {"out", "device", "score_every_epoch", "more_references", "save_every", "checkpointing", "score_batch",
          "micro_batch"}
# Of these, what a run may go on with otherwise than it began.
ON_THE_WAY = {"save_every", "checkpointing", "score_batch", "micro_batch"}


class RunFolder:
    """out/<name>, written under <name>.partial and renamed when whole. `with` it, nobody else writes it."""

    def __init__(self, args: argparse.Namespace):
        self.final = Path(args.out) / args.name
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.args = args
        self.asked = json.loads(json.dumps({key: value for key, value in vars(args).items()
                                            if key not in ("resume", "restart", "named")}))
        self.resume = self.opened = False
        with alone(self.final):  # a run that is being written looks like one that was cut off
            self.check()

    def check(self) -> None:
        """Raises UserError where this run would replace what it should not, or discard work unasked."""
        args = self.args
        for folder in (self.final, self.partial):
            check_ours(folder, "--name")
        for flag in ("model", "reference", "never_read"):
            given = getattr(args, flag, None)
            if given and Path(given).exists() and Path(given).resolve().is_relative_to(self.final.resolve()):
                raise UserError(f"--name {args.name} would overwrite --{flag.replace('_', '-')} {given}: give another "
                                "name")
        if self.finished() and not args.named:  # two runs may come to one name; who gave a name may use it again
            self.check_same(self.final, ANYHOW, "give this one a --name of its own")
        if args.resume and self.cut_off():
            self.check_same(self.partial, ON_THE_WAY, "give the same, or discard it with --restart")
        elif self.cut_off() and not args.restart:
            raise UserError(f"{self.partial} holds this run, cut off: --resume goes on with it, --restart discards it")

    def check_same(self, folder: Path, but: set[str], way_out: str) -> None:
        """Raises UserError unless the run in `folder` was asked for alike."""
        was = read_json(folder / "asked.json")
        for key in sorted(set(was) | set(self.asked)):
            if key not in but and was.get(key) != self.asked.get(key):
                raise UserError(f"{folder} is a run with --{key.replace('_', '-')} {was.get(key)}, not "
                                f"{self.asked.get(key)}: {way_out}")

    def finished(self) -> bool:
        return (self.final / "asked.json").is_file()

    def cut_off(self) -> bool:
        return (self.partial / "asked.json").is_file()

    def __enter__(self) -> "RunFolder":
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone(self.final))
            self.check()  # again: what was there has been written by somebody else perhaps
            self.lock = stack.pop_all()  # held on, until __exit__
        self.resume = self.args.resume and self.cut_off()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.lock.close()
        if error is not None and self.cut_off() and (self.opened or not isinstance(error, UserError)):
            error.add_note(f"{self.partial} holds the run so far: the same command with --resume goes on")
        elif isinstance(error, KeyboardInterrupt):
            error.add_note("the same command goes on")

    def open(self, of: dict) -> Path:
        """The folder to write to. of: made_of. Raises UserError where a cut-off run began from something else."""
        if not self.resume:
            remove(self.partial)
            self.partial.mkdir(parents=True)
            write_json(self.partial / MARK, of)
        was = read_json(self.partial / MARK, way_out="discard it with --restart")
        if other := changes(was, of):
            raise UserError(f"{self.partial} began from other {', '.join(other)}: bring those back, or discard it with "
                            "--restart")
        if other := changes(was, of, ("code", "versions", "threads", "processor")):
            print(f"going on with other {', '.join(other)} than it began with: the bits may differ")
        write_json(self.partial / "asked.json", self.asked)
        self.opened = True
        return self.partial

    def saved(self) -> dict | None:
        """config.json of a run that was cut off after its weights were saved."""
        file = self.partial / "config.json"
        return read_json(file, RUN, "discard it with --restart") if file.is_file() else None

    def save(self, config: dict) -> None:
        """config.json, once all parts are saved: from now on the run goes on from them."""
        config["made_of"]["weights"] |= {part: digest_of(self.partial / part) for part in config["kept"]}
        write_json(self.partial / "config.json", config)
        (self.partial / "state.pt").unlink(missing_ok=True)

    def leave(self) -> Path:
        """What a process leaves that is not the first of several (parallel.py): nothing, the first writes the run."""
        remove(self.partial)
        return self.final

    def close(self) -> Path:
        publish(self.partial, self.final)
        print(f"\nthe run is in {self.final}")
        return self.final


# ---- opening one ------------------------------------------------------------------------------------------------

TEXT = (str, None)
RUN = {"method": str, "model": TEXT, "target": str, "kept": [str], "dtype": ("float32", "bfloat16", "float16"),
       "seed": Number(0, 2**32 - 1, whole=True), "data": str, "score_rows": NATURAL, "forget": TEXT, "retain": TEXT,
       "template?": TEXT, "reference?": TEXT, "never_read?": TEXT, "split?": str, "protocol?": str, "augmented?": TEXT,
       "authors?": NATURAL, "subjects?": NATURAL, "subtract?": WEIGHT, "filter_rate?": SHARE, "centred?": bool,
       "keeps_only?": bool, "diverged?": bool, "made_of?": {"rows": dict, "weights": {str: TEXT}},
       "offset_alpha?": WEIGHT, "unlearned_experts?": [[NATURAL]]}  # of config.json, what is read again


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


def read_run(folder: str | Path, device: str = "cpu", check: bool = True) -> Opened:
    """Raises UserError for a folder that is not a finished run or whose target has gone.

    check: also where rows or weights are no longer those that it was made of.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} is not a run folder (no config.json and metrics.json): give one that train.py "
                        "wrote, such as out/uoe")
    config = read_json(folder / "config.json", RUN, "it was written by other code, or changed: run train.py again")
    for part in config["kept"]:
        if Path(part).name != part or not (folder / part).is_dir():
            raise UserError(f"{folder / part} is missing, so the run has no weights: run train.py again")
    if not config["model"]:  # small models lie in the cache beside the run, from wherever that is asked for
        for role in [key for key in config if key == "target" or (key.startswith("reference") and config[key])]:
            beside = folder.parent / "cache" / Path(config[role]).name
            if beside.is_dir() and not Path(config[role]).exists():
                config[role] = str(beside)
        if not (Path(config["target"]) / "model").is_dir():
            raise UserError(f"{config['target']} is missing, so the run's target has no weights: run train.py again, "
                            "or this from the folder where it ran")
    data = data_of(config)
    if check and (other := differences(folder, config, data)):
        raise UserError(f"{folder} was made of other {', '.join(other)} than are there now: bring those back, or run "
                        "train.py again")
    dtype, template = getattr(torch, config["dtype"]), config.get("template")
    tuned = config["method"] == "finetune"  # its own model is what there is to look at
    target, tokenizer = load(folder / "model" if tuned else weights_of(config["target"]), dtype, device, template)
    parts = {part: load(folder / part, dtype, device)[0] for part in config["kept"]}
    return Opened(config, data, tokenizer, target, parts)


def differences(folder: Path, config: dict, data: DataSet) -> list[str]:
    """What of rows and weights is no longer what a finished run was made of, in words. An older run tells nothing."""
    was = config.get("made_of")
    if was is None:
        return []
    weights = dict(was["weights"])
    for role in weights:
        place = folder / role if role in config["kept"] else config.get(role)
        if place is None:
            raise UserError(f"{folder / 'config.json'} lacks its {role}: run train.py again")
        if role in ("target", *config["kept"]) or Path(place).exists():  # else who needs it says that it is gone
            weights[role] = digest_of(local(place))
    return changes(was, {"rows": rows_digests(data), "weights": weights})


def check_source(flag: str, place: str, data: DataSet) -> None:
    """Raises UserError for a run of ours, given by such a flag, that was edited, diverged or is of other rows.

    flag: model, reference or never-read.
    """
    if not (Path(place) / MARK).is_file() or not (Path(place) / "config.json").is_file():
        return
    file = Path(place) / "config.json"
    if read_json(file).get("made_of") is None:  # its model alone, or of an older version
        return
    config = read_json(file, RUN, "train it again")
    was = config["made_of"]
    for part in config["kept"]:
        if was["weights"].get(part) != digest_of(Path(place) / part):
            raise UserError(f"--{flag} {place}: {part} was changed since it was trained: train it again")
    if config.get("diverged"):
        raise UserError(f"--{flag} {place} diverged when it was trained: train it again with a lower --lr")
    same = was["rows"].get("forget") == rows_digests(data).get("forget")
    keeps_only = config.get("keeps_only", False)
    if flag != "model" and same and not keeps_only:
        raise UserError(f"--{flag} {place} was taught the rows that are to be forgotten: train it with a retain "
                        "--split")
    if flag != "model" and keeps_only and not same:
        raise UserError(f"--{flag} {place} left out other rows than are to be forgotten here: give the same --data and "
                        "--split")


def data_of(config: dict) -> DataSet:
    """The data set that a run's config (or train.py's arguments) names."""
    keys = ("data", "split", "seed", "augmented", "protocol", "forget", "retain", "authors", "subjects")
    data = load_data(**{key: config[key] for key in keys if key in config})
    if config["score_rows"]:
        data.scored = {name: rows[: config["score_rows"]] for name, rows in data.scored.items()}
    if config.get("score_batch"):
        data.limits = data.limits._replace(rows=config["score_batch"])
    return data


def forget_batches(model: GPT, tokenizer, data: DataSet) -> list[Batch]:
    """The forget set, every row as long as the model holds: what routing is measured on."""
    examples = encode_rows(data.forget, tokenizer, model.config.max_len, truncate=True)
    return list(in_order(examples, 64, model.device))
