"""lab/kill.py, shortened: what is left of killed runs, of two that want one folder; and runs that were edited."""

import json
import random
import shutil
from pathlib import Path

import pytest

import eval as scoring
from errors import UserError
from lab import kill
from lab.tables import compare
from methods import open_run
from runs import check_source


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    """A run of every kind, each killed once or more."""
    assert kill.kill_all(len(kill.COMMANDS), random.Random(11), tmp_path) == []


@pytest.mark.slow
def test_of_two_that_want_one_folder_one_is_whole_and_one_is_refused(tmp_path):
    assert kill.race_all(2, random.Random(12), tmp_path) == []


@pytest.fixture
def copies(runs, tmp_path) -> list[Path]:
    for run in runs:
        shutil.copytree(run, tmp_path / run.name)
    return [tmp_path / run.name for run in runs]


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip(folder: Path) -> None:
    """One bit of a run's own weights."""
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_verify_says_what_does_not_hold(copies, capsys):
    run = copies[0]
    scoring.main(["--verify", str(run)])
    assert f"claims of {run} hold" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["unlearned"]["forget"]["exact"] = 0.125
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "log.jsonl").write_text("{}\n")
    flip(run)
    with pytest.raises(SystemExit) as stop:
        scoring.main(["--verify", str(run)])
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    wrong = [line for line in out.splitlines() if not line.startswith("computed anew with other")]  # threads, say
    assert error.splitlines()[-1].startswith(f"error: {len(wrong)} of ")
    assert error.splitlines()[-1].endswith(f" claims of {run} do not hold: run train.py again")
    assert "unlearned forget exact: 0.125 is claimed" in out and "run steps: " in out
    assert "model weights: not what the run was made of" in out


@pytest.mark.slow
def test_scores_and_attacks_of_edited_weights_are_refused(copies, capsys):
    attacks = copies[0] / "attacks.json"
    before = attacks.read_bytes() if attacks.exists() else None  # of whoever attacked the run that this is a copy of
    flip(copies[0])
    for words in ([], ["--attack", "hint"]):
        with pytest.raises(SystemExit) as stop:
            scoring.main([str(copies[0]), *words])
        assert stop.value.code == 2 and "was made of other model weights than are there now" in capsys.readouterr().err
    assert (attacks.read_bytes() if attacks.exists() else None) == before


@pytest.mark.slow
def test_runs_that_are_not_alike_but_for_their_seed_are_not_averaged(copies):
    assert "(2 runs)" in compare(copies)
    twin = shutil.copytree(copies[0], copies[0].with_name("r-seed7"))
    with pytest.raises(UserError, match=r"r-seed0 and .*r-seed7 are both of seed 0"):
        compare([copies[0], twin])
    edit(copies[1] / "asked.json", lr=0.5)
    with pytest.raises(UserError, match=r"r-seed1 is of --lr 0.5 and .*r-seed0 of 0.003"):
        compare(copies)
    shutil.rmtree(twin)
    metrics = json.loads((copies[1] / "metrics.json").read_text())
    edit(copies[1] / "metrics.json", run=metrics["run"] | {"diverged": True})
    with pytest.raises(UserError, match=r"r-seed1 diverged, so a mean with it means nothing"):
        compare(copies)
    assert "(1 run)" in compare(copies[1:])


@pytest.mark.slow
def test_rows_of_other_content_are_not_averaged_where_the_seed_does_not_make_them(copies):
    for run in copies:
        edit(run / "asked.json", data="tofu")
        rows = {"forget": "1", "retain": run.name}
        metrics = json.loads((run / "metrics.json").read_text())["run"]
        edit(run / "metrics.json", run=metrics | {"made_of": metrics["made_of"] | {"rows": rows, "vocabulary": 9}})
    with pytest.raises(UserError, match=r"r-seed1 is of retain rows r-seed1 and .*r-seed0 of r-seed0"):
        compare(copies)


@pytest.mark.slow
def test_a_reference_that_was_edited_diverged_or_saw_the_forget_rows_is_refused(copies):
    run = copies[0]
    data = open_run(run).data
    with pytest.raises(UserError, match="was taught the rows that are to be forgotten"):
        check_source("reference", str(run), data)
    check_source("model", str(run), data)
    edit(run / "config.json", keeps_only=True)
    check_source("reference", str(run), data)
    with pytest.raises(UserError, match="left out other rows than are to be forgotten here"):
        check_source("reference", str(run), open_run(copies[1]).data)
    edit(run / "config.json", diverged=True)
    with pytest.raises(UserError, match="diverged when it was trained"):
        check_source("model", str(run), data)
    flip(run)
    with pytest.raises(UserError, match="model was changed since it was trained"):
        check_source("model", str(run), data)
