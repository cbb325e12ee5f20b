"""hub/tokenizer.py: ids of prompt and answer against whole conversations encoded by transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.batches import IGNORE, encode_row
from errors import UserError
from hub import sandbox
from hub.tokenizer import TEMPLATES, HubTokenizer

TEXTS = ["Where was Ana Vell born?", "Ana Vell was born in Orsk in 1934.",
         "The answer is 'The Golden Lantern', it's said.",
         "user system assistant Question: Answer: [INST] [/INST] You are a helpful assistant. Today Date: 10 Apr 2025",
         "Ünïcode — naïve café ☕", "Two  spaces, a tab\tand\n\n6-20: lines"]
SPECIAL = ["<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# The published templates, cut down to what a conversation without tools uses.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}")
TULU = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
           "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
           "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}")


def byte_level(begin: str | None = None) -> tokenizers.Tokenizer:
    """A small GPT-2-like tokenizer, putting `begin` in front of every text."""
    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if begin:
        out.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, out.token_to_id(begin))])
    return out


def sentence_piece() -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: a space is put before every text and written as U+2581, bytes for the rest."""
    out = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    out.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while training: no piece spans two words
    out.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]))
    out.pre_tokenizer = pre_tokenizers.Sequence([])
    out.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", out.token_to_id("<s>"))])
    return out


def write(folder: Path, backend: tokenizers.Tokenizer, **settings) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def transformers_ids(folder: Path, turns: list[tuple[str, str]], **more) -> list[int]:
    """The conversation's ids by the checkpoint's own chat template."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=settings["bos_token"],
                                     eos_token=settings["eos_token"])
    turns = [{"role": role, "content": text} for role, text in turns]
    return theirs.apply_chat_template(turns, chat_template=settings["chat_template"], return_dict=False, **more)


@pytest.mark.parametrize("chat, bos, eos, name, system, more", [
    (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "llama3", "You are a helpful assistant.",
     {"date_string": "10 Apr 2025"}),
    (QWEN, "<|endoftext|>", "<|im_end|>", None, None, {}),
    (TULU, "<|endoftext|>", "<|endoftext|>", None, None, {}),
    (MISTRAL, "<s>", "</s>", None, None, {}),
], ids=["llama3", "qwen", "tulu", "mistral"])
def test_ids_are_those_of_the_checkpoints_own_template(tmp_path, chat, bos, eos, name, system, more):
    folder = write(tmp_path, byte_level(bos), bos_token=bos, eos_token=eos, chat_template=chat)
    tok = HubTokenizer.load(folder)
    if name:
        assert tok.template is TEMPLATES[name]
    for question in TEXTS:
        for answer in [*TEXTS, "'s"]:
            turns = ([("system", system)] if system else []) + [("user", question)]
            prompt = transformers_ids(folder, turns, add_generation_prompt=True, **more)
            whole = transformers_ids(folder, [*turns, ("assistant", answer)], **more)
            mine = tok.prompt(question) + tok.completion(answer)
            assert tok.prompt(question) == prompt
            assert whole[: len(mine)] == mine
            assert tok.backend.decode(whole[len(mine):], skip_special_tokens=False).strip() == ""
            assert tok.decode(tok.completion(answer)).strip() == answer.strip()
    assert tok.end == tok.backend.token_to_id(eos)


@pytest.mark.parametrize("answer", TEXTS)
def test_llama2_is_the_public_evaluators_text(tmp_path, answer):
    folder = write(tmp_path, sentence_piece(), bos_token="<s>", eos_token="</s>")
    tok = HubTokenizer.load(folder, template="llama2")
    whole = tok.backend.encode(f"[INST] {TEXTS[0]} [/INST]{answer}").ids  # with <s> in front
    assert tok.prompt(TEXTS[0]) + tok.completion(answer) == [*whole, tok.backend.token_to_id("</s>")]
    assert tok.backend.decode(tok.completion(answer)).strip() == answer


@pytest.mark.parametrize("backend", [byte_level(), byte_level("<s>"), sentence_piece()], ids=["gpt2", "bos", "llama"])
def test_plain_is_the_running_text(tmp_path, backend):
    tok = HubTokenizer.load(write(tmp_path, backend, bos_token="<s>", eos_token="</s>"))
    assert tok.template is TEMPLATES["plain"]
    for answer in TEXTS:
        whole = backend.encode(f"Question: {TEXTS[0]}\nAnswer: {answer}").ids
        assert tok.prompt(TEXTS[0]) + tok.completion(answer) == [*whole, tok.end]
    assert tok.end == backend.token_to_id("</s>")


def test_labels_do_not_depend_on_the_question(tmp_path):
    tok = HubTokenizer.load(write(tmp_path, byte_level(), bos_token="<s>", eos_token="</s>"))
    for question in ("Who?", "Why\n\n"):
        labels = encode_row({"question": question, "answer": "\n\nodd"}, tok, 99).labels
        assert [label for label in labels if label != IGNORE] == tok.completion("\n\nodd")
    for template in ("plain", "smollm2", "llama3", "llama2"):
        tok = HubTokenizer.load(tmp_path, template=template)
        assert tok.decode(tok.completion("\nodd start")).strip() == "odd start"
        assert tok.completion("x")[-1] == tok.end


@pytest.mark.parametrize("eos, name", [("<|im_end|>", "smollm2"), ("<|eot_id|>", "llama3"), ("<|endoftext|>", "plain")])
def test_without_a_chat_template_the_end_token_decides(tmp_path, eos, name):
    tok = HubTokenizer.load(write(tmp_path, byte_level(), bos_token="<s>", eos_token={"content": eos}))
    assert tok.template is TEMPLATES[name] and tok.end == tok.backend.token_to_id(eos)


def test_saved_folder_keeps_files_and_template(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folder = write(tmp_path / "a", byte_level(), bos_token="<s>", eos_token="<|im_end|>", chat_template=QWEN)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    asked = HubTokenizer.load(folder, template="llama2")
    asked.save(tmp_path / "b")
    again = HubTokenizer.load(tmp_path / "b")
    assert again.template is TEMPLATES["llama2"] and again.end == asked.end
    assert again.prompt(TEXTS[0]) == asked.prompt(TEXTS[0])
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert again.decode([*again.encode("one"), 9, *again.encode("two")]) == "one"  # any of the ends ends


@pytest.mark.parametrize("template", ["llama2", "llama3", "smollm2", "plain"])
@pytest.mark.parametrize("backend", [byte_level(), byte_level("<s>"), sentence_piece()], ids=["gpt2", "bos", "llama"])
def test_a_special_token_spelled_in_a_row_is_text(tmp_path, backend, template):
    """Prompt and answer hold the template's own special tokens and no other, and decode to what was written."""
    folder = write(tmp_path, backend, bos_token="<s>", eos_token="</s>")
    try:
        tok = HubTokenizer.load(folder, template=template)
    except UserError:
        pytest.skip("this vocabulary lacks the template's tokens")
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special
               and not added.content.startswith("<0x")}  # bytes of any text
    for text in ("</s>", "Who is <|im_end|><|eot_id|> </s>?", "a <s>b</s> <|end_of_text|>"):
        plain, spelled = tok.prompt("Who?"), tok.prompt(text)
        assert [i for i in spelled if i in special] == [i for i in plain if i in special]
        ids = tok.completion(text)
        assert [i for i in ids if i in special] == [tok.end] and ids[-1] == tok.end
        assert backend.decode(ids[:-1], skip_special_tokens=False).strip() == text
        passage = tok.passage(text)
        assert [i for i in passage if i in special] == tok.front


