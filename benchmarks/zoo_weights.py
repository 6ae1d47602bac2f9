"""Random weights for an architecture, and norm statistics near those of what reaches them.

>>> with no_random_init():
...     model = build().eval()
>>> randomise(model)
>>> with fitted_norms(model) as norms:
...     model(x)
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


def keeps_statistics(module: nn.Module) -> bool:
    tensors = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(tensor, Tensor) for tensor in tensors) and not isinstance(module, _InstanceNorm)


def flat(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs.detach()
        elif outputs.is_complex():
            yield torch.view_as_real(outputs.detach())
        return
    if isinstance(outputs, Mapping):
        items: list[object] = list(outputs.values())
    elif isinstance(outputs, list | tuple):
        items = list(outputs)
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        items = [getattr(outputs, field.name) for field in fields(outputs)]
    else:
        return
    for item in items:
        yield from flat(item)


@contextmanager
def no_random_init() -> Iterator[None]:
    """Constructors draw weights that are drawn again here, which is most of the time of a build, and of its memory."""
    names = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_")
    originals = {name: getattr(Tensor, name) for name in names}

    def skipping(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(self: Tensor, *args: Any, **named: Any) -> Tensor:
            skip = isinstance(self, nn.Parameter) and self.dim() >= 2  # smaller ones are not all drawn again
            return self if skip else original(self, *args, **named)

        return call

    torch.manual_seed(0)
    for name, original in originals.items():
        setattr(Tensor, name, skipping(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


@functools.cache
def _pool(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


class _Noise:
    """Normal numbers from a pool, as drawing them would take longer than running the network."""

    def __init__(self, size: int = 1 << 21) -> None:
        self._pool = _pool(size + 17)  # no power of two: rows of a weight must not repeat each other
        self._at = 0

    def like(self, tensor: Tensor) -> Tensor:
        need, parts = tensor.numel(), []
        while need:
            if self._at >= len(self._pool):
                self._at = 0
            part = self._pool[self._at : self._at + need]
            self._at, need = self._at + len(part), need - len(part)
            parts.append(part)
        return torch.cat(parts).view(tensor.shape) if parts else torch.zeros(tensor.shape)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep the size of what flows through; norm statistics come from the first run (`fitted_norms`)."""
    noise = _Noise()
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done and parameter.is_floating_point():
                _draw(module, name, parameter, noise)
                done.add(id(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point() and not buffer.isfinite().any():
            buffer.zero_()


def _draw(module: nn.Module, name: str, parameter: nn.Parameter, noise: _Noise) -> None:
    if parameter.dim() >= 2:
        fan_in = parameter.numel() // max(parameter.shape[0], 1)
        parameter.copy_(noise.like(parameter) * (1.3 / max(fan_in, 1) ** 0.5))
    elif parameter.dim() == 1 and "bias" in name:
        parameter.copy_(0.2 * noise.like(parameter).clamp(-3, 3))
    elif parameter.dim() == 1 and (isinstance(module, _NormBase) or name in ("weight", "gamma")):
        parameter.copy_(0.5 + 1.5 * (noise.like(parameter) / 2.5).sigmoid())
    elif not parameter.isfinite().all() or float(parameter.abs().max() if parameter.numel() else 0) > 1e3:
        parameter.copy_(0.5 * torch.ones_like(parameter))


class _Norms:
    """Forward hooks that give a norm statistics near, but not at, those of the first input that reaches it.

    Freely drawn ones would make a deep network blow up or die; these leave every channel up to 2.5 times its own spread
    off either way, with a mean off by a part of it, so that an error in any of them shows. Kept are the name of the norm
    that was called last, and its output.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.last: str | None = None
        self.output: list[Tensor] = []
        self._fitted: set[str] = set()
        self._noise = _Noise(1 << 16)

    def before(self, norm: Any, args: tuple[Any, ...]) -> None:
        x, mean, name = args[0] if args else None, norm.running_mean, self.names[norm]
        if name in self._fitted or not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != mean.numel():
            return
        self._fitted.add(name)
        var, at = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        spread = (var + 0.05 * var.mean() + 1e-4).clamp_max(1e12)
        mean.copy_(at + 0.3 * spread.sqrt() * self._noise.like(mean))
        norm.running_var.copy_(spread * (0.9 * self._noise.like(mean).clamp(-2, 2)).exp())

    def after(self, norm: nn.Module, _: object, output: object) -> None:
        self.last, self.output = self.names[norm], [tensor.clone() for tensor in flat(output)]


@contextmanager
def fitted_norms(model: nn.Module) -> Iterator[_Norms]:
    norms = _Norms({module: name for name, module in model.named_modules() if keeps_statistics(module)})
    handles = [norm.register_forward_pre_hook(norms.before) for norm in norms.names]
    handles += [norm.register_forward_hook(norms.after) for norm in norms.names]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
