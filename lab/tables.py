"""metrics.json files as tables: of one run, over seeds, and along the way at one level of forgetting."""

import re
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from data import WORLDS
from errors import UserError
from flags import WEIGHT, Number
from metrics.score import WATCHED
from runs import ANYHOW
from schema import ANY_NUMBER, parse_json_lines, read_bytes, read_json

MEASURES = (("value_said", "value said"), ("any_wording", "in any wording"), ("cloze", "cloze"), ("choice", "choice"),
            ("leak", "worst leak@8"), ("in_frame", "in frame"), ("exact", "exact answers"),
            ("rougeL_recall", "ROUGE-L recall"), ("probability", "probability"), ("truth_ratio", "truth ratio"))
SINGLES = (("model_utility", "model utility"), ("forget_quality", "forget quality  p"),
           ("forget_quality_D", "                D"), ("forget_quality_null", "  null with D as large"),
           ("exact_memorization", "exact memorisation"), ("extraction_strength", "extraction strength"),
           ("completion_bleu", "completion, BLEU"), ("completion_rougeL_f1", "completion, ROUGE-L F1"),
           ("auc_loss", "membership AUC, loss"), ("auc_zlib", "                zlib"),
           ("auc_min_k", "                min-k"), ("auc_min_k_plus_plus", "                min-k++"),
           ("auc_reference", "                reference"),
           ("priv_leak", "PrivLeak, %"), ("perplexity", "perplexity of its answers"),
           ("repetition", "repeated 4-grams"), ("routing_overlap", "routing overlap on forget"),
           ("depth", "depth probe, best layer"), ("kept_at", "keeps 0.99 of the target up to"),
           ("kept_cloze", "                forget cloze"),
           ("free_known", "known, own routing"), ("forced_known", "known, target's routing"))  # of a model


WHOLE, SOME = Number(0, 2**53, whole=True), (ANY_NUMBER, None)
BLOCK = {"model_utility?": SOME, "forget_quality?": SOME, "forget_quality_D?": SOME, "forget?": {str: SOME},
         str: (SOME, bool, list, {str: SOME})}  # of a model: its sets' numbers, and its own
METRICS = {"target": BLOCK, str: BLOCK, "run?": {"seed?": WHOLE, "diverged?": bool,
                                                 "made_of?": {"rows": dict, "vocabulary": WHOLE}}}
SCORED = METRICS | {"run": {"method": str, "forget_loss": (str, None), "retain_loss": (str, None), "diverged": bool,
                            "trainable_parameters": WHOLE, "total_parameters": WHOLE, "steps": WHOLE,
                            "notes?": [str]}}
PATH = {"epoch?": WEIGHT, "step?": WEIGHT, "seconds?": WEIGHT, str: SOME}  # a line of path.jsonl


def read_metrics(folder: str | Path, schema: dict = METRICS) -> dict:
    """A run's metrics.json; schema: SCORED where its table is to be printed.

    Raises UserError where it is missing or was not written by this code.
    """
    return read_json(Path(folder) / "metrics.json", schema, "run train.py again")


