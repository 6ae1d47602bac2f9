"""The table by site, column by column. The page, the terminal and the explanation below the table all follow from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from normrewrite.reporting.facts import SiteFigures, Spread


@dataclass(frozen=True)
class Column:
    """head: two words; unit: in which it is told, if in any; meaning: a sentence for the reader; cell: its text, "" for none;
    part: of the table, where a terminal is too narrow for all of it: `function`, `scales` or `inputs`."""

    head: str
    unit: str
    meaning: str
    cell: Callable[[SiteFigures], str]
    number: bool = True
    part: str = "function"


def _became(site: SiteFigures) -> str:
    return f"{site.was} → {site.target}" if site.target else f"{site.was}, refused" if site.refused else site.was


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    low, middle, high = map(short, (spread.low, spread.middle, spread.high))
    return middle if low == high else f"{middle} ({low}–{high})"


def _weights(site: SiteFigures) -> str:
    after = _spread(site.weight_after)
    return _spread(site.weight_before) + (f" → {after}" if after else "")


def _dead(site: SiteFigures) -> str:
    return "" if site.advice is None or site.advice.kappa is None else f"{site.advice.dead} of {site.channels}"


def _bits(name: str) -> Callable[[SiteFigures], str]:
    def cell(site: SiteFigures) -> str:
        known = site.advice is not None and site.advice.kappa is not None
        value = getattr(site.advice, name) if known else math.inf
        return f"{value:+.1f}".replace("-", "−") if math.isfinite(value) else ""

    return cell


def short(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else power(value)


def power(value: float | None, digits: int = 1) -> str:
    """`2.4 × 10⁻⁷`, as people write it."""
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

SITE = Column("site", "", "The norm's dotted name in the model.", lambda site: site.label, number=False)
COLUMNS = (
    Column(
        "was → is",
        "",
        "Its class before, and the target that it became; a class alone was left.",
        _became,
        number=False,
    ),
    Column("channels", "", "How many channels it normalises.", lambda site: str(site.channels or "")),
    Column(
        "eval difference",
        "of largest output",
        "Largest difference of the site's output in eval, before and after the rewrite, on random input of its width.",
        lambda site: power(site.difference),
    ),
    Column(
        "error",
        "of largest output",
        "The same against the original's function computed in float64: what the site itself rounds away.",
        lambda site: power(site.error),
    ),
    Column(
        "scale before",
        "input's unit",
        "What the norm divided by in eval: median of its channels, and smallest to largest.",
        lambda site: _spread(site.scale_before),
        part="scales",
    ),
    Column(
        "scale after",
        "input's unit",
        "What it divides by now. Calibration moves it to what the new metric reads, and weight makes up for that.",
        lambda site: _spread(site.scale_after),
        part="scales",
    ),
    Column(
        "κ",
        "× σ",
        "What the metric reads on the real inputs, over their standard deviation: 1 on Gaussians. Median of live channels.",
        lambda site: "" if site.kappa is None else f"{site.kappa:.3f}",
        part="inputs",
    ),
    Column(
        "fp16, Σ|d|",
        "bits of headroom",
        "Powers of two between 65504 and the largest sum of absolute deviations of a channel; below 0 a half sum is infinite.",
        _bits("fp16_sums"),
        part="inputs",
    ),
    Column(
        "fp16, Σd²",
        "bits of headroom",
        "The same for the sum of squares, which batch norm needs and l1 does not.",
        _bits("fp16_squares"),
        part="inputs",
    ),
    Column(
        "int8",
        "bits of headroom",
        "Powers of two between one step of an int8 tensor (largest |x| over 127) and the narrowest channel's σ; below 0 "
        "rounding takes the channel away.",
        _bits("int8"),
        part="inputs",
    ),
    Column("dead", "channels", "Channels whose input is constant on all data.", _dead, part="inputs"),
    Column(
        "weight norm",
        "2-norm by channel",
        "Of the weights in front, by output channel: median, and smallest to largest; after the arrow, where it changed.",
        _weights,
        part="scales",
    ),
    Column("note", "", "Why a site was left, or what is special about it.", lambda site: site.note, number=False),
)


def used(sites: list[SiteFigures]) -> list[Column]:
    """The columns that say something of any of these sites."""
    return [column for column in COLUMNS if any(column.cell(site) for site in sites)]
