"""Public checkpoints in and out: a Hugging Face folder or hub name -> (model, tokenizer), and back.

    model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16, device="cuda")
    save(model, tokenizer, "out/mine")             # transformers and vLLM read out/mine

There is one format. Our own small models are written in it too: a small GPT is a Llama, a small MoE an OLMoE. Which
tokenizer a folder has, its files say: `tokenizer.tiktoken` is ours, `tokenizer.json` the `tokenizers` library's.

| model_type     | what is special                                                                              |
|----------------|----------------------------------------------------------------------------------------------|
| llama, mistral | dense. Both are one architecture; saved as llama, but for a sliding window                    |
| qwen2, qwen3   | dense: biases in q, k, v; q/k norm of each head                                               |
| olmo2          | dense: q/k norm over the whole projection, norms behind attention and MLP                     |
| olmoe          | experts: the same q/k norm, norms in front; kept router weights as they are, or renormalised  |
| mixtral        | experts: kept router weights renormalised; other tensor names                                 |
| qwen2_moe      | experts: biases in q, k, v; a shared expert scaled by a sigmoid gate                          |
| qwen3_moe      | experts: q/k norm of each head                                                                |
| granitemoe     | experts in stacks: as mixtral, with a factor on embeddings, attention, residuals, logits       |
| deepseek_v2    | experts above the first layers: latent attention, shared experts (V2-Lite; no groups as in V2) |

A mixture's experts are read one by one or, as `save_pretrained(save_original_format=False)` writes them, in stacks.
Rotary scaling: llama3 and YaRN. Not read, because each needs more than a row here: Gemma 2 (two soft caps that fused
attention cannot do, norms with an offset of 1, windows in every other layer), expert groups (DeepSeek-V2 and V3).

Shapes: V vocabulary   D model width   E experts   F width of an MLP or expert
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import hub.tokenizer as hub_tokenizer
from data import tokenizer as small_tokenizer
from data.tokenizer import Tokenizer
from errors import UserError
from files import MARK, check_ours, sync, write_json
from flags import Number
from hub.tokenizer import HubTokenizer, NoTokenizer
from model import GPT, Config
from moe import MoE
from schema import read_json

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
WRITTEN = ("config.json", "model*.safetensors", INDEX, small_tokenizer.FILE, *hub_tokenizer.FILES, MARK)

# ---- names ------------------------------------------------------------------------------------------------------

# One part of a dotted name, ours -> theirs: blocks.3.attn.q.weight is model.layers.3.self_attn.q_proj.weight.
PARTS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
         "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
         "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
         "q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj",
         "kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj",
         "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
         "router": "gate", "shared": "shared_expert", "shared_gate": "shared_expert_gate"}


class Layout(NamedTuple):
    """How the tensors of a checkpoint are called."""

    parts: dict[str, str]  # names that differ from PARTS
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # of each; or the stacks: (gate and up, down)


STACKS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass
class Family:
    """What sets one model_type apart from the others. keys: our Config field -> its key in config.json."""

    architecture: str
    keys: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)  # Config fields that the family does not choose
    defaults: dict[str, Any] = field(default_factory=dict)  # what an absent key means, where not 1e-6 and 1e4
    also: dict[str, Any] = field(default_factory=dict)  # what else config.json says
    needs: tuple[str, ...] = ()  # Config fields that may not be 0
    square: bool = False  # its heads are together as wide as the model
    layouts: tuple[Layout, ...] = (Layout({}), Layout({}, STACKS))  # all are read, the first is written


DENSE = {"d_ff": "intermediate_size"}
EXPERTS = {"d_ff": "moe_intermediate_size", "n_expert": "num_experts", "top_k": "num_experts_per_tok",
           "norm_topk_prob": "norm_topk_prob"}
LOCAL = {"d_ff": "intermediate_size", "n_expert": "num_local_experts", "top_k": "num_experts_per_tok"}
FAMILIES = {  # a Config is saved as the first that can express it
    "llama": Family("LlamaForCausalLM", DENSE),
    "mistral": Family("MistralForCausalLM", {**DENSE, "window": "sliding_window"}),
    "qwen2": Family("Qwen2ForCausalLM", DENSE, fixed={"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", DENSE, fixed={"qk_norm": "head"}, defaults={"head_dim": 128}),
    "olmo2": Family("Olmo2ForCausalLM", DENSE, fixed={"qk_norm": "full", "norm_after": True}, square=True,
                    defaults={"rms_norm_eps": 1e-5},
                    layouts=(Layout({"attn_after": "post_attention_layernorm",
                                     "mlp_after": "post_feedforward_layernorm"}),)),
    "olmoe": Family("OlmoeForCausalLM", EXPERTS | {"d_ff": "intermediate_size"}, fixed={"qk_norm": "full"},
                    defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-5}, needs=("n_expert",), square=True),
    "mixtral": Family("MixtralForCausalLM", LOCAL | {"window": "sliding_window"}, fixed={"norm_topk_prob": True},
                      defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6}, needs=("n_expert",),
                      layouts=(Layout({"mlp": "block_sparse_moe"}, ("w1", "w3", "w2")), Layout({}, STACKS))),
    "qwen2_moe": Family("Qwen2MoeForCausalLM",
                        EXPERTS | {"d_shared": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias"},
                        fixed={"shared_gate": True}, defaults={"norm_topk_prob": False, "qkv_bias": True},
                        needs=("n_expert", "d_shared")),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", EXPERTS, fixed={"qk_norm": "head"}, defaults={"norm_topk_prob": False},
                        needs=("n_expert",)),
    "granitemoe": Family("GraniteMoeForCausalLM",
                         LOCAL | {"embed_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
                                  "attention_scale": "attention_multiplier", "logit_divisor": "logits_scaling"},
                         fixed={"norm_topk_prob": True}, needs=("n_expert", "attention_scale"), square=True,
                         defaults=dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier",
                                                 "logits_scaling"), 1.0),
                         layouts=(Layout({"mlp": "block_sparse_moe", "router": "router.layer"},
                                         ("input_linear.weight", "output_linear.weight")),
                                  Layout({"mlp": "block_sparse_moe", "router": "router"}, STACKS))),
    "deepseek_v2": Family("DeepseekV2ForCausalLM",
                          EXPERTS | {"n_expert": "n_routed_experts", "n_shared": "n_shared_experts",
                                     "n_dense": "first_k_dense_replace", "d_dense": "intermediate_size",
                                     "d_head": "qk_rope_head_dim", "d_nope": "qk_nope_head_dim",
                                     "d_value": "v_head_dim", "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank"},
                          defaults={"norm_topk_prob": False, "q_lora_rank": None, "first_k_dense_replace": 0},
                          also={"topk_method": "greedy", "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
                                "routed_scaling_factor": 1.0, "moe_layer_freq": 1},
                          needs=("n_expert", "n_shared", "kv_rank"),
                          layouts=(Layout({"shared": "shared_experts"}), Layout({"shared": "shared_experts"}, STACKS))),
}
SPELLINGS = {"num_local_experts": "num_experts"}  # current transformers renames Qwen3-MoE's
COMMON = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
          "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_head": "head_dim",
          "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
          "rope_scaling": "rope_scaling", "tie_head": "tie_word_embeddings"}
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": False,
            "sliding_window": None}
# Rotary scaling that model.py computes: type -> the keys that it needs, those that it may have.
ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"))}
# What the model here does not compute: key of config.json -> the values that mean "not used".
UNUSED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "clip_qkv": (),
    "partial_rotary_factor": (1.0,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "moe_layer_freq": (1,),
    "use_sliding_window": (False,), "topk_method": ("greedy",), "scoring_func": ("softmax",),
    "routed_scaling_factor": (1.0,),
    "quantization_config": ({},)}


def hub_tensors(model: GPT, layout: Layout | None = None) -> dict[str, Tensor]:
    """Their name -> our weight, or the part of a stack that it is: a view, so reading into it fills the model.

    layout: one of the family's; None: the one that is written.
    """
    layout = layout or FAMILIES[family_of(model.config)].layouts[0]
    names = PARTS | layout.parts

    def theirs(name: str) -> str:
        return ".".join(names.get(part, part) for part in name.split("."))

    out = {}
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        where, _, last = name.rpartition(".")
        owner = model.get_submodule(where)
        if not isinstance(owner, MoE):
            if ".taken." not in name:  # experts taken out of the stack come with expert_weights below
                out[theirs(name)] = p.detach()
        elif len(layout.experts) == 2:  # whole stacks
            of = ("gate_up", "down").index(last)
            stack = torch.stack(owner.expert_weights()[of]) if owner.taken else p
            out[f"{theirs(where)}.{layout.experts[of]}"] = stack.detach()
        elif last == "gate_up":
            gate, up, down = layout.experts
            for e, (gate_up, w_down) in enumerate(zip(*owner.expert_weights(), strict=True)):  # (2F, D), (D, F)
                at = f"{theirs(where)}.experts.{e}"
                out[f"{at}.{gate}.weight"], out[f"{at}.{up}.weight"] = gate_up.detach().chunk(2)
                out[f"{at}.{down}.weight"] = w_down.detach()
    return out


def layout_of(config: Config, names: Iterable[str]) -> Layout:
    """How a checkpoint with these tensors calls them: the first layout of its family but for stacks that are there."""
    layouts = FAMILIES[family_of(config)].layouts
    stacks = [layout for layout in layouts if len(layout.experts) == 2]
    return next((layout for layout in stacks if any(name.endswith(layout.experts[0]) for name in names)), layouts[0])


# ---- config.json ------------------------------------------------------------------------------------------------

def family_of(config: Config) -> str:
    """The model_type that a Config is saved as. Raises UserError where none can express it."""
    for name, family in FAMILIES.items():
        said = COMMON | family.keys
        fits = [getattr(config, f.name) == family.fixed.get(f.name, f.default) for f in fields(config)
                if f.name not in said]
        wide = config.d_head * config.n_head == config.d_model
        if all(fits) and all(getattr(config, needed) for needed in family.needs) and (wide or not family.square):
            return name
    odd = {f.name: getattr(config, f.name) for f in fields(config)
           if f.name not in COMMON and getattr(config, f.name) != f.default} | {"d_head": config.d_head}
    raise UserError(f"no public family has this shape, so it cannot be saved: {odd}; the table at the top of "
                    f"hub/checkpoint.py lists what {', '.join(FAMILIES)} have")


def hub_config(config: Config, dtype: torch.dtype, tokenizer) -> dict:
    """config.json, in the spelling that old and new versions of transformers read."""
    name = family_of(config)
    family = FAMILIES[name]
    out = {theirs: getattr(config, ours) for ours, theirs in (COMMON | family.keys).items()}
    return {"architectures": [family.architecture], "model_type": name, **out, **family.also, "hidden_act": "silu",
            "attention_bias": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": getattr(tokenizer, "begin", None), "eos_token_id": getattr(tokenizer, "end", None),
            "pad_token_id": None}


# What config.json may hold: wide enough for every published model, too narrow for what no machine holds.
SIZE, HEADS = Number(1, 2**24, whole=True), Number(1, 4096, whole=True)
FACTOR = Number(0, 1e12, above=True)
ROPE_SCHEMA: dict = {"rope_type?": str, "type?": str, "original_max_position_embeddings?": SIZE, "truncate?": bool}
ROPE_SCHEMA |= dict.fromkeys(("rope_theta?", "factor?", "low_freq_factor?", "high_freq_factor?",
                              "partial_rotary_factor?", "beta_fast?", "beta_slow?", "attention_factor?"), FACTOR)
ROPE_SCHEMA |= dict.fromkeys(("mscale?", "mscale_all_dim?"), Number(0, 1e12))
ROPE_SCHEMA = {key: (kind, None) for key, kind in ROPE_SCHEMA.items()}
CONFIG: dict = {"model_type?": str, "vocab_size?": SIZE, "num_hidden_layers?": HEADS, "num_attention_heads?": HEADS,
                "num_key_value_heads?": HEADS, "hidden_size?": SIZE, "head_dim?": SIZE, "rms_norm_eps?": Number(0, 1),
                "max_position_embeddings?": Number(1, 2**31, whole=True), "rope_theta?": FACTOR,
                "tie_word_embeddings?": bool, "intermediate_size?": SIZE, "moe_intermediate_size?": SIZE,
                "num_experts?": HEADS, "num_local_experts?": HEADS, "num_experts_per_tok?": HEADS,
                "norm_topk_prob?": bool, "shared_expert_intermediate_size?": Number(0, 2**24, whole=True),
                "qkv_bias?": bool, "use_sliding_window?": bool,
                "sliding_window?": Number(0, 2**31, whole=True), "rope_parameters?": ROPE_SCHEMA,
                "rope_scaling?": ROPE_SCHEMA}
CONFIG |= dict.fromkeys(("embedding_multiplier?", "residual_multiplier?", "attention_multiplier?", "logits_scaling?"),
                        FACTOR)  # Granite
CONFIG |= dict.fromkeys(("n_routed_experts?", "n_shared_experts?", "first_k_dense_replace?"),
                        Number(0, 4096, whole=True))  # DeepSeek-V2
CONFIG |= dict.fromkeys(("qk_rope_head_dim?", "qk_nope_head_dim?", "v_head_dim?", "kv_lora_rank?", "q_lora_rank?"),
                        SIZE)
CONFIG = {key: (kind, None) for key, kind in CONFIG.items()}  # null: as if it were not there


def read_config(folder: Path) -> Config:
    """The Config of a checkpoint. Raises UserError naming the key of config.json that this model cannot follow."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no checkpoint; give a folder with config.json and "
                        "model.safetensors, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct")
    raw = read_json(path, CONFIG)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; these are: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, harmless in UNUSED.items():
        if raw.get(key) is not None and raw[key] not in harmless:
            raise UserError(f"{path}: {key} {raw[key]!r} is not supported; use a checkpoint without it")
    # new transformers: {"rope_parameters": {"rope_type", "rope_theta", ...}}; old: rope_theta, and rope_scaling
    rope = {key: value for key, value in (raw.get("rope_parameters") or raw.get("rope_scaling") or {}).items()
            if value is not None}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: rope_scaling {rope} is not supported (of rope_types only llama3 and yarn are)")
    keys = COMMON | family.keys
    given = {key: value for key, value in raw.items() if value is not None}
    given |= {new: given[old] for old, new in SPELLINGS.items() if old in given and new not in given}
    raw = DEFAULTS | family.defaults | given
    raw["rope_theta"], raw["rope_scaling"] = rope.get("rope_theta", raw["rope_theta"]), None
    if rope_type != "default":
        wanted, others = ROPE[rope_type]
        rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | rope
        if missing := [key for key in wanted if rope.get(key) is None]:
            raise UserError(f"{path}: rope_scaling lacks {', '.join(missing)}: download it again")
        if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise UserError(f"{path}: rope_scaling has a high_freq_factor no higher than low_freq_factor: "
                            "download it again")
        raw["rope_scaling"] = {"rope_type": rope_type, **{key: rope[key] for key in (*wanted, *others) if key in rope}}
    raw.setdefault("head_dim", 0)  # 0: width / heads
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if missing := [theirs for theirs in keys.values() if theirs not in raw]:
        raise UserError(f"{path} lacks {', '.join(missing)}: download it again")
    try:
        return Config(**{ours: raw[theirs] for ours, theirs in keys.items()}, **family.fixed)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None


