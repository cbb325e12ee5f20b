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
    assert set(results["recorded"].values()) == {1.0}  # on a CPU nothing is recorded
    for part, ours in (("uoe", {"here", "transformers, grouped_mm"}), ("grouped", {"here", "transformers"}),
                       ("uld", {"target", "ULD", "transformers"})):
        found = results[part]["decoding"]
        assert set(found) == {"8", "256"} and set(found["256"]) == ours and "transformers" in found["8"]
        assert any("kernel by kernel" in name for name in found["8"])
        assert all(seconds > 0 for each in found.values() for seconds in each.values())
    assert results["uoe"]["decoding_bytes"]["8"] < results["uoe"]["decoding_bytes"]["256"]  # more experts met
    assert results["compiled"]["seconds"] > 0
    assert results["uoe"]["steps"]["32"]["trained"] == 3 * 32 * 16 + 8 * 32  # one expert and its router
    page = (tmp_path / "gpu.md").read_text()
    assert "Not measured" not in page and page.count("tokens/s") == 19


def test_a_part_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    def broken(here):
        raise RuntimeError("no such device")

    monkeypatch.setattr(gpu, "PARTS", {"card": lambda here: {"bf16_flops": 1e12, "bytes_per_second": 1e12},
                                       "experts": broken})
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    page = (tmp_path / "gpu.md").read_text()
    (tmp_path / "gpu.md").write_text(page + "By hand.\n")
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.md").read_text() == page + "By hand.\n"
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["card"]["bf16_flops"] == 1e12 and "error" in results["experts"]
    assert "no such device" in capsys.readouterr().err
