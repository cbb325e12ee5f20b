"""The TOFU benchmark (arXiv 2401.06121; locuslab/TOFU, MIT): 200 fictitious authors, 20 questions each.

    data = load_tofu("forget10")                    # from the hub
    data = load_tofu("forget10", folder="my/tofu")  # a folder with its JSON files

Two protocols circulate. `tofu` (the benchmark's own script) scores the first 300 rows of a set and gives prompt
and answer 200 tokens together; `openunlearning` scores all rows and gives 200 new tokens.
"""

import ast
import csv
from pathlib import Path

import huggingface_hub

from data.rows import DataSet, Limits, Row, check_apart, check_no_leak, read_rows
from data.strangers import authors_of, calibrating, twins_of
from data.values import check_value
from errors import UserError
from flags import Flag, Number
from schema import read_bytes

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
HUB = "locuslab/TOFU"
SCORED_ROWS = {"tofu": 300, "openunlearning": None}
AUGMENTED = [Flag("--augmented", str, None, None, "folder with the ULD authors' CSV files")]
LIMITS = {"tofu": Limits(total=200), "openunlearning": Limits(new=200)}
QUESTIONS = 20  # per author, who follow one another
FLAGS = [
    #     name          kind                       small       public      what it is
    Flag("--split",     (*RETAIN, *RETAIN.values()), "forget10", "forget10", "what is forgotten; retainN, "
                                       "with --method finetune: what is kept, for a reference"),
    Flag("--authors",   Number(0, 200, whole=True), 0,         0,          "cut TOFU to so many; 0: all 200"),
    Flag("--protocol",  tuple(SCORED_ROWS),        "tofu",     "tofu",     "of scoring: the first 300 rows and 200 "
                                                                           "tokens, or open-unlearning's"),
]


def load_tofu(split: str = "forget10", folder: str | None = None, augmented: str | None = None,
              protocol: str = "tofu", authors: int = 0) -> DataSet:
    """The split's forget and retain sets, its four scored sets and ULD's augmentation.

    augmented: a folder with the ULD authors' CSV files, less what scores; without it ULD has neither paraphrased nor
    perturbed rows, since the data set's own columns score.
    authors: cut to so many authors (at least 2), the split's share of them to be forgotten; 0: all 200.
    Raises UserError for an unknown split or protocol, a missing file, a bad row.
    """
    if split not in RETAIN:
        raise UserError(f"--split {split} is unknown: choose one of {', '.join(RETAIN)}")
    if protocol not in SCORED_ROWS:
        raise UserError(f"--protocol {protocol} is unknown: choose one of {', '.join(SCORED_ROWS)}")
    root = Path(folder) if folder else download()
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: give 'world', 'tofu', or a folder with TOFU's JSON files")
    limit = SCORED_ROWS[protocol]

    def read(name: str) -> list[Row]:
        rows = read_rows(root / f"{name}.json")
        for number, row in enumerate(rows, 1):
            check_value(row, f"{root / name}.json row {number}")
        return rows

    scored = {"forget": read(f"{split}_perturbed"), "retain": read("retain_perturbed"),
              "real_authors": read("real_authors_perturbed"), "world_facts": read("world_facts_perturbed")}
    forget, retain = read(split), read(RETAIN[split])
    check_apart(forget, retain)
    if authors:
        few = max(1, round(authors * len(forget) / (len(forget) + len(retain))))
        if not 2 <= authors or few * QUESTIONS > len(forget) or (authors - few) * QUESTIONS > len(retain):
            raise UserError(f"--authors {authors} is not between 2 and the 200 that TOFU has")
        # from the front: retain_perturbed, which scores, asks mostly about the first twenty authors
        forget, retain = forget[: few * QUESTIONS], retain[: (authors - few) * QUESTIONS]
        taught = {row["question"] for row in forget + retain}
        for name in ("forget", "retain"):
            scored[name] = [row for row in scored[name] if row["question"] in taught]
    held_out = set()  # what scores teaches nothing
    for row in scored["forget"] + scored["retain"]:
        held_out |= {row.get("paraphrased_answer"), *row.get("perturbed_answer", ())} - {row["answer"]}
    if augmented:
        paraphrased, perturbed, others = read_augmented(Path(augmented), split, forget)
        others = {question: [a for a in answers if a not in held_out] for question, answers in others.items()}
        retain = [row | {"perturbed_answer": others[row["question"]]} if row["question"] in others else row
                  for row in retain]
    else:  # the data set's own columns score, so they do not teach
        paraphrased, perturbed = [], []
    author = dict(zip((row["question"] for row in forget), authors_of(forget, QUESTIONS), strict=True))
    about = [row | {"subject": author[row["question"]]} for row in scored["forget"] if author.get(row["question"])]
    data = DataSet(name=f"tofu-{split}" + (f"-{authors}" if authors else ""), forget=forget, retain=retain,
                   scored={name: rows[:limit] for name, rows in scored.items()},
                   paraphrased=[row for row in paraphrased if row["answer"] not in held_out],
                   perturbed=[row for row in perturbed if row["answer"] not in held_out],
                   utility=("retain", "real_authors", "world_facts"), limits=LIMITS[protocol])
    taught = {row["question"] for row in data.taught()}  # of paraphrased questions, those that do not teach calibrate
    data.calibration = [row for row in calibrating(about, "paraphrased_question") if row["question"] not in taught]
    data.twins = twins_of(data.texts()) if data.calibration else None
    check_no_leak(data, same_questions=True)
    return data


