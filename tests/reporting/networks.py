"""Small networks of every shape that the page has to draw, and one whose names mean harm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import randomise


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class ResNet(nn.Module):
    """Two stages of two residual blocks, between a stem and a head."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList(nn.Sequential(Residual(channels), Residual(channels)) for _ in range(2))
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """A block whose output skips over another."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = Residual(2), Residual(2), Residual(4)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        middle = F.interpolate(self.middle(F.max_pool2d(down, 2)), scale_factor=2)
        return self.up(torch.cat([middle, down], 1))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """No graph: it looks at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) if x.sum() > 0 else x


class Twice(nn.BatchNorm2d):
    """More than a norm, so it is refused."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


EVIL = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">'&amp;\u202e"


def evil() -> nn.Module:
    """Names that would be elements, if they were let."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Twice(4))
    model._modules = {f"{name}{EVIL}": module for name, module in model._modules.items()}
    return prepared(model)


def prepared(model: nn.Module) -> nn.Module:
    return randomise(model).eval()


def images(count: int = 40, size: int = 8, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def networks() -> dict[str, Any]:
    return {
        "resnet": lambda: prepared(ResNet()),
        "unet": lambda: prepared(UNet()),
        "branching": lambda: prepared(Branching()),
        "chain": lambda: prepared(
            nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(9)))
        ),
        "root": lambda: prepared(nn.BatchNorm2d(1)),
        "evil": evil,
    }
