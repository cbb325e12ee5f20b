"""What a run needs of memory, by arithmetic, before anything is loaded; and what a process has taken.

    python -m lab.memory > results/memory.md       # public models on cards of 24, 48 and 80 GB, and the flags that fit

Four things add up. *Weights*: one copy, whatever the method. *What trains*: its own copy (a second model where all
trains), gradients and AdamW's two moments, in float32 whatever the weights are. *A pass*: what the backward pass is to
find of one micro-batch, or LoRA's blocks merged after the last. *Kept*: what is computed once per row
(data/batches.py, KEPT_BYTES).

Shapes: R rows at once   T tokens of the longest   A of them answers   D width   V vocabulary   F width of an MLP
"""

import argparse
import contextlib
import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import loop
import parallel
from data.batches import KEPT_BYTES
from data.rows import Row
from errors import one_line_errors
from flags import Parser
from methods import METHODS
from model import GPT, Block, Config, count_parameters
from moe import MoE
from objectives import FORGET, RETAIN
from uld import add_lora, assistant_depth, build_assistant
from uoe import isolate

GB = 1e9
M_MMAP_THRESHOLD = -3  # malloc.h


class Need(NamedTuple):
    """Bytes."""

    weights: int
    trains: int
    one_pass: int
    kept: int

    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = zip(("weights", "what trains", "a pass", "kept of rows"), self, strict=True)
        return f"about {self.total() / GB:.1f} GB: " + ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)


class Text(NamedTuple):
    """Of the longest row: its tokens, and how many of them are its answer; and all tokens of all rows."""

    tokens: int
    answer: int
    total: int


def need(config: Config, args: argparse.Namespace, text: Text) -> Need:
    """Of a run of args.method on a model of this shape. args: as train.py has them."""
    size = 4 if args.dtype == "float32" else 2
    with torch.device("meta"):
        model = GPT(config)
    weights = size * count_parameters(model)
    frozen = args.method in ("uoe", "esft")
    insides = max(inside(block, config, frozen) for block in model.blocks)
    looked = max(inside(block, config, frozen=True) for block in model.blocks)  # nothing is kept for a gradient
    last_mlp = inside_mlp(model.blocks[-1], config, frozen)
    trained, beside, after, backward = what_trains(model, args, size)
    # float32: gradient and two moments; bf16: beside these a float32 copy, and a gradient of its own in passing
    everything = args.method in ("full", "finetune")
    copies = size == 2 and (everything or frozen)  # LoRA is float32 whatever the weights are
    states = trained * (18 if copies else 12) // (parallel.size() if everything else 1)
    rows = args.micro_batch or math.ceil(args.batch_size / parallel.size())
    checkpointing = args.checkpointing
    kept_blocks = min(backward, 1) if checkpointing else backward
    one_pass = rows * text.tokens * size * (kept_blocks * insides + config.n_layer * config.d_model)
    if kept_blocks and not checkpointing and not reads_trace(args):  # the last MLP meets answers alone
        one_pass -= rows * (text.tokens - text.answer) * size * last_mlp
    # logits and their gradient; in float32 a softmax, its gradient, and of lower precision a copy
    one_pass += rows * text.answer * config.vocab_size * (2 * size + 8 + (4 if size == 2 else 0))
    one_pass = max(one_pass, (args.micro_batch or 64) * text.tokens * size * looked)  # or looking at rows, 64 at once
    stems = text.total * config.d_model * size
    kept = stems if frozen and stems <= 2 * KEPT_BYTES else 0
    return Need(weights, states + beside, max(one_pass, after), kept)  # once training has ended no pass takes memory


