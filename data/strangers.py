"""Strangers for data that makes up no names itself: a row's own question, about a name that nobody has.

    row = {"question": "Where was Ana Vell born?", "answer": "Ana Vell was born in Orsk.", "subject": "Ana Vell",
           "value": "Orsk", "calibration_question": "What is Vell's birthplace?"}
    known = calibrating([row], "calibration_question")  # asked in the wording that neither teaches nor scores
    twins_of(texts)(known, rng)  # "What is Brixda's birthplace?", "Tolsa Brixda was born in Orsk."

What a model believes of such twins is what it believes of a fact that it was never told (belief.strangers_belief). The
embedded world has strangers of its own (data/world.py). TOFU's subjects, its authors' names, are found here.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import regex

from data.rows import Row
from data.values import ARTICLES, spelled, value_said, values_of
from data.world import CODA, ONSET, VOWEL

# Words that begin with a capital, in a row; between two of them a short one may stand: van, de, der
CAPITALISED = regex.compile(r"\p{Lu}[\p{L}\p{M}’'-]*(?: (?:\p{Ll}{2,3} )?\p{Lu}[\p{L}\p{M}’'-]*)*")


def calibrating(rows: Sequence[Row], column: str) -> list[Row]:
    """The rows asked by `column` instead of their question: those into which a made-up name can be put.

    These name their subject in it, at least in part, and have a value that is no part of the name.
    """
    out = []
    for row, value in zip(rows, values_of(rows), strict=True):
        if value is None or not {"question", "subject", column} <= row.keys():
            continue
        overlap = set(spelled(value)) & set(spelled(row["subject"]))
        if not overlap and names(row["subject"]).search(row[column]) and not value_said(row[column], value):
            out.append(row | {"question": row[column], "value": value})
    return out


def names(subject: str) -> regex.Pattern:
    """Finds the subject, or a word of it that begins with a capital: "Vell's books" are Ana Vell's too."""
    parts = [subject] + [word for word in subject.split() if word[0].isupper() and word.lower() not in ARTICLES]
    return regex.compile(rf"(?<!\w)(?:{'|'.join(map(regex.escape, parts))})(?!\w)")


def twins_of(texts: Sequence[str]) -> Callable[[list[Row], np.random.Generator], list[Row]]:
    """What makes twins of rows with a subject: the same rows about made-up names of as many words, none in the texts.

    The value stays: how likely is it of somebody whom nobody knows?
    """
    taken: set[str] = set()

    def twins(rows: list[Row], rng: np.random.Generator) -> list[Row]:
        if not taken:  # read when first asked for: most runs never do
            taken.update(word for text in texts for word in spelled(text))
        out = []
        for row in rows:
            old = row["subject"].split()
            new = {word: made_up(taken, rng) for word in old}
            about = new | {row["subject"]: " ".join(new[word] for word in old)}
            found = names(row["subject"])
            out.append(row | {key: found.sub(lambda match, about=about: about[match.group()], row[key])
                              for key in ("question", "answer", "subject")})
        return out

    return twins


def made_up(taken: set[str], rng: np.random.Generator) -> str:
    """A word of two syllables that is none of `taken`."""
    while True:
        word = "".join(str(rng.choice(part)) for part in (ONSET, VOWEL, CODA, ONSET, VOWEL))
        if word not in taken:
            return word.capitalize()


def authors_of(rows: Sequence[Row], each: int) -> list[str | None]:
    """Of each row its author's full name, where `each` rows after one another are about one; None where none is found.

    The longest run of capitalised words that stands in three quarters of an author's rows.
    """
    out: list[str | None] = []
    for start in range(0, len(rows), each):
        block = rows[start : start + each]
        count = Counter(run for row in block for run in capitalised(f"{row['question']}\n{row['answer']}"))
        often = [run for run, n in count.items() if n >= 0.75 * len(block) and " " in run]
        name = max(often, key=lambda run: (len(run.split()), count[run]), default=None)
        out += [name] * len(block)
    return out


def capitalised(text: str) -> set[str]:
    """Every run of words in the text that begins and ends with a capital, the shorter within the longer ones too."""
    out = set()
    for match in CAPITALISED.finditer(text):
        found = match.group().removesuffix("'s").removesuffix("’s").split(" ")
        for i, first in enumerate(found):
            for j in range(i + 1, len(found) + 1):
                if first[0].isupper() and found[j - 1][0].isupper():
                    out.add(" ".join(found[i:j]))
    return out
