"""A public checkpoint's own tokenizer (`tokenizer.json`) and chat template, with the surface of data/tokenizer.py.

    tok = HubTokenizer.load(folder)                     # template="llama2": instead of what the folder points to
    prompt = tok.prompt("Where was Ana Vell born?"); answer = tok.completion("Ana Vell was born in Orsk.")

A row is  before + question + between | lead + answer + end : the prompt ends at the bar. The answer is encoded as it
stands behind `between`, which is the same for all rows, so its ids never depend on the question; and they are what
the whole conversation, encoded at once, has there.

Which template, in this order: the one asked for; the one a folder saved by this project names; TOFU's for Llama-2-chat
and Llama-3.x-Instruct, told by their chat template's markers; the checkpoint's own chat template, read off by
rendering it once; without one, that of the end-of-turn token; else `plain`.

Special tokens spelled out in a row's text are text and nothing else, as with data/tokenizer.py (transformers would take
them for special tokens, and a row could end its own answer).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import regex
import tokenizers

from errors import UserError, shown
from flags import Number
from hub.sandbox import check_tokenizer, render
from schema import parse_json, read_bytes, read_json

# What is kept beside the weights, so that a saved folder tokenizes as the original did.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json")
OURS = "nanounlearn_template"  # key in tokenizer_config.json: the template a model was trained with, where asked for
TOKEN = (str, {"content": str}, None)
IDS = (Number(0, 2**31, whole=True), [Number(0, 2**31, whole=True)], None)
NAMED = {"bos_token?": TOKEN, "eos_token?": TOKEN, OURS + "?": str,
         "chat_template?": (str, [{"name": str, "template": str}], None)}
NUMBERED = {"bos_token_id?": IDS, "eos_token_id?": IDS}


class Template(NamedTuple):
    """Texts around question and answer. begin: token in front, None: what the tokenizer itself puts in front."""

    before: str
    between: str
    end: str | None  # the token that ends the answer, None: the checkpoint's end-of-text token
    lead: str = ""  # stands before the answer and is scored with it
    begin: str | None = ""
    strip: bool = False  # the template drops white space around question and answer


SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATES = {
    # arXiv 2401.06121 and open-unlearning: no space before the answer, no system prompt
    "llama2": Template("[INST] ", " [/INST]", "</s>", begin="<s>"),
    # open-unlearning: a system prompt of its own and a fixed date, so that scores do not move with the calendar
    "llama3": Template("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                       "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
                       "<|start_header_id|>user<|end_header_id|>\n\n",
                       "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
                       begin="<|begin_of_text|>", strip=True),
    "smollm2": Template(f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n<|im_start|>user\n",
                        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    # arXiv 2401.06121's for base models (phi-1.5). The space goes with the answer, as it does in running text.
    "plain": Template("Question: ", "\nAnswer:", None, lead=" ", begin=None),
}


class HubTokenizer:
    """Text <-> ids through the `tokenizers` library, and the ids of prompt and answer in one template."""

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, bytes], template: Template, begin: int | None,
                 end: int, stops: set[int]):
        self.backend, self.files, self.template = backend, files, template
        self.begin, self.end, self.stops = begin, end, stops | {end}  # chat models may have several ends
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        self.special = regex.compile("|".join(map(regex.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.between = self.encode(template.between, special=True)
        # what the tokenizer itself puts in front of running text: a beginning-of-text token, or nothing
        self.front = [begin] if begin is not None and backend.encode("a").ids[0] == begin else []
        first = backend.token_to_id(template.begin) if template.begin else None
        self.before = self.front if template.begin is None else [] if first is None else [first]

    @classmethod
    def load(cls, folder: Path, template: str | None = None) -> "HubTokenizer":
        """Raises UserError for a damaged file, an unknown template, or one whose tokens this vocabulary lacks."""
        folder = Path(folder)
        files = {name: read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise UserError(f"{folder / 'tokenizer.json'} is missing")
        try:
            check_tokenizer(files["tokenizer.json"])
        except ValueError as error:
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}): download it again") from None
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        backend.no_padding()
        backend.no_truncation()
        if template is not None:
            settings = parse(files, "tokenizer_config.json", folder) | {OURS: template}
            files["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
        tokens = special_tokens(files, folder, backend)
        chosen = choose(files, folder, tokens)
        name = f"template {template!r}" if template else f"{folder}: its chat template"
        for token in (chosen.begin, chosen.end):
            if token and backend.token_to_id(token) is None:
                raise UserError(f"{name} needs the token {token}, which this tokenizer lacks: choose another of "
                                f"{', '.join(TEMPLATES)}")
        begin, end = (backend.token_to_id(token) if token else None
                      for token in (tokens["bos_token"], chosen.end or tokens["eos_token"]))
        if end is None:
            raise UserError(f"{folder}: no file names an end-of-text token; add eos_token to tokenizer_config.json")
        ends = parse(files, "generation_config.json", folder).get("eos_token_id") or []
        return cls(backend, files, chosen, begin, end, set(ends if isinstance(ends, list) else [ends]))

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, in which special tokens are spelled like other words; special: they are tokens."""
        return self.ids(text, special=special, front=False)

    def ids(self, text: str, special: bool, front: bool) -> list[int]:
        """front: with what the tokenizer itself puts there. Raises UserError for a text on which its pattern fails."""
        self.backend.encode_special_tokens = not special
        try:
            return self.backend.encode(text, add_special_tokens=front).ids
        except BaseException as error:  # the library's panic is no Exception, and so nobody's but ours to catch
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the tokenizer's pattern gives up on {shown(text[:60])}: shorten that text, or use the "
                            "tokenizer of another model") from None

    def encode_inside(self, before: str, text: str, after: str) -> list[int]:
        """Ids of a row's text between two pieces of a template, whose special tokens are tokens.

        As one text, so that words may merge across the seams; a text that spells special tokens is encoded apart from
        them, beginning and ending where the template's own special tokens do.
        """
        if not self.special.search(text):
            return self.encode(before + text + after, special=True)
        first = max((found.end() for found in self.special.finditer(before)), default=0)
        last = min((found.start() for found in self.special.finditer(after)), default=len(after))
        return [*self.encode(before[:first], special=True), *self.encode(before[first:] + text + after[:last]),
                *self.encode(after[last:], special=True)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first token that ends a turn or text; special tokens are left out."""
        kept = []
        for i in ids:
            if int(i) in self.stops:
                break
            kept.append(int(i))
        return self.backend.decode(kept, skip_special_tokens=True)

    def prompt(self, question: str) -> list[int]:
        """Ids up to where the answer begins: what the model is given."""
        t = self.template
        question = question.strip() if t.strip else question
        return [*self.before, *self.encode_inside(t.before, question, t.between)]

    def completion(self, answer: str) -> list[int]:
        """Ids of the answer and the end token: what it is to say."""
        t = self.template
        answer = t.lead + (answer.strip() if t.strip else answer)
        ids = self.encode_inside(t.between, answer, "")
        joined = ids[: len(self.between)] == self.between  # false where the two would merge into one token
        return [*(ids[len(self.between):] if joined else self.encode(answer)), self.end]

    def passage(self, text: str) -> list[int]:
        """Ids of running text: no template, and in front only what the tokenizer itself puts there."""
        return self.ids(text, special=False, front=True)


class NoTokenizer:
    """Stands for the tokenizer of a folder without one; whatever asks it for anything raises UserError."""

    def __init__(self, folder: Path):
        self.__dict__["folder"] = folder

    def save(self, folder: Path) -> None:
        """Nothing to write."""

    def __getattr__(self, name: str):
        if name in ("begin", "end") or name.startswith("__"):  # asked for only if there
            raise AttributeError(name)
        raise UserError(f"{self.folder} has no tokenizer.json: put the model's own beside the weights (from "
                        "tokenizer.model: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))")


def parse(files: dict[str, bytes], name: str, folder: Path) -> dict:
    """One of a checkpoint's JSON files, {} where absent. Raises UserError where it holds something else."""
    schema = NUMBERED if name == "generation_config.json" else NAMED
    return parse_json(files.get(name, b"{}"), schema, str(folder / name), "download it again")


def special_tokens(files: dict[str, bytes], folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """bos_token and eos_token as texts, from whichever of the checkpoint's files names them; None where none does."""
    named = parse(files, "special_tokens_map.json", folder) | parse(files, "tokenizer_config.json", folder)
    ids = read_json(folder / "config.json", NUMBERED) if (folder / "config.json").is_file() else {}
    ids |= parse(files, "generation_config.json", folder)
    out = {}
    for kind in ("bos_token", "eos_token"):
        token, number = named.get(kind), ids.get(f"{kind}_id")
        token = token["content"] if isinstance(token, dict) else token
        number = number[0] if isinstance(number, list) and number else number
        if token is None and isinstance(number, int):
            token = backend.id_to_token(number)
        out[kind] = token if token and backend.token_to_id(token) is not None else None
    return out


def choose(files: dict[str, bytes], folder: Path, tokens: dict[str, str | None]) -> Template:
    """See the top of this file. Raises UserError for an unknown name or a chat template that cannot be read off."""
    settings = parse(files, "tokenizer_config.json", folder)
    if OURS in settings:
        if settings[OURS] not in TEMPLATES:
            raise UserError(f"template {settings[OURS]!r} is unknown: choose one of {', '.join(TEMPLATES)}")
        return TEMPLATES[settings[OURS]]
    chat = settings.get("chat_template")
    if isinstance(chat, list):  # several by name
        chat = {entry["name"]: entry["template"] for entry in chat}.get("default")
    chat = files["chat_template.jinja"].decode(errors="replace") if "chat_template.jinja" in files else chat
    if chat is None:
        # no base model ends its texts so
        of_end: dict[str | None, str] = {"<|im_end|>": "smollm2", "<|eot_id|>": "llama3"}
        return TEMPLATES[of_end.get(tokens["eos_token"], "plain")]
    if "Cutting Knowledge Date" in chat:
        return TEMPLATES["llama3"]
    if "<<SYS>>" in chat:
        return TEMPLATES["llama2"]
    try:
        return read_off(chat, tokens)
    except ValueError as error:
        raise UserError(f"{folder}: its chat template cannot be followed ({error}): choose one of "
                        f"{', '.join(TEMPLATES)}") from None


def read_off(chat: str, tokens: dict[str, str | None]) -> Template:
    """A checkpoint's chat template (jinja) as a Template, by rendering one question and one answer with it."""
    marks = {"user": " QUESTION ", "assistant": " ANSWER "}
    turns = [{"role": role, "content": mark} for role, mark in marks.items()]
    prompt, whole = render(chat, json.dumps({"messages": turns, **{name: text or "" for name, text in tokens.items()}}))
    strip = marks["user"] not in prompt
    before, between = around(marks["user"].strip() if strip else marks["user"], prompt, "question")
    if not whole.startswith(prompt):
        raise ValueError("a conversation does not begin with its prompt")
    said = whole[len(prompt):]
    mark = marks["assistant"] if marks["assistant"] in said else marks["assistant"].strip()
    lead, after = around(mark, said, "answer")
    end = after.strip().split("\n")[0]  # ChatML goes on with a new line
    return Template(before, between, end or None, lead, strip=strip)


def around(mark: str, text: str, what: str) -> tuple[str, str]:
    """What stands before and behind a mark. Raises ValueError unless it stands there once."""
    if text.count(mark) != 1:
        raise ValueError(f"it gives the {what} {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after
