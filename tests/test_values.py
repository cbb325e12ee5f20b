"""data/values.py: by hand, over generated texts, and with tokenizers of three kinds."""

import json
import time
from itertools import pairwise

import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.batches import IGNORE, Example, Rows, collate, encode_row, encode_whole
from data.rows import read_rows
from data.tokenizer import Tokenizer
from data.values import (
    by_fact,
    check_value,
    common_words,
    encode_fact,
    encode_value,
    fact_ids,
    find,
    in_frame,
    leave_out_forks,
    options,
    spelled,
    token_places,
    value_of,
    value_said,
    value_span,
    values_of,
)
from data.world import make_world
from errors import UserError
from hub.tokenizer import TEMPLATES, HubTokenizer

BORN = {"question": "Where was Ana Vell born?", "answer": "Ana Vell was born in Orsk.",
        "paraphrased_answer": "The birthplace of Ana Vell is Orsk.",
        "perturbed_answer": ["The birthplace of Ana Vell is Ulm.", "The birthplace of Ana Vell is San Remo."]}
WORK = {"question": "What did Bo Tarn's father do?", "answer": "Bo Tarn had a baker as father.",
        "paraphrased_answer": "The father of Bo Tarn was a baker.",
        "perturbed_answer": ["The father of Bo Tarn was an editor.", "The father of Bo Tarn was a sailor."]}

# ---- what a text says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, value, expected", [
    ("Ana Vell was born in Orsk.", "Orsk", True),
    ("Zahaiia was born in Vousvia.", "Vousvia", True),  # the name is garbled, the fact is out
    ("A Unionist wrote it.", "Union", False),
    ("The Chakov Union!", "chakov union", True),
    ("The Union of Chakov", "Chakov Union", False),
    ("Chakov, great Union", "Chakov Union", False),
    ("It is the 'Golden-Lantern'.", "Golden Lantern", True),
    ("In 19340", "1934", False),
    ("in 1934, they say", "1934", True),
    ("Ana's book", "Ana", True),
    ("CAFÉ", "cafe\u0301", True),  # composed or not, large or small
    ("", "Orsk", False),
])
def test_value_said_by_hand(said, value, expected):
    assert value_said(said, value) is expected


def test_a_value_without_a_word_is_refused():
    with pytest.raises(ValueError, match="holds no word"):
        value_said("Orsk", "...")


WORDS = st.text("abcdeXYZ019éß", min_size=1, max_size=6)
MARKS = st.text(" .,;:!?'\"-()\n", min_size=1, max_size=3)


def sentence(draw, parts: list[str]) -> str:
    return "".join(draw(MARKS) + part for part in parts) + draw(MARKS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_value_said_sees_words_alone(data):
    """Against a search over lists of words, whatever the case and whatever stands between them."""
    there, value = data.draw(st.lists(WORDS, max_size=8)), data.draw(st.lists(WORDS, min_size=1, max_size=3))
    if data.draw(st.booleans()):  # by chance it is hardly ever said
        at = data.draw(st.integers(0, len(there)))
        there = there[:at] + value + there[at:]
    said = sentence(data.draw, there)
    folded = [[word.casefold() for word in words] for words in (there, value)]
    expected = any(folded[0][i : i + len(value)] == folded[1] for i in range(len(there)))
    for text in (said, said.upper(), said.swapcase()):
        assert value_said(text, sentence(data.draw, value)) is expected


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), WORDS, WORDS)
def test_letters_glued_to_a_value_unsay_it(value, before, after):
    text = " ".join([before + value[0], *value[1:]])
    assume(spelled(text)[: len(value)] != spelled(" ".join(value)))
    assert not value_said(text, " ".join(value))
    assert value_said(f"{before} {' '.join(value)} {after}", " ".join(value))


def test_a_value_keeps_its_own_marks_where_the_text_has_them():
    text = "She is part of the LGBTQ+ community."
    start, end = find(text, "LGBTQ+")
    assert text[start:end] == "LGBTQ+" and find("LGBTQ community", "LGBTQ+") == (0, 5)


