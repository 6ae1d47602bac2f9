"""FoldOffset: what stood in front of a norm is in the layer in front, or stays; the file needs no normrewrite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.commands.convert import convert
from normrewrite.commands.source import Source
from normrewrite.nn.offset import OffsetNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.options.convert import Convert
from normrewrite.options.fields import quiet
from normrewrite.passes import FoldOffset
from normrewrite.passes.folding import fold, plain_state
from normrewrite.tolerances import worst
from tests.conftest import randomise
from tests.forms import NETWORKS, inputs, start

STAY = {
    "chain": set(),
    "dense": set(),
    "pre-activation": {"first", "behind_relu", "one", "other", "shared"},
    "fused": {"body.3"},
}


def offsets(model: nn.Module) -> set[str]:
    return {site.name for site in sites.find(model, lambda module: isinstance(module, OffsetNorm))}


@pytest.mark.parametrize("to", ["group:2", "rms"])
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_folded_computes_the_same(to: str, network: str) -> None:
    x = inputs(network).double()
    twin = nr.convert(start(to, network, torch.float64), to)
    folded, outcome, notes = fold(twin, [x])
    everywhere = offsets(twin)
    assert offsets(folded) == STAY[network] and worst(folded(x), twin(x)) < 1e-12
    count = f"{len(everywhere - STAY[network])} folded into the layer in front, {len(STAY[network])} stay"
    assert notes == [f"offsets in front of norms: {count} as a Mul and an Add"]
    assert not outcome.into_neighbour and not outcome.to_affine and offsets(twin) == everywhere
    layer = next(module for module in folded.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    with torch.no_grad():
        layer.weight.mul_(1.01)
    assert worst(folded(x), twin(x)) > 1e-5  # the comparison can fail


def test_a_tail_stays_behind_its_norm() -> None:
    twin = nr.convert(start("layer", "fused"), "layer")
    places = dict(FoldOffset().apply(twin)[0].named_modules())
    assert type(places["body.1"]) is StandIn and type(places["body.1.norm"]) is nn.GroupNorm and "body.1.act" in places
    assert type(places["body.3"]) is OffsetNorm


class Untraced(nn.Module):
    """torch.fx can't trace it, and so nobody knows who else reads the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if float(x.sum()) < 1e9 else x


def test_a_network_that_cannot_be_traced_keeps_them() -> None:
    twin, x = nr.convert(randomise(Untraced()).eval(), "layer"), torch.randn(2, 3, 4, 4)
    folded, _, notes = fold(twin)
    assert offsets(folded) == {"norm"} and torch.equal(folded(x), twin(x)) and "0 folded" in notes[0]


def test_half_keeps_its_dtype_and_parameters_learn_as_before() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval().requires_grad_(False)
    folded: Any = FoldOffset().apply(nr.convert(model.half(), "layer"))[0]
    assert {p.dtype for p in folded.parameters()} == {torch.float16} and type(folded[1]) is nn.GroupNorm
    assert not any(p.requires_grad for p in folded.parameters())


# --- a file that loads without normrewrite ------------------------------------------------------------------------------

AS_MADE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, bias=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=bias), norm(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, groups=2, bias=bias), norm(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))
"""


@pytest.mark.parametrize(("to", "groups"), [("layer", (1, 1)), ("group", (1, 2)), ("group:4", (4, 4))])
def test_a_folded_file_loads_into_plain_group_norms(tmp_path: Path, to: str, groups: tuple[int, int]) -> None:
    """Convolutions with a bias and torch.nn.GroupNorm at its defaults: nothing of normrewrite's, and no missing name."""
    (tmp_path / "net.py").write_text(AS_MADE)
    namespace: dict[str, Any] = {}
    exec(AS_MADE, namespace)
    model = randomise(namespace["Net"]()).eval()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    asked = Convert(model=tmp_path / "net.pt", arch=f"{tmp_path / 'net.py'}:Net", to=to, folded=True)
    written = convert(Source.of(asked), asked, quiet)
    assert "2 folded into the layer in front, 0 stay" in str(written)
    plain = namespace["Net"](lambda channels: nn.GroupNorm(groups[channels == 32], channels), bias=True)
    plain.load_state_dict(torch.load(tmp_path / f"net.{to.replace(':', '-')}.folded.pt", weights_only=True))
    x = torch.randn(4, 3, 9, 9)
    twin = nr.convert(model, to)
    torch.testing.assert_close(plain(x), twin(x), rtol=0, atol=2e-4)
    assert not torch.allclose(plain(1.05 * x), twin(x), rtol=0, atol=2e-4)


def test_what_stays_is_under_the_name_of_its_norm() -> None:
    twin = nr.convert(start("layer", "pre-activation"), "layer")
    state = plain_state(fold(twin)[0])
    assert {name for name in state if name.startswith("one.")} == {
        f"one.{n}" for n in ("scale", "offset", "weight", "bias")
    }
