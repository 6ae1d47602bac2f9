"""Hooks run once, whatever a twin goes through: torch.fx traces, folds, other passes, ONNX files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import normrewrite as nr
from normrewrite.nn.parts import deepcopy
from normrewrite.passes import FoldAffine, FuseActivation, SwapMetric
from tests.conftest import randomise

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4))
        self.head, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.head(self.body(x))))


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "before": lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] * 2 + 1,)),
    "behind": lambda m: m.register_forward_hook(lambda m, a, y: y * 2 + 1),
    "before, with kwargs": lambda m: m.register_forward_pre_hook(
        lambda m, a, k: ((a[0] * 2 + 1,), k), with_kwargs=True
    ),
    "behind, with kwargs": lambda m: m.register_forward_hook(lambda m, a, k, y: y * 2 + 1, with_kwargs=True),
}


def hooked(where: str, hook: str) -> tuple[nn.Module, Tensor]:
    model = randomise(Net()).eval()
    HOOKS[hook](model.get_submodule(where))
    with torch.no_grad():
        return model, model(X)


def passed(rewrite: Any, model: nn.Module) -> GraphModule:
    found: GraphModule = rewrite(symbolic_trace(deepcopy(model))).graph_module
    return found


PLACES = [
    (where, hook) for where in ("body.0", "body.1", "body.2", "body", "head", "norm") for hook in ("before", "behind")
]
PLACES += [(where, f"{hook}, with kwargs") for where in ("body.1", "body.2") for hook in ("before", "behind")]


@pytest.mark.parametrize("to", ["l1", "none", "wn", "wn:mean-bn"])
@pytest.mark.parametrize(("where", "hook"), PLACES)
@torch.no_grad()
def test_once_in_every_form(where: str, hook: str, to: str) -> None:
    model, expected = hooked(where, hook)
    twin = nr.convert(model, to)
    forms = [
        twin,
        symbolic_trace(twin),
        passed(FuseActivation(), twin),
        passed(FoldAffine((X,)), twin),
        twin if to == "none" else nr.revert(twin),  # what was folded away is gone
    ]
    for form in [*forms, passed(SwapMetric("l1"), model), passed(FoldAffine((X,)), model)]:
        torch.testing.assert_close(form(X), expected, rtol=1e-4, atol=1e-4)


def test_a_node_stands_where_its_module_does() -> None:
    """As torch's own norms: tools that name nodes by the stack of modules find ours under their names."""
    twin = nr.convert(randomise(Net()).eval())
    stacks = [
        {
            node.target: list(node.meta["nn_module_stack"].values())[-1][0]
            for node in symbolic_trace(net).graph.nodes
            if node.op == "call_module"
        }
        for net in (Net(), twin)
    ]
    assert stacks[0] == stacks[1] and stacks[0]["body.1"] == "body.1"


def run(path: Path) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def test_once_in_an_onnx_file(tmp_path: Path) -> None:
    """A norm that is folded into its layer where it has no hooks, and one that measures at inference."""
    model, _ = hooked("body.1", "behind")
    HOOKS["behind, with kwargs"](model.get_submodule("body.3"))
    twin = nr.convert(model, scope="all")
    nr.export(twin, X, tmp_path / "m.onnx")
    torch.testing.assert_close(run(tmp_path / "m.onnx"), twin(X).detach(), rtol=1e-4, atol=1e-4)


def test_hooks_that_the_exporter_leaves_out_are_refused(tmp_path: Path) -> None:
    model, _ = hooked("", "behind")
    with pytest.raises(nr.NormRewriteError, match="hooks on the whole Net"):
        nr.export(nr.convert(model), X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
