"""Images and labels of a task: CIFAR-10 from a folder, scikit-learn's digits, or any feed that `finetune --data` takes.

>>> train, test = open_task(Task("cifar10", 16, 20_000, 10_000), Path("../shared/data"))

CIFAR-10 is read from cifar-10-batches-bin/, the binary version of https://www.cs.toronto.edu/~kriz/cifar.html, or from
cifar10/, lossless sheets of 50 × 100 images and labels.npz.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.norm_matters.run import Task
from normrewrite.data import Batch, Data, open_data
from normrewrite.errors import NormRewriteError

Images = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # (N, H, W, 3) and (N,)
FIGURES = {  # mean and standard deviation of pixels of 0 to 255
    "standardised": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "pixels": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def folder() -> Path:
    """Where CIFAR-10 and trained networks are, unless --data says otherwise."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("NORMREWRITE_DATA", beside))


@lru_cache(maxsize=4)
def open_task(task: Task, where: Path) -> tuple[Data, Data]:
    """To train on and to test with. Raises NormRewriteError where the data are not there, or too few."""
    if ":" in task.source:
        return open_data(task.source.format(split="train"), ["x"]), open_data(task.source.format(split="test"), ["x"])
    if task.source == "digits":
        images, labels = _digits()
        train, test = (images[task.test :], labels[task.test :]), (images[: task.test], labels[: task.test])
    else:
        train, test = (_cifar10(where, split) for split in ("train", "test"))
    return _data(train, task, task.train), _data(test, task, task.test)


def _data(labelled: Images, task: Task, count: int) -> Data:
    images, labels = labelled
    if len(images) < count:
        raise NormRewriteError(f"{task.source}: {count} images are needed, got {len(images)}.")
    count = count or len(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in FIGURES[task.scale])
    x = _resized(torch.from_numpy(images[:count]).permute(0, 3, 1, 2).float(), task.side)
    return Data(Batch({"input": (x - mean) / std}, torch.from_numpy(labels[:count])))


def _resized(x: Tensor, side: int) -> Tensor:
    """Means of pixels where there are more, repeated pixels where there are fewer."""
    return F.avg_pool2d(x, x.shape[-1] // side) if side < x.shape[-1] else F.interpolate(x, size=side)


def _digits() -> Images:
    """scikit-learn's 1,797, 8 × 8, in random order, as grey pixels of 0 to 255."""
    from sklearn.datasets import load_digits

    data_set = load_digits()
    order = np.random.default_rng(0).permutation(len(data_set.target))
    grey = (data_set.images[order] * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), data_set.target[order].astype(np.int64)


@lru_cache(maxsize=2)
def _cifar10(where: Path, split: str) -> Images:
    binary, sheets = where / "cifar-10-batches-bin", where / "cifar10"
    if binary.is_dir():
        return _batches(sorted(binary.glob("data_batch_*.bin" if split == "train" else "test_batch.bin")))
    if sheets.is_dir():
        images = np.concatenate([_sheet(path) for path in sorted(sheets.glob(f"{split}_*.webp"))])
        return images, np.load(sheets / "labels.npz")[split][: len(images)].astype(np.int64)
    raise NormRewriteError(
        f"--data {where}: holds neither cifar-10-batches-bin nor cifar10. Unpack cifar-10-binary.tar.gz of "
        "https://www.cs.toronto.edu/~kriz/cifar.html there, or name the folder where it is."
    )


def _batches(paths: list[Path]) -> Images:
    """A label and 3 × 32 × 32 pixels a record."""
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in paths])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def _sheet(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    sheet = np.asarray(Image.open(path).convert("RGB"))
    return sheet.reshape(50, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
