"""The wheel holds the tree, and nothing of it becomes a top-level name."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import normrewrite as nr
from tests.conftest import ROOT


def _modules() -> set[str]:
    """Every module of the tree as the wheel must name it; the links inside normrewrite/ are not followed."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "normrewrite").rglob("*.py")}
    found = {name for name in found if not name.startswith(("normrewrite/passes/", "normrewrite/plugins/"))}
    for folder in ("passes", "plugins"):
        found |= {f"normrewrite/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    return found


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {module.rpartition("/")[0].replace("/", ".") for module in _modules()} == set(listed)


@pytest.mark.slow
def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    # Elsewhere than in build/, where files of an earlier state may lie.
    command += ["-C--global-option=build", f"-C--global-option=--build-base={tmp_path / 'build'}"]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {name for name in held if name.endswith(".py")} == _modules()
    beside = {path for path in (ROOT / "normrewrite").rglob("*") if path.suffix in (".css", ".jinja", ".pyi", ".typed")}
    sources = {f"normrewrite/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "plugins" / "cpp").iterdir()}
    assert {path.relative_to(ROOT).as_posix() for path in beside} | sources <= set(held)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cli", ["torch", "numpy", "rich"]),  # --help, and words for a wrong option, don't wait for torch
        ("commands.convert", ["rich", "onnx", "onnxruntime"]),  # the convert command must not pay for them
    ],
)
def test_imports_stay_light(module: str, heavy: list[str]) -> None:
    code = f"import sys, normrewrite.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_come_on_their_first_use() -> None:
    listed = re.findall(
        r"^from \.\S* import (\w+) as \1$", (ROOT / "normrewrite" / "__init__.pyi").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(nr.__all__) and not [name for name in listed if not hasattr(nr, name)]
    assert callable(nr.convert) and callable(nr.verify)  # and no modules of that name


def test_operators_are_registered_by_the_modules() -> None:
    """A program of torch.export's finds them again in a fresh process, as docs/kernels.md says."""
    code = (
        "import normrewrite.nn, torch; torch.ops.normrewrite.row_norm.default; torch.ops.normrewrite.batch_norm.default"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
