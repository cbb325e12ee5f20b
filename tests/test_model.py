"""model.py against `transformers` on tiny random weights, and against itself in every way of decoding."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.testing import assert_close

import decoding
from decoding import Replay, parts_of
from model import GPT, Config, Linear, Trace, count_parameters, needed_by, rope_frequencies
from uld import LogitDifference

PROMPTS = [[5, 9, 2, 44, 7], [3], [8, 8, 1], [60, 0, 17, 4, 33, 21, 6]]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded by a token (1) that is a real one elsewhere, so that nothing may recognise padding by its id."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    return tokens, torch.tensor([longest - len(p) for p in prompts])


def argmax_loop(model, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding the slow way: the whole sequence anew at every step."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


# ---- against transformers ---------------------------------------------------------------------------------------

NAMES = {  # ours -> theirs, within one block
    "attn_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight", "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight", "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q.bias": "self_attn.q_proj.bias", "attn.k.bias": "self_attn.k_proj.bias",
    "attn.v.bias": "self_attn.v_proj.bias",
    "attn.q_norm.weight": "self_attn.q_norm.weight", "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight", "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight", "mlp.gate_up": "mlp.experts.gate_up_proj",
    "mlp.down": "mlp.experts.down_proj",
    "mlp.shared.gate.weight": "mlp.shared_expert.gate_proj.weight",
    "mlp.shared.up.weight": "mlp.shared_expert.up_proj.weight",
    "mlp.shared.down.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
}


def assert_same_as_transformers(theirs, config: Config, length: int = 48) -> None:
    """Random weights into `theirs`, copied name by name into ours: logits on random tokens must agree."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    weights = theirs.eval().state_dict()
    ours = GPT(config).eval()
    state, used = {}, set()
    for name in ours.state_dict():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            source = f"model.layers.{layer}.{NAMES[rest]}"
        else:
            source = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
                      "head.weight": "lm_head.weight"}[name]
        state[name] = weights[source]
        used.add(source)
    assert used == set(weights), "every weight of theirs must have a place in ours"
    ours.load_state_dict(state)
    tokens = torch.randint(config.vocab_size, (3, length))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def sizes(**more) -> dict:
    """A tiny transformers config of 2 layers; vocabulary and special ids small enough to agree."""
    return dict(vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
                attn_implementation="eager") | more


@pytest.mark.parametrize("groups, tied, scaling", [(4, False, None), (2, True, None), (1, False, LLAMA3),
                                                   (2, False, LLAMA3)])
def test_dense_model_is_a_llama(groups, tied, scaling):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500.0} | (scaling or {})
    theirs = LlamaForCausalLM(LlamaConfig(**sizes(num_key_value_heads=groups, tie_word_embeddings=tied,
                                                  rms_norm_eps=1e-5, rope_parameters=rope)))
    assert_same_as_transformers(theirs, Config(
        vocab_size=97, n_layer=2, n_head=4, n_kv_head=groups, d_model=32, d_ff=24, max_len=64, norm_eps=1e-5,
        rope_theta=500.0, rope_scaling=scaling, tie_head=tied))


@pytest.mark.parametrize("groups, renormalised", [(4, False), (2, False), (4, True)])
def test_sparse_model_is_an_olmoe(groups, renormalised):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    theirs = OlmoeForCausalLM(OlmoeConfig(**sizes(
        num_key_value_heads=groups, intermediate_size=16, num_experts=7, num_experts_per_tok=3, rms_norm_eps=1e-5,
        norm_topk_prob=renormalised, tie_word_embeddings=False)))
    assert_same_as_transformers(theirs, Config(
        vocab_size=97, n_layer=2, n_head=4, n_kv_head=groups, d_model=32, d_ff=16, max_len=64, norm_eps=1e-5,
        qk_norm="full", n_expert=7, top_k=3, norm_topk_prob=renormalised))


