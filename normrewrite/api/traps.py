"""What is known to go wrong with batch norms, where it stands in a model, and what is done about it.

>>> for trap in find_traps(model):
...     print(trap.title, trap.sites)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.passes.lift_functional import candidates
from normrewrite.sites import Site, Walk
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal


@dataclass(frozen=True)
class Trap:
    """title; sites: where it stands; wrong: what would happen; remedy: what normrewrite does, or what to do."""

    title: str
    sites: tuple[str, ...]
    wrong: str
    remedy: str


@dataclass(frozen=True)
class _Known:
    title: str
    wrong: str
    remedy: str
    holds: Callable[[Site, nn.Module], bool]


def find_traps(model: nn.Module) -> list[Trap]:
    """Every known trap that the model holds. Looks, and touches nothing."""
    return traps_of(Walk(model))


def traps_of(walk: Walk) -> list[Trap]:
    norms = walk.find()
    traps = []
    for known in _KNOWN:
        where = tuple(site.label for site in norms if known.holds(site, walk.model))
        if where:
            traps.append(Trap(known.title, where, known.wrong, known.remedy))
    calls = tuple(site.label for site in candidates(walk))
    if calls:
        traps.append(replace(_FUNCTIONAL, sites=calls))
    unseen = tuple(site.label for site in walk.out_of_sight())
    if unseen:
        traps.append(replace(_OUT_OF_SIGHT, sites=unseen))
    return traps


def _tensor(site: Site, name: str) -> Tensor | None:
    value = getattr(site.module, name, None)
    return value if isinstance(value, Tensor) and not value.is_meta else None


def _spread(site: Site) -> Tensor | None:
    scale, var = _tensor(site, "running_scale"), _tensor(site, "running_var")
    return scale if var is None else var.float().sqrt()


def _any(values: Tensor | None, holds: Callable[[Tensor], Tensor]) -> bool:
    return values is not None and bool(holds(values.detach().float()).any())


def is_frozen(site: Site) -> bool:
    """Whether training never measures it."""
    return isinstance(site.norm, Kind) and issubclass(site.norm.cls, FrozenBatchNorm)


def _is_measured(norm: nn.Module) -> bool:
    """Whether it is one of ours whose running statistics training moves."""
    ours = isinstance(norm, BatchNorm) and not isinstance(norm, FrozenBatchNorm)
    return ours and norm.running_mean is not None


def _low_precision(site: Site, name: str) -> bool:
    values = _tensor(site, name)
    return values is not None and torch.finfo(values.dtype).bits < 32


_FUNCTIONAL = Trap(
    "F.batch_norm called by hand",
    (),
    "tools that look for modules miss it, and the network stays half converted (pytorch #122070)",
    "the module that calls it is traced, and the call becomes a norm module; refused by name where that can't be done",
)

_OUT_OF_SIGHT = Trap(
    "norms in a plain list",
    (),
    "torch does not find them: they are in no state_dict, follow no .to() and no .eval()",
    "left, and named; put them into an nn.ModuleList. One that is registered too is rewritten in both places",
)

_KNOWN = (
    _Known(
        "running statistics that are not finite",
        "a NaN under mixed precision has poisoned them for good; every output is NaN (pytorch #88474, #115500)",
        "they are kept as they are; recompute them with the original, then convert. Ours skip such batches",
        lambda site, model: any(
            _any(_tensor(site, n), lambda t: ~t.isfinite()) for n in ("running_mean", "running_var", "running_scale")
        ),
    ),
    _Known(
        "running statistics in half precision",
        "small variances are flushed to zero and updates are lost in rounding",
        "the twin keeps them in fp32, whatever the model's dtype",
        lambda site, model: _low_precision(site, "running_mean"),
    ),
    _Known(
        "frozen inside a model in training",
        "its own training flag is off; the next model.train() lets its statistics move again",
        "the flag is carried over as it is; freeze it again after model.train(), or use a frozen norm",
        lambda site, model: model.training and not site.module.training and not is_frozen(site),
    ),
    _Known(
        "frozen for good",
        "no statistics are ever measured, so a metric makes no difference to training",
        "becomes a frozen norm of the same function; calibration leaves it out",
        lambda site, model: is_frozen(site),
    ),
    _Known(
        "activation or dropout fused into the norm's class",
        "a norm that is rebuilt from its tensors alone loses them without a word (timm #1254)",
        "they are kept behind the twin's norm, once the class was seen to do just that",
        lambda site, model: isinstance(site.norm, Kind) and not site.norm.ours and bool(site.norm.tail),
    ),
    _Known(
        "class that does more than normalise",
        "rebuilding it would change the function",
        "left as it is, with the reason",
        lambda site, model: isinstance(site.norm, Refusal),
    ),
    _Known(
        "used at several places",
        "replacing one place leaves the others behind; folding for one caller breaks the other (pytorch #197539)",
        "stays one module at all places; folded only where a layer has one caller; calibration takes the average",
        lambda site, model: len(site.names) > 1,
    ),
    _Known(
        "no running statistics",
        "eval measures the batch: outputs depend on the other inputs, and ONNX has no such inference (pytorch #75252)",
        "converted and marked 'live statistics'; not folded, and export refuses it by name",
        lambda site, model: _tensor(site, "running_mean") is None and not isinstance(site.norm, Refusal),
    ),
    _Known(
        "no affine parameters",
        "calibration has no weight to put its factor on",
        "converted exactly; calibrate leaves it out and says so",
        lambda site, model: getattr(site.module, "weight", None) is None and not isinstance(site.norm, Refusal),
    ),
    _Known(
        "dead channels",
        "their variance is zero, so that the smallest noise is divided by eps alone",
        "eval is the same; their gradient stays finite; calibrate counts them",
        lambda site, model: _any(_spread(site), lambda t: t < 1e-8),
    ),
    _Known(
        "weights that fp16 flushes to zero",
        "|weight| below 6e-8 is not zero, and would be after .half()",
        "kept as it is in fp32; look before you go to half precision",
        lambda site, model: _any(_tensor(site, "weight"), lambda t: (t != 0) & (t.abs() < 6e-8)),
    ),
    _Known(
        "momentum 0",
        "training normalises by the batch, but its running statistics never move (eval and training drift apart)",
        "carried over as it is; set a momentum before you train",
        lambda site, model: getattr(site.module, "momentum", None) == 0.0 and not is_frozen(site),
    ),
    _Known(
        "norms that update_bn passes by",
        "torch.optim.swa_utils.update_bn, and Lightning's averaging, measure torch's norms alone: an average of weights keeps "
        "statistics that are not its own",
        "nr.update_norms(model, data) measures these and torch's",
        lambda site, model: _is_measured(site.module),
    ),
    _Known(
        "SyncBatchNorm",
        "an average of the ranks' own deviations is not that of the whole batch: it misses how their means differ",
        "its twin measures all ranks' batches as one, as exactly as one process would",
        lambda site, model: isinstance(site.module, nn.SyncBatchNorm) or getattr(site.module, "synchronised", False),
    ),
)
