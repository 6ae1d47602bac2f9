"""What of a plan has to be tried before it is believed: code that looks at its norms, `.train()` of a network's own.

Where code would take another branch for a rewritten norm (normrewrite.sites.looks), measuring each site tells nothing. With
inputs the whole network is compared, original and twin: its outputs in eval, where the target keeps the function; and in eval
and in training, with the outputs of all sites set to the original's, that nothing differs between them. Without inputs, or
where anything differs, the sites are refused.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite import sites
from normrewrite.api.plan import Choice, Plan
from normrewrite.api.verify import verify
from normrewrite.errors import first_line
from normrewrite.execution import Outputs, device_of, flat
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.sites import Site, Walk, looks
from normrewrite.sites.refusal import Refusal
from normrewrite.tolerances import SAME_NETWORK, worst

_REMEDY = (
    "give example inputs (--input-shape, --calibrate), so that the whole network is compared, leave the site with --exclude, or "
    "change that code"
)


def refused(plan: Plan, walk: Walk, inputs: Sequence[Tensor] | None) -> dict[str, Refusal]:
    """By site, why a rewrite that a plan has in mind is not to be made after all. walk: through the plan's model."""
    refusals = _looked_at(plan, walk, inputs)
    left = [choice for choice in plan.rewritten if choice.site.name not in refusals]
    return refusals | (_flagged(plan, left) if left and _has_own_train(plan.model) else {})


def _looked_at(plan: Plan, walk: Walk, inputs: Sequence[Tensor] | None) -> dict[str, Refusal]:
    choices = {choice.site.name: choice for choice in plan.rewritten}
    known: dict[Any, looks.Renewed] = {}

    def renewed(site: Site, by_class: bool) -> looks.Renewed:
        rewrite = choices[site.name].rewrite
        assert rewrite is not None
        alike = (id(rewrite), type(site.module), tuple(site.module._modules), site.before is None)
        key = alike if by_class else site.name
        if key not in known:
            known[key] = looks.Renewed(rewrite.replacement(site).norm, not rewrite.inexact(site))
        return known[key]

    lifted = [walk.by_name[name] for name in plan.lifts]
    seen = looks.first_looks(plan.model, [choice.site for choice in choices.values()], renewed, lifted)
    if not seen:
        return {}
    why = _REMEDY if inputs is None else _parts_ways(plan, inputs)
    texts = {name: f"{look}, which its twin answers otherwise: {why}" for name, look in seen.items()} if why else {}
    return {name: Refusal(text) for name, text in texts.items()}


# --- the whole network ---------------------------------------------------------------------------------------------------


def _parts_ways(plan: Plan, inputs: Sequence[Tensor]) -> str | None:
    """How original and twin differ on the inputs, or None where they don't."""
    original = deepcopy(plan.model)
    twin, report = plan.apply()
    names = [choice.site.name for choice in plan.rewritten]
    folded = {choice.site.name for choice in plan.rewritten if choice.site.before is not None}
    advice = "leave the site with --exclude, or change that code"
    try:
        if not (report.inexact or report.live):
            compared = verify(original, twin, [value.clone() for value in inputs])
            if not compared.ok:
                return f"on the example inputs the twin computes another function ({compared.verdict}); {advice}"
        for training in (False, True):
            first = _run(_in_mode(original, training), names, inputs)
            if not _run(_in_mode(twin, training), names, inputs, first.calls).same(first, folded):
                return (
                    f"in {'training' if training else 'eval'} the twin takes another way through the network; {advice}"
                )
    except Exception as error:  # both run their own code
        return (
            f"original and twin can't be compared on the example inputs ({first_line(error)}); {advice}, or give others"
        )
    return None


@dataclass(frozen=True)
class _Call:
    """One call of a site: what came in, None where that is no tensor, and what came out."""

    name: str
    input: Tensor | None
    output: Any


