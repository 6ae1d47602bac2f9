"""The main job: plan which norm becomes what, and carry it out.

>>> twin = convert(model, to="l1")
>>> plan_ = plan(model, to="topk:10"); print(plan_); twin, report = plan_.apply()
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from normrewrite import rules as rules_
from normrewrite import sites
from normrewrite.api import trial
from normrewrite.api.passage import passage
from normrewrite.api.plan import Choice, Plan
from normrewrite.errors import NormRewriteError
from normrewrite.execution import dtype_of, fitted_to
from normrewrite.nn.parts import deepcopy, require_module
from normrewrite.options.convert import Names, PlanOptions
from normrewrite.options.fields import options, takes
from normrewrite.passes import Rewrite
from normrewrite.passes.lift_functional import candidates, lifted
from normrewrite.passes.swap_metric import SCOPES
from normrewrite.provenance.report import Report
from normrewrite.rules import KEEP, Rules
from normrewrite.sites import Site, Walk
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.undo import undone_on_error
from normrewrite.targets import require_text, rewrite


@options
class PlanCall(PlanOptions):
    """What `plan` takes in Python."""

    model: nn.Module = field(kw_only=False)
    to: str = field(default="l1", kw_only=False)
    rules: Mapping[str, str | None] | Rules | None = None
    example_inputs: Sequence[Tensor] | None = None


@options
class ConvertCall(PlanCall):
    """What `convert` and `convert_` take in Python."""

    optimizers: Iterable[Optimizer] = ()


@takes(PlanCall)
def plan(options: PlanCall) -> Plan:
    """Decide for every norm of `model` what it becomes; touches nothing.

    >>> twin, report = plan(model, to="l1", rules={"layer4.*": "linf", "stem.bn": None}).apply()

    to: a target of normrewrite.targets: `l1`, `topk:1%`, `group:4`, `wn`, ..., or `l2` for torch's own norms back from ours.
    scope: for metrics, which norms are meant: `batch`, `layer`, `group`, `instance`, `rms`, several of them, or `all`.
    example_inputs: forward's arguments. They tell which norms are never called, and what linear layers a norm can be folded
    into; and original and twin are compared on them as a whole. Where the network's code looks at its norms, those are left
    without.
    rules: PATTERN -> target (None or `keep` leaves a site), first match wins, before `to`.
    include, exclude: globs or `re:` patterns of dotted names; each must match a site.
    Raises NormRewriteError for an unknown target or pattern, or a model wrapped for data-parallel training.
    """
    return planned(options)


def planned(options: PlanCall) -> Plan:
    """`plan`, of what it takes as one object."""
    model, to, example_inputs = options.model, options.to, options.example_inputs
    require_module(model)
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise NormRewriteError(
            f"the model is wrapped in {type(model).__name__}. Convert model.module, then wrap the result again."
        )
    _require_tensors(example_inputs)
    if example_inputs is not None:
        dtype = dtype_of(model)
        example_inputs = [fitted_to(dtype, value) for value in example_inputs]
    scopes = as_scopes(options.scope)
    pairs = rules_.as_rules(options.rules)
    require_text(to)
    asked = dict.fromkeys([to, *(target for _, target in pairs if target != KEEP)])
    passes = {target: rewrite(target, options.gain, scopes, example_inputs, options.offset) for target in asked}
    walk = Walk(model)
    norms, lifts, choices = _find(walk, list(passes.values()))
    include, exclude = (
        rules_.as_names(names, option) for names, option in ((options.include, "include"), (options.exclude, "exclude"))
    )
    if norms:
        for option, patterns in (("--include", include), ("--exclude", exclude), ("--rule", [p for p, _ in pairs])):
            rules_.must_match(patterns, norms, option)
    seen = {}
    for name, each in passes.items():
        own = [site for site in norms if each.wants(site.module)]
        seen[name] = {site.name: site for site in each.look(model, own)}
    fast = walk.held_fast()
    for site in norms:
        target = next((t for pattern, t in pairs if rules_.matches(pattern, site)), to)
        known = site if target == KEEP else seen[target].get(site.name)
        if known is not None:
            choices.append(_choose(known, target, include, exclude, passes, fast))
    choices += [Choice.left(site, _OUT_OF_SIGHT) for site in walk.out_of_sight(_wanted_by(passes.values()))]
    wanted = [name for name in lifts if any(_within(c.site.name, name) for c in choices if c.rewrite is not None)]
    missing = "no batch norm" if scopes == ("batch",) else f"no norm of scope {', '.join(scopes)}"
    return _tried(Plan(model, choices, wanted, list(passes.values()), missing), walk, example_inputs)


def _tried(draft: Plan, walk: Walk, inputs: Sequence[Tensor] | None) -> Plan:
    """The plan without the rewrites that a look at the whole network forbids, and with what inputs show."""
    names = [choice.site.name for choice in draft.choices]
    called = set(names) if inputs is None else passage(draft.model, names, inputs).called
    unused = (set(names) & walk.by_name.keys()) - called
    refused = trial.refused(draft, walk, inputs)
    choices = [
        Choice.left(choice.site, refused[choice.site.name])
        if choice.rewrite is not None and choice.site.name in refused
        else replace(choice, unused=choice.site.name in unused)
        for choice in draft.choices
    ]
    return replace(draft, choices=choices, example_inputs=inputs)


_OUT_OF_SIGHT = Refusal(
    "is held in a plain list or attribute, where torch does not find it either. Put it into an nn.ModuleList"
)


def _require_tensors(inputs: Any) -> None:
    each = isinstance(inputs, Sequence) and all(isinstance(value, Tensor) for value in inputs)
    if inputs is not None and not each:
        raise NormRewriteError(
            "example_inputs: needed are forward's arguments as a sequence of tensors, as in (torch.zeros(1, 3, 32, 32),)."
        )


_COMPILED = Refusal("is compiled by TorchScript, with a batch norm inside. Convert the network before it is compiled")


def as_scopes(scope: Names) -> tuple[str, ...]:
    """`all`, a name, several with commas, or a sequence of names."""
    names = tuple(
        name.strip() for name in rules_.as_names(scope.split(",") if isinstance(scope, str) else scope, "scope")
    )
    return SCOPES if "all" in names else names


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _find(walk: Walk, passes: list[Rewrite]) -> tuple[list[Site], list[str], list[Choice]]:
    """Sites that are modules, or will be once their F.batch_norm is lifted; the modules to lift; and those that can't be."""
    norms = walk.find(_wanted_by(passes))
    lifts, left = [], [Choice.left(site, _COMPILED) for site in walk.compiled()]
    for candidate in candidates(walk):
        new = lifted(deepcopy(candidate.module))  # a trace runs the module's own code
        norms = [site for site in norms if site.module is not candidate.module]
        if isinstance(new, Refusal):
            left.append(Choice.left(candidate, new))
            continue
        lifts.append(candidate.name)
        known = {name for site in norms for name in site.names}
        inside = [
            Site(tuple(f"{candidate.name}.{name}".removeprefix(".") for name in site.names), site.module, ())
            for site in sites.find(new)
        ]
        norms += [site for site in inside if site.name not in known]
    return norms, lifts, left


