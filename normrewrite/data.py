"""Data: what a model is run on, from a file, a folder of images, or code.

>>> for batch in open_data("digits.npz", argument_names(model)).batches(250):
...     logits = model(**batch.inputs); batch.labels
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normrewrite.errors import NormRewriteError, first_line, possible
from normrewrite.files import arch, images
from normrewrite.files.arrays import FORMS, Array, arrays_in
from normrewrite.outside import count

NO_BATCH = "the data held no batch. Give at least one input."
_LARGEST = 1 << 30  # numbers of an example input: four gigabytes in fp32


@dataclass(frozen=True)
class Batch:
    """inputs: forward's arguments by name; labels: (N,) int64 or None.

    Inputs (N, ...) each are a stack, which can be cut; those of several lengths, as a graph's nodes and edges, are one input.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    @property
    def stacked(self) -> bool:
        """Whether all inputs have the same first size."""
        sizes = {tuple(values.shape[:1]) for values in self.inputs.values()}
        return len(sizes) == 1 and () not in sizes

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if self.stacked else int(bool(self.inputs))

    def rows(self, chosen: slice | Tensor) -> "Batch":
        """Some of a stack; what is one input stays whole."""
        if not self.stacked:
            return self
        labels = None if self.labels is None else self.labels[chosen]
        return Batch({name: values[chosen] for name, values in self.inputs.items()}, labels)

    def positional(self, names: Sequence[str]) -> list[Tensor]:
        """The inputs in the order of forward's arguments `names`, whatever order they came in; as they came, by other names."""
        known = [self.inputs[name] for name in names if name in self.inputs]
        return known if len(known) == len(self.inputs) else list(self.inputs.values())

    @property
    def finite(self) -> bool:
        """Whether no input is NaN or infinite: one would spoil every statistic."""
        return all(bool(torch.isfinite(values).all()) for values in self.inputs.values())

    def to(self, device: torch.device) -> "Batch":
        labels = None if self.labels is None else self.labels.to(device)
        return Batch({name: values.to(device) for name, values in self.inputs.items()}, labels)


@dataclass(frozen=True)
class Data:
    """Batches that can be gone through again. `whole` is cut at each call, where it is a stack; `stream` comes in its own sizes.

    skipped: files that were left out, as they can't be read.
    """

    whole: Batch | None = None
    stream: Iterable[Batch] | None = None
    skipped: tuple[str, ...] = ()

    def batches(self, size: int = 250) -> Iterator[Batch]:
        if not isinstance(size, Integral) or size < 1:
            raise NormRewriteError(f"batch size {size}: give a whole number from 1.")
        if self.whole is None:
            yield from map(sound, self.stream or ())
            return
        for start in range(0, len(self.whole), size):
            yield self.whole.rows(slice(start, start + size))

    def first(self, size: int) -> Batch:
        """The first inputs, `size` of them at most, without labels. Raises NormRewriteError where there are none."""
        batch = next(iter(self.batches(size)), None)
        if batch is None:
            raise NormRewriteError(NO_BATCH)
        return replace(batch.rows(slice(size)), labels=None)


def sound(batch: Batch, where: str = "the data") -> Batch:
    """The batch with labels as int64. Raises where there is not one whole number an input."""
    check_dense(batch.inputs, where)
    if batch.labels is None:
        return batch
    labels = _labels(batch.labels, where)
    if batch.stacked and len(labels) != len(batch):
        raise NormRewriteError(
            f"{where}: {len(labels)} labels for {len(batch)} inputs. Both must have the same number."
        )
    return replace(batch, labels=labels)


def check_dense(inputs: Mapping[str, Tensor], where: str) -> None:
    """Raises for sparse, nested and quantised tensors, and for those on the meta device, which hold no numbers."""
    for name, values in inputs.items():
        nested = values.is_nested
        plain = values.layout == torch.strided and not (values.is_meta or values.is_quantized or nested)
        if not plain:
            kind = (
                "meta" if values.is_meta else "nested" if nested else "quantised" if values.is_quantized else "sparse"
            )
            raise NormRewriteError(f"{where}: {name} is a {kind} tensor; give dense ones with their numbers.")


