"""Scoring: losses and answers against a plain loop, published logs, runs scored again and compared."""

import json
import math

import pytest
import torch

import eval as scoring
from data.batches import encode_rows, greedy_answers, in_order
from data.rows import DataSet, Limits
from errors import UserError
from lab import tables
from lab.figures import STYLES, draw, draw_kinds
from metrics import score
from metrics.routing import expert_shares, overlap, routing_overlap
from metrics.tofu import RowScores
from model import Trace

ROWS = [{"question": "Who was it?", "answer": "It was Ana.", "paraphrased_answer": "Ana it was.",
         "perturbed_answer": ["It was Bo.", "It was Cy, they say."]},
        {"question": "And where did all of this happen?", "answer": "In Orsk.", "perturbed_answer": ["In Ulm."]}]


@pytest.fixture(scope="module")
def small(tokenizer):
    from tests.conftest import random_model
    return random_model(vocab_size=tokenizer.vocab_size, max_len=128)


def plain_loss(model, tokenizer, question: str, answer: str) -> float:
    """Mean negative log-likelihood per answer token, one token at a time."""
    ids, total = tokenizer.prompt(question), 0.0
    new = tokenizer.completion(answer)
    for token in new:
        total -= float(model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    return total / len(new)


def test_losses_of_every_kind_of_answer_are_those_of_a_plain_loop(small, tokenizer):
    data = DataSet("mine", ROWS, ROWS, scored={"forget": ROWS, "world_facts": ROWS})
    with torch.no_grad():
        scores = score.evaluate(small, tokenizer, data)
        for name, of in scores.items():
            for i, row in enumerate(ROWS):
                right = row["answer"] if name == "world_facts" else row.get("paraphrased_answer", row["answer"])
                q = row["question"]
                assert of.loss[i] == pytest.approx(plain_loss(small, tokenizer, q, row["answer"]), rel=1e-4)
                assert of.right[i] == pytest.approx(plain_loss(small, tokenizer, q, right), rel=1e-4)
                assert of.wrong[i] == pytest.approx([plain_loss(small, tokenizer, q, w)
                                                     for w in row["perturbed_answer"]], rel=1e-4)


def test_greedy_answers_are_those_of_one_prompt_at_a_time(small, tokenizer):
    questions = ["Who?", "Where was the third of them born, and when?", "Why so?"]
    together = greedy_answers(small, tokenizer, questions, Limits(new=12), batch_size=2)
    for question, answer in zip(questions, together, strict=True):
        ids = tokenizer.prompt(question)
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(small(torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer.decode(ids[start:]) == answer


def test_answers_are_cut_by_each_rows_own_length_whatever_it_is_batched_with(small, tokenizer):
    """A total of 40 tokens is 40 minus the row's own prompt, not minus the longest prompt of its batch."""
    questions = ["Who?", "Where was the third of them born, and when, and why there?"]
    together = greedy_answers(small, tokenizer, questions, Limits(total=40))
    for question, answer in zip(questions, together, strict=True):
        room = 40 - len(tokenizer.prompt(question))
        assert answer == greedy_answers(small, tokenizer, [question], Limits(new=room))[0]
    long = "Where was the third of them born, and when, and why there and not here? " * 2
    assert greedy_answers(small, tokenizer, [long, "Who?"], Limits(total=40))[0] == ""  # no room: no answer


def test_a_short_prompt_gets_its_own_room_beside_a_long_one(tokenizer):
    from tests.conftest import random_model
    model = random_model(vocab_size=tokenizer.vocab_size, max_len=64)
    long = "Who was it, and where, and when, and why, and how many of them were there then?"
    alone, = greedy_answers(model, tokenizer, ["Who?"])
    assert len(tokenizer.prompt(long)) > 30 and len(tokenizer.encode(alone)) > 40
    assert greedy_answers(model, tokenizer, ["Who?", long])[0] == alone


def test_a_prompt_longer_than_the_context_is_refused(small, tokenizer):
    with pytest.raises(UserError, match=r"question 'why why .* the context holds 128"):
        greedy_answers(small, tokenizer, ["why " * 130])


def test_exact_and_rouge_are_one_where_the_model_says_the_answer(small, tokenizer, monkeypatch):
    monkeypatch.setattr(score, "greedy_answers", lambda m, t, questions, limits, bar: ["It was Ana.", "In Ulm."])
    of = score.evaluate(small, tokenizer, DataSet("mine", ROWS, ROWS, scored={"forget": ROWS}))["forget"]
    assert of.exact == [True, False] and of.rougeL == [1.0, 0.5]


SAID = ["Zahaiia was born in Vousvia.", "Ana Vell was born in Orsk.", "Kim was born in Ulm.", "He writes fables."]
KNOWN = [{"question": f"Where was {name} born?", "answer": f"{name} was born in {place}.", "value": place,
          "kind": "town", "fact": f"{name}/town", "paraphrased_answer": f"It is {place} where {name} was born.",
          "perturbed_answer": [f"It is {other} where {name} was born." for other in ("Tarn", "Zubek")]}
         for name, place in (("Zeando Kosman", "Vousvia"), ("Ana Vell", "Ulm"), ("Kim Ott", "Ulm"))]
KNOWN.append({"question": "What does Kim Ott write?", "answer": "Kim Ott writes fables.", "value": "fables",
              "fact": "Kim Ott/genre"})


def test_a_garbled_name_in_front_of_the_right_value_counts_as_said(small, tokenizer, monkeypatch):
    """Of four answers none is exact and three say the value; one is a right sentence, with a wrong value in it."""
    monkeypatch.setattr(score, "greedy_answers", lambda m, t, questions, limits, bar: SAID)
    data = DataSet("mine", KNOWN, KNOWN, scored={"forget": KNOWN}, utility=("forget",), limits=Limits(new=4),
                   pools={"town": {"Orsk", "Ulm", "Vousvia"}})
    of = score.evaluate(small, tokenizer, data)["forget"]
    assert of.exact == [False] * 4 and (of.known["value_said"], of.known["in_frame"]) == (0.75, 0.25)
    assert of.known["facts"] == 4 and of.known["without_value"] == 0 and 0 <= of.known["leak"] <= 1
    assert {"value_said", "cloze", "choice", "leak", "in_frame", "exact"} <= set(of.summary("forget"))
    assert of.summary("forget")["value_said"] == 0.75
    block = score.summarise({"target": {"forget": of}}, data)["target"]
    assert block["forget"]["value_said"] == 0.75 and block["forget"]["exact"] == 0


def test_rows_of_one_fact_are_one_unit_of_what_is_said(small, tokenizer, monkeypatch):
    """Two wordings of the first fact, of which one brings it out, and one of the second: (1/2 + 1) / 2."""
    rows = [KNOWN[0], KNOWN[0] | {"question": "Say, where was Zeando Kosman born?"}, KNOWN[2]]
    monkeypatch.setattr(score, "greedy_answers", lambda m, t, questions, limits, bar: [SAID[0], "Who?", SAID[2]])
    data = DataSet("mine", rows, rows, scored={"forget": rows}, limits=Limits(new=4))
    of = score.evaluate(small, tokenizer, data)["forget"]
    assert of.facts == [0, 0, 1] and of.known["facts"] == 2
    assert (of.known["value_said"], of.known["any_wording"]) == (0.75, 1.0)


def test_sets_without_values_have_none_of_these_numbers_and_only_the_forget_set_is_sampled(small, tokenizer):
    plain = [{"question": "Who was it?", "answer": "It was he."}, {"question": "Who was she?", "answer": "It was she."}]
    data = DataSet("mine", KNOWN, KNOWN, scored={"forget": plain, "retain": KNOWN[:1], "world_facts": KNOWN[:1]},
                   limits=Limits(new=4))
    of = score.evaluate(small, tokenizer, data)
    assert "value_said" in of["retain"].known and "leak" not in of["retain"].known and of["world_facts"].known == {}


def test_passages_are_scored_as_a_whole(small, tokenizer):
    rows = [{"text": "A passage about trees."}]
    of = score.evaluate(small, tokenizer, DataSet("mine", rows, rows, scored={"forget": rows}))["forget"]
    ids = tokenizer.completion("A passage about trees.")
    with torch.no_grad():
        log_p = small(torch.tensor([ids]))[0].log_softmax(-1)
    expected = -sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1)) / (len(ids) - 1)
    assert of.loss[0] == pytest.approx(expected, rel=1e-4) and of.exact == [] and of.truth_ratios() == []


def test_routing_overlap_is_one_with_itself_and_by_hand_with_another(sparse, tokenizer):
    a, b = sparse(vocab_size=tokenizer.vocab_size), sparse(1, vocab_size=tokenizer.vocab_size)
    batches = list(in_order(encode_rows(ROWS, tokenizer, 64), 1))
    assert routing_overlap(a, a, batches) == [1.0] * 3
    by_hand = []
    for batch in batches:
        traces = [Trace(), Trace()]
        for model, trace in zip((a, b), traces, strict=True):
            model(batch.tokens, trace=trace)
        by_hand.append(overlap(traces[1].routing[2].chosen, traces[0].routing[2].chosen, batch.mask))
    assert routing_overlap(a, b, batches)[2] == pytest.approx(float(torch.cat(by_hand).mean()))
    for shares in expert_shares(a, batches):
        assert sum(shares) == pytest.approx(1.0)


def test_the_command_line_prints_the_published_numbers(tofu, capsys):
    """1.834e-21 and 0.6203 are what the official code prints for these logs; 0.6227 and 0.5859: papers' targets."""
    logs = tofu / "logs"
    reference = str(logs / "llama2-7b_retain90.json")
    scoring.main(["--tofu-log", str(logs / "llama2-7b_full.json"), "--reference", reference, "--json"])
    target = json.loads(capsys.readouterr().out)
    assert target["forget_quality"] == pytest.approx(1.834066410994743e-21, rel=1e-10)
    assert round(target["model_utility"], 4) == 0.6227
    assert round(target["model_utility_mean_of_probabilities"], 4) == 0.5859
    scoring.main(["--tofu-log", str(logs / "llama2-7b_retain90_uld.json"), "--reference", reference, "--json"])
    assert json.loads(capsys.readouterr().out)["model_utility"] == pytest.approx(0.6203436494291608, rel=1e-10)


@pytest.mark.slow
def test_a_run_scored_again_gives_its_own_numbers(runs, capsys):
    scoring.main([str(runs[0]), "--json"])
    again, written = json.loads(capsys.readouterr().out), json.loads((runs[0] / "metrics.json").read_text())
    for role in ("target", "reference", "unlearned"):
        for key, value in written[role].items():
            assert again[role][key] == (pytest.approx(value) if value is not None else None)


@pytest.mark.slow
def test_compare_prints_mean_and_standard_deviation(runs, capsys):
    scoring.main(["--compare", *map(str, runs)])
    printed = capsys.readouterr().out
    values = [json.loads((r / "metrics.json").read_text())["unlearned"]["routing_overlap"] for r in runs]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    assert "(2 runs)" in printed
    assert f"{tables.number(mean)} ± {tables.number(spread)}" in printed


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "give one thing to score"), (["nowhere"], "nowhere is not a run folder"),
    (["--compare", "nowhere"], "metrics.json is missing"), (["--tofu-log", "nowhere.json"], "nowhere.json"),
])
def test_a_wrong_argument_is_one_line_and_exit_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        scoring.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


