"""uoe.py: which expert the forget set engages (equation 2), the anchor (equation 3), training one expert."""

import argparse
import copy
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from belief import row_log_prob
from data.batches import IGNORE, Batch, Example, collate, in_order
from data.world import TOPICS
from errors import UserError
from metrics.routing import expert_shares, routing_overlap
from model import Config, Trace, sharing
from moe import MoE, Routing
from objectives import cross_entropy, npo
from uoe import (
    adversarial_stem,
    affinity_table,
    anchor_loss,
    anchor_losses,
    check,
    choose_experts,
    deep_as_strangers,
    expert_attribution,
    isolate,
    layer_choice,
    own_experts,
    steering,
    unlearn,
)

ROWS = [[5, 9, 2, 44, 7], [3], [8, 8, 1], [60, 0, 17, 4, 33, 21, 6], [12, 13]]
EXAMPLES = [Example(row, [IGNORE] * len(row)) for row in ROWS]


def equation_2(model) -> torch.Tensor:
    """Sequences one by one, tokens one by one, the router by hand."""
    total = torch.zeros(model.config.n_layer, model.config.n_expert)
    with torch.no_grad():
        for row in ROWS:
            for layer in range(model.config.n_layer):
                seen = model.blocks[layer].mlp_norm(model.stem(torch.tensor([row]), layer))[0]
                for u in seen:
                    s = (model.moe(layer).router.weight @ u).softmax(0).tolist()
                    for i in sorted(range(len(s)), key=lambda i: -s[i])[: model.config.top_k]:
                        total[layer, i] += s[i] / len(row)
    return total / len(ROWS)


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_attribution_is_equation_2_at_any_batch_size(sparse, batch_size, renormalised):
    model = sparse(std=0.2, norm_topk_prob=renormalised)
    got = expert_attribution(model, in_order(EXAMPLES, batch_size))
    assert got.shape == (3, 7) and (got.sum(1) <= 1).all() and got.dtype == torch.float32
    assert_close(got, equation_2(model), rtol=1e-4, atol=1e-5)


def test_attribution_does_not_see_padding(sparse):
    model, batch = sparse(), collate(EXAMPLES)
    wide = Batch(*(torch.nn.functional.pad(t, (0, 4), value=v) for t, v in
                   ((batch.tokens, 11), (batch.labels, IGNORE), (batch.mask, False))), batch.index)
    assert_close(expert_attribution(model, [wide]), expert_attribution(model, [batch]), rtol=1e-4, atol=1e-6)


def test_with_all_experts_chosen_each_layer_sums_to_one(sparse):
    assert_close(expert_attribution(sparse(top_k=7), [collate(EXAMPLES)]).sum(1), torch.ones(3))


def test_attribution_stops_after_enough_tokens(sparse):
    """Batches of 7, 5, 3, 2 and 1 tokens: 8 tokens are reached in the second."""
    model, batches = sparse(), list(in_order(EXAMPLES, 1))
    assert torch.equal(expert_attribution(model, batches, tokens=8), expert_attribution(model, batches[:2]))
    assert torch.equal(expert_attribution(model, batches, tokens=1000), expert_attribution(model, batches))


def test_attribution_needs_experts_and_rows(dense, sparse):
    with pytest.raises(UserError, match="this model is dense"):
        expert_attribution(dense(), [collate(EXAMPLES)])
    with pytest.raises(UserError, match="at least one row"):
        expert_attribution(sparse(), [])


# ---- choosing ---------------------------------------------------------------------------------------------------

TABLE = torch.tensor([[0.10, 0.40, 0.20], [0.50, 0.05, 0.30]])


@pytest.mark.parametrize("m, layer, sign, expected", [
    (1, "all", 1, [(1, 0)]),
    (3, "all", 1, [(1, 0), (0, 1), (1, 2)]),
    (2, "top", 1, [(1, 0), (1, 2)]),
    (1, "all", -1, [(1, 1)]),
    (3, "all", -1, [(1, 1), (0, 0), (0, 2)]),
    (2, "top", -1, [(1, 1), (1, 2)]),
    (2, 0, 1, [(0, 1), (0, 2)]),
    (1, 0, -1, [(0, 0)]),
])
def test_experts_by_affinity(m, layer, sign, expected):
    """The lowest affinity is the highest of its negative."""
    assert choose_experts(sign * TABLE, asked(m=m, layer=layer)) == expected


