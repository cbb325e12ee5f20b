"""Where data comes from: the embedded world, TOFU, or the user's own JSON lines; all end up as one DataSet."""

from pathlib import Path

from data.rows import DataSet, Limits, Row, augment, check_apart, check_no_leak, read_rows
from data.strangers import calibrating, names, twins_of
from data.tofu import load_tofu
from data.values import check_value
from data.world import make_world
from errors import UserError

WORLDS = {"world": "subjects", "topic": "topic"}  # --data -> what is forgotten: some subjects, or a whole topic


def load_data(data: str = "world", split: str = "forget10", seed: int = 0, augmented: str | None = None,
              protocol: str = "tofu", forget: str | None = None, retain: str | None = None,
              authors: int = 0, subjects: int = 10) -> DataSet:
    """`world` or `topic` (generated from seed), `tofu` (from the hub), a folder with TOFU's files; or the user's own.

    authors: cut TOFU to so many, 0: all.  subjects: known ones per topic of the world.
    forget, retain: JSON-lines files that stand in for `data`; they teach and score themselves.
    Raises UserError for anything that is missing or not in the schema of data/rows.py.
    """
    if forget or retain:
        if not (forget and retain):
            raise UserError("--forget and --retain go together: give both files, or neither")
        rows = {"forget": read_rows(Path(forget)), "retain": read_rows(Path(retain))}
        for name, path in (("forget", forget), ("retain", retain)):
            for number, row in enumerate(rows[name], 1):
                check_value(row, f"{path} row {number}")
                check_subject(row, f"{path} row {number}")
        check_apart(rows["forget"], rows["retain"])
        calibration = calibrating(rows["forget"], "calibration_question")
        scored = {}
        for name in rows:
            rows[name], scored[name] = (list(of) for of in zip(*map(shared_out, rows[name]), strict=True))
            scored[name] = scored[name][:200]
        paraphrased, perturbed = augment(rows["forget"])
        own = DataSet(name=Path(forget).stem, forget=rows["forget"], retain=rows["retain"], scored=scored,
                      paraphrased=paraphrased, perturbed=perturbed, utility=("retain",), limits=Limits(new=200),
                      calibration=calibration)
        if calibration:
            own.twins = twins_of(own.texts())
        check_no_leak(own, same_questions=True)
        return own
    if is_tofu(data):  # raises UserError for what is no data at all
        return load_tofu(split, None if data == "tofu" else data, augmented, protocol, authors)
    return make_world(seed, WORLDS[data], subjects)


def shared_out(row: Row) -> tuple[Row, Row]:
    """A row of a user's own as (what augments, what scores), so that nothing does both.

    The paraphrased question augments and the paraphrased answer scores; of the wrong answers the first half, rounded
    up, score.
    """
    wrong = row.get("perturbed_answer", [])
    half = (len(wrong) + 1) // 2
    spare = {key: value for key, value in row.items() if key != "paraphrased_answer"}
    if wrong:
        spare["perturbed_answer"] = wrong[half:]
        row = row | {"perturbed_answer": wrong[:half]}
    return spare, row


def check_subject(row: Row, where: str) -> None:
    """Raises UserError, beginning with `where`, for a calibration_question without a subject that it names."""
    if "calibration_question" not in row:
        return
    subject = row.get("subject")
    if not isinstance(subject, str) or not subject.strip():
        raise UserError(f"{where} has a 'calibration_question' and no 'subject': name whom a stranger is to replace")
    if not names(subject).search(row["calibration_question"]):
        raise UserError(f"{where}: the subject {subject!r} does not stand in the calibration_question, so no stranger "
                        "can be asked about")


def is_tofu(data: str) -> bool:
    """Whether --data is TOFU, or a folder of its kind. Raises UserError where it is nothing."""
    if data in WORLDS or data == "tofu":
        return data == "tofu"
    if not Path(data).is_dir():
        raise UserError(f"--data {data} is neither 'world', 'topic', 'tofu' nor a folder: give one of the four")
    return True
