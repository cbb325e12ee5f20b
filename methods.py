"""Every unlearning method by its name, and a finished run of any of them, opened again."""

from dataclasses import dataclass
from pathlib import Path

import baselines
import uld
import uoe
from errors import UserError
from interfaces import LanguageModel, Method
from runs import Opened, read_run

METHODS: dict[str, Method] = {"uoe": uoe.METHOD, "uld": uld.METHOD, **baselines.METHODS}


@dataclass
class Run(Opened):
    """A finished run with the model that was scored: the unlearned one, or the one that was fine-tuned."""

    model: LanguageModel


def open_run(folder: str | Path, device: str = "cpu", check: bool = True) -> Run:
    """Raises UserError as runs.read_run does."""
    run = read_run(folder, device, check)
    if run.config["method"] == "finetune":
        return Run(**vars(run), model=run.target)
    try:
        reopen = METHODS[run.config["method"]].reopen
        return Run(**vars(run), model=reopen(run.target, run.parts, run.config))
    except KeyError as error:  # of a method that is none, or without what its own has
        raise UserError(f"{folder}/config.json lacks {error}: it was written by other code, or changed: run train.py "
                        "again") from None