# ---- loading ----------------------------------------------------------------------------------------------------

def load(path_or_hub_name: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
         template: str | None = None) -> tuple[GPT, Tokenizer | HubTokenizer | NoTokenizer]:
    """A checkpoint as (model in eval mode, tokenizer), from a folder or, where no such folder exists, from the hub.

    Weights go from a memory map straight to dtype and device; peak memory is the model and 2% of it.
    template: a name in hub/tokenizer.py's table, instead of the one that the checkpoint's own files point to.
    Raises UserError, one line, for whatever is missing, damaged, not supported or does not fit together.
    """
    check_device(dtype, device)
    folder = find_folder(path_or_hub_name)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config, template)
    files = find_tensors(folder)
    if config.n_layer > len(files):  # seen before a model of so many layers is made
        raise UserError(f"{folder}: config.json asks for {config.n_layer} layers and the weights are {len(files)} "
                        "tensors: they do not belong together")
    layout = layout_of(config, files)
    with torch.device("meta"):
        wanted = hub_tensors(GPT(config), layout)
    check_tensors(folder, config, files, {name: list(tensor.shape) for name, tensor in wanted.items()})
    model = empty_model(config, dtype, device)
    into = hub_tensors(model, layout)
    by_file: dict[Path, list[str]] = {}
    for name in into:
        by_file.setdefault(files[name], []).append(name)
    chunk = sum(tensor.nbytes for tensor in into.values()) // 50
    for path, names in by_file.items():
        for name, tensor in read_tensors(path, names, chunk):
            into[name].copy_(tensor)
    return model.eval(), tokenizer