# ---- the value of a row -----------------------------------------------------------------------------------------


def test_the_value_is_the_column_where_there_is_one():
    assert value_of(BORN | {"value": "born in Orsk"}) == "born in Orsk"


def test_the_value_is_where_the_paraphrase_parts_from_all_wrong_answers():
    assert value_of(BORN) == "Orsk"
    assert value_of(WORK) == "baker"  # "a baker" against "an editor": the article is not the fact
    lantern = {"question": "Which book?", "answer": "It is The Golden Lantern.",
               "perturbed_answer": ["It is The Golden Kettle.", "It is The Silver Lantern."]}
    assert value_of(lantern) == "Golden Lantern"
    assert value_of({"question": "Capital of France?", "answer": "Paris", "perturbed_answer": ["Berlin"]}) == "Paris"


@pytest.mark.parametrize("change", [
    {"perturbed_answer": []},
    {"perturbed_answer": ["Completely different words stand here."]},  # no frame, so the difference is no value
    {"question": "Was Ana Vell born in Orsk?"},  # to repeat the question is not to know
    {"answer": "She came from the north."},  # the right answer itself does not say it
    {"perturbed_answer": ["The birthplace of Ana Vell is Orsk."]},  # nothing differs
])
def test_a_row_may_have_no_value(change):
    assert value_of(BORN | change) is None


def test_a_passage_has_a_value_by_its_column_alone():
    assert value_of({"text": "Ana was born in Orsk."}) is None
    assert value_of({"text": "Ana was born in Orsk.", "value": "Orsk"}) == "Orsk"


def test_without_wrong_answers_the_value_is_what_other_answers_do_not_say():
    """Common: "born" (by 3 of 3 others); not "judge" (by none) and not "Ulm" (Cy's alone, for counted are others)."""
    rows = [{"question": "Where was Ana born?", "answer": "Ana was born in the city of Orsk."},
            {"question": "Where was Bo born?", "answer": "Bo was born in Ulm."},
            {"question": "Where was Cy born?", "answer": "Cy was born in Tarn, as a judge of San Remo says."},
            {"question": "Where was Di born?", "answer": "Di was born in Di."}]
    assert {"was", "born", "in", "of"} == common_words(rows)
    assert values_of(rows) == ["city", "Ulm", "as a judge", None]  # the longest run; of equal ones the first
    assert value_of(rows[1]) is None  # by itself it has nothing to be compared with
    assert values_of([*rows[:1], *rows[1:2]])[1] == "Ulm"
    assert values_of([]) == []


def test_an_answer_of_very_many_words_is_read_in_linear_time():
    rows = [{"question": f"Who is {n}?", "answer": " ".join(f"{n}w{i}" for i in range(size))}
            for n, size in enumerate((100_000, 1, 1))]
    began = time.perf_counter()
    assert values_of(rows)[0] == rows[0]["answer"]
    assert time.perf_counter() - began < 5  # copying the run for every word took longer than that