def test_random_experts_follow_the_scores_drawn_and_not_the_table():
    def draw(seed, m=1, layer="all"):
        scores = torch.rand(TABLE.shape, generator=torch.Generator().manual_seed(seed))
        return choose_experts(scores, asked(m=m, layer=layer))

    assert draw(3, 4) == draw(3, 4) and len(set(draw(3, 6))) == 6
    assert {place for seed in range(100) for place in draw(seed)} == {(i, e) for i in range(2) for e in range(3)}
    assert all(len({layer for layer, _ in draw(seed, 3, "top")}) == 1 for seed in range(20))


@pytest.mark.parametrize("m, layer", [(0, "all"), (7, "all"), (4, "top"), (-1, "top"), (4, 1)])
def test_more_experts_than_there_are_is_refused(m, layer):
    with pytest.raises(UserError, match=f"--m {m} is not between 1 and"):
        choose_experts(TABLE, asked(m=m, layer=layer))


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(UserError, match=f"--layer {layer} does not exist: layers go from 0 to 1"):
        choose_experts(TABLE, asked(layer=layer))


def test_an_unknown_layer_is_refused():
    says = "botom is neither all, last, top, a layer's number nor LAYER,EXPERT"
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        layer_choice("botom")
    assert [layer_choice(text) for text in ("all", "last", "top", "3", "2,6")] == ["all", "last", "top", 3, (2, 6)]


@pytest.mark.parametrize("text", ["1,2,3", "-1,0", "0,-1", "a,b", "1,", "", "1,1.5", "9" * 30 + ",0"])
def test_what_is_no_place_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither all, last, top, a layer's number nor"):
        layer_choice(text)


def config_of(**more) -> Config:
    return Config(n_layer=3, n_expert=7, top_k=2, **more)


def asked(**options) -> argparse.Namespace:
    return argparse.Namespace(**dict(m=1, layer="last", attribution_tokens=0) | options)


@pytest.mark.parametrize("where", [(3, 0), (0, 7)])
def test_a_place_that_does_not_exist_is_refused(where):
    says = f"--layer {where[0]},{where[1]} does not exist: layers go from 0 to 2, experts from 0 to 6"
    with pytest.raises(UserError, match=says):
        check(asked(layer=where), config_of())


def test_a_place_that_exists_is_itself():
    check(asked(layer=(2, 6)), config_of())
    assert choose_experts(torch.zeros(3, 7), asked(layer=(2, 6))) == [(2, 6)]


def test_the_flags_choose_among_all_layers_the_last_one_the_top_one_or_one_by_number():
    affinity = torch.tensor([[0.1, 0.5, 0.2], [0.6, 0.1, 0.2], [0.3, 0.0, 0.4]])
    for layer, expected in (("all", [(1, 0), (0, 1)]), ("last", [(2, 2), (2, 0)]), ("top", [(1, 0), (1, 2)]),
                            (0, [(0, 1), (0, 2)])):
        assert choose_experts(affinity, asked(layer=layer, m=2)) == expected


@pytest.mark.parametrize("layer, own, expected", [
    ("last", [(2, 0), (2, 2)], [(2, 2), (2, 0)]),  # all of them, best first
    ("last", [(1, 0), (0, 0), (0, 1)], [(1, 0)]),  # the last layer that has any
    ("last", [], [(2, 2)]), (0, [(1, 0)], [(0, 1)]), ("top", [(2, 0)], [(1, 0)]),  # none there: one, and whosever it is
    ("all", [(0, 1), (2, 0)], [(0, 1), (2, 0)]), ((0, 2), [(1, 0)], [(0, 2)]),
])
def test_those_experts_that_are_the_topics_own_are_chosen(layer, own, expected):
    affinity = torch.tensor([[0.1, 0.5, 0.2], [0.6, 0.1, 0.2], [0.3, 0.0, 0.4]])
    marked = torch.zeros(3, 3, dtype=torch.bool)
    for place in own:
        marked[place] = True
    assert choose_experts(affinity, asked(layer=layer, m="own"), marked=marked) == expected
    assert len(choose_experts(affinity, asked(layer=layer, m="own"))) == 1  # without having asked which


