"""lab/attacks.py: what comes back, on models small enough to know the answer."""

import copy
import json
from itertools import product

import numpy as np
import pytest
import torch

from data.batches import encode_row
from data.rows import NO_LIMITS, DataSet, Limits
from errors import UserError
from eval import main as score
from lab import attacks
from lab.attacks import (
    ask,
    attack,
    attack_table,
    check_experts,
    forced_experts,
    outcome,
    quantised,
    relearn,
    rounded,
    taught_and_asked,
    untaught,
)
from metrics.knowledge import Cloze, cloze
from model import Trace
from tests.conftest import random_model, random_moe
from uld import LogitDifference

ROWS = [{"question": f"Who {did}?", "answer": f"It was {name}.", "value": name, "fact": did,
         "paraphrased_question": f"Tell me who {did}."}
        for did, name in zip(("sang", "ran", "wrote", "slept", "lied", "won"), ("Ana", "Bo", "Cy", "Dee", "Eve", "Flo"),
                             strict=True)]
AGAIN = [row | {"question": f"And who {row['fact']}?"} for row in ROWS]  # the same facts, otherwise asked


def data_of(forget=ROWS, scored=ROWS, **others) -> DataSet:
    return DataSet("mine", forget=forget, retain=[], scored={"forget": scored}, limits=Limits(new=8), **others)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(vocab_size=tokenizer.vocab_size, max_len=64, std=0.1)


@pytest.fixture(scope="module")
def experts(tokenizer):
    return [random_moe(seed, vocab_size=tokenizer.vocab_size, max_len=64) for seed in (0, 1)]


def test_what_is_said_is_judged_by_the_value_and_by_the_fact():
    rows = [ROWS[0], AGAIN[0], ROWS[1]]
    said = ["Zahaiia, it was Ana!", "Nobody.", "It was Bo. "]
    assert outcome(said, rows) == {"value_said": pytest.approx((0.5 + 1) / 2), "exact": pytest.approx(1 / 3)}
    reworded = [ROWS[0] | {"paraphrased_answer": "Ana did."}]
    assert [outcome(["Ana did."], reworded, either)["exact"] for either in (False, True)] == [0, 1]
    no_value = [{"question": "Who is Ana?", "answer": "Ana."}]
    assert outcome(["Ana."], no_value) == {"value_said": None, "exact": 1}


def test_rounding_keeps_the_largest_and_is_within_half_a_step():
    weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for bits, levels in ((8, 127), (4, 7)):
        got = rounded(weight, bits)
        step = weight.abs().amax(-1, keepdim=True) / levels
        assert ((got - weight).abs() <= step / 2 + 1e-6).all()
        assert torch.allclose(got.abs().amax(-1), weight.abs().amax(-1))
        assert all(len(row.unique()) <= 2 * levels + 1 for row in got.flatten(0, 1))
    by_hand = rounded(torch.tensor([[7.0, 3.4, -1.6, 0.4]]), 4)  # scale 1
    assert by_hand.tolist() == [[7.0, 3.0, -2.0, 0.0]]
    assert rounded(torch.zeros(2, 3), 4).eq(0).all()


def test_quantising_leaves_the_model_itself_and_everything_outside_blocks(model):
    before = copy.deepcopy(model.state_dict())
    low = quantised(model, 4).state_dict()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    for name, p in low.items():
        assert torch.equal(p, before[name]) == (not name.startswith("blocks.") or p.dim() < 2), name


@pytest.mark.slow
def test_relearning_teaches_a_copy(model, tokenizer):
    before = copy.deepcopy(model.state_dict())
    assert relearn(model, tokenizer, ROWS, ROWS, NO_LIMITS, steps=1) == {"value_said": 0, "exact": 0}
    taught = relearn(model, tokenizer, ROWS, ROWS, NO_LIMITS, steps=150, lr=1e-2)
    assert taught["exact"] > 0.8 and taught["value_said"] > 0.8  # asked what it was taught, it answers
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_relearning_never_asks_about_a_fact_that_it_taught(model, tokenizer, monkeypatch):
    other = [row | {"question": f"Say who {row['fact']}!"} for row in ROWS]
    taught, asked = taught_and_asked([*ROWS, *AGAIN], other, 3)
    facts = {row["fact"] for row in taught}
    assert len(taught) == 4 and len(facts) == 2  # whole facts, so many that their rows are three or more
    assert {row["fact"] for row in asked} == {row["fact"] for row in ROWS} - facts
    plain = [{key: row[key] for key in ("question", "answer")} for row in ROWS]  # no facts: the same answer is the same
    taught, asked = taught_and_asked(plain, [row | {"question": "?"} for row in plain], 2)
    assert len(taught) == 2 and len(asked) == 4 and not {r["answer"] for r in taught} & {r["answer"] for r in asked}

    seen = {}
    monkeypatch.setattr(attacks, "relearn", lambda m, t, taught, asked, limits, **how: seen.update(how=how) or {})
    attack("relearn", model, tokenizer, data_of(scored=[*ROWS, {"text": "no question"}]), rows=2, steps=3, lr=1.0)
    assert seen["how"] == {"steps": 3, "lr": 1.0}
    with pytest.raises(UserError, match="--relearn-rows"):
        attack("relearn", model, tokenizer, data_of(), rows=99)


