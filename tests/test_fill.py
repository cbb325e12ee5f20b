"""lab/fill.py: tables in prose, from runs."""

import json
from pathlib import Path

import pytest

from lab import fill

ROOT = Path(__file__).resolve().parents[1]

PAGE = """Before.

<!-- table forgetting: x=Ours; x:target=Target; gone=Missing -->
| mean (worst) of runs | value said |
| --- | --- |
| Ours (1) | old |
<!-- end -->
After.
"""


@pytest.fixture
def kinds(tmp_path):
    for i, (said, framed, null) in enumerate(((0.1, 0.9, 0.0), (0.3, 0.5, 0.4))):
        folder = tmp_path / f"x-seed{i}"
        folder.mkdir()
        block = {"forget": {"value_said": said, "in_frame": framed}, "retain": {"value_said": 1.0},
                 "forget_quality_null": null}
        (folder / "metrics.json").write_text(json.dumps({"unlearned": block, "target": block, "run": {}}))
    return fill.by_kind([str(p) for p in sorted(tmp_path.iterdir())])


def test_a_page_keeps_its_prose_and_gets_its_numbers(kinds, capsys):
    new = fill.fill(PAGE, kinds)
    assert new.startswith("Before.\n\n<!-- table forgetting: x=Ours;") and new.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in new and "| Ours (2) | 0.20 (0.30) | 0.70 (0.50) | 0.00 (0.00) | 1 of 2 |" in new
    assert "untouched" not in new  # no row has it
    assert "nothing of gone" in capsys.readouterr().err and "Missing (" not in new
    assert fill.fill(new, kinds) == new  # filling twice changes nothing
    with pytest.raises(fill.UserError, match="these columns are unknown"):
        fill.fill(PAGE.replace("forgetting", "nothing"), kinds)
    with pytest.raises(fill.UserError, match="two rows named 'Ours'"):  # a row that stays is found by its label
        fill.fill(PAGE.replace("Missing", "Ours"), kinds)


def test_of_destroyed_runs_forget_quality_is_told_apart_from_what_was_not_measured():
    def run(D: float | None, destroyed: bool) -> dict:
        return {"unlearned": {"forget_quality_D": D, "destroyed": destroyed}}

    def cell(*runs: dict) -> str:
        return fill.cell(list(runs), "unlearned", None, "forget_quality_D", "max")

    assert cell(run(0.1, False), run(0.3, False), run(None, True)) == "0.20 (0.30), 1 destroyed"
    assert cell(run(None, True)) == "1 destroyed" and cell(run(0.1, False), run(None, False)) == "-"


@pytest.mark.parametrize("values, worst, expected", [
    ([0.1, 0.3], "max", "0.20 (0.30)"), ([0.1, 0.3], "min", "0.20 (0.10)"), ([0.25], "max", "0.25"),
    ([12.4], "max", "12"),
    ([0.0, 0.2, 0.0], "count", "1 of 3"), ([None, None], "max", "-"),
    ([0.1, None], "max", "-"), ([], "count", "-"),
])
def test_a_cell_is_the_mean_and_the_worst_of_its_runs(values, worst, expected):
    """Destroyed runs have no forget quality."""
    runs = [{"unlearned": {"forget_quality_D": value}} for value in values]
    assert fill.cell(runs, "unlearned", None, "forget_quality_D", worst) == expected


@pytest.mark.slow
def test_every_column_of_a_run_is_in_its_metrics(runs):
    """A heading that no run can fill would be left out of every table, silently."""
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    for name, columns in fill.COLUMNS.items():
        for head, where, key, _ in columns:
            if key in ("forget_quality_null", "perplexity", "depth"):  # of some runs
                continue
            of = metrics["run"] if where == "run" else metrics["unlearned"]
            if where == "real_authors":  # TOFU's alone: a set like any other
                where = "retain"
            assert key.partition(" - ")[0] in (of[where] if where not in (None, "run") else of), (name, head)


