"""Full-size shapes on one GPU, by random weights: nothing is fetched, a few minutes, one page.

    python -m lab.gpu                          # writes results/gpu.md and results/gpu.json
    python -m lab.gpu --out /tmp --tiny        # the same at toy sizes, on a CPU too: does every part run?

What is measured: the card's own rates; whether recorded decoding says what decoding says; the MoE layer against
`transformers`; UOE on OLMoE-1B-7B's shape and ULD on Llama-2-7B's, each as train.py runs it (uoe.py, uld.py, loop.py),
with decoding and peak memory; decoding of Llama-3.1-8B's shape. Speed does not ask what the weights say, so random ones
do. A part that fails prints its traceback and the next one runs.

Shapes: N tokens   D model width   E experts   K experts per token   F width of an expert
"""

import argparse
import contextlib
import copy
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import loop
from cli import parse
from data.rows import DataSet, Row
from decoding import Replay
from errors import one_line_errors
from flags import Parser
from lab.bench import in_turn, timed, weights_met
from lab.memory import Text, need
from lab.trial import write_page
from methods import METHODS
from model import GPT, Config, count_parameters
from moe import MoE, experts_all, experts_grouped, experts_loop

try:
    import transformers
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
except ImportError:  # then nothing is compared with it
    transformers = None  # type: ignore[assignment]

Shape = dict[str, Any]
OLMOE = dict(vocab_size=50_304, n_layer=16, n_head=16, n_kv_head=16, d_model=2048, d_ff=1024, max_len=4096,
             qk_norm="full", n_expert=64, top_k=8)
LLAMA = dict(vocab_size=32_000, n_layer=32, n_head=32, n_kv_head=32, d_model=4096, d_ff=11_008, max_len=4096)
LLAMA3 = LLAMA | dict(vocab_size=128_256, n_kv_head=8, d_ff=14_336)
TINY = dict(vocab_size=128, n_layer=4, n_head=2, n_kv_head=2, d_model=32, d_ff=16)
PROMPT, ANSWER, ROWS = 32, 64, 128  # tokens of a question and of an answer, and rows of the forget set
DECODED, AT_ONCE, MANY = 200, 8, 256  # tokens of each answer, and answers side by side, few and many
BATCHES = 32, 128  # forget rows of a step, and as many retain rows


