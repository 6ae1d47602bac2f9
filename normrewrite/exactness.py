"""How far a rewritten site is from the norm it was, in eval, on random input of its own width."""

from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.modes import evaluating
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.tolerances import SAME_FUNCTION, worst

_RANKS = {nn.BatchNorm1d: 2, nn.BatchNorm3d: 5, nn.InstanceNorm1d: 3, nn.InstanceNorm3d: 5}


class Probe:
    """Random input for any site, drawn once; torch's global random state stays as it is."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._noise = torch.empty(0)

    def input(self, norm: Any) -> Tensor:
        """(4, C, 1...) around the norm's running mean, in its dtype and on its device."""
        mean: Tensor = norm.running_mean
        need = 4 * mean.numel()
        if self._noise.numel() < need:
            self._noise = torch.randn(need, generator=self._generator, dtype=torch.float64)
        dtype = mean.dtype if norm.weight is None else norm.weight.dtype
        spread: Any = getattr(norm, "running_scale", None)
        spread = norm.running_var.sqrt() if spread is None else spread
        noise = self._noise[:need].view(4, -1).to(mean.device, mean.dtype)
        x: Tensor = (mean.detach() + spread * noise).to(dtype)
        return x.view(4, -1, *(1,) * (_rank(norm) - 2))


def _rank(norm: nn.Module) -> int:
    if isinstance(norm, BatchNorm):
        return min(norm.ranks) if norm.ranks else 4
    return next((rank for cls, rank in _RANKS.items() if isinstance(norm, cls)), 4)


@torch.no_grad()
def difference(old: Any, new: nn.Module, probe: Probe) -> float | None:
    """Largest |new(x) - old(x)| in eval, in units of max(1, largest |old(x)|, largest |weight * mean / scale|).

    The last is what both forms subtract to reach y: where a mean is many times its scale, rounding is relative to that.
    None where there is nothing to compare: no running statistics (live ones differ by intent), or tensors on `meta`.
    """
    if getattr(old, "running_mean", None) is None or old.running_mean.is_meta:
        return None
    x = probe.input(old)
    after, before = in_eval(new, x), in_eval(old, x)
    gap = worst(after, before)
    if gap <= tolerance(old):
        return gap
    return worst(after, before, max(1.0, _offset(new if isinstance(new, BatchNorm) else old)))


@torch.no_grad()
def folded_difference(old: tuple[nn.Module, nn.Module], new: tuple[nn.Module, nn.Module]) -> float:
    """The same for a layer and the norm behind it, one after the other, in float64: what the rewrite itself rounded away.

    On Gaussian input of the layer's width, just large enough for its kernel.
    """
    x = _layer_input(old[0])
    pairs = [[deepcopy(module).cpu().double() for module in pair] for pair in (old, new)]
    before, after = (in_eval(norm, in_eval(layer, x)) for layer, norm in pairs)
    return worst(after, before)


def _layer_input(layer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        return torch.randn(4, layer.in_features, generator=generator, dtype=torch.float64)
    sizes = [(size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(4, layer.in_channels, *sizes, generator=generator, dtype=torch.float64)


def _offset(norm: Any) -> float:
    """Largest |weight * mean / scale| of one of our norms; 0 for others."""
    if not isinstance(norm, BatchNorm) or norm.running_scale is None or norm.running_mean is None:
        return 0.0
    offset = norm.running_mean.double() / (norm.running_scale + norm.eps).double()
    offset = (offset if norm.weight is None else offset * norm.weight.double()).abs()
    return float(offset[offset.isfinite()].max()) if offset.isfinite().any() else 0.0


def in_eval(norm: nn.Module, x: Tensor) -> Tensor:
    """The bare function of the norm: no hooks, no updates."""
    if not norm.training and all(not child.training for child in norm._modules.values() if child is not None):
        return norm.forward(x)  # type: ignore[no-any-return]
    with evaluating(norm):
        return norm.forward(x)  # type: ignore[no-any-return]


def tolerance(norm: nn.Module) -> float:
    """What `difference` may be for this norm's dtype."""
    weight = norm.weight if isinstance(norm.weight, Tensor) else norm.running_mean
    return SAME_FUNCTION[weight.dtype] if isinstance(weight, Tensor) else SAME_FUNCTION[torch.float32]