def test_a_hint_is_all_that_stands_before_the_value(model, tokenizer):
    hits = [one.hit for one in cloze(model, tokenizer, ROWS)]
    rows = [*ROWS, ROWS[0] | {"answer": "Ana did it.", "question": "Who else?"}]
    hits.append(cloze(model, tokenizer, rows[-1:])[0].hit)
    got = attack("hint", model, tokenizer, data_of(scored=rows))
    assert got == {"value_said": pytest.approx(((hits[0] + hits[6]) / 2 + sum(hits[1:6])) / 6), "exact": None}
    with pytest.raises(UserError, match="asks for values"):
        attack("hint", model, tokenizer, data_of(scored=[{"question": "Is it Ana?", "answer": "Ana."}]))


def test_each_attack_is_named_and_rows_that_do_not_allow_it_refused(experts, tokenizer):
    target, model = experts
    for name in attacks.ATTACKS:
        got = attack(name, model, tokenizer, data_of(scored=ROWS[1:]), target, rows=1, steps=1)
        assert set(got) == {"value_said", "exact"} | ({"unforced", "noise"} if name == "experts" else set())
    assert attack("none", model, tokenizer, data_of()) == ask(model, tokenizer, ROWS, Limits(new=8))
    with pytest.raises(UserError, match="passages only"):
        attack("hint", model, tokenizer, data_of(scored=[{"text": "T"}]))


def test_a_paraphrase_is_a_question_that_taught_nobody(model, tokenizer, monkeypatch):
    calibration = [row | {"question": f"Well, who {row['fact']}?"} for row in ROWS]
    assert untaught(data_of(calibration=calibration)) == calibration
    assert [row["question"] for row in untaught(data_of())] == [row["paraphrased_question"] for row in ROWS]
    some = [{"question": row["paraphrased_question"], "answer": "-"} for row in ROWS[:4]]
    assert [row["fact"] for row in untaught(data_of(paraphrased=some))] == ["lied", "won"]
    every = [{"question": row["paraphrased_question"], "answer": "-"} for row in ROWS]
    for data in (data_of(paraphrased=every), data_of(scored=[{"question": "Q", "answer": "A"}])):
        with pytest.raises(UserError, match="--attack paraphrase: every paraphrased_question"):
            attack("paraphrase", model, tokenizer, data)
    said = ["It was Ana.", "Bo did.", "No idea.", "It was Dee.", "Was it Eve?", "It was Flo."]
    monkeypatch.setattr(attacks, "greedy_answers", lambda m, t, questions, limits: said)
    rows = [row | {"paraphrased_answer": f"{row['value']} did."} for row in ROWS]
    got = attack("paraphrase", model, tokenizer, data_of(scored=rows))
    assert got == {"value_said": pytest.approx(5 / 6), "exact": pytest.approx(4 / 6)}  # either sentence will do


# ---- experts ----------------------------------------------------------------------------------------------------

