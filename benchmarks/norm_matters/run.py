"""What one run is: everything that its result depends on, and the key that its result is filed under.

>>> run = Run("train", "resnet8", Task("cifar10", 16, 20_000, 10_000), Norm("l1"), {"epochs": 5, "lr": 0.1}, seed=0)
>>> run.file
'resnet8-l1-0-7efab005bc3f.json'
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from normrewrite.norms import Gain

Budget = Literal["smoke", "cpu", "gpu"]
FORMAT = 1  # of what a run means: a higher one makes every result stale


@dataclass(frozen=True)
class Task:
    """What is learned and tested. source: `cifar10`, `digits`, or what --data of finetune takes, with {split} in it.

    side: of the images in pixels, by means over pixels or repeated ones. train, test: how many (0: all).
    scale: `standardised`, `pixels` of 0 to 255, or `imagenet`, standardised by ImageNet's figures.
    """

    source: str
    side: int
    train: int
    test: int
    scale: str = "standardised"


@dataclass(frozen=True)
class Norm:
    """What every batch norm of a network becomes. to: a target, `l2` for torch's own; scope: of what is rewritten.

    times: the constant C of its metric, times this. initialise: weight norms by data, as in nr.initialise_.
    """

    to: str = "l2"
    gain: Gain = "exact"
    times: float = 1.0
    initialise: bool = False
    scope: str = "batch"

    def __str__(self) -> str:
        more = [self.gain] * (self.gain != "exact") + [f"x{self.times:g}"] * (self.times != 1)
        return "-".join([self.to.replace(":", "").replace(",", "-"), *more])


@dataclass(frozen=True)
class Run:
    """measure: which function of measure.MEASURES; network: which of networks.NETWORKS; recipe: that function's options."""

    measure: str
    network: str
    task: Task
    norm: Norm
    recipe: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def file(self) -> str:
        return f"{self.network}-{self.norm}-{self.seed}-{self.key}.json"


@dataclass(frozen=True)
class Study:
    """What the arms of a comparison share.

    >>> study.arm(Norm("l1"))            # one run a seed
    """

    network: str
    task: Task
    recipe: Mapping[str, Any]
    seeds: int
    measure: str = "train"

    def arm(self, norm: Norm = Norm(), task: Task | None = None, **recipe: Any) -> list[Run]:
        merged = {**self.recipe, **recipe}
        return [Run(self.measure, self.network, task or self.task, norm, merged, seed) for seed in range(self.seeds)]


Arms = Mapping[str, list[Run]]
ByArm = Mapping[str, list[dict[str, Any]]]  # by arm: the results of its runs
