"""Everything that --device cuda runs, on a pretended device: a tensor left behind on the CPU is an error, as on a GPU.

The pretended device computes on the CPU, so that runs end and their numbers are right; what it adds is the question
that a GPU asks of every operation: do all of your tensors lie here?
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import WORLD, tiny
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import eval as scoring
import train
from baselines import METHODS as BASELINES
from model import GPT
from uld import LogitDifference

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)  # a GPU takes CPU numbers there


class OnCard(torch.Tensor):
    """A CPU tensor, `inner`, that says it lies on the device "card"."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="card:0", requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_card(func, args, kwargs or {})


def on_card(func, args, kwargs):
    """Run func on what the tensors hold; raise RuntimeError where some lie on the card and some do not."""
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    here = [t for t in given if isinstance(t, OnCard)]
    strays = [t for t in given if not isinstance(t, OnCard) and t.dim() > 0]
    if here and strays and func not in (*MOVES, *INDEXED):
        raise RuntimeError(f"{func}: expected all tensors on one device, but {len(strays)} of {len(given)} are not")
    device = kwargs.get("device")
    to_card = device is not None and torch.device(device).type == "card"
    if to_card:
        kwargs = kwargs | {"device": "cpu"}
    if func is aten._fused_sdp_choice.default:
        return 0  # the plain formula
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, OnCard) else t, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if to_card or (here and device is None):
        out = tree_map(lambda t: OnCard(t) if isinstance(t, torch.Tensor) and not isinstance(t, OnCard) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if here else out
    return out


class CPUGenerator(torch.Generator):
    """Whatever device it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Card(TorchDispatchMode):
    """While it is on, tensors are made on the card where that is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_card(func, args, kwargs or {})


@pytest.fixture(scope="module")
def registered() -> None:
    _setup_privateuseone_for_python_backend("card")


@pytest.fixture
def card(registered, monkeypatch) -> Iterator[str]:
    """The device's name. torch.tensor and torch.Generator know real devices only."""
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **more: tensor(data, **more).to(device or "cpu"))
    monkeypatch.setattr(torch, "Generator", CPUGenerator)
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to keeps tied weights tied, as on a GPU
    with Card():
        yield "card"
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_tensor_left_on_the_cpu_is_noticed(card):
    there = torch.ones(3, device=card)
    assert there.device.type == "card" and (there + 1).device.type == "card"
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        there + torch.ones(3)
    assert (there * torch.tensor(2.0)).sum().item() == 6  # numbers may lie anywhere, as on a GPU


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_and_its_gradients_are_the_cpus(factories, card, kind, dtype):
    model, tokens = factories[kind](std=0.1).to(dtype), torch.randint(61, (2, 6))
    there = GPT(model.config).to(dtype)
    there.load_state_dict(model.state_dict())
    there = there.to(card)
    for m, t in ((model, tokens), (there, tokens.to(card))):
        m(t).float().square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), there.parameters(), strict=True):
        assert q.grad.device.type == "card" and q.grad.dtype == dtype, name
        if dtype == torch.float32:  # bf16's rounding may send a token to another expert
            assert_close(q.grad.cpu(), p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_decoding_says_what_the_cpu_says(factories, card, kind):
    target, assistant = factories[kind](), factories[kind](seed=1)
    both = LogitDifference(target, assistant, 0.5, 0.1)
    tokens, pad = torch.tensor([[1, 1, 5, 9], [3, 4, 8, 2], [1, 7, 7, 1]]), torch.tensor([2, 0, 1])
    of = torch.tensor([0, 0, 1, 2])
    expected = both.generate(tokens, 20, pad=pad, end=[4, 9], of=of)
    got = both.to(card).generate(tokens.to(card), 20, pad=pad.to(card), end=[4, 9], of=of.to(card))
    assert got.tolist() == expected.tolist()


@pytest.mark.slow
def test_a_target_that_waits_on_the_cpu_is_asked_there(tmp_path, card):
    """By one loss for its logits, by the other for its hidden states."""
    asked, logs = {"--forget-loss": "di", "--retain-loss": "hidden"}, []
    for flags in ([], ["--target-on-cpu"]):
        name = "there" if flags else "here"
        train.main([*tiny("--method", "full", *(word for pair in asked.items() for word in pair)), *WORLD, *flags,
                    "--out", str(tmp_path), "--name", name, "--device", "card"])
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Shared, so that each architecture is pretrained once."""
    return tmp_path_factory.mktemp("out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uoe", "uld", *BASELINES])
def test_every_method_trains_scores_and_decodes_there(out, card, method):
    train.main([*tiny("--method", method), *WORLD, "--out", str(out), "--name", method, "--device", "card"])
    metrics = json.loads((out / method / "metrics.json").read_text())
    assert set(metrics) == {"target", "reference", "unlearned", "run"}
    if method in ("uoe", "uld"):
        pushes = ["relearn", "int8", *(["experts"] if method == "uoe" else [])]
        scoring.main([str(out / method), "--attack", *pushes, "--device", "card"])
