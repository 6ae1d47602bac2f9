"""What a rewrite did to each site, as data."""

from dataclasses import asdict, dataclass
from typing import Any

from normrewrite.errors import NormRewriteError
from normrewrite.results import Mood, Result, Summary, Table, Verdict
from normrewrite.sites import Site


@dataclass(frozen=True)
class SiteResult:
    """One site: what it was, what it became, how far its eval function moved, or the reason why it was left.

    difference: to the norm it was; error: to that norm in float64 (normrewrite.diagnostics.exactness).
    """

    names: tuple[str, ...]
    was: str
    channels: int | None
    target: str | None
    difference: float | None
    tolerance: float | None
    reason: str | None
    note: str = ""
    error: float | None = None

    @classmethod
    def kept(cls, site: Site, reason: str) -> "SiteResult":
        return cls(site.names, site.kind, site.channels, None, None, None, reason)

    @property
    def label(self) -> str:
        return self.names[0] or "(the model itself)"

    @property
    def ok(self) -> bool:
        return self.difference is None or self.tolerance is None or self.difference <= self.tolerance


@dataclass(frozen=True)
class Report(Result):
    """Every site of one rewrite.

    >>> twin, report = plan(model).apply(); report.max_difference
    2.4e-07
    """

    sites: list[SiteResult]

    @property
    def rewritten(self) -> list[SiteResult]:
        return [site for site in self.sites if site.target is not None]

    @property
    def kept(self) -> list[SiteResult]:
        return [site for site in self.sites if site.target is None]

    @property
    def live(self) -> list[SiteResult]:
        """Rewritten sites without running statistics: eval computes live ones, so there is no function to keep."""
        return [site for site in self.rewritten if site.difference is None and site.tolerance is not None]

    @property
    def inexact(self) -> list[SiteResult]:
        """Rewritten sites whose target can't be the same function in eval."""
        return [site for site in self.rewritten if site.tolerance is None]

    @property
    def max_difference(self) -> float:
        return max((site.difference for site in self.sites if site.difference is not None), default=0.0)

    @property
    def ok(self) -> bool:
        return all(site.ok for site in self.sites)

    @property
    def mood(self) -> Mood:
        if not self.ok:
            return "bad"
        if self.inexact or self.live:
            return "mixed"
        return "good" if self.rewritten else "plain"

    def require_exact(self) -> None:
        bad = [site for site in self.sites if not site.ok]
        if bad:
            worst = max(bad, key=lambda site: site.difference or 0.0)
            raise NormRewriteError(
                f"{worst.label}: eval differs by {worst.difference:.2g} after the rewrite, tolerance {worst.tolerance:.2g} "
                f"({len(bad)} such sites). Leave them with --exclude, or report this as a fault of normrewrite.",
                exit_code=1,
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "rewritten": len(self.rewritten),
            "kept": len(self.kept),
            "max_difference": self.max_difference,
            "sites": [asdict(site) for site in self.sites],
        }

    def summary(self) -> Summary:
        counts = [f"{len(self.rewritten)} site{'s' * (len(self.rewritten) != 1)} rewritten, {len(self.kept)} left"]
        if any(site.difference is not None for site in self.sites):
            counts.append(f"largest eval difference {self.max_difference:.1e}")
        if self.inexact:
            counts.append(f"{len(self.inexact)} can't be exact")
        lines = [
            (
                site.label,
                site.was,
                str(site.channels or ""),
                site.target or "",
                "" if site.difference is None else f"{site.difference:.1e}",
                site.reason or site.note or ("live statistics" if site in self.live else ""),
            )
            for site in self.sites
        ]
        moods: list[Mood] = ["plain" if site.ok else "bad" for site in self.sites]
        heads = ("site", "was", "channels", "is now", "eval difference", "note")
        return [Verdict("; ".join(counts), self.mood), Table(heads, lines, moods=moods)]
