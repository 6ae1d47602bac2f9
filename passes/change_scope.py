"""ChangeScope: statistics of each sample instead of the batch: group, layer, instance or RMS normalisation.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   y = weight * (x - m) / sqrt(v + eps) + bias      m, v of one sample's channel group: torch.nn.GroupNorm
         rms: m = 0, and v the mean square of the whole sample: nr.nn.GroupNorm(1, C, metric="l2", centred=False)

Statistics of a sample are no statistics of the data set, so eval is another function: weight and bias are copied, and
calibrate(data) fits them to what the original computes (normrewrite.diagnostics.least_squares). `instance` throws the mean of
each sample's channels away, and with it what many networks decide by.
"""

import math
from typing import Any, cast

from torch import Tensor, nn

from normrewrite.nn.origin import Origin
from normrewrite.nn.sample import GroupNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.passes.base import Rewrite
from normrewrite.sites import Site
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal


class ChangeScope(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> ChangeScope("group", 4)(torch.fx.symbolic_trace(model)).modified
    True

    groups: for `group`, the largest number of them that also divides the channels; 32 by default.
    """

    def __init__(self, scope: str, groups: int | None = None) -> None:
        self.scope = scope
        self.groups = groups
        self.target = scope if groups is None else f"{scope}:{groups}"

    def why_not(self, site: Site) -> Refusal | None:
        norm = site.native()
        return norm if isinstance(norm, Refusal) else None

    def inexact(self, site: Site) -> str:
        loss = "; it loses each sample's own channel means" if self.scope == "instance" else ""
        return f"statistics of each sample{loss}"

    def rewrite(self, site: Site) -> nn.Module:
        old, was = cast(Any, site.module), site.norm
        assert isinstance(was, Kind)
        norm = self._norm(old, was.eps)
        learned = {name: getattr(norm, name) for name in ("weight", "bias")}
        tail = {name: old._modules[name] for name in was.tail}
        new = StandIn(norm, tail) if tail else norm
        new.origin = Origin(old, {name: (getattr(old, name), value) for name, value in learned.items()}).keep(old)
        return new

    def _norm(self, old: Any, eps: float) -> Any:
        channels = len(old.running_mean) if old.running_mean is not None else old.num_features
        like = next((t for t in (old.weight, old.running_mean) if isinstance(t, Tensor)), None)
        options: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        if self.scope == "rms":
            norm: Any = GroupNorm(1, channels, eps, metric="l2", centred=False, **options)
        else:
            norm = nn.GroupNorm(self._groups(channels), channels, eps, **options)
        for name in ("weight", "bias"):
            value = getattr(old, name, None)
            if isinstance(value, Tensor):  # a frozen norm keeps buffers
                norm._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone())
        return norm

    def _groups(self, channels: int) -> int:
        return {"layer": 1, "instance": channels}.get(self.scope, math.gcd(self.groups or 32, channels))
