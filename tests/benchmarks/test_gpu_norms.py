"""What of the GPU benchmark needs no GPU: correctness, shapes, bytes, report, figure, and the word that there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

import normrewrite as nr
from benchmarks import gpu_norms, gpu_traffic, right
from benchmarks.gpu_norms import SPECS, case, goals, lines, plot, summary
from benchmarks.gpu_traffic import NATIVE, RESNET50, Norms, batch_launches, moved, passes, row_launches, table
from benchmarks.networks import resnet50
from normrewrite.backends.dispatch import kernels
from normrewrite.backends.triton import launch
from normrewrite.nn.rectify import norm_relu
from tests.backends.triton import interpreter
from tests.conftest import ROOT

BIG = Norms(256, 56, "relu", 1)


def test_the_shapes_are_a_resnet50s() -> None:
    model = nr.convert(resnet50(), "l1")
    graph_module = nr.passes.FuseActivation()(torch.fx.symbolic_trace(model)).graph_module
    from torch.fx.passes.shape_prop import ShapeProp

    ShapeProp(graph_module.to("meta")).propagate(torch.empty(2, 3, 224, 224, device="meta"))
    found: dict[tuple[int, int, str], int] = {}
    for node in graph_module.graph.nodes:
        fused = node.target is norm_relu
        if fused or (node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), nr.nn.BatchNorm)):
            _, channels, side, _ = node.meta["tensor_meta"].shape
            form = "plain" if not fused else "relu" if len(node.args) == 2 else "add"
            found[channels, side, form] = found.get((channels, side, form), 0) + 1
    assert found == {(norms.channels, norms.side, norms.form): norms.count for norms in RESNET50}
    assert sum(norms.count for norms in RESNET50) == 53


def test_bytes_by_hand() -> None:
    """l1: x three times and y; g and x, g and dx; two bits an element written and read. The sums of parts are the rest."""
    assert 8.25 <= passes("l1", "relu") <= 8.25 * 1.03
    assert 8.125 <= passes("l1", "plain") <= 8.125 * 1.03
    assert 7.125 <= passes("linf", "relu") <= 7.125 * 1.03
    assert 10.25 <= passes("l1", "add") <= 10.25 * 1.03
    assert passes("topk:10", "relu") <= 7.125 * 1.08


def test_bytes_reach_the_floors_that_the_goals_assume() -> None:
    for (spec, form), floor in gpu_traffic.FLOORS.items():
        assert NATIVE[form] / passes(spec, form) >= floor * 0.985
    for (spec, form, against), goal in gpu_norms.GOALS.items():
        if against == "native":
            assert NATIVE[form] / passes(spec, form) > goal * 1.05


def test_a_layer_norm_reads_each_tensor_once() -> None:
    size = 2 * 65536 * 1024
    assert 5 <= moved(row_launches("l1", 65536, 1024)) / size < 5.2


def test_the_page_has_the_table() -> None:
    assert table() in gpu_traffic.PAGE.read_text()


def _times(factor: float = 1.0) -> dict[str, float]:
    return {"native": 2.0, "compiled": 1.5, **{spec: factor * (1.0 + i / 10) for i, spec in enumerate(SPECS)}}


def _result(*cases: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {"batch norm": list(cases), "layer norm": [], "step": {}, "left out": []} | more
    return found | {"goals": goals(found)}


def test_report_and_goals() -> None:
    cases = [case(BIG, 256, _times(), 4e12), case(BIG._replace(form="add"), 256, _times(), 4e12)]
    small = case(Norms(64, 7, "relu", 1), 64, _times(9), 4e12)
    found = _result(*cases, small)["goals"]  # a small tensor is not bound by memory
    assert found["l1 relu against native"] == {"wanted": 1.35, "found": 2.0, "reached": True}
    assert found["linf relu against compiled"]["found"] == pytest.approx(1.5 / 1.1)
    assert not _result(case(BIG, 256, _times(2), 4e12))["goals"]["l1 relu against native"]["reached"]
    size = 2 * 256 * 256 * 56 * 56
    assert cases[0]["floor ms"]["native"] == pytest.approx(13 * size / 4e12 * 1e3)
    share = cases[0]["share of copy"]["l1"]
    assert share == pytest.approx(moved(batch_launches("l1", (256, 256, 56, 56), "relu")) / 4e12 * 1e3 / 1.0)
    table_ = lines([*cases, case(BIG, 64, {"native": 1.0, "l1": 0.5}, 4e12)])
    assert f"| 256×256×56×56 | relu | 2.000 | 1.33 | 2.00 ({share:.0%}) |" in table_
    assert "| 64×256×56×56 | relu | 1.000 | – | 2.00 (" in table_ and json.dumps(cases)


def test_layer_norms_and_the_step_are_judged_and_what_is_missing_is_named() -> None:
    layers = [{"shape": (64, 8), "ms": {"native": 3.0, "compiled": 2.0, "l1": 2.5}, "floor ms": {"l1": 1.0}}]
    shown = summary(
        _result(**{"layer norm": layers, "step": {"native": 100.0, "l1": 90.0}, "left out": ["x at batch 64"]})
    )
    for line in (
        "reached      layer norm, l1 against native: 1.20, wanted 1.0",
        "missed       layer norm, l1 against compiled: 0.80, wanted 1.0",
        "reached      ResNet-50 step, l1 against native: 1.11, wanted 1.05",
        "not measured ResNet-50 step, l1 compiled against native compiled: wanted 1.0",
        "not measured l1 relu against native: wanted 1.35",
        "left out     x at batch 64",
        "layer norm (64, 8): native 3.000 ms, compiled 2.000 ms, l1 2.500 ms; floor of l1 1.000",
    ):
        assert line in shown.splitlines()


def test_every_part_is_measured_or_named_and_written_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(*_: Any, **__: Any) -> dict[str, float]:
        now[0] += 20
        return _times()

    for name, value in {
        "correctness": dict,
        "copy_bandwidth": lambda: 4e12,
        "batch_norm": slow,
        "layer_norm": slow,
    }.items():
        monkeypatch.setattr(gpu_norms, name, value)
    monkeypatch.setattr(gpu_norms, "resnet_step", slow)
    monkeypatch.setattr(gpu_norms.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    *_, last = written = [json.loads(json.dumps(result)) for result in gpu_norms.measure(8)]
    assert len(written[0]["batch norm"]) == 1 and now[0] <= 480
    shapes = [norms for norms in RESNET50 if norms.form != "plain"]
    assert len(last["batch norm"]) + len(last["layer norm"]) + bool(last["step"]) + len(last["left out"]) == len(
        written
    )
    assert len(written) == 2 * len(shapes) + 4 and last["step"] and last["left out"]


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install normrewrite[figures]")
    path = plot(
        {"batch norm": [case(BIG, 256, _times(), 4e12), case(BIG, 64, {"native": 1.0}, 4e12)]}, tmp_path / "a.svg"
    )
    assert "<svg" in path.read_text()


@pytest.mark.parametrize("spec", ["l1", "range"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")  # masked lanes
def test_what_is_run_first_on_a_gpu_is_right_here(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with float64, by the interpreter; and that it can fail."""
    interpreter.mend()
    monkeypatch.setattr(right, "DEVICE", "cpu")

    def worst() -> list[float]:
        with kernels("triton"):
            forms = (right.errors(spec, torch.float32, (2, 8, 3, 5), True, form) for form in gpu_traffic.FORMS)
            return [max(each.values()) for each in (*forms, right.row_errors(spec, torch.float32, 40))]

    allowed, run = right.ALLOWED[torch.float32], launch.run
    assert max(worst()) <= allowed

    def off(kernel: Any, programs: int, warps: int, told: dict[str, Any], *more: Any) -> None:
        run(kernel, programs, warps, told | ({"gain": 1.01 * told["gain"]} if "gain" in told else {}), *more)

    monkeypatch.setattr(launch, "run", off)
    assert min(worst()) > allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_norms"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no GPU here" in done.stderr
