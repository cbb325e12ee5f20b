"""Kills and races: what is left of a run that is killed at any moment, and of two that are started at once.

    python -m lab.kill                                # 100 kills and 20 races on tiny models, about an hour on one core
    python -m lab.kill --kills 4 --races 2 --seed 7

A kill: one command runs undisturbed in a folder of its own; then in other folders the same command is killed at a
moment drawn from its seconds (SIGKILL, SIGTERM or SIGINT), and gone on with as the program says, killed again perhaps,
until it ends. Weights and scores must be those of the undisturbed one to the last bit, no step may be done again but
those since the last kept state, and SIGTERM and SIGINT must end in one line.
A race: the same command twice, or two that want one name, 0 to 3 s apart. One must finish whole, the other end in one
line.

Commands are forks of this process, which has imported everything: so nearly all of their time is work.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import eval as scoring
import loop
import pretrain
import train
from errors import UserError, one_line_errors
from files import digest_of
from flags import NATURAL, Parser

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EVERY = 5  # --save-every: so many steps may be done again, and no more
TINY = (f"--depth 1 --width 32 --pretrain-steps 20 --save-every {EVERY} --subjects 2 --score-rows 2 --epochs 10 "
        "--batch-size 8 --device cpu --name run").split()
MOE = "--experts 4 --top-k 2".split()
COMMANDS = {
    "uoe": ["--method", "uoe", "--data", "world", "--until", "never", *MOE, *TINY],
    "uld": ["--method", "uld", *TINY],
    "full": ["--method", "full", "--data", "world", "--until", "never", "--score-every-epoch", *MOE, *TINY,
             "--epochs", "3"],
    "finetune": ["--method", "finetune", "--data", "world", "--subjects", "2", "--score-rows", "2", "--epochs", "6",
                 "--batch-size", "8", "--save-every", str(EVERY), "--dtype", "float32", "--context", "64",
                 "--device", "cpu", "--name", "run"],
    "attack": ["--attack", "int8", "relearn"],
}
UNTIMED = ("train_seconds", "setup_seconds", "seconds", "peak_memory_bytes", "made_of")


class Ended(NamedTuple):
    status: int  # of os.waitstatus_to_exitcode: minus the signal's number for one that was killed
    said: str  # on both streams


# ---- starting a command -------------------------------------------------------------------------------------------

def start(name: str, words: list[str], folder: Path, steps: Path, number: int) -> tuple[int, Path]:
    """The process's id, and where what it says goes. steps: file that gets a line for every training step begun."""
    said = folder.with_name(f"{folder.name}.{number}.txt")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, said
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = sys.stderr = open(said, "w", buffering=1)  # and below Python, what C code has to say
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    status = 1
    try:
        trace_steps(steps)
        if name == "attack":
            scoring.main([str(folder / "run"), *words])
        else:
            train.main([*words, "--out", str(folder)])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        print(f"Traceback of {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status)


def trace_steps(file: Path) -> None:
    """Every step that loop.minimise begins is a line `what step` of file."""
    plain = loop.minimise
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def traced(parameters, losses, steps, lr, folder, what, *rest, **more):
        def counted(step: int):
            os.write(log, f"{what} {step}\n".encode())
            return losses(step)

        return plain(parameters, counted, steps, lr, folder, what, *rest, **more)

    loop.minimise = pretrain.minimise = traced


def ended(pid: int, said: Path) -> Ended:
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"))


# ---- what is left -------------------------------------------------------------------------------------------------

def outcome(name: str, folder: Path) -> dict:
    """Everything of a finished command that must not depend on kills: weights, log, scores; or what attacks found."""
    run = folder / "run"
    if name == "attack":
        return json.loads((run / "attacks.json").read_text())["outcomes"]
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["run"] = {key: value for key, value in metrics["run"].items() if key not in UNTIMED}
    kept = json.loads((run / "config.json").read_text())["kept"]
    out = {"weights": {part: digest_of(run / part) for part in kept}, "metrics": metrics,
           "log": (run / "log.jsonl").read_text(), "files": sorted(p.name for p in run.iterdir() if p.is_file())}
    if (run / "path.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "path.jsonl").read_text().splitlines()]
        out["path"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    for cached in sorted((folder / "cache").glob("*")):
        out[cached.name.rpartition("-")[0]] = digest_of(cached / "model")
    return out


def repeated(steps: Path) -> int:
    """How many steps were begun more than once, each as often as it was begun again."""
    begun = Counter(steps.read_text().splitlines()) if steps.is_file() else Counter()
    return sum(times - 1 for times in begun.values())


# ---- kills --------------------------------------------------------------------------------------------------------

def prepare(name: str, folder: Path, base: Path) -> list[str]:
    """What a command needs in its folder before it starts; returns its words."""
    if name == "attack":
        shutil.copytree(base, folder)
        return COMMANDS[name]
    folder.mkdir()
    return [*COMMANDS[name], *(["--model", str(base)] if name == "finetune" else [])]


def kill_once(name: str, draw: random.Random, seconds: float, folder: Path, base: Path) -> tuple[list[str], int, int]:
    """One command, killed until it ends. Returns (what is wrong, kills, steps done again)."""
    words, steps, kills = prepare(name, folder, base), folder.with_name(folder.name + ".steps"), 0
    wrong: list[str] = []
    for number in range(20):
        more = ["--resume"] if (folder / "run.partial" / "asked.json").is_file() else []
        pid, said = start(name, words + more, folder, steps, number)
        killed = number == 0 or (number < 3 and draw.random() < 0.3)
        if killed:
            time.sleep(draw.uniform(0, seconds))
            by = draw.choice(SIGNALS)
            os.kill(pid, by)
        end = ended(pid, said)
        if end.status == 0:
            return wrong, kills, repeated(steps)
        if not killed:
            return [*wrong, f"ended with {end.status}: {end.said[-300:]}"], kills, repeated(steps)
        kills += 1
        expected = -by if by == signal.SIGKILL else 128 + by
        line = end.said.strip().splitlines()[-1:]
        if end.status not in (expected, -by) or "Traceback" in end.said:  # -by: before main had begun
            wrong.append(f"{by.name} ended it with {end.status}: {end.said[-300:]}")
        elif by != signal.SIGKILL and end.status > 0 and "stopped" not in " ".join(line):
            wrong.append(f"{by.name} ended it without a word: {end.said[-300:]}")
    return [*wrong, "never ended"], kills, repeated(steps)


def kill_all(count: int, draw: random.Random, place: Path) -> list[str]:
    """`count` commands killed once or more; prints a line for each command's kind, returns what was wrong."""
    wrong: list[str] = []
    base = place / "base"
    kinds = list(COMMANDS)
    whole: dict[str, tuple[dict, float]] = {}
    total: Counter[str] = Counter()
    for i in range(count):
        name = kinds[i % len(kinds)]
        beginning = {"finetune": base / "run" / "model", "attack": base}.get(name, base)
        if name not in whole:  # undisturbed, once
            folder = base if name == "uoe" else place / f"{name}-whole"
            began = time.perf_counter()
            pid, said = start(name, prepare(name, folder, beginning), folder, place / f"{name}.steps", 0)
            end = ended(pid, said)
            if end.status:
                raise UserError(f"{name} does not run undisturbed: {end.said[-300:]}")
            whole[name] = outcome(name, folder), time.perf_counter() - began
        folder = place / f"{name}-{i}"
        found, kills, again = kill_once(name, draw, whole[name][1], folder, beginning)
        if not found and outcome(name, folder) != whole[name][0]:
            other = outcome(name, folder)
            found = [f"{key} differs" for key in whole[name][0] if whole[name][0][key] != other.get(key)]
        if again > kills * EVERY:
            found.append(f"{again} steps were done again after {kills} kills, and {EVERY} a kill are allowed")
        litter = [p.name for p in folder.iterdir() if p.name.endswith((".partial", ".tmp"))]
        wrong += [f"{name} {i}: {one}" for one in found + [f"{one} is left over" for one in litter]]
        total += Counter(runs=1, kills=kills, again=again, same=not found)
        shutil.rmtree(folder)
        print(f"{name} {i}: {kills} kills, {again} steps again, {'; '.join(found) or 'the same bits'}", flush=True)
    print(f"{total['runs']} runs killed {total['kills']} times: {total['same']} ended with the same bits and scores, "
          f"{total['again']} steps were done again")
    return wrong


# ---- races --------------------------------------------------------------------------------------------------------

def race(draw: random.Random, folder: Path, name: str, other: list[str], most: float = 3.0) -> list[str]:
    """The command and, up to `most` seconds later, the same with `other` words more. Returns what is wrong."""
    folder.mkdir()
    first = start(name, COMMANDS[name], folder, folder.with_name("steps"), 0)
    time.sleep(draw.uniform(0, most))
    if os.waitid(os.P_PID, first[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):  # ended already: no race, so sooner
        ended(*first)
        shutil.rmtree(folder)
        return race(draw, folder, name, other, most / 2)
    second = start(name, COMMANDS[name] + other, folder, folder.with_name("steps"), 1)
    ends = [ended(*first), ended(*second)]
    statuses = sorted(end.status for end in ends)
    wrong = [f"it says {end.said[-300:]}" for end in ends if "Traceback" in end.said]
    if statuses != [0, 2]:
        return [*wrong, f"they ended with {statuses}: {' / '.join(end.said[-200:] for end in ends)}"]
    loser, = (end.said for end in ends if end.status)
    if "is being written by process" not in loser or sum("error" in line for line in loser.splitlines()) != 1:
        wrong.append(f"the second says {loser}")
    try:
        scoring.verify(folder / "run", "cpu")
    except UserError as error:
        wrong.append(str(error))
    return wrong


def race_all(count: int, draw: random.Random, place: Path) -> list[str]:
    wrong = []
    for i in range(count):
        name = ("uoe", "uld", "full")[i % 3]
        other = [] if i % 2 else ["--lr", "0.01"]
        found = race(draw, place / f"race-{i}", name, other)
        wrong += [f"race {i} of {name} {' '.join(other)}: {one}" for one in found]
        print(f"race {i}, {name}, {'other' if other else 'same'} options: "
              f"{'; '.join(found) or 'one whole, one refused in a line'}", flush=True)
        shutil.rmtree(place / f"race-{i}")
    print(f"{count} races, {count - len({one.split(':')[0] for one in wrong})} as they should be")
    return wrong


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="kill commands and start pairs of them, and look at what is left")
    parser.add_argument("--kills", type=NATURAL, default=100, help="commands that are killed, each once or more")
    parser.add_argument("--races", type=NATURAL, default=20, help="pairs of simultaneous starts")
    parser.add_argument("--seed", type=NATURAL, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        wrong = kill_all(args.kills, draw, Path(place)) + race_all(args.races, draw, Path(place))
    print("\n".join(wrong))
    if wrong:
        raise UserError(f"{len(wrong)} things are wrong")


if __name__ == "__main__":
    main()
