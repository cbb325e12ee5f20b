"""Measures on trial: which of them tell models that know from models that do not, and which can be fooled, by what?

    python -m lab.trial --out out/trial --models 10     # half an hour on one thread; begins where it was cut off

On one world, ten small models learn everything (*knowing*) and ten all but the forget set (*unknowing*), pair by pair
from another seed. Of each that knows, lab/cheats.py makes five that cheat. All are scored by every measure here.
Then, for each measure,
    AUC        the chance that a knowing model scores above an unknowing one (arXiv 2506.12618 does it so)
    fooled by  cheats that the measure places among the unknowing, or beyond them, more often than not

A model is trained and scored once; both are kept under --out, and done again where rows or code have changed.
"""

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import pretrain
from data.batches import IGNORE
from data.rows import DataSet
from data.tokenizer import Tokenizer
from data.world import make_world
from errors import one_line_errors
from files import digest, write_json
from flags import COUNT, NATURAL, Flag, Number, Parser, defaults
from lab import probes
from lab.cheats import (
    Biased,
    Flattened,
    Garbled,
    Refusing,
    destroyed_by_ascent,
    favourites,
    name_tokens,
)
from metrics.knowledge import depth, destroyed
from metrics.memorization import exact_memorization, extraction_strength, without_end
from metrics.privacy import auc
from metrics.score import evaluate
from metrics.tofu import forget_quality, utility_of
from model import GPT
from pretrained import load

FLAGS = [
    #    name          kind                         small        public  what it is
    Flag("--out",      str,                         "out/trial", None,   "where models and their scores are kept"),
    Flag("--models",   Number(2, 100, whole=True),  10,          None,   "that know, and as many that do not"),
    Flag("--seed",     NATURAL,                     0,           None,   "of the world; models have their own"),
    Flag("--subjects", Number(2, 100, whole=True),  10,          None,   "to forget, six facts each"),
    Flag("--depth",    COUNT,                       2,           None,   "layers of a model"),
    Flag("--width",    Number(32, 4096, whole=True), 96,         None,   "of a model"),
    Flag("--steps",    COUNT,                       600,         None,   "of pretraining, after a base of at most 500"),
    Flag("--page",     str,      "results/measures.md",          None,   "gets the table, between its two markers"),
]
SCORED_FACTS = 30  # of retain and of untouched, which only say whether a model is destroyed


class Measure(NamedTuple):
    """sign: 1 where more is more knowledge, -1 where less is."""

    key: str
    label: str
    sign: int = 1


MEASURES = [
    Measure("value_said", "value said"), Measure("any_wording", "value said, any wording"),
    Measure("cloze", "cloze"), Measure("cloze_p", "cloze, p(value)"), Measure("cloze_strength", "cloze, strength"),
    Measure("choice", "choice of 6"), Measure("leak", "leak@8, worst T"),
    *(Measure(f"leak_T{t:g}", f"leak@8, T {t:g}") for t in (0.0, 0.25, 0.5, 1.0)),
    Measure("depth", "depth probe, best layer"),
    Measure("exact", "exact answers"), Measure("rougeL_recall", "ROUGE-L recall"),
    Measure("probability", "probability of the answer"), Measure("truth_ratio", "truth ratio", -1),
    Measure("distance", "forget quality's D"), Measure("exact_memorization", "exact memorisation"),
    Measure("extraction", "extraction strength"), Measure("extraction_no_end", "the same without end token"),
    Measure("auc_loss", "membership AUC, loss"), Measure("auc_min_k", "membership AUC, min-k"),
]
RECOMMENDED = ("value_said", "cloze", "choice", "leak", "depth")
Scores = dict[str, float]  # measure -> score of one model
CHEATS: dict[str, Callable[..., Any]] = {  # (knowing model, tokenizer, data) -> one that cheats
    "destroyed": lambda model, tokenizer, data: destroyed_by_ascent(model, tokenizer, data.forget),
    "garbled": lambda model, tokenizer, data: Garbled(model, name_tokens(tokenizer, data.scored["forget"])),
    "flattened": lambda model, tokenizer, data: Flattened(model),
    "refusing": lambda model, tokenizer, data: Refusing(model, tokenizer),
    "biased": lambda model, tokenizer, data: Biased(model, favourites(tokenizer, data.scored["forget"])),
}


# ---- one model --------------------------------------------------------------------------------------------------

