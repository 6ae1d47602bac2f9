"""ChannelAffine: its value, its gradients, and one node under torch.fx."""

import pytest
import torch
from torch import fx, nn

from normrewrite.nn import ChannelAffine
from tests.backends.tolerances import TOLERANCES, check_close

SHAPES = [(4, 3), (4, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)]


def channel_affine(dtype: torch.dtype) -> ChannelAffine:
    return ChannelAffine(torch.tensor([2.0, -0.5, 0.0]).to(dtype), torch.tensor([1.0, 0.25, -3.0]).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = channel_affine(dtype)(x)
    rows = x.double().transpose(0, 1)
    wanted = torch.stack([2.0 * rows[0] + 1.0, -0.5 * rows[1] + 0.25, 0 * rows[2] - 3.0]).transpose(0, 1)
    assert y.dtype == dtype
    check_close("y", y, wanted, TOLERANCES[dtype].y)
    with pytest.raises(AssertionError, match="off by"):
        check_close("y", y.double() * 1.01, wanted, TOLERANCES[dtype].y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, ...]) -> None:
    module = channel_affine(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())
    assert list(parameters) == ["weight", "bias"]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(module, {"weight": weight, "bias": bias}, x),
        (x, *parameters.values()),
    )


def test_layout_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert channel_affine(torch.float32)(x).is_contiguous(memory_format=torch.channels_last)


def test_one_node_when_traced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), channel_affine(torch.float32))
    traced = fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes][1:3] == [("call_module", "0"), ("call_module", "1")]
    assert isinstance(traced.get_submodule("1"), ChannelAffine)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(traced(x), model(x))


def test_repr() -> None:
    assert repr(channel_affine(torch.float32)) == "ChannelAffine(3)"


def test_the_module_follows_a_cast() -> None:
    module = channel_affine(torch.float32).half()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
    assert module(torch.randn(2, 3).half()).dtype == torch.float16
