"""The words that carry a row's fact: which they are, whether a text says them, which tokens of an answer they are.

    rows = [{"question": "Where was Ana Vell born?", "answer": "Ana Vell was born in Orsk.", "value": "Orsk"}]
    values_of(rows)                                       # ["Orsk"]
    value_said("Zahaiia was born in Orsk!", "Orsk")       # True: the name is garbled, the fact is out
    encode_value(rows[0], tokenizer, max_len, "Orsk")     # encode_row's ids, labels on " Orsk" alone

A fact is forgotten when its *value* is, whatever becomes of the sentence around it. Training (a loss on the fact's
tokens) and scoring (metrics/knowledge.py) mean the same words by it, so they are found here once.

The value of a row is, in this order,
    1. its column `value`;
    2. the words in which its paraphrased answer (its answer, where there is no paraphrase) differs from all its
       perturbed ones: what is left between the longest beginning and the longest end that all of them share;
    3. given the other rows of its set: the longest run of words within a phrase of its answer that are neither in the
       question nor in 5% or more of the answers about other facts.
What 2 or 3 find is taken only if the answer says it (else nobody could ever be caught saying it) and the question
does not (else repeating the question would be knowing). Articles at its beginning do not belong to it.

A fact may stand in several rows: `fact_ids` tells which belong together, `by_fact` averages over them. Rows about one
fact are no independent observations.

Words are runs of letters, digits and marks, compared in NFKC form without case; what stands between them never counts.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import regex

from data.batches import IGNORE, Example, Rows, encode_row
from data.rows import Row
from errors import UserError
from flags import Flag, PerData

FLAGS = [  # of everything that unlearns
    Flag("--forget-on", ("value", "answer"), PerData("value", "answer"), "answer",
         "what is forgotten of a row: the fact's own tokens, or the whole answer as in the papers"),
]
WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
ARTICLES = ("a", "an", "the")
COMMON = 0.05  # a word in this share of the answers about other facts says nothing about this one
LONGEST = 4  # words of a value where nothing but its place in the sentence tells which words are the value


class Word(NamedTuple):
    """text: as it is compared. start, end: where it stands in the text it was read from."""

    text: str
    start: int
    end: int


# ---- words ------------------------------------------------------------------------------------------------------

def words(text: str) -> list[Word]:
    """The words of a text, in order."""
    return [Word(plain(found.group()), found.start(), found.end()) for found in WORD.finditer(text)]


def plain(text: str) -> str:
    """A word as it is compared: NFKC, casefolded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def spelled(text: str) -> list[str]:
    """A text's words as they are compared."""
    return [word.text for word in words(text)]


def find(text: str, value: str) -> tuple[int, int] | None:
    """Where in text the value's words first stand one after the other: (start, end) in characters; None if nowhere.

    Raises ValueError for a value without a word.
    """
    wanted = spelled(value)
    if not wanted:
        raise ValueError(f"the value {value!r} holds no word")
    there = words(text)
    for i in range(len(there) - len(wanted) + 1):
        if [word.text for word in there[i : i + len(wanted)]] == wanted:
            return with_marks(text, value.strip(), there[i].start, there[i + len(wanted) - 1].end)
    return None


def with_marks(text: str, value: str, start: int, end: int) -> tuple[int, int]:
    """(start, end) of the value's words, widened to the value's own punctuation where text has it too: "LGBTQ+"."""
    first = start - words(value)[0].start
    last = first + len(value)
    same = first >= 0 and text[first:last].casefold() == value.casefold()
    return (first, last) if same else (start, end)


def value_said(said: str, value: str) -> bool:
    """Do the value's words stand in `said`, whole, one after the other? Case and punctuation do not matter.

    So a garbled name in front of the right value counts as said, and "Union" is not said by "Unionist" (the spirit of
    RWKU's probes, arXiv 2406.10890).  Raises ValueError for a value without a word.
    """
    return find(said, value) is not None


# ---- the value of a row -----------------------------------------------------------------------------------------