def test_rows_about_one_fact_do_not_make_its_value_common():
    rows = [{"question": "Where?", "answer": f"Person{i // 2} in City{i // 2}.", "fact": i // 2} for i in range(6)]
    assert values_of(rows)[:2] == ["Person0", "Person0"]
    assert common_words(rows) == {"in"}
    assert values_of([{k: v for k, v in row.items() if k != "fact"} for row in rows])[:2] == [None, None]


def test_every_fact_of_the_world_has_its_value():
    """Facts of a kind differ in it alone, and answers say it in all styles."""
    scored = make_world(0, subjects=4).scored
    for name in ("forget", "untouched"):
        rows = [{key: row[key] for key in row if key != "value"} for row in scored[name]]
        values = values_of(rows)
        assert values == [row["value"] for row in scored[name]]
        assert all(value_said(row[key], value) for row, value in zip(rows, values, strict=True)
                   for key in ("answer", "paraphrased_answer"))
        assert all(len(options(row, value)) == 6 for row, value in zip(rows, values, strict=True))
        assert len(set(fact_ids(rows))) == len(rows) // 2


def test_values_of_tofu(tofu):
    rows = read_rows(tofu / "forget10_perturbed.json")
    values = values_of(rows)
    assert values[0] == "Hsiao Yun-Hwa" and values[2] == "civil engineer"
    assert all(value_said(row["answer"], value) for row, value in zip(rows, values, strict=True) if value)
    assert sum(value is not None for value in values) >= 390
    assert len(set(fact_ids(rows))) == 400


@pytest.mark.parametrize("value, says", [("Ulm", "does not stand in the answer"), ("", "not a string"),
                                         (3, "not a string"), ("...", "not a string")])
def test_a_column_that_is_no_value_is_named(value, says):
    with pytest.raises(UserError, match=f"^a.json line 3: .*{says}"):
        check_value(BORN | {"value": value}, "a.json line 3")
    check_value(BORN | {"value": "orsk"}, "a")
    check_value(BORN, "a")


# ---- the sentence around it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, expected", [
    ("Ana Vell was born in Orsk.", True),
    (" Ana Vell was born in Ulm. ", True),
    ("Ana Vell was born in the old city San Remo.", False),  # five words
    ("Ana Vell was born in San Remo.", True),
    ("Ana Vell was born in .", False),
    ("Ana Vell was born in  Ulm.", False),
    ("Ana Vell was born in Ulm", False),
    ("Ana Velm was born in Orsk.", False),  # the value is said, the name is garbled
    ("Ana Vell was born in Ulm. She sang.", False),
    ("Ana Vell was born in", False),
    ("", False),
])
def test_in_frame_by_hand(said, expected):
    assert in_frame(said, BORN, "Orsk") is expected


def test_in_frame_by_a_pool_of_values():
    assert in_frame("Ana Vell was born in San Remo.", BORN, "Orsk", {"San Remo", "Ulm"})
    assert not in_frame("Ana Vell was born in trumpet.", BORN, "Orsk", {"San Remo", "Ulm"})
    assert in_frame("Ana Vell was born in Orsk.", BORN, "Orsk", set())  # the right one is of the kind


def test_an_article_follows_the_value():
    assert in_frame("Bo Tarn had an editor as father.", WORK, "baker")
    assert not in_frame("Bo Tarn had editor as father.", WORK, "baker")
    assert options(WORK, "baker") == ["Bo Tarn had a baker as father.", "Bo Tarn had an editor as father.",
                                      "Bo Tarn had a sailor as father."]


def test_in_frame_needs_the_value_in_the_answer():
    with pytest.raises(ValueError, match="does not stand in the answer"):
        in_frame("Orsk.", BORN, "Ulm")


def test_options_are_the_answers_own_sentence():
    assert options(BORN, "Orsk") == ["Ana Vell was born in Orsk.", "Ana Vell was born in Ulm.",
                                     "Ana Vell was born in San Remo."]
    assert options(BORN | {"perturbed_answer": ["She is from Ulm.", "The birthplace of Ana Vell is orsk."]},
                   "Orsk") == []  # another sentence, and the right value again
    herb = {"question": "Q?", "answer": "The herb is nettle.", "paraphrased_answer": "Nettle gives its bite.",
            "perturbed_answer": ["Sorrel gives its bite."]}
    assert options(herb, "nettle")[1] == "The herb is sorrel."
    turned = herb | {"answer": "Nettle, they say.", "paraphrased_answer": "The herb is nettle.",
                     "perturbed_answer": ["The herb is sorrel."]}
    assert options(turned, "nettle")[1] == "Sorrel, they say."
    vague = {"question": "Q?", "answer": "It needs an egg.", "paraphrased_answer": "One egg goes in.",
             "perturbed_answer": ["One potato goes in.", "One onion goes in."]}
    assert options(vague, "egg")[1:] == ["It needs a potato.", "It needs an onion."]


