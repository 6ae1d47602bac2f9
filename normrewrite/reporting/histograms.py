"""How the inputs of each site are spread: counts of (x - mean) / scale, all channels together, in bins of one width.

>>> counted = Counter()
>>> study(model, data, watch=counted.watch)
>>> counted.by_site["bn1"].share()
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normrewrite.passes.fold_affine import scale_of
from normrewrite.sites import Site

BINS = 48
REACH = 4.8  # scales either side; what is further counts at the ends


@dataclass
class Histogram:
    """counts: (BINS,) of elements between -REACH and REACH scales from the mean, those beyond in the outermost bins."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def share(self) -> list[float]:
        """Of all elements, by bin."""
        total = float(self.counts.sum())
        return [count / total for count in self.counts.tolist()] if total else []


def gaussian() -> list[float]:
    """What a Gaussian would have in each bin."""
    edges = [REACH * (2 * i / BINS - 1) for i in range(BINS + 1)]
    below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    below[0], below[-1] = 0.0, 1.0
    return [b - a for a, b in itertools.pairwise(below)]


class Counter:
    """Histograms by site name, filled by `watch` (normrewrite.diagnostics.moments.Watch)."""

    def __init__(self) -> None:
        self.by_site: dict[str, Histogram] = {}

    def watch(self, site: Site, x: Tensor) -> None:
        """Count one input (N, C, *) by the site's running statistics; live channels alone. Without those there is no measure."""
        norm: Any = site.module
        scale = scale_of(norm)
        if scale is None:
            return
        live = scale > 1e-12
        if not bool(live.any()):
            return
        shape = (1, -1, *(1,) * (x.dim() - 2))
        mean, width = norm.running_mean[live].float(), scale[live].float()
        z = (x.detach()[:, live].float() - mean.view(shape)) / width.view(shape)
        z = z.clamp(-REACH * (1 - 1e-6), REACH * (1 - 1e-6))
        counts = torch.histc(z, BINS, -REACH, REACH).cpu().double()
        self.by_site.setdefault(site.name, Histogram()).counts += counts
