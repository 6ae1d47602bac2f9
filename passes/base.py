"""What every pass shares: one rule for one site, and the two drivers that carry it through a model.

A pass states which modules it `wants`, `why_not(site)` (a refusal, or None) and `rewrite(site)` (what takes the place of the
norm, and of the layer in front of it; pure, sees one site). One that folds a norm into that layer also has
`look(model, sites)`, which tells each site's neighbour. The tree driver `apply` walks any nn.Module. Called on a
torch.fx.GraphModule a pass is a torch.fx pass: it rewrites the graph module in place, as torch.fx passes do, and returns
PassResult. Modules that the graph module shares with the model it was traced from are never altered, only replaced.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from normrewrite import sites
from normrewrite.norms import Gain
from normrewrite.passes.lift_functional import LiftFunctional
from normrewrite.sites import Site, graph
from normrewrite.sites.fused import step_aside_
from normrewrite.sites.owners import why_owned
from normrewrite.sites.refusal import Refusal

Pair = tuple[nn.Module | None, nn.Module]  # the layer in front, where the rewrite changed that too, and the norm


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a norm and, where that changes too, of the layer in front of it."""

    norm: nn.Module
    layer: nn.Module | None = None


class Rewritten(NamedTuple):
    """A site that was rewritten: the layer before it, if that changed too, and the module that it got."""

    site: Site
    before: nn.Module | None
    norm: nn.Module


class Rewrite(ABC):
    """One rewrite of a model, usable alone, in a Plan, or in torch.fx's PassManager."""

    target = ""  # as people write it
    gain: Gain = "exact"

    def wants(self, module: nn.Module) -> bool:
        """Whether the module is a site of this pass at all, refused or not."""
        return sites.is_norm(module)

    def look(self, model: nn.Module, places: Sequence[Site]) -> list[Site]:
        """The sites with what has to be known of their surroundings."""
        return list(places)

    @abstractmethod
    def why_not(self, site: Site) -> Refusal | str | None:
        """The reason why this site must stay as it is, or None."""

    def refusal(self, site: Site) -> Refusal | None:
        """The same, or what stands around it forbids any rewrite."""
        return why_owned(site) or Refusal.of(self.why_not(site))

    def inexact(self, site: Site) -> str:
        """Why eval can't stay the same function here; empty where it does."""
        return ""

    def note(self, site: Site) -> str:
        """What people should know of this site's rewrite."""
        where = f"affine: {site.alone}" if site.alone else ""
        where = where if site.before is None else f"folded into {site.before.name}"
        reason = self.inexact(site)
        return "; ".join(part for part in (where, f"not exact: {reason}" if reason else "") if part)

    def halves(self, site: Site, before: nn.Module | None, new: nn.Module) -> tuple[Pair, Pair] | None:
        """What has to compute the same in eval: the layer in front, if it changes too, and the module, as they were and as they
        are; None where another site tells."""
        layer = None if before is None or site.before is None else site.before.module
        return (layer, site.module), (before, new)

    @abstractmethod
    def rewrite(self, site: Site) -> Replacement | nn.Module:
        """What takes the place of the site's norm, and of the layer before it where that changes too: a Replacement, or the
        one module. Alters nothing."""

    def replacement(self, site: Site) -> Replacement:
        """What `rewrite` gives, in one form: a bare module takes the norm's place alone."""
        before = getattr(self, "rewrite_before", None)  # of passes from before Replacement
        layer = None if before is None else before(site)
        new = self.rewrite(site)
        return new if isinstance(new, Replacement) else Replacement(new, layer)

    def settle(self, model: nn.Module, done: Sequence[Rewritten]) -> None:
        """What there is to do around the sites once they are rewritten: torch's fused layers read norms past their forward."""
        step_aside_(model, [norm for each in done for norm in (each.site.module, each.norm)])

    def apply(self, model: nn.Module, chosen: Iterable[Site] | None = None) -> tuple[nn.Module, list[Rewritten]]:
        """Tree driver, in place: rewrite the chosen sites, which must not be refused (all such, by default).

        Returns the model (a new root where the root itself was a norm) and each site with the layer before it, if that
        changed too, and the module it got.
        """
        if chosen is None:
            seen = self.look(model, sites.find(model, self.wants))
            chosen = [site for site in seen if self.refusal(site) is None]
        done = []
        for site in chosen:
            new = self.replacement(site)
            if new.layer is not None and site.before is not None:
                sites.replace(site.before, new.layer)
            sites.replace(site, new.norm)
            origin = sites.origin_of(new.norm)
            if origin is not None:
                origin.target, origin.gain, origin.inexact = self.target, self.gain, self.inexact(site)
            done.append(Rewritten(site, new.layer, new.norm))
            if site.module is model:
                model = new.norm
        self.settle(model, done)
        return model, done

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Graph driver: rewrite every site of the graph module that is not refused."""
        own_parents(graph_module, self.wants)
        lifted = LiftFunctional()(graph_module).modified
        _, done = self.apply(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, lifted or bool(done))


def own_parents(graph_module: GraphModule, wants: Callable[[nn.Module], bool]) -> None:
    """Give the graph module its own copy of every module that it calls whole and that holds wanted modules inside.

    A trace shares such a module (torch.nn's TransformerEncoderLayer, say) with the original, down to its children.
    """
    for node in graph_module.graph.nodes:
        module = graph.module_of(graph_module, node)
        if module is not None and any(site.name for site in sites.find(module, wants)):
            graph_module.set_submodule(str(node.target), _unshared(module))


def _unshared(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    new._modules = {
        key: child if child is None or not child._modules else _unshared(child)
        for key, child in module._modules.items()
    }
    return new
