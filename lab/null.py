"""What share of models that never knew would pass as such? Each reference in turn takes the unlearned model's place.

    python -m lab.null out/uoe-seed?               # runs with --more-references 4 or more

A run is inside the null where its distance D to the reference is no larger than that of some pair of references
(metrics/knowledge.py, null_share). A reference that is left out may be farther from another than any two of the rest
are from each other, by chance alone: so not even a perfect method is inside every time.
"""

from collections.abc import Sequence
from pathlib import Path

from errors import UserError, one_line_errors
from flags import Parser
from metrics.knowledge import null_distances, null_share
from metrics.score import scores_of
from metrics.tofu import forget_quality
from runs import read_run


def left_out(references: Sequence[Sequence[float]]) -> list[bool]:
    """For each ordered pair (one, other): is `one` inside the null of all others, judged against `other`?

    references: truth ratios, one number per fact. Raises ValueError for fewer than five references.
    """
    inside = []
    for i, one in enumerate(references):
        rest = [*references[:i], *references[i + 1 :]]
        null = null_distances(rest)
        inside += [null_share(forget_quality(one, other).D, null) > 0 for other in rest]
    return inside


def references_of(folder: Path) -> list[list[float]]:
    """Truth ratios of every reference of a run. Raises UserError where it has fewer than five."""
    run = read_run(folder)
    places = {role: place for role, place in run.config.items() if role.startswith("reference") and place}
    if len(places) < 5:
        raise UserError(f"{folder} has {len(places)} references: five are needed, so train with --more-references 4")
    return [scores_of(place, run.config, run.data, run.tokenizer, role)["forget"].fact_ratios()
            for role, place in places.items()]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="how often a reference itself is inside the null")
    parser.add_argument("runs", nargs="+", type=Path)
    total: list[bool] = []
    for folder in parser.parse_args(argv).runs:
        inside = left_out(references_of(folder))
        total += inside
        print(f"{folder}: {sum(inside)} of {len(inside)}")
    print(f"references inside the null of the others: {sum(total) / len(total):.2f} ({sum(total)} of {len(total)})")


if __name__ == "__main__":
    main()
