"""metrics/privacy.py: by hand, and against versions in plain loops."""

import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from belief import token_log_probs
from data.batches import IGNORE
from metrics.privacy import (
    auc,
    loss_score,
    min_k,
    min_k_plus_plus,
    priv_leak,
    standardised,
    zlib_score,
)

LABELS = torch.tensor([[IGNORE, 1, 1, 1, 1], [IGNORE, IGNORE, 1, 1, IGNORE]])
LOG_PROBS = torch.tensor([[0.0, -1, -4, -2, -3], [-9, -9, -0.5, -1.5, -9]])  # -9: what must not be read


def random_batch(seed: int, rows: int = 3, time: int = 7, vocabulary: int = 6):
    """Logits and labels; each row has at least one answer token."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, time, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows, time), generator=generator)
    labels[torch.rand(rows, time, generator=generator) < 0.4] = IGNORE
    labels[:, 2] = 3
    return logits, labels


# ---- attacks ----------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    assert loss_score(LOG_PROBS, LABELS).tolist() == [-2.5, -1]


def test_zlib_divides_by_bytes_of_the_compressed_utf8_text():
    texts = ["ab" * 500, "é-ü quite another text"]
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    assert sizes[0] < 40  # 1000 characters
    got = zlib_score(LOG_PROBS, LABELS, texts)
    assert got.tolist() == pytest.approx([-2.5 / sizes[0], -1 / sizes[1]])
    with pytest.raises(ValueError, match="1 texts for 2 rows"):
        zlib_score(LOG_PROBS, LABELS, texts[:1])


@pytest.mark.parametrize("k, expected", [(0.2, [-4, -1.5]), (0.5, [-3.5, -1.5]), (0.99, [-3, -1.5]), (1, [-2.5, -1])])
def test_min_k_by_hand(k, expected):
    """int(k n) of 4 and of 2 values, at least one."""
    assert min_k(LOG_PROBS, LABELS, k).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, -0.1, 1.01, 20])
def test_min_k_takes_a_share_not_a_percentage(k):
    with pytest.raises(ValueError, match="k is a share"):
        min_k(LOG_PROBS, LABELS, k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.29, 0.3, 0.4, 0.57, 0.6, 0.7, 1.0]))
def test_min_k_by_sorting(seed, k):
    logits, labels = random_batch(seed, time=20)
    log_probs = token_log_probs(logits, labels)
    got = min_k(log_probs, labels, k).tolist()
    for row, kept, score in zip(log_probs.tolist(), (labels != IGNORE).tolist(), got, strict=True):
        values = sorted(value for value, keep in zip(row, kept, strict=True) if keep)
        count = max(1, int(len(values) * k))
        assert score == pytest.approx(sum(values[:count]) / count, rel=1e-5)


def test_standardised_by_hand():
    """p = 1/2, 1/4, 1/4: mu = -1.5 log 2, sigma = 0.5 log 2, so the first token is 1 above, the others 1 below."""
    logits = torch.tensor([[[0.5, 0.25, 0.25]] * 3]).log() + 7  # a constant added to all logits changes nothing
    got = standardised(logits, torch.tensor([[0, 2, IGNORE]]))
    assert got.tolist() == [pytest.approx([1, -1, 0], abs=1e-5)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 1.0]))
def test_min_k_plus_plus_by_loops_over_the_vocabulary(seed, k):
    logits, labels = random_batch(seed)
    got = min_k_plus_plus(logits, labels, k).tolist()
    for b in range(len(labels)):
        scores = []
        for t in range(labels.shape[1]):
            if labels[b, t] == IGNORE:
                continue
            weights = [math.exp(x) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            mu = sum(q * math.log(q) for q in p)
            sigma = math.sqrt(sum(q * math.log(q) ** 2 for q in p) - mu**2)
            scores.append((math.log(p[labels[b, t]]) - mu) / sigma)
        scores.sort()
        count = max(1, int(len(scores) * k))
        assert got[b] == pytest.approx(sum(scores[:count]) / count, rel=1e-3, abs=1e-3)


def test_standardised_where_there_is_no_spread():
    """Uniform: exactly as likely as expected, 0. Certain and right: 0 too, not NaN."""
    logits = torch.stack([torch.zeros(4), torch.tensor([1000.0, 0, 0, 0])])[None]
    assert standardised(logits, torch.tensor([[2, 0]])).tolist() == [pytest.approx([0, 0], abs=1e-3)]


def test_standardised_with_tokens_that_a_filter_ruled_out():
    """-inf logits count for nothing; a label among them is as unlikely as can be, not NaN."""
    logits = torch.tensor([[[0.5, 0.25, 0.25, 0]] * 2]).log()
    assert standardised(logits, torch.tensor([[0, 3]])).tolist() == [[pytest.approx(1, abs=1e-5), -math.inf]]


def test_a_nan_stays_one():
    """A model that diverged must not pass for one that is certain of every token; what is not read may be NaN."""
    logits = torch.zeros(2, 5, 4)
    logits[0, 3] = torch.nan
    logits[1, 4] = torch.nan
    log_probs = torch.where(LABELS == IGNORE, torch.nan, token_log_probs(logits, LABELS))
    for score in (loss_score(log_probs, LABELS), min_k(log_probs, LABELS), min_k_plus_plus(logits, LABELS)):
        assert score.isnan().tolist() == [True, False]


def test_an_answer_of_one_token_and_of_none():
    labels = torch.tensor([[IGNORE, 2]])
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    log_probs = token_log_probs(logits, labels)
    assert min_k(log_probs, labels, 0.2).item() == pytest.approx(loss_score(log_probs, labels).item())
    for score in (lambda: loss_score(log_probs, labels * 0 + IGNORE), lambda: min_k(log_probs, labels * 0 + IGNORE)):
        with pytest.raises(ValueError, match="row 0 of the batch has no answer token"):
            score()


def test_every_score_is_larger_for_the_row_that_was_learnt():
    """One text, two models: one has it by heart, the other has not."""
    labels = torch.tensor([[0, 1, 2, 3, 4]] * 2)
    strange = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    known = strange + 5 * torch.nn.functional.one_hot(labels[0], 6)
    logits = torch.stack([known, strange])
    log_probs = token_log_probs(logits, labels)
    for score in (loss_score(log_probs, labels), zlib_score(log_probs, labels, ["text"] * 2),
                  min_k(log_probs, labels), min_k_plus_plus(logits, labels)):
        assert score[0] > score[1] and score.dtype == torch.float32


# ---- from scores to one number ----------------------------------------------------------------------------------

def test_auc_by_hand_and_at_its_ends():
    """Pairs (2 > 1), (2 < 3), (3 > 1), (3 = 3): 2.5 of 4."""
    assert auc([2, 3], [1, 3]) == 2.5 / 4
    assert auc([5, 6, 7], [1, 2]) == 1 and auc([1, 2], [5, 6, 7]) == 0 and auc([1, 1], [1]) == 0.5
    assert auc([-math.inf, 2], [-math.inf, 1]) == (0.5 + 0 + 1 + 1) / 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_auc_by_a_double_loop(members, others):
    wins = sum((a > b) + (a == b) / 2 for a in members for b in others)
    assert auc(members, others) == pytest.approx(wins / (len(members) * len(others)))
    assert auc(members, others) + auc(others, members) == pytest.approx(1)
    assert auc([math.exp(a) for a in members], [math.exp(b) for b in others]) == pytest.approx(auc(members, others))


@pytest.mark.parametrize("members, others", [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [0.0, math.nan])])
def test_auc_refuses_empty_sides_and_nan(members, others):
    with pytest.raises(ValueError, match="an AUC needs"):
        auc(members, others)


def muse(forget: list[float], holdout: list[float]) -> float:
    """MUSE's code: perplexity-like values (larger is less likely), holdout rows are the positive class."""
    return sum((h < f) + (h == f) / 2 for f in forget for h in holdout) / (len(forget) * len(holdout))


