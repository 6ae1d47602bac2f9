"""FoldOffset: the affine in front of a norm within a sample folds into the layer in front.

before:  conv -> OffsetNorm    conv with weight W, bias c; y = norm(a * x + t)
after:   conv' -> norm         W' = a * W by output channel, c' = a * c + t; torch's own classes, as people write them

Where no layer in front may be changed (normrewrite.sites.neighbours says why) one Mul and one Add stay. For deployment: what the
norm was is no longer known.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from normrewrite.nn.offset import OffsetNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.passes.base import Replacement, Rewrite
from normrewrite.passes.fold_affine import into_previous
from normrewrite.sites import Site, neighbours


class FoldOffset(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> FoldOffset().apply(twin)
    """

    def __init__(self, example_inputs: Sequence[Tensor] | None = None) -> None:
        self.example_inputs = example_inputs

    def wants(self, module: nn.Module) -> bool:
        return isinstance(module, OffsetNorm)

    def look(self, model: nn.Module, places: Sequence[Site]) -> list[Site]:
        return neighbours.attach(model, places, self.example_inputs) if places else []

    def why_not(self, site: Site) -> str | None:
        return site.alone or None

    def rewrite(self, site: Site) -> Replacement:
        old = site.module
        assert isinstance(old, OffsetNorm) and site.before is not None
        affine = old.scale.detach().double(), old.offset.detach().double()
        layer = into_previous(site.before.module, affine, old.norm)
        tail = {name: old.get_submodule(name) for name in old.tail}
        if not tail:
            return Replacement(old.norm, layer)
        return Replacement(StandIn(old.norm, tail), layer)