def _wanted_by(passes: Iterable[Rewrite]) -> Callable[[nn.Module], bool]:
    """Whether any of the passes has a module for a site."""
    each = list(passes)
    return lambda module: any(rewrite.wants(module) for rewrite in each)


def _choose(
    site: Site,
    target: str,
    include: list[str],
    exclude: list[str],
    passes: dict[str, Rewrite],
    fast: Mapping[int, str],
) -> Choice:
    if include and not any(rules_.matches(pattern, site) for pattern in include):
        return Choice.left(site, Refusal("not in --include"))
    if any(rules_.matches(pattern, site) for pattern in exclude):
        return Choice.left(site, Refusal("in --exclude"))
    if target == KEEP:
        return Choice.left(site, Refusal("kept by a rule"))
    refusal = passes[target].refusal(site) or _held(site, fast)
    return Choice(site, target, passes[target]) if refusal is None else Choice.left(site, refusal)


def _held(site: Site, fast: Mapping[int, str]) -> Refusal | None:
    places = [fast[id(each.module)] for each in (site, site.before) if each is not None and id(each.module) in fast]
    text = "what can't be changed holds it or its layer too ({}), and would keep the old one. Make that a list"
    return Refusal(text.format(places[0])) if places else None


@takes(ConvertCall)
def convert(options: ConvertCall) -> nn.Module:
    """A copy of `model` with its norms rewritten to `to`; in eval the same function, unless the target can't be (group,
    layer, instance, rms, bwn:strict; see `plan`). Options are those of `plan`.

    >>> twin = convert(model, to="topk:10", exclude="stem.*", optimizers=[optimizer])

    optimizers: made for `model`; they step the copy from now on, with the state they have.

    Raises NormRewriteError where no site can be rewritten, or where a rewritten site differs beyond tolerance (exit_code 1).
    """
    return _checked(*planned(options).apply(options.optimizers))


@takes(ConvertCall)
def convert_(options: ConvertCall) -> nn.Module:
    """`convert` in place. Returns the model, or the new root where the model itself is a norm. On an error it is as it was."""
    chosen = planned(options)
    with undone_on_error(options.model):
        return _checked(*chosen.apply_(options.optimizers))


def _checked(model: nn.Module, report: Report) -> nn.Module:
    report.require_exact()
    return model
