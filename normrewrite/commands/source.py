"""What commands have in common: the model file that they read, the data, and the names of what they write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from normrewrite import files
from normrewrite.data import Batch, Data, argument_names, example, open_data
from normrewrite.errors import NormRewriteError
from normrewrite.execution import Network
from normrewrite.files.arch import parse_arguments
from normrewrite.options.groups import Code, Inputs, Pixels
from normrewrite.results import shortened

File = TypeVar("File")


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
    # What people are to know of the files, beside the result.
    notes: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, options: Code) -> "Source":
        """As options say; they name a model."""
        assert options.path is not None
        arguments = parse_arguments(options.arch_args)
        return cls(options.path, options.arch, arguments, options.key, options.allow, options.trust, options.device)

    def __post_init__(self) -> None:
        """A fault of the input is told before one of the output."""
        if self.path.suffix != ".onnx":
            files.recognise(self.path)

    def read(self) -> files.ModelFile:
        return self.read_all(self.path)[0]

    def read_all(self, *paths: Path) -> list[files.ModelFile]:
        """Several files of the same code, with what is said of how they were read."""
        device = _device(self.device)
        read = partial(files.read, arch=self.arch, arch_args=self.arch_args, allow=self.allow, trust=self.trust)
        model_files = by_key(read, self.key, *paths)
        for file in model_files:
            file.model.to(device)
            self.notes.extend(note for note in file.notes if note not in self.notes)
        return model_files

    def inputs(self) -> dict[str, Path | None]:
        """The files that every command reads, by what names them: the model's, and that of its code where it is a file."""
        code = (self.arch or "").rpartition(":")[0]
        return {"MODEL": self.path, "--arch": Path(code) if code.endswith(".py") else None}

    def check_outputs(
        self, outputs: Mapping[str, Path | None], force: bool, inputs: Mapping[str, object], kind: str = "a torch file"
    ) -> None:
        """As files.check_outputs, and the model file is no other output than a torch file by --force, which is its successor."""
        files.recognise(self.path)  # a fault of the input is told before one of the output
        own = self.inputs()
        further = {option: path for option, path in outputs.items() if option != "-o"}
        if kind == "a torch file":
            files.check_outputs(further, force, own)
            del own["MODEL"]
        files.check_outputs(outputs, force, own | dict(inputs), kind)

    def save(self, file: files.ModelFile, model: nn.Module, output: Path, **options: Any) -> files.Form:
        """Write what came of a file in its form and layout; options: as of normrewrite.files.save."""
        layout = file.layout
        written = files.save(model, output, form=file.form, layout=layout, **options)
        beside = [*layout.left, *(layout.beside if written == "safetensors" else ())]
        if beside:
            self.notes.append(
                f"left out of {output.name}: {shortened(beside)} (only small, plain data is carried along)"
            )
        return written


def by_key(read: Callable[..., File], key: str | None, *paths: Path) -> list[File]:
    """Each file read with `key` where it has it, for one of several may be of another layout; one of them has to."""
    contents, missing = [], []
    for path in paths:
        try:
            contents.append(read(path, key=key))
        except files.NoSuchKey as error:
            missing.append(error)
            if len(missing) == len(paths):
                raise missing[0] from None
            try:
                contents.append(read(path, key=None))
            except files.NoSuchKey:
                raise error from None
    return contents


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # every backend has its own way to say that it is not there
        raise NormRewriteError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def opened(data: str, model: nn.Module, pixels: Pixels) -> Data:
    return open_data(data, argument_names(model), mean=pixels.mean, std=pixels.std)


def inputs_of(options: Inputs, names: list[str], missing: str, otherwise: str | None = None) -> Data:
    """What goes into a network: random numbers or data, or else the data `otherwise`; raises with the text `missing`."""
    if options.input_shape is not None:
        return Data(whole=Batch({names[0] if names else "input": example(options.input_shape)}))
    data = options.data or otherwise
    if data is None:
        raise NormRewriteError(missing)
    return open_data(data, names, mean=options.mean, std=options.std)


def networks_of(source: Source, other: Path) -> tuple[tuple[Network, Network], list[str]]:
    """Two networks, torch or ONNX, and the names of their arguments where torch tells them."""
    plain = (".onnx", ".engine")
    paths = (source.path, other)
    modules = iter(source.read_all(*(path for path in paths if path.suffix not in plain)))
    a, b = (path if path.suffix in plain else next(modules).model for path in paths)
    return (a, b), next((argument_names(network) for network in (a, b) if isinstance(network, nn.Module)), [])


def derived(path: Path, word: str) -> Path:
    """`model.pt`, `l1` -> `model.l1.pt`."""
    return path.with_name(f"{path.stem}.{word}{path.suffix}")
