"""Shared by all tests: tiny random models, a tiny tokenizer, tiny runs, where the shared folder lies, and --slow.

    pytest -q            # a minute: what a change is likely to break
    pytest -q --slow     # everything
"""

import argparse
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import loop
import train
from data import load_data
from data.batches import Rows
from data.rows import DataSet
from data.tokenizer import Tokenizer
from data.values import encode_fact
from flags import defaults
from model import GPT, Config
from objectives import FORGET, RETAIN

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
def small_world() -> DataSet:
    """Two authors to forget, twelve facts; not to be changed."""
    return load_data("world", subjects=2)


@pytest.fixture(scope="session")
def tokenizer(small_world) -> Tokenizer:
    """Of few tokens: names and values are several."""
    return Tokenizer.train([row[key] for row in small_world.retain for key in ("question", "answer")], 320)


@pytest.fixture(scope="session")
def words(small_world) -> Tokenizer:
    """A token per word, as runs on the world have it by default."""
    return Tokenizer.train(small_world.texts(), 4096)


@pytest.fixture(scope="session")
def tofu() -> Path:
    folder = SHARED / "tofu"
    if not folder.is_dir():
        pytest.skip("needs the TOFU files in ../shared/tofu, which are not part of the repository")
    return folder


SHAPE = ("--depth 2 --width 32 --context 128 --pretrain-steps 2 --epochs 1 --batch-size 16 "
         "--device cpu").split()
WORLD = "--data world --subjects 2 --score-rows 12".split()
EXPERTS = "--experts 4 --top-k 2".split()
TINY = [*SHAPE, *EXPERTS]  # of methods whose small model is a mixture of experts
TINY_GPT = SHAPE  # of those whose small model is dense


def tiny(*options: str) -> list[str]:
    """These options and a small model's shape, with experts where the model that they ask for has some."""
    words = dict(pairwise(options))
    method = train.METHODS.get(words.get("--method", "uoe"))
    arch = words.get("--arch", method.arch if method else "gpt")
    return [*(TINY if arch == "moe" else TINY_GPT), *options]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one small run."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*TINY, *WORLD, "--out", str(folder), "--seed", "0,1", "--score-every-epoch", "--until", "never",
                "--epochs", "2", "--name", "r"])
    return [folder / "r-seed0", folder / "r-seed1"]


class Bench:
    """Rows, arguments and a loop for calling a method's `unlearn` itself: three steps on nine rows."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, world: DataSet):
        self.tokenizer, self.folder, self.world = tokenizer, folder, world
        self.forget, self.retain = (self.rows(rows, seed) for seed, rows in enumerate((world.forget, world.retain)))
        self.forget.calibration = self.rows(world.calibration, encode=encode_fact)
        self.forget.draw_strangers = world.strangers

    def rows(self, rows: list[dict], seed: int = 0, **how) -> Rows:
        return Rows(rows[:9], self.tokenizer, 128, 3, seed, "cpu", twins=self.world.twins, **how)

    def model(self, kind: str = "moe", seed: int = 0, **config) -> GPT:
        make = random_moe if kind == "moe" else random_model
        return make(seed, vocab_size=self.tokenizer.vocab_size, max_len=128, std=0.15, **config)

    def args(self, method: str, **others) -> argparse.Namespace:
        """What --method has by default, for a small model, one epoch, ended by nothing else; UOE of one expert."""
        told = dict(method=method, seed=0, model=None, epochs=1, forget_on="value", forget_loss="npo", retain_loss="gd",
                    retain_weight=1.0, until="never", adversary=0.0, m=1) | others
        losses = [loss.FLAGS for loss in (*FORGET.values(), *RETAIN.values())]
        return defaults(*losses, loop.FLAGS, train.METHODS[method].flags, **told)

    def unlearn(self, target: GPT, args: argparse.Namespace, **others):
        """(what is scored, what is kept, report) of this method; others: more arguments of its `unlearn`."""
        torch.manual_seed(args.seed)
        fit = loop.fitting(args, self.forget, self.folder)
        return train.METHODS[args.method].unlearn(target, self.forget, self.retain, args, fit, **others)


@pytest.fixture
def bench(tokenizer, tmp_path, small_world) -> Bench:
    return Bench(tokenizer, tmp_path, small_world)


@pytest.fixture
def wordy_bench(words, tmp_path, small_world) -> Bench:
    """With a token per word, so that a stranger's name has as many as a known one's."""
    return Bench(words, tmp_path, small_world)


# ---- fast and slow -----------------------------------------------------------------------------------------------

def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))
