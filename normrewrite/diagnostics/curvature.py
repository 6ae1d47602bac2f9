"""How sharply a loss bends: the largest eigenvalue λ of its Hessian by a model's trainable parameters.

>>> curvature(model, lambda batch: F.cross_entropy(model(**batch.inputs), batch.labels), drawn(data, 64)).value
61.9

An iteration is one product of Hessian and vector, by a second backward pass, as in power iteration. Of the same products
Lanczos' recurrence gives the largest eigenvalue over all vectors so far: sooner, and λ itself where one below zero is larger in
size. From a random vector that takes five iterations where one direction stands out, and a dozen where none does.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normrewrite.data import Batch, Data
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.sites.modes import same_buffers

Product = Callable[[Tensor], Tensor]
INPUTS = 64  # that the loss is averaged over
ITERATIONS = 16  # at most
SETTLED = 5e-3  # a relative change that ends the iterations
_FEW = 4  # iterations that tell something, where there is no time for more
_SPANNED = 1e-6  # what is left of a product, of the largest so far, where the vectors hold all that there is


@dataclass(frozen=True)
class Curvature:
    """value: λ, from below: more iterations may raise it. change: by how much of itself the last one did. inputs: of the loss, in
    batches of batch_size."""

    value: float
    change: float
    iterations: int
    inputs: int
    batch_size: int


def drawn(data: Data, batch_size: int, inputs: int = INPUTS) -> list[Batch]:
    """Batches of so many inputs in all, one at least: of data at hand drawn by chance, always the same; of a stream the first."""
    whole, size = data.whole, len(data.first(batch_size))
    if whole is None:
        return _first(data, batch_size, inputs)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    count = max(min(inputs, len(whole)) // size, 1)
    return [whole.rows(chosen) for chosen in order[: count * size].split(size)]


def _first(stream: Data, batch_size: int, inputs: int) -> list[Batch]:
    batches: list[Batch] = []
    for batch in stream.batches(batch_size):
        batches.append(batch.rows(slice(batch_size)))
        if sum(map(len, batches)) >= inputs:
            break
    return batches


def curvature(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    *,
    iterations: int = ITERATIONS,
    settled: float = SETTLED,
    seconds: float = math.inf,
) -> Curvature:
    """λ of the mean of `loss`, a scalar, over the batches, by the parameters of `model` that require a gradient.

    It runs in the mode that each module is in; gradients and buffers, running statistics among them, are as before afterwards.
    Random numbers are drawn as they come, once, so that all products are of one function. iterations: at most.
    Raises NormRewriteError where the loss can't be differentiated twice or is not finite, and where `seconds` are over before
    enough iterations are done to tell anything.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    # of torch's attentions the one that is differentiable twice
    with same_buffers(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        mean = torch.stack([loss(batch) for batch in batches]).mean()
        _check_loss(mean, model)
        try:
            gradients = torch.autograd.grad(mean, parameters, create_graph=True, materialize_grads=True)
            product, start = _hessian(gradients, parameters), _random(parameters)
            eigenvalue = _lanczos(product, start, iterations, settled, started + seconds)
        except RuntimeError as error:  # an operation without a second derivative, or too little memory
            raise NormRewriteError(
                f"{type(model).__name__}: its second derivatives can't be had: {first_line(error)}. Find a learning rate by "
                "trial."
            ) from error
    return Curvature(*eigenvalue, sum(map(len, batches)), len(batches[0]))


def _check_loss(loss: Tensor, model: nn.Module) -> None:
    if not loss.requires_grad or not torch.isfinite(loss):
        raise NormRewriteError(
            f"the loss of {type(model).__name__} is {loss.item():g}, {'with' if loss.requires_grad else 'without'} a gradient, "
            "so it has no curvature. Give one that is finite and follows from parameters that require a gradient."
        )


def _random(parameters: Sequence[Tensor]) -> Tensor:
    """A Gaussian vector of all parameters, fp32 at least, always the same."""
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in parameters) else torch.float32
    size, generator = sum(each.numel() for each in parameters), torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=dtype).to(parameters[0].device)


def _hessian(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Product:
    """What multiplies a vector of all parameters by the Hessian."""
    sizes = [each.numel() for each in parameters]
    varied = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    variables = [*parameters, *_leaves(gradients)]

    def product(vector: Tensor) -> Tensor:
        if not varied:
            return torch.zeros_like(vector)
        parts = vector.split(sizes)
        outputs = [gradients[i] for i in varied]
        cotangents = [parts[i].view(gradients[i].shape).to(gradients[i]) for i in varied]
        slopes = torch.autograd.grad(outputs, variables, cotangents, retain_graph=True, materialize_grads=True)
        return torch.cat([slope.flatten().to(vector) for slope in slopes[: len(sizes)]])

    return product


def _leaves(gradients: Sequence[Tensor]) -> list[Tensor]:
    """All that the gradients follow from. What can be differentiated once alone raises on the way to a leaf that torch makes up,
    and counts as constant where that isn't asked for."""
    ahead: list[Any] = [gradient.grad_fn for gradient in gradients]
    nodes: dict[Any, None] = {}
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            ahead += [before for before, _ in node.next_functions]
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _lanczos(
    product: Product, start: Tensor, iterations: int, settled: float, deadline: float
) -> tuple[float, float, int]:
    """The largest eigenvalue of the tridiagonal matrix that an operator is in the basis of its products from `start` on; its last
    relative change; the size of the matrix."""
    vector, before, residue = start / start.norm(), torch.zeros_like(start), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    value = -math.inf
    while True:
        image = product(vector)
        diagonal.append(float(vector @ image))
        value, last = _largest(diagonal, beside), value
        image = image - diagonal[-1] * vector - residue * before
        residue = float(image.norm())
        spanned = residue <= _SPANNED * max(map(abs, [*diagonal, *beside]))
        change = 0.0 if spanned or value == last else (value - last) / abs(value or last)
        late = time.perf_counter() > deadline
        if len(diagonal) == iterations or change <= settled or (late and len(diagonal) >= _FEW):
            return value, change, len(diagonal)
        if late:
            raise NormRewriteError("it takes too long. nr.stable_lr takes its time, or fewer inputs.")
        beside.append(residue)
        vector, before = image / residue, vector


def _largest(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off + off.T
    if not matrix.isfinite().all():
        raise NormRewriteError(
            "second derivatives are not finite, so the curvature isn't known. Compute in a wider dtype."
        )
    return float(torch.linalg.eigvalsh(matrix)[-1])
