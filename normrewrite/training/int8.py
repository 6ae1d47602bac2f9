"""A network that computes on 8 bits for a while: every convolution, linear layer and residual add inside a `with`.

>>> with int8(model) as quantised:
...     train(model)                                              # quantisation-aware; eval runs on the ranges learned
>>> export(model, example_inputs, "model.onnx", precision="int8", learned=quantised.ranges)

The model stays what it is, with the same classes, names and fp32 weights. Products are caught where torch computes them, so
that what counts is the tensor that a product reads, as in an ONNX file: behind a layer's own padding, in a subclass, in a
forward that calls F.conv2d itself. Norms and parametrised weights are computed as ever. A deep copy made inside (averaged
weights, say) runs on the same ranges. Not caught: what torch runs as a whole, as its attention does.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from normrewrite import sites
from normrewrite.errors import NormRewriteError, nearest, some
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.norms import metric as row_of
from normrewrite.options.finetune import RangesBy
from normrewrite.provenance.ranges import SIDES, LearnedRanges, called, check
from normrewrite.training.descent import Descent
from normrewrite.training.products import (
    SIMULATED,
    Convolution,
    Products,
    product,
    reach,
    rounded,
    scale_of,
    usual_reach,
)

MOMENTUM = 0.05  # of a batch in the range of an activation
ENDS = ("first", "last")


@contextmanager
def int8(
    model: nn.Module,
    *,
    ranges: LearnedRanges | None = None,
    keep: Sequence[str] = (),
    gradients: bool = False,
    by: RangesBy = "percentile",
    products: Products = SIMULATED,
) -> Iterator["Int8"]:
    """`model` on 8 bits inside the `with`: weights by output channel, activations by tensor, all symmetric.

    In training each range follows how far its activation reaches, the 99.99th percentile of |x| as in calibration, by a
    moving average (0.05), over all processes; in eval ranges stand still. ranges: to start from, with what they kept. keep:
    modules left in floating point, by name or glob, or `first` and `last`, the first and last layer in the order of their
    definition. gradients: 8-bit gradients too, rounded by torch's generator. by: `gradient` lets ranges follow the loss's
    own gradient instead, from the first batch's percentile on; `quantised.step()` then stands beside `optimizer.step()`.
    products: who computes. Raises NormRewriteError where there is no layer, or a name matches none.
    """
    mode = Int8(model, ranges, [*(ranges.kept if ranges else ()), *kept(model, keep)], gradients, by, products)
    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(partial(mode.enter, name), prepend=True),
            module.register_forward_hook(mode.leave, always_call=True),
        ]
    try:
        yield mode
    finally:
        mode.active = False
        for handle in handles:
            handle.remove()


@dataclass
class _Call:
    """A module whose forward is running. done: products and adds that it computed itself, so far."""

    name: str
    module: nn.Module
    training: bool
    aside: bool
    done: Counter[bool] = field(default_factory=Counter)


class Int8(TorchFunctionMode):
    """What is known inside `int8`: the ranges so far. Has a state, for checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        ranges: LearnedRanges | None = None,
        kept: Sequence[str] = (),
        gradients: bool = False,
        by: RangesBy = "percentile",
        products: Products = SIMULATED,
    ) -> None:
        super().__init__()
        if ranges is not None:
            check(ranges, model)
        self.kept, self.gradients, self.products, self.active = tuple(dict.fromkeys(kept)), gradients, products, True
        self.amax = {name: torch.tensor(value) for name, value in ranges.amax.items()} if ranges else {}
        self.descent = Descent() if by == "gradient" else None
        aside = sites.find(
            model, lambda m: sites.is_norm(m) or sites.is_sample_norm(m) or isinstance(m, ParametrizationList)
        )
        self.aside = {name for site in aside for name in site.names} | set(kept)
        self.calls: list[_Call] = []

    def __deepcopy__(self, memo: object) -> "Int8":
        """A copy of the model computes on the same ranges."""
        return self

    @property
    def ranges(self) -> LearnedRanges:
        """The ranges as they are now. Raises NormRewriteError where one is not finite."""
        return LearnedRanges({name: float(value) for name, value in self.amax.items()}, self.kept)

    def step(self, factor: float = 1.0) -> None:
        """One update of ranges that follow the gradient; of others nothing. factor: of their learning rate, as of a schedule."""
        if self.descent is not None:
            self.amax |= self.descent.step(factor)

    def state_dict(self) -> dict[str, Any]:
        amax = {name: value.clone() for name, value in self.amax.items()}
        return {"amax": amax, "descent": None if self.descent is None else self.descent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.amax = {name: value.clone() for name, value in state["amax"].items()}
        if self.descent is not None:
            self.descent.load_state_dict(state["descent"])

    # --- which module computes --------------------------------------------------------------------------------------------

    def enter(self, name: str, module: nn.Module, inputs: object) -> None:
        if self.active:
            if not self.calls:
                self.__enter__()  # type: ignore[no-untyped-call]
            training = self.calls[0].training if self.calls else module.training
            aside = name in self.aside or any(call.aside for call in self.calls)
            self.calls.append(_Call(name, module, training, aside))

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        if self.calls:
            self.calls.pop()
            if not self.calls:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    # --- what it computes -------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        caught = None if self.calls[-1].aside else _CAUGHT.get(func)
        output = NotImplemented if caught is None else caught(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if output is NotImplemented else output

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return self._product(input, weight, bias, None)

    def convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        size = weight.dim() - 2
        if padding == "same":  # the odd one of an even kernel goes to the end, as torch has it
            total = [d * (k - 1) for d, k in zip(_each(dilation, size), weight.shape[2:], strict=True)]
            input = F.pad(input, [side for one in reversed(total) for side in (0, one % 2)])
            padding = [one // 2 for one in total]
        pads = _each(0 if padding == "valid" else padding, size)
        layer = Convolution(_each(stride, size), pads, _each(dilation, size), False, _each(0, size), groups)
        return self._product(input, weight, bias, layer)

    def transposed(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        steps, pads, more, holes = (
            _each(value, weight.dim() - 2) for value in (stride, padding, output_padding, dilation)
        )
        return self._product(input, weight, bias, Convolution(steps, pads, holes, True, more, groups))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Convolution | None) -> Any:
        if not x.is_floating_point() or not x.numel():
            return NotImplemented
        scale = self._scale(x, self._name(adds=False))
        alone = layer is not None and x.dim() < weight.dim()  # one input without a batch
        x = x[None] if alone else x
        y = product(x, weight, bias, layer, scale, self.gradients, self.products)
        return y[0] if alone else y

    def add(self, input: Any, other: Any, **options: Any) -> Any:
        if options or not (self._is_activation(input) and self._is_activation(other)):
            return NotImplemented
        a, b = self._both(input, other)
        return a + b

    def add_(self, input: Any, other: Any, **options: Any) -> Any:
        if options or not (self._is_activation(input) and self._is_activation(other)):
            return NotImplemented
        a, b = self._both(input.clone(), other)  # what is rounded is needed again
        return input.copy_(a + b)

    def _is_activation(self, x: object) -> bool:
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or not x.is_floating_point() or not x.numel():
            return False
        return all(x is not buffer for buffer in self.calls[-1].module.buffers(recurse=False))

    def _both(self, *sides: Tensor) -> list[Tensor]:
        name = self._name(adds=True)
        return [rounded(x, self._scale(x, name + side)) for x, side in zip(sides, SIDES, strict=True)]

    def _name(self, adds: bool) -> str:
        call = self.calls[-1]
        call.done[adds] += 1
        return called(call.name, call.done[adds])

    def _scale(self, x: Tensor, name: str) -> Tensor:
        known = self.amax.get(name)
        if self.calls[0].training:
            return self._learned(x, name, known) if self.descent is None else self._descending(x, name, self.descent)
        if known is None:
            raise NormRewriteError(
                f"int8: {name or 'the model'} has no range yet. Run the model in training first, or give `ranges`."
            )
        return scale_of(known.to(x.device))

    @torch.no_grad()
    def _learned(self, x: Tensor, name: str, known: Tensor | None) -> Tensor:
        """What is not finite doesn't enter a range, but shows in the product."""
        mine = usual_reach(x).float()
        seen = mine
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            seen = mine.clone()
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        known = seen if known is None else known.to(x.device)
        follows = torch.where(known.isfinite(), known + MOMENTUM * (seen - known), seen)
        self.amax[name] = torch.where(seen.isfinite(), follows, known)
        return scale_of(torch.where((mine + seen).isfinite(), self.amax[name], torch.nan))

    def _descending(self, x: Tensor, name: str, descent: Descent) -> Tensor:
        """Zeros tell no range: until there is one, it is looked for as ever."""
        if name not in descent.logs:
            if not _positive(self.amax.get(name)):
                scale = self._learned(x, name, self.amax.get(name))
            if not _positive(self.amax[name]):
                return scale
            descent.begin(name, self.amax[name])
        bad = torch.where(reach(x).isfinite(), 1.0, torch.nan)  # multiplied in, so that the gradient shows it too
        return bad * scale_of(descent.reach(name).to(x.device))


def _positive(value: Tensor | None) -> bool:
    return value is not None and 0 < float(value) < math.inf


_CAUGHT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: Int8.linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), Int8.convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), Int8.transposed),
    **dict.fromkeys((torch.add, Tensor.add), Int8.add),
    Tensor.add_: Int8.add_,
}


