"""What the suites over the registry share: the forms of every target, and the networks that they are tried on.

A new row of targets.TARGETS is tried by its own name from the day it stands there; `FORMS` adds what it may be written as.
"""

import copy
from functools import cache

import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.targets import TARGETS
from tests.conftest import randomise
from tests.sites.test_kinds import NormAct

_SPELT = {
    "topk": ["topk:10", "topk:1%"],
    "group": ["group", "group:4"],
    "bwn": ["bwn", "bwn:strict", "bwn:mean-bn", "bwn:l1"],
    "wn": ["wn", "wn:mean-bn", "wn:l1", "wn:linf"],
}
FORMS = [form for name in TARGETS for form in _SPELT.get(name, [name])]
FROM_OURS = {"l2"}  # the way back: needs a twin to start from
FOR_GOOD = {"none", "l2"}  # leave no norm of ours, and nothing to revert
REVERSIBLE = [form for form in FORMS if form not in FOR_GOOD]


class Chain(nn.Module):
    """Convolutions of every kind, each with its norm, and a residual."""

    shape = (12, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, eps=1e-3, momentum=None)
        self.up, self.bn4 = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu()
        x = (x + self.bn3(self.grouped(self.bn2(self.depthwise(x)).relu()))).relu()
        x = self.bn4(self.up(x)).relu()
        logits: Tensor = self.head(nn.functional.max_pool2d(x, 6).flatten(1))
        return logits


class Dense(nn.Module):
    """Linear layers, whose norms they take in where example inputs tell the rank."""

    shape = (12, 10)

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16)
        self.linear2, self.bn2 = nn.Linear(16, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.linear1(x)).relu()
        logits: Tensor = self.head(self.bn2(self.linear2(x)).relu())
        return logits


class PreActivation(nn.Module):
    """Norms that no layer in front can take: at the start, behind ReLU, behind a layer called twice; one used twice."""

    shape = (12, 4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)
        self.behind_relu, self.twice = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.one, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.shared, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind_relu(self.conv(self.first(x).relu()).relu())
        y = self.one(self.twice(x)).relu()
        y = self.other(self.twice(y)).relu()
        maps: Tensor = self.last(self.shared(y).relu() + self.shared(x).relu())
        return maps


class Fused(nn.Module):
    """Norms that apply their own activation, as timm's BatchNormAct2d."""

    shape = (12, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 8, 3, bias=False), NormAct(8), nn.MaxPool2d(2), NormAct(8), nn.Conv2d(8, 6, 2)
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.body(x)
        return maps


NETWORKS: dict[str, type[Chain] | type[Dense] | type[PreActivation] | type[Fused]] = {
    "chain": Chain,
    "dense": Dense,
    "pre-activation": PreActivation,
    "fused": Fused,
}


# What differs from the form before it by a measure or a number alone: one network each, in turn, decides for all.
ALIKE = ("linf", "topk:10", "topk:1%", "range", "group:4", "bwn:l1", "wn:l1", "wn:linf", "wn:mean-bn")
CASES = [
    (form, network)
    for form in FORMS
    for place, network in enumerate(NETWORKS)
    # One value a sample and channel: instance norm leaves nothing of it but the bias.
    if (form, network) != ("instance", "dense") and (form not in ALIKE or place == ALIKE.index(form) % len(NETWORKS))
]


def inputs(network: str, seed: int = 0) -> Tensor:
    return torch.randn(NETWORKS[network].shape, generator=torch.Generator().manual_seed(seed))


@cache
def _trained(network: str, seed: int) -> nn.Module:
    """Odd weights and biases, and about the statistics of its own inputs: else activations would die out on the way."""
    torch.manual_seed(seed)
    model = randomise(NETWORKS[network](), seed).train()
    with torch.no_grad():
        for step in range(20):
            model(inputs(network, seed=100 + step))
    return model.eval()


def start(form: str, network: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """What the form is asked of, trained-looking, in eval: of torch's norms, or of an l1 twin for the way back."""
    model = copy.deepcopy(_trained(network, seed)).to(dtype)
    return nr.convert(model, "l1") if form in FROM_OURS else model


def fresh(form: str, network: str) -> nn.Module:
    """The same as it is made, in training."""
    model = NETWORKS[network]()
    return nr.convert(model, "l1") if form in FROM_OURS else model


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """The same names in the same order, with the same bits and dtypes."""
    ours, theirs = a.state_dict(), b.state_dict()
    dtypes = [[value.dtype for value in state.values()] for state in (ours, theirs)]
    return list(ours) == list(theirs) and dtypes[0] == dtypes[1] and all(torch.equal(ours[n], theirs[n]) for n in ours)


def rewritten(model: nn.Module) -> list[sites.Site]:
    return sites.find(model, sites.is_rewritten)