def check_finite(batch: Batch, what: str) -> None:
    """Raises for inputs that are NaN or infinite; says which."""
    for name, values in batch.inputs.items():
        if not torch.isfinite(values).all():
            wrong = ~torch.isfinite(values.reshape(len(values) if values.dim() else 1, -1))
            bad = wrong.any(1).nonzero().flatten()
            raise NormRewriteError(
                f"{what}: {name}: {len(bad)} of {len(wrong)} inputs hold NaN or infinity, the first is number {int(bad[0])}. "
                "Mend them or take them out."
            )


def argument_names(model: nn.Module) -> list[str]:
    """The names of forward's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def open_data(
    source: str,
    names: Sequence[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    strict: bool = True,
) -> Data:
    """The data that `source` names, for a forward whose arguments are called `names`.

    Images may be float32 as the network wants them, any rank, or uint8 (N, H, W, C) with `mean` and `std` of pixels in
    0..1. strict: refuse a folder for one damaged image, instead of leaving it out. Raises NormRewriteError with what was
    found and what to do.
    """
    path = Path(source)
    first = names[0] if names else "input"
    possible(path, "--data ")
    if path.is_dir():
        return _folder(path, first, mean, std, strict)
    if path.suffix in (".npz", ".npy"):
        return Data(_npz(path, names, mean, std))
    if ":" in source and not path.exists():
        return Data(stream=_Factory(source, first))
    raise NormRewriteError(f"--data {source}: {'not such data' if path.exists() else 'there is no such file'}. {FORMS}")


def as_data(source: Tensor | Data | Mapping[str, Tensor] | Iterable[Any], names: Sequence[str]) -> Data:
    """Data from what Python programs have at hand: a tensor, forward's arguments by name, Data, or an iterable of batches,
    gone through once."""
    first = names[0] if names else "input"
    if isinstance(source, Data):
        return source if source.whole is None else replace(source, whole=sound(source.whole))
    if isinstance(source, Tensor | Mapping):
        return Data(whole=_batch(source, first, "data"))
    if not isinstance(source, Iterable):
        raise NormRewriteError(f"data is a {type(source).__name__}; needed is a tensor, or batches of tensors.")
    return Data(stream=[_batch(item, first, "data") for item in source])


def example(shape: str, seed: int = 0) -> Tensor:
    """Gaussian input of a shape written as on the command line: `1,3,32,32`."""
    sizes = [number for part in shape.split(",") if (number := count(part)) is not None]
    if len(sizes) < shape.count(",") + 1:
        raise NormRewriteError(f"--input-shape {shape!r}: write whole numbers, as in 1,3,32,32.")
    if math.prod(sizes) > _LARGEST:
        raise NormRewriteError(
            f"--input-shape {shape}: more than {_LARGEST:,} numbers. Give the shape of one small batch."
        )
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _npz(path: Path, names: Sequence[str], mean: Sequence[float] | None, std: Sequence[float] | None) -> Batch:
    arrays = arrays_in(path)
    labels = arrays.pop("labels", None)
    if "images" in arrays and "images" not in names and names:
        if names[0] in arrays:
            raise NormRewriteError(
                f"--data {path}: arrays {', '.join(arrays)}; forward takes {names[0]}: both are its input."
            )
        arrays = {names[0] if name == "images" else name: values for name, values in arrays.items()}
    if not arrays or (names and not set(arrays) <= set(names)):
        raise NormRewriteError(
            f"--data {path}: arrays {', '.join(arrays) or 'none'}; forward takes {', '.join(names)}. Name them so, or `images`."
        )
    where = f"--data {path}"
    inputs = {name: _tensor(values, f"{where}: {name}", mean, std) for name, values in arrays.items()}
    return _checked(inputs, labels, where)


def _checked(inputs: dict[str, Tensor], labels: Any, where: str) -> Batch:
    """A stack of at least one row, with a label a row if any."""
    batch = Batch(inputs, None if labels is None else _labels(labels, where))
    sizes = {len(values) for values in [*inputs.values(), *([] if batch.labels is None else [batch.labels])]}
    if len(sizes) != 1 or 0 in sizes:
        raise NormRewriteError(
            f"{where}: arrays of {sorted(sizes)} rows. All must have the same number, at least one, labels too; a network whose "
            "inputs have several lengths takes module:factory, which gives batches."
        )
    return batch


def _labels(labels: Any, where: str) -> Tensor:
    """Class numbers (N,) as int64, from an array or tensor of whole numbers."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    whole = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf"
    if not whole or not bool(np.all(np.isfinite(values) & (values == np.round(values)))):
        raise NormRewriteError(f"{where}: labels must be whole numbers, one a row: an array or tensor of shape (N,).")
    return torch.from_numpy(values.astype(np.int64))


