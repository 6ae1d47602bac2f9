"""What commands return beside what the functions of normrewrite do: these with their files."""

from dataclasses import dataclass
from typing import Any

from normrewrite.api.advise import Advice
from normrewrite.api.calibrate import Calibration
from normrewrite.api.correct_biases import BiasCorrection
from normrewrite.api.initialise import Initialisation
from normrewrite.api.inspect import Inspection
from normrewrite.api.plan import Plan
from normrewrite.api.reestimate import Reestimation
from normrewrite.backends.onnx import DOMAIN
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.diagnostics.layers import Layers
from normrewrite.provenance.report import Report
from normrewrite.results import Part, Result, Summary, Verdict, Wrote, apart


@dataclass
class Converted(Result):
    """What `convert` did: the sites, the whole network's difference where it was measured, and the file."""

    report: Report
    output: str
    form: str
    network: Comparison | None = None
    calibration: Calibration | Initialisation | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        network = None if self.network is None else self.network.as_dict()
        calibration = None if self.calibration is None else self.calibration.as_dict()
        record = {"output": self.output, "form": self.form, "network": network, "calibration": calibration}
        return record | self.report.as_dict()

    def summary(self) -> Summary:
        network = [Verdict(f"whole network: {self.network.verdict}", self.network.mood)] if self.network else []
        calibration = self.calibration.summary() if self.calibration else []
        notes = [self.note] if self.note else []
        return [*self.report.summary(), *network, *calibration, Wrote(self.output), *notes]


@dataclass
class Planned(Result):
    """What `convert --dry-run` would do."""

    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        sites = [
            {"names": c.site.names, "was": c.site.kind, "target": c.target, "reason": c.reason}
            for c in self.plan.choices
        ]
        return {"dry_run": True, "rewritten": len(self.plan.rewritten), "kept": len(self.plan.kept), "sites": sites}

    def summary(self) -> Summary:
        return [*self.plan.summary(), "nothing was written (--dry-run)"]


@dataclass
class Advised(Result):
    """What `inspect --advise` found: the norms, and which target suits each."""

    inspection: Inspection
    advice: Advice

    def as_dict(self) -> dict[str, Any]:
        return self.inspection.as_dict() | {"advice": self.advice.as_dict()}

    def summary(self) -> Summary:
        return apart([self.inspection.summary(), self.advice.summary()])


@dataclass
class Calibrated(Result):
    """What `calibrate` did."""

    calibration: Calibration | Reestimation | BiasCorrection
    output: str

    def as_dict(self) -> dict[str, Any]:
        return {"output": self.output, **self.calibration.as_dict()}

    def summary(self) -> Summary:
        return [*self.calibration.summary(), Wrote(self.output)]


@dataclass
class Reverted(Result):
    """What `revert` did."""

    sites: list[str]
    trained: list[str]
    output: str

    def as_dict(self) -> dict[str, Any]:
        return {"output": self.output, "reverted": self.sites, "nearest": self.trained}

    def summary(self) -> Summary:
        exact = len(self.sites) - len(self.trained)
        text = f"{len(self.sites)} norms are torch's again, {exact} of them to the bit"
        if not self.trained:
            return [Verdict(text, "good"), Wrote(self.output)]
        nearest = f"trained since the rewrite, so the nearest was taken: {', '.join(self.trained[:8])}"
        return [Verdict(text, "mixed"), nearest, Wrote(self.output)]


@dataclass
class Listed(Result):
    """What `plugins list` found: operators with their attributes, and where each kind of plugin can be made here."""

    operators: dict[str, dict[str, str]]
    runtimes: dict[str, bool]
    library: str | None

    def as_dict(self) -> dict[str, Any]:
        return {"operators": self.operators, "runtimes": self.runtimes, "library": self.library}

    def summary(self) -> Summary:
        lines: list[Part] = []
        for name, attributes in self.operators.items():
            lines += [f"{DOMAIN}::{name}", *(f"  {key}: {words}" for key, words in attributes.items())]
        here = [f"{name} ({'installed' if there else 'not installed'})" for name, there in self.runtimes.items()]
        lines.append(f"as IPluginV3 in Python, for {', '.join(here)}")
        lines.append(f"as IPluginV3 in C++: {self.library or 'not built; normrewrite plugins path says how'}")
        return [*lines, "enqueue has not been run on a GPU"]


@dataclass
class Verified(Result):
    """What `verify --layers` found: the outputs, and the layers on the way there."""

    comparison: Comparison
    layers: Layers

    @property
    def ok(self) -> bool:
        return self.comparison.ok

    def as_dict(self) -> dict[str, Any]:
        return {**self.comparison.as_dict(), **self.layers.as_dict()}

    def summary(self) -> Summary:
        return apart([self.layers.summary(), self.comparison.summary()])


@dataclass
class Written(Result):
    """What `finetune` did."""

    record: dict[str, Any]
    parts: Summary

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def summary(self) -> Summary:
        return self.parts
