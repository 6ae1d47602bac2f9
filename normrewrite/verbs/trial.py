"""What of a plan has to be tried before it is believed: code that looks at its norms, `.train()` of a network's own.

Where code would take another branch for a rewritten norm (normrewrite.sites.looks), measuring each site tells nothing. With
inputs the whole network is compared, original and twin: outputs in eval where the target keeps the function, and in eval and in
training which norms are called, in what order and on what shapes. Without, or where these differ, the sites are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite import sites
from normrewrite.errors import first_line
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.sites import Site, looks
from normrewrite.sites.modes import evaluating
from normrewrite.verbs.verify import device_of, verify

if TYPE_CHECKING:
    from normrewrite.verbs.convert import Choice, Plan

Calls = list[tuple[str, tuple[int, ...] | None]]  # which site was called, and on what shape
_REMEDY = (
    "give example inputs (--input-shape, --calibrate), so that the whole network is compared, leave the site with --exclude, or "
    "change that code"
)


def refused(plan: Plan, inputs: Sequence[Tensor] | None) -> dict[str, str]:
    """By site, why a rewrite that a plan has in mind is not to be made after all."""
    reasons = _looked_at(plan, inputs)
    left = [choice for choice in plan.rewritten if choice.site.name not in reasons]
    return reasons | (_flagged(plan, left) if left and _has_own_train(plan.model) else {})


def _looked_at(plan: Plan, inputs: Sequence[Tensor] | None) -> dict[str, str]:
    choices = {choice.site.name: choice for choice in plan.rewritten}
    known: dict[str, looks.Renewed] = {}

    def renewed(site: Site) -> looks.Renewed:
        rewrite = choices[site.name].rewrite
        assert rewrite is not None
        if site.name not in known:
            known[site.name] = looks.Renewed(rewrite.rewrite(site), not rewrite.inexact(site))
        return known[site.name]

    lifted = [module for name, module in sites.by_name(plan.model).items() if name in plan.lifts]
    seen = looks.found(plan.model, [choice.site for choice in choices.values()], renewed, lifted)
    if not seen:
        return {}
    why = _REMEDY if inputs is None else _parts_ways(plan, inputs)
    return {name: f"{look}, which its twin answers otherwise: {why}" for name, look in seen.items()} if why else {}


# --- the whole network ---------------------------------------------------------------------------------------------------


def _parts_ways(plan: Plan, inputs: Sequence[Tensor]) -> str | None:
    """How original and twin differ on the inputs, or None where they don't."""
    original = deepcopy(plan.model)
    twin, report = plan.apply()
    names = [choice.site.name for choice in plan.rewritten]
    advice = "leave the site with --exclude, or change that code"
    try:
        if not (report.inexact or report.live):
            compared = verify(original, twin, [value.clone() for value in inputs])
            if not compared.ok:
                return f"on the example inputs the twin computes another function ({compared.verdict}); {advice}"
        for training in (False, True):
            for model in (original, twin):
                _set_mode(model, training)
            if calls(original, names, inputs) != calls(twin, names, inputs):
                return f"in {'training' if training else 'eval'} the twin takes another way through the network; {advice}"
    except Exception as error:  # both run their own code
        return f"original and twin can't be compared on the example inputs ({first_line(error)}); {advice}, or give others"
    return None


def calls(model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> Calls:
    """The named modules in the order in which forward calls them, as the model's flags are, each with its input's shape."""
    made: Calls = []
    modules = sites.by_name(model)
    handles = [
        modules[name].register_forward_pre_hook(
            lambda module, args, name=name: made.append((name, tuple(args[0].shape) if _has_tensor(args) else None))
        )
        for name in names
        if name in modules
    ]
    device = device_of(model)
    try:
        with torch.no_grad(), _seeded(device):
            model(*(value.clone().to(device) for value in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return made


def _has_tensor(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments) and isinstance(arguments[0], Tensor)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and the caller's afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


# --- training flags ------------------------------------------------------------------------------------------------------


def _has_own_train(model: nn.Module) -> bool:
    return any(
        (cls.train, cls.eval) != (nn.Module.train, nn.Module.eval) or "train" in vars(module)
        for module in model.modules()
        for cls in [type(module)]
    )


def _flagged(plan: Plan, left: Sequence[Choice]) -> dict[str, str]:
    """Sites that the network's own `.train()` or `.eval()` would leave in another mode than the original's."""
    original, (twin, _) = deepcopy(plan.model), replace(plan, choices=list(left)).apply()
    names = [choice.site.name for choice in left]
    refused: dict[str, str] = {}
    for training in (True, False):
        flags, now = (_after(model, names, training) for model in (original, twin))
        mode = "train" if training else "eval"
        for name in names:
            if flags.get(name) is not None and now.get(name) is not None and flags[name] != now[name]:
                refused.setdefault(
                    name,
                    f"after the network's own .{mode}() this norm is in {'training' if flags[name] else 'eval'}, and its twin "
                    "would not be. Rewrite it to `frozen` or `none` where it is held still for good, leave it with --exclude, or have "
                    "that code look for nr.nn.BatchNorm too",
                )
    return refused


def _after(model: nn.Module, names: Iterable[str], training: bool) -> dict[str, bool]:
    """By name, the training flag of the norms whose statistics it moves."""
    _set_mode(model, training)
    modules = sites.by_name(model)
    moving = {name: modules[name] for name in names if name in modules and _moves(modules[name])}
    return {name: module.training for name, module in moving.items()}


def _moves(norm: nn.Module) -> bool:
    """Whether training does another thing than eval here; a norm of a class of its own is taken to."""
    if isinstance(norm, BatchNorm | MeanOnlyBatchNorm | _BatchNorm):
        return not isinstance(norm, FrozenBatchNorm)
    return sites.is_norm(norm)


def _set_mode(model: nn.Module, training: bool) -> None:
    model.train() if training else model.eval()


# --- which norms are called ----------------------------------------------------------------------------------------------


def never_called(model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> set[str]:
    """The named modules of the model that forward does not call in eval; none where it can't run on the inputs by position."""
    try:
        with evaluating(model):
            called = {name for name, _ in calls(model, names, inputs)}
    except Exception:  # the model's own code runs here; who compares or folds tells what is wrong
        return set()
    return (set(names) & sites.by_name(model).keys()) - called