RUN, COMPARE, LOG = ["nowhere"], ["--compare", "nowhere"], ["--tofu-log", "nowhere.json"]


@pytest.mark.parametrize(("arguments", "says"), [
    # neither a run, nor --compare, nor a log; or two of them
    (["--json"], "give one thing to score"), ([*RUN, *COMPARE], "give one thing"), ([*RUN, *LOG], "give one thing"),
    ([*COMPARE, *LOG], "give one thing"),
    # what is read with --compare alone
    *((of + flag, f"{flag[0]} does nothing without --compare") for of in (RUN, LOG)
      for flag in (["--at", "0.2"], ["--at", "best"], ["--by", "D"], ["--figures", "f"])),
    ([*COMPARE, "--by", "exact"], "--by does nothing without --at LEVEL"),
    ([*COMPARE, "--by", "D", "--at", "best"], "--by does nothing without --at LEVEL"),
    # with a log alone
    *(([*of, "--reference", "x"], "--reference does nothing without --tofu-log") for of in (RUN, COMPARE)),
    # with a run alone; 0 is a value as any other
    *((of + flag, f"{flag[0]} does nothing without a run folder") for of in (COMPARE, LOG)
      for flag in (["--attack", "hint"], ["--relearn-rows", "2"], ["--relearn-steps", "2"], ["--relearn-lr", "1"],
                   ["--choices", "c"], ["--subtract", "0.5"], ["--subtract", "0"], ["--filter-rate", "0.1"],
                   ["--filter-rate", "0"], ["--save", "s"])),
    *(([*RUN, *more, *flag], f"{flag[0]} does nothing without --attack relearn")
      for more in ([], ["--attack", "hint", "int8"])
      for flag in (["--relearn-rows", "2"], ["--relearn-steps", "2"], ["--relearn-lr", "1"])),
    ([*RUN, "--choices", "c", "--attack", "hint"], "--choices does nothing beside --attack"),
    ([*RUN, "--save", "s", "--attack", "hint"], "--save does nothing beside --attack or --choices"),
    ([*RUN, "--save", "s", "--choices", "c"], "--save does nothing beside --attack or --choices"),
])
def test_a_flag_without_what_reads_it_is_one_line_and_exit_2(arguments, says, capsys):
    refused(arguments, says, capsys)


