"""uoe.py: which expert the forget set engages (equation 2), the anchor (equation 3), training one expert."""

import pytest
import torch
from torch.testing import assert_close

from data.batches import IGNORE, Batch, Example, collate, in_order
from errors import UserError
from model import Trace
from moe import Routing
from uoe import (
    affinity_table,
    anchor_loss,
    balanced_weights,
    check_place,
    expert_attribution,
    experts_reaching,
    isolate,
    repair_routers,
    restore,
    select_experts,
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


@pytest.mark.parametrize("m, same_layer, rule, expected", [
    (1, False, "top", [(1, 0)]),
    (3, False, "top", [(1, 0), (0, 1), (1, 2)]),
    (2, True, "top", [(1, 0), (1, 2)]),
    (1, False, "bottom", [(1, 1)]),
    (3, False, "bottom", [(1, 1), (0, 0), (0, 2)]),
    (2, True, "bottom", [(1, 1), (1, 2)]),
])
def test_experts_by_affinity(m, same_layer, rule, expected):
    assert select_experts(TABLE, m, same_layer, rule) == expected


def test_random_experts_follow_the_generator_and_not_the_table():
    def draw(seed, m=1, same_layer=False):
        return select_experts(TABLE, m, same_layer, "random", torch.Generator().manual_seed(seed))

    assert draw(3, 4) == draw(3, 4) and len(set(draw(3, 6))) == 6
    assert {place for seed in range(100) for place in draw(seed)} == {(i, e) for i in range(2) for e in range(3)}
    assert all(len({layer for layer, _ in draw(seed, 3, True)}) == 1 for seed in range(20))


@pytest.mark.parametrize("m, same_layer", [(0, False), (7, False), (4, True), (-1, True)])
def test_more_experts_than_there_are_is_refused(m, same_layer):
    with pytest.raises(UserError, match=f"--m {m} is not between 1 and"):
        select_experts(TABLE, m, same_layer)


def test_an_unknown_rule_is_refused():
    with pytest.raises((UserError, ValueError)):
        select_experts(TABLE, rule="botom")


@pytest.mark.parametrize("place", [(3, 0), (-1, 0), (0, 7), (0, -1)])
def test_a_place_that_does_not_exist_is_refused(place):
    with pytest.raises(UserError, match=f"--expert {place[0]},{place[1]} does not exist: layers go from 0 to 2"):
        check_place(place, 3, 7)


def test_a_place_that_exists_is_itself():
    assert check_place((2, 6), 3, 7) == (2, 6)


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


def test_anchor_of_nothing_but_padding_is_zero():
    assert anchor_loss(routing(), [0], torch.zeros(2, 2, dtype=torch.bool)).item() == 0


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
    model = sparse(std=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = isolate(model, places, train_router)
    routers = 7 * 32 * len({layer for layer, _ in places}) if train_router else 0
    assert sum(p.numel() for p in parameters) == len(places) * 3 * 16 * 32 + routers
    train(model, parameters)
    with torch.no_grad():
        trained = model(torch.tensor(ROWS[3:4]))
        restore(model)
        assert torch.equal(model(torch.tensor(ROWS[3:4])), trained)
    after = model.state_dict()
    assert set(after) == set(before) and all(p.requires_grad for p in model.parameters())
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


def test_an_affinity_rank_skips_the_more_wanted():
    table = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.3, 0.0]])
    assert select_experts(table, rank=2) == [(1, 0)] and select_experts(table, 2, rank=3) == [(1, 1), (0, 2)]
    assert select_experts(table, layer=1, rank=2) == [(1, 1)]
    for options in (dict(rank=0), dict(rank=7), dict(m=2, rank=6), dict(layer=0, rank=4)):
        with pytest.raises(UserError, match="--affinity-rank"):
            select_experts(table, **options)


@pytest.mark.parametrize("p, expected", [
    (0.0, [(0, 1), (1, 0)]), (0.5, [(0, 1), (1, 0)]), (0.51, [(0, 1), (0, 2), (1, 0)]),
    (0.6, [(0, 1), (0, 2), (1, 0), (1, 1)]), (1.0, [(0, 1), (0, 2), (0, 3), (0, 0), (1, 0), (1, 1)]),
])
def test_esft_takes_the_fewest_experts_that_reach_p(p, expected):
    """Shares 0.1, 0.5, 0.25, 0.15 and 4/7, 3/7; the second layer's sum is 0.7."""
    table = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.4, 0.3, 0.0, 0.0]])
    assert experts_reaching(table, p) == expected


