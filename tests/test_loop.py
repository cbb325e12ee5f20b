"""loop.py: the schedule, low-precision weights, what ends a run."""

import copy
import json
import math
import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch

from belief import Belief, belief, row_log_prob, strangers_belief
from data.values import encode_fact
from errors import Stopped, UserError
from lab import fuzz
from loop import Weights, fitting, learning_rate, minimise, stop_at, until, until_strangers
from model import Trace
from objectives import cross_entropy


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 5) and max(rates) == 2.0 == rates[4]
    assert rates[-1] == pytest.approx(0.2, rel=0.01) and all(a >= b for a, b in pairwise(rates[5:]))


@pytest.mark.slow
def test_bf16_weights_learn_by_updates_below_their_rounding(tmp_path):
    """1000 steps of 1e-5 move a weight of 1 by 1e-2; rounded at every step to bf16 (spacing 1/128) it never would."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(3))
    for weight, name in ((p, "low"), (exact, "full")):
        (tmp_path / name).mkdir()
        minimise([weight], lambda step, w=weight: [{"loss": w.float().sum()}], 1000, 2e-5, tmp_path / name, "x", 0,
                 weight_decay=0.0)
    assert p.dtype == torch.bfloat16 and (exact < 0.99).all()
    assert torch.equal(p.detach(), exact.detach().bfloat16())


def test_float32_weights_are_the_optimisers_own():
    p = torch.nn.Parameter(torch.ones(2))
    assert Weights([p]).full[0] is p


def test_slow_parameters_learn_at_their_share_of_the_rate(tmp_path):
    fast, slow = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    minimise([fast, slow], lambda step: [{"loss": (fast + slow).sum()}], 10, 1e-3, tmp_path, "x", 0, weight_decay=0.0,
             slow=(slow,), slow_factor=0.25)
    assert slow.item() == pytest.approx(0.25 * fast.item(), rel=1e-4) and fast.item() < -5e-3


def test_a_step_that_reaches_nothing_that_trains_changes_nothing(tmp_path):
    """As where one expert trains alone and no token of the batch comes to it."""
    p = torch.nn.Parameter(torch.ones(2))
    report = minimise([p], lambda step: [{"loss": p.sum() if step == 1 else torch.ones(())}], 2, 0.1, tmp_path, "x", 0,
                      weight_decay=0.0)
    after = p.detach().clone()
    assert report == {"steps": 2, "train_seconds": report["train_seconds"], "diverged": False} and (after < 1).all()
    p = torch.nn.Parameter(torch.ones(2))
    minimise([p], lambda step: [{"loss": torch.ones(())}], 3, 0.1, tmp_path, "x", 0, weight_decay=0.0)
    assert torch.equal(p.detach(), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_losses_of_a_step_are_their_sum(tmp_path, dtype):
    """Gradients of bf16 weights are added up in float32: 1 + 2^-9 has no place in bf16."""
    def start():
        return torch.nn.Parameter(torch.ones(3, dtype=dtype))

    p, q = start(), start()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    minimise([p], lambda step: [{"loss": (p.float() * (1 + 2**-9)).sum()}], 5, 0.1, tmp_path / "one", "x", 0)
    minimise([q], lambda step: iter([{"a": q.float().sum(), "loss": q.float().sum()},
                                     {"b": q.float().sum(), "loss": (q.float() * 2**-9).sum()}]),
             5, 0.1, tmp_path / "two", "x", 0)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    one, two = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4) and {"a", "b"} <= set(two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(tmp_path, dtype):
    def start():
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(5).to(dtype))

    def losses(p, stop=10**9):
        def at(step):
            if step == stop:
                raise KeyboardInterrupt
            return [{"loss": ((p.float() - step % 3) ** 2 * torch.rand(5)).sum()}]  # random, but by (seed, step)
        return at

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    p, q = start(), start()
    minimise([p], losses(p), 20, 0.1, tmp_path / "whole", "x", 3, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        minimise([q], losses(q, stop=14), 20, 0.1, tmp_path / "cut", "x", 3, save_every=4)
    q = start()
    report = minimise([q], losses(q), 20, 0.1, tmp_path / "cut", "x", 3, save_every=4, resume=True)
    assert torch.equal(p, q) and report["steps"] == 20
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def toy(folder, stop_at=None, **options):
    """(weight, steps that were begun, report or what was raised) of twelve steps; a signal comes within one of them."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    p, begun = torch.nn.Parameter(torch.randn(5)), []

    def losses(step):
        begun.append(step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [{"loss": ((p - step % 3) ** 2 * torch.rand(5)).sum()}]

    try:
        report = minimise([p], losses, 12, 0.1, folder, "toy", 3, save_every=5, **options)
    except Stopped as stopped:
        report = stopped
    return p.detach(), begun, report


@pytest.mark.parametrize("step", [0, 6, 11])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_does_none_twice(tmp_path, step):
    whole, _, _ = toy(tmp_path / "whole")
    _, begun, stopped = toy(tmp_path / "cut", step)
    assert begun == list(range(step + 1)) and stopped.status == 143
    assert str(stopped).startswith(f"toy stopped after step {step + 1} of 12" if step < 11 else "toy stopped after its")
    p, begun, report = toy(tmp_path / "cut", resume=True)
    assert torch.equal(p, whole) and begun == list(range(step + 1, 12)) and report["steps"] == 12
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize("enough", [lambda done, spent: False, lambda done, spent: done == 7])
def test_training_that_has_ended_is_not_done_again(tmp_path, enough):
    p, _, report = toy(tmp_path / "run", enough=enough)
    again, begun, same = toy(tmp_path / "run", resume=True, enough=enough)
    assert torch.equal(p, again) and begun == []
    assert same.pop("resumed_seconds") == pytest.approx(report["train_seconds"], abs=0.1) and same == report


def test_a_state_that_is_damaged_or_of_another_model_is_named(tmp_path):
    toy(tmp_path / "run", 6)
    state = tmp_path / "run" / "state.pt"
    for damaged in (state.read_bytes()[:-50], b"", b"not a state"):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match=r"state.pt is damaged, or the state of another model: remove .*run and"):
            toy(tmp_path / "run", resume=True)
    for other in ({"step": 1}, [], {"step": 1, "seconds": 0.0, "log": "", "report": None, "optimizer": {},
                                    "parameters": [torch.zeros(1)]}):  # one number would be broadcast
        torch.save(other, state)
        with pytest.raises(UserError, match=r"state.pt is damaged"):
            toy(tmp_path / "run", resume=True)


