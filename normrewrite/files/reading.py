"""Model files that come in: recognised, and read without running what is in them.

>>> twin = load("twin.pt", arch="zoo.py:cifar10_resnet20")
"""

import errno
import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite.errors import NormRewriteError, nearest, possible
from normrewrite.files import arch as arch_
from normrewrite.files import layout as layouts
from normrewrite.files import soundness, unpickle
from normrewrite.files.layout import Layout
from normrewrite.files.writing import Form
from normrewrite.nn.parts import deepcopy
from normrewrite.provenance import manifest


@dataclass
class ModelFile:
    """A model as it came from a file, and what is needed to write one of the same form."""

    model: nn.Module
    form: Form
    manifest: dict[str, Any] | None
    layout: Layout = field(default_factory=Layout)
    notes: list[str] = field(default_factory=list)  # what people are to know of how it was read


@dataclass
class Content:
    """What a file holds, before any code that it belongs to was run: a module, or tensors by name; its form; its manifest."""

    found: nn.Module | dict[str, Tensor]
    form: Form
    manifest: dict[str, Any] | None
    layout: Layout
    notes: list[str]

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.found.state_dict()) if isinstance(self.found, nn.Module) else self.found


def load(
    path: str | Path,
    arch: str | arch_.Factory | nn.Module | None = None,
    *,
    arch_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
) -> nn.Module:
    """The model in a file: a checkpoint or state_dict (with `arch`), .safetensors, or a pickled module.

    >>> twin = load("twin.pt", arch="zoo.py:cifar10_resnet20")

    arch: `PATH.py:factory`, `module:factory`, `timm:NAME`, `torchvision:NAME`, a callable or a module to fill.
    key: where in a checkpoint the state_dict is, dotted, if not under a usual name (normrewrite.files.layout.USUAL).
    allow, trust: see normrewrite.files.unpickle; nothing is unpickled freely without `trust`.
    A file of normrewrite's is rewritten by its manifest first. Raises NormRewriteError with what to do.
    """
    file = read(path, arch, arch_args=arch_args, key=key, allow=allow, trust=trust)
    for note in file.notes:
        warnings.warn(note, stacklevel=2)
    # A copy, else who writes over the file pulls its memory away; the caller's own module has its own.
    return file.model if isinstance(arch, nn.Module) else deepcopy(file.model)


def read(
    path: str | Path,
    arch: str | arch_.Factory | nn.Module | None = None,
    *,
    arch_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
) -> ModelFile:
    """`load`, with the form of the file and its manifest; tensors stay mapped from the file, which nobody may change."""
    if not isinstance(path, str | os.PathLike):
        raise NormRewriteError(f"the file is a {type(path).__name__}; needed is its path.")
    path = Path(path)
    content = look(path, key=key, allow=allow, trust=trust)
    if isinstance(content.found, nn.Module):
        return ModelFile(content.found, "module", content.manifest, content.layout, content.notes)
    if arch is None:
        arch, arch_args = _named_by(content.manifest, trust, path)
    model, layout, note = _fill(arch_.build(arch, arch_args), content, path, arch)
    notes = [*content.notes, *([f"{path.name}: {note}"] if note else [])]
    return ModelFile(model, content.form, content.manifest, layout, notes)


def look(path: Path, *, key: str | None = None, allow: Sequence[str] = (), trust: bool = False) -> Content:
    """What a file holds, without an architecture."""
    recognise(path)
    form: Form = "safetensors" if path.suffix == ".safetensors" else "state_dict"
    content, metadata = _read_safetensors(path) if form == "safetensors" else (unpickle.load(path, allow, trust), {})
    record = content.get(manifest.KEY) if isinstance(content, Mapping) else None
    checked = None if record is None else manifest.check(record, str(path))
    weights, layout, notes = layouts.find(content, key, path)
    if form == "safetensors":  # which has no keys; those of a checkpoint that it was made from are in its manifest
        layout = replace(layout, key=layouts.of(checked).key, metadata=metadata)
    if isinstance(weights, nn.Module):
        wrong = soundness.check(weights)
        if wrong is not None:
            raise NormRewriteError(f"{path}: the module in it is damaged: {wrong}. Save it again.")
        form = "module"
    return Content(weights, form, checked, layout, notes)


def record(
    path: Path, *, key: str | None = None, allow: Sequence[str] = (), trust: bool = False
) -> dict[str, Any] | None:
    """The manifest in a .json file, or the one that a model file carries, if any."""
    if path.suffix != ".json":
        return look(path, key=key, allow=allow, trust=trust).manifest
    recognise(path)
    return manifest.read(path)


