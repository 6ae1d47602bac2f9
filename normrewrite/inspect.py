"""What norms a model holds, and what stands in the way of rewriting them.

>>> print(inspect(model))
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from normrewrite import sites
from normrewrite.kinds import recognise
from normrewrite.nn.batch import BatchNorm
from normrewrite.report import table
from normrewrite.sites import Site
from normrewrite.traps import Trap, find_traps


@dataclass(frozen=True)
class SiteFacts:
    """One norm as it stands. `refusal`: why its metric can't be swapped, or None."""

    names: tuple[str, ...]
    kind: str
    metric: str
    channels: int | None
    eps: float | None
    momentum: float | None
    affine: bool
    tracked: bool
    refusal: str | None


@dataclass(frozen=True)
class Inspection:
    """Every norm of a model, its size, and the traps it holds."""

    model: str
    parameters: int
    sites: list[SiteFacts]
    traps: list[Trap]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.model}: {self.parameters:,} parameters, {len(self.sites)} batch norms"
        if not self.sites:
            return "\n".join([head, *map(_explained, self.traps)])
        rows = [
            (
                facts.names[0] or "(the model itself)",
                facts.kind,
                facts.metric,
                str(facts.channels or ""),
                "" if facts.eps is None else f"{facts.eps:g}",
                "" if facts.momentum is None else f"{facts.momentum:g}",
                "; ".join(_notes(facts)),
            )
            for facts in self.sites
        ]
        return "\n".join([head, table(HEAD, rows), *map(_explained, self.traps)])


HEAD = ("site", "class", "metric", "channels", "eps", "momentum", "note")


def _explained(trap: Trap) -> str:
    some = f"{', '.join(trap.sites[:4])}{' ...' if len(trap.sites) > 4 else ''}"
    head = f"\n! {trap.title} ({len(trap.sites)}: {some})"
    return f"{head}\n  what goes wrong:    {trap.wrong}\n  what is done here:  {trap.remedy}"


def _notes(facts: SiteFacts) -> list[str]:
    notes = [f"also {', '.join(facts.names[1:])}"] if len(facts.names) > 1 else []
    notes += ["no affine parameters"] if not facts.affine else []
    notes += ["no running statistics"] if not facts.tracked else []
    return notes + ([f"can't be rewritten: {facts.refusal}"] if facts.refusal else [])


def inspect(model: nn.Module) -> Inspection:
    """Look, and touch nothing."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return Inspection(type(model).__name__, count, [_facts(site) for site in sites.find(model)], find_traps(model))


def _facts(site: Site) -> SiteFacts:
    norm: Any = site.module
    ours = isinstance(norm, BatchNorm)
    kind = None if ours else recognise(norm)
    return SiteFacts(
        site.names,
        site.kind,
        norm.metric if ours else "l2",
        site.channels,
        getattr(norm, "eps", None),
        getattr(norm, "momentum", None),
        getattr(norm, "weight", None) is not None,
        getattr(norm, "running_mean", None) is not None,
        kind if isinstance(kind, str) else None,
    )
