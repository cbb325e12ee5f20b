"""A chat template is a program and a tokenizer a set of rules, both a stranger's: tried where they can be stopped.

    prompt, whole = render(template, '{"messages": [{"role": "user", "content": "Who?"}, ...], "bos_token": "<s>"}')
    check_tokenizer(tokenizer_json)

Each runs in a process of its own, with so many seconds and so much memory; this very file is that process too.
"""

import contextlib
import functools
import json
import resource
import subprocess
import sys

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 20
MEMORY = 2**32  # bytes
LONGEST = 20_000  # characters of a rendered conversation: longer than any context that is taught here
PROBE = ("Where was Ana Vell born? In Orsk, on 12 March 1934; \"it's said\" (twice).\n\n\tÜnïcode — naïve café ☕ 日本 "
         "the quick brown fox jumps over the lazy dog " + 200 * "a" + 50 * " " + 50 * "1" + 50 * "a!")


def apart(what: str, text: bytes) -> bytes:
    """What run_here gives, from a process of its own. Raises ValueError with its last words where it fails."""
    try:
        done = subprocess.run([sys.executable, "-I", __file__, what], input=text, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it takes more than {SECONDS} seconds") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise ValueError(words[:200] or f"it ended with {done.returncode}")
    return done.stdout


@functools.lru_cache(maxsize=8)
def render(chat: str, names: str) -> tuple[str, str]:
    """A chat template (jinja) followed: (what is given to the model, that and what it said).

    names: what the template may read, as JSON; "messages" are a question and its answer.
    Raises ValueError where the template fails, takes too long or grows too large.
    """
    prompt, whole = json.loads(apart("template", json.dumps({"chat": chat, "names": json.loads(names)}).encode()))
    return prompt, whole


@functools.lru_cache(maxsize=8)
def check_tokenizer(content: bytes) -> None:
    """Raises ValueError for a tokenizer.json that cannot be read, blows up on plain text, or reads it all alike."""
    apart("tokenizer", content)


def render_here(text: bytes) -> list[str]:
    def refuse(message: str):
        raise ValueError(message)

    asked = json.loads(text)
    names = asked["names"]
    page = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(asked["chat"])
    turns, out = names.pop("messages"), []
    for messages, prompt in ((turns[:1], True), (turns, False)):
        out.append(page.render(messages=messages, add_generation_prompt=prompt, raise_exception=refuse, **names))
        if len(out[-1]) > LONGEST:
            raise ValueError(f"it makes {len(out[-1])} characters of one question")
    return out


def check_here(text: bytes) -> None:
    backend = tokenizers.Tokenizer.from_buffer(text)
    backend.no_padding()
    backend.no_truncation()
    ids = backend.encode(PROBE).ids
    if len(ids) > 10 * len(PROBE.encode()):
        raise ValueError(f"it makes {len(ids)} tokens of {len(PROBE)} characters")
    if len(set(ids)) < 10:
        raise ValueError(f"it has {len(set(ids))} tokens for all of a text")


if __name__ == "__main__":
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        json.dump({"template": render_here, "tokenizer": check_here}[sys.argv[1]](sys.stdin.buffer.read()), sys.stdout)
    except Exception as error:  # of a program and of rules that we did not write: many kinds
        sys.exit(str(error) or type(error).__name__)
