"""The options of `convert`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from normrewrite.options.fields import option, options
from normrewrite.options.groups import BatchSize, Overwrite, Pixels, Source

# As in normrewrite.targets, and normrewrite.norms.Gain, which --help would wait for; tests compare them.
TARGETS = (
    "Metrics: l1, linf, topk:K (a count, or a percentage as topk:1%), range. Weight norms: bwn (bounded), bwn:strict, wn, "
    "wn:mean-bn. Each sample's statistics: group[:G], layer, instance, rms. Also renorm, frozen, none (folded away), and l2 "
    "for torch's own norms back"
)
Gain = Literal["exact", "paper"]
Names = str | Sequence[str]
AUTO, FREE = "auto", "free"  # offsets that are no number


@options
class Scoped:
    """Which norms a metric is for."""

    scope: Names = option(
        "Norms whose metric changes: batch, layer, group, instance, rms, several with commas, or all.",
        default="batch",
        metavar="SCOPES",
    )


@options
class PlanOptions(Scoped):
    """What becomes of which site, beside target and rules."""

    include: Names = option("Only these sites: name, glob or re:REGEX; repeatable.", default=(), metavar="GLOB")
    exclude: Names = option("Not these sites; repeatable.", default=(), metavar="GLOB")
    gain: Gain = option("The constants of the metrics; paper: as published.", default="exact")
    offset: str | float = option(
        "Of group, layer and rms: the offset in front of the norm that keeps what the network did, a number, or free; 0: none. "
        "auto: 30, 5 once it is fitted (30 where that explains under 95 %), none in an untrained network.",
        default=AUTO,
        metavar="B",
    )


@options
class Convert(PlanOptions, Pixels, BatchSize, Overwrite, Source):
    """Rewrite norms; in eval the network computes the same function, or says where it can't."""

    to: str | None = option(f"{TARGETS}.", default=None, metavar="TARGET")
    replay: Path | None = option(
        "Do what this manifest (.json, or a twin's) did to another checkpoint.", default=None, metavar="FILE", file=True
    )
    _scope: ClassVar[Any] = Scoped
    rules: tuple[str, ...] = option(
        "Another target, or keep, for some sites; the first match wins.",
        default=(),
        flag="--rule",
        metavar="PATTERN=TARGET",
    )
    _plan: ClassVar[Any] = PlanOptions
    dry_run: bool = option("Print the plan, write nothing.", default=False, silent=True)
    expect: int | None = option("Fail unless exactly N sites are rewritten.", default=None, metavar="N", silent=True)
    input_shape: str | None = option(
        "Check the whole network too, on random input of this shape; needed where its code looks at its norms.",
        default=None,
        metavar="N,C,...",
    )
    calibrate: str | None = option(
        "Bring training nearer to the original's eval on this data, as `calibrate` does; fresh weight norms are initialised.",
        default=None,
        metavar="DATA",
        file=True,
    )
    _pixels: ClassVar[Any] = Pixels
    _batch: ClassVar[Any] = BatchSize
    folded: bool = option("Write a plain state_dict of the network with its norms folded away.", default=False)
    forget: bool = option("Keep nothing of the original: a smaller file, without a way back.", default=False)
    output: Path | None = option(
        "Output file.  [default: MODEL.TARGET.pt beside the input]", default=None, short="-o", silent=True
    )
    manifest: Path | None = option(
        "Write the manifest as JSON, too: a pickled module has no other.", default=None, metavar="FILE", silent=True
    )
    _force: ClassVar[Any] = Overwrite

    def missing(self) -> str:
        return "Missing option '--to', or '--replay'." if self.to is None and self.replay is None else ""
