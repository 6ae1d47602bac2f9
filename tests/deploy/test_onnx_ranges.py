"""What an int8 training computed is what the exported file computes, in onnxruntime; and which tensor has which range."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import LearnedRanges, NormRewriteError
from normrewrite.deploy.onnx_ranges import tensors
from normrewrite.sites.modes import freeze_statistics
from normrewrite.training.products import by_channel, nearest, scale_of
from tests.api.test_export import images, residual
from tests.conftest import ROOT, digits_network
from tests.forms import Chain, PreActivation

SAME = (
    1e-4  # of logits of order one: float rounding; where that moves a number by a step of 8 bits, some are further off
)


def digits() -> tuple[nn.Module, Tensor]:
    """A trained network and its images."""
    return digits_network(), torch.from_numpy(np.load(ROOT / "examples" / "digits.npz")["images"])


@torch.no_grad()
def watched(model: nn.Module, x: Tensor, **options: Any) -> tuple[LearnedRanges, Tensor]:
    """Ranges that x shows, and what the network gives on 8 bits of them."""
    with nr.int8(model, **options) as quantised:
        model.train()
        freeze_statistics(model)
        for batch in x.split(64):
            model(batch)
        return quantised.ranges, model.eval()(x)


def run(path: Path, x: Tensor, level: str = "ORT_DISABLE_ALL") -> Tensor:
    """The file as it is written, unless its own optimiser may change it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def share(a: Tensor, b: Tensor) -> float:
    """How many outputs are the same, up to float rounding."""
    return float(((a - b).abs() <= SAME * max(1.0, float(b.abs().max()))).double().mean())


def quantised_inputs(path: Path) -> dict[str, int]:
    """By node, how many of its first two inputs come from 8 bits."""
    proto = onnx.load(path)
    made_by = {node.output[0]: node.op_type for node in proto.graph.node}
    return {
        node.name: [made_by.get(name) for name in node.input[:2]].count("DequantizeLinear")
        for node in proto.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
    }


def constants_of(proto: Any) -> dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def steps(path: Path) -> set[float]:
    """Of all activations."""
    proto = onnx.load(path)
    found = constants_of(proto)
    return {float(found[node.input[1]]) for node in proto.graph.node if node.op_type == "QuantizeLinear"}


def steps_of(learned: LearnedRanges) -> set[float]:
    return {float(scale_of(torch.tensor(value))) for value in learned.amax.values()}


# --- the same function ------------------------------------------------------------------------------------------------


def test_a_trained_network_computes_what_training_saw(tmp_path: Path) -> None:
    model, x = digits()
    twin, path = nr.convert(model), tmp_path / "model.onnx"
    learned, expected = watched(twin, x)
    written = nr.export(twin, x[:2], path, precision="int8", learned=learned)
    assert not written.notes and set(quantised_inputs(path).values()) == {2} and steps(path) == steps_of(learned)
    found = run(path, x)
    assert share(found, expected) > 0.99 and (found - expected).abs().max() < 0.1
    with torch.no_grad():
        off = (expected - twin(x)).abs()
    assert off.mean() > 0.01 and (off <= SAME).double().mean() < 0.05  # 8 bits are told from fp32
    # onnxruntime's optimiser rounds biases too, to 32 bits, and tips a few numbers: a part of what 8 bits cost
    assert (run(path, x, "ORT_ENABLE_ALL") - expected).abs().mean() < off.mean() / 2
    _check_weights(twin, onnx.load(path))
    assert share(run(_scaled(path), x), expected) < 0.2


def _check_weights(twin: nn.Module, proto: Any) -> None:
    """The file's are the very ones of training; a norm with a negative weight turns its channel round."""
    constants = constants_of(proto)
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        mine = nearest(weight, scale_of(by_channel(weight, None))).values.flatten(1).int().numpy()
        theirs = constants[f"{name}.weight_quantized"].reshape(mine.shape).astype(int)
        off = np.abs(theirs - np.sign((theirs * mine).sum(1, keepdims=True)) * mine)
        assert off.max() <= 1 and (off > 0).mean() < 1e-3, name


def _scaled(path: Path) -> Path:
    """The same file with all ranges of activations 1 % wider."""
    proto = onnx.load(path)
    names = {node.input[1] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, path.with_suffix(".scaled.onnx"))
    return path.with_suffix(".scaled.onnx")