def test_an_expert_is_the_topics_own_by_twice_an_even_share_and_twice_each_other_topics(bench):
    target, others = bench.model(), bench.forget.others()  # random routers, so topics engage experts much alike
    topics = sorted(set(TOPICS) - {"author"})
    assert sorted({row["topic"] for row in others.rows}) == topics
    known = {row["subject"] for row in bench.world.background}
    assert known and not known & {row["subject"] for row in others.rows}
    rivals = [expert_attribution(target, others.like([row for row in others.rows if row["topic"] == topic]).in_order())
              for topic in topics]
    highest = torch.stack(rivals).amax(0)  # (3, 7)
    affinity = 2 * highest + 1e-4
    affinity[0, 0] -= 2e-4
    affinity[0, 1] = affinity[1, 2] = 0.9  # the first of their layers
    shared = int(highest[2].argmax())
    affinity[2] = 2 * highest[2, shared] - 2e-4  # more than twice what others give to any expert but one
    affinity[2, shared] += 1e-4  # which is the first, and no more than twice
    expected = (affinity >= 2 / 7) & (affinity > 2 * highest)
    assert expected[2].sum() == 6
    expected[2] = False
    own = own_experts(target, affinity, others)
    assert own.equal(expected) and own[1, 2] and not own[0, 0]
    assert not own_experts(target, torch.full((3, 7), 2 / 7 - 1e-4), others).any()


def test_strangers_of_other_topics_are_asked_of_data_that_has_them(bench):
    bench.forget.draw_strangers = None
    with pytest.raises(UserError, match="this data has no strangers"):
        bench.unlearn(bench.model(), bench.args("uoe", m="own"))


@pytest.mark.parametrize("options, says", [
    (dict(layer=3), "--layer 3 does not exist"), (dict(m=8), "--m 8"), (dict(layer="all", m=22), "--m 22"),
    (dict(layer=(1, 1), m=2), "--layer 1,1 names the expert"),
    (dict(layer=(1, 1), attribution_tokens=9), "--layer 1,1 names the expert"),
    (dict(layer=(2, 0), rmu_layer=1), "--rmu-layer 1 lies below"), (dict(rmu_layer=1), "--rmu-layer 1 lies below"),
])
def test_what_cannot_be_chosen_is_said_before_anything_is_trained(options, says):
    with pytest.raises(UserError, match=says):
        check(asked(**options), config_of())


def test_what_can_be_chosen_passes():
    for options in (dict(), dict(m=7), dict(layer="all", m=21), dict(layer="top", rmu_layer=0), dict(rmu_layer=2),
                    dict(layer=(2, 0), rmu_layer=2), dict(m="own", rmu_layer=1)):
        check(asked(**options), config_of())


# ---- the anchor -------------------------------------------------------------------------------------------------

def routing() -> Routing:
    probs = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [[0.3, 0.6, 0.1], [0.0, 0.0, 1.0]]], requires_grad=True)
    weights, chosen = probs.topk(2, dim=-1)
    return Routing(probs, chosen, weights)


MASK = torch.tensor([[True, True], [True, False]])


def test_anchor_on_probabilities_by_hand():
    """a = (1, 0, 0): 0.25 + 0.09 + 0.04, 0.81 + 0.04 + 0.49, 0.49 + 0.36 + 0.01, mean of the three real tokens."""
    assert anchor_loss(routing(), [0], MASK).item() == pytest.approx((0.38 + 1.34 + 0.86) / 3)
    # a = (1, 0, 1): 0.25 + 0.09 + 0.64, 0.81 + 0.04 + 0.09, 0.49 + 0.36 + 0.81
    assert anchor_loss(routing(), [0, 2], MASK).item() == pytest.approx((0.98 + 0.94 + 1.66) / 3)


