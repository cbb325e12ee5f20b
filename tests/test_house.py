"""Imports run one way, stand at the head of a file, and training does not import scoring."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "data", "hub", "lab", "metrics")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
NAMES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
         for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, those that are for types alone left out."""
    out = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            out |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return out & set(NAMES)


GRAPH = {name: imports(path) for name, path in NAMES.items()}


def reached(name: str) -> set[str]:
    """What a module imports, and what those import."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for other in GRAPH[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_no_file_imports_one_that_imports_it():
    assert {name for name in GRAPH if name in reached(name)} == set()


def test_no_function_imports():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inside, f"{path.name}:{node.name}"


def test_training_does_not_import_scoring():
    scoring = {"eval", "metrics.score", "metrics.knowledge", "metrics.tofu", "lab.report"}
    for name in ("loop", "pretrain", "objectives", "uld", "uoe", "baselines"):
        assert not reached(name) & scoring, name


def test_objectives_know_nothing_of_data_but_a_constant():
    assert {name for name in GRAPH["objectives"] if name.startswith("data")} == {"data.batches"}
    source = (ROOT / "objectives.py").read_text(encoding="utf-8")
    assert "\nfrom data.batches import IGNORE\n" in source
