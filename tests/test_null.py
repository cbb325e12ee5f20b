"""lab/null.py: a reference in the place of the unlearned model."""

import json
import shutil

import pytest

from lab.null import left_out, main, references_of
from metrics.score import scores_of
from metrics.tofu import forget_quality
from runs import read_run


def ratios(shift: float) -> list[float]:
    return [shift + i / 10 for i in range(10)]


def test_one_that_is_far_from_all_others_is_outside_and_makes_room_for_them():
    """Four alike, one far off: judged by the four it is outside; where it is among the rest any distance is inside."""
    inside = left_out([ratios(0), ratios(0.01), ratios(0.02), ratios(0.03), ratios(100)])
    assert inside == [True] * 16 + [False] * 4


def test_too_few_references_are_said(runs, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(runs[0])])
    assert ended.value.code == 2 and "--more-references 4" in capsys.readouterr().err


def test_references_are_scored_as_the_run_scored_them(runs, tmp_path, capsys):
    """Five times one reference: its distance to the target is the run's own, and none is farther than another."""
    shutil.copytree(runs[0], tmp_path / "run")
    file, metrics = tmp_path / "run" / "config.json", json.loads((runs[0] / "metrics.json").read_text())
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {f"reference-{i}": config["reference"] for i in range(2, 6)}))
    references = references_of(tmp_path / "run")
    target = read_run(runs[0])
    scores = scores_of(config["target"], config, target.data, target.tokenizer, "target")["forget"]
    for one in references:
        assert forget_quality(scores.fact_ratios(), one).D == metrics["target"]["forget_quality_D"]
    main([str(tmp_path / "run")])
    assert "1.00 (20 of 20)" in capsys.readouterr().out