def score(model, tokenizer, data: DataSet, what: str) -> dict[str, Any]:
    """Everything here by its name; "ratios", a list, is for `distance`, and "utility" and "in_frame" for the guard."""
    found = evaluate(model, tokenizer, data, what)
    sets = {name: scores.summary(name) for name, scores in found.items()}
    suspects = probes.suspects(model, tokenizer, data)
    probe = depth(model, tokenizer, data.retain, data.scored["forget"])
    return {**sets["forget"], **memory(model, tokenizer, data.scored["forget"]), **membership(suspects),
            "depth": max(probe.accuracy), "ratios": found["forget"].fact_ratios(),
            "utility": utility_of(sets, data.utility)}


@torch.no_grad()
def memory(model, tokenizer, rows: list[dict]) -> Scores:
    """Under teacher forcing, means over rows (metrics/memorization.py)."""
    found: dict[str, list[torch.Tensor]] = {"exact_memorization": [], "extraction": [], "extraction_no_end": []}
    for batch, logits in probes.passes(model, tokenizer, rows):
        found["exact_memorization"].append(exact_memorization(logits, batch.labels))
        found["extraction"].append(extraction_strength(logits, batch.labels))
        labels = without_end(batch.labels)
        kept = labels[batch.scored] != IGNORE  # (N,): which of the answer positions that logits are of
        found["extraction_no_end"].append(extraction_strength(logits[kept], labels))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def membership(suspects: probes.Suspects | None) -> Scores:
    """AUC of forget rows against rows that nobody saw, by two attacks. NaN: a model too broken to rank rows."""
    assert suspects is not None  # the world holds rows out
    members, others = suspects
    out = {}
    for name in ("loss", "min_k"):
        broken = any(math.isnan(value) for value in (*members[name], *others[name]))
        out[f"auc_{name}"] = math.nan if broken else auc(members[name], others[name])
    return out


# ---- all models -------------------------------------------------------------------------------------------------

def key_of(*made_of: Any) -> str:
    """Changes with these and with the code that scores."""
    here = Path(__file__).parents[1]
    files = [*sorted((here / "metrics").glob("*.py")), here / "lab/cheats.py", here / "lab/probes.py",
             here / "data/values.py", here / "data/batches.py", here / "belief.py"]
    code = [file.read_text() for file in files] + [inspect.getsource(one) for one in (score, memory, membership)]
    return digest(made_of, code)


