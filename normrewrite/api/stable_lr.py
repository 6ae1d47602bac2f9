"""The largest learning rate at which SGD is stable on a network, by its loss's curvature.

>>> float(stable_lr(twin, F.cross_entropy, Data(Batch({"x": images}, labels))))
0.0614
"""

from collections.abc import Callable, Iterable
from dataclasses import field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normrewrite.data import Batch, Data, argument_names, as_data
from normrewrite.diagnostics.curvature import INPUTS, ITERATIONS, curvature, drawn
from normrewrite.errors import NormRewriteError
from normrewrite.execution import call, device_of
from normrewrite.options.fields import options, takes
from normrewrite.sites.modes import evaluating, same_flags

if TYPE_CHECKING:
    from normrewrite.training.stability import StableLearningRate


@options
class StableCall:
    """What `stable_lr` takes in Python."""

    model: nn.Module = field(kw_only=False)
    loss: Callable[..., Tensor] = field(kw_only=False)
    data: Tensor | Data | Iterable[Any] = field(kw_only=False)
    teacher: nn.Module | None = None
    momentum: float = 0.9
    nesterov: bool = False
    training: bool | None = True
    batch_size: int = 64
    inputs: int = INPUTS
    iterations: int = ITERATIONS


@takes(StableCall)
def stable_lr(options: StableCall) -> "StableLearningRate":
    """The largest learning rate at which SGD is stable on a loss as it bends now: 2(1 + momentum)/λ, where λ is the largest
    eigenvalue of its Hessian by the parameters that require a gradient.

    >>> rate = stable_lr(twin, nn.functional.cross_entropy, [(images, labels)])
    >>> optimizer = torch.optim.SGD(twin.parameters(), lr=float(rate) / 2, momentum=0.9)

    A limit, not advice: λ is known from below, grows as batches get smaller, and moves while the training goes on. Adam's steps
    are another matter.

    loss: called with the outputs and the batch's labels (N,); with the teacher's outputs instead, in eval, where there is a
    teacher; with the outputs alone where there is neither. It gives the mean over the inputs, a tensor of one number.
    data: (N, ...) inputs, Data, or batches (a tensor, (tensor, labels) or a dict each). `inputs` of them are taken, of data at
    hand by chance, in batches of batch_size, which norms of a batch measure. training: as by `model.train()` or `.eval()`; None:
    as each module is. momentum, nesterov: torch.optim.SGD's; with nesterov it is 2(1 + momentum)/((1 + 2 momentum)λ).
    iterations: products of Hessian and vector, at most; `curvature.change` tells whether they were enough.
    Gradients, buffers, training flags and random state stay as they are.
    Raises NormRewriteError where the loss isn't one finite number or can't be differentiated twice, as by half arithmetic and
    synchronised norms.
    """
    from normrewrite.training import randomness  # `import normrewrite` is not to wait for what only training needs
    from normrewrite.training.stability import StableLearningRate

    _check(options)
    model = options.model
    with same_flags(model), randomness.kept():
        randomness.seed(0)
        if options.training is not None:
            model.train(options.training)
        batches = drawn(as_data(options.data, argument_names(model)), options.batch_size, options.inputs)
        found = curvature(model, _Loss(options), batches, iterations=options.iterations)
    return StableLearningRate(found, options.momentum, options.nesterov)


def _check(options: StableCall) -> None:
    if not 0 <= options.momentum < 1 or options.iterations < 2 or options.inputs < 1:
        raise NormRewriteError(
            f"momentum {options.momentum}, iterations {options.iterations}, inputs {options.inputs}: needed are a momentum "
            "from 0 up to, not including, 1, and at least two iterations and one input."
        )


class _Loss:
    """The user's loss of a batch."""

    def __init__(self, options: StableCall) -> None:
        self.model, self.loss, self.teacher = options.model, options.loss, options.teacher
        self.names, self.device = argument_names(options.model), device_of(options.model)

    def __call__(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        outputs = call(self.model, batch, self.names)
        loss = self.loss(outputs, *self._goal(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise NormRewriteError(f"loss gave {kind}; needed is a tensor of one number, the mean over the inputs.")
        return loss.reshape(())

    def _goal(self, batch: Batch) -> list[Any]:
        if self.teacher is None:
            return [] if batch.labels is None else [batch.labels]
        with evaluating(self.teacher), torch.no_grad():
            return [call(self.teacher, batch, self.names)]
