"""Sites: the places in a model where a norm works, by dotted name, and what each norm computes.

>>> [site.name for site in find(model)]
['bn1', 'layer1.0.bn1', 'layer1.0.bn2']
>>> find(model)[0].norm
Kind(cls=BatchNorm2d, eps=1e-05, tail=(), ranks=(4,), metric='l2', gain='exact', ours=False)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.weights import WeightNorm, weight_norm_of
from normrewrite.sites import kinds, sample_kinds
from normrewrite.sites.hidden import Place, Shelf, hidden
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SampleKind

Norm = Kind | SampleKind  # what a site's norm computes


@dataclass(frozen=True)
class Site:
    """One norm module, every name it goes by, and every place (parent, key) that holds it: where it is registered, and the
    plain lists that hold it too; none for a root.

    inside: the modules that hold it, and those that hold them.
    before: the layer that feeds this norm alone, so that the norm can be folded into it; alone: why there is none. Both
    are known only where a rewrite has looked (normrewrite.sites.neighbours).
    norm: what it computes, or why no rewrite can take it over; read when it is first asked for, and kept.
    """

    names: tuple[str, ...]
    module: nn.Module
    homes: tuple[tuple[nn.Module | Shelf, Any], ...]
    inside: tuple[nn.Module, ...] = ()
    before: "Site | None" = None
    alone: str = ""
    _read: list[Norm | Refusal] = field(default_factory=list, compare=False, repr=False)  # one, or none yet

    @property
    def norm(self) -> Norm | Refusal:
        if not self._read:
            self._read.append(read(self.module))
        return self._read[0]

    def native(self, *, tracked: bool = False, frozen: bool = True) -> Kind | Refusal:
        """`norm`, for rewrites that start from a batch norm that is not ours: with running statistics, or not frozen, if so
        asked."""
        norm = self.norm
        if isinstance(norm, SampleKind):
            return Refusal(f"is a norm within a sample: its scope is {norm.scope}")
        if isinstance(norm, Kind) and norm.ours:
            return Refusal(f"is {norm.metric} already: revert it first")
        if isinstance(norm, Kind) and norm.cls is FrozenBatchNorm and not frozen:
            return Refusal("is frozen: training never measures it")
        if isinstance(norm, Kind) and tracked and not isinstance(self.module.running_mean, Tensor):
            return Refusal("has no running statistics")
        return norm

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """The name for people: a root module has an empty one."""
        return self.name or "(the model itself)"

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def channels(self) -> int | None:
        return getattr(self.module, "num_features", getattr(self.module, "num_channels", None))


def is_norm(module: nn.Module) -> bool:
    """A batch norm of torch's, of ours, or anything else that keeps running statistics (a pass may refuse it by name)."""
    if isinstance(module, _BatchNorm | BatchNorm):
        return True
    if isinstance(module, ScriptModule):  # compiled code is refused as a whole
        return False
    statistics = module._buffers.get("running_mean"), module._buffers.get("running_var")
    return all(isinstance(tensor, Tensor) for tensor in statistics) and not isinstance(
        module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    )


def origin_of(module: nn.Module) -> Origin | None:
    """What the module was before a rewrite, if it was one: of a weight norm, the layer itself."""
    if isinstance(module, WeightNorm | ScriptModule):  # a part of its layer; compiled code
        return None
    norm = weight_norm_of(module)
    origin = module._modules.get("origin") if norm is None else norm.origin
    return origin if isinstance(origin, Origin) else None


def is_rewritten(module: nn.Module) -> bool:
    """Whether the module stands for another."""
    return origin_of(module) is not None


def gives_back(module: nn.Module) -> bool:
    """Whether what the module stands for is still in it."""
    origin = origin_of(module)
    return origin is not None and not origin.forgotten


def read(module: nn.Module) -> Norm | Refusal:
    """What a norm computes: ours says so itself, another is recognised by its class or by watching it."""
    if isinstance(module, BatchNorm):
        return kinds.known(module)
    if isinstance(module, RowNorm):
        return sample_kinds.known(module)
    if is_sample_norm(module):
        return sample_kinds.recognise_sample(module)
    return kinds.recognise(module) if is_norm(module) else Refusal("is no norm")


_SAMPLE_NORMS = (RowNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm)


def is_sample_norm(module: nn.Module) -> bool:
    """A norm within a sample: torch's, ours, or what is called a norm and holds a weight by channel and little else.

    A pass may refuse it by name.
    """
    if isinstance(module, _SAMPLE_NORMS):
        return True
    if isinstance(module, ScriptModule):
        return False
    tensors = {name: value for name, value in module._parameters.items() if value is not None}
    others = [*module._modules.values(), *module._buffers.values()]
    named = "norm" in type(module).__name__.lower() and tensors.keys() <= {"weight", "bias"} and "weight" in tensors
    return named and not is_norm(module) and tensors["weight"].dim() == 1 and all(value is None for value in others)