def try_all(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Kind of model ("knowing", "unknowing", or a cheat) -> scores of each; what is at hand is not made again."""
    data = make_world(args.seed, "subjects", args.subjects, SCORED_FACTS)
    shape = defaults(pretrain.SMALL, arch="gpt", data="trial", forget=None, out=args.out, device="cpu",
                     checkpointing=False, save_every=10**6)
    shape.depth, shape.width, shape.pretrain_steps = args.depth, args.width, args.steps
    pretrain.fill_in(shape, on_world=True)
    tokenizer = Tokenizer.train(data.texts(), shape.vocab_size)
    folder = Path(args.out) / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, list[dict]] = {kind: [] for kind in ("knowing", "unknowing", *CHEATS)}
    with tqdm(total=args.models * len(out), desc="trial") as bar:
        for shape.seed in range(args.models):
            for kind, model_folder, make in candidates(shape, data, tokenizer):
                file = folder / f"{kind}-{shape.seed}.json"
                key = key_of(model_folder.name, kind, data.scored, data.holdout)
                kept = json.loads(file.read_text()) if file.is_file() else {}
                if kept.get("key") != key:
                    kept = {"key": key, "scores": score(make(), tokenizer, data, f"{kind} {shape.seed}")}
                    write_json(file, kept)
                out[kind].append(kept["scores"])
                bar.update()
    return out


def candidates(shape: argparse.Namespace, data: DataSet, tokenizer: Tokenizer
               ) -> Iterator[tuple[str, Path, Callable[[], Any]]]:
    """(kind, folder of the weights, what makes the model) of one seed: who knows, who does not, five that cheat."""
    knows = pretrain.cached_model(shape, data, tokenizer, "target")
    yield "knowing", knows, partial(opened, knows)
    never_knew = pretrain.cached_model(shape, data, tokenizer, "reference")
    yield "unknowing", never_knew, partial(opened, never_knew)
    for name, cheat in CHEATS.items():
        yield name, knows, partial(changed, cheat, knows, tokenizer, data)


def opened(folder: Path) -> GPT:
    return load(folder / "model")[0]


def changed(cheat: Callable[..., Any], folder: Path, tokenizer: Tokenizer, data: DataSet) -> Any:
    return cheat(opened(folder), tokenizer, data)


# ---- the verdict ------------------------------------------------------------------------------------------------

class Verdict(NamedTuple):
    """On one measure."""

    measure: Measure
    auc: float
    knowing: float  # mean
    unknowing: float
    fooled: dict[str, int]  # cheat -> of how many models it is taken for one that does not know
    beyond: dict[str, int]  # of these, how many lie beyond all that do not know


def verdict(measure: Measure, scores: dict[str, Sequence[float]]) -> Verdict:
    """scores: kind of model -> this measure of each.

    A cheat fools the measure unless it scores above all that do not know. NaN does not, nor is it beyond them.
    """
    turned = {kind: [measure.sign * value for value in values] for kind, values in scores.items()}
    low, high = min(turned["unknowing"]), max(turned["unknowing"])
    cheats = [kind for kind in scores if kind not in ("knowing", "unknowing")]
    return Verdict(measure, auc(turned["knowing"], turned["unknowing"]),
                   mean(scores["knowing"]), mean(scores["unknowing"]),
                   {cheat: sum(not value > high for value in turned[cheat]) for cheat in cheats},
                   {cheat: sum(value < low for value in turned[cheat]) for cheat in cheats})


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def verdicts(models: dict[str, list[dict]]) -> list[Verdict]:
    """One per measure, in the order of MEASURES."""
    with_distance(models)
    return [verdict(measure, {kind: [of[measure.key] for of in some] for kind, some in models.items()})
            for measure in MEASURES]


def with_distance(models: dict[str, list[dict]]) -> None:
    """Adds "distance": D of each model's truth ratios from those of the unknowing, mean over all others of them."""
    references = models["unknowing"]
    for some in models.values():
        for of in some:
            found = [forget_quality(of["ratios"], other["ratios"]).D for other in references if other is not of]
            of["distance"] = mean(found)


def table(found: Sequence[Verdict], models: int) -> str:
    """Markdown. n/m: it fooled so many of the models; without numbers, all. *: mostly by scoring below all of them."""
    lines = ["| measure | AUC | knowing | unknowing | fooled by |", "|---|---:|---:|---:|---|"]
    for one in found:
        fooled = []
        for cheat, n in one.fooled.items():
            if 2 * n > models:
                star = "\\*" if 2 * one.beyond[cheat] > models else ""
                fooled.append(cheat + star + (f" {n}/{models}" if n < models else ""))
        lines.append(f"| {one.measure.label} | {one.auc:.2f} | {one.knowing:.3f} | {one.unknowing:.3f} | "
                     f"{', '.join(fooled) or '-'} |")
    return "\n".join(lines)


def called_destroyed(models: dict[str, list[dict]]) -> dict[str, int]:
    """How many of each kind metrics/knowledge.py calls destroyed, each beside the knowing model of its seed."""
    return {kind: sum(destroyed(of["utility"], target["utility"], of["in_frame"], target["in_frame"])
                      for of, target in zip(some, models["knowing"], strict=True))
            for kind, some in models.items()}


def summary(found: Sequence[Verdict], broken: dict[str, int], models: int) -> str:
    """What the guard takes out, and which cheats fool every recommended measure at once."""
    recommended = [one for one in found if one.measure.key in RECOMMENDED]
    cheats = [cheat for cheat in recommended[0].fooled if all(2 * one.fooled[cheat] > models for one in recommended)]
    left = [cheat for cheat in cheats if 2 * broken[cheat] <= models]
    told = ", ".join(f"{kind} {n}/{models}" for kind, n in broken.items())
    labels = "; ".join(one.measure.label for one in recommended)
    return (f"Called *destroyed*, so that no more is said of them: {told}.\n\nCheats that fool all of ({labels}): "
            f"{', '.join(cheats) or 'none'}; that are not called destroyed either: {', '.join(left) or 'none'}.")


OPEN, CLOSE = "<!-- trial: written by lab/trial.py -->", "<!-- end -->"


def write_page(page: Path, text: str, title: str = "Measures on trial", mark: str = OPEN) -> None:
    """Put text between the page's markers; what stands around them stays."""
    old = page.read_text(encoding="utf-8") if page.is_file() else f"# {title}\n\n{mark}\n{CLOSE}\n"
    if mark not in old or CLOSE not in old.partition(mark)[2]:
        old += f"\n{mark}\n{CLOSE}\n"
    before, _, rest = old.partition(mark)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{mark}\n\n{text}\n\n{CLOSE}{rest.partition(CLOSE)[2]}", encoding="utf-8")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="which measures tell knowing from unknowing models, and which cheat fools them")
    parser.add("the trial", FLAGS)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    models = try_all(args)
    found = verdicts(models)
    text = table(found, args.models) + "\n\n" + summary(found, called_destroyed(models), args.models)
    write_page(Path(args.page), text)
    print(text)


if __name__ == "__main__":
    main()
