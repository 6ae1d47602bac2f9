"""Layer norms to L1 and Top-k: a transformer encoder and a ConvNeXt-like network, before and after correction, and in fp16.

    python -m benchmarks.scopes          # two minutes on two cores; writes results/scopes.json

Both are trained here on scikit-learn's digits (1,400 images; 397 are kept for the test), then converted with scope layer and
corrected on 256 unlabelled training images. Differences are of logits, in units of the original's norm. fp16: rows of mean
300 and standard deviation 10,000, whose squares lie beyond 65,504, against float64.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from benchmarks.stamp import markdown, write

TARGETS = ("l1", "topk:10", "topk:25%", "linf")


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder over the eight rows of a digit: 7 layer norms of width 64."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(0.02 * torch.randn(8, 64))
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(images[:, 0]) + self.position).mean(1))
        return logits


class LayerNorm2d(nn.Module):
    """Channels first, written by hand as ConvNeXt's own code has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(var + self.eps)) + self.bias[:, None, None]


class Block(nn.Module):
    """Depthwise convolution, layer norm channels last, two linear layers, layer scale, shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.project(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


def convnext_like() -> nn.Module:
    """6 norms, three of them channels first."""
    stem = (nn.Conv2d(1, 32, 3, padding=1), LayerNorm2d(32))
    down = (LayerNorm2d(32), nn.Conv2d(32, 64, 2, 2))
    return nn.Sequential(
        *stem,
        Block(32),
        *down,
        Block(64),
        Block(64),
        LayerNorm2d(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    data_set = load_digits()
    images = torch.tensor(data_set.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data_set.target)[order]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(x.split(64)))
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def measure(name: str, model: nn.Module, to: str, train_x: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
    twin, report = nr.plan(model, to, scope="layer").apply()
    before, copied = model(x), twin(x)
    twin, calibration = nr.calibrate(twin, train_x[:256])
    corrected, half = twin(x), twin.half()(x.half()).float()
    return {
        "network": name,
        "target": to,
        "sites": len(report.rewritten),
        "copied": relative(copied, before),
        "corrected": relative(corrected, before),
        "half": relative(half, corrected),
        "top1": [float((logits.argmax(1) == y).double().mean()) for logits in (before, copied, corrected, half)],
        "left": {fit.name: 1 - fit.explained for fit in calibration.fits},
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def large_rows(to: str) -> dict[str, Any]:
    """A layer norm of 512 on fp16 rows whose squares overflow: its error, and what squares in fp16 give."""
    x = (300 + 10_000 * torch.randn(256, 512, generator=torch.Generator().manual_seed(0))).half()
    output = nr.nn.LayerNorm(512, metric=to).half()(x)
    expected = nr.nn.LayerNorm(512, metric=to, dtype=torch.float64)(x.double())
    return {
        "target": to,
        "finite": bool(output.isfinite().all()),
        "error": float((output.double() - expected).abs().max() / expected.abs().max()),
        "squares_finite": bool((x - x.mean(1, keepdim=True)).square().mean(1).isfinite().all()),
    }


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            result["network"],
            f"`{result['target']}`",
            str(result["sites"]),
            f"{result['copied']:.3f}",
            f"{result['corrected']:.3f}",
            f"{result['half']:.1e}",
            " / ".join(f"{100 * value:.1f}" for value in result["top1"]),
        ]
        for result in results
    ]


HEAD = [
    "network",
    "target",
    "sites",
    "as copied",
    "corrected",
    "fp16 to fp32",
    "top-1: original / copied / corrected / fp16",
]
NETWORKS: dict[str, Callable[[], nn.Module]] = {"transformer encoder": Encoder, "ConvNeXt-like": convnext_like}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    x, y = digits()
    results = []
    for name, make in NETWORKS.items():
        model = train(make(), x[:1400], y[:1400], 20)
        results += [measure(name, model, to, x[:1400], x[1400:], y[1400:]) for to in TARGETS]
    large = [large_rows(to) for to in TARGETS]
    print(markdown(HEAD, rows(results)))
    print("\n".join(str(result) for result in large))
    print(f"wrote {write('scopes', {'networks': results, 'fp16_rows': large}, 'scikit-learn')}")


if __name__ == "__main__":
    main()