class Walk:
    """One walk through a model, asked for all that is wanted of it. It is of the model as it stood when it was walked.

    >>> walk = Walk(model); walk.find(is_norm); walk.by_name["layer1.0.bn1"]
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.registrations = list(registrations(model))
        self._sites: dict[int, Site] = {}

    @cached_property
    def by_name(self) -> dict[str, nn.Module]:
        """Every module by each of its names, whatever characters they hold."""
        return {name: module for name, module, _ in self.registrations}

    @cached_property
    def modules(self) -> dict[int, nn.Module]:
        """Every registered module by id, in registration order."""
        return {id(module): module for _, module, _ in self.registrations}

    @cached_property
    def _places(self) -> list[Place]:
        return list(hidden(self.model))

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for name, module, _ in self.registrations:
            names.setdefault(id(module), []).append(name)
        return names

    @cached_property
    def _registered(self) -> dict[int, list[tuple[nn.Module, str]]]:
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for _, module, home in self.registrations:
            homes.setdefault(id(module), []).extend(home)
        return homes

    @cached_property
    def _shelved(self) -> dict[int, list[tuple[Shelf, Any]]]:
        shelves: dict[int, list[tuple[Shelf, Any]]] = {}
        for place in self._places:
            if not place.fixed:
                shelves.setdefault(id(place.module), []).append((place.shelf, place.key))
        return shelves

    def site(self, module: nn.Module) -> Site:
        """The one site of a registered module."""
        key = id(module)
        if key not in self._sites:
            homes = (*self._registered[key], *self._shelved.get(key, ()))
            self._sites[key] = Site(tuple(self._names[key]), module, homes, self._above(key))
        return self._sites[key]

    def _above(self, module: int) -> tuple[nn.Module, ...]:
        above: dict[int, nn.Module] = {}
        queue = [module]
        for key in queue:
            parents = {id(parent): parent for parent, _ in self._registered[key] if id(parent) not in above}
            above |= parents
            queue += parents
        return tuple(above.values())

    def find(self, wanted: Callable[[nn.Module], bool] = is_norm) -> list[Site]:
        """All wanted modules in registration order; one used at several places is one site."""
        return [self.site(module) for module in self.modules.values() if wanted(module)]

    def compiled(self) -> list[Site]:
        """The TorchScript modules in which a batch norm is at work: nothing can be replaced there."""
        scripts = self.find(lambda module: isinstance(module, ScriptModule) and _holds_statistics(module))
        inner = {id(child) for site in scripts for child in site.module.modules() if child is not site.module}
        return [site for site in scripts if id(site.module) not in inner]

    def out_of_sight(self, wanted: Callable[[nn.Module], bool] = is_norm) -> list[Site]:
        """Wanted modules that plain containers alone hold, under the name of the first place that leads to them."""
        known = set(self.modules)
        unseen = []
        for place in self._places:
            for site in find(place.module, wanted) if id(place.module) not in known else ():
                if id(site.module) not in known:
                    known.add(id(site.module))
                    unseen.append(Site((f"{place.path}.{site.name}".removesuffix("."),), site.module, ()))
        return unseen

    def held_fast(self) -> dict[int, str]:
        """By id, the place of every module that something holds too in which nothing can be replaced: a tuple, a bound method.
        What copies share with the original, as closures and weak references, holds all below it."""
        places = [place for place in self._places if place.fixed]
        return {
            id(module): place.path
            for place in places
            for module in ([place.module] if place.copied else place.module.modules())
        }


def find(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_norm) -> list[Site]:
    """All wanted modules, batch norms by default, in registration order; one used at several places is one site."""
    return Walk(model).find(wanted)


def _holds_statistics(module: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, _ in module.named_buffers()}
    return {"running_mean", "running_var"} <= names


def registrations(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[nn.Module, str]]]]:
    """Every place a module is registered at, depth first, with its dotted name; one used at several comes several times."""
    yield "", model, []
    yield from _below(model, "", {id(model)})


def by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by each of its names, whatever characters they hold."""
    return Walk(model).by_name


def _below(
    parent: nn.Module, prefix: str, seen: set[int]
) -> Iterator[tuple[str, nn.Module, list[tuple[nn.Module, str]]]]:
    for key, child in parent._modules.items():
        if child is not None:
            name = f"{prefix}.{key}" if prefix else key
            yield name, child, [(parent, key)]
            if id(child) not in seen:
                seen.add(id(child))
                yield from _below(child, name, seen)


def replace(site: Site, new: nn.Module) -> nn.Module:
    """Put `new` wherever the site's module is registered, carrying over its training flag and hooks. Returns `new`."""
    carry_over(site.module, new)
    for parent, key in site.homes:
        parent._modules[key] = new
    return new


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training flag and every kind of hook. Parameters are handed over by the rewrites themselves."""
    new.training = old.training
    for name, hooks in vars(old).items():
        if "hooks" in name and hooks:
            getattr(new, name).update(hooks)
    new._is_full_backward_hook = old._is_full_backward_hook


def shared_parameters(model: nn.Module) -> set[int]:
    """The parameters (by id) that more than one module holds: to change one for a module would change the others."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in set(module._parameters.values()))
    return {parameter for parameter, count in holders.items() if count > 1}
