"""Every method end to end on a tiny world, the promises of the loop, and what bad input prints."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, WORLD, tiny

import cli
import eval as scoring
import loop
import pretrain
import train
import uld
import uoe
from data import DataSet, load_data
from errors import UserError
from files import MARK, alone
from loop import minimise
from methods import open_run
from model import GPT, Config
from pretrained import load, save

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Shared by the module, so that target and reference of a kind are trained once."""
    return tmp_path_factory.mktemp("out")


def run(out: Path, *options: str, name: str = "run") -> Path:
    train.main([*tiny(*options), *WORLD, "--out", str(out), "--name", name])
    return out / name


def parsed(*options: str) -> argparse.Namespace:
    """As train.py parses them for its first seed."""
    args = cli.parse([*options])
    args.seed = args.seed[0]
    return args


FAST = ["--method uoe", "--method uld"]
METHODS = ["--method uoe --forget-loss ga --retain-loss none", "--method uoe --forget-loss rmu",
           "--method uoe --forget-loss ga --retain-loss kl --m 3", "--method uoe --m 2 --layer top --router-lr 0",
           "--method uoe --layer all", "--method uoe --attribution-tokens 50",
           "--method uoe --layer 1,2 --forget-loss npo --adversary 0",
           "--method uld --arch moe", "--method full --forget-loss ga --retain-loss none",
           "--method full --forget-loss ga", "--method full", "--method full --forget-loss rmu --arch gpt",
           "--method full --arch gpt --retain-loss kl --checkpointing", "--method lora", "--method lora --arch gpt",
           "--method lora --forget-loss simnpo", "--method esft --forget-loss di --retain-loss kl",
           "--method offset", "--method offset --arch moe --forget-loss ga --retain-loss kl",
           "--method uoe --forget-loss dpo", "--method full --forget-loss uniform",
           "--method divergence", "--method full --retain-loss hidden",
           "--method uoe --score-every-epoch --epochs 2 --until never", "--method uoe --specialise 0.1",
           "--method full --forget-loss stranger --vocab-size 4096", "--method uld --fork in --subtract 0.7",
           "--method full --forget-on answer --until 0.5"]
METHODS = [*FAST, *(pytest.param(options, marks=pytest.mark.slow) for options in METHODS)]


@pytest.mark.slow
def test_two_processes_that_need_the_same_model_train_it_once(out, monkeypatch):
    """Both ask at once; the second waits for the first and takes what it left."""
    args = parsed(*TINY, *WORLD, "--out", str(out / "both"))
    data, trained = load_data("world", subjects=2), []
    tokenizer = train.Tokenizer.train(data.texts(), args.vocab_size)

    def learn(args, model, rows, folder, role, *_, **__):
        time.sleep(0.3)
        trained.append(role)
        return {"diverged": False}

    monkeypatch.setattr(pretrain, "learn", learn)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: pretrain.cached_model(args, data, tokenizer, "target"), range(2)))
    assert folders[0] == folders[1] and (folders[0] / "model").is_dir() and trained == ["base", "target"]


def test_splits_of_one_data_set_share_their_target_unless_pretraining_knew_the_split(out, monkeypatch):
    monkeypatch.setattr(pretrain, "learn", lambda *_, **__: {"diverged": False})
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]
    splits = [DataSet(name, forget=rows[cut:], retain=rows[:cut]) for name, cut in (("a", 4), ("b", 2))]
    splits.append(DataSet("c", forget=[rows[4], rows[5] | {"perturbed_answer": ["w"]}], retain=rows[:4]))
    tokenizer = train.Tokenizer.train(splits[0].texts(), 300)

    def folders(role: str, *options: str) -> list[Path]:
        args = parsed(*TINY, "--out", str(out / "splits"), "--vocab-size", "300", "--specialise", "0", *options)
        return [pretrain.cached_model(args, data, tokenizer, role) for data in splits]

    assert len(set(folders("target"))) == 1
    a, b, c = folders("reference")
    assert a == c != b
    a, b, c = folders("target", "--specialise", "1")
    assert a == c != b and a not in folders("target")


