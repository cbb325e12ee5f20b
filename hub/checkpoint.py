"""Public checkpoints in and out: a Hugging Face folder or hub name -> (model, tokenizer), and back.

    model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16, device="cuda")
    save(model, tokenizer, "out/mine")             # transformers and vLLM read out/mine

There is one format. Our own small models are written in it too: a small GPT is a Llama, a small MoE an OLMoE. Which
tokenizer a folder has, its files say: `tokenizer.tiktoken` is ours, `tokenizer.json` the `tokenizers` library's.

| model_type     | what is special                                                          | config.json      |
|----------------|--------------------------------------------------------------------------|------------------|
| llama, mistral | dense. Both are one architecture; saved as llama                         | rope type llama3 |
| olmoe          | q/k norm over the whole projection, kept router weights as they are       | norm_topk_prob   |
| mixtral        | kept router weights renormalised; other tensor names                     |                  |
| qwen2_moe      | biases in q, k, v; a shared expert scaled by a sigmoid gate               | norm_topk_prob   |

Sliding windows (Mistral 7B v0.1) are not computed. Within the window they change nothing, so such a model's context,
Config.max_len, is cut to the window; its results are then exact.

Shapes: V vocabulary   D model width   E experts   F width of an MLP or expert
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import hub.tokenizer as hub_tokenizer
from data import tokenizer as small_tokenizer
from data.tokenizer import Tokenizer
from errors import UserError
from hub.tokenizer import HubTokenizer, NoTokenizer
from model import GPT, Config
from moe import MoE

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
WRITTEN = ("config.json", "model*.safetensors", INDEX, small_tokenizer.FILE, *hub_tokenizer.FILES)

# ---- names ------------------------------------------------------------------------------------------------------

# One part of a dotted name, ours -> theirs: blocks.3.attn.q.weight is model.layers.3.self_attn.q_proj.weight.
PARTS = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
         "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
         "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
         "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
         "router": "gate", "shared": "shared_expert", "shared_gate": "shared_expert_gate"}


@dataclass
class Family:
    """What sets one model_type apart from the others. keys: our Config field -> its key in config.json."""

    architecture: str
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)  # Config fields that the family does not choose
    defaults: dict[str, Any] = field(default_factory=dict)  # what an absent key means, where not 1e-6 and 1e4
    parts: dict[str, str] = field(default_factory=dict)  # names that differ from PARTS; expert: (gate, up, down)
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


DENSE = {"d_ff": "intermediate_size"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", DENSE),
    "mistral": Family("MistralForCausalLM", DENSE),
    "olmoe": Family("OlmoeForCausalLM", {"d_ff": "intermediate_size", "n_expert": "num_experts",
                                         "top_k": "num_experts_per_tok", "norm_topk_prob": "norm_topk_prob"},
                    fixed={"qk_norm": "full"}, defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-5}),
    "mixtral": Family("MixtralForCausalLM", {"d_ff": "intermediate_size", "n_expert": "num_local_experts",
                                             "top_k": "num_experts_per_tok"},
                      fixed={"norm_topk_prob": True}, defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
                      parts={"mlp": "block_sparse_moe"}, expert=("w1", "w3", "w2")),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {"d_ff": "moe_intermediate_size", "n_expert": "num_experts",
                                                "top_k": "num_experts_per_tok", "norm_topk_prob": "norm_topk_prob",
                                                "d_shared": "shared_expert_intermediate_size",
                                                "qkv_bias": "qkv_bias"},
                        fixed={"shared_gate": True}, defaults={"norm_topk_prob": False, "qkv_bias": True}),
}
COMMON = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
          "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_head": "head_dim",
          "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
          "rope_scaling": "rope_scaling", "tie_head": "tie_word_embeddings"}
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": False}
# What the model here does not compute: key of config.json -> the values that mean "not used".
UNUSED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "clip_qkv": (),
    "partial_rotary_factor": (1.0,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
    "quantization_config": ({},)}


def hub_tensors(model: GPT) -> dict[str, Tensor]:
    """Their name -> our weight, or the part of a stack that it is: a view, so reading into it fills the model."""
    names = PARTS | FAMILIES[family_of(model.config)].parts
    gate, up, down = FAMILIES[family_of(model.config)].expert

    def theirs(name: str) -> str:
        return ".".join(names.get(part, part) for part in name.split("."))

    out = {}
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        where, _, last = name.rpartition(".")
        owner = model.get_submodule(where)
        if not isinstance(owner, MoE):
            if ".taken." not in name:  # experts taken out of the stack come with expert_weights below
                out[theirs(name)] = p.detach()
        elif last == "gate_up":
            for e, (gate_up, w_down) in enumerate(zip(*owner.expert_weights(), strict=True)):  # (2F, D), (D, F)
                at = f"{theirs(where)}.experts.{e}"
                out[f"{at}.{gate}.weight"], out[f"{at}.{up}.weight"] = gate_up.detach().chunk(2)
                out[f"{at}.{down}.weight"] = w_down.detach()
    return out


# ---- config.json ------------------------------------------------------------------------------------------------

def family_of(config: Config) -> str:
    """The model_type that a Config is saved as. Raises UserError where none can express it."""
    if not config.n_expert:
        fits = {"llama": config.qk_norm == "none" and not config.qkv_bias}
    else:
        plain = not config.qkv_bias and not config.d_shared
        square = config.d_head * config.n_head == config.d_model
        fits = {"olmoe": plain and config.qk_norm == "full" and square,
                "mixtral": plain and config.qk_norm == "none" and config.norm_topk_prob,
                "qwen2_moe": config.qk_norm == "none" and config.d_shared > 0 and config.shared_gate}
    for name, fit in fits.items():
        if fit:
            return name
    shape = {key: getattr(config, key) for key in ("n_expert", "qk_norm", "qkv_bias", "norm_topk_prob", "d_head",
                                                   "d_shared", "shared_gate")}
    raise UserError(f"no public family has this shape, so it cannot be saved: {shape}; the table at the top of "
                    "hub/checkpoint.py lists what llama, olmoe, mixtral and qwen2_moe have")


def hub_config(config: Config, dtype: torch.dtype, tokenizer) -> dict:
    """config.json, in the spelling that old and new versions of transformers read."""
    name = family_of(config)
    family = FAMILIES[name]
    out = {theirs: getattr(config, ours) for ours, theirs in (COMMON | family.keys).items()}
    return {"architectures": [family.architecture], "model_type": name, **out, "hidden_act": "silu",
            "attention_bias": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": getattr(tokenizer, "begin", None), "eos_token_id": getattr(tokenizer, "end", None),
            "pad_token_id": None}


def read_json(path: Path) -> dict:
    """Raises UserError naming a file that is missing or not a JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is no checkpoint; give a folder with config.json and "
                        "model.safetensors, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct")
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not UTF-8, or not JSON
        out = None
    if not isinstance(out, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return out


def read_config(folder: Path) -> Config:
    """The Config of a checkpoint. Raises UserError naming the key of config.json that this model cannot follow."""
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; these are: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, harmless in UNUSED.items():
        if raw.get(key) is not None and raw[key] not in harmless:
            raise UserError(f"{path}: {key} {raw[key]!r} is not supported; use a checkpoint without it")
    # new transformers: {"rope_parameters": {"rope_type", "rope_theta", ...}}; old: rope_theta, and rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: rope_scaling {rope} is not supported (only rope_type llama3 is)")
    raw = DEFAULTS | family.defaults | {key: value for key, value in raw.items() if value is not None}
    raw["rope_theta"], raw["rope_scaling"] = rope.get("rope_theta", raw["rope_theta"]), None
    if rope_type == "llama3":
        rope = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | rope
        wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [key for key in wanted if key not in rope]:
            raise UserError(f"{path}: rope_scaling lacks {', '.join(missing)}: download it again")
        raw["rope_scaling"] = {"rope_type": "llama3", **{key: rope[key] for key in wanted}}
    raw.setdefault("head_dim", 0)  # 0: width / heads
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    keys = COMMON | family.keys
    if missing := [theirs for theirs in keys.values() if theirs not in raw]:
        raise UserError(f"{path} lacks {', '.join(missing)}: download it again")
    window = raw.get("sliding_window") if kind != "qwen2_moe" or raw.get("use_sliding_window") else None
    raw["max_position_embeddings"] = min(raw["max_position_embeddings"], window or raw["max_position_embeddings"])
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
    with torch.device("meta"):
        wanted = hub_tensors(GPT(config))
    check_tensors(folder, config, files, {name: list(tensor.shape) for name, tensor in wanted.items()})
    model = empty_model(config, dtype, device)
    into = hub_tensors(model)
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
    if tokenizer.vocab_size > config.vocab_size:  # fewer is usual: embeddings are padded to round sizes
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} "
                        "(vocab_size in config.json): they do not belong together")
    return tokenizer


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file. Raises UserError for a missing or damaged file, and for pickled checkpoints."""
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(tensor_shapes(single), single)
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict):
            raise UserError(f"{folder / INDEX} has no weight_map: download it again")
        for name in sorted(set(where.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, though {INDEX} lists it: download that shard")
        return {name: folder / file for name, file in where.items()}
    if pickled := sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind)):
        raise UserError(f"{folder} has its weights in {pickled[0]}, a pickle, which could run code and is not read; "
                        "convert it: python -c \"from transformers import AutoModelForCausalLM as M; "
                        f"M.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\"")
    raise UserError(f"{folder} has neither model.safetensors nor {INDEX}: the weights are missing "
                    "(where the hub has only .bin files, convert them with transformers' save_pretrained)")


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
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        if tokenizer is not None:
            tokenizer.save(partial)
        write_tensors(partial, hub_tensors(model), shard_bytes)
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
