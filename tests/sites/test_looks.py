"""Code that looks at its norms: whatever way it asks, the twin is the same function or the site is refused by name."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import BatchNorm1d as Aliased
from torch.nn.modules.batchnorm import _BatchNorm

import normrewrite as nr
from normrewrite.api.verify import verify
from normrewrite.sites.code import Function
from normrewrite.sites.questions import questions
from tests.conftest import randomise

TARGETS = ["l1", "none", "wn", "bwn", "group", "frozen"]
TABLE = {nn.BatchNorm1d: True, nn.LayerNorm: False}
WIDTH = 6


def _helper(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm1d)


class _Net(nn.Module):
    """Normalises the last axis by channel where `asks` says so, and the second else."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.types: Any = (nn.BatchNorm1d, nn.BatchNorm2d)
        randomise(self)
        self.eval()

    def asks(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        return self.norm(h.transpose(1, 2)).transpose(1, 2) if self.asks() else self.norm(h)


class Isinstance(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, nn.BatchNorm1d)


class OfBase(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, _BatchNorm)


class OfSeveral(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, (nn.LayerNorm, nn.BatchNorm1d))


class OfUnion(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, nn.LayerNorm | nn.BatchNorm1d)


class OfAnAlias(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, Aliased)


class OfAnAttribute(_Net):
    def asks(self) -> bool:
        return isinstance(self.norm, self.types)


class OfALocal(_Net):
    def asks(self) -> bool:
        kinds, norm = (nn.BatchNorm1d,), self.norm
        return isinstance(norm, kinds)


class OfTheOther(_Net):
    def asks(self) -> bool:
        return not isinstance(
            self.norm, (nn.LayerNorm, nn.GroupNorm, nr.nn.BatchNorm, nr.nn.StandIn, nr.nn.ChannelAffine)
        )


class Type(_Net):
    def asks(self) -> bool:
        return type(self.norm) is nn.BatchNorm1d


class TypeIn(_Net):
    def asks(self) -> bool:
        return type(self.norm) in (nn.BatchNorm1d, nn.BatchNorm2d)


class Dispatched(_Net):
    def asks(self) -> bool:
        return TABLE.get(type(self.norm), False)


class Subclass(_Net):
    def asks(self) -> bool:
        return issubclass(type(self.norm), nn.BatchNorm1d)


class DunderClass(_Net):
    def asks(self) -> bool:
        return self.norm.__class__ == nn.BatchNorm1d


class Name(_Net):
    def asks(self) -> bool:
        return "BatchNorm" in self.norm.__class__.__name__


class NameLowered(_Net):
    def asks(self) -> bool:
        name = type(self.norm).__name__.lower()
        return name.startswith("batchnorm")


class GetName(_Net):
    def asks(self) -> bool:
        return self.norm._get_name() == "BatchNorm1d"


class Printed(_Net):
    def asks(self) -> bool:
        return str(self.norm).startswith("BatchNorm1d(")


class HasAttribute(_Net):
    def asks(self) -> bool:
        return hasattr(self.norm, "num_features")


class GetsAttribute(_Net):
    def asks(self) -> bool:
        return getattr(self.norm, "running_var", None) is not None


class ReadsValue(_Net):
    def asks(self) -> bool:
        return bool(self.norm.weight.detach().sum() > 0) and self.norm.eps == 1e-5


class Matched(_Net):
    def asks(self) -> bool:
        match self.norm:
            case nn.BatchNorm1d():
                return True
        return False


class InAHelper(_Net):
    def asks(self) -> bool:
        return _helper(self.norm)


class InALoop(_Net):
    def asks(self) -> bool:
        return any(isinstance(each, nn.BatchNorm1d) for each in self.modules())


class InAProperty(_Net):
    @property
    def _batch(self) -> bool:
        return isinstance(self.norm, nn.BatchNorm1d)

    def asks(self) -> bool:
        return self._batch


class ByAStoredFunction(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.test: Callable[[nn.Module], bool] = lambda norm: isinstance(norm, nn.BatchNorm1d)

    def asks(self) -> bool:
        return self.test(self.norm)


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        return self.norm(h)

    def across(self, x: Tensor) -> Tensor:
        h = self.lin(x).transpose(1, 2) if isinstance(self.norm, nn.BatchNorm1d) else self.lin(x)
        return self.norm(h)


class FromTheParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()
        randomise(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner.norm, nn.BatchNorm1d):
            x = x.transpose(1, 2)
        return self.inner(x)


class ByAnotherMethodOfAChild(FromTheParent):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner.across(x)


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[1].register_forward_hook(lambda module, inputs, y: y * 2 if isinstance(module, nn.BatchNorm1d) else y)
    return randomise(model).eval()


def _generated(question: str) -> nn.Module:
    namespace: dict[str, Any] = {"nn": nn}
    exec(compile(f"def asks(self):\n    return {question}\n", "<generated>", "exec"), namespace)
    return type("Generated", (_Net,), {"asks": namespace["asks"], "__module__": __name__})()


def _without_source() -> nn.Module:
    return _generated("isinstance(self.norm, nn.BatchNorm1d)")


def _attribute_without_source() -> nn.Module:
    return _generated("hasattr(self.norm, 'num_features')")


def _name_without_source() -> nn.Module:
    return _generated("'BatchNorm' in type(self.norm).__name__")


ASKING = [
    *(cls for cls in _Net.__subclasses__()),
    FromTheParent,
    ByAnotherMethodOfAChild,
    _hooked,
    _without_source,
    _attribute_without_source,
    _name_without_source,
]
INPUTS = torch.randn(5, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))


def _inputs(make: Callable[[], nn.Module]) -> Tensor:
    return INPUTS[0] if make is _hooked else INPUTS


@pytest.mark.parametrize("make", ASKING, ids=lambda make: make.__name__)
def test_however_it_asks_the_twin_is_exact_or_the_site_refused_by_name(make: Callable[[], nn.Module]) -> None:
    refusals, x = [], _inputs(make)
    for to in TARGETS:
        for examples in (None, [x]) if to in ("l1", "none", "group") else (None,):
            model = make()
            expected = model(x)
            plan = nr.plan(model, to=to, example_inputs=examples)
            left = [choice for choice in plan.kept if choice.site.kind == "BatchNorm1d"]
            if left:
                assert "(test_looks.py:" in str(left[0].reason) or "<generated>:" in str(left[0].reason)
                assert "--exclude" in str(left[0].reason)
                refusals.append(to)
            if plan.rewritten:
                twin, report = plan.apply()
                if not left and not report.inexact:
                    assert torch.allclose(twin(x), expected, 1e-4, 1e-4), to
                assert left or report.inexact or verify(model, twin, x).ok
    assert refusals  # every one of them asks what some twin answers otherwise


def test_a_file_that_was_edited_since_is_read_from_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = Path(__file__).read_text()
    head, asking = body[: body.index("class Isinstance")], "class Isinstance(_Net):\n    def asks(self):\n"
    head = head.replace("from tests.conftest import randomise", "randomise = lambda model: model")
    (tmp_path / "edited_since.py").write_text(f"{head}{asking}        return isinstance(self.norm, nn.BatchNorm1d)\n")
    monkeypatch.syspath_prepend(tmp_path)
    edited: Any = importlib.import_module("edited_since")
    (tmp_path / "edited_since.py").write_text(f"{'#' * 40}\n" * 9 + f"{head}{asking}        return True\n")
    assert not nr.plan(edited.Isinstance(), to="l1").rewritten


def test_where_inputs_show_the_same_network_the_site_is_rewritten() -> None:
    class Harmless(_Net):
        def asks(self) -> bool:
            return isinstance(self.norm, nn.BatchNorm1d) or True

    model = Harmless()
    assert not nr.plan(model, to="l1").rewritten
    assert len(nr.plan(model, to="l1", example_inputs=[INPUTS]).rewritten) == 1
    assert (
        len(nr.plan(model, to="group:2", example_inputs=[INPUTS]).rewritten) == 1
    )  # the same norms, on the same shapes


class _OnlyInTraining(_Net):
    def asks(self) -> bool:
        return not self.training or isinstance(self.norm, nn.BatchNorm1d)


def test_a_branch_of_training_is_compared_in_training() -> None:
    plan = nr.plan(_OnlyInTraining(), to="l1", example_inputs=[INPUTS])
    assert not plan.rewritten and "in training the twin takes another way" in str(plan.kept[0].reason)


def test_a_trial_leaves_model_and_randomness_alone() -> None:
    model = Isinstance().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    nr.plan(model, to="l1", example_inputs=[INPUTS])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())


