"""One way to fail: what a user can cause ends in one line on standard error and exit status 2."""

import functools
import re
import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """Something the user can put right. The message names the thing (file, row, flag) and the way out."""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: UserError and out-of-memory become one line and exit 2, Ctrl-C exit 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            main(*args, **kwargs)
        except UserError as error:
            sys.exit(fail(str(error)))
        except OSError as error:  # a folder where a file belongs, no permission, a name too long, a full disk
            sys.exit(fail(f"{error.filename or 'a file'}: {error.strerror or error}; give another, or make room"))
        except torch.cuda.OutOfMemoryError:
            sys.exit(fail("the GPU ran out of memory: lower --batch-size, or add --checkpointing"))
        except KeyboardInterrupt:
            print("stopped; nothing half-written is kept under a finished run's name", file=sys.stderr)
            sys.exit(130)

    return wrapped


def fail(message: str) -> int:
    """Print `error: message` on one line of standard error; returns the exit status, 2."""
    print("error: " + shown(" ".join(message.split())), file=sys.stderr)
    return 2


# Control characters but tab and line feed, halves of surrogate pairs, and what turns the direction of writing.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """Text of a row, a model or a file for a terminal: what would move its cursor is spelled out, not obeyed."""
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
