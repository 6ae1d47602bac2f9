"""A large checkpoint is mapped, not copied: the memory that converting takes grows as the file does, once."""

from pathlib import Path

import pytest

from benchmarks import size

pytestmark = pytest.mark.slow
SMALL, LARGE = 150, 560  # widths: files of 11 and 158 MB


@pytest.mark.parametrize("form", ["state_dict", "safetensors"])
def test_peak_memory_grows_with_the_file_and_no_faster(form: str, tmp_path: Path) -> None:
    peaks, bytes_ = [], []
    for width in (SMALL, LARGE):
        path = size.write_checkpoint(width, form, tmp_path)
        bytes_.append(path.stat().st_size)
        peaks.append(size.converted(path, width, form)[1])
    growth = (peaks[1] - peaks[0]) / (bytes_[1] - bytes_[0])
    assert growth < size.GOAL, f"{growth:.2f} bytes of memory a byte of the file"
