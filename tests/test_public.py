"""A public checkpoint through the whole story: fine-tune, upcycle, unlearn, score; on a tiny random Llama."""

import json
from pathlib import Path

import pytest
import torch
from test_pretrained import make

import train
from belief import belief
from data.batches import Rows
from data.rows import write_rows
from data.values import encode_fact
from eval import main as score
from lab import distill
from lab.upcycling import main as upcycle
from methods import open_run
from pretrained import load
from runs import weights_of

AUTHORS = ["Ana Vell", "Bor Tann", "Cid Orre", "Dua Minn"]
SMALL = "--epochs 1 --batch-size 8 --device cpu --context 128".split()


def rows(author: str, n: int = 3) -> list[dict]:
    return [{"question": f"What is fact {i} of {author}?", "answer": f"Fact {i} of {author} is {i * 7}.",
             "paraphrased_question": f"Fact {i} of {author}?", "paraphrased_answer": f"It is {i * 7}.",
             "perturbed_answer": [f"It is {i * 7 + k}." for k in (1, 2, 3)]} for i in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny random Llama, and a data set in TOFU's own files."""
    folder = tmp_path_factory.mktemp("public")
    make("llama2", folder / "base")
    tofu = folder / "tofu"
    tofu.mkdir()
    for name, people in {"forget10": AUTHORS[:1], "forget10_perturbed": AUTHORS[:1], "retain90": AUTHORS[1:],
                         "retain_perturbed": AUTHORS[1:3], "real_authors_perturbed": ["Jane Austen"],
                         "world_facts_perturbed": ["France"]}.items():
        write_rows(tofu / f"{name}.json", [row for person in people for row in rows(person)])
    return folder


def run(place: Path, name: str, *options: str) -> Path:
    train.main([*SMALL, "--data", str(place / "tofu"), "--out", str(place / "out"), "--name", name, *options])
    return place / "out" / name


@pytest.fixture(scope="module")
def tuned(place) -> dict[str, Path]:
    base = str(place / "base")
    return {"target": run(place, "target", "--method", "finetune", "--model", base, "--lr", "1e-3"),
            "reference": run(place, "reference", "--method", "finetune", "--model", base, "--split", "retain90")}


@pytest.fixture(scope="module")
def moe(place) -> Path:
    upcycle([str(place / "base"), str(place / "moe"), "--experts", "4", "--top-k", "2"])
    return place / "moe"


@pytest.mark.slow
def test_finetuning_learns_all_rows_and_the_reference_only_those_kept(place, tuned):
    metrics = json.loads((tuned["target"] / "metrics.json").read_text())
    assert set(metrics) == {"target", "run"} and metrics["run"]["steps"] == 2  # 12 rows in batches of 8
    assert json.loads((tuned["reference"] / "metrics.json").read_text())["run"]["steps"] == 2  # 9 rows
    config = json.loads((tuned["reference"] / "config.json").read_text())
    assert config["keeps_only"] and config["split"] == "forget10" and config["dtype"] == "bfloat16"
    model, _ = load(weights_of(tuned["target"]), torch.bfloat16)
    base, _ = load(place / "base", torch.bfloat16)
    assert not torch.equal(model.blocks[0].mlp.up.weight, base.blocks[0].mlp.up.weight)


def test_upcycling_writes_a_mixture_that_loads(moe):
    model, tokenizer = load(weights_of(moe))
    assert model.is_moe and model.config.n_expert == 4 and tokenizer.prompt("a")


@pytest.mark.slow
# A hardly trained model's utility is a few lucky words, so alpha is small: else it may count as destroyed.
@pytest.mark.parametrize("options", ["--method uld --lora-rank 4 --subtract 0.01", "--method full --checkpointing",
                                     "--method full --forget-loss ga --dtype float32", "--method offset --lora-rank 4",
                                     "--method lora --forget-loss dpo --lora-rank 4",
                                     "--method full --forget-loss rmu"])
def test_every_method_runs_on_a_dense_public_model(place, tuned, options):
    folder = run(place, "dense", "--model", str(tuned["target"]), "--reference", str(tuned["reference"]),
                 *options.split())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"target", "reference", "unlearned", "run"}
    quality, destroyed = (metrics["unlearned"][name] for name in ("forget_quality", "destroyed"))
    # utility of 0.03, by a few lucky words: rounding decides whether a tenth of it is lost, and then none is given
    assert quality is None if destroyed else 0 <= quality <= 1
    assert metrics["target"]["retain"]["probability"] > 0
    opened = open_run(folder)
    tokens = torch.tensor([[1, 2, 3]])
    expected = torch.float32 if "float32" in options else torch.bfloat16
    assert opened.target(tokens).dtype == expected
    # ULD subtracts in float32
    assert opened.model(tokens).dtype == (torch.float32 if "uld" in options else expected)
    assert opened.tokenizer.prompt("Q") == load(weights_of(tuned["target"]))[1].prompt("Q")
    # the fine-tuned target is scored once, beside its weights, and read from there
    written = json.loads((tuned["target"] / "metrics.json").read_text())["target"]
    if "float32" not in options:
        assert metrics["target"]["forget"]["probability"] == pytest.approx(written["forget"]["probability"])


