"""Bias correction: what changed weights have shifted, taken back by channel; no labels, no training.

>>> print(correct_biases_(rounded, original, images))

Module by module, in the order of execution: where W became W', the output's mean by channel is moved by E[W'x' - Wx], and

    bias <- bias + E[original's output] - E[output]

takes that back. Later modules see what the corrected ones before them give, so that each mean equals the original's in the
end. Whatever adds a bias takes part: a layer without one leaves its shift to the norm behind it. Nagel et al.,
arXiv:1906.04721, section 4.2; the expectations are measured on data.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normrewrite import sites
from normrewrite.data import Data, argument_names, as_data, check_finite
from normrewrite.diagnostics.training_mode import outputs, relative_difference
from normrewrite.errors import NormRewriteError
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import shallow
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.options.fields import options, takes
from normrewrite.options.groups import BatchSize
from normrewrite.passes.fold_affine import as_affine
from normrewrite.results import Result, Summary, Table, shortened
from normrewrite.sites.kinds import Kind
from normrewrite.sites.undo import undone_on_error

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass(frozen=True)
class CorrectedBias:
    """One module. before, after: how far its output's mean was and is from the original's, largest channel, in units of the
    original's standard deviation there."""

    name: str
    channels: int
    before: float
    after: float


@dataclass
class BiasCorrection(Result):
    """The modules in the order in which they ran, and why others were left. outputs: of the network, their relative difference
    from the original's, before and after."""

    corrected: list[CorrectedBias]
    outputs: tuple[float, float]
    inputs: int
    left: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        count = f"{len(self.corrected)} biases corrected on {self.inputs} inputs"
        lines = [(each.name, str(each.channels), f"{each.before:.3f}", f"{each.after:.1e}") for each in self.corrected]
        table = Table(("module", "channels", "largest shift of a mean", "corrected"), lines)
        distance = "outputs, relative difference from the original's {:.3f}, corrected {:.3f}".format(*self.outputs)
        return [count, table, distance, *map(self._left, dict.fromkeys(self.left.values()))]

    def _left(self, why: str) -> str:
        names = [name for name, reason in self.left.items() if reason == why]
        return f"{shortened(names)}: {why}"


@options
class CorrectCall(BatchSize):
    """What `correct_biases_` takes in Python."""

    model: nn.Module = field(kw_only=False)
    original: nn.Module = field(kw_only=False)
    data: Tensor | Data | Iterable[Any] = field(kw_only=False)


@takes(CorrectCall)
def correct_biases_(options: CorrectCall) -> BiasCorrection:
    """Bring the mean of each module's output, by channel, back to the original's, in place; weights stay as they are.

    >>> correct_biases_(nr.convert(model, to="bwn:strict"), model, images).outputs
    (0.61, 0.34)

    model: the original with other weights: rounded, pruned, trained apart, or a twin of it, also one with its norms folded
    away. What has no bias gets none, so that files still fit their architecture; a module that is called several times is
    corrected by its first call. A twin gives back the nearest afterwards, and not the original's bits.
    data: (N, ...) inputs, Data, or batches; the first `batch_size` are used, all at once; labels are not.
    Raises NormRewriteError where no module has a bias to correct, or a network can't run on the data: nothing is changed then.
    """
    model, original = options.model, options.original
    batch = as_data(options.data, argument_names(model)).first(options.batch_size)
    check_finite(batch, "the data")
    pairs, left = _pairs(model, original)
    means: dict[str, tuple[Tensor, Tensor]] = {}
    corrected: dict[str, CorrectedBias] = {}
    with _watched({pair.target: _reader(pair, means) for pair in pairs}):
        expected = outputs(original, [batch])
    before = outputs(model, [batch])
    with undone_on_error(model), _watched({pair.module: _corrector(pair, means, corrected) for pair in pairs}):
        after = outputs(model, [batch])
    if not corrected:
        raise NormRewriteError(
            f"{type(model).__name__} has no bias that the original has, too: there is nothing to correct."
        )
    left |= {pair.name: "not reached by the data" for pair in pairs if pair.name not in corrected}
    distance = relative_difference(before, expected), relative_difference(after, expected)
    return BiasCorrection(list(corrected.values()), distance, len(batch), left)


# --- which module is whose --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A module with a bias, and the original's that computes the same."""

    name: str
    module: Any
    target: nn.Module
    kinds: dict[nn.Module, Kind]  # of the two, where that is a norm which applies an activation itself


