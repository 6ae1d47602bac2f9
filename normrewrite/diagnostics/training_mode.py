"""How far a network whose norms measure each batch, as in training, is from what its original computes.

>>> mode = TrainingMode(batches, twin, original)
>>> mode.apart(twin)                            # from the original's eval, and from its training
(0.299, 0.121)

Relative: the norm of the difference of all outputs, over the norm of the original's. All but the norms run as in eval.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.data import Batch, argument_names
from normrewrite.execution import call, device_of, flat
from normrewrite.results import Printable, Summary, Verdict
from normrewrite.sites.modes import evaluating, same_buffers

Mode = Callable[[nn.Module], AbstractContextManager[object]]


@dataclass(frozen=True)
class TrainingDistance(Printable):
    """Of a twin in training, before and after it was calibrated. from_training: None where the original isn't at hand.

    original: how far the original's own training is from its eval.
    """

    inputs: int
    from_eval: tuple[float, float]
    from_training: tuple[float, float] | None
    original: float | None

    def summary(self) -> Summary:
        """One line, and another where the calibration was of no use."""
        whose = "the original's" if self.original is not None else "its own"
        figures = [f"from {whose} eval {_both(self.from_eval)}"]
        if self.from_training is not None:
            figures.append(f"from the original's training {_both(self.from_training)}")
        if self.original is not None:
            figures.append(f"of the original's training from its eval {self.original:.3f}")
        line = f"outputs in training, relative difference on {self.inputs} inputs: {'; '.join(figures)}"
        before, now = self.from_eval
        return [line, Verdict(_NO_NEARER, "mixed")] if now >= before else [line]


_NO_NEARER = "training has come no nearer to eval by it: leave the network as it was, or give larger batches"


def _both(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f}, calibrated {pair[1]:.3f}"


class TrainingMode:
    """What a twin is compared with: its original's eval and training; without an original, its own eval as it is now."""

    def __init__(self, batches: Sequence[Batch], twin: nn.Module, original: nn.Module | None) -> None:
        self.batches = batches
        self.eval = outputs(twin if original is None else original, batches)
        self.training = None if original is None else outputs(original, batches, measuring)

    def apart(self, twin: nn.Module) -> tuple[float, float | None]:
        """The relative differences of the twin in training to eval, and to training."""
        now = outputs(twin, self.batches, measuring)
        training = None if self.training is None else relative_difference(now, self.training)
        return relative_difference(now, self.eval), training

    def distance(self, before: tuple[float, float | None], after: tuple[float, float | None]) -> TrainingDistance:
        training = None if before[1] is None or after[1] is None else (before[1], after[1])
        original = None if self.training is None else relative_difference(self.training, self.eval)
        return TrainingDistance(sum(map(len, self.batches)), (before[0], after[0]), training, original)


def outputs(model: nn.Module, batches: Sequence[Batch], mode: Mode = evaluating) -> list[Tensor]:
    """All floating outputs, float64, on the CPU."""
    names, device = argument_names(model), device_of(model)
    with mode(model), torch.no_grad():
        return [value for batch in batches for value in _floats(call(model, batch.to(device), names))]


def _floats(outputs: object) -> list[Tensor]:
    return [value.detach().double().cpu() for value in flat(outputs).values() if value.is_floating_point()]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """The norms in training and all else in eval; flags and running statistics come back afterwards."""
    with evaluating(model), same_buffers(model):
        for site in sites.find(model):
            for module in site.module.modules():
                module.training = True
        yield


def relative_difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The norm of all differences over that of all that was expected. NaN where they have other shapes."""
    if [value.shape for value in values] != [value.shape for value in expected]:
        return float("nan")
    gap = sum(float((a - b).square().sum()) for a, b in zip(values, expected, strict=True))
    size = sum(float(b.square().sum()) for b in expected)
    return (gap / size) ** 0.5 if size else float("nan")