def rows_of(metrics: dict, roles: list[str]) -> list[tuple[str, list]]:
    """(label, one number or None per role) for each line of the table."""
    sets = [name for name, value in metrics["target"].items() if isinstance(value, dict)]

    def of(role: str, name: str) -> dict:
        found = metrics[role].get(name)
        return found if isinstance(found, dict) else {}

    rows = [(f"{name:<13}{label}", [of(role, name).get(key) for role in roles])
            for name in sets for key, label in MEASURES]
    for key, label in SINGLES:
        found = [metrics[role].get(key) for role in roles]
        rows.append((label, [value if isinstance(value, int | float) else None for value in found]))
    return [(label, values) for label, values in rows if any(v is not None for v in values)]


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def spread(values: list[float | None]) -> str:
    """`0.970 ± 0.026`, the number alone where there is one run, `-` where a run lacks it."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    if len(known) == 1:
        return number(known[0])
    deviation = statistics.stdev(known)
    return f"{number(statistics.mean(known))} ± {number(deviation if deviation > 1e-9 else 0.0)}"


def table(metrics: dict) -> str:
    """Target, reference(s) and unlearned, one line per measure."""
    roles = [role for role in metrics if role != "run"]
    lines = [f"{'':<30}" + "".join(f"{role:>13}" for role in roles)]
    lines += [f"{label:<30}" + "".join(f"{number(v):>13}" for v in values) for label, values in rows_of(metrics, roles)]
    run, n = metrics["run"], metrics.get("unlearned", {}).get("forget_quality_n")
    if n:
        lines.append("(forget quality: two-sample KS test of truth ratios against the reference, "
                     f"n = {n}; p falls with n, compare it only at one n)")
    by = f"{run['method']}, {run['forget_loss']} + {run['retain_loss']}" if run["forget_loss"] else run["method"]
    lines.append(f"{by}: trained "
                 f"{run['trainable_parameters']:,} of {run['total_parameters']:,} parameters for {run['steps']} steps"
                 + (", stopped because it diverged" if run["diverged"] else ""))
    lines += [f"note: {note}" for note in run.get("notes", [])]
    return "\n".join(lines)


def by_kind(folders: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Run folders by their names without the seed: out/uoe and out/uoe-seed1 are two of a kind."""
    kinds: dict[str, list[Path]] = {}
    for folder in map(Path, folders):
        if not (folder / "metrics.json").is_file():
            raise UserError(f"{folder / 'metrics.json'} is missing: --compare takes finished run folders")
        kinds.setdefault(re.sub(r"-seed\d+$", "", folder.name), []).append(folder)
    for of in kinds.values():
        check_alike(of)
    return kinds


def check_alike(folders: list[Path]) -> None:
    """Raises UserError for runs of a kind whose mean would mean nothing: of one seed, diverged, or not asked for alike.

    Alike are the options but for the seed and, where they do not depend on the seed, vocabulary and rows. A run of an
    older version tells less, and less is asked of it.
    """
    first: dict = {}
    seeds: dict[int, Path] = {}
    for folder in folders:
        run = read_metrics(folder).get("run", {})
        if run.get("diverged") and len(folders) > 1:
            raise UserError(f"{folder} diverged, so a mean with it means nothing: leave it out")
        if "made_of" not in run:
            continue
        if run["seed"] in seeds:
            raise UserError(f"{seeds[run['seed']]} and {folder} are both of seed {run['seed']}: give each seed once")
        seeds[run["seed"]] = folder
        asked = read_json(folder / "asked.json", {"data": str, "forget": (str, None)}, "run train.py again")
        told = {f"--{key.replace('_', '-')}": value for key, value in asked.items()
                if key not in ANYHOW | {"seed", "name", "model", "reference", "never_read"}}
        if asked["data"] not in WORLDS or asked["forget"]:
            told["vocabulary"] = run["made_of"]["vocabulary"]
            told |= {f"{name} rows": value for name, value in run["made_of"]["rows"].items()}
        first = first or told
        for key in sorted(first.keys() | told.keys()):
            if first.get(key) != told.get(key):
                raise UserError(f"{folder} is of {key} {told.get(key)} and {folders[0]} of {first.get(key)}, so a mean "
                                "means nothing: compare runs that differ in their seed alone")


