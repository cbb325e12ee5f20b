"""files.py: whole files, one owner per folder, what is replaced and what never is, hashes of content."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from errors import UserError
from files import MARK, alone, check_ours, digest, digest_of, publish, remove, whole, write, write_json


def ours(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in {MARK: "{}", **files}.items():
        (folder / name).write_text(text)
    return folder


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), whole(file) as into:
        into.write(b"half")
        raise ZeroDivisionError
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write(file, "ü")
    assert file.read_bytes() == b"\xc3\xbc"


def test_the_second_owner_is_told_who_is_the_first(tmp_path):
    with alone(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"run is being written by process {os.getpid()} on .+ since 20\d\d-"):
            with alone(tmp_path / "run"):
                pass
        with alone(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "run"):
        pass


def test_whoever_waits_is_told_for_whom_and_goes_on_afterwards(tmp_path, capsys):
    order = []

    def wait() -> None:
        with alone(tmp_path / "m", wait=True):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        with alone(tmp_path / "m"):
            waiting = [pool.submit(wait) for _ in range(2)]
            time.sleep(0.2)
            order.append("first")
        for one in waiting:
            one.result()
    said = capsys.readouterr().err
    assert order == ["first", "second", "second"]
    assert said.count(f"waiting for {tmp_path / 'm'}, which is being written by process {os.getpid()}") >= 2


def test_a_killed_owner_leaves_a_folder_to_the_next(tmp_path):
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with alone(tmp_path / "run"):
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"process {pid} "), alone(tmp_path / "run"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with alone(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()


def test_only_what_this_program_wrote_may_be_replaced(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")  # somebody's model
    (tmp_path / "file").write_text("")
    ours(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f".{MARK}.17.tmp").write_text("{")  # before its mark was whole
    for name, says in (("checkpoint", "is no run or model that this program wrote"), ("file", "is a file"),
                       ("link", "is a link"), ("dangling", "is a link")):
        with pytest.raises(UserError, match=f"{name} .*{says}.* another --name"):
            check_ours(tmp_path / name, "--name")
    for name in ("mine", "empty", "absent", "killed"):
        check_ours(tmp_path / name, "--name")
    (tmp_path / "killed" / "a.txt").write_text("somebody's")
    with pytest.raises(UserError, match="killed exists and is no run or model"):
        check_ours(tmp_path / "killed", "--name")


@pytest.mark.parametrize("killed", [False, True])
def test_publishing_replaces_a_folder_only_once_the_new_one_stands(tmp_path, killed):
    """Also where a process was killed between the two renames, and left litter."""
    new = ours(tmp_path / "run.partial", a="new", **{".state.pt.17.tmp": "half"})
    old = ours(tmp_path / "run", a="old")
    if killed:
        old.rename(new / ".replaced")
    publish(new, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert sorted(p.name for p in old.iterdir()) == ["a", MARK] and (old / "a").read_text() == "new"


def test_a_folder_half_removed_is_still_ours(tmp_path, monkeypatch):
    folder = ours(tmp_path / "run", a="", b="")
    (folder / "model").mkdir()
    gone = []
    real = Path.unlink

    def unlink(path: Path, **how) -> None:
        if gone:
            raise KeyboardInterrupt
        gone.append(path)
        real(path, **how)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    check_ours(folder, "--name")
    monkeypatch.undo()
    remove(folder)
    remove(folder)  # what is not there need not go
    assert not folder.exists()


def test_a_digest_is_of_content_and_of_nothing_else(tmp_path):
    one, other = (ours(tmp_path / name, **{"model.safetensors": "weights", "config.json": "{}"}) for name in "ab")
    assert digest_of(one) == digest_of(other)
    (other / "README.md").write_text("said, not read")
    (other / MARK).write_text("2")
    assert digest_of(one) == digest_of(other)
    (other / "model.safetensors").write_text("weightz")
    assert digest_of(one) != digest_of(other)
    assert digest_of(one / "config.json") == digest_of(other / "config.json")
    with pytest.raises(UserError, match="nowhere is missing"):
        digest_of(tmp_path / "nowhere")
    rows = [{"question": "Q", "answer": "A"}]
    assert digest(rows) == digest([{"answer": "A", "question": "Q"}]) != digest([{"question": "Q", "answer": "B"}])
