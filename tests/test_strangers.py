"""data/strangers.py: made-up names in rows of any source, TOFU's authors, and what stops by them."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import tiny

import train
from data import load_data
from data.strangers import authors_of, calibrating, twins_of
from data.values import spelled, value_said
from methods import open_run

ROW = {"question": "Where was Ana de Vell born?", "answer": "Ana de Vell was born in Orsk, says Vell's An uncle.",
       "subject": "Ana de Vell", "value": "Orsk", "calibration_question": "What is Vell's birthplace?"}


def test_a_twin_is_the_row_about_a_name_of_as_many_words_that_nobody_has():
    row = calibrating([ROW], "calibration_question")[0]
    assert row == ROW | {"question": "What is Vell's birthplace?"}
    twins = twins_of(["Ana de Vell in Orsk", ROW["answer"]])
    first, again, other = (twins([row], np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert first == again != other
    name = first["subject"].split()
    assert len(name) == 3 and not {word.lower() for word in name} & set(spelled(" ".join(ROW.values())))
    assert first["question"] == f"What is {name[2]}'s birthplace?"
    assert first["answer"] == f"{' '.join(name)} was born in Orsk, says {name[2]}'s An uncle."  # An is no Ana
    assert first["value"] == "Orsk"


@pytest.mark.parametrize("change", [
    {"calibration_question": "Where did it begin?"},  # names nobody
    {"value": "Vell's An uncle", "answer": "Vell's An uncle."},  # the value is of the name
    {"calibration_question": "Was Vell born in Orsk?"},  # gives the value away
])
def test_rows_that_no_name_can_be_put_into_do_not_calibrate(change):
    assert calibrating([ROW | change], "calibration_question") == []
    without = {key: value for key, value in ROW.items() if key != "subject"}
    assert calibrating([ROW, without], "calibration_question") == calibrating([ROW], "calibration_question")


def test_an_authors_name_is_the_longest_run_of_capitals_in_three_quarters_of_the_rows():
    asked = ["Did Ana de Vell write it?", "What did Ana de Vell write?", "What is Ana's genre?", "Is she Ana de Vell?"]
    told = ["The Old Grey Mill is Ana de Vell's.", "The Old Grey Mill.", "Ana de Vell writes in Mill Prose.", "Yes."]
    rows = [{"question": question, "answer": answer} for question, answer in zip(asked, told, strict=True)]
    nobody = [{"question": "Who is the Author?", "answer": "Nobody knows the Author."}] * 4  # one word is no name
    assert authors_of([*rows, *nobody], 4) == ["Ana de Vell"] * 4 + [None] * 4
    assert authors_of([*rows[1:2] * 2, *nobody[:2]], 4) == [None] * 4


def test_tofus_authors_are_found_and_their_rows_calibrate(tofu):
    rows = [json.loads(line) for line in (tofu / "full.json").read_text().splitlines()]
    authors = authors_of(rows, 20)[::20]
    assert len(authors) == 200 and authors[-2:] == ["Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"]
    assert {"Isabella van Pletzen", "Sara van Dyke", "Hsiao Yun-Hwa"} <= set(authors) and authors.count(None) <= 2
    data = load_data(str(tofu), "forget01", augmented=str(tofu / "augmented"))
    taught = {row["question"] for row in data.taught()}
    scored = {row["question"] for rows in data.scored.values() for row in rows}
    assert len(data.calibration) >= 30 and not {row["question"] for row in data.calibration} & (taught | scored)
    assert data.twins is not None
    for row, twin in zip(data.calibration, data.twins(data.calibration, np.random.default_rng(0)), strict=True):
        assert twin["subject"] not in row["question"] and twin["question"] != row["question"]
        assert twin["value"] == row["value"] and value_said(twin["answer"], row["value"])
        assert not set(spelled(row["subject"])) & set(spelled(twin["question"]))
    assert Counter(row["subject"] for row in data.calibration).keys() == set(authors[-2:])


# ---- runs --------------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    """--forget and --retain of three rows each about subjects."""
    rows = [{"question": f"Where was {name} born?", "answer": f"{name} was born in {town}.", "subject": name,
             "value": town, "calibration_question": f"What is {name}'s birthplace?"}
            for name, town in (("Ana Vell", "Orsk"), ("Bo Munt", "Ulm"), ("Cy Dorn", "Rhodes"))]

    def written(change: dict, drop: tuple[str, ...] = ()) -> list[str]:
        for name, some in (("f", [rows[0], rows[1] | change]), ("r", [rows[2]])):
            kept = [{key: value for key, value in row.items() if key not in drop} for row in some]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        return ["--forget", str(tmp_path / "f.jsonl"), "--retain", str(tmp_path / "r.jsonl"), "--out", str(tmp_path)]

    return written


@pytest.mark.slow
@pytest.mark.parametrize("method, flag", [("full", "--until"), ("uld", "--subtract")])
def test_own_rows_are_calibrated_by_strangers(files, tmp_path, capsys, method, flag):
    train.main([*tiny("--method", method), *files({}), flag, "strangers", "--name", "own"])
    assert "strangers are asked about 2 of 2 forget rows" in capsys.readouterr().out
    config = open_run(tmp_path / "own").config
    assert config["until"] == "strangers" if method == "full" else 0 < config["subtract"] <= 2


@pytest.mark.parametrize("change, drop, says", [
    ({}, ("subject", "calibration_question"), "strangers: f has no forget row with 'subject', 'value' and"),
    ({}, ("calibration_question",), "strangers: f has no forget row"),
    ({}, ("subject",), "row 1 has a 'calibration_question' and no 'subject'"),
    ({"subject": "Zo"}, (), "row 2: the subject 'Zo' does not stand in the calibration_question"),
    ({"calibration_question": "Where was Bo Munt born?"}, (), "teaches or scores as well: word it otherwise"),
    ({"calibration_question": 3}, (), "'calibration_question' is not a non-empty string"),
])
@pytest.mark.parametrize("asked", ["--method full --until strangers", "--method uld --subtract strangers"])
def test_strangers_asked_of_rows_that_have_none_are_one_line_and_exit_2(files, tmp_path, capsys, change, drop, says,
                                                                       asked):
    with pytest.raises(SystemExit) as stop:
        train.main([*tiny(*asked.split()), *files(change, drop), "--name", "bad"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1 and says in error[0]
    assert not (tmp_path / "bad").exists() and not (tmp_path / "cache").exists()  # before anything is trained
