"""What every pass shares: one rule for one site, and the two drivers that carry it through a model.

A pass states `why_not(site)` (a refusal, or None) and `rewrite(site)` (the new module; pure, sees one site). The tree
driver `apply` walks any nn.Module. Called on a torch.fx.GraphModule a pass is a torch.fx pass: it rewrites the graph
module in place, as torch.fx passes do, and returns PassResult. Modules that the graph module shares with the model it
was traced from are never altered, only replaced.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from normrewrite import graph, sites
from normrewrite.fused import step_aside_
from normrewrite.nn.rows import RowNorm
from normrewrite.passes.lift_functional import LiftFunctional
from normrewrite.sites import Site


class Rewrite(ABC):
    """One rewrite of a model, usable alone, in a Plan, or in torch.fx's PassManager."""

    @abstractmethod
    def why_not(self, site: Site) -> str | None:
        """The reason why this site must stay as it is, or None."""

    @abstractmethod
    def rewrite(self, site: Site) -> nn.Module:
        """The module that takes the site's place. Alters nothing."""

    def wanted(self, module: nn.Module) -> bool:
        """Whether a module is a site of this pass; it may be refused."""
        return sites.is_norm(module)

    def apply(
        self, model: nn.Module, chosen: Iterable[Site] | None = None
    ) -> tuple[nn.Module, list[tuple[Site, nn.Module]]]:
        """Tree driver, in place: rewrite the chosen sites, which must not be refused (all such, by default).

        Returns the model (a new root where the root itself was a norm) and each site with the module it got.
        """
        if chosen is None:
            chosen = [site for site in sites.find(model, self.wanted) if self.why_not(site) is None]
        done = []
        for site in chosen:
            new = sites.replace(site, self.rewrite(site))
            done.append((site, new))
            if site.module is model:
                model = new
        if any(isinstance(norm, RowNorm) for site, new in done for norm in (site.module, new)):
            step_aside_(model)
        return model, done

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Graph driver: rewrite every site of the graph module that is not refused."""
        own_parents(graph_module, self.wanted)
        lifted = LiftFunctional()(graph_module).modified
        _, done = self.apply(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, lifted or bool(done))


def own_parents(graph_module: GraphModule, wanted: Callable[[nn.Module], bool] = sites.is_norm) -> None:
    """Give the graph module its own copy of every module that it calls whole and that holds norms inside.

    A trace shares such a module (torch.nn's TransformerEncoderLayer, say) with the original, down to its children.
    """
    for node in graph_module.graph.nodes:
        module = graph.module_of(graph_module, node)
        if module is not None and any(site.name for site in sites.find(module, wanted)):
            graph_module.set_submodule(str(node.target), _unshared(module))


def _unshared(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    new._modules = {
        key: child if child is None or not child._modules else _unshared(child)
        for key, child in module._modules.items()
    }
    return new
