"""Fills the tables of the README and of results/'s pages from metrics.json and attacks.json of runs.

    python -m lab.fill out [more folders of runs]

The prose is by hand. A page holds, on lines of their own, `<!-- table COLUMNS: KIND=label; KIND:ROLE=label -->` and
`<!-- end -->`; what lies between is written anew: mean and, in brackets, the worst over the runs of each KIND
(out/KIND, out/KIND-seed1, ...; KIND+KIND: of both). `<!-- attacks: ... -->`, or `<!-- attacks HOW: ... -->` of one
attack, is of attacks.json (`python eval.py RUN --attack HOW ...`). A kind without runs is named on standard error; its
row stays as it was, so that a table can grow without every run being at hand.
`<!-- equations -->` and `<!-- book -->` are README's tables of statements and of files, made from the code.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from errors import UserError, one_line_errors
from lab.tables import by_kind, read_metrics

HERE = Path(__file__).resolve().parents[1] / "results"
Line = tuple[str, str, str, list[str] | None]  # kind, label, how many runs, cells (None: no runs are here)

# heading, set ("run": of the run; None: of the model), key, and which of several runs is the worst. "key - role": less
# what the run's own models of that role have on the mean (reference: all its references).
COLUMNS: dict[str, list[tuple[str, str | None, str, str]]] = {
    "forgetting": [("value said", "forget", "value_said", "max"), ("worst leak@8", "forget", "leak", "max"),
                   ("leak over references", "forget", "leak - reference", "max"),
                   ("choice", "forget", "choice", "max"), ("cloze at equal retention", None, "kept_cloze", "max"),
                   ("in frame", "forget", "in_frame", "min"),
                   ("retain, change", "retain", "value_said - target", "min"),
                   ("untouched, change", "untouched", "value_said - target", "min"),
                   ("utility, change", None, "model_utility - target", "min"), ("D", None, "forget_quality_D", "max"),
                   ("runs inside the null", None, "forget_quality_null", "count"),
                   ("overlap", None, "routing_overlap", "min"), ("steps", "run", "steps", "max")],
    "time": [("steps", "run", "steps", "max"), ("seconds", "run", "seconds", "max")],
    "short": [("value said", "forget", "value_said", "max"), ("leak", "forget", "leak", "max"),
              ("in frame", "forget", "in_frame", "min"), ("retain", "retain", "value_said", "min"),
              ("untouched", "untouched", "value_said", "min"), ("utility", None, "model_utility", "min"),
              ("D", None, "forget_quality_D", "max"), ("overlap", None, "routing_overlap", "min")],
    "privacy": [("cloze", "forget", "cloze", "max"), ("depth probe", None, "depth", "max"),
                ("exact answers", "forget", "exact", "max"), ("extraction strength", "forget", "cloze_strength", "max"),
                ("membership AUC, loss", None, "auc_loss", "max"), ("min-k++", None, "auc_min_k_plus_plus", "max"),
                ("perplexity", None, "perplexity", "max"), ("known, own routing", None, "free_known", "max"),
                ("known, target's routing", None, "forced_known", "max")],
    "tofu": [("value said", "forget", "value_said", "max"), ("leak", "forget", "leak", "max"),
             ("ROUGE-L", "forget", "rougeL_recall", "max"), ("retain, value said", "retain", "value_said", "min"),
             ("retain, ROUGE-L", "retain", "rougeL_recall", "min"),
             ("real authors, ROUGE-L", "real_authors", "rougeL_recall", "min"),
             ("utility", None, "model_utility", "min")],
}
COLUMNS["ablation"] = [column for column in COLUMNS["forgetting"] if column[0] not in (
    "leak over references", "cloze at equal retention", "runs inside the null")]


def number_of(run: dict, role: str, where: str | None, key: str) -> float | None:
    """Of one run, a COLUMNS entry's number; None where the run or the role lacks it."""
    name, _, other = key.partition(" - ")
    if where == "run":
        return run["run"].get(name) if role == "unlearned" else None

    def of(model: str) -> float | None:
        block = run.get(model, {})
        return (block.get(where) or {} if where else block).get(name)

    own = of(role)
    if not other or own is None:
        return own
    beside = [of(model) for model in run if model.startswith(other)]
    known = [number for number in beside if number is not None]
    return own - statistics.mean(known) if role == "unlearned" and known and len(known) == len(beside) else None


