"""lab/null.py: a reference in the place of the unlearned model."""

import json

import pytest

from lab.null import left_out, main, references_of


def ratios(shift: float) -> list[float]:
    return [shift + i / 10 for i in range(10)]


def test_one_that_is_far_from_all_others_is_outside_and_makes_room_for_them():
    """Four alike, one far off: judged by the four it is outside; where it is among the rest any distance is inside."""
    inside = left_out([ratios(0), ratios(0.01), ratios(0.02), ratios(0.03), ratios(100)])
    assert inside == [True] * 16 + [False] * 4


def test_too_few_references_are_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"target": "x", "reference": "y", "reference-2": "z"}))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2 and "--more-references 4" in capsys.readouterr().err


def test_references_are_read_from_their_own_folders(tmp_path):
    config, fields = {"target": "x"}, {"loss": [], "rougeL": [], "exact": [], "said": [], "known": {}, "answers": []}
    for i in range(5):
        place = tmp_path / f"r{i}"
        place.mkdir()
        scores = {"forget": {"right": [1.0, 2.0], "wrong": [[1.0], [2.0 - i]], "facts": [0, 1], **fields}}
        (place / "scores.json").write_text(json.dumps({"key": "k", "scores": scores}))
        config["reference" + (f"-{i + 1}" if i else "")] = str(place)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert references_of(tmp_path)[0] == pytest.approx([1, 1])
    assert references_of(tmp_path)[2] == pytest.approx([1, 2.718281828**2])
