"""`normrewrite finetune` in several processes: by hand, by torchrun, by accelerate launch; and when one of them dies."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.finetune import finetune
from normrewrite.data import Batch, Data
from normrewrite.training.checkpoints import Checkpoints
from normrewrite.training.machine import accelerator
from normrewrite.training.recipe import Recipe
from tests.conftest import ROOT
from tests.ranks import Started, on_ranks, start_ranks

ARCH = "--arch digits.py:digits_resnet"
STEPS = "--batch-size 8 --accumulate 2 --epochs 8 --save-every 2 --flip --crop 1 --timeout 120"
PLAIN = f"finetune twin.pt {ARCH} --data few.npz {STEPS}"
LINE = f"{PLAIN} --ema 0.9 --val-split 0.2 --clip 1"  # 3 steps an epoch in 2 processes
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate launch says it


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network as a twin in l1, some digits, and what two processes make of them that nobody disturbs."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copy(ROOT / "examples" / "digits.py", folder)
    arrays = np.load(ROOT / "examples" / "digits.npz")
    np.savez(folder / "few.npz", images=arrays["images"][:120], labels=arrays["labels"][:120])
    np.savez(folder / "nan.npz", images=np.full((120, 1, 8, 8), np.nan, np.float32))
    model = nr.load(ROOT / "examples" / "digits.pt", arch=f"{folder / 'digits.py'}:digits_resnet")
    nr.save(nr.convert(model, to="l1"), folder / "twin.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line, name in ((LINE, "whole"), (PLAIN, "plain")):
            assert [rank.end() for rank in start_ranks(f"{line} -o {name}.pt -q", 2, folder)] == [0, 0]
    return folder


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "inside"
    shutil.copytree(shelf, inside, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
    monkeypatch.chdir(inside)
    return inside


def _weights(path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def _same(a: str, b: str) -> bool:
    return all(torch.equal(value, _weights(b)[name]) for name, value in _weights(a).items())


def _newest(name: str) -> int:
    return max((int(path.name[5:]) for path in Path(f"{name}.checkpoints").glob("step-*[0-9]")), default=0)


def _reaches(name: str, step: int, alive: Any) -> None:
    """Waits for a checkpoint of that step, and for a moment more."""
    patience = time.monotonic() + 120
    while _newest(name) < step and alive() and time.monotonic() < patience:
        time.sleep(0.001)
    assert _newest(name) >= step
    time.sleep(random.Random(step).uniform(0, 0.03))


# --- by hand: nobody ends the other one -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_dies_is_told_by_the_other_and_the_run_resumed_to_the_same_bits(folder: Path) -> None:
    line = f"{LINE} -o killed.pt --resume"
    for victim, step in ((1, 6), (0, 14)):
        ranks = start_ranks(line, 2, folder)
        _reaches("killed", step, ranks[victim].process.is_alive)
        ranks[victim].send(signal.SIGKILL)
        killed, survivor = ranks[victim], ranks[1 - victim]
        assert killed.end() == -signal.SIGKILL and survivor.end(60) == 1
        assert re.search(
            rf"^error: process {1 - victim}: another process died.*--resume; or raise", survivor.said, re.M
        )
        assert "Traceback" not in survivor.said and not Path("killed.pt").exists()
    assert _newest("killed") >= 14
    assert [rank.end() for rank in start_ranks(line, 2, folder)] == [0, 0]
    assert _same("killed.pt", "whole.pt") and _same("killed.last.pt", "whole.last.pt")
    assert {path.name for path in Path("killed.checkpoints").iterdir()} == {"run.json", "finished.json"}


@pytest.mark.slow
def test_a_process_that_stands_still_is_an_error_after_the_timeout(folder: Path) -> None:
    ranks = start_ranks(f"{LINE} -o stuck.pt --timeout 12", 2, folder)
    _reaches("stuck", 4, ranks[1].process.is_alive)
    ranks[1].send(signal.SIGSTOP)
    try:
        assert ranks[0].end(40) == 1
        assert re.search("kept this one waiting for more than 12 s", ranks[0].said) and "Traceback" not in ranks[0].said
    finally:
        ranks[1].send(signal.SIGKILL)
    assert ranks[1].end() == -signal.SIGKILL and _newest("stuck") >= 4


@pytest.mark.slow
def test_other_processes_and_data_that_cannot_serve_are_refused_by_all(folder: Path) -> None:
    ranks = start_ranks(f"{LINE} -o half.pt", 2, folder)
    _reaches("half", 2, ranks[0].process.is_alive)
    for rank in ranks:
        rank.send(signal.SIGKILL)
        rank.end()
    asked = {
        f"{LINE} -o half.pt --resume": "another run: .*processes 2 then, 3 now",
        f"{LINE} -o nan.pt".replace("few.npz", "nan.npz"): "120 of 120 inputs hold NaN",
        f"{LINE} -o few.pt --accumulate 40": "96 inputs, and a step takes 120 batches",
        f"{PLAIN} -o fsdp.pt --ema 0.9": "--ema beside --use_fsdp",
    }
    before = {path.name for path in folder.iterdir()}
    for line, message in asked.items():
        found: list[Started] = start_ranks(line, 3, folder, **(SHARDED if "fsdp" in line else {}))
        assert [rank.end() for rank in found] == [2, 2, 2]
        assert all(re.search(message, rank.said) and "Traceback" not in rank.said for rank in found)
    assert {path.name for path in folder.iterdir() if path.suffix != ".log"} <= before


# --- by a launcher ----------------------------------------------------------------------------------------------------


def _launched(launcher: str, line: str, folder: Path) -> subprocess.Popen[str]:
    program, *arguments = launcher.split()
    command = [str(Path(sys.executable).with_name(program)), *arguments, "-m", "normrewrite", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's processes in /proc")
def test_torchrun_ends_all_where_one_dies_and_resumes_to_the_same_bits(folder: Path) -> None:
    process = _launched("torchrun --standalone --nproc-per-node 2", f"{LINE} -o killed.pt", folder)
    _reaches("killed", 6, lambda: process.poll() is None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in said and not Path("killed.pt").exists()
    assert [rank.end() for rank in start_ranks(f"{LINE} -o killed.pt --resume", 2, folder)] == [0, 0]
    assert _same("killed.pt", "whole.pt") and _same("killed.last.pt", "whole.last.pt")


def _options(how: str) -> str:
    return f"{how} --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


SHARDING = "--use_fsdp --fsdp_version 2"


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_bits(folder: Path) -> None:
    process = _launched(f"accelerate launch {_options(SHARDING)}", f"{PLAIN} -o launched.pt", folder)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count("wrote launched.pt") == 1, said  # one process tells, and writes
    assert _same("launched.pt", "plain.pt")


def _said_by_accelerate_launch(how: str) -> dict[str, str]:
    """What it says to its processes, beside what torchrun says."""
    asked, *_ = _validate_launch_command(launch_command_parser().parse_args([*_options(how).split(), "script.py"]))
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(asked).items() if name.startswith(names)}


def test_what_accelerate_launch_says_gives_the_same_bits(folder: Path) -> None:
    """--multi_gpu is how it starts several processes, on a CPU too."""
    assert SHARDED.items() <= _said_by_accelerate_launch(SHARDING).items()
    ranks = start_ranks(f"{PLAIN} -o launched.pt", 2, folder, **_said_by_accelerate_launch("--multi_gpu"))
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].said
    assert _same("launched.pt", "plain.pt")


# --- sharded ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_run_is_resumed_to_the_bits_of_one_that_is_not(kind: str, folder: Path) -> None:
    for step in (5, None):
        ranks = start_ranks(
            f"{PLAIN} --save-every 5 -o sharded.pt --resume", 2, folder, **SHARDED, FSDP_STATE_DICT_TYPE=kind
        )
        if step is not None:
            _reaches("sharded", step, ranks[0].process.is_alive)
            ranks[0].send(signal.SIGKILL)
        codes = [rank.end() for rank in ranks]
        assert codes == ([0, 0] if step is None else [-signal.SIGKILL, 1]), ranks[1].said
    assert _same("sharded.pt", "plain.pt")


# --- what they compute ------------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    """Its norm measures the batches of all processes as one."""
    torch.manual_seed(0)
    return nr.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, 10)), to="l1")


def _linear() -> nn.Module:
    """Nothing in it looks across inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class _Spare(nn.Sequential):
    """With a head that takes no part in the loss."""

    def forward(self, input: Tensor) -> Tensor:
        return self[1](self[0](input))  # type: ignore[no-any-return]


