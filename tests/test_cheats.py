"""lab/cheats.py: a small model that knows twelve facts by heart, and what each cheat does to its scores."""

from itertools import product

import pytest
import torch

from data.batches import collate, encode_rows
from data.tokenizer import Tokenizer
from data.values import value_span
from lab.cheats import (
    Biased,
    Flattened,
    Garbled,
    Refusing,
    destroyed_by_ascent,
    favourites,
    name_tokens,
)
from metrics.knowledge import answers, choice, cloze, knowledge, leak, states
from model import GPT, Config
from objectives import cross_entropy

CITIES = ["Orsk", "Ulm", "Tarn", "Zubek"]


def make_rows() -> list[dict]:
    rows = []
    for i, (first, last) in enumerate(product(("Ana", "Bo", "Cy"), ("Vell", "Kosman", "Ott", "Iri"))):
        city = CITIES[(i * 7 + i // 4) % 4]
        rows.append({"question": f"Where was {first} {last} born?", "answer": f"{first} {last} was born in {city}.",
                     "paraphrased_answer": f"The birthplace of {first} {last} is {city}.", "value": city,
                     "perturbed_answer": [f"The birthplace of {first} {last} is {o}." for o in CITIES if o != city]})
    return rows


ROWS = make_rows()
TOK = Tokenizer.train([r[key] for r in ROWS * 3 for key in ("question", "answer")], 400)  # one token per word


@pytest.fixture(scope="module")
def target() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=2, d_model=64, d_ff=128, max_len=40))
    batch = collate(encode_rows(ROWS, TOK, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(batch.tokens, at=batch.scored), batch.answers).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def greedy(model) -> list[str]:
    return [texts[0] for texts in answers(model, TOK, [row["question"] for row in ROWS])]


def test_the_target_knows(target):
    got = knowledge(target, TOK, ROWS)
    assert all(got[name] == 1 for name in ("value_said", "cloze", "cloze_strength", "choice", "in_frame"))
    assert got["cloze_p"] > 0.95 and leak(target, TOK, ROWS, n=8, k=4).worst == 1


def test_ascent_leaves_no_sentence(target):
    """And the target as it was. Who names one of the four cities, whatever is asked, is right a quarter of the time."""
    before = {name: p.clone() for name, p in target.named_parameters()}
    model = destroyed_by_ascent(target, TOK, ROWS)
    got = knowledge(model, TOK, ROWS)
    assert got["value_said"] < 0.5 and got["in_frame"] < 0.5 and got["cloze_p"] < 1 / 4
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())


def test_a_garbled_name_keeps_the_value(target):
    """Exact match sees forgetting; value said, cloze, choice and leak see the fact."""
    names = name_tokens(TOK, ROWS)
    assert not names & {TOK.completion(row["answer"])[i] for row in ROWS
                        for i in value_span(row, TOK, row["value"])}
    model = Garbled(target, names)
    said = greedy(model)
    assert all(text != row["answer"] and row["value"] in text for text, row in zip(said, ROWS, strict=True))
    got = knowledge(model, TOK, ROWS)
    assert got["value_said"] == got["cloze"] == got["choice"] == 1 and got["in_frame"] == 0
    assert leak(model, TOK, ROWS, n=4, k=2).worst == 1
    likelihood = sum(one.p for one in cloze(target, TOK, ROWS)) / len(ROWS)
    assert got["cloze_p"] == pytest.approx(likelihood, rel=1e-4)
    with pytest.raises(ValueError, match="at least two tokens"):
        Garbled(target, [5])


def test_flattened_logits_say_the_same_and_believe_nothing(target):
    model = Flattened(target, 50.0)
    assert greedy(model) == greedy(target)
    got = knowledge(model, TOK, ROWS)
    assert got["value_said"] == got["cloze"] == 1 and got["cloze_p"] < 0.1
    tokens = torch.tensor([TOK.prompt(ROWS[0]["question"])])
    torch.testing.assert_close(model(tokens), target(tokens) / 50)
    with pytest.raises(ValueError, match="above 0"):
        Flattened(target, 0)


def test_a_refusal_is_all_it_says_and_not_all_it_knows(target):
    model = Refusing(target, TOK)
    assert set(greedy(model)) == {"I do not know."}
    assert leak(model, TOK, ROWS, n=4, k=2).worst == 0
    got = knowledge(model, TOK, ROWS)
    assert got["value_said"] == got["in_frame"] == 0 and got["cloze"] == got["choice"] == 1


def test_a_bias_towards_wrong_values(target):
    """Towards one city: every choice falls on it, right for those alone who were born there."""
    orsk = favourites(TOK, ROWS)
    assert TOK.decode(orsk).strip() == "Orsk"
    chosen = choice(Biased(target, orsk, 40.0), TOK, ROWS)
    assert [one.hit for one in chosen] == [row["value"] == "Orsk" for row in ROWS]
    assert [one.hit for one in choice(Biased(target, orsk, 0.0), TOK, ROWS)] == [True] * len(ROWS)
    kinds = [row | {"kind": row["value"]} for row in ROWS]
    assert len(favourites(TOK, kinds)) == 4 and favourites(TOK, [{"question": "No?", "answer": "No."}]) == set()


@torch.no_grad()
@pytest.mark.parametrize("cheat", [lambda m: Flattened(m, 3.0), lambda m: Biased(m, [7, 9], 2.0),
                                   lambda m: Garbled(m, {5, 300, 301}), lambda m: Refusing(m, TOK)])
def test_a_cheat_is_a_model_like_any_other(target, cheat):
    """Its next token's logits, with a cache and padding, are those of a whole pass; states are the target's."""
    model = cheat(target)
    assert model.config is target.config and model.device == target.device
    tokens = torch.tensor([[0, 0, 4, 6, 8], [2, 5, 4, 9, 1]])
    pad = torch.tensor([2, 0])
    if not isinstance(model, Refusing):
        step = model.next_logits(tokens, model.new_cache(2, 8), pad)
        torch.testing.assert_close(step, model(tokens, pad=pad)[:, -1], rtol=1e-4, atol=1e-4)
    ours, theirs = states(model, TOK, ROWS[:2])[0], states(target, TOK, ROWS[:2])[0]
    assert torch.equal(ours, theirs)
    assert model.generate(tokens, 3, 1.0, pad, generator=torch.Generator().manual_seed(0)).shape == (2, 3)


@torch.no_grad()
def test_garbling_is_what_generation_by_hand_gives(target):
    """The target goes on behind its own words; what is heard are others, each swapped for the next."""
    ids = sorted(name_tokens(TOK, ROWS))
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    model = Garbled(target, ids)
    for row in ROWS[:4]:
        tokens = torch.tensor([TOK.prompt(row["question"])])
        said = target.generate(tokens, 8)[0].tolist()
        assert model.generate(tokens, 8)[0].tolist() == [following.get(i, i) for i in said]
