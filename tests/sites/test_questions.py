"""Whatever detour code takes to ask what a norm is, it is seen; and what asks of other things is left in peace."""

import functools
import importlib
import logging
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normrewrite as nr
from tests.conftest import randomise

WIDTH = 6
INPUTS = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))


def _helper(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm1d)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.types: Any = (nn.BatchNorm1d, nn.BatchNorm2d)
        randomise(self)
        self.eval()

    def asks(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.lin(x))
        return h * 2 if self.asks() else h


class _Helper:
    @staticmethod
    def static(norm: nn.Module) -> bool:
        return isinstance(norm, nn.BatchNorm1d)

    @classmethod
    def of_class(cls, norm: nn.Module) -> bool:
        return isinstance(norm, nn.BatchNorm1d)

    def asks(self, norm: nn.Module) -> bool:
        return isinstance(norm, nn.BatchNorm1d)

    __call__ = asks


class _Holding(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.helper, self.kind, self.table = _Helper(), nn.BatchNorm1d, {nn.BatchNorm1d: True}
        self.functions, self.by_name = [_helper], {"a": _helper}


@functools.singledispatch
def _dispatched(norm: object) -> bool:
    return False


@_dispatched.register
def _(norm: nn.BatchNorm1d) -> bool:
    return True


def _is_it(kind: type) -> bool:
    return kind == nn.BatchNorm1d


def _by_default(norm: nn.Module, test: Any = _helper, ask: Any = isinstance) -> bool:
    return bool(test(norm))


def _with_its_own(norm: nn.Module, ask: Any = isinstance) -> bool:
    return bool(ask(norm, nn.BatchNorm1d))


HELPER, HELPERS, ASK, PARTIAL = _Helper(), {"a": _helper}, isinstance, functools.partial(_helper)
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "method": lambda self: self.helper.asks(self.norm),
    "static": lambda self: self.helper.static(self.norm),
    "called": lambda self: self.helper(self.norm),
    "of a class": lambda self: _Helper.static(self.norm),
    "class method": lambda self: _Helper.of_class(self.norm),
    "global object": lambda self: HELPER.asks(self.norm),
    "made here": lambda self: _Helper().asks(self.norm),
    "default": lambda self: _by_default(self.norm),
    "alias as default": lambda self: _with_its_own(self.norm),
    "alias": lambda self: ASK(self.norm, nn.BatchNorm1d),
    "handed on": lambda self: next(map(type, [self.norm])) is nn.BatchNorm1d,
    "partial": lambda self: PARTIAL(self.norm),
    "partial question": lambda self: functools.partial(isinstance, self.norm)(nn.BatchNorm1d),
    "global table": lambda self: HELPERS["a"](self.norm),
    "list held": lambda self: self.functions[0](self.norm),
    "table held": lambda self: self.by_name["a"](self.norm),
    "dispatch": lambda self: _dispatched(self.norm),
    "type passed": lambda self: _is_it(type(self.norm)),
    "types held": lambda self: type(self.norm) in self.types,
    "kind held": lambda self: type(self.norm) is self.kind,
    "classes held": lambda self: self.table.get(type(self.norm)),
    "mro": lambda self: _BatchNorm in type(self.norm).__mro__,
    "class by name": lambda self: isinstance(self.norm, getattr(nn, "BatchNorm1d")),  # noqa: B009
    "f-string": lambda self: f"{type(self.norm).__name__}" == "BatchNorm1d",
    "f-string of it": lambda self: f"{self.norm}".startswith("BatchNorm1d"),
    "percent": lambda self: ("%s" % self.norm).startswith("BatchNorm1d"),  # noqa: UP031
    "format": lambda self: format(self.norm).startswith("BatchNorm1d"),
    "str.format": lambda self: "{}".format(self.norm).startswith("BatchNorm1d"),  # noqa: UP032
    "count": lambda self: len(list(self.modules())) == 3,
    "buffers": lambda self: len(list(self.norm.buffers())) == 3,
    "in state": lambda self: "norm.running_var" in self.state_dict(),
    "named buffers": lambda self: "norm.running_var" in dict(self.named_buffers()),
    "buffer": lambda self: self.norm._buffers["running_var"].sum() > 0,
    "buffer, if any": lambda self: self.norm._buffers.get("running_var") is not None,
    "state": lambda self: self.norm.state_dict()["running_var"].sum() > 0,
    "state, dotted": lambda self: self.state_dict()["norm.running_var"].sum() > 0,
    "getter": lambda self: operator.attrgetter("running_var")(self.norm).sum() > 0,
    "vars": lambda self: vars(self.norm)["eps"] == 1e-5,
    "unbound": lambda self: nn.BatchNorm1d.forward(self.norm, INPUTS).sum() > -1e9,
    "parameters": lambda self: sum(p.norm() for p in self.norm.parameters()) > 0.0,
    "named parameters": lambda self: sum(p.norm() for _, p in self.named_parameters()) > 0.0,
}