# ---- rows as the loop meets them ---------------------------------------------------------------------------------

@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_that_begin_at_their_stems_give_the_logits_of_whole_passes(bench, layer):
    """In batches of rows of unequal length, right-padded, and by another model that differs above only."""
    model, batch = bench.model(), bench.forget.batch(0)
    trace, traced = Trace(), Trace()
    whole = bench.forget.run(model, batch, trace)
    assert len(set(batch.mask.sum(1).tolist())) > 1
    bench.forget.keep_stems(model, layer)
    late = bench.forget.run(model, batch, traced)
    assert len(whole) == int((batch.labels >= 0).sum())
    torch.testing.assert_close(late, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bench.forget.run(model, batch), whole, rtol=1e-4, atol=1e-5)  # the last MLP on answers
    assert set(traced.routing) == set(range(layer, 3)) and set(trace.routing) == {0, 1, 2}


def test_stems_that_are_too_large_to_keep_are_not_kept(bench, monkeypatch):
    model, batch = bench.model(), bench.forget.batch(0)
    whole = bench.forget.run(model, batch)
    needed = 4 * 32 * sum(len(example.tokens) for example in bench.forget.examples)  # float32, width 32
    for budget, kept in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("data.batches.KEPT_BYTES", budget)
        bench.retain.start = bench.forget.start = None
        bench.forget.keep_stems(model, 1)
        assert (bench.forget.start == 1) == kept
        torch.testing.assert_close(bench.forget.run(model, batch), whole, rtol=1e-4, atol=1e-5)


def test_rows_are_looked_at_no_more_at_once_than_memory_takes(bench):
    bench.forget.micro = 2
    for batches in (bench.forget.in_order(), bench.forget.like(bench.forget.rows).in_order(), bench.forget.parts(0)):
        assert max(len(batch.index) for batch in batches) == 2


def test_each_row_gets_its_own_number_whatever_it_is_batched_with(bench):
    model, rows = bench.model(), bench.forget
    got = rows.each(model, lambda logits, labels: row_log_prob(logits, labels))
    alone = [row_log_prob(model(b.tokens), b.labels) for b in (rows.at([i]) for i in range(len(rows.examples)))]
    torch.testing.assert_close(got, torch.cat(alone).detach(), rtol=1e-4, atol=1e-4)
    assert not got.requires_grad


# ---- fitting -----------------------------------------------------------------------------------------------------

