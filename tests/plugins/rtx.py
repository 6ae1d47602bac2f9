"""What tests against the real parser of TensorRT-RTX share: the mark that skips them by name, and files of one norm."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

from normrewrite.api.build import Built, build

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: pip install normrewrite[rtx]"
)
OPEN = {"min": ["1,4,1,64"], "opt": ["2,4,1,256"], "max": ["4,4,1,1024"]}  # where K * S is open


def built(proto: onnx.ModelProto, folder: Path, plugins: str = "auto", **options: Any) -> Built:
    """For one GPU, from a file in the folder."""
    onnx.save(proto, folder / "model.onnx")
    return build(folder / "model.onnx", folder / "model.engine", gpus=["sm89"], plugins=plugins, **options)


def without(proto: onnx.ModelProto, attribute: str) -> onnx.ModelProto:
    """The file without an attribute of its node."""
    node = proto.graph.node[0]
    kept = [given for given in node.attribute if given.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    return proto