def _spare() -> nn.Module:
    return _Spare(*_linear(), nn.Linear(64, 10))


def _trained(model: nn.Module, batch_size: int, accumulate: int = 1) -> dict[str, Tensor]:
    arrays = np.load(ROOT / "examples" / "digits.npz")
    images, labels = torch.from_numpy(arrays["images"][:96]).double(), torch.from_numpy(arrays["labels"][:96]).long()
    asked: dict[str, Any] = {"labels": True, "steps": 6, "lr": 0.01, "clip": 0.5, "val_split": 0.25}
    data = Data(Batch({"input": images}, labels))
    twin, result = finetune(model.double(), data, batch_size=batch_size, accumulate=accumulate, **asked)
    figures = [[epoch.loss, epoch.accuracy, epoch.val_loss, epoch.val_accuracy] for epoch in result.epochs]
    return twin.state_dict() | {"figures": torch.tensor(figures, dtype=torch.float64)}


def _refusal() -> str:
    """Of a checkpoint that one machine has and the other has not."""
    with tempfile.TemporaryDirectory() as folder, accelerator(_linear(), Recipe()) as machine:
        if machine.is_main_process:
            (Path(folder) / "step-00000004").mkdir()
        with pytest.raises(nr.NormRewriteError) as error:
            Checkpoints(Path(folder), machine).begin({}, resume=True)
    return str(error.value).partition(": ")[2]


def _job() -> dict[str, Any]:
    """24 inputs to validate on are three batches of eight: not the same number for each."""
    return {
        "refusal": _refusal(),
        "joined": _trained(_network(), 8),
        "accumulated": _trained(_linear(), 4, 2),
        "spare": _trained(_spare(), 8),
        "half": _trained(_linear(), 4),
    }


def test_two_processes_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    first, second = on_ranks(2, _job, tmp_path / "job")
    assert (
        first["refusal"] == second["refusal"] and "there is step-00000004, nothing. Put the output" in first["refusal"]
    )
    alone = {
        "joined": _trained(_network(), 16),
        "accumulated": _trained(_linear(), 16),
        "spare": _trained(_spare(), 16),
    }
    for name, wanted in alone.items():
        for key, value in wanted.items():
            torch.testing.assert_close(
                first[name][key].double(), value.double(), rtol=1e-5, atol=1e-9, msg=f"{name} {key}"
            )
            assert torch.equal(first[name][key], second[name][key])
    assert not torch.allclose(first["half"]["1.weight"], alone["accumulated"]["1.weight"], rtol=1e-3)
