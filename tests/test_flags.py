"""Flags: each is read by those it is declared for, and refused wherever nothing would read it."""

import argparse
import ast
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import cli
import data
import eval as scoring
import loop
import pretrain
import runs
import train
import uld
import uoe
from data import tofu, values, world
from errors import UserError
from flags import Flag, Number, Parser, defaults, named
from objectives import FORGET, RETAIN

ROOT = Path(__file__).resolve().parents[1]
METHODS = train.METHODS
OWN_LOSSES = [name for name, method in METHODS.items() if method.losses is None]  # chosen on the command line


# ---- every flag is read -----------------------------------------------------------------------------------------

class Reads(NamedTuple):
    """Keys of the parsed arguments: as args.key, which must be there, and as getattr(args, "key", ...)."""

    plain: set[str]
    if_there: set[str]


def reads(*functions: Callable) -> Reads:
    """What functions, or classes, read of `args`, and with them all functions of ours that they hand it to."""
    out, seen, todo = Reads(set(), set()), set(), [*functions]
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        names = vars(sys.modules[function.__module__])
        for node in nodes_of(function):
            if isinstance(node, ast.Attribute) and is_args(node.value) and isinstance(node.ctx, ast.Load):
                out.plain.add(node.attr)
            elif isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id == "getattr" and is_args(node.args[0]):
                    out.if_there.update(n.value for n in node.args[1:2] if isinstance(n, ast.Constant))
                handed = [*node.args, *(keyword.value for keyword in node.keywords)]
                if any(is_args(part) for value in handed for part in ast.walk(value)):
                    todo += called(node.func, names)
        if function is runs.data_of:  # it reads them by name, and hands them to load_data
            out.plain.update(node.value for node in ast.walk(ast.parse(inspect.getsource(function)))
                             if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return out


@functools.cache
def nodes_of(function: Callable) -> list[ast.AST]:
    return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))


