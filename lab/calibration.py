"""Where to stop: as strangers tell, at a fixed strength, or at the best look by the test itself, as the papers do?

    python -m lab.calibration --seeds 0,1,2            # flags of train.py may follow; begins where it was cut off

Of each seed, UOE forgets a topic and ULD some subjects, once, as far as it goes. UOE's model is looked at after every
epoch, ULD's one assistant at every alpha of a grid. Each look asks what the model believes of the forget facts in
calibration wordings, what it says in scored ones, and how far its truth ratios are from the reference's (D, p). So
three rules can be read off one run:

    strangers   where forget facts are believed no more than strangers' are by the target (loop.until_strangers and
                uoe.deep_as_strangers; uld.alpha_of_strangers): no reference, no scored row
    fixed       the paper's number: 5 epochs, alpha 0.75 of an assistant that was trained for strangers' (uld.AIM)
    best test   the look of the highest forget quality: takes the reference, and is chosen by what it then reports

Each seed and method is kept under OUT/calibration, and done again where models, flags or the code have changed.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cli
import loop
import pretrain
from belief import belief, strangers_belief
from data.batches import Rows
from data.rows import DataSet, Row
from data.tokenizer import Tokenizer
from errors import one_line_errors
from files import digest, write_json
from flags import Flag, Parser
from interfaces import LanguageModel
from lab.trial import write_page
from methods import METHODS
from metrics.score import evaluate
from metrics.tofu import RowScores, forget_quality
from pretrained import load
from runs import data_of
from uld import LogitDifference

TRIED = {"uoe": ["--until", "strangers"], "uld": ["--subtract", "strangers"]}  # as by default, but looked at to the end
FIXED = {"uoe": 5, "uld": 0.75}  # epochs, alpha
ALPHAS = [i / 10 for i in range(21)]
RULES = ("strangers", "fixed", "best test")
FLAGS = [
    #    name        kind         small                     public  what it is
    Flag("--seeds",  cli.seeds, [0],                      None,   "of worlds and models; 0,1,2: several"),
    Flag("--out",    str,         "out",                    None,   "where models are cached and looks are kept"),
    Flag("--page",   str,         "results/calibration.md", None,   "gets the tables, between its two markers"),
]
# at: epoch or alpha; p, hit, in_three: belief.Belief's; value_said, in_frame; quality, D; of UOE enough: would it stop?
Look = dict[str, float]


# ---- one run ----------------------------------------------------------------------------------------------------

class Looker:
    """Looks at models of one world: what they believe, what they say, how far from the reference they are."""

    def __init__(self, data: DataSet, known: Rows, reference: LanguageModel):
        """known: calibration rows."""
        self.data, self.known = copy.copy(data), known
        self.data.scored = {"asked": data.scored["forget"]}  # of a set named "forget" answers are sampled, for minutes
        self.reference = self.scores(reference)

    def scores(self, model: LanguageModel) -> RowScores:
        return evaluate(model, self.known.tokenizer, self.data, "look")["asked"]

    def look(self, model: LanguageModel, at: float) -> Look:
        scores, quality, D = self.scores(model), 0.0, 1.0
        with contextlib.suppress(ValueError):  # a NaN among truth ratios: as far away as can be
            quality, D, _ = forget_quality(scores.fact_ratios(), self.reference.fact_ratios())
        said = {key: float(scores.known[key] or 0.0) for key in ("value_said", "in_frame")}
        return {"at": at, **belief(model, self.known)._asdict(), **said, "quality": quality, "D": D}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The looks of one seed and method, kept as JSON; models are cached, or trained now, as train.py does it."""
    data, method = data_of(vars(args)), METHODS[args.method]
    tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
    forget, retain = loop.learning_rows(args, data, *method.rows(data, args), tokenizer)
    places = {role: pretrain.cached_model(args, data, tokenizer, role) for role in ("target", "reference")}
    folder = Path(args.out) / "calibration" / f"{args.method}-seed{args.seed}"
    asked = [str(value) for key, value in sorted(vars(args).items()) if key not in ("out", "name", "resume")]
    root = Path(__file__).parent.parent
    code = ("lab/calibration.py", "uoe.py", "uld.py", "objectives.py", "belief.py")
    key = digest([place.name for place in places.values()], asked, [(root / name).read_text() for name in code])
    file = folder.with_suffix(".json")
    if file.is_file() and json.loads(file.read_text())["key"] == key:
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    target, reference = (load(place / "model", device=args.device)[0] for place in places.values())
    known = forget.calibrating()
    looker, looks = Looker(data, known, reference), []
    styles = [belief(target, known.like(rows)).p for rows in (data.scored["forget"], other_style(data))]

    def fit(*what, deep=None, **how) -> dict:
        stop = loop.until_strangers(target, known)

        def after_epoch(model: LanguageModel, epoch: int, steps: int, seconds: float) -> bool:
            if args.method == "uoe":
                enough = stop(model, epoch, steps, seconds) and (deep is None or deep(model))
                looks.append(looker.look(model, epoch) | {"enough": enough})
            return False

        return loop.fitting(args, forget, folder, after_epoch=after_epoch)(*what, **how)

    torch.manual_seed(args.seed)
    model, _, _ = method.unlearn(target, forget, retain, args, fit)
    chosen = None
    if isinstance(model, LogitDifference):
        chosen = model.alpha
        for model.alpha in sorted({*ALPHAS, FIXED["uld"], chosen}):
            looks.append(looker.look(model, model.alpha))
    out = {"key": key, "method": args.method, "seed": args.seed, "looks": looks, "chosen": chosen,  # alpha, of ULD
           "strangers": strangers_belief(target, known)._asdict(),
           "styles": styles,
           "target": looker.look(target, 0), "reference": looker.look(reference, 0)}
    write_json(file, out)
    return out


