"""OffsetNorm: an affine in front of a norm, one node wherever a norm is one, in every form and file."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import normrewrite as nr
from normrewrite.nn.offset import OffsetNorm
from normrewrite.passes.reversion import reverted
from normrewrite.provenance import manifest
from tests.conftest import randomise

SHAPES = [(4, 12), (4, 12, 5), (2, 12, 4, 3), (2, 12, 2, 3, 2)]


def made(norm: nn.Module | None = None) -> OffsetNorm:
    torch.manual_seed(0)
    return OffsetNorm(nn.GroupNorm(3, 12) if norm is None else norm, torch.rand(12) + 0.5, torch.randn(12), {})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...]) -> None:
    norm, x = made().double(), torch.randn(shape).double().requires_grad_()
    by_channel = (1, 12, *(1,) * (len(shape) - 2))
    wanted = norm.norm(norm.scale.view(by_channel) * x + norm.offset.view(by_channel))
    torch.testing.assert_close(norm(x), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(norm, (x,))
    values = {name: getattr(norm, name).detach() for name in ("scale", "offset")}
    for name, value in values.items():
        leaf = value.clone().requires_grad_()
        others = {key: leaf if key == name else each for key, each in values.items()}
        assert torch.autograd.gradcheck(lambda _, o=others: torch.func.functional_call(norm, o, (x.detach(),)), (leaf,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    norm, x = made(), torch.randn(2, 12, 5, 5)
    y = copy.deepcopy(norm).to(dtype)(x.to(dtype))
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), norm(x), rtol=0, atol=5e-2)
    with torch.autocast("cpu", dtype):
        assert torch.isfinite(norm(x.to(dtype))).all()


def network() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
    return randomise(nn.Sequential(*layers)).eval()


@pytest.mark.parametrize("to", ["group:2", "rms"])
def test_it_is_traced_as_one_node_compiled_and_exported_by_torch(to: str) -> None:
    twin, x = nr.convert(network(), to), torch.randn(2, 3, 8, 8)
    traced = fx.symbolic_trace(twin)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    assert torch.equal(traced(x), twin(x))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(twin), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(twin, (x,)).module()(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["layer", "group:4", "rms"])
@pytest.mark.parametrize("form", ["twin.pt", "twin.safetensors", "module"])
def test_it_goes_through_files_and_back_to_the_bit(to: str, form: str, tmp_path: Path) -> None:
    model = network()
    twin, x = nr.convert(model, to, offset=5), torch.randn(2, 3, 8, 8)
    if form == "module":
        torch.save(twin, tmp_path / "twin.pt")
        again = torch.load(tmp_path / "twin.pt", weights_only=False)
    else:
        nr.save(twin, tmp_path / form)
        again = nr.load(tmp_path / form, arch=network)
    assert repr(again) == repr(twin) and torch.equal(again(x), twin(x))
    assert manifest.describe(again)["sites"] == manifest.describe(twin)["sites"]
    back = nr.revert(again)
    assert repr(back) == repr(model) and torch.equal(back(x), model(x))
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["1.scale", "1.offset", "1.norm.weight", "1.norm.bias"])
def test_training_any_of_it_is_noticed(name: str) -> None:
    twin = nr.convert(network(), "layer")
    with torch.no_grad():
        twin.get_parameter(name).add_(0.01)
    back, _, trained = reverted(twin)
    assert trained == ["1"] and isinstance(back[1], OffsetNorm) and type(back[3]) is nn.BatchNorm2d  # type: ignore[index]


# --- manifests ---------------------------------------------------------------------------------------------------------


def entries(twin: nn.Module) -> list[Any]:
    return [entry.get("offset") for entry in manifest.describe(twin)["sites"]]


@pytest.mark.parametrize(("size", "told"), [("auto", "auto"), ("free", "free"), (0, 0.0), (3, 3.0), ("3", 3.0)])
def test_a_manifest_tells_what_was_asked(size: Any, told: Any) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    twin = nr.convert(model, "group", offset=size)
    record = manifest.describe(twin)
    assert entries(twin) == [told, told] and manifest.check(record, "here")
    again = manifest.replay(model, record, "here")
    assert torch.equal(again(x), twin(x)) and entries(again) == [told, told]


def test_manifests_of_0_1_0_are_plain_norms_of_their_groups() -> None:
    """`group` was gcd(32, channels) then."""
    sites = [{"names": [name], "was": "BatchNorm2d", "to": "group", "gain": "exact"} for name in ("1", "3")]
    record = {"normrewrite": "0.1.0", "format": 1, "torch": "2.13.0", "sites": sites}
    again: Any = manifest.replay(network(), manifest.check(record, "here"), "here")
    assert type(again[1]) is nn.GroupNorm and again[1].num_groups == 16 and again[1].eps == 1e-5
    assert entries(again) == [None, None] and "offset" not in manifest.describe(again)["sites"][0]


@pytest.mark.parametrize("to", ["group:2", "l1"])
@pytest.mark.parametrize("bad", ["much", -1, [5], {"a": 1}, "nan"])
def test_a_manifest_with_a_bad_offset_is_refused(to: str, bad: Any) -> None:
    site = {"names": ["1"], "was": "BatchNorm2d", "to": to, "gain": "exact", "offset": bad}
    with pytest.raises(nr.NormRewriteError, match=r"here: site '1' of its manifest: --offset .* is no size"):
        manifest.check({"normrewrite": "0.2.0", "format": 1, "sites": [site]}, "here")


# --- deployment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "deploy", "precision"),
    [
        *(("group:2", "fold", precision) for precision in ("fp32", "fp16", "int8")),
        ("rms", "fold", "fp32"),
        ("rms", "op", "fp16"),
        ("rms", "op", "int8"),
    ],
)
def test_onnx(to: str, deploy: Any, precision: Any, tmp_path: Path) -> None:
    import onnx

    twin, x = nr.convert(network(), to), torch.randn(4, 3, 8, 8)
    path = tmp_path / "twin.onnx"
    extra: Any = {"calibrate": x} if precision == "int8" else {}
    written = nr.export(twin, x, path, precision=precision, deploy=deploy, **extra)
    assert "1 folded into the layer in front, 1 stay as a Mul and an Add" in str(written)
    limit = {"fp32": 1e-5, "fp16": 3e-2, "int8": 1e-1}[precision]
    assert nr.verify(path, twin, x, tolerance=limit).ok
    assert not nr.verify(path, nr.convert(network(), to, offset=1), x, tolerance=limit).ok  # it can fail
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("NormRewritePower") == (2 if deploy == "op" else 0)