def cell(runs: list[dict], role: str, where: str | None, key: str, worst: str) -> str:
    """`0.11 (0.18)`: mean over runs and, in brackets, the worst of them; `-` where a run lacks it."""
    values = [number_of(run, role, where, key) for run in runs]
    if worst == "count":  # a share of reference pairs that are as far apart: 0 means outside
        measured = [value for value in values if value is not None]
        return f"{sum(value > 0 for value in measured)} of {len(measured)}" if measured else "-"
    known = [value for value in values if value is not None]
    withheld = sum(bool(run.get(role, {}).get("destroyed")) for run in runs) if key.startswith("forget_quality") else 0
    if len(known) + withheld < len(values) or not values:
        return "-"  # a run lacks it
    parts = [told(known, worst)] if known else []
    parts += [f"{withheld} destroyed"] if withheld else []
    return ", ".join(parts)


def told(values: list[float], worst: str) -> str:
    """`0.11 (0.18)`; the number alone where there is one run."""
    mean, furthest = short(statistics.mean(values)), short(max(values) if worst == "max" else min(values))
    return f"{mean} ({furthest})" if len(values) > 1 else mean


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}".replace("-0.00", "0.00")


def entries(spec: str) -> list[tuple[str, str, str]]:
    """`uoe=UOE; uoe:target=MoE target` -> (kind, role, label) each. Raises UserError for a label given twice."""
    out = []
    for part in filter(None, (p.strip() for p in spec.split(";"))):
        kind, _, label = part.partition("=")
        kind, _, role = kind.strip().partition(":")
        out.append((kind, role or "unlearned", label.strip() or kind))
    labels = [label for *_, label in out]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:  # a row that stays is found by its label
        raise UserError(f"a table has two rows named {twice[0]!r}: rename one")
    return out


def folders(kind: str, kinds: dict[str, list[Path]]) -> list[Path]:
    """The runs of a kind, or of several (uoe+uoe-more); none where one of those has none."""
    found = [kinds.get(part, []) for part in kind.split("+")]
    return [folder for of in found for folder in of] if all(found) else []


def unlearned_table(columns: str, spec: str, kinds: dict[str, list[Path]]) -> tuple[list[str], list[Line]]:
    if columns not in COLUMNS:
        raise UserError(f"table {columns}: these columns are unknown: {', '.join(COLUMNS)}")
    lines: list[Line] = []
    for kind, role, label in entries(spec):
        runs = [read_metrics(folder) for folder in folders(kind, kinds)]
        cells = [cell(runs, role, where, key, worst) for _, where, key, worst in COLUMNS[columns]] if runs else None
        lines.append((kind, label, f"({len(runs)})", cells))
    return ["mean (worst) of runs", *(name for name, *_ in COLUMNS[columns])], lines


def attacks_table(only: str | None, spec: str, kinds: dict[str, list[Path]]) -> tuple[list[str], list[Line]]:
    """Share of forget values said after each attack of attacks.json, or one: mean and, in brackets, the worst.

    Beside relearn what it brings back more than to the reference; beside experts how large a difference is noise.
    """
    found = []
    for kind, role, label in entries(spec):
        files = [folder / "attacks.json" for folder in folders(kind, kinds) if (folder / "attacks.json").is_file()]
        found.append((kind, role, label, [json.loads(file.read_text())["outcomes"] for file in files]))
    names = list(dict.fromkeys(name for *_, runs in found for run in runs for name in run
                               if only in (None, name) or name == "none"))
    if only and names and only not in names:
        raise UserError(f"attacks {only}: no run here has it, only {', '.join(names)}")
    heads = names + [head for name, head in (("relearn", "relearn over reference"), ("experts", "noise of two halves"))
                     if name in names]
    lines = []
    for kind, role, label, runs in found:
        columns = {name: [run.get(name, {}).get(role, {}).get("value_said") for run in runs] for name in names}
        if role != "reference" and "relearn" in columns:
            theirs = [run.get("relearn", {}).get("reference", {}).get("value_said") for run in runs]
            columns["relearn over reference"] = [None if None in pair else pair[0] - pair[1]
                                                 for pair in zip(columns["relearn"], theirs, strict=True)]
        if "experts" in columns:
            columns["noise of two halves"] = [run.get("experts", {}).get(role, {}).get("noise") for run in runs]
        cells = {head: "-" if None in values else told(values, "max") for head, values in columns.items() if values}
        lines.append((kind, label, f"({len(runs)})", [cells.get(head, "-") for head in heads] if runs else None))
    return ["value said: mean (worst) of runs", *heads], lines


