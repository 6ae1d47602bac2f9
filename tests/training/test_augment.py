"""Flips and crops: what they may do to an image, and to what they may not be done."""

import pytest
import torch

from normrewrite import NormRewriteError
from normrewrite.data import Batch
from normrewrite.training.augment import augmentation, flipped, shifted


def test_every_image_is_itself_or_its_mirror_image() -> None:
    images = torch.randn(200, 3, 4, 5)
    found = flipped(images)
    same = (found == images).flatten(1).all(1)
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 60 < int(same.sum()) < 140


def test_every_image_is_moved_within_a_border_of_zeros() -> None:
    images = 1 + torch.rand(300, 2, 4, 5)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    found = shifted(images, 1)
    places = {(i, j): padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)}
    fits = torch.stack([(found == place).flatten(1).all(1) for place in places.values()])
    assert bool((fits.sum(0) == 1).all()) and bool((fits.sum(1) > 10).all())  # one place each, and every place


def test_labels_stay_and_the_draw_follows_the_seed() -> None:
    augment, batch = augmentation(flip=True, crop=2), Batch({"x": torch.randn(8, 1, 6, 6)}, torch.arange(8))
    torch.manual_seed(3)
    first = augment(batch)
    torch.manual_seed(3)
    assert torch.equal(augment(batch).inputs["x"], first.inputs["x"]) and first.labels is batch.labels
    assert not torch.equal(augment(batch).inputs["x"], first.inputs["x"])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(NormRewriteError, match=r"x is torch.float32 \(4, 9\). Leave them out"):
        augmentation(flip=True, crop=0)(Batch({"x": torch.zeros(4, 9)}))
