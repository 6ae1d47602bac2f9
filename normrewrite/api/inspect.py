"""What norms a model holds, and what stands in the way of rewriting them.

>>> print(inspect(model))
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.traps import Trap, traps_of
from normrewrite.nn.stand_in import StandIn
from normrewrite.results import Mood, Result, Summary, Table
from normrewrite.sites import Norm, Site, Walk
from normrewrite.sites.refusal import Refusal


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
    walk = Walk(model)
    places = walk.find(_is_site)
    parts = {id(_norm_in(site.module)) for site in places if _norm_in(site.module) is not site.module}
    facts = [_facts(site) for site in places if id(site.module) not in parts]
    return Inspection(type(model).__name__, count, facts, traps_of(walk))


def _norm_in(module: nn.Module) -> Any:
    """The norm itself, of what stands in a norm's place with more than that."""
    return module._modules.get("norm", module) if isinstance(module, StandIn) else module


def _is_site(module: nn.Module) -> bool:
    origin = sites.origin_of(module)
    return sites.is_norm(module) or sites.is_sample_norm(module) or (origin is not None and origin.target != "")


def _facts(site: Site) -> SiteFacts:
    module = _norm_in(site.module)
    read = site.norm if module is site.module else sites.read(module)
    norm = read if sites.is_norm(module) or sites.is_sample_norm(module) else None
    origin = sites.origin_of(site.module)
    scope = "" if norm is None else _scope(module, norm)
    became = "" if origin is None else origin.target
    return SiteFacts(
        site.names,
        site.kind,
        scope,
        getattr(module, "metric", "l2" if scope else became),
        site.channels or _width(module),
        getattr(module, "eps", None),
        getattr(module, "momentum", None),
        getattr(module, "weight", None) is not None,
        getattr(module, "running_mean", None) is not None,
        str(norm) if isinstance(norm, Refusal) else None,
    )


def _scope(module: nn.Module, norm: Norm | Refusal) -> str:
    """Of a norm that can't be read, only whether it measures batches is known."""
    if isinstance(norm, Refusal):
        return "batch" if sites.is_norm(module) else ""
    return norm.scope


def _width(norm: Any) -> int | None:
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) and weight.dim() == 1 else None