def test_a_methods_loop_takes_its_numbers_from_the_flags_and_looks_after_every_epoch(bench):
    """Nine rows in batches of three are three steps an epoch."""
    model, seen, steps = bench.model("dense"), [], []
    args = bench.args("full", epochs=4, lr=1e-3)

    def look(watched, epoch, done, spent):
        assert watched is model and not model.training and spent > 0
        seen.append((epoch, done))
        return epoch == 3

    def losses(step):
        assert model.training
        steps.append(step)
        batch = bench.forget.batch(step)
        return [{"loss": cross_entropy(model(batch.tokens, at=batch.scored), batch.answers)}]

    fit = fitting(args, bench.forget, bench.folder, after_epoch=look)
    parameters = list(model.parameters())
    report = fit(model, parameters, losses)
    assert seen == [(1, 3), (2, 6), (3, 9)] and steps == list(range(9)) and not model.training
    assert report["steps"] == 9 and report["trainable_parameters"] == sum(p.numel() for p in parameters)


def test_stop_at_asks_the_rows_that_are_forgotten_and_none_without_questions(bench, monkeypatch, capsys):
    rows = [{"question": f"Q{i}?", "answer": f"A{i}. "} for i in range(10)] + [{"text": "A passage."}]
    said = ["A0."] * 10
    monkeypatch.setattr("loop.greedy_answers", lambda model, tokenizer, questions, limits: [
        said[i] for i, _ in enumerate(questions)])
    model = bench.model("dense")
    assert stop_at(0.1, rows, bench.tokenizer)(model, 1, 3, 0.0)  # one of ten is right
    said[1] = "A1."
    assert not stop_at(0.1, rows, bench.tokenizer)(model, 1, 3, 0.0)
    assert stop_at(0.2, rows, bench.tokenizer)(model, 1, 3, 0.0)
    assert not capsys.readouterr().out
    assert not stop_at(1.0, rows[-1:], bench.tokenizer)(model, 1, 3, 0.0)
    assert "--until 1: no forget row has a question to ask" in capsys.readouterr().out


@pytest.mark.parametrize("text, value", [("never", "never"), ("strangers", "strangers"), ("0", 0.0), ("0.25", 0.25),
                                         ("1", 1.0)])
def test_until_is_strangers_a_share_or_never(text, value):
    assert until(text) == value


# ---- strangers ---------------------------------------------------------------------------------------------------

@pytest.fixture
def knowing(wordy_bench):
    """A small model that has learnt nine forget rows and strangers' sentences, as targets have."""
    bench, model = wordy_bench, wordy_bench.model("dense")
    strangers = bench.forget.like(bench.world.strangers(64, np.random.default_rng(0)))
    sets = (bench.forget, strangers)

    def losses(step):
        batches = [rows.batch(step) for rows in sets]
        return [{"loss": sum(cross_entropy(model(b.tokens, at=b.scored), b.answers) for b in batches)}]

    model.train()
    minimise(list(model.parameters()), losses, 90, 8e-3, bench.folder, "x", 0)
    bench.forget.calibration = bench.rows(bench.world.forget, encode=encode_fact)
    return model.eval()


@torch.no_grad()
def test_belief_is_a_mean_over_rows_of_probabilities_and_of_hits(wordy_bench):
    model, rows = wordy_bench.model("dense"), wordy_bench.forget.calibration
    each, hits = [], []
    for tokens, labels in rows.examples:
        p = model(torch.tensor([tokens]))[0].softmax(-1)
        each.append(math.prod(float(p[t, label]) for t, label in enumerate(labels) if label >= 0))
        hits.append(all(int(p[t].argmax()) == label for t, label in enumerate(labels) if label >= 0))
    found = belief(model, rows)
    assert found.p == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found.hit == pytest.approx(sum(hits) / len(hits))
    assert found.in_three == pytest.approx(sum(1 - (1 - p) ** 3 for p in each) / len(each), rel=1e-4)


@pytest.mark.parametrize("ours, enough", [
    ((0.2, 0.3), True), ((0.1, 0.0), True), ((0.1, 0.4), False), ((0.3, 0.0), False)])
def test_belief_is_at_most_anothers_where_both_its_numbers_are(ours, enough):
    assert Belief(*ours, 0.5).at_most(Belief(0.2, 0.3, 0.4)) == enough


def test_the_belief_of_strangers_is_the_targets_on_the_same_rows_about_nobody(knowing, wordy_bench):
    rows = wordy_bench.forget.calibration
    level, known = strangers_belief(knowing, rows), belief(knowing, rows)
    parts = []
    for draw in range(5):
        twins = wordy_bench.world.twins(rows.rows, np.random.default_rng([0x57, 0, draw]))
        parts.append(belief(knowing, wordy_bench.rows(twins, encode=encode_fact)))
    assert level.p == pytest.approx(sum(part.p for part in parts) / 5, rel=1e-5) and len(set(parts)) == 5
    assert level.hit == pytest.approx(sum(part.hit for part in parts) / 5, rel=1e-5)
    assert level.p < 0.5 * known.p and level.hit < known.hit  # it knows what it learnt


