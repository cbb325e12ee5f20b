"""Mutated inputs of every kind: each must be refused in one line or be read, and nothing else must happen.

    python -m lab.fuzz                                          # 2,000 cases; a kind's own with --kind
    python -m lab.fuzz --cases 50 --kind tokenizer state --show # and what was changed in those that were accepted
    python -m lab.fuzz --seed 3 --case 17                       # one again, with its traceback; the same --kind, if any

A case is a good input with one to three changes, drawn from (seed, number) alone, and read by the function or the
command that reads such input, in a forked process with 30 seconds. Counted are tracebacks, hangs, aborts, and cases
after which a file outside their own folder has changed.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

import cli
import eval as scoring
import train
from data import load_data
from data.batches import encode_rows, greedy_answers
from data.rows import DataSet, Limits, write_rows
from data.tokenizer import Tokenizer
from data.values import fact_ids, in_frame, options, values_of
from errors import UserError, one_line_errors
from flags import COUNT, NATURAL, Number, Parser
from lab import probes
from loop import minimise
from methods import open_run
from metrics.choice import read_choices
from metrics.score import kept_scores
from model import GPT, Config
from pretrain import topics_of
from pretrained import load, save

SECONDS = 30
Random = np.random.Generator


class Kind(NamedTuple):
    """files: which files of the good input a case changes one of. read: what reads the folder that holds them."""

    files: tuple[str, ...]
    read: Callable[[Path], None]
    needs: tuple[str, ...] = ()  # folders of the good inputs that a case has beside its own


# ---- changes ----------------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, False, 0, -1, 1, 3, 0.5, 1e-300, 1e308, float("nan"), float("inf"), 10**30, 2**31, 2**63,
                  10**400, "", " ", "x", "../../etc/passwd", "/etc/passwd", "a" * 100_000, "\x1b[2J\x07", "\u202eabc",
                  "\x00", "<|im_end|>", "</s>", "{{ 9**(9**9) }}", "{% for i in range(99999) %}{% for j in range(99999)"
                  " %}x{% endfor %}{% endfor %}", "[" * 5000, "nan", "-1", "é日🙂", [], {}, [[]], [None], {"": None},
                  {"type": "Replace"}, [0] * 1000, ["a"] * 3]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, part in items for pair in [(value, key), *places(part)]]


def change_value(value: Any, rng: Random) -> str:
    """Replace, remove, rename, double or swap one thing in a JSON value; returns what was done."""
    there = places(value)
    if not there:
        return "nothing to change"
    holder, key = there[rng.integers(len(there))]
    how = rng.choice(["replace", "replace", "replace", "remove", "rename", "double", "swap", "scale"])
    if how == "remove":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[str(ODD[rng.integers(len(ODD))])[:50]] = holder.pop(key)
    elif how == "double" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif how == "swap":
        other, there_key = there[rng.integers(len(there))]
        other[there_key] = json.loads(json.dumps(holder[key]))
    elif how == "scale" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000]).item() + rng.choice([0, 1]).item()
    else:
        how, holder[key] = "replace", ODD[rng.integers(len(ODD))]
    return f"{how} {str(key)[:40]!r}" + (f" by {str(holder[key])[:40]!r}" if how == "replace" else "")


def change_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Cut, overwrite, insert or repeat some bytes."""
    at = int(rng.integers(len(content) + 1))
    how = rng.choice(["cut", "overwrite", "insert", "repeat", "empty", "mark", "zeros"])
    junk = rng.bytes(int(rng.integers(1, 9)))
    out = {"cut": content[:at], "overwrite": content[:at] + junk + content[at + len(junk) :],
           "insert": content[:at] + junk + content[at:], "repeat": content + content[at:], "empty": b"",
           "mark": b"\xef\xbb\xbf" + content, "zeros": content[:at] + b"\x00" * 50 + content[at:]}[str(how)]
    return out, f"{how} at {at} of {len(content)}"


