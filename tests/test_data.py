"""data/: rows, TOFU, batches, the tokenizer, and that nothing which scores teaches, whatever the source."""

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import WORLDS, DataSet, load_data, shared_out
from data.batches import (
    IGNORE,
    Example,
    batch_at,
    collate,
    encode_row,
    encode_rows,
    epoch_order,
    in_order,
    left_pad,
    rows_that_fit,
)
from data.rows import Limits, augment, check_no_leak, read_rows, refusals, write_rows
from data.tofu import RETAIN, load_tofu, read_augmented
from data.tokenizer import PATTERN, Tokenizer, train_ranks
from errors import UserError
from flags import defaults
from lab import distill
from methods import METHODS
from uld import rows as uld_rows

GOOD = '{"question": "Who?", "answer": "Me."}'
WORDY = dict(alphabet=string.ascii_letters + string.digits + " .,'!?-\n\té日🙂", max_size=60)

# ---- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, says", [
    ("{question: 1}", "is not JSON"),
    (GOOD + GOOD, "is not JSON"),
    ("[1, 2]", "is not a JSON object"),
    ('{"question": "Who?"}', "lacks 'answer'"),
    ('{"answer": "Me."}', "lacks 'question'"),
    ('{"question": 3, "answer": "Me."}', "'question' is not a non-empty string"),
    ('{"question": "Who?", "answer": " "}', "'answer' is not a non-empty string"),
    ('{"question": "Who?", "answer": null}', "'answer' is not a non-empty string"),
    ('{"question": "Who?", "answer": "Me.", "paraphrased_answer": ["I."]}', "'paraphrased_answer' is not"),
    ('{"question": "Who?", "answer": "Me.", "perturbed_answer": ["You.", 3]}', "'perturbed_answer' is not a list"),
    ('{"question": "Who?", "answer": "Me.", "perturbed_answer": 3}', "'perturbed_answer' is not a list"),
    ('{"text": ""}', "'text' is not a non-empty string"),
    ('{"question": "Who?", "answer": "Me.", "kind": ["a"]}', "'kind' is not a non-empty string"),
])
def test_a_bad_row_is_named_by_file_line_and_fault(tmp_path, bad, says):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")  # blank lines are no rows but count as lines
    with pytest.raises(UserError, match=rf"mine\.jsonl line 3.*{re.escape(says)}"):
        read_rows(path)


@pytest.mark.parametrize("content, says", [(b"", "is empty"), (b"\n \n", "is empty"),
                                           (b'{"text": "caf\xe9"}', "line 1 is not JSON .not UTF-8 text")])
def test_a_file_without_rows_or_not_in_utf_8_is_named(tmp_path, content, says):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.jsonl {says}"):
        read_rows(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read_rows(tmp_path)


def test_one_wrong_answer_may_stand_without_its_list(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?", "answer": "Me.", "perturbed_answer": "You."}')
    assert read_rows(path)[0]["perturbed_answer"] == ["You."]


@settings(max_examples=60, deadline=None)
@example(["a\u2028b", "a\x85b", "a\x0bb"])
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_rows_survive_the_disk_whatever_their_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"question": text, "answer": text[::-1]} for text in texts] + [{"text": texts[0]}]
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_augmentation_by_hand():
    """Another wording with the same answer, another answer to the same wording, then the first two wrong answers."""
    rows = [{"question": "q1", "answer": "a1", "paraphrased_question": "q1'", "paraphrased_answer": "a1'",
             "perturbed_answer": ["x", "y", "z"]},
            {"question": "q2", "answer": "a2", "perturbed_answer": ["w"]}, {"question": "q3", "answer": "a3"}]
    paraphrased, perturbed = augment(rows)
    assert paraphrased == [{"question": "q1'", "answer": "a1"}, {"question": "q1", "answer": "a1'"}]
    assert perturbed == [{"question": "q1", "answer": a} for a in "xy"] + [{"question": "q2", "answer": "w"}]


# ---- TOFU -------------------------------------------------------------------------------------------------------

