"""What users are told where no other test says so: one line each that names the thing and the way out."""

import io
import json
import random
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import WORLD, tiny
from tokenizers.pre_tokenizers import ByteLevel

import eval as scoring
import loop
import train
import uld
import uoe
from data.batches import encode_row
from data.rows import DataSet
from data.tofu import download, read_augmented
from errors import UserError, one_line_errors
from hub.tokenizer import HubTokenizer
from lab import fill, fuzz, kill, queue, sizes
from lab.attacks import _relearn
from lab.tables import read_path
from metrics.score import scores_of
from pretrained import load, save
from runs import read_run
from train import check_tokens


def said(capsys, main, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.splitlines()[-1].startswith("error: ")  # above it at most a bar
    return err


def changed(file: Path, **what) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | what))


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of a run's small files, to be broken; its weights are the run's own."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in runs[0].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
        else:
            (folder / file.name).symlink_to(file)
    return folder


# ---- rows and tokenizers ------------------------------------------------------------------------------------------

def test_a_text_of_one_token(tokenizer):
    with pytest.raises(UserError, match=r"row 3 is a text of one token.*lengthen it"):
        encode_row({"text": "a"}, OneToken(), 9, "row 3")


class OneToken:
    def passage(self, text: str) -> list[int]:
        return [7]


def test_tofu_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"--data tofu: could not fetch locuslab/TOFU \(OSError\).*pass the folder"):
        download()


def test_augmented_files_of_other_questions(tmp_path):
    (tmp_path / "forget01_paraphrase.csv").write_text('other?,yes,"[\'o?\']","[\'aye\']"\n')
    with pytest.raises(UserError, match=r"no row about a forget question of forget01: give the CSV files of this"):
        read_augmented(tmp_path, "forget01", [{"question": "q?", "answer": "a"}])


BYTES = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}


