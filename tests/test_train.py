"""Every method end to end on a tiny world, the promises of the loop, and what bad input prints."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from unlearn import rows_of

import eval as scoring
import train
from data import DataSet, load_data
from data.authors import make_world, write_world
from data.batches import encode_rows
from errors import UserError
from pretrained import load
from runs import open_run
from uld import first_layers

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--layers 2 --width 16 --heads 2 --ff 16 --experts 4 --top-k 2 --vocab-size 320 --context 128 "
        "--pretrain-epochs 1 --pretrain-batch-size 64 --epochs 1 --batch-size 16 --device cpu").split()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A world of 4 authors, one of them to be forgotten, cut down to a few rows per set."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, {name: rows[:24] for name, rows in make_world(0, authors=4, countries=8).items()})
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Shared by the module, so that target and reference of a kind are trained once."""
    return tmp_path_factory.mktemp("out")


def run(world: Path, out: Path, *options: str, name: str = "run") -> Path:
    train.main([*TINY, "--data", str(world), "--out", str(out), "--name", name, *options])
    return out / name


METHODS = ["--method uoe", "--method uoe --forget-loss ga --retain-loss none", "--method uoe --forget-loss rmu",
           "--method uoe --forget-loss ga --retain-loss kl --m 3", "--method uoe --m 2 --same-layer --freeze-router",
           "--method uoe --layer all",
           "--method uoe --select random --attribution-tokens 50", "--method uoe --expert 1,2 --forget-loss npo",
           "--method uld", "--method uld --arch moe", "--method full --forget-loss ga --retain-loss none",
           "--method full --forget-loss ga", "--method full", "--method full --forget-loss rmu --arch gpt",
           "--method full --arch gpt --retain-loss kl --checkpointing", "--method lora", "--method lora --arch gpt",
           "--method lora --lora-targets attn --forget-loss simnpo", "--method esft --forget-loss di --retain-loss kl",
           "--method offset", "--method offset --arch moe --forget-loss ga --retain-loss kl",
           "--method uoe --forget-loss dpo", "--method full --forget-loss uniform", "--method uoe --affinity-rank 3",
           "--method divergence", "--method full --repair-routers", "--method uoe --balance-retain",
           "--method full --retain-loss hidden",
           "--method uoe --path --epochs 2 --stop-at -1",
           "--method uld --no-paraphrased --uld-retain 0.5", "--method uld --no-perturbed",
           "--method uld --stray-perturbed 2 --uniform-on all", "--method uld --centre",
           "--method uoe --specialise 0.1"]


def test_two_processes_that_need_the_same_model_train_it_once(world, out, monkeypatch):
    """Both ask at once; the second waits for the first and takes what it left."""
    args = train.parse([*TINY, "--data", str(world), "--out", str(out / "both")])
    data, trained = load_data(str(world)), []
    tokenizer = train.Tokenizer.train(data.texts(), args.vocab_size)

    def learn(*_, **__):
        time.sleep(0.3)
        trained.append(1)
        return {"diverged": False}

    monkeypatch.setattr(train, "learn", learn)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: train.cached_model(args, data, tokenizer, "target"), range(2)))
    assert folders[0] == folders[1] and (folders[0] / "model").is_dir() and trained == [1]


def test_splits_of_one_data_set_share_their_target_unless_pretraining_knew_the_split(out, monkeypatch):
    monkeypatch.setattr(train, "learn", lambda *_, **__: {"diverged": False})
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]
    splits = [DataSet(name, forget=rows[cut:], retain=rows[:cut]) for name, cut in (("a", 4), ("b", 2))]
    splits.append(DataSet("c", forget=[rows[4], rows[5] | {"perturbed_answer": ["w"]}], retain=rows[:4]))
    tokenizer = train.Tokenizer.train(splits[0].texts(), 300)

    def folders(role: str, *options: str) -> list[Path]:
        args = train.parse([*TINY, "--out", str(out / "splits"), "--vocab-size", "300", *options])
        return [train.cached_model(args, data, tokenizer, role) for data in splits]

    assert len(set(folders("target"))) == 1
    a, b, c = folders("reference")
    assert a == c != b
    a, b, c = folders("target", "--specialise", "1")
    assert a == c != b and a not in folders("target")