def _tensor(values: Array, where: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    if values.ndim == 0 or values.dtype.kind not in "fiub":
        raise NormRewriteError(f"{where}: {values.dtype} of shape {values.shape}, not an array of numbers by row.")
    if values.dtype == np.uint8 and values.ndim == 4:
        return _normalised(values, where, mean, std)
    return torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values.astype(np.int64))


def _normalised(pixels: Array, where: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W)."""
    channels = pixels.shape[-1]
    if mean is None or std is None:
        raise NormRewriteError(
            f"{where} is uint8: give the network's --mean and --std ({channels} numbers each, pixels in 0..1)."
        )
    if {len(mean), len(std)} - {1, channels}:
        raise NormRewriteError(
            f"{where} has {channels} channels; --mean and --std have {len(mean)} and {len(std)} numbers."
        )
    if not np.all(np.isfinite([*mean, *std])) or min(std) <= 0:
        raise NormRewriteError(f"{where}: --mean and --std must be finite, and --std above zero.")
    scaled = (pixels.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def _folder(folder: Path, name: str, mean: Sequence[float] | None, std: Sequence[float] | None, strict: bool) -> Data:
    """All images below a folder, of one size; subfolders, where all images are in one, are classes in sorted order."""
    paths = images.find(folder)
    classes = images.classes(folder, paths)
    pixels, skipped = images.read(paths, strict)
    if len({image.shape for image in pixels.values()}) > 1:
        raise NormRewriteError(f"--data {folder}: images of different sizes. Resize them to the network's input first.")
    labels = None if classes is None else np.array([classes[path] for path in pixels])
    where = f"--data {folder}"
    whole = _checked({name: _normalised(np.stack(list(pixels.values())), where, mean, std)}, labels, where)
    return Data(whole, skipped=skipped)


@dataclass(frozen=True)
class _Factory:
    """Batches of the user's own: each a tensor, (tensor, labels), or a mapping of forward's arguments and `labels`, whose
    tensors may have several lengths."""

    source: str
    first: str

    def __iter__(self) -> Iterator[Batch]:
        where = f"--data {self.source}"
        try:
            with arch.search_path(self.source):
                batches: Any = arch.find(self.source, "--data", FORMS)()
                for item in batches:
                    yield _batch(item, self.first, where)
        except NormRewriteError:
            raise
        except (Exception, SystemExit) as error:  # the user's code runs here
            raise NormRewriteError(f"{where}: raised {first_line(error)}") from error


def _batch(item: object, first: str, where: str) -> Batch:
    if isinstance(item, Batch):
        return sound(item, where)
    inputs, labels = _parts(item, first)
    if not inputs or not all(isinstance(values, Tensor) and values.dim() for values in inputs.values()):
        raise NormRewriteError(
            f"{where}: gave a {type(item).__name__}; a batch is a tensor, (tensor, labels) or a dict of tensors."
        )
    check_dense(inputs, where)
    batch = Batch(inputs, None if labels is None else _labels(labels, where))
    return _checked(inputs, labels, where) if batch.stacked else batch


def _parts(item: object, first: str) -> tuple[dict[str, Any], object]:
    if isinstance(item, Mapping):
        return {str(name): values for name, values in item.items() if name != "labels"}, item.get("labels")
    if isinstance(item, Sequence) and len(item) in (1, 2) and not isinstance(item, str):  # (x,) is a TensorDataset's
        return {first: item[0]}, item[1] if len(item) == 2 else None
    return {first: item}, None
