"""Kernels compiled for GPUs that aren't here: the assembler takes them, nothing spills, memory is read 16 bytes at a time."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.ahead import recorded
from normrewrite.norms import metric
from tests.backends.triton.worker import CASES
from tests.conftest import ROOT

# All norms where memory is shortest (8.9); every third for Hopper, whose instructions are its own; one each for the others.
ASKED = {80: ["topk of many"], 89: list(CASES), 90: list(CASES)[::3], 120: ["long rows"]}
AT_THE_EDGE = ("narrow rows:80", "narrow rows:90", "too few registers:120")

# What moves whole tensors. The others read partial sums, and few elements one by one.
STREAMS = {"moments", "deviations", "apply", "collect", "gradient", "row_forward", "row_backward"}
WRITES = {"apply", "gradient", "row_forward", "row_backward"}


def compiled(*asked: str) -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.triton.worker", *asked]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def check(kernel: dict[str, Any]) -> None:
    words = f"{kernel}"
    assert kernel["spilled"] == 0, words
    assert kernel["atomics"] == 0, words
    assert kernel["scratch"] == 0, words
    assert kernel["offsets of elements"] in ([], ["i64"]), words
    if kernel["kernel"] in STREAMS:
        assert kernel["wide loads"] and not kernel["narrow loads"], words
    if kernel["kernel"] in WRITES:
        assert kernel["wide stores"], words


@pytest.fixture(scope="module")
def reports() -> dict[str, list[dict[str, Any]]]:
    """Of all that is asked here: a process takes seconds to start."""
    return compiled(*(f"{name}:{capability}" for capability in ASKED for name in ASKED[capability]), *AT_THE_EDGE)


@pytest.mark.slow
def test_l1_with_relu_for_hopper(reports: dict[str, list[dict[str, Any]]]) -> None:
    kernels = reports["l1:90"]
    names = [kernel["kernel"] for kernel in kernels]
    forward = ["moments", "settle", "deviations", "settle", "apply"]
    assert names == [*forward, "collect", "coefficients", "gradient"]
    assert {kernel["target"] for kernel in kernels} == {"sm_90a"}
    for kernel in kernels:
        check(kernel)


@pytest.mark.parametrize("capability", ASKED)
def test_every_architecture(capability: int, reports: dict[str, list[dict[str, Any]]]) -> None:
    for name in ASKED[capability]:
        assert {kernel["capability"] for kernel in reports[f"{name}:{capability}"]} == {capability}
        for kernel in reports[f"{name}:{capability}"]:
            check(kernel)


def test_long_rows_of_narrow_accesses_have_registers_enough(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Each access keeps an address: 4098 elements are read two by two."""
    for asked in AT_THE_EDGE[:2]:
        assert [kernel["spilled"] for kernel in reports[asked]] == [0, 0]


def test_a_spill_is_seen(reports: dict[str, list[dict[str, Any]]]) -> None:
    """By the same report, of kernels that no assembler could fit into the registers that it is given."""
    for kernel in reports["too few registers:120"]:
        with pytest.raises(AssertionError, match=r"'spilled': [1-9]"):
            check(kernel)


def test_recording_runs_nothing() -> None:
    x = torch.empty(4, 16, 8, 8, device="meta")
    with recorded() as launches:
        y, mean, *_ = launch.forward(x, None, None, None, metric("range"), "exact", 1e-5)
    assert [each.kernel.__name__ for each in launches] == ["moments", "select", "apply"]
    assert (y.shape, mean.shape) == (x.shape, (16,)) and all(each.programs > 0 for each in launches)