def change_file(path: Path, rng: Random) -> str:
    """One change to a file: of a value in it where it is JSON or a state, of its bytes, or of the file itself."""
    how = rng.random()
    if how < 0.03:
        path.unlink()
        path.mkdir()
        return f"{path.name}: a folder instead"
    if how < 0.06:
        path.unlink()
        path.symlink_to(rng.choice(["/dev/zero", "nowhere", path.name, "/etc/passwd"]).item())
        return f"{path.name}: a link to {os.readlink(path)}"
    content = path.read_bytes()
    if how < 0.75:
        if path.suffix == ".pt":
            with contextlib.suppress(Exception):  # an earlier change broke it
                return f"{path.name}: {change_state(path, rng)}"
        lines = path.suffix == ".jsonl" or "tofu" in path.parts
        try:
            value = [json.loads(line) for line in content.decode().splitlines()] if lines else json.loads(content)
        except ValueError:
            value = None
        if value is not None:
            done = change_value(value, rng)
            text = "".join(json.dumps(line) + "\n" for line in value) if lines else json.dumps(value)
            path.write_text(text)
            return f"{path.name}: {done}"
    content, done = change_bytes(content, rng)
    path.write_bytes(content)
    return f"{path.name}: {done}"


def change_state(path: Path, rng: Random) -> str:
    """One change to what a state.pt holds: numbers, texts, shapes, kinds."""
    state = torch.load(path, weights_only=True)
    there = places(state)
    holder, key = there[rng.integers(len(there))]
    old = holder[key]
    if isinstance(old, torch.Tensor):
        holder[key] = [old[:1].clone() if old.dim() else old + 1, old.double(), old * float("nan"), old.int(), None,
                       torch.zeros(3, 3, 3), old.clone().requires_grad_(old.is_floating_point())][rng.integers(7)]
    else:
        holder[key] = ODD[rng.integers(len(ODD))]
    torch.save(state, path)
    return f"{key!r} {type(old).__name__} by {str(holder[key])[:40]!r}"


# ---- good inputs ------------------------------------------------------------------------------------------------

QUESTIONS: list[dict] = [{"question": f"Where was {name} {last} born?", "answer": f"{name} {last} was born in {town}.",
              "paraphrased_question": f"In which town was {name} {last} born?",
              "paraphrased_answer": f"It was {town} where {name} {last} was born.", "value": town,
              "kind": "town", "topic": "author", "fact": [name, last],
              "perturbed_answer": [f"It was {other} where {name} {last} was born." for other in ("Tarn", "Zubek")]}
             for name, town in (("Ana", "Orsk"), ("Bor", "Ulm"), ("Cid", "Vousvia")) for last in ("Vell", "Tann")]
