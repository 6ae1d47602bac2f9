"""ChangeClass: what Freeze and Renormalise share. A batch norm of torch's becomes one of our classes, measured as it was.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   the same in eval; training is the class's own
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import nn

from normrewrite.nn.batch import BatchNorm
from normrewrite.passes.base import Rewrite
from normrewrite.passes.swap_metric import from_native
from normrewrite.sites import Site
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal


class ChangeClass(Rewrite):
    """The base of both; `cls` is the class, and needs running statistics that training may move."""

    cls: type[BatchNorm]

    def why_not(self, site: Site) -> Refusal | None:
        norm = site.native(tracked=True, frozen=False)
        return norm if isinstance(norm, Refusal) else None

    def rewrite(self, site: Site) -> nn.Module:
        assert isinstance(site.norm, Kind)
        new = from_native(site.module, replace(site.norm, cls=self.cls), "l2", "exact")
        new.site = site.name
        self.finish(site.module, new)
        return new

    @abstractmethod
    def finish(self, old: Any, new: BatchNorm) -> None:
        """What the class has beside a batch norm's attributes."""
