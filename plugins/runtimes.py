"""The builders of engines: TensorRT-RTX, and TensorRT.

>>> RUNTIMES["rtx"].environment(folder)["LD_LIBRARY_PATH"]
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from normrewrite.errors import NormRewriteError


@dataclass(frozen=True)
class Runtime:
    """How a builder is found, and what it can do. `libs`: the package with its libraries; `link`: (present, looked for)."""

    name: str
    title: str
    module: str
    extra: str
    libs: str
    link: tuple[str, str] | None
    names_gpus: bool  # it builds for GPUs that aren't there

    def require(self) -> None:
        if find_spec(self.module) is None:
            raise NormRewriteError(
                f"{self.title} is not installed ({self.module}): pip install 'normrewrite[{self.extra}]', on Linux or "
                "Windows on x86-64."
            )

    def environment(self, folder: Path) -> dict[str, str]:
        """Where its parser finds the library under the name it looks for: a link in `folder`, nothing in site-packages."""
        spec = find_spec(self.libs) if self.link else None
        if self.link is None or spec is None or not spec.submodule_search_locations:
            return dict(os.environ)
        present, wanted = self.link
        library = Path(next(iter(spec.submodule_search_locations))) / present
        if library.is_file():
            (folder / wanted).symlink_to(library)
        paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)}


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "rtx",
            "TensorRT-RTX",
            "tensorrt_rtx_bindings",
            "rtx",
            "tensorrt_rtx_libs",
            ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so"),  # as the wheel 1.7 has it, as its parser opens it
            names_gpus=True,
        ),
        Runtime("tensorrt", "TensorRT", "tensorrt", "tensorrt", "tensorrt_libs", None, names_gpus=False),
    )
}