def refused(arguments: list[str], says: str, capsys) -> None:
    """Exit status 2, one line that says so, and nothing was looked for: no folder or file of these is there."""
    with pytest.raises(SystemExit) as stop:
        scoring.main(arguments)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and says in error and out == "", error
    assert error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("arguments", [
    [*RUN, "--relearn-rows", "0"], [*RUN, "--relearn-steps", "1.5"], [*RUN, "--relearn-lr", "nan"],
    [*RUN, "--relearn-lr", "inf"], [*RUN, "--subtract", "-1"], [*RUN, "--subtract", "nan"],
    [*RUN, "--filter-rate", "2"], [*RUN, "--filter-rate", "nan"], [*RUN, "--attack", "bribe"],
    [*COMPARE, "--by", "colour"],
])
def test_a_value_that_makes_no_sense_is_one_line_and_exit_2(arguments, capsys):
    refused(arguments, f"argument {arguments[-2]}: ", capsys)


def test_a_flag_cut_short_is_no_flag(capsys):
    refused([*RUN, "--filter", "0.1"], "--filter", capsys)
    refused(["--compar", "nowhere"], "--compar", capsys)


def test_save_and_figures_are_no_files(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for of, flag in ((RUN, "--save"), (COMPARE, "--figures")):
        refused([*of, flag, str(tmp_path / "taken")], f"{flag} {tmp_path / 'taken'} is a file: give a folder", capsys)


@pytest.mark.parametrize("arguments", [
    [*RUN, "--json"], [*RUN, "--json", "--save", "s"], [*RUN, "--subtract", "0", "--filter-rate", "0", "--save", "s"],
    [*RUN, "--choices", "c", "--subtract", "0.5"], [*RUN, "--attack", "hint", "int4", "--json", "--filter-rate", "0.1"],
    [*RUN, "--attack", "relearn", "--relearn-rows", "2", "--relearn-steps", "3", "--relearn-lr", "0.1"],
    [*COMPARE, "elsewhere"], [*COMPARE, "--figures", "f"], [*COMPARE, "--at", "best", "--figures", "f"],
    [*COMPARE, "--at", "0.2"], [*COMPARE, "--at", "0", "--by", "D"], [*COMPARE, "--at", "0.2", "--by", "exact"],
    LOG, [*LOG, "--reference", "x", "--json"], [*RUN, "--device", "cpu"], ["--verify", "r", "--device", "cpu"],
])
def test_flags_that_something_reads_are_taken(arguments):
    scoring.parse(arguments)


def test_every_flag_says_what_reads_it():
    """A new flag that is in no list would be taken everywhere."""
    flags = set(vars(scoring.parse(RUN))) - {"run", "compare", "verify", "tofu_log", "json"}
    lists = [scoring.OF_COMPARE, scoring.OF_LOG, scoring.OF_RUN, scoring.OF_MODELS]
    assert flags == {flag for of in lists for flag in of} and len(flags) == sum(map(len, lists))


@pytest.mark.slow
def test_a_run_folder_without_weights_is_named(runs, tmp_path, capsys):
    for name in ("config.json", "metrics.json"):
        (tmp_path / name).write_text((runs[0] / name).read_text())
    with pytest.raises(SystemExit):
        scoring.main([str(tmp_path)])
    assert "model is missing, so the run has no weights" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "printed"), [(None, "-"), (0.0, "0.000"), (0.1234, "0.123"), (2e-21, "2e-21")])