@pytest.mark.parametrize("files, told", [
    ({}, "tokenizer.json is missing"),
    ({"tokenizer.json": {"model": {"type": "BPE", "vocab": BYTES, "merges": []},
                         "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                           "use_regex": True}}},
     "no file names an end-of-text token; add eos_token to tokenizer_config.json"),
])
def test_a_folder_without_a_tokenizer_or_an_end(files, told, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        HubTokenizer.load(tmp_path)


def test_a_text_on_which_a_tokenizer_gives_up(tmp_path):
    """Its pattern backtracks: the library counts to a limit and panics, which is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": r"^(([a-z])+.)+[A-Z]([a-z])+$"}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": "<e>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": BYTES | {"<e>": 256}, "merges": []}, "added_tokens": [end],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    tokenizer = HubTokenizer.load(tmp_path)
    assert len(tokenizer.encode("a plain text")) == 12
    with pytest.raises(UserError, match=r"the tokenizer's pattern gives up on a{60}: shorten that text"):
        tokenizer.passage("a" * 70 + "!")


def test_a_reference_with_other_tokens_or_another_template(dense, tokenizer, words, tmp_path, small_world):
    for name, of in {"a": tokenizer, "b": words}.items():
        save(dense(0, vocab_size=of.vocab_size), of, tmp_path / name)
    ours = load(tmp_path / "a")[1]
    args = Namespace(model="m", reference=str(tmp_path / "b"), template=None)
    with pytest.raises(UserError, match=r"has another tokenizer than --model m.*give a model of the same family"):
        check_tokens(args, "reference", args.reference, ours, small_world)
    args.reference = str(tmp_path / "a")
    check_tokens(args, "reference", args.reference, ours, small_world)


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_whose_parts_are_gone(run):
    (run / "model").unlink()
    with pytest.raises(UserError, match=r"model is missing, so the run has no weights: run train.py again"):
        read_run(run)


@pytest.mark.slow
def test_a_run_whose_target_is_gone(run):
    changed(run / "config.json", target="nowhere")
    with pytest.raises(UserError, match=r"nowhere is missing, so the run's target has no weights: run train.py again"):
        read_run(run)


@pytest.mark.slow
def test_scores_of_a_model_that_the_run_does_not_name(run, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    changed(run / "metrics.json", judge=metrics["target"])
    assert "has a judge that config.json does not name: run train.py again" in said(capsys, scoring.main, str(run))


@pytest.mark.slow
def test_a_run_without_hashes_is_not_verified(run, capsys):
    config = json.loads((run / "config.json").read_text())
    del config["made_of"]
    (run / "config.json").write_text(json.dumps(config))
    told = said(capsys, scoring.main, "--verify", str(run))
    assert "was written by an older version, which noted no hashes: run train.py again" in told


def test_the_path_of_a_run_that_was_not_watched(tmp_path):
    with pytest.raises(UserError, match=r"path.jsonl is missing: run train.py with --score-every-epoch"):
        read_path(tmp_path)


@pytest.mark.slow
def test_a_demonstration_of_another_method(runs, capsys):
    assert "is a run of --method uoe: this shows runs of --method uld" in said(capsys, uld.main, str(runs[0]))


@pytest.mark.slow
@pytest.mark.parametrize("method, part, show", [("esft", "model", uoe), ("offset", "assistant", uld)])
def test_a_demonstration_of_a_method_that_keeps_the_same(run, capsys, method, part, show):
    config = json.loads((run / "config.json").read_text())  # of uoe, with the experts that esft notes too
    weights = config["made_of"]["weights"]
    weights[part] = weights.pop("model")
    (run / "model").rename(run / part)
    (run / "config.json").write_text(json.dumps(config | {"method": method, "kept": [part]}))
    told = said(capsys, show.main, str(run))
    assert f"is a run of --method {method}: this shows runs of --method {show.__name__}" in told


@pytest.mark.slow
def test_a_run_is_opened_from_another_folder_than_it_was_made_in(run, tmp_path, monkeypatch, capsys):
    config = json.loads((run / "config.json").read_text())
    roles = [key for key in config if key.startswith(("target", "reference"))]
    assert len(roles) >= 2
    (tmp_path / "cache").mkdir()
    for role in roles:
        (tmp_path / "cache" / role).symlink_to(Path(config[role]).resolve())
        config[role] = f"out/cache/{role}"  # as --out out has it, of where train.py ran
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    scoring.main([str(run), "--json"])
    assert json.loads(capsys.readouterr().out).keys() == json.loads((run / "metrics.json").read_text()).keys()
    (tmp_path / "cache" / "target").unlink()
    assert "or this from the folder where it ran" in said(capsys, scoring.main, str(run))


@pytest.mark.slow
def test_another_alpha_is_not_saved_over_a_run(run, capsys):
    before = (run / "metrics.json").read_text()
    told = said(capsys, scoring.main, str(run), "--save", str(run))
    assert "is a run, which keeps its own metrics.json: give another folder" in told
    assert (run / "metrics.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), lambda file: file.mkdir()])
def test_earlier_attacks_are_read_before_a_new_one_is_made(run, capsys, monkeypatch, damage):
    monkeypatch.setattr(scoring, "attack", None)  # called, it would be a fault of ours
    (run / "attacks.json").unlink(missing_ok=True)
    damage(run / "attacks.json")
    assert "attacks.json is not " in said(capsys, scoring.main, str(run), "--attack", "hint")


@pytest.mark.slow
def test_a_log_that_is_no_text(run, capsys):
    (run / "log.jsonl").write_bytes(b"\xff\n")
    assert "claims of" in said(capsys, scoring.main, "--verify", str(run))
    (run / "log.jsonl").unlink()
    assert "log.jsonl does not exist: run train.py again" in said(capsys, scoring.main, "--verify", str(run))


def test_what_a_terminal_cannot_print_is_spelled_out(monkeypatch):
    seen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(seen, encoding="ascii"))
    one_line_errors(lambda: print("Zoë", flush=True))()
    assert seen.getvalue() == b"Zo\\xeb\n"


@pytest.mark.parametrize("flag", ["--forget", "--retain", "--data", "--model", "--out"])
def test_an_empty_value_is_not_taken_for_none(flag, capsys):
    assert f"{flag}: it is empty: give it a value, or leave the flag out" in said(capsys, train.main, flag, "")


def test_what_is_no_file_is_not_called_missing(tmp_path, capsys):
    told = said(capsys, train.main, "--forget", str(tmp_path), "--retain", str(tmp_path))
    assert f"{tmp_path} is not a file: give a file of JSON lines" in told


def test_a_log_of_another_number_of_rows(tofu, small_world):
    log = tofu / "logs" / "llama2-7b_retain90.json"
    with pytest.raises(UserError, match=r"is the log of 300 forget rows, and .* scored here: give a log of the same"):
        scores_of(str(log), {"dtype": "float32"}, small_world, None, "reference")


def test_a_model_whose_losses_are_no_numbers(dense, words, small_world, tmp_path):
    model = dense(0, vocab_size=words.vocab_size)
    model.norm.weight.data.fill_(float("nan"))
    save(model, words, tmp_path / "broken" / "model")
    few = DataSet("few", small_world.forget, small_world.retain, scored={"forget": small_world.forget[:2]})
    with pytest.raises(UserError, match=r"has losses that are not numbers.*download or train it again"):
        scores_of(str(tmp_path / "broken"), {"dtype": "float32"}, few, words, "reference")


@pytest.mark.slow
def test_a_run_that_would_overwrite_what_it_is_of(runs, capsys):
    """--name says the folder of the very run whose model is to be unlearned."""
    told = said(capsys, train.main, "--method", "uoe", "--model", str(runs[0]), "--data", "topic", "--out",
                str(runs[0].parent), "--name", runs[0].name)
    assert f"--name {runs[0].name} would overwrite --model {runs[0]}: give another name" in told


def test_pretraining_that_diverges(tmp_path, capsys):
    words = tiny(*WORLD, "--pretrain-lr", "1e9", "--pretrain-steps", "9", "--out", str(tmp_path))
    told = said(capsys, train.main, *words)
    assert "pretraining the target diverged: lower --pretrain-lr (now 1000000000.0)" in told


def test_a_reference_that_ends_answers_otherwise(dense, tmp_path, small_world, tokenizer):
    save(dense(0, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a")
    ours = load(tmp_path / "a")[1]
    args = Namespace(model="m", reference=str(tmp_path / "a"), template=None)
    ends = Ending(ours)
    with pytest.raises(UserError, match=r"reads prompts or ends answers otherwise than --model m: give both one --tem"):
        check_tokens(args, "reference", args.reference, ends, small_world)


class Ending:
    """A tokenizer that ends every answer with one token more than the one it is made of."""

    def __init__(self, of):
        self.encode, self.prompt, self.completion = of.encode, of.prompt, lambda answer: [*of.encode(answer), 0]


# ---- lab ------------------------------------------------------------------------------------------------------------

def test_relearning_passages():
    with pytest.raises(UserError, match=r"teaches questions, and the rows that were forgotten are passages only"):
        _relearn(None, None, DataSet("texts", [{"text": "a b c"}], []), [], None)


def test_filling_tables_from_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fill"])
    with pytest.raises(SystemExit) as stop:
        fill.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: give the folder that holds the runs, such as out\n"


def test_an_equation_that_two_statements_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "HERE", tmp_path / "results")
    (tmp_path / "a.py").write_text("x = 1  # ULD (2)\ny = 2  # ULD (2)\n")
    with pytest.raises(UserError, match=r"the marker '# ULD \(2\)' stands at 2 statements: a.py#L1, a.py#L2"):
        fill.equation_table()


def test_a_command_of_the_queue_that_fails(tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("-c pass\n-c 1/0\n")
    told = said(capsys, queue.main, str(lines), "--out", str(tmp_path / "out"))
    assert "1 of 2 commands failed: mend them and start the queue again" in told


@pytest.mark.parametrize("lab, broken, words, told", [
    (fuzz, {"run_cases": lambda args: 2}, [], "2 cases ended otherwise than in one line or in order; --case NUMBER"),
    (kill, {"kill_all": lambda *_: ["a"], "race_all": lambda *_: ["b"]}, [], "2 things are wrong"),
    (sizes, {"subprocess": Namespace(run=lambda command: Namespace(returncode=1))}, ["5", "6"],
     "5 rows could not be measured"),
])
def test_faults_that_were_found_are_counted(lab, broken, words, told, monkeypatch, capsys):
    for name, instead in broken.items():
        monkeypatch.setattr(lab, name, instead)
    assert told in said(capsys, lab.main, *words)


def test_a_command_that_fails_without_being_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "prepare", lambda *_: [])
    monkeypatch.setattr(kill, "start", lambda *_: (0, None))
    monkeypatch.setattr(kill, "ended", lambda *_: Namespace(status=1, said="boom"))
    with pytest.raises(UserError, match=r"does not run undisturbed: boom"):
        kill.kill_all(1, random.Random(0), tmp_path)


def test_a_process_that_kept_another_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.parallel, "total", lambda values, device: [7])
    with pytest.raises(UserError, match=r"state.pt: other processes kept another step than 0: start again with --rest"):
        loop.minimise([torch.ones(2, requires_grad=True)], dict, 3, 0.1, tmp_path, "toy", 0)
