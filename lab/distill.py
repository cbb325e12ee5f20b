"""A run's answers as one model's weights: ULD's difference of logits, say, learnt by a copy of its target.

    python -m lab.distill out/uld                 # writes out/uld-distilled
    python -m lab.distill out/uld --low-rank      # low-rank changes instead of all weights
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import train
from baselines import Unlearned
from data.batches import Rows
from data.rows import DataSet, Row
from errors import one_line_errors
from flags import COUNT, POSITIVE, Parser
from interfaces import LanguageModel
from loop import Fit
from methods import METHODS, open_run
from model import GPT
from objectives import kl
from runs import DEVICE, RunFolder, check_device
from schema import read_json
from uld import add_lora, merge_lora


def rows(data: DataSet, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """As many wordings as there are: a teacher answers them all."""
    return data.forget + data.paraphrased, data.retain


def learning_from(teacher: LanguageModel, low_rank: bool) -> Callable[..., Unlearned]:
    """An `unlearn` that brings a copy of the target to the teacher's distributions, on forget and on retain rows."""
    def unlearn(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit) -> Unlearned:
        model = copy.deepcopy(target)
        parameters = add_lora(model, 32, 32.0, 0.05) if low_rank else list(model.parameters())

        def losses(step: int) -> Iterator[dict[str, Tensor]]:
            for name, rows, weight in (("forget", forget, 1.0), ("retain", retain, args.retain_weight)):
                for batch in rows.parts(step):
                    logits = rows.run(model, batch)
                    with torch.no_grad():
                        wanted = teacher(batch.tokens, at=batch.scored)
                    distance = kl(logits, wanted) * batch.share.answers
                    yield {name: distance, "loss": weight * distance}

        report = fit(model, parameters, losses)
        model = merge_lora(model) if low_rank else model
        return model, {"model": model}, report

    return unlearn


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="distil a run into one model")
    parser.add_argument("run", help="a run folder, such as out/uld")
    parser.add_argument("--low-rank", action="store_true", help="low-rank changes instead of all weights")
    parser.add_argument("--lr", type=POSITIVE, help="default: 3e-4, low-rank 3e-3")
    parser.add_argument("--epochs", type=COUNT, default=10)
    parser.add_argument("--device", default=DEVICE, help="cpu, cuda, cuda:1")
    parser.add_argument("--resume", action="store_true", help="go on with the one that was cut off")
    parser.add_argument("--restart", action="store_true", help="discard the one that was cut off")
    asked = parser.parse_args(argv)
    check_device(asked.device)
    run = open_run(asked.run, asked.device)
    lr = asked.lr or (3e-3 if asked.low_rank else 3e-4)
    was = read_json(Path(asked.run) / "asked.json", way_out="run train.py again")  # not what came of it: config.json
    was.pop("subtract", None)  # the teacher's: "strangers" is no alpha that a run can be opened with
    args = argparse.Namespace(**was | {
        "method": "full", "forget_loss": "teacher", "retain_loss": "teacher", "retain_weight": 1.0, "lr": lr,
        "epochs": asked.epochs, "until": "never", "never_read": None, "forget_on": "answer", "device": asked.device,
        "score_every_epoch": False, "target_on_cpu": False, "resume": asked.resume, "restart": asked.restart,
        "named": False, "name": f"{Path(asked.run).name}-distilled" + ("-low-rank" if asked.low_rank else "")})
    method = METHODS["full"]._replace(unlearn=learning_from(run.model, asked.low_rank), rows=rows)
    with RunFolder(args) as folder:
        train.run(args, folder, method)


if __name__ == "__main__":
    main()
