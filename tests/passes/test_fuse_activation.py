"""FuseActivation: the same function and the same keys, whatever comes after it."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import normrewrite as nr
from benchmarks.networks import resnet50
from normrewrite.nn.rectify import norm_relu
from normrewrite.passes import FoldAffine, FuseActivation, SwapMetric
from normrewrite.sites import graph
from tests.conftest import randomise


class Block(nn.Module):
    """A residual block with two norms, one of them in front of an addition."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.form = form
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.form == "plain":
            return self.relu(out + x)
        if self.form == "swapped":
            return F.relu(x + out)
        if self.form == "in place":
            out += x
            return F.relu(out, inplace=True)
        if self.form == "method":
            return out.add_(x).relu_()
        return torch.relu(torch.add(x, out))


FORMS = ("plain", "swapped", "in place", "method", "function")


def _fused(model: nn.Module) -> GraphModule:
    found: GraphModule = FuseActivation()(fx.symbolic_trace(model)).graph_module
    return found


def _calls(graph_module: GraphModule) -> list[int]:
    """The numbers of arguments of all fused calls."""
    return [len(node.args) for node in graph_module.graph.nodes if node.target is norm_relu]


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_same_function_and_keys(form: str, training: bool) -> None:
    twin = nr.convert(randomise(Block(form)), "l1").train(training)
    fused, x = _fused(copy.deepcopy(twin)), torch.randn(4, 4, 6, 6)
    assert _calls(fused) == [2, 3]
    assert list(fused.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(_step(fused, x), _step(twin, x), strict=True))
    if training:
        assert torch.equal(fused.eval()(x), twin.eval()(x))  # the flag is alive


def test_group_norms_too() -> None:
    twin = nr.convert(nr.convert(randomise(Block()), "group:2", offset=0), "l1", scope="group")
    fused, x = _fused(twin), torch.randn(4, 4, 6, 6)
    assert _calls(fused) == [2, 3] and torch.equal(fused(x), twin(x))


def test_a_resnet50_has_33_and_16_of_them() -> None:
    """53 norms: 16 in front of an addition, 4 beside it, the others in front of a ReLU alone."""
    fused = _fused(nr.convert(resnet50(), "l1"))
    assert sorted(_calls(fused)) == [2] * 33 + [3] * 16


class _Left(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.bn = form, nr.nn.BatchNorm2d(4)
        if form == "hooked":
            self.bn.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.form == "read twice":
            return F.relu(y) + y
        if self.form == "added to itself":
            return F.relu(y + y)
        if self.form == "in place into another":
            return F.relu(x.clone().add_(y))
        if self.form == "scaled":
            return F.relu(torch.add(x, y, alpha=2))
        if self.form == "a number":
            return F.relu(y + 1)
        return F.gelu(y) if self.form == "gelu" else F.relu(y)


@pytest.mark.parametrize(
    "form", ["read twice", "added to itself", "in place into another", "scaled", "a number", "gelu", "hooked"]
)
def test_what_is_left_alone(form: str) -> None:
    model = _Left(form)
    result = FuseActivation()(graph.trace(model, {id(model.bn)}))
    x = torch.randn(4, 4, 6, 6)
    assert not result.modified and torch.equal(result.graph_module(x), model(x))


def test_torchs_own_norms_are_left_to_torch() -> None:
    assert not FuseActivation()(fx.symbolic_trace(Block())).modified


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_revert_gives_the_original_back(training: bool) -> None:
    model = randomise(Block()).train(training)
    back, x = nr.revert(_fused(nr.convert(model, "l1"))), torch.randn(4, 4, 6, 6)
    assert torch.equal(back(x), model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_other_passes_still_find_the_norms() -> None:
    twin, x = nr.convert(randomise(Block()).eval(), "l1"), torch.randn(4, 4, 6, 6)
    fused = _fused(copy.deepcopy(twin))
    SwapMetric("linf")(fused)
    assert {m.metric for m in fused.modules() if isinstance(m, nr.nn.BatchNorm)} == {"linf"}
    assert torch.equal(fused(x), twin(x))
    folded = FoldAffine()(fused).graph_module
    torch.testing.assert_close(folded(x), twin(x))
    tree, _ = FoldAffine().apply(_fused(copy.deepcopy(twin)))
    torch.testing.assert_close(tree(x), twin(x))


def test_it_compiles_and_exports() -> None:
    fused, x = _fused(nr.convert(randomise(Block()), "l1")), torch.randn(4, 4, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    program = torch.export.export(copy.deepcopy(fused), (x,))
    torch.testing.assert_close(compiled(x), copy.deepcopy(fused)(x))
    torch.testing.assert_close(program.module()(x), copy.deepcopy(fused)(x))


def test_deep_copies_and_its_own_code_are_whole() -> None:
    fused, x = _fused(nr.convert(randomise(Block()).eval(), "l1")), torch.randn(4, 4, 6, 6)
    again = fx.symbolic_trace(copy.deepcopy(fused))
    assert _calls(again) == [2, 3] and torch.equal(again(x), fused(x))
