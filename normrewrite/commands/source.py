"""What commands have in common: the model file that they read, the data, and the names of what they write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normrewrite import files
from normrewrite.data import Data, argument_names, open_data
from normrewrite.errors import NormRewriteError


@dataclass(frozen=True)
class Source:
    """How a model file is to be read: the options that all commands share."""

    path: Path
    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    allow: Sequence[str] = ()
    trust: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """A fault of the input is told before one of the output."""
        if self.path.suffix != ".onnx":
            files.recognise(self.path)

    def read(self, path: Path | None = None) -> files.ModelFile:
        device = _device(self.device)
        file = files.read(
            path or self.path, self.arch, arch_args=self.arch_args, key=self.key, allow=self.allow, trust=self.trust
        )
        file.model.to(device)
        return file


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # every backend has its own way to say that it is not there
        raise NormRewriteError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def opened(data: str, model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> Data:
    return open_data(data, argument_names(model), mean=mean, std=std)


def derived(path: Path, word: str) -> Path:
    """`model.pt`, `l1` -> `model.l1.pt`."""
    return path.with_name(f"{path.stem}.{word}{path.suffix}")
