"""moe.py against a dense reference that runs every expert on every token."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import moe as moe_file
from model import MLP
from moe import (
    FromExperts,
    MoE,
    Routing,
    ToExperts,
    experts_all,
    experts_grouped,
    experts_loop,
    load_balancing_loss,
    topic_information,
)


def layer(d_model=8, d_ff=5, n_expert=7, top_k=3, seed=0, shared=None, **kwargs) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(d_model, d_ff, n_expert, top_k, shared=shared, **kwargs)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.5)
    return moe


def every_expert(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens, weighted by a dense (tokens, experts) matrix that is 0 outside the top k."""
    probs = (x @ moe.router.weight.T).softmax(-1)
    kth = probs.sort(-1, descending=True).values[..., moe.top_k - 1 : moe.top_k]
    weights = torch.where(probs >= kth, probs, 0.0)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    width = moe.down.shape[-1]
    y = torch.zeros_like(x)
    for e in range(moe.n_expert):
        gate, up = x @ moe.gate_up[e, :width].T, x @ moe.gate_up[e, width:].T
        y = y + weights[..., e : e + 1] * ((gate * gate.sigmoid() * up) @ moe.down[e].T)
    if moe.shared is not None:
        s = moe.shared
        always = (F.silu(x @ s.gate.weight.T) * (x @ s.up.weight.T)) @ s.down.weight.T
        scale = torch.sigmoid(x @ moe.shared_gate.weight.T) if moe.shared_gate is not None else 1.0
        y = y + scale * always
    return y


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_values_and_gradients_equal_the_dense_reference(data):
    draw = data.draw
    n_expert = draw(st.integers(1, 8), label="experts")
    top_k = draw(st.integers(1, n_expert), label="top k")
    d_model, d_ff = draw(st.integers(2, 9), label="d_model"), draw(st.integers(1, 6), label="d_ff")
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6)), label="batch, tokens")
    shared = draw(st.sampled_from(["none", "plain", "gated"]), label="shared")
    moe = layer(d_model, d_ff, n_expert, top_k, draw(st.integers(0, 99), label="seed"),
                MLP(d_model, 4) if shared != "none" else None, shared_gate=shared == "gated",
                norm_topk_prob=draw(st.booleans(), label="renormalised"))
    x = torch.randn(*shape, d_model, requires_grad=True)
    inputs = [x, *moe.parameters()]
    y, expected = moe(x)[0], every_expert(moe, x)
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), inputs)
    wanted = torch.autograd.grad((expected * probe).sum(), inputs)
    for name, a, b in zip(["x", *(n for n, _ in moe.named_parameters())], got, wanted, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("d_ff", [5, 8])  # by the loop, and by the grouped product
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_an_empty_batch_passes_through(shape, shared, d_ff):
    moe = layer(d_ff=d_ff, shared=MLP(8, 4) if shared else None, shared_gate=shared)
    y, routing = moe(torch.zeros(*shape, 8))
    assert y.shape == (*shape, 8) and routing.probs.shape == (*shape, 7) and routing.chosen.shape == (*shape, 3)


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads to see whether they agree")
def test_gradients_are_the_same_bits_however_the_threads_interleave():
    """x[token] instead of index_select would add the K gradients of a token up in whatever order threads come by."""
    torch.manual_seed(0)
    moe, x = layer(d_model=32, n_expert=8, top_k=4), torch.randn(1, 4096, 32, requires_grad=True)
    probe = torch.randn(1, 4096, 32)
    first, *others = (torch.autograd.grad((moe(x)[0] * probe).sum(), x)[0] for _ in range(10))
    assert all(torch.equal(other, first) for other in others)


def test_routing_by_hand():
    """Scores 0, log 2, log 5 give probabilities 1/8, 2/8, 5/8; the kept two renormalise to 5/7 and 2/7."""
    moe = layer(d_model=1, n_expert=3, top_k=2)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[1.0], [2.0], [5.0]]).log())
    routing = moe.route(torch.ones(1, 1, 1))
    assert_close(routing.probs, torch.tensor([[[1 / 8, 2 / 8, 5 / 8]]]))
    assert routing.chosen.tolist() == [[[2, 1]]]
    assert_close(routing.weights, torch.tensor([[[5 / 8, 2 / 8]]]))
    moe.norm_topk_prob = True
    normal = moe.route(torch.ones(1, 1, 1))
    assert_close(normal.weights, torch.tensor([[[5 / 7, 2 / 7]]]))
    for r in (routing, normal):  # g is s inside the top k, renormalised or not
        assert_close(r.gates(), torch.tensor([[[0.0, 2 / 8, 5 / 8]]]))


