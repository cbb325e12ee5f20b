"""Interim: our own models to a folder and back."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from model import GPT, Config


def save(model, tokenizer, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.config)))
    tokenizer.save(folder)


def load(folder, dtype=torch.float32, device="cpu"):
    folder = Path(folder)
    model = GPT(Config(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device, dtype).eval(), Tokenizer.load(folder)