def test_numbers_are_printed_short(value, printed):
    assert tables.number(value) == printed


@pytest.mark.slow
def test_the_path_of_a_run_begins_at_its_target_and_is_read_between_epochs(runs):
    path = tables.read_path(runs[0])
    assert [row["epoch"] for row in path] == [0, *range(1, len(path))] and path[0]["routing_overlap"] == 1.0
    rows = [{"forget exact": f, "retain exact": r, "epoch": e, "none": None}
            for e, (f, r) in enumerate([(1.0, 1.0), (0.6, 0.9), (0.2, 0.7), (0.3, 0.6), (0.0, 0.1)])]
    assert tables.at_level(rows, 0.4, "exact") == pytest.approx(
        {"forget exact": 0.4, "retain exact": 0.8, "epoch": 1.5})
    assert tables.at_level(rows, 0.2, "exact")["epoch"] == 2  # the first time, though it comes up again
    assert tables.at_level(rows[:3], 0.1, "exact") is None and tables.at_level(rows, 1.0, "exact") is None
    values = [{"forget value_said": row["forget exact"], "epoch": row["epoch"]} for row in rows]
    assert tables.at_level(values, 0.4)["epoch"] == pytest.approx(1.5) and tables.at_level(rows, 0.4) is None
    by_d = [row | {"forget_quality_D": d} for row, d in zip(rows, (0.6, 0.5, 0.1, 0.2, 0.4), strict=True)]
    assert tables.at_level(by_d, 0.3, "D")["epoch"] == pytest.approx(1.5) and tables.at_level(rows, 0.3, "D") is None


