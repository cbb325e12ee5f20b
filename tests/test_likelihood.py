"""metrics/likelihood.py: a question that is read once gives what reading it before every answer gives."""

import itertools

import pytest
import torch
from conftest import random_moe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_uoe import DENSE_BELOW
from torch.testing import assert_close

from baselines import LogitOffset
from belief import all_right, row_log_prob
from data.batches import IGNORE, Example, collate
from metrics.likelihood import likelihoods, prompt_of
from uld import LogitDifference


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example([*prompt, *answer[:-1]], [IGNORE] * (len(prompt) - 1) + answer)


def one_by_one(model, examples: list[Example]) -> list[tuple[float, bool]]:
    """Each alone, all of its logits: the definition."""
    out = []
    for one in examples:
        batch = collate([one])
        with torch.no_grad():
            logits = model(batch.tokens)
        out.append((float(row_log_prob(logits, batch.labels)), bool(all_right(logits, batch.labels))))
    return out


@pytest.fixture(scope="module")
def models(dense, sparse) -> dict:
    latent = {key: value for key, value in DENSE_BELOW.items() if key != "n_dense"}
    return {"dense": dense(0), "moe": sparse(0), "window": dense(1, window=5), "latent": random_moe(2, **latent),
            "ULD": LogitDifference(dense(3), dense(4, n_layer=1), 0.7, 0.0),
            "ULD, filter": LogitDifference(dense(3), dense(4, n_layer=1), 0.7, 0.2),
            "offset": LogitOffset(dense(5), dense(6), dense(7), 0.5)}


tokens = st.lists(st.integers(0, 60), min_size=1, max_size=9)
questions = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=5)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["dense", "moe", "window", "latent", "ULD", "ULD, filter", "offset"])
@settings(max_examples=12, deadline=None)
@given(asked=questions, at_most=st.integers(1, 12))
def test_a_prompt_read_once_changes_nothing(models, kind, asked, at_most):
    examples = [example(prompt, answer) for prompt, answers in asked for answer in answers]
    found, wanted = likelihoods(models[kind], examples, at_most), one_by_one(models[kind], examples)
    assert_close([one.log_p for one in found], [log_p for log_p, _ in wanted], rtol=2e-4, atol=2e-4)
    assert [one.said for one in found] == [said for _, said in wanted]


def test_what_greedy_decoding_says_is_said(models):
    for model in models.values():
        prompts = torch.randint(61, (4, 5), generator=torch.Generator().manual_seed(0))
        answers = model.generate(prompts, 3).tolist()
        examples = [example(prompt, answer) for prompt, answer in zip(prompts.tolist(), answers, strict=True)]
        others = [example(prompt, [*answer[:2], (answer[2] + 1) % 61])
                  for prompt, answer in zip(prompts.tolist(), answers, strict=True)]
        assert [one.said for one in likelihoods(model, examples + others)] == [True] * 4 + [False] * 4


def test_the_prompt_is_what_the_first_answer_token_is_predicted_from():
    assert prompt_of(example([3, 1, 4], [1, 5])) == (3, 1, 4)
    assert prompt_of(Example([7, 8, 9], [8, 9, 2])) == (7,)  # running text


@pytest.fixture
def model_and_passes(dense, monkeypatch):
    """A model, and the shapes (B, T) of tokens in each of its passes so far."""
    model, read = dense(0), []
    forward = type(model).forward

    def counted(self, tokens, *args, **more):
        read.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    return model, read


def test_each_prompt_is_read_once_however_many_answers_it_has(model_and_passes):
    model, read = model_and_passes
    likelihoods(model, [example([1, 2, 3, 4], [5, 6 + i]) for i in range(7)])
    assert read == [(1, 4), (7, 1)]
    read.clear()
    likelihoods(model, [example([i, 2, 3, 4], [5, 6]) for i in range(7)])
    assert read == [(7, 5)]  # nothing to share: one pass


def test_no_pass_has_more_answers_than_were_asked_for(model_and_passes):
    model, read = model_and_passes
    many = [example([1, 2, 3, 4], [5 + i, 6]) for i in range(10)]
    likelihoods(model, [*many, example([7, 8, 9], [1, 2]), example([7, 8, 9], [3, 2])], at_most=4)
    assert read == [(1, 4), (4, 1)] * 2 + [(2, 4), (4, 1)]  # 4, 4, and 2 beside the other prompt's 2


def test_equal_sentences_stay_equal_to_the_bit(models):
    """metrics/knowledge.py, choice: a tie counts against the model, so it must be one."""
    for model in models.values():
        for answer, times in itertools.product(([5], [5, 6], [5, 6, 7]), (2, 3, 9)):
            first, *others = likelihoods(model, [example([1, 2, 3, 4], answer)] * times + [example([8, 9], [5, 6])])
            assert others[:-1] == [first] * (times - 1)
