"""How fast, side by side: what a training step, likelihoods or greedy answers cost, as ratios.

    python -m lab.bench                                   # medians of 7 rounds; everything takes its turn in each
    python -m lab.bench --rounds 3 --depth 8 --width 256  # flags of train.py that shape both small models
    python -m lab.bench --device cuda                     # lab/gpu.py has full-size shapes
    python -m lab.bench --model HuggingFaceTB/SmolLM2-135M-Instruct --data tofu     # a public model on TOFU's rows

What does a method's step cost against one of all parameters (NPO + GD), set-up included? What does ULD's decoding cost
against its target's own? And, where `transformers` is installed, what does the same model cost here and there: the same
weights and tokens, checked to give the same logits first? Ratios, for absolute times mean little on a machine that
nobody else has; beside them what share of the device's own matrix rate and memory bandwidth, measured in the same run,
a training step and decoding reach.

Shapes: B batch   T tokens
"""

import contextlib
import copy
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import loop
from belief import at_answers, row_log_prob
from cli import parse
from data.batches import Batch, Example, collate, encode_row, encode_rows, left_pad
from data.rows import Row
from data.tokenizer import Tokenizer
from errors import one_line_errors
from flags import COUNT, Parser
from interfaces import LanguageModel, TextCodec
from lab.memory import large_blocks
from methods import METHODS as ALL
from metrics.likelihood import likelihoods
from model import GPT, Config, count_parameters
from moe import MoE, experts_loop
from objectives import cross_entropy
from pretrain import small_config
from pretrained import load, save
from runs import data_of, weights_of
from uld import LogitDifference, build_assistant, merge_lora

try:
    from transformers import AutoModelForCausalLM, OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
except ImportError:  # then nothing is compared with it, and the table says so
    AutoModelForCausalLM = None  # type: ignore[assignment, misc]

METHODS = {  # against all parameters of the same model, NPO + GD
    "moe": {"UOE": ["--method", "uoe"], "UOE with NPO": ["--method", "uoe", "--forget-loss", "npo", "--adversary", "0"],
            "ESFT": ["--method", "esft"], "LoRA": ["--method", "lora"], "all parameters": ["--method", "full"]},
    "gpt": {"ULD, assistant of a quarter": ["--method", "uld"],
            "Offset": ["--method", "offset"], "all parameters, GDIFF": ["--method", "full", "--forget-loss", "ga"],
            "all parameters, KL": ["--method", "full", "--retain-loss", "kl"], "all parameters": ["--method", "full"]},
}

NEW = 32  # tokens that are decoded
LAYERS = [  # width, width of an expert, experts, per token, dtype, tokens
    (128, 64, 16, 4, torch.float32, 800),
    (2048, 1024, 8, 2, torch.float32, 512),
    (2048, 1024, 64, 8, torch.bfloat16, 512),
]