def compare(folders: Sequence[str | Path]) -> str:
    """Mean +- standard deviation of every measure over runs of a kind."""
    kinds = {kind: [read_metrics(folder) for folder in of]
             for kind, of in by_kind(folders).items()}
    lines = []
    for kind, runs in kinds.items():
        roles = [role for role in runs[0] if role != "run" and all(role in run for run in runs)]
        lines += [f"{kind} ({len(runs)} {'run' if len(runs) == 1 else 'runs'})",
                  f"{'':<30}" + "".join(f"{role:>18}" for role in roles)]
        each = [dict(rows_of(run, roles)) for run in runs]  # a run may lack a line that another has
        for label in dict.fromkeys(label for rows in each for label in rows):
            cells = []
            for j in range(len(roles)):
                values = [rows[label][j] if label in rows else None for rows in each]
                cells.append(spread(values))
            lines.append(f"{label:<30}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


LEVELS = {"value": "forget value_said", "exact": "forget exact", "D": "forget_quality_D"}  # runs compare at one level


def at_level(path: list[dict], level: float, by: str = "value") -> dict | None:
    """A path.jsonl where LEVELS[by] first falls to `level`, each number interpolated between the two epochs around it.

    End points of runs lie at different levels of forgetting, so they do not compare; this does. None where the level
    is never reached (or is not measured: passages have no exact answer, and D needs a reference).
    """
    key = LEVELS[by]
    for before, after in pairwise(path):
        if None not in (before.get(key), after.get(key)) and before[key] > level >= after[key]:
            share = (before[key] - level) / (before[key] - after[key])
            return {name: before[name] + share * (after[name] - before[name]) for name in after
                    if isinstance(after[name], int | float) and isinstance(before.get(name), int | float)}
    return None


def at_best(path: list[dict]) -> dict | None:
    """The epoch with the highest forget quality: what ULD's paper reports, chosen by the very measure it reports."""
    measured = [row for row in path if row.get("forget_quality") is not None]
    return max(measured, key=lambda row: row["forget_quality"], default=None)


def read_path(folder: Path) -> list[dict]:
    """A run's path.jsonl behind a line for the target, epoch 0.

    The target was scored on all rows, the epochs on the first 100 of each set but forget.
    Raises UserError where the run was without --score-every-epoch.
    """
    file = Path(folder) / "path.jsonl"
    if not file.is_file():
        raise UserError(f"{file} is missing: run train.py with --score-every-epoch")
    target = read_metrics(folder)["target"]
    lines = parse_json_lines(read_bytes(file), PATH, str(file), "run train.py again")
    start = {"epoch": 0, "step": 0, "seconds": 0.0,
             **({"routing_overlap": 1.0} if any("routing_overlap" in line for line in lines) else {}),
             **{key: target.get(key) for key in ("model_utility", "forget_quality", "forget_quality_D")}}
    for name, of in target.items():
        if isinstance(of, dict):
            start |= {f"{name} {key}": of.get(key) for key in WATCHED}
    return [start, *lines]


AT = ("forget value_said", "forget leak", "forget in_frame", "retain exact", "untouched exact", "model_utility",
      "forget_quality_D", "routing_overlap", "step", "seconds")  # what of a point of the path is shown


def compare_at(folders: Sequence[str | Path], by: str, level: float | str) -> str:
    """Runs of a kind where their paths fall to `level` of one of LEVELS; "best": at their best epochs, p by seed."""
    best = level == "best"
    first = "at its best forget quality" if best else f"at {LEVELS[by].replace('_', ' ')} {level:g}"
    heads = [key.replace("_", " ") for key in AT] + (["p, by seed"] if best else [])
    rows = []
    for kind, of in by_kind(folders).items():
        paths = [read_path(folder) for folder in of]
        found = [at_best(path) if best else at_level(path, float(level), by) for path in paths]
        points = [point for point in found if point]
        cells = [spread([point.get(key) for point in points]) for key in AT]
        if best:
            cells.append(", ".join(f"{point['forget_quality']:.2g}" for point in points))
        rows.append((kind, f"{len(points)}/{len(of)}", cells))
    wide = [2 + max(16, *(len(cells[i]) for *_, cells in rows)) for i in range(len(heads))]
    lines = [f"{first:<26}{'runs':>6}" + "".join(f"{head:>{w}}" for head, w in zip(heads, wide, strict=True))]
    lines += [f"{kind:<26}{reached:>6}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, wide, strict=True))
              for kind, reached, cells in rows]
    return "\n".join(lines)