def _each(value: Any, size: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    return sizes * size if len(sizes) == 1 else sizes


@contextmanager
def aside(mode: Int8 | None) -> Iterator[None]:
    """Inside, the model computes as it would without."""
    active = mode is not None and mode.active
    try:
        if mode is not None:
            mode.active = False
        yield
    finally:
        if mode is not None:
            mode.active = active


# --- which layers, which norms ----------------------------------------------------------------------------------------


def kept(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The modules that patterns name, in order. Raises NormRewriteError where one names none, or there is no layer at all."""
    names = [name for name, _ in model.named_modules()]
    layers = [name for name, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]
    if not layers:
        raise NormRewriteError(
            f"int8: {type(model).__name__} holds no convolution and no linear layer, so nothing to compute on 8 bits."
        )
    ends = dict(zip(ENDS, (layers[0], layers[-1]), strict=True))
    chosen = {
        pattern: [name for name in names if fnmatchcase(name, ends.get(pattern, pattern))] for pattern in patterns
    }
    for pattern, matches in chosen.items():
        if not matches:
            raise NormRewriteError(
                f"int8: {pattern!r} is to be kept, and no module is called so.{nearest(pattern, names)} Name modules, or "
                f"{' or '.join(ENDS)}."
            )
    return tuple(name for name in names if any(name in matches for matches in chosen.values()))


def notes(model: nn.Module) -> list[str]:
    """What people should know of the norms between 8-bit layers."""
    squares = [site.name for site in sites.find(model) if _measures_squares(site.module)]
    if not squares:
        return []
    return [
        f"{len(squares)} batch norms between 8-bit layers measure squares ({some(squares, 3)}): converted to l1 or "
        "range they need none"
    ]


def _measures_squares(norm: nn.Module) -> bool:
    if isinstance(norm, BatchNorm):
        return row_of(norm.metric).power == 2 and not isinstance(norm, FrozenBatchNorm)
    return True
