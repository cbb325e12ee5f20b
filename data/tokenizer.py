"""A byte-pair vocabulary trained on the data once, encoded by tiktoken (arXiv 1508.07909; byte-level as in GPT-2).

    tok = Tokenizer.train(texts, vocab_size=1024)
    ids = tok.encode("a question")
    prompt = tok.prompt("Where was Ana Vell born?"); answer = tok.completion("Ana Vell was born in Orsk.")

Prompt and answer are encoded apart and joined as ids, so an answer's labels never depend on how the prompt ends.
On disk: `tokenizer.tiktoken`, one `base64(bytes) rank` line per token, tiktoken's own text format.
"""

import base64
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from errors import UserError

# Words with their leading space, numbers in groups of up to three, runs of punctuation.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}|'(?:s|t|re|ve|m|ll|d)| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = ["<|end|>", "<|question|>", "<|answer|>"]
FILE = "tokenizer.tiktoken"


def train_ranks(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Merge the most frequent neighbouring pair again and again; ties go to the smaller pair of ids.

    Returns token bytes -> rank, the 256 single bytes first. Fewer than vocab_size where nothing is left to merge.
    """
    words = Counter(piece.encode() for text in texts for piece in regex.findall(PATTERN, text))
    tokens = [bytes([b]) for b in range(256)]
    spelled = [(list(word), count) for word, count in sorted(words.items())]
    pair_count: Counter = Counter()
    where = defaultdict(set)  # pair -> words that may hold it
    for i, (ids, count) in enumerate(spelled):
        for pair in pairwise(ids):
            pair_count[pair] += count
            where[pair].add(i)
    # The heap holds every pair with its present count, and older counts too: those are skipped when they come up.
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        count, best = heapq.heappop(heap)
        if -count != pair_count[best]:
            continue
        if -count < 2:
            break
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        changed = set()
        for i in where.pop(best):
            ids, count = spelled[i]
            for pair in pairwise(ids):
                pair_count[pair] -= count
                changed.add(pair)
            merged, j = [], 0
            while j < len(ids):
                if j + 1 < len(ids) and (ids[j], ids[j + 1]) == best:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(ids[j])
                    j += 1
            spelled[i] = (merged, count)
            for pair in pairwise(merged):
                pair_count[pair] += count
                where[pair].add(i)
                changed.add(pair)
        for pair in changed - {best}:
            heapq.heappush(heap, (-pair_count[pair], pair))
        del pair_count[best]
    return {token: rank for rank, token in enumerate(tokens)}


class Tokenizer:
    """Text <-> ids for the small models. Special tokens come after the ranks."""

    def __init__(self, ranks: dict[bytes, int]):
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.ranks = ranks
        self.encoding = tiktoken.Encoding("nanounlearn", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.end, self.question, self.answer = (special[name] for name in SPECIAL)
        self.stops = {self.end}
        self.front: list[int] = []  # nothing stands in front of running text
        self.vocab_size = len(ranks) + len(special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """vocab_size counts the special tokens."""
        return cls(train_ranks(texts, vocab_size - len(SPECIAL)))

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token; special tokens are left out."""
        kept = []
        for i in ids:
            if i == self.end:
                break
            if i < len(self.ranks):
                kept.append(int(i))
        return self.encoding.decode(kept)

    def prompt(self, question: str) -> list[int]:
        """Ids of `<|question|> question <|answer|>`: what the model is given."""
        return [self.question, *self.encode(question), self.answer]

    def completion(self, answer: str) -> list[int]:
        """Ids of `answer <|end|>`: what it is to say."""
        return [*self.encode(answer), self.end]

    def passage(self, text: str) -> list[int]:
        """Ids of `text <|end|>`: running text, no question."""
        return self.completion(text)

    def save(self, folder: Path) -> None:
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in self.ranks.items()]
        (Path(folder) / FILE).write_text("\n".join(lines) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Raises UserError where the file is missing or its lines are not `base64 rank` with ranks 0, 1, 2..."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"{path} is missing: this folder holds no tokenizer of ours")
        ranks = {}
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                token, rank = line.split()
                if int(rank) != number - 1:
                    raise ValueError("ranks count up from 0: special tokens come right after the last")
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise UserError(f"{path} line {number} is not 'base64 rank': fetch or train it again") from None
        if len(ranks) < 256:
            raise UserError(f"{path} holds {len(ranks)} tokens, fewer than the 256 bytes: fetch or train it again")
        return cls(ranks)
