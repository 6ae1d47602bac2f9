"""One pass of a network in eval on example inputs: what it returns and which norms it calls, held against another's.

>>> before = passage(model, ["norm"], [x]); why_apart(before, passage(twin, ["norm"], [x]), limit(model))
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.verify import named, own_limit
from normrewrite.data import Batch, argument_names
from normrewrite.execution import Outputs, call, device_of, flat
from normrewrite.sites.modes import evaluating
from normrewrite.tolerances import LIMITS, worst


@dataclass(frozen=True)
class Passage:
    """called: the named modules that forward called."""

    called: frozenset[str]
    outputs: Outputs


def passage(model: nn.Module, names: Collection[str], inputs: Sequence[Tensor]) -> Passage:
    """Run the model on forward's arguments, always with the same random numbers. Raises where it can't take them."""
    called: set[str] = set()
    modules = sites.by_name(model)

    def note(name: str) -> Any:
        return lambda module, arguments: called.add(name)

    handles = [modules[name].register_forward_pre_hook(note(name)) for name in names if name in modules]
    device = device_of(model)
    batch = Batch(named(list(inputs), model)).to(device)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            outputs = flat(call(model, batch, argument_names(model)))
    finally:
        for handle in handles:
            handle.remove()
    return Passage(frozenset(called), outputs)


def limit(model: nn.Module) -> float:
    """How far its outputs may be from those of another form of it, in units of the largest; GPUs may compute in TF32."""
    own = own_limit(model)[1].tolerance
    return max(own, LIMITS["fp16"].tolerance) if device_of(model).type == "cuda" else own


def why_apart(before: Passage, after: Passage, limit: float) -> str | None:
    """How the second differs from the first, which calls each of its norms and returns the same within the limit; else None."""
    skipped = sorted(before.called - after.called)
    if skipped:
        return f"it calls no norm at {', '.join(skipped[:4])}"
    if before.outputs.keys() != after.outputs.keys():
        return f"it returns {', '.join(after.outputs) or 'nothing'} instead of {', '.join(before.outputs) or 'nothing'}"
    for name, wanted in before.outputs.items():
        output = after.outputs[name]
        if output.shape != wanted.shape:
            return f"{name} is {tuple(output.shape)} instead of {tuple(wanted.shape)}"
        if wanted.is_floating_point() and not (gap := worst(output, wanted, 0.0)) <= limit:
            return f"{name} differs by {gap:.1e} of its largest number, with {limit:.0e} allowed"
    return None
