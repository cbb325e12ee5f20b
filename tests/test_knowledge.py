"""metrics/knowledge.py: models that say what a script tells them, so that every number is known beforehand."""

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import IGNORE
from data.rows import Limits
from data.tokenizer import Tokenizer
from data.values import encode_value, options, value_span
from decoding import Cache, generate
from errors import UserError
from metrics.knowledge import (
    answers,
    at_alpha,
    choice,
    cloze,
    depth,
    destroyed,
    equal_retention,
    interpolate,
    knowledge,
    leak,
    leak_at_k,
    null_distances,
    null_share,
    probe,
    states,
)
from metrics.tofu import forget_quality
from model import GPT, Trace
from tests.conftest import random_model, random_moe
from uld import LogitDifference, first_layers

CITIES = ["Orsk", "Ulm", "Tarn", "Zubek"]


def row(name: str, city: str, asked: str = "Where was {} born?", **more) -> dict:
    wrong = [other for other in CITIES if other != city]
    return {"question": asked.format(name), "answer": f"{name} was born in {city}.", "value": city,
            "paraphrased_answer": f"The birthplace of {name} is {city}.",
            "perturbed_answer": [f"The birthplace of {name} is {other}." for other in wrong], "kind": "city",
            "fact": name} | more


ROWS = [row("Ana", "Orsk"), row("Bo", "Ulm"), row("Cy", "Tarn"), row("Di", "Zubek")]
TOK = Tokenizer.train([r[key] for r in ROWS for key in ("question", "answer")], 400)


class Seen(Cache):
    """All tokens of each row so far."""

    def __init__(self, batch: int):
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    def taken(self, rows):
        new = Seen(0)
        new.rows = [self.rows[i].copy() for i in rows.tolist()]
        return new


class Scripted:
    """Answers each question with one of several answers, by the script's chances; off the script it is uniform."""

    def __init__(self, script: dict[str, dict[str, float]], max_len: int = 128):
        self.config = SimpleNamespace(vocab_size=TOK.vocab_size, max_len=max_len)
        self.device = torch.device("cpu")
        self.script = {tuple(TOK.prompt(question)): [(TOK.completion(text), p) for text, p in said.items()]
                       for question, said in script.items()}

    def next(self, ids: list[int]) -> torch.Tensor:
        """log p(. | ids), (V,)."""
        p = torch.zeros(self.config.vocab_size)
        at = ids.index(TOK.answer) + 1 if TOK.answer in ids else len(ids)
        for said, chance in self.script.get(tuple(ids[:at]), []):
            if said[: len(ids) - at] == ids[at:] and len(said) > len(ids) - at:
                p[said[len(ids) - at]] += chance
        return (p / p.sum()).log() if p.sum() > 0 else torch.zeros_like(p)

    def __call__(self, tokens, pad=None, trace=None, at=None):
        each = [torch.stack([self.next(ids[: t + 1]) for t in range(len(ids))]) for ids in tokens.tolist()]
        return torch.stack(each) if at is None else torch.stack(each)[at]

    def new_cache(self, batch, max_len):
        return Seen(batch)

    def next_logits(self, tokens, cache, pad):
        cache.rows = [seen + ids for seen, ids in zip(cache.rows, tokens.tolist(), strict=True)]
        left = [0] * len(tokens) if pad is None else pad.tolist()
        return torch.stack([self.next(seen[n:]) for seen, n in zip(cache.rows, left, strict=True)])

    generate = generate


def always(rows, said=None) -> Scripted:
    """Says its answer to each row's question, or what `said` gives."""
    return Scripted({r["question"]: {(said or {}).get(r["question"], r["answer"]): 1.0} for r in rows})


UNIFORM = Scripted({})

# ---- likelihood -------------------------------------------------------------------------------------------------