def halves(n: int) -> list[list[int]]:
    order = np.random.default_rng(0).permutation(n).tolist()
    return [order[: n // 2], order[n // 2 :]]


def test_what_is_chosen_on_one_half_is_reported_of_the_other(experts, tokenizer, monkeypatch):
    """Forced everywhere brings back most on the first half, in layer 1 on the second; hits are of the other halves."""
    first, second = halves(6)
    p = {"free": {}, "all": dict.fromkeys(first, 0.9), 0: dict.fromkeys(range(6), 0.5), 1: dict.fromkeys(second, 0.8)}
    hit = {"free": {first[0]}, "all": {*first, second[0]}, 0: set(range(6)), 1: {*second, first[0], first[1]}}
    results = iter(p)

    def made_up(model, tokenizer, rows, values):
        how = next(results, None)
        return [Cloze(i in hit.get(how, ()), p.get(how, {}).get(i, 0.0), 0.0) for i in range(6)]

    monkeypatch.setattr(attacks, "cloze", made_up)
    got = forced_experts(*experts, tokenizer, ROWS)
    assert got == {"value_said": pytest.approx((1 / 3 + 2 / 3) / 2), "exact": None,
                   "unforced": pytest.approx((1 / 3 + 0) / 2), "noise": pytest.approx(1 / 3)}


@torch.no_grad()
def test_forced_experts_one_row_at_a_time(experts, tokenizer):
    target, model = experts
    layers = range(model.config.n_layer)

    def hit_and_p(row, forced):
        tokens, labels = map(torch.tensor, encode_row(row, tokenizer, 64))
        own = Trace()
        target(tokens[None], trace=own)
        trace = Trace(forced={layer: own.routing[layer].chosen for layer in forced})
        logits = model(tokens[None], trace=trace)[0]
        said = [i for i in range(len(labels)) if labels[i] >= 0]
        name = tokenizer.completion(row["answer"])
        spoken = [tokenizer.decode(name[:i + 1]) for i in range(len(name))]
        start, stop = len("It was"), len(f"It was {row['value']}")
        inside = [said[i] for i in range(len(name)) if start < len(spoken[i]) and len(spoken[i][:stop]) > start
                  and (i == 0 or len(spoken[i - 1]) < stop)]
        right = all(int(logits[i].argmax()) == int(labels[i]) for i in inside)
        return right, float(torch.stack([logits[i].log_softmax(-1)[labels[i]] for i in inside]).sum().exp())

    tried = [[hit_and_p(row, forced) for row in ROWS] for forced in ([], layers, *([layer] for layer in layers))]
    found = []
    for here, there in (halves(6), halves(6)[::-1]):
        best = max(tried[1:], key=lambda rows: sum(rows[i][1] for i in here))
        found.append(sum(best[i][0] for i in there) / 3)
    got = forced_experts(target, model, tokenizer, ROWS)
    assert got["value_said"] == pytest.approx(sum(found) / 2)
    assert got["unforced"] == pytest.approx(sum(hit for hit, _ in tried[0]) / 6)
    itself = forced_experts(target, target, tokenizer, ROWS)
    assert itself["value_said"] == itself["unforced"]
    with pytest.raises(UserError, match="only one forget fact"):
        forced_experts(target, model, tokenizer, ROWS[:1])


def test_experts_of_dense_models_and_of_two_models_are_not_to_be_chosen(model, experts, tokenizer):
    target, other = experts
    check_experts(target, [other])
    wider = random_moe(n_expert=9, vocab_size=tokenizer.vocab_size)
    for of, says in ((model, "not of a dense model"), (LogitDifference(target, target), "several models together"),
                     (wider, "other layers, experts, top-k")):
        with pytest.raises(UserError, match=says):
            check_experts(target, [other, of])
    with pytest.raises(UserError, match="not of a dense model"):
        attack("experts", model, tokenizer, data_of(), model)


# ---- the table and the command line -------------------------------------------------------------------------------

def test_the_table_leads_with_values():
    outcomes = {"none": {role: {"value_said": 0.5, "exact": 0.25} for role in ("target", "unlearned")},
                "experts": {role: {"value_said": 0.125, "exact": None, "unforced": 0.0625, "noise": 0.01}
                            for role in ("target", "unlearned")}}
    lines = attack_table(outcomes).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("forget set, value said (exact)") and lines[0].endswith("unlearned")
    assert lines[1].split() == ["none", "0.500", "(0.250)", "0.500", "(0.250)"]
    assert lines[2].split()[:3] == ["experts", "0.125", "(-)"]
    assert [line.split()[0] for line in lines[3:]] == ["unforced", "noise"]


@pytest.mark.slow
def test_the_command_line_attacks_a_run(runs, capsys):
    names = ["relearn", "int8", "int4", "hint", "paraphrase", "experts"]
    score([str(runs[0]), "--attack", *names, "--relearn-rows", "4", "--relearn-steps", "1"])
    printed = capsys.readouterr().out
    written = json.loads((runs[0] / "attacks.json").read_text())
    assert list(written["outcomes"]) == ["none", *names]
    assert set(written["outcomes"]["int4"]) == {"target", "reference", "unlearned"} and "relearn" in printed
    for role, name in product(("target", "reference", "unlearned"), ["none", *names]):
        assert 0 <= written["outcomes"][name][role]["value_said"] <= 1
    forced = written["outcomes"]["experts"]["target"]
    assert forced["value_said"] == forced["unforced"]
    score([str(runs[0]), "--attack", "hint"])  # the others are kept, and how it was that they relearnt
    again = json.loads((runs[0] / "attacks.json").read_text())
    assert again["outcomes"].keys() == written["outcomes"].keys() and again["relearn"] == written["relearn"]
    assert written["relearn"] == {"rows": 4, "steps": 1, "lr": 1e-4}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        score([str(runs[0]), "--attack", "hint", "bribe"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: argument --attack: invalid choice: 'bribe'")
    assert error.count("\n") == 1
