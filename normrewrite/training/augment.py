"""Flips and crops of image batches on whatever device they are, drawn from torch's own generator.

>>> augment = augmentation(flip=True, crop=4); batch = augment(batch)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from normrewrite.data import Batch
from normrewrite.errors import NormRewriteError


def augmentation(flip: bool, crop: int) -> Callable[[Batch], Batch]:
    """What changes every image of a batch, each by its own draw; labels stay."""
    changes: list[Callable[[Tensor], Tensor]] = [flipped] if flip else []
    if crop:
        changes.append(partial(shifted, pixels=crop))

    def augment(batch: Batch) -> Batch:
        inputs = batch.inputs
        for change in changes:
            inputs = {name: change(_images(name, values)) for name, values in inputs.items()}
        return Batch(inputs, batch.labels)

    return augment


def _images(name: str, values: Tensor) -> Tensor:
    if values.dim() != 4 or not values.is_floating_point():
        shape = tuple(values.shape)
        raise NormRewriteError(
            f"--flip and --crop need float images (N, C, H, W); {name} is {values.dtype} {shape}. Leave them out."
        )
    return values


def flipped(images: Tensor) -> Tensor:
    """Each image mirrored, or not, with even chances."""
    chosen = torch.rand(len(images)) < 0.5
    return torch.where(chosen[:, None, None, None].to(images.device), images.flip(-1), images)


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to `pixels` each way: a crop of the image with a border of zeros."""
    n, _, height, width = images.shape
    if pixels > max(height, width):
        raise NormRewriteError(f"--crop {pixels}: images are {height} x {width}. Shift them by less.")
    padded = F.pad(images, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, n, 1)).to(images.device)
    down_to = (down + torch.arange(height, device=images.device))[:, :, None]
    right_to = (right + torch.arange(width, device=images.device))[:, None, :]
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, down_to, right_to].permute(0, 3, 1, 2).contiguous()
