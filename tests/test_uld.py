"""uld.py: the difference of logits, its filter, the assistant and its LoRA."""

import math

import pytest
import torch
from torch.nn.utils import parametrize
from torch.testing import assert_close

from data.batches import Example, collate
from errors import UserError
from model import Trace, count_parameters
from moe import MoE
from uld import (
    LogitDifference,
    LogitOffset,
    add_lora,
    assistant_level,
    build_assistant,
    explain,
    first_layers,
    merge_lora,
    plausible,
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


def kept_by_hand(p: list[float], rate: float, keep_share: bool) -> list[bool]:
    """The definition in words: p >= rate * max p, or among the max(1, rate * V) most likely tokens."""
    share = max(1, int(rate * len(p)))
    rank = {v: i for i, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v]))}
    return [p[v] >= rate * max(p) or (keep_share and rank[v] < share) for v in range(len(p))]


# ---- the filter -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, rate, keep_share, expected", [
    ([0.5, 0.3, 0.15, 0.05], 0.4, True, "1100"),  # threshold 0.2
    ([0.5, 0.3, 0.15, 0.05], 0.25, True, "1110"),  # threshold 0.125
    ([0.05, 0.3, 0.5, 0.15], 0.25, True, "0111"),  # not by position
    ([0.9, 0.06, 0.03, 0.01], 0.5, False, "1000"),  # threshold 0.45
    ([0.9, 0.06, 0.03, 0.01], 0.5, True, "1100"),  # half of four tokens always stay
    ([0.9, 0.06, 0.03, 0.01], 0.1, True, "1000"),  # 0.4 tokens: at least one
    ([0.9, 0.06, 0.03, 0.01], 1.0, False, "1000"),
    ([0.9, 0.06, 0.03, 0.01], 1.0, True, "1111"),
    ([0.9, 0.06, 0.03, 0.01], 0.0, False, "1111"),
])
def test_plausible_tokens_by_hand(p, rate, keep_share, expected):
    wanted = [c == "1" for c in expected]
    assert wanted == kept_by_hand(p, rate, keep_share)
    logits = torch.tensor(p).log() + 3.0
    assert plausible(logits, rate, keep_share).tolist() == wanted
    both = torch.stack([logits, logits.flip(0)])[:, None]  # (2, 1, V): each position has its own set
    assert plausible(both, rate, keep_share).tolist() == [[wanted], [wanted[::-1]]]


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("keep_share", [True, False])
def test_plausible_tokens_of_random_distributions(rate, keep_share):
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    got = plausible(logits, rate, keep_share).tolist()
    assert got == [kept_by_hand(row, rate, keep_share) for row in logits.double().softmax(-1).tolist()]


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
    assert both.is_moe == target.is_moe and both.config is target.config


@pytest.mark.parametrize("rate, keep_share", [(0.0, True), (0.05, True), (0.05, False), (0.3, True), (1.0, False)])
def test_likelihood_by_hand(dense, rate, keep_share):
    """Inside the plausible set target - alpha * assistant, outside the target's logit as it stands."""
    target, assistant = dense(0, std=0.15), dense(1, std=0.15, n_layer=2)
    tokens = torch.tensor([[5, 9, 2], [7, 1, 33]])
    with torch.no_grad():
        t, a = target(tokens), assistant(tokens)
        got = LogitDifference(target, assistant, 0.8, rate, keep_share)(tokens)
    for b in range(2):
        for i in range(3):
            keep = kept_by_hand(t[b, i].double().softmax(-1).tolist(), rate, keep_share)
            for v in range(61):
                expected = t[b, i, v] - 0.8 * a[b, i, v] if keep[v] else t[b, i, v]
                assert got[b, i, v].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_a_centred_assistant_that_is_uniform_changes_nothing(dense, rate):
    """All its logits 10: off centre, every plausible token loses 8 and no other does."""
    target, assistant, tokens = dense(0, std=0.15), dense(1), torch.tensor([[5, 9, 2], [7, 1, 33]])
    assistant.forward = lambda tokens, **_: torch.full((*tokens.shape, 61), 10.0)
    with torch.no_grad():
        before = target(tokens).log_softmax(-1)
        centred = LogitDifference(target, assistant, 0.8, rate, False, centred=True)(tokens).log_softmax(-1)
        plain = LogitDifference(target, assistant, 0.8, rate, False)(tokens).log_softmax(-1)
    assert_close(centred, before)
    keep = plausible(before, rate, False)
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