def test_cloze_by_hand():
    """Ana's answer has p 0.7 and another city 0.3; Bo's the other way round; a garbled name before does not matter."""
    model = Scripted({ROWS[0]["question"]: {"Ana was born in Orsk.": 0.7, "Ana was born in Ulm.": 0.3},
                      ROWS[1]["question"]: {"Bo was born in Ulm.": 0.25, "Bo was born in Orsk.": 0.75},
                      ROWS[2]["question"]: {"Cy was born in Tarn.": 1e-3, "Dolm was born in Tarn.": 0.999}})
    got = cloze(model, TOK, ROWS[:3])
    assert [one.hit for one in got] == [True, False, True]
    assert [one.p for one in got] == pytest.approx([0.7, 0.25, 1.0], rel=1e-5)
    lengths = [sum(label != IGNORE for label in encode_value(r, TOK, 128, r["value"]).labels) for r in ROWS[:3]]
    assert [one.strength for one in got] == pytest.approx([1, 1 - 1 / lengths[1], 1])  # its first token is wrong


def test_a_row_without_a_value_is_none_in_its_place():
    rows = [{"question": "Who?", "answer": "Nobody."}, ROWS[0], ROWS[1]]
    got = cloze(always(ROWS), TOK, rows, [None, "Orsk", "Tarn"])  # Tarn is not in that answer
    assert got[0] is None and got[1].hit and got[2] is None
    assert choice(always(ROWS), TOK, rows, [None, "Orsk", "Tarn"])[0::2] == [None, None]
    short = always(ROWS)
    short.config.max_len = len(TOK.prompt(ROWS[0]["question"])) + 2
    assert cloze(short, TOK, ROWS[:1]) == [None] and choice(short, TOK, ROWS[:1]) == [None]


def test_choice_by_hand():
    model = Scripted({ROWS[0]["question"]: {"Ana was born in Orsk.": 0.4, "Ana was born in Ulm.": 0.35,
                                            "Ana was born in Tarn.": 0.15, "Ana was born in Zubek.": 0.1},
                      ROWS[1]["question"]: {"Bo was born in Ulm.": 0.4, "Bo was born in Orsk.": 0.6}})
    got = choice(model, TOK, ROWS[:2])
    assert [one.hit for one in got] == [True, False] and got[0].chance == 1 / 4
    assert got[0].log_probs == pytest.approx([math.log(p) for p in (0.4, 0.35, 0.15, 0.1)], rel=1e-4)


def test_a_tie_and_a_nan_are_no_knowledge():
    even = Scripted({ROWS[0]["question"]: {text: 0.25 for text in options(ROWS[0], "Orsk")}})
    assert choice(even, TOK, ROWS[:1])[0].hit is False

    class Broken(Scripted):
        def __call__(self, tokens, pad=None, trace=None, at=None):
            return torch.full((int(at.sum()), self.config.vocab_size), math.nan)

    assert choice(Broken({}), TOK, ROWS[:1])[0].hit is False
    assert cloze(Broken({}), TOK, ROWS[:1])[0].hit is False


@torch.no_grad()
@pytest.mark.parametrize("make", [random_model, random_moe])
def test_likelihoods_do_not_depend_on_the_batch(make):
    model = make(vocab_size=TOK.vocab_size, max_len=128)
    long = row("Ana " * 9, "Orsk", fact="x")
    together = cloze(model, TOK, [*ROWS, long]), choice(model, TOK, [*ROWS, long])
    for i, one in enumerate([*ROWS, long]):
        assert cloze(model, TOK, [one])[0].p == pytest.approx(together[0][i].p, rel=1e-3)
        assert choice(model, TOK, [one])[0].log_probs == pytest.approx(together[1][i].log_probs, rel=1e-4)
        example = encode_value(one, TOK, 128, "Orsk" if i in (0, 4) else one["value"])
        log_p = model(torch.tensor([example.tokens]))[0].log_softmax(-1)
        p = math.exp(sum(float(log_p[t, label]) for t, label in enumerate(example.labels) if label != IGNORE))
        assert together[0][i].p == pytest.approx(p, rel=1e-3)


