"""lab/memory.py: the arithmetic against what small models take, measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab.memory import KEPT_BYTES, SHAPES, Text, arguments, context_of, first_that_fits, inside, need, peak_memory, ways
from model import GPT, Config, count_parameters

ROOT = Path(__file__).resolve().parents[1]
TEXT = Text(tokens=64, answer=32, total=4096)
SMALL = dict(vocab_size=2048, n_layer=4, n_head=8, n_kv_head=8, d_model=512, max_len=64)
SPARSE = Config(**SMALL, d_ff=512, n_expert=16, top_k=2, qk_norm="full")
DENSE = Config(**SMALL, d_ff=2048)


@pytest.mark.parametrize("method, kind", [("uoe", "moe"), ("esft", "moe"), ("uld", "dense"), ("lora", "dense"),
                                          ("lora", "moe"), ("full", "dense"), ("offset", "dense")])
def test_what_trains_is_counted_as_the_method_counts_it(bench, method, kind):
    model = bench.model(kind)
    args = bench.args(method, lora_rank=4, esft_p=1.0, layer=(1, 2), dtype="float32")
    _, _, report = bench.unlearn(model, args)
    args.layer = "last"
    needed = need(model.config, args, TEXT)
    assert needed.weights == 4 * count_parameters(model)
    states = 12 * report["trainable_parameters"]
    assert states <= needed.trains <= states + needed.weights + 4 * report["trainable_parameters"]


def test_a_target_that_waits_on_the_cpu_takes_no_memory_of_the_card():
    both, one = (need(DENSE, arguments("full", target_on_cpu=on_cpu), TEXT) for on_cpu in (False, True))
    assert both.total() - one.total() == both.weights


def test_all_parameters_in_bf16_take_a_second_copy_and_18_bytes_each():
    count = count_parameters(GPT(DENSE))
    needed = need(DENSE, arguments("full"), TEXT)
    assert needed.weights == 2 * count and needed.trains == 20 * count


def test_a_micro_batch_makes_a_pass_smaller_in_proportion_and_checkpointing_by_more():
    one, four = (need(DENSE, arguments("full", micro_batch=n), TEXT).one_pass for n in (1, 4))
    assert four == 4 * one and need(DENSE, arguments("full", micro_batch=4, checkpointing=True), TEXT).one_pass < four
    assert inside(GPT(DENSE).blocks[0], DENSE) * 2 * 64 * 64 == need(
        DENSE, arguments("full", micro_batch=64, checkpointing=True), Text(64, 0, 0)).one_pass - 64 * 64 * 2 * 4 * 512


def test_stems_are_kept_up_to_the_budget():
    rows = 2 * KEPT_BYTES // (2 * 512)  # tokens of two sets that are just kept
    for total, kept in ((rows, 2 * KEPT_BYTES), (rows + 1, 0)):
        assert need(SPARSE, arguments("uoe"), TEXT._replace(total=total)).kept == kept


@pytest.mark.parametrize("name, billions", [("OLMoE-1B-7B", 6.92), ("Mixtral-8x7B", 46.7), ("Llama-2-7B", 6.74),
                                            ("Llama-3.1-8B", 8.03), ("Qwen1.5-MoE-A2.7B", 14.3)])
def test_the_shapes_of_the_table_have_their_models_parameters(name, billions):
    assert need(Config(**SHAPES[name]), arguments("uld"), TEXT).weights / 2e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.slow
def test_a_card_that_is_too_small_gets_flags_or_a_no():
    config = Config(**SHAPES["OLMoE-1B-7B"])
    found = ways(config, "uoe")
    assert first_that_fits(found, 80) == f"{found[''] / 1e9:.0f}" and "--micro-batch" in first_that_fits(found, 24)
    assert first_that_fits(ways(config, "full"), 24).startswith("no (")


MEASURE = """
import json, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
import loop
from data import load_data
from data.batches import Rows
from data.tokenizer import Tokenizer
from lab.memory import arguments, measure_from_here, need, peak_memory, Text
from methods import METHODS
from model import GPT
from tests.test_memory import DENSE, SPARSE
method, dtype = sys.argv[1], sys.argv[2]
config = SPARSE if METHODS[method].needs_experts or sys.argv[3] == "moe" else DENSE
data = load_data("world", subjects=4)
tokenizer = Tokenizer.train(data.texts(), 2048)
args = arguments(method, dtype=dtype, epochs=2, seed=0, forget_loss="npo", retain_loss="gd", retain_weight=1.0,
                 npo_beta=0.1, subtract=0.75, layer=(1, 0))
