"""uld.py: the difference of logits, its filter, the assistant and its LoRA."""

import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import uld
from belief import strangers_belief
from data.batches import IGNORE, Rows
from data.rows import DataSet
from data.values import encode_fact
from errors import UserError
from model import Config, Trace, count_parameters, same_memory
from moe import MoE
from pretrained import load, save
from uld import (
    LogitDifference,
    LoRALinear,
    LoRAStack,
    add_lora,
    alpha_of_strangers,
    assistant_depth,
    build_assistant,
    explain,
    first_layers,
    merge_lora,
    plausible,
    reopen,
    rows,
    said_instead,
    subtract,
    unlearn,
)

PROMPTS = [[5, 9, 2, 44, 7], [3], [8, 8, 1]]


def stir(model, seed: int = 1) -> None:
    """Random numbers into everything trainable: LoRA's B starts at 0 and would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))


def padded(prompts):
    longest = max(map(len, prompts))
    return (torch.tensor([[1] * (longest - len(p)) + p for p in prompts]),
            torch.tensor([longest - len(p) for p in prompts]))


def kept_by_hand(p: list[float], rate: float) -> list[bool]:
    """The definition in words: all at rate 0; p >= rate * max p, or among the max(1, rate * V) most likely tokens."""
    share = max(1, int(rate * len(p)))
    rank = {v: i for i, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v]))}
    return [p[v] >= rate * max(p) or rank[v] < share for v in range(len(p))]


# ---- the filter -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, rate, expected", [
    ([0.5, 0.3, 0.15, 0.05], 0.4, "1100"),  # threshold 0.2
    ([0.5, 0.3, 0.15, 0.05], 0.25, "1110"),  # threshold 0.125
    ([0.05, 0.3, 0.5, 0.15], 0.25, "0111"),  # not by position
    ([0.9, 0.06, 0.03, 0.01], 0.5, "1100"),  # half of four tokens always stay
    ([0.9, 0.06, 0.03, 0.01], 0.1, "1000"),  # 0.4 tokens: at least one
    ([0.9, 0.06, 0.03, 0.01], 1.0, "1111"),
    ([0.9, 0.06, 0.03, 0.01], 0.0, "1111"),
])
def test_plausible_tokens_by_hand(p, rate, expected):
    wanted = [c == "1" for c in expected]
    assert wanted == kept_by_hand(p, rate)
    logits = torch.tensor(p).log() + 3.0
    assert plausible(logits, rate).tolist() == wanted
    both = torch.stack([logits, logits.flip(0)])[:, None]  # (2, 1, V): each position has its own set
    assert plausible(both, rate).tolist() == [[wanted], [wanted[::-1]]]


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.3, 0.9])
def test_plausible_tokens_of_random_distributions(rate):
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    got = plausible(logits, rate).tolist()
    assert got == [kept_by_hand(row, rate) for row in logits.double().softmax(-1).tolist()]


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_filter_rate_outside_zero_to_one_is_refused(dense, rate):
    with pytest.raises(UserError, match="--filter-rate"):
        plausible(torch.zeros(3), rate)
    with pytest.raises(UserError, match="--filter-rate"):
        LogitDifference(dense(), dense(1), 0.5, rate)(torch.tensor([[1, 2]]))


# ---- the difference ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_without_subtraction_it_is_the_target(factories, kind):
    target, assistant = factories[kind](0), factories["dense"](1, n_layer=1)
    both = LogitDifference(target, assistant, alpha=0.0, filter_rate=0.0)
    tokens, pad = padded(PROMPTS)
    with torch.no_grad():
        assert torch.equal(both(tokens, pad=pad), target(tokens, pad=pad))
    assert torch.equal(both.generate(tokens, 8, pad=pad), target.generate(tokens, 8, pad=pad))
    assert both.config is target.config


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 1.0])
def test_likelihood_by_hand(dense, rate):
    """Inside the plausible set target - alpha * assistant, outside the target's logit as it stands."""
    target, assistant = dense(0, std=0.15), dense(1, std=0.15, n_layer=2)
    tokens = torch.tensor([[5, 9, 2], [7, 1, 33]])
    with torch.no_grad():
        t, a = target(tokens), assistant(tokens)
        got = LogitDifference(target, assistant, 0.8, rate)(tokens)
    for b in range(2):
        for i in range(3):
            keep = kept_by_hand(t[b, i].double().softmax(-1).tolist(), rate)
            for v in range(61):
                expected = t[b, i, v] - 0.8 * a[b, i, v] if keep[v] else t[b, i, v]
                assert got[b, i, v].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_a_centred_assistant_that_is_uniform_changes_nothing(dense, rate):
    """All its logits 10: off centre, every plausible token loses 8 and no other does."""
    target, assistant, tokens = dense(0, std=0.15), dense(1), torch.tensor([[5, 9, 2], [7, 1, 33]])
    assistant.head.forward = lambda hidden: torch.full((*hidden.shape[:-1], 61), 10.0)
    with torch.no_grad():
        before = target(tokens).log_softmax(-1)
        centred = LogitDifference(target, assistant, 0.8, rate, centred=True)(tokens).log_softmax(-1)
        plain = LogitDifference(target, assistant, 0.8, rate)(tokens).log_softmax(-1)
    assert_close(centred, before)
    keep = plausible(before, rate)
    moved = plain - before
    for row in range(2):
        for i in range(3):
            inside, outside = moved[row, i][keep[row, i]], moved[row, i][~keep[row, i]]
            assert inside.max() - inside.min() < 1e-4  # all of them alike
            if len(outside):
                assert_close(outside - inside[0], torch.full_like(outside, 8.0))