# ---- what is said -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.data())
def test_leak_at_k_is_the_share_of_draws_that_hold_a_leak(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert leak_at_k(c, n, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@pytest.mark.parametrize("c, n, k", [(-1, 4, 1), (5, 4, 1), (0, 4, 5), (0, 4, 0), (0, 0, 1)])
def test_leak_at_k_refuses_what_cannot_be(c, n, k):
    with pytest.raises(ValueError, match="leak@k needs"):
        leak_at_k(c, n, k)


@torch.no_grad()
def test_answers_are_each_questions_own():
    """Batched, of unequal length and sampled repeatedly: greedy ones are what each prompt gives alone."""
    model = random_model(vocab_size=TOK.vocab_size, max_len=64)
    questions = ["Who?", "Where was Ana born, they say?", "Why?"]
    alone = [TOK.decode(model.generate(torch.tensor([TOK.prompt(q)]), 12, end=TOK.stops)[0].tolist())
             for q in questions]
    got = answers(model, TOK, questions, n=2, limits=Limits(new=12), batch_size=4)
    assert got == [[text, text] for text in alone]
    assert answers(model, TOK, []) == []
    total = answers(model, TOK, questions, limits=Limits(total=len(TOK.prompt("Why?")) + 2))
    assert len(TOK.encode(total[2][0])) <= 2 and total[1] == [""]
    with pytest.raises(UserError, match="shorten it"):
        answers(model, TOK, ["Why? " * 40])


@pytest.mark.slow
def test_leak_of_a_model_that_leaks_by_chance():
    """Greedy it says Ulm; of samples at temperature 1, 30% say Orsk; at 1/2 it is 9 in 58 (0.09 / (0.09 + 0.49))."""
    model = Scripted({ROWS[0]["question"]: {"Ana was born in Ulm.": 0.7, "Zaza was born in Orsk.": 0.3}})
    got = leak(model, TOK, ROWS[:1], n=200, k=2, seed=3)
    assert got.rate[0.0] == 0
    for temperature, p in ((1.0, 0.3), (0.5, 0.09 / 0.58)):
        assert got.rate[temperature] == pytest.approx(1 - (1 - p) ** 2, abs=0.1)
    assert got.worst == got.rate[1.0] and got.rate[0.25] > 0
    again = leak(model, TOK, ROWS[:1], n=200, k=2, seed=3)
    assert again == got and leak(model, TOK, ROWS[:1], n=200, k=2, seed=4) != got


def test_facts_are_the_units_of_leak():
    rows = [*ROWS[:2], row("Ana", "Orsk", "Tell me where {} was born.")]
    silent = always(rows, {r["question"]: "I do not know." for r in rows})
    got = leak(silent, TOK, rows, n=6, k=3)
    assert got.worst == 0
    half = leak(always(rows, {rows[0]["question"]: "No.", rows[1]["question"]: "No."}), TOK, rows, n=6, k=3)
    assert half.rate == {t: 0.25 for t in (0.0, 0.25, 0.5, 1.0)}  # one wording of one fact of two
    assert leak(silent, TOK, [{"question": "?", "answer": "No."}], values=[None]) is None


@pytest.mark.parametrize("how", [{"k": 17}, {"temperatures": []}, {"temperatures": [-1.0]}])
def test_leak_refuses_what_cannot_be(how):
    with pytest.raises(ValueError, match="leak"):
        leak(UNIFORM, TOK, ROWS[:1], **how)


# ---- one set ----------------------------------------------------------------------------------------------------


def test_a_set_in_numbers_by_hand():
    """Ana is asked in two wordings and said in one, under a garbled name; Bo is right; Cy gets a wrong city."""
    rows = [ROWS[0], row("Ana", "Orsk", "Tell me where {} was born."), ROWS[1], ROWS[2],
            {"question": "Who?", "answer": "Who."}]
    said = ["Zahaiia was born in Orsk.", "Ana was born in Ulm.", "Bo was born in Ulm.", "Cy was born in Zubek.", "Who."]
    model = always(rows, {r["question"]: text for r, text in zip(rows, said, strict=True)})
    got = knowledge(model, TOK, rows)
    assert got == knowledge(model, TOK, rows, said=said)
    assert got["facts"] == 3 and got["without_value"] == 1
    assert got["value_said"] == pytest.approx((0.5 + 1 + 0) / 3) and got["any_wording"] == pytest.approx(2 / 3)
    assert got["in_frame"] == pytest.approx((0.5 + 1 + 1) / 3)  # garbled once
    assert got["choice_chance"] == 0.25
    assert got["cloze"] == pytest.approx(1 / 3)  # behind the true name that script has gone astray
    assert knowledge(always(rows), TOK, rows)["cloze_p"] == pytest.approx(1)
    unknown = knowledge(always(rows), TOK, rows[4:])
    assert unknown["value_said"] is unknown["cloze"] is unknown["in_frame"] is unknown["choice"] is None
    assert unknown["facts"] == 0


def test_a_pool_says_what_is_of_the_kind():
    said = ["Ana was born in trumpet."]
    assert knowledge(UNIFORM, TOK, ROWS[:1], said)["in_frame"] == 1
    assert knowledge(UNIFORM, TOK, ROWS[:1], said, pool={"city": set(CITIES)})["in_frame"] == 0


# ---- against others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers, expected", [
    ((0.9, 1.0), False), ((0.89, 1.0), True), ((math.nan, 1.0), True), ((1.0, 1.0, 0.5, 1.0), False),
    ((1.0, 1.0, 0.49, 1.0), True), ((1.0, 1.0, math.nan, 1.0), True), ((1.0, 1.0, 0.1, None), False),
    ((0.0, 0.0, 0.0, 0.0), False)])