def what_trains(model: GPT, args: argparse.Namespace, size: int) -> tuple[int, int, int, int]:
    """(parameters that train, bytes of copies beside the weights, of LoRA merged after, blocks a gradient passes)."""
    config, method = model.config, args.method
    if method in ("uoe", "esft"):
        wanted = max(1, math.ceil(args.esft_p * config.n_expert)) if method == "esft" else args.m
        per_layer = 3 if wanted == "own" else wanted  # known once the target was asked; more were never found
        per_layer = min(per_layer, config.n_expert)  # more is refused elsewhere
        sparse = [layer for layer, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]
        layers = sparse if method == "esft" else sparse[-1:]
        places = [(layer, expert) for layer in layers for expert in range(per_layer)]
        trained = count(isolate(model, places, train_router=method == "uoe"))
        open_yet = method == "esft" or wanted == "own" or args.layer in ("all", "top")  # any layer may be the lowest
        lowest = 0 if open_yet else config.n_layer - 1 if args.layer == "last" else args.layer
        lowest = lowest[0] if isinstance(lowest, tuple) else lowest
        return trained, trained * size, 0, config.n_layer - lowest
    if method in ("full", "finetune"):
        every = count_parameters(model)
        return every, 0 if method == "finetune" or args.target_on_cpu else every * size, 0, config.n_layer
    low_rank = (args.lora_rank, args.lora_alpha)
    if method == "lora":
        blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
        trained = count(add_lora(model, *low_rank))
        return trained, trained * 4, blocks * size, config.n_layer
    depth = assistant_depth(args, config)
    blocks = sum(p.numel() for block in model.blocks[:depth] for p in block.parameters())
    trained = count_parameters(build_assistant(model, depth, *low_rank), trainable=True)
    both = 2 if method == "divergence" else 1
    return both * trained, both * trained * 4, both * blocks * size, config.n_layer if method == "offset" else depth


def count(parameters: list) -> int:
    return sum(p.numel() for p in parameters)


def reads_trace(args: argparse.Namespace) -> bool:
    """Whether a pass of a step is asked for hidden states or routing: UOE's anchor, pretrain.learn, some losses."""
    names = (FORGET.get(getattr(args, "forget_loss", "")), RETAIN.get(getattr(args, "retain_loss", "")))
    return args.method in ("uoe", "finetune") or any(loss.READS_TRACE for loss in names if loss)


def inside(block: Block, config: Config, frozen: bool = False) -> int:
    """Numbers per token that a block's backward pass finds again: what goes into each of its products and functions.

    frozen: most of its weights are, and what goes into their products is not asked for.
    """
    D, width = config.d_model, config.d_head * config.n_head
    attention = 2 * D + 4 * width if frozen else 4 * D + 6 * width
    return attention + inside_mlp(block, config, frozen)


def inside_mlp(block: Block, config: Config, frozen: bool = False) -> int:
    """As `inside`, of its MLP or MoE and the norm before that."""
    D, F = config.d_model, config.d_ff
    if isinstance(block.mlp, MoE):
        routed = config.top_k * (D + 4 * F if frozen else 3 * D + 5 * F)
        return 2 * D + routed + 4 * config.n_expert
    return 2 * D + (3 if frozen else 5) * block.mlp.up.out_features


# ---- measured -----------------------------------------------------------------------------------------------------

def large_blocks() -> None:
    """For public models: how a CPU's large blocks of memory come and go. To be called before the first tensor.

    Where glibc is the allocator, blocks of 16 MB and more go back to the system as they are freed. Left alone, it
    raises its bound to 32 MB and keeps what is below in one heap, where holes add up: UOE on an upcycled SmolLM2 took
    4.8 GB that way and takes 3.1 this way, in the same time.
    Where Linux gives pages of 2 MB on demand, PyTorch is told to ask for them: memory that is new at every step, as the
    gradients of many experts are, is then cleared with fewer interruptions. (THP_MEM_ALLOC_ENABLE=0 before the command:
    pages of 4 kB.)
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # who set it knows better
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 << 20)


def measure_from_here(device: str) -> None:
    """What peak_memory tells from now on is the highest from now on, where the system can forget what was before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)  # what scoring has freed
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def peak_memory(device: str) -> int:
    """Bytes at the highest: of the GPU's memory, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory(device: str) -> int | None:
    """Bytes that are to be had there; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])
    return None


def context_of(args: argparse.Namespace, config: Config) -> int:
    """The longest sequence that a public model is given: --context, or 512, and no more than it can take."""
    return min(args.context or 512, config.max_len)


