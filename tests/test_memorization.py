"""metrics/memorization.py: by hand, by trying every prefix, and by decoding with a model that is a table."""

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import IGNORE
from metrics.memorization import (
    answer_lengths,
    bleu,
    exact_memorization,
    extraction_strength,
    right_tokens,
    rouge_l,
    split_prefix,
    without_end,
)

V = 5


def case(pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One row from letters: "." outside the answer (argmax 0), "r" a right and "w" a wrong answer token."""
    labels = torch.tensor([[IGNORE if c == "." else 1 + i % (V - 1) for i, c in enumerate(pattern)]])
    argmax = torch.tensor([[0 if c in ".w" else 1 + i % (V - 1) for i, c in enumerate(pattern)]])
    return torch.nn.functional.one_hot(argmax, V).float(), labels


@pytest.mark.parametrize("pattern, em, es", [
    ("..rrrr", 1, 1), ("..wwww", 0, 0), ("..rrrw", 3 / 4, 0), ("..wrrr", 3 / 4, 3 / 4), ("..rwrr", 3 / 4, 1 / 2),
    (".rwr..", 2 / 3, 1 / 3),  # padding at the right breaks nothing
    (".r", 1, 1), (".w", 0, 0),  # an answer of one token
])
def test_one_row_by_hand(pattern, em, es):
    logits, labels = case(pattern)
    assert exact_memorization(logits, labels).tolist() == pytest.approx([em])
    assert extraction_strength(logits, labels).tolist() == pytest.approx([es])


def test_rows_of_a_batch_do_not_see_each_other():
    logits, labels = (torch.cat(parts) for parts in zip(case(".rrr"), case(".wr."), case("..rw"), strict=True))
    assert exact_memorization(logits, labels).tolist() == [1, 0.5, 0.5]
    assert extraction_strength(logits, labels).tolist() == [1, 0.5, 0]


def test_floor_is_what_open_unlearning_computes():
    """Its loop over k ends at n - 1: a wrong last token costs no more than a right one alone would gain."""
    for pattern, es in ((".rrrw", 1 / 4), (".wwww", 1 / 4), (".wwwr", 1 / 4), (".wwrr", 1 / 2), (".w", 1)):
        assert extraction_strength(*case(pattern), floor=True).item() == pytest.approx(es)


def open_unlearning(right: list[bool]) -> float:
    """The published loop, on a list of which tokens are right."""
    k = 0
    for k in range(len(right)):
        if all(right[k:]):
            break
    return 1 - k / len(right)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 3))
def test_extraction_strength_by_trying_every_prefix(right, before, after):
    logits, labels = case("." * before + "".join("r" if r else "w" for r in right) + "." * after)
    n = len(right)
    least = min(k for k in range(n + 1) if all(right[k:]))
    es, em = extraction_strength(logits, labels).item(), exact_memorization(logits, labels).item()
    assert es == pytest.approx(1 - least / n, abs=1e-6)
    assert em == pytest.approx(sum(right) / n, abs=1e-6)
    assert es <= em + 1e-6  # the right tail is a part of what is right
    assert extraction_strength(logits, labels, floor=True).item() == pytest.approx(open_unlearning(right), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_extraction_strength_by_decoding(seed, n):
    """A model that looks at its last two tokens only: decode greedily after every prefix of the answer."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 3, 3, generator=generator)  # few tokens, so that prefixes do succeed by chance
    ids = torch.randint(3, (2 + n,), generator=generator).tolist()
    logits = torch.stack([table[a, b] for a, b in zip([0, *ids[:-2]], ids[:-1], strict=True)])[None]
    labels = torch.tensor([[IGNORE, *ids[2:]]])

    def reproduces(k: int) -> bool:
        text = ids[: 2 + k]
        while len(text) < len(ids):
            text = [*text, int(table[text[-2], text[-1]].argmax())]
        return text == ids

    least = min(k for k in range(n + 1) if reproduces(k))
    assert extraction_strength(logits, labels).item() == pytest.approx(1 - least / n, abs=1e-6)


def test_equal_logits_are_not_all_right():
    """A collapsed model: the first token of the vocabulary is its answer everywhere, and nothing else is."""
    labels = torch.tensor([[IGNORE, 0, 1, 0]])
    assert right_tokens(torch.zeros(1, 4, V), labels).tolist() == [[False, True, False, True]]
    assert exact_memorization(torch.zeros(1, 4, V), labels).item() == pytest.approx(2 / 3)


def test_results_are_float32_whatever_the_logits_are():
    logits, labels = case(".rw")
    assert exact_memorization(logits.bfloat16(), labels).dtype == torch.float32
    assert extraction_strength(logits.bfloat16(), labels).dtype == torch.float32


def test_a_row_without_an_answer_is_named():
    logits, labels = (torch.cat(parts) for parts in zip(case(".rr"), case("..."), strict=True))
    for measure in (exact_memorization, extraction_strength):
        with pytest.raises(ValueError, match="row 1 of the batch has no answer token"):
            measure(logits, labels)
    assert answer_lengths(labels[:1]).tolist() == [2]


def test_without_end_takes_the_last_answer_token_of_every_row():
    labels = torch.tensor([[IGNORE, 7, 8, 9], [IGNORE, 7, 2, IGNORE], [9, IGNORE, IGNORE, IGNORE]])
    assert without_end(labels).tolist() == [[IGNORE, 7, 8, IGNORE], [IGNORE, 7, IGNORE, IGNORE], [IGNORE] * 4]
    assert labels[0, 3] == 9  # the caller's tensor is left alone
    logits, labels = case(".wrw")
    assert exact_memorization(logits, without_end(labels)).item() == 0.5
    assert extraction_strength(logits, without_end(labels)).item() == 0.5


# ---- completion -------------------------------------------------------------------------------------------------

def test_split_prefix():
    assert split_prefix([5, 6, 7, 8], 1) == ([5], [6, 7, 8])
    assert split_prefix((5, 6, 7, 8), 3) == ([5, 6, 7], [8])
    for prefix in (0, -1, 4, 5):
        with pytest.raises(ValueError, match="the passage has 4"):
            split_prefix([5, 6, 7, 8], prefix)


def test_rouge_l_by_hand():
    """Three of the four words in order; recall over the reference's four, precision over the generation's six."""
    score, = rouge_l(["the cat sat down"], ["the dog cat went far down"])
    assert score.recall == pytest.approx(3 / 4) and score.f1 == pytest.approx(2 * 3 / (4 + 6))
    assert rouge_l(["a b", "a b"], ["a b", ""]) == [(1, 1), (0, 0)]
    assert rouge_l(["novels"], ["novel"])[0].recall == 0 and rouge_l(["novels"], ["novel"], stem=True)[0].recall == 1
    with pytest.raises(ValueError):
        rouge_l(["a"], [])


def test_rouge_l_recall_as_tofu_takes_it_by_hand():
    """Longest common subsequence over the right answer's words, after stemming, whatever comes besides."""
    right = ["the cat sat on the mat", "she wrote novels", "one two three", "one two three"]
    said = ["the cat lay on a mat today", "he writes a novel", "three two one", ""]
    recalls = [score.recall for score in rouge_l(right, said, stem=True)]
    assert recalls == pytest.approx([4 / 6, 1 / 3, 1 / 3, 0])


def test_bleu_by_hand():
    """Four of five words right, one wrong at the end: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty."""
    assert bleu(["a b c d e"], ["a b c d x"]) == pytest.approx([100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25])
    # all right but one of seven words missing: the brevity penalty exp(1 - 7/6) alone
    assert bleu(["a b c d e f g"], ["a b c d e f"]) == pytest.approx([100 * 2.718281828 ** (-1 / 6)])
    assert bleu(["a b c d e"], ["a b c d e"]) == pytest.approx([100])
    assert bleu(["a b c d e", "a b"], ["", "a b"]) == [0, 0]  # empty, and right but shorter than four words


def test_bleu_is_per_row_not_of_the_corpus():
    """Four words right and eight wrong: 100 and 0. As one corpus 4/12, 3/10, 2/8, 1/6 of the n-grams are right."""
    right, said = ["a b c d", "g h i j k l m n"], ["a b c d", "x x x x x x x x"]
    assert bleu(right, said) == pytest.approx([100, 0])
    corpus = 100 * (4 / 12 * 3 / 10 * 2 / 8 * 1 / 6) ** 0.25
    assert sacrebleu.corpus_bleu(said, [right]).score == pytest.approx(corpus)
    with pytest.raises(ValueError):
        bleu(["a"], [])
