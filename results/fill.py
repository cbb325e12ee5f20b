"""Fills the tables of the README and of the pages beside this file from metrics.json and path.jsonl of runs.

    python results/fill.py out [more folders of runs]

The prose is by hand. A page holds, on lines of their own, `<!-- table COLUMNS: KIND=label; KIND:ROLE=label -->` and
`<!-- end -->`; what lies between is written anew: mean ± standard deviation over the runs of each KIND (out/KIND,
out/KIND-seed1, ...). `<!-- at exact LEVEL: ... -->` reads every run's path where so many forget answers are left,
`<!-- at D LEVEL: ... -->` where forget quality's D has fallen to it, `<!-- at best: ... -->` at its best epoch, as
ULD's paper does. `<!-- attacks: ... -->` is of attacks.json (`python eval.py RUN --attack ...`). A kind without runs is
left out and named on standard error.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import UserError, one_line_errors
from tables import LEVELS, by_kind, heads_at, rows_at, spread

HERE = Path(__file__).resolve().parent

COLUMNS = {
    "unlearning": [("forget exact", "forget", "exact"), ("forget ROUGE-L", "forget", "rougeL_recall"),
                   ("retain exact", "retain", "exact"), ("untouched exact", "untouched", "exact"),
                   ("model utility", None, "model_utility"), ("forget quality p, by seed", None, "forget_quality"),
                   ("D", None, "forget_quality_D"), ("reference pairs as far apart", None, "forget_quality_null")],
    "memory": [("exact memorisation", None, "exact_memorization"), ("extraction strength", None, "extraction_strength"),
               ("membership AUC, loss", None, "auc_loss"), ("min-k++", None, "auc_min_k_plus_plus"),
               ("PrivLeak %", None, "priv_leak"), ("perplexity of answers", None, "perplexity"),
               ("repeated 4-grams", None, "repetition")],
    "routing": [("forget exact", "forget", "exact"), ("retain exact", "retain", "exact"),
                ("untouched exact", "untouched", "exact"), ("routing overlap", None, "routing_overlap"),
                ("known, own routing", None, "free_known"), ("known, target's routing", None, "forced_known"),
                ("steps", "run", "steps")],
    "tofu": [("forget exact", "forget", "exact"), ("retain exact", "retain", "exact"),
             ("forget prob.", "forget", "probability"), ("forget ROUGE-L", "forget", "rougeL_recall"),
             ("retain prob.", "retain", "probability"), ("retain ROUGE-L", "retain", "rougeL_recall"),
             ("real authors ROUGE-L", "real_authors", "rougeL_recall"),
             ("world facts ROUGE-L", "world_facts", "rougeL_recall"), ("model utility", None, "model_utility"),
             ("forget quality p", None, "forget_quality"), ("D", None, "forget_quality_D"),
             ("routing overlap", None, "routing_overlap")],
}
COLUMNS["short"] = [column for column in COLUMNS["unlearning"] if column[2] != "forget_quality_null"]
COLUMNS["tofu-small"] = [("forget exact", "forget", "exact"), ("forget ROUGE-L", "forget", "rougeL_recall"),
                         ("forget prob.", "forget", "probability"), ("retain exact", "retain", "exact"),
                         ("retain prob.", "retain", "probability"),
                         ("forget quality p, by seed", None, "forget_quality"), ("D", None, "forget_quality_D"),
                         ("steps", "run", "steps"), ("seconds", "run", "train_seconds")]


def cell(runs: list[dict], role: str, where: str | None, key: str) -> str:
    if where == "run":
        if role != "unlearned":
            return "-"
        values = [r["run"][key] for r in runs]
        return spread(values)
    values = [(r.get(role, {}).get(where, {}) if where else r.get(role, {})).get(key) for r in runs]
    if key == "forget_quality":  # p-values do not average
        return ", ".join("-" if v is None else f"{v:.2g}" for v in values)
    return spread(values)


def entries(spec: str) -> list[tuple[str, str, str]]:
    """`uoe=UOE; uoe:target=MoE target` -> (kind, role, label) each."""
    out = []
    for part in filter(None, (p.strip() for p in spec.split(";"))):
        kind, _, label = part.partition("=")
        kind, _, role = kind.strip().partition(":")
        out.append((kind, role or "unlearned", label.strip() or kind))
    return out


def markdown(rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def table(columns: str, spec: str, kinds: dict[str, list[Path]]) -> str:
    if columns not in COLUMNS:
        raise UserError(f"table {columns}: these columns are unknown: {', '.join(COLUMNS)}")
    lines = []
    for kind, role, label in entries(spec):
        if kind not in kinds:
            print(f"no runs of {kind}: its row is left out", file=sys.stderr)
            continue
        runs = [json.loads((folder / "metrics.json").read_text()) for folder in kinds[kind]]
        lines.append([f"{label} ({len(runs)})", *(cell(runs, role, where, key) for _, where, key in COLUMNS[columns])])
    heads = ["(runs)", *(name for name, _, _ in COLUMNS[columns])]
    keep = [i for i in range(len(heads)) if i == 0 or any(line[i].strip("-, ") for line in lines)]
    rows = [heads, ["---"] * len(heads), *lines]
    return markdown([[row[i] for i in keep] for row in rows])


def table_at(by: str, level: str | None, spec: str, kinds: dict[str, list[Path]]) -> str:
    if by not in (*LEVELS, "best") or (level is None) != (by == "best"):
        raise UserError(f"at {by}: `at best`, or a measure and a level, as in `at exact 0.15`; measures: "
                        f"{', '.join(LEVELS)}")
    level = float(level) if level else None
    heads = heads_at(by, level)
    rows = [heads, ["---"] * len(heads)]
    for kind, _, label in entries(spec):
        if kind not in kinds:
            print(f"no runs of {kind}: its row is left out", file=sys.stderr)
            continue
        (_, reached, runs, cells), = rows_at({kind: kinds[kind]}, by, level)
        rows.append([f"{label} ({runs})" if by == "best" else f"{label} ({reached} of {runs} get there)", *cells])
    keep = [i for i in range(len(heads)) if i == 0 or any(row[i].strip("-, ") for row in rows[2:])]
    return markdown([[row[i] for i in keep] for row in rows])


def table_attacks(spec: str, kinds: dict[str, list[Path]]) -> str:
    """Share of forget answers said word for word after each attack of attacks.json."""
    found = []
    for kind, role, label in entries(spec):
        files = [folder / "attacks.json" for folder in kinds.get(kind, []) if (folder / "attacks.json").is_file()]
        if not files:
            print(f"no attacks on {kind}: its row is left out", file=sys.stderr)
            continue
        found.append((role, f"{label} ({len(files)})", [json.loads(file.read_text())["outcomes"] for file in files]))
    names = list(dict.fromkeys(name for _, _, runs in found for run in runs for name in run))
    rows = [["forget exact (runs)", *names], ["---"] * (len(names) + 1)]
    for role, label, runs in found:
        exact = ([run.get(name, {}).get(role, {}).get("exact") for run in runs] for name in names)
        rows.append([label, *map(spread, exact)])
    return markdown(rows)


def fill(text: str, kinds: dict[str, list[Path]]) -> str:
    def one(match: re.Match) -> str:
        what, argument, spec = match["what"], match["argument"], match["spec"]
        if what == "table":
            body = table(argument, spec, kinds)
        else:
            body = table_attacks(spec, kinds) if what == "attacks" else table_at(argument, match["level"], spec, kinds)
        return f"{match['open']}\n{body}<!-- end -->"

    return re.sub(r"(?P<open><!-- (?P<what>table|attacks|at)(?: (?P<argument>[\w-]+))?(?: (?P<level>[\d.]+))?: "
                  r"(?P<spec>[^>]*?) -->)\n.*?<!-- end -->", one, text, flags=re.DOTALL)


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