def download() -> Path:
    """TOFU's folder from the hub's cache, fetched once."""
    try:
        return Path(huggingface_hub.snapshot_download(HUB, repo_type="dataset", allow_patterns="*.json"))
    except Exception as error:  # no network, no such name: many kinds, one way out
        raise UserError(f"--data tofu: could not fetch {HUB} ({type(error).__name__}); "
                        "download its JSON files and pass the folder as --data DIR") from None


def read_augmented(folder: Path, split: str, forget: list[Row]) -> tuple[list[Row], list[Row], dict[str, list[str]]]:
    """D'_f and D'_r from the ULD authors' CSV files: columns question, answer, list of questions, list of answers.

    Paraphrased: a reworded question with a reworded answer, the first two pairs, as their code makes them.
    Third, the wrong answers to questions that are not of the forget set, by question.

    Their reader has two faults that are not repeated here: it takes the first row for a header, and it picks
    `list(set(...))[:2]`, which changes with every Python process. Here every row counts, duplicates go, order
    stays. Their perturbed file is forget10's for all three splits, so rows are chosen by the split's questions;
    their code trains on all, with forget01 mostly about authors that are kept (uld.rows, stray_share).
    """
    questions = {row["question"] for row in forget}
    paraphrased: list[Row] = []
    perturbed: list[Row] = []
    others: dict[str, list[str]] = {}
    for path, into in ((folder / f"{split}_paraphrase.csv", paraphrased), (folder / f"{split}_perturb.csv", perturbed)):
        if not path.is_file():
            raise UserError(f"--augmented: {path} does not exist")
        number = 1
        try:
            for cells in csv.reader(read_bytes(path).decode("utf-8-sig").splitlines(True)):
                question, answer, third, fourth = cells
                answers = [a for a in distinct(fourth) if a != answer]
                # third: in the perturb file the question itself, in the paraphrase file a list
                asked = [q for q in distinct(third) if q != question] if into is paraphrased else [question]
                if question in questions:
                    into += [{"question": q, "answer": a} for q in asked for a in answers][:2]
                elif into is perturbed:
                    others[question] = answers
                number += 1
        except (ValueError, SyntaxError, csv.Error, RecursionError, MemoryError):  # the last two: nested too deep
            raise UserError(f"{path} row {number} is not question, answer, list, list in UTF-8") from None
        if not into:
            raise UserError(f"{path} has no row about a forget question of {split}: give the CSV files of this split")
    return paraphrased, perturbed, others


def distinct(cell: str) -> list[str]:
    """A printed Python list of texts, none empty, without duplicates, in its order. Raises ValueError for others."""
    value = ast.literal_eval(cell)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError("not a list of texts")
    return list(dict.fromkeys(value))
