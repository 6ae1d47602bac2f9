"""Images in a folder: which there are, of which class, and their pixels.

>>> paths = find(folder); pixels, skipped = read(paths, strict=False)
>>> pixels[paths[0]].shape
(224, 224, 3)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.files.arrays import FORMS, Array, check_size

_MOST_PIXELS = 1 << 25  # of an image: 100 MB as pixels
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def find(folder: Path) -> list[Path]:
    """All images below a folder, in order. Raises where there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise NormRewriteError(f"--data {folder}: no image in the folder ({', '.join(sorted(_SUFFIXES))}). {FORMS}")
    return paths


def classes(folder: Path, paths: Sequence[Path]) -> dict[Path, int] | None:
    """The class of each image by its subfolder, where all are in one."""
    inside = {path: path.relative_to(folder).parts for path in paths}
    if any(len(parts) == 1 for parts in inside.values()):
        return None
    names = sorted({parts[0] for parts in inside.values()})
    return {path: names.index(parts[0]) for path, parts in inside.items()}


def read(paths: Sequence[Path], strict: bool) -> tuple[dict[Path, Array], tuple[str, ...]]:
    """The images, and the files that are none; the first of these is raised where `strict`, or where no image is left."""
    pixels: dict[Path, Array] = {}
    packed = unpacked = 0
    faults: dict[str, NormRewriteError] = {}
    for path in paths:
        try:
            packed, unpacked = packed + path.stat().st_size, unpacked + _unpacked(path)
            check_size(f"--data {path}", packed, unpacked)
            with _image(path) as image:
                pixels[path] = np.asarray(image.convert("RGB"))
        except _Damaged as error:
            faults[str(path)] = error
    if faults and (strict or not pixels):
        raise next(iter(faults.values()))
    return pixels, tuple(faults)


class _Damaged(NormRewriteError):
    """An image that can't be read."""


def _unpacked(path: Path) -> int:
    """Bytes of an image as pixels, by its head alone."""
    with _image(path) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise _Damaged(
                f"--data {path}: can't be read as an image (of {image.width} x {image.height} pixels). Give smaller ones."
            )
        return 3 * int(image.width * image.height)


@contextmanager
def _image(path: Path) -> Iterator[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise NormRewriteError("a folder of images needs Pillow: pip install normrewrite[images]") from error
    if not path.is_file():
        raise _Damaged(f"--data {path}: can't be read as an image (it is no file).")
    try:
        with Image.open(path) as image:
            yield image
    except NormRewriteError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise _Damaged(f"--data {path}: can't be read as an image ({first_line(error)}).") from error
