"""IPluginV3 in Python, made from a spec: the same code for TensorRT 10 and 11 and for TensorRT-RTX.

>>> made = creator(tensorrt, OPS["NormRewriteMean"])       # an IPluginCreatorV3One, to be registered by registry.py
>>> made.made                                              # what it was asked for: {"/encoder/norm": {"eps": 1e-5, ...}}

fp32, fp16 and int8, in TensorRT's linear format; of the first two channels-last (HWC, and HWC8 in fp16) too where a group is
one channel, as in instance and batch scope. Sizes may be open. enqueue runs the Triton kernels: it needs torch for CUDA there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric
from normrewrite.plugins import compute as memory
from normrewrite.plugins.spec import DTYPES, INPUTS, INT8, NAMESPACE, RANKS, VERSION, Attribute, Op, Values

_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8"}
_MULTIPLES = {"LINEAR": 0, "HWC": 1, "HWC8": 8}  # of channels, see compute.strides
_CHANNELS_LAST = {"float32": "HWC", "float16": "HWC8"}


def creator(trt: Any, op: Op) -> Any:
    """What makes the operator's plugins from a node's attributes, and from those that an engine holds. trt: the module."""
    problems: list[str] = []  # TensorRT passes no message of ours on
    plugin = _plugin(trt, op, problems)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            fields = [_field(trt, attribute, attribute.default) for attribute in op.attributes]
            self.field_names = trt.PluginFieldCollection(fields)
            self.made: dict[str, dict[str, Any]] = {}
            self.problems = problems

        def create_plugin(self, name: str, fields: Any, _phase: Any) -> Any:
            try:
                values = op.parse({field.name: field.data for field in fields}, f"node {name or op.name}")
            except NormRewriteError as error:
                problems.append(str(error))
                return None
            self.made[name] = values
            return plugin(values, name)

    return Creator()


def _plugin(trt: Any, op: Op, problems: list[str]) -> Any:
    """The class of the operator's plugins. problems: where what one has against its inputs is noted."""
    bases = trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime

    class Plugin(_Methods, *bases):  # type: ignore[misc]
        def __init__(self, values: Values, name: str) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.num_outputs = 1
            self.trt, self.op, self.problems = trt, op, problems
            self.values, self.node, self.row = values, name, op.row(values)

    return Plugin


class _Methods:
    """What TensorRT asks of a plugin."""

    trt: Any
    op: Op
    values: Values
    node: str
    row: Metric
    problems: list[str]

    def get_capability_interface(self, _kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        kind: Any = type(self)
        copied = kind(self.values, self.node)
        copied.__dict__.update(self.__dict__)
        return copied

    # --- while an engine is built ---

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        self._refuse(self.op.why_not_dtypes([_dtype(each) for each in types]))
        return [types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], _shape_inputs: Any, _expressions: Any) -> list[Any]:
        shape = self.trt.DimsExprs(len(inputs[0]))
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
        return self.trt.PluginFieldCollection([_field(self.trt, a, self.values[a.name]) for a in self.op.attributes])

    # --- while it runs ---

    def attach_to_context(self, _context: Any) -> Any:
        return self.clone()

    def set_tactic(self, _tactic: int) -> None:
        pass

    def on_shape_change(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
        self._check(inputs)

    def enqueue(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        sources: Any,
        targets: Any,
        _workspace: int,
        stream: int,
    ) -> None:
        with memory.on_stream(stream):
            x, weight, bias = (_tensor(*pair) for pair in zip(sources, inputs, strict=True))
            memory.compute(self.row, self.values, x, weight, bias, _tensor(targets[0], outputs[0]))

    def _check(self, inputs: Sequence[Any]) -> None:
        dtypes = [_dtype(tensor.type) for tensor in inputs]
        self._refuse(self.op.why_not([tuple(tensor.dims) for tensor in inputs], dtypes, self.values))

    def _refuse(self, problem: str | None) -> None:
        if problem:
            self.problems.append(f"node {self.node or self.op.name} {problem}.")
            raise NormRewriteError(self.problems[-1])


def supported(place: int, described: Sequence[Any]) -> bool:
    """Whether the tensor at a place, the last that is described, may be as it is; those before it may."""
    x, tensor = described[0], described[place]
    dtype = _dtype(x.type)
    parameters = INT8[1] if dtype == INT8[0] else dtype
    if dtype not in (*DTYPES, INT8[0]) or _dtype(tensor.type) != (parameters if 0 < place < len(INPUTS) else dtype):
        return False
    if place:
        return bool(tensor.format.name == ("LINEAR" if place < len(INPUTS) else x.format.name))
    return x.format.name == "LINEAR" or (_one_channel_each(x) and x.format.name == _CHANNELS_LAST.get(dtype))


def _one_channel_each(x: Any) -> bool:
    """Whether groups are channels, so that TensorRT's channels-last is that of the kernels."""
    shape = tuple(x.dims)
    return len(shape) == RANKS[0] and shape[2] == 1 and shape[1] > 1


def _dtype(kind: Any) -> str:
    """torch's and numpy's name of TensorRT's dtype."""
    return _NAMES.get(str(kind.name), str(kind.name).lower())


def _tensor(address: int, described: Any) -> Any:
    shape = tuple(described.dims)
    laid_out = memory.strides(shape, multiple=_MULTIPLES[described.format.name])
    return memory.tensor_at(address, shape, laid_out, _dtype(described.type))


def _field(trt: Any, attribute: Attribute, value: Any) -> Any:
    """An attribute as TensorRT holds it: 32 bits a number."""
    kind, dtype = ("INT32", np.int32) if attribute.kind == "int" else ("FLOAT32", np.float32)
    return trt.PluginField(attribute.name, np.asarray([value], dtype).reshape(-1), getattr(trt.PluginFieldType, kind))