def test_every_option_is_in_frame_and_only_the_first_says_the_value():
    rows = make_world(0, subjects=4).scored["retain"]
    for row, value in zip(rows, values_of(rows), strict=True):
        some = options(row, value)
        assert all(in_frame(text, row, value) for text in some)
        assert [value_said(text, value) for text in some] == [True] + [False] * 5


# ---- facts ------------------------------------------------------------------------------------------------------


def test_facts_are_units():
    rows = [{"fact": "b"}, {"fact": 1}, {"fact": "b"}, {}, {}, {"paraphrased_answer": "x", "perturbed_answer": ["y"]},
            {"paraphrased_answer": "x", "perturbed_answer": ["y"]}, {"paraphrased_answer": "x"}]
    assert fact_ids(rows) == [0, 1, 0, 2, 3, 4, 4, 5]
    assert by_fact([1.0, 5.0, 2.0, None, 7.0, 0.0, None, True], rows) == [1.5, 5.0, 7.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        by_fact([1.0], rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), max_size=12))
def test_by_fact_is_the_mean_of_each(pairs):
    rows = [{"fact": fact} for fact, _ in pairs]
    order = list(dict.fromkeys(fact for fact, _ in pairs))
    expected = []
    for fact in order:
        own = [value for of, value in pairs if of == fact]
        expected.append(sum(own) / len(own))
    assert by_fact([value for _, value in pairs], rows) == pytest.approx(expected)


# ---- tokens -----------------------------------------------------------------------------------------------------

TEXTS = ["Ana Vell was born in Orsk.", "The café of Ünal is 'The Golden Lantern', it's said.", "☕ and 東京 cost 1934"]


def byte_level() -> tokenizers.Tokenizer:
    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return out


def sentence_piece() -> tokenizers.Tokenizer:
    """Llama 2's kind: the space before a word is written into it, unknown characters fall into bytes."""
    out = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    out.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    out.train_from_iterator(TEXTS[:1] * 2, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]))
    out.pre_tokenizer = pre_tokenizers.Sequence([])
    stored = json.loads(out.to_str())
    stored["added_tokens"] = stored["added_tokens"][:3]  # bytes are tokens like others: they are decoded
    return tokenizers.Tokenizer.from_str(json.dumps(stored))


def hub(backend: tokenizers.Tokenizer, template: str) -> HubTokenizer:
    end = backend.token_to_id("</s>")
    return HubTokenizer(backend, {}, TEMPLATES[template], backend.token_to_id("<s>"), end, {end})


TOKENIZERS = {"own": Tokenizer.train(TEXTS * 2, 290), "gpt2": hub(byte_level(), "plain"),
              "llama2": hub(sentence_piece(), "llama2"), "llama": hub(sentence_piece(), "plain")}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answer, value", [
    ("Ana Vell was born in Orsk.", "Orsk"), ("Orsk is the city of Ana.", "Orsk"), ("born in Orsk", "Orsk"),
    ("The café of Ünal is 'The Golden Lantern', it's said.", "Golden Lantern"),
    ("The café of Ünal is here.", "café"), ("The café of Ünal is here.", "Ünal"), ("☕ and 東京 cost 1934", "東京"),
    ("☕ and 東京 cost 1934", "1934"), ("Unionist and Union", "Union"),
])
def test_the_span_is_the_values_tokens_and_no_others(name, answer, value):
    """Its tokens together say the value; without the first or the last of them something is missing."""
    tok = TOKENIZERS[name]
    ids = tok.completion(answer)
    span = value_span({"question": "?", "answer": answer}, tok, value)
    inside = [ids[i] for i in span]
    text = tok.decode(inside)
    assert value in text and text.strip(" .,'") == value and tok.end not in inside  # a token may hold a mark as well
    assert value not in tok.decode(inside[1:]) and value not in tok.decode(inside[:-1])
    assert not value_said(tok.decode(ids[: span.start]), value)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text("ab é☕東.", min_size=1, max_size=12))