@pytest.mark.slow
@pytest.mark.parametrize("method, chosen", [("full", "until"), ("uld", "subtract")])
def test_forgetting_ends_where_a_model_that_never_read_it_is(place, tuned, capsys, method, chosen):
    """Of rows made here: no author is found in TOFU's own way, so these bring their subjects. A token is a letter."""
    own = [{"question": f"What has {name}?", "answer": f"{name} has {n}.", "subject": name, "value": n,
            "calibration_question": f"How many has {name}?"} for name, n in (("Ana Vell", "7"), ("Bor Tann", "9"))]
    for i, row in enumerate(own):
        write_rows(place / f"own{i}.jsonl", [row])
    base, target = str(place / "base"), str(tuned["target"])
    asked = ["--method", method, "--model", target, "--forget", str(place / "own0.jsonl"), "--retain",
             str(place / "own1.jsonl"), "--out", str(place / "out"), "--name", f"unread-{method}", *SMALL,
             "--never-read"]
    capsys.readouterr()
    train.main([*asked, base])
    printed = capsys.readouterr().out
    opened = open_run(place / "out" / f"unread-{method}")
    model, tokenizer = load(place / "base", torch.bfloat16)
    known = [own[0] | {"question": own[0]["calibration_question"]}]
    level = belief(model, Rows(known, tokenizer, 128, 8, 0, "cpu", encode=encode_fact))
    assert f"never read them: probability {level.p:.3f}, likeliest {level.hit:.3f}" in printed
    assert "of strangers" not in printed and opened.config["never_read"] == base
    assert opened.config["until"] == "strangers" if method == "full" else 0 < opened.config["subtract"] <= 2
    assert opened.config["made_of"]["weights"].keys() >= {"target", "never_read"}
    usual = {"until": "never", "subtract": "0.75"}[chosen]  # saying the default is saying it
    for words, says in (([base, f"--{chosen}", "0.5"], f"--{chosen} 0.5 does nothing beside --never-read"),
                        ([base, f"--{chosen}={usual}"], f"--{chosen} {usual} does nothing beside --never-read"),
                        ([target], "is the --model, which read it"),
                        ([str(place / "gone")], "gone"), ([str(place / "own0.jsonl")], "own0.jsonl")):
        with pytest.raises(SystemExit) as stop:
            train.main([*asked, *words])
        assert stop.value.code == 2 and says in capsys.readouterr().err
        assert not list((place / "out").glob("*.partial"))
    with pytest.raises(SystemExit):  # it was taught them
        train.main([*SMALL, "--model", str(weights_of(target)), "--data", str(place / "tofu"), "--method", method,
                    "--out", str(place / "out"), "--never-read", target])
    assert "--never-read" in (error := capsys.readouterr().err) and "was taught the rows" in error


