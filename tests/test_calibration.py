"""lab/calibration.py: where each rule ends on made-up looks, and a whole comparison of models too small to know."""

import json

import pytest

from lab import calibration
from lab.calibration import end_of, models_table, rules_table

SHAPE = ("--subjects 2 --depth 2 --width 32 --context 128 --pretrain-steps 2 --epochs 2 "
         "--batch-size 16").split()


def look(at: float, p: float, hit: float, said: float, quality: float) -> dict:
    return {"at": at, "p": p, "hit": hit, "value_said": said, "in_frame": 1 - at / 10, "quality": quality,
            "D": 1 - quality, "enough": 2 < at < 6}


def made_up(method: str, chosen: float | None = None) -> dict:
    looks = [look(1, 0.5, 0.5, 0.6, 0.0), look(2, 0.09, 0.3, 0.3, 0.2), look(3, 0.08, 0.1, 0.1, 0.1),
             look(4, 0.01, 0.0, 0.0, 0.6), look(6, 0.0, 0.0, 0.0, 0.4)]
    return {"method": method, "seed": 3, "looks": looks, "chosen": chosen,
            "styles": [0.9, 0.55], "strangers": {"p": 0.1, "hit": 0.2}, "reference": look(0, 0.05, 0.15, 0.15, 1.0)}


def test_each_rule_ends_where_it_says():
    kept = made_up("uoe")
    assert [end_of(rule, kept)["at"] for rule in calibration.RULES] == [3, 6, 4]  # none is looked at at 5
    difference = made_up("uld", 2)
    assert [end_of(rule, difference)["at"] for rule in calibration.RULES] == [2, 1, 4]  # 0.75 is not looked at here
    never = [one | {"enough": False} for one in kept["looks"]]
    assert end_of("strangers", kept | {"looks": never})["at"] == 6  # the last


def test_the_tables_give_mean_and_worst_and_the_distances():
    runs = [made_up("uoe"), made_up("uoe") | {"strangers": {"p": 1.0, "hit": 1.0}}]
    runs[1]["looks"] = [one | {"enough": True} for one in runs[1]["looks"]]
    row = rules_table(runs).splitlines()[2]
    assert row == "| uoe, strangers | 2 | 2, 1 - 3 | 0.25 (0.45) | 0.95 (1.00) | 0.80 (0.70) |"
    *_, second, apart = models_table(runs).splitlines()
    assert second == "| uoe, seed 3 | 1.000 | 0.050 | 1.000 | 0.150 | 0.90 | 0.55 | 1.00 |"
    assert apart == "| distance, mean (worst) | | 0.50 (0.95) | | 0.45 (0.85) | | | |"


def test_bad_input_is_one_line_and_exit_2(capsys):
    for words in (["--seeds", "a"], ["--colour", "red"], ["--until", "sometimes"]):
        with pytest.raises(SystemExit) as stop:
            calibration.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_tiny_comparison_is_whole_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "ALPHAS", [0.0, 1.0, 2.0])
    words = ["--out", str(tmp_path), "--seeds", "0", "--page", str(tmp_path / "page.md"), *SHAPE]
    calibration.main(words)
    page = (tmp_path / "page.md").read_text()
    assert "| uoe, strangers | 1 |" in page and "| uld, fixed 0.75 | 1 |" in page and "| uld, seed 0 |" in page
    uoe, uld = (json.loads((tmp_path / "calibration" / f"{name}-seed0.json").read_text()) for name in ("uoe", "uld"))
    assert [one["at"] for one in uoe["looks"]] == [1, 2]
    assert {one["at"] for one in uld["looks"]} == {*calibration.ALPHAS, 0.75, uld["chosen"]}
    assert uld["looks"][0] | {"at": 0} == uld["target"]  # alpha 0 is the target
    assert uld["reference"]["D"] == 0 and uld["reference"]["quality"] == 1
    monkeypatch.setattr(calibration.Looker, "look", None)
    calibration.main(words)  # nothing is looked at again
    assert (tmp_path / "page.md").read_text() == page
