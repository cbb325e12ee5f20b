"""Long runs in a row: a file of commands, so many at a time, one thread each; can be stopped, and goes on.

    python -m lab.queue lab/runs.txt                 # what results/ was made from; finished lines are skipped
    python -m lab.queue lab/runs.txt --workers 2 --seeds 0,1 --threads 2

A line is what stands behind `python` on the command line; # begins a comment. A line with the word SEED is done once
for each of --seeds. Each command's output goes to out/queue/NUMBER.log, and one that ended well is written to
out/queue/done.txt. What was cut off goes on with --resume where it left a cut-off run.
"""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from cli import seeds
from errors import UserError, one_line_errors
from flags import COUNT, Parser


def read_lines(path: Path, seeds: list[int]) -> list[str]:
    """The commands of a file, SEED in them replaced by each seed. Raises UserError where it is missing or empty."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file with a command on each line")
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} holds no command: one on each line, without `python`")
    return [line.replace("SEED", str(seed)) for line in lines for seed in (seeds if "SEED" in line else seeds[:1])]


def cut_off(line: str, out: Path) -> bool:
    """Whether the line's run (its --name) was begun and not finished."""
    words = shlex.split(line)
    if "--name" not in words:
        return False
    wanted = re.escape(words[words.index("--name") + 1]) + r"(-seed\d+)?\.partial"  # not another that begins so
    return any(re.fullmatch(wanted, file.parent.name) for file in out.glob("*.partial/asked.json"))


def run_line(number: int, line: str, out: Path, threads: int) -> int:
    """One command in a process of its own; returns its exit status."""
    words = shlex.split(line)
    words += [] if "--out" in words or "lab.upcycling" in words else ["--out", str(out)]
    words += ["--resume"] if cut_off(line, out) else []
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    with open(out / "queue" / f"{number}.log", "w") as log:
        return subprocess.run([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | environment, check=False).returncode


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="run a file of commands, each in a process of its own")
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=COUNT, default=1, help="commands at a time")
    parser.add_argument("--threads", type=COUNT, default=1, help="of each")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2, 3, 4, 5], help="for lines that hold SEED")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where runs go that do not say")
    args = parser.parse_args(argv)
    lines = read_lines(args.file, args.seeds)
    (args.out / "queue").mkdir(parents=True, exist_ok=True)
    done_file = args.out / "queue" / "done.txt"
    done = done_file.read_text().splitlines() if done_file.is_file() else []
    waiting = [(number, line) for number, line in enumerate(lines, 1) if line not in done]
    failed = []
    with tqdm(total=len(lines), initial=len(lines) - len(waiting), desc="queue") as bar:
        def one(item: tuple[int, str]) -> None:
            status = run_line(*item, args.out, args.threads)
            if status:
                failed.append(item)
                tqdm.write(f"line {item[0]} ended with {status}: {item[1]} (its output is in "
                           f"{args.out / 'queue'}/{item[0]}.log)")
            else:
                with open(done_file, "a") as file:
                    file.write(item[1] + "\n")
            bar.update()

        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(one, waiting))
    if failed:
        raise UserError(f"{len(failed)} of {len(lines)} commands failed: mend them and start the queue again")


if __name__ == "__main__":
    main()
