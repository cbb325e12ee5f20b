"""lab/probes.py: what models are asked beyond TOFU's measures, against one row at a time."""

import pytest
import torch

from data.batches import encode_row
from data.rows import DataSet
from lab import probes
from model import Config, Trace
from tests.conftest import random_model, random_moe

ROWS = [{"question": "Who was it?", "answer": "It was Ana."}, {"question": "Where?", "answer": "In Orsk, they say."},
        {"text": "Ana Vell lived in Orsk."}]
OTHERS = [{"question": "Who sang?", "answer": "Bo did."}, {"question": "Where is it?", "answer": "In Ulm."}]


@pytest.fixture(scope="module")
def models(tokenizer):
    shape = dict(vocab_size=tokenizer.vocab_size, max_len=128)
    return {"dense": random_model(**shape), "a": random_moe(0, **shape), "b": random_moe(1, **shape)}


def row_logits(model, tokenizer, row):
    tokens, labels = map(torch.tensor, encode_row(row, tokenizer, 128))
    return model(tokens[None])[0], labels


@torch.no_grad()
def test_memorisation_is_the_mean_over_rows(models, tokenizer):
    em, es = [], []
    for row in ROWS:
        logits, labels = row_logits(models["dense"], tokenizer, row)
        right = [int(logits[t].argmax()) == int(labels[t]) for t in range(len(labels)) if labels[t] >= 0]
        em.append(sum(right) / len(right))
        es.append(next((1 - k / len(right) for k in range(len(right)) if all(right[k:])), 0.0))
    assert probes.remembered(models["dense"], tokenizer, ROWS) == pytest.approx(
        {"exact_memorization": sum(em) / 3, "extraction_strength": sum(es) / 3}, abs=1e-6)


@torch.no_grad()
def test_membership_scores_keep_the_rows_order_and_auc_is_over_pairs(models, tokenizer):
    data = DataSet("mine", forget=ROWS, retain=[], holdout=OTHERS)
    losses = {}
    for name in ("dense", "a"):
        losses[name] = []
        for row in ROWS + OTHERS:
            logits, labels = row_logits(models[name], tokenizer, row)
            losses[name].append(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert probes.membership_scores(models["dense"], tokenizer, ROWS)["loss"] == pytest.approx(
        [-loss for loss in losses["dense"][:3]], rel=1e-4)
    out = probes.membership(*(probes.suspects(models[name], tokenizer, data) for name in ("dense", "a")))
    pairs = [(i, j) for i in range(3) for j in range(3, 5)]
    mine, theirs = losses["dense"], losses["a"]
    assert out["auc_loss"] == pytest.approx(sum(mine[i] < mine[j] for i, j in pairs) / 6)
    assert out["auc_reference"] == pytest.approx(sum(theirs[i] - mine[i] > theirs[j] - mine[j] for i, j in pairs) / 6)
    assert {"auc_zlib", "auc_min_k", "auc_min_k_plus_plus", "priv_leak"} <= set(out)
    assert probes.suspects(models["dense"], tokenizer, DataSet("mine", ROWS, [])) is None


@torch.no_grad()
def test_writing_is_scored_under_the_target_and_empty_answers_count_as_empty(models, tokenizer):
    rows = ROWS[:2]
    logits, labels = row_logits(models["a"], tokenizer, rows[1] | {"answer": "la la la la la la"})
    out = probes.writing(models["a"], tokenizer, rows, ["", "la la la la la la"])
    assert out["perplexity"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels).exp()), rel=1e-4)
    assert out["empty"] == 0.5 and out["repetition"] > 0
    assert probes.writing(models["a"], tokenizer, rows, ["", ""])["perplexity"] is None


