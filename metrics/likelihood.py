"""How likely a model finds answers, several of them to one question: the question is read once.

    found = likelihoods(model, examples)   # examples: data.batches.encode_row's
    found[0].log_p, found[0].said          # of the first

Shapes: B prompts   P longest prompt   R answers   T longest of them but its first token   V vocabulary
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from belief import all_right, row_log_prob, token_log_probs
from data.batches import IGNORE, Example, answer_length, in_order, left_pad, rows_that_fit
from interfaces import LanguageModel

Prompt = tuple[int, ...]
Found = Iterator[tuple[Tensor, Tensor, Tensor]]  # (R,) each: places among the examples, log p, 1 where said


class Likelihood(NamedTuple):
    """Of one answer behind its prompt."""

    log_p: float  # a sum over its tokens
    said: bool  # every token of it is the likeliest: greedy decoding would say it


@torch.no_grad()
def likelihoods(model: LanguageModel, examples: list[Example], at_most: int = 64,
                bar: tqdm | None = None) -> list[Likelihood]:
    """Of each example's answer, which has a token at least. at_most: answers at once; bar: counts them.

    An example that comes again is not asked again: rounding differs with the place in a batch, and equals are to tie.
    """
    names = [(tuple(example.tokens), tuple(example.labels)) for example in examples]
    different = dict(zip(names, examples, strict=True))
    found = dict(zip(different, of_each(model, list(different.values()), at_most, bar), strict=True))
    if bar is not None:
        bar.update(len(examples) - len(different))
    return [found[name] for name in names]


def of_each(model: LanguageModel, examples: list[Example], at_most: int, bar: tqdm | None) -> list[Likelihood]:
    """The same of examples no two of which are equal."""
    size = rows_that_fit(examples, model.config.vocab_size, at_most)
    of_prompt: dict[Prompt, list[int]] = {}
    for i, example in enumerate(examples):
        of_prompt.setdefault(prompt_of(example), []).append(i)
    tokens = sum(len(example.tokens) for example in examples)
    saved = sum(len(prompt) * (len(places) - 1) for prompt, places in of_prompt.items())
    if saved <= tokens / 10 or not hasattr(model, "behind"):  # not worth a second pass, or a model that has none
        found = alone(model, examples, size)
    else:
        found = shared(model, examples, of_prompt, size)
    out = [Likelihood(0.0, False)] * len(examples)
    for places, log_p, said in found:
        for i, p, right in zip(places.tolist(), log_p.tolist(), said.tolist(), strict=True):
            out[i] = Likelihood(p, bool(right))
        if bar is not None:
            bar.update(len(places))
    return out


def prompt_of(example: Example) -> Prompt:
    """The tokens up to the one that the answer's first is predicted from."""
    return tuple(example.tokens[: len(example.tokens) - answer_length(example) + 1])


def alone(model: LanguageModel, examples: list[Example], size: int) -> Found:
    """Each behind a prompt of its own."""
    for batch in in_order(examples, size, model.device):
        logits = model(batch.tokens, at=batch.scored)
        yield batch.index, row_log_prob(logits, batch.labels), all_right(logits, batch.labels)


def shared(model, examples: list[Example], of_prompt: dict[Prompt, list[int]], size: int) -> Found:
    """Some prompts, each once, and all of their answers at a time."""
    device = model.device
    longest = {prompt: max(answer_length(examples[i]) for i in places) for prompt, places in of_prompt.items()}
    order = sorted(of_prompt, key=lambda prompt: longest[prompt], reverse=True)  # of answers there are most tokens
    for part in portions({prompt: of_prompt[prompt] for prompt in order}, size):
        row = {i: row for row, (_, some) in enumerate(part) for i in some}
        places = sorted(row, key=lambda i: answer_length(examples[i]), reverse=True)
        of = torch.tensor([row[i] for i in places], device=device)
        answers = [examples[i].labels[-answer_length(examples[i]):] for i in places]
        starts = torch.tensor([answer[:1] for answer in answers], device=device)  # (R, 1)
        tails = padded([answer[:-1] for answer in answers], 0).to(device)  # (R, T)
        labels = padded([answer[1:] for answer in answers], IGNORE).to(device)
        tokens, pad = left_pad([list(prompt) for prompt, _ in part], device)
        first, parts = model.behind(tokens, pad, of, tails, labels != IGNORE)
        first = first[of]  # (R, V)
        log_p, said = token_log_probs(first, starts)[:, 0], all_right(first, starts)
        for some, rest in parts:
            log_p[some] += row_log_prob(rest, labels[some])
            said[some] *= all_right(rest, labels[some])
        yield torch.tensor(places), log_p, said


def padded(rows: list[list[int]], value: int) -> Tensor:
    """(R, T) long, `value` at the right of shorter rows."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def portions(of_prompt: dict[Prompt, list[int]], size: int) -> Iterator[list[tuple[Prompt, list[int]]]]:
    """Prompts and their answers' places in this order, at most `size` answers at a time."""
    part: list[tuple[Prompt, list[int]]] = []
    room = size
    for prompt, places in of_prompt.items():
        for some in (places[i : i + size] for i in range(0, len(places), size)):
            if len(some) > room:
                yield part
                part, room = [], size
            part.append((prompt, some))
            room -= len(some)
    yield part