def test_shared_experts_train_only_where_asked_and_present(sparse):
    model = sparse(qk_norm="none", d_shared=8, shared_gate=True)
    without = isolate(model, [(1, 2)])
    restore(model)
    both = isolate(model, [(1, 2)], shared=True)
    assert len(both) == len(without) + 3  # gate, up, down; not the sigmoid gate
    assert model.moe(1).shared.up.weight.requires_grad and not model.moe(0).shared.up.weight.requires_grad
    with pytest.raises(UserError, match="--with-shared"):
        isolate(sparse(), [(1, 2)], shared=True)


def router_logits(model, batches, layer):
    return torch.cat([(model.blocks[layer].mlp_norm(model.stem(b.tokens, layer)) @ model.moe(layer).router.weight.T)
                      [b.mask] for b in batches])


@torch.no_grad()
def test_repair_leaves_a_model_that_never_changed_and_brings_scores_back_where_one_did(sparse):
    """The ridge solution by hand at the first layer that changed: its own normal equations hold."""
    batches = list(in_order([Example([(7 * i + j) % 61 for j in range(9)], [IGNORE] * 9) for i in range(40)], 16))
    target, same, changed = sparse(0), sparse(0), sparse(0)
    repair_routers(target, same, batches, ridge=1e-9)
    for layer in range(3):
        torch.testing.assert_close(router_logits(same, batches, layer), router_logits(target, batches, layer),
                                   atol=1e-3, rtol=1e-3)
    changed.moe(0).down.mul_(1.3)
    wanted = [router_logits(target, batches, layer) for layer in range(3)]
    before = [(router_logits(changed, batches, layer) - wanted[layer]).square().mean() for layer in range(3)]
    assert before[0] == 0 < before[1]
    repair_routers(target, changed, batches, ridge=1e-6)
    for layer in (1, 2):
        assert (router_logits(changed, batches, layer) - wanted[layer]).square().mean() < before[layer]
    x = torch.cat([changed.blocks[1].mlp_norm(changed.stem(b.tokens, 1))[b.mask] for b in batches]).double()
    theta = changed.moe(1).router.weight.double()
    ridge = 1e-6 * x.square().sum(0).mean()
    gap = (x @ theta.T - wanted[1].double()).T @ x + ridge * theta  # gradient of the ridge objective
    assert gap.abs().max() < 1e-2 * (wanted[1].double().T @ x).abs().max()


@torch.no_grad()
def test_balanced_weights_bring_the_experts_shares_to_those_of_the_forget_set(sparse):
    def batches(seed, n):
        draw = torch.Generator().manual_seed(seed)
        rows = [torch.randint(61, (5 + i % 6,), generator=draw).tolist() for i in range(n)]
        return list(in_order([Example(row, [IGNORE] * len(row)) for row in rows], 16))

    def shares(model, parts, weights):
        """Of the assignments at layer 0, weighted."""
        total = torch.zeros(7)
        for batch, weight in zip(parts, weights, strict=True):
            trace = Trace()
            model(batch.tokens, trace=trace)
            for b, t in batch.mask.nonzero().tolist():
                for e in trace.routing[0].chosen[b, t].tolist():
                    total[e] += weight[b, t]
        return total / total.sum()

    model = sparse(n_layer=1)
    forget, retain = batches(0, 8), batches(1, 80)
    weights = balanced_weights(model, forget, retain, rounds=50)
    real = torch.cat([w[b.mask] for w, b in zip(weights, retain, strict=True)])
    assert real.mean() == pytest.approx(1, abs=1e-4) and all((w[~b.mask] == 0).all() for w, b in
                                                             zip(weights, retain, strict=True))
    ones = lambda parts: [b.mask.float() for b in parts]  # noqa: E731
    wanted, before = shares(model, forget, ones(forget)), shares(model, retain, ones(retain))
    after = shares(model, retain, weights)
    assert (after - wanted).abs().max() < 0.1 * (before - wanted).abs().max()
    same = balanced_weights(model, retain, retain)
    assert torch.allclose(torch.cat([w[b.mask] for w, b in zip(same, retain, strict=True)]), torch.ones(len(real)),
                          atol=1e-4)