def check_device(dtype: torch.dtype, device: str | torch.device) -> None:
    """Raises UserError unless a tiny model runs on device in dtype: the answer comes from the device itself."""
    name = str(dtype).removeprefix("torch.")
    try:
        emulated = (torch.device(device).type == "cuda" and torch.cuda.is_available() and dtype == torch.bfloat16
                    and not torch.cuda.is_bf16_supported(including_emulation=False))
        if not emulated:
            tiny = GPT(Config(vocab_size=2, n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=8)).to(device, dtype)
            tiny(torch.zeros(1, 1, dtype=torch.long, device=device))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"{name} on {device} does not work here ({str(error).splitlines()[0][:80]}): "
                        "choose --dtype float32 or another --device") from None
    if emulated:
        raise UserError(f"{device} has no {name} arithmetic: choose --dtype float32")


def find_folder(name: str | Path) -> Path:
    """The folder itself, or the hub's copy of what load needs. Raises UserError where neither is to be had."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"{name} is neither a folder nor a hub name (owner/model): give one of the two")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(WRITTEN)))
    except Exception as error:  # no network, no such name, no permission: many kinds, one way out
        raise UserError(f"{name} is no folder here, and the hub did not give it ({type(error).__name__}): check "
                        "the name, `hf auth login` if it is gated, or download it and give the folder") from None


def load_tokenizer(folder: Path, config: Config, template: str | None) -> Tokenizer | HubTokenizer | NoTokenizer:
    """Raises UserError where its vocabulary does not fit the model's."""
    tokenizer: Tokenizer | HubTokenizer
    if (folder / small_tokenizer.FILE).is_file():
        tokenizer = Tokenizer.load(folder)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = HubTokenizer.load(folder, template)
    else:
        return NoTokenizer(folder)  # weights alone are of use too; whoever needs the tokenizer is told
    # fewer is usual, embeddings are padded to round sizes; of half of them nobody would speak
    if not config.vocab_size // 2 <= tokenizer.vocab_size <= config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} "
                        "(vocab_size in config.json): they do not belong together")
    return tokenizer


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file. Raises UserError for a missing or damaged file, and for pickled checkpoints."""
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(tensor_shapes(single), single)
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX, {"weight_map": {str: str}})["weight_map"]
        for name in sorted(set(where.values())):
            check_inside(folder, name)
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, though {INDEX} lists it: download that shard")
        return {name: folder / file for name, file in where.items()}
    if pickled := sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind)):
        raise UserError(f"{folder} has its weights in {pickled[0]}, a pickle, which could run code and is not read; "
                        "convert it: python -c \"from transformers import AutoModelForCausalLM as M; "
                        f"M.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\"")
    raise UserError(f"{folder} has neither model.safetensors nor {INDEX}: the weights are missing "
                    "(where the hub has only .bin files, convert them with transformers' save_pretrained)")


def check_inside(folder: Path, name: str) -> None:
    """Raises UserError for a shard outside its folder, unless it is a link that the hub's cache made."""
    inside = name.isprintable() and Path(name).name == name
    if inside:
        here = folder.resolve()
        place = Path(os.path.realpath(here / name)).parent  # resolve() raises where links go round in a circle
        cache = here.parent.parent / "blobs"  # the cache keeps models--o--n/snapshots/REVISION and .../blobs
        inside = place == here or (here.parent.name == "snapshots" and place == cache)
    if not inside:
        raise UserError(f"{folder / INDEX} lists the shard {name}, which lies outside {folder}: download it again")


