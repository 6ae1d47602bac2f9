"""Which norm of a network becomes what, and what carries that out.

>>> plan_ = nr.plan(model, to="topk:10"); print(plan_); twin, report = plan_.apply()
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from normrewrite import sites
from normrewrite.api.passage import Passage, limit, passage, why_apart
from normrewrite.diagnostics.exactness import Probe, measured, tolerance
from normrewrite.errors import NormRewriteError
from normrewrite.nn.parts import deepcopy
from normrewrite.optimizers import inherited, parameters_of, rebind
from normrewrite.passes import PIPELINE, Rewrite
from normrewrite.passes.base import Rewritten
from normrewrite.passes.lift_functional import lift_
from normrewrite.passes.renormalise import is_fresh
from normrewrite.provenance.report import Report, SiteResult
from normrewrite.results import Printable, Summary, Table
from normrewrite.rules import KEEP
from normrewrite.sites import Site, Walk
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.undo import undone_on_error


@dataclass(frozen=True)
class Choice:
    """What a plan has in mind for one site: a rewrite, or the reason why it stays; and what came of it."""

    site: Site
    target: str
    rewrite: Rewrite | None
    refusal: Refusal | None = None
    unused: bool = False  # forward does not call it, on the example inputs

    @classmethod
    def left(cls, site: Site, refusal: Refusal) -> "Choice":
        return cls(site, KEEP, None, refusal)

    @property
    def reason(self) -> str | None:
        return None if self.refusal is None else str(self.refusal)

    @property
    def note(self) -> str:
        """What is to be said of a site that will be rewritten: where it is folded, why eval can't stay the same."""
        note = "" if self.rewrite is None else self.rewrite.note(self.site)
        return "; ".join(filter(None, ("never called on the example inputs" if self.unused else "", note)))

    def outcome(self, done: Rewritten | None, probe: Probe) -> SiteResult:
        """What became of the site, measured now; the twin's norm keeps the figures, for its manifest."""
        if self.rewrite is None or done is None:
            return SiteResult.kept(self.site, self.reason or "the traced forward does not use it")
        site, inexact, halves = done.site, self.rewrite.inexact(done.site), self.rewrite.halves(*done)
        difference, error = (None, None) if halves is None else measured(*halves, inexact, probe, site.norm)
        origin = sites.origin_of(done.norm)
        if origin is not None:
            origin.difference, origin.error = difference, error
        limit = None if inexact or halves is None else tolerance(halves[0][0] or site.module)
        return SiteResult(site.names, site.kind, site.channels, self.target, difference, limit, None, self.note, error)