@pytest.mark.parametrize("rate, keep_share", [(0.0, True), (0.05, True), (0.05, False), (0.3, True), (1.0, False)])
def test_generation_rules_out_what_is_implausible(dense, rate, keep_share):
    target, assistant = dense(0, std=0.15), dense(1, std=0.15, n_layer=2)
    both, tokens = LogitDifference(target, assistant, 0.8, rate, keep_share), torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        t, a = target(tokens)[0, -1], assistant(tokens)[0, -1]
        got = both.next_logits(tokens, both.new_cache(1, 3), None)[0]
    keep = kept_by_hand(t.double().softmax(-1).tolist(), rate, keep_share)
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
            keep = torch.tensor(kept_by_hand(t.double().softmax(-1).tolist(), rate, True))
            ids.append(int(torch.where(keep, t - 1.5 * a, -math.inf).argmax()))
        return ids[len(prompt):]

    with torch.no_grad():
        slow = [slowly(prompt) for prompt in PROMPTS]
    tokens, pad = padded(PROMPTS)
    assert both.generate(tokens, 10, pad=pad).tolist() == slow
    for prompt, said in zip(PROMPTS, slow, strict=True):
        assert both.generate(torch.tensor([prompt]), 10).tolist() == [said]
        assert said != target.generate(torch.tensor([prompt]), 10).tolist()[0]  # the assistant does make a difference


def test_sampling_never_leaves_the_plausible_set(dense):
    """rate 1 without the share leaves the target's first choice alone, whatever the assistant and the temperature."""
    target, prompt = dense(0), torch.tensor([[5, 9]])
    both = LogitDifference(target, dense(1), 3.0, 1.0, keep_share=False)
    for temperature in (0.0, 5.0):
        assert torch.equal(both.generate(prompt, 6, temperature), target.generate(prompt, 6))


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


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_an_assistant_of_no_or_too_many_layers_is_refused(dense, layers):
    with pytest.raises(UserError, match=f"--assistant-layers {layers} is not between 1 and the target's 3"):
        build_assistant(dense(), layers)
    with pytest.raises(UserError):
        first_layers(dense(), layers)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(dense, rank):
    with pytest.raises(UserError, match=f"--lora-rank {rank}"):
        build_assistant(dense(), 1, rank=rank)


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
    assert not any(isinstance(m, MoE) and parametrize.is_parametrized(m) for m in merged.modules())
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


def test_the_level_of_an_assistant_by_hand(dense):
    """Logits 1, 2, 3 and 5, 5, 8 at two answer positions, 9s at the question's: mean 4, deviations 1 and sqrt 3."""
    both = LogitDifference(dense(), dense(1))
    both.assistant.forward = lambda tokens: torch.tensor([[[9.0, 9, 9], [1, 2, 3], [5, 5, 8]]])
    batch = collate([Example([1, 2, 3], [-100, 4, 5])])
    assert assistant_level(both, [batch]) == pytest.approx((4.0, (1 + 3**0.5) / 2))


# ---- the offset -------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_an_offset_is_the_target_plus_what_changed(dense):
    target, plus, minus = dense(0), dense(1, n_layer=1), dense(2, n_layer=1)
    tokens = torch.tensor([[5, 9, 2, 44, 7]])
    both = LogitOffset(target, plus, minus, 0.3)
    assert_close(both(tokens), target(tokens) + 0.3 * (plus(tokens) - minus(tokens)))
    assert torch.equal(LogitOffset(target, plus, plus, 0.3)(tokens), target(tokens))
    out = both.generate(tokens, 6)
    for i in range(6):  # the caches of all three parts give what whole passes give
        assert both(torch.cat([tokens, out[:, :i]], 1))[:, -1].argmax() == out[0, i]


def test_an_offsets_gradient_reaches_whatever_is_not_frozen(dense):
    target, plus, minus = dense(0).requires_grad_(False), dense(1, n_layer=1), dense(2, n_layer=1)
    LogitOffset(target, plus, minus, 0.5)(torch.tensor([[5, 9]])).sum().backward()
    assert all(p.grad is None for p in target.parameters())
    alone = dense(1, n_layer=1)
    alone(torch.tensor([[5, 9]])).sum().backward()
    for p, q in zip(plus.parameters(), alone.parameters(), strict=True):
        assert_close(p.grad, 0.5 * q.grad)
    assert all(p.grad is not None for p in minus.parameters())


def test_an_offset_needs_one_vocabulary(dense):
    with pytest.raises(UserError, match="vocabularies of 61 and 50"):
        LogitOffset(dense(), dense(vocab_size=50), dense())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lora_goes_where_it_is_told(factories, kind):
    counts = {}
    for targets in ("all", "attn", "mlp"):
        model = factories[kind]()
        counts[targets] = sum(p.numel() for p in add_lora(model, 2, 2.0, targets=targets))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(targets == "all" or f".{targets}." in name for name in names) and names
    assert counts["attn"] + counts["mlp"] == counts["all"]
    with pytest.raises(UserError, match="--lora-targets"):
        add_lora(factories[kind](), 2, 2.0, targets="nose")