def test_a_run_is_not_replaced_by_one_that_comes_to_the_same_name(world, out, tmp_path, capsys):
    """Two files of one stem; the same run made anew, or one that was given the name, may take its place."""
    lines = '{"question": "Who?", "answer": "Ana."}\n{"question": "Where?", "answer": "In Orsk."}\n'
    for name in ("a/x.jsonl", "b/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(lines)
    first, second = ([*TINY, "--method", "full", "--out", str(tmp_path / "out"), "--forget", str(tmp_path / of),
                      "--retain", str(tmp_path / "a/x.jsonl")] for of in ("a/x.jsonl", "b/x.jsonl"))
    train.main(first)
    train.main([*first, "--path"])
    folder, = (p for p in (tmp_path / "out").iterdir() if p.name != "cache")
    before = (folder / "config.json").read_text()
    with pytest.raises(SystemExit) as stop:
        train.main(second)
    assert stop.value.code == 2 and "is a run with --forget" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == before
    train.main([*second, "--name", folder.name])
    assert (folder / "config.json").read_text() != before


def test_a_reference_has_a_name_of_its_own():
    base = ["--method", "finetune", "--model", "x/m", "--forget", "f", "--retain", "r"]
    names = {train.parse([*base, *more]).name for more in ([], ["--split", "retain90"])}
    assert names == {"finetune-m-f", "finetune-m-f-without10"}
    long = train.parse([*TINY, "--data", "x" * 120, *("--width 32 --lora-rank 4 --npo-beta 0.5 --simnpo-beta 3 "
                                                       "--dpo-beta 0.2 --seed 3").split()])
    assert len(long.name) < 170 and long.name.endswith("-seed3")


def test_seeds_that_were_cut_off_go_on_as_they_were_asked_for(world, out, capsys):
    options = ["--method", "full", "--seeds", "0,1", "--name", "cut"]
    run(world, out, *options, name="cut")
    before = (out / "cut-seed0" / "config.json").stat().st_mtime_ns
    run(world, out, *options, "--resume", name="cut")
    assert (out / "cut-seed0" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run(world, out, *options, "--resume", "--lr", "0.5", name="cut")
    assert "cut-seed0 is a run with --lr 0.0001, not 0.5" in capsys.readouterr().err


def test_every_expert_that_rmu_is_to_train_is_trained(world, out):
    """The state that is steered lies above all of them."""
    folder = run(world, out, "--method", "esft", "--forget-loss", "rmu", "--esft-p", "0.3")
    opened = open_run(folder)
    places = opened.config["unlearned_experts"]
    assert {layer for layer, _ in places} == {0, 1}
    for layer, expert in places:
        before, after = (m.moe(layer).expert_weights()[0][expert] for m in (opened.target, opened.model))
        assert not torch.equal(before, after)


def test_diverging_before_the_first_epoch_is_over_leaves_the_target(world, out):
    folder = run(world, out, *"--method full --forget-loss ga --retain-loss none --lr 1e30 --path --stop-at -1".split(),
                 "--batch-size", "2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["run"]["diverged"] and metrics["run"]["steps"] == 0
    assert metrics["unlearned"]["forget"] == metrics["target"]["forget"]


def test_an_alpha_of_nothing_is_the_target_and_attacks_remember_how_they_decoded(world, out, capsys):
    folder = run(world, out, "--method", "uld", "--subtract", "3", "--lr", "0.05")
    capsys.readouterr()
    scoring.main([str(folder), "--json", "--subtract", "0"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["unlearned"]["forget"] == metrics["target"]["forget"]
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["unlearned"]["forget"]["loss"] != pytest.approx(kept["target"]["forget"]["loss"], rel=1e-3)
    attacks = folder / "attacks.json"
    for options, names in ((["int8"], {"none", "int8"}), (["hint"], {"none", "int8", "hint"}),
                           (["int4", "--subtract", "1"], {"none", "int4"})):
        scoring.main([str(folder), "--attack", *options])
        assert set(json.loads(attacks.read_text())["outcomes"]) == names
    assert json.loads(attacks.read_text())["decoding"] == {"alpha": 1.0, "filter_rate": 0.01, "centred": False}


@pytest.mark.parametrize("options", METHODS)
def test_every_method_runs_to_the_end_and_writes_a_whole_run(world, out, options, capsys):
    folder = run(world, out, *options.split())
    printed = capsys.readouterr().out
    for word in ("target", "reference", "unlearned", "exact answers", "model utility", "forget quality", "[forget]",
                 "[retain]", "[untouched]"):
        assert word in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"target", "reference", "unlearned", "run"}
    assert metrics["reference"]["forget_quality"] is None and 0 <= metrics["unlearned"]["forget_quality"] <= 1
    for name in ("forget", "retain", "untouched"):
        assert {"probability", "rougeL_recall", "truth_ratio", "exact"} <= set(metrics["unlearned"][name])
    assert metrics["run"]["trainable_parameters"] > 0 and not metrics["run"]["diverged"]
    dense = "gpt" in options or "offset" in options or "divergence" in options
    if "--path" in options:
        path = [json.loads(line) for line in (folder / "path.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in path] == [1, 2] and 0 <= path[1]["routing_overlap"] <= 1
        assert path[1]["forget loss"] == pytest.approx(metrics["unlearned"]["forget"]["loss"], rel=1e-4)
    assert ("routing_overlap" in metrics["unlearned"]) == ("uld" not in options and not dense)
    assert metrics["run"]["steps"] == len((folder / "log.jsonl").read_text().splitlines())
    assert (folder / "figures" / "training.png").stat().st_size > 1000
    assert not (out / "run.partial").exists() and not list(folder.glob("state*"))
    # and it opens again, as eval.py, uoe.py and uld.py open it
    tokens = torch.tensor([[1, 2, 3]])
    assert open_run(folder).model(tokens).shape == (1, 3, open_run(folder).target.config.vocab_size)


def test_specialise_makes_experts_tell_the_three_sets_apart(world, out):
    """I(topic; expert) of the routers grows along pretraining; log 3 is the most there can be."""
    folder = run(world, out, "--method", "uoe", "--specialise", "1", "--pretrain-epochs", "6", name="specialists")
    target = Path(json.loads((folder / "config.json").read_text())["target"])
    topic = [json.loads(line)["topic"] for line in (target / "log.jsonl").read_text().splitlines()]
    assert topic[0] < topic[-1] < 1.0987 and topic[-1] > 3 * topic[0]


def test_a_difference_of_logits_can_be_distilled_into_one_model(world, out, capsys):
    teacher = run(world, out, "--method", "uld", name="teacher")
    before = json.loads((teacher / "config.json").read_text())["target"]
    folder = run(world, out, "--method", "distill", "--teacher", str(teacher), "--epochs", "2", name="pupil")
    config, log = (json.loads((folder / "config.json").read_text()), (folder / "log.jsonl").read_text().splitlines())
    assert config["target"] == before
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < losses[0]  # it comes nearer to its teacher
    assert (folder / "model" / "model.safetensors").is_file()
    for options, says in ((["--width", "32"], "was made with --width 16, not 32"),
                          (["--teacher", str(world)], "is not a run folder")):
        with pytest.raises(SystemExit):  # a teacher of another target, and none at all
            run(world, out, "--method", "distill-lora", "--teacher", str(teacher), *options, name="other")
        assert says in capsys.readouterr().err


def test_ulds_decoding_is_the_papers_off_the_embedded_world(tmp_path):
    for options, wanted in (("", (0.7, 0.0)), ("--data topic", (0.7, 0.0)), ("--data tofu", (0.75, 0.01)),
                            ("--forget a.jsonl --retain b.jsonl", (0.75, 0.01)), ("--model m", (0.75, 0.01)),
                            ("--data tofu --filter-rate 0", (0.75, 0.0))):
        args = train.parse(["--method", "uld", *options.split(), "--out", str(tmp_path)])
        assert (args.subtract, args.filter_rate) == wanted


@pytest.mark.parametrize(("options", "name"), [
    ("", "uoe"), ("--path --device cpu --references 2", "uoe"), ("--balance-retain --m 3", "uoe-m3-balance-retain"),
    ("--method full --forget-loss ga --retain-loss none --lr 5e-5", "full-ga-none-lr5e-05"),
    ("--method lora --arch gpt --lora-targets attn --seed 2", "lora-gpt-lora-targetsattn-seed2"),
    ("--data topic --specialise 1", "uoe-topic-specialise1"), ("--expert 2,5", "uoe-expert2,5"),
    ("--method uld --data tofu --split forget01 --authors 40", "uld-tofu-forget01-authors40"),
    ("--method uld --data tofu --augmented my/csv", "uld-tofu-forget10-augmented"),
    ("--method distill --teacher out/uld-k2", "distill-uld-k2"),
])
def test_runs_that_were_asked_for_differently_have_names_of_their_own(options, name, tmp_path):
    assert train.parse([*options.split(), "--out", str(tmp_path)]).name == name


def test_a_folder_that_is_no_run_is_never_overwritten(world, out, capsys):
    (out / "diary").mkdir()
    (out / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(SystemExit):
        run(world, out, "--method", "uoe", name="diary")
    assert "diary exists and is no run" in capsys.readouterr().err
    assert (out / "diary" / "monday.txt").read_text() == "dear diary"
    with pytest.raises(SystemExit):
        train.main([*TINY, "--data", str(world), "--out", str(out / "diary" / "monday.txt")])
    assert "--out" in capsys.readouterr().err


def test_seeds_go_on_after_a_cut_with_those_that_are_not_finished(world, out, monkeypatch):
    finished, options = [], [*TINY, "--data", str(world), "--out", str(out), "--seeds", "0,1,2", "--name", "many"]
    real = train.one

    def until_the_second(args):
        if len(finished) == 1:
            raise KeyboardInterrupt
        finished.append(args.seed)
        return real(args)

    monkeypatch.setattr(train, "one", until_the_second)
    with pytest.raises(SystemExit):
        train.main(options)
    again = []
    monkeypatch.setattr(train, "one", lambda args: again.append(args.seed) or real(args))
    train.main([*options, "--resume"])
    assert finished == [0] and again == [1, 2]


def test_several_seeds_are_a_run_each_and_their_mean(world, out, capsys):
    train.main([*TINY, "--data", str(world), "--out", str(out), "--seeds", "0,3", "--method", "esft"])
    printed = capsys.readouterr().out
    assert "(2 runs)" in printed and " ± " in printed
    names = sorted(p.name for p in out.glob("esft-*-seed*"))
    assert len(names) == 2 and names[0].endswith("seed0") and names[1].endswith("seed3")


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load(folder)[0].state_dict()


def test_uoe_changes_one_expert_and_its_router_and_not_one_other_bit(world, out):
    folder = run(world, out, "--method", "uoe", "--expert", "1,2", "--lr", "0.01")
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


def test_uld_leaves_the_target_and_all_but_the_blocks_of_the_assistant_alone(world, out):
    folder = run(world, out, "--method", "uld", "--assistant-layers", "1", "--lr", "0.01")
    config = json.loads((folder / "config.json").read_text())
    target, assistant = weights(Path(config["target"]) / "model"), weights(folder / "assistant")
    changed = {name for name in assistant if not torch.equal(target[name], assistant[name])}
    linears = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    assert changed == {f"blocks.0.{part}.weight" for part in linears}
    assert not any(name.startswith("blocks.1") for name in assistant)


def test_the_authors_uniform_loss_takes_every_token_and_stray_rows_ask_about_what_is_kept(world, out):
    """At step 0 the LoRA is zero, so the assistant is the target's first layer and its loss can be worked by hand."""
    options = "--method uld --assistant-layers 1 --lora-dropout 0 --stray-perturbed 0.5 --batch-size 500".split()
    data = load_data(str(world))
    first = {}
    for on in ("answer", "all"):
        folder = run(world, out, *options, "--uniform-on", on, name=f"uniform-{on}")
        first[on] = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["retain"]
    opened = open_run(folder)
    args = train.parse([*TINY, *options, "--data", str(world), "--out", str(out)])
    _, rows = rows_of(args, data)
    stray = rows[len(data.forget) + len(data.perturbed) :]
    asked = {row["question"] for row in data.retain}
    assert len(stray) == 2 * round(0.5 * len(data.forget)) and all(row["question"] in asked for row in stray)
    right = {(row["question"], row["answer"]) for row in data.retain}
    assert not any((row["question"], row["answer"]) in right for row in stray)
    assistant = first_layers(opened.target, 1)
    values = {"answer": [], "all": []}
    for example in encode_rows(rows, opened.tokenizer, args.context):
        p = assistant(torch.tensor([example.tokens])).log_softmax(-1)[0]  # (T, V)
        values["all"] += (-p.mean(-1)).tolist()
        values["answer"] += [-float(p[t].mean()) for t, label in enumerate(example.labels) if label >= 0]
    for on, of in values.items():
        assert first[on] == pytest.approx(sum(of) / len(of), rel=1e-4)


def test_the_same_command_gives_the_same_weights_and_another_seed_others(world, out):
    first = weights(run(world, out, "--method", "uoe") / "model")
    again = weights(run(world, out, "--method", "uoe", name="again") / "model")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(run(world, out, "--method", "uoe", "--seed", "1", name="other") / "model")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def fit_toy(folder: Path, steps: int, breaks_at: int | None = None, **options):
    torch.manual_seed(0)
    weight = torch.randn(5, requires_grad=True)

    def losses(step: int):
        if step == breaks_at:
            raise KeyboardInterrupt
        return {"loss": (torch.nn.functional.dropout(weight, 0.5) - step % 3).square().sum()}

    report = train.fit([weight], losses, steps, 0.1, folder, "toy", seed=3, save_every=4, **options)
    return weight.detach(), report


def test_a_killed_run_resumes_to_the_very_same_bits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = fit_toy(tmp_path / "a", 20)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "b", 20, breaks_at=13)
    resumed, report = fit_toy(tmp_path / "b", 20, resume=True)
    assert torch.equal(whole, resumed) and report["steps"] == 20
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()


def test_a_diverging_run_goes_back_to_its_last_kept_state_and_says_so(tmp_path):
    weight = torch.zeros(2, requires_grad=True)
    seen = []

    def losses(step: int):
        seen.append(weight.detach().clone())
        return {"loss": weight.sum() * (float("nan") if step == 7 else 1.0)}

    report = train.fit([weight], losses, 20, 0.1, tmp_path, "toy", seed=0, save_every=5)
    assert report["diverged"] and report["steps"] == 5
    assert torch.equal(weight.detach(), seen[5])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5


def test_fit_stops_once_it_is_enough(tmp_path):
    _, report = fit_toy(tmp_path, 20, enough=lambda done, spent: done >= 6)
    assert report["steps"] == 6 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


def test_stop_at_ends_with_the_first_epoch_that_has_forgotten_enough(world, out):
    folder = run(world, out, "--method", "full", "--epochs", "5", "--stop-at", "0.99")
    assert json.loads((folder / "metrics.json").read_text())["run"]["steps"] == 2  # an untrained target knows nothing


def test_one_row_to_forget_and_an_answer_of_one_token_work(tmp_path, out):
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "A"}\n')
    (tmp_path / "retain.jsonl").write_text('{"question": "What is it?", "answer": "It is a tree."}\n'
                                           '{"text": "A passage about trees, which stand."}\n')
    for method in ("uoe", "uld", "full"):
        train.main([*TINY, "--method", method, "--out", str(out), "--name", "own", "--forget",
                    str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")])
        metrics = json.loads((out / "own" / "metrics.json").read_text())
        assert metrics["target"]["forget"]["truth_ratio"] is None and metrics["unlearned"]["forget_quality"] is None


# ---- bad input: one line that names the thing, exit 2, nothing half-written --------------------------------------

@pytest.mark.parametrize(("options", "says"), [
    ("--method frobnicate", r"--method frobnicate .*uoe"),
    ("--method uoe --forget-loss sorrow", r"--forget-loss sorrow .*npo"),
    ("--method uoe --model nowhere", r"nowhere is neither a folder"), ("--method finetune", r"finetune needs --model"),
    ("--method offset --forget-loss rmu", r"offset has no hidden states"), ("--split retain90", r"for --method fine"),
    ("--method uoe --forget-loss uniform --retain-loss uniform", r"belong to uld"),
    ("--method esft --esft-p 2", r"--esft-p 2"), ("--method lora --lora-targets nose", r"--lora-targets nose"),
    ("--with-shared", r"--with-shared"), ("--affinity-rank 99", r"--affinity-rank 99"),
    ("--dtype bfloat16", r"--dtype bfloat16 is for"),
    ("--method uld --no-perturbed --uld-retain 0", r"no retain rows are left"),
    ("--method full --uniform-on all", r"--stray-perturbed and --uniform-on"),
    ("--method full --centre", r"--centre is about decoding"),
    ("--method uld --stray-perturbed -1", r"--stray-perturbed -1"),
    ("--specialise -1", r"--specialise -1"), ("--method uld --specialise 0.1", r"--specialise is about pretraining"),
    ("--method uoe --retain-loss some", r"--retain-loss some .*gd"),
    ("--method uoe --arch gpt", r"--method uoe needs a mixture"),
    ("--method uld --forget-loss npo", r"--method uld .* its own are ce and uniform"),
    ("--method full --forget-loss ce", r"belong to uld"), ("--method full --forget-loss teacher", r"belong to uld"),
    ("--method distill", r"--teacher RUN and --method distill"), ("--teacher out", r"--teacher RUN and"),
    ("--method divergence --retain-loss kl", r"its own are ce and gd"), ("--seeds 0,a", r"--seeds 0,a"),
    ("--name ..", r"--name \.\."), ("--name cache", r"--name cache"), ("--experts 0", r"--experts 0"),
    ("--reference x", r"--reference is for --model"),
    ("--model x --method finetune --reference y", r"finetune does none"),
    ("--layer 1 --same-layer", r"--same-layer chooses it"), ("--expert 1,1 --layer 0", r"--layer chooses: give one"),
    ("--expert 1,1 --select random", r"--select chooses: give one"), ("--seed 5000000000", r"--seed 5000000000"),
    ("--method lora --lora-rank 0", r"--lora-rank 0"), ("--expert 1,1 --m 2", r"--expert names one"),
    ("--method uld --repair-routers", r"--repair-routers"), ("--method uld --balance-retain", r"--balance-retain"),
    ("--method uoe --forget-loss rmu --balance-retain", r"--balance-retain"),
    ("--data tofu --split forget99", r"--split forget99 .*forget10"),
    ("--data nowhere", r"--data nowhere"),
    ("--protocol mine --data .", r"--protocol mine .*openunlearning"),
    ("--expert 99,0", r"--expert 99,0 does not exist"),
    ("--expert 0,99", r"--expert 0,99 does not exist"),
    ("--expert one", r"--expert one"), ("--layer first", r"--layer first"), ("--layer 9", r"--layer 9 does not"),
    ("--m 0", r"--m 0"), ("--m 99", r"--m 99"), ("--lr 0", r"--lr 0"), ("--batch-size -1", r"--batch-size -1"),
    ("--filter-rate 2", r"--filter-rate 2"), ("--method uld --assistant-layers 9", r"--assistant-layers 9"),
    ("--method uld --stop-at 0.1", r"--stop-at"), ("--stop-at 1.5", r"--stop-at 1.5"),
    ("--forget-loss rmu --rmu-layer 9", r"--rmu-layer 9"),
    ("--forget-loss rmu --expert 1,0 --rmu-layer 0", r"--rmu-layer 0 lies below"),
    ("--width 15", r"d_model 15"), ("--top-k 9", r"top_k 9"), ("--vocab-size 100", r"--vocab-size 100"),
    ("--device quantum", r"--device quantum"), ("--name a/b", r"--name a/b"), ("--resume", r"--resume"),
    ("--forget x.jsonl", r"--forget and --retain go together"), ("--context 8", r"context holds 8"),
])
def test_a_wrong_option_is_one_line_and_exit_2(world, out, options, says, capsys):
    base = [] if "--data" in options or "--forget " in options else ["--data", str(world)]
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *base, "--out", str(out), "--name", "bad", *options.split()])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    import re
    assert re.search(says, error[0]), error[0]
    assert not (out / "bad").exists()


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


def test_the_process_itself_exits_2_with_one_line_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--method", "nope", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --method nope") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_two_method_scripts_print_their_tables(world, out):
    for script, method, says in (("uoe.py", "uoe", "evenly spread it would be 25.0%"), ("uld.py", "uld", "difference")):
        folder = run(world, out, "--method", method, name=f"script-{method}")
        done = subprocess.run([sys.executable, ROOT / script, folder], capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done.stderr
