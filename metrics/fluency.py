"""Does a model still write? Forgetting by breaking the language model is cheap, and most measures do not see it.

    perplexity   exp( - sum of log p over all tokens of all texts / number of tokens ); at least 1, lower is better.
                 *One* mean over tokens, so that a long text counts for more than a short one. A mean of each row's
                 perplexity is another number, never smaller than this one where rows are equally long, and one absurd
                 row decides it.
    repetition   seq-rep-n of one generation: 1 - different n-grams / n-grams, the share that were there before
                 (Welleck et al., arXiv 1908.04319; n = 4 there and here); 0 for fresh text, near 1 for a loop, lower
                 is better. People's text is not at 0: compare with the reference answers.

An empty generation repeats nothing, and would score a perfect 0. A generation of fewer than n tokens has no n-gram, so
its repetition is None; repetition_rate leaves those out of the mean and reports how many were empty. Give generations
without their end token.

Perplexities compare only between models of one tokenizer. Over *words* (ULD's WikiText numbers, the LM evaluation
harness' word_perplexity) they compare beyond it: pass counts of words instead of tokens, log-probabilities unchanged.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from metrics.tofu import exp


class Repetition(NamedTuple):
    """Of a set of generations."""

    rate: float | None  # mean over those that have an n-gram; None where none has
    empty: float  # share with no token at all


def perplexity(log_probs: Sequence[float], counts: Sequence[int]) -> float:
    """Over all rows together, from each row's *sum* of log p (belief.row_log_prob) and its number of tokens.

    At least one token in all; inf where it overflows.
    """
    return exp(float(-sum(log_probs) / sum(counts)))


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """Share of a generation's n-grams that repeat an earlier one (seq-rep-n); None where it has no n-gram.

    tokens: ids or words, not a string, whose items are characters.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def repetition_rate(generations: Sequence[Sequence[Hashable]]) -> Repetition:
    """Mean seq-rep-4 over generations, at least one, and what could not be scored."""
    scores = [repetition(tokens) for tokens in generations]
    scored = [score for score in scores if score is not None]
    return Repetition(rate=sum(scored) / len(scored) if scored else None,
                      empty=sum(len(tokens) == 0 for tokens in generations) / len(generations))