def tensor_shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype), from the file's header alone. Raises UserError for a truncated or corrupt file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): download it again") from None


def check_tensors(folder: Path, config: Config, files: dict[str, Path], wanted: dict[str, list[int]]) -> None:
    """Raises UserError naming the first tensor that is missing, not expected, or of another shape or kind."""
    found: dict[str, tuple[list[int], str]] = {}
    for path in sorted(set(files.values())):
        found |= {name: part for name, part in tensor_shapes(path).items() if files.get(name) == path}
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{folder} lacks the tensor {name} {shape}: the download is incomplete, or config.json "
                            "belongs to another model")
        if found[name][0] != shape:
            raise UserError(f"{files[name]}: {name} has shape {found[name][0]}, but config.json asks for {shape}")
        if found[name][1] not in FLOATS:
            raise UserError(f"{files[name]}: {name} is stored as {found[name][1]}: quantised weights are not read")
    for name in found.keys() - wanted.keys():
        if name == "lm_head.weight" and config.tie_head:  # some checkpoints store the shared matrix twice
            (_, head), = read_tensors(files[name], [name])
            (_, embedding), = read_tensors(files["model.embed_tokens.weight"], ["model.embed_tokens.weight"])
            if not torch.equal(head, embedding):
                raise UserError(f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but "
                                "lm_head.weight differs from model.embed_tokens.weight: set it to false")
        elif not name.endswith("rotary_emb.inv_freq"):  # a constant that old versions stored
            raise UserError(f"{files[name]}: the tensor {name} is not expected in a {family_of(config)} model")


