"""lab/fuzz.py: changed inputs end in one line or are read; and the counts that say so can be wrong."""

import os
import signal
import time

import pytest

from errors import UserError
from lab import fuzz


def accepted(folder):
    pass


def refused(folder):
    raise UserError("no")


def fails(folder):
    raise ZeroDivisionError


def hangs(folder):
    time.sleep(60)


def aborts(folder):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_every_outcome_is_told_from_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for read, outcome in ((accepted, "accepted"), (refused, "refused"), (fails, "traceback"), (hangs, "hang"),
                          (aborts, "abort")):
        assert fuzz.run_apart(read, tmp_path, tmp_path / "log") == outcome


@pytest.mark.slow
def test_a_few_changed_inputs_of_every_kind_end_in_order(capsys):
    fuzz.main(["--cases", "72", "--seed", "7"])
    assert capsys.readouterr().out.rstrip().split("\n")[-1].split()[-4:] == ["0"] * 4
