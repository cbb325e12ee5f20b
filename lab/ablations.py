"""Rows of results/ that no flag of train.py asks for: a method with one of its parts exchanged.

    python -m lab.ablations --list
    python -m lab.ablations uoe-random --seed 0,1,2       # whatever follows are train.py's own flags
    python -m lab.ablations uld-no-perturbed

A row is the method's own functions, called with other arguments. Rows that flags do ask for are not here: no anchor is
`train.py --method uoe --anchor-weight 0`.

Shapes: L layers   E experts
"""

import argparse
import sys
from functools import partial

import torch
from torch import Tensor

import baselines
import cli
import pretrain
import train
import uld
import uoe
from data.batches import Example, Rows
from errors import UserError, one_line_errors
from interfaces import Method
from lab.grip import with_projection, with_repair
from lab.trace import with_trace
from loop import Fit
from model import GPT

# ---- which expert -----------------------------------------------------------------------------------------------

def lowest(affinity: Tensor, args: argparse.Namespace) -> list[uoe.Place]:
    return uoe.choose_experts(-affinity, args)


def at_random(affinity: Tensor, args: argparse.Namespace) -> list[uoe.Place]:
    drawn = torch.Generator().manual_seed(args.seed)
    shape = affinity.shape if args.layer in ("all", "top") else (1, affinity.shape[1])
    return uoe.choose_experts(torch.rand(shape, generator=drawn) + 0 * affinity, args)  # NaN stays: no expert there


def pushing_on(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit):
    """UOE whose NPO goes on pushing facts that are as unlikely as strangers'; where training ends was told to `fit`."""
    if args.adversary or args.forget_loss not in ("npo", "stranger-npo"):
        raise UserError("uoe-sink is a row of NPO: add --forget-loss npo --adversary 0")
    return uoe.unlearn(target, forget, retain, argparse.Namespace(**vars(args) | {"until": "never"}), fit)


# ---- ULD's rows and losses ----------------------------------------------------------------------------------------

def uniform_on_all(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit):
    """ULD whose assistant is to be uniform over the question's tokens too, as in the authors' code."""
    # to be uniform takes no right answer, so any label does
    retain.examples = [Example(row.tokens, [0] * len(row.labels)) for row in retain.examples]
    return uld.unlearn(target, forget, retain, args, fit)


# ---- by name ------------------------------------------------------------------------------------------------------

UOE, ULD = uoe.METHOD, uld.METHOD
ROWS: dict[str, tuple[str, Method]] = {  # name -> (the method it is a variant of, that variant)
    "uoe-random": ("uoe", UOE._replace(unlearn=partial(uoe.unlearn, choose=at_random))),
    "uoe-sink": ("uoe", UOE._replace(unlearn=pushing_on)),
    "uoe-bottom": ("uoe", UOE._replace(unlearn=partial(uoe.unlearn, choose=lowest))),
    "uoe-rank8": ("uoe", UOE._replace(unlearn=partial(uoe.unlearn, choose=partial(uoe.choose_experts, rank=8)))),
    "uoe-masked": ("uoe", UOE._replace(unlearn=partial(uoe.unlearn, masked=True))),
    "uoe-shared": ("uoe", UOE._replace(unlearn=partial(uoe.unlearn, shared=True))),
    "uoe-trace": ("uoe", UOE._replace(unlearn=with_trace(uoe.unlearn))),
    "uoe-grip": ("uoe", UOE._replace(unlearn=with_repair(uoe.unlearn))),
    "uoe-grip-train": ("uoe", UOE._replace(unlearn=with_projection(uoe.unlearn))),
    "uoe-grip-expert": ("uoe", UOE._replace(unlearn=with_projection(uoe.unlearn, experts=True))),
    "full-grip-train": ("full", baselines.METHODS["full"]._replace(unlearn=with_projection(baselines.full))),
    "full-grip": ("full", baselines.METHODS["full"]._replace(unlearn=with_repair(baselines.full))),
    "lora-attn": ("lora", baselines.METHODS["lora"]._replace(unlearn=partial(baselines.lora, targets="attn"))),
    "lora-mlp": ("lora", baselines.METHODS["lora"]._replace(unlearn=partial(baselines.lora, targets="mlp"))),
    "uld-no-paraphrased": ("uld", ULD._replace(rows=partial(uld.rows, paraphrased=False))),
    "uld-no-perturbed": ("uld", ULD._replace(rows=partial(uld.rows, perturbed=False))),
    "uld-no-retain": ("uld", ULD._replace(rows=partial(uld.rows, retain_share=0.0))),
    "uld-retain9": ("uld", ULD._replace(rows=partial(uld.rows, retain_share=9.0))),
    "uld-stray9": ("uld", ULD._replace(rows=partial(uld.rows, stray_share=9.0))),
    "uld-uniform-all": ("uld", ULD._replace(unlearn=uniform_on_all)),
    "uld-rest": ("uld", ULD._replace(unlearn=partial(uld.unlearn, lowered=False))),
    "uld-centred": ("uld", ULD._replace(unlearn=partial(uld.unlearn, centred=True))),
}
BALANCES = {"uoe-no-balance": ("uoe", 0.0), "full-no-balance": ("full", 0.0)}  # weight of load balancing, pretraining


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    names = [*ROWS, *BALANCES]
    if argv[:1] == ["--list"]:
        print("\n".join(names))
        return
    if not argv or argv[0] not in names:
        raise UserError(f"{argv[0] if argv else 'no row'} is not a row: --list prints them")
    name, rest = argv[0], argv[1:]
    base, method = ROWS[name] if name in ROWS else (BALANCES[name][0], None)
    args = cli.parse(["--method", base, "--name", name, *rest])
    args.variant = name  # in asked.json: no other row goes on with this one
    train.run_seeds(args, method, BALANCES[name][1] if name in BALANCES else pretrain.BALANCE)


if __name__ == "__main__":
    main()
