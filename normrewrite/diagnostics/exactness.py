"""How far a rewritten site is from the norm it was, in eval, on random input of its own width.

>>> difference, error = measured((None, bn), (None, twin_norm), "", Probe())

difference: to the norm as it computes in its own dtype. error: to the same function in float64, a reference that has no part
of either form's arithmetic: so it tells what the twin itself rounds away.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.backends.families import statistics_dtype
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.passes.base import Pair
from normrewrite.passes.fold_affine import affine_of, tail_of
from normrewrite.sites import Norm
from normrewrite.sites.modes import evaluating
from normrewrite.sites.neighbours import is_layer
from normrewrite.sites.refusal import Refusal
from normrewrite.tolerances import SAME_FUNCTION, worst

_RANKS = {nn.BatchNorm1d: 2, nn.BatchNorm3d: 5, nn.InstanceNorm1d: 3, nn.InstanceNorm3d: 5}


class Probe:
    """Random input for any site, drawn once; torch's global random state stays as it is."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._noise = torch.empty(0, device="cpu")

    def input(self, norm: Any) -> Tensor:
        """(4, C, 1...) around the norm's running mean, in its dtype and on its device."""
        mean: Tensor = norm.running_mean
        need = 4 * mean.numel()
        if self._noise.numel() < need:
            self._noise = torch.randn(need, generator=self._generator, dtype=torch.float64, device="cpu")
        dtype = mean.dtype if norm.weight is None else norm.weight.dtype
        noise = self._noise[:need].view(4, -1).to(mean.device, mean.dtype)
        x: Tensor = (mean.detach() + _spread(norm) * noise).to(dtype)
        return x.view(4, -1, *(1,) * (_rank(norm) - 2))


def _spread(norm: Any) -> Any:
    if isinstance(norm, MeanOnlyBatchNorm):  # the weight in front has its scale
        return 1.0
    scale = getattr(norm, "running_scale", None)
    return norm.running_var.sqrt() if scale is None else scale


def _rank(norm: nn.Module) -> int:
    if isinstance(norm, MeanOnlyBatchNorm):
        return norm.rank or 4
    if isinstance(norm, BatchNorm):
        return min(norm.ranks) if norm.ranks else 4
    return next((rank for cls, rank in _RANKS.items() if isinstance(norm, cls)), 4)


def measured(
    old: Pair, new: Pair, inexact: str, probe: Probe, kind: Norm | Refusal | None = None
) -> tuple[float | None, float | None]:
    """(difference, error) of one site; None where there is nothing to compare.

    inexact: why eval can't be the same, if so. kind: of the old norm, where it was read.
    """
    if old[0] is not None and new[0] is not None:
        return _folded((old[0], old[1]), (new[0], new[1]))
    if inexact:
        return None, None
    if is_layer(old[1]):  # a layer that no norm stands behind
        return _folded((old[1], nn.Identity()), (new[1], nn.Identity()))
    return difference(old[1], new[1], probe), error(old[1], new[1], probe, kind)


@torch.no_grad()
def error(old: Any, new: nn.Module, probe: Probe, kind: Norm | Refusal | None = None) -> float | None:
    """Largest |new(x) - (a*x + b)| in eval, a and b by channel from old's tensors in float64; units as `difference`'s."""
    if getattr(old, "running_mean", None) is None or old.running_mean.is_meta:
        return None
    x = probe.input(old)
    a, b = (_by_channel(values, x.dim()) for values in affine_of(old, kind))
    expected, tail = a * x.double() + b, tail_of(old, kind)
    if tail is not None:
        expected = in_eval(deepcopy(tail).double(), expected)
    after = in_eval(new, x)
    gap = worst(after, expected)
    return gap if gap <= tolerance(old) else worst(after, expected, max(1.0, _offset(new)))


def _by_channel(values: Tensor, rank: int) -> Tensor:
    return values.view(1, -1, *(1,) * (rank - 2))


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
def _folded(old: tuple[nn.Module, nn.Module], new: tuple[nn.Module, nn.Module]) -> tuple[float, float]:
    """The same for a layer and the norm behind it, one after the other: the difference in float64, what the rewrite itself
    rounded away; the error as the new layer computes, in fp32 at least.

    On Gaussian input of the layer's width, just large enough for its kernel.
    """
    narrow = next(new[0].parameters()).dtype
    x = _layer_input(old[0]).to(narrow)
    before, after = (_in_turn(_copies(pair, torch.float64), x) for pair in (old, new))
    computed = _in_turn(_copies(new, statistics_dtype(narrow)), x)
    return worst(after, before), worst(computed, before)


def _copies(pair: tuple[nn.Module, nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    return deepcopy(pair[0]).cpu().to(dtype), deepcopy(pair[1]).cpu().to(dtype)


def _in_turn(pair: tuple[nn.Module, nn.Module], x: Tensor) -> Tensor:
    """The layer, then the norm, on x in the layer's dtype."""
    return in_eval(pair[1], in_eval(pair[0], x.to(next(pair[0].parameters()).dtype)))


def _layer_input(layer: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(layer, nn.Linear):
        return torch.randn(4, layer.in_features, generator=generator, dtype=torch.float64, device="cpu")
    sizes = [(size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(4, layer.in_channels, *sizes, generator=generator, dtype=torch.float64, device="cpu")


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
