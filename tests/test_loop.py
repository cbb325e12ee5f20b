"""loop.py: the schedule, low-precision weights, what ends a run."""

from itertools import pairwise

import pytest
import torch

from loop import Weights, fit, learning_rate


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 5) and max(rates) == 2.0 == rates[4]
    assert rates[-1] == pytest.approx(0.2, rel=0.01) and all(a >= b for a, b in pairwise(rates[5:]))


def test_bf16_weights_learn_by_updates_below_their_rounding(tmp_path):
    """1000 steps of 1e-5 move a weight of 1 by 1e-2; rounded at every step to bf16 (spacing 1/128) it never would."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(3))
    for weight, name in ((p, "low"), (exact, "full")):
        (tmp_path / name).mkdir()
        fit([weight], lambda step, w=weight: {"loss": w.float().sum()}, 1000, 2e-5, tmp_path / name, "x", 0,
            weight_decay=0.0)
    assert p.dtype == torch.bfloat16 and (exact < 0.99).all()
    assert torch.equal(p.detach(), exact.detach().bfloat16())


def test_float32_weights_are_the_optimisers_own():
    p = torch.nn.Parameter(torch.ones(2))
    assert Weights([p]).full[0] is p


def test_slow_parameters_learn_at_their_share_of_the_rate(tmp_path):
    fast, slow = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    fit([fast, slow], lambda step: {"loss": (fast + slow).sum()}, 10, 1e-3, tmp_path, "x", 0, weight_decay=0.0,
        slow=(slow,), slow_factor=0.25)
    assert slow.item() == pytest.approx(0.25 * fast.item(), rel=1e-4) and fast.item() < -5e-3


def test_a_step_that_reaches_nothing_that_trains_changes_nothing(tmp_path):
    """As where one expert trains alone and no token of the batch comes to it."""
    p = torch.nn.Parameter(torch.ones(2))
    report = fit([p], lambda step: {"loss": p.sum() if step == 1 else torch.ones(())}, 2, 0.1, tmp_path, "x", 0,
                 weight_decay=0.0)
    after = p.detach().clone()
    assert report == {"steps": 2, "train_seconds": report["train_seconds"], "diverged": False} and (after < 1).all()
    p = torch.nn.Parameter(torch.ones(2))
    fit([p], lambda step: {"loss": torch.ones(())}, 3, 0.1, tmp_path, "x", 0, weight_decay=0.0)
    assert torch.equal(p.detach(), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(tmp_path, dtype):
    def start():
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(5).to(dtype))

    def losses(p, stop=10**9):
        def at(step):
            if step == stop:
                raise KeyboardInterrupt
            return {"loss": ((p.float() - step % 3) ** 2 * torch.rand(5)).sum()}  # random, but by (seed, step)
        return at

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    p, q = start(), start()
    fit([p], losses(p), 20, 0.1, tmp_path / "whole", "x", 3, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        fit([q], losses(q, stop=14), 20, 0.1, tmp_path / "cut", "x", 3, save_every=4)
    q = start()
    report = fit([q], losses(q), 20, 0.1, tmp_path / "cut", "x", 3, save_every=4, resume=True)
    assert torch.equal(p, q) and report["steps"] == 20
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
