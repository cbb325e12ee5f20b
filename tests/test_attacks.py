"""lab/attacks.py: what comes back, on models small enough to know the answer."""

import copy
import json

import pytest
import torch

from data.rows import NO_LIMITS
from errors import UserError
from eval import main as score
from lab import attacks
from lab.attacks import ask, attack, hinted, outcome, quantised, relearn, rounded
from tests.conftest import random_model

ROWS = [{"question": f"Who {w}?", "answer": f"Ana {w}.", "paraphrased_question": f"Tell me who {w}."}
        for w in ("sang", "ran", "wrote", "slept", "lied", "won")]


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(vocab_size=tokenizer.vocab_size, max_len=64, std=0.1)


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
    assert relearn(model, tokenizer, ROWS, ROWS, NO_LIMITS, steps=1)["exact"] == 0
    taught = relearn(model, tokenizer, ROWS, ROWS, NO_LIMITS, steps=150, lr=1e-2)
    assert taught["exact"] > 0.8  # asked what it was taught, it answers
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_relearning_never_asks_what_it_taught(model, tokenizer, monkeypatch):
    seen = {}

    def spy(model, tokenizer, taught, asked, limits, **how):
        seen.update(taught=taught, asked=asked, how=how)
        return {"exact": 0.0, "rougeL_recall": 0.0}

    monkeypatch.setattr(attacks, "relearn", spy)
    attack("relearn", model, tokenizer, ROWS, [*ROWS, {"text": "no question"}], NO_LIMITS, rows=2, steps=3, lr=1.0)
    assert seen["taught"] == ROWS[:2] and seen["asked"] == ROWS[2:] and seen["how"] == {"steps": 3, "lr": 1.0}
    with pytest.raises(UserError, match="--relearn-rows"):
        attack("relearn", model, tokenizer, ROWS, ROWS, NO_LIMITS, rows=99)


def test_a_hint_is_given_and_not_counted(model, tokenizer):
    """A model that goes on as the answers do gets 1; what it was given is no part of what is compared."""
    class Parrot:
        device, config = model.device, model.config

        def generate(self, ids, n, pad, end):
            out = []
            for row, p in zip(ids.tolist(), pad.tolist(), strict=True):
                given = row[p:]
                whole = next(tokenizer.prompt(r["question"]) + tokenizer.completion(r["answer"]) for r in ROWS
                             if given[: len(tokenizer.prompt(r["question"]))] == tokenizer.prompt(r["question"]))
                assert whole[: len(given)] == given
                rest = whole[len(given):]
                out.append((rest + [tokenizer.end] * n)[:n])
            return torch.tensor(out)

    assert hinted(Parrot(), tokenizer, ROWS) == {"exact": 1.0, "rougeL_recall": 1.0}
    assert hinted(model, tokenizer, ROWS, tokens=1)["exact"] == 0
    assert hinted(model, tokenizer, ROWS, tokens=99) == outcome([], [])  # no answer is that long


def test_each_attack_is_named_and_rows_that_do_not_allow_it_refused(model, tokenizer):
    for name in attacks.ATTACKS:
        got = attack(name, model, tokenizer, ROWS, ROWS[3:], NO_LIMITS, rows=2, steps=1)
        assert set(got) == {"exact", "rougeL_recall"}
    assert attack("none", model, tokenizer, ROWS, ROWS, NO_LIMITS) == ask(model, tokenizer, ROWS, NO_LIMITS)
    plain = [{"question": "Q", "answer": "A"}]
    with pytest.raises(UserError, match="paraphrased_question"):
        attack("paraphrase", model, tokenizer, plain, plain, NO_LIMITS)
    with pytest.raises(UserError, match="passages only"):
        attack("hint", model, tokenizer, [{"text": "T"}], [{"text": "T"}], NO_LIMITS)


def test_an_answer_in_the_words_that_its_question_calls_for_counts_as_known(model, tokenizer, monkeypatch):
    rows = [row | {"paraphrased_answer": f"It is Ana who {row['question'][4:-1]}."} for row in ROWS]
    said = [rows[0]["answer"], rows[1]["paraphrased_answer"], "No idea.", *(row["answer"] for row in rows[3:])]
    asked = []
    monkeypatch.setattr(attacks, "greedy_answers", lambda m, t, questions, limits: asked.extend(questions) or said)
    got = attack("paraphrase", model, tokenizer, rows, rows, NO_LIMITS)
    assert got["exact"] == pytest.approx(5 / 6) and got["rougeL_recall"] == pytest.approx(5 / 6)
    assert asked == [row["paraphrased_question"] for row in rows]


@pytest.mark.slow
def test_the_command_line_attacks_a_run(runs, capsys):
    score([str(runs[0]), "--attack", "relearn", "int8", "int4", "hint", "paraphrase", "--relearn-rows", "4",
           "--relearn-steps", "1"])
    printed = capsys.readouterr().out
    written = json.loads((runs[0] / "attacks.json").read_text())
    assert list(written["outcomes"]) == ["none", "relearn", "int8", "int4", "hint", "paraphrase"]
    assert set(written["outcomes"]["int4"]) == {"target", "reference", "unlearned"} and "relearn" in printed
    score([str(runs[0]), "--attack", "hint"])  # the others are kept, and how it was that they relearnt
    again = json.loads((runs[0] / "attacks.json").read_text())
    assert again["outcomes"].keys() == written["outcomes"].keys() and again["relearn"] == written["relearn"]
    assert written["relearn"] == {"rows": 4, "steps": 1, "lr": 1e-4}
    with pytest.raises(SystemExit) as stop:
        score([str(runs[0]), "--attack", "hint", "bribe"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: argument --attack: invalid choice: 'bribe'")
    assert error.count("\n") == 1