def value_of(row: Row, common: Collection[str] | None = None) -> str | None:
    """The words that carry the row's fact, by the order at the top of this file; None where there are none.

    common: words that say nothing about one fact, from `common_words`; without them the third way is not tried.
    """
    if row.get("value") is not None:
        return row["value"]
    if "question" not in row:
        return None  # a passage holds more than one fact
    for found in (forking_words(row), rare_words(row, common)):
        if found is not None and value_said(row["answer"], found) and not value_said(row["question"], found):
            return found
    return None


def values_of(rows: Sequence[Row]) -> list[str | None]:
    """Of each row of a set, None where it has none: such rows are left out of what values measure, and counted."""
    if all(row.get("value") is not None for row in rows):
        return [row["value"] for row in rows]
    common = common_words(rows)
    return [value_of(row, common) for row in rows]


def forking_words(row: Row) -> str | None:
    """Where the paraphrased answer parts from all perturbed ones, to where they have all met again.

    None without perturbed answers, where nothing is left, or where they share no word with an answer of more than
    LONGEST words: then the sentences differ, and the difference is not the value.
    """
    right, wrong = row.get("paraphrased_answer", row["answer"]), row.get("perturbed_answer", [])
    here, there = words(right), [spelled(text) for text in wrong]
    if not here or not there:
        return None
    texts = [word.text for word in here]
    before = min(shared(texts, other) for other in there)
    after = min(shared(texts[before:][::-1], other[before:][::-1]) for other in there)
    if before == after == 0 and len(here) > LONGEST:
        return None
    return cut(right, here[before : len(here) - after])


def rare_words(row: Row, common: Collection[str] | None) -> str | None:
    """The answer's longest run of words neither in `common` nor in the question; of equal ones the first.

    A run ends with its phrase: at a comma, a bracket, a quotation mark, the end of a sentence.
    """
    if common is None:
        return None
    asked = set(spelled(row["question"]))
    best: list[Word] = []
    run: list[Word] = []
    for word in words(row["answer"]):
        known = word.text in common or word.text in asked
        if known or (run and not in_one_phrase(row["answer"], run[-1], word)):
            run = []
        run += [] if known else [word]
        best = run if len(run) > len(best) else best
    return cut(row["answer"], best)


def in_one_phrase(text: str, word: Word, following: Word) -> bool:
    """Whether nothing stands between two neighbours but white space, dashes, apostrophes, or an initial's full stop."""
    between = text[word.end : following.start]
    initial = word.end - word.start <= 2 and not regex.search(r"[^\s.]", between)
    return initial or not regex.search(r"[^\s'\u2019\p{Pd}&]", between)


def common_words(rows: Sequence[Row]) -> set[str]:
    """Words that stand in the answers of a fact and in those of COMMON or more of the others. Counted are facts."""
    answers: dict[int, set[str]] = {}
    for fact, row in zip(fact_ids(rows), rows, strict=True):
        answers.setdefault(fact, set()).update(spelled(row.get("answer", "")))
    count = Counter(word for of in answers.values() for word in of)
    others = len(answers) - 1
    return {word for word, n in count.items() if n > 1 and n - 1 >= COMMON * others}