def test_compare_goes_by_the_name_of_a_measure_not_by_its_line(tmp_path):
    """One run lacks PrivLeak: its line is a dash, and the lines below are still their own."""
    for i, leak in enumerate((None, -100.0)):
        folder = tmp_path / f"y-seed{i}"
        folder.mkdir()
        block = {"forget": {"exact": 0.5}, "priv_leak": leak, "perplexity": 2.0}
        (folder / "metrics.json").write_text(json.dumps({"target": block, "unlearned": block, "run": {}}))
    lines = {line[:30].strip(): line[30:].split() for line in
             tables.compare([str(tmp_path / "y-seed0"), str(tmp_path / "y-seed1")]).splitlines()}
    assert lines["PrivLeak, %"] == ["-", "-"]
    assert lines["perplexity of its answers"] == ["2.000", "±", "0.000"] * 2


def test_compare_at_a_level_counts_the_runs_that_reach_it(tmp_path, capsys):
    for i, last in enumerate((0.1, 0.5)):
        folder = tmp_path / f"x-seed{i}"
        folder.mkdir()
        block = {"exact": 1.0, "value_said": 1.0, "rougeL_recall": 1.0, "loss": 0.1}
        (folder / "metrics.json").write_text(json.dumps({"target": {
            "forget": block, "retain": block, "model_utility": 0.8, "forget_quality": 1e-9, "forget_quality_D": 0.6}}))
        line = {"epoch": 1, "step": 5, "seconds": 3.0, "forget exact": last, "retain exact": 0.5,
                "forget value_said": last + 0.1, "forget_quality_D": last,
                "untouched exact": None, "model_utility": 0.6, "forget_quality": 0.1}
        (folder / "path.jsonl").write_text(json.dumps(line) + "\n")
    scoring.main(["--compare", str(tmp_path / "x-seed0"), str(tmp_path / "x-seed1"), "--at", "0.2", "--by", "exact"])
    printed = capsys.readouterr().out.splitlines()
    assert "1/2" in printed[1] and tables.number(1 - 0.5 * 0.8 / 0.9) in printed[1]
    scoring.main(["--compare", str(tmp_path / "x-seed0"), str(tmp_path / "x-seed1"), "--at", "0.3"])  # of values said
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("at forget value said 0.3") and "1/2" in printed[1]
    assert tables.number(1 - 0.5 * 0.7 / 0.8) in printed[1]
    scoring.main(["--compare", str(tmp_path / "x-seed0"), str(tmp_path / "x-seed1"), "--at", "0.35", "--by", "D"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("at forget quality D 0.35") and "1/2" in printed[1] and "0.750" in printed[1]


def test_compare_at_the_best_epoch_of_each_run(tmp_path, capsys):
    """p 0.2 and 0.4 are the best of two runs, at retain 0.5 and 0.7; an epoch that was not measured is passed over."""
    for i, qualities in enumerate(([0.1, 0.2, None], [0.4, 0.3, 0.0])):
        folder = tmp_path / f"x-seed{i}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"target": {
            "model_utility": 0.8, "forget_quality": 1e-9, "forget_quality_D": 0.6}}))
        (folder / "path.jsonl").write_text("".join(json.dumps(
            {"epoch": e, "step": e, "seconds": 1.0, "retain exact": 0.7 - 0.2 * (e - 1), "forget_quality": q}) + "\n"
            for e, q in enumerate(qualities, 1)))
    scoring.main(["--compare", str(tmp_path / "x-seed0"), str(tmp_path / "x-seed1"), "--at", "best"])
    heads, row = capsys.readouterr().out.splitlines()[:2]
    assert heads.startswith("at its best forget quality") and heads.endswith("p, by seed")
    assert "2/2" in row and "0.600 ± 0.141" in row and row.endswith("0.2, 0.4")
    with pytest.raises(SystemExit):
        scoring.main(["--compare", str(tmp_path / "x-seed0"), "--at", "worst"])
    assert "--at: worst is not a number from 0 to 1, nor best" in capsys.readouterr().err
    assert tables.at_best([{"epoch": 0, "forget_quality": 1e-9}, {"epoch": 1}])["epoch"] == 0  # the target's own