def test_priv_leak_has_the_sign_and_value_of_muse():
    """Values of -min-k: the target knows the forget set, the retrained model does not, the last was driven too far."""
    holdout, retrained, target, over = [3.0, 4.0, 5.0], [3.5, 4.5, 2.5], [0.1, 0.2, 0.3], [8.0, 9.0, 4.5]

    def leak(values):
        return priv_leak(auc([-v for v in values], [-v for v in holdout]),
                         auc([-v for v in retrained], [-v for v in holdout]))

    base = muse(retrained, holdout)
    assert base == pytest.approx(3 / 9)
    for values in (target, over, retrained):
        assert leak(values) == pytest.approx(100 * (muse(values, holdout) - base) / base)
    assert leak(target) == pytest.approx(-100) and leak(retrained) == 0 and leak(over) > 0


def test_priv_leak_by_hand():
    assert priv_leak(0.75, 0.5) == pytest.approx(-50) and priv_leak(0.25, 0.5) == pytest.approx(50)
    assert priv_leak(0.52, 0.2) == pytest.approx(-40)  # (0.48 - 0.8) / 0.8, not over one's own 0.2


@pytest.mark.parametrize("unlearned, retrained, says", [(1.2, 0.5, "1.2 is not an AUC"), (0.5, -0.1, "not an AUC"),
                                                        (math.nan, 0.5, "nan is not"), (0.5, 1, "one distribution")])
def test_priv_leak_refuses_what_is_no_auc(unlearned, retrained, says):
    with pytest.raises(ValueError, match=says):
        priv_leak(unlearned, retrained)
