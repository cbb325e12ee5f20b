"""metrics/: by hand, against scipy, and against numbers that TOFU's and another group's own code computed."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from errors import UserError
from metrics.routing import overlap
from metrics.tofu import (
    LOG_SETS,
    RowScores,
    check_comparable,
    forget_quality,
    mean,
    model_utility,
    probability,
    read_log,
    set_truth_ratio,
    truth_ratio,
    utility_of,
)

# ---- one row ----------------------------------------------------------------------------------------------------


def test_truth_ratio_by_hand_in_both_definitions():
    """p(right) 1/4, p(wrong) 1/2 and 1/8. Losses: geometric mean 1/4 over 1/4 = 1; probabilities: 5/16 over 1/4."""
    right, wrong = math.log(4), [math.log(2), math.log(8)]
    assert truth_ratio(right, wrong) == truth_ratio(right, wrong, "losses") == pytest.approx(1)
    assert truth_ratio(right, wrong, "probabilities") == pytest.approx(5 / 4)


@pytest.mark.parametrize("definition", ["losses", "probabilities"])
def test_a_better_known_answer_has_the_smaller_ratio(definition):
    assert truth_ratio(0.1, [3.0, 4.0], definition) < 0.1 < 1 < truth_ratio(3.0, [0.1, 0.2], definition)
    assert truth_ratio(2.0, [2.0] * 5, definition) == pytest.approx(1)


def test_truth_ratio_needs_wrong_answers_and_a_known_definition():
    with pytest.raises(ValueError, match="at least one wrong answer"):
        truth_ratio(1.0, [])
    with pytest.raises(ValueError, match="definition 'mine'"):
        truth_ratio(1.0, [1.0], "mine")


def test_a_model_driven_to_absurd_losses_still_has_a_ratio():
    """Gradient ascent is unbounded: exp(1000) is infinity, which the means below read as 0, and no exception."""
    assert truth_ratio(1000.0, [1.0]) == math.inf
    assert truth_ratio(1000.0, [1.0], "probabilities") == math.inf
    assert set_truth_ratio([math.inf, 1.0], forget=True) == 0.5
    assert set_truth_ratio([math.inf, 0.0], forget=False) == 0.5


def test_probability_by_hand():
    assert probability(math.log(4)) == pytest.approx(1 / 4)
    assert probability(math.log(4), [math.log(2), math.log(8)]) == pytest.approx(0.25 / (0.25 + 0.5 + 0.125))


def test_probability_over_options_does_not_depend_on_how_absurd_all_are():
    """Equal losses are equal shares, also where exp(-loss) underflows."""
    assert probability(800.0, [800.0]) == pytest.approx(0.5)


# ---- one set ----------------------------------------------------------------------------------------------------

def test_set_truth_ratio_by_hand():
    """Forget: min(r, 1/r) = 0.5, 0.5, 1, 0. Others: max(0, 1 - r) = 0.5, 0, 0, 1."""
    ratios = [0.5, 2.0, 1.0, 0.0]
    assert set_truth_ratio(ratios, forget=True) == pytest.approx(0.5)
    assert set_truth_ratio(ratios, forget=False) == pytest.approx(0.375)


def test_summary_by_hand():
    ln = math.log
    scores = RowScores(loss=[ln(2), ln(4)], right=[ln(2), ln(4)], wrong=[[ln(4)], [ln(4), ln(4)]], rougeL=[1.0, 0.5],
                       exact=[True, False])
    # ratios 1/2 and 1: min(r, 1/r) 0.75 on average, max(0, 1 - r) 0.25
    assert scores.summary("forget") == pytest.approx(
        {"loss": 1.5 * ln(2), "probability": 0.375, "rougeL_recall": 0.75, "truth_ratio": 0.75, "exact": 0.5})
    assert scores.summary("retain")["truth_ratio"] == pytest.approx(0.25)
    # over the options: 1/2 of 3/4, and 1/4 of 3/4
    assert scores.summary("world_facts")["probability"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_rows_without_wrong_answers_are_left_out_of_the_truth_ratio_alone():
    scores = RowScores([1.0, 2.0], [1.0, 2.0], [[3.0], []], [1.0, 0.0])
    assert scores.truth_ratios() == [math.exp(-2)]
    summary = scores.summary("retain")
    assert summary["truth_ratio"] == pytest.approx(1 - math.exp(-2)) and summary["loss"] == 1.5
    over_options = scores.summary("real_authors")["probability"]  # the second has no options to be compared with
    assert over_options == pytest.approx((1 / (1 + math.exp(-2)) + math.exp(-2)) / 2)


def test_a_nan_loss_has_a_nan_ratio_not_an_infinite_one():
    assert math.isnan(truth_ratio(math.nan, [1.0])) and truth_ratio(800.0, [1.0]) == math.inf


def test_a_set_without_wrong_answers_has_no_truth_ratio():
    scores = RowScores([1.0], [1.0], [[]], [1.0])
    assert scores.truth_ratios() == []
    assert scores.summary("real_authors") == {"loss": 1.0, "probability": pytest.approx(math.exp(-1)),
                                              "rougeL_recall": 1.0, "truth_ratio": None}
    assert mean([]) is None


def test_model_utility_is_the_harmonic_mean_and_zero_with_a_zero():
    assert model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / (1 + 2 + 4))
    assert model_utility([0.9, 0.0, 0.8]) == 0
    assert model_utility([0.7]) == pytest.approx(0.7)
    for bad in ([], [0.5, -0.1]):
        with pytest.raises(ValueError, match="model utility"):
            model_utility(bad)


def test_utility_leaves_out_what_a_set_does_not_have():
    summaries = {"retain": {"probability": 1.0, "rougeL_recall": 0.5, "truth_ratio": None},
                 "forget": {"probability": 0.0, "rougeL_recall": 0.0, "truth_ratio": 0.0}}
    assert utility_of(summaries, ["retain"]) == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.integers(2, 60))
def test_forget_quality_is_the_two_sample_ks_test(seed, n, m):
    """D by hand: the largest gap of the two empirical distribution functions; p from scipy, two-sided."""
    rng = np.random.default_rng(seed)
    a, b = rng.random(n).round(2), (0.8 * rng.random(m)).round(2)  # rounded: with ties
    gap = max(abs((a <= x).mean() - (b <= x).mean()) for x in [*a, *b])
    got = forget_quality(a.tolist(), b.tolist())
    assert got.D == pytest.approx(gap) and got.n == n
    assert got.p == pytest.approx(ks_2samp(a, b, alternative="two-sided").pvalue)


def test_forget_quality_at_its_ends():
    """Equal lists: p = 1. Disjoint ones of n = 10: two orders of 20 choose 10."""
    ratios = [i / 10 for i in range(10)]
    assert forget_quality(ratios, ratios)[:2] == (1.0, 0.0)
    assert forget_quality(ratios, [r + 2 for r in ratios]).p == pytest.approx(2 / math.comb(20, 10))


@pytest.mark.parametrize("unlearned, reference", [([], [1.0]), ([1.0], []), ([1.0, math.nan], [1.0]),
                                                  ([1.0], [math.nan, 1.0])])
def test_forget_quality_refuses_empty_lists_and_nan(unlearned, reference):
    with pytest.raises(ValueError, match="truth ratios of both models"):
        forget_quality(unlearned, reference)


# ---- published logs ---------------------------------------------------------------------------------------------

def close(x: float):
    """To 10 significant digits."""
    return pytest.approx(x, rel=1e-10, abs=0)


def test_forget_quality_of_the_published_target(tofu):
    """Official aggregation of llama2-7b_full.json against llama2-7b_retain90.json (logs/README.md)."""
    full, retain = (read_log(tofu / "logs" / f"llama2-7b_{name}.json") for name in ("full", "retain90"))
    got = forget_quality(full["forget"].truth_ratios(), retain["forget"].truth_ratios())
    assert got.p == close(1.834066410994743e-21) and got.n == 300


def test_every_number_of_the_published_aggregation(tofu):
    """llama2-7b_retain90_uld.csv is the official aggregation of the log beside it, against itself.

    An older state of the script: it divides the forget set's probability, too, by that of all options.
    """
    log = read_log(tofu / "logs" / "llama2-7b_retain90_uld.json")
    with (tofu / "logs" / "llama2-7b_retain90_uld.csv").open(newline="") as file:
        official, = ({key: float(value) for key, value in row.items()} for row in csv.DictReader(file))
    blocks = {name: scores.summary(name) for name, scores in log.items()}
    names = {"Retain": "retain", "Real Authors": "real_authors", "Real World": "world_facts", "Forget": "forget"}
    measures = {"ROUGE": "rougeL_recall", "Probability": "probability", "Truth Ratio": "truth_ratio"}
    for theirs, ours in names.items():
        for measure, key in measures.items():
            if (theirs, measure) != ("Forget", "Probability"):
                assert blocks[ours][key] == close(official[f"{theirs} {measure}"]), (theirs, measure)
    forget = log["forget"]
    shares = [probability(right, wrong) for right, wrong in zip(forget.loss, forget.wrong, strict=True)]
    assert mean(shares) == close(official["Forget Probability"])
    utility = utility_of(blocks, ["retain", "real_authors", "world_facts"])
    assert utility == close(official["Model Utility"]) == close(0.6203436494291608)
    quality = forget_quality(log["forget"].truth_ratios(), log["forget"].truth_ratios())
    assert quality.p == official["Forget Quality"] == official["KS Test PVal Forget"]
    assert quality.D == official["KS Test Forget"]


@pytest.mark.parametrize("definition, utility", [("losses", 0.6227), ("probabilities", 0.5859)])
def test_model_utility_of_the_published_target_in_both_definitions(tofu, definition, utility):
    """As shared/papers/metrics.md gives it, to four digits."""
    log = read_log(tofu / "logs" / "llama2-7b_full.json")
    blocks = {name: scores.summary(name, definition) for name, scores in log.items()}
    assert utility_of(blocks, ["retain", "real_authors", "world_facts"]) == pytest.approx(utility, abs=5e-5)


def tiny_log() -> dict:
    """Rows by their number as text, as TOFU writes them: "10" comes after "2"."""
    one = {"avg_gt_loss": {"0": 0.0, "10": 10.0, "2": 2.0}, "avg_paraphrased_loss": [1.0, 2.0, 3.0],
           "average_perturb_loss": [[1.0], [2.0], [3.0, 4.0]], "rougeL_recall": [1, 1, 0]}
    return {key: one for key in ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json",
                                 "eval_real_world_wo_options.json")}


def test_rows_of_a_log_are_in_the_order_of_their_numbers(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(tiny_log()))
    assert read_log(path)["retain"].loss == [0.0, 2.0, 10.0]
    assert read_log(path)["forget"].wrong == [[1.0], [2.0], [3.0, 4.0]]


@pytest.mark.parametrize("content, says", [(None, "does not exist"), (b"{", "is not JSON"), (b"\xff", "is not JSON"),
                                           (b"{}", r"lacks 'eval_log\.json'"), (b"[]", "is not a JSON object"),
                                           (b'{"eval_log.json": {}}', "lacks 'eval_log_forget.json'"),
                                           (json.dumps({key: {} for key in LOG_SETS.values()}).encode(),
                                            "'eval_log.json' lacks 'avg_gt_loss'")])
def test_a_log_that_is_none_is_named(tmp_path, content, says):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.json .*{says}"):
        read_log(path)


# ---- routing ----------------------------------------------------------------------------------------------------

BEFORE = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [0, 1]]])
AFTER = torch.tensor([[[1, 0], [3, 0]], [[1, 2], [0, 1]]])
MASK = torch.tensor([[True, True], [True, False]])


def test_overlap_by_hand():
    """Same pair in the other order, one of two, none; the last is padding."""
    assert overlap(AFTER, BEFORE, MASK).tolist() == [1.0, 0.5, 0.0]
    assert overlap(BEFORE, BEFORE, MASK).tolist() == [1.0, 1.0, 1.0]
    assert overlap(AFTER, BEFORE, torch.zeros(2, 2, dtype=torch.bool)).shape == (0,)


def write_open_unlearning(path, sets=("forget",), n=12, **change):
    def by_index(values):
        return {"agg_value": 0.0, "value_by_index": {str(i): v for i, v in reversed(list(enumerate(values)))}}

    log = {"model_utility": {"agg_value": 0.5}}
    for short in sets:
        log |= {f"{short}_Q_A_Prob": by_index([{"prob": 0.5, "avg_loss": 0.1 * i} for i in range(n)]),
                f"{short}_Q_A_PARA_Prob": by_index([{"avg_loss": [1.0 + i]} for i in range(n)]),
                f"{short}_Q_A_PERT_Prob": by_index([{"avg_loss": [2.0, 4.0 + i]} for i in range(n)]),
                f"{short}_Q_A_ROUGE": by_index([{"rougeL_recall": i / 12} for i in range(n)])}
    path.write_text(json.dumps(log | change))
    return path


def test_an_open_unlearning_log_gives_the_truth_ratios_its_own_code_does(tmp_path):
    """Their formula: exp(-mean wrong loss) / exp(-right loss), row by row in the order of the numbers (2 before 10)."""
    scores = read_log(write_open_unlearning(tmp_path / "TOFU_EVAL.json", ("forget", "retain", "ra")))
    assert list(scores) == ["forget", "retain", "real_authors"]
    assert scores["forget"].truth_ratios() == pytest.approx(
        [math.exp(-(6.0 + i) / 2) / math.exp(-(1.0 + i)) for i in range(12)])
    assert scores["retain"].rougeL[10] == pytest.approx(10 / 12) and scores["retain"].loss[2] == pytest.approx(0.2)
    assert scores["real_authors"].right == scores["real_authors"].loss  # there the right answer is the answer itself


def test_an_open_unlearning_log_that_is_cut_off_is_named(tmp_path):
    path = write_open_unlearning(tmp_path / "a.json", forget_Q_A_PERT_Prob={"value_by_index": {}})
    with pytest.raises(UserError, match=r"a\.json: 'forget' has 12 right and 0 wrong"):
        read_log(path)
    path = write_open_unlearning(tmp_path / "b.json", forget_Q_A_PERT_Prob={})
    with pytest.raises(UserError, match=r"b\.json 'forget_Q_A_PERT_Prob' lacks 'value_by_index'"):
        read_log(path)


@pytest.mark.parametrize("field, value, says", [
    ("avg_gt_loss", [0.0, -1.0, 2.0], "'1' is -1.0, not a number from 0"), ("avg_gt_loss", [0.0, 1.0], "it is cut off"),
    ("avg_paraphrased_loss", [1.0, math.nan, 1.0], "'1' is NaN"), ("avg_gt_loss", {"a": 1, "b": 2, "c": 3}, "invalid"),
    ("rougeL_recall", [1, 1, 2], "'2' is 2, not a number from 0 to 1"), ("rougeL_recall", None, "is not a list"),
    ("average_perturb_loss", [[1.0], [], [1.0]], "each row needs one"), ("average_perturb_loss", [1.0], "'0' is not"),
    ("average_perturb_loss", [[1.0], [math.inf], [1.0]], "Infinity"), ("avg_gt_loss", [True, 1, 1], "is true, not"),
])
def test_a_log_with_numbers_that_mean_nothing_is_refused(tmp_path, field, value, says):
    log = tiny_log()
    log["eval_log_forget.json"] = log["eval_log_forget.json"] | {field: value}
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(UserError, match=rf"log\.json.*{says}"):
        read_log(tmp_path / "log.json")


def test_logs_of_other_rows_or_of_one_model_do_not_compare():
    ours, theirs = RowScores([], [1.0, 2.0], [[3.0], [4.0]]), RowScores([], [1.5, 2.0], [[3.0], [4.0]])
    check_comparable(ours, theirs, "a against b")
    with pytest.raises(UserError, match=r"^a against b: the very same losses"):
        check_comparable(ours, RowScores([], [1.0, 2.0], [[3.0], [4.0]]), "a against b")
    with pytest.raises(UserError, match=r"2 forget rows against 1: give logs of the same rows"):
        check_comparable(ours, RowScores([], [1.0], [[3.0]]), "a against b")
    ours.answers, theirs.answers = ["Orsk.", "Ulm."], ["Orsk.", "Bor."]
    with pytest.raises(UserError, match=r"forget row 2 is another in each"):
        check_comparable(ours, theirs, "a against b")
