"""lab/: TRACE, GRIP's repair, distillation and ULD's uniform loss on all tokens, against computations by hand."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import WORLD, tiny

import train
from belief import token_log_probs
from data.batches import IGNORE, Example, in_order
from errors import UserError
from lab import distill
from lab.ablations import main as ablate
from lab.ablations import uniform_on_all
from lab.grip import Held, off_span, repair_routers, spans, with_projection, with_repair
from lab.queue import cut_off, read_lines
from lab.trace import WEIGHTED, Weighted, balanced_weights, with_trace
from methods import open_run
from model import Trace
from objectives import RETAIN, cross_entropy, kl
from uld import LogitDifference, first_layers
from uoe import unlearn as uoe_unlearn

# ---- TRACE ------------------------------------------------------------------------------------------------------


def random_batches(seed: int, n: int) -> list:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(61, (5 + i % 6,), generator=draw).tolist() for i in range(n)]
    return list(in_order([Example(row, [IGNORE] * len(row)) for row in rows], 16))


def shares(model, parts, weights) -> torch.Tensor:
    """Of the assignments at layer 0, weighted."""
    total = torch.zeros(7)
    for batch, weight in zip(parts, weights, strict=True):
        trace = Trace()
        model(batch.tokens, trace=trace)
        for b, t in batch.mask.nonzero().tolist():
            for e in trace.routing[0].chosen[b, t].tolist():
                total[e] += weight[b, t]
    return total / total.sum()


@torch.no_grad()
def test_balanced_weights_bring_the_experts_shares_to_those_of_the_forget_set(sparse):
    model = sparse(n_layer=1)
    forget, retain = random_batches(0, 8), random_batches(1, 80)
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


def test_weights_of_one_change_nothing_and_others_scale_their_positions(bench):
    """Of GD and KL, in batches of rows of unequal length."""
    before, after, batch = bench.model("dense", 0), bench.model("dense", 1), bench.retain.batch(0)
    with torch.no_grad():
        scored, was = (model(batch.tokens)[batch.scored] for model in (after, before))  # (N, V), what a loss is given
    plain = {"gd": cross_entropy(scored, batch.answers), "kl": kl(scored, was)}
    lengths = [len(example.tokens) for example in bench.retain.examples]
    for name, loss in WEIGHTED.items():
        one = loss(before, bench.retain, None)
        Weighted.weights = [torch.ones(n) for n in lengths]
        torch.testing.assert_close(one(after, scored, None, batch), plain[name])
        Weighted.weights = [torch.full((n,), 2.0) for n in lengths]
        torch.testing.assert_close(one(after, scored, None, batch), 2 * plain[name])
    Weighted.weights = [torch.arange(n).float() for n in lengths]
    each, counted = -token_log_probs(scored, batch.labels), torch.arange(batch.labels.shape[1]).float()
    expected = (counted * each).sum() / (batch.labels >= 0).sum()
    torch.testing.assert_close(WEIGHTED["gd"](before, bench.retain, None)(after, scored, None, batch), expected)


@pytest.mark.parametrize("retain_loss", ["gd", "kl"])
def test_a_method_with_trace_weighs_its_retain_loss_and_nothing_else(bench, monkeypatch, retain_loss):
    """At step 0, from the target itself: the weights are those of all rows, whatever batch they come in."""
    monkeypatch.setattr("lab.trace.RETAIN", dict(RETAIN))
    target = bench.model()
    batches = list(bench.retain.in_order())
    weights = balanced_weights(target, bench.forget.in_order(), batches)
    of_row = {i: w[:n] for batch, several in zip(batches, weights, strict=True)
              for i, w, n in zip(batch.index.tolist(), several, batch.mask.sum(1).tolist(), strict=True)}
    monkeypatch.setattr("uoe.RETAIN", RETAIN | {"trace": WEIGHTED[retain_loss]})
    args = bench.args("uoe", layer=(1, 2), retain_loss=retain_loss)
    with_trace(uoe_unlearn)(target, bench.forget, bench.retain, args,
                            train.loop.fitting(args, bench.forget, bench.folder))
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    batch = bench.retain.batch(0)
    with torch.no_grad():
        each = -token_log_probs(target(batch.tokens), batch.labels)
    total = sum(float((each[b, : len(of_row[i])] * of_row[i]).sum()) for b, i in enumerate(batch.index.tolist()))
    expected = 0.0 if retain_loss == "kl" else total / int((batch.labels >= 0).sum())
    assert first["retain"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert args.retain_loss == f"{retain_loss}, weighed"


# ---- GRIP -------------------------------------------------------------------------------------------------------

def router_logits(model, batches, layer: int) -> torch.Tensor:
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


def test_a_method_with_repair_is_repaired_on_what_is_kept(bench):
    """The routers are those that a repair by hand gives, and no other weight moves by it."""
    target = bench.model()
    before = {name: p.clone() for name, p in target.named_parameters()}
    args = bench.args("uoe", layer=(0, 2), lr=0.05)
    fit = train.loop.fitting(args, bench.forget, bench.folder)
    plain, _, _ = uoe_unlearn(target, bench.forget, bench.retain, args, fit)
    model, kept, _ = with_repair(uoe_unlearn)(target, bench.forget, bench.retain, args, fit)
    assert kept["model"] is model
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert moved == {f"blocks.{layer}.mlp.router.weight" for layer in range(3)}
    plain = copy.deepcopy(plain)
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    repair_routers(target, plain, bench.retain.in_order())
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())


@torch.no_grad()
def test_what_is_taken_out_is_the_span_of_the_tokens_that_chose_the_expert(sparse):
    """Each expert's own inputs, gathered token by token, are gone under its projection; what is orthogonal stays."""
    batches = list(in_order([Example([(7 * i + j) % 61 for j in range(5)], [IGNORE] * 5) for i in range(3)], 2))
    model = sparse(0)
    of = spans(model, batches, 1, keep=1 - 1e-9)
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        trace = Trace()
        model(batch.tokens, trace=trace)
        x = model.blocks[1].mlp_norm(model.stem(batch.tokens, 1))
        for b, t in batch.mask.nonzero().tolist():
            for e in trace.routing[1].chosen[b, t].tolist():
                seen.setdefault(e, []).append(x[b, t])
    for e in range(7):
        x = torch.stack(seen[e]) if e in seen else torch.zeros(1, 32)
        gate, up = (x @ model.moe(1).gate_up[e].T).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        for p, inputs in ((of.inputs[e], x), (of.hidden[e], h)):
            assert (inputs @ p).norm() <= 1e-3 * inputs.norm().clamp_min(1e-6)
            assert torch.trace(p).item() == pytest.approx(len(p) - torch.linalg.matrix_rank(inputs).item(), abs=0.01)
            torch.testing.assert_close(p @ p, p, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_so_much_of_the_span_is_held_as_is_asked_for():
    gram = torch.diag(torch.tensor([90.0, 9.0, 0.6, 0.4]))[None].double()
    for keep, kept in ((1.0, [1, 1, 1, 1]), (0.995, [1, 1, 1, 0]), (0.98, [1, 1, 0, 0]), (0.5, [1, 0, 0, 0])):
        torch.testing.assert_close(off_span(gram, keep)[0], torch.eye(4) - torch.diag(torch.tensor(kept).float()))
    held = Held(torch.zeros(2, 3), off_span(torch.stack([torch.diag(torch.tensor(d).double()) for d in
                                                         ([1, 0, 0], [0, 0, 1])]), 0.99))
    torch.testing.assert_close(held(torch.ones(2, 3)), torch.tensor([[0.0, 1, 1], [1, 1, 0]]))  # a router: row by row


@pytest.mark.parametrize("experts", [False, True])
def test_a_method_with_projection_leaves_what_retain_tokens_meet_as_it_was(bench, monkeypatch, experts):
    """UOE in the first layer, whose inputs do not move: its router's scores of the tokens that chose each expert, or
    the outputs of its expert; what is not held moves."""
    target = bench.model()
    place = (0, 2)
    args = bench.args("uoe", layer=place, lr=0.05, epochs=4)
    fit = train.loop.fitting(args, bench.forget, bench.folder)
    retain = bench.retain.like([{"question": "Is it a?", "answer": "No."}])  # of fewer tokens than the model is wide
    batches = list(retain.in_order())
    model, kept, _ = with_projection(uoe_unlearn, experts, keep=1 - 1e-7)(target, bench.forget, retain, args, fit)
    assert kept["model"] is model and not hasattr(model.moe(place[0]).router, "parametrizations")
    with torch.no_grad():
        x = torch.cat([target.blocks[0].mlp_norm(target.stem(b.tokens, 0))[b.mask] for b in batches])
        x = x[(target.moe(0).route(x).chosen == place[1]).any(-1)]
        scores, outputs = ([], [])
        for m in (target, model):
            scores.append(x @ m.moe(0).router.weight[place[1]])
            gate_up, down = (weights[place[1]] for weights in m.moe(0).expert_weights())
            gate, up = (x @ gate_up.T).chunk(2, -1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ down.T)
        far = [((after - before).norm() / before.norm()).item() for before, after in (scores, outputs)]
    stays, moves = far[::-1] if experts else far
    assert stays < 1e-3 < 0.01 < moves
    assert not torch.equal(model.moe(0).router.weight, target.moe(0).router.weight)
    assert not torch.equal(model.moe(0).expert_weights()[0][place[1]], target.moe(0).gate_up[place[1]])


# ---- ULD: uniform on all ----------------------------------------------------------------------------------------

def test_the_authors_uniform_loss_takes_every_token(bench):
    """At step 0 the LoRA is zero, so the assistant is the target's first layer and its loss can be worked by hand."""
    target = bench.model("dense")
    args = bench.args("uld", assistant_layers=1, lora_dropout=0.0, subtract=0.7, fork="in")
    assistant, tokens = first_layers(target, 1), [example.tokens for example in bench.retain.examples]
    questions = int((bench.retain.batch(0).labels < 0).sum())
    model, kept, _ = uniform_on_all(target, bench.forget, bench.retain, args,
                                    train.loop.fitting(args, bench.forget, bench.folder))
    first = json.loads((bench.folder / "log.jsonl").read_text().splitlines()[0])
    values = []
    with torch.no_grad():
        for i in bench.retain.batch(0).index.tolist():
            values += (-assistant(torch.tensor([tokens[i]])).log_softmax(-1)[0].mean(-1)).tolist()
    assert questions > 0 and first["retain"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert isinstance(model, LogitDifference) and set(kept) == {"assistant"}


# ---- distillation -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_pupil_comes_nearer_to_its_teacher_on_what_both_sets_ask(bench):
    """At step 0 the losses are KL(teacher || target) on the answers of each set."""
    target, teacher = bench.model("dense", 0), bench.model("dense", 1)
    args = bench.args("full", lr=3e-3, epochs=6, retain_weight=2.0)
    fit = train.loop.fitting(args, bench.forget, bench.folder)
    pupil, kept, _ = distill.learning_from(teacher, low_rank=False)(target, bench.forget, bench.retain, args, fit)
    log = [json.loads(line) for line in (bench.folder / "log.jsonl").read_text().splitlines()]
    with torch.no_grad():
        for name, rows in (("forget", bench.forget), ("retain", bench.retain)):
            batch = rows.batch(0)
            expected = kl(target(batch.tokens)[batch.scored], teacher(batch.tokens)[batch.scored]).item()
            assert log[0][name] == pytest.approx(expected, rel=1e-3)
    assert log[0]["loss"] == pytest.approx(log[0]["forget"] + 2 * log[0]["retain"], rel=1e-4)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and kept == {"model": pupil}
    low, _, _ = distill.learning_from(teacher, low_rank=True)(target, bench.forget, bench.retain, args, fit)
    moved = {name for name, p in low.named_parameters() if not torch.equal(p, target.get_parameter(name))}
    assert moved and not any("norm" in name or "embed" in name or "head" in name for name in moved)


@pytest.mark.slow
def test_a_difference_of_logits_can_be_distilled_into_one_model(tmp_path, capsys):
    train.main([*tiny("--method", "uld"), *WORLD, "--out", str(tmp_path), "--name", "teacher", "--subtract", "0.7"])
    teacher = tmp_path / "teacher"
    asked = json.loads((teacher / "asked.json").read_text())
    (teacher / "asked.json").write_text(json.dumps(asked | {"subtract": "strangers"}))  # as it was asked by default
    before = json.loads((teacher / "config.json").read_text())["target"]
    distill.main([str(teacher), "--epochs", "2"])
    folder = tmp_path / "teacher-distilled"
    config, log = (json.loads((folder / "config.json").read_text()), (folder / "log.jsonl").read_text().splitlines())
    assert config["target"] == before
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < losses[0]  # it comes nearer to its teacher
    assert (folder / "model" / "model.safetensors").is_file() and open_run(folder).config["method"] == "full"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        distill.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is not a run folder" in error and error.count("\n") == 1


# ---- by name ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Shared, so that each architecture is pretrained once."""
    return tmp_path_factory.mktemp("out")


@pytest.mark.slow
@pytest.mark.parametrize("row, method", [("uoe-trace", "uoe"), ("uoe-grip", "uoe"), ("full-grip-train", "full"),
                                         ("uld-uniform-all", "uld"), ("uld-no-perturbed", "uld"),
                                         ("uoe-random", "uoe"), ("lora-attn", "lora")])
def test_a_row_is_a_run_like_any_other(row, method, out):
    ablate([row, *tiny("--method", method)[: -2], *WORLD, "--out", str(out)])
    run = open_run(out / row)
    assert run.config["method"] == method and not run.config["diverged"] and (out / row / "figures").is_dir()


def test_a_row_that_is_not_there_is_one_line_and_exit_2(capsys):
    for words in ([], ["uoe-nothing"]):
        with pytest.raises(SystemExit) as stop:
            ablate(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "--list prints them" in error and error.count("\n") == 1


# ---- the queue --------------------------------------------------------------------------------------------------

def test_a_line_with_seed_is_done_for_each(tmp_path):
    file = tmp_path / "runs.txt"
    file.write_text("# nothing\ntrain.py --seed SEED --name a-SEED  # why\n\ntrain.py --name b\n")
    assert read_lines(file, [3, 5]) == ["train.py --seed 3 --name a-3", "train.py --seed 5 --name a-5",
                                        "train.py --name b"]
    with pytest.raises(UserError, match="holds no command"):
        file.write_text("# only words\n")
        read_lines(file, [0])
    with pytest.raises(UserError, match="does not exist"):
        read_lines(tmp_path / "absent", [0])


def test_a_run_is_cut_off_where_it_alone_was_begun(tmp_path):
    assert not cut_off("train.py --name a", tmp_path)
    for name in ("a-kl", "b-seed3"):
        (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / f"{name}.partial" / "asked.json").touch()
    assert [cut_off(f"train.py --name {name}", tmp_path) for name in ("a", "a-kl", "b")] == [False, True, True]
    assert not cut_off("train.py", tmp_path)