def test_anchor_on_the_top_k_by_hand():
    """g: (0.5, 0.3, 0), (0, 0.2, 0.7), (0.3, 0.6, 0): 0.25 + 0.09, 1 + 0.04 + 0.49, 0.49 + 0.36."""
    assert anchor_loss(routing(), [0], MASK, masked=True).item() == pytest.approx((0.34 + 1.53 + 0.85) / 3)


def test_only_the_unmasked_anchor_can_bring_an_expert_back():
    """At the second token expert 0 is outside the top two: g gives it no gradient, s does, towards more."""
    second = torch.tensor([[False, True], [False, False]])
    for masked in (True, False):
        r = routing()
        anchor_loss(r, [0], second, masked).backward()
        assert r.probs.grad[0, 1, 0].item() == pytest.approx(0 if masked else 2 * (0.1 - 1))


def test_a_run_with_the_masked_anchor_begins_at_its_value(bench):
    target, args = bench.model(), bench.args("uoe", layer=(1, 2))
    for masked in (True, False):
        bench.unlearn(target, args, masked=masked)
        first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
        batch, trace = bench.forget.batch(0), Trace()
        target.hidden(batch.tokens, trace=trace)
        expected = anchor_loss(trace.routing[1], [2], batch.mask, masked).item()
        assert first["anchor"] == pytest.approx(expected, rel=1e-4)


def test_anchors_of_several_layers_are_summed_each_over_its_own_experts():
    flat = Routing(torch.full((2, 2, 3), 1 / 3), torch.zeros(2, 2, 1, dtype=torch.long), torch.zeros(2, 2, 1))
    trace = Trace(routing={0: routing(), 2: flat})
    got = anchor_losses(trace, [(2, 1), (0, 2), (0, 0)], MASK)
    by_hand = (0.98 + 0.94 + 1.66) / 3 + (4 / 9 + 1 / 9 + 1 / 9)
    assert got.item() == pytest.approx(by_hand)


# ---- training one expert ----------------------------------------------------------------------------------------

def train(model, parameters, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    tokens = torch.randint(61, (6, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("places", [[(1, 4)], [(1, 4), (1, 0)], [(0, 2), (2, 6)]])
@pytest.mark.parametrize("train_router", [True, False])
def test_unlearning_experts_leaves_everything_else_bit_for_bit(sparse, places, train_router):
    target = sparse(std=0.2)
    before, model = state(target), sharing(target)
    parameters = isolate(model, places, train_router)
    routers = 7 * 32 * len({layer for layer, _ in places}) if train_router else 0
    assert sum(p.numel() for p in parameters) == len(places) * 3 * 16 * 32 + routers
    train(model, parameters)
    after = state(model)
    assert set(after) == set(before) and not changed(before, target)
    own = {id(p) for p in parameters}
    theirs = {p.data_ptr() for p in target.parameters()}
    assert {p.data_ptr() in theirs for p in model.parameters() if id(p) not in own} == {True}  # in memory once
    assert not any(p.data_ptr() in theirs for p in parameters)
    layers = {layer for layer, _ in places}
    for name, value in after.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if name.endswith("router.weight") and layer in layers and train_router:
            assert not torch.equal(value, before[name])
        elif name.endswith(("mlp.gate_up", "mlp.down")):
            for e in range(7):
                assert torch.equal(value[e], before[name][e]) == ((layer, e) not in places), (name, e)
        else:
            assert torch.equal(value, before[name]), name


def test_isolating_changes_no_output(sparse):
    model, tokens = sparse(), torch.tensor(ROWS[3:4])
    with torch.no_grad():
        before = model(tokens)
        isolate(model, [(1, 4)])
        assert torch.equal(model(tokens), before)


def test_the_affinity_table_names_the_highest_and_marks_the_unlearned():
    lines = affinity_table(TABLE, after=TABLE.flip(1), chosen=[(1, 0)], top=2).splitlines()
    assert "evenly spread, each would have 0.258" in lines[0]  # (0.70 + 0.85) / 2 / 3
    assert lines[1].split() == "layer 0: E1 0.400 -> 0.400 E2 0.200 -> 0.100".split()
    assert lines[2].split() == "layer 1: E0 0.500 -> 0.300 * E2 0.300 -> 0.500".split()


def test_a_rank_skips_the_more_wanted():
    table = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.3, 0.0]])
    assert choose_experts(table, asked(layer="all"), rank=2) == [(1, 0)]
    assert choose_experts(table, asked(m=2, layer="all"), rank=3) == [(1, 1), (0, 2)]
    assert choose_experts(table, asked(layer=1), rank=2) == [(1, 1)]
    for m, layer, rank in ((1, "all", 0), (1, "all", 7), (2, "all", 6), (1, 0, 4)):
        with pytest.raises(UserError, match="--m"):
            choose_experts(table, asked(m=m, layer=layer), rank)


