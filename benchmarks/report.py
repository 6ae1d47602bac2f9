"""The report of a real network: docs/report.html, and its picture docs/report.png.

    python -m benchmarks.report ../shared/data          # four minutes beside other work; the picture needs headless Chromium

ResNet-20 as an l1 twin, calibrated on 512 training images, reported on 2,000 test images. The page is
what `normrewrite report` writes, byte for byte; no image of the data is in it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONVERT = "convert {net}.pt --arch zoo.py:{net} --to l1 --calibrate train.npz --batch-size 128"
REPORT = (
    "report {net}.l1.pt --arch zoo.py:{net} --original {net}.pt --data test.npz --latency onnxruntime -o report.html"
)
NET = "cifar10_resnet20"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    data = parser.parse_args().data.resolve()
    os.environ["NORMREWRITE_DATA"] = str(data)
    from tests.conftest import real_images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(data / "weights" / f"{NET}.pt", folder)
        shutil.copy(data / "zoo.py", folder)
        np.savez(folder / "train.npz", images=real_images("train", 512)[0].numpy())
        images, labels = real_images("test", 2000)
        np.savez(folder / "test.npz", images=images.numpy(), labels=labels.numpy())
        for line in (CONVERT, REPORT):
            words = line.format(net=NET).split()
            print("$ normrewrite", *words)
            subprocess.run([sys.executable, "-m", "normrewrite", *words], cwd=folder, check=True)
        shutil.copy(folder / "report.html", DOCS / "report.html")
        _photograph(DOCS / "report.html", folder, DOCS / "report.png")


def _photograph(page: Path, folder: Path, target: Path) -> None:
    """The first screens of a desk and of a phone, side by side."""
    from PIL import Image

    from tests.browser import Browser, found

    if found() is None:
        print("no headless Chromium is here: the picture stays as it was")
        return
    height, gap = 1500, 30
    with Browser() as browser:
        for width in (1160, 390):
            browser.open(page, width, height).screenshot(folder / f"{width}.png", whole=False)
    desk, phone = (Image.open(folder / f"{width}.png").convert("RGB") for width in (1160, 390))
    both = Image.new("RGB", (desk.width + gap + phone.width, height), "#dcd9d3")
    both.paste(desk, (0, 0))
    both.paste(phone, (desk.width + gap, 0))
    both.quantize(96, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"wrote {page.name} ({page.stat().st_size:,} bytes), {target.name} ({target.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