forget, retain = (Rows(rows[:64], tokenizer, 64, 32, 0, "cpu") for rows in METHODS[method].rows(data, args))
examples = forget.examples + retain.examples
text = Text(max(len(e.tokens) for e in examples), max(sum(label >= 0 for label in e.labels) for e in examples),
            sum(len(e.tokens) for e in examples))
warm = torch.nn.Linear(9, 9)  # what PyTorch loads at its first steps is no part of the method's need
with tempfile.TemporaryDirectory() as folder:
    losses = lambda step: [{"loss": warm(torch.ones(9, 9)).sum()}]
    loop.minimise(list(warm.parameters()), losses, 2, 0.1, Path(folder), "", 0)
def now():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
before = now()
torch.manual_seed(0)
model = GPT(config).to(getattr(torch, dtype)).eval()
measure_from_here("cpu")
with tempfile.TemporaryDirectory() as folder:
    METHODS[method].unlearn(model, forget, retain, args, loop.fitting(args, forget, Path(folder)))
print(json.dumps([peak_memory("cpu") - before, need(config, args, text).total()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a system that can forget its peak")
@pytest.mark.parametrize("method, kind", [("uoe", "moe"), ("uld", "dense"), ("lora", "dense"), ("full", "dense"),
                                          ("full", "moe"), ("uld", "moe"), ("lora", "moe")])
def test_the_arithmetic_is_near_what_a_process_takes(method, kind):
    system = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed is given back
    out = subprocess.run([sys.executable, "-c", MEASURE, method, "float32", kind], cwd=ROOT, capture_output=True,
                         text=True, env=system)
    assert not out.returncode, out.stderr
    measured, told = json.loads(out.stdout.splitlines()[-1])
    assert measured == pytest.approx(told, rel=0.25)


def test_peak_memory_is_of_this_process():
    before = peak_memory("cpu")
    block = torch.ones(64 * 2**20)
    assert peak_memory("cpu") >= before > 10**7 and peak_memory("cpu") >= 4 * len(block)


HUGE = """
import sys, torch, train, lab.ablations

def block(args):
    kept = torch.ones(16 * 2**20)
    print([line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHuge")][0])
    sys.exit(0)

train.RunFolder = block
flags = ["--model", "somewhere", "--data", "tofu", "--out", sys.argv[2]]
lab.ablations.main(["uld-rest", *flags]) if sys.argv[1] == "ablations" else train.main(["--method", "full", *flags])
"""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not PAGES.is_file() or "[madvise]" not in PAGES.read_text(), reason="needs pages of 2 MB on demand")
@pytest.mark.parametrize("script", ["train", "ablations"])
def test_large_tensors_of_a_public_model_lie_on_large_pages(script, tmp_path):
    """PyTorch looks once, before its first tensor, whether to ask for them: nothing makes one before it is told to."""
    out = subprocess.run([sys.executable, "-c", HUGE, script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert not out.returncode, out.stderr
    assert int(out.stdout) >= 32 * 1024  # kB, of 64 MB


def test_the_context_that_is_announced_is_the_one_that_is_run():
    config, args = Config(**SMALL | {"max_len": 8192}, d_ff=16), arguments("full", context=0)
    assert [context_of(args, config), context_of(args, Config(**SMALL, d_ff=16))] == [512, 64]
    args.context = 600
    assert [context_of(args, config), context_of(args, Config(**SMALL, d_ff=16))] == [600, 64]
