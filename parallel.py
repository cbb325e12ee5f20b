"""One run by several processes, a GPU each: torchrun starts them, every one does the same, and they share the work.

    torchrun --nproc-per-node 4 train.py --method full --model meta-llama/Llama-2-7b-chat-hf --data tofu

Of a batch's n rows process r of p takes r, r + p, r + 2p...; losses and gradients are added up over processes, so a
step is that of one process, as with the parts of --micro-batch. Where all weights train (full, finetune), each process
holds a piece of weights, gradients and AdamW's moments, and gathers a block's weights when it comes to it
(fully_shard; ZeRO, arXiv 1910.02054, stage 3). Other methods train little, and every process has all of that.

The first process writes the run. Process r keeps what it needs to go on with (state.pt) under out/.rank<r>.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from errors import UserError
from model import GPT, of_state

LONGEST_WAIT = timedelta(hours=12)  # for a process that scores while others are ready for the next seed


def size() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def processes(args: argparse.Namespace) -> Iterator[None]:
    """Within, torchrun's processes know of each other; all but the first are quiet and write elsewhere.

    Sets args.device to this process's own, and args.out. Raises UserError without --model: a small one trains faster
    by one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if not args.model:
        raise UserError("torchrun shares out runs of a --model: start a small model's with python, by one process")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=LONGEST_WAIT)
    with contextlib.ExitStack() as quiet:
        if rank():
            args.out = str(Path(args.out) / f".rank{rank()}")
            Path(args.out).mkdir(parents=True, exist_ok=True)
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()


def total(values: list[float], device: torch.device) -> list[float]:
    """Each number, added up over processes."""
    if size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def agreed(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process: what all of them then act upon, so that none waits for one that has left."""
    return total([float(here)], device)[0] > 0


def add_up(weights: list[Tensor]) -> None:
    """Each weight's gradient, added up over processes; None where no process has one. Pieces are added up already."""
    if size() == 1 or isinstance(weights[0], DTensor):
        return
    there = total([float(w.grad is not None) for w in weights], weights[0].device)
    for w, some in zip(weights, there, strict=True):
        if some:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            dist.all_reduce(w.grad)


def in_one_piece(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process holds a piece; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def sharded(model: object, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Within, if all weights of a GPT train, each process holds only its piece of each; yields the pieces.

    Afterwards every process has the whole model again. Any other model is left as it is.
    """
    if size() == 1 or not isinstance(model, GPT) or len(parameters) < len(list(model.parameters())):
        yield parameters
        return
    mesh = init_device_mesh(model.device.type, (size(),))
    for part in (*model.blocks, model):
        piece = fully_shard(part, mesh=mesh)
        assert isinstance(piece, FSDPModule)
        piece.set_gradient_divide_factor(1.0)  # a sum, not a mean: a part knows its share of the batch (Batch.share)
        piece.set_force_sum_reduction_for_comms(True)  # between CPUs nothing else is to be had
    for method in ("hidden", "next_logits"):
        register_fsdp_forward_method(model, method)
    yield list(model.parameters())
    plain = of_state(model.config, {name: in_one_piece(p.detach()) for name, p in model.state_dict().items()})
    model.__class__, model.__dict__ = GPT, plain.train(model.training).__dict__  # in place, for whoever holds `model`
