"""Everything that --device cuda runs, on a pretended device: tests/on_device.py, in a process of its own.

PyTorch learns of a new device once and for a whole process, and not at all once gradients have been computed in it.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_a_gpu_would_run_leaves_no_tensor_behind():
    checks = Path(__file__).with_name("on_device.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider", str(checks)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout and "failed" not in done.stdout
