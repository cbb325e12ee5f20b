"""metrics/fluency.py: by hand, and against counting in plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from belief import row_log_prob
from data.batches import IGNORE
from metrics.fluency import Repetition, perplexity, repetition, repetition_rate
from objectives import cross_entropy

# ---- perplexity -------------------------------------------------------------------------------------------------

def test_perplexity_is_over_tokens_not_over_rows():
    """One token at p = 1/16, three at p = 1/2: log2 of it is (4 + 3) / 4. The mean of 16 and 2 would be 9."""
    log_probs = [-math.log(16), -3 * math.log(2)]
    assert perplexity(log_probs, [1, 3]) == pytest.approx(2 ** (7 / 4))


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    assert perplexity([5 * math.log(1 / 7), 2 * math.log(1 / 7)], [5, 2]) == pytest.approx(7)


def test_perplexity_from_the_losses_of_a_batch():
    """Rows of unequal length: the same as exp of cross_entropy, which is a mean over answer tokens, too."""
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORE, 1, 2, 3], [IGNORE, IGNORE, IGNORE, 4]])
    at = labels != IGNORE
    got = perplexity(row_log_prob(logits, labels).tolist(), at.sum(-1).tolist())
    assert got == pytest.approx(cross_entropy(logits[at], labels[at]).exp().item(), rel=1e-5)


def test_perplexity_at_its_ends():
    assert perplexity([0.0], [3]) == 1
    assert perplexity([-10_000.0], [2]) == math.inf
    assert perplexity([-math.inf, -1.0], [1, 1]) == math.inf
    assert perplexity([0.0, -math.log(3)], [0, 1]) == pytest.approx(3)  # a row without tokens counts for nothing


# ---- repetition -------------------------------------------------------------------------------------------------

def test_repetition_by_hand():
    """a b a b a b has three 4-grams, of which the third is the first again."""
    assert repetition("a b a b a b".split()) == pytest.approx(1 / 3)
    assert repetition("a b a b a b".split(), n=2) == pytest.approx(3 / 5)  # ab ba ab ba ab: two of five are new
    assert repetition("a b a b a b".split(), n=1) == pytest.approx(4 / 6)
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 103) == pytest.approx(99 / 100)  # a loop


def test_what_is_too_short_has_no_repetition():
    """None, not the 0 of good text."""
    assert repetition([]) is None and repetition([1, 1, 1]) is None
    assert repetition([1, 1, 1, 1]) == 0 and repetition([1, 1, 1], n=3) == 0  # one n-gram, nothing before it


def test_repetition_rate_says_what_it_left_out():
    got = repetition_rate([[7] * 5, [1, 2, 3, 4], [1, 2], [], []])
    assert got == Repetition(rate=pytest.approx(0.25), empty=pytest.approx(2 / 5))
    assert repetition_rate([[], [1]]) == (None, 0.5)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 5))
def test_repetition_by_looking_back(tokens, n):
    """An n-gram counts where the same one begins anywhere before."""
    starts = range(len(tokens) - n + 1)
    if not len(starts):
        assert repetition(tokens, n) is None
        return
    seen = sum(any(tokens[j : j + n] == tokens[i : i + n] for j in range(i)) for i in starts)
    assert repetition(tokens, n) == pytest.approx(seen / len(starts))
    assert 0 <= repetition(tokens, n) < 1