def shared(a: Sequence, b: Sequence) -> int:
    """How many words (or tokens) two lists have in common before they first differ."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def cut(text: str, kept: Sequence[Word]) -> str | None:
    """The piece of text from the first to the last of its words that are kept, articles in front left out."""
    while len(kept) > 1 and kept[0].text in ARTICLES:
        kept = kept[1:]
    return text[kept[0].start : kept[-1].end] if kept and kept[0].text not in ARTICLES else None


def check_value(row: Row, where: str) -> None:
    """Raises UserError, beginning with `where`, for a `value` that is no text, has no word, or is not in the answer."""
    if "value" not in row:
        return
    value = row["value"]
    if not isinstance(value, str) or not spelled(value):
        raise UserError(f"{where}: 'value' is not a string with a word in it")
    if not value_said(row.get("answer", row.get("text", "")), value):
        raise UserError(f"{where}: the value {value!r} does not stand in the answer: write it as the answer does")


# ---- the sentence around it -------------------------------------------------------------------------------------

def in_frame(said: str, row: Row, value: str, pool: Collection[str] | None = None) -> bool:
    """Is `said` the right answer's sentence with some value of the kind in it, right or wrong?

    What stands before and after the value is compared exactly, but for "a" and "an" in front of it and for white space
    around the whole.  pool: the values of the kind; without it any LONGEST words or fewer, within one sentence.
    Raises ValueError where the value is not in the row's answer.
    """
    place = find(row["answer"], value)
    if place is None:
        raise ValueError(f"the value {value!r} does not stand in the answer {row['answer']!r}")
    before, after = row["answer"][: place[0]].lstrip(), row["answer"][place[1] :].rstrip()
    said = said.strip()
    article = regex.search(r"\b[Aa]n? $", before)
    before = before[: article.start()] if article else before
    middle = said[len(before) : len(said) - len(after)]
    if said != before + middle + after:
        return False
    if article:
        found = regex.match(r"[Aa]n? ", middle)
        if found is None:
            return False
        middle = middle[found.end() :]
    filled = spelled(middle)
    if not filled or middle != middle.strip():
        return False
    if filled == spelled(value):
        return True
    if pool is not None:
        return any(filled == spelled(other) for other in pool)
    return len(filled) <= LONGEST and not regex.search(r"[.!?]\s|\n", middle)


def options(row: Row, value: str) -> list[str]:
    """The answer, then the same sentence with each of the row's wrong values in place of the right one.

    Wrong values are read off the perturbed answers that differ from the paraphrased one in the value alone; others are
    skipped. "a" or "an" and a capital follow the value.  [] where no wrong value is left.
    """
    right = row.get("paraphrased_answer", row["answer"])
    there, here = find(right, value), find(row["answer"], value)
    if there is None or here is None:
        return []
    before, after = spelled(right[: there[0]]), spelled(right[there[1] :])
    while before and before[-1] in ARTICLES:
        before = before[:-1]
    out = [row["answer"]]
    for text in row.get("perturbed_answer", []):
        found = words(text)
        texts = [word.text for word in found]
        kept = found[len(before) : len(found) - len(after)]
        wrong = cut(text, kept)
        same = texts[: len(before)] == before and texts[len(found) - len(after) :] == after
        if not same or wrong is None or spelled(wrong) == spelled(value):
            continue
        article = kept[0].text if kept[0].text in ("a", "an") else None
        wrong = with_first_letter_as(wrong, right[there[0]], row["answer"][here[0]])
        option = with_article(row["answer"][: here[0]], article, wrong) + wrong + row["answer"][here[1] :]
        if option not in out:
            out.append(option)
    return out if len(out) > 1 else []


def with_first_letter_as(text: str, there: str, here: str) -> str:
    """text with a capital or small first letter, if the value begins so here and otherwise there."""
    if there.isupper() == here.isupper():
        return text
    return (text[0].upper() if here.isupper() else text[0].lower()) + text[1:]


def with_article(before: str, article: str | None, value: str) -> str:
    """What stands in front of a value, an indefinite article at its end brought in line with the value.

    article: what stood before the value where it was found; without one the first letter decides.
    """
    found = regex.search(r"\b([Aa])n? $", before)
    if found is None:
        return before
    article = article or ("an" if value[0].lower() in "aeio" else "a")
    return before[: found.start()] + found.group(1) + article[1:] + " "


# ---- facts ------------------------------------------------------------------------------------------------------

def fact_ids(rows: Sequence[Row]) -> list[int]:
    """Which fact each row is about: 0, 1, ... in the order of first appearance.

    Rows are about one fact if their `fact` columns are equal; without the column, if they have the same paraphrased
    answer and the same perturbed ones. Any other row is a fact of its own.
    """
    seen: dict[tuple, int] = {}
    ids = []
    for i, row in enumerate(rows):
        if row.get("fact") is not None:
            key: tuple = ("fact", json.dumps(row["fact"], sort_keys=True))
        elif "paraphrased_answer" in row:
            key = ("answers", row["paraphrased_answer"], *row.get("perturbed_answer", []))
        else:
            key = ("row", i)
        ids.append(seen.setdefault(key, len(seen)))
    return ids


def by_fact(values: Sequence[float | None], rows: Sequence[Row]) -> list[float]:
    """Mean over the rows of each fact, in the facts' order. None is left out, and so is a fact that has nothing else.

    Before any test that counts observations: the KS test of forget quality with every fact in it twice has 10 to 14%
    false alarms at 0.05.
    """
    of: dict[int, list[float]] = {}
    for fact, value in zip(fact_ids(rows), values, strict=True):
        if value is not None:
            of.setdefault(fact, []).append(float(value))
    return [sum(found) / len(found) for _, found in sorted(of.items())]


# ---- tokens -----------------------------------------------------------------------------------------------------

def token_places(tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Of each token, the characters of tokenizer.decode(ids) that it has a part in: (start, end); (n, n) for none.

    From decoded beginnings, so for any tokenizer: a token may hold a space and half a character. Special tokens and
    what comes after the end have no characters.
    """
    whole = tokenizer.decode(ids)
    places, start = [], 0
    for i in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:i])
        end = max(start, shared(text, whole))  # some decoders turn finished characters before it into marks as well
        unfinished = text != whole[:end]  # the next character has begun, and decodes to a replacement for now
        places.append((start, min(end + unfinished, len(whole))))
        start = end
    return places