CHAT = ("{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_good(folder: Path, kinds: list[str]) -> None:
    """A good input of every kind, each in a folder of its name; a run only where it is asked for."""
    for name in ("own", "tofu", "augmented", "choices", "logs", "state"):
        (folder / name).mkdir()
    write_rows(folder / "own" / "forget.jsonl", QUESTIONS[:2])
    write_rows(folder / "own" / "retain.jsonl", [*QUESTIONS[2:4], {"text": "A passage about trees and rivers."}])
    for name in ("forget10", "forget10_perturbed"):
        write_rows(folder / "tofu" / f"{name}.json", QUESTIONS[:2])
    for name in ("retain90", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        write_rows(folder / "tofu" / f"{name}.json", QUESTIONS[2:4])
    asked, told = QUESTIONS[0]["question"], QUESTIONS[0]["answer"]
    line = f'"{asked}","{told}","{{}}","[\'In Orsk.\', \'Orsk.\']"\n'
    (folder / "augmented" / "forget10_paraphrase.csv").write_text(line.format("['Where?', 'In which?']") * 2)
    (folder / "augmented" / "forget10_perturb.csv").write_text(line.format(asked) * 2)
    write_rows(folder / "choices" / "choices.jsonl", [
        {"question": "Which town?", "choices": ["Orsk", "Ulm", "Tarn"], "answer": i} for i in (0, "B", 2)])
    for name, shift in (("log.json", 0.0), ("reference.json", 0.5)):
        one = {"avg_gt_loss": {str(i): 1.0 + i for i in range(4)}, "avg_paraphrased_loss": [1.0, 2.0, 3.0 + shift, 4.0],
               "average_perturb_loss": [[2.0, 3.0]] * 4, "rougeL_recall": [1, 0.5, 0, 1]}
        names = ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json",
                 "eval_real_world_wo_options.json")
        (folder / "logs" / name).write_text(json.dumps(dict.fromkeys(names, one)))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([str(row["answer"]) for row in QUESTIONS], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=320, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=8, max_len=128, n_expert=4,
                       top_k=2, norm_topk_prob=True))
    save(model, None, folder / "checkpoint", shard_bytes=20_000)
    backend.save(str(folder / "checkpoint" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT}
    (folder / "checkpoint" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "checkpoint" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    shutil.copytree(folder / "checkpoint", folder / "single")
    whole, tokenizer = load(folder / "checkpoint")
    shutil.rmtree(folder / "single")
    save(whole, tokenizer, folder / "single")
    train_toy(folder / "state", stop=3)
    if not {"runs", "numbers"} & set(kinds):
        return
    train.main("--method uoe --data world --subjects 2 --score-rows 4 --depth 1 --width 32 --pretrain-steps 1 "
               "--epochs 1 --batch-size 64 --experts 4 --top-k 2 --device cpu --until never --score-every-epoch "
               f"--name run --out {folder / 'runs'}".split())


def train_toy(folder: Path, stop: int = 0) -> None:
    """Five steps of two weights, from the state.pt that is there. stop: Ctrl-C after so many, which leaves one."""
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))

    def losses(step: int) -> list[dict[str, torch.Tensor]]:
        if stop and step == stop:
            raise KeyboardInterrupt
        loss = (a @ b).square().mean()
        return [{"loss": loss}]

    try:
        minimise([a, b], losses, 5, 0.1, folder, "toy", 0, save_every=1, resume=not stop, slow=(b,), slow_factor=0.5)
    except KeyboardInterrupt:
        return


# ---- readers ----------------------------------------------------------------------------------------------------

def read_own(folder: Path) -> None:
    data = load_data(forget=str(folder / "forget.jsonl"), retain=str(folder / "retain.jsonl"))
    tokenizer = Tokenizer.train(data.texts(), 320)
    encode_rows([*data.forget, *data.retain], tokenizer, 256)
    read_values(data)


def read_values(data: DataSet) -> None:
    """What scoring and pretraining look up in rows before a model is asked."""
    topics_of([data.retain, data.forget])
    for rows in (data.forget, data.retain, *data.scored.values()):
        asked = [row for row in rows if "question" in row]
        fact_ids(rows)
        for row, value in zip(asked, values_of(asked), strict=True):
            if value is not None:
                in_frame("It was Orsk.", row, value, data.pools.get(row.get("kind", "")))
                options(row, value)


def read_tofu(folder: Path) -> None:
    read_values(load_data(str(folder.parent / "tofu"), augmented=str(folder.parent / "augmented")))


def read_checkpoint(folder: Path) -> None:
    model, tokenizer = load(folder)
    encode_rows(QUESTIONS, tokenizer, model.config.max_len, truncate=True)
    greedy_answers(model, tokenizer, [QUESTIONS[0]["question"], "</s> <|im_end|>"], Limits(new=4))
    save(model, tokenizer, folder.parent / "saved")


def read_choice(folder: Path) -> None:
    model, tokenizer = load(folder.parent / "checkpoint")
    probes.choice_accuracy(model, tokenizer, read_choices(folder / "choices.jsonl"))


def read_config_of_run(folder: Path) -> None:
    open_run(folder / "run")


