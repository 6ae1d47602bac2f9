"""Networks that benchmarks need and no package gives offline."""

from torch import Tensor, nn
from torch.nn import functional

from normrewrite.nn import BatchNorm2d, LayerNorm


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or width_in != out
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2015): (N, 3, 224, 224) -> (N, 1000), 25.6 M parameters, 53 BN. Untrained."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    width_in = 64
    for stage, repeats in enumerate((3, 4, 6, 3)):
        for i in range(repeats):
            layers.append(_Bottleneck(width_in, 64 << stage, 2 if i == 0 and stage else 1))
            width_in = 4 * (64 << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class _Basic(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int, metric: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), BatchNorm2d(width, metric=metric)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), BatchNorm2d(width, metric=metric)
        projection = (nn.Conv2d(width_in, width, 1, stride, bias=False), BatchNorm2d(width, metric=metric))
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


def resnet8(metric: str, width: int = 16) -> nn.Module:
    """ResNet-8: a stem and three basic blocks, (N, 3, 32, 32) -> (N, 10), with norms of `metric`. Untrained."""
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), BatchNorm2d(width, metric=metric), nn.ReLU())
    widths = (width, width, 2 * width, 4 * width)
    blocks = (_Basic(widths[i], widths[i + 1], 1 if i == 0 else 2, metric) for i in range(3))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class _EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward; torch's own layer skips its norms' forward in eval."""

    def __init__(self, width: int, metric: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(width, metric=metric) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


def transformer_encoder(metric: str, width: int = 64, layers: int = 2) -> nn.Module:
    """(N, T, width) -> the same, with normrewrite's layer norms. Untrained."""
    return nn.Sequential(*(_EncoderBlock(width, metric) for _ in range(layers)), LayerNorm(width, metric=metric)).eval()


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, metric: str) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = LayerNorm(width, eps=1e-6, metric=metric)
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        return x + self.channels(y).permute(0, 3, 1, 2)


def convnext(metric: str, width: int = 32) -> nn.Module:
    """A small net of ConvNeXt blocks (Liu et al. 2022): (N, 3, H, W) -> (N, 10), H and W multiples of 8. Untrained."""

    def across(channels: int) -> nn.Module:
        return LayerNorm(channels, eps=1e-6, metric=metric, channels_first=True)

    stem = (nn.Conv2d(3, width, 4, 4), across(width), _ConvNeXtBlock(width, metric))
    down = (across(width), nn.Conv2d(width, 2 * width, 2, 2), _ConvNeXtBlock(2 * width, metric))
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), LayerNorm(2 * width, eps=1e-6, metric=metric))
    return nn.Sequential(*stem, *down, *pooled, nn.Linear(2 * width, 10)).eval()