def tofu_rows(name: str, n: int) -> list[dict]:
    return [{"question": f"{name} q{i}?", "answer": f"{name} a{i}.", "paraphrased_answer": f"{name} p{i}.",
             "perturbed_answer": [f"{name} w{i}{j}." for j in range(3)]} for i in range(n)]


@pytest.fixture
def tiny_tofu(tmp_path):
    """A folder with the files of forget01: 3 forget rows, 5 retain rows, scored sets of 305, 2, 2 and 4."""
    forget = [{k: row[k] for k in ("question", "answer")} for row in tofu_rows("f", 3)]
    for name, rows in {"forget01": forget, "retain99": tofu_rows("r", 5), "forget01_perturbed": tofu_rows("f", 4),
                       "retain_perturbed": tofu_rows("r", 305), "real_authors_perturbed": tofu_rows("ra", 2),
                       "world_facts_perturbed": tofu_rows("wf", 2)}.items():
        write_rows(tmp_path / f"{name}.json", rows)
    return tmp_path


def test_a_value_that_is_not_in_the_answer_is_named_in_a_folder_too(tiny_tofu):
    write_rows(tiny_tofu / "forget01.json", [{"question": "q", "answer": "In Orsk.", "value": "Ulm"}])
    with pytest.raises(UserError, match=r"forget01.json row 1: the value 'Ulm' does not stand in the answer"):
        load_tofu("forget01", str(tiny_tofu))


def test_tofu_from_a_folder(tiny_tofu):
    data = load_tofu("forget01", str(tiny_tofu))
    assert [row["question"] for row in data.forget] == ["f q0?", "f q1?", "f q2?"] and len(data.retain) == 5
    assert {name: len(rows) for name, rows in data.scored.items()} == {
        "forget": 4, "retain": 300, "real_authors": 2, "world_facts": 2}
    assert data.utility == ("retain", "real_authors", "world_facts")
    assert data.paraphrased == data.perturbed == []  # the columns that could serve score
    assert len(load_tofu("forget01", str(tiny_tofu), protocol="openunlearning").scored["retain"]) == 305
    assert load_data(str(tiny_tofu), "forget01").forget == data.forget