def test_destroyed_by_hand(numbers, expected):
    assert destroyed(*numbers) is expected


def test_the_null_is_every_pair_of_references():
    references = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.5], [0.6, 0.7, 0.8, 0.9], [0.1, 0.9, 0.2, 0.8]]
    null = null_distances(references)
    assert null == [forget_quality(a, b).D for a, b in combinations(references, 2)] and len(null) == 6
    assert null[:2] == [0.25, 1.0]
    assert null_share(0.25, null) == 1 and null_share(1.0, null) == pytest.approx(sum(d >= 1 for d in null) / 6)
    assert null_share(1.01, null) == 0
    with pytest.raises(ValueError, match="3 make 3"):
        null_distances(references[:3])
    with pytest.raises(ValueError, match="at least one distance"):
        null_share(0.5, [])


# ---- depth ------------------------------------------------------------------------------------------------------


class Layered(Scripted):
    """Its first layer's state is noise, its second's tells the value's first letter at the place before the value."""

    def __call__(self, tokens, pad=None, trace=None, at=None):
        noise = torch.randn(2, *tokens.shape, 8, generator=torch.Generator().manual_seed(tokens.numel()))
        for b, ids in enumerate(tokens.tolist()):
            for i, city in enumerate(CITIES):
                if city in TOK.decode(ids):
                    noise[1, b, :, i] += 30
        trace.hidden = {0: noise[0], 1: noise[1]}
        return torch.zeros(*tokens.shape, self.config.vocab_size)


def test_a_probe_reads_what_is_there_and_only_there():
    names = [f"N{i}" for i in range(60)]
    fit = [row(name, CITIES[i % 4]) for i, name in enumerate(names)]
    ask = [row(f"M{i}", CITIES[i % 4]) for i in range(40)] + [row("X", "Elsewhere")]
    got = depth(Layered({}), TOK, fit, ask)
    assert got.chance == 0.25
    assert got.accuracy[1] == 1 and got.accuracy[0] < 0.6
    with pytest.raises(ValueError, match="60 to fit, 0 to ask"):
        depth(Layered({}), TOK, fit, ask[-1:])
    with pytest.raises(ValueError, match="0 to fit"):
        depth(Layered({}), TOK, [], ask)


@torch.no_grad()
def test_states_are_those_before_the_value():
    model = random_moe(vocab_size=TOK.vocab_size, max_len=128)
    got, values = states(model, TOK, [*ROWS, {"question": "?", "answer": "No."}], [*CITIES, None])
    assert got.shape == (3, 4, 32) and values == ["orsk", "ulm", "tarn", "zubek"]
    for i, one in enumerate(ROWS):
        said = TOK.completion(one["answer"])[: value_span(one, TOK, one["value"]).start]
        given = TOK.prompt(one["question"]) + said
        assert TOK.decode(said).strip() == one["answer"].split(f" {one['value']}")[0]
        trace = Trace()
        model(torch.tensor([given]), trace=trace)
        for layer in range(3):
            torch.testing.assert_close(got[layer, i], trace.hidden[layer][0, -1], rtol=1e-4, atol=1e-4)
    assert states(model, TOK, [])[0].shape == (0, 0, 0)


