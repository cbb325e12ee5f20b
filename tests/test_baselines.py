"""baselines.py: what the methods that ULD and UOE are compared with train, and what they leave alone."""

import copy
import json
import math

import pytest
import torch
from torch.testing import assert_close

from baselines import METHODS, LogitOffset, experts_reaching
from belief import row_log_prob
from errors import UserError
from model import GPT
from moe import MoE
from objectives import cross_entropy
from uld import add_lora, first_layers
from uoe import expert_attribution

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


# ---- what is chosen ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lora_goes_where_it_is_told(factories, kind):
    counts = {}
    for targets in ("all", "attn", "mlp"):
        model = factories[kind]()
        counts[targets] = sum(p.numel() for p in add_lora(model, 2, 2.0, targets=targets))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(targets == "all" or f".{targets}." in name for name in names) and names
    assert counts["attn"] + counts["mlp"] == counts["all"]


@pytest.mark.parametrize("p, expected", [
    (0.0, [(0, 1), (1, 0)]), (0.5, [(0, 1), (1, 0)]), (0.51, [(0, 1), (0, 2), (1, 0)]),
    (0.6, [(0, 1), (0, 2), (1, 0), (1, 1)]), (1.0, [(0, 1), (0, 2), (0, 3), (0, 0), (1, 0), (1, 1)]),
])
def test_esft_takes_the_fewest_experts_that_reach_p(p, expected):
    """Shares 0.1, 0.5, 0.25, 0.15 and 4/7, 3/7; the second layer's sum is 0.7."""
    table = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.4, 0.3, 0.0, 0.0]])
    assert experts_reaching(table, p) == expected


# ---- the methods, by the same interface as ULD's and UOE's -------------------------------------------------------

