"""README's promises that code can check: the equation table, the tree, the two commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# | ULD (2) | what it says | [`uld.py:173`](uld.py#L173) `LogitDifference` |
ROWS = re.findall(r"^\| (\w+ [^|]*?) \| [^|]* \| \[`([\w./]+):(\d+)`\]\(([\w./]+)#L(\d+)\) `([\w.]+)` \|$",
                  README, re.M)


def line_of(path: Path, name: str) -> int:
    """The line on which the class, function or method `name` (dotted) begins."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((n for n in body if getattr(n, "name", None) == part), None)
        assert node is not None, f"{path.name} has no {name}"
        body = getattr(node, "body", [])
    return node.lineno


def test_the_equation_table_is_there():
    papers = {row[0].split()[0] for row in ROWS}
    assert len(ROWS) >= 12 and {"ULD", "UOE", "TOFU", "NPO", "RMU", "LoRA"} <= papers


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[5]}")
def test_every_equation_is_where_the_table_says(row):
    _, file, line, link_file, link_line, name = row
    assert (file, line) == (link_file, link_line)
    assert int(line) == line_of(ROOT / file, name), f"{name} is at {file}:{line_of(ROOT / file, name)}"


def test_the_tree_names_every_module_and_nothing_else():
    named = set(re.findall(r"^([\w/]+\.py) ", README, re.M))
    there = {str(p.relative_to(ROOT)) for folder in (".", "data", "metrics") for p in (ROOT / folder).glob("*.py")
             if p.name != "__init__.py"}
    assert named == there


def test_ci_runs_the_same_test_command():
    command = re.search(r"^python3 .*pytest.*$", README, re.M).group(0)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
