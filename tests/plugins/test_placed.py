"""Who takes a norm: TensorRT-RTX's real parser against the table, plugins' attributes as they came, and networks whole."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normrewrite as nr
from benchmarks.networks import convnext, transformer_encoder
from normrewrite.api.build import build
from normrewrite.backends import onnx as nodes
from normrewrite.backends.onnx_int8 import absorb
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, placed
from tests.backends import test_onnx_int8
from tests.backends.test_onnx import SPECS, node_model
from tests.conftest import RealNetwork
from tests.plugins.rtx import OPEN, built, needs_rtx, without
from tests.plugins.test_spec import given_of

SHAPE = (2, 4, 1, 256)


def node(name: str = "l1", dtype: Any = np.float32, **changed: Any) -> onnx.ModelProto:
    return node_model(name, SHAPE, dtype, 256, **changed)


def bare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without its bodies."""
    del proto.functions[:]
    return proto


TABLE: dict[str, tuple[Callable[[], onnx.ModelProto], str, str | None]] = {  # the node, with plugins, without
    "function alone": (lambda: without(node(), "plugin_namespace"), "function", "function"),
    "function and namespace": (node, "plugin", "function"),
    "no body": (lambda: bare(node()), "plugin", None),
}


@pytest.mark.parametrize("kind", TABLE)
def test_what_the_table_says(kind: str) -> None:
    make, with_plugins, alone = TABLE[kind]
    assert placed.expected(make(), set(OPS)) == {"norm": with_plugins}
    if alone is not None:
        assert placed.expected(make(), ()) == {"norm": alone}
    else:
        with pytest.raises(NormRewriteError, match=r"node norm: NormRewriteMean has no function body .*--plugins auto"):
            placed.expected(make(), ())


def joined(*protos: onnx.ModelProto) -> onnx.ModelProto:
    """One file of several, their nodes and inputs called 0:norm, 0:x and so on: one engine serves many tests."""
    parts = [onnx.compose.add_prefix(proto, f"{i}:", rename_functions=False) for i, proto in enumerate(protos)]
    whole = parts[0]
    for part in parts[1:]:
        for name in ("node", "input", "output", "initializer", "value_info"):
            getattr(whole.graph, name).extend(getattr(part.graph, name))
        present = {function.name for function in whole.functions}
        whole.functions.extend(function for function in part.functions if function.name not in present)
    return whole


@needs_rtx
@pytest.mark.parametrize("plugins", ["auto", "off"])
def test_what_the_parser_does(plugins: str, tmp_path: Path) -> None:
    """All kinds of the table in one file; the last has another operator, as a body serves all nodes of one."""
    kinds = list(TABLE)[: 3 if plugins == "auto" else 2]
    protos = [bare(node("range")) if kind == "no body" else TABLE[kind][0]() for kind in kinds]
    result = built(joined(*protos), tmp_path, plugins)
    assert result.norms == {f"{i}:norm": TABLE[kind][1 if plugins == "auto" else 2] for i, kind in enumerate(kinds)}
    by_plugin = {name for name, path in result.norms.items() if path == "plugin"}
    assert set(result.attributes) == by_plugin
    assert ("runs only where those plugins are registered" in str(result)) == bool(by_plugin)


@needs_rtx
def test_what_nobody_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NormRewriteError, match="no function body"):
        built(bare(node()), tmp_path, "off")
    assert not (tmp_path / "model.engine").exists()