def test_shared_expert_and_biases_are_qwen_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    theirs = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes(
        num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=20, num_experts=5,
        num_experts_per_tok=2, rms_norm_eps=1e-6, norm_topk_prob=False, tie_word_embeddings=False)))
    assert_same_as_transformers(theirs, Config(
        vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=16, max_len=64, norm_eps=1e-6,
        qkv_bias=True, n_expert=5, top_k=2, d_shared=20, shared_gate=True))


def test_norm_per_head_and_own_head_width_are_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes(num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-6,
                                                  tie_word_embeddings=False)))
    assert_same_as_transformers(theirs, Config(
        vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=24, d_head=12, max_len=64, norm_eps=1e-6,
        qk_norm="head"))


def test_llama3_scaling_slows_long_waves_and_leaves_short_ones():
    """Worked by hand: waves of less than original / high stay, of more than original / low are `factor` slower."""
    config = dict(d_model=64, n_head=1, n_kv_head=1, rope_theta=10_000.0)
    plain = rope_frequencies(Config(**config))
    scaled = rope_frequencies(Config(**config, rope_scaling=LLAMA3))
    wave = 2 * math.pi / plain
    short, long = wave < 32 / 4, wave > 32 / 1
    assert short.any() and long.any() and not (short | long).all()
    assert_close(scaled[short], plain[short])
    assert_close(scaled[long], plain[long] / 8)
    between = ~(short | long)
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


# ---- one model, many ways to run it -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_later_token_never_changes_an_earlier_logit(factories, kind):
    model = factories[kind]()
    tokens = torch.randint(61, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_left_padding_changes_no_real_logit(factories, kind):
    model = factories[kind]()
    tokens, pad = padded(PROMPTS)
    with torch.no_grad():
        together = model(tokens, pad=pad)
        for row, prompt in enumerate(PROMPTS):
            assert_close(together[row, pad[row]:], model(torch.tensor([prompt]))[0], rtol=1e-4, atol=1e-4)
    assert together.isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 1, 2, 1], [1, 6]])
def test_cached_pieces_give_the_logits_of_one_pass(factories, kind, pieces):
    model = factories[kind]()
    tokens, pad = padded(PROMPTS)
    cache = model.new_cache(len(tokens), 7)
    with torch.no_grad():
        whole = model(tokens, pad=pad)
        parts = torch.cat([model(part, cache=cache, pad=pad) for part in tokens.split(pieces, dim=1)], dim=1)
    assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 7


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_greedy_generation_is_the_naive_argmax_loop_alone_and_in_a_padded_batch(factories, kind):
    model = factories[kind]()
    slow = [argmax_loop(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(s) for s in slow}) == len(PROMPTS)  # the rows say different things, so mixing them up shows
    tokens, pad = padded(PROMPTS)
    assert model.generate(tokens, 12, pad=pad).tolist() == slow
    for prompt, said in zip(PROMPTS, slow, strict=True):  # batches of one, unpadded
        assert model.generate(torch.tensor([prompt]), 12).tolist() == [said]


def test_generation_stops_at_the_end_token_row_by_row(dense):
    model = dense()
    slow = [argmax_loop(model, prompt, 12) for prompt in PROMPTS]
    end = slow[0][3]
    stop = [s.index(end) if end in s else 12 for s in slow]
    assert len(set(stop)) > 1
    tokens, pad = padded(PROMPTS)
    said = model.generate(tokens, 12, pad=pad, end=end).tolist()
    longest = min(12, max(stop) + 1)
    assert said == [(s[:n] + [end] * 12)[:longest] for s, n in zip(slow, stop, strict=True)]


def test_generation_ends_early_once_all_rows_have_ended(dense):
    model = dense()
    slow = argmax_loop(model, PROMPTS[0], 12)
    end = slow[3]
    said = model.generate(torch.tensor([PROMPTS[0]] * 2), 12, end=end)
    assert said.tolist() == [slow[: slow.index(end) + 1]] * 2


