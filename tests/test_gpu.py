"""lab/gpu.py at toy sizes on the CPU: every part runs, and the page says what was measured."""

import json

import pytest

from lab import gpu


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path, capsys):
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    for part in gpu.PARTS:
        assert results[part] and "error" not in results[part], part
    assert all(seconds > 0 for row in results["experts"].values() for seconds in row.values())
    assert set(results["uoe"]["decoding"]) == {"ours", "transformers"}
    assert set(results["uld"]["decoding"]) == {"target", "ULD", "transformers"}
    assert results["uoe"]["trained"] == 3 * 32 * 16 + 8 * 32  # one expert and its router
    page = (tmp_path / "gpu.md").read_text()
    assert "Not measured" not in page and page.count("tokens/s") == 5


def test_a_part_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    def broken(here):
        raise RuntimeError("no such device")

    monkeypatch.setattr(gpu, "PARTS", {"card": lambda here: {"bf16_flops": 1e12, "bytes_per_second": 1e12},
                                       "experts": broken})
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["card"]["bf16_flops"] == 1e12 and "error" in results["experts"]
    assert "no such device" in capsys.readouterr().err


def test_active_parameters_by_hand():
    """2 blocks of attention 4 * 8 * 8, MLP 3 * 8 * 5, norms 16; last norm 8, head 10 * 8. Then 2 of 4 experts."""
    shape = dict(vocab_size=10, n_layer=2, n_head=2, n_kv_head=2, d_model=8, d_ff=5)
    rest = 2 * (4 * 64 + 16) + 8 + 80
    assert gpu.active_parameters(gpu.Config(**shape)) == rest + 2 * 3 * 8 * 5
    sparse = gpu.Config(**shape, n_expert=4, top_k=2)
    assert gpu.active_parameters(sparse) == rest + 2 * (4 * 8 + 2 * 3 * 8 * 5)
    # one row meets 2 of 4 experts, two rows 1 - (1/2)^2 = 3 of 4, were they even
    assert gpu.bytes_per_token_step(sparse, 1) == 2 * gpu.active_parameters(sparse)
    assert gpu.bytes_per_token_step(sparse, 2) == 2 * (rest + 2 * (4 * 8 + 3 * 3 * 8 * 5))
