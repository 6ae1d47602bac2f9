"""IPluginV3 in Python, made from a spec: the same code for TensorRT 10 and 11 and for TensorRT-RTX.

>>> made = creator(tensorrt, OPS["NormRewriteMean"])       # an IPluginCreatorV3One, to be registered by registry.py
>>> made.made                                              # what it was asked for: {"/encoder/norm": {"eps": 1e-5, ...}}

fp32 and fp16, in TensorRT's linear format; channels-last (HWC, and HWC8 in fp16) too where a group is one channel, as in
instance and batch scope. Sizes may be open. enqueue runs the Triton kernels and so needs torch for CUDA where the engine runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from normrewrite.errors import NormRewriteError
from normrewrite.plugins import compute as memory
from normrewrite.plugins.spec import INPUTS, NAMESPACE, VERSION, Attribute, Given, Op

_NAMES = {"FLOAT": "float32", "HALF": "float16"}  # TensorRT's of the dtypes that a spec has
_MULTIPLES = {"LINEAR": 0, "HWC": 1, "HWC8": 8}  # of channels, see compute.strides
_CHANNELS_LAST = {"float32": "HWC", "float16": "HWC8"}


def creator(trt: Any, op: Op) -> Any:
    """What makes the operator's plugins from a node's attributes, and from those that an engine holds. trt: the module."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.field_names = trt.PluginFieldCollection(
                [_field(trt, attribute, attribute.default) for attribute in op.attributes]
            )
            self.made: dict[str, dict[str, Any]] = {}
            self.problems: list[str] = []  # TensorRT passes no message of ours on

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            try:
                given = op.parse({field.name: field.data for field in fields}, f"node {name or op.name}")
            except NormRewriteError as error:
                self.problems.append(str(error))
                return None
            self.made[name] = given
            return plugin(given, name)

    plugin = _plugin(trt, op, lambda problem: created.problems.append(problem))
    created = Creator()
    return created


def _plugin(trt: Any, op: Op, refuse: Any) -> Any:
    """The class of the operator's plugins."""
    bases = trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, given: Given, name: str) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.num_outputs = 1
            self.given, self.node, self.row = given, name, op.row(given)

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copied = Plugin(self.given, self.node)
            copied.__dict__.update(self.__dict__)
            return copied

        # --- while an engine is built ---

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], _shape_inputs: Any, _expressions: Any) -> list[Any]:
            shape = trt.DimsExprs(len(inputs[0]))
            for axis in range(len(inputs[0])):
                shape[axis] = inputs[0][axis]
            return [shape]

        def supports_format_combination(self, place: int, tensors: Sequence[Any], _inputs: int) -> bool:
            described = [tensor.desc for tensor in tensors]
            return supported(place, described[: place + 1])

        def configure_plugin(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            self._check([tensor.desc for tensor in inputs])

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([_field(trt, a, self.given[a.name]) for a in op.attributes])

        # --- while it runs ---

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def set_tactic(self, _tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            self._check(inputs)

        def enqueue(
            self, inputs: Sequence[Any], outputs: Sequence[Any], sources: Any, targets: Any, _workspace: int, stream: int
        ) -> None:
            with memory.on_stream(stream):
                x, weight, bias = (_tensor(*pair) for pair in zip(sources, inputs, strict=True))
                memory.compute(self.row, self.given, x, weight, bias, _tensor(targets[0], outputs[0]))

        def _check(self, inputs: Sequence[Any]) -> None:
            shapes, dtypes = [tuple(tensor.dims) for tensor in inputs], [_dtype(tensor) for tensor in inputs]
            problem = op.why_not(shapes, dtypes, self.given)
            if problem:
                refuse(f"node {self.node or op.name} {problem}.")
                raise NormRewriteError(f"node {self.node or op.name} {problem}.")

    return Plugin


def supported(place: int, described: Sequence[Any]) -> bool:
    """Whether the tensor at a place, the last that is described, may be as it is; those before it may."""
    x, tensor = described[0], described[place]
    if _dtype(tensor) != _dtype(x) or _dtype(x) not in _NAMES.values():
        return False
    layout = tensor.format.name
    if 0 < place < len(INPUTS):
        return bool(layout == "LINEAR")
    if place:
        return bool(layout == x.format.name)
    groups, each = (tuple(x.dims)[1:3]) if len(tuple(x.dims)) == 4 else (1, 0)
    return bool(layout == "LINEAR" or (each == 1 and groups > 1 and layout == _CHANNELS_LAST[_dtype(x)]))


def _dtype(tensor: Any) -> str:
    name: str = tensor.type.name
    return _NAMES.get(name, name.lower())


def _tensor(address: int, described: Any) -> Any:
    shape = tuple(described.dims)
    laid_out = memory.strides(shape, multiple=_MULTIPLES[described.format.name])
    return memory.tensor_at(address, shape, laid_out, _dtype(described))


def _field(trt: Any, attribute: Attribute, value: Any) -> Any:
    """An attribute as TensorRT holds it: 32 bits a number."""
    kind, dtype = ("INT32", np.int32) if attribute.kind == "int" else ("FLOAT32", np.float32)
    return trt.PluginField(attribute.name, np.asarray([value], dtype).reshape(-1), getattr(trt.PluginFieldType, kind))
