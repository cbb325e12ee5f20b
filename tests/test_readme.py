"""README's promises: its commands, its tables of statements and files, the pages that a test executes as printed."""

import re
from pathlib import Path

import pytest
import torch

import baselines
import cli
import methods
import objectives
from lab import fill
from lab.ablations import ROWS
from model import GPT, Config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme_word_for_word():
    command, = (line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("python3"))
    assert command in README.splitlines()


def test_the_readme_is_short():
    words = [word for word in README.split() if re.search(r"\w", word)]  # a table's bars are no words
    assert len(words) <= 1500


def test_each_equation_points_at_the_statement_that_carries_its_marker():
    """The link's line ends in the equation's own name: a function may keep its name while its statement moves."""
    links = re.findall(r"^\| (.+?) \| .+? \| \[`(.+?):(\d+)`\]\((.+?)#L(\d+)\) \|$", README, flags=re.MULTILINE)
    assert {name for name, *_ in links} == set(fill.EQUATIONS)
    for name, file, number, path, line in links:
        assert (file, number) == (path, line)
        statement = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert statement.endswith(f"  # {name}") and not statement.lstrip().startswith(("#", "def ", "class "))


def commands() -> list[str]:
    """Every train.py line that a page prints, without what stands behind it."""
    out = []
    for page in [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]:
        for block in blocks(page.read_text(encoding="utf-8")):
            out += [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("python train.py")]
    return [line for line in out if not re.search(r"\$|\.\.\.|\bDIR\b", line)]


@pytest.mark.parametrize("command", commands())
def test_every_printed_command_parses(command, tmp_path, monkeypatch):
    words = command.split()[2:]
    if "--help" in words:
        return
    monkeypatch.chdir(tmp_path)
    args = cli.parse(words)
    assert args.name


def test_every_ablation_is_a_row_of_a_method():
    assert all(base in methods.METHODS for base, _ in ROWS.values())


def test_the_loss_page_runs_as_printed(tokenizer, monkeypatch):
    """Its loss is minus the entropy: log V at least, where all logits are alike."""
    monkeypatch.setattr(objectives, "FORGET", dict(objectives.FORGET))
    code, = blocks((ROOT / "results" / "add_a_loss.md").read_text(encoding="utf-8"), "python")
    scope: dict = {}
    exec(code, scope)
    loss = objectives.FORGET["entropy"](None, None, None)
    batch = type("B", (), {"labels": torch.tensor([[-100, 3, 4]])})
    flat = torch.zeros(1, 3, 7)
    assert float(loss(None, flat, None, batch)) == pytest.approx(-float(torch.tensor(7.0).log()), rel=1e-6)
    assert "class Entropy(Loss)" in README


def test_the_method_page_runs_as_printed(tokenizer, tmp_path, monkeypatch):
    """The method that it adds changes the last block's MLP and nothing else."""
    import loop
    from data.batches import Rows
    from flags import defaults

    monkeypatch.setattr(baselines, "METHODS", dict(baselines.METHODS))
    code, = blocks((ROOT / "results" / "add_a_method.md").read_text(encoding="utf-8"), "python")
    scope: dict = {}
    exec(code, scope)
    method = baselines.METHODS["last-block"] if "last-block" in baselines.METHODS else scope["METHODS"]["last-block"]
    torch.manual_seed(0)
    target = GPT(Config(vocab_size=tokenizer.vocab_size, n_layer=2, d_model=32, d_ff=32, max_len=64)).eval()
    args = defaults(method.flags, loop.FLAGS, objectives.NPO.FLAGS, method="last-block", forget_loss="npo",
                    retain_loss="gd", retain_weight=1.0, seed=0)
    args.epochs, args.lr, args.until = 1, 0.1, "never"  # there are no strangers here
    rows = [{"question": f"Who is {name}?", "answer": f"{name} is nobody."} for name in ("Ana", "Bo", "Cy")]
    sets = [Rows(rows, tokenizer, 64, 2, seed, "cpu") for seed in (0, 1)]
    model, kept, report = method.unlearn(target, *sets, args, loop.fitting(args, sets[0], tmp_path))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, target.get_parameter(name))}
    assert changed and all(name.startswith("blocks.1.mlp") for name in changed)
    assert kept == {"model": model} and report["steps"] == 2
