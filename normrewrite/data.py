"""Data: what a model is run on, from a file, a folder of images, or code.

>>> for batch in open_data("digits.npz", model).batches(250):
...     logits = model(**batch.inputs); batch.labels
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from normrewrite import arch
from normrewrite.errors import NormRewriteError

Array = npt.NDArray[Any]
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMS = (
    "Give a .npz (arrays named as forward's arguments, or `images`; `labels` optional), "
    "a folder of images, or module:factory."
)


@dataclass(frozen=True)
class Batch:
    """inputs: forward's arguments by name, each (N, ...); labels: (N,) int64 or None."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Data:
    """Batches that can be gone through again. `whole` is sliced at each call; `stream` comes in its own sizes."""

    whole: Batch | None = None
    stream: Iterable[Batch] | None = None

    def batches(self, size: int = 250) -> Iterator[Batch]:
        if self.whole is None:
            yield from self.stream or ()
            return
        for start in range(0, len(self.whole), size):
            part = slice(start, start + size)
            labels = None if self.whole.labels is None else self.whole.labels[part]
            yield Batch({name: values[part] for name, values in self.whole.inputs.items()}, labels)


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
) -> Data:
    """The data that `source` names, for a forward whose arguments are called `names`.

    Images may be float32 as the network wants them, any rank, or uint8 (N, H, W, C) with `mean` and `std` of pixels in
    0..1. Raises NormRewriteError with what was found and what to do.
    """
    path = Path(source)
    first = names[0] if names else "input"
    if path.is_dir():
        return Data(_folder(path, first, mean, std))
    if path.suffix == ".npz":
        return Data(_npz(path, names, mean, std))
    if ":" in source and not path.exists():
        return Data(stream=_Factory(source, first))
    raise NormRewriteError(
        f"--data {source}: {'not such data' if path.exists() else 'there is no such file'}. {_FORMS}"
    )


def as_data(source: Tensor | Data | Iterable[Any], names: Sequence[str]) -> Data:
    """Data from what Python programs have at hand: a tensor, Data, or an iterable of batches that can be gone through."""
    first = names[0] if names else "input"
    if isinstance(source, Data):
        return source
    if isinstance(source, Tensor):
        return Data(whole=Batch({first: source}))
    return Data(stream=[_batch(item, first, "data") for item in source])


def example(shape: str, seed: int = 0) -> Tensor:
    """Gaussian input of a shape written as on the command line: `1,3,32,32`."""
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise NormRewriteError(f"--input-shape {shape!r}: write whole numbers, as in 1,3,32,32.")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _npz(path: Path, names: Sequence[str], mean: Sequence[float] | None, std: Sequence[float] | None) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise NormRewriteError(f"--data {path}: can't be read as .npz ({error}). {_FORMS}") from error
    labels = arrays.pop("labels", None)
    inputs = {names[0] if name == "images" and names else name: values for name, values in arrays.items()}
    unknown = [name for name in inputs if name not in names]
    if not inputs or (names and unknown):
        raise NormRewriteError(
            f"--data {path}: arrays {', '.join(arrays) or 'none'}; forward takes {', '.join(names)}. Name them so, or `images`."
        )
    batch = Batch(
        {name: _tensor(values, f"--data {path}: {name}", mean, std) for name, values in inputs.items()},
        None if labels is None else torch.from_numpy(np.asarray(labels).astype(np.int64)),
    )
    sizes = {len(values) for values in [*batch.inputs.values(), *([] if batch.labels is None else [batch.labels])]}
    if len(sizes) != 1 or 0 in sizes:
        raise NormRewriteError(
            f"--data {path}: arrays of {sorted(sizes)} rows. All must have the same number, at least one."
        )
    return batch


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
    scaled = (pixels.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def _folder(folder: Path, name: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Batch:
    """All images below a folder, of one size; subfolders, where all images are in one, are classes in sorted order."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise NormRewriteError(
            f"--data {folder}: no image in the folder ({', '.join(sorted(_IMAGE_SUFFIXES))}). {_FORMS}"
        )
    pixels = [_pixels(path) for path in paths]
    if len({image.shape for image in pixels}) > 1:
        raise NormRewriteError(f"--data {folder}: images of different sizes. Resize them to the network's input first.")
    classes = sorted({path.parent.name for path in paths})
    labels = (
        torch.tensor([classes.index(path.parent.name) for path in paths])
        if all(p.parent != folder for p in paths)
        else None
    )
    return Batch({name: _normalised(np.stack(pixels), f"--data {folder}", mean, std)}, labels)


def _pixels(path: Path) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise NormRewriteError("a folder of images needs Pillow: pip install normrewrite[images]") from error
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise NormRewriteError(f"--data {path}: can't be read as an image ({error}).") from error


@dataclass(frozen=True)
class _Factory:
    """Batches of the user's own: each a tensor, (tensor, labels), or a mapping of forward's arguments and `labels`."""

    source: str
    first: str

    def __iter__(self) -> Iterator[Batch]:
        try:
            batches: Any = arch.find(self.source)()
            for item in batches:
                yield _batch(item, self.first, f"--data {self.source}")
        except NormRewriteError:
            raise
        except Exception as error:  # the user's code runs here
            raise NormRewriteError(f"--data {self.source}: raised {type(error).__name__}: {error}") from error


def _batch(item: object, first: str, where: str) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        inputs = {str(name): values for name, values in item.items() if name != "labels"}
        return Batch(inputs, item.get("labels"))
    if isinstance(item, Sequence) and len(item) == 2:
        return Batch({first: item[0]}, item[1])
    if isinstance(item, Tensor):
        return Batch({first: item})
    raise NormRewriteError(f"{where}: gave a {type(item).__name__}; a batch is a tensor, (tensor, labels) or a dict.")
