"""The networks of the paper, as torch.nn has them, and the norms that a run puts in.

>>> model = with_norm(NETWORKS["resnet8"](), Norm("l1", times=4))

For images of 16 × 16 and 32 × 32, ten classes: a 3 × 3 stem without pooling; `imagenet` networks have the usual one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normrewrite as nr
from benchmarks.norm_matters.run import Norm
from benchmarks.scopes import Encoder


def _conv(width_in: int, width: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), a projection where the shape changes. body: two 3 × 3, or 1 × 1, 3 × 3, 1 × 1."""

    def __init__(self, width_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            out = 4 * width
            inner = (*_conv(width_in, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU())
            self.body = nn.Sequential(*inner, *_conv(width, out, 1))
        else:
            out = width
            self.body = nn.Sequential(*_conv(width_in, width, 3, stride), nn.ReLU(), *_conv(width, width, 3))
        same = stride == 1 and width_in == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(width_in, out, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def resnet(
    blocks: tuple[int, ...], width: int = 64, bottleneck: bool = False, classes: int = 10, imagenet: bool = False
) -> nn.Module:
    """He et al. 2015: a stage for every number of blocks, each twice as wide and half the side of the one before."""
    pooling = [nn.MaxPool2d(3, 2, 1)] if imagenet else []
    stem = _conv(3, width, 7, 2) if imagenet else _conv(3, width, 3)
    layers: list[nn.Module] = [*stem, nn.ReLU(), *pooling]
    width_in = width
    for stage, repeats in enumerate(blocks):
        for i in range(repeats):
            stride = 2 if stage and i == 0 else 1
            layers.append(Residual(width_in, width << stage, stride, bottleneck))
            width_in = (4 if bottleneck else 1) * (width << stage)
    return _initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes)))


def vgg11(width: int = 64) -> nn.Module:
    """Simonyan & Zisserman 2014, A, with batch norm and one linear layer; four poolings, so that 16 × 16 is enough."""
    layers: list[nn.Module] = []
    width_in = 3
    for times, pooled in zip((1, 2, 4, 4, 8, 8, 8, 8), (1, 1, 0, 1, 0, 1, 0, 0), strict=True):
        layers += [*_conv(width_in, times * width, 3), nn.ReLU(), *[nn.MaxPool2d(2)] * pooled]
        width_in = times * width
    return _initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 10)))


def _initialised(model: nn.Module) -> nn.Module:
    """As torchvision's: He et al. 2015, by the outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": partial(resnet, (1, 1, 1), 8),
    "resnet18": partial(resnet, (2, 2, 2, 2)),
    "resnet50": partial(resnet, (3, 4, 6, 3), bottleneck=True),
    "imagenet_resnet18": partial(resnet, (2, 2, 2, 2), classes=1000, imagenet=True),
    "imagenet_resnet50": partial(resnet, (3, 4, 6, 3), bottleneck=True, classes=1000, imagenet=True),
    "vgg11_eighth": partial(vgg11, 8),
    "vgg11": vgg11,
    "transformer": Encoder,
}


class Times(nn.Module):
    """A parametrisation: the weight is the parameter times a constant. A norm's constant C is its weight's inverse."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, parameter: Tensor) -> Tensor:
        return self.factor * parameter


def with_norm(model: nn.Module, norm: Norm) -> nn.Module:
    """The network with its batch norms (or those of norm.scope) rewritten. times: y = weight * d / (times * C * S) + bias."""
    if norm.to != "l2":
        model = nr.convert(model, norm.to, gain=norm.gain, scope=norm.scope)
    if norm.times != 1:
        for module in [module for module in model.modules() if isinstance(module, nr.nn.BatchNorm2d)]:
            parametrize.register_parametrization(module, "weight", Times(1 / norm.times))
    return model


def made(network: str, norm: Norm, seed: int) -> nn.Module:
    """A fresh network: the same weights for every norm, by the seed."""
    torch.manual_seed(seed)
    return with_norm(NETWORKS[network](), norm)