def test_centring_takes_the_mean_over_the_vocabulary(dense):
    target, assistant, tokens = dense(0, std=0.15), dense(1, std=0.15), torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        t, a = target(tokens), assistant(tokens)
        got = LogitDifference(target, assistant, 0.8, 0.05, centred=True)(tokens)
        wanted = torch.where(plausible(t, 0.05), t - 0.8 * (a - a.sum(-1, keepdim=True) / 61), t)
    assert_close(got, wanted)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 1.0])
def test_generation_rules_out_what_is_implausible(dense, rate):
    target, assistant = dense(0, std=0.15), dense(1, std=0.15, n_layer=2)
    both, tokens = LogitDifference(target, assistant, 0.8, rate), torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        t, a = target(tokens)[0, -1], assistant(tokens)[0, -1]
        got = both.next_logits(tokens, both.new_cache(1, 3), None)[0]
    keep = kept_by_hand(t.double().softmax(-1).tolist(), rate)
    assert (got > -math.inf).tolist() == keep
    keep = torch.tensor(keep)
    assert_close(got[keep], (t - 0.8 * a)[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_cached_generation_is_the_uncached_loop_alone_and_in_a_padded_batch(factories, kind, rate):
    target, assistant = factories[kind](0, std=0.2), factories[kind](1, std=0.2, n_layer=1)
    both = LogitDifference(target, assistant, 1.5, rate)

    def slowly(prompt, steps=10):
        ids = list(prompt)
        for _ in range(steps):
            t, a = (m(torch.tensor([ids]))[0, -1] for m in (target, assistant))
            keep = torch.tensor(kept_by_hand(t.double().softmax(-1).tolist(), rate))
            ids.append(int(torch.where(keep, t - 1.5 * a, -math.inf).argmax()))
        return ids[len(prompt):]

    with torch.no_grad():
        slow = [slowly(prompt) for prompt in PROMPTS]
    tokens, pad = padded(PROMPTS)
    assert both.generate(tokens, 10, pad=pad).tolist() == slow
    for prompt, said in zip(PROMPTS, slow, strict=True):
        assert both.generate(torch.tensor([prompt]), 10).tolist() == [said]
        assert said != target.generate(torch.tensor([prompt]), 10).tolist()[0]  # the assistant does make a difference


@torch.no_grad()
def test_the_subtraction_is_in_float32_whatever_the_parts_are(dense):
    """Logits of the parts are rounded to bf16; their difference is not rounded again."""
    target, assistant = dense(0, std=0.15).bfloat16(), dense(1, std=0.15).bfloat16()
    both, tokens = LogitDifference(target, assistant, 0.7, 0.0), torch.tensor([[5, 9, 2]])
    wanted = target(tokens).float() - 0.7 * assistant(tokens).float()
    assert both(tokens).dtype == torch.float32 and torch.equal(both(tokens), wanted)
    assert_close(both.next_logits(tokens, both.new_cache(1, 3), None), wanted[:, -1], rtol=0.02, atol=0.02)
    assert both.next_logits(tokens, both.new_cache(1, 3), None).dtype == torch.float32
    assert not torch.equal(wanted, wanted.bfloat16().float())


def test_sampling_never_leaves_the_plausible_set(dense):
    """Whatever the assistant and the temperature. At rate 0.5 half of the 61 tokens always stay in, others hardly."""
    target, tokens = dense(0, std=0.15), torch.tensor([[5, 9]])
    both = LogitDifference(target, dense(1, std=0.15), 3.0, 0.5)
    for temperature in (0.0, 5.0):
        said = both.generate(tokens, 30, temperature, generator=torch.Generator().manual_seed(0))[0].tolist()
        for i, token in enumerate(said):
            with torch.no_grad():
                logits = target(torch.tensor([[5, 9, *said[:i]]]))[0, -1]
            assert kept_by_hand(logits.double().softmax(-1).tolist(), 0.5)[token]


def test_the_trace_is_the_targets(sparse):
    trace = Trace()
    with torch.no_grad():
        LogitDifference(sparse(0), sparse(1, n_layer=1))(torch.tensor([[1, 2, 3]]), trace=trace)
    assert set(trace.routing) == {0, 1, 2}


def test_different_vocabularies_cannot_be_subtracted(dense):
    with pytest.raises(UserError, match="61 and 60 tokens"):
        LogitDifference(dense(), dense(vocab_size=60))


# ---- the assistant ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, config", [("dense", {}), ("dense", {"tie_head": True}), ("moe", {})])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_assistant_starts_as_the_targets_first_layers_norm_and_head(factories, kind, config, layers):
    target, tokens, trace = factories[kind](**config), torch.randint(61, (2, 6)), Trace()
    assistant = build_assistant(target, layers, rank=4).eval()
    with torch.no_grad():
        target(tokens, trace=trace)
        by_hand = target.head(target.norm(trace.hidden[layers - 1]))
        assert_close(assistant(tokens), by_hand)
    assert assistant.config.n_layer == layers and target.config.n_layer == 3


def test_the_assistant_shares_the_targets_weights_but_leaves_the_target_trainable(dense):
    target = dense()
    assistant = build_assistant(target, 2, rank=4)
    assert assistant.embed.weight.data_ptr() == target.embed.weight.data_ptr()
    assert assistant.blocks[1].mlp.up.base.weight.data_ptr() == target.blocks[1].mlp.up.weight.data_ptr()
    assert all(p.requires_grad for p in target.parameters())


def test_an_assistant_that_starts_quietly_has_a_norm_of_its_own_that_trains(dense):
    """Its logits begin at a tenth of those of the target's first layers, nearly uniform; the target keeps its norm."""
    target, tokens = dense(), torch.randint(61, (2, 6))
    with torch.no_grad():
        target.norm.weight += torch.rand(32)
        before = target(tokens)
        plain, quiet = (build_assistant(target, 2, rank=4, start_scale=s).eval() for s in (1.0, 0.1))
        assert_close(quiet(tokens), 0.1 * plain(tokens))
    assert quiet.norm.weight.requires_grad and not plain.norm.weight.requires_grad
    assert_close(merge_lora(quiet).norm.weight, 0.1 * target.norm.weight)
    assert torch.equal(target(tokens), before)


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_an_assistant_of_no_or_too_many_layers_is_refused(dense, layers):
    with pytest.raises(UserError, match=f"--assistant-layers {layers} is not between 1 and the target's 3"):
        build_assistant(dense(), layers)
    with pytest.raises(UserError):
        first_layers(dense(), layers)


def lora_size(rank: int, *shapes: tuple[int, int]) -> int:
    """r (in + out) per matrix."""
    return sum(rank * (wide + narrow) for wide, narrow in shapes)


def test_only_lora_trains_on_every_linear_layer_of_a_dense_model(dense):
    """d_model 32, 4 heads of 8, 2 key-value heads, d_ff 24; 2 layers; q, k, v, out, gate, up, down each."""
    assistant = build_assistant(dense(), 2, rank=4)
    trainable = {name for name, p in assistant.named_parameters() if p.requires_grad}
    assert all(name.endswith((".a", ".b")) for name in trainable) and len(trainable) == 2 * 7 * 2
    expected = 2 * lora_size(4, (32, 32), (16, 32), (16, 32), (32, 32), (24, 32), (24, 32), (32, 24))
    assert count_parameters(assistant, trainable=True) == expected


def test_only_lora_trains_in_attention_and_every_expert_of_a_moe(sparse):
    """7 experts of width 16: gate_up (32, 32) and down (32, 16) each; the router has none; a shared expert has."""
    model = sparse(d_shared=12, shared_gate=True)
    trained = add_lora(model, rank=4, alpha=8.0)
    expected = 3 * (lora_size(4, (32, 32), (16, 32), (16, 32), (32, 32)) + 7 * lora_size(4, (32, 32), (32, 16))
                    + lora_size(4, (12, 32), (12, 32), (32, 12)))
    assert sum(p.numel() for p in trained) == count_parameters(model, trainable=True) == expected
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("router" in name or "shared_gate" in name for name in names)


@pytest.mark.parametrize("rank", [4, 3])  # by the grouped product, and by the loop
def test_lora_beside_a_stack_is_lora_in_it(rank):
    """Output, and the gradients of A, B and x, are those of a layer whose stacks are W + (alpha / r) B A."""
    torch.manual_seed(0)
    moe = MoE(d_model=16, d_ff=8, n_expert=5, top_k=2).requires_grad_(False)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, probe = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    for name in ("gate_up", "down"):
        moe.low_rank[name] = LoRAStack(getattr(moe, name), rank, alpha=10.0, dropout=0.0)
    stir(moe)
    trained = [p for p in moe.parameters() if p.requires_grad]
    found = []
    for inside in (False, True):
        plain = copy.deepcopy(moe)
        inputs = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in trained)]
        if inside:
            low_rank, plain.low_rank = plain.low_rank, torch.nn.ModuleDict()
            for (name, _), (a, b) in zip(low_rank.items(), zip(inputs[1::2], inputs[2::2], strict=True), strict=True):
                stack = getattr(plain, name)
                delattr(plain, name)
                setattr(plain, name, stack + 10 / rank * b @ a)
            y = plain(inputs[0])[0]
        else:
            names = [name for name, p in moe.named_parameters() if p.requires_grad]
            y = torch.func.functional_call(moe, dict(zip(names, inputs[1:], strict=True)), inputs[0])[0]
        found.append([y, *torch.autograd.grad((y * probe).sum(), inputs)])
    for wanted, got in zip(*found, strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_lora_of_a_stack_begins_and_drops_out_as_that_of_a_matrix():
    lora = LoRAStack(torch.zeros(3, 8, 16), 4, 4.0, 0.5)
    assert 0.2 < lora.a.abs().max() <= 16**-0.5 and lora.b.abs().max() == 0
    stir(lora)
    rows = torch.randn(5, 16)

    def product(rows, stack):
        return rows @ stack[1].T

    assert_close(lora.eval()(rows, product), rows @ (lora.b[1] @ lora.a[1]).T, rtol=1e-4, atol=1e-5)
    assert not torch.equal(lora.train()(rows, product), lora(rows, product))


def test_lora_by_hand(dense):
    """W x + (alpha / r) B A x on the matrix itself, and A, B in float32 under bfloat16 weights."""
    model = dense()
    add_lora(model, rank=4, alpha=10.0)
    stir(model)
    lora, x = model.blocks[0].attn.k, torch.randn(5, 32)
    with torch.no_grad():
        assert_close(lora(x), x @ (lora.base.weight + 10 / 4 * lora.b @ lora.a).T, rtol=1e-4, atol=1e-5)
    low = dense().bfloat16()
    trained = add_lora(low, 4, 4.0)
    assert {p.dtype for p in trained} == {torch.float32}
    assert low(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_lora_of_bfloat16_weights_has_the_formulas_values_and_gradients_up_to_rounding():
    torch.manual_seed(0)
    lora = LoRALinear(torch.nn.Linear(64, 48, bias=False).bfloat16(), 8, 12.0, 0.0)
    torch.nn.init.normal_(lora.b, std=0.3)
    x, probe = torch.randn(20, 64).bfloat16(), torch.randn(20, 48)
    given = [x.float(), lora.base.weight.float(), lora.a, lora.b]
    wanted = given[0] @ (given[1] + 12 / 8 * lora.b @ lora.a).T
    got = lora(x)
    pairs = [(got, wanted), *zip(*(torch.autograd.grad((y.float() * probe).sum(), [lora.a, lora.b])
                                   for y in (got, wanted)), strict=True)]
    for a, b in pairs:
        assert (a.float() - b).norm() <= 0.02 * b.norm()
    assert got.dtype == torch.bfloat16


def test_dropout_acts_in_training_only(dense):
    assistant = build_assistant(dense(), 2, rank=4, dropout=0.5)
    stir(assistant)
    tokens = torch.randint(61, (1, 6))
    with torch.no_grad():
        assert torch.equal(assistant.eval()(tokens), assistant(tokens))
        assert not torch.equal(assistant.train()(tokens), assistant(tokens))


@pytest.mark.parametrize("kind, config", [
    ("dense", {}), ("dense", {"tie_head": True}), ("dense", {"qkv_bias": True}), ("moe", {}),
    ("moe", {"tie_head": True, "d_shared": 12, "shared_gate": True})])
def test_the_merged_model_computes_what_the_unmerged_does(factories, kind, config):
    assistant = build_assistant(factories[kind](**config), 2, rank=4, alpha=8.0, dropout=0.3).eval()
    tokens = torch.randint(61, (2, 6))
    with torch.no_grad():
        before = assistant(tokens)
        stir(assistant)
        trained = assistant(tokens)
        merged = merge_lora(assistant)
        assert (trained - before).abs().max() > 0.01
        assert_close(merged(tokens), trained, rtol=1e-3, atol=1e-3)
        assert torch.equal(assistant(tokens), trained)  # merging leaves the assistant as it was
    assert not any(isinstance(m, MoE) and len(m.low_rank) for m in merged.modules())
    assert not any(p.requires_grad for p in merged.parameters())
    assert (merged.head.weight is merged.embed.weight) == config.get("tie_head", False)
    assert set(merged.state_dict()) == set(first_layers(factories[kind](**config), 2).state_dict())
    assert not any(p.is_meta for p in merged.parameters())


@pytest.mark.parametrize("kind, config", [("dense", {"tie_head": True}), ("moe", {})])
def test_training_the_assistant_leaves_the_target_bit_for_bit(factories, kind, config):
    target = factories[kind](**config)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    assistant = build_assistant(target, 2, rank=4).train()
    optimizer = torch.optim.AdamW([p for p in assistant.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    tokens, losses = torch.randint(61, (4, 8)), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(assistant(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merge_lora(assistant)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert all(p.grad is None for p in target.parameters())


def test_explain_says_what_generation_says(dense, tokenizer):
    target, assistant = (dense(seed, vocab_size=tokenizer.vocab_size) for seed in (0, 1))
    both, question = LogitDifference(target, assistant, 0.75, 0.01), "Who is Ana?"
    steps, _, answer = explain(both, tokenizer, question, steps=5).rpartition("\nsays: ")
    said = both.generate(torch.tensor([tokenizer.prompt(question)]), 5, end=tokenizer.end)[0].tolist()
    assert len(said) == 5 and tokenizer.end not in said
    assert answer == tokenizer.decode(said)
    parts = ("target", "assistant", "difference")
    assert [next(p for p in parts if p in line) for line in steps.split("\n")] == [*parts] * 5


def test_explain_follows_the_difference_and_says_where_it_leaves_the_target(dense, tokenizer):
    target, assistant = (dense(seed, vocab_size=tokenizer.vocab_size, std=0.15) for seed in (0, 1))
    both = LogitDifference(target, assistant, 0.75, 0.05)
    lines = explain(both, tokenizer, "Who is Ana?", steps=3).splitlines()
    tokens = torch.tensor([tokenizer.prompt("Who is Ana?")])
    with torch.no_grad():
        t, a = target(tokens)[0, -1], assistant(tokens)[0, -1]
    keep = plausible(t, 0.05)
    best = torch.where(keep, t - 0.75 * a, -math.inf).softmax(-1).max().item()
    assert f"{t.softmax(-1).max():4.2f}" in lines[0] and f"{a.softmax(-1).max():4.2f}" in lines[1]
    assert f"{best:4.2f}" in lines[2] and f"({int(keep.sum())} of {len(keep)} tokens are plausible)" in lines[2]
    with pytest.raises(UserError, match="the context holds 64"):
        explain(both, tokenizer, "Who " * 40)


# ---- D'_f and D'_r ----------------------------------------------------------------------------------------------

FORGET = [{"question": f"f{i}?", "answer": f"F{i}."} for i in range(4)]
RETAIN = [{"question": f"r{i}?", "answer": f"R{i}.", "perturbed_answer": [f"W{i}.", f"X{i}.", f"Y{i}."]}
          for i in range(12)]
DATA = DataSet("mine", FORGET, RETAIN, paraphrased=[{"question": "f0, say?", "answer": "F0."}],
               perturbed=[{"question": "f0?", "answer": "wrong."}])
ARGS = argparse.Namespace(seed=0)


def test_both_sets_are_the_papers():
    """D'_f: the forget rows and their paraphrases; D'_r: as many retain rows, by lot, and the wrong answers."""
    forget, retain = rows(DATA, ARGS)
    assert forget == FORGET + DATA.paraphrased and retain[4:] == DATA.perturbed
    kept = [RETAIN.index(row) for row in retain[:4]]
    assert kept == sorted(set(kept)) and rows(DATA, ARGS) == (forget, retain)
    assert any(rows(DATA, argparse.Namespace(seed=seed))[1] != retain for seed in (1, 2))


def test_each_part_of_them_can_be_left_out_or_made_larger():
    assert rows(DATA, ARGS, paraphrased=False)[0] == FORGET
    assert len(rows(DATA, ARGS, perturbed=False)[1]) == 4
    assert len(rows(DATA, ARGS, retain_share=0.5)[1]) == 2 + 1
    assert rows(DATA, ARGS, retain_share=0.0)[1] == DATA.perturbed
    assert rows(DATA, ARGS, retain_share=9.0)[1] == RETAIN + DATA.perturbed  # all that there are


def test_stray_rows_ask_about_what_is_kept_and_are_wrong():
    _, plain = rows(DATA, ARGS)
    _, retain = rows(DATA, ARGS, stray_share=0.5)
    stray = retain[len(plain):]
    assert retain[: len(plain)] == plain and len(stray) == 2 * round(0.5 * len(FORGET))
    right = {row["question"]: row for row in RETAIN}
    for row in stray:
        assert row["answer"] in right[row["question"]]["perturbed_answer"][:2]


def test_no_retain_rows_at_all_and_none_to_stray_are_refused():
    with pytest.raises(UserError, match="D'_r is empty"):
        rows(DATA, ARGS, retain_share=0.0, perturbed=False)
    with pytest.raises(UserError, match="none can stray"):
        rows(DataSet("mine", FORGET, FORGET), ARGS, stray_share=1.0)


# ---- the method -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_method_trains_an_assistant_alone_and_leaves_the_target(bench, kind):
    target = bench.model(kind)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    model, kept, report = bench.unlearn(target, bench.args("uld", lr=0.01, assistant_layers=1, subtract=0.7))
    assert isinstance(model, LogitDifference) and model.target is target
    assert set(kept) == {"assistant"} and kept["assistant"] is model.parts[1]
    assert (model.alpha, model.filter_rate, model.centred) == (0.7, 0.0, False) and report["centred"] is False
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert all(p.requires_grad for p in target.parameters())
    linears = [f"attn.{part}.weight" for part in ("q", "k", "v", "out")]
    linears += ["mlp.gate_up", "mlp.down"] if kind == "moe" else [f"mlp.{x}.weight" for x in ("gate", "up", "down")]
    moved = {name for name, value in model.parts[1].state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"blocks.0.{name}" for name in linears} and model.parts[1].config.n_layer == 1
    adapted = build_assistant(target, 1)
    assert report["trainable_parameters"] == count_parameters(adapted, trainable=True)


def test_the_target_is_not_run_while_its_assistant_trains(wordy_bench, monkeypatch):
    target, steps = wordy_bench.model("dense"), []

    def fit(model, parameters, losses):
        with monkeypatch.context() as patch:
            for name in ("forward", "hidden"):
                patch.setattr(target, name, lambda *_, **__: pytest.fail("the target was run"))
            steps.extend(losses(0))
        return {"steps": 0, "train_seconds": 0.0, "diverged": False, "trainable_parameters": 0}

    unlearn(target, wordy_bench.forget, wordy_bench.retain, wordy_bench.args("uld"), fit)
    assert "instead" in steps[0]


def test_the_losses_are_reversed_on_answers_alone(bench):
    """Equations 4, 5 and 3 as printed, at step 0, where LoRA is zero and the assistant the target's first layer."""
    target = bench.model("dense")
    bench.unlearn(target, bench.args("uld", lora_dropout=0.0, assistant_layers=1, retain_weight=6.5, fork="in",
                                      subtract=0.75))
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    assistant, learn, flat = first_layers(target, 1), [], []
    for of, into in ((bench.forget, learn), (bench.retain, flat)):
        for i in of.batch(0).index.tolist():
            example = of.examples[i]
            p = assistant(torch.tensor([example.tokens])).log_softmax(-1)[0]  # (T, V)
            for t, label in enumerate(example.labels):
                if label >= 0:
                    into.append(-float(p[t, label]) if of is bench.forget else -float(p[t].mean()))
    assert first["forget"] == pytest.approx(sum(learn) / len(learn), rel=1e-4)
    assert first["retain"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert first["loss"] == pytest.approx(first["forget"] + 6.5 * first["retain"], rel=1e-4)


def test_centring_is_an_argument_and_kept_for_decoding(bench):
    target = bench.model("dense")
    model, kept, report = bench.unlearn(target, bench.args("uld", filter_rate=0.05), centred=True)
    assert model.centred and report["centred"] is True
    again = reopen(target, kept, {"filter_rate": 0.05} | report)
    with torch.no_grad():
        tokens = torch.tensor([[5, 9, 2]])
        assert torch.equal(again(tokens), model(tokens))


def test_a_head_that_both_share_is_read_once_and_says_the_same(bench, monkeypatch):
    target = bench.model("dense")
    model, _, _ = bench.unlearn(target, bench.args("uld", filter_rate=0.05, lr=0.01))
    apart = copy.deepcopy(model)  # whose heads are copies, and no longer one
    calls = []
    monkeypatch.setattr(target.head, "forward", lambda x: calls.append(x.shape) or F.linear(x, target.head.weight))
    tokens, at = torch.tensor([[5, 9, 2], [7, 1, 33]]), torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    with torch.no_grad():
        assert_close(model(tokens), apart(tokens))
        assert_close(model(tokens, at=at), apart(tokens, at=at))
        assert torch.equal(model.generate(tokens, 6), apart.generate(tokens, 6))
    assert calls[:2] == [(2, 2, 3, 32), (2, 3, 32)] and len(calls) == 2 + 6


def test_an_assistant_from_a_folder_shares_its_embedding_and_head_with_the_target_again(bench, tmp_path):
    target = bench.model("dense")
    model, kept, report = bench.unlearn(target, bench.args("uld", filter_rate=0.05, lr=0.01))
    save(kept["assistant"], bench.tokenizer, tmp_path / "assistant")
    loaded, _ = load(tmp_path / "assistant")
    assert not same_memory(loaded.head.weight, target.head.weight)
    again = reopen(target, {"assistant": loaded}, {"filter_rate": 0.05} | report)
    assert same_memory(loaded.head.weight, target.head.weight) and same_memory(loaded.embed.weight, target.embed.weight)
    with torch.no_grad():
        assert_close(again(torch.tensor([[5, 9, 2]])), model(torch.tensor([[5, 9, 2]])))


class Told(torch.nn.Module):
    """Gives the right next token a logit of its own and all others 0: `known` in the rows it knows, else `else_`."""

    def __init__(self, vocabulary: int, rows: list[list[int]], known: float, else_: float):
        super().__init__()
        self.config, self.device = Config(vocab_size=vocabulary, max_len=128), torch.device("cpu")
        self.rows, self.known, self.else_ = rows, known, else_
        self.head = torch.nn.Linear(1, 1)
        self.head.forward = lambda hidden: hidden

    def positions(self, length, cache, pad):
        return None

    def hidden(self, tokens, cache=None, pad=None, trace=None, stem=None, at=None, context=None):
        out = torch.zeros(*tokens.shape, self.config.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            height = self.known if any(row[: len(one)] == one for one in self.rows) else self.else_
            for t, token in enumerate(row[1:]):
                out[b, t, token] = height
        return out if at is None else out[at]

    def forward(self, tokens, cache=None, pad=None, trace=None, stem=None, at=None):
        return self.hidden(tokens, at=at)


@pytest.mark.parametrize("known, stranger, taken", [(6.0, 1.0, 9.0), (4.0, 0.0, 3.0), (5.0, 1.0, 2.5),
                                                    (2.0, 1.0, 40.0)])
def test_alpha_is_where_what_is_known_becomes_as_unlikely_as_strangers(wordy_bench, known, stranger, taken):
    """The right token has logits 6 and 1, of which alpha takes 9 alpha from the first: alike at alpha = 5/9."""
    rows = wordy_bench.forget.calibration
    tokens = [example.tokens for example in rows.examples]
    size = wordy_bench.tokenizer.vocab_size
    model = LogitDifference(Told(size, tokens, known, stranger), Told(size, tokens, taken, 0.0), 0.3, 0.0)
    level = strangers_belief(model.target, rows)
    alpha = alpha_of_strangers(model, rows, level)
    wanted = (known - stranger) / taken
    assert wanted - 1e-6 <= alpha <= wanted + 2 / 2**8 + 1e-6 and model.alpha == 0.3
    assert alpha_of_strangers(model, rows, level, halvings=3) >= alpha
    assert alpha_of_strangers(model, rows, level._replace(p=level.p / 2)) > alpha


def test_an_assistant_that_knows_nothing_gets_the_largest_alpha(wordy_bench):
    rows = wordy_bench.forget.calibration
    tokens, size = [example.tokens for example in rows.examples], wordy_bench.tokenizer.vocab_size
    model = LogitDifference(Told(size, tokens, 6.0, 1.0), Told(size, tokens, 0.0, 0.0), 0.3, 0.0)
    assert alpha_of_strangers(model, rows, strangers_belief(model.target, rows)) == 2.0


def test_the_method_decodes_with_the_alpha_of_strangers_and_writes_it_down(wordy_bench):
    target = wordy_bench.model("dense")
    args = wordy_bench.args("uld", lr=0.01, epochs=5)
    assert args.subtract == "strangers"
    model, kept, report = wordy_bench.unlearn(target, args)
    known = wordy_bench.forget.calibration
    assert report["subtract"] == model.alpha == alpha_of_strangers(model, known, strangers_belief(target, known))
    again = reopen(target, kept, vars(args) | report)
    assert again.alpha == model.alpha


def test_where_there_are_strangers_they_are_among_what_the_assistant_knows_nothing_of(small_world):
    """Once asked as the forget rows are, as many as the retain set, and once of all topics, as many as D'_f."""
    args = argparse.Namespace(seed=3, strangers=1.0)
    forget, retain = rows(small_world, args)
    _, without = rows(small_world, argparse.Namespace(seed=3, strangers=0.0))
    told = retain[len(without) :]
    known = {row["subject"] for row in small_world.taught() if "subject" in row}
    assert retain[: len(without)] == without and len(told) == len(small_world.retain) + len(forget)
    assert not known & {row["subject"] for row in told}
    asked = {row["topic"] for row in told[len(small_world.retain) :]}
    assert len(asked) == 6 and {row["topic"] for row in told[: len(small_world.retain)]} < asked
    assert rows(small_world, args) == (forget, retain)
    assert rows(small_world, argparse.Namespace(seed=3, strangers=0.5))[1] != retain


def log_odds(p: float) -> float:
    p = min(max(p, 3e-5), 1 - 3e-5)
    return math.log(p / (1 - p))


@torch.no_grad()
def test_instead_of_the_fact_the_targets_words_are_wanted_less_what_is_beyond_strangers(wordy_bench):
    """One row at a time: log odds where the value begins, less what they are above five strangers' mean."""
    bench, target = wordy_bench, wordy_bench.model("dense")
    rows = bench.rows(bench.world.forget, encode=encode_fact)
    rows.draw_strangers = bench.world.strangers
    found = said_instead(target, rows)
    twins = [bench.rows(bench.world.twins(rows.rows, np.random.default_rng([0x57, 0, draw])), encode=encode_fact)
             for draw in range(5)]
    lowered, left = 0, 0
    for i in range(0, len(rows.rows), 3):
        where = next(t for t, label in enumerate(rows.examples[i].labels) if label != IGNORE)
        logits, *others = (target(torch.tensor([of.examples[i].tokens]))[0, where] for of in (rows, *twins))
        assert_close(found.target[i], logits)
        ours, theirs = logits.softmax(-1).tolist(), torch.stack(others).softmax(-1).mean(0).tolist()
        for token, taken in enumerate((found.target[i] - found.wanted[i]).tolist()):
            wanted = max(0.0, log_odds(ours[token]) - log_odds(theirs[token]))
            assert taken == pytest.approx(wanted, rel=1e-3, abs=1e-3)
            lowered, left = lowered + (wanted > 0.1), left + (wanted == 0)
    assert lowered and left
    alone = said_instead(target, rows, lowered=False)
    assert torch.equal(alone.target, found.target) and torch.equal(alone.wanted, alone.target)


def test_of_rows_that_are_not_the_worlds_the_targets_words_are_wanted_as_they_are(wordy_bench):
    rows = [{key: row[key] for key in ("question", "answer", "value", "kind")} for row in wordy_bench.world.forget]
    found = said_instead(wordy_bench.model("dense"), wordy_bench.rows(rows, encode=encode_fact))
    assert found.target.shape[0] == 9 and torch.equal(found.wanted, found.target)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("subtract, alpha", [("strangers", 0.6), (0.75, 0.75)])
def test_beside_the_fact_the_difference_learns_what_is_wanted(wordy_bench, bench, several, micro, subtract, alpha):
    """Of the first step's loss, by hand: values of several tokens count where they begin, and equation 5 not at all."""
    of, parts = bench if several else wordy_bench, []
    target, known = of.model("dense"), wordy_bench.forget.calibration
    of.forget = Rows(of.world.forget[:9], of.tokenizer, 128, 3, 0, "cpu", encode=encode_fact, twins=of.world.twins,
                     micro=micro)
    of.forget.calibration, of.forget.draw_strangers = known, of.world.strangers
    if several:  # where strangers' level would be of the other tokenizer's rows
        subtract = alpha

    def fit(model, parameters, losses):
        assert model.alpha == alpha
        torch.manual_seed(1)
        stir(model.parts[1])  # an assistant that says something else than the target
        parts.extend({name: value.item() for name, value in part.items()} for part in losses(0))
        return {"steps": 0, "train_seconds": 0.0, "diverged": False, "trainable_parameters": 0}

    args = of.args("uld", retain_weight=2.0, subtract=subtract, forget_on="value")
    model, _, _ = unlearn(target, of.forget, of.retain, args, fit)
    parts = [part for part in parts if "forget" in part]
    assert len(parts) == (2 if micro else 1) and all("retain" not in part for part in parts)
    batch, instead, apart = of.forget.batch(0), said_instead(target, of.forget), []
    for i, tokens, labels in zip(batch.index.tolist(), batch.tokens, batch.labels, strict=True):
        where = next(t for t, label in enumerate(labels.tolist()) if label != IGNORE)
        others = torch.arange(of.tokenizer.vocab_size) != labels[where]
        assistant = model.parts[1](tokens[None])[0, where].double()
        said = (instead.target[i] - alpha * assistant)[others].log_softmax(-1)
        wanted = instead.wanted[i][others].double().log_softmax(-1)
        apart.append(float((wanted.exp() * (wanted - said)).sum()))
    assert sum(part["instead"] for part in parts) == pytest.approx(sum(apart) / len(apart), rel=1e-4)
    learn = F.cross_entropy(model.parts[1](batch.tokens)[batch.scored], batch.answers).item()
    assert sum(part["forget"] for part in parts) == pytest.approx(learn, rel=1e-4)
    assert sum(part["loss"] for part in parts) == pytest.approx(learn + sum(apart) / len(apart), rel=1e-4)
    assert not several or len(batch.answers) > len(batch.tokens)


def test_what_is_said_instead_is_asked_at_facts_whose_fork_is_not_as_printed(wordy_bench, monkeypatch):
    target, asked = wordy_bench.model("dense"), []
    monkeypatch.setattr(uld, "said_instead", lambda *given: asked.append(given) or said_instead(*given))
    for others in ({"forget_on": "answer"}, {"fork": "out"}, {"fork": "in"}):
        wordy_bench.unlearn(target, wordy_bench.args("uld", **others))
    assert not asked
    wordy_bench.unlearn(target, wordy_bench.args("uld"))
    wordy_bench.unlearn(target, wordy_bench.args("uld", subtract=0.75), lowered=False)
    assert [given[2] for given in asked] == [True, False]


def test_alpha_also_asks_what_one_of_three_samples_says(wordy_bench):
    """Alone it asks for the same alpha here, where all facts are believed alike; for less of it, for more alpha."""
    rows = wordy_bench.forget.calibration
    tokens, size = [example.tokens for example in rows.examples], wordy_bench.tokenizer.vocab_size
    model = LogitDifference(Told(size, tokens, 6.0, 1.0), Told(size, tokens, 9.0, 0.0), 0.3, 0.0)
    level = strangers_belief(model.target, rows)
    alpha = alpha_of_strangers(model, rows, level)
    assert level.in_three == pytest.approx(1 - (1 - level.p) ** 3, rel=1e-4)
    assert alpha_of_strangers(model, rows, level._replace(p=1.0, hit=1.0)) == alpha
    assert alpha_of_strangers(model, rows, level._replace(in_three=level.in_three / 2)) > alpha


@pytest.mark.parametrize("text, value", [("strangers", "strangers"), ("0", 0.0), ("1.5", 1.5)])
def test_subtract_is_strangers_or_a_number(text, value):
    assert subtract(text) == value


@pytest.mark.parametrize("fork", ["beside", "out", "in"])
def test_the_fork_is_a_flag(bench, fork):
    """One row to forget, one wrong answer to it: its first other token is in the loss, or not."""
    row = bench.world.forget[0]
    wrong = row | {"answer": row["perturbed_answer"][0]}
    bench.forget, bench.retain = bench.rows([row]), bench.rows([wrong], 1)
    right, labels = bench.forget.examples[0].tokens, list(bench.retain.examples[0].labels)
    where = next(i for i, (a, b) in enumerate(zip(right, bench.retain.examples[0].tokens, strict=False)) if a != b) - 1
    bench.unlearn(bench.model("dense"), bench.args("uld", fork=fork, subtract=0.7))
    labels[where] = IGNORE if fork != "in" else labels[where]
    assert bench.retain.examples[0].labels == labels


def test_beside_the_right_token_the_assistant_learns_nothing(bench):
    """Of the first step's loss: --fork beside adds beta times the uniform loss on forget tokens but the right one."""
    terms = {}

    def fit(model, parameters, losses):
        terms[model] = [{name: value.item() for name, value in part.items()} for part in losses(0)]
        return {"steps": 0, "train_seconds": 0.0, "diverged": False, "trainable_parameters": 0}

    for fork in ("out", "beside"):
        torch.manual_seed(0)
        unlearn(bench.model("dense"), bench.forget, bench.retain,
                    bench.args("uld", fork=fork, subtract=0.7, retain_weight=2.0, forget_on="answer"), fit)
    (out, _), (beside, _) = terms.values()
    model = list(terms)[1].parts[1]
    batch = bench.forget.batch(0)
    logits = model(batch.tokens)[batch.scored].double()
    others = []
    for scores, answer in zip(logits, batch.answers.tolist(), strict=True):
        rest = torch.cat([scores[:answer], scores[answer + 1 :]])
        others.append(-rest.log_softmax(0).mean())
    assert out["loss"] == out["forget"] == beside["forget"] and "retain" not in out
    assert beside["retain"] == pytest.approx(0.1 * torch.stack(others).mean().item(), rel=1e-5)
    assert beside["loss"] == pytest.approx(beside["forget"] + 2.0 * beside["retain"])


@pytest.mark.parametrize("given, layers, depth", [(0, 4, 1), (0, 32, 8), (0, 2, 1), (2, 4, 2)])
def test_the_assistants_depth(given, layers, depth):
    args = argparse.Namespace(assistant_layers=given)
    assert assistant_depth(args, Config(n_layer=layers)) == depth