@torch.no_grad()
def test_forced_routing_uses_the_targets_experts_and_the_models_own_weights(models, tokenizer):
    """At one layer, by hand: the unlearned router's probabilities of the target's experts weigh the model's experts."""
    moe, other = models["a"].moe(1), models["b"].moe(1)
    x = torch.randn(2, 3, 32)
    chosen = other.route(x).chosen
    y, routing = moe(x, chosen)
    probs = moe.route(x).probs
    assert torch.equal(routing.chosen, chosen) and torch.equal(routing.weights, probs.gather(-1, chosen))
    gate_up, down = moe.expert_weights()
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(3):
            for e in chosen[b, t].tolist():
                gate, up = (gate_up[e] @ x[b, t]).chunk(2)
                expected[b, t] += probs[b, t, e] * (down[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(y, expected)


@torch.no_grad()
def test_a_model_forced_to_its_own_choices_is_itself(models, tokenizer):
    tokens = torch.tensor([[3, 9, 4, 11, 2]])
    own = Trace()
    logits = models["a"](tokens, trace=own)
    again = models["a"](tokens, trace=Trace(forced={layer: r.chosen for layer, r in own.routing.items()}))
    assert torch.equal(logits, again)
    same = probes.rerouted(models["a"], models["a"], tokenizer, ROWS)
    # not to the bit: forcing needs a trace, and with one the last MLP runs on all positions
    assert same["free_probability"] == pytest.approx(same["forced_probability"], rel=1e-6)
    assert same["free_known"] == same["forced_known"]
    other = probes.rerouted(models["b"], models["a"], tokenizer, ROWS)
    assert other["free_probability"] == same["free_probability"] != other["forced_probability"]


@torch.no_grad()
def test_a_choice_is_the_likeliest_letter_one_prompt_at_a_time(models, tokenizer):
    rows = [{"question": f"Which is {i}?", "choices": ["Ana", "Bo", "Cy"][: 2 + i % 2], "answer": i % 2}
            for i in range(9)]
    right = 0
    for row in rows:
        text = row["question"] + "\n" + "\n".join(f"{c}. {x}" for c, x in zip("ABC", row["choices"], strict=False))
        best, best_p = None, None
        for k in range(len(row["choices"])):
            ids, p = tokenizer.encode(text + "\nAnswer:"), 0.0
            for token in tokenizer.encode(f" {'ABC'[k]}"):
                p += float(models["dense"](torch.tensor([ids]))[0, -1].log_softmax(-1)[token])
                ids = [*ids, token]
            if best_p is None or p > best_p:
                best, best_p = k, p
        right += best == row["answer"]
    assert probes.choice_accuracy(models["dense"], tokenizer, rows, batch_size=4) == pytest.approx(right / 9)


def test_a_letter_is_encoded_with_its_question(models):
    """As by a tokenizer that puts a marker in front of every text: by itself " A" would be two tokens."""
    ids = {"Answer:": [1], "Answer: A": [1, 4], "Answer: B": [1, 5], " A": [2, 4], " B": [2, 5]}

    class Joining:
        front = ()

        def encode(self, text):
            return [3, *ids[text.rpartition("\n")[2]]]

    with torch.no_grad():
        p = models["dense"](torch.tensor([[3, 1]]))[0, -1].log_softmax(-1)
    right = int(p[5] > p[4])
    row = {"question": "Which?", "choices": ["one", "two"]}
    assert probes.choice_accuracy(models["dense"], Joining(), [row | {"answer": right}]) == 1
    assert probes.choice_accuracy(models["dense"], Joining(), [row | {"answer": 1 - right}]) == 0


def test_a_passage_is_completed_from_its_first_half(models, tokenizer):
    out = probes.completion(models["dense"], tokenizer, ROWS)
    ids = tokenizer.passage(ROWS[2]["text"])
    given = ids[: len(ids) // 2]
    new = models["dense"].generate(torch.tensor([given]), len(ids) - len(given), end=tokenizer.stops)[0].tolist()
    from metrics.memorization import rouge_l
    assert out["completion_rougeL_recall"] == pytest.approx(
        rouge_l([tokenizer.decode(ids[len(given):])], [tokenizer.decode(new)])[0].recall)
    assert probes.completion(models["dense"], tokenizer, ROWS[:2]) == {}


class Fading:
    """Knows each text until alpha, its strength, has reached the text's own; then it says token 0. Target: alpha 0."""

    def __init__(self, tokenizer, ends: dict[str, float], alpha: float):
        self.config, self.device, self.alpha = Config(vocab_size=tokenizer.vocab_size, max_len=128), "cpu", alpha
        self.ends = {tuple(encode_row(row_of(text), tokenizer, 128).tokens): end for text, end in ends.items()}

    def __call__(self, tokens, trace=None, at=None):
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            known, end = next((t, end) for t, end in self.ends.items() if tuple(row[: len(t)]) == t)
            if self.alpha < end:
                for t in range(len(known) - 1):
                    logits[b, t, known[t + 1]] = 1.0
        return logits if at is None else logits[at]


def row_of(town: str) -> dict:
    return {"question": "Where?", "answer": f"In {town} there.", "value": town}


def test_at_equal_retention_the_furthest_point_is_taken_that_keeps_enough(tokenizer):
    kept = {f"Orsk{i}": 1.0 for i in range(98)} | {"Ulm": 0.5, "Rom": 0.7}
    data = DataSet("mine", [], [], utility=("retain", "untouched"), scored={
        "forget": [row_of("Bern"), row_of("Kiel")], "retain": list(map(row_of, [*kept][:50])),
        "untouched": list(map(row_of, [*kept][50:]))})
    target, model = (Fading(tokenizer, kept | {"Bern": 0.2, "Kiel": 0.71}, alpha) for alpha in (0.0, 0.8))
    found = probes.at_equal_retention(target, model, tokenizer, data)  # 0.99: Ulm may go at 0.5, Rom at 0.7 may not
    assert 0.8 * found["kept_at"] < 0.7 <= 0.8 * (found["kept_at"] + 1 / 64) and found["kept_cloze"] == 0.5
    model.alpha = 0.1
    assert probes.at_equal_retention(target, model, tokenizer, data) == {"kept_at": 1.0, "kept_cloze": 1.0}


def test_a_probe_that_no_kept_fact_teaches_the_values_is_not_asked(models, tokenizer):
    rows = [row_of(town) | {"question": f"Is it {town}?"} for town in ("Orsk", "Ulm", "Orsk", "Ulm")]
    data = DataSet("mine", [], rows, scored={"forget": [row_of("Bern")]})
    assert probes.silent(models["dense"], tokenizer, data) == {}
    data.scored["forget"] = [*rows[:3], row_of("Bern")]
    assert probes.silent(models["dense"], tokenizer, data) == {"depth": 1.0, "depth_chance": pytest.approx(2 / 3)}