@pytest.mark.parametrize("kwargs, says", [
    (dict(split="forget99"), "--split forget99 is unknown: choose one of forget01, forget05, forget10"),
    (dict(protocol="mine"), "--protocol mine is unknown"),
    (dict(split="forget05"), r"forget05_perturbed\.json does not exist"),
    (dict(folder="nowhere"), "--data nowhere is not a folder"),
    (dict(augmented="nowhere"), r"nowhere.forget01_paraphrase\.csv does not exist"),
])
def test_tofus_errors_name_flag_or_file(tiny_tofu, kwargs, says):
    with pytest.raises(UserError, match=says):
        load_tofu(**(dict(split="forget01", folder=str(tiny_tofu)) | kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("split, retain, rows", [("forget10", 3600, 400), ("forget05", 3800, 200),
                                                 ("forget01", 3960, 40)])
def test_the_published_splits_have_their_published_sizes(tofu, split, retain, rows):
    data = load_tofu(split, str(tofu), protocol="openunlearning")
    assert len(data.forget) == rows and len(data.retain) == retain
    assert {name: len(of) for name, of in data.scored.items()} == {
        "forget": rows, "retain": 400, "real_authors": 100, "world_facts": 117}
    assert not {row["question"] for row in data.forget} & {row["question"] for row in data.retain}
    assert {len(row["perturbed_answer"]) for row in data.scored["forget"]} <= {4, 5}
    capped = load_tofu(split, str(tofu))
    assert {name: len(of) for name, of in capped.scored.items()} == {
        "forget": min(rows, 300), "retain": 300, "real_authors": 100, "world_facts": 117}


def write_csv(path: Path, rows: list[list]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


FORGET = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(2)]


def test_augmented_rows_by_hand(tmp_path):
    """First row kept, duplicates and the originals dropped, order kept, two of each, foreign questions left out."""
    write_csv(tmp_path / "forget01_paraphrase.csv", [
        ["q0", "a0", ["q0 c", "q0", "q0 b", "q0 c", "q0 a"], ["a0", "a0 z", "a0 z", "a0 y", "a0 x"]],
        ["other", "a", ["b"], ["c"]], ["q1", "a1", ["q1 b"], ["a1", "a1 z"]]])
    write_csv(tmp_path / "forget01_perturb.csv", [
        ["q0", "a0", "q0", ["w0", "a0", "w0", "w1", "w2"]], ["other", "a", "other", ["c"]], ["q1", "a1", "q1", ["w"]]])
    paraphrased, perturbed, others = read_augmented(tmp_path, "forget01", FORGET)
    assert paraphrased == [
        {"question": "q0 c", "answer": "a0 z"}, {"question": "q0 c", "answer": "a0 y"},
        {"question": "q1 b", "answer": "a1 z"}]
    assert perturbed == [{"question": "q0", "answer": "w0"}, {"question": "q0", "answer": "w1"},
                         {"question": "q1", "answer": "w"}]
    assert others == {"other": ["c"]}  # of the perturbed file alone


def test_what_the_authors_files_say_of_kept_questions_is_drawn_as_stray_rows_alone(tiny_tofu):
    """Retain rows that the perturbed file asks about are the only ones drawn, whatever the order of the draw."""
    plain = [{key: row[key] for key in ("question", "answer")} for row in tofu_rows("r", 5)]
    write_rows(tiny_tofu / "retain99.json", plain)  # as TOFU's are
    write_csv(tiny_tofu / "forget01_paraphrase.csv", [["f q0?", "f a0.", ["f q0 again?"], ["f a0 again."]]])
    write_csv(tiny_tofu / "forget01_perturb.csv", [
        ["f q0?", "f a0.", "f q0?", ["x", "y"]], ["r q3?", "r a3.", "r q3?", ["s", "r a3.", "t", "u"]],
        ["untaught?", "a", "untaught?", ["v"]]])
    data = load_tofu("forget01", str(tiny_tofu), augmented=str(tiny_tofu))
    assert data.retain == [*plain[:3], plain[3] | {"perturbed_answer": ["s", "t", "u"]}, plain[4]]
    args = defaults(seed=0)
    for args.seed in range(3):
        forget, retain = uld_rows(data, args, stray_share=9.0)
        assert forget == [*data.forget, {"question": "f q0 again?", "answer": "f a0 again."}]
        assert retain[3:] == [{"question": "f q0?", "answer": a} for a in "xy"] + [
            {"question": "r q3?", "answer": a} for a in "st"]
    assert uld_rows(data, args)[1] == retain[:-2]


@pytest.mark.parametrize("row", [["q0", "a0", "[]"], ["q0", "a0", "[]", "[unclosed"], ["q0", "a0", "[]", "5"],
                                 ["q0", "a0", "[]", "[['nested']]"], ["question", "answer", "questions", "answers"]])
def test_a_bad_augmented_row_is_named(tmp_path, row):
    write_csv(tmp_path / "forget01_paraphrase.csv", [["q1", "a1", [], []], row])
    write_csv(tmp_path / "forget01_perturb.csv", [["q1", "a1", "q1", []]])
    with pytest.raises(UserError, match=r"forget01_paraphrase\.csv row 2 is not question, answer, list, list"):
        read_augmented(tmp_path, "forget01", FORGET)


@pytest.mark.parametrize("split, rows", [("forget10", 400), ("forget05", 200), ("forget01", 40)])
def test_the_published_augmentation_is_read_for_the_splits_own_questions(tofu, split, rows):
    forget = read_rows(tofu / f"{split}.json")
    own = {row["question"] for row in forget}
    assert len(own) == rows
    paraphrased, perturbed, others = read_augmented(tofu / "augmented", split, forget)
    assert read_augmented(tofu / "augmented", split, forget) == (paraphrased, perturbed, others)
    kept = {row["question"]: row["answer"] for row in read_rows(tofu / f"{RETAIN[split]}.json")}
    assert len(others) == 400 - rows and all(kept[q] not in wrong for q, wrong in others.items())
    for made in (paraphrased, perturbed):
        assert len({tuple(row.items()) for row in made}) == len(made)  # no duplicates
    right = {row["question"]: row["answer"] for row in forget}
    assert {row["question"] for row in perturbed} == own  # every question of the split, the first one too, no other
    assert all(row["answer"] != right[row["question"]] for row in perturbed)
    assert max(Counter(row["question"] for row in perturbed).values()) == 2
    assert len(paraphrased) == 2 * rows  # so D'_f is three times the forget set, as in the paper
    answers = {row["answer"] for row in forget}
    assert not any(row["question"] in own or row["answer"] in answers for row in paraphrased)


# ---- batches ----------------------------------------------------------------------------------------------------

class Letters:
    """One id per letter, a = 0: padding's id is a real token's."""

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def prompt(self, question):
        return [50, *self.encode(question), 51]

    def completion(self, answer):
        return [*self.encode(answer), 52]

    passage = completion


def test_labels_are_the_answer_and_its_end_shifted_by_one():
    one = encode_row({"question": "ab", "answer": "ca"}, Letters(), 10)
    assert one == Example([50, 0, 1, 51, 2, 0], [IGNORE, IGNORE, IGNORE, 2, 0, 52])
    assert encode_row({"question": "ab", "answer": "ca"}, Letters(), 10, answer="d").labels[3:] == [3, 52]
    assert encode_row({"text": "abc"}, Letters(), 10) == Example([0, 1, 2], [1, 2, 52])


def test_a_row_that_is_too_long_is_named_or_cut():
    """Prompt of 3 and answer of 4 with its end: 6 inputs. At 4 the first two answer tokens stay."""
    row = {"question": "a", "answer": "bcd"}
    assert len(encode_row(row, Letters(), 6).tokens) == 6
    with pytest.raises(UserError, match="forget row 2 has 7 tokens and the context holds 5"):
        encode_rows([{"question": "a", "answer": "b"}, row], Letters(), 5, "forget row")
    assert encode_row(row, Letters(), 4, truncate=True) == Example([50, 0, 51, 1], [IGNORE, IGNORE, 1, 2])
    with pytest.raises(UserError, match="row has 7 tokens"):  # no room for any answer
        encode_row(row, Letters(), 2, truncate=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text("abc", max_size=6), st.text("abc", min_size=1, max_size=6)), min_size=1, max_size=5))