def in_turn(what: Mapping[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Each callable's own seconds, `rounds` times, all of them in every round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in tqdm(range(rounds + 1), desc=title):
        for name, measure in what.items():
            spent = measure()
            if turn:
                seconds[name].append(spent)
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the GPU's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rates(device: torch.device, dtype: torch.dtype, side: int = 1024, rounds: int = 5) -> tuple[float, float]:
    """What the device can do: operations per second of a square product, bytes per second of a copy (read, written)."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    much, into = (torch.zeros(256 * side**2, dtype=torch.uint8, device=device) for _ in range(2))
    works = {"product": lambda: timed(lambda: a @ b, device), "copy": lambda: timed(lambda: into.copy_(much), device)}
    seconds = {name: statistics.median(each) for name, each in in_turn(works, rounds, "the device").items()}
    return 2 * side**3 / seconds["product"], 2 * much.numel() / seconds["copy"]


def weights_met(config: Config, rows: int = 1) -> float:
    """How many weights so many tokens meet: all but an embedding of its own, and experts as if evenly chosen.

    One token: what a pass computes with, twice as many operations. The rows of a decoding step: what it has to read.
    """
    with torch.device("meta"):
        model = GPT(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("mlp.gate_up", "mlp.down")))
    embedding = 0 if config.tie_head else model.embed.weight.numel()
    unmet = (1 - config.top_k / config.n_expert) ** rows if experts else 0.0  # share of experts that no row chooses
    return count_parameters(model) - embedding - experts * unmet


def operations(config: Config, tokens: int, answers: int) -> float:
    """Of a training step on so many real tokens: 6 for each weight that a token meets. Answers alone meet the head and,
    where no trace is asked for, the last MLP."""
    with torch.device("meta"):
        last = GPT(config).blocks[-1]
    block = weights_met(config) - weights_met(dataclasses.replace(config, n_layer=config.n_layer - 1))
    mlp = block - count_parameters(last.attn) - 2 * config.d_model  # but for attention and two norms
    late = config.vocab_size * config.d_model + mlp
    return 6 * ((weights_met(config) - late) * tokens + late * answers)


def step_of(flags: list[str], extra: list[str], arch: str, target: GPT, tokenizer: TextCodec,
            epochs: int) -> Callable[[], float]:
    """A callable: seconds of the method that `flags` name, set-up included, per training step."""
    args = parse([*extra, *flags, "--arch", arch, "--epochs", str(epochs), "--name", "bench"])
    args.seed, method, data = 0, ALL[args.method], data_of(vars(args) | {"seed": 0})
    rows = method.rows(data, args)

    def measure() -> float:
        quiet = io.StringIO()
        with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet),
              contextlib.redirect_stderr(quiet)):
            forget, retain = loop.learning_rows(args, data, *rows, tokenizer)
            fit, reports = loop.fitting(args, forget, Path(folder)), []
            seconds = timed(lambda: reports.append(method.unlearn(target, forget, retain, args, fit)[2]), target.device)
        return seconds / reports[0]["steps"]

    return measure


def decoding_pair(target: GPT, prompts: Tensor, pad: Tensor, new: int = NEW,
                  filter_rate: float = 0.0) -> dict[str, Callable[[], Any]]:
    """`new` greedy tokens for 8 prompts, of the target and of ULD's difference with a quarter of its layers."""
    assistant = merge_lora(build_assistant(target, max(1, target.config.n_layer // 4)))
    models: dict[str, LanguageModel] = {"target": target, "ULD": LogitDifference(target, assistant, 0.75, filter_rate)}
    return {name: partial(model.generate, prompts[:8], new, pad=pad[:8]) for name, model in models.items()}


def here_and_there(model: GPT, tokenizer: TextCodec, examples: list[Example], batch: Batch, prompts: Tensor,
                   pad: Tensor, new: int = NEW) -> dict[str, tuple[Callable, Callable]]:
    """What -> (ours, transformers'), on the same weights and tokens. {} where transformers is not installed.

    Training: batch. Likelihoods: examples, here as scoring has them, there a plain loop over what comes. Decoding:
    prompts, (B, T), `new` tokens. Here only answers meet the head, as everywhere in this code; there logits are what a
    forward pass gives.

    Raises AssertionError where the two disagree on a logit by more than 1e-4 of the largest.
    """
    if AutoModelForCausalLM is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, Path(folder))
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs.to(model.device)
    with torch.no_grad():
        both = theirs(batch.tokens, use_cache=False).logits, model(batch.tokens)
        torch.testing.assert_close(*both, rtol=0, atol=1e-4 * max(1.0, float(both[0].abs().max())))
    mask = torch.arange(prompts.shape[1], device=model.device) >= pad[:, None]

    def here(part: Batch) -> Tensor:
        return model(part.tokens, at=part.scored)

    def there(part: Batch) -> Tensor:
        return theirs(part.tokens, use_cache=False).logits

    def train_step(forward: Callable, parameters: list) -> None:
        for p in parameters:
            p.grad = None
        cross_entropy(*at_answers(forward(batch), batch.labels)).backward()

    @torch.no_grad()
    def likelihoods_there() -> None:
        for i in range(0, len(examples), len(batch.tokens)):
            part = collate(examples[i : i + len(batch.tokens)], device=model.device)
            row_log_prob(there(part), part.labels)

    def generate_theirs() -> None:
        theirs.generate(prompts, attention_mask=mask.long(), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                        pad_token_id=0)

    return {"training step": (partial(train_step, here, list(model.parameters())),
                              partial(train_step, there, list(theirs.parameters()))),
            "likelihoods": (lambda: likelihoods(model, examples), likelihoods_there),
            f"{new} greedy tokens": (lambda: model.generate(prompts, new, pad=pad), generate_theirs)}


def layer_step(layer: torch.nn.Module, x: Tensor) -> None:
    """Forward and backward of one layer."""
    for p in layer.parameters():
        p.grad = None
    first(layer(x)).float().square().mean().backward()


def moe_layers(rounds: int, device: torch.device) -> None:
    """Prints the cost of one MoE layer: all of it trains, or one expert and the router, as in UOE's last layer."""
    for width, of_expert, experts, per_token, dtype, tokens in LAYERS:
        x = torch.randn(8, tokens // 8, width, device=device, dtype=dtype)
        ours = MoE(width, of_expert, experts, per_token).to(device, dtype)
        for p in ours.parameters():
            torch.nn.init.normal_(p, std=0.02)
        loop_alone = copy.deepcopy(ours)
        loop_alone.way = lambda *_: experts_loop  # type: ignore[method-assign]
        one = copy.deepcopy(ours).requires_grad_(False)
        one.take_out(0)
        one.router.requires_grad_(True)
        works = {"here": partial(layer_step, ours, x.clone().requires_grad_()), "one": partial(layer_step, one, x),
                 "loop": partial(layer_step, loop_alone, x.clone().requires_grad_())}
        if AutoModelForCausalLM is not None:
            config = OlmoeConfig(hidden_size=width, intermediate_size=of_expert, num_experts=experts,
                                 num_experts_per_tok=per_token, norm_topk_prob=False)
            config._experts_implementation = "grouped_mm"  # the fastest of theirs on all these shapes
            theirs = OlmoeSparseMoeBlock(config).to(device, dtype)
            theirs.load_state_dict({"gate.weight": ours.router.weight, "experts.gate_up_proj": ours.gate_up,
                                    "experts.down_proj": ours.down})
            with torch.no_grad():
                torch.testing.assert_close(first(theirs(x)), first(ours(x)), rtol=1e-2, atol=1e-2)
            works["there"] = partial(layer_step, theirs, x.clone().requires_grad_())
        seconds = in_turn({name: partial(timed, work, device) for name, work in works.items()}, rounds, "MoE layer")
        print(f"\nMoE layer of width {width}, {experts} experts of {of_expert}, {per_token} per token, {dtype}, "
              f"{tokens} tokens, forward and backward")
        if "there" in works:
            print(line("here / in transformers", seconds["here"], seconds["there"]))
        print(line("one expert at a time / here", seconds["loop"], seconds["here"]))
        print(line("one expert trains / all do", seconds["one"], seconds["here"]))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def answers_of(rows: list[Row], tokenizer: TextCodec, context: int) -> list[Example]:
    """What scoring asks of these rows: the answer of each, the paraphrased one, the wrong ones."""
    return [encode_row(row, tokenizer, context, answer=answer, truncate=True) for row in rows
            for answer in (row["answer"], row.get("paraphrased_answer"), *row.get("perturbed_answer", ())) if answer]


def public(args: Any, rounds: int, device: torch.device) -> None:
    """A public model on a data set's forget rows: steps of 8, all answers of 20, 64 tokens for 16 prompts."""
    model, tokenizer = load(weights_of(args.model), torch.float32, device, args.template)
    rows = [row for row in data_of(vars(args) | {"seed": 0}).scored["forget"] if "question" in row][:20]
    examples = answers_of(rows, tokenizer, args.context or 512)
    batch = collate(encode_rows(rows[:8], tokenizer, args.context or 512, truncate=True), device=device)
    prompts, pad = left_pad([tokenizer.prompt(row["question"]) for row in rows[:16]], device)
    pairs = here_and_there(model, tokenizer, examples, batch, prompts, pad, 64)
    works = {f"{name} {i}": work for name, both in pairs.items() for i, work in enumerate(both)}
    works |= decoding_pair(model, prompts, pad, 64, filter_rate=1e-2)
    seconds = in_turn({name: partial(timed, work, device) for name, work in works.items()}, rounds, "passes")
    print(f"\n{args.model}, {len(rows)} rows: seconds here / seconds in transformers")
    for name in pairs:
        print(line(name, seconds[f"{name} 0"], seconds[f"{name} 1"]))
    print("seconds of ULD's decoding / of its target's, an assistant of a quarter")
    print(line("64 tokens, ULD", seconds["ULD"], seconds["target"]))


def line(name: str, ours: list[float], other: list[float]) -> str:
    """Ratio of medians, and the least and largest ratio within a round."""
    each = [a / b for a, b in zip(ours, other, strict=True)]
    middle = statistics.median(ours) / statistics.median(other)
    return f"    {name:<34}{middle:6.2f}   ({min(each):.2f} to {max(each):.2f})"


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="speed, side by side, as ratios; other flags are train.py's")
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--epochs-per-round", type=COUNT, default=1)
    own, extra = parser.parse_known_args(argv)
    large_blocks()
    args = parse(extra)
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; ratios of medians of {own.rounds} rounds, in brackets the least and largest in one round")
    matrix, bandwidth = rates(device, torch.float32)
    print(f"a float32 product of 1024 x 1024: {matrix / 1e9:.0f} GFLOP/s; a copy: {bandwidth / 1e9:.1f} GB/s")
    if args.model:
        public(args, own.rounds, device)
        return
    moe_layers(own.rounds, device)
    for arch, methods in METHODS.items():
        args = parse([*extra, "--method", "full", "--arch", arch])
        data = data_of(vars(args) | {"seed": 0})
        tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
        torch.manual_seed(0)
        target = GPT(small_config(args, tokenizer.vocab_size)).to(device).eval()
        examples = answers_of(data.scored["forget"][:64], tokenizer, args.context)
        batch = collate(encode_rows(data.retain[:32], tokenizer, args.context, truncate=True), device=device)
        prompts, pad = left_pad([tokenizer.prompt(row["question"])[:12] for row in data.retain[:32]], device)
        pairs = here_and_there(target, tokenizer, examples, batch, prompts, pad)
        works = {f"{name} {i}": work for name, both in pairs.items() for i, work in enumerate(both)}
        if arch == "gpt":
            works |= decoding_pair(target, prompts, pad)
        seconds = in_turn({name: partial(timed, work, device) for name, work in works.items()}, own.rounds,
                          f"{arch}, passes")
        steps = in_turn({name: step_of(flags, extra, arch, target, tokenizer, own.epochs_per_round)
                         for name, flags in methods.items()}, own.rounds, f"{arch}, methods")
        kind = "mixture of experts" if arch == "moe" else "dense model"
        print(f"\n{kind}: seconds here / seconds in transformers")
        for name in pairs:
            print(line(name, seconds[f"{name} 0"], seconds[f"{name} 1"]))
        if not pairs:
            print("    (transformers is not installed: pip install -r requirements-test.txt)")
        else:
            step = statistics.median(seconds["training step 0"])
            decoded = statistics.median(seconds[f"{NEW} greedy tokens 0"])
            used = operations(target.config, int(batch.mask.sum()), len(batch.answers)) / step / matrix
            read = 4 * weights_met(target.config, len(prompts)) * NEW / decoded / bandwidth
            print(f"    here: {100 * used:.0f}% of the matrix rate in training, {100 * read:.0f}% of the bandwidth in "
                  "decoding")
        if arch == "gpt":
            print("seconds of ULD's decoding / of its target's, an assistant of a quarter")
            print(line(f"{NEW} tokens, ULD", seconds["ULD"], seconds["target"]))
        print(f"{kind}: seconds per training step, set-up included / of all parameters, NPO + GD")
        for name in list(methods)[:-1]:
            print(line(name, steps[name], steps["all parameters"]))


if __name__ == "__main__":
    main()
