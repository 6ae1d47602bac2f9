"""SwapMetric: measure a batch norm's spread otherwise, without changing what it computes in eval.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   y = weight * (x - running_mean) / (running_scale + eps') + bias           metric l1, linf, topk:K, range
         with running_scale = sqrt(running_var + eps) - eps'

Eval computes the same function, to rounding. Training then measures C * S instead of the standard deviation, with C such
that both agree on Gaussian inputs. The parameters stay the same objects; the running variance travels in `origin`.
Between two of our own norms only the metric changes. Norms within a sample are rewritten where `scopes` names theirs:
swap_sample.py.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from normrewrite.backends.families import statistics_dtype
from normrewrite.errors import NormRewriteError, nearest
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import assemble, attributes, shallow
from normrewrite.norms import Gain, metric, require_gain
from normrewrite.passes import swap_sample
from normrewrite.passes.base import Rewrite
from normrewrite.sites import Site, is_norm, is_sample_norm
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SAMPLE_SCOPES, SampleKind

SCOPES = ("batch", *SAMPLE_SCOPES)


class SwapMetric(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> SwapMetric(to="l1")(torch.fx.symbolic_trace(model)).modified
    True

    scopes: which norms, of `batch`, `layer`, `group`, `instance` and `rms`.
    """

    def __init__(self, to: str = "l1", gain: Gain = "exact", scopes: Sequence[str] = ("batch",)) -> None:
        require_gain(gain)
        self.to = metric(to)
        self.gain: Gain = gain
        self.target = str(self.to)
        self.scopes = tuple(scopes)
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown:
            raise NormRewriteError(
                f"unknown scope {unknown[0]!r}.{nearest(unknown[0], SCOPES)} Known: {', '.join(SCOPES)}, all."
            )

    def wants(self, module: nn.Module) -> bool:
        return ("batch" in self.scopes and is_norm(module)) or (self.scopes != ("batch",) and is_sample_norm(module))

    def inexact(self, site: Site) -> str:
        tracked = getattr(site.module, "running_mean", None) is not None
        return "" if tracked or not is_sample_norm(site.module) else "another metric on statistics of each sample"

    def why_not(self, site: Site) -> Refusal | None:
        if self.to.native:
            return Refusal("RestoreNative is the pass for torch's own norms")
        norm = site.norm
        if isinstance(norm, Refusal):
            return norm
        if norm.scope not in self.scopes:
            return Refusal(f"its scope is {norm.scope}, and {', '.join(self.scopes)} is asked for")
        if norm.ours and (norm.metric, norm.gain) == (str(self.to), self.gain):
            return Refusal(f"is {norm.metric} already")
        return swap_sample.why_too_short(norm, self.to) if isinstance(norm, SampleKind) else None

    def rewrite(self, site: Site) -> nn.Module:
        old, norm = site.module, site.norm
        assert not isinstance(norm, Refusal)
        if isinstance(norm, SampleKind):
            new: Any = swap_sample.rewrite(old, norm, self.to, self.gain)
        elif norm.ours:
            new = shallow(old)
            new.metric, new.gain = str(self.to), self.gain
            new.origin = new.origin or Origin(old, {})
        else:
            new = from_native(old, norm, str(self.to), self.gain)
        new.site = site.name
        return new  # type: ignore[no-any-return]


def from_native(old: Any, kind: Kind, to: str, gain: Gain) -> BatchNorm:
    """One of our batch norms, of `kind.cls`, with the tensors of one that is not ours."""
    mean, var = old.running_mean, old.running_var
    buffers: dict[str, Tensor | None] = {"running_mean": None, "running_scale": None, "num_batches_tracked": None}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    if mean is not None and var is not None:
        scale = (_wide(var) + kind.eps).sqrt_() - kind.eps
        counted = getattr(old, "num_batches_tracked", None)
        buffers = {"running_mean": _wide(mean), "running_scale": scale, "num_batches_tracked": counted}
        pairs["running_var"] = (var, scale)
    parameters: dict[str, nn.Parameter | None] = {"weight": None, "bias": None}
    for name in parameters.keys() & old._buffers.keys():  # frozen ones
        buffers[name] = old._buffers[name]
        del parameters[name]
    parameters |= {name: value for name, value in old._parameters.items() if name in parameters}
    new: BatchNorm = assemble(kind.cls, _attributes(old, kind, to, gain), parameters, buffers)
    new._modules.update(old._modules)
    new.origin = Origin(old, pairs)
    return new


def _attributes(old: Any, kind: Kind, to: str, gain: Gain) -> dict[str, Any]:
    ours = {
        "num_features": len(old.running_mean) if old.running_mean is not None else old.num_features,
        "eps": kind.eps,
        "momentum": getattr(old, "momentum", 0.0),
        "affine": getattr(old, "weight", None) is not None,
        "track_running_stats": getattr(old, "track_running_stats", True),
        "metric": to,
        "gain": gain,
        "site": "",
        "origin": None,
        "tail": kind.tail,
        "synchronised": isinstance(old, nn.SyncBatchNorm),
        "process_group": getattr(old, "process_group", None),
    }
    if kind.ranks != kind.cls.ranks:
        ours["ranks"] = kind.ranks
    return attributes(old) | ours


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(statistics_dtype(values.dtype), copy=True)