def markdown(heads: list[str], lines: list[Line], old: str) -> str:
    """The table; a line without cells is the one that `old`, the table as it was, has under the same label."""
    table = [[cell.strip() for cell in row.strip(" |").split("|")] for row in old.splitlines()]
    was, before = (table[0], table[2:]) if table else ([], [])
    measured = heads
    heads = was if set(heads) <= set(was) else heads + [head for head in was[1:] if head not in heads]
    rows = []
    for kind, label, runs, cells in lines:
        if cells is not None:
            told = dict(zip(measured[1:], cells, strict=True))
            rows.append([f"{label} {runs}", *(told.get(head, "-") for head in heads[1:])])
            continue
        kept = [row for row in before if re.fullmatch(re.escape(label) + r" \([^()]*\)", row[0])]
        print(f"nothing of {kind} here: its row {'stays as it was' if kept else 'is left out'}", file=sys.stderr)
        rows += [[row[0], *(dict(zip(was, row, strict=True)).get(head, "-") for head in heads[1:])] for row in kept]
    keep = [i for i in range(len(heads)) if i == 0 or any(row[i].strip("-, ") for row in rows)]
    rows = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(row[i] for i in keep) + " |\n" for row in rows)


EQUATIONS = {  # marker at the end of a statement -> what it says
    "ULD (2)": "logits = target - α · assistant",
    "ULD (3)": "minimise forget + β · retain, both reversed",
    "ULD (4)": "the assistant learns the forget set",
    "ULD (5)": "and is uniform on everything else",
    "ULD 3.2": "assistant = first K layers, frozen, with LoRA",
    "ULD 3.3": "D′_f and D′_r: paraphrased and perturbed rows",
    "ULD 3.4": "the filter: only plausible tokens are touched",
    "LoRA (3)": "W x + (α / r) B A x",
    "UOE 3": "router: softmax over all experts, then top k",
    "UOE (2)": "affinity score of every expert",
    "UOE (3)": "anchor loss ‖g - a‖²",
    "UOE (4)": "forget + λ · retain + α · anchor",
    "UOE Fig. 3": "overlap of selected experts with the original model",
    "NPO (3)": "-(2/β) log σ(-β log p/p_ref)",
    "RMU (2)": "hidden states towards one random direction",
    "TOFU (1)": "truth ratio, wrong over right",
    "TOFU 2.2.2": "forget quality: KS test against the reference",
}


def equation_table() -> list[str]:
    """A row per marker, with the file and line of the one statement that carries it.

    Raises UserError where a marker stands nowhere or twice.
    """
    root = HERE.parent
    where: dict[str, list[str]] = {name: [] for name in EQUATIONS}
    for path in sorted([*root.glob("*.py"), *root.glob("metrics/*.py")]):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            marker = line.rpartition("  # ")[2]
            if marker in where:
                where[marker].append(f"{path.relative_to(root)}#L{number}")
    rows = ["| equation | what it says | where |", "|---|---|---|"]
    for name, places in where.items():
        if len(places) != 1:
            raise UserError(f"the marker '# {name}' stands at {len(places)} statements: {', '.join(places)}")
        rows.append(f"| {name} | {EQUATIONS[name]} | [`{places[0].replace('#L', ':')}`]({places[0]}) |")
    return rows


BOOK = ("uoe.py", "uld.py", "objectives.py", "moe.py", "model.py", "loop.py", "train.py", "eval.py")


def book_table() -> list[str]:
    """The eight files a student reads, in order: the first sentence of each, and how long it is."""
    rows = ["| file | what it is | lines |", "|---|---|---|"]
    for name in BOOK:
        text = (HERE.parent / name).read_text(encoding="utf-8")
        said = text.removeprefix('"""').partition("\n")[0].rstrip(".")
        rows.append(f"| [`{name}`]({name}) | {said} | {len(text.splitlines())} |")
    return rows


def fill(text: str, kinds: dict[str, list[Path]]) -> str:
    def one(match: re.Match) -> str:
        heads, lines = (attacks_table(match["argument"], match["spec"], kinds) if match["what"] == "attacks" else
                        unlearned_table(match["argument"], match["spec"], kinds))
        return f"{match['open']}\n{markdown(heads, lines, match['old'])}<!-- end -->"

    def whole(table: Callable[[], list[str]], match: re.Match) -> str:
        return match[1] + "".join(row + "\n" for row in table()) + match[2]

    for name, table in (("equations", equation_table), ("book", book_table)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", partial(whole, table), text, flags=re.DOTALL)
    return re.sub(r"(?P<open><!-- (?P<what>table|attacks)(?: (?P<argument>[\w-]+))?: (?P<spec>[^>]*?) -->)\n"
                  r"(?P<old>.*?)<!-- end -->", one, text, flags=re.DOTALL)


@one_line_errors
def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("give the folder that holds the runs, such as out")
    runs = sorted(p.parent for root in sys.argv[1:] for p in Path(root).glob("*/metrics.json")
                  if p.parent.suffix != ".partial")
    kinds = by_kind(list(map(str, runs)))
    for page in [*sorted(HERE.glob("*.md")), HERE.parent / "README.md"]:
        old = page.read_text(encoding="utf-8")
        new = fill(old, kinds)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"filled {page.name}")


if __name__ == "__main__":
    main()