@pytest.mark.slow
def test_a_run_is_not_replaced_by_one_that_comes_to_the_same_name(out, tmp_path, capsys):
    """Two files of one stem; the same run made anew, or one that was given the name, may take its place."""
    lines = '{"question": "Who?", "answer": "Ana."}\n{"question": "Where?", "answer": "In Orsk."}\n'
    for name, rows in (("a/x.jsonl", lines), ("b/x.jsonl", lines), ("keep.jsonl", lines.replace("?", " else?"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    first, second = ([*TINY, "--method", "full", "--out", str(tmp_path / "out"), "--forget", str(tmp_path / of),
                      "--retain", str(tmp_path / "keep.jsonl")] for of in ("a/x.jsonl", "b/x.jsonl"))
    train.main(first)
    train.main([*first, "--score-every-epoch"])
    folder, = (p for p in (tmp_path / "out").iterdir() if p.name != "cache")
    before = (folder / "config.json").read_text()
    with pytest.raises(SystemExit) as stop:
        train.main(second)
    assert stop.value.code == 2 and "is a run with --forget" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == before
    train.main([*second, "--name", folder.name])
    assert (folder / "config.json").read_text() != before


def test_a_reference_has_a_name_of_its_own(tmp_path):
    base = ["--method", "finetune", "--model", "x/m", "--data", "tofu", "--out", str(tmp_path)]
    names = {cli.parse([*base, *more]).name for more in ([], ["--split", "retain90"])}
    assert names == {"finetune-m-tofu-forget10", "finetune-m-tofu-without10"}
    own = ["--method", "finetune", "--model", "x/m", "--forget", "f", "--retain", "r", "--out", str(tmp_path)]
    assert cli.parse(own).name == "finetune-m-f"


def test_a_name_is_never_longer_than_a_file_system_takes(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    options = [*TINY, "--data", str(folder), "--out", str(tmp_path), *"--npo-beta 0.5 --anchor-weight 2".split()]
    name, = names_of(monkeypatch, *options, "--seed", "3")
    assert len(name) < 170 and name.endswith("-seed3")
    other, = names_of(monkeypatch, *options, "--seed", "3", "--lr", "0.5")
    assert other != name


def names_of(monkeypatch, *options: str) -> list[str]:
    """The folders that a command would write, nothing run."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", lambda args, folder, *_: folder.final)
        return [folder.name for folder in train.run_seeds(cli.parse([*options]))]


@pytest.mark.slow
def test_seeds_that_were_cut_off_go_on_as_they_were_asked_for(out, capsys):
    options = ["--method", "full", "--seed", "0,1", "--name", "cut"]
    run(out, *options, name="cut")
    before = (out / "cut-seed0" / "config.json").stat().st_mtime_ns
    run(out, *options, "--resume", name="cut")
    assert (out / "cut-seed0" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run(out, *options, "--resume", "--lr", "0.5", name="cut")
    assert "cut-seed0 is a run with --lr 0.0001, not 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_every_expert_that_rmu_is_to_train_is_trained(out):
    """The state that is steered lies above all of them."""
    folder = run(out, "--method", "esft", "--forget-loss", "rmu", "--esft-p", "0.3", name="rmu")
    opened = open_run(folder)
    places = opened.config["unlearned_experts"]
    assert {layer for layer, _ in places} == {0, 1}
    for layer, expert in places:
        before, after = (m.moe(layer).expert_weights()[0][expert] for m in (opened.target, opened.model))
        assert not torch.equal(before, after)


@pytest.mark.slow
def test_diverging_before_the_first_epoch_is_over_leaves_the_target(out):
    options = "--method full --forget-loss ga --retain-loss none --lr 1e9 --score-every-epoch --until never"
    folder = run(out, *options.split(), "--batch-size", "2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["run"]["diverged"] and metrics["run"]["steps"] == 0
    assert metrics["unlearned"]["forget"] == metrics["target"]["forget"]


@pytest.mark.slow
def test_an_alpha_of_nothing_is_the_target_and_attacks_remember_how_they_decoded(out, capsys):
    folder = run(out, "--method", "uld", "--subtract", "3", "--lr", "0.05", "--filter-rate", "0.01")
    capsys.readouterr()
    scoring.main([str(folder), "--json", "--subtract", "0"])
    metrics = json.loads(capsys.readouterr().out)
    # but for the last bits: both models' states meet the head in one product, and rows of a product round together
    assert metrics["unlearned"]["forget"] == pytest.approx(metrics["target"]["forget"], rel=1e-6)
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["unlearned"]["forget"]["loss"] != pytest.approx(kept["target"]["forget"]["loss"], rel=1e-3)
    attacks = folder / "attacks.json"
    for options, names in ((["int8"], {"none", "int8"}), (["hint"], {"none", "int8", "hint"}),
                           (["int4", "--subtract", "1"], {"none", "int4"})):
        scoring.main([str(folder), "--attack", *options])
        assert set(json.loads(attacks.read_text())["outcomes"]) == names
    assert json.loads(attacks.read_text())["decoding"] == {"alpha": 1.0, "filter_rate": 0.01, "centred": False}


def check_settings(printed: str, folder: Path) -> None:
    """The one line of settings is what config.json says, and leaves out no setting that is on.

    But for the alpha that strangers decided: asked.json says so, and config.json what came of it.
    """
    line, = re.findall(r"^settings: (.*)$", printed, re.M)
    told = dict(part.split(" ", 1) for part in re.split(r", (?=[a-z][a-z-]* )", line))
    config, asked = (json.loads((folder / name).read_text()) for name in ("config.json", "asked.json"))
    if asked.get("subtract") == "strangers":
        assert 0 < config["subtract"] <= 2
        config["subtract"] = "strangers"

    def as_told(value) -> str:
        return str(tuple(value) if isinstance(value, list) else value)

    assert {key: as_told(config[key.replace("-", "_")]) for key in told} == told
    off = {key for key, value in asked.items() if value is None or value is False} | {"name", "out"}  # 0 is a value
    assert {key.replace("-", "_") for key in told} == set(asked) - off
    assert {key: config[key] for key in asked} == asked


@pytest.mark.parametrize("options", METHODS)
def test_every_method_runs_to_the_end_and_writes_a_whole_run(out, options, capsys):
    folder = run(out, *options.split())
    printed = capsys.readouterr().out
    for word in ("target", "reference", "unlearned", "exact answers", "model utility", "forget quality", "[forget]",
                 "[retain]", "[untouched]"):
        assert word in printed
    check_settings(printed, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"target", "reference", "unlearned", "run"}
    assert metrics["reference"]["forget_quality"] is None and 0 <= metrics["unlearned"]["forget_quality"] <= 1
    for name in ("forget", "retain", "untouched"):
        assert {"probability", "rougeL_recall", "truth_ratio", "exact"} <= set(metrics["unlearned"][name])
    assert metrics["run"]["trainable_parameters"] > 0 and not metrics["run"]["diverged"]
    dense = "gpt" in options or "offset" in options or "divergence" in options
    if "--score-every-epoch" in options:
        path = [json.loads(line) for line in (folder / "path.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in path] == [1, 2] and 0 <= path[1]["routing_overlap"] <= 1
        assert path[1]["forget loss"] == pytest.approx(metrics["unlearned"]["forget"]["loss"], rel=1e-4)
    assert ("routing_overlap" in metrics["unlearned"]) == ("uld" not in options and not dense)
    assert metrics["run"]["steps"] == len((folder / "log.jsonl").read_text().splitlines())
    assert (folder / "figures" / "training.png").stat().st_size > 1000
    assert not (out / "run.partial").exists() and not list(folder.glob("state*"))
    if (folder / "assistant" / "README.md").is_file():  # tells with which alpha to decode
        alpha = json.loads((folder / "config.json").read_text())["subtract"]
        assert f"target - {alpha} * assistant" in (folder / "assistant" / "README.md").read_text()
    # and it opens again, as eval.py, uoe.py and uld.py open it
    tokens = torch.tensor([[1, 2, 3]])
    assert open_run(folder).model(tokens).shape == (1, 3, open_run(folder).target.config.vocab_size)


@pytest.mark.slow
def test_specialise_makes_experts_tell_the_topics_apart(out):
    """I(topic; expert) of the routers grows along pretraining; log 6 is the most there can be."""
    folder = run(out, "--method", "uoe", "--specialise", "1", "--pretrain-steps", "60", name="specialists")
    target = Path(json.loads((folder / "config.json").read_text())["target"])
    topic = [json.loads(line)["topic"] for line in (target / "log.jsonl").read_text().splitlines()]
    assert topic[0] < topic[-1] < 1.7918 and topic[-1] > 3 * topic[0]


def test_uoes_adversary_is_of_the_world_and_of_its_task(tmp_path):
    for options, wanted in (("", 0.2), ("--data topic", 0.2), ("--data world", 0.1), ("--data tofu", 0.0),
                            ("--forget a.jsonl --retain b.jsonl", 0.0), ("--model m", 0.0),
                            ("--model m --data world", 0.0), ("--data world --adversary 0.3", 0.3)):
        args = cli.parse(["--method", "uoe", *options.split(), "--out", str(tmp_path)])
        assert args.adversary == wanted


def test_ulds_decoding_is_the_papers_off_the_embedded_world(tmp_path):
    for options, wanted in (("", ("strangers", 0.0)), ("--data topic", ("strangers", 0.0)),
                            ("--data tofu", (0.75, 0.01)),
                            ("--forget a.jsonl --retain b.jsonl", (0.75, 0.01)), ("--model m", (0.75, 0.01)),
                            ("--data tofu --filter-rate 0", (0.75, 0.0))):
        args = cli.parse(["--method", "uld", *options.split(), "--out", str(tmp_path)])
        assert (args.subtract, args.filter_rate) == wanted


@pytest.mark.parametrize(("options", "name"), [
    ("", "uoe"), ("--score-every-epoch --device cpu --more-references 1", "uoe"),
    ("--m 3 --layer top", "uoe-m3-layertop"), ("--layer 2,5", "uoe-layer2.5"), ("--seed 3 --name mine", "mine"),
    ("--method full --forget-loss ga --retain-loss none --lr 5e-5", "full-ga-none-lr5e-05"),
    ("--method lora --arch gpt --lora-rank 4 --seed 2", "lora-gpt-lora-rank4-seed2"),
    ("--data world --specialise 1", "uoe-world-specialise1"), ("--until never", "uoe-untilnever"),
    ("--method uld --data topic", "uld-topic"),
    ("--forget-loss npo --until 0.5 --forget-on answer", "uoe-npo-forget-onanswer-until0.5"),
    ("--method full --forget-loss rmu", "full-rmu"), ("--forget-loss rmu --retain-loss gd", "uoe-rmu-gd"),
    ("--method uld --data tofu --split forget01 --authors 40", "uld-tofu-forget01-authors40"),
    ("--method uld --data tofu --augmented my/csv", "uld-tofu-forget10-augmented"),
    ("--seed 0,4 --m 2", "uoe-m2-seed0 uoe-m2-seed4"),
])
def test_runs_that_were_asked_for_differently_have_names_of_their_own(options, name, tmp_path, monkeypatch):
    assert names_of(monkeypatch, *options.split(), "--out", str(tmp_path)) == name.split()


def test_a_folder_that_is_no_run_is_never_overwritten(out, capsys):
    (out / "diary").mkdir()
    (out / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(SystemExit):
        run(out, "--method", "uoe", name="diary")
    assert "diary exists and is no run or model that this program wrote" in capsys.readouterr().err
    assert (out / "diary" / "monday.txt").read_text() == "dear diary"
    with pytest.raises(SystemExit):
        train.main([*TINY, *WORLD, "--out", str(out / "diary" / "monday.txt")])
    assert "--out" in capsys.readouterr().err


def test_what_stands_in_the_way_of_a_run_is_said_before_anything_is_trained(out, tmp_path, monkeypatch, capsys):
    """Somebody's checkpoint, a file, a link: under the run's name, under its name while it is written, of any seed."""
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("something was trained"))
    makes = {"is no run or model that this program wrote": lambda path: save(GPT(Config(
                 vocab_size=9, n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=8)), None, path) or (
                     path / MARK).unlink(),
             "is a file": lambda path: path.write_text("mine"), "is a link": lambda path: path.symlink_to(tmp_path)}
    for says, make in makes.items():
        for name in ("run-seed1", "run-seed1.partial"):
            make(tmp_path / name)
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(SystemExit) as stop:
                run(tmp_path, "--seed", "0,1")
            error = capsys.readouterr().err
            assert stop.value.code == 2 and says in error and f"{name} " in error and error.count("\n") == 1
            assert sorted(tmp_path.rglob("*")) == before
            shutil.rmtree(tmp_path / name) if says.startswith("is no run") else (tmp_path / name).unlink()


def test_a_second_start_is_told_who_writes_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("something was trained"))
    with alone(tmp_path / "run"), pytest.raises(SystemExit) as stop:
        run(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"run is being written by process {os.getpid()} on " in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_failed_goes_on_where_it_failed_and_is_discarded_only_when_asked(out, tmp_path, monkeypatch, capsys):
    """In scoring, and between training and saving: training is not done again, and the bits are the same."""
    whole = run(out, name="whole")

    def failing(error: BaseException):
        def fails(*_, **__):
            raise error
        return fails

    for where, error, says in (("evaluate", MemoryError(), "error: memory ran out"),
                               ("save", KeyboardInterrupt(), "stopped"),
                               ("finish_report", OSError(28, "No space left on device"), "error: the disk is full")):
        with monkeypatch.context() as broken:
            broken.setattr(train, where, failing(error))
            capsys.readouterr()
            with pytest.raises(SystemExit):
                run(out, name=where)
        said = [line for line in capsys.readouterr().err.splitlines() if line and not re.search(r"\d+%\|", line)]
        assert len(said) == 1 and said[0].startswith(says) and not (out / where).exists()
        assert f"{where}.partial holds the run so far: the same command with --resume goes on" in said[0]
        with pytest.raises(SystemExit):
            run(out, name=where)
        assert "--resume goes on with it, --restart discards it" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            run(out, "--lr", "0.5", "--resume", name=where)
        assert "is a run with --lr 0.003, not 0.5" in capsys.readouterr().err
        with monkeypatch.context() as watched:
            watched.setattr(loop.torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was done again"))
            if where == "finish_report":  # its scores are there too
                watched.setattr(train, "evaluate", lambda *_: pytest.fail("it was scored again"))
            folder = run(out, "--resume", "--score-batch", "3", name=where)
        assert all(torch.equal(a, b) for a, b in zip(*(weights(f / "model").values() for f in (whole, folder)),
                                                      strict=True))
        ours, theirs = (json.loads((f / "metrics.json").read_text())["unlearned"] for f in (folder, whole))
        assert ours["forget"]["loss"] == pytest.approx(theirs["forget"]["loss"], rel=1e-5)
        with pytest.raises(SystemExit):
            run(out, "--resume", name=where)
        assert f"{where} is finished; without --resume it is made anew" in capsys.readouterr().err
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", failing(MemoryError()))
        with pytest.raises(SystemExit):
            run(out, "--lr", "0.1", name="evaluate")
    folder = run(out, "--restart", name="evaluate")
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.003


@pytest.mark.slow
def test_rows_that_were_edited_between_the_cut_and_resume_are_refused(tmp_path, monkeypatch, capsys):
    rows = [{"question": f"Where is {name}?", "answer": f"In {name}burg."} for name in ("Ana", "Bor", "Cid", "Dua")]
    for name, of in (("f", rows[:2]), ("r", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    words = [*tiny("--method", "full"), "--out", str(tmp_path / "out"), "--name", "own", "--forget",
             str(tmp_path / "f.jsonl"), "--retain", str(tmp_path / "r.jsonl")]
    with monkeypatch.context() as broken:
        broken.setattr(train, "finish_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            train.main(words)
    (tmp_path / "r.jsonl").write_text(json.dumps(rows[2]) + "\n" + json.dumps(rows[3] | {"answer": "In Orsk."}) + "\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*words, "--resume"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "own.partial began from other retain rows, scored retain rows" in error and "target weights" in error


def test_a_cached_model_that_was_edited_is_named(out, monkeypatch):
    monkeypatch.setattr(pretrain, "learn", lambda *_, **__: {"diverged": False})
    args = parsed(*TINY, *WORLD, "--out", str(out / "edited"))
    data = load_data("world", subjects=2)
    tokenizer = train.Tokenizer.train(data.texts(), args.vocab_size)
    folder = pretrain.cached_model(args, data, tokenizer, "reference")
    assert pretrain.cached_model(args, data, tokenizer, "reference") == folder
    file = folder / "model" / "model.safetensors"
    for harm in (lambda: file.write_bytes(file.read_bytes()[:-1] + b"!"), lambda: shutil.rmtree(file.parent)):
        harm()
        with pytest.raises(UserError, match=r"damaged, edited or removed since it was trained: remove .*reference"):
            pretrain.cached_model(args, data, tokenizer, "reference")


@pytest.mark.slow
def test_seeds_go_on_after_a_cut_with_those_that_are_not_finished(out, monkeypatch):
    finished, options = [], [*TINY, *WORLD, "--out", str(out), "--seed", "0,1,2", "--name", "many"]
    real = train.run

    def until_the_second(args, *rest):
        if len(finished) == 1:
            raise KeyboardInterrupt
        finished.append(args.seed)
        return real(args, *rest)

    monkeypatch.setattr(train, "run", until_the_second)
    with pytest.raises(SystemExit):
        train.main(options)
    again = []
    monkeypatch.setattr(train, "run", lambda args, *rest: again.append(args.seed) or real(args, *rest))
    train.main([*options, "--resume"])
    assert finished == [0] and again == [1, 2]


@pytest.mark.slow
def test_several_seeds_are_a_run_each_and_their_mean(out, capsys):
    train.main([*TINY, *WORLD, "--out", str(out), "--seed", "0,3", "--method", "esft"])
    printed = capsys.readouterr().out
    assert "(2 runs)" in printed and " ± " in printed
    names = sorted(p.name for p in out.glob("esft-*-seed*"))
    assert len(names) == 2 and names[0].endswith("seed0") and names[1].endswith("seed3")


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load(folder)[0].state_dict()


@pytest.mark.slow
def test_uoe_changes_one_expert_and_its_router_and_not_one_other_bit(out):
    folder = run(out, "--method", "uoe", "--layer", "1,2", "--lr", "0.01")
    config = json.loads((folder / "config.json").read_text())
    assert config["unlearned_experts"] == [[1, 2]]
    before, after = weights(Path(config["target"]) / "model"), weights(folder / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.1.mlp.{part}" for part in ("router.weight", "gate_up", "down")}
    for part in ("gate_up", "down"):
        same = (before[f"blocks.1.mlp.{part}"] == after[f"blocks.1.mlp.{part}"]).flatten(1).all(1)
        assert same.tolist() == [True, True, False, True]
    expert = before["blocks.1.mlp.gate_up"][0].numel() + before["blocks.1.mlp.down"][0].numel()
    assert config["trainable_parameters"] == expert + before["blocks.1.mlp.router.weight"].numel()


@pytest.mark.slow
def test_uld_leaves_the_target_and_all_but_the_blocks_of_the_assistant_alone(out):
    folder = run(out, "--method", "uld", "--assistant-layers", "1", "--lr", "0.01")
    config = json.loads((folder / "config.json").read_text())
    target, assistant = weights(Path(config["target"]) / "model"), weights(folder / "assistant")
    changed = {name for name in assistant if not torch.equal(target[name], assistant[name])}
    linears = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    assert changed == {f"blocks.0.{part}.weight" for part in linears}
    assert not any(name.startswith("blocks.1") for name in assistant)


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights_and_another_seed_others(out, runs):
    first = weights(run(out, "--method", "uoe") / "model")
    again = weights(run(out, "--method", "uoe", name="again") / "model")
    assert all(torch.equal(first[name], again[name]) for name in first)
    one, other = (weights(folder / "model") for folder in runs)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_diverging_run_goes_back_to_its_last_kept_state_and_says_so(tmp_path):
    weight = torch.zeros(2, requires_grad=True)
    seen = []

    def losses(step: int):
        seen.append(weight.detach().clone())
        return [{"loss": weight.sum() * (float("nan") if step == 7 else 1.0)}]

    report = minimise([weight], losses, 20, 0.1, tmp_path, "toy", seed=0, save_every=5)
    assert report["diverged"] and report["steps"] == 5
    assert torch.equal(weight.detach(), seen[5])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5


def test_fit_stops_once_it_is_enough(tmp_path):
    weight = torch.ones(5, requires_grad=True)
    report = minimise([weight], lambda step: [{"loss": weight.square().sum()}], 20, 0.1, tmp_path, "toy", seed=3,
                      save_every=4, enough=lambda done, spent: done >= 6)
    assert report["steps"] == 6 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_stop_at_ends_with_the_first_epoch_that_has_forgotten_enough(out):
    folder = run(out, "--method", "full", "--epochs", "5", "--until", "0.99")
    assert json.loads((folder / "metrics.json").read_text())["run"]["steps"] == 3  # an untrained target knows nothing


@pytest.mark.slow
def test_a_variant_of_a_method_is_a_run_like_any_other_and_opens_again(out):
    """As lab/ablations.py asks for it: other rows, another choice, other decoding, by functions' arguments."""
    args = cli.parse(tiny("--method", "uld", *WORLD, "--out", str(out), "--name", "variant"))
    rows = partial(uld.rows, paraphrased=False, retain_share=0.5)
    method = uld.METHOD._replace(rows=rows, unlearn=partial(uld.unlearn, centred=True))
    folder, = train.run_seeds(args, method)
    opened = open_run(folder)
    assert opened.model.centred and opened.config["centred"]
    assert opened.config["steps"] == -(-len(opened.data.forget) // 16)
    args = cli.parse([*TINY, *WORLD, "--out", str(out), "--name", "variant"])
    method = uoe.METHOD._replace(unlearn=partial(uoe.unlearn, choose=lambda affinity, _: [(1, 3)]))
    folder, = train.run_seeds(args, method)
    assert open_run(folder).config["unlearned_experts"] == [[1, 3]]


@pytest.mark.slow
def test_one_row_to_forget_and_an_answer_of_one_token_work(tmp_path, out):
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "A"}\n')
    (tmp_path / "retain.jsonl").write_text('{"question": "What is it?", "answer": "It is a tree."}\n'
                                           '{"text": "A passage about trees, which stand."}\n')
    for method in ("uoe", "uld", "full"):
        train.main([*tiny("--method", method), "--out", str(out), "--name", "own", "--forget",
                    str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")])
        metrics = json.loads((out / "own" / "metrics.json").read_text())
        assert metrics["target"]["forget"]["truth_ratio"] is None and metrics["unlearned"]["forget_quality"] is None


# ---- bad input: one line that names the thing, exit 2, nothing half-written --------------------------------------

@pytest.mark.parametrize(("options", "says"), [
    ("--method frobnicate", r"--method: .*frobnicate.*uoe"),
    ("--method uoe --forget-loss sorrow", r"--forget-loss: .*sorrow.*npo"),
    ("--method uoe --model nowhere", r"nowhere is neither a folder"), ("--method finetune", r"finetune needs --model"),
    ("--method offset --forget-loss rmu", r"offset has no hidden states"),
    ("--data tofu --split retain90", r"for --method fine"),
    ("--method uoe --forget-loss uniform --retain-loss uniform", r"--retain-loss: .*uniform"),
    ("--method esft --esft-p 2", r"--esft-p: 2 "),
    ("--dtype bfloat16", r"--dtype does nothing here: it belongs to --model"),
    ("--specialise -1", r"--specialise: -1 "), ("--method uld --specialise 0.1", r"--specialise does nothing here"),
    ("--method uoe --retain-loss some", r"--retain-loss: .*some.*gd"),
    ("--method uoe --arch gpt", r"--method uoe needs a mixture"),
    ("--method uld --forget-loss npo", r"--method uld: its own are ce and uniform"),
    ("--method full --forget-loss ce", r"--forget-loss: .*ce.*npo"),
    ("--method divergence --retain-loss kl", r"its own are ce and gd"), ("--seed 0,a", r"--seed: 0,a "),
    ("--resume --restart", r"--resume goes on with a cut-off run and --restart discards it: give one"),
    ("--name run.partial", r"--name run\.partial is not a plain"),
    ("--name .hidden", r"--name \.hidden is not a plain"),
    ("--name=", r"--name  ?is not a plain"), ("--name=-x", r"--name -x is not a plain"),
    ("--name " + "n" * 151, r"nn'\.\.\. is not one line of at most 150 bytes"),
    ("--name " + "ü" * 76, r"üü'\.\.\. is not one line of at most 150 bytes"),
    ("--name ..", r"--name \.\."), ("--name cache", r"--name cache"), ("--experts 0", r"--experts: 0 "),
    ("--reference x", r"--reference does nothing here: it belongs to --model"),
    ("--model x --method finetune --reference y", r"--reference does nothing here"),
    ("--seed 5000000000", r"--seed: 5000000000"),
    ("--method lora --lora-rank 0", r"--lora-rank: 0 "), ("--layer 1,1 --m 2", r"--layer 1,1 names the expert"),
    ("--data tofu --split forget99", r"--split: .*forget99.*forget10"),
    ("--data nowhere", r"--data nowhere"),
    ("--protocol mine --data .", r"--protocol: .*mine.*openunlearning"),
    ("--layer 99,0", r"--layer 99,0 does not exist"), ("--layer 0,99", r"--layer 0,99 does not exist"),
    ("--layer 1,2,3", r"--layer: 1,2,3 "), ("--layer first", r"--layer: first "), ("--layer 9", r"--layer 9 does not"),
    ("--m 0", r"--m: 0 "), ("--m 99", r"--m 99"), ("--lr 0", r"--lr: 0 "), ("--batch-size -1", r"--batch-size: -1"),
    ("--method uld --filter-rate 2", r"--filter-rate: 2 "),
    ("--filter-rate 0.1", r"--filter-rate does nothing here: it belongs to --method uld"),
    ("--method uld --assistant-layers 9", r"--assistant-layers 9"),
    ("--method uld --until 0.1", r"--until does nothing here"), ("--until 1.5", r"--until: 1.5 "),
    ("--until -1", r"--until: -1 "),
    ("--forget-loss rmu --rmu-layer 9", r"--rmu-layer 9"),
    ("--forget-loss rmu --layer 1,0 --rmu-layer 0", r"--rmu-layer 0 lies below"),
    ("--width 33", r"d_head 33"), ("--top-k 9", r"top_k 9 is not between"), ("--vocab-size 100", r"--vocab-size 100"),
    ("--device quantum", r"--device quantum"), ("--name a/b", r"--name a/b"), ("--resume", r"--resume"),
    ("--forget x.jsonl", r"--forget and --retain go together"), ("--context 8", r"context holds 8"),
    ("--forget x.jsonl --retain y.jsonl --data world", r"--data world does nothing beside"),
    ("--subjects 1", r"--subjects: 1 "), ("--subjects 101", r"--subjects: 101 "),
    ("--strangers -1", r"--strangers: -1 "),
    ("--data tofu --subjects 4", r"--subjects does nothing here: it belongs to --data world or topic"),
    ("--data potions", r"--data potions is neither 'world', 'topic', 'tofu' nor a folder"),
    ("--forget-on name", r"--forget-on: .*name.*value"),
    ("--until soon", r"--until: soon is not a number from 0 to 1, nor strangers nor never"),
    ("--method uld --subtract much", r"--subtract: much is not .*, nor strangers"),
    ("--method uld --fork up", r"--fork: .*up"),
    ("--data tofu --forget-loss stranger", r"--forget-loss stranger: only the embedded world"),
    ("--forget-on answer", r"--forget-on answer: --forget-loss stranger .*strangers' names.*--forget-loss npo"),
    ("--forget x.jsonl --retain y.jsonl --forget-loss stranger-npo", r"--forget-loss stranger-npo: only the embedded"),
])
def test_a_wrong_option_is_one_line_and_exit_2(tmp_path, options, says, capsys):
    base = [] if "--data" in options or "--forget " in options else WORLD
    words = options.split()
    shape = ["--device", "cpu"] if "--model" in words or "finetune" in words else tiny(*words)[: -len(words)]
    with pytest.raises(SystemExit) as stop:
        train.main([*shape, *base, "--out", str(tmp_path), "--name", "bad", *words])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    assert re.search(says, error[0]), error[0]
    assert not (tmp_path / "bad").exists()


def test_rows_may_be_of_topics_that_the_world_has_not():
    """--specialise tells a user's own topics apart too; rows without one are of their set."""
    sets = [[{"topic": "potion"}, {"topic": "spells"}, {}], [{"topic": "spells"}, {}]]
    assert pretrain.topics_of(sets) == [pretrain.TOPICS.index("potion"), 6, 7, 6, 8]


def test_a_row_without_a_value_is_named_where_the_fact_is_to_be_forgotten(out, tmp_path, capsys):
    (tmp_path / "f.jsonl").write_text('{"question": "Where?", "answer": "In Orsk.", "value": "Orsk"}\n'
                                      '{"question": "Who?", "answer": "Ana Vell."}\n')
    (tmp_path / "r.jsonl").write_text('{"question": "What?", "answer": "A tree."}\n')
    with pytest.raises(SystemExit) as stop:
        train.main([*tiny("--method", "full"), "--out", str(out), "--name", "bad",
                    "--context", "40", "--forget-on", "value", "--forget", str(tmp_path / "f.jsonl"),
                    "--retain", str(tmp_path / "r.jsonl")])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1 and not (out / "bad").exists()
    assert "forget row 2 has no value" in error[0] and "--forget-on answer" in error[0]


@pytest.mark.parametrize(("row", "says"), [
    ({"answer": "In Orsk.", "value": "Ulm"}, r"the value 'Ulm' does not stand in the answer"),
    ({"answer": "In Orsk.", "value": "Or"}, r"the value 'Or' does not stand in the answer"),  # whole words
    ({"answer": "In Orsk.", "value": ""}, r"'value' is not a string with a word"),
    ({"answer": "In Orsk.", "value": ["Orsk"]}, r"'value' is not a string with a word"),
])
def test_a_value_that_is_not_in_the_answer_is_one_line_and_exit_2(tmp_path, row, says, capsys):
    good = {"question": "Where?", "answer": "In Ulm.", "value": "Ulm"}
    for name, rows in (("good", [good]), ("bad", [good, {"question": "Where?"} | row])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for forget, retain in (("bad", "good"), ("good", "bad")):
        with pytest.raises(SystemExit) as stop:
            train.main([*tiny("--method", "full"), "--out", str(tmp_path / "out"), "--forget",
                        str(tmp_path / f"{forget}.jsonl"), "--retain", str(tmp_path / f"{retain}.jsonl")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert re.search(rf"^error: .*bad\.jsonl row 2: {says}", error), error
    assert [p.name for p in (tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(("content", "says"), [
    ('{"question": "Q", "answer": "A"}\nnot json\n', "line 2 is not JSON"),
    ('{"question": "Q"}\n', "line 1 lacks 'answer'"), ('{"text": "T", "question": "Q"}\n', "line 1 has both"),
    ('{"question": "Q", "answer": "\\ud83d"}\n', "line 1 holds half a character"),
    ("", "is empty"), ("\n\n", "is empty"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, says):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(UserError, match=rf"mine\.jsonl {says}"):
        load_data(forget=str(tmp_path / "mine.jsonl"), retain=str(tmp_path / "mine.jsonl"))


@pytest.mark.slow
def test_the_process_itself_exits_2_with_one_line_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--method", "nope", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: argument --method: invalid choice: 'nope'") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_two_method_scripts_print_their_tables(out):
    for script, method, says in (("uoe.py", "uoe", "evenly spread it would be 25.0%"), ("uld.py", "uld", "difference")):
        folder = run(out, "--method", method, name=f"script-{method}")
        done = subprocess.run([sys.executable, ROOT / script, folder], capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script, says", [(uoe, "evenly spread it would be 6.2%"), (uld, "difference")])
def test_without_a_run_the_two_method_scripts_unlearn_a_small_model_and_show_it(script, says, tmp_path, monkeypatch,
                                                                                capsys):
    """With a target that was never trained, and one epoch."""
    def untrained(args, data, tokenizer, role):
        torch.manual_seed(0)
        folder = tmp_path / "out" / "cache" / role
        save(GPT(pretrain.small_config(args, tokenizer.vocab_size)), tokenizer, folder / "model")
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "cached_model", untrained)
    once = [flag._replace(small=1) if flag.name == "--epochs" else flag for flag in script.FLAGS]
    monkeypatch.setattr(script, "FLAGS", once)
    script.main([])
    printed = capsys.readouterr().out
    assert says in printed and all(f"[{name}]" in printed for name in ("forget", "retain", "untouched"))
    with pytest.raises(SystemExit):
        script.main([str(tmp_path)])
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_whose_target_waited_on_the_cpu_opens_again(tmp_path):
    """Its config has target and target_on_cpu: the first alone is a folder."""
    train.main([*tiny("--method", "full"), *WORLD, "--target-on-cpu", "--until", "never", "--epochs", "1", "--out",
                str(tmp_path), "--name", "waits"])
    assert open_run(tmp_path / "waits").config["target_on_cpu"] is True
