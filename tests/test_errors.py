"""errors.py: what a user can cause is one line on standard error and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errors import UserError, fail, one_line_errors


def run(raised: BaseException) -> int:
    """Exit status of a main that raises."""
    @one_line_errors
    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


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


def test_fail_returns_the_status(capsys):
    assert fail("no") == 2 and capsys.readouterr().err == "error: no\n"


@pytest.mark.slow
def test_a_script_run_for_real_ends_the_same_way():
    script = Path(__file__).resolve().parents[1] / "data" / "world.py"
    done = subprocess.run([sys.executable, script, "--show", "--seed", "-1"], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == "error: --seed -1 is below 0\n"