def is_args(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("args", "this")


def called(func: ast.expr, names: dict) -> list[Callable]:
    """Functions and classes of this repository that an expression may call: f, module.f, (choose or f)."""
    if isinstance(func, ast.BoolOp):
        return [f for value in func.values for f in called(value, names)]
    found = None
    if isinstance(func, ast.Name):
        found = names.get(func.id)
    elif isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        found = getattr(names.get(func.value.id), func.attr, None)
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return []
    file = Path(inspect.getfile(found))
    return [found] if file.is_relative_to(ROOT) and "site-packages" not in file.parts else []  # .venv lies in ROOT


# Who reads the flags of each title: a title that is not here fails, and so does a flag that none of these reads.
READERS: dict[str, list[Callable]] = {
    "the run": [train.run_seeds, train.run, cli.finish],
    "--data tofu": [runs.data_of],
    "--data tofu --method uld": [runs.data_of],
    "--data world or topic": [runs.data_of, METHODS["full"].rows],
    "--model": [train.open_public, train.run],
    "--model beside a method with --until or --subtract": [train.run],
    "the small models": [pretrain.small_config, pretrain.fill_in, pretrain.cached_model, train.run],
    "--arch moe": [pretrain.small_config, pretrain.cached_model],
    "training": [loop.fitting, train.run],
    "unlearning": [train.run],
    "--method finetune": [pretrain.finetune],
    "a retain loss": [METHODS[name].unlearn for name in OWN_LOSSES],
}
for _name, _method in METHODS.items():
    READERS[f"--method {_name}"] = [_method.unlearn, _method.check, _method.rows, loop.fitting, train.after_epoch]
for _flag, _losses in (("--forget-loss", FORGET), ("--retain-loss", RETAIN)):
    for _name, _loss in _losses.items():
        READERS[f"{_flag} {_name}"] = [of for of in _loss.__mro__ if of.__module__ == _loss.__module__]

OWNED = cli.all_readers()


def unread(title: str, flags: list[Flag]) -> list[str]:
    of = reads(*READERS[title])
    return [flag.name for flag in flags if flag.key not in of.plain | of.if_there]


@pytest.mark.parametrize("title", OWNED)
def test_every_flag_is_read_by_those_it_is_declared_for(title):
    assert not unread(title, OWNED[title])


def test_a_flag_without_a_reader_is_noticed():
    for title in READERS:
        assert unread(title, [Flag("--frobnicate", str, None, None, "")]) == ["--frobnicate"]


@pytest.mark.parametrize("method", METHODS)
def test_what_belongs_to_other_methods_is_read_by_none_of_a_methods_functions(method):
    own = {flag.key for flag in METHODS[method].flags}
    others = {flag for other in METHODS.values() for flag in other.flags if flag.key not in own}
    # --retain-weight comes with a retain loss; --until is obeyed by train.after_epoch, whoever has it
    others = [flag for flag in others if flag.key not in ("retain_weight", "until")]
    assert sorted(unread(f"--method {method}", others)) == sorted(flag.name for flag in others)


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_every_method_without_losses_of_its_own_reads_which_they_are_and_their_weight(name):
    assert {"forget_loss", "retain_loss", "retain_weight"} <= reads(METHODS[name].unlearn).plain


def test_the_flags_of_tofu_reach_its_reader():
    for flag in tofu.FLAGS + tofu.AUGMENTED:
        assert flag.key in inspect.signature(data.load_data).parameters
        assert flag.key in inspect.signature(data.load_tofu).parameters


def test_the_commands_readers_are_all_in_the_table():
    assert set(OWNED) <= set(READERS)
    for case in CASES:
        for title, flags in cli.readers(case.first()):
            assert {flag.name for flag in flags} <= {flag.name for flag in OWNED[title]}


@pytest.mark.parametrize("method", METHODS)
def test_whatever_a_method_and_its_losses_read_is_there(method, tmp_path):
    """No combination ends in an AttributeError after an hour."""
    losses = [(None, None)]
    if method in OWN_LOSSES:
        losses = [(f, r) for f in FORGET for r in RETAIN if method != "offset" or (f != "rmu" and r != "hidden")]
    for forget, retain in losses:
        words = [f"--forget-loss {forget} --retain-loss {retain}"] if forget else []
        args = cli.parse(["--method", method, *" ".join(words).split(), "--out", str(tmp_path)])
        functions = [METHODS[method].unlearn, METHODS[method].check, METHODS[method].rows, loop.fitting]
        functions += [FORGET[forget], RETAIN[retain]] if forget else []
        plain, if_there = reads(*functions)
        assert plain - if_there <= set(vars(args)), (forget, retain)


# ---- dead flags -------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """A command, and whose flags it takes."""

    words: str
    method: str = "uoe"
    arch: str | None = "moe"  # None: --model
    losses: tuple[str, str] | None = ("npo", "gd")
    data: str | None = None  # None: files of the user's own; tofu, world or topic

    @property
    def tofu(self) -> bool:
        return self.data == "tofu"

    @property
    def on_world(self) -> bool:
        return self.data in ("world", "topic")

    def live(self) -> dict[str, Flag]:
        """By name, from the tables in the files that read them."""
        flags = [*cli.RUN, *loop.FLAGS]
        if self.tofu:  # the augmented rows are ULD's alone
            flags += tofu.FLAGS + (tofu.AUGMENTED if self.method == "uld" else [])
        if self.on_world:
            flags += world.FLAGS
        if self.arch is None:
            flags += cli.PUBLIC
        else:
            flags += pretrain.SMALL + (pretrain.SMALL_MOE if self.arch == "moe" else [])
        if self.method == "finetune":
            return {flag.name: flag for flag in [*flags, *pretrain.FINETUNE]}
        flags += cli.WATCH + values.FLAGS + METHODS[self.method].flags
        flags += cli.REFERENCE if self.arch is None else []
        if self.arch is None and {"--until", "--subtract"} & {flag.name for flag in METHODS[self.method].flags}:
            flags.append(cli.NEVER_READ)
        if self.losses is not None:
            flags += [*FORGET[self.losses[0]].FLAGS, *RETAIN[self.losses[1]].FLAGS]
            flags += [RETAIN_WEIGHT] if self.losses[1] != "none" else []
        return {flag.name: flag for flag in flags}

    def first(self) -> argparse.Namespace:
        """What cli.readers is asked with."""
        losses = self.losses or METHODS[self.method].losses if self.method != "finetune" else (None, None)
        return argparse.Namespace(method=self.method, arch=self.arch, model=None if self.arch else "m",
                                  forget_loss=losses[0], retain_loss=losses[1], tofu=self.tofu, data=self.data,
                                  forget=None if self.data else "a.jsonl")


def cases() -> list[Case]:
    out = []
    for name, method in METHODS.items():
        for arch in ("gpt", "moe"):
            if arch == "moe" or not method.needs_experts:
                data, losses = "topic" if arch == "moe" else "world", None if method.losses else (method.on_world, "gd")
                out.append(Case(f"--method {name} --arch {arch}", name, arch, losses, data))
        losses = None if method.losses else ("npo", "gd")
        out.append(Case(f"--method {name} --model m", name, None, losses, "world"))
    for forget in FORGET:
        retain = "hidden" if forget == "rmu" else "gd"
        out.append(Case(f"--forget-loss {forget}", losses=(forget, retain), data="topic"))
        out.append(Case(f"--method full --forget-loss {forget} --retain-loss none", "full", losses=(forget, "none"),
                        data="topic"))
    for retain in RETAIN:
        out.append(Case(f"--retain-loss {retain}", losses=("stranger", retain), data="topic"))
    out.append(Case("--method finetune --model m", "finetune", None, None, "world"))
    out.append(Case("--method uld --data tofu", "uld", "gpt", None, "tofu"))
    out.append(Case("--data tofu", data="tofu"))
    out.append(Case("--method finetune --model m --data tofu", "finetune", None, None, "tofu"))
    out.append(Case("--forget a.jsonl --retain b.jsonl"))
    out.append(Case("--data world", losses=("stranger", "gd"), data="world"))
    return out


ALL = {flag.name: flag for flags in OWNED.values() for flag in flags}
RETAIN_WEIGHT = ALL["--retain-weight"]
CASES = cases()
VALUES = {"--seed": "1", "--layer": "2,1", "--rmu-layer": "3", "--device": "cpu", "--template": "plain",
          "--split": "forget05", "--context": "64", "--vocab-size": "512", "--reference": "r", "--augmented": "folder",
          "--name": "mine", "--out": "", "--pretrain-steps": "2", "--subjects": "3", "--top-k": "2", "--width": "64",
          "--experts": "8", "--forget-on": "value"}


def words_of(flag: Flag) -> list[str]:
    """The flag with a value that it takes."""
    if flag.kind is bool:
        return [flag.name]
    if isinstance(flag.kind, tuple):
        return [flag.name, VALUES.get(flag.name, flag.kind[-1])]
    share = (isinstance(flag.kind, Number) and not flag.kind.whole) or flag.kind in (loop.until, uld.subtract)
    return [flag.name, VALUES.get(flag.name, "0.5" if share else "1")]


@pytest.fixture
def parse(tmp_path):
    def parsed(words: str | list[str]):
        words = words.split() if isinstance(words, str) else words
        return cli.parse([*words, "--out", str(tmp_path)])

    return parsed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_a_command_takes_its_own_flags_and_no_other(case, parse):
    live = case.live()
    for name, flag in (ALL | live).items():
        words = [*case.words.split(), *words_of(flag)]
        if name == "--out":
            continue
        if name in live:
            assert getattr(parse(words), flag.key), name
        else:
            with pytest.raises(UserError, match=f"^{name} does nothing here: it belongs to "):
                parse(words)


# Accepted by the code before, every one a no-op: issue 12, by the names that the flags have now.
DEAD = [
    *(f"--method {method} {flag}" for method in ("full", "lora", "esft", "uld") for flag in
      ("--layer 1", "--m 2", "--layer 1,1", "--anchor-weight 2", "--router-lr 0.5", "--router-lr 0",
       "--attribution-tokens 100")),
    *(f"--method uld {flag}" for flag in ("--npo-beta 2", "--steering 2", "--offset-alpha 2", "--until 0.2",
                                          "--esft-p 0.3", "--specialise 0.1")),
    *(f"--method full {flag}" for flag in ("--subtract 1", "--filter-rate 0.1", "--lora-rank 4", "--esft-p 0.3",
                                           "--assistant-layers 2", "--offset-alpha 2", "--fork in")),
    *(f"--data tofu {flag}" for flag in ("--subjects 4", "--strangers 0")),
    *(f"--forget a.jsonl --retain b.jsonl {flag}" for flag in ("--subjects 4", "--strangers 0")),
    *(f"--data world {flag}" for flag in ("--authors 40", "--split forget05", "--protocol openunlearning",
                                          "--augmented folder")),
    *(f"--method {method} --model m {flag}" for method in ("uoe", "uld") for flag in
      ("--depth 2", "--width 64", "--experts 8", "--top-k 2", "--pretrain-lr 0.1", "--pretrain-steps 2",
       "--vocab-size 512", "--specialise 1", "--more-references 1")),
    "--template plain", "--dtype bfloat16", "--reference r", "--method full --template plain",
    "--retain-loss none --retain-weight 50", "--method full --retain-loss none --retain-weight 50",
    "--rmu-layer 1", "--steering 2", "--forget-loss ga --rmu-layer 1", "--forget-loss ga --steering 2",
    "--forget-loss npo --retain-loss hidden --steering 2", "--forget-loss ga --npo-beta 1", "--preference-beta 1",
    "--forget-loss stranger --npo-beta 1",
    "--forget-loss dpo --simnpo-beta 1", "--simnpo-gamma 1", "--di-offset 3", "--method full --arch gpt --experts 8",
    "--forget a.jsonl --retain b.jsonl --split forget05", "--data tofu --augmented folder",
    "--method full --data tofu --augmented folder", "--method finetune --model m --data tofu --augmented folder",
    "--method finetune --model m --until 0.1", "--method finetune --model m --forget-on value",
    "--method finetune --model m --score-every-epoch", "--method finetune --model m --reference r",
]
# Flags that are gone, some of them prefixes of flags that are there.
GONE = ["--place 1,1", "--stop-at 0.1", "--pretrain-epochs 2", "--dpo-beta 1", "--seeds 0,1", "--path",
        "--expert 1,1", "--layers 4", "--references 2", "--heads 4", "--ff 64",
        "--balance 0.1", "--pretrain-batch-size 32", "--freeze-router", "--same-layer", "--select random",
        "--affinity-rank 2", "--with-shared", "--balance-retain", "--repair-routers", "--method uld --no-paraphrased",
        "--method uld --no-perturbed", "--method uld --uld-retain 2", "--method uld --stray-perturbed 1",
        "--method uld --uniform-on all", "--method uld --centre", "--method lora --lora-targets attn",
        "--teacher out/uld", "--method full --freeze-router", "--method full --with-shared",
        "--method uld --lora-targets attn", "--method full --no-perturbed", "--method full --uld-retain 2",
        "--model m --layers 4", "--model m --balance 0.1"]


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Its one line on standard error of a command that must end before anything is trained or made."""
    monkeypatch.setattr(train, "run_seeds", lambda *_: pytest.fail("it was accepted"))

    def ends(words: str | list[str]) -> str:
        words = words.split() if isinstance(words, str) else words
        with pytest.raises(SystemExit) as stop:
            train.main([*words, "--out", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
        return err

    return ends


def last_flag(words: str) -> str:
    return [word for word in words.split() if word.startswith("--")][-1]


@pytest.mark.parametrize("words", DEAD)
def test_a_flag_that_would_change_nothing_ends_in_exit_2(words, refused):
    assert refused(words).startswith(f"error: {last_flag(words)} does nothing here: it belongs to ")


@pytest.mark.parametrize("words", GONE)
def test_a_flag_that_is_gone_is_unknown(words, refused):
    assert refused(words).startswith(f"error: {last_flag(words)} is unknown")


@pytest.mark.parametrize("words", ["--method distill", "--method distill-lora", "--method upcycle --model m"])
def test_a_method_that_is_gone_is_unknown(words, refused):
    assert "--method" in refused(words)


@pytest.mark.parametrize("words, says", [
    ("--layer 1,1 --m 2", "--m"), ("--layer 1,1 --attribution-tokens 5", "--attribution-tokens"),
    ("--data tofu --m own", "--m own"), ("--data tofu --forget-loss stranger", "--forget-loss stranger"),
    ("--model m --arch moe", "--arch"), ("--method uld --forget-loss ga", "--forget-loss"),
    ("--method divergence --retain-loss gd", "--retain-loss"), ("--data world --forget a --retain b", "--data"),
    ("--method finetune --model m --forget-loss ga", "--forget-loss"), ("--seed 1,1", "--seed"),
    ("--method uoe --arch gpt", "--arch gpt"),
])
def test_what_does_not_go_together_is_refused(words, says, refused):
    assert says in refused(words)


# ---- numbers ----------------------------------------------------------------------------------------------------

NUMERIC = (cli.seeds, loop.until, uoe.layer_choice, uoe.how_many, uld.subtract)  # kinds beside Number that hold numbers
BAD = ["nan", "inf", "-inf", "-1", str(10**30), "", "abc", "1e400", "1,-1"]


def is_numeric(flag: Flag) -> bool:
    return isinstance(flag.kind, Number) or flag.kind in NUMERIC


@pytest.mark.parametrize("name", [name for name, flag in ALL.items() if is_numeric(flag)])
def test_what_is_no_number_or_no_machine_holds_is_refused(name, refused):
    case = next(case for case in CASES if name in case.live())
    for bad in BAD:
        assert name in refused([*case.words.split(), name, bad]), bad


def test_every_kind_of_flag_is_a_number_a_choice_a_switch_or_a_text():
    for flag in ALL.values():
        assert is_numeric(flag) or isinstance(flag.kind, tuple) or flag.kind in (bool, str, named), flag.name


def test_defaults_are_values_that_the_flags_take():
    for flags in OWNED.values():
        for flag in flags:
            for value in (flag.default(), flag.default(task="world"), flag.default(task="other"), flag.public):
                if value is not None and is_numeric(flag) and flag is not RETAIN_WEIGHT and flag.kind != cli.seeds:
                    assert flag.kind(str(value)) == value, flag.name
                elif value is not None and isinstance(flag.kind, tuple):
                    assert value in flag.kind, flag.name


@pytest.mark.parametrize("low, high, options, good, bad", [
    (0, 1, {}, ["0", "1", "0.5", "1e-3"], ["-0.1", "1.1", "nan", "half"]),
    (0, 9, dict(above=True), ["1e-9", "9"], ["0", "-1", "9.1"]),
    (1, 9, dict(whole=True), ["1", "9"], ["0", "1.5", "10", "1e0"]),
])
def test_a_number_keeps_to_its_bounds(low, high, options, good, bad):
    kind = Number(low, high, **options)
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(text)} is not a "):
            kind(text)


@pytest.mark.parametrize("text, value", [("0", [0]), ("7", [7]), ("0,1,2", [0, 1, 2]), (str(2**32 - 1), [2**32 - 1])])
def test_seeds(text, value):
    assert cli.seeds(text) == value


@pytest.mark.parametrize("words", [["--subtract"], ["--filter-rate"], ["--attack", "relearn", "--relearn-rows"],
                                   ["--attack", "relearn", "--relearn-steps"], ["--attack", "relearn", "--relearn-lr"]])
def test_evals_numbers_are_refused_alike(words):
    for bad in BAD:
        with pytest.raises(UserError, match=words[-1]):
            scoring.parse(["run", *words, bad])


@pytest.mark.parametrize("level", ["nan", "inf", "-1", str(10**30), "", "abc"])
def test_the_level_that_eval_compares_at_is_a_number_too(level):
    with pytest.raises(UserError, match="--at"):
        scoring.parse(["--compare", "run", "--at", level])


# ---- names and help ---------------------------------------------------------------------------------------------

def options_of(parse: Callable, words: list[str], capsys, monkeypatch) -> list[str]:
    """Every flag that --help lists, as often as it does; the help is a screen of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse([*words, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code in (0, None)
    return re.findall(r"^  (?:-h, )?(--[a-z-]+)", printed, re.M)


def first_flags() -> list[str]:
    parser = Parser(add_help=False)
    cli.first_choices(parser)
    return [name for action in parser._actions for name in action.option_strings]


def within_one(a: str, b: str) -> bool:
    """Whether one letter put in, left out or changed makes a into b."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    same = next((i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y), len(a))
    return a[same + 1 :] == b[same + 1 :] or a[same:] == b[same + 1 :] or a[same + 1 :] == b[same:]


def test_the_measure_of_one_letter():
    assert within_one("--layer", "--layers") and within_one("--seeds", "--seed") and within_one("--at", "--by") is False
    assert within_one("--lr", "--lm") and within_one("--expert", "--xpert") and not within_one("--a", "--a")


def test_no_two_flags_of_the_whole_program_differ_by_a_letter(capsys, monkeypatch):
    names = {*ALL, *first_flags(), *options_of(scoring.parse, [], capsys, monkeypatch),
             *options_of(uoe.main, [], capsys, monkeypatch), *options_of(uld.main, [], capsys, monkeypatch)}
    assert {"--attack", "--question", "--method", "--m", "--lr"} <= names
    close = [(a, b) for a, b in itertools.combinations(sorted(names), 2) if within_one(a, b)]
    assert not close


@pytest.mark.parametrize("words", ["", *(f"--method {name}" for name in METHODS), "--method full --model m --data tofu",
                                   "--method uoe --forget-loss rmu", "--method finetune --model m --data tofu"])
def test_the_help_of_a_method_fits_two_screens_and_has_every_flag_once(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.parse([*words.split(), "--help"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 100
    case = next((case for case in CASES if case.words == words), None)
    listed = options_of(cli.parse, words.split(), capsys, monkeypatch)
    assert len(listed) == len(set(listed)) and "--help" in listed
    if case is not None:
        assert set(listed) == {*case.live(), *first_flags(), "--help"}


def test_a_flag_belongs_to_one_place_of_each_command_and_means_one_thing_everywhere():
    """Titles of one command share no flag; a key that several tables have is of one kind, or of two that say so."""
    for case in CASES:
        names = [flag.name for _, flags in cli.readers(case.first()) for flag in flags]
        assert len(names) == len(set(names)) and not set(names) & set(first_flags()), case.words


@pytest.mark.parametrize("words", ["--epoch 3", "--forget-los ga", "--dat topic", "--metho uld", "--expert 4",
                                   "--anchor 2", "--res", "--m=2 --anchor=1"])
def test_no_flag_is_guessed_from_its_beginning(words, refused):
    assert "is unknown" in refused(words)


def test_a_value_after_an_equals_sign_is_the_same(parse):
    assert parse("--m=2 --forget-loss=ga").m == 2
    with pytest.raises(UserError, match=r"^--subtract does nothing here: it belongs to --method uld"):
        parse("--subtract=2")


def test_the_number_of_flags():
    """About 35 for one method, those of first choices with them."""
    counts = {case.words: len(case.live()) + len(first_flags()) for case in CASES}
    assert max(counts.values()) <= 46, counts
    assert len({*ALL, *first_flags()}) <= 70


def test_defaults_stand_in_for_a_command_line(parse):
    """A demonstration's arguments are those of the command, where no flag is given."""
    args = parse("--method uoe")
    alone = vars(defaults(uoe.FLAGS, loop.FLAGS, FORGET[args.forget_loss].FLAGS))
    assert {key: value for key, value in vars(args).items() if key in alone} == alone
