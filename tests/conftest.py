"""Shared by all tests: tiny random models, a tiny tokenizer, and where the shared folder lies."""

from pathlib import Path

import pytest
import torch

import train
from data.authors import make_world, write_world
from data.tokenizer import Tokenizer
from model import GPT, Config

SHARED = Path(__file__).resolve().parents[2] / "shared"


def random_model(seed: int = 0, std: float = 0.3, **config) -> GPT:
    """A small decoder whose weights are far larger than at init (norms and biases too), so that mistakes show."""
    shape = dict(vocab_size=61, n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=24, max_len=64) | config
    torch.manual_seed(seed)
    model = GPT(Config(**shape))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, std)
    return model.eval()


def random_moe(seed: int = 0, **config) -> GPT:
    return random_model(seed, **(dict(n_expert=7, top_k=3, qk_norm="full", d_ff=16) | config))


@pytest.fixture(scope="session")
def dense():
    """Factory: dense(seed=0, **config) -> GPT."""
    return random_model


@pytest.fixture(scope="session")
def sparse():
    """Factory: sparse(seed=0, **config) -> GPT with 7 experts, top 3."""
    return random_moe


@pytest.fixture(scope="session")
def factories():
    """Both factories by name, for tests that run on either kind."""
    return {"dense": random_model, "moe": random_moe}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    world = make_world(0, authors=4, countries=8)
    return Tokenizer.train([row[key] for row in world["retain"] for key in ("question", "answer")], 320)


@pytest.fixture(scope="session")
def tofu() -> Path:
    folder = SHARED / "tofu"
    if not folder.is_dir():
        pytest.skip("needs the TOFU files in ../shared/tofu, which are not part of the repository")
    return folder


TINY = ("--layers 2 --width 16 --heads 2 --ff 16 --experts 4 --top-k 2 --vocab-size 320 --context 128 "
        "--pretrain-epochs 1 --pretrain-batch-size 64 --epochs 1 --batch-size 16 --device cpu").split()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one small run."""
    folder = tmp_path_factory.mktemp("runs")
    write_world(folder / "world", {name: rows[:20] for name, rows in make_world(0, authors=4, countries=8).items()})
    for seed in ("0", "1"):
        train.main([*TINY, "--data", str(folder / "world"), "--out", str(folder), "--seed", seed, "--path",
                    "--epochs", "2", "--name", f"r-seed{seed}"])
    return [folder / "r-seed0", folder / "r-seed1"]
