"""How much code a reader passes from the command line to a method's first update, counted while it runs.

    python -m lab.walk                # all of uoe and uld; writes results/walk.md

Traced with sys.settrace: every function of this repository that is entered, once, with the lines of its body. *Core*:
from entering the method's `unlearn` on. What trains the target is left out: a cached one is used.
"""

import contextlib
import inspect
import io
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType

import loop
import train
from errors import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
TINY = "--depth 2 --width 32 --pretrain-steps 2 --subjects 2 --epochs 1 --score-rows 8".split()


class FirstUpdate(Exception):
    """The optimiser has stepped once: the walk ends here."""


class Walk:
    """Functions entered, in the order of their first call; `core` those since the method's unlearn."""

    def __init__(self) -> None:
        self.seen: dict[CodeType, None] = {}
        self.core: dict[CodeType, None] = {}
        self.in_method = False

    def __call__(self, frame: FrameType, event: str, _):
        code = frame.f_code
        file = Path(code.co_filename)
        if (event != "call" or file == Path(__file__) or ROOT not in file.parents or ".venv" in file.parts
                or code.co_name.startswith("<")):
            return None
        if code.co_name == "unlearn":
            self.in_method = True
        self.seen.setdefault(code)
        if self.in_method:
            self.core.setdefault(code)
        return None


def body_lines(code: CodeType) -> int:
    """Lines of a function's source without its docstring, blank lines and comments; nested functions count apart."""
    lines, start = inspect.getsourcelines(code)
    inner = [const for const in code.co_consts if isinstance(const, CodeType) and not const.co_name.startswith("<")]
    skip: set[int] = set()
    for nested in inner:
        body, first = inspect.getsourcelines(nested)
        skip |= set(range(first, first + len(body)))
    doc = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else ""
    doc_lines = len(doc.splitlines()) if doc and f'"""{doc.splitlines()[0][:20]}' in "".join(lines) else 0
    kept = [line for number, line in enumerate(lines, start)
            if number not in skip and line.strip() and not line.strip().startswith("#")]
    return len(kept) - sum(1 for line in doc.splitlines() if line.strip()) * bool(doc_lines)


def walk(method: str, out: str) -> Walk:
    """From train.main to the first update of one method, on a tiny world."""
    train.main(["--method", method, *TINY, "--out", out, "--name", "first"])  # so that target and scores are cached
    steps = loop.torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps(self, *args, **kwargs)
        sys.settrace(None)  # what tidies up after is not on the way
        raise FirstUpdate

    found = Walk()
    loop.torch.optim.AdamW.step = step  # type: ignore[method-assign]
    sys.settrace(found)
    try:
        with contextlib.suppress(FirstUpdate):
            train.main(["--method", method, *TINY, "--out", out, "--name", "walk"])
    finally:
        sys.settrace(None)
        loop.torch.optim.AdamW.step = steps  # type: ignore[method-assign]
    return found


def row(method: str, part: str, found: dict[CodeType, None]) -> str:
    lines = {code: body_lines(code) for code in found}
    hidden = sum(n for code, n in lines.items() if ROOT / "hub" in Path(code.co_filename).parents)
    return f"| {method} | {part} | {len(lines)} | {sum(lines.values())} | {hidden} |"


@one_line_errors
def main() -> None:
    page = ["# From the command line to the first update", "",
            "Functions entered and the lines of their bodies (no docstrings, comments, blank lines), as "
            "`python -m lab.walk` traced them. Core: from entering the method's `unlearn`.", "",
            "| method | part | functions | lines | of these hub/ |", "|---|---|---|---|---|"]
    for method in ("uoe", "uld"):
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            found = walk(method, out)
        page += [row(method, "all of it", found.seen), row(method, "core", found.core)]
    (ROOT / "results" / "walk.md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
