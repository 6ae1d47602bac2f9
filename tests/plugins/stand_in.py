"""NVIDIA's own tensorrt/plugin/*.py on a CPU: TensorRT-RTX's classes, and small ones for those that only full TensorRT has.

python -m tests.plugins.stand_in SPEC:CAPABILITY ...     tells of each plugin what TensorRT would learn, as JSON
"""

import enum
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SHAPES = ((-1, 2, 3, 49), (2, 3, 1), (2, 3, 1))
OPT = ((8, 2, 3, 49), *SHAPES[1:])


class Size:
    """IDimensionExpr: a formula, as text, and its value where that is known."""

    def __init__(self, text: str, value: int | None = None) -> None:
        self.text, self.value = text, value

    def is_constant(self) -> bool:
        return self.value is not None

    def get_constant_value(self) -> int | None:
        return self.value


class Sizes:
    """IExprBuilder."""

    def constant(self, value: int) -> Size:
        return Size(str(value), value)

    def operation(self, kind: Any, a: Size, b: Size) -> Size:
        return Size(f"{kind.name}({a.text}, {b.text})")


class Described:
    """DynamicPluginTensorDesc."""

    def __init__(self, dims: Any, opt: Any, kind: Any, layout: Any) -> None:
        self.desc = SimpleNamespace(dims=dims, type=kind, format=layout, scale=1.0)
        self.opt = self.min = self.max = opt


class Exprs(list[Any]):
    def __init__(self, rank: int) -> None:
        super().__init__([None] * rank)


def module() -> tuple[ModuleType, Any]:
    """(tensorrt, tensorrt.plugin)"""
    rtx = importlib.import_module("tensorrt_rtx_bindings")
    trt = ModuleType("tensorrt")
    trt.__dict__.update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    bindings = find_spec("tensorrt_bindings")
    assert bindings is not None and bindings.origin is not None
    trt.__path__ = [str(Path(bindings.origin).parent)]
    vars(trt).update(
        QuickPluginCreationRequest=enum.Enum(
            "QuickPluginCreationRequest", "PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
        ),
        IDimensionExpr=Size,
        IExprBuilder=Sizes,
        DimsExprs=Exprs,
        DynamicPluginTensorDesc=Described,
        **{name: type(name, (), {}) for name in ("IPluginV3QuickAOTBuild", "ISymExpr")},
    )
    for name in ("PluginArgType", "PluginArgDataType"):
        vars(trt).setdefault(name, enum.Enum(name, "INT INT8 INT16 INT32"))
    sys.modules["tensorrt"] = trt
    return trt, importlib.import_module("tensorrt.plugin")


def told_of(trt: Any, quick: Any, spec: str, shapes: Any = SHAPES) -> dict[str, Any]:
    """What TensorRT asks a plugin while it builds, in its order."""
    from normrewrite.backends import onnx as nodes
    from normrewrite.norms import metric

    given = nodes.attributes(metric(spec), 147, eps=1e-5)
    fields = [
        trt.PluginField(name, np.array([value]).ravel().astype(np.int32 if type(value) is int else np.float32), kind)
        for name, value in given.items()
        if name not in nodes.PLUGIN
        for kind in [trt.PluginFieldType.INT32 if type(value) is int else trt.PluginFieldType.FLOAT32]
    ]
    name = nodes.operator(metric(spec))
    creator = trt.get_plugin_registry().get_creator(name, "1", nodes.DOMAIN)
    plugin = creator.create_plugin(
        name, nodes.DOMAIN, fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    )
    plugin._tactic = 0
    types = plugin.get_output_data_types([trt.DataType.HALF] * 3, [4, 3, 3])
    sizes = [Exprs(len(shape)) for shape in shapes]
    for expression, shape in zip(sizes, shapes, strict=True):
        expression[:] = [Size("batch" if n == -1 else str(n), None if n == -1 else n) for n in shape]
    (like,) = plugin.get_output_shapes(sizes, [], Sizes())
    linear, half = trt.TensorFormat.LINEAR, trt.DataType.HALF
    tensors = [
        Described(dims, opt, half, linear) for dims, opt in zip((*shapes, shapes[0]), (*OPT, OPT[0]), strict=True)
    ]
    launch, further = SimpleNamespace(), _Setter()
    plugin.get_launch_params(sizes, tensors, 3, launch, further, Sizes())
    kernel, ptx = plugin.get_kernel([tensor.desc for tensor in tensors[:3]], [tensors[3].desc])
    return {
        "types": [each.name for each in types],
        "shape": [size.text for size in like],
        "grid": launch.grid_x.expr.text,
        "block": launch.block_x.expr.value,
        "further": [each.expr.text for each in further.values()],
        "kernel": kernel,
        "ptx": ptx.decode(),
    }


class _Setter(dict[int, Any]):
    """The symbolic arguments behind the inputs."""

    nbSymExprs = 0


def main() -> None:
    from normrewrite.errors import NormRewriteError
    from normrewrite.plugins.quick import define

    capability, *specs = sys.argv[1:]
    trt, quick = module()
    define(quick, int(capability))
    found = {spec: told_of(trt, quick, spec) for spec in specs}
    try:
        told_of(trt, quick, "l1", ((-1, 2, 3, -1), *SHAPES[1:]))
    except NormRewriteError as error:
        found["open"] = {"refused": str(error)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
