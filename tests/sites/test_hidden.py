"""Norms in plain Python containers, norms that nothing calls, and what a trace leaves behind."""

import functools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.traps import find_traps
from normrewrite.sites.undo import undone_on_error
from tests.conftest import randomise

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class _Listed(nn.Module):
    """Convolutions and norms that forward takes from plain containers, registered or not."""

    def __init__(self, container: Any = list, *, registered: bool = True) -> None:
        super().__init__()
        self.stem = nn.BatchNorm2d(3)
        self.convs, norms = nn.ModuleList([nn.Conv2d(3, 3, 3) for _ in range(2)]), [nn.BatchNorm2d(3) for _ in range(2)]
        for i, norm in enumerate(norms if registered else []):
            self.add_module(f"norm{i}", norm)
        self.norms = container(norms)
        randomise(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        norms = list(self.norms.values()) if isinstance(self.norms, dict) else self.norms
        for conv, norm in zip(self.convs, norms, strict=True):
            x = conv(x) if norm is None else norm(conv(x))
        return x


def _as_dict(norms: list[nn.Module]) -> dict[str, nn.Module]:
    return dict(zip("ab", norms, strict=True))


@pytest.mark.parametrize("to", ["l1", "none", "wn"])
@pytest.mark.parametrize("container", [list, _as_dict])
def test_a_norm_that_is_listed_and_registered_is_rewritten_in_both_places(container: Any, to: str) -> None:
    """The list would go on calling the old norm: behind a convolution that has it folded in, it would work twice."""
    model = _Listed(container)
    twin = nr.convert(model, to=to)
    listed = list(twin.norms.values()) if isinstance(twin.norms, dict) else twin.norms  # type: ignore[operator]
    assert listed[0] is twin.norm0 and listed[1] is twin.norm1 and type(listed[0]) is not nn.BatchNorm2d
    assert torch.allclose(twin(X), model(X), 1e-4, 1e-5)
    assert type(model.norms[0] if container is list else model.norms["a"]) is nn.BatchNorm2d
    if to == "none":  # nothing is left of them
        return
    back = nr.revert(twin)
    held = list(back.norms.values()) if isinstance(back.norms, dict) else back.norms  # type: ignore[operator]
    assert torch.equal(back(X), model(X)) and type(held[0]) is nn.BatchNorm2d


def test_in_a_tuple_it_is_refused_by_name() -> None:
    plan = nr.plan(_Listed(tuple), to="l1")
    reasons = {choice.site.name: choice.reason for choice in plan.kept}
    assert reasons.keys() == {"norm0", "norm1"} and "(norms[0])" in str(reasons["norm0"])
    assert torch.allclose(plan.apply()[0](X), plan.model(X), 1e-4, 1e-5)


def test_what_only_a_list_holds_is_said_to_be_out_of_sight() -> None:
    model = _Listed(registered=False)
    plan = nr.plan(model, to="l1")
    assert [choice.site.name for choice in plan.rewritten] == ["stem"]
    assert {choice.site.name for choice in plan.kept} == {"norms[0]", "norms[1]"}
    assert "nn.ModuleList" in str(plan) and torch.allclose(plan.apply()[0](X), model(X), 1e-4, 1e-5)
    [trap] = [trap for trap in find_traps(model) if trap.title == "norms in a plain list"]
    assert trap.sites == ("norms[0]", "norms[1]")
    del model._modules["stem"]
    with pytest.raises(nr.NormRewriteError, match=r"none of 2 sites.*plain list"):
        nr.convert(model, to="l1")


def test_inside_a_module_that_a_list_holds_names_say_where() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.teacher = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),)  # type: ignore[assignment]
    assert [choice.site.name for choice in nr.plan(model, to="l1").kept] == ["teacher[0].1"]


class _Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.old = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


@pytest.mark.parametrize("to", ["l1", "none", "wn", "group:2"])
def test_a_norm_that_is_never_called_is_called_that(to: str) -> None:
    plan = nr.plan(_Dead(), to=to, example_inputs=[X])
    notes = {choice.site.name: choice.note for choice in plan.rewritten}
    assert "never called on the example inputs" in notes["old"] and "never called" not in notes["norm"]
    assert "never called" not in str(nr.plan(_Dead(), to="l1"))  # nothing was run


def test_a_trace_tells_it_too() -> None:
    assert "is never called in eval" in str(nr.plan(_Dead(), to="none"))