def other_style(data: DataSet) -> list[Row]:
    """The scored forget rows with the answers that truth ratios ask: in a style in which the fact was never taught."""
    return [row | {"answer": row.get("paraphrased_answer", row["answer"])} for row in data.scored["forget"]]


# ---- where each rule ends ---------------------------------------------------------------------------------------

def end_of(rule: str, kept: dict[str, Any]) -> Look:
    """The look at which a rule stops; the last one where it never does, as in training."""
    looks = kept["looks"]
    if rule == "best test":
        return max(looks, key=lambda look: look["quality"])
    if rule == "strangers" and kept["chosen"] is None:
        return [*(look for look in looks if look["enough"]), looks[-1]][0]
    at = kept["chosen"] if rule == "strangers" else FIXED[kept["method"]]
    return [*(look for look in looks if look["at"] >= at), looks[-1]][0]


def cell(values: Sequence[float], worst: Any = max) -> str:
    """Mean and, in brackets, the worst."""
    return f"{statistics.mean(values):.2f} ({worst(values):.2f})"


def rules_table(runs: Sequence[dict[str, Any]]) -> str:
    """Of each method and rule, over seeds: where it ends, how far from the reference, in markdown."""
    lines = ["| mean (worst) of seeds | seeds | ends at, from - to | distance of value said | D | in frame |",
             "|---|---:|---:|---:|---:|---:|"]
    for method in dict.fromkeys(kept["method"] for kept in runs):
        some = [kept for kept in runs if kept["method"] == method]
        for rule in RULES:
            ends = [end_of(rule, kept) for kept in some]
            far = [abs(end["value_said"] - kept["reference"]["value_said"])
                   for end, kept in zip(ends, some, strict=True)]
            at = [end["at"] for end in ends]
            told = f"{rule} {FIXED[method]}" if rule == "fixed" else rule
            lines.append(f"| {method}, {told} | {len(some)} | {statistics.mean(at):.3g}, {min(at):.3g} - {max(at):.3g} "
                         f"| {cell(far)} | {cell([end['D'] for end in ends])} "
                         f"| {cell([end['in_frame'] for end in ends], min)} |")
    return "\n".join(lines)


def models_table(runs: Sequence[dict[str, Any]]) -> str:
    """Of each model: what the target believes of strangers beside what the reference believes of the forget facts.

    And how sure the target is of the forget facts in the scored rows' two styles of answer, beside the D at which the
    strangers' rule ends.
    """
    lines = ["| model | p(value): target, strangers | reference, forget facts | likeliest: target, strangers "
             "| reference, forget facts | p(value): target, taught style | style of truth ratios | D, strangers |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for kept in runs:
        ours, theirs = kept["strangers"], kept["reference"]
        sure = [*kept["styles"], end_of("strangers", kept)["D"]]
        lines.append(f"| {kept['method']}, seed {kept['seed']} | {ours['p']:.3f} | {theirs['p']:.3f} "
                     f"| {ours['hit']:.3f} | {theirs['hit']:.3f} | {' | '.join(f'{x:.2f}' for x in sure)} |")
    apart = [cell([abs(kept["strangers"][of] - kept["reference"][of]) for kept in runs]) for of in ("p", "hit")]
    lines.append(f"| distance, mean (worst) | | {apart[0]} | | {apart[1]} | | | |")
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="calibration by strangers, beside fixed strength and the best by the test")
    parser.add("calibration", FLAGS)
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    runs = []
    for method, how in TRIED.items():
        args = cli.parse(["--method", method, *how, "--out", own.out, "--name", "calibration", *rest])
        for seed in own.seeds:
            args.seed = seed
            runs.append(run(args))
    text = rules_table(runs) + "\n\n" + models_table(runs)
    write_page(Path(own.page), text, "Calibration by strangers", "<!-- calibration: written by lab/calibration.py -->")
    print(text)


if __name__ == "__main__":
    main()
