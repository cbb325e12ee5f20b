"""One way to fail: what a user can cause ends in one line on standard error and exit status 2."""

import functools
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
        except torch.cuda.OutOfMemoryError:
            sys.exit(fail("the GPU ran out of memory: give a --micro-batch, or add --checkpointing"))
        except KeyboardInterrupt:
            print("stopped; nothing half-written is kept under a finished run's name", file=sys.stderr)
            sys.exit(130)

    return wrapped


def fail(message: str) -> int:
    """Print `error: message` on one line of standard error; returns the exit status, 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
