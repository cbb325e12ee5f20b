"""lab/convert.py on small files of each benchmark's schema: what comes out is what our readers take in."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import read_rows
from lab.convert import main, muse
from metrics.choice import read_choices

QUESTION = {"question": "Which of these?", "choices": ["a", "b", "c", "d"], "answer": 2}
PROBE = {"query": "Ana Vell was born in ___.", "answer": "Orsk", "level": "1", "type": "simple", "subject": "Ana Vell"}


def converted(folder, benchmark: str, rows: list, as_list: bool = True):
    text = json.dumps(rows) if as_list else "\n".join(json.dumps(row) for row in rows)
    (folder / "theirs.json").write_text(text)
    main([benchmark, str(folder / "theirs.json"), str(folder / "ours.jsonl")])
    return folder / "ours.jsonl"


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("benchmark, theirs, ours", [
    ("wmdp", {"title": "T", "abstract": "A", "text": "A passage.", "doi": "10.1"}, {"text": "A passage."}),
    ("rwku", PROBE, {"question": PROBE["query"], "answer": "Orsk", "subject": "Ana Vell", "value": "Orsk"}),
    ("rwku", {"subject": "Ana Vell", "text": "Ana."}, {"text": "Ana.", "subject": "Ana Vell"}),
    ("muse", {"question": "Who?", "answer": "Ana."}, {"question": "Who?", "answer": "Ana."}),
    ("muse", {"prompt": "It was a", "gt": "dark night."}, {"text": "It was a dark night."}),
    ("muse", {"prompt": "It was a ", "gt": "dark night."}, {"text": "It was a dark night."}),
    ("muse", {"text": "A whole book."}, {"text": "A whole book."}),
    ("muse", "A whole book.", {"text": "A whole book."}),
])
def test_rows_are_what_train_py_reads(tmp_path, benchmark, theirs, ours, as_list):
    assert read_rows(converted(tmp_path, benchmark, [theirs] * 2, as_list)) == [ours] * 2


@pytest.mark.parametrize("as_list", [True, False])
def test_questions_of_wmdp_are_what_eval_py_reads(tmp_path, as_list):
    assert read_choices(converted(tmp_path, "wmdp", [QUESTION | {"id": 7}, QUESTION], as_list)) == [QUESTION] * 2


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_a_verbatim_passage_holds_both_parts_in_order(prompt, gt):
    text = muse({"prompt": prompt, "gt": gt}, "row 1")["text"]
    assert text.startswith(prompt) and text.endswith(gt) and len(text) - len(prompt) - len(gt) in (0, 1)


@pytest.mark.parametrize("benchmark, rows, says", [
    ("wmdp", [QUESTION, QUESTION | {"answer": 4}], "theirs.json row 2: 'answer' is 4"),
    ("wmdp", [QUESTION, {"query": "?"}], "row 2 has none of the columns"), ("rwku", [QUESTION], "row 1 has none of"),
    ("rwku", [PROBE | {"answer": None}], "row 1: 'answer' is not a non-empty string"),
    ("rwku", [{"query": "Who?"}], "row 1 lacks 'answer'"), ("muse", [{"prompt": "It"}], "row 1 has none of"),
    ("muse", [3], "row 1 is neither a JSON object nor a string"), ("muse", [" "], "row 1: 'text' is not"),
    ("muse", ["half \ud83d"], "row 1 holds half a character"), ("muse", [], "lacks|neither|none of|is empty"),
])
def test_rows_of_another_schema_are_one_line_and_exit_2_and_nothing_is_written(tmp_path, capsys, benchmark, rows, says):
    with pytest.raises(SystemExit) as stop:
        converted(tmp_path, benchmark, rows)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert any(part in error for part in says.split("|")), error
    assert not (tmp_path / "ours.jsonl").exists()


def test_files_that_are_not_there(tmp_path, capsys):
    for file, out, says in (("no.json", "ours.jsonl", "no.json does not exist"),
                            ("theirs.json", "no/such/ours.jsonl", "could not be written")):
        (tmp_path / "theirs.json").write_text(json.dumps([QUESTION]))
        with pytest.raises(SystemExit) as stop:
            main(["wmdp", str(tmp_path / file), str(tmp_path / out)])
        assert stop.value.code == 2 and says in capsys.readouterr().err
