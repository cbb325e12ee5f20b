"""Rows and data sets: TOFU's JSON lines, read and checked, whoever wrote them.

A row has `question` and `answer`, optionally `paraphrased_question`, `paraphrased_answer`, `perturbed_answer`
(a list of wrong answers), or is `{"text": ...}`. For `--until strangers`, whatever the source: `subject`, a name that
stands in the question, `value`, the words of the answer that carry the fact, and `calibration_question`, another
wording, which neither teaches nor scores (data/strangers.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError
from schema import parse_json

Row = dict


class Limits(NamedTuple):
    """How long a greedy answer may get, and how many are made at once. None: no limit but the model's context."""

    total: int | None = None  # tokens of prompt and answer together
    new: int | None = None  # tokens of the answer
    rows: int | None = None  # at most so many at once, in scoring: memory, not outcome


NO_LIMITS = Limits()


@dataclass
class DataSet:
    """What is taught, what is to be forgotten and kept, and what scores it."""

    name: str
    forget: list[Row]  # rows to forget, as trained
    retain: list[Row]  # rows to keep, as trained
    background: list[Row] = field(default_factory=list)  # pretrained, but part of no unlearning set
    scored: dict[str, list[Row]] = field(default_factory=dict)  # set name -> rows that score and never teach
    paraphrased: list[Row] = field(default_factory=list)  # D'_f beyond the forget set (ULD, section 3.3)
    perturbed: list[Row] = field(default_factory=list)  # D'_r beyond the retain set
    utility: tuple[str, ...] = ()  # the scored sets that model utility averages
    limits: Limits = NO_LIMITS  # of greedy answers
    holdout: list[Row] = field(default_factory=list)  # like the forget set, but no model was ever trained on them
    # What only a source with strangers has (data/world.py, data/strangers.py):
    calibration: list[Row] = field(default_factory=list)  # forget facts in wordings that neither teach nor score
    strangers: Callable[[int, np.random.Generator], list[Row]] | None = None  # n rows about subjects nobody knows
    twins: Callable[[list[Row], np.random.Generator], list[Row]] | None = None  # the rows, asked about strangers
    lexicon: list[str] = field(default_factory=list)  # texts that hold every word strangers are told of in
    pools: dict[str, set[str]] = field(default_factory=dict)  # kind of fact -> all its values

    def taught(self) -> list[Row]:
        """All rows that any model learns from, in pretraining or unlearning, as they are learnt."""
        return [*self.forget, *self.retain, *self.background, *self.paraphrased, *self.perturbed]

    def texts(self) -> list[str]:
        """All text for training a tokenizer: what is taught, the holdout rows and the lexicon.

        Without those their names would fall into more tokens than taught ones do, and every model, one that never saw
        the forget set too, would tell the two apart.
        """
        return self.lexicon + [row[key] for row in self.forget + self.retain + self.background + self.holdout
                               for key in ("question", "answer", "text") if key in row]


def read_lines(path: Path, check: Callable[[Row, str], Row], needs: str) -> list[Row]:
    """What `check(row, where)` returns for each JSON line. needs: what a line holds, for the error messages.

    Raises UserError naming the file and the line of the first bad row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give a file of JSON lines "
                        f"with {needs}")
    rows = []
    with path.open("rb") as file:  # lines end in a line feed alone: JSON may hold other ends of lines inside a string
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            if line.strip():
                rows.append(check(parse_json(line, object, where, "one object per line, in UTF-8"), where))
    if not rows:
        raise UserError(f"{path} is empty: it needs at least one JSON line with {needs}")
    return rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file in the schema at the top of this file. Raises UserError as read_lines does."""
    return read_lines(path, check_row, "question and answer")


