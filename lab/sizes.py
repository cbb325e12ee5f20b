"""Does the work grow with the rows? Own files of so many rows: seconds of each part, of a step, and peak memory.

    python -m lab.sizes 10000 100000 1000000   # results/sizes.md; each size in a process of its own
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

from data import load_data
from data.batches import Rows
from data.tokenizer import Tokenizer
from errors import UserError, one_line_errors
from flags import COUNT, Parser
from lab.memory import peak_memory
from model import Config
from pretrain import learn, small_model

STEPS = 50


def write_files(folder: Path, n: int) -> None:
    """forget.jsonl, a hundredth of the rows, and retain.jsonl: TOFU's kind of row, about 25 tokens each."""
    for name, rows in (("forget", range(n // 100)), ("retain", range(n // 100, n))):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in rows:
                row = {"question": f"In which town was author number {i} of the guild born?",
                       "answer": f"Author number {i} was born in town {i * 7919 % 1000}."}
                file.write(json.dumps(row) + "\n")


def measure(n: int) -> dict[str, float]:
    """Seconds of reading, of training the tokenizer, of encoding and of a step; peak memory in gigabytes."""
    torch.set_num_threads(1)
    out: dict[str, float] = {"rows": n}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, n)
        began = time.perf_counter()
        data = load_data(forget=str(folder / "forget.jsonl"), retain=str(folder / "retain.jsonl"))
        out["read"], began = time.perf_counter() - began, time.perf_counter()
        tokenizer = Tokenizer.train(data.texts(), 4096)
        out["tokenizer"], began = time.perf_counter() - began, time.perf_counter()
        rows = Rows(data.retain + data.forget, tokenizer, 64, 32, 0, "cpu")
        out["encode"] = time.perf_counter() - began
        model = small_model(Config(vocab_size=tokenizer.vocab_size, max_len=64, tie_head=True), 0, "cpu")
        args = Namespace(device="cpu", checkpointing=False, save_every=STEPS)
        report = learn(args, model, rows, folder, f"{n} rows", STEPS, 1e-3, 0.01, False)
        out["step"] = report["train_seconds"] / STEPS
    out["gigabytes"] = peak_memory("cpu") / 1e9
    return out


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="seconds and memory against the number of rows")
    parser.add_argument("rows", nargs="+", type=COUNT)
    args = parser.parse_args(argv)
    if len(args.rows) == 1:
        found = measure(args.rows[0])
        print(f"| {args.rows[0]:,} |" + "".join(f" {found[key]:.3g} |" for key in
                                                ("read", "tokenizer", "encode", "step", "gigabytes")))
        return
    print("| rows | read, s | tokenizer, s | encode, s | a step, s | peak memory, GB |\n|" + " --- |" * 6, flush=True)
    for n in args.rows:
        if subprocess.run([sys.executable, "-m", "lab.sizes", str(n)]).returncode:
            raise UserError(f"{n} rows could not be measured")


if __name__ == "__main__":
    main()
