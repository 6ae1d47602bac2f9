"""Data-dependent initialisation of weight norms: Salimans & Kingma, arXiv:1602.07868, section 3.

>>> print(initialise_(model, images))                          # no labels; one forward pass

Layer by layer, in the order of execution, the output t of every weight-normalised layer is standardised by channel:
g <- g / std[t], bias <- (bias - mean[t]) / std[t]. Later layers see what the initialised layers before them give.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normrewrite.backends.families import wide
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.nn.weights import WeightNorm, gain_of, weight_norm_of
from normrewrite.results import Result, Summary, Table

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class InitialisedLayer:
    """One layer. std: of its output before, (N,), fp32 or float64; left: channels that were dead or not finite."""

    name: str
    std: Tensor
    left: int


@dataclass(frozen=True)
class Initialisation(Result):
    """The layers in the order in which they ran, and the names of those that the batch did not reach."""

    layers: list[InitialisedLayer]
    unreached: list[str]

    def as_dict(self) -> dict[str, Any]:
        layers = [{"name": layer.name, "std": layer.std.tolist(), "left": layer.left} for layer in self.layers]
        return {"initialised": layers, "unreached": self.unreached}

    def summary(self) -> Summary:
        lines = [
            (layer.name, f"{layer.std.median():.3g} ({layer.std.min():.3g}, {layer.std.max():.3g})", _left(layer))
            for layer in self.layers
        ]
        unreached = [f"not reached by the batch: {', '.join(self.unreached)}"] if self.unreached else []
        table = Table(("layer", "std before (smallest, largest)", "left"), lines)
        return [f"{len(lines)} layers initialised", table, *unreached]


def _left(layer: InitialisedLayer) -> str:
    return f"{layer.left}/{len(layer.std)} channels" if layer.left else ""


@torch.no_grad()
def initialise_(model: nn.Module, data_batch: Batch) -> Initialisation:
    """Standardise the outputs of the model's weight-normalised layers, in place, by one forward pass.

    >>> initialise_(model.train(), images).layers[0].std

    data_batch: forward's argument, a tuple of its arguments, or a dict of them by name, of any dtype that it takes.
    The pass runs in the mode that each module is in: train() is what a fresh model wants, whose running statistics say
    nothing yet. Buffers of other modules and the random state come back as they were. Of a bounded layer the gains'
    direction and rho are set, and rho stays from then on. A layer without bias is scaled, not centred; one that is called
    several times is set by its first call; a channel that is constant on the batch is left. Strict layers have no gain.
    Raises NormRewriteError where no layer has a gain, or the model can't run on the batch.
    """
    layers = {name: layer for name, layer in model.named_modules() if gain_of(layer) is not None}
    if not layers:
        raise NormRewriteError(
            f"{type(model).__name__} holds no weight norm with a gain. Convert it first, to wn or bwn."
        )
    done: dict[str, InitialisedLayer] = {}
    hooks = [layer.register_forward_hook(_hook(name, done), prepend=True) for name, layer in layers.items()]
    try:
        with _nothing_else_moves(model):
            _run(model, data_batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Initialisation(list(done.values()), [name for name in layers if name not in done])


def _hook(name: str, done: dict[str, InitialisedLayer]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def initialise(layer: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        if name in done:
            return None
        standardised, done[name] = _standardise(name, layer, output)
        return standardised

    return initialise


def _standardise(name: str, layer: Any, output: Tensor) -> tuple[Tensor, InitialisedLayer]:
    """Sets gain, rho and bias of the layer; its output with them."""
    norm, gain = weight_norm_of(layer), gain_of(layer)
    assert norm is not None and gain is not None
    t, axis = wide(output), _channel_axis(layer, output)
    std, mean = torch.std_mean(t.movedim(axis, 0).flatten(1), 1, correction=0)
    alive = torch.isfinite(std) & (std > 1e-6 * mean.abs() + 1e-12)  # else constant, to the rounding of fp32
    factor = torch.where(alive, 1 / std, 1)
    centre = torch.zeros_like(mean) if layer.bias is None else torch.where(alive, mean, 0)
    gain.copy_(norm.gains(norm.norms(gain) * factor))
    if layer.bias is not None:
        layer.bias.copy_((wide(layer.bias) - centre) * factor)
    standardised = ((t.movedim(axis, -1) - centre) * factor).movedim(-1, axis)
    return standardised.to(output.dtype), InitialisedLayer(name, std, int((~alive).sum()))


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    """Convolutions take inputs without a batch dimension as well."""
    return output.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)


@contextmanager
def _nothing_else_moves(model: nn.Module) -> Iterator[None]:
    """Random state and buffers come back, but for those of weight norms; statistics may live on any other module."""
    others = [module for module in model.modules() if not isinstance(module, WeightNorm)]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in others
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    gpus = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer.copy_(before)


def _run(model: nn.Module, batch: Batch) -> None:
    """On copies: the model may work in place."""
    try:
        if isinstance(batch, Mapping):
            model(**{name: _copied(value) for name, value in batch.items()})
        else:
            model(*map(_copied, batch if isinstance(batch, tuple) else (batch,)))
    except Exception as error:  # the model's code runs here, and may raise anything
        raise NormRewriteError(f"the model can't run on this batch: {first_line(error)}") from error


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