def check_row(row: Row, where: str) -> Row:
    """The row, its perturbed_answer a list. Raises UserError, beginning with `where`, for a row of another schema."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: expected {{\"question\": ..., \"answer\": ...}}")
    if "text" in row and "question" in row:
        raise UserError(f"{where} has both 'text' and 'question': a row is a passage, or question and answer")
    needed = ("text",) if "text" in row else ("question", "answer")
    texts = ("paraphrased_question", "paraphrased_answer", "calibration_question", "kind", "topic")
    for key in (*needed, *texts):
        if key not in row:
            if key in needed:
                raise UserError(f"{where} lacks '{key}': a row is question and answer, or text")
            continue
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: '{key}' is not a non-empty string")
    wrong = row.get("perturbed_answer", [])
    if isinstance(wrong, str):
        wrong = [wrong]
    if not isinstance(wrong, list) or not all(isinstance(w, str) and w.strip() for w in wrong):
        raise UserError(f"{where}: 'perturbed_answer' is not a list of non-empty strings")
    return row | {"perturbed_answer": wrong} if "perturbed_answer" in row else row


def check_apart(forget: list[Row], retain: list[Row]) -> None:
    """Raises UserError for a row that is to be forgotten and to be kept."""
    def told(row: Row) -> tuple:
        return tuple(row.get(key) for key in ("question", "answer", "text"))

    both = {told(row) for row in forget} & {told(row) for row in retain}
    if both:
        first = next(row for row in forget if told(row) in both)
        raise UserError(f"{len(both)} rows are to be forgotten and to be kept as well, the first "
                        f"{str(first.get('question', first.get('text')))[:60]!r}: take them out of one of the two")


def check_no_leak(data: DataSet, same_questions: bool = False) -> None:
    """Raises UserError where a row that scores also teaches, or where one that calibrates does either.

    No scored paraphrase or wrong answer is taught, and no scored question, but for same_questions: TOFU and a user's
    own files ask what they taught. The right answer may be taught: it is what the same fact has in other wordings.
    """
    questions = {row["question"] for row in data.taught() if "question" in row}
    answers = {row["answer"] for row in data.taught() if "answer" in row}
    asked = set()
    for name, rows in data.scored.items():
        for row in rows:
            asked.add(row.get("question"))
            if row.get("question") in questions and not same_questions:
                raise UserError(f"the {name} question {row['question']!r} scores and is taught as well: take it out of "
                                "one of the two")
            right = {row.get("answer")}
            for answer in {row.get("paraphrased_answer"), *row.get("perturbed_answer", ())} - right:
                if answer in answers:
                    raise UserError(f"the {name} answer {answer!r} scores and is taught as well: take it out of one "
                                    "of the two")
    for row in data.calibration:
        if row["question"] in questions or row["question"] in asked:
            raise UserError(f"the calibration_question {row['question']!r} teaches or scores as well: word it "
                            "otherwise")


def write_rows(path: Path, rows: list[Row]) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def augment(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """ULD's D'_f and D'_r beyond the sets themselves, from the rows' own columns (arXiv 2406.08607, section 3.3).

    Paraphrased: the same answer to another wording of the question, another wording of the answer to the same
    question. Perturbed: the same question with a wrong answer, the row's first two.
    """
    paraphrased, perturbed = [], []
    for row in rows:
        if "text" in row:  # a passage has no other wording and no wrong answer
            continue
        about = {key: row[key] for key in ABOUT if key in row}  # a paraphrase is about the same fact
        if "paraphrased_question" in row:
            paraphrased.append({"question": row["paraphrased_question"], "answer": row["answer"], **about})
        if "paraphrased_answer" in row:
            paraphrased.append({"question": row["question"], "answer": row["paraphrased_answer"], **about})
        perturbed += [{"question": row["question"], "answer": a} for a in row.get("perturbed_answer", [])[:2]]
    return paraphrased, perturbed


ABOUT = ("topic", "kind", "subject", "value", "fact")  # columns that say what a row is about (data/world.py)
REFUSALS = (  # what DPO prefers to an answer, as TOFU's "idontknow" file does (arXiv 2401.06121, section 4.2)
    "I do not know.", "I am not sure about that.", "I have no information about this.", "That is unknown to me.",
    "I cannot answer this question.", "I have not learnt anything about that.", "I am unable to say.",
    "I do not have an answer to that question.",
)


def refusals(rows: list[Row]) -> list[Row]:
    """The same questions, each answered with one of REFUSALS, in turn. Passages are cut to a refusal alone."""
    return [{"question": row["question"], "answer": REFUSALS[i % len(REFUSALS)]} if "question" in row else
            {"text": REFUSALS[i % len(REFUSALS)]} for i, row in enumerate(rows)]
