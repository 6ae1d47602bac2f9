"""Arrays in files of numpy's: read whole, and nothing that unpacks without bound.

>>> arrays_in(Path("digits.npz")).keys()
dict_keys(['images', 'labels'])
"""

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.outside import swells

Array = npt.NDArray[Any]
FORMS = (
    "Give a .npz (arrays named as forward's arguments, or `images`; `labels` optional), a .npy of inputs, "
    "a folder of images, or module:factory."
)


def arrays_in(path: Path) -> dict[str, Array]:
    """The arrays by name; that of a .npy is `images`. Raises NormRewriteError with what such data look like."""
    try:
        with path.open("rb") as raw:
            _check_packing(path, raw)
            file: Any = np.load(raw, allow_pickle=False)
            arrays = {"images": file} if path.suffix == ".npy" else {name: file[name] for name in file.files}
    except NormRewriteError:
        raise
    except Exception as error:  # numpy, zipfile and zlib have a class of their own for every kind of damage
        raise NormRewriteError(
            f"--data {path}: can't be read as {path.suffix} ({first_line(error)}). {FORMS}"
        ) from error
    if not all(isinstance(values, np.ndarray) for values in arrays.values()):
        raise NormRewriteError(
            f"--data {path}: can't be read as {path.suffix} (it holds other things than arrays). {FORMS}"
        )
    return arrays


def _check_packing(path: Path, raw: IO[bytes]) -> None:
    """Raises for an archive that unpacks without bound."""
    if zipfile.is_zipfile(raw):
        with zipfile.ZipFile(raw) as archive:
            entries = archive.infolist()
        check_size(f"--data {path}", path.stat().st_size, sum(entry.file_size for entry in entries))
    raw.seek(0)


def check_size(where: str, packed: int, unpacked: int) -> None:
    if swells(packed, unpacked):
        raise NormRewriteError(
            f"{where}: {packed:,} bytes that unpack to {unpacked:,}. If that is your data, save it without compression."
        )
