"""lab/lm_eval_adapter.py: the LM evaluation harness on a local task, against our multiple choice and its own class for
`transformers` models. Needs `pip install lm_eval`, which no requirements file asks for: CI runs the first
test alone."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from test_pretrained import make
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

import train
from data.rows import write_rows
from errors import UserError
from lab import lm_eval_adapter as adapter
from lab.probes import choice_accuracy, choice_log_probs
from methods import open_run
from metrics import choice
from pretrained import load
from tests.conftest import WORLD, random_model, tiny
from uld import LogitDifference

ROWS = [{"question": f"What is {a} plus {b}?", "choices": [str(a + b + (i - answer)) for i in range(4)],
         "answer": answer} for a, b, answer in ((2, 3, 0), (4, 1, 2), (7, 7, 3), (12, 30, 1), (5, 5, 2), (9, 1, 0))]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""  # noqa: E501 - WMDP's own, on a file


def request(*args):
    return SimpleNamespace(args=args)


def asked(rows: list[dict]) -> list:
    return [request(choice.prompt(row), letter) for row in rows for letter in choice.letters(row)]


def test_without_the_harness_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(adapter, "lm_eval", None)
    with pytest.raises(SystemExit) as stop:
        adapter.main(["out/uoe", "--tasks", "mmlu"])
    assert stop.value.code == 2 and capsys.readouterr().err.endswith("not installed: pip install lm_eval\n")


@pytest.fixture(scope="module", autouse=True)
def harness():
    """Keeps the network shut."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


needed = pytest.mark.skipif(adapter.lm_eval is None, reason="needs the LM evaluation harness: pip install lm_eval")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the task and its rows."""
    folder = tmp_path_factory.mktemp("task")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def uld_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uld")
    train.main([*tiny("--method", "uld"), *WORLD, "--out", str(folder), "--name", "r", "--lora-rank", "4"])
    return folder / "r"


@needed
@pytest.mark.parametrize("kind", ["one", "two"])
def test_log_likelihoods_are_those_of_our_multiple_choice(kind, tokenizer):
    target, other = (random_model(seed, vocab_size=tokenizer.vocab_size, max_len=128) for seed in (0, 1))
    model = target if kind == "one" else LogitDifference(target, other, 0.75, 0.01).eval()
    theirs = adapter.Harnessed(model, tokenizer).loglikelihood(asked(ROWS), disable_tqdm=True)
    ours = [log_p for of in choice_log_probs(model, tokenizer, ROWS) for log_p in of]
    assert [log_p for log_p, _ in theirs] == pytest.approx(ours, abs=1e-4) and max(ours) < 0
    with torch.no_grad():
        for (_, greedy), one in zip(theirs[:8], asked(ROWS)[:8], strict=True):
            best = model(torch.tensor([tokenizer.encode(one.args[0])]))[0, -1].argmax().item()
            assert greedy == (tokenizer.encode(one.args[1]) == [best])


@needed
def test_log_likelihoods_are_those_of_the_harness_own_class(tmp_path):
    """A public checkpoint whose tokenizer begins texts with a token of its own."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate, too")
    make("llama2", tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs = huggingface.HFLM(pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=4)
    ours = adapter.Harnessed(*load(tmp_path))
    assert ours.tokenizer.front == [0] and ours.tok_encode("a b") == theirs.tok_encode("a b")
    assert ours.prefix_token_id == theirs.prefix_token_id
    requests = [*asked(ROWS), request("", " something"), request("a ", "b")]
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
    until = request("What is", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False})
    assert ours.generate_until([until]) == theirs.generate_until([until])


@needed
@pytest.mark.slow
def test_a_run_of_either_method_is_scored_on_a_local_task(place, uld_run, runs, capsys):
    for folder in (uld_run, runs[0]):
        capsys.readouterr()
        adapter.main([str(folder), "--tasks", "sums", "--include", str(place), "--json"])
        out = capsys.readouterr().out
        found = json.loads(out[out.index("{") :])
        run = open_run(folder)
        assert set(found) == {"target", "reference", "unlearned"}
        for role, model in (("target", run.target), ("unlearned", run.model)):
            assert found[role]["sums"]["acc"] == pytest.approx(choice_accuracy(model, run.tokenizer, ROWS))
    adapter.main([str(runs[0]), "--tasks", "sums", "--include", str(place), "--limit", "2"])
    table = capsys.readouterr().out
    assert "target" in table and "sums acc" in table
    with pytest.raises(SystemExit) as stop:
        adapter.main([str(runs[0]), "--tasks", "sums", "nonsense", "--include", str(place)])
    assert stop.value.code == 2 and "the harness has no nonsense" in capsys.readouterr().err


@needed
def test_rolling_log_likelihood_is_the_whole_text_window_by_window(tokenizer):
    """Windows of 16 tokens, the last one as long as the others; each token given what its window holds before it."""
    model = random_model(vocab_size=tokenizer.vocab_size, max_len=16)
    text = "the same words and other words, one after the other, " * 2
    ids = tokenizer.encode(text)
    assert 16 < len(ids) < 100
    total = 0.0
    with torch.no_grad():
        given = [tokenizer.end, *ids]
        for start in range(0, len(ids), 16):
            stop = min(start + 16, len(ids))
            first = max(0, stop - 16)
            log_p = model(torch.tensor([given[first:stop]]))[0].log_softmax(-1)
            total += sum(log_p[i - first, ids[i]].item() for i in range(start, stop))
    found, = adapter.Harnessed(model, tokenizer).loglikelihood_rolling([request(text)])
    assert found == pytest.approx(total, abs=1e-3)


@needed
def test_generation_stops_at_the_first_stop_text(tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size, max_len=32)
    harnessed = adapter.Harnessed(model, tokenizer)
    whole, = harnessed.generate_until([request("One two", {"max_gen_toks": 9})])
    with torch.no_grad():
        ids = model.generate(torch.tensor([tokenizer.encode("One two")]), 9, end=tokenizer.stops)[0].tolist()
    assert whole == tokenizer.decode(ids) and len(whole) > 4
    cut, = harnessed.generate_until([request("One two", {"max_gen_toks": 9, "until": [whole[3], "never"]})])
    assert cut == whole.split(whole[3])[0]
    with pytest.raises(UserError, match="generates greedily"):
        harnessed.generate_until([request("One", {"do_sample": True, "temperature": 1.0})])