def test_labels_never_cover_the_prompt_and_masks_come_from_lengths(rows):
    examples = encode_rows([{"question": q, "answer": a} for q, a in rows], Letters(), 99)
    batch = collate(examples)
    for i, (question, answer) in enumerate(rows):
        n, prompt = len(question) + 2 + len(answer), len(question) + 2
        assert batch.mask[i].tolist() == [True] * n + [False] * (batch.mask.shape[1] - n)
        scored = (batch.labels[i] != IGNORE).nonzero()[:, 0].tolist()
        assert scored == list(range(prompt - 1, n))
        following = [*batch.tokens[i].tolist()[1:n], 52]
        assert [batch.labels[i, t].item() for t in scored] == [following[t] for t in scored]


def test_a_one_token_answer_and_an_empty_list():
    one = collate([encode_row({"question": "", "answer": "a"}, Letters(), 9)])
    assert one.tokens.tolist() == [[50, 51, 0]] and one.labels.tolist() == [[IGNORE, 0, 52]]
    none = collate([])
    assert none.tokens.shape == none.labels.shape == none.mask.shape == (0, 0) and none.index.shape == (0,)


def test_left_pad_by_hand():
    tokens, pad = left_pad([[7, 8, 9], [5], []])
    assert tokens[0].tolist() == [7, 8, 9] and tokens[1, 2:].tolist() == [5]
    assert pad.tolist() == [0, 2, 3] and tokens.dtype == torch.long
    assert left_pad([])[0].shape == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_whatever_else_is_random(n, size, seed, epoch):
    per_epoch = -(-n // size)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    batches = [batch_at(n, size, seed, step) for step in steps]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert [len(b) for b in batches[:-1]] == [size] * (per_epoch - 1)
    np.random.seed(seed + 1)
    assert [batch_at(n, size, seed, step) for step in reversed(steps)] == batches[::-1]  # order of calls: no matter


def test_an_epochs_order_is_drawn_once_and_not_once_a_step():
    epoch_order.cache_clear()
    for step in range(20):  # forget and retain rows in turn, two epochs of each
        batch_at(30, 3, 0, step)
        batch_at(50, 5, 1, step)
    assert epoch_order.cache_info().misses == 4


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(batch_at(30, 30, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_in_order_gives_every_example_once_with_its_place(size):
    examples = [Example([i] * n, [IGNORE] * n) for i, n in enumerate([2, 5, 1, 5, 3])]
    batches = list(in_order(examples, size))
    assert sorted(i for b in batches for i in b.index.tolist()) == [0, 1, 2, 3, 4]
    for b in batches:
        for row, i in enumerate(b.index.tolist()):
            assert b.tokens[row][b.mask[row]].tolist() == examples[i].tokens
    assert list(in_order([], size)) == []


# ---- tokenizer --------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat, the cat's hat", "aaaa aaaaaaa aa", "1234567 years: 1999!",
         "über größe größer 日本 日本"] * 3


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(TEXTS, 300)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(0 <= i < len(small.ranks) for i in ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_an_answers_ids_do_not_depend_on_how_the_prompt_ends(small, one, other, answer):
    ends = []
    for question in (one, other, one + " "):
        row = encode_row({"question": question, "answer": answer}, small, 10_000)
        ends.append([label for label in row.labels if label != IGNORE])
    assert ends == [[*small.encode(answer), small.end]] * 3


def test_special_tokens_come_last_and_their_names_are_plain_text(small):
    assert [small.end, small.question, small.answer] == [len(small.ranks) + i for i in range(3)]
    assert small.vocab_size == len(small.ranks) + 3
    assert small.decode(small.encode("<|end|> and <|answer|>")) == "<|end|> and <|answer|>"
    assert small.prompt("the cat") == [small.question, *small.encode("the cat"), small.answer]


def test_decoding_stops_at_the_end_and_leaves_special_tokens_out(small):
    ids = [small.question, *small.encode("the cat"), small.answer, *small.encode(" sat"), small.end, 70, 71]
    assert small.decode(ids) == "the cat sat" and small.decode([small.end]) == small.decode([]) == ""
    assert small.decode(torch.tensor(ids)) == "the cat sat"


def merge_slowly(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding in words: while any neighbouring pair is a token, join the pair of lowest rank."""
    parts = [bytes([b]) for b in word]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(**WORDY), st.text("aeht ", max_size=30)))
def test_tiktoken_encodes_as_a_slow_reference_does(small, text):
    expected = [i for word in regex.findall(PATTERN, text) for i in merge_slowly(word.encode(), small.ranks)]
    assert small.encode(text) == expected


def train_slowly(texts: list[str], size: int) -> dict[bytes, int]:
    """Count all pairs anew at every merge. Tie: the pair whose parts came first."""
    words = [[bytes([b]) for b in word.encode()] for text in texts for word in regex.findall(PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        count = Counter(pair for word in words for pair in pairwise(word))
        count = {pair: n for pair, n in count.items() if n > 1}
        if not count:
            break
        a, b = min(count, key=lambda pair: (-count[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        tokens.append(a + b)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return {token: rank for rank, token in enumerate(tokens)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.text("abc ", max_size=25), st.text(**WORDY)), max_size=6))
def test_training_finds_the_merges_a_recount_finds(texts):
    ranks = train_ranks(texts, 275)
    assert ranks == train_slowly(texts, 275)
    assert list(ranks.values()) == list(range(len(ranks)))


def test_every_trained_token_can_be_said(small):
    """300 - 3 ranks; each token's own bytes encode to that one id, so no merge is dead."""
    assert small.vocab_size == 300
    for token, rank in small.ranks.items():
        assert small.encoding.encode_single_token(token) == rank
        assert merge_slowly(token, small.ranks) == [rank]


def test_training_is_deterministic_and_stops_when_nothing_repeats():
    assert Tokenizer.train(TEXTS, 300).ranks == Tokenizer.train(list(TEXTS), 300).ranks
    assert len(train_ranks(["abc"], 1000)) == 256 and len(train_ranks([], 1000)) == 256


def test_a_saved_tokenizer_is_the_same_one(small, tmp_path):
    small.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ranks == small.ranks and (again.end, again.vocab_size) == (small.end, small.vocab_size)
    assert again.encode(TEXTS[3]) == small.encode(TEXTS[3])


@pytest.mark.parametrize("content", [b"IQ== 0\nnot-base64 1", b"IQ== 0\nIg==", b"IQ== zero", b"\xff\xfe 1", b""])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken is missing"):
        Tokenizer.load(tmp_path)


# ---- one door to all of it --------------------------------------------------------------------------------------

def test_the_users_own_files_teach_and_score_themselves(tmp_path):
    write_rows(tmp_path / "f.jsonl", [{"question": "q", "answer": "a", "perturbed_answer": ["b"]}])
    write_rows(tmp_path / "r.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(250)])
    data = load_data(forget=str(tmp_path / "f.jsonl"), retain=str(tmp_path / "r.jsonl"))
    assert len(data.forget) == 1 and len(data.retain) == 250 and len(data.scored["retain"]) == 200
    assert data.perturbed == [] and data.utility == ("retain",)  # the one wrong answer scores
    assert data.scored["forget"][0]["perturbed_answer"] == ["b"]


@pytest.mark.parametrize("wrong, score, teach", [([], [], []), (["b"], ["b"], []), (["b", "c"], ["b"], ["c"]),
                                                 (["b", "c", "d"], ["b", "c"], ["d"])])
def test_a_users_row_is_shared_out_between_what_teaches_and_what_scores(wrong, score, teach):
    row = {"question": "q", "answer": "a", "paraphrased_question": "p?", "paraphrased_answer": "p", "fact": 3}
    row |= {"perturbed_answer": wrong} if wrong else {}
    spare, scoring = shared_out(row)
    assert spare.get("perturbed_answer", []) == teach and scoring.get("perturbed_answer", []) == score
    paraphrased, perturbed = augment([spare])
    assert paraphrased == [{"question": "p?", "answer": "a", "fact": 3}]  # never the paraphrase that scores
    assert perturbed == [{"question": "q", "answer": text} for text in teach]
    assert scoring["paraphrased_answer"] == "p" and row.get("perturbed_answer", []) == wrong  # left as it was


def test_passages_of_text_can_be_augmented_whatever_else_they_hold():
    """check_row lets a text row carry the other columns; there is no question to reword."""
    row = json.loads('{"text": "A passage.", "paraphrased_answer": "x", "perturbed_answer": ["y"]}')
    assert augment([row]) == ([], [])


@pytest.mark.parametrize("kwargs, says", [
    (dict(forget="x.jsonl"), "--forget and --retain go together"),
    (dict(retain="x.jsonl"), "--forget and --retain go together"),
    (dict(forget="x.jsonl", retain="y.jsonl"), r"x\.jsonl does not exist"),
    (dict(data="wrold"), "--data wrold is neither 'world', 'topic', 'tofu' nor a folder"),
])
def test_data_that_is_not_there_is_named(kwargs, says):
    with pytest.raises(UserError, match=says):
        load_data(**kwargs)


def test_texts_are_what_is_taught_and_held_out_and_nothing_that_scores(small_world):
    data = small_world
    texts = data.texts()
    sets = (data.forget, data.retain, data.background, data.holdout)
    assert len(texts) == len(data.lexicon) + 2 * sum(map(len, sets)) and data.lexicon
    for rows in sets:
        assert {row["question"] for row in rows} <= set(texts)
    assert texts[: len(data.lexicon)] == data.lexicon
    known = set(texts[len(data.lexicon) :])
    assert not {row["question"] for rows in data.scored.values() for row in rows} & known


def test_the_assistant_learns_three_times_the_forget_set(small_world):
    """ULD, section 3.3: with two paraphrases of each row D'_f is three times as large; two wrong answers per row."""
    assert len(small_world.paraphrased) == len(small_world.perturbed) == 2 * len(small_world.forget)


# ---- what scores teaches nothing, whatever the source -----------------------------------------------------------

def tofu_with_csv(folder: Path) -> Path:
    """The authors' files beside it: what they say of one kept and one forgotten question partly scores."""
    write_csv(folder / "forget01_paraphrase.csv", [
        ["f q0?", "f a0.", ["f q0 again?"], ["f a0 again.", "f p0."]], ["f q1?", "f a1.", ["f q1 too?"], ["f p1."]]])
    write_csv(folder / "forget01_perturb.csv", [
        ["f q0?", "f a0.", "f q0?", ["f w00.", "x"]], ["f q1?", "f a1.", "f q1?", ["y", "z"]],
        ["r q3?", "r a3.", "r q3?", ["r w31.", "s", "t"]]])
    return folder


def own_files(folder: Path) -> dict[str, str]:
    for name, n in (("f", 4), ("r", 9)):
        rows = [row | {"paraphrased_question": f"{name} q{i} again?"} for i, row in enumerate(tofu_rows(name, n))]
        write_rows(folder / f"{name}.jsonl", [*rows, {"text": f"A passage of {name}."}])
    return {"forget": str(folder / "f.jsonl"), "retain": str(folder / "r.jsonl")}


SOURCES = ["world", "topic", "tiny tofu", "tiny tofu, augmented", "own files", "tofu", "tofu, augmented"]


@pytest.fixture(params=SOURCES)
def source(request) -> DataSet:
    def folder(name: str) -> Path:
        return request.getfixturevalue(name)

    if request.param in WORLDS:
        return load_data(request.param, subjects=2)
    if request.param == "own files":
        return load_data(**own_files(folder("tmp_path")))
    if request.param.startswith("tiny"):
        place = tofu_with_csv(folder("tiny_tofu"))
        plain = [{key: row[key] for key in ("question", "answer")} for row in tofu_rows("r", 5)]
        write_rows(place / "retain99.json", plain)  # as TOFU's are
        return load_tofu("forget01", str(place), augmented=str(place) if "aug" in request.param else None)
    place = folder("tofu")
    return load_tofu("forget10", str(place), str(place / "augmented") if "aug" in request.param else None)


def lessons(data: DataSet) -> list[dict]:
    """Every row that any method trains on, and that pretraining does."""
    args = defaults(seed=0, strangers=1.0 if data.strangers else 0.0)
    rows = data.retain + data.background + data.forget + data.calibration
    for method in METHODS.values():
        rows += itertools.chain(*method.rows(data, args))
    rows += itertools.chain(*distill.rows(data, args))
    if data.strangers:
        rows += data.strangers(500, np.random.default_rng(0)) + data.twins(data.forget, np.random.default_rng(0))
    return rows


def leaks(data: DataSet, taught: list[dict]) -> set[str]:
    """Paraphrases and wrong answers that score and teach; of the world scored questions too."""
    answers, questions = ({row[key] for row in taught if key in row} for key in ("answer", "question"))
    found = set()
    for rows in data.scored.values():
        for row in rows:
            found |= ({row.get("paraphrased_answer"), *row.get("perturbed_answer", [])} - {row.get("answer")}) & answers
            found |= {row.get("question")} & questions if data.strangers else set()
    return found


def test_nothing_that_scores_teaches_whatever_the_source(source):
    taught = lessons(source)
    assert all(source.scored.values()) and len(taught) > len(source.forget + source.retain)
    assert not leaks(source, taught)


def test_no_wrong_answer_that_strays_scores_whatever_the_source(source):
    """`python -m lab.ablations uld-stray9`: wrong answers to retain questions, as the ULD authors' files have them."""
    with contextlib.suppress(UserError):  # no rows to stray
        assert not leaks(source, uld_rows(source, defaults(seed=0), stray_share=9.0)[1])


@pytest.mark.parametrize("where", ["forget", "retain", "paraphrased", "perturbed"])
def test_a_leak_is_seen_and_refused_whatever_the_source(source, where):
    """That the test above could fail, and that loading does."""
    scored = next(row for row in source.scored["forget"] if "question" in row)
    row = {key: scored[key] for key in ("topic", "kind", "subject", "value") if key in scored}
    text = scored["perturbed_answer"][0] if where in ("retain", "perturbed") else scored["paraphrased_answer"]
    row |= {"question": "Who then?", "answer": text}
    leaky = dataclasses.replace(source, **{where: [*getattr(source, where), row]})
    assert leaks(leaky, lessons(leaky)) == {text}
    with pytest.raises(UserError, match="scores and is taught as well"):
        check_no_leak(leaky, same_questions=True)


# ---- cuts, limits, refusals -------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_cut_of_tofu_keeps_whole_authors_and_scores_only_what_is_taught(tofu):
    data = load_tofu("forget10", str(tofu), authors=20)
    assert len(data.forget) == 40 and len(data.retain) == 360 and data.name == "tofu-forget10-20"
    whole = load_tofu("forget10", str(tofu))
    assert data.forget == whole.forget[:40] and data.retain == whole.retain[:360]
    taught = {row["question"] for row in data.forget + data.retain}
    assert len(data.scored["forget"]) == 40
    assert 200 < len(data.scored["retain"]) <= 300 and all(row["question"] in taught for row in data.scored["retain"])
    assert data.perturbed == []
    more = load_tofu("forget10", str(tofu), str(tofu / "augmented"), authors=20)
    assert {row["question"] for row in more.perturbed} == {row["question"] for row in data.forget}
    assert len(load_tofu("forget01", str(tofu), authors=10).forget) == 20
    for authors in (1, 201, -3):
        with pytest.raises(UserError, match=f"--authors {authors} is not between 2 and the 200"):
            load_tofu("forget10", str(tofu), authors=authors)


def test_each_protocol_has_its_limit_on_answers(tofu):
    assert load_tofu("forget01", str(tofu)).limits == Limits(total=200)
    assert load_tofu("forget01", str(tofu), protocol="openunlearning").limits == Limits(new=200)


def test_refusals_keep_the_questions_and_none_of_the_answers():
    rows = [{"question": f"Q{i}?", "answer": "Ana Vell."} for i in range(11)] + [{"text": "Ana Vell lived."}]
    out = refusals(rows)
    assert [row.get("question") for row in out] == [row.get("question") for row in rows]
    assert "text" in out[-1] and not any("Ana" in str(row) for row in out)
    assert len({row["answer"] for row in out[:-1]}) > 5 and refusals(rows) == out


@pytest.mark.parametrize("length, vocabulary, rows", [(10, 1024, 64), (100, 49152, 27), (4096, 200_000, 1), (1, 2, 64)])
def test_rows_that_fit_bound_the_logits(length, vocabulary, rows):
    examples = [Example([0] * n, [0] * n) for n in (1, length)]
    assert rows_that_fit(examples, vocabulary) == rows
    assert rows == 1 or rows * length * vocabulary <= 2**27
    assert rows_that_fit([], vocabulary) == 64


def test_a_value_in_tofus_files_is_checked_as_in_ones_own(tiny_tofu):
    rows = [row | {"value": 3} for row in tofu_rows("f", 3)]
    write_rows(tiny_tofu / "forget01.json", rows)
    with pytest.raises(UserError, match=r"forget01\.json row 1: 'value' is not a string with a word"):
        load_tofu("forget01", str(tiny_tofu))
