"""lab/bench.py: everything takes its turn in every round, and ratios are what they say."""

import pytest
from conftest import SHAPE

from lab import bench
from model import Config


def test_all_take_their_turn_and_the_first_round_only_warms_up():
    calls = []
    seconds = bench.in_turn({name: (lambda name=name: calls.append(name) or len(calls)) for name in "ab"}, 2, "test")
    assert calls == ["a", "b"] * 3 and seconds == {"a": [3, 5], "b": [4, 6]}


def test_a_ratio_is_of_medians_with_the_range_within_rounds():
    assert bench.line("x", [1.0, 2.0, 9.0], [2.0, 4.0, 3.0]).split() == ["x", "0.67", "(0.50", "to", "3.00)"]


def test_weights_met_by_hand():
    """2 blocks of attention 4 * 8 * 8, MLP 3 * 8 * 5, norms 16; last norm 8, head 10 * 8. Then 2 of 4 experts."""
    shape = dict(vocab_size=10, n_layer=2, n_head=2, n_kv_head=2, d_model=8, d_ff=5)
    rest = 2 * (4 * 64 + 16) + 8 + 80
    assert bench.weights_met(Config(**shape)) == bench.weights_met(Config(**shape), 9) == rest + 2 * 3 * 8 * 5
    assert bench.weights_met(Config(**shape, tie_head=True)) == rest + 2 * 3 * 8 * 5  # the embedding is the head
    sparse = Config(**shape, n_expert=4, top_k=2)
    assert bench.weights_met(sparse) == rest + 2 * (4 * 8 + 2 * 3 * 8 * 5)
    # one row meets 2 of 4 experts, two rows 1 - (1/2)^2 = 3 of 4, were they even
    assert bench.weights_met(sparse, 2) == rest + 2 * (4 * 8 + 3 * 3 * 8 * 5)


def test_operations_of_a_step_by_hand():
    """Of 7 tokens all meet two attentions, the first MLP and four norms; of these 3 the second MLP, last norm, head."""
    shape = dict(vocab_size=10, n_layer=2, n_head=2, n_kv_head=2, d_model=8, d_ff=5)
    early, late = 2 * 4 * 64 + 3 * 8 * 5 + 2 * 16 + 8, 3 * 8 * 5 + 80  # the last norm, 8, is counted with the others
    assert bench.operations(Config(**shape), 7, 3) == 6 * (7 * early + 3 * late)
    sparse = late - 120 + 8 * 4 + 2 * 120  # a router, two of four experts
    early += 8 * 4 + 120
    assert bench.operations(Config(**shape, n_expert=4, top_k=2), 7, 3) == 6 * (7 * early + 3 * sparse)


@pytest.mark.slow
def test_every_method_is_timed_and_the_same_model_in_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "LAYERS", bench.LAYERS[:1])
    bench.main(["--rounds", "1", *SHAPE, "--subjects", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("training step   ") == printed.count("likelihoods   ") == 2
    assert printed.count("32 greedy tokens") == printed.count("% of the bandwidth") == 2
    assert printed.count("32 tokens, ULD") == printed.count("here / in transformers") == 1
    for name in (name for methods in bench.METHODS.values() for name in list(methods)[:-1]):
        assert f"    {name} " in printed