def read_tensors(path: Path, names: list[str], chunk: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file by memory map, which is dropped after each `chunk` bytes: what was read is not kept."""
    names = list(reversed(names))
    while names:
        mapped = 0
        with safe_open(path, "pt") as file:
            while names and mapped <= chunk:
                tensor = file.get_tensor(names[-1])
                mapped += tensor.nbytes
                yield names.pop(), tensor


def empty_model(config: Config, dtype: torch.dtype, device: str | torch.device) -> GPT:
    """A GPT whose weights have memory but no values yet; nothing is computed or copied to get there."""
    with torch.device("meta"):
        model = GPT(config)
    weights = {name: torch.empty_like(p, dtype=dtype, device=device) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_head:
        model.head.weight = model.embed.weight
    return model


# ---- saving -----------------------------------------------------------------------------------------------------

def save(model: GPT, tokenizer, folder: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that load, transformers and vLLM read: config.json, weights in one file or in shards, tokenizer.

    Written under <folder>.partial and renamed when whole. Memory beyond the model: one shard.
    Raises UserError where no family has the model's shape, folder holds other things, or writing fails.
    """
    folder = Path(folder)
    config = hub_config(model.config, model.embed.weight.dtype, tokenizer)
    if folder.exists() and (not folder.is_dir() or any(not any(p.match(w) for w in WRITTEN) for p in folder.iterdir())):
        raise UserError(f"{folder} exists and holds other things than a model: give another name")
    check_ours(folder, "name")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / MARK, {"weights": "saved by nanounlearn"})
        write_json(partial / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(partial)
        write_tensors(partial, hub_tensors(model), shard_bytes)
        sync(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} could not be written ({error})") from None


def write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most shard_bytes (a larger tensor has one to itself) and their index."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name].cpu().contiguous() for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
