"""Half arithmetic by choice: norms compute in half, and sum as an accumulator does.

>>> with nr.half_arithmetic("half:64"):
...     loss = criterion(model(images.half()), labels)             # a model of half parameters; the backward follows suit
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from normrewrite.backends import half, torch_batch
from normrewrite.backends.accumulate import Accumulator, accumulator
from normrewrite.backends.context import here, setting, thread
from normrewrite.backends.half import Rule, normalise, normalise_batch
from normrewrite.nn.functional import average_in
from normrewrite.norms import metric


@contextmanager
def half_arithmetic(sums: str = "fp32") -> Iterator[Accumulator]:
    """Inside, norms of half inputs compute in half too: each result is rounded, and every sum goes through an accumulator.

    >>> with half_arithmetic("half:64"):
    ...     logits = model(images.half())

    sums: `fp32`, `half` or `half:CHUNK`, see normrewrite.backends.accumulate; normrewrite.backends.half says which sums they are.
    It holds for norms of normrewrite and of torch (modules, and calls of F.batch_norm, F.layer_norm, F.group_norm,
    F.instance_norm and F.rms_norm) in this thread, and for their backward wherever that is run; not in other threads, nor in
    other tasks of asyncio, but for those that are started inside, while the block is open. Nothing is done to the model, and
    running statistics stay fp32. In eval a norm that has some is torch's affine of each channel, rounded once. Weight norms, and
    norms that a model writes out in other operations, compute as they are written.

    Convolutions and matrix products sum in fp32 and round once, as half kernels on GPUs do. On a CPU without half instructions
    torch's own add up a convolution's weight gradient over the batch in half, which stops at 2048 times one sample's, and took 27
    to 43 times as long as fp32 where that was tried: on any CPU they are fp32 kernels on half numbers here.
    Raises NormRewriteError for other sums, and where a norm is to measure several processes' batches as one.
    """
    chosen = accumulator(sums)
    with setting(accumulator=chosen), _HalfArithmetic():
        thread.modes += 1
        try:
            yield chosen
        finally:
            thread.modes -= 1


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {}


class _HalfArithmetic(TorchFunctionMode):
    """Torch's own functions, as they are to compute on half inputs; norms of ours look at the context themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _in_place_of(function: Callable[..., Any]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def either(input: Tensor, *arguments: Any, **options: Any) -> Tensor:
            chosen: Callable[..., Tensor] = function if half.chosen(input) is None else ours
            return chosen(input, *arguments, **options)

        _REPLACED[function] = either
        return ours

    return register


# --- torch's norms: l2, with eps under the root ------------------------------------------------------------------------------


def _native(eps: float, centred: bool = True) -> Rule:
    assert here.now.accumulator is not None
    return Rule(metric("l2"), "exact", eps, here.now.accumulator, centred, native=True)


@_in_place_of(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        return torch_batch.affine(input, running_mean, (running_var + eps).sqrt(), weight, bias)
    y, mean, variance = normalise_batch(input, weight, bias, _native(eps))
    _average(momentum, running_mean, mean, running_var, variance, input.numel() // input.shape[1])
    return y


@_in_place_of(F.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats and running_mean is not None and running_var is not None:
        return torch_batch.affine(input, running_mean, (running_var + eps).sqrt(), weight, bias)
    lines = input.flatten(2)[:, :, None]
    y, mean, variance = normalise(lines, *_by_group(weight, bias, lines.shape[1]), _native(eps))
    n = input.numel() // (input.shape[0] * input.shape[1])
    _average(momentum, running_mean, mean.mean(0), running_var, variance.mean(0), n)
    return y.reshape(input.shape)


def _average(
    momentum: float, running_mean: Tensor | None, mean: Tensor, running_var: Tensor | None, variance: Tensor, n: int
) -> None:
    """As torch: the variance without its bias."""
    if running_mean is not None and running_var is not None:
        average_in(momentum, (running_mean, mean), (running_var, variance * (n / max(n - 1, 1))))


@_in_place_of(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _over_last(input, len(normalized_shape), weight, bias, _native(eps))


@_in_place_of(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _over_last(input, len(normalized_shape), weight, None, _native(eps, centred=False))


def _over_last(input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, rule: Rule) -> Tensor:
    lines = input.flatten(-dims)
    lines = lines.reshape(-1, 1, lines.shape[-1], 1)
    return normalise(lines, *_by_group(weight, bias, 1), rule)[0].reshape(input.shape)


@_in_place_of(F.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    lines = input.reshape(input.shape[0], num_groups, input.shape[1] // num_groups, -1)
    return normalise(lines, *_by_group(weight, bias, num_groups), _native(eps))[0].reshape(input.shape)


def _by_group(weight: Tensor | None, bias: Tensor | None, groups: int) -> tuple[Tensor | None, Tensor | None]:
    """(C,), or of any shape, -> (groups, channels a group)."""
    return None if weight is None else weight.view(groups, -1), None if bias is None else bias.view(groups, -1)


# --- products ----------------------------------------------------------------------------------------------------------------


def _summed_in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of half tensors on a CPU, computed in fp32; results and gradients are rounded to half."""

    def product(*arguments: Any, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        ours = [value.dtype is torch.float16 and value.device.type == "cpu" for value in tensors]
        if here.now.accumulator is None or not ours or not all(ours) or "out" in options:
            return function(*arguments, **options)
        widened = {name: _widened(value) for name, value in options.items()}
        return function(*map(_widened, arguments), **widened).half()

    return product


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


for _function in (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
    F.bilinear,
    F.scaled_dot_product_attention,
    torch.einsum,
    *(getattr(torch, _name) for _name in ("matmul", "mm", "bmm", "addmm", "baddbmm")),
    *(getattr(Tensor, _name) for _name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__")),
):
    _REPLACED[_function] = _summed_in_fp32(_function)
