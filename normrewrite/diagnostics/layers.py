"""Layer by layer: where two forms of a network part, by the names that torch gave its layers.

>>> print(compare_layers(model, "model.int8.onnx", batch))
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite.data import Batch, argument_names
from normrewrite.deploy import onnx_file
from normrewrite.diagnostics.comparison import OutputDifference
from normrewrite.errors import NormRewriteError
from normrewrite.execution import Network, Outputs, runner
from normrewrite.passes.folding import fold
from normrewrite.results import Result, Summary, Table


@dataclass
class Layers(Result):
    """The difference at every layer that both forms have, in order of execution."""

    layers: list[OutputDifference]

    def as_dict(self) -> dict[str, Any]:
        layers = [{"name": layer.name, "max_abs": layer.max_abs, "snr_db": layer.snr_db} for layer in self.layers]
        return {"layers": layers}

    def summary(self) -> Summary:
        lines = [(layer.name, f"{layer.max_abs:.2e}", f"{layer.snr_db:.1f}") for layer in self.layers]
        return [Table(("layer", "max difference", "SNR (dB)"), lines)]


def compare_layers(a: Network, b: Network, batch: Batch) -> Layers:
    """Outputs of the layers that two networks have in common: torch modules, whose norms are folded first as export
    folds them, or ONNX files that normrewrite (or torch) exported. B is the signal.

    Raises NormRewriteError where no layer has the same name in both.
    """
    left, right = _outputs(a, batch), _outputs(b, batch)
    common = [name for name in left if name in right and left[name].shape == right[name].shape]
    if not common:
        raise NormRewriteError(
            "no layer has the same name in both forms. Compare a torch model with ONNX files exported from it."
        )
    differences = []
    for name in common:
        differences.append(OutputDifference(name))
        differences[-1].add(left[name], right[name], None)
    return Layers(differences)


def _outputs(network: Network, batch: Batch) -> Outputs:
    return _of_module(network, batch) if isinstance(network, nn.Module) else _of_file(Path(network), batch)


def _of_module(model: nn.Module, batch: Batch) -> Outputs:
    folded, _, _ = fold(model, [values.cpu() for values in batch.positional(argument_names(model))])
    seen: Outputs = {}
    for name, module in folded.named_modules():
        if name and not module._modules:
            module.register_forward_hook(_keeper(name, seen))
    runner(folded)(Batch({name: values.cpu() for name, values in batch.inputs.items()}))
    return seen


def _keeper(name: str, seen: Outputs) -> Callable[[nn.Module, object, object], None]:
    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):  # the last call of a shared module, as in a file
            seen.pop(name, None)
            seen[name] = output.detach().clone()

    return keep


def _of_file(path: Path, batch: Batch) -> Outputs:
    """Every layer's last tensor marked as an output, and the marked file run."""
    import onnx

    proto = onnx_file.read(path)
    marked = {layer: tensor for layer, tensor in _last_tensors(proto).items() if tensor}
    present = {value.name for value in proto.graph.output}
    for tensor in set(marked.values()) - present:
        proto.graph.output.append(onnx.ValueInfoProto(name=tensor))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "marked.onnx"
        file.write_bytes(proto.SerializeToString())
        outputs = runner(file)(batch)
    floating = {layer: outputs[tensor] for layer, tensor in marked.items()}
    return {layer: tensor for layer, tensor in floating.items() if tensor.dtype.is_floating_point}


def _last_tensors(proto: Any) -> dict[str, str]:
    """By module name, the last tensor that its code computed."""
    last: dict[str, str] = {}
    for node in proto.graph.node:
        scopes = onnx_file.scopes(node)
        if scopes and scopes[-1]:
            last.pop(scopes[-1], None)
            last[scopes[-1]] = node.output[0]
    return last