def test_a_table_of_attacks_is_a_column_per_attack(kinds, capsys):
    for i, folder in enumerate(kinds["x"]):
        outcomes = {"none": {"target": {"value_said": 1.0}, "unlearned": {"value_said": 0.1 * i}},
                    "int4": {"target": {"value_said": 0.5}, "unlearned": {"value_said": 0.3}},
                    "experts": {role: {"value_said": 0.2, "unforced": 0.1, "noise": 0.05 * i}
                                for role in ("target", "unlearned")}}
        (folder / "attacks.json").write_text(json.dumps({"outcomes": outcomes}))
    new = fill.fill("<!-- attacks: x=Ours; x:target=Target; gone=Missing -->\n<!-- end -->\n", kinds)
    assert "| value said: mean (worst) of runs | none | int4 | experts | noise of two halves |" in new
    ends = "| 0.20 (0.20) | 0.03 (0.05) |"
    assert f"| Ours (2) | 0.05 (0.10) | 0.30 (0.30) {ends}" in new
    assert f"| Target (2) | 1.00 (1.00) | 0.50 (0.50) {ends}" in new
    assert "nothing of gone" in capsys.readouterr().err
    new = fill.fill("<!-- attacks int4: x=Ours -->\n<!-- end -->\n", kinds)
    assert "| value said: mean (worst) of runs | none | int4 |\n" in new


def test_what_relearning_brings_back_is_compared_run_by_run(kinds):
    for folder, ours, theirs in zip(kinds["x"], (0.3, 0.1), (0.1, 0.2), strict=True):
        back = {"unlearned": {"value_said": ours}, "reference": {"value_said": theirs}}
        (folder / "attacks.json").write_text(json.dumps({"outcomes": {"relearn": back}}))
    new = fill.fill("<!-- attacks relearn: x=Ours; x:reference=Reference -->\n<!-- end -->\n", kinds)
    assert "| Ours (2) | 0.20 (0.30) | 0.05 (0.20) |" in new  # + 0.2 and - 0.1
    assert "| Reference (2) | 0.15 (0.20) | - |" in new


def test_change_is_from_each_runs_own_target_and_references():
    run = {"target": {"model_utility": 0.7}, "unlearned": {"model_utility": 0.6, "forget": {"leak": 0.3}},
           "reference": {"forget": {"leak": 0.1}}, "reference-2": {"forget": {"leak": 0.4}}}
    assert fill.number_of(run, "unlearned", None, "model_utility - target") == pytest.approx(-0.1)
    assert fill.number_of(run, "unlearned", "forget", "leak - reference") == pytest.approx(0.05)
    assert fill.number_of(run, "reference", "forget", "leak - reference") is None
    assert fill.number_of({"unlearned": run["unlearned"]}, "unlearned", "forget", "leak - reference") is None
    assert fill.short(-0.001) == "0.00"


def test_runs_of_several_kinds_make_one_row(kinds):
    both = kinds | {"y": kinds["x"][:1]}
    assert len(fill.folders("x+y", both)) == 3 and fill.folders("x+gone", both) == []


def test_a_row_whose_runs_are_elsewhere_stays_as_it_was(kinds, capsys):
    full = fill.fill(PAGE.replace("x:target=Target; gone", "x:target=Target; y"), kinds)
    page = full.replace("y=Missing", "y=Target").replace("x:target=Target; ", "").replace("x=Ours", "x=Mine")
    assert "| Target (2) | 0.20" in page and "Mine (2)" not in page
    new = fill.fill(page, kinds)
    assert "nothing of y here: its row stays" in capsys.readouterr().err
    assert "| Mine (2) | 0.20" in new and "Ours (2)" not in new  # a renamed row is another row
    assert "| Target (2) | 0.20 (0.30) | 0.70 (0.50) | - | 1 of 2 |" in new


def test_a_kept_row_keeps_its_columns_and_new_rows_bring_theirs(kinds):
    page = PAGE.replace("value said |\n| --- |", "D | value said |\n| --- | --- |")
    page = page.replace("| Ours (1) | old |", "| Missing (3) | 0.5 | 0.7 |")
    heads, _, ours, target, missing = [[c.strip() for c in row.split("|")[1:-1]] for row in
                                       fill.fill(page, kinds).splitlines() if row.startswith("|")]
    assert missing[0] == "Missing (3)" and ours[0] == "Ours (2)" and target[0] == "Target (2)"
    assert dict(zip(heads, missing, strict=True)) | {heads[0]: ""} == {
        "mean (worst) of runs": "", "value said": "0.7", "in frame": "-", "retain, change": "-",
        "runs inside the null": "-", "D": "0.5"}
    assert dict(zip(heads, ours, strict=True))["D"] == "-"


def test_pages_filled_without_runs_stay_as_they_are():
    for page in [*(ROOT / "results").glob("*.md"), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        assert fill.fill(text, {}) == text
