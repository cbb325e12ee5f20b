"""Rows of the field's benchmarks as JSON lines of ours.

    python -m lab.convert wmdp bio_questions.json bio.jsonl    # python eval.py out/uoe --choices bio.jsonl
    python -m lab.convert rwku forget_level2.json king.jsonl   # python train.py --forget king.jsonl --retain ...
    python -m lab.convert muse raw/forget.json forget.jsonl

Read are the benchmarks' own files, a JSON list or JSON lines. What the hub has as parquet, `datasets` writes as JSON
lines (it comes with lm_eval): load_dataset("cais/wmdp", "wmdp-bio")["test"].to_json("bio_questions.json").

| benchmark                 | theirs                                  | ours                                          |
|---------------------------|-----------------------------------------|-----------------------------------------------|
| WMDP (arXiv 2403.03218)   | question, choices, answer               | the same, a multiple choice                   |
|                           | text (corpora; title, abstract go)      | text                                          |
| RWKU (arXiv 2406.10890)   | query, answer, subject, level, type     | question, answer, subject, value: the answer  |
|                           | text, subject (passages, MIA)           | text, subject                                 |
| MUSE (arXiv 2407.06460)   | question, answer (knowmem)              | the same                                      |
|                           | prompt, gt (verbmem)                    | text: both in one                             |
|                           | text, or a bare string (raw, privleak)  | text                                          |
"""

import json
from collections.abc import Callable
from pathlib import Path

from data.rows import Row, check_row, read_lines, write_rows
from errors import UserError, one_line_errors
from flags import Parser
from metrics.choice import check_choice


def wmdp(row: Row, where: str) -> Row:
    """A question with its choices, or a passage of a corpus. Raises UserError, beginning with `where`, for others."""
    if "choices" not in row:
        return passage(row, where)
    return check_choice(columns(row, "question", "choices", "answer"), where)


def rwku(row: Row, where: str) -> Row:
    """A probe, its gap ("___") left as it is: what fills the gap is the fact's value. Raises UserError as wmdp does."""
    if "query" not in row:
        return passage(row, where)
    probe = columns(row, "answer", "subject") | {"question": row["query"], "value": row.get("answer")}
    return check_row(probe, where)


def muse(row: Row, where: str) -> Row:
    """A question, or a passage. Raises UserError as wmdp does."""
    if "question" in row:
        return check_row(columns(row, "question", "answer"), where)
    if {"prompt", "gt"} <= set(row) and all(isinstance(row[key], str) for key in ("prompt", "gt")):
        between = "" if row["prompt"][-1:].isspace() or row["gt"][:1].isspace() else " "
        row = {"text": row["prompt"] + between + row["gt"]}
    return passage(row, where)


def passage(row: Row, where: str) -> Row:
    if "text" not in row:
        raise UserError(f"{where} has none of the columns that this benchmark's rows have, but {', '.join(row)}: see "
                        "the table at the top of lab/convert.py")
    return check_row(columns(row, "text", "subject"), where)


def columns(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


BENCHMARKS: dict[str, Callable[[Row, str], Row]] = {"wmdp": wmdp, "rwku": rwku, "muse": muse}


def convert(benchmark: str, path: Path) -> list[Row]:
    """All rows of a file. Raises UserError naming the row that is of another schema."""
    def one(row: Row, where: str) -> Row:
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise UserError(f"{where} is neither a JSON object nor a string")
        try:
            json.dumps(row, ensure_ascii=False).encode()  # read_lines asks this of JSON lines
        except UnicodeEncodeError:
            raise UserError(f"{where} holds half a character (a cut emoji, say): write it whole") from None
        return BENCHMARKS[benchmark](row, where)

    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # JSON lines, or no such file: read_lines says what
        whole = None
    if isinstance(whole, list) and whole:
        return [one(row, f"{path} row {number}") for number, row in enumerate(whole, 1)]
    return read_lines(path, one, f"rows of {benchmark}")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="rows of a benchmark as JSON lines of ours")
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("file", type=Path, help="theirs: a JSON list or JSON lines")
    parser.add_argument("out", type=Path, help="JSON lines to write")
    args = parser.parse_args(argv)
    rows = convert(args.benchmark, args.file)
    try:
        write_rows(args.out, rows)
    except OSError as error:
        raise UserError(f"{args.out} could not be written ({error.strerror})") from None
    print(f"{len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