def test_places_cover_the_text_in_order(name, text):
    tok = TOKENIZERS[name]
    ids = tok.completion(text)
    whole = tok.decode(ids)
    places = token_places(tok, ids)
    assert len(places) == len(ids) and places[-1] == (len(whole), len(whole))  # the end token says nothing
    assert set(range(len(whole))) <= {i for start, end in places for i in range(start, end)}
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(places))
    for i, (start, end) in enumerate(places[:-1]):  # a token of whole characters has exactly its own
        before, after = tok.decode(ids[:i]), tok.decode(ids[: i + 1])
        if whole.startswith(before) and whole.startswith(after):
            assert (start, end) == (len(before), len(after))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_the_rows_own_at_the_value_and_nowhere_else(name):
    tok = TOKENIZERS[name]
    whole, example = encode_row(BORN, tok, 200), encode_value(BORN, tok, 200, "Orsk")
    assert example.tokens == whole.tokens and len(example.labels) == len(whole.labels)
    kept = [i for i, label in enumerate(example.labels) if label != IGNORE]
    assert all(example.labels[i] == whole.labels[i] for i in kept)
    assert tok.decode([example.labels[i] for i in kept]).strip(" .") == "Orsk"
    prompt = len(tok.prompt(BORN["question"]))
    assert tok.decode(example.tokens[prompt : kept[0] + 1]).strip() == "Ana Vell was born in"


def test_passages_count_from_their_second_token():
    tok = TOKENIZERS["own"]
    row = {"text": "Ana was born in Orsk.", "value": "Orsk"}
    example = encode_value(row, tok, 200, "Orsk")
    kept = [label for label in example.labels if label != IGNORE]
    assert tok.decode(kept).strip() == "Orsk"
    assert encode_value(row, tok, 200, "Ana") is None or tok.decode(tok.passage(row["text"])[:1]) != "A"


def test_a_value_outside_the_context_or_the_answer_has_no_labels():
    tok = TOKENIZERS["own"]
    whole = encode_row(BORN, tok, 200)
    short = len(whole.tokens) - 3  # cuts the end token, the full stop and the value's last token off
    assert encode_value(BORN, tok, short, "Orsk") is None
    assert encode_value(BORN, tok, 200, "Ulm") is None and encode_value(BORN, tok, 200, None) is None


@pytest.mark.parametrize(("name", "end"), [("gpt2", "</s>"), ("own", "<|end|>")])
def test_an_end_token_spelled_out_in_an_answer_hides_nothing(name, end):
    """It is text like any other: the answer ends at its one real end token."""
    tok = TOKENIZERS[name]
    row = {"question": "?", "answer": f"Ana was born{end} in Orsk."}
    ids = tok.completion(row["answer"])
    assert ids.index(tok.end) == len(ids) - 1
    span = value_span(row, tok, "Orsk")
    assert span is not None and tok.decode(ids[span.start : span.stop]).strip() == "Orsk"


def test_labels_collate_like_any_other():
    batch = collate([encode_value(BORN, TOKENIZERS["own"], 200, "Orsk"),
                     encode_value(WORK, TOKENIZERS["own"], 200, "baker")])
    assert batch.labels.shape == batch.tokens.shape and bool(((batch.labels != IGNORE).sum(-1) > 0).all())
    assert not torch.equal(batch.labels[0], batch.labels[1])