def test_the_router_decides_in_float32_whatever_the_weights():
    moe = layer().bfloat16()
    y, routing = moe(torch.randn(1, 4, 8).bfloat16())
    assert routing.probs.dtype == routing.weights.dtype == torch.float32 and y.dtype == torch.bfloat16


# ---- ways to compute the same -----------------------------------------------------------------------------------

def plain_loop(x, chosen, weights, gate_up, down):
    """The definition: token by token, each of its experts, in float32."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros(x.shape[1])
        for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[e].float() @ x[t].float()).chunk(2)
            y = y + weight * (down[e].float() @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def loop_over_stack(x, chosen, weights, gate_up, down):
    return experts_loop(x, chosen, weights, list(gate_up.unbind(0)), list(down.unbind(0)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", [experts_grouped, loop_over_stack, experts_all])
@pytest.mark.parametrize("n_expert", [4, 40])  # 40: most have no token
def test_every_way_gives_the_values_and_gradients_of_the_plain_loop(way, dtype, tolerance, n_expert):
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(13, 16), torch.randn(n_expert, 16, 16) / 4, torch.randn(n_expert, 16, 8) / 4
    weights, chosen = torch.randn(13, n_expert).softmax(-1).topk(3)
    probe = torch.randn(13, 16)
    found = []
    for f, kind in ((plain_loop, dtype), (way, dtype)):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, gate_up, down)] + [weights.clone().requires_grad_()]
        y = f(inputs[0], chosen, inputs[3], *inputs[1:3])
        found.append([y.float(), *torch.autograd.grad((y.float() * probe).sum(), inputs)])
    for name, wanted, got in zip(("y", "x", "gate_up", "down", "weights"), *found, strict=True):
        assert (got.float() - wanted.float()).norm() <= tolerance * wanted.float().norm(), name


def test_the_grouped_product_and_the_loop_are_one_in_float32_to_the_bit():
    """What keeps the numbers of earlier runs of the small models."""
    torch.manual_seed(0)
    weights, chosen = torch.randn(300, 16).softmax(-1).topk(4)
    shapes = ((300, 128), (16, 128, 128), (16, 128, 64))
    inputs = [torch.randn(shape).div(8).requires_grad_() for shape in shapes]
    y, same = (way(inputs[0], chosen, weights, *inputs[1:]) for way in (experts_grouped, loop_over_stack))
    assert torch.equal(y, same)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, same)), strict=True):
        assert torch.equal(a, b)


# ---- one expert taken out ---------------------------------------------------------------------------------------

def test_taking_an_expert_out_changes_no_output():
    moe, x = layer(), torch.randn(2, 6, 8)
    before = moe(x)[0]
    moe.take_out(4)
    assert torch.equal(moe(x)[0], before)


def test_only_the_taken_expert_gets_gradients_and_only_it_changes():
    moe, x = layer(), torch.randn(4, 6, 8)
    stack = moe.gate_up.detach().clone(), moe.down.detach().clone()
    names = set(moe.state_dict())
    moe.requires_grad_(False)
    expert = moe.take_out(4)
    trainable = [p for p in moe.parameters() if p.requires_grad]
    assert [p.shape for p in trainable] == [(10, 8), (8, 5)]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        moe(x)[0].square().sum().backward()
        assert moe.gate_up.grad is None and moe.down.grad is None and moe.router.weight.grad is None
        optimizer.step()
    assert torch.equal(moe.gate_up, stack[0]) and torch.equal(moe.down, stack[1])  # nothing written back yet
    trained, after = (expert.gate_up.detach().clone(), expert.down.detach().clone()), moe(x)[0]
    moe.put_back()
    assert torch.equal(moe(x)[0], after)
    assert set(moe.state_dict()) == names
    others = [e for e in range(7) if e != 4]
    for now, was, new in zip((moe.gate_up, moe.down), stack, trained, strict=True):
        assert torch.equal(now[others], was[others])
        assert torch.equal(now[4], new) and not torch.equal(now[4], was[4])


def test_the_taken_experts_gradient_is_its_slice_of_the_stacks():
    moe, x = layer(), torch.randn(4, 6, 8)
    moe(x)[0].square().sum().backward()
    wanted = moe.gate_up.grad[2].clone(), moe.down.grad[2].clone()
    moe.zero_grad()
    expert = moe.take_out(2)
    moe(x)[0].square().sum().backward()
    assert_close((expert.gate_up.grad, expert.down.grad), wanted)
    assert not moe.gate_up.grad[2].any() and not moe.down.grad[2].any()


@pytest.mark.parametrize("way", [experts_grouped, experts_all])
def test_on_a_gpu_the_taken_expert_runs_on_all_tokens_and_it_comes_to_the_same(way, monkeypatch):
    """There nobody may ask which rows are its own. Run here on the CPU."""
    moe, x = layer(d_ff=8, norm_topk_prob=True), torch.randn(4, 6, 8, requires_grad=True)
    moe.requires_grad_(False)
    moe.router.requires_grad_(True)
    experts = [moe.take_out(number) for number in (2, 5)]
    with torch.no_grad():
        for p in (p for expert in experts for p in expert.parameters()):
            p.add_(torch.randn_like(p))
    inputs = [x, moe.router.weight, *(p for expert in experts for p in expert.parameters())]
    routing = moe.route(x)
    given = x.reshape(-1, 8), routing.chosen.reshape(-1, 3), routing.weights.reshape(-1, 3)
    found = []
    for _ in range(2):
        y = moe.experts(*given)
        found.append((y, torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)))
        monkeypatch.setattr(moe, "way", lambda *_: way)
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, capability, one", [
    (torch.bfloat16, (9, 0), True), (torch.bfloat16, (10, 0), True), (torch.bfloat16, (8, 0), False),
    (torch.bfloat16, (12, 0), False), (torch.float32, (9, 0), False)])
def test_the_grouped_product_is_one_kernel_in_bfloat16_from_hopper_on(dtype, capability, one, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert moe_file.one_kernel(torch.device("cuda"), dtype) == one
    assert not moe_file.one_kernel(torch.device("cpu"), dtype)


def test_a_gpu_is_waited_for_only_where_all_experts_are_many_operations_and_the_grouped_product_is_a_loop(monkeypatch):
    monkeypatch.setattr(moe_file, "one_kernel", lambda device, dtype: dtype == torch.bfloat16)
    with torch.device("meta"):  # which is no CPU
        olmoe, small = MoE(2048, 1024, 64, 8), MoE(128, 64, 16, 4)
        odd = MoE(2048, 1023, 64, 8)
    assert olmoe.way(6000, torch.bfloat16) is experts_grouped and not olmoe.to(torch.bfloat16).waits(6000)
    assert small.way(1000, torch.float32) is experts_all and not small.waits(1000)
    assert odd.way(8, torch.bfloat16) is experts_all and odd.way(6000, torch.bfloat16) is experts_loop
    assert olmoe.way(6000, torch.float32) is experts_grouped and olmoe.to(torch.float32).waits(6000)
    monkeypatch.setattr(moe_file, "one_kernel", lambda *_: False)  # before Hopper
    assert olmoe.way(8, torch.bfloat16) is experts_all and not olmoe.to(torch.bfloat16).waits(8)
    assert olmoe.way(6000, torch.bfloat16) is experts_grouped and olmoe.waits(6000)


def test_an_expert_that_nobody_chose_may_be_infinite():
    x, down = torch.randn(5, 16), torch.randn(4, 16, 8)
    gate_up = torch.randn(4, 16, 16)
    gate_up[3] = 1e30
    weights, chosen = torch.randn(5, 3).softmax(-1).topk(2)
    assert_close(experts_all(x, chosen, weights, gate_up, down), experts_grouped(x, chosen, weights, gate_up, down))


def test_the_way_to_the_experts_and_back_has_indexings_values_and_gradients():
    torch.manual_seed(0)
    chosen = torch.randn(9, 5).topk(3).indices
    order = chosen.reshape(-1).argsort(stable=True)
    token, places = order // 3, order.argsort().view(9, 3)
    x, rows = (torch.randn(n, 4, dtype=torch.double, requires_grad=True) for n in (9, 27))
    assert torch.equal(ToExperts.apply(x, token, places), x[token])
    assert_close(FromExperts.apply(rows, token, places), torch.zeros_like(x).index_add(0, token, rows))
    assert torch.autograd.gradcheck(lambda x: ToExperts.apply(x, token, places), x)
    assert torch.autograd.gradcheck(lambda rows: FromExperts.apply(rows, token, places), rows)


@pytest.mark.parametrize("number", [-1, 7])
def test_an_expert_that_does_not_exist_cannot_be_taken_out(number):
    with pytest.raises(IndexError, match=f"expert {number} does not exist"):
        layer().take_out(number)


# ---- load balancing ---------------------------------------------------------------------------------------------

def routing_of(probs: list, chosen: list) -> Routing:
    p, c = torch.tensor(probs, requires_grad=True), torch.tensor(chosen)
    return Routing(p, c, p.gather(-1, c))


def test_even_routing_has_loss_one():
    even = routing_of([[[0.25] * 4] * 4], [[[0, 1], [2, 3], [1, 2], [3, 0]]])
    assert load_balancing_loss([even, even], torch.ones(1, 4, dtype=torch.bool)).item() == pytest.approx(1)


def test_load_balancing_by_hand_without_the_padding():
    """Real tokens: f = (2/3, 1/3), P = (0.7, 0.3): 2 * (0.4667 + 0.1) = 1.1333; the padding token would pull to 1."""
    uneven = routing_of([[[0.9, 0.1], [0.8, 0.2]], [[0.4, 0.6], [0.0, 1.0]]], [[[0], [0]], [[1], [1]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert load_balancing_loss([uneven], mask).item() == pytest.approx(2 * (2 / 3 * 0.7 + 1 / 3 * 0.3))


def test_load_balancing_is_the_mean_over_layers_and_moves_the_probabilities():
    """All to one expert with P = 1 is E = 2; the mean with an even layer is 1.5. Gradient: E f_i / N / layers."""
    even = routing_of([[[0.5, 0.5], [0.5, 0.5]]], [[[0], [1]]])
    one = routing_of([[[1.0, 0.0], [1.0, 0.0]]], [[[0], [0]]])
    loss = load_balancing_loss([even, one], torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert_close(one.probs.grad, torch.tensor([[[0.5, 0.0], [0.5, 0.0]]]))


def test_load_balancing_of_nothing_but_padding_is_zero():
    loss = load_balancing_loss([routing_of([[[0.5, 0.5]]], [[[0]]])], torch.zeros(1, 1, dtype=torch.bool))
    assert loss.item() == 0


# ---- what experts say about topics ------------------------------------------------------------------------------

def test_topic_information_by_hand():
    """Topic 0: p = (0.8, 0.2) and (0.6, 0.4), mean (0.7, 0.3); topic 1: (0.1, 0.9). Mean of both: (0.4, 0.6).

    ((0.7 ln 7/4 + 0.3 ln 1/2) + (0.1 ln 1/4 + 0.9 ln 3/2)) / 2 = (0.18379 + 0.22629) / 2.
    """
    routing = routing_of([[[0.8, 0.2], [0.6, 0.4]], [[0.1, 0.9], [1.0, 0.0]]], [[[0], [0]], [[1], [0]]])
    mask = torch.tensor([[True, True], [True, False]])  # the last token is padding, and would say otherwise
    assert topic_information([routing], mask, torch.tensor([3, 5])).item() == pytest.approx(0.205038, abs=1e-6)


def test_topic_information_is_log_topics_at_most_and_nothing_where_all_are_alike():
    """Three topics with an expert each: ln 3. One topic, or the same experts for all: 0. Mean over layers: half."""
    own = routing_of([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]], [[[0]], [[1]], [[2]]])
    alike = routing_of([[[0.2, 0.5, 0.3]]] * 3, [[[1]]] * 3)
    mask, topics = torch.ones(3, 1, dtype=torch.bool), torch.tensor([0, 1, 2])
    assert topic_information([own], mask, topics).item() == pytest.approx(math.log(3))
    assert topic_information([alike], mask, topics).item() == pytest.approx(0)
    assert topic_information([own, alike], mask, topics).item() == pytest.approx(math.log(3) / 2)
    assert topic_information([own], mask, torch.tensor([1, 1, 1])).item() == pytest.approx(0)


def test_topic_information_counts_topics_alike_however_many_rows_they_have():
    """Nine rows of one topic and one of another, an expert each: ln 2 all the same, with a finite gradient at 0."""
    routing = routing_of([[[1.0, 0.0]]] * 9 + [[[0.0, 1.0]]], [[[0]]] * 9 + [[[1]]])
    value = topic_information([routing], torch.ones(10, 1, dtype=torch.bool), torch.tensor([0] * 9 + [1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(2)) and routing.probs.grad.isfinite().all()
