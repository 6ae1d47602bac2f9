"""The norms in loops of other people's: the examples run, and what docs/own_loop.md says of them is so."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normrewrite as nr
from tests.conftest import ROOT

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]


def _run(command: list[str], name: str) -> tuple[int, str]:
    line = [*command, str(ROOT / "examples" / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def reached(said: str) -> float:
    """The last percentage of the line that tells the test accuracy."""
    (line,) = (line for line in said.splitlines() if "test accuracy" in line)
    return float(re.findall(r"(\d+\.\d+) ?%", line)[-1])


def test_accuracies_are_read_up_to_a_hundred() -> None:
    assert reached("test accuracy 100.00% of 500 images") == 100
    assert reached("…\ntest accuracy 9.05% as converted, 89.20 % trained, of 500 images") == 89.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"),
    [([sys.executable], "own_loop_lightning.py"), (TORCHRUN, "own_loop_accelerate.py")],
    ids=["lightning", "accelerate"],
)
def test_an_example_reaches_what_it_should(command: list[str], name: str) -> None:
    if "lightning" in name and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install lightning")
    code, said = _run(command, name)
    assert code == 0 and reached(said) >= 90, said  # one line, of one process of two
    assert "in eval mode" not in said, said  # Lightning counts modules that are


def test_the_plain_example_reaches_what_it_should(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    assert importlib.import_module("own_loop_pytorch").main() == 0 and reached(capsys.readouterr().out) >= 90


def test_an_example_that_falls_short_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("own_loop_pytorch")
    monkeypatch.setattr(example, "RATE", 1e-9)
    monkeypatch.setattr(example, "EPOCHS", 1)
    assert example.main() == 1 and "test accuracy" in capsys.readouterr().out


# --- docs/own_loop.md -------------------------------------------------------------------------------------------------


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def test_its_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 5 and not namespace["twin"][1].training and namespace["twin"].training  # type: ignore[index, attr-defined]


@pytest.mark.parametrize("to", ["l1", "topk:10", "group:4", "bwn", "renorm", "frozen"])
def test_training_flags_are_carried_over_to_every_module(to: str) -> None:
    assert all(module.training for module in nr.convert(_network(), to=to).modules())
    assert not any(module.training for module in nr.convert(_network().eval(), to="l1").modules())


def test_only_what_is_synchronised_before_or_by_request_is_so() -> None:
    before = nr.convert(nn.SyncBatchNorm.convert_sync_batchnorm(_network()), to="l1")
    after = nn.SyncBatchNorm.convert_sync_batchnorm(nr.convert(_network(), to="l1"))
    asked = nr.nn.synchronise_(nr.convert(_network(), to="l1"))
    assert [model[1].synchronised for model in (before, after, asked)] == [True, False, True]


def test_update_bn_passes_them_by() -> None:
    for model, seen in ((_network(), True), (nr.convert(_network(), to="l1"), False)):
        before = model[1].running_mean.clone()
        update_bn([torch.randn(8, 3, 8, 8) + 3], model)
        assert torch.equal(before, model[1].running_mean) is not seen


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_batch_that_is_not_finite_stays_out_of_running_statistics(bad: float) -> None:
    native, ours = nn.BatchNorm2d(3), nr.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    x[0, 1, 0, 0] = bad
    native(x), ours(x)
    assert not torch.isfinite(_statistics(native)).all() and torch.isfinite(_statistics(ours)).all()
    assert ours.running_mean is not None and ours.running_mean.count_nonzero() == 2


def _statistics(norm: nn.Module) -> Tensor:
    return torch.cat([value.flatten().float() for value in norm.buffers()])


def test_under_autocast_they_measure_in_fp32() -> None:
    norm, x = nr.nn.BatchNorm2d(3), 300 + torch.randn(64, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    assert y.dtype is torch.bfloat16 and norm.running_scale is not None and norm.running_scale.dtype is torch.float32
    wanted = x.bfloat16().double().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double() / 0.1, wanted, rtol=1e-5, atol=0)  # type: ignore[union-attr]