def state(model) -> dict[str, torch.Tensor]:
    """Weights by name, experts that stand apart in their places of the stack."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.put_back()
    return model.state_dict()


def changed(before: dict, model) -> set[str]:
    return {name for name, value in state(model).items() if not torch.equal(value, before[name])}


CASES = [(method, kind) for method in METHODS for kind in ("dense", "moe") if method != "esft" or kind == "moe"]


@pytest.mark.parametrize("method, kind", CASES)
def test_every_method_leaves_the_target_and_changes_what_is_scored(bench, method, kind):
    target = bench.model(kind)
    before, tokens = state(target), torch.tensor([[5, 9, 2, 44]])
    model, kept, report = bench.unlearn(target, bench.args(method, lr=0.01, lora_rank=4))
    assert not changed(before, target) and all(p.requires_grad for p in target.parameters())
    assert all(isinstance(part, GPT) for part in kept.values()) and report["steps"] == 3 and not report["diverged"]
    with torch.no_grad():
        assert not torch.equal(model(tokens), target(tokens))
        config = vars(bench.args(method)) | report
        again = METHODS[method].reopen(target, kept, config)
        assert torch.equal(again(tokens), model(tokens))  # what is kept is what was scored


@pytest.mark.parametrize("frozen", [False, True])
def test_full_changes_every_parameter(bench, frozen):
    """Of a target, too, that nobody meant to train."""
    target = bench.model("dense").requires_grad_(not frozen)
    model, kept, report = bench.unlearn(target, bench.args("full", lr=0.01))
    assert changed(state(target), model) == set(state(target)) and kept == {"model": model}
    assert report["trainable_parameters"] == sum(p.numel() for p in target.parameters())


@pytest.mark.parametrize("targets, parts", [("all", {"attn", "mlp"}), ("attn", {"attn"}), ("mlp", {"mlp"})])
def test_lora_changes_the_linear_layers_of_the_parts_it_is_given(bench, targets, parts):
    target = bench.model("moe")
    model, _, _ = bench.unlearn(target, bench.args("lora", lr=0.01, lora_rank=4), targets=targets)
    names = changed(state(target), model)
    assert {name.split(".")[2] for name in names} == parts and not any("router" in name for name in names)


def test_esft_changes_the_chosen_experts_alone(bench):
    target = bench.model("moe")
    model, _, report = bench.unlearn(target, bench.args("esft", lr=0.01, esft_p=0.3))
    places = experts_reaching(expert_attribution(target, bench.forget.in_order()), 0.3)
    assert report["unlearned_experts"] == [list(place) for place in places]
    assert {layer for layer, _ in places} == {0, 1, 2}
    for layer in range(3):
        for part in ("gate_up", "down"):
            name = f"blocks.{layer}.mlp.{part}"
            same = [bool(torch.equal(a, b)) for a, b in zip(state(target)[name], state(model)[name], strict=True)]
            assert same == [(layer, expert) not in places for expert in range(7)]
    assert all(name.endswith(("gate_up", "down")) for name in changed(state(target), model))


def test_every_expert_that_rmu_is_to_train_is_trained(bench):
    """The state that is steered lies above all of them."""
    target = bench.model("moe")
    args = bench.args("esft", lr=0.01, esft_p=0.3, forget_loss="rmu", retain_loss="hidden")
    model, _, report = bench.unlearn(target, args)
    places = report["unlearned_experts"]
    assert {layer for layer, _ in places} == {0, 1, 2} and args.rmu_layer is None
    for layer, expert in places:
        name = f"blocks.{layer}.mlp.gate_up"
        assert not torch.equal(state(target)[name][expert], state(model)[name][expert])


def test_an_offset_starts_as_the_target_and_trains_its_assistant_alone(bench):
    """At step 0 the difference is 0: the first losses are those of the target."""
    target = bench.model("dense")
    args = bench.args("offset", lr=0.01, lora_rank=4, lora_dropout=0.0, assistant_layers=1, offset_alpha=0.5)
    model, kept, _ = bench.unlearn(target, args)
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    batch = bench.retain.batch(0)
    with torch.no_grad():
        retain = cross_entropy(target(batch.tokens, at=batch.scored), batch.answers).item()
    assert first["forget"] == pytest.approx(2 / args.npo_beta * math.log(2), rel=1e-4)
    assert first["retain"] == pytest.approx(retain, rel=1e-4)
    assert set(kept) == {"assistant", "before"} and model.alpha == 0.5
    assert not changed(state(first_layers(target, 1)), kept["before"])
    assert all(name.startswith("blocks.0.") for name in changed(state(kept["before"]), kept["assistant"]))


@pytest.mark.slow
def test_divergence_trains_one_assistant_on_both_sets_and_one_on_what_is_kept(bench):
    target = bench.model("dense")
    args = bench.args("divergence", lr=0.01, lora_rank=4, lora_dropout=0.0, assistant_layers=1, epochs=20)
    model, kept, _ = bench.unlearn(target, args)
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    assistant = first_layers(target, 1)
    with torch.no_grad():
        batches = [rows.batch(0) for rows in (bench.forget, bench.retain)]
        forget, retain = (cross_entropy(assistant(b.tokens, at=b.scored), b.answers).item() for b in batches)
    assert first["forget"] == pytest.approx(forget, rel=1e-4)
    assert first["retain"] == pytest.approx(2 * retain, rel=1e-4)  # both start there and both learn it
    assert set(kept) == {"without", "with"} and isinstance(model, LogitOffset)
    seen, without = (bench.forget.each(kept[name], row_log_prob).mean() for name in ("with", "without"))
    assert seen > without  # and so the difference takes the forget rows away
    assert bench.forget.each(model, row_log_prob).mean() < bench.forget.each(target, row_log_prob).mean()


@pytest.mark.parametrize("loss", [dict(forget_loss="rmu"), dict(retain_loss="hidden")])
def test_an_offset_has_no_hidden_states_to_steer(bench, loss):
    with pytest.raises(UserError, match="offset has no hidden states"):
        METHODS["offset"].check(bench.args("offset", **loss), bench.model("dense").config)


@pytest.mark.parametrize("method", ["offset", "divergence"])
def test_an_assistant_deeper_than_its_target_is_refused_before_anything_is_trained(bench, method):
    with pytest.raises(UserError, match="--assistant-layers 9 is not between 1 and the target's 3"):
        METHODS[method].check(bench.args(method, assistant_layers=9), bench.model("dense").config)


@pytest.mark.parametrize("losses", [("npo", "kl"), ("di", "gd"), ("rmu", "hidden"), ("stranger", "gd")])
def test_a_target_that_waits_on_the_cpu_teaches_the_same(wordy_bench, losses):
    """tests/on_device.py has it with two devices."""
    target, made = wordy_bench.model("dense"), []
    for on_cpu in (False, True):
        args = wordy_bench.args("full", forget_loss=losses[0], retain_loss=losses[1], target_on_cpu=on_cpu)
        made.append(wordy_bench.unlearn(target, args)[0].state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(torch.equal(made[0][name], value) for name, value in target.state_dict().items())