def slow_sampling(model, prompts: list[list[int]], steps: int, end: int, generator) -> list[list[int]]:
    """Sampling at temperature 1 the slow way: each row anew at every step, one draw for all rows, ended ones too."""
    rows = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(steps):
            logits = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
            for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1, generator=generator), strict=True):
                row.append(int(token))
    said = [row[len(prompt):] for row, prompt in zip(rows, prompts, strict=True)]
    stop = [row.index(end) + 1 if end in row else steps for row in said]
    return [(row[:n] + [end] * steps)[: max(stop)] for row, n in zip(said, stop, strict=True)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_samples_do_not_depend_on_who_has_ended_nor_on_the_prompt_being_shared(factories, kind):
    model = factories[kind](std=0.1)
    end = 7
    tokens, pad = padded(PROMPTS[:3])
    of = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1])
    expected = slow_sampling(model, [PROMPTS[i] for i in of.tolist()], 40, end, torch.Generator().manual_seed(3))
    got = model.generate(tokens, 40, 1.0, pad=pad, end=end, generator=torch.Generator().manual_seed(3), of=of)
    ended = [row.index(end) for row in expected if end in row]
    assert len(set(ended)) > 3  # so many at different times that the batch has shrunk
    assert got.tolist() == expected


def test_a_cache_grows_with_what_is_said(dense):
    model = dense(max_len=256)
    cache = model.new_cache(1, 200)
    model.next_logits(torch.tensor([[5, 9, 2]]), cache, None)
    assert cache.k[0].shape[2] < 64
    assert model.generate(torch.tensor([[5, 9, 2]]), 100).tolist() == [argmax_loop(model, [5, 9, 2], 100)]


LATENT = dict(n_head=2, n_kv_head=2, d_head=8, kv_rank=16, d_nope=8, d_value=16)


@pytest.mark.parametrize("kind, more", [("dense", {}), ("dense", dict(window=4)), ("dense", LATENT), ("moe", {})])
def test_a_settled_cache_gives_the_logits_of_one_pass(factories, kind, more):
    """As a GPU decodes: keys and values stay where they are, and the device counts (decoding.Replay)."""
    model = factories[kind](**more)
    tokens, pad = padded(PROMPTS)
    for left in (pad, None):
        cache = model.new_cache(len(tokens), 20)
        with torch.no_grad():
            whole = model(tokens, pad=left)
            parts = [model(tokens[:, :2], cache=cache, pad=left)]
            cache.settle(100)
            before = cache.k[0].data_ptr()
            parts += [model(part, cache=cache, pad=left) for part in tokens[:, 2:].split(1, dim=1)]
        assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.place.tolist() == [7] and cache.k[0].data_ptr() == before and cache.k[0].shape[2] == 24


class Recording:
    """Stands in for torch.cuda.CUDAGraph where there is no GPU: what was recorded is Python, run again."""

    def __init__(self, replay):
        self.replayed = replay

    def __enter__(self):
        self.before = [(part, part.place.clone(), part.length) for part in parts_of(self.replayed.cache)]

    def __exit__(self, *_):
        for part, place, _ in self.before:
            part.place.copy_(place)  # a recording computes nothing

    def replay(self):
        of, now = self.replayed, [part.length for part, _, _ in self.before]
        for part, _, length in self.before:
            part.length = length  # whatever Python counts is in a recording as it was then
        of.logits.copy_(of.model.next_logits(of.tokens, of.cache, of.pad))
        for (part, _, _), length in zip(self.before, now, strict=True):
            part.length = length


@pytest.mark.parametrize("kind", ["dense", "moe", "both"])
@pytest.mark.parametrize("room", [8192, 0])
def test_recorded_decoding_says_what_decoding_says(factories, kind, room, monkeypatch):
    """Also where it is recorded anew on the way, every five tokens."""
    model = (LogitDifference(factories["dense"](), factories["dense"](seed=1), 0.5, 0.1) if kind == "both"
             else factories[kind]())
    prompts, pad = padded(PROMPTS)
    of = torch.tensor([0, 0, 1, 2, 3])
    given = dict(pad=pad, of=of, end=[7, 11])
    expected = model.generate(prompts, 23, **given)
    made, recordings = [], []

    class Watched(Replay):
        works = staticmethod(lambda *_: True)
        ROOM, LEAST = room, 5

        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recordings.append(1) or Recording(self))
            monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)

    monkeypatch.setattr(decoding, "Replay", Watched)
    assert torch.equal(model.generate(prompts, 23, **given), expected)
    assert len(recordings) == (1 if room else 5)  # of 22 tokens
    part = parts_of(made[0].cache)[0]
    assert part.k[0].shape[2] == 32 and part.length == prompts.shape[1] + 22


