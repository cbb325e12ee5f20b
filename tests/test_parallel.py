"""parallel.py: two processes on one run come to what one comes to. They talk by gloo, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import parallel
import train
from data.batches import Rows, Share
from pretrained import save

ROOT = Path(__file__).resolve().parents[1]


def start(processes: int, *words: str, out: Path) -> subprocess.Popen:
    """train.py by so many processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*command, "train.py", *words, "--out", str(out), "--device", "cpu"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[:3000]
    return said


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def public(tmp_path_factory, dense, sparse, words, small_world) -> dict[str, Path]:
    """A small model of each kind as a folder, and rows of one's own; seven to forget, so that batches do not halve."""
    folder = tmp_path_factory.mktemp("public")
    for kind, make in (("dense", dense), ("moe", sparse)):
        save(make(vocab_size=words.vocab_size, std=0.1, tie_head=kind == "dense"), words, folder / kind)
    for name, rows in (("forget", small_world.forget[:7]), ("retain", small_world.retain[:12])):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({key: row[key] for key in ("question", "answer")}) + "\n" for row in rows))
    return {path.stem: path for path in folder.iterdir()}


RUNS = {"full": ("dense", "--method full --retain-loss kl --checkpointing"), "full-moe": ("moe", "--method full"),
        "uoe": ("moe", "--method uoe"), "uoe-adversary": ("moe", "--method uoe --adversary 0.2"),
        "uld": ("dense", "--method uld --lora-rank 4 --lora-dropout 0 --assistant-layers 1"),
        "finetune": ("dense", "--method finetune"), "micro": ("dense", "--method full --micro-batch 1")}



SMALL = "--name r --dtype float32 --batch-size 3 --lr 1e-3 --score-rows 4".split()


def words_of(name: str, public: dict[str, Path], epochs: int) -> list[str]:
    kind, method = RUNS[name]
    return [*method.split(), "--model", str(public[kind]), "--forget", str(public["forget"]), "--retain",
            str(public["retain"]), "--epochs", str(epochs), *SMALL]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_the_losses_and_weights_of_one(name, public, tmp_path):
    started = start(2, *words_of(name, public, 2), out=tmp_path / "2")
    train.main([*words_of(name, public, 2), "--out", str(tmp_path / "1"), "--device", "cpu"])
    finish(started)
    one, two = (tmp_path / str(processes) / "r" for processes in (1, 2))
    assert len(losses(one)) >= 6
    for a, b in zip(losses(one), losses(two), strict=True):
        assert_close(b, a, rtol=1e-5, atol=1e-5)
    for file in one.glob("*/model.safetensors"):
        there = load_file(two / file.relative_to(one))
        for key, value in load_file(file).items():
            assert_close(there[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert not list((tmp_path / "2" / ".rank1").glob("[!.]*"))


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_to_the_same_bits(public, tmp_path):
    words = words_of("full", public, 60)
    said = finish(start(2, *words, out=tmp_path / "whole"))
    assert said.count("settings: ") == 1  # one of them speaks
    cut = start(2, *words, out=tmp_path / "cut")
    parts = [tmp_path / "cut" / of / "r.partial" / "state.pt" for of in ("", ".rank1")]
    while cut.poll() is None and not all(part.is_file() for part in parts):
        time.sleep(0.05)
    time.sleep(1)
    cut.send_signal(signal.SIGTERM)
    assert "stopped after step" in cut.communicate(timeout=60)[0]
    finish(start(2, *words, "--resume", out=tmp_path / "cut"))
    whole, cut_off = (tmp_path / name / "r" for name in ("whole", "cut"))
    assert losses(whole) == losses(cut_off) and len(losses(whole)) == 180
    there = load_file(cut_off / "model" / "model.safetensors")
    for key, value in load_file(whole / "model" / "model.safetensors").items():
        assert value.equal(there[key]), key


@pytest.mark.parametrize("rows, processes, micro", [(7, 2, 0), (7, 3, 1), (1, 2, 0), (5, 4, 2), (8, 2, 3)])
def test_the_parts_of_all_processes_are_the_batch(rows, processes, micro, monkeypatch, tokenizer, small_world):
    """Each row once, shares that add up to 1, and as many passes in each process, whoever has fewer rows."""
    of = Rows(small_world.forget[:rows], tokenizer, 128, 8, 0, "cpu")
    of.micro = micro
    monkeypatch.setattr(parallel, "size", lambda: processes)
    every = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        every.append(list(of.parts(0)))
    assert len({len(parts) for parts in every}) == 1
    taught = [part for parts in every for part in parts if part.share.rows > 0]
    assert sorted(i for part in taught for i in part.index.tolist()) == list(range(rows))
    for kind in Share._fields:
        assert sum(getattr(part.share, kind) for parts in every for part in parts) == pytest.approx(1.0)


def test_a_small_model_is_trained_by_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        train.main(["--method", "uoe"])
    assert ended.value.code == 2 and "torchrun shares out runs of a --model" in capsys.readouterr().err
