"""One way to fail: what a user can cause, and what a machine can, ends in one line on standard error and a status.

    2 an error   130 Ctrl-C   143 SIGTERM (128 and the signal's number, as a shell has it)
"""

import contextlib
import errno
import functools
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch


class UserError(Exception):
    """Something the user can put right. The message names the thing (file, row, flag) and the way out."""


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to stop, by signal `number`."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.status = 128 + number


def stop(number: int, frame: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def on_stop(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM call handler(number, frame), but for one that this process was told to ignore."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
    """Within, being asked to stop is only noted, in the list that this gives; who asks twice is obeyed at once."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            stop(number, frame)
        noted.append(number)

    with on_stop(note):
        yield noted


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: UserError, a full disk, no memory left and being stopped become one line and a status.

    Notes that were added to the exception (how to go on) end the line. A fault of ours keeps its traceback. Letters
    that the terminal has not are spelled out.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with on_stop(stop):
                main(*args, **kwargs)
        except KeyboardInterrupt as error:
            print(told(error, str(error) or "stopped"), file=sys.stderr)
            sys.exit(getattr(error, "status", 130))
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else of_the_machine(error)
            if message is None:
                raise
            print("error: " + shown(told(error, message)), file=sys.stderr)
            sys.exit(2)

    return wrapped


def told(error: BaseException, message: str) -> str:
    return " ".join("; ".join([message, *getattr(error, "__notes__", [])]).split())


def of_the_machine(error: Exception) -> str | None:
    """What went wrong and the way out where it is the machine's fault; None where it is ours."""
    text = str(error)
    if "inline_container" in text and isinstance(error.__context__, OSError):  # torch.save, closing a file it cannot
        error = error.__context__
    if isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return "the GPU ran out of memory: give a --micro-batch (--score-batch in scoring), or add --checkpointing"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "memory ran out: give a --micro-batch (--score-batch in scoring), or add --checkpointing"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{where}the disk is full ({error.strerror}): make room, or give another --out"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{where}{error.strerror}: give a place that can be read and written"
        return f"{where}{error.strerror or text}: see to it, and start again"
    return None


# Control characters but tab and line feed, halves of surrogate pairs, and what turns the direction of writing.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """Text of a row, a model or a file for a terminal: what would move its cursor is spelled out, not obeyed."""
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
