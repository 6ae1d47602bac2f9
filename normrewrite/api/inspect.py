"""What norms a model holds, and what stands in the way of rewriting them.

>>> print(inspect(model))
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.traps import Trap, find_traps
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.sample import RowNorm
from normrewrite.passes.swap_sample import scope_of
from normrewrite.results import Mood, Result, Summary, Table
from normrewrite.sites import Site
from normrewrite.sites.kinds import Kind, recognise
from normrewrite.sites.sample_kinds import RowKind, recognise_row


@dataclass(frozen=True)
class SiteFacts:
    """One norm as it stands, or what a rewrite put in its place. `refusal`: why its metric can't be swapped, or None.

    scope: batch, layer, group, instance or rms; for what is no norm any more (weight norms, affines) empty.
    """

    names: tuple[str, ...]
    kind: str
    scope: str
    metric: str
    channels: int | None
    eps: float | None
    momentum: float | None
    affine: bool
    tracked: bool
    refusal: str | None


@dataclass(frozen=True)
class Inspection(Result):
    """Every norm of a model, its size, and the traps it holds."""

    model: str
    parameters: int
    sites: list[SiteFacts]
    traps: list[Trap]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        counts = Counter(f"{facts.scope} norms" if facts.scope else "rewritten sites" for facts in self.sites)
        counted = ", ".join(f"{count} {what}" for what, count in counts.items()) or "no norms"
        head = f"{self.model}: {self.parameters:,} parameters, {counted}"
        traps = map(_explained, self.traps)
        if not self.sites:
            return [head, *traps]
        lines = [
            (
                facts.names[0] or "(the model itself)",
                facts.kind,
                facts.scope,
                facts.metric,
                str(facts.channels or ""),
                "" if facts.eps is None else f"{facts.eps:g}",
                "" if facts.momentum is None else f"{facts.momentum:g}",
                "; ".join(_notes(facts)),
            )
            for facts in self.sites
        ]
        moods: list[Mood] = ["bad" if facts.refusal else "plain" for facts in self.sites]
        return [head, Table(_HEADS, lines, moods=moods), *traps]


_HEADS = ("site", "class", "scope", "metric", "channels", "eps", "momentum", "note")


def _explained(trap: Trap) -> str:
    some = f"{', '.join(trap.sites[:4])}{' ...' if len(trap.sites) > 4 else ''}"
    head = f"\n! {trap.title} ({len(trap.sites)}: {some})"
    return f"{head}\n  what goes wrong:    {trap.wrong}\n  what is done here:  {trap.remedy}"


def _notes(facts: SiteFacts) -> list[str]:
    notes = [f"also {', '.join(facts.names[1:])}"] if len(facts.names) > 1 else []
    notes += ["no affine parameters"] if not facts.affine and facts.scope else []
    notes += ["no running statistics"] if not facts.tracked and facts.scope == "batch" else []
    return notes + ([f"can't be rewritten: {facts.refusal}"] if facts.refusal else [])


def inspect(model: nn.Module) -> Inspection:
    """Look, and touch nothing."""
    count = sum(parameter.numel() for parameter in model.parameters())
    found = sites.find(model, _is_site)
    return Inspection(type(model).__name__, count, [_facts(site) for site in found], find_traps(model))


def _is_site(module: nn.Module) -> bool:
    origin = sites.origin_of(module)
    return sites.is_norm(module) or sites.is_row_norm(module) or (origin is not None and origin.target != "")


def _facts(site: Site) -> SiteFacts:
    norm: Any = site.module
    kind = _kind(norm)
    origin = sites.origin_of(norm)
    scope = _scope(norm, kind)
    became = "" if origin is None else origin.target
    return SiteFacts(
        site.names,
        site.kind,
        scope,
        getattr(norm, "metric", "l2" if scope else became),
        site.channels or _width(norm),
        getattr(norm, "eps", None),
        getattr(norm, "momentum", None),
        getattr(norm, "weight", None) is not None,
        getattr(norm, "running_mean", None) is not None,
        kind if isinstance(kind, str) else None,
    )


def _kind(norm: nn.Module) -> Kind | RowKind | str | None:
    """What it is recognised as; None for ours."""
    if isinstance(norm, BatchNorm | RowNorm):
        return None
    if sites.is_norm(norm):
        return recognise(norm)
    return recognise_row(norm) if sites.is_row_norm(norm) else None


def _scope(norm: nn.Module, kind: Kind | RowKind | str | None) -> str:
    if isinstance(kind, RowKind):
        return kind.scope
    if isinstance(norm, RowNorm):
        return scope_of(norm)
    return "batch" if sites.is_norm(norm) else ""


def _width(norm: Any) -> int | None:
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) and weight.dim() == 1 else None