@pytest.mark.parametrize("to", ["l1", "none", "wn", "group:2"])
def test_inputs_that_do_not_fit_are_told(to: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"can't run on .*\(\d, 2, .*to have 3 channels"):
        nr.plan(_Dead(), to=to, example_inputs=[X[:, :2]])


class _Caches(nn.Module):
    """Keeps what it computes in eval, as attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        self.cache["last"], self.last = y, y
        return y


@pytest.mark.parametrize("to", ["none", "wn"])
def test_a_trace_leaves_nothing_in_the_model(to: str) -> None:
    model = _Caches()
    plan = nr.plan(model, to=to)
    assert model.cache == {} and not hasattr(model, "last")
    assert torch.allclose(plan.apply()[0](X), model(X), 1e-4, 1e-5)


class _Holding(nn.Module):
    """A norm that forward takes from where else it is held."""

    def __init__(self, hold: Callable[[nn.Module], Any], get: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        object.__setattr__(self, "held", hold(self))
        self.get = get
        randomise(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get(self.held)(self.conv(x))
        return y


@dataclass(frozen=True)
class _Record:
    norm: Any


class _Slotted:
    __slots__ = ("norm",)


def _slotted(model: Any) -> _Slotted:
    slotted = _Slotted()
    slotted.norm = model.norm
    return slotted


def _made_by_exec(model: Any) -> Any:
    namespace: dict[str, Any] = {}
    exec("class Config: pass", namespace)
    held = namespace["Config"]()
    held.norm = model.norm
    return held


REPLACED: dict[str, tuple[Any, Any]] = {
    "exec": (_made_by_exec, lambda held: held.norm),
    "record": (lambda model: _Record(model.norm), lambda held: held.norm),
    "namespace": (lambda model: SimpleNamespace(norms=[{"a": model.norm}]), lambda held: held.norms[0]["a"]),
    "deque": (lambda model: deque([model.norm]), lambda held: held[0]),
}
FIXED: dict[str, tuple[Any, Any]] = {
    "slots": (_slotted, lambda held: held.norm),
    "key": (lambda model: {model.norm: 1}, lambda held: next(iter(held))),
    "partial": (lambda model: functools.partial(model.norm.__call__), lambda held: held),
    "method": (lambda model: model.norm.forward, lambda held: held),
    "closure": (lambda model: lambda x: model.norm(x), lambda held: held),
    "weak": (lambda model: weakref.ref(model.norm), lambda held: held()),
    "weak parent": (weakref.ref, lambda held: held().norm),
    "weak proxy": (weakref.proxy, lambda held: held.norm),
}


@pytest.mark.parametrize("to", ["l1", "none", "wn"])
@pytest.mark.parametrize("how", REPLACED)
def test_a_norm_that_an_object_holds_too_is_rewritten_there(how: str, to: str) -> None:
    model = _Holding(*REPLACED[how])
    twin: Any = nr.convert(model, to=to)
    assert twin.get(twin.held) is twin.norm and type(twin.norm) is not nn.BatchNorm2d
    assert type(model.get(model.held)) is nn.BatchNorm2d and torch.allclose(twin(X), model(X), 1e-4, 1e-5)


@pytest.mark.parametrize("to", ["l1", "none"])
@pytest.mark.parametrize("how", FIXED)
def test_where_it_cannot_be_replaced_it_is_refused_by_name(how: str, to: str) -> None:
    plan = nr.plan(_Holding(*FIXED[how]), to=to)
    assert not plan.rewritten and "held" in str(plan.kept[0].reason) and "keep the old one" in str(plan.kept[0].reason)


def test_what_objects_hold_comes_back_on_an_error() -> None:
    model = _Holding(*REPLACED["namespace"])
    with pytest.raises(ZeroDivisionError), undone_on_error(model):
        nr.convert_(model, to="l1")
        assert type(model.held.norms[0]["a"]) is not nn.BatchNorm2d
        raise ZeroDivisionError
    assert model.held.norms[0]["a"] is model.norm and type(model.norm) is nn.BatchNorm2d


def test_a_bound_method_of_a_parent_is_copied_with_it() -> None:
    model = _Holding(lambda model: model.named_children, lambda held: dict(held())["norm"])
    assert torch.allclose(nr.convert(model, to="none")(X), model(X), 1e-4, 1e-5)


def test_a_class_may_have_no_module() -> None:
    model = randomise(_Dead())
    cls = type("Homeless", (_Dead,), {"__module__": None})
    model.__class__ = cls
    assert torch.allclose(nr.convert(model, to="none")(X), model(X), 1e-4, 1e-5)
