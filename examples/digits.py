"""A small residual network for 8×8 digits, trained: `examples/digits.pt` holds its weights.

    net = digits_resnet()
    net.load_state_dict(torch.load("examples/digits.pt", weights_only=True))
    logits = net.eval()(images)

Input: `images`, float32 (N, 1, 8, 8), standardised as in `examples/digits.npz`. Output: float32 logits (N, 10).
"""

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution and its norm. No bias: the norm would subtract it again."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """`relu(body(x) + shortcut(x))`, with a projection on the shortcut only where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, outputs, 3, stride), nn.ReLU(), conv_bn(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Stem, three blocks (8×8, 4×4, 2×2), average pooling, one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(1, width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.blocks(self.stem(images)))
        logits: Tensor = self.head(features.flatten(1))
        return logits


def digits_resnet(width: int = 16) -> nn.Module:
    """`digits_resnet()(torch.zeros(5, 1, 8, 8)).shape == (5, 10)`: nine BatchNorm2d; `digits.pt` has width 16."""
    return DigitsResNet(width)