def test_one_target_is_asked_about_strangers_once_and_another_anew(knowing, wordy_bench, monkeypatch):
    rows, other = wordy_bench.forget.calibration, wordy_bench.model("dense", 1)
    first = strangers_belief(knowing, rows)
    with monkeypatch.context() as patched:
        patched.setattr(type(rows), "as_strangers", None)  # cannot be asked
        assert strangers_belief(knowing, rows) is first
    assert strangers_belief(other, rows) != first == strangers_belief(knowing, rows)


def test_rows_without_calibration_say_so(wordy_bench):
    assert wordy_bench.forget.calibrating() is wordy_bench.forget.calibration
    with pytest.raises(UserError, match="no strangers to compare with"):
        wordy_bench.retain.calibrating()


def test_until_strangers_ends_with_the_first_epoch_whose_facts_are_believed_no_more(knowing, wordy_bench):
    bench, rows, path = wordy_bench, wordy_bench.forget.calibration, []
    model, level = copy.deepcopy(knowing), strangers_belief(knowing, rows)
    stop = until_strangers(knowing, rows)

    def look(watched, epoch, steps, seconds):
        path.append(belief(watched, rows))
        return stop(watched, epoch, steps, seconds)

    def losses(step):
        batch = rows.batch(step)
        return [{"loss": -cross_entropy(model(batch.tokens, at=batch.scored), batch.answers)}]

    args = bench.args("full", epochs=40, lr=5e-4)
    report = fitting(args, bench.forget, bench.folder, after_epoch=look)(model, list(model.parameters()), losses)
    assert 1 < len(path) < 40 and report["steps"] == 3 * len(path)
    enough = [found.at_most(level) for found in path]
    assert enough == [False] * (len(path) - 1) + [True]
    assert stop(model, 1, 1, 0.0) and not stop(knowing, 1, 1, 0.0)  # by what the model is, not by when it is asked


@pytest.mark.parametrize("enough, deep, ends", [(2, 4, 4), (4, 2, 4), (3, 3, 3), (2, 9, 6), (9, 2, 6)])
def test_training_ends_where_the_rule_and_the_methods_own_condition_say_so(wordy_bench, enough, deep, ends):
    """The method's own is asked only where the rule says that it is enough, of a model that does not train."""
    bench, model, asked = wordy_bench, wordy_bench.model("dense"), []

    def losses(step):
        batch = bench.forget.batch(step)
        return [{"loss": cross_entropy(model(batch.tokens, at=batch.scored), batch.answers)}]

    def is_deep(seen):
        asked.append(epochs[-1])
        return seen is model and not seen.training and epochs[-1] >= deep

    epochs = []
    fit = fitting(bench.args("full", epochs=6), bench.forget, bench.folder,
                  after_epoch=lambda seen, epoch, *_: epochs.append(epoch) or epoch >= enough)
    report = fit(model, list(model.parameters()), losses, deep=is_deep)
    assert report["steps"] == 3 * ends and asked == list(range(enough, ends + 1))


def stopped(folder):
    """The state.pt of two weights after three of five steps."""
    fuzz.train_toy(folder, stop=3)
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("change", [
    lambda state: state.pop("log"), lambda state: state.update(step=-1), lambda state: state.update(step=True),
    lambda state: state["parameters"].pop(), lambda state: state["parameters"].append(torch.ones(2)),
    lambda state: state["parameters"].__setitem__(0, torch.ones(2, 3)),
    lambda state: state["parameters"].__setitem__(0, torch.ones(3, 2).double()),
    lambda state: state["parameters"][1].fill_(math.nan), lambda state: state.pop("optimizer"),
    lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(7)),
    lambda state: state["optimizer"]["state"][0].pop("step"), lambda state: state["optimizer"]["state"].update({9: {}}),
    lambda state: state["optimizer"]["param_groups"][0].update(betas="x"),
    lambda state: state["optimizer"]["param_groups"].pop(), lambda state: state.update(log="{}\n"),
    lambda state: state.update(log=state["log"] + '{"step": 3}\n'), lambda state: state.update(log="{"),
    lambda state: state.update(report={"steps": "many"}),
], ids=range(18))
def test_a_state_of_other_shapes_steps_or_kinds_is_refused(tmp_path, change):
    state = stopped(tmp_path)
    change(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt"):
        fuzz.train_toy(tmp_path)


def test_a_state_as_it_was_kept_goes_on(tmp_path):
    assert stopped(tmp_path)["step"] == 3
    fuzz.train_toy(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