@needs_rtx
def test_the_parser_itself_refuses_what_nobody_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is said beforehand."""
    monkeypatch.setattr(placed, "expected", lambda *_: {})
    with pytest.raises(NormRewriteError, match=r"can't build .*node norm: .*Plugin not found"):
        built(bare(node()), tmp_path, "off")


@needs_rtx
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16, K * S open"])
def test_attributes_arrive_as_they_were_given(half: bool, tmp_path: Path) -> None:
    """Of every metric, in one engine."""
    dtype, n, changed = np.float16 if half else np.float32, None if half else 256, {"eps": 3e-4, "centred": 0}
    protos = [node_model(name, SHAPE, dtype, n, **changed) for name in SPECS]
    opened = {end: [f"{i}:x:{sizes[0]}" for i in range(len(SPECS))] for end, sizes in OPEN.items()}
    result = built(joined(*protos), tmp_path, shapes=opened if half else {})
    assert result.norms == {f"{i}:norm": "plugin" for i in range(len(SPECS))}
    for i, proto in enumerate(protos):
        given, found = given_of(proto), result.attributes[f"{i}:norm"]
        assert set(found) == set(given)
        for key, value in given.items():
            assert found[key] == pytest.approx(value, rel=1e-6)
        assert found["eps"] != pytest.approx(1.01 * given["eps"], rel=1e-6)  # it can fail


@needs_rtx
@pytest.mark.parametrize("plugins", ["auto", "off"])
def test_int8_goes_in_and_out(plugins: str, tmp_path: Path) -> None:
    """A norm between Q/DQ that was put on int8; RTX lets a plugin have that, and parses the body where none is."""
    proto = test_onnx_int8.sandwich("l1", views=True)
    assert list(absorb(proto)) == ["norm"]
    result = built(proto, tmp_path, plugins)
    assert result.norms == {"norm": "plugin" if plugins == "auto" else "function"}


# --- bad input -------------------------------------------------------------------------------------------------------


def _weight_of(size: int) -> onnx.ModelProto:
    proto = node()
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_value = size
    return proto


def _fp16_weight() -> onnx.ModelProto:
    proto = node()
    proto.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return proto


@needs_rtx
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: _weight_of(5), "takes weight 4×1×1, got 5×1×1"),
        (_fp16_weight, "for all inputs alike, got float32, float16, float32"),
        (lambda: node("l2", power=2.5), "power 2.5: a plugin takes whole powers"),
    ],
)
def test_what_no_plugin_takes_is_told(make: Callable[[], onnx.ModelProto], said: str, tmp_path: Path) -> None:
    """Sizes, types, attributes: that their messages come through the parser. tests/plugins/test_spec.py has all of them."""
    with pytest.raises(NormRewriteError, match=f"node norm:? .*{said}|node norm.*{said}") as caught:
        built(make(), tmp_path)
    assert caught.value.exit_code == 2 and not (tmp_path / "model.engine").exists()


@needs_rtx
@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("nothing.so", "there is no such library of plugins. Give auto, off, or the path of one"),
        ("text.so", "is no shared library"),
        ("other.so", "TensorRT finds no plugins in it"),
    ],
)
def test_libraries_that_are_none(library: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not one at all")
    spec = importlib.util.find_spec("_ctypes")
    assert spec is not None and spec.origin is not None
    (tmp_path / "other.so").write_bytes(Path(spec.origin).read_bytes())
    with pytest.raises(NormRewriteError, match=f"{library}: {said}"):
        built(node(), tmp_path, str(tmp_path / library))


def test_a_norm_in_the_wrong_place_fails() -> None:
    with pytest.raises(
        NormRewriteError, match=r"node norm was to be a plugin, and is function\. .*--no-bodies"
    ) as caught:
        placed.check({"norm": "plugin"}, {"norm": "function"})
    assert caught.value.exit_code == 1
    with pytest.raises(NormRewriteError, match="and is nowhere"):
        placed.check({"norm": "plugin"}, {"other": "plugin"})


# --- networks --------------------------------------------------------------------------------------------------------


METRICS = ("l1", "topk:10")


def _both(models: list[nn.Module], x: torch.Tensor, folder: Path, **options: Any) -> int:
    """How many norms each has; all, in one file, are checked to be where the table says, by plugin and by function."""
    files = []
    for i, model in enumerate(models):
        nr.export(model, x, folder / f"{i}.onnx", deploy="op", **options)
        files.append(onnx.load(folder / f"{i}.onnx"))
    proto = joined(*files)
    onnx.save(proto, folder / "model.onnx")
    names = {n.name for n in proto.graph.node if n.domain == nodes.DOMAIN}
    assert len({n.op_type for n in proto.graph.node if n.domain == nodes.DOMAIN}) == len(models)
    for plugins, path in (("auto", "plugin"), ("off", "function")):
        result = build(folder / "model.onnx", folder / f"{path}.engine", gpus=["sm89"], plugins=plugins)
        assert result.norms == dict.fromkeys(names, path)
        assert set(result.attributes) == (names if path == "plugin" else set())
        assert all(name in str(result) for name in names)
    return len(names) // len(models)


@needs_rtx
@pytest.mark.slow
def test_a_transformer_encoder(tmp_path: Path) -> None:
    assert _both([transformer_encoder(spec) for spec in METRICS], torch.randn(2, 16, 64), tmp_path) == 5


@needs_rtx
@pytest.mark.slow
def test_a_convnext_like_net(tmp_path: Path) -> None:
    assert _both([convnext(spec) for spec in METRICS], torch.randn(2, 3, 32, 32), tmp_path, precision="fp16") == 5


@needs_rtx
@pytest.mark.slow
def test_a_trained_network_with_live_statistics(resnet20: RealNetwork, tmp_path: Path) -> None:
    twin, (x, _) = nr.convert(resnet20.make(), "l1"), resnet20.inputs(2)
    assert _both([twin], x, tmp_path, live_stats=True) == resnet20.sites