def announce(config: Config, args: argparse.Namespace, rows: list[Row]) -> None:
    """Print what a run will need, of rows whose tokens are guessed from their letters, and what there is."""
    tokens, answers, total = 1, 1, 0
    for row in rows:
        answer = len(row.get("answer", row.get("text", ""))) // 3 + 1  # a token has three letters or more
        length = min(context_of(args, config), answer + len(row.get("question", "")) // 3)
        tokens, answers, total = max(tokens, length), max(answers, min(answer, length)), total + length
    needed, free = need(config, args, Text(tokens, answers, total)), free_memory(args.device)
    print(f"memory: {needed}" + (f"; free on {args.device}: {free / GB:.1f}" if free is not None else ""))
    if free is not None and needed.total() > free:
        print("memory: that is more than there is free; --micro-batch and --checkpointing make a pass smaller")


# ---- the table ----------------------------------------------------------------------------------------------------

EXPERTS_7B = dict(d_model=2048, n_layer=16, n_head=16, n_kv_head=16, d_ff=1024, n_expert=64, top_k=8)
SHAPES: dict[str, dict] = {
    "OLMoE-1B-7B": dict(EXPERTS_7B, vocab_size=50304, qk_norm="full"),
    "Qwen1.5-MoE-A2.7B": dict(vocab_size=151936, d_model=2048, n_layer=24, n_head=16, n_kv_head=16, d_ff=1408,
                              n_expert=60, top_k=4, d_shared=5632, shared_gate=True, qkv_bias=True),
    "DeepSeek-V2-Lite": dict(vocab_size=102400, d_model=2048, n_layer=27, n_head=16, n_kv_head=16, d_ff=1408,
                             n_expert=64, top_k=6, n_shared=2, n_dense=1, d_dense=10944, kv_rank=512, d_head=64,
                             d_nope=128, d_value=128),
    "Mixtral-8x7B": dict(vocab_size=32000, d_model=4096, n_layer=32, n_head=32, n_kv_head=8, d_ff=14336, n_expert=8,
                         top_k=2, norm_topk_prob=True),
    "Llama-2-7B": dict(vocab_size=32000, d_model=4096, n_layer=32, n_head=32, n_kv_head=32, d_ff=11008),
    "Llama-3.1-8B": dict(vocab_size=128256, d_model=4096, n_layer=32, n_head=32, n_kv_head=8, d_ff=14336),
}
CARDS = (24, 48, 80)
RESERVED = 1.5 * GB  # of a card: CUDA's own, and what its allocator cannot use
TOFU = Text(tokens=128, answer=100, total=4000 * 64)  # of its longest row, about; and of all rows
METHODS_SHOWN = {"uoe": "UOE", "uld": "ULD", "lora": "LoRA", "full": "all parameters"}
WAYS = [{}, {"micro_batch": 8}, {"micro_batch": 2}, {"micro_batch": 8, "checkpointing": True},
        {"micro_batch": 1, "checkpointing": True}]  # the quickest first


def arguments(method: str, **others) -> argparse.Namespace:
    """What --method has by default for a public model."""
    flags = [*loop.FLAGS, *METHODS[method].flags]
    public = {flag.key: False if flag.kind is bool else flag.public for flag in flags}
    return argparse.Namespace(**public | dict(method=method, model="public", dtype="bfloat16") | others)


def ways(config: Config, method: str) -> dict[str, int]:
    """WAYS as flags, each with its need in bytes."""
    out = {}
    for way in WAYS:
        words = [f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in way.items()]
        out[" ".join(words)] = need(config, arguments(method, **way), TOFU).total()
    return out


def first_that_fits(found: dict[str, int], card: int) -> str:
    """A cell of the table: GB, and the flags where some are needed."""
    for flags, size in found.items():
        if size <= card * GB - RESERVED:
            return f"{size / GB:.0f}" + (f" `{flags}`" if flags else "")
    return f"no ({min(found.values()) / GB:.0f})"


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| model | weights | method | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    for name, shape in SHAPES.items():
        config = Config(**shape, max_len=4096)
        weights = f"{need(config, arguments('uld'), TOFU).weights / GB:.1f}"
        for method, title in METHODS_SHOWN.items():
            if METHODS[method].needs_experts and not config.n_expert:
                continue
            found = ways(config, method)
            cells = [name, weights, title, *(first_that_fits(found, card) for card in CARDS)]
            yield f"| {' | '.join(cells)} |"


HEAD = """# Memory

Printed by `python -m lab.memory`, by the arithmetic that a run prints before it loads anything; `tests/test_memory.py`
holds it against measured small models. GB (10^9 bytes) that unlearning TOFU's rows needs, bf16, defaults of public
models: 32 rows to forget and 32 to keep a step. Flags where the defaults do not fit: the quickest of those tried. *no*:
what it would need with all of them. Scoring is not counted. No number here was measured on a card; what one measured
beside what was announced (UOE 20 GB for 22, 39 for 47; ULD 20 for 21, 39 for 41): [gpu.md](gpu.md), [tofu.md](tofu.md).
"""


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    Parser(description="memory of public models, by arithmetic").parse_args(argv)
    print(HEAD)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