class _Innocent(_Net):
    """Asks for other things, and of its norms only in what runs at construction, or in an error's words."""

    def __init__(self) -> None:
        super().__init__()
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.ones_(module.weight)
            elif type(module).__name__ == "BatchNorm2d":
                nn.init.zeros_(module.weight)

    def fuse(self) -> Tensor:
        return self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()

    def asks(self) -> bool:
        """Whether BatchNorm is what it holds."""
        if not isinstance(self.lin, nn.Linear):
            raise TypeError(f"{type(self.norm).__name__} behind {type(self.lin).__name__}, needed is BatchNorm")
        assert hasattr(self.norm, "forward") and self.norm.training == self.training, "BatchNorm1d"
        names = [type(value).__name__ for value in (1, "two")]
        return isinstance(self.norm, nn.Module) and "int" in names and getattr(self.lin, "weight", None) is not None


@pytest.mark.parametrize("to", TARGETS)
def test_innocent_code_is_left_in_peace(to: str) -> None:
    class Net(_Innocent):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x)) if self.asks() else x

    model = Net()
    plan = nr.plan(model, to=to)
    assert len(plan.rewritten) == 1 and not plan.kept
    twin, report = plan.apply()
    assert report.inexact or torch.allclose(twin(INPUTS[0]), model(INPUTS[0]), 1e-4, 1e-4)