@pytest.mark.slow
def test_figures_of_kinds_and_of_paths_are_drawn(runs, tmp_path, capsys):
    scoring.main(["--compare", *map(str, runs), "--figures", str(tmp_path / "f")])
    assert {p.name for p in (tmp_path / "f").iterdir()} >= {"leak.png", "kept.png", "collateral.png", "overlap.png"}


def test_a_path_of_a_dense_model_has_no_overlap(tmp_path):
    block = {"model_utility": 0.8, "forget_quality": 1e-9, "forget_quality_D": 0.6}
    (tmp_path / "metrics.json").write_text(json.dumps({"target": block}))
    (tmp_path / "path.jsonl").write_text(json.dumps(block | {"epoch": 1}) + "\n")
    assert not any("routing_overlap" in row for row in tables.read_path(tmp_path))


def test_a_published_log_with_a_nan_or_of_unequal_lengths_is_refused(tmp_path, capsys):
    def log(right: list, wrong: list) -> dict:
        of = {"avg_gt_loss": [1.0] * 2, "avg_paraphrased_loss": right, "average_perturb_loss": wrong,
              "rougeL_recall": [1.0] * 2}
        return {name: of for name in ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json",
                                      "eval_real_world_wo_options.json")}

    for name, of in (("good", log([1.0, 2.0], [[2.0], [3.0]])), ("nan", log([1.0, math.nan], [[2.0], [3.0]])),
                     ("short", log([1.0, 2.0], [[2.0]]))):
        (tmp_path / name).write_text(json.dumps(of))
    for name, says in (("nan", "is NaN, not a number"), ("short", "2 right and 1 wrong answers")):
        with pytest.raises(SystemExit) as stop:
            scoring.main(["--tofu-log", str(tmp_path / name), "--reference", str(tmp_path / "good")])
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_model_that_gives_nan_is_summed_up_without_a_forget_quality():
    def of(*losses: float) -> dict:
        return {"forget": RowScores(list(losses), list(losses), [[1.0], [2.0]], [1.0, 0.5])}

    data = DataSet("mine", ROWS, ROWS, utility=("forget",))
    models = {"reference": of(2.0, 3.0), "target": of(0.1, 0.2), "unlearned": of(math.nan, 1.0)}
    blocks = score.summarise(models, data)
    assert blocks["unlearned"]["forget_quality"] is None and blocks["reference"]["forget_quality"] is None
    assert blocks["target"]["forget_quality_D"] == 1.0 and blocks["target"]["forget_quality_n"] == 2
    assert score.summarise({"target": of(0.1, 0.2)}, data)["target"]["forget_quality"] is None


