"""metrics/choice.py: the prompt letter by letter, rows good and bad, accuracy by hand."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from metrics.choice import accuracy, chance, choose, letters, prompt, read_choices

ROW = {"question": " Which one? ", "choices": ["red", "green", "blue", "none of them"], "answer": 2}
SHORT = {"question": "Yes?", "choices": ["yes", "no"], "answer": 1}


# ---- prompts ----------------------------------------------------------------------------------------------------

def test_prompt_is_that_of_the_harness():
    assert prompt(ROW) == "Which one?\nA. red\nB. green\nC. blue\nD. none of them\nAnswer:"
    assert letters(ROW) == [" A", " B", " C", " D"]
    assert prompt(SHORT) == "Yes?\nA. yes\nB. no\nAnswer:" and letters(SHORT) == [" A", " B"]


# ---- rows -------------------------------------------------------------------------------------------------------

def write(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_answers_are_read_as_places_or_letters(tmp_path):
    rows = read_choices(write(tmp_path, ROW, "", ROW | {"answer": "A"}, ROW | {"answer": "D"}, SHORT | {"answer": 0},
                              SHORT | {"question": "a\u2028b"}))
    assert [row["answer"] for row in rows] == [2, 0, 3, 0, 1]
    assert rows[0]["choices"] == ROW["choices"] and rows[4]["question"] == "a\u2028b"


def test_other_columns_are_kept(tmp_path):
    assert read_choices(write(tmp_path, SHORT | {"subject": "virology"}))[0]["subject"] == "virology"


@pytest.mark.parametrize("row, says", [
    ("{", "is not JSON"), ("[1]", "is not a JSON object"),
    ({"question": "?", "choices": ["a", "b"]}, "lacks 'answer'"),
    ({"choices": ["a", "b"], "answer": 0}, "lacks 'question'"), ({"question": "?", "answer": 0}, "lacks 'choices'"),
    (SHORT | {"question": "  "}, "'question' is not"), (SHORT | {"question": 3}, "'question' is not"),
    (SHORT | {"choices": "ab"}, "'choices' is not a list"), (SHORT | {"choices": ["a", ""]}, "'choices' is not a list"),
    (SHORT | {"choices": ["a", 2]}, "'choices' is not a list"), (SHORT | {"choices": ["a"]}, "has 1 entries"),
    (SHORT | {"choices": ["a"] * 27}, "has 27 entries"), (SHORT | {"choices": []}, "has 0 entries"),
    (SHORT | {"answer": 2}, "'answer' is 2: give 0 to 1 or A to B"), (SHORT | {"answer": -1}, "'answer' is -1"),
    (SHORT | {"answer": "C"}, "'answer' is \"C\""), (SHORT | {"answer": "a"}, "'answer' is \"a\""),
    (SHORT | {"answer": "1"}, "'answer' is \"1\""), (SHORT | {"answer": "AB"}, "'answer' is \"AB\""),
    (SHORT | {"answer": ""}, "'answer' is"), (SHORT | {"answer": True}, "'answer' is true"),
    (SHORT | {"answer": 1.0}, "'answer' is 1.0"), (SHORT | {"answer": None}, "'answer' is null"),
])
def test_a_bad_row_is_named_in_one_line(tmp_path, row, says):
    with pytest.raises(UserError) as error:
        read_choices(write(tmp_path, SHORT, "", row))
    message = str(error.value)
    assert "mine.jsonl line 3" in message and says in message and "\n" not in message


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        read_choices(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"mine\.jsonl is empty"):
        read_choices(write(tmp_path, "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UserError, match=r"bytes\.jsonl line 1 is not JSON \(not UTF-8 text\)"):
        read_choices(tmp_path / "bytes.jsonl")


# ---- scores -----------------------------------------------------------------------------------------------------

def test_accuracy_by_hand():
    log_probs = [[-3, -1, -2, -4], [-1, -2, -3, -4], [-5, -4], [-2, -2]]
    assert accuracy(log_probs, [1, 3, 1, 0]) == 3 / 4
    assert accuracy(log_probs, [1, 3, 1, 1]) == 2 / 4  # of equal ones the first is taken


def test_a_ruled_out_choice_is_never_taken():
    assert choose([-math.inf, -800, -math.inf]) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 0), min_size=2, max_size=6), st.floats(-20, 20))
def test_the_choice_is_the_largest_and_stays_so_with_a_constant_added(log_probs, shift):
    best = choose(log_probs)
    assert all(log_probs[best] >= x for x in log_probs) and log_probs.index(max(log_probs)) == best
    moved = [x + shift for x in log_probs]
    assert moved[choose(moved)] == moved[best]
    assert accuracy([log_probs], [best]) == 1 and accuracy([log_probs], [(best + 1) % len(log_probs)]) == 0


def test_what_cannot_be_scored():
    for bad in ([], [math.nan, -1], [-1, math.nan]):
        with pytest.raises(ValueError, match="none of them NaN"):
            choose(bad)
    with pytest.raises(ValueError, match="at least one question"):
        accuracy([], [])
    with pytest.raises(ValueError):
        accuracy([[-1, -2]], [0, 1])
    with pytest.raises(ValueError, match="at least one question"):
        chance([])


def test_chance_is_a_mean_over_questions():
    assert chance([ROW]) == 0.25 and chance([ROW, SHORT]) == pytest.approx(0.375)