def _asking(question: Callable[[Any], Any]) -> _Net:
    return type("Asking", (_Holding,), {"asks": question})()


@pytest.mark.parametrize("how", QUESTIONS)
def test_by_whatever_detour_it_is_asked(how: str) -> None:
    refusals = []
    for to in ("l1", "none"):
        model = _asking(QUESTIONS[how])
        plan = nr.plan(model, to=to, example_inputs=None)
        refusals += [str(choice.reason) for choice in plan.kept]
        if plan.rewritten:
            assert torch.allclose(plan.apply()[0](INPUTS), model(INPUTS), 1e-4, 1e-4), to
    assert refusals and all("(test_questions.py:" in reason for reason in refusals)


INNOCENT: dict[str, Callable[[Any], Any]] = {
    "device": lambda self: next(self.parameters()).device.type == "cpu",
    "dtype": lambda self: any(p.dtype == torch.float32 for p in self.parameters()),
    "trained": lambda self: [p.requires_grad for _, p in self.named_parameters()],
    "log": lambda self: logging.getLogger("it").debug(f"{self.norm} {type(self.norm).__name__}"),
    "another": lambda self: isinstance(self.lin, nn.Linear) and type(self.lin) is not nn.BatchNorm1d,
    "text": lambda self: ",".join(map(str, (1, 2))) + f"{self.lin.in_features}" == "" or isinstance("", str | type),
    "children": lambda self: [child for child in self.children() if child.training],
}


@pytest.mark.parametrize("to", ["l1", "none"])
@pytest.mark.parametrize("how", INNOCENT)
def test_what_asks_of_other_things_is_left_in_peace(how: str, to: str) -> None:
    assert len(nr.plan(_asking(INNOCENT[how]), to=to).rewritten) == 1


def test_a_module_of_the_users_own_may_be_called_like_one_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from torch import nn\ndef asks(norm):\n    return isinstance(norm, nn.BatchNorm1d)\n"
    (tmp_path / "asks_of.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own: Any = importlib.import_module("asks_of")
    monkeypatch.setattr(own.asks, "__module__", "statistics.models")
    model = _asking(own.asks)
    type(model).forward = lambda self, x: self.norm(self.lin(x)) * (2 if own.asks(self.norm) else 1)  # type: ignore[assignment]
    assert not nr.plan(model, to="l1").rewritten


def test_a_class_from_exec_is_no_built_in() -> None:
    namespace: dict[str, Any] = {"nn": nn, "Net": _Net}
    exec("class Made(Net):\n    def asks(self):\n        return isinstance(self.norm, nn.BatchNorm1d)", namespace)
    assert namespace["Made"].__module__ == "builtins" and not nr.plan(namespace["Made"](), to="l1").rewritten


class _Util:
    @staticmethod
    def freeze(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


class _FrozenByAnother(nn.Sequential):
    def train(self, mode: bool = True) -> "_FrozenByAnother":
        super().train(mode)
        _Util.freeze(self)
        return self


def test_flags_that_another_s_method_sets_are_compared() -> None:
    model = randomise(_FrozenByAnother(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    assert not nr.plan(model, to="l1").rewritten and nr.plan(model, to="frozen").rewritten


def test_a_layer_whose_parameters_forward_adds_up_is_not_folded_into() -> None:
    class Penalised(nn.Sequential):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), sum(p.norm() for p in self[0].parameters())

    model = randomise(Penalised(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    for to in ("none", "wn", "bwn"):
        [left] = [choice for choice in nr.plan(model, to=to).kept if choice.site.kind == "BatchNorm2d"]
        assert "self[0].parameters()" in str(left.reason)
    assert nr.plan(model, to="l1").rewritten