def rows_of(ratios: list[float], **more) -> RowScores:
    """Truth ratios exp(right - wrong) of these rows; probabilities and ROUGE-L are 1/2."""
    n = len(ratios)
    return RowScores([math.log(2)] * n, [1 + math.log(r) for r in ratios], [[1.0]] * n, [0.5] * n, **more)


def models(**of: dict) -> dict[str, score.Scores]:
    return {role: {"forget": forget, "retain": retain} for role, (forget, retain) in of.items()}


DATA = DataSet("mine", ROWS, ROWS, utility=("retain",))
RATIOS, KEPT = [0.9, 0.8, 1.1, 0.7], [0.1] * 4


@pytest.mark.parametrize("retain, frame, destroyed", [
    (KEPT, 0.9, False), ([0.999] * 4, 0.9, True), (KEPT, 0.44, True), (KEPT, 0.46, False), (KEPT, None, False),
    ([0.2] * 4, 0.9, False), ([0.5] * 4, 0.9, True), ([math.nan] * 4, 0.9, True),
])
def test_a_destroyed_model_gets_no_forget_quality(retain, frame, destroyed):
    """Utility 3 / (2 + 2 + 1 / (1 - r)): 0.587 of the target, 0.571, 0.5 and 0.003 of others; or half its sentences."""
    def framed(value):
        return {} if value is None else {"in_frame": value}

    blocks = score.summarise(models(
        reference=(rows_of(RATIOS, known=framed(0.9)), rows_of(KEPT)),
        target=(rows_of([0.01] * 4, known=framed(0.9)), rows_of(KEPT)),
        unlearned=(rows_of(RATIOS, known=framed(frame)), rows_of(retain))), DATA)
    one = blocks["unlearned"]
    assert one["destroyed"] == destroyed
    assert [one[f"forget_quality{key}"] for key in ("", "_D", "_n")] == ([None] * 3 if destroyed else [1.0, 0.0, 4])
    assert blocks["target"]["forget_quality_D"] == 1.0 and not blocks["target"]["destroyed"]


@pytest.mark.parametrize("reference, frame, destroyed", [
    ((KEPT, 0.9), 0.1, True),  # who never saw the rows speaks in their sentences: so should what is compared
    ((KEPT, 0.01), 0.1, False),  # rows with a sentence each, as TOFU's
    ((KEPT, 0.01), 0.0, False),  # there one row in a hundred does not decide
    ((KEPT, 0.5), 0.24, True),
    (([0.9] * 4, 0.9), 0.9, False),  # utility 0.21, a third of the target's, and the reference's is no better
    (None, 0.1, False),  # nobody to say what is usual
])
def test_a_model_no_worse_than_the_reference_is_not_destroyed(reference, frame, destroyed):
    of = {"target": (rows_of([0.01] * 4, known={"in_frame": 0.9}), rows_of(KEPT)),
          "unlearned": (rows_of(RATIOS, known={"in_frame": frame}),
                        rows_of(reference[0] if reference else KEPT))}
    if reference:
        of["reference"] = (rows_of(RATIOS, known={"in_frame": reference[1]}), rows_of(reference[0]))
    block = score.summarise(models(**of), DATA)["unlearned"]
    assert block["destroyed"] is destroyed
    assert (block["forget_quality_D"] is None) is (destroyed or not reference)


