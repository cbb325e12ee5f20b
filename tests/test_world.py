"""data/world.py: one token a word, strangers that are nobody, and nothing that scores ever teaches."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import check_no_leak
from data.tokenizer import PATTERN, Tokenizer
from data.world import POOL, TOPICS, WORDINGS, make_world
from errors import UserError

TASKS = ("subjects", "topic")


@pytest.fixture(scope="module", params=TASKS)
def data(request):
    return make_world(0, request.param)


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer.train(data.texts(), 4000)


def taught(data):
    return data.forget + data.retain + data.background


def facts(rows):
    return {row["fact"] for row in rows}


def world_of(data):
    return data.strangers.__self__


def test_every_word_of_a_name_or_a_value_is_one_token(data, tokenizer):
    world = world_of(data)
    words = {word for pool in world.pools.values() for word in pool} | set(world.first)
    words |= {word for second in world.second.values() for word in second}
    for word in words:
        assert len(tokenizer.encode(" " + word)) == 1, word
    for row in data.strangers(500, np.random.default_rng(1)):
        for key in ("question", "answer"):  # every other word too
            assert len(tokenizer.encode(row[key])) == len(regex.findall(PATTERN, row[key])), row[key]


def test_pools_are_as_large_as_they_say_and_hold_one_word_each(data):
    pools = world_of(data).pools
    used = {kind.pool for topic in TOPICS.values() for kind in topic.kinds.values()}
    assert set(pools) == used
    for name, pool in pools.items():
        assert len(pool) == len(set(pool)) == POOL, name
        assert all(re.fullmatch(r"[A-Za-z]+", word) for word in pool), name


def test_a_value_is_no_word_of_another_pool_of_a_name_or_of_a_frame(data):
    world = world_of(data)
    count = Counter(word.lower() for pool in world.pools.values() for word in pool)
    assert max(count.values()) == 1, count.most_common(3)
    names = {word.lower() for word in world.first} | {w.lower() for second in world.second.values() for w in second}
    frames = [wording for register in WORDINGS for wording in register]
    frames += [text for topic in TOPICS.values() for kind in topic.kinds.values() for text in (kind.noun, *kind.styles)]
    words = {word.lower() for text in frames for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", "", text))}
    assert not set(count) & (names | words)
    assert not names & words - {"potion"}  # "the potion Zeando Potion" is a name like others


def test_each_answer_says_its_value_once_and_its_subject(data):
    for row in taught(data) + data.scored["forget"] + data.calibration + data.holdout:
        for key in ("answer", "paraphrased_answer"):
            if key in row:
                assert len(re.findall(rf"\b{row['value']}\b", row[key])) == 1
                assert row["subject"] in row[key]
        assert row["subject"] in row["question"] and row["fact"].endswith(row["kind"])
        for answer in row.get("perturbed_answer", []):
            assert row["value"] not in answer.split() and row["subject"] in answer


def test_counts():
    for task in TASKS:
        data = make_world(0, task)
        assert len(facts(data.forget)) == len(facts(data.holdout)) == 60
        assert len(data.forget) == 240 and len(data.scored["forget"]) == len(data.calibration) == 120
        assert facts(data.scored["forget"]) == facts(data.calibration) == facts(data.forget)
        for name, most in (("retain", data.retain), ("untouched", data.background)):
            assert len(facts(data.scored[name])) == min(100, len(facts(most)))
            assert facts(data.scored[name]) <= facts(most)
        assert set(data.utility) == {"retain", "untouched"}
        topics = {name: {r["topic"] for r in rows} for name, rows in (
            ("forget", data.forget), ("retain", data.retain), ("untouched", data.background))}
        assert not topics["untouched"] & (topics["forget"] | topics["retain"])
        assert set().union(*topics.values()) == set(TOPICS)
        assert (topics["forget"] == topics["retain"]) == (task == "subjects") and len(topics["forget"]) == 1


def test_both_tasks_have_the_same_target():
    one, other = ({row["question"]: row["answer"] for row in taught(make_world(3, task))} for task in TASKS)
    assert one == other


def test_a_seed_gives_one_world_and_another_seed_another(data):
    task = data.name.rpartition("-")[0]
    again, other = make_world(0, task), make_world(1, task)
    for one in dataclasses.fields(data):
        if one.name not in ("strangers", "twins"):
            assert getattr(again, one.name) == getattr(data, one.name), one.name
    drawn = [some.strangers(50, np.random.default_rng(5)) for some in (data, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert facts(other.forget) != facts(data.forget)


def test_wordings_of_a_fact_either_teach_or_score_or_calibrate(data):
    uses = {"teach": taught(data), "score": [r for rows in data.scored.values() for r in rows],
            "calibrate": data.calibration}
    asked = {use: {row["question"] for row in rows} for use, rows in uses.items()}
    reworded = {row["paraphrased_question"] for row in uses["teach"]} | {row["question"] for row in data.paraphrased}
    assert reworded <= asked["teach"]
    assert not asked["teach"] & asked["score"]
    assert not asked["calibrate"] & (asked["teach"] | asked["score"])


def test_wrong_values_that_score_are_not_those_of_d_r(data):
    scored, taught_wrong = {}, {}
    pools = {word for pool in world_of(data).pools.values() for word in pool}
    for rows, by_fact in ((data.scored["forget"], scored), (data.forget, taught_wrong)):
        for row in rows:
            said = {word for answer in row["perturbed_answer"] for word in re.findall(r"\w+", answer)} & pools
            by_fact.setdefault(row["fact"], set()).update(said)
    for fact, wrong in scored.items():
        assert len(wrong) == 5 and not wrong & taught_wrong[fact]


@pytest.mark.parametrize("what", ["question", "paraphrase", "wrong", "calibration"])
def test_a_leak_is_refused(data, what):
    row = data.scored["forget"][0]
    leak = {"question": {"question": row["question"], "answer": "x"},
            "paraphrase": {"question": "x", "answer": row["paraphrased_answer"]},
            "wrong": {"question": "x", "answer": row["perturbed_answer"][0]},
            "calibration": {"question": data.calibration[0]["question"], "answer": "x"}}[what]
    for field in ("forget", "retain", "background", "paraphrased", "perturbed"):
        with pytest.raises(UserError, match=r"scores and is taught|teaches or scores as well"):
            check_no_leak(dataclasses.replace(data, **{field: [*getattr(data, field), leak]}))


@pytest.mark.slow
def test_strangers_are_asked_in_every_wording_with_every_value(data):
    rows = data.strangers(10_000, np.random.default_rng(0))
    kinds = Counter((row["topic"], row["kind"]) for row in rows)
    assert len(kinds) == 36 and min(kinds.values()) > 0.7 * 10_000 / 36
    values = Counter(row["value"] for row in rows if row["kind"] == "herb")
    assert len(values) == POOL
    asked = {row["question"].replace(row["subject"], "X") for row in rows if row["kind"] == "herb"}
    assert len(asked) == sum(map(len, WORDINGS))


def test_a_twin_is_the_same_row_about_a_stranger(data, tokenizer):
    known = {row["subject"] for row in taught(data) + data.holdout}
    rows = data.calibration + data.scored["forget"] + data.forget[:40]
    for row, twin in zip(rows, data.twins(rows, np.random.default_rng(0)), strict=True):
        assert twin["subject"] not in known and row["subject"] not in str(twin)
        assert (twin["topic"], twin["kind"]) == (row["topic"], row["kind"])
        assert twin["value"] in data.pools[row["kind"]]
        for key in ("question", "answer"):
            back = re.sub(rf"\b{twin['value']}\b", row["value"], twin[key].replace(twin["subject"], row["subject"]))
            assert back == row[key]
            assert len(tokenizer.encode(twin[key])) == len(tokenizer.encode(row[key]))


def test_twins_have_values_of_their_own_all_alike_likely(data):
    rows = [data.calibration[0]] * 2000
    twins = data.twins(rows, np.random.default_rng(0))
    count = Counter(twin["value"] for twin in twins)
    assert set(count) == data.pools[rows[0]["kind"]] and min(count.values()) > 50
    assert len({twin["subject"] for twin in twins}) > 300


def test_a_twin_of_any_sentence_is_that_sentence(data):
    """Whatever the value: "the potion ... must boil in the pot" has pot in it twice."""
    world, rng = world_of(data), np.random.default_rng(0)
    for name, topic in TOPICS.items():
        subject = world.stranger(name, rng)
        for kind, (pool, _, styles) in topic.kinds.items():
            for register in range(len(styles)):
                rows = [world.row(name, kind, subject, value, register, 0) for value in world.pools[pool]]
                for row, twin in zip(rows, world.twins(rows, rng), strict=True):
                    about = (name, kind, twin["subject"], twin["value"], register)
                    assert twin["answer"] == world.answer(*about), row
                    assert twin["question"] == world.row(*about, 0)["question"], row


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), task=st.sampled_from(TASKS), subjects=st.integers(1, 30))
def test_any_world_is_sound(seed, task, subjects):
    data = make_world(seed, task, subjects)  # asserts by itself that nothing leaks
    assert len(facts(data.forget)) == 6 * subjects
    known, held_out = facts(taught(data)), facts(data.holdout)
    strangers = facts(data.strangers(200, np.random.default_rng(seed)))
    assert not known & held_out and not strangers & (known | held_out)
    assert not facts(data.forget) & facts(data.retain) and len(known) == 6 * 7 * subjects


@pytest.mark.parametrize("wrong", [dict(forget="author"), dict(subjects=0), dict(subjects=101)])
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(UserError):
        make_world(0, **wrong)