class Here:
    """The device, and how large everything is on it."""

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny = torch.device(device), tiny
        self.rounds = 1 if tiny else 5
        self.olmoe: Shape = OLMOE | (TINY | dict(n_expert=8, top_k=2) if tiny else {})
        self.llama: Shape = LLAMA | (TINY if tiny else {})
        self.llama3: Shape = LLAMA3 | (TINY | dict(n_head=4) if tiny else {})
        self.decoded = 4 if tiny else DECODED

    def seconds(self, work: Callable[[], object], rounds: int = 0) -> float:
        """Median of a few rounds, after one that warms up."""
        work()
        return statistics.median(timed(work, self.device) for _ in range(rounds or self.rounds))

    def model(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> GPT:
        """Random weights, made on the device."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return GPT(Config(**shape)).eval()
        finally:
            torch.set_default_dtype(before)

    def forget_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes that the card has held at once since forget_peak; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


class Numbers:
    """A tokenizer whose text is token numbers, "17 3 940": rows can be as long and as random as wanted."""

    end = 0
    stops: tuple[int, ...] = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.front: list[int] = []

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    prompt = completion = passage = encode

    def save(self, folder: Path) -> None:
        raise NotImplementedError("nothing is saved here")


def random_rows(vocab_size: int, n: int, seed: int) -> list[Row]:
    """n rows of PROMPT + ANSWER random tokens."""
    ids = torch.randint(1, vocab_size, (n, PROMPT + ANSWER), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"question": " ".join(map(str, row[:PROMPT])), "answer": " ".join(map(str, row[PROMPT:]))} for row in ids]


# ---- parts: each returns what it found, name -> number ------------------------------------------------------------

def card(here: Here) -> dict[str, float]:
    """What the device can do: a large bf16 product, and a copy of much memory (read and written)."""
    n = 256 if here.tiny else 8192
    a, b = (torch.randn(n, n, device=here.device, dtype=torch.bfloat16) for _ in range(2))
    much = torch.empty(2**20 if here.tiny else 2**31, dtype=torch.uint8, device=here.device)
    return {"bf16_flops": 2 * n**3 / here.seconds(lambda: a @ b, 4 * here.rounds),
            "bytes_per_second": 2 * much.numel() / here.seconds(lambda: much.clone(), 4 * here.rounds)}


def recorded(here: Here) -> dict[str, float]:
    """Share of tokens alike, of answers decoded from recordings made anew every five tokens and kernel by kernel."""
    shape: Shape = dict(vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, d_model=64, d_ff=48, max_len=64)
    kinds: dict[str, Shape] = {
        "grouped queries": shape, "a head each": shape | dict(n_kv_head=4), "a window": shape | dict(window=7),
        "experts": shape | dict(n_expert=8, top_k=2, qk_norm="full"),
        "latent attention": shape | dict(n_kv_head=4, d_head=8, kv_rank=16, d_nope=8, d_value=16)}
    tokens = torch.randint(1, 64, (5, 9), device=here.device)
    given: dict[str, Any] = dict(pad=torch.tensor([0, 3, 8, 1, 0], device=here.device), end=[5],
                                 of=torch.tensor([0, 0, 1, 2, 3, 4], device=here.device))
    out = {}
    for name, one in kinds.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = here.model(one, dtype)
            for p in model.parameters():
                p.data.mul_(8 if p.dim() > 1 else 1)  # so sure of itself that no rounding decides
            with mock.patch.multiple(Replay, ROOM=0, LEAST=5), counted(Replay, "record") as recordings:
                said = model.generate(tokens, 40, **given)
            if here.device.type == "cuda" and len(recordings) < 2:
                raise RuntimeError(f"{name} was recorded {len(recordings)} times: nothing was compared")
            alike = said == KernelByKernel(model).generate(tokens, 40, **given)
            out[f"{name}, {str(dtype).removeprefix('torch.')}"] = float(alike.float().mean())
    return out


@contextlib.contextmanager
def counted(of: type, name: str) -> Iterator[list[None]]:
    """A list that grows with each call of a method."""
    method = getattr(of, name)
    calls: list[None] = []

    def counting(*args: Any) -> Any:
        calls.append(None)
        return method(*args)

    with mock.patch.object(of, name, counting):
        yield calls


def loop_over_stack(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return experts_loop(x, chosen, weights, list(gate_up.unbind(0)), list(down.unbind(0)))


def experts(here: Here) -> dict[str, dict[str, float | None]]:
    """Seconds of the experts of one layer, forward and backward: ours each way, theirs each way."""
    small, upcycled = (dict(d_model=128, d_ff=64, n_expert=16, top_k=4),
                       dict(d_model=576, d_ff=1536, n_expert=8, top_k=2))
    shapes = {**{f"OLMoE, bf16, {n}": (here.olmoe, torch.bfloat16, n) for n in (512, 4096, 16_384)},
              **{f"OLMoE, float32, {n}": (here.olmoe, torch.float32, n) for n in (8, 64, 512)},
              "SmolLM2 in 8 experts, float32, 2048": (upcycled, torch.float32, 2048),
              **{f"small, float32, {n}": (small, torch.float32, n) for n in (1024, 16_384)}}
    out = {}
    for name, (shape, dtype, tokens) in shapes.items():
        tokens = 16 if here.tiny else tokens
        out[name] = one_layer(here, shape, dtype, tokens)
        here.forget_peak()
    return out


def one_layer(here: Here, shape: Shape, dtype: torch.dtype, tokens: int) -> dict[str, float | None]:
    """Of one shape; None where a way does not run.

    "one expert" is UOE's: it and the router train, and what comes in needs no gradient.
    """
    d, e, k = shape["d_model"], shape["n_expert"], shape["top_k"]
    with here.device:
        moe = MoE(d, shape["d_ff"], e, k).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(tokens, d, device=here.device, dtype=dtype, requires_grad=True)
    routing = moe.route(x[None].detach())
    chosen, weights = routing.chosen[0], routing.weights[0].detach().requires_grad_()
    probe = torch.randn_like(x)

    def step(forward: Callable, *given) -> Callable[[], None]:
        leaves = [t for t in given if t.requires_grad]

        def work() -> None:
            torch.autograd.grad((forward(*given) * probe).sum(), leaves)
        return work

    ours: dict[str, Callable] = {"grouped": experts_grouped, "loop": loop_over_stack}
    if tokens * e * d * shape["d_ff"] < 2**36:  # more would take too much memory
        ours["all"] = experts_all
    def peer(name: str) -> Callable[[], None]:
        config = transformers.OlmoeConfig(hidden_size=d, intermediate_size=shape["d_ff"], num_experts=e,
                                          num_experts_per_tok=k)
        config._experts_implementation = name
        with here.device:
            theirs = OlmoeSparseMoeBlock(config).experts.to(dtype)
        with torch.no_grad():
            theirs.gate_up_proj.copy_(moe.gate_up)
            theirs.down_proj.copy_(moe.down)
        scaled = weights.detach().to(dtype).requires_grad_()
        return step(lambda x, chosen, scaled, *_: theirs(x, chosen, scaled), x, chosen, scaled, *theirs.parameters())

    def one_expert() -> Callable[[], None]:
        moe.requires_grad_(False)
        expert = moe.take_out(int(chosen[0, 0]))
        return step(lambda x, chosen, weights, *_: moe.experts(x, chosen, weights), x.detach(), chosen, weights,
                    expert.gate_up, expert.down)

    makers: dict[str, Callable[[], Callable]] = {
        name: partial(step, way, x, chosen, weights, moe.gate_up, moe.down) for name, way in ours.items()}
    if transformers is not None:
        makers |= {f"transformers {name}": partial(peer, name) for name in ("grouped_mm", "eager")}
    makers["one expert"] = one_expert
    def measured(make: Callable[[], Callable]) -> float:
        return here.seconds(make(), 2 * here.rounds)

    return {name: attempt(partial(measured, make), None) for name, make in makers.items()}


def attempt(work: Callable[[], Any], otherwise: Any) -> Any:
    """What work returns; `otherwise` where it fails, with its traceback printed: the rest is still worth its minute."""
    try:
        return work()
    except Exception:
        traceback.print_exc()
        return otherwise


def unlearn(here: Here, target: GPT, batch: int, *flags: str) -> tuple[Any, dict[str, Any]]:
    """A method as train.py runs it, on random rows: the model that is scored, and seconds per step, tokens, memory."""
    args = parse([*flags, "--model", "random", "--forget", "random", "--retain", "random", "--device", str(here.device),
                  "--context", "256", "--batch-size", str(batch), "--epochs", "2" if here.tiny else "5"])
    args.seed = 0
    forget_rows, retain_rows = (random_rows(target.config.vocab_size, ROWS, seed) for seed in (0, 1))
    data, method = DataSet("random", forget_rows, retain_rows), METHODS[args.method]
    began: list[float] = []
    forget, retain = loop.learning_rows(args, data, forget_rows, retain_rows, Numbers(target.config.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        fit = loop.fitting(args, forget, Path(folder))

        def timing(model, parameters, losses, *more, **others) -> dict:
            def noted(*step):
                began.append(time.perf_counter())  # the step before has ended: its losses have been read
                return losses(*step)
            return fit(model, parameters, noted, *more, **others)

        here.forget_peak()
        held = here.peak()
        model, _, report = method.unlearn(target, forget, retain, args, timing)
    steps = [after - before for before, after in pairwise(began)]
    tokens = 2 * args.batch_size * (PROMPT + ANSWER - 1)  # of forget and retain rows; the last needs no pass
    return model, {"step_seconds": statistics.median(steps[1:] or steps), "tokens_per_step": tokens,
                   "trained": report["trainable_parameters"], "peak_bytes": here.peak(), "held_before": held,
                   "announced_bytes": need(target.config, args, announced_text()).total(),
                   "diverged": report["diverged"]}


def announced_text() -> Text:
    """What a run of `unlearn` is told of its rows before it begins."""
    return Text(PROMPT + ANSWER, ANSWER, 2 * ROWS * (PROMPT + ANSWER))


def decoding(here: Here, models: dict[str, Any], rows: int, new: int) -> dict[str, float]:
    """Seconds per greedy token of so many answers side by side, prompt included, each model by turns."""
    tokens = torch.randint(1, 100, (rows, PROMPT), device=here.device)
    works = {name: lambda model=model: timed(lambda: model.generate(tokens, new), here.device)
             for name, model in models.items()
             if attempt(partial(model.generate, tokens, 2), None) is not None}  # one that fails leaves the others alone
    return {name: statistics.median(each) / new for name, each in in_turn(works, 2, "decoding").items()}


class KernelByKernel:
    """A model of ours that decodes on a GPU as it does on a CPU: without decoding.Replay."""

    def __init__(self, model: GPT):
        self.model = model

    def generate(self, tokens: Tensor, new: int, **given: Any) -> Tensor:
        with mock.patch.object(Replay, "works", return_value=False):
            return self.model.generate(tokens, new, **given)


class Theirs:
    """The same shape in transformers, with random bf16 weights and `generate` as ours."""

    def __init__(self, here: Here, shape: Shape, **more: str):
        self.more = more  # of generate's
        common = dict(vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
                      num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"],
                      num_key_value_heads=shape["n_kv_head"], pad_token_id=0, bos_token_id=0, eos_token_id=0)
        config: Any
        if "n_expert" in shape:
            config = transformers.OlmoeConfig(**common, num_experts=shape["n_expert"],
                                              num_experts_per_tok=shape["top_k"])
            config._experts_implementation = "grouped_mm"  # so that where it cannot that is said
        else:
            config = transformers.LlamaConfig(**common)
        with here.device:
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def generate(self, tokens: Tensor, new: int) -> Tensor:
        return self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                                   min_new_tokens=new, do_sample=False, **self.more)


class TheirsGrouped:
    """The same model, its experts by grouped products throughout.

    Its `generate` copies the weights of each token's experts, which suits few rows and takes 0.24 s a step of 256 on an
    H200.
    """

    def __init__(self, peer: Theirs):
        self.peer = peer

    def generate(self, tokens: Tensor, new: int) -> Tensor:
        with mock.patch.object(type(self.peer.model), "_optimize_model_for_decode", contextlib.nullcontext):
            return self.peer.generate(tokens, new)


def few_and_many(here: Here, models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """decoding of AT_ONCE answers, and of MANY, a quarter as long, by those that are quick at it; by how many."""
    slow = {"transformers"} if "transformers, grouped_mm" in models else set()
    slow |= {name for name, model in models.items() if isinstance(model, KernelByKernel)}
    quick = {name: model for name, model in models.items() if name not in slow}
    return {str(AT_ONCE): attempt(partial(decoding, here, models, AT_ONCE, here.decoded), {}),
            str(MANY): attempt(partial(decoding, here, quick, MANY, here.decoded // 4), {})}


def decoded(here: Here, shape: Shape, models: dict[str, Any]) -> dict[str, Any]:
    """few_and_many of these models and, once they are let go of, of transformers'; bytes of weights a step reads."""
    found = few_and_many(here, models)
    models.clear()
    here.forget_peak()
    if transformers is not None:
        peer = Theirs(here, shape)
        grouped = {"transformers, grouped_mm": TheirsGrouped(peer)} if "n_expert" in shape else {}
        theirs = few_and_many(here, {"transformers": peer} | grouped)
        found = {rows: each | theirs[rows] for rows, each in found.items()}
    return {"decoding": found, "decoding_bytes": {rows: 2 * weights_met(Config(**shape), int(rows)) for rows in found}}


def steps(here: Here, target: GPT, active: float, *flags: str) -> tuple[Any, dict[str, Any]]:
    """A method at both batch sizes: the model that the last made, and what `unlearn` finds, by batch size.

    active: parameters that a token meets. Forward and the gradient of what goes in; what trains is small beside them.
    """
    model, found = None, {}
    for batch in BATCHES:
        model = None  # the one before makes room
        model, one = unlearn(here, target, batch, *flags)
        found[str(batch)] = one | {"step_flops": 4 * active * one["tokens_per_step"]}
    return model, {"active": active, "steps": found}


def uoe(here: Here) -> dict[str, Any]:
    """OLMoE-1B-7B's shape: one expert of the first layer trains, so that nothing can be left out above it; NPO + GD."""
    target = here.model(here.olmoe)
    out: dict[str, Any] = {"parameters": count_parameters(target)}
    model, found = steps(here, target, weights_met(target.config), "--method", "uoe", "--layer", "0,0")
    out |= found
    del target
    here.forget_peak()
    models = {"here": model, "kernel by kernel": KernelByKernel(model)}
    del model
    return out | decoded(here, here.olmoe, models)


def uld(here: Here) -> dict[str, Any]:
    """Llama-2-7B's shape, an assistant of a quarter of its layers."""
    target = here.model(here.llama)
    out: dict[str, Any] = {"parameters": count_parameters(target)}
    config = copy.copy(target.config)
    config.n_layer //= 4
    model, found = steps(here, target, weights_met(config), "--method", "uld")
    out |= found
    here.forget_peak()
    models = {"target": target, "target, kernel by kernel": KernelByKernel(target), "ULD": model}
    del target, model
    return out | decoded(here, here.llama, models)


def grouped(here: Here) -> dict[str, Any]:
    """Decoding of Llama-3.1-8B's shape: four queries share a key and a value, and the head is of 128,256 tokens."""
    target = here.model(here.llama3)
    out: dict[str, Any] = {"parameters": count_parameters(target)}
    models = {"here": target, "kernel by kernel": KernelByKernel(target)}
    del target
    return out | decoded(here, here.llama3, models)


def compiled(here: Here) -> dict[str, float]:
    """Llama-2-7B's shape as transformers decodes it fastest: a cache of fixed size, and torch.compile."""
    if transformers is None:
        return {}
    peer = Theirs(here, here.llama, cache_implementation="static")
    tokens = torch.randint(1, 100, (AT_ONCE, PROMPT), device=here.device)
    first, *more = [timed(lambda: peer.generate(tokens, here.decoded), here.device) for _ in range(3)]
    return {"first_seconds": first, "seconds": statistics.median(more) / here.decoded}


# ---- the page -------------------------------------------------------------------------------------------------------

def gigabytes(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e9:.1f} GB"


def method_lines(title: str, found: dict[str, Any], rates: dict[str, float]) -> list[str]:
    """What one method's part found, a line each."""
    train = f", {found['steps'][str(BATCHES[0])]['trained']:,} train" if "steps" in found else ""
    lines = [f"## {title}", "", f"{found['parameters'] / 1e9:.2f} billion parameters{train}.", ""]
    for batch, step in found.get("steps", {}).items():
        share = step["step_flops"] / step["step_seconds"] / rates["bf16_flops"]
        lines.append(f"- a training step of {batch} + {batch} rows, {step['tokens_per_step']} tokens: "
                     f"{1e3 * step['step_seconds']:.0f} ms, {100 * share:.0f}% of the card's measured bf16 rate (4 x "
                     f"{found['active'] / 1e9:.2f} billion parameters x tokens); peak memory of unlearning "
                     f"{gigabytes(step['peak_bytes'])}, of which {gigabytes(step['held_before'])} were there before; "
                     f"a run announces {gigabytes(step['announced_bytes'])}")
    for rows, each in found["decoding"].items():
        if not each:
            continue
        bound = found["decoding_bytes"][rows] / rates["bytes_per_second"]
        said = (f"{name} {int(rows) / seconds:,.0f} tokens/s ({1e3 * seconds:.1f} ms a step)"
                for name, seconds in each.items())
        lines.append(f"- greedy decoding, {rows} rows: {', '.join(said)}; reading the target's weights once takes "
                     f"{1e3 * bound:.1f} ms")
    return lines


def page(results: dict[str, Any]) -> str:
    """What results/gpu.md holds between its markers."""
    lines = [f"`python -m lab.gpu` on {results['device']}, torch {results['torch']}, "
             f"transformers {results['transformers']}; random weights, {PROMPT} + {ANSWER} tokens a row; decoding: "
             f"{DECODED} new tokens, of {MANY} rows a quarter, the prompt included. "
             "The numbers are in [gpu.json](gpu.json). Decoding starts a token's kernels as one recording "
             "(decoding.Replay); *kernel by kernel*: without that.", ""]
    rates = results.get("card", {"error": ""})
    if "error" not in rates:
        lines += [f"Measured in the same run: {rates['bf16_flops'] / 1e12:.0f} TFLOP/s in bf16 (a square product), "
                  f"{rates['bytes_per_second'] / 1e12:.2f} TB/s (a copy, read and written).", ""]
    for name, title in (("uoe", "UOE, OLMoE-1B-7B's shape, an expert of the lowest layer"),
                        ("uld", "ULD, Llama-2-7B's shape"), ("grouped", "Llama-3.1-8B's shape, as it is")):
        if "error" in results.get(name, {"error": ""}) or "error" in rates:
            lines += [f"## {title}", "", f"Not measured: {results.get(name, {}).get('error', 'no time left')}", ""]
        else:
            lines += [*method_lines(title, results[name], rates), ""]
            peer = results.get("compiled", {})
            if name == "uld" and "seconds" in peer:
                lines[-1:] = ["- greedy decoding, 8 rows, transformers with a static cache and torch.compile: "
                              f"{AT_ONCE / peer['seconds']:.0f} tokens/s, {1e3 * peer['seconds']:.1f} ms a step; its "
                              f"first answers took {peer['first_seconds']:.0f} s", ""]
    alike = results.get("recorded", {"error": ""})
    if "error" not in alike:
        lines += ["## Does a recording say the same?", "",
                  "Share of tokens alike, small random models decoding recorded anew every five tokens and kernel by "
                  "kernel: " + ", ".join(f"{name} {share:.3f}" for name, share in alike.items()) + ".", ""]
    lines += ["## One layer's experts, forward and backward", ""]
    table = results.get("experts", {"error": "no time left"})
    if "error" in table:
        return "\n".join([*lines, f"Not measured: {table['error']}"])
    ways = list(dict.fromkeys(way for row in table.values() for way in row))
    lines += ["| ms | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for name, row in table.items():
        cells = [f"{1e3 * row[way]:.2f}" if row.get(way) else "-" for way in ways]
        lines.append(f"| {name} tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PARTS = {"card": card, "recorded": recorded, "experts": experts, "uoe": uoe, "uld": uld, "grouped": grouped,
         "compiled": compiled}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="full-size shapes with random weights on one GPU")
    parser.add_argument("--out", default="results", help="folder for gpu.md and gpu.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=400.0, help="no part begins later than that")
    measure(parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    """Run the parts in turn; what is known so far is on disk after each."""
    here, began = Here(args.device, args.tiny), time.perf_counter()
    name = torch.cuda.get_device_name() if here.device.type == "cuda" else "CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__,
                               "transformers": getattr(transformers, "__version__", "not installed")}
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if time.perf_counter() - began > args.seconds:
            results[part] = {"error": "no time left"}
            continue
        print(f"---- {part}", flush=True)
        began_part = time.perf_counter()
        results[part] = attempt(partial(PARTS[part], here), {"error": "it failed; the log says how"})
        here.forget_peak()
        print(json.dumps(results[part]), f"({time.perf_counter() - began_part:.0f} s)", flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        write_page(folder / "gpu.md", page(results), "One GPU, full size", "<!-- gpu: written by lab/gpu.py -->")
    print(page(results))


if __name__ == "__main__":
    main()
