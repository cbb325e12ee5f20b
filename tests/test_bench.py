"""lab/bench.py: everything takes its turn in every round, and ratios are what they say."""

import pytest
from conftest import SHAPE

from lab import bench


def test_all_take_their_turn_and_the_first_round_only_warms_up():
    calls = []
    seconds = bench.in_turn({name: (lambda name=name: calls.append(name) or len(calls)) for name in "ab"}, 2, "test")
    assert calls == ["a", "b"] * 3 and seconds == {"a": [3, 5], "b": [4, 6]}


def test_a_ratio_is_of_medians_with_the_range_within_rounds():
    assert bench.line("x", [1.0, 2.0, 9.0], [2.0, 4.0, 3.0]).split() == ["x", "0.67", "(0.50", "to", "3.00)"]


@pytest.mark.slow
def test_every_method_is_timed_and_the_same_model_in_transformers(tmp_path, capsys):
    bench.main(["--rounds", "1", *SHAPE, "--subjects", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("training step   ") == printed.count("32 greedy tokens") == 2
    for name in (name for methods in bench.METHODS.values() for name in list(methods)[:-1]):
        assert f"    {name} " in printed
