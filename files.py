"""Files that are never half-written, and folders that have one owner.

    write(path, text)                  # whole and on the disk, or as it was before
    with alone(folder): ...            # nobody else writes that folder meanwhile
    check_ours(folder, "--name x")     # what somebody else put there is never replaced
    digest(rows), digest_of(folder)    # of content: the same where nothing has changed, whatever it is called
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError

MARK = "nanounlearn.json"  # in every folder that this program made as a whole, and may replace
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.tiktoken")  # of a folder of weights: what loading it reads


# ---- writing ----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes `path`'s place once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1))


def sync(folder: Path) -> None:
    """Returns once every file in it is on the disk, so that a rename after it never shows half a folder."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# ---- owning -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """Nobody else writes `folder` within: a lock beside it, which the system takes from a process that is killed.

    Raises UserError saying who has it; or with `wait` says so and waits.
    """
    path = Path(os.path.realpath(folder))
    path = path.with_name(f".{path.name}.lock")
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read() or "another process"
            if not wait:
                file.close()
                raise UserError(f"{folder} is being written by {who}: wait for it, or train under another --name"
                                ) from None
            print(f"waiting for {folder}, which is being written by {who}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # its last owner may just have removed it: then take a new one
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def check_ours(folder: Path, flag: str) -> None:
    """Raises UserError where `folder` is there, and is a link, a file or a folder that this program did not make."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which is not written through: remove it, or give another {flag}")
    held = list(folder.iterdir()) if folder.is_dir() and not (folder / MARK).is_file() else []
    if not all(path.match(f".{MARK}.*.tmp") for path in held):  # a mark that was being written when we were killed
        raise UserError(f"{folder} exists and is no run or model that this program wrote (it has no {MARK}): move "
                        f"it away, or give another {flag}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is to stand there: move it away, or give another {flag}")


def remove(folder: Path) -> None:
    """A folder of ours, the mark last: one that is half removed is still ours."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name != MARK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(folder)


def publish(partial: Path, folder: Path) -> None:
    """Rename a whole folder. What it replaces goes only once the new one stands."""
    for path in partial.rglob(".*.tmp"):  # of a process that was killed
        path.unlink()
    sync(partial)
    replaced = partial / ".replaced"
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(folder / ".replaced", ignore_errors=True)


# ---- content ----------------------------------------------------------------------------------------------------

def digest(*made_of: Any) -> str:
    """16 hexadecimal digits of whatever JSON can spell."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: Path) -> str:
    """Of a file's bytes; of a folder of weights: of all that loading it reads. Raises UserError where it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    files = [path] if path.is_file() else sorted({file for kind in MODEL_FILES for file in path.glob(kind)} -
                                                 {path / MARK})
    found = []
    for file in files:
        with open(file, "rb") as opened:
            found.append(["" if file == path else file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return digest(found)
