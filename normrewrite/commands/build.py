"""The command `build`."""

from collections.abc import Callable

from normrewrite.api.build import Built
from normrewrite.api.build import build as build_engine
from normrewrite.options.build import Build, BuildOptions
from normrewrite.options.fields import part


def build(options: Build, progress: Callable[..., object]) -> Built:
    """Build an engine from an ONNX file."""
    gpus = [name.strip() for name in options.gpu.split(",") if name.strip()]
    shapes = {"min": options.low, "opt": options.middle, "max": options.high}
    return build_engine(
        options.model, options.output, gpus=gpus, shapes=shapes, progress=progress, **part(options, BuildOptions)
    )