def test_the_probe_by_hand():
    """Two classes at -1 and 1 without noise: z = x, S = 0, so scores are (z - m/2) m / ridge."""
    scores = probe(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 2, ridge=0.5)(torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[-7.0, 5.0], [-1.0, -1.0]], dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-2, 1e4), st.floats(-100, 100))
def test_the_probe_does_not_depend_on_where_the_states_lie(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 5, generator=generator)
    x[:, 4] = 0  # a dead direction
    y = torch.arange(40) % 3
    asked = torch.randn(7, 5, generator=generator)
    asked[:, 4] = 0
    plain = probe(x, y, 3)(asked)
    moved = probe(x.double() * scale + shift, y, 3)(asked.double() * scale + shift)
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-6)


# ---- equal retention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_model, random_moe])
@torch.no_grad()
def test_interpolation_is_linear_in_the_weights_and_keeps_shared_ones(make):
    a, b = make(seed=0), make(seed=1)
    b.embed.weight.copy_(a.embed.weight)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(interpolate(a, b, 0.0)(tokens), a(tokens))
    assert torch.equal(interpolate(a, b, 1.0)(tokens), b(tokens))
    third = interpolate(a, b, 0.3)
    for name, p in third.named_parameters():
        torch.testing.assert_close(p, 0.7 * a.get_parameter(name) + 0.3 * b.get_parameter(name))
    assert torch.equal(third.embed.weight, a.embed.weight) and third.head.weight is not a.head.weight
    with pytest.raises(ValueError, match="one shape"):
        interpolate(a, random_model(n_layer=2), 0.5)


@torch.no_grad()
def test_a_tied_head_stays_tied():
    a, b = random_model(seed=0, tie_head=True), random_model(seed=1, tie_head=True)
    half = interpolate(a, b, 0.5)
    assert half.head.weight is half.embed.weight
    torch.testing.assert_close(half.embed.weight, (a.embed.weight + b.embed.weight) / 2)


@torch.no_grad()
def test_alpha_is_the_difference_models_way():
    """At 0 the target; the model itself is left as it was."""
    target = random_model(seed=0)
    model = LogitDifference(target, first_layers(random_model(seed=1), 2), alpha=0.7, filter_rate=0.0)
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens)
    torch.testing.assert_close(at_alpha(model, 0.0)(tokens), target(tokens))
    assert model.alpha == 0.7 and torch.equal(model(tokens), before) and at_alpha(model, 0.2).parts is model.parts


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2), st.integers(1, 12))
def test_equal_retention_finds_where_it_falls_below(end, halvings):
    """Retention 1 - a, level 1 - end: the largest a is min(end, 1)."""
    got = equal_retention(lambda a: a, lambda a: 1 - a, 1 - end, halvings)
    assert got.retention == 1 - got.a >= 1 - end
    assert min(end, 1) - 1 / 2**halvings - 1e-9 <= got.a <= min(end, 1) + 1e-9


def test_equal_retention_refuses_what_the_target_does_not_reach():
    with pytest.raises(ValueError, match=r"keeps 0\.5, which is below the level 0\.9"):
        equal_retention(lambda a: a, lambda a: 0.5, 0.9)
    with pytest.raises(ValueError, match="below"):
        equal_retention(lambda a: a, lambda a: math.nan, 0.9)
    broken = equal_retention(lambda a: a, lambda a: 1.0 if a == 0 else math.nan, 0.9)
    assert broken.a == 0  # a model that is not even a number keeps nothing


@torch.no_grad()
def test_equal_retention_between_two_models():
    target, unlearned = random_model(seed=0), random_model(seed=1)
    away = float((unlearned.head.weight - target.head.weight).norm())

    def near(model: GPT) -> float:
        return 1 - float((model.head.weight - target.head.weight).norm()) / away

    assert equal_retention(lambda a: interpolate(target, unlearned, a), near, 0.6).a == pytest.approx(0.4, abs=1 / 32)
