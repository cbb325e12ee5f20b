"""lab/trial.py: the verdict on made-up scores, and a whole trial of models too small to know anything."""

import json
import math

import pytest

from lab import trial
from lab.trial import (
    CHEATS,
    CLOSE,
    MEASURES,
    OPEN,
    Measure,
    called_destroyed,
    summary,
    table,
    verdict,
    verdicts,
    write_page,
)

SAID = Measure("value_said", "value said")


def test_a_cheat_fools_a_measure_unless_it_scores_above_all_that_do_not_know():
    scores = {"knowing": [1.0, 0.9, 0.8], "unknowing": [0.1, 0.0, 0.2],
              "garbled": [0.9, 0.8, 0.7], "flattened": [0.2, 0.15, 0.21], "refusing": [-0.1, -0.1, 0.3],
              "destroyed": [math.nan, 0.5, 0.1]}
    got = verdict(SAID, scores)
    assert got.auc == 1 and got.knowing == pytest.approx(0.9) and got.unknowing == pytest.approx(0.1)
    assert got.fooled == {"garbled": 0, "flattened": 2, "refusing": 2, "destroyed": 2}
    assert got.beyond == {"garbled": 0, "flattened": 0, "refusing": 2, "destroyed": 0}
    line = table([got], 3).splitlines()[-1]
    assert line == "| value said | 1.00 | 0.900 | 0.100 | flattened 2/3, refusing\\* 2/3, destroyed 2/3 |"


def test_where_less_is_more_knowledge_everything_is_turned():
    scores = {"knowing": [0.1, 0.2], "unknowing": [0.8, 0.9], "garbled": [0.1, 0.1], "flattened": [0.95, 0.97]}
    got = verdict(Measure("truth_ratio", "truth ratio", -1), scores)
    assert got.auc == 1 and got.knowing == pytest.approx(0.15)
    assert got.fooled == {"garbled": 0, "flattened": 2} and got.beyond == {"garbled": 0, "flattened": 2}
    assert table([got], 2).splitlines()[-1].endswith("| flattened\\* |")


def made_up(n: int = 4) -> dict[str, list[dict]]:
    """All measures see what knows, and no cheat but one; each model has n truth ratios of its own."""
    level = {"knowing": 1.0, "unknowing": 0.0, **dict.fromkeys(CHEATS, 1.0), "refusing": 0.0}
    out = {}
    for kind, value in level.items():
        out[kind] = []
        for i in range(3):
            scores = {one.key: one.sign * (value + i / 100) for one in MEASURES if one.key != "distance"}
            ratios = [(0.1 if value else 0.9) + j / 100 for j in range(n)]
            out[kind].append(scores | {"ratios": ratios, "utility": 0.5 if kind == "destroyed" else 1.0,
                                       "in_frame": 0.2 if kind == "garbled" else 1.0})
    return out


def test_the_whole_verdict_on_made_up_scores():
    models = made_up()
    found = verdicts(models)
    assert [one.measure for one in found] == MEASURES and all(one.auc == 1 for one in found)
    distance = next(one for one in found if one.measure.key == "distance")
    assert (distance.knowing, distance.unknowing) == (1, 0)  # a reference is compared with the other references
    assert all([cheat for cheat, n in one.fooled.items() if n] == ["refusing"] for one in found)
    broken = called_destroyed(models)
    assert broken == dict.fromkeys(models, 0) | {"destroyed": 3, "garbled": 3}
    told = summary(found, broken, 3)
    assert "knowing 0/3" in told and "destroyed 3/3" in told
    assert told.endswith("worst T; depth probe, best layer): refusing; that are not called destroyed either: refusing.")
    told = summary(found, broken | {"refusing": 3}, 3)
    assert told.endswith(": refusing; that are not called destroyed either: none.")
    models["refusing"] = [scores | {"choice": 1.0} for scores in models["refusing"]]
    assert summary(verdicts(models), broken, 3).endswith(": none; that are not called destroyed either: none.")


def test_the_table_is_put_between_the_markers_and_words_around_it_stay(tmp_path):
    page = tmp_path / "results" / "measures.md"
    write_page(page, "first")
    assert page.read_text() == f"# Measures on trial\n\n{OPEN}\n\nfirst\n\n{CLOSE}\n"
    page.write_text(page.read_text().replace("trial\n", "trial\n\nWords.\n", 1) + "\nMore words.\n")
    write_page(page, "second")
    text = page.read_text()
    assert "first" not in text and text.index("Words.") < text.index("second") < text.index("More words.")
    (tmp_path / "bare.md").write_text("Words.\n")
    write_page(tmp_path / "bare.md", "third")
    assert (tmp_path / "bare.md").read_text() == f"Words.\n\n{OPEN}\n\nthird\n\n{CLOSE}\n"


def test_bad_input_is_one_line_and_exit_2(capsys):
    for words in (["--models", "1"], ["--steps", "0"], ["--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            trial.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_tiny_trial_is_whole_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trial, "SCORED_FACTS", 4)
    words = ["--out", str(tmp_path), "--models", "2", "--subjects", "2", "--depth", "1", "--width", "32", "--steps",
             "20", "--page", str(tmp_path / "page.md")]
    trial.main(words)
    page = (tmp_path / "page.md").read_text()
    assert all(f"| {one.label} | " in page for one in MEASURES) and page.count("/2") >= 7
    scores = sorted(file.name for file in (tmp_path / "scores").iterdir())
    assert scores == sorted(f"{kind}-{i}.json" for kind in ("knowing", "unknowing", *CHEATS) for i in (0, 1))
    assert len(list((tmp_path / "cache").glob("*/model"))) == 6  # a base, and who knows and who does not, of each seed
    (tmp_path / "scores" / "biased-1.json").unlink()
    stale = json.loads((tmp_path / "scores" / "garbled-0.json").read_text()) | {"key": "of other code"}
    (tmp_path / "scores" / "garbled-0.json").write_text(json.dumps(stale))
    made: list[str] = []
    monkeypatch.setattr(trial, "evaluate", lambda model, tokenizer, data, what, old=trial.evaluate:
                        made.append(what) or old(model, tokenizer, data, what))
    trial.main(words)
    assert made == ["garbled 0", "biased 1"] and (tmp_path / "page.md").read_text() == page