def _named_by(record: dict[str, Any] | None, trust: bool, path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture that a manifest names: code, so it is run only by `trust`."""
    named = None if record is None else record.get("arch")
    if record is not None and named is not None and trust:
        return named, arch_.parse_arguments(record.get("arch_args", []))
    hint = (
        f" Its manifest names {named!r}, and nothing of that was imported: give it as --arch if you know it, or --trust the file."
        if named
        else ""
    )
    raise NormRewriteError(
        f"{path} holds a state_dict: tensors without the code they belong to. Name it with --arch PATH.py:factory or "
        f"--arch module:factory.{hint}"
    )


def recognise(path: Path) -> None:
    """Raises for everything that is no file of weights, with what to do instead."""
    possible(path)
    if path.is_dir():
        raise NormRewriteError(f"{path} is a folder. Give the model file itself.")
    if not path.is_file():
        if path.is_symlink():
            to = path.readlink()
            what = "leads to itself" if _leads_to_itself(path) else f"leads to {to}, which is not there"
            raise NormRewriteError(f"{path} is a link that {what}. Name the file itself.")
        beside = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
        raise NormRewriteError(f"{path}: there is no such file.{nearest(path.name, beside)}")
    if path.stat().st_size == 0:
        raise NormRewriteError(f"{path} is empty. Give a checkpoint written by torch.save or a .safetensors file.")
    if path.suffix == ".onnx":
        raise NormRewriteError(f"{path} is an ONNX file. Convert the PyTorch model, then `normrewrite export` it.")
    names = _zip_names(path)
    if any(name.endswith("/constants.pkl") and f"{name.split('/')[0]}/code/" in "\n".join(names) for name in names):
        raise NormRewriteError(
            f"{path} is a TorchScript archive: compiled code, whose norms can't be rewritten. Give the state_dict of the "
            "Python model it was made from (script.state_dict() saves it) and --arch."
        )
    if path.suffix == ".pt2" or any(
        name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in names
    ):
        raise NormRewriteError(
            f"{path} is a torch.export archive (.pt2): its graph is fixed for inference and can't be trained further. Convert "
            "the Python model (state_dict and --arch), then export the twin."
        )


def _leads_to_itself(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # the last two: names and versions of no zip
        return []


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """In the shape of a checkpoint of torch.save's: the state_dict and, if there is one, the manifest. Also further metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        record = {manifest.KEY: json.loads(metadata[manifest.KEY])} if manifest.KEY in metadata else {}
        others = {name: text for name, text in metadata.items() if name != manifest.KEY}
        return {"state_dict": tensors, **record}, others
    except (SafetensorError, ValueError, RecursionError, OSError) as error:  # a number too long is a ValueError
        raise NormRewriteError(
            f"{path}: can't be read as a safetensors file ({error}). It may be truncated."
        ) from error


def _fill(model: nn.Module, content: Content, path: Path, arch: object) -> tuple[nn.Module, Layout, str]:
    """The architecture with the file's weights, by their names in it; how these stood in the file, and what is to be said."""
    record = content.manifest
    if record is not None:
        model = manifest.replay(model, record, str(path))
    wanted = model.state_dict().keys()
    state, layout, note = layouts.fitted(content.state, content.layout, wanted)
    state, layout = layouts.without_extra(state, layout, wanted)
    _take_dtypes(model, state)
    own = {} if isinstance(arch, nn.Module) else _taken(model, state)  # a module of the caller's keeps its memory
    try:
        outcome = model.load_state_dict(state | own, strict=False)
    except RuntimeError as error:  # sizes that differ
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise NormRewriteError(f"{path} doesn't fit --arch {arch}: {' '.join(lines)}") from error
    wrong = [f"missing {name}" for name in outcome.missing_keys] + [
        f"unexpected {name}" for name in outcome.unexpected_keys
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise NormRewriteError(
            f"{path} doesn't fit --arch {arch}: {', '.join(wrong[:4])}{more}. "
            "Is it the right architecture, with the right --arch-args?"
        )
    if record is not None:
        manifest.remember(model, record)
    return model, layout, note


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give every tensor of the model its checkpoint's dtype: a half checkpoint stays half, and tied tensors stay tied."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(name)
        if (
            isinstance(stored, Tensor)
            and isinstance(tensor, Tensor)
            and stored.dtype != tensor.dtype
            and stored.is_floating_point()
        ):
            tensor.data = tensor.data.to(stored.dtype)


def _taken(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model that now are their checkpoint's, mapped from the file: a large one is not held twice."""
    taken = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(name)
        if isinstance(stored, Tensor) and isinstance(tensor, Tensor) and _alike(stored, tensor):
            tensor.data = stored
            taken[name] = tensor
    return taken


def _alike(stored: Tensor, tensor: Tensor) -> bool:
    return all(getattr(stored, each) == getattr(tensor, each) for each in ("shape", "dtype", "device", "layout"))