@dataclass
class _Run:
    """The calls of the sites, in their order, and what the network returned."""

    calls: list[_Call]
    outputs: Outputs

    def same(self, other: "_Run", folded: Collection[str]) -> bool:
        """Whether two runs with the same outputs of every site differ nowhere else: in no site's input, and not in the end.
        The input of a site that was folded into the layer in front is another by intent, but for its shape."""
        if [call.name for call in self.calls] != [call.name for call in other.calls]:
            return False
        inputs = all(
            _alike(mine.input, its.input, by_shape=mine.name in folded)
            for mine, its in zip(self.calls, other.calls, strict=True)
        )
        ends = self.outputs.keys() == other.outputs.keys()
        return inputs and ends and all(_alike(value, other.outputs[name]) for name, value in self.outputs.items())


def _alike(a: Tensor | None, b: Tensor | None, *, by_shape: bool = False) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and (by_shape or worst(a, b, 0.0) <= SAME_NETWORK.get(b.dtype, 0.0))


def _run(model: nn.Module, names: Collection[str], inputs: Sequence[Tensor], replayed: Sequence[_Call] = ()) -> _Run:
    """One pass, as the model's flags are. replayed: the calls of another run, whose outputs take the place of the sites' own, so
    that what is between the sites can be compared by itself."""
    calls: list[_Call] = []
    entered: list[Tensor | None] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        first = arguments[0] if arguments else None
        entered.append(first.clone() if isinstance(first, Tensor) else None)

    def leave(name: str, output: Any) -> Any:
        place = len(calls)
        wanted = replayed[place].output if place < len(replayed) and replayed[place].name == name else output
        output = wanted.clone() if isinstance(wanted, Tensor) else wanted
        calls.append(_Call(name, entered.pop(), wanted))
        return output

    modules = sites.by_name(model)
    known = [name for name in names if name in modules]
    handles = [modules[name].register_forward_pre_hook(enter) for name in known]
    handles += [
        modules[name].register_forward_hook(lambda module, args, output, name=name: leave(name, output))
        for name in known
    ]
    device = device_of(model)
    try:
        with torch.no_grad(), _seeded(device):
            return _Run(calls, flat(model(*(value.clone().to(device) for value in inputs))))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and the caller's afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


# --- training flags ------------------------------------------------------------------------------------------------------


_FLAG = (
    "after the network's own .{}() this norm is in {}, and its twin would not be. Rewrite it to `frozen` or `none` where it is "
    "held still for good, leave it with --exclude, or have that code look for nr.nn.BatchNorm too"
)
_MODES = frozenset({"train", "eval"})


def _has_own_train(model: nn.Module) -> bool:
    """Whether a module has a `.train()` or `.eval()` of its own: what that asks for is seen where it is run."""
    classes = {type(module) for module in model.modules()}
    own = any((cls.train, cls.eval) != (nn.Module.train, nn.Module.eval) for cls in classes)
    return own or any(_MODES & vars(module).keys() for module in model.modules())


def _flagged(plan: Plan, left: Sequence[Choice]) -> dict[str, Refusal]:
    """Sites that the network's own `.train()` or `.eval()` would leave in another mode than the original's."""
    original, (twin, _) = deepcopy(plan.model), replace(plan, choices=list(left)).apply()
    names = [choice.site.name for choice in left]
    refusals: dict[str, Refusal] = {}
    for training in (True, False):
        flags, now = (_after(model, names, training) for model in (original, twin))
        mode = "train" if training else "eval"
        for name in names:
            if flags.get(name) is not None and now.get(name) is not None and flags[name] != now[name]:
                text = _FLAG.format(mode, "training" if flags[name] else "eval")
                refusals.setdefault(name, Refusal(text))
    return refusals


def _after(model: nn.Module, names: Iterable[str], training: bool) -> dict[str, bool]:
    """By name, the training flag of the norms whose statistics it moves."""
    modules = sites.by_name(_in_mode(model, training))
    moving = {name: modules[name] for name in names if name in modules and _moves(modules[name])}
    return {name: module.training for name, module in moving.items()}


def _moves(norm: nn.Module) -> bool:
    """Whether training does another thing than eval here; a norm of a class of its own is taken to."""
    if isinstance(norm, BatchNorm | MeanOnlyBatchNorm | _BatchNorm):
        return not isinstance(norm, FrozenBatchNorm)
    return sites.is_norm(norm)


def _in_mode(model: nn.Module, training: bool) -> nn.Module:
    model.train() if training else model.eval()
    return model
