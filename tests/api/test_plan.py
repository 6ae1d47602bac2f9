"""plan and convert: what is looked at and what is left alone, whatever a model does with its norms beside calling them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import sites
from normrewrite.data import Batch, Data
from tests.conftest import randomise
from tests.passes.test_lift_functional import Block

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class _ReadsANorm(nn.Module):
    """Calls a norm, and F.batch_norm on the same norm's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = randomise(nn.BatchNorm2d(3))
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.bn(x))
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training)


def test_planning_touches_nothing() -> None:
    model = nn.Sequential(_ReadsANorm()).train()
    model[0].inner.eval()
    before = copy.deepcopy(model.state_dict())
    str(nr.plan(model))
    assert list(model.state_dict()) == list(before) and not model[0].inner.training and model[0].training
    x = torch.randn(4, 3, 5, 5)
    twin = nr.convert(model)
    assert not twin.get_submodule("0.inner.0").training
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), **CLOSE)
    assert list(model.state_dict()) == list(before)


class _Private(nn.BatchNorm2d):
    def __init__(self, width: int, noise: float = 0.0) -> None:
        super().__init__(width)
        self._noise = noise

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * (1 + self._noise) if self.training else y


def test_private_attributes_count_and_come_back() -> None:
    model = randomise(nn.Sequential(_Private(4), _Private(4, 1.0))).eval()
    plan = nr.plan(model)
    assert [choice.rewrite is not None for choice in plan.choices] == [True, False]
    back = nr.revert(plan.apply()[0])
    assert back[0]._noise == 0.0 and torch.equal(back(torch.ones(1, 4, 2, 2)), model(torch.ones(1, 4, 2, 2)))  # type: ignore[index]


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, self.mean, self.var, training=self.training)
        return y if skip is None else y + skip


def test_optional_arguments_are_not_baked_in() -> None:
    model = nn.Sequential(_Optional(), nn.BatchNorm2d(3)).eval()
    plan = nr.plan(model)
    assert "optional arguments skip" in str(plan) and len(plan.rewritten) == 1
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(plan.apply()[0](x), model(x), **CLOSE)


def test_what_is_excluded_is_not_traced_either() -> None:
    model = nn.Sequential(Block(3), randomise(nn.BatchNorm2d(3))).eval()
    twin = nr.convert(model, exclude="0.*")
    assert type(twin[0]) is Block  # type: ignore[index]


def test_a_dtype_that_batch_norm_cannot_compute_in_is_refused() -> None:
    norm = nn.BatchNorm2d(4)
    norm.weight.data = norm.weight.data.to(torch.float8_e4m3fn)
    assert "float8" in str(nr.plan(nn.Sequential(norm)))
    mixed = nn.BatchNorm2d(4)
    mixed.running_mean = mixed.running_mean.bfloat16()  # type: ignore[union-attr]
    assert "bfloat16 and float32" in str(nr.plan(nn.Sequential(mixed)))


def test_what_an_origin_keeps_is_no_norm_of_the_model() -> None:
    """It holds the tensors of one, running statistics too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomise(nn.BatchNorm2d(4))).eval()
    for to in ("bwn", "layer", "frozen"):
        twin = nr.convert(model, to)
        assert [site.name for site in sites.find(twin)] == (["1"] if to == "frozen" else [])


class _TwoInputs(nn.Module):
    """A linear layer with a norm to itself on the first argument, and another width on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), randomise(nn.BatchNorm1d(6)), nn.Linear(3, 6)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(self.first(a)) + self.second(b)  # type: ignore[no-any-return]


def test_inputs_by_name_may_come_in_any_order() -> None:
    model = _TwoInputs().eval()
    batch = Batch({"b": torch.randn(5, 3), "a": torch.randn(5, 4)})
    assert [tuple(value.shape) for value in batch.positional(["a", "b"])] == [(5, 4), (5, 3)]
    twin = nr.convert(model, "wn", example_inputs=batch.positional(["a", "b"]))
    assert isinstance(twin.norm, nr.nn.StandIn)  # the rank of its layer's output is known
    torch.testing.assert_close(twin(**batch.inputs), model(**batch.inputs))
    assert nr.advise(model, Data(batch)).sites[0].folds_into == "first"


@pytest.mark.parametrize("to", ["l1", "renorm", "frozen", "layer", "none", "bwn", "wn"])
def test_networks_without_values_are_converted_or_refused(to: str) -> None:
    """On the meta device a network is planned before it is filled."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    try:
        twin = nr.convert(model, to)
    except nr.NormRewriteError as error:
        assert "meta" in str(error)
    else:
        assert all(tensor.is_meta for tensor in twin.parameters())