def test_reading_the_same_parameter_is_no_difference() -> None:
    """Channel attention by a norm's own weights: the twin has the same ones, a folded norm has not."""

    class Attention(_Net):
        def asks(self) -> bool:
            return True

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.lin(x)) * self.norm.weight.abs()
            return y

    model = Attention()
    assert torch.allclose(nr.convert(model, to="l1")(INPUTS[0]), model(INPUTS[0]), 1e-4, 1e-5)
    with pytest.raises(nr.NormRewriteError, match=r"Attention\.forward .*asks self\.norm\.weight"):
        nr.convert(model, to="none")


def test_statistics_that_forward_sets_need_the_norm_that_has_them() -> None:
    class Sets(_Net):
        def forward(self, x: Tensor) -> Tensor:
            self.norm.running_var.mul_(1.0)  # type: ignore[union-attr, operator]
            y: Tensor = self.norm(self.lin(x))
            return y

    with pytest.raises(nr.NormRewriteError, match=r"sets self\.norm\.running_var\.mul_"):
        nr.convert(Sets(), to="l1")


class _OwnTrain(nn.Sequential):
    def __init__(self, test: Callable[[nn.Module], bool]) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.test = test

    def train(self, mode: bool = True) -> "_OwnTrain":
        super().train(mode)
        for module in list(self.modules())[1:4]:
            if self.test(module):
                module.eval()
        return self


HELD_STILL = {
    "isinstance": lambda module: isinstance(module, _BatchNorm),
    "type": lambda module: type(module) is nn.BatchNorm2d,
    "attribute": lambda module: hasattr(module, "running_var") and not hasattr(module, "running_scale"),
}
ANY_NORM = {
    "by name": lambda module: "BatchNorm" in type(module).__name__,
    "statistics": lambda m: hasattr(m, "running_mean"),
}


@pytest.mark.parametrize("to", ["l1", "renorm", "wn:mean-bn"])
@pytest.mark.parametrize("how", HELD_STILL)
def test_norms_that_train_holds_still_are_refused_and_the_others_rewritten(how: str, to: str) -> None:
    model = randomise(_OwnTrain(HELD_STILL[how])).eval()
    plan = nr.plan(model, to=to)
    [left] = [choice for choice in plan.kept if choice.site.kind == "BatchNorm2d"]
    assert left.site.name == "1" and "`frozen`" in str(left.reason)
    assert "4" in [choice.site.name for choice in plan.rewritten]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("how", "to"), list(itertools.product(ANY_NORM, ["l1", "linf"])))
def test_where_train_finds_ours_too_nothing_is_refused(how: str, to: str) -> None:
    twin = nr.convert(randomise(_OwnTrain(ANY_NORM[how])).eval(), to=to).train()
    assert [twin[1].training, twin[4].training] == [False, True]


@pytest.mark.parametrize("to", ["frozen", "none", "wn", "group:2"])
def test_targets_without_statistics_that_move_need_no_flag(to: str) -> None:
    assert len(nr.plan(randomise(_OwnTrain(HELD_STILL["isinstance"])).eval(), to=to).rewritten) >= 2


def test_a_look_tells_its_line() -> None:
    [look] = questions(Function(Isinstance.asks, "self"))
    line = Path(__file__).read_text().splitlines().index("        return isinstance(self.norm, nn.BatchNorm1d)") + 1
    assert str(look) == f"Isinstance.asks (test_looks.py:{line}) asks isinstance(self.norm, nn.BatchNorm1d)"
