"""One result file a run: what has one is not run again, so a stopped budget goes on where it was.

>>> results = results_of("cpu")
>>> arm, run = next(results.missing(CLAIMS["constant"].arms("cpu")))
>>> carry_out(run, machine, results)["accuracy"]
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.norm_matters.measure import MEASURES, Machine
from benchmarks.norm_matters.run import Arms, Budget, ByArm, Run
from benchmarks.stamp import RESULTS, stamp

FOLDER = RESULTS / "norm_matters"


@dataclass(frozen=True)
class Results:
    """The results of a budget, in a folder."""

    folder: Path

    def of(self, run: Run) -> dict[str, Any] | None:
        path = self.folder / run.file
        record: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
        return record

    def by_arm(self, arms: Arms) -> ByArm:
        """What there is, arm by arm, in the order of seeds."""
        read = {name: [self.of(run) for run in runs] for name, runs in arms.items()}
        return {name: [record for record in records if record is not None] for name, records in read.items()}

    def missing(self, arms: Arms) -> Iterator[tuple[str, Run]]:
        """In order, with the arm's name; each is looked for when its turn comes."""
        for name, runs in arms.items():
            for run in runs:
                if self.of(run) is None:
                    yield name, run

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, run: Run, record: dict[str, Any]) -> Path:
        """Whole or not at all, also where the process is killed meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, part = self.folder / run.file, self.folder / f"{run.file}.part"
        content = {"run": asdict(run), "stamp": machine_stamp(), **_finite(record)}
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        part.replace(path)
        return path


def carry_out(run: Run, machine: Machine, results: Results) -> dict[str, Any]:
    """The run's record, which is kept."""
    machine.beside.mkdir(parents=True, exist_ok=True)
    record = MEASURES[run.measure](run, machine)
    results.keep(run, record)
    return record


def results_of(budget: Budget) -> Results:
    return Results(FOLDER / budget)


def machine_stamp() -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**stamp("accelerate", "scikit-learn"), **gpu, "threads": torch.get_num_threads()}


def _finite(value: Any) -> Any:
    """Floats to seven digits; what is not finite is null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