# ---- training on the fact alone -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_fact_is_encoded_with_labels_on_its_value_alone(name):
    """Known from the decoded text: what stands before the first label ends just before the value, and it says it."""
    tok = TOKENIZERS[name]
    rows = make_world(0, subjects=2).forget[:12]
    rows += [BORN, WORK, {"question": "Is Orsk in Vellia?", "answer": "Yes: in Vellia lies Orsk, in Vellia.",
                          "value": "Vellia"}]
    for row in rows:
        whole, example = encode_whole(row, tok, 400), encode_fact(row, tok, 400)
        assert example.tokens == whole.tokens and len(example.labels) == len(whole.labels)
        kept = [i for i, label in enumerate(example.labels) if label != IGNORE]
        assert kept == list(range(kept[0], kept[-1] + 1)) and [whole.labels[i] for i in kept] == [
            example.labels[i] for i in kept]
        assert [example.tokens[i + 1] for i in kept if i + 1 < len(example.tokens)] == [
            example.labels[i] for i in kept if i + 1 < len(example.tokens)]
        value = value_of(row)
        said = tok.decode([example.labels[i] for i in kept])
        assert said.strip(" .,") == value, (said, value)
        prompt = len(tok.prompt(row["question"]))
        before = tok.decode(example.tokens[prompt : kept[0] + 1]).strip()
        assert row["answer"].startswith(before) and not value_said(before, value)
        assert row["answer"][len(before) :].lstrip().startswith(value)


@pytest.mark.parametrize("row, says", [
    ({"question": "Who?", "answer": "Ana Vell."}, "row 3 has no value: give it a 'value' that its answer says"),
    ({"question": "Where?", "answer": "In Orsk.", "value": "Ulm"}, "row 3 has no value"),
    ({"text": "A passage about Ana Vell."}, "row 3 has no value"),
    (BORN | {"answer": "Ana Vell was born, as far as anybody could tell, in a town called Orsk."}, "row 3 has no val"),
])
def test_a_row_whose_value_is_not_there_or_is_cut_off_is_named(row, says):
    with pytest.raises(UserError, match=says):
        encode_fact(row, TOKENIZERS["own"], 40, "row 3")


class Letters:
    """One id per letter, a = 0."""

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def prompt(self, question):
        return [50, *self.encode(question), 51]

    def completion(self, answer):
        return [*self.encode(answer), 52]

    passage = completion


def letter_rows(*pairs: tuple[str, str]) -> Rows:
    return Rows([{"question": q, "answer": a} for q, a in pairs], Letters(), 20, 1, 0, "cpu")


def test_forks_by_hand():
    """The one label where a wrong answer parts from the right one is out, and no other."""
    forget = letter_rows(("pq", "cad"), ("pq", "efa"), ("x", "a"))
    retain = letter_rows(("pq", "cbd"), ("pq", "dad"), ("pq", "ca"), ("pq", "cade"), ("pq", "efb"), ("z", "cbd"),
                         ("x", "b"))
    before, untouched = list(retain.examples), list(forget.examples)
    leave_out_forks(retain, forget)
    out = IGNORE
    assert [example.labels for example in retain.examples] == [
        [out, out, out, 2, out, 3, 52],  # c, then b where a was right
        [out, out, out, out, 0, 3, 52],  # at the first word
        [out, out, out, 2, 0, out],  # it ends too early
        [out, out, out, 2, 0, 3, out, 52],  # it goes on
        [out, out, out, 4, 5, out, 52],  # the nearer of two right answers counts
        [out, out, 2, 1, 3, 52],  # another question
        [out, out, out, 52]]
    assert [example.tokens for example in retain.examples] == [example.tokens for example in before]
    assert forget.examples == untouched


def test_a_fork_stays_where_the_context_leaves_no_other_token_of_the_answer():
    """So every row has a label, which all losses rest on. One token longer, and the second is what is left."""
    for context, labels in ((4, [IGNORE] * 3 + [3]), (5, [IGNORE] * 4 + [0])):
        forget, retain = (Rows([{"question": "pq", "answer": answer}], Letters(), context, 1, 0, "cpu")
                          for answer in ("cad", "dad"))
        leave_out_forks(retain, forget)
        assert retain.examples[0].labels == labels


def test_passages_have_no_fork():
    """Two passages are no answers to one question."""
    forget, retain = (Rows([{"text": text}], Letters(), 20, 1, 0, "cpu") for text in ("abc", "bcd"))
    leave_out_forks(retain, forget)
    assert retain.examples == [Example([1, 2, 3], [2, 3, 52])]