@dataclass
class Plan(Printable):
    """Which site becomes what. Print it, then `apply()` for a new module or `apply_()` to rewrite the model in place."""

    model: nn.Module
    choices: list[Choice]
    lifts: list[str] = field(default_factory=list)  # modules whose own forward calls F.batch_norm, and will be traced
    passes: list[Rewrite] = field(default_factory=list)
    missing: str = "no batch norm"  # what it was looked through for in vain, where nothing was found
    example_inputs: Sequence[Tensor] | None = None  # the whole network is compared on these

    @property
    def rewritten(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.rewrite is not None]

    @property
    def kept(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.rewrite is None]

    @property
    def fresh(self) -> bool:
        """Whether nothing was trained yet: every batch norm has the statistics that it was made with."""
        return untouched(self.model)

    def summary(self) -> Summary:
        lines = [
            (c.site.label, c.site.kind, str(c.site.channels or ""), c.target, c.reason or c.note) for c in self.choices
        ]
        count = f"{len(self.rewritten)} of {len(self.choices)} sites to be rewritten"
        return [count, Table(("site", "was", "channels", "becomes", "note"), lines)]

    def apply(self, optimizers: Iterable[Optimizer] = ()) -> tuple[nn.Module, Report]:
        """A rewritten copy of the model, and the report. The model itself is not touched.

        optimizers: made for the model; they step the copy from now on, with the state they have.
        """
        self.require()
        twin = deepcopy(self.model)
        copies = dict(twin.named_parameters())
        twin, report, heirs = self._carry_out(twin)
        if report.ok:  # else the copy is not for use
            copied = {id(old): copies[name] for name, old in self.model.named_parameters() if name in copies}
            rebind(optimizers, {key: heirs.get(id(new), [new]) for key, new in copied.items()})
        return twin, report

    def apply_(self, optimizers: Iterable[Optimizer] = ()) -> tuple[nn.Module, Report]:
        """Rewrite the model in place; returns it (a new root where the root itself was a norm) and the report.

        Parameters stay the same objects where the target has them, so that optimisers need nothing; where it brings
        parameters of its own (weight norms, affines), the optimizers that are given step those from now on.
        """
        self.require()
        with undone_on_error(self.model):
            model, report, heirs = self._carry_out(self.model)
            if report.ok:
                rebind(optimizers, {id(parameter): [parameter] for parameter in model.parameters()} | heirs)
        return model, report

    def _carry_out(self, model: nn.Module) -> tuple[nn.Module, Report, dict[int, list[nn.Parameter]]]:
        original = self._passage(model)
        model = lift_(model, self.lifts) if self.lifts else model
        walk, done = Walk(model), dict[str, Rewritten]()
        places = {
            (id(rewrite), site.name): site
            for rewrite in self.passes
            for site in rewrite.look(model, walk.find(rewrite.wants))
        }
        heirs: dict[int, list[nn.Parameter]] = {}
        for choice in sorted(self.rewritten, key=_turn):
            site = places.get((id(choice.rewrite), choice.site.name))
            if choice.rewrite is not None and site is not None:
                model, [rewritten] = choice.rewrite.apply(model, [site])
                done[choice.site.name] = rewritten
                heirs |= inherited(parameters_of(site.before, site), parameters_of(rewritten.before, rewritten.norm))
        probe = Probe()
        report = Report([choice.outcome(done.get(choice.site.name), probe) for choice in self.choices])
        if original is not None and report.ok and not report.live:
            self._compare(original, model)
        return model, report, heirs

    def _passage(self, model: nn.Module) -> Passage | None:
        """What the model does on the example inputs, where there are any and the twin has to do the same."""
        exact = all(choice.rewrite is None or not choice.rewrite.inexact(choice.site) for choice in self.choices)
        names = [choice.site.name for choice in self.rewritten]
        return passage(model, names, self.example_inputs) if exact and self.example_inputs is not None else None

    def _compare(self, before: Passage, twin: nn.Module) -> None:
        after = self._passage(twin)
        apart = None if after is None else why_apart(before, after, limit(self.model))
        if apart is not None:
            raise NormRewriteError(
                f"on the example inputs the twin computes another function: {apart}. Code of the network may look at what was "
                "rewritten: find the site by --exclude, and leave it.",
                exit_code=1,
            )

    def require(self, expect: int | None = None) -> None:
        """Raises where no site, or not `expect` sites, would be rewritten; the message carries the reasons."""
        reasons = sorted({f"{c.site.label}: {c.reason}" for c in self.kept})
        because = f" Left: {'; '.join(reasons[:5])}{' ...' if len(reasons) > 5 else ''}." if reasons else ""
        if not self.choices:
            raise NormRewriteError(
                f"{type(self.model).__name__} holds {self.missing}, so there is nothing to rewrite. "
                "`normrewrite inspect` lists its norms; metrics reach other scopes with --scope."
            )
        if not self.rewritten:
            raise NormRewriteError(f"none of {len(self.choices)} sites can be rewritten.{because}")
        if expect is not None and len(self.rewritten) != expect:
            raise NormRewriteError(f"expected {expect} sites to be rewritten, found {len(self.rewritten)}.{because}")


def untouched(model: nn.Module) -> bool:
    """Whether nothing was trained yet: every batch norm has the statistics that it was made with."""
    norms = sites.find(model)
    return bool(norms) and all(is_fresh(site.module) for site in norms)


def _turn(choice: Choice) -> int:
    """When a choice is carried out: by the place of its pass in the pipeline, passes of others' last."""
    return next((place for place, each in enumerate(PIPELINE) if isinstance(choice.rewrite, each)), len(PIPELINE))