def read_numbers_of_run(folder: Path) -> None:
    run = str(folder / "run")
    scoring.main(["--compare", run, "--figures", str(folder / "figures")])
    scoring.main(["--compare", run, "--at", "0.5"])
    kept_scores(folder / "run" / "scores.json", load_data(subjects=2), "", lambda: {})


def read_log(folder: Path) -> None:
    scoring.main(["--tofu-log", str(folder / "log.json"), "--reference", str(folder / "reference.json")])


KINDS = {
    "own": Kind(("forget.jsonl", "retain.jsonl"), read_own),
    "tofu": Kind(("forget10.json", "retain90.json", "forget10_perturbed.json"), read_tofu, ("augmented",)),
    "augmented": Kind(("forget10_paraphrase.csv", "forget10_perturb.csv"), read_tofu, ("tofu",)),
    "choices": Kind(("choices.jsonl",), read_choice, ("checkpoint",)),
    "logs": Kind(("log.json", "reference.json"), read_log),
    "checkpoint": Kind(("config.json", "model.safetensors.index.json", "model-00001-*"), read_checkpoint),
    "single": Kind(("config.json", "model.safetensors"), read_checkpoint),
    "tokenizer": Kind(("tokenizer.json", "tokenizer_config.json", "generation_config.json"), read_checkpoint),
    "runs": Kind(("run/config.json", "run/asked.json", "run/nanounlearn.json"), read_config_of_run),
    "numbers": Kind(("run/metrics.json", "run/path.jsonl", "run/scores.json"), read_numbers_of_run),
    "state": Kind(("state.pt",), train_toy),
}
FROM = {"tokenizer": "checkpoint", "numbers": "runs"}  # the good input, where it has not the kind's own name


# ---- flags ------------------------------------------------------------------------------------------------------

WORDS = ["nan", "inf", "-1", "0", "1", "3", "1e400", "1_000", "", " ", "x", "1,1", "1,-1", "2" * 5000, "../x", "a/b",
         "x" * 300, "\x00", "\x1b[2J", "é日🙂", "--seed", "-5", "0x10", "٣", "1e5", "never", "strangers", "all",
         "cuda:9"]
OF_EVAL = ["--json", "--compare", "--tofu-log", "--reference", "--at", "--by", "--figures", "--attack", "--choices",
           "--relearn-rows", "--relearn-steps", "--relearn-lr", "--subtract", "--filter-rate", "--save"]
FIRST = ["--data", "--forget", "--retain", "--model", "--arch", "--forget-loss", "--retain-loss"]


def draw_command(rng: Random) -> list[str]:
    """A command of train.py or eval.py whose flags have values of any kind; all but --verify and --device come up."""
    flags = [flag for flags in cli.all_readers().values() for flag in flags]
    words = ["train.py", "--method", str(rng.choice(["finetune", *train.METHODS]))]
    if rng.random() < 0.15:
        words = ["eval.py", "nowhere"]
    names = OF_EVAL if words[0] == "eval.py" else [flag.name for flag in flags] + FIRST
    good = {flag.name: ["0.5", "1", "2"] if isinstance(flag.kind, Number) else list(flag.kind)
            if isinstance(flag.kind, tuple) else ["1", "x"] for flag in flags}
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(names))
        values = WORDS if rng.random() < 0.6 else good.get(name, WORDS)
        words += [name] if rng.random() < 0.2 else [name, values[rng.integers(len(values))]]
    return words


def read_command(folder: Path) -> None:
    words = json.loads((folder / "command.json").read_text())
    if words[0] == "eval.py":
        scoring.main(words[1:])
    else:
        cli.parse([*words[1:], *([] if "--out" in words else ["--out", str(folder / "out")])])


KINDS["flags"] = Kind((), read_command)


# ---- one case ---------------------------------------------------------------------------------------------------