def test_shared_experts_train_only_where_asked_and_present(sparse):
    model = sparse(qk_norm="none", d_shared=8, shared_gate=True)
    without = isolate(sharing(model), [(1, 2)])
    both = isolate(model, [(1, 2)], shared=True)
    assert len(both) == len(without) + 3  # gate, up, down; not the sigmoid gate
    assert model.moe(1).shared.up.weight.requires_grad and not model.moe(0).shared.up.weight.requires_grad
    with pytest.raises(UserError, match="no shared experts"):
        isolate(sparse(), [(1, 2)], shared=True)


# ---- the method -------------------------------------------------------------------------------------------------

def state(model) -> dict[str, torch.Tensor]:
    """Weights by name, experts that stand apart in their places of the stack."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.put_back()
    return model.state_dict()


def changed(before: dict, model) -> set[str]:
    return {name for name, value in state(model).items() if not torch.equal(value, before[name])}


def test_the_method_trains_the_expert_that_equation_2_names_and_its_router_and_leaves_the_target(bench):
    target = bench.model()
    before = state(target)
    wanted = int(expert_attribution(target, bench.forget.in_order())[1].argmax())
    model, kept, report = bench.unlearn(target, bench.args("uoe", lr=0.01, layer=1))
    assert kept == {"model": model} and report["unlearned_experts"] == [[1, wanted]]
    assert not changed(before, target) and all(p.requires_grad for p in target.parameters())
    assert changed(before, model) == {f"blocks.1.mlp.{part}" for part in ("router.weight", "gate_up", "down")}
    same = (state(model)["blocks.1.mlp.gate_up"] == target.moe(1).gate_up).flatten(1).all(1).tolist()
    assert same == [expert != wanted for expert in range(7)]
    expert = model.moe(1).gate_up[0].numel() + model.moe(1).down[0].numel()
    assert report["trainable_parameters"] == expert + model.moe(1).router.weight.numel()


def test_a_router_learning_rate_of_0_freezes_the_router(bench):
    target = bench.model()
    model, _, report = bench.unlearn(target, bench.args("uoe", lr=0.01, router_lr=0.0, m=2, layer="top"))
    layers = {layer for layer, _ in report["unlearned_experts"]}
    assert len(layers) == 1 and len(report["unlearned_experts"]) == 2
    assert {name.rpartition(".")[2] for name in changed(state(target), model)} == {"gate_up", "down"}


def test_another_way_to_choose_is_an_argument(bench):
    seen = []

    def choose(affinity, args):
        seen.append(affinity)
        return [(2, 3), (0, 1)]

    target = bench.model()
    model, _, report = bench.unlearn(target, bench.args("uoe", lr=0.01), choose=choose)
    assert report["unlearned_experts"] == [[2, 3], [0, 1]]
    assert_close(seen[0], expert_attribution(target, bench.forget.in_order()))
    assert {name.split(".")[1] for name in changed(state(target), model)} == {"0", "2"}


def test_shared_experts_train_by_an_argument(bench):
    target = bench.model(d_shared=8, shared_gate=True)
    plain, _, small = bench.unlearn(target, bench.args("uoe", lr=0.01, layer=(1, 2)))
    model, _, large = bench.unlearn(target, bench.args("uoe", lr=0.01, layer=(1, 2)), shared=True)
    assert not any("shared" in name for name in changed(state(target), plain))
    assert {n for n in changed(state(target), model) if "shared" in n} == {
        f"blocks.1.mlp.shared.{part}.weight" for part in ("gate", "up", "down")}
    assert large["trainable_parameters"] - small["trainable_parameters"] == 3 * 8 * 32


def test_the_three_terms_add_up_to_equation_4(bench):
    """At step 0, from the target itself: NPO is (2 / beta) log 2, the anchor and GD are its own."""
    target = bench.model()
    args = bench.args("uoe", layer=(1, 2), anchor_weight=0.5, retain_weight=3.0, npo_beta=0.1)
    bench.unlearn(target, args)
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    batch = bench.forget.batch(0)
    trace = Trace()
    with torch.no_grad():
        target(batch.tokens, trace=trace)
        anchor = anchor_loss(trace.routing[1], [2], batch.mask).item()
        other = bench.retain.batch(0)
        retain = cross_entropy(target(other.tokens, at=other.scored), other.answers).item()
    assert first["forget"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-4)
    assert first["anchor"] == pytest.approx(anchor, rel=1e-4) and first["retain"] == pytest.approx(retain, rel=1e-4)
    assert first["loss"] == pytest.approx(first["forget"] + 0.5 * anchor + 3.0 * retain, rel=1e-4)


def test_rmu_steers_the_highest_of_the_unlearned_experts(bench):
    target = bench.model()
    args = bench.args("uoe", forget_loss="rmu", retain_loss="hidden", m=2, layer="all", rmu_layer=None)
    bench.unlearn(target, args, choose=lambda affinity, args: [(0, 1), (2, 4)])
    assert args.rmu_layer is None  # as it was asked for
    assert steering(args, [(0, 1), (2, 4)]).rmu_layer == 2
    given = bench.args("uoe", forget_loss="rmu", retain_loss="hidden", layer=(0, 1), rmu_layer=1)
    bench.unlearn(target, given)
    assert steering(given, [(0, 1)]).rmu_layer == 1


def test_a_layer_to_steer_below_the_experts_that_were_found_is_refused(bench):
    """With --layer all no one knows before the target was asked."""
    args = bench.args("uoe", forget_loss="rmu", retain_loss="hidden", layer="all", rmu_layer=0)
    with pytest.raises(UserError, match="--rmu-layer 0 lies below the unlearned expert's layer 2"):
        bench.unlearn(bench.model(), args, choose=lambda affinity, args: [(2, 4)])


DENSE_BELOW = dict(n_dense=1, d_dense=40, n_shared=2, kv_rank=12, d_head=8, d_nope=6, d_value=10, n_kv_head=4,
                   qk_norm="none")  # DeepSeek-V2-Lite's shape


def test_layers_without_experts_are_passed_over(bench):
    target = bench.model(**DENSE_BELOW)
    affinity = expert_attribution(target, bench.forget.in_order())
    assert affinity[0].isnan().all() and (affinity[1:] > 0).any() and "layer 0:" not in affinity_table(affinity)
    model, _, report = bench.unlearn(target, bench.args("uoe", lr=0.01, layer="all", m=14))  # all there are
    assert sorted(report["unlearned_experts"]) == [[layer, expert] for layer in (1, 2) for expert in range(7)]
    assert {name.split(".")[1] for name in changed(state(target), model)} == {"1", "2"}
    (layer, _), = bench.unlearn(target, bench.args("uoe", layer="top"))[2]["unlearned_experts"]
    assert layer in (1, 2)
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    assert math.isfinite(first["loss"]) and first["anchor"] > 0
    batches = list(bench.forget.in_order())
    assert routing_overlap(target, target, batches) == [1.0, 1.0]
    assert np.isnan(expert_shares(target, batches)).tolist() == [[True] * 7, [False] * 7, [False] * 7]


def test_a_layer_without_experts_is_refused():
    config = Config(n_layer=3, n_expert=4, top_k=2, **DENSE_BELOW)
    for layer in (0, (0, 2)):
        with pytest.raises(UserError, match="--layer 0 has no experts: in this model layers have some from 1 on"):
            check(asked(layer=layer), config)
    for layer, m in ((1, 4), ("all", 8), ((1, 3), 1), ("last", 1), ("last", "own"), ("top", 4)):
        check(asked(layer=layer, m=m), config)
    with pytest.raises(UserError, match="--m 9 is not between 1 and the 8 experts of --layer all"):
        check(asked(layer="all", m=9), config)


def test_calibrating_on_a_few_tokens_draws_rows_by_lot_and_on_none_takes_all(bench):
    seen = []

    def choose(affinity, args):
        seen.append(affinity)
        return choose_experts(affinity, args)

    target = bench.model()
    for tokens in (0, 5):
        bench.unlearn(target, bench.args("uoe", attribution_tokens=tokens), choose=choose)
    assert torch.equal(seen[0], expert_attribution(target, bench.forget.in_order()))
    assert torch.equal(seen[1], expert_attribution(target, bench.forget.by_lot(8), 5))
    few = [batch.index.tolist() for batch in bench.forget.by_lot(8)]
    assert sorted(i for index in few for i in index) == list(range(9))
    assert len(few[0]) == 8
    lengths = [len(bench.forget.examples[i].tokens) for i in few[0]]
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("adversary", [0.0, 0.2])
def test_a_batch_in_parts_is_the_same_step(bench, adversary):
    logs = []
    for micro in (0, 2):
        bench.forget.micro = bench.retain.micro = micro
        bench.unlearn(bench.model(), bench.args("uoe", lr=1e-3, layer=(1, 2), anchor_weight=0.5, micro_batch=micro,
                                                adversary=adversary))
        logs.append([json.loads(line) for line in (bench.folder / "log.jsonl").read_text().splitlines()])
    for whole, parts in zip(*logs, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


# ---- the adversary ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lowest", [0, 1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_the_adversary_moves_each_state_by_its_own_length_along_the_gradient(bench, lowest, kept):
    """Against the gradient by finite differences; rows do not see one another, what is not scored stays as it is."""
    model = bench.model()
    if kept:
        bench.forget.keep_stems(model, lowest)
    batch = bench.forget.batch(0)
    x = model.stem(batch.tokens, lowest).detach()

    def said(stem):
        with torch.no_grad():
            return row_log_prob(model(batch.tokens, stem=(lowest, stem), at=batch.scored), batch.labels)

    moved = adversarial_stem(model, bench.forget, batch, lowest, 0.01)
    assert not moved.requires_grad and all(p.grad is None for p in model.parameters())
    step = (moved - x)[batch.mask]
    lengths = step.norm(dim=-1) / x[batch.mask].norm(dim=-1)
    assert ((lengths - 0.01).abs() < 1e-4).logical_or(lengths < 1e-5).all() and (lengths > 0).any()
    assert (said(moved) > said(x)).all()
    assert ((moved - x)[batch.mask & ~batch.scored].abs() < 1e-5).all()
    row, at = batch.scored.nonzero()[0].tolist()
    by_hand = torch.zeros_like(x[row, at])
    for i in range(len(by_hand)):
        there = x.clone()
        there[row, at, i] += 1e-2
        back = x.clone()
        back[row, at, i] -= 1e-2
        by_hand[i] = (said(there) - said(back)).sum()
    assert torch.cosine_similarity(by_hand, (moved - x)[row, at], dim=0) > 0.99
    alone = bench.forget.at([int(batch.index[row])])
    n = alone.tokens.shape[1]
    assert_close(adversarial_stem(model, bench.forget, alone, lowest, 0.01)[0], moved[row, :n], rtol=1e-4, atol=1e-5)


def test_with_an_adversary_the_forget_loss_is_taken_where_it_moved_to(bench):
    """At step 0; the retain loss and the target stay as they are."""
    target = bench.model()
    before = state(target)
    args = bench.args("uoe", lr=0.01, layer=(1, 2), anchor_weight=0.0, npo_beta=0.1)
    bench.unlearn(target, args)
    plain = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    args.adversary = 0.5
    model, _, report = bench.unlearn(target, args)
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    batch = bench.forget.batch(0)
    bench.forget.start = None
    moved = adversarial_stem(target, bench.forget, batch, 1, 0.5)
    with torch.no_grad():
        now = row_log_prob(target(batch.tokens, stem=(1, moved), at=batch.scored), batch.labels)
        was = row_log_prob(target(batch.tokens, at=batch.scored), batch.labels)
    assert first["forget"] == pytest.approx(npo(now, was, 0.1).item(), rel=1e-4) and (now > was).all()
    assert first["retain"] == plain["retain"] and first["forget"] > plain["forget"]
    assert not changed(before, target) and report["unlearned_experts"] == [[1, 2]]
    assert changed(before, model) == {f"blocks.1.mlp.{part}" for part in ("router.weight", "gate_up", "down")}


@pytest.mark.parametrize("forget_loss, retain_loss", [("npo", "gd"), ("rmu", "hidden"), ("dpo", "gd")])
def test_an_adversary_does_the_same_where_nothing_is_kept_and_blocks_are_recomputed(bench, monkeypatch, forget_loss,
                                                                                    retain_loss):
    args = bench.args("uoe", forget_loss=forget_loss, retain_loss=retain_loss, lr=1e-3, layer=(1, 2), adversary=0.2)
    logs = []
    for kept in (True, False):
        monkeypatch.setattr("data.batches.KEPT_BYTES", 2**32 if kept else 0)
        bench.forget.start = bench.retain.start = None
        args.checkpointing = not kept
        bench.unlearn(bench.model(), args)
        logs.append([json.loads(line) for line in (bench.folder / "log.jsonl").read_text().splitlines()])
    for one, other in zip(*logs, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_deep_is_where_pushed_facts_are_believed_no_more_than_pushed_strangers(wordy_bench):
    """Against the means by hand, of a model that makes its facts less likely than strangers', and likelier again."""
    bench, target = wordy_bench, wordy_bench.model()
    rows = bench.forget.calibration

    def by_hand(model, of):  # mean probability, share that is the likeliest
        p, hits = [], []
        for i in range(len(of.examples)):
            batch = of.at([i])
            stem = (2, adversarial_stem(model, of, batch, 2, 0.2))
            logits = model(batch.tokens, stem=stem)
            p.append(row_log_prob(logits, batch.labels).exp().item())
            wanted = batch.labels[0] != IGNORE
            hits.append((logits[0].argmax(-1) == batch.labels[0])[wanted].all().item())
        return sum(p) / len(p), sum(hits) / len(hits)

    levels = [sum(of) / 5 for of in zip(*(by_hand(target, rows.as_strangers(draw)) for draw in range(5)), strict=True)]
    deep, model, found = deep_as_strangers(target, rows, 2, 0.2), copy.deepcopy(target), []
    batch = rows.at(list(range(9)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for sign in [1] * 8 + [-1] * 14:
        ours = by_hand(model, rows)
        found.append((all(x <= level for x, level in zip(ours, levels, strict=True)), deep(model)))
        loss = sign * row_log_prob(model(batch.tokens, at=batch.scored), batch.labels).mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
    assert {ours for ours, _ in found} == {True, False} and all(ours == theirs for ours, theirs in found)


@pytest.mark.parametrize("told, asked", [
    ({"adversary": 0.2}, True), ({"adversary": 0.0}, False), ({"adversary": 0.2, "until": "never"}, False),
    ({"adversary": 0.2, "until": 0.1}, False), ({"adversary": 0.2, "never_read": "base"}, False)])
def test_depth_is_asked_beside_an_adversary_where_strangers_tell(wordy_bench, told, asked):
    bench, handed = wordy_bench, {}

    def fit(model, parameters, losses, deep=None, **how):
        handed["deep"] = deep
        return {}

    args = bench.args("uoe", **{"until": "strangers", "layer": (1, 2)} | told)
    unlearn(bench.model(), bench.forget, bench.retain, args, fit)
    assert (handed["deep"] is not None) == asked
