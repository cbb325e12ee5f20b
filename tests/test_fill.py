"""results/fill.py: tables in prose, from runs."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("fill", ROOT / "results" / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)

PAGE = """Before.

<!-- table unlearning: x=Ours; x:target=Target; gone=Missing -->
old
<!-- end -->
After.
"""


@pytest.fixture
def kinds(tmp_path):
    for i, exact in enumerate((0.1, 0.3)):
        folder = tmp_path / f"x-seed{i}"
        folder.mkdir()
        block = {"forget": {"exact": exact, "rougeL_recall": 0.5}, "retain": {"exact": 1.0}, "forget_quality": exact}
        (folder / "metrics.json").write_text(json.dumps({"unlearned": block, "target": block, "run": {}}))
    return fill.by_kind([str(p) for p in sorted(tmp_path.iterdir())])


def test_a_page_keeps_its_prose_and_gets_its_numbers(kinds, capsys):
    new = fill.fill(PAGE, kinds)
    assert new.startswith("Before.\n\n<!-- table unlearning: x=Ours;") and new.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in new and "| Ours (2) | 0.200 ± 0.141 | 0.500 ± 0.000 | 1.000 ± 0.000 | 0.1, 0.3 |" in new
    assert "untouched" not in new  # no row has it
    assert "no runs of gone" in capsys.readouterr().err and "Missing (" not in new
    assert fill.fill(new, kinds) == new  # filling twice changes nothing


def test_every_page_can_be_filled_from_nothing():
    for page in (ROOT / "results").glob("*.md"):
        fill.fill(page.read_text(encoding="utf-8"), {})
