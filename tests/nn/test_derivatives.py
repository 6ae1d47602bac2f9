"""Networks that are differentiated twice, and by torch.func: gradient penalties, MAML, gradients by sample; in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parametrize

import normrewrite as nr
from normrewrite.nn import (
    BatchNorm,
    BatchRenorm,
    ChannelAffine,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    RMSNorm,
)
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.nn.weights import BoundedWeightNorm, WeightNorm
from normrewrite.norms import metric
from tests.backends.tolerances import check_close
from tests.conftest import randomise

METRICS = ("l2", "l1", "linf", "topk:3", "range")
WIDE = {"dtype": torch.float64}
NORMS: dict[str, Callable[[str], nn.Module]] = {
    "batch": lambda spec: BatchNorm(4, metric=spec, **WIDE),
    "batch, bare": lambda spec: BatchNorm(4, metric=spec, affine=False, **WIDE),
    # with open limits it has a constant that numerical derivatives would move: test_renorm.py has its own formulas
    "renorm": lambda spec: BatchRenorm(4, metric=spec, r_max=1.0, d_max=0.0, schedule=None, **WIDE),
    "frozen": lambda spec: FrozenBatchNorm(4, metric=spec, **WIDE),
    "instance": lambda spec: InstanceNorm(4, affine=True, track_running_stats=True, metric=spec, **WIDE),
    "group": lambda spec: GroupNorm(2, 4, metric=spec, **WIDE),
    "layer": lambda spec: LayerNorm((4, 2, 3), metric=spec, **WIDE),
    "layer, bare": lambda spec: LayerNorm((4, 2, 3), elementwise_affine=False, metric=spec, **WIDE),
    "rms": lambda spec: RMSNorm(4, channels_first=True, metric=spec, **WIDE),
}


def filled(module: nn.Module) -> nn.Module:
    """With parameters and statistics that show an error."""
    generator = torch.Generator().manual_seed(5)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 1.5, generator=generator) if "mean" not in name else value.normal_(
                generator=generator
            )
    return module


def checked(module: nn.Module, x: Tensor) -> bool:
    """First and second derivatives by x and every parameter."""
    names, values = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
    state = {name: value.clone() for name, value in module.named_buffers()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in state.items()}
        return functional_call(module, dict(zip(names, values, strict=True)) | buffers, (x,))

    inputs = (x.requires_grad_(), *values)
    passed: bool = gradcheck(run, inputs, fast_mode=True) and gradgradcheck(run, inputs, fast_mode=True)
    return passed


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spec", METRICS)
@pytest.mark.parametrize("name", NORMS)
def test_every_metric_and_scope(name: str, spec: str, training: bool) -> None:
    assert checked(filled(NORMS[name](spec)).train(training), torch.randn(3, 4, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_has_no_scale(training: bool) -> None:
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    assert checked(filled(MeanOnlyBatchNorm(4, **WIDE)).train(training), x)
    assert checked(filled(ChannelAffine(torch.ones(4, **WIDE), torch.ones(4, **WIDE))).train(training), x)


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_weight_norms(p: float) -> None:
    for norm, options in ((WeightNorm, {}), (BoundedWeightNorm, {}), (BoundedWeightNorm, {"strict": True})):
        layer = nn.Conv2d(4, 2, 2, groups=2, **WIDE)
        parametrize.register_parametrization(layer, "weight", norm(layer, p, **options))
        assert checked(layer, torch.randn(2, 4, 3, 3, dtype=torch.float64))


# --- networks, against one whose norms are written out ------------------------------------------------------------------------


class WrittenOut(nn.Module):
    """A norm of ours in other words: torch's own derivatives are the oracle."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.old = norm.weight, norm.bias, [norm]

    def forward(self, x: Tensor) -> Tensor:
        norm, row = self.old[0], metric(self.old[0].metric)
        channels = (1, -1, *(1,) * (x.dim() - 2))
        if isinstance(norm, BatchNorm):
            rows = x.transpose(0, 1).flatten(1)
            mean, spread = self._measured(rows, row) if self.training else (norm.running_mean, norm.running_scale)
            y = (x - mean.view(channels)) / (spread + norm.eps).view(channels)
        else:
            rows = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
            mean, spread = self._measured(rows.flatten(0, 1), row)
            sizes = *rows.shape[:2], 1
            y = ((rows - mean.view(sizes)) / (spread + norm.eps).view(sizes)).view(x.shape)
        return self.weight.view(channels) * y + self.bias.view(channels)

    @staticmethod
    def _measured(rows: Tensor, row: Any) -> tuple[Tensor, Tensor]:
        mean, n = rows.mean(1), rows.shape[1]
        ordered = (rows - mean[:, None]).abs().sort(1, descending=True).values
        spreads = {
            "mean": lambda: ordered.pow(row.power).mean(1).pow(1 / row.power),
            "top": lambda: ordered[:, : row.k(n)].mean(1),
            "span": lambda: rows.amax(1) - rows.amin(1),
        }
        return mean, row.gain(n) * spreads[row.family]()


