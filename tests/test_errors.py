"""errors.py: what a user can cause is one line on standard error and exit status 2."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from errors import Stopped, UserError, held, one_line_errors


def run(raised: BaseException) -> int:
    """Exit status of a main that raises."""
    @one_line_errors
    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.fixture
def heard():
    """Both signals as a shell's foreground has them: a job in the background is told to ignore Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, old in before.items():
        signal.signal(number, old)


def test_a_user_error_is_one_line_and_exit_2(capsys):
    assert run(UserError("rows.jsonl line 3 is\n  not JSON:\tgive   JSON")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: rows.jsonl line 3 is not JSON: give JSON\n")


def test_running_out_of_gpu_memory_is_one_line_and_exit_2(capsys):
    assert run(torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the GPU ran out of memory: give a --micro-batch") and err.count("\n") == 1


def test_control_c_is_one_line_and_exit_130(capsys):
    assert run(KeyboardInterrupt()) == 130
    err = capsys.readouterr().err
    assert err.startswith("stopped") and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_stop_is_one_line_and_a_shells_status(number, capsys, heard):
    @one_line_errors
    def main():
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 128 + number and capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(number) is before


def test_a_stop_that_is_held_is_noted_and_the_second_is_obeyed(heard):
    with pytest.raises(Stopped) as stopped, held() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.status == 130


@pytest.mark.parametrize(("raised", "says"), [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full (No space left on device): make room"),
    (OSError(errno.EROFS, "Read-only file system", "out/u"), "out/u: Read-only file system: give a place"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory: see to it"),
    (MemoryError(), "memory ran out: give a --micro-batch (--score-batch in scoring), or add"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out: give a --micro-batch"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "the GPU ran out of memory: give a --micro-batch"),
])
def test_a_fault_of_the_machine_is_one_line_with_the_way_out_and_how_to_go_on(raised, says, capsys):
    raised.add_note("out/u.partial holds the run so far")
    assert run(raised) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {says}") and err.endswith("; out/u.partial holds the run so far\n")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_memory_and_disk_that_really_run_out_are_one_line(tmp_path):
    """An address space of 6 GB, and files of at most 5,000 bytes: in a process of its own."""
    for limit, does, says in (("RLIMIT_AS, (6 << 30, 6 << 30)", "torch.zeros(1 << 34)", "memory ran out"),
                              ("RLIMIT_FSIZE, (5000, 5000)", "save()", "the disk is full")):
        script = f"""
import resource, torch
from pathlib import Path
from errors import one_line_errors
from files import whole

def save():
    with whole(Path({str(tmp_path / "state.pt")!r})) as file:
        torch.save({{"a": torch.zeros(9000), "b": torch.zeros(9000)}}, file)

resource.setrlimit(resource.{limit})
one_line_errors(lambda: {does})()
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parents[1])
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {says}") and not list(tmp_path.iterdir())


def test_a_fault_of_ours_keeps_its_traceback():
    @one_line_errors
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_main_that_succeeds_gets_its_arguments_and_does_not_exit():
    seen = []

    @one_line_errors
    def main(*args, **kwargs):
        """What it does."""
        seen.append((args, kwargs))

    main(1, two=2)
    assert seen == [((1,), {"two": 2})] and main.__name__ == "main" and main.__doc__ == "What it does."


@pytest.mark.slow
def test_a_script_run_for_real_ends_the_same_way():
    script = Path(__file__).resolve().parents[1] / "data" / "world.py"
    done = subprocess.run([sys.executable, script, "--show", "--seed", "-1"], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: argument --seed: -1 is not a whole number from 0 to 1e+09\n"