def test_rotary_tables_are_made_again_for_another_precision(dense):
    model, tokens = dense(), torch.randint(61, (1, 6))
    model(tokens)
    rounded = dense().bfloat16()
    with torch.no_grad():
        assert torch.equal(model.bfloat16()(tokens), rounded(tokens))


def test_sampling_is_a_function_of_the_generator(dense):
    model, tokens = dense(std=0.15), torch.tensor([[3, 4], [9, 1]])

    def draw(seed):
        return model.generate(tokens, 10, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampled_frequencies_follow_the_softmax(dense, temperature):
    """Chi-square over 6,000 draws of one token; 1e-3 under a fixed seed."""
    model = dense(vocab_size=8, std=0.15)
    prompt = torch.tensor([[3, 4, 1]])
    with torch.no_grad():
        p = (model(prompt)[0, -1].double() / temperature).softmax(-1)
    drawn = model.generate(prompt.repeat(6000, 1), 1, temperature, generator=torch.Generator().manual_seed(0))
    count = torch.bincount(drawn[:, 0], minlength=8)
    assert chisquare(count.numpy(), 6000 * (p / p.sum()).numpy()).pvalue > 1e-3


def test_a_large_vocabulary_is_drawn_as_weighted():
    """Chi-square over 6,000 draws where one random number a row decides; what weighs nothing is never drawn."""
    weights = torch.zeros(6000, 2**14)
    places, shares = torch.tensor([1, 77, 8000, 2**14 - 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    weights[:, places] = shares
    drawn = decoding.draw(weights, torch.Generator().manual_seed(0))
    count = torch.stack([(drawn == place).sum() for place in places])
    assert int(count.sum()) == 6000
    assert chisquare(count.numpy(), 6000 * shares.double().numpy() / float(shares.double().sum())).pvalue > 1e-3


def test_generating_no_token_gives_none(dense):
    assert dense().generate(torch.tensor([[1, 2], [3, 4]]), 0).shape == (2, 0)


def test_an_empty_prompt_is_refused(dense):
    with pytest.raises(ValueError, match="at least one prompt token"):
        dense().generate(torch.zeros(2, 0, dtype=torch.long), 3)


def test_a_batch_of_one_token_runs(sparse):
    assert sparse()(torch.tensor([[7]])).shape == (1, 1, 61)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_pass_that_begins_at_a_stem_is_the_whole_pass_at_every_layer(factories, kind):
    model = factories[kind]()
    tokens = torch.randint(61, (3, 7))
    with torch.no_grad():
        trace = Trace()
        whole = model(tokens, trace=trace)
        for layer in range(3):
            late = Trace()
            x = model.stem(tokens, layer)
            assert_close(model(tokens, trace=late, stem=(layer, x)), whole, rtol=1e-5, atol=1e-5)
            assert set(late.hidden) == set(range(layer, 3))  # what lies below is not run again
            for above in range(layer, 3):
                assert_close(late.hidden[above], trace.hidden[above], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_checkpointing_gives_the_same_loss_gradients_and_trace(factories, kind):
    tokens, results = torch.randint(61, (2, 6)), []
    for checkpointing in (False, True):
        model = factories[kind]().train()
        model.checkpointing = checkpointing
        trace = Trace()
        loss = model(tokens, trace=trace).square().mean() + trace.hidden[1].mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, trace))
    (loss, grads, trace), (loss_again, grads_again, trace_again) = results
    assert_close(loss_again, loss)
    assert_close(grads_again, grads)
    assert all(g is not None for g in grads.values())
    assert set(trace.hidden) == set(trace_again.hidden) == {0, 1, 2}
    assert set(trace.routing) == set(trace_again.routing) == ({0, 1, 2} if kind == "moe" else set())


def test_trace_holds_each_blocks_output_and_routing(sparse):
    model, tokens, trace = sparse(), torch.randint(61, (2, 5)), Trace()
    with torch.no_grad():
        logits = model(tokens, trace=trace)
        assert_close(model.head(model.norm(trace.hidden[2])), logits)
        for layer in range(3):  # the router by hand, on what it sees
            seen = model.blocks[layer].mlp_norm(model.stem(tokens, layer))
            probs = (seen @ model.moe(layer).router.weight.T).softmax(-1)
            assert_close(trace.routing[layer].probs, probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bfloat16_weights_give_bfloat16_logits_near_the_float32_ones(factories, kind):
    tokens = torch.randint(61, (2, 6))
    with torch.no_grad():
        exact = factories[kind](std=0.1)(tokens)
        rounded = factories[kind](std=0.1).bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


# ---- shapes and weights -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, says", [
    (dict(d_model=30, n_head=4), "not a multiple of n_head"),
    (dict(n_head=4, n_kv_head=3), "not a multiple of n_kv_head"),
    (dict(n_head=2), "not a multiple of n_kv_head"),  # n_kv_head is 4 unless given
    (dict(d_model=12, n_head=4), "d_head 3 is odd"),
    (dict(d_head=5), "d_head 5 is odd"),
    (dict(n_expert=4), "top_k 0"),
    (dict(n_expert=4, top_k=5), "top_k 5"),
    (dict(qk_norm="all"), "qk_norm 'all'"),
])
def test_a_shape_that_cannot_be_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        Config(**config)


def test_residual_projections_start_smaller():
    """0.02, and 0.02 / sqrt(2 * 2 layers) = 0.01 into the residual stream; norms 1, biases 0."""
    for moe in ({}, dict(n_expert=4, top_k=2, d_shared=64)):
        model = GPT(Config(n_layer=2, d_model=128, d_ff=256, qkv_bias=True, **moe))
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                assert (p == 1).all()
            elif name.endswith("bias"):
                assert (p == 0).all()
            elif p.numel() > 5000:
                small = any(part in name for part in ("attn.out", "down"))
                assert p.std().item() == pytest.approx(0.01 if small else 0.02, rel=0.05), name


def test_parameters_are_counted_once():
    """By hand: 2 norms + q, k, v, out + gate, up, down; then embedding, head and last norm."""
    shape = dict(vocab_size=10, n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=12)
    block = 2 * 8 + (8 * 8 + 2 * 4 * 8 + 8 * 8) + 3 * 8 * 12
    assert count_parameters(GPT(Config(**shape))) == block + 2 * 80 + 8
    tied = GPT(Config(**shape, tie_head=True))
    assert count_parameters(tied) == block + 80 + 8
    tied.blocks.requires_grad_(False)
    assert count_parameters(tied, trainable=True) == 80 + 8


def test_any_of_several_end_tokens_ends_a_row(dense):
    model = dense()
    prompts = torch.tensor([[5, 9, 2], [7, 7, 1], [30, 4, 4]])
    free = model.generate(prompts, 8)
    ends = [int(free[0, 2]), int(free[1, 4])]
    got = model.generate(prompts, 8, end=ends)
    for row, full in zip(got.tolist(), free.tolist(), strict=True):
        first = next((i for i, t in enumerate(full) if t in ends), len(full))
        assert row == (full[: first + 1] + [full[min(first, 7)]] * 8)[: len(row)]


# ---- what need not be computed ------------------------------------------------------------------------------------

KINDS = {"dense": dict(), "moe": dict(n_expert=7, top_k=3, d_ff=16), "window": dict(window=3),
         "after": dict(norm_after=True, qk_norm="full"),
         "one layer": dict(n_layer=1), "granite": dict(logit_divisor=3.0, residual_scale=0.7)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wide", [0, 512])  # 0: padding is left out
@settings(max_examples=10, deadline=None)
@given(wanted=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_wanted_positions_alone_have_the_values_and_gradients_of_a_whole_pass(dense, kind, checkpointing, wide, wanted):
    exact = kind != "moe"  # grouped products take no float64
    model = dense(0, **KINDS[kind]).train().to(torch.float64 if exact else torch.float32)
    model.checkpointing = checkpointing
    at = torch.tensor(wanted)
    tokens = torch.randint(61, at.shape, generator=torch.Generator().manual_seed(1))
    found = []
    with mock.patch("model.WIDE", wide):
        alone = model(tokens, at=at)
    for logits in (alone, model(tokens)[at], model(tokens, at=at, trace=Trace())):
        gradients = torch.autograd.grad(logits.tanh().sum(), list(model.parameters()))
        found.append((logits, *gradients))
    largest = max(float(gradient.abs().max()) for gradient in gradients)  # rounding is a share of that
    for other in found[1:]:
        assert_close(found[0], other, rtol=0, atol=(1e-11 if exact else 2e-5) * max(1, largest))


def test_of_a_wide_models_batch_the_padding_meets_no_mlp(dense, monkeypatch):
    """Rows of 5 and 2 wanted to their ends, and one of 4 of which the second alone is: 9 of 15 positions."""
    model, met = dense(0), []
    model.blocks[0].mlp.register_forward_hook(lambda layer, inputs, output: met.append(inputs[0].shape))
    at = torch.zeros(3, 5, dtype=torch.bool)
    at[0, 3:], at[1, 1], at[2, 1] = True, True, True
    tokens = torch.ones(3, 5, dtype=torch.long)
    model(tokens, at=at)
    monkeypatch.setattr("model.WIDE", 32)
    model(tokens, at=at)
    model(tokens, at=at, cache=model.new_cache(3, 5))  # whose later tokens see all of these
    assert met == [(3, 5, 32), (9, 32), (3, 5, 32)]
    assert needed_by(at, 31) is None and needed_by(at[:1], 32) is None  # a narrow model; nothing to leave out
    assert needed_by(at, 32).tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_what_is_left_out_changes_nothing_above_a_stem_with_an_expert_apart(sparse, start, monkeypatch):
    """As in UOE's retain pass: values, and gradients of the expert and of what comes in."""
    model = sparse(0, n_layer=3).requires_grad_(False)
    taken = [model.moe(layer).take_out(2) for layer in range(start, 3)]
    at = torch.tensor([[False] * 3 + [True] * 2, [False, True] + [False] * 3, [True] + [False] * 4])
    tokens = torch.randint(61, (3, 5), generator=torch.Generator().manual_seed(1))
    x = model.stem(tokens, start).requires_grad_()
    weights, found = [x, *(p for expert in taken for p in expert.parameters())], []
    for wide in (512, 0):
        monkeypatch.setattr("model.WIDE", wide)
        logits = model(tokens, stem=(start, x), at=at)
        found.append((logits, *torch.autograd.grad(logits.tanh().sum(), weights, allow_unused=True)))
    assert needed_by(at, 512) is not None
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_trace_has_all_positions_whichever_are_wanted(sparse):
    model, tokens, trace = sparse(0), torch.tensor([[5, 9, 2], [7, 1, 33]]), Trace()
    model(tokens, at=tokens == 9, trace=trace)
    assert all(x.shape == (2, 3, 32) for x in trace.hidden.values())
    assert all(routing.probs.shape == (2, 3, 7) for routing in trace.routing.values())


@pytest.mark.parametrize("shape", [(1,), (2,), (64,), (65,), (3, 1), (4, 16), (2, 3, 5), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("amd", [False, True])
def test_a_linear_layer_is_one_for_any_number_of_rows(shape, bias, amd, monkeypatch):
    monkeypatch.setattr(Linear, "AMD", amd)
    torch.manual_seed(0)
    layer = Linear(24, 10, bias)
    x = torch.randn(*shape, 24, requires_grad=True)
    wanted = (x[..., None, :] * layer.weight).sum(-1) + (layer.bias if bias else 0)
    assert layer(x).shape == (*shape, 10)
    assert_close(layer(x), wanted)
    assert_close(torch.autograd.grad(layer(x).sin().sum(), (x, layer.weight)),
                 torch.autograd.grad(wanted.sin().sum(), (x, layer.weight)))
