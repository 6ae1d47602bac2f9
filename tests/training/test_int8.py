"""A network on 8 bits for a while: what is caught, under which name, in which range, and that nothing of it stays."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import LearnedRanges, NormRewriteError
from normrewrite.training.int8 import MOMENTUM, Int8, int8, notes
from normrewrite.training.products import nearest, scale_of
from tests.api.test_export import images, residual
from tests.forms import Chain
from tests.ranks import on_ranks


def learned(model: nn.Module, *batches: Tensor, **options: Any) -> LearnedRanges:
    with int8(model, **options) as quantised:
        model.train()
        for batch in batches:
            model(batch)
    return quantised.ranges


def fq(x: Tensor, amax: float | None = None) -> Tensor:
    return nearest(x, scale_of(x.abs().max() if amax is None else torch.tensor(amax))).wide()


def by_row(weight: Tensor) -> Tensor:
    return torch.stack([fq(row) for row in weight])


# --- what is computed -------------------------------------------------------------------------------------------------


def test_a_whole_network_is_that_of_its_rounded_numbers() -> None:
    """Against the same layers with weights, inputs and both sides of the add rounded by hand."""
    model, x = residual(), images(8)
    ranges = learned(model, x).amax
    with int8(model, ranges=LearnedRanges(ranges)):
        found = model.eval()(x)
    by_hand = copy.deepcopy(model)
    for layer in (by_hand.conv1, by_hand.conv2, by_hand.fc):
        layer.weight.data = by_row(layer.weight.data)
    y = by_hand.norm(by_hand.conv1(fq(x, ranges["conv1"]))).relu()
    z = fq(y, ranges["+left"]) + fq(by_hand.conv2(fq(y, ranges["conv2"])), ranges["+right"])
    expected = by_hand.fc(fq(z.relu().mean((2, 3)), ranges["fc"]))
    torch.testing.assert_close(found, expected)
    assert (found - model(x)).abs().max() > 1e-3
    assert sorted(ranges) == ["+left", "+right", "conv1", "conv2", "fc"]


class Odd(nn.Module):
    """Layers of torch's in other forms: padding of its own, one input without a batch, called directly, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mirrored = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.same, self.valid = nn.Conv2d(4, 4, 4, padding="same"), nn.Conv2d(4, 4, 2, padding="valid")
        self.weight, self.twice = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Conv2d(4, 4, 1)
        self.register_buffer("place", torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.valid(self.same(self.mirrored(x)) + self.place)
        x = x + F.conv2d(x, self.weight, padding=1)
        y = F.conv2d(x[0], self.weight)
        y += self.twice(self.twice(y))
        return y


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_every_form_of_a_layer_is_caught() -> None:
    model, x = Odd(), torch.randn(2, 3, 8, 8)
    with int8(model) as quantised:
        model.train()
        found = model(x)
    names = {"mirrored", "same", "valid", "twice", "", "#2", "+left", "+right", "#2+left", "#2+right"}
    assert set(quantised.amax) == names
    assert 1e-3 < (found - model(x)).norm() / found.norm() < 0.1
    torch.testing.assert_close(quantised.amax["mirrored"], x.abs().max())
    one = nn.Conv2d(4, 4, 4, padding="same")
    with int8(one):
        y, expected = (
            one(x[:, :1].expand(-1, 4, -1, -1)),
            F.conv2d(F.pad(fq(x[:, :1].expand(-1, 4, -1, -1)), (1, 2, 1, 2)), by_row(one.weight.detach()), one.bias),
        )
    torch.testing.assert_close(y, expected)


def test_an_add_in_place_changes_its_own_tensor() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            z = y
            z += x
            return y, z.relu_()

    model, x = InPlace(), torch.randn(2, 3, 4, 4)
    with int8(model):
        y, z = model(x)
        z.sum().backward()
    assert y is not None and torch.equal(y, z) and model.conv.weight.grad is not None


def test_norms_and_parametrised_weights_are_computed_as_ever() -> None:
    model = nr.convert(Chain().eval(), to="bwn")
    names = set(learned(model, torch.randn(Chain.shape)).amax)
    assert names == {"conv", "depthwise", "grouped", "up", "head", "+left", "+right"}
    group = nn.Sequential(nn.Conv2d(3, 4, 1), nr.nn.GroupNorm(2, 4, metric="l1"), nr.nn.BatchNorm2d(4, metric="range"))
    assert set(learned(group, images(4)).amax) == {"0"}


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_follow_the_largest_value_by_a_moving_average() -> None:
    model, batches = nn.Linear(4, 2), [scale * torch.randn(8, 4) for scale in (1, 5, 0.1)]
    largest = [float(batch.abs().max()) for batch in batches]
    expected = largest[0]
    for value in largest[1:]:
        expected += MOMENTUM * (value - expected)
    assert math.isclose(learned(model, *batches).amax[""], expected, rel_tol=1e-6)


def test_eval_is_deterministic_and_learns_nothing() -> None:
    model, x = residual(), images(8)
    with int8(model, gradients=True) as quantised:
        model.train()(x)
        before = quantised.ranges
        outputs = [model.eval()(10 * x) for _ in range(2)]
    assert torch.equal(*outputs) and quantised.ranges == before


def test_what_is_not_finite_shows_and_stays_out_of_the_ranges() -> None:
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    for bad in (torch.nan, torch.inf):
        with int8(model) as quantised:
            model(x)
            before = quantised.ranges
            assert torch.isnan(model(torch.where(torch.arange(4) == 1, bad, x))).all()
            assert quantised.ranges == before
    with pytest.raises(NormRewriteError, match="'' is inf; a range is a number"), int8(model) as quantised:
        model(bad * x)
        _ = quantised.ranges


def test_ranges_go_on_from_what_is_known() -> None:
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    amax = learned(model, x, ranges=LearnedRanges({"": 100.0})).amax[""]
    assert math.isclose(amax, 100 + MOMENTUM * (float(x.abs().max()) - 100), rel_tol=1e-6)
    with int8(model, ranges=LearnedRanges({"": 1.0})) as quantised:
        torch.testing.assert_close(model.eval()(x), F.linear(fq(x, 1.0), by_row(model.weight.detach()), model.bias))
        state = quantised.state_dict()
    other = Int8(model)
    other.load_state_dict(state)
    assert other.ranges == quantised.ranges


def on_a_rank() -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    return learned(residual(), x[torch.distributed.get_rank() * 2 :][: 2 + 2 * torch.distributed.get_rank()]).amax


@pytest.mark.slow
def test_ranks_learn_the_range_of_the_joined_batch(tmp_path: Path) -> None:
    found = on_ranks(2, on_a_rank, tmp_path / "ranks")
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    assert found[0] == found[1] and found[0]["conv1"] == float(x.abs().max())


# --- nothing of it stays ----------------------------------------------------------------------------------------------


def test_the_model_is_what_it_was() -> None:
    model, x = residual(), images(4)
    before, state, keys = (
        model(x),
        copy.deepcopy(model.state_dict()),
        {n: set(vars(m)) for n, m in model.named_modules()},
    )
    with int8(model) as quantised:
        model.train()(x)
        inside = copy.deepcopy(model).eval()
        assert torch.equal(inside(x), model.eval()(x)) and not torch.equal(inside(x), before)
    for name, module in model.named_modules():
        assert set(vars(module)) == keys[name] and not module._forward_hooks and not module._forward_pre_hooks
    for name in state:
        if "running" not in name and "num" not in name:
            assert torch.equal(model.state_dict()[name], state[name])
    assert not quantised.calls
    model.load_state_dict(state)
    assert torch.equal(model.eval()(x), before)
    inside.load_state_dict(state)
    assert torch.equal(inside(x), before)  # the copy's hooks do nothing any more


def test_a_forward_that_raises_leaves_no_trace() -> None:
    model = residual()
    with int8(model) as quantised:
        model.train()(images(2))
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 8, 8))
        assert not quantised.calls
        before, x = quantised.ranges, images(2)
        assert torch.equal(x + x, 2 * x) and quantised.ranges == before  # nothing outside a forward is caught
        model(x)
        assert quantised.ranges != before