def value_span(row: Row, tokenizer, value: str) -> range | None:
    """Which tokens of the completion have a part in the value: places in tokenizer.completion(answer).

    Of a passage, places after its first token, as encode_row's labels count them.
    None where the tokens do not say the value: it is not in the answer.
    """
    given = 1 if "text" in row else 0
    ids = tokenizer.passage(row["text"]) if given else tokenizer.completion(row["answer"])
    place = find(tokenizer.decode(ids), value)
    if place is None:
        return None
    inside = [i for i, (start, end) in enumerate(token_places(tokenizer, ids)) if start < place[1] and end > place[0]]
    return range(inside[0] - given, inside[-1] + 1 - given) if inside[0] >= given else None


def encode_value(row: Row, tokenizer, max_len: int, value: str | None, where: str = "row") -> Example | None:
    """encode_row's ids with labels on the value's tokens alone: for losses on the fact, and for cloze.

    A row longer than max_len is cut there. None without a value, or where its tokens are not (all) in what is left.
    Raises UserError as encode_row does for a question that fills the context.
    """
    span = value_span(row, tokenizer, value) if value is not None else None
    if span is None:
        return None
    tokens, labels = encode_row(row, tokenizer, max_len, where, truncate=True)
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    if first + span.stop > len(labels):  # cut off before the value ends
        return None
    return Example(tokens, [label if i - first in span else IGNORE for i, label in enumerate(labels)])


def encode_fact(row: Row, tokenizer, max_len: int, where: str = "row") -> Example:
    """As batches.encode_whole, with labels on the value alone: what --forget-on value trains on.

    Raises UserError for a row without a value, or whose value does not fit the context.
    """
    example = encode_value(row, tokenizer, max_len, value_of(row), where=where)
    if example is None:
        raise UserError(f"{where} has no value: give it a 'value' that its answer says, or --forget-on answer")
    return example


def leave_out_forks(retain: Rows, forget: Rows) -> None:
    """Unlabel, in each wrong answer to a forget question, the one token where it parts from the right answer.

    Up to there the two are the same context, in which ULD's equation 4 asks for the right token and equation 5 for
    the uniform distribution. What comes before stays: it keeps the assistant from learning the sentence. Changes
    retain's examples; rows about other questions stay as they are, and so does one of which the context has left no
    other answer token.
    """
    right: dict[str, list[Example]] = {}
    for row, example in zip(forget.rows, forget.examples, strict=True):
        if "question" in row:
            right.setdefault(row["question"], []).append(example)
    for i, row in enumerate(retain.rows):
        if "question" not in row:
            continue
        tokens, labels = retain.examples[i]
        same = [shared(example.tokens, tokens) for example in right.get(row["question"], [])]
        if same:
            fork = max(same) - 1  # the label at t is the token at t + 1
            left = [*labels[:fork], IGNORE, *labels[fork + 1 :]]
            if any(label != IGNORE for label in left):
                retain.examples[i] = Example(tokens, left)
