"""SwapMetric: measure a batch norm's spread otherwise, without changing what it computes in eval.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          BatchNorm1d, 2d, 3d
after:   y = weight * (x - running_mean) / (running_scale + eps') + bias           metric l1, linf, topk:K, range
         with running_scale = sqrt(running_var + eps) - eps'

Eval computes the same function, to rounding. Training then measures C * S instead of the standard deviation, with C such
that both agree on Gaussian inputs. The parameters stay the same objects; the running variance travels in `origin`.
Between two of our own norms only the metric changes.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normrewrite.nn import batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import assemble, shallow
from normrewrite.norms import Gain, metric
from normrewrite.passes.base import Rewrite
from normrewrite.sites import Site

# The rank check tells the dimensions that a class stands for, also in subclasses that leave it alone.
_BY_RANK_CHECK = {
    nn.BatchNorm1d._check_input_dim: batch.BatchNorm1d,
    nn.BatchNorm2d._check_input_dim: batch.BatchNorm2d,
    nn.BatchNorm3d._check_input_dim: batch.BatchNorm3d,
}


class SwapMetric(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> SwapMetric(to="l1")(torch.fx.symbolic_trace(model)).modified
    True
    """

    def __init__(self, to: str = "l1", gain: Gain = "exact") -> None:
        self.to = metric(to)
        self.gain: Gain = gain

    def why_not(self, site: Site) -> str | None:
        old = site.module
        if self.to.native:
            return "RestoreNative is the pass for torch's own batch norm"
        if isinstance(old, BatchNorm):
            return f"is {old.metric} already" if (old.metric, old.gain) == (str(self.to), self.gain) else None
        return why_not_plain(old)

    def rewrite(self, site: Site) -> nn.Module:
        old = site.module
        if isinstance(old, BatchNorm):
            new: BatchNorm = shallow(old)
            new.metric, new.gain = str(self.to), self.gain
            new.origin = old.origin or Origin(old, {})
        else:
            assert isinstance(old, _BatchNorm)
            new = _from_native(old, str(self.to), self.gain)
        new.site = site.name
        return new


def why_not_plain(module: nn.Module) -> str | None:
    """Why `module` is no batch norm of torch's whose behaviour its tensors tell in full, or None."""
    kind = type(module).__name__
    if not isinstance(module, _BatchNorm):
        return f"{kind} is not one of torch.nn's batch norms"
    if is_parametrized(module):
        return "its parameters are parametrised; remove the parametrisation first"
    if any(tensor is not None and is_lazy(tensor) for tensor in (module.weight, module.running_mean)):
        return "is lazy and has no size yet; run the model on one batch first"
    if type(module).forward is not _BatchNorm.forward or "forward" in vars(module):
        return f"{kind} overrides forward, and may do more than normalise"
    return None


def _from_native(old: _BatchNorm, to: str, gain: Gain) -> BatchNorm:
    cls = _BY_RANK_CHECK.get(type(old)._check_input_dim, BatchNorm)
    buffers: dict[str, Tensor | None] = dict.fromkeys(("running_mean", "running_scale", "num_batches_tracked"))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    if old.running_mean is not None and old.running_var is not None:
        scale = (_wide(old.running_var) + old.eps).sqrt_() - old.eps
        buffers = {
            "running_mean": _wide(old.running_mean),
            "running_scale": scale,
            "num_batches_tracked": old.num_batches_tracked,
        }
        pairs["running_var"] = (old.running_var, scale)
    attributes = {
        name: getattr(old, name) for name in ("num_features", "eps", "momentum", "affine", "track_running_stats")
    }
    attributes |= {"metric": to, "gain": gain, "site": "", "origin": None}
    new: BatchNorm = assemble(cls, attributes, {"weight": old.weight, "bias": old.bias}, buffers)
    new.origin = Origin(old, pairs)
    return new


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(batch.statistics_dtype(values.dtype), copy=True)