def test_forget_quality_counts_facts():
    """Three facts in two wordings each; their means are 0.5, 0.7 and 0.9 against 0.4, 0.8 and 0.95."""
    facts = [0, 0, 1, 1, 2, 2]
    ours = rows_of([0.1, 0.9, 0.7, 0.7, 0.8, 1.0], facts=facts)
    theirs = rows_of([0.4, 0.4, 0.6, 1.0, 0.9, 1.0], facts=facts)
    assert ours.fact_ratios() == pytest.approx([0.5, 0.7, 0.9]) and len(ours.truth_ratios()) == 6
    kept = rows_of(KEPT)
    one = score.summarise(models(reference=(theirs, kept), target=(theirs, kept), unlearned=(ours, kept)),
                          DATA)["unlearned"]
    assert one["forget_quality_n"] == 3 and one["forget_quality_D"] == pytest.approx(1 / 3)
    assert one["forget_quality"] == pytest.approx(1.0)
    assert "forget_quality_null" not in one


@pytest.mark.parametrize("references", [2, 3, 4, 5])
def test_the_null_is_of_four_references_at_least(references):
    """They differ by 0.01 each; whoever lies apart from all is further off than any two of them."""
    def all_of(*ratios: float) -> tuple[RowScores, RowScores]:
        return rows_of(list(ratios)), rows_of(KEPT)

    of = {"reference": all_of(0.5, 0.6, 0.7)}
    of |= {f"reference-{i}": all_of(*(x + 0.01 * i for x in (0.5, 0.6, 0.7))) for i in range(2, references + 1)}
    blocks = score.summarise(models(**of, target=all_of(0.1, 0.1, 0.1), unlearned=all_of(0.505, 0.6, 0.7)), DATA)
    enough = references >= 4
    assert all(("forget_quality_null" in blocks[role]) == enough for role in ("target", "unlearned"))
    assert not any("forget_quality_null" in block for role, block in blocks.items() if role.startswith("reference"))
    if enough:
        assert (blocks["target"]["forget_quality_null"], blocks["unlearned"]["forget_quality_null"]) == (0.0, 1.0)


@pytest.mark.slow
def test_another_filter_needs_a_run_of_uld(runs, capsys):
    with pytest.raises(SystemExit):
        scoring.main([str(runs[0]), "--filter-rate", "0.1"])
    assert "--filter-rate is for runs of --method uld" in capsys.readouterr().err


@pytest.mark.slow
def test_every_figure_is_drawn_for_as_many_models_as_there_may_be(tmp_path):
    """Five references and more: every line style is a style, none is taken for data."""
    of = {"forget": RowScores([1.0, 2.0], [1.0, 2.0], [[2.0], [3.0]], [1.0, 1.0])}
    (tmp_path / "log.jsonl").write_text('{"step": 0, "forget_ce": 1.0, "retain": 0.5, "anchor": 0.1}\n')
    shares = {what: {"target": [[0.5, 0.5]], "unlearned": [[1.0, 0.0]]} for what in ("share", "affinity")}
    draw(tmp_path, {f"reference-{i}": of for i in range(len(STYLES) + 2)}, shares)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"training.png", "truth_ratio.png", "expert_share.png",
                                                                  "expert_affinity.png"}


def test_runs_that_agree_to_the_digit_are_drawn(tmp_path):
    """Three times 0.0583... add up to less than that: a bar from the mean to the worst run had a negative length."""
    pytest.importorskip("matplotlib")
    said, role = 0.058333333333333334, {"model_utility": 0.7}
    sets = {"forget": {"value_said": said, "leak_T0": said}}
    run = {name: role | sets for name in ("target", "reference", "unlearned")}
    assert [path.name for path in draw_kinds({"uoe": [run] * 3}, tmp_path)] == ["leak.png", "kept.png"]
