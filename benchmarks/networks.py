"""Networks that benchmarks need and no package gives offline."""

from torch import Tensor, nn


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


def transformer_encoder(width: int = 64, layers: int = 2) -> nn.Module:
    """An encoder of pre-norm layers: (N, T, width) -> the same. Untrained."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False).eval()


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        return x + self.channels(y).permute(0, 3, 1, 2)


def convnext(width: int = 32) -> nn.Module:
    """A small net of ConvNeXt blocks (Liu et al. 2022): (N, 3, H, W) -> (N, 10), H and W multiples of 8. Untrained."""
    stem = (nn.Conv2d(3, width, 4, 4), nn.GroupNorm(1, width))
    down = (nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 2, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(2 * width), nn.Linear(2 * width, 10))
    return nn.Sequential(*stem, _ConvNeXtBlock(width), *down, _ConvNeXtBlock(2 * width), *head).eval()