class Shared(nn.Module):
    """A block that is called twice, under a second name too; a norm that only the layer behind could take."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block = nn.BatchNorm2d(3), Chain()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.head = self.conv, nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(self.norm(images))
        x = x + self.again(x)
        logits: Tensor = self.head(self.block(x) + self.block(2 * x))
        return logits


MODELS = {"kinds of layers": (Chain, False), "norms of their own": (PreActivation, True), "shared": (Shared, False)}


@pytest.mark.parametrize("case", MODELS)
def test_networks_of_all_forms(case: str, tmp_path: Path) -> None:
    make, as_graph = MODELS[case]
    model: nn.Module = nr.convert(make().eval())
    x, path = torch.randn(12, *getattr(make, "shape", (0, 3, 6, 6))[1:]), tmp_path / "model.onnx"
    model = torch.fx.symbolic_trace(model) if as_graph else model
    learned, expected = watched(model, x)
    written = nr.export(model, x, path, precision="int8", learned=learned)
    assert set(quantised_inputs(path).values()) <= {0, 2}  # an affine's own Mul and Add are no residual
    if case == "norms of their own":
        assert not written.notes and share(run(path, x), expected) > 0.95
    else:
        note = "groups of a transposed convolution" if case == "kinds of layers" else "several readers with ranges"
        assert any(note in found for found in written.notes)


def test_a_network_that_torch_fx_cannot_trace(tmp_path: Path) -> None:
    class Checks(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if len(x.shape) == int(x.dim()) and x.shape[1] == 3 else -x)

    model, x, path = nr.convert(Checks().eval()), torch.randn(Chain.shape), tmp_path / "model.onnx"
    learned, expected = watched(model, x, keep=["up"])
    nr.export(model, x, path, precision="int8", learned=learned)
    assert list(quantised_inputs(path).values()).count(2) == 5
    assert share(run(path, x), expected) > 0.95


# --- what has no range ------------------------------------------------------------------------------------------------


def test_data_supply_what_was_not_learned_but_not_what_was_kept(tmp_path: Path) -> None:
    model, x, path = nr.convert(residual()), images(16), tmp_path / "model.onnx"
    learned, _ = watched(model, x, keep=["conv2"])
    some = LearnedRanges({name: value for name, value in learned.amax.items() if "+" not in name}, learned.kept)
    written = nr.export(model, x, path, precision="int8", learned=some)
    assert sorted(quantised_inputs(path).values()) == [0, 0, 2, 2] and steps(path) == steps_of(some)
    assert "1 of 3 products and adds have no learned range, and are computed in fp32: node_add" in written.notes[0]
    written = nr.export(model, x, path, precision="int8", learned=some, calibrate=x, force=True)
    assert sorted(quantised_inputs(path).values()) == [0, 2, 2, 2] and "are calibrated" in written.notes[0]
    assert steps(path) > steps_of(some)


def test_another_number_of_adds_than_in_training_is_not_taken(tmp_path: Path) -> None:
    model, x, path = nr.convert(residual()), images(4), tmp_path / "model.onnx"
    nr.export(model, x, path)
    proto = onnx.load(path)
    ranges = LearnedRanges({"conv1": 1.0, "conv2": 2.0, "fc": 3.0, "+left": 2.0, "+right": 5.0})
    found, notes = tensors(proto, ranges, model)
    assert found["images"] == 1.0 and sorted(found.values()) == [1.0, 2.0, 3.0, 5.0] and not notes
    more = LearnedRanges(ranges.amax | {"#2+left": 7.0, "#2+right": 8.0, "conv1#2": 9.0})
    assert sorted(tensors(proto, more, model)[0].values()) == [2.0, 3.0]


def test_the_ranges_of_another_network_are_refused(tmp_path: Path) -> None:
    model, x = nr.convert(residual()), images(4)
    with pytest.raises(NormRewriteError, match=r"they know 'conv9', which Residual has not\. Did you mean 'conv\d'"):
        nr.export(model, x, tmp_path / "m.onnx", precision="int8", learned=LearnedRanges({"conv9": 1.0}))
    with pytest.raises(NormRewriteError, match=r"give --calibrate DATA, or a network that finetune --precision int8"):
        nr.export(model, x, tmp_path / "m.onnx", precision="int8")
    assert not list(tmp_path.iterdir())


def test_a_layer_behind_a_norm_alone_reads_the_same_in_both(tmp_path: Path) -> None:
    """Folding forwards would give the layer another input, whose range nobody learned."""
    model, x, path = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), images(32), tmp_path / "model.onnx"
    with torch.no_grad():
        model.train()(3 * x + 1)
    twin = nr.convert(model.eval())
    learned, expected = watched(twin, x)
    written = nr.export(twin, x, path, precision="int8", learned=learned)
    assert written.to_affine == ["0"] and share(run(path, x), expected) > 0.99