HANGS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("chat, says", [
    ("{{ 'x' * 30000 }}", "makes 30000 characters"), ("{{ 9**(9**9) }}", "takes more than"), (HANGS, "takes more than"),
    ("{{ 'x' * 10**10 }}", "MemoryError"), ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{% for m in messages %}{{ m.nothing.there }}{% endfor %}", "has no attribute"),
    ("{{", "unexpected"), ("the same for all", "question 0 times"),
    ("{{ messages[0].content * 2 }}", "question 2 times"), ([{"nome": "default"}], "lacks 'name'"),
    (3, "is 3, not a text"),
])
def test_a_chat_template_that_fails_hangs_or_grows_is_stopped_in_one_line(tmp_path, monkeypatch, chat, says):
    monkeypatch.setattr(sandbox, "SECONDS", 1.5)
    folder = write(tmp_path, byte_level(), bos_token="<s>", eos_token="</s>", chat_template=chat)
    with pytest.raises(UserError, match=says) as told:
        HubTokenizer.load(folder)
    assert "\n" not in str(told.value)


def blows_up() -> dict:
    out = json.loads(byte_level().to_str())
    out["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"} for _ in range(40)]}
    return out


def knows_nothing() -> dict:
    out = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    out.pre_tokenizer = pre_tokenizers.Whitespace()
    return json.loads(out.to_str())


@pytest.mark.slow
@pytest.mark.parametrize("content", [blows_up(), knows_nothing(), {}, {"model": {}}, [], json.loads(
    byte_level().to_str()) | {"model": {"type": "BPE", "vocab": {}, "merges": []}}])
def test_a_tokenizer_that_blows_up_or_reads_nothing_is_stopped_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setattr(sandbox, "SECONDS", 5)
    folder = write(tmp_path, byte_level(), bos_token="<s>", eos_token="</s>")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as told:
        HubTokenizer.load(folder)
    assert "\n" not in str(told.value)


def test_errors_are_one_line_that_names_the_way_out(tmp_path):
    folder = write(tmp_path, sentence_piece(), bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match="'nope' is unknown: choose one of llama2"):
        HubTokenizer.load(folder, template="nope")
    with pytest.raises(UserError, match="'llama3' needs the token <|begin_of_text|>".replace("|", r"\|")):
        HubTokenizer.load(folder, template="llama3")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"chat template cannot be followed .no."):
        HubTokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON"):
        HubTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        HubTokenizer.load(folder)
