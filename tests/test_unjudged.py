"""What cannot be judged is said: broken models, targets that know nothing, rows that are in both sets, choices."""

import math

import pytest
import torch

from data.rows import DataSet, check_apart
from errors import UserError
from lab import probes, tables
from metrics.score import evaluate, is_broken, summarise, unjudged
from metrics.tofu import RowScores

ROWS = [{"question": "Who was it?", "answer": "It was Ana.", "perturbed_answer": ["It was Bo."]},
        {"question": "Where?", "answer": "In Orsk.", "perturbed_answer": ["In Ulm."]}]


def scores(exact: list[bool], right=(1.0, 2.0), wrong=((2.0,), (3.0,))) -> dict[str, RowScores]:
    return {"forget": RowScores([1.0, 2.0], list(right), [list(w) for w in wrong], [1.0, 1.0], exact),
            "retain": RowScores([1.0], [1.0], [[2.0]], [1.0], [True])}


def notes(of: dict[str, dict], **data) -> str:
    rows = DataSet("mine", ROWS, ROWS, scored={"forget": ROWS, "retain": ROWS[:1]}, utility=("retain",), **data)
    return "; ".join(unjudged(summarise(of, rows), of, rows))


def test_the_reason_for_each_number_that_is_absent_is_given():
    knows, knows_not = scores([True, False]), scores([False, False], (2.0, 3.0))
    assert notes({"target": knows, "reference": knows_not, "unlearned": knows_not}, holdout=ROWS) == ""
    assert notes({"target": knows, "unlearned": knows_not}, holdout=ROWS) == (
        "no forget quality: no reference was given")
    assert "answers none of the forget rows" in notes({"target": knows_not, "reference": knows_not,
                                                       "unlearned": knows_not}, holdout=ROWS)
    bare = scores([True, False], wrong=((), ()))
    assert "no forget row has wrong answers" in notes({"target": bare, "reference": bare, "unlearned": bare})
    assert "no membership inference: this data has no rows" in notes({"target": knows})


def test_a_broken_model_is_scored_and_said_to_be_broken(dense, tokenizer):
    model = dense(vocab_size=tokenizer.vocab_size, max_len=128)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    of = evaluate(model, tokenizer, DataSet("mine", ROWS, ROWS, scored={"forget": ROWS, "retain": ROWS}))
    assert is_broken(of) and not is_broken(scores([True, True]))
    data = DataSet("mine", ROWS, ROWS, holdout=ROWS)
    assert probes.membership(probes.suspects(model, tokenizer, data)) == {}
    assert probes.choice_accuracy(model, tokenizer, [{"question": "?", "choices": ["a", "b"], "answer": 0}]) is None
    assert "unlearned: its losses are not numbers" in notes({"target": scores([True, True]), "unlearned": of})


def test_notes_stand_below_the_table():
    run = {"method": "uoe", "forget_loss": None, "retain_loss": None, "trainable_parameters": 1, "total_parameters": 2,
           "steps": 3, "diverged": False, "notes": ["no forget quality: no reference was given"]}
    assert tables.table({"target": {}, "run": run}).endswith("note: no forget quality: no reference was given")


def test_a_row_to_forget_and_to_keep_is_refused():
    check_apart(ROWS[:1], [ROWS[0] | {"answer": "It was Bo."}, {"text": "It was Ana."}])
    with pytest.raises(UserError, match=r"1 rows are to be forgotten and to be kept as well, the first 'Where\?'"):
        check_apart(ROWS, [ROWS[1] | {"value": "Orsk"}])


def test_choices_without_tokens_of_their_own_are_refused(dense):
    class Alike:
        front = ()

        def encode(self, text):
            return [3] * len(text.split("\n"))

    with pytest.raises(UserError, match="choices of question 1 have no tokens of their own"):
        probes.choice_accuracy(dense(), Alike(), [{"question": "?", "choices": ["a", "b"], "answer": 0}])
