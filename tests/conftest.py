"""What several tests share: trained networks and images that stand beside the project, where they do; the command line."""

import gc
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Triton decides when it is imported whether its kernels are interpreted, and torch imports it on its own account. Tests run
# them on the CPU; what is compiled ahead of time is compiled in a process of its own.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn

from normrewrite import cli
from normrewrite.options.convert import Convert
from normrewrite.options.fields import quiet

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("NORMREWRITE_DATA", ROOT.parent / "shared" / "data"))
TARGETS = ("l1", "linf", "topk:10", "topk:1%", "range")

# Tests run side by side: a thread each, those of the processes that they start, too.
THREADS = os.environ.get("NORMREWRITE_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
os.environ.setdefault("OMP_NUM_THREADS", THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with one when the other is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """torch.onnx reads the source of its 500 functions in every call: once will do."""
    with suppress(ImportError):  # a private module, and not in every process that imports this file
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)
    _freeze()


def _freeze() -> None:
    """What is imported and collected by now stays: searches for garbage, of which trainers make many, pass it by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen_after() -> Iterator[None]:
    """Compilers and launchers, imported where they are first used, and their caches stay too."""
    yield
    _freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _module(path: Path) -> ModuleType:
    name = f"real_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class RealNetwork:
    """A trained network of the data folder: how to make it, its weights, what it is run on."""

    name: str
    sites: int
    shape: tuple[int, ...]

    @property
    def weights(self) -> Path:
        return REAL / "weights" / f"{self.name}.pt"

    @property
    def arch(self) -> str:
        return f"{REAL / 'zoo.py'}:{self.name}"

    def make(self) -> nn.Module:
        model: nn.Module = getattr(_module(REAL / "zoo.py"), self.name)()
        model.load_state_dict(torch.load(self.weights, weights_only=True))
        return model.eval()

    def inputs(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Real images with labels; tones for the pitch tracker (labels None)."""
        if self.name == "crepe_tiny":
            return tones(count), None
        return real_images("imagenet" if self.name.startswith("imagenet") else "test", count)


def real_images(source: str, count: int) -> tuple[Tensor, Tensor]:
    """Normalised images and labels: `imagenet`, or CIFAR-10's `train` or `test`."""
    load = _module(REAL / "load.py")
    sheets = (count + 4999) // 5000
    images, labels = load.imagenet1000(count) if source == "imagenet" else load.cifar10(source, sheets)
    return torch.from_numpy(load.normalised(images[:count])), torch.from_numpy(labels[:count])


NETWORKS = (
    RealNetwork("cifar10_resnet20", 19, (3, 32, 32)),
    RealNetwork("cifar10_resnet56", 55, (3, 32, 32)),
    RealNetwork("imagenet_mobilenet_v2", 52, (3, 224, 224)),
    RealNetwork("crepe_tiny", 6, (1024,)),
)


def tones(count: int) -> Tensor:
    """(count, 1024) frames of harmonic tones from 60 to 1500 Hz at 16 kHz, each zero-mean and unit-std."""
    generator = torch.Generator().manual_seed(0)
    pitch = torch.logspace(1.78, 3.17, count)[:, None, None]
    time = torch.arange(1024) / 16_000
    order = torch.arange(1, 6)[None, :, None]
    phase = 6.283 * torch.rand(count, 5, 1, generator=generator)
    waves = (torch.sin(6.28318 * pitch * order * time + phase) / order).sum(1)
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)


def digits_network() -> nn.Module:
    """The trained network of the examples, in eval."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from digits import digits_resnet  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "examples"))
    model: nn.Module = digits_resnet()
    model.load_state_dict(torch.load(ROOT / "examples" / "digits.pt", weights_only=True))
    return model.eval()


@pytest.fixture(params=NETWORKS, ids=lambda network: network.name)
def network(request: pytest.FixtureRequest) -> RealNetwork:
    found: RealNetwork = request.param
    if not found.weights.is_file():
        pytest.skip(f"trained network {found.weights.name} is not beside the project; set NORMREWRITE_DATA")
    return found


@pytest.fixture
def resnet20() -> RealNetwork:
    if not NETWORKS[0].weights.is_file():
        pytest.skip("trained network cifar10_resnet20.pt is not beside the project; set NORMREWRITE_DATA")
    return NETWORKS[0]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and affine parameters that no two channels share, so that an error shows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.copy_(draw(module.running_mean, -2, 2))
                    module.running_var.copy_(draw(module.running_var, 0.2, 4))
                if module.weight is not None:
                    module.weight.copy_(draw(module.weight, 0.5, 2))
                    module.bias.copy_(draw(module.bias, -1, 1))
    return model


@pytest.fixture
def small() -> Callable[[], nn.Module]:
    """A small trained-looking network of torch.nn classes alone."""

    def make() -> nn.Module:
        layers = (
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, 10),
        )
        return randomise(nn.Sequential(*layers)).eval()

    return make


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


Command = Callable[[str], Outcome]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `normrewrite ...` in this process, in the folder that a test's own file makes. An exception that comes out of it is
    what a user sees as a traceback."""

    def invoke(line: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["normrewrite", *shlex.split(line)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return invoke


def enter_copy(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test's own copy of the files that a module of tests made once; the folder it runs in."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    inside = tmp_path / "inside"
    shutil.copytree(shelf, inside, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(inside)
    return inside


def convert_file(path: Path, **options: Any) -> None:
    """What the command `convert` writes, with L1 norms."""
    from normrewrite.commands.convert import convert
    from normrewrite.commands.source import Source

    asked = Convert(model=path, to="l1", **options)
    convert(Source.of(asked), asked, quiet)