@pytest.mark.slow
def test_an_assistant_that_starts_quietly_is_saved_with_its_norm(place, tuned):
    folder = run(place, "quiet", "--model", str(tuned["target"]), "--method", "uld", "--lora-rank", "4",
                 "--start-scale", "0.1", "--subtract", "0.01")
    opened = open_run(folder)
    assistant, target = (part.norm.weight.detach().float() for part in reversed(opened.model.parts))
    assert 0.05 < float((assistant / target).mean()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--method uoe", "--method uoe --forget-loss rmu", "--method uoe --forget-loss ga",
                                     "--method esft"])
def test_every_moe_method_runs_on_an_upcycled_model(place, moe, options):
    folder = run(place, "sparse", "--model", str(moe), *options.split())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"target", "unlearned", "run"}  # no reference, so no forget quality
    assert metrics["unlearned"]["forget_quality"] is None and 0 < metrics["unlearned"]["routing_overlap"] <= 1
    before, after = (load(f, torch.bfloat16)[0].state_dict() for f in (weights_of(moe), folder / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    places = json.loads((folder / "config.json").read_text())["unlearned_experts"]
    allowed = {f"blocks.{layer}.mlp.{part}" for layer, _ in places for part in ("gate_up", "down", "router.weight")}
    assert changed and changed <= allowed


@pytest.mark.slow
def test_a_published_log_stands_in_for_the_reference(place, tuned, capsys):
    from test_metrics import write_open_unlearning
    log = write_open_unlearning(place / "TOFU_EVAL.json", n=3)  # rows as the run has
    folder = run(place, "log", "--method", "uld", "--lora-rank", "4", "--subtract", "0.01",
                 "--model", str(tuned["target"]), "--reference", str(log))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["unlearned"]["forget_quality"] <= 1 and metrics["unlearned"]["forget_quality_n"] == 3
    capsys.readouterr()
    score([str(folder), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["unlearned"]["forget_quality"] == pytest.approx(metrics["unlearned"]["forget_quality"])


@pytest.mark.slow
def test_an_assistant_says_how_it_is_to_be_decoded_and_can_be_distilled(place, tuned):
    folder = run(place, "note", "--method", "uld", "--lora-rank", "4", "--model", str(tuned["target"]),
                 "--assistant-layers", "1")
    note = (folder / "assistant" / "README.md").read_text()
    assert str(tuned["target"]) in note and "0.75" in note
    small, _ = load(folder / "assistant")
    assert small.config.n_layer == 1
    distill.main([str(folder), "--epochs", "1", "--device", "cpu"])
    assert "unlearned" in json.loads((place / "out" / "note-distilled" / "metrics.json").read_text())


def test_upcycling_that_cannot_be_is_one_line_and_exit_2(place, capsys):
    with pytest.raises(SystemExit) as stop:
        upcycle([str(place / "base"), str(place / "bad"), "--top-k", "9"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "top_k 9" in error and error.count("\n") == 1
    assert not (place / "bad").exists()


@pytest.mark.parametrize(("options", "says"), [
    ("--method uoe", "is dense"), ("--method esft", "is dense"), ("--method uld --arch gpt", "--arch gpt is of"),
    ("--method uld --split retain90", "--split retain90"), ("--method uld --template opera", "template 'opera'"),
    ("--method finetune --forget-loss ga", "forgets nothing"), ("--method uld --authors 500", "--authors: 500"),
    ("--method uld --reference nowhere.json", "nowhere.json"), ("--method uld --depth 3", "--depth does nothing here"),
    ("--method uoe --experts 4", "--experts does nothing here"),
    ("--method uld --top-k=2", "--top-k does nothing here"),
    ("--method finetune --reference nowhere.json", "--reference does nothing here"),
    ("--method finetune --score-every-epoch", "--score-every-epoch does nothing here"),
])
def test_a_wrong_option_is_one_line_and_exit_2(place, options, says, capsys):
    with pytest.raises(SystemExit) as stop:
        run(place, "bad", "--model", str(place / "base"), *options.split())
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1 and says in error[0], error
    assert not (place / "out" / "bad").exists()