# --- choices ----------------------------------------------------------------------------------------------------------


def test_layers_are_kept_by_name_and_at_the_ends() -> None:
    model, x = nr.convert(Chain().eval()), torch.randn(Chain.shape)
    for keep, names in (
        (["first", "last"], {"depthwise", "grouped", "up", "+left", "+right"}),
        (["*ed"], {"conv", "depthwise", "up", "head", "+left", "+right"}),
        (["*"], set()),
    ):
        ranges = learned(model, x, keep=keep)
        assert set(ranges.amax) == names
    assert learned(model, x, keep=["last", "up"]).kept == ("up", "head")
    nested = nn.Sequential(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), nn.Linear(12, 2))
    assert set(learned(nested, torch.randn(3, 12), keep=["0"]).amax) == {"1"}  # with all that is in it


def test_what_cannot_be_asked_for() -> None:
    model, x = residual(), images(2)
    for options, message in (
        ({"keep": ["conv3"]}, r"'conv3' is to be kept, and no module is called so. Did you mean 'conv\d'\?"),
        ({"ranges": LearnedRanges({"layer1.conv": 1.0})}, "they know 'layer1.conv', which Residual has not"),
        ({"ranges": LearnedRanges({})}, "they know no layer"),
    ):
        with pytest.raises(NormRewriteError, match=message), int8(model, **options):  # type: ignore[arg-type]
            pass
    with pytest.raises(NormRewriteError, match="ReLU holds no convolution and no linear layer"), int8(nn.ReLU()):
        pass
    with pytest.raises(NormRewriteError, match=r"conv1 has no range yet\. Run the model in training"), int8(model):
        model.eval()(x)


def test_norms_that_measure_squares_are_told() -> None:
    (note,) = notes(residual())
    assert note.startswith("1 batch norms between 8-bit layers measure squares (norm)")
    (note,) = notes(nr.convert(residual(), to="renorm"))  # ours, and l2
    assert "measure squares (norm)" in note
    assert notes(nr.convert(residual(), to="range")) == notes(nr.convert(residual(), to="frozen")) == []