def _pairs(model: nn.Module, original: nn.Module) -> tuple[list[_Pair], dict[str, str]]:
    """Also why others are left, by name."""
    theirs, shared = sites.by_name(original), sites.shared_parameters(model)
    halves = {name: module for name, module in model.named_modules() if isinstance(module, StandIn | MeanOnlyBatchNorm)}
    places = {id(layer): (name, place) for name, place in halves.items() for layer in place.layer}
    pairs, left = list[_Pair](), dict[str, str]()
    for name, module in model.named_modules():
        if not _adds_a_bias(module):
            continue
        place, holder = places.get(id(module), (name, None))
        target = theirs.get(place, theirs.get(name.removesuffix(".norm")))
        bias = getattr(module, "bias", None)
        if bias is None:
            left[name] = "without a bias: a norm behind takes the shift, where there is one"
        elif id(bias) in shared:
            left[name] = "its bias is another module's, too"
        elif holder is not None and not isinstance(holder, StandIn):
            left[name] = "has a part of the norm behind it, which takes its shift"
        elif target is None:
            left[name] = "the original has no module of that name"
        else:
            pairs.append(_Pair(name, module, target, _tailed(module) | _tailed(target)))
    return pairs, left


def _tailed(module: Any) -> dict[nn.Module, Kind]:
    """Read before anything watches the module: reading may run it."""
    kind = sites.read(module) if sites.is_norm(module) and module.running_mean is not None else None
    return {module: kind} if isinstance(kind, Kind) and kind.tail else {}


def _adds_a_bias(module: nn.Module) -> bool:
    layers = _ConvNd, nn.Linear, ChannelAffine, MeanOnlyBatchNorm
    within_a_sample = RowNorm, nn.GroupNorm, nn.LayerNorm, _InstanceNorm
    return isinstance(module, (*layers, *within_a_sample)) or sites.is_norm(module)


# --- one module -------------------------------------------------------------------------------------------------------


@contextmanager
def _watched(hooks: dict[nn.Module, Hook]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, prepend=True, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reader(pair: _Pair, means: dict[str, tuple[Tensor, Tensor]]) -> Hook:
    """Keeps mean and variance of the original's output, by channel."""

    def read(target: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if pair.name not in means:
            means[pair.name] = _moments(pair, _without_tail(pair, target, arguments, named, output))

    return read


def _corrector(pair: _Pair, means: dict[str, tuple[Tensor, Tensor]], corrected: dict[str, CorrectedBias]) -> Hook:
    """Corrects the bias in the module's first call, which returns what it gives with that."""

    def correct(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
        if pair.name in corrected or pair.name not in means:
            return None
        wanted, variance = means[pair.name]
        mean, _ = _moments(pair, _without_tail(pair, module, arguments, named, output))
        if mean.shape != wanted.shape:
            raise NormRewriteError(f"{pair.name}: {len(mean)} channels, and the original has {len(wanted)} there.")
        bias, shift = module.bias, torch.where((wanted - mean).isfinite(), wanted - mean, 0)
        bias.data = (bias.double() + shift.view_as(bias)).to(bias.dtype)
        _mark(module)
        now: Tensor = module.forward(*arguments, **named)
        left = wanted - _moments(pair, _without_tail(pair, module, arguments, named, now))[0]
        unit = float(variance.mean().sqrt()) or 1.0
        worst = [float(each.abs().max()) / unit for each in (wanted - mean, left)]
        corrected[pair.name] = CorrectedBias(pair.name, len(mean), *worst)
        return now

    return correct


def _mark(module: nn.Module) -> None:
    """A batch norm keeps no copy of its bias by which its origin could tell that it isn't the original's any more."""
    if isinstance(module, BatchNorm) and module.origin is not None:
        module.origin.trained.data = torch.ones_like(module.origin.trained)


def _moments(pair: _Pair, output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all that one element of the bias is added to, flat, float64."""
    dims = _sharing(pair.module, output.dim())
    variance, mean = torch.var_mean(output.detach().double(), dims, correction=0)
    return mean.flatten().to(pair.module.bias.device), variance.flatten()


def _sharing(module: Any, rank: int) -> list[int]:
    if isinstance(module, nn.Linear):
        return list(range(rank - 1))
    if hasattr(module, "normalized_shape") and not getattr(module, "channels_first", False):
        return list(range(rank - len(module.normalized_shape)))
    channels = rank - 1 - len(module.kernel_size) if isinstance(module, _ConvNd) else 1  # without a batch, too
    return [dim for dim in range(rank) if dim != channels]


def _without_tail(
    pair: _Pair, module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor
) -> Tensor:
    """The output, before the activation that some norms apply themselves: a bias doesn't move what is behind it by as much."""
    if module in pair.kinds:
        return as_affine(module, pair.kinds[module])(*arguments, **named)  # type: ignore[no-any-return]
    if not isinstance(module, StandIn | ChannelAffine | MeanOnlyBatchNorm) or not module.tail:
        return output
    bare = shallow(module)
    bare.tail = ()
    return bare.forward(*arguments, **named)  # type: ignore[no-any-return]
