"""The examples of own loops, run as a user runs them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ALONE = {"loop_pytorch": "torch", "loop_accelerate": "accelerate", "loop_lightning": "lightning"}


def accuracy_of(*command: str) -> float:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^accuracy ([\d.]+) %$", done.stdout, re.MULTILINE)
    assert len(found) == 1, done.stdout
    return float(found[0])


@pytest.mark.parametrize("name", ALONE)
def test_own_loops_learn(name: str) -> None:
    if importlib.util.find_spec(ALONE[name]) is None:
        pytest.skip(f"{ALONE[name]} is not installed")
    assert accuracy_of(sys.executable, str(EXAMPLES / f"{name}.py")) > 90


@pytest.mark.slow
def test_two_processes_learn_together() -> None:
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert accuracy_of(*launch, "--main_process_port", "0", str(EXAMPLES / "loop_accelerate.py")) > 90
