"""How far a training is: all of it that isn't in the model, the optimiser or the schedule, so that a checkpoint holds it.

>>> progress = Progress(); progress.tally += Tally(loss=0.3, right=50, rated=64, inputs=64); progress.step += 1
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass
class Tally:
    """Sums over inputs. right stays 0 where there are no classes to be right about (rated 0). spoilt: batches whose
    statistics were not finite."""

    loss: float = 0.0
    right: int = 0
    rated: int = 0
    inputs: int = 0
    spoilt: int = 0

    def __iadd__(self, other: "Tally") -> "Tally":
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def mean(self) -> float | None:
        return self.loss / self.inputs if self.inputs else None

    @property
    def accuracy(self) -> float | None:
        return self.right / self.rated if self.rated else None


@dataclass(frozen=True)
class Epoch:
    """One line of the record. Accuracy is agreement with the teacher where there are no labels."""

    epoch: int
    step: int
    loss: float | None
    accuracy: float | None
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass
class Progress:
    """Steps done, of them skipped as not finite, batches whose statistics were not finite (spoilt), the epoch under way, the
    epochs behind, and the best weights so far."""

    step: int = 0
    skipped: int = 0
    spoilt: int = 0
    in_a_row: int = 0
    inputs: int = 0
    seconds: float = 0.0
    stopped: bool = False
    tally: Tally = field(default_factory=Tally)
    epochs: list[Epoch] = field(default_factory=list)
    best: int | None = None
    score: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)

    def validated(self, score: list[float], weights: dict[str, Tensor], ranges: dict[str, float]) -> None:
        """Keep the weights, and what int8 learned, where they are the best so far; the epoch is the last of `epochs`."""
        if self.best is None or score > self.score:
            self.best, self.score, self.ranges = self.epochs[-1].epoch, score, ranges
            self.weights = {name: value.detach().cpu().clone() for name, value in weights.items()}

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return 0 if self.best is None else self.epochs[-1].epoch - self.best

    def state_dict(self) -> dict[str, Any]:
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return plain | {"tally": asdict(self.tally), "epochs": [asdict(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values = state | {"tally": Tally(**state["tally"]), "epochs": [Epoch(**epoch) for epoch in state["epochs"]]}
        for name, value in values.items():
            setattr(self, name, value)
