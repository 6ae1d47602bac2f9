"""ONNX files in every form and precision: what they hold, that they compute the same, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.deploy import onnx_file
from tests.conftest import RealNetwork, randomise, real_images

FP16 = 2e-3  # of max(1, largest output): a few layers, each rounded to 11 bits


class Residual(nn.Module):
    """A convolution, a norm, a residual add and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv1(images)).relu()
        return self.fc((x + self.conv2(x)).relu().mean((2, 3)))


class Live(nn.Module):
    """Every scope that measures at inference, and one that does so on request."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3, padding=1), nr.nn.BatchNorm2d(8, metric="l1")
        self.group, self.instance = nr.nn.GroupNorm(2, 8, metric="topk:10"), nr.nn.InstanceNorm2d(8, metric="linf")
        self.layer, self.rms = nr.nn.LayerNorm(8, metric="range"), nr.nn.RMSNorm(8, metric="l1")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.group(self.batch(self.conv(images))))
        return self.rms(self.layer(x.flatten(2).transpose(1, 2)).relu())


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8)


def residual() -> nn.Module:
    return randomise(Residual()).eval()


def live() -> nn.Module:
    return Live().eval()


def domains(path: Path) -> set[str]:
    return {entry.domain for entry in onnx.load(path).opset_import}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def types(path: Path) -> list[int]:
    graph = onnx.load(path).graph
    return [value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]]


def test_a_folded_file_has_standard_operators_alone(tmp_path: Path) -> None:
    model, path, x = live(), tmp_path / "model.onnx", images()
    written = nr.export(model, x, path)
    assert domains(path) == {""} and not onnx.load(path).functions
    assert written.live == ["group", "instance", "layer", "rms"] and written.into_neighbour == ["batch"]
    assert nr.verify(path, model, images(5), tolerance=1e-5).ok


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_one_node_a_norm(tmp_path: Path, kind: Any) -> None:
    model, path, x = live(), tmp_path / "model.onnx", images()
    nr.export(model, x, path, deploy="op", precision=kind)
    nodes = [op for op in operators(path) if op.startswith("NormRewrite")]
    assert sorted(nodes) == ["NormRewriteMean", "NormRewriteSpan", "NormRewriteTop", "NormRewriteTop"]
    assert nr.verify(path, model, images(5), tolerance=1e-5 if kind == "fp32" else FP16).ok
    assert not nr.verify(path, nn.Sequential(model, Scaled()), images(5), tolerance=FP16).ok  # it can fail


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * x


@pytest.mark.parametrize(("spec", "off"), [("l1", 1e-5), ("linf", 2e-3)])  # linf: C(n) is fitted where n is open
def test_live_statistics_of_batch_norms(tmp_path: Path, spec: str, off: float) -> None:
    model, path = nn.Sequential(nn.Conv2d(3, 8, 1), nr.nn.BatchNorm2d(8, metric=spec)), tmp_path / "model.onnx"
    x = 3 * images() + 1
    written = nr.export(model.eval(), x, path, live_stats=True)
    assert written.live == ["1"] and ("C(n) is a fitted formula" in str(written)) == (spec == "linf")
    expected = model.train()(x).detach()  # training measures the batch
    (found,) = onnx_outputs(path, x)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=off)
    compared = nr.verify(path, path, x)
    assert (compared.word, compared.tolerance) == (
        ("same function", 1e-4) if spec == "l1" else ("within a fitted C(n)'s tolerance", 2e-3)
    )


def onnx_outputs(path: Path, x: torch.Tensor) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})  # type: ignore[no-any-return]


def test_without_bodies(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    written = nr.export(live(), images(), path, deploy="op", bodies=False)
    assert not onnx.load(path).functions and "NormRewriteMean" in operators(path)
    assert "only a runtime with normrewrite's plugins" in str(written)


def test_open_sizes(tmp_path: Path) -> None:
    model, path = residual(), tmp_path / "model.onnx"
    nr.export(model, images(), path, dynamic_size=True)
    assert nr.verify(path, model, torch.randn(3, 3, 12, 20)).ok
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in shape] == [True, False, True, True]


class Graph(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, nodes: torch.Tensor, graphs: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        return torch.relu(self.norm(self.lin(nodes))).mean(0, keepdim=True) + graphs


def test_inputs_of_several_lengths_have_open_sizes_of_their_own(tmp_path: Path) -> None:
    model, path = Graph().eval(), tmp_path / "model.onnx"
    example = {"graphs": torch.randn(7, 6), "nodes": torch.randn(14, 4)}
    nr.export(nr.convert(model), example, path)
    names = [value.type.tensor_type.shape.dim[0].dim_param for value in onnx.load(path).graph.input]
    assert len(set(names)) == 2 and all(names)
    for nodes, graphs in ((14, 7), (3, 9), (5, 5)):
        assert nr.verify(model, path, {"nodes": torch.randn(nodes, 4), "graphs": torch.randn(graphs, 6)}).ok
    with pytest.raises(nr.NormRewriteError, match="the first of them without a gap"):
        nr.export(model, {"nodes": example["nodes"], "shift": example["graphs"]}, path, force=True)


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(tmp_path: Path, opset: int) -> None:
    model, path = live(), tmp_path / "model.onnx"
    nr.export(model, images(), path, opset=opset, deploy="op")
    proto = onnx.load(path)
    assert {f.opset_import[0].version for f in proto.functions} == {onnx_file.opset_of(proto)} == {opset}
    assert nr.verify(path, model, images(3), tolerance=1e-5).ok


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 17}, "--opset 17: the exporter gives 18 to 23"),
        ({"precision": "int8"}, "give --calibrate DATA"),
        ({"precision": "bf16"}, "bf16 only from opset 22"),
        ({"precision": "fp8"}, r"unknown precision 'fp8'\..* Known: fp32, fp16, bf16, int8"),
        ({"deploy": "plugin"}, "unknown deploy 'plugin'. Known: fold, op"),
        ({"precision": "int8", "ranges": "max"}, "unknown ranges 'max'. Did you mean 'minmax'"),
        ({"calibrate": torch.randn(4, 3, 8, 8)}, "--calibrate goes with --precision int8"),
        ({"live_stats": True}, "holds no batch norm of normrewrite's"),
        ({"bodies": False}, "--no-bodies goes with --deploy op"),
        ({"precision": "int8", "calibrate": torch.randn(4, 1, 8, 8)}, "can't calibrate the model"),
    ],
)
def test_bad_requests_write_nothing(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=said) as caught:
        nr.export(residual(), images(), tmp_path / "model.onnx", **options)
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_another_opset_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "opset_of", lambda proto: 18)
    with pytest.raises(nr.NormRewriteError, match="--opset 20: torch's exporter gave opset 18 instead"):
        nr.export(residual(), images(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 3000)
    with pytest.raises(nr.NormRewriteError, match=r"one ONNX file holds less than .*--precision fp16"):
        nr.export(residual(), images(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_norms_without_running_statistics(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(nr.NormRewriteError, match="ask for that by --live-stats"):
        nr.export(model, images(), tmp_path / "model.onnx")
    mixed = nn.Sequential(model, nr.nn.BatchNorm2d(4))
    with pytest.raises(nr.NormRewriteError, match="convert them first"):
        nr.export(mixed.eval(), images(), tmp_path / "model.onnx", live_stats=True)
    nr.export(nr.convert(model, "l1"), images(), tmp_path / "model.onnx", live_stats=True)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Live()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images if images.dim() == 4 else images[None])  # type: ignore[no-any-return]


class FixesItsBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.relu() if len(images) else images


def test_a_model_that_cannot_be_traced(tmp_path: Path) -> None:
    model, path = Untraceable().eval(), tmp_path / "model.onnx"
    written = nr.export(model, images(), path, deploy="op")
    assert len(written.live) == 4 and "NormRewriteMean" in operators(path)
    assert nr.verify(path, model, images(5), tolerance=1e-5).ok


def test_a_model_that_fixes_its_batch(tmp_path: Path) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"fixes its batch size .*--static-batch"):
        nr.export(FixesItsBatch(), images(), tmp_path / "model.onnx")
    nr.export(FixesItsBatch(), images(), tmp_path / "model.onnx", dynamic_batch=False)


@pytest.mark.slow
def test_a_trained_network_keeps_its_top1(resnet20: RealNetwork, tmp_path: Path) -> None:
    model, (x, labels) = resnet20.make(), resnet20.inputs(500)
    twin, path = nr.convert(model, "l1"), tmp_path / "model.onnx"
    for kind, lost in (("fp32", 0), ("fp16", 1), ("int8", 5)):  # of 500
        calibrate = real_images("train", 200)[0] if kind == "int8" else None
        nr.export(twin, x[:2], path, precision=kind, calibrate=calibrate, force=True)  # type: ignore[arg-type]
        compared = nr.verify(path, model, x, labels)
        assert compared.ok and compared.outputs[0].right[0] >= compared.outputs[0].right[1] - lost


def test_opsets_that_the_exporter_does_not_give_are_refused(small: Callable[[], nn.Module], tmp_path: Path) -> None:
    for opset in (-3, 7, 99):
        with pytest.raises(nr.NormRewriteError, match=f"--opset {opset}"):
            nr.export(small(), torch.randn(2, 3, 4, 4), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