def networks(to: str) -> tuple[nn.Module, nn.Module]:
    """A converted network, and the same with its norms written out; they share parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4)),
        *(nn.Softplus(), nn.Flatten(), nn.Linear(4 * 2 * 3, 3)),
    )
    randomise(model)
    ours = nr.convert(model.double().eval(), to=to)
    theirs = copy.copy(ours)
    theirs._modules = {
        name: WrittenOut(module) if hasattr(module, "metric") else module for name, module in ours._modules.items()
    }
    return ours, theirs


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(8, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 5), (3,)))  # type: ignore[return-value]


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, wanted: Tensor) -> Tensor:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    error: Tensor = (functional_call(model, parameters | buffers, (x,)) - wanted).square().mean()
    return error


def penalty(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a WGAN's penalty, and of x."""
    x, _ = data()
    x.requires_grad_()
    model.zero_grad()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (dx.flatten(1).norm(dim=1) - 1).square().mean().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None} | {"x": x.grad}  # type: ignore[dict-item]


def maml(model: nn.Module) -> dict[str, Tensor]:
    """Gradients through two steps of descent."""
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    (x, wanted), step = data(), torch.func.grad(loss, argnums=1)

    def after(parameters: dict[str, Tensor]) -> Tensor:
        for _ in range(2):
            slopes = step(model, parameters, x[:4], wanted[:4])
            parameters = {name: value - 0.1 * slopes[name] for name, value in parameters.items()}
        return loss(model, parameters, x[4:], wanted[4:])

    return torch.func.grad(after)(start)


def by_sample(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    each = torch.func.grad(lambda *values: loss(model, *values))
    x, wanted = data()
    return torch.vmap(each, (None, 0, 0))(parameters, x[:, None], wanted[:, None])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("to", ["l1", "topk:3", "range", "group:2"])
@pytest.mark.parametrize("function", [penalty, maml, by_sample], ids=lambda function: function.__name__)
def test_converted_networks(function: Callable[[nn.Module], dict[str, Tensor]], to: str, training: bool) -> None:
    if function is by_sample and training and not to.startswith("group"):
        return refused_by_vmap(to)
    ours, theirs = (function(network.train(training)) for network in networks(to))
    largest = max(float(value.abs().max()) for value in theirs.values())  # a bias in front of a batch norm has none
    for key, value in theirs.items():
        check_close(key, ours[key], value, 1e-9, unit=largest)
    with pytest.raises(AssertionError, match="off by"):
        check_close("7.weight", 1.01 * theirs["7.weight"], theirs["7.weight"], 1e-9, unit=largest)
    return None


def refused_by_vmap(to: str) -> None:
    """As torch's own batch norm: running statistics can't be averaged over what is mapped over them."""
    model = networks(to)[0].train()
    with pytest.raises(RuntimeError, match="vmap: inplace"):
        parameters, (x, _) = dict(model.named_parameters()), data()
        buffers = dict(model.named_buffers())
        torch.vmap(lambda x: functional_call(model, parameters | buffers, (x,)))(x[:, None])
