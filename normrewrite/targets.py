"""The table of targets: what `--to` may name, one row each, and the pass that makes it.

>>> rewrite("group:4").target
'group:4'
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normrewrite import norms
from normrewrite.errors import NormRewriteError, nearest
from normrewrite.nn.offset import Size, size_of
from normrewrite.norms import Gain
from normrewrite.options.convert import AUTO
from normrewrite.outside import count
from normrewrite.passes import (
    ChangeScope,
    FoldAffine,
    Freeze,
    NormaliseWeights,
    Renormalise,
    RestoreNative,
    Rewrite,
    SwapMetric,
)
from normrewrite.passes.normalise_weights import Form

Inputs = Sequence[Tensor] | None

# What a norm can be invariant to, after Ba, Kiros and Hinton 2016 (arXiv:1607.06450, table 1).
PROPERTIES = {
    "weight matrix scaled": "all weights of the layer in front times a constant",
    "weight vector scaled": "the weights of one output channel times a constant",
    "weight matrix shifted": "the same vector added to the weights of every output channel",
    "data set scaled": "every input times a constant",
    "data set shifted": "the same vector added to every input",
    "one input scaled": "one input of a batch times a constant",
}
_BATCH = frozenset({"weight matrix scaled", "weight vector scaled", "data set scaled", "data set shifted"})
_WEIGHTS = frozenset({"weight matrix scaled", "weight vector scaled"})
_SAMPLE = frozenset({"weight matrix scaled", "data set scaled", "one input scaled"})


@dataclass(frozen=True)
class Target:
    """One row. spelling: as in help texts; make: the pass, from the argument behind the colon (metrics: the whole spelling).

    invariant: what training with it is invariant to (names of PROPERTIES), for the norm alone on feature maps, without a bias
    in front; docs/invariances.md says where vectors differ.
    """

    spelling: str
    summary: str
    source: str
    make: Callable[..., Rewrite]
    invariant: frozenset[str]


def _plain(name: str, factory: Callable[[Inputs], Rewrite]) -> Callable[..., Rewrite]:
    def make(argument: str, example_inputs: Inputs = None) -> Rewrite:
        if argument:
            raise NormRewriteError(f"{name}:{argument}: {name} takes no argument. Write {name!r}.")
        return factory(example_inputs)

    return make


def _group(argument: str, example_inputs: Inputs = None) -> Rewrite:
    if not argument:
        return ChangeScope("group")
    number = count(argument)
    if number is None:
        raise NormRewriteError(f"group:{argument}: {argument!r} is no count. Give a whole number from 1 (group:4).")
    return ChangeScope("group", number)


def _weights(bounded: bool) -> Callable[..., Rewrite]:
    options: dict[str, dict[str, Any]] = {"mean-bn": {"mean_bn": True}, "l1": {"p": 1}, "linf": {"p": math.inf}}
    options |= {"strict": {"strict": True}} if bounded else {}
    name = "bwn" if bounded else "wn"

    def make(argument: str, example_inputs: Inputs = None) -> Rewrite:
        asked = [word for word in argument.split(",") if word]
        unknown = [word for word in asked if word not in options]
        if unknown:
            raise NormRewriteError(
                f"{name}:{argument}: {unknown[0]!r} is no form.{nearest(unknown[0], options)} Known: {', '.join(options)}."
            )
        chosen = {key: value for word in asked for key, value in options[word].items()}
        target = ":".join([name, ",".join(asked)]) if asked else name
        return NormaliseWeights(Form(bounded=bounded, **chosen), target, example_inputs)

    return make


def of_metric(row: norms.Metric) -> Target:
    """A metric as a target; docs/add_a_norm.md adds one in the same way."""
    return Target(row.spelling, row.summary, row.source, SwapMetric, _BATCH)


_WU_HE = "Wu & He 2018, arXiv:1803.08494"

TARGETS: dict[str, Target] = {row.name: of_metric(row) for row in norms.METRICS.values() if not row.native} | {
    "l2": Target(
        "l2",
        "torch's own norms back from ours",
        "Ioffe & Szegedy 2015",
        _plain("l2", lambda _: RestoreNative()),
        _BATCH,
    ),
    "renorm": Target(
        "renorm",
        "Batch Renorm: training follows the running statistics",
        "Ioffe 2017, arXiv:1702.03275",
        _plain("renorm", lambda _: Renormalise()),
        frozenset(),
    ),
    "group": Target("group[:G]", "group norm, at most G groups (1 to 4)", _WU_HE, _group, _SAMPLE),
    "layer": Target(
        "layer",
        "one group of all channels of a sample",
        "Ba et al. 2016, arXiv:1607.06450",
        _plain("layer", lambda _: ChangeScope("layer")),
        _SAMPLE,
    ),
    "instance": Target(
        "instance",
        "each channel of a sample alone; loses their means",
        "Ulyanov et al. 2016, arXiv:1607.08022",
        _plain("instance", lambda _: ChangeScope("instance")),
        _SAMPLE | _BATCH,
    ),
    "rms": Target(
        "rms",
        "root mean square of a sample, not centred",
        "Zhang & Sennrich 2019, arXiv:1910.07467",
        _plain("rms", lambda _: ChangeScope("rms")),
        _SAMPLE,
    ),
    "frozen": Target(
        "frozen",
        "statistics and parameters stand still",
        "Detectron",
        _plain("frozen", lambda _: Freeze()),
        frozenset(),
    ),
    "bwn": Target(
        "bwn[:strict|mean-bn]",
        "bounded weight norm: the norm of each layer's weights is fixed",
        "Hoffer et al. 2018, arXiv:1803.01814, section 4",
        _weights(True),
        _WEIGHTS,
    ),
    "wn": Target(
        "wn[:mean-bn]",
        "weight norm: weights as direction and length",
        "Salimans & Kingma 2016, arXiv:1602.07868",
        _weights(False),
        _WEIGHTS,
    ),
    "none": Target(
        "none", "folded away, for deployment", "Jacob et al. 2017, 3.2", _plain("none", FoldAffine), frozenset()
    ),
}


def spellings() -> list[str]:
    return [target.spelling for target in TARGETS.values()]


def measures(spec: str) -> bool:
    """Whether a target is a metric, and so keeps the scope of what it finds."""
    row = norms.METRICS.get(spec.strip().lower().partition(":")[0])
    return row is not None and not row.native


def require_text(spec: object) -> None:
    """Raises where a target is no text."""
    if not isinstance(spec, str):
        raise NormRewriteError(
            f"the target is a {type(spec).__name__}; needed is a text. Known: {', '.join(spellings())}."
        )


def rewrite(
    spec: str,
    gain: Gain = "exact",
    scopes: Sequence[str] = ("batch",),
    example_inputs: Inputs = None,
    offset: Size | None = AUTO,
) -> Rewrite:
    """The pass that makes a target. Raises NormRewriteError with the nearest name where there is none.

    gain, scopes: of metric targets; other targets say themselves what they normalise over. example_inputs: forward's
    arguments, which tell targets that fold norms away the rank of linear layers' outputs. offset: in front of norms of each
    sample, `auto`, `free` or a number; None is what 0.1.0 did.
    """
    require_text(spec)
    size = None if offset is None else size_of(offset)
    name, _, argument = spec.strip().lower().partition(":")
    if name not in TARGETS:
        raise NormRewriteError(
            f"--to {spec!r}: there is no such target.{nearest(name, TARGETS)} Known: {', '.join(spellings())}."
        )
    if measures(name):
        return TARGETS[name].make(spec, gain=gain, scopes=scopes)
    if tuple(scopes) != ("batch",):
        raise NormRewriteError(f"--scope is for metrics; {spec!r} says itself what it normalises over. Leave it out.")
    made = TARGETS[name].make(argument, example_inputs)
    return made.with_offset(size) if isinstance(made, ChangeScope) else made
