"""How likely a model finds answers, several of them to one question: the question is read once.

    log_p = answer_log_probs(model, examples)   # examples: data.batches.encode_row's

Shapes: B prompts   P longest prompt   R answers   T longest of them but its first token   V vocabulary
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.batches import IGNORE, Example, answer_length, in_order, left_pad, rows_that_fit
from interfaces import LanguageModel
from objectives import row_log_prob, token_log_probs

Prompt = tuple[int, ...]


@torch.no_grad()
def answer_log_probs(model: LanguageModel, examples: list[Example], at_most: int = 64,
                     bar: tqdm | None = None) -> list[float]:
    """log p(answer | prompt) of each, a sum over its answer's tokens. at_most: answers at once; bar: counts them."""
    size = rows_that_fit(examples, model.config.vocab_size, at_most)
    out = torch.zeros(len(examples))
    of_prompt: dict[Prompt, list[int]] = {}
    for i, example in enumerate(examples):
        of_prompt.setdefault(prompt_of(example), []).append(i)
    tokens = sum(len(example.tokens) for example in examples)
    saved = sum(len(prompt) * (len(places) - 1) for prompt, places in of_prompt.items())
    if saved <= tokens / 10 or not hasattr(model, "behind"):  # not worth a second pass, or a model that has none
        found = alone(model, examples, size)
    else:
        found = shared(model, examples, of_prompt, size)
    for index, log_p in found:
        out[index.cpu()] = log_p.float().cpu()
        if bar is not None:
            bar.update(len(index))
    return out.tolist()


def prompt_of(example: Example) -> Prompt:
    """The tokens up to the one that the answer's first is predicted from."""
    return tuple(example.tokens[: len(example.tokens) - answer_length(example) + 1])


def alone(model: LanguageModel, examples: list[Example], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(places among the examples, log p of each), each behind a prompt of its own."""
    for batch in in_order(examples, size, model.device):
        yield batch.index, row_log_prob(model(batch.tokens, at=batch.scored), batch.labels)


def shared(model, examples: list[Example], of_prompt: dict[Prompt, list[int]],
           size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, some prompts and all of their answers at a time."""
    device = model.device
    for prompts in portions(of_prompt, size):
        places = [i for prompt in prompts for i in of_prompt[prompt]]
        of = torch.tensor([row for row, prompt in enumerate(prompts) for _ in of_prompt[prompt]], device=device)
        answers = [examples[i].labels[-answer_length(examples[i]):] for i in places]
        starts = torch.tensor([answer[:1] for answer in answers], device=device)  # (R, 1)
        tails = padded([answer[:-1] for answer in answers], 0).to(device)
        labels = padded([answer[1:] for answer in answers], IGNORE).to(device)
        tokens, pad = left_pad([list(prompt) for prompt in prompts], device)
        first, rest = model.behind(tokens, pad, of, tails, labels != IGNORE)
        yield torch.tensor(places), token_log_probs(first[of], starts)[:, 0] + row_log_prob(rest, labels)


def padded(rows: list[list[int]], value: int) -> Tensor:
    """(R, T) long, `value` at the right of shorter rows."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def portions(of_prompt: dict[Prompt, list[int]], size: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, as many as have `size` answers in all, or one."""
    part: list[Prompt] = []
    answers = 0
    for prompt in sorted(of_prompt, key=len, reverse=True):
        if part and answers + len(of_prompt[prompt]) > size:
            yield part
            part, answers = [], 0
        part.append(prompt)
        answers += len(of_prompt[prompt])
    yield part