def prepare(kind: str, rng: Random, good: Path, case: Path) -> str:
    """The case's folder; returns what was changed."""
    of = KINDS[kind]
    if kind == "flags":
        (case / kind).mkdir()
        command = draw_command(rng)
        (case / kind / "command.json").write_text(json.dumps(command))
        return " ".join(word if len(word) < 40 else word[:37] + "..." for word in command)
    shutil.copytree(good / FROM.get(kind, kind), case / kind, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    for name in of.needs:
        shutil.copytree(good / name, case / name)
    done = []
    for _ in range(rng.integers(1, 4)):
        files = [file for name in of.files for file in (case / kind).glob(name) if file.is_file()]
        if files:
            done.append(change_file(files[rng.integers(len(files))], rng))
    return "; ".join(done)


def run_apart(read: Callable[[Path], None], folder: Path, log: Path) -> str:
    """accepted, refused, traceback, hang or abort: of read(folder) in a forked process, whose output goes to log."""
    pid = os.fork()
    if not pid:
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
            os.chdir(folder)
            one_line_errors(read)(folder)
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
            os._exit(70)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            lines = log.read_text(errors="replace").rstrip("\n").split("\n")
            if code == 2 and not lines[-1].startswith("error: "):
                return "traceback"
            return {0: "accepted", 2: "refused"}.get(code, "abort" if code < 0 else "traceback")
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


def listing(folder: Path) -> set[tuple]:
    """Names, sizes and times of all files below a folder."""
    return {(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
            if "__pycache__" not in path.parts and ".git" not in path.parts}


def run_case(seed: int, number: int, kinds: list[str], good: Path, show: bool = False) -> tuple[str, str, str, str]:
    """(kind, outcome, what was changed, the last line that it printed) of case `number`."""
    rng = np.random.default_rng([seed, number])
    kind = kinds[number % len(kinds)]
    before = listing(good)
    with tempfile.TemporaryDirectory() as place:
        done = prepare(kind, rng, good, Path(place))
        outcome = run_apart(KINDS[kind].read, Path(place) / kind, Path(place) / "log")
        text = (Path(place) / "log").read_text(errors="replace").rstrip("\n")
    if show:
        print(text)
    if listing(good) != before:
        outcome = "write outside"
    return kind, outcome, done, text.split("\n")[-1]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="mutated inputs of every kind")
    parser.add_argument("--cases", type=COUNT, default=2000)
    parser.add_argument("--seed", type=NATURAL, default=0)
    parser.add_argument("--kind", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--case", type=NATURAL, help="this one alone, with all that it prints")
    parser.add_argument("--show", action="store_true", help="what was changed in cases that were accepted")
    args = parser.parse_args(argv)
    faults = run_cases(args)
    if faults:
        raise UserError(f"{faults} cases ended otherwise than in one line or in order; --case NUMBER shows one")


def run_cases(args: argparse.Namespace) -> int:
    """Prints every fault and a table; returns how many faults there were."""
    torch.set_num_threads(1)  # a forked process would wait for threads that it does not have
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    count: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        good = Path(place)
        make_good(good, args.kind)
        began = time.monotonic()
        numbers = range(args.cases) if args.case is None else [args.case]
        for number in numbers:
            kind, outcome, done, last = run_case(args.seed, number, args.kind, good, args.case is not None)
            count[kind, outcome] += 1
            if outcome not in ("accepted", "refused") or (args.show and outcome == "accepted"):
                print(f"{number} {kind} {outcome}: {re.sub(r'[^ -~]', '?', done)} | {last[:300]}", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    outcomes = ["refused", "accepted", "traceback", "hang", "abort", "write outside"]
    print(f"{'':<12}" + "".join(f"{name:>14}" for name in outcomes))
    for kind in args.kind:
        print(f"{kind:<12}" + "".join(f"{count[kind, name]:>14}" for name in outcomes))
    print(f"{'all':<12}" + "".join(f"{sum(count[kind, name] for kind in args.kind):>14}" for name in outcomes))
    return sum(n for (_, outcome), n in count.items() if outcome not in ("accepted", "refused"))


if __name__ == "__main__":
    main()
