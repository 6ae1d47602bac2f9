"""Origin: what was travels where a module's buffers travel, and is none of them."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.files.soundness import fault
from normrewrite.nn.origin import Origin
from normrewrite.sites import origin_of
from tests.conftest import randomise

NAMES = ["trained", "running_var", "running_var_converted", "weight", "weight_converted"]


def made() -> Origin:
    bn = randomise(nn.BatchNorm2d(4))
    pairs = {"running_var": (bn.running_var, bn.running_var + 1), "weight": (bn.weight, 2 * bn.weight)}  # type: ignore[operator]
    return Origin(bn, pairs)  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def hidden(origin: Origin) -> bool:
    """From the modules above; its own it names, as FSDP and distributed checkpoints ask module by module."""
    own = [name for name, _ in origin.named_buffers(recurse=False)]
    return own == NAMES and not list(nn.ModuleList([origin]).buffers())


def pickled(origin: Origin) -> Origin:
    file = io.BytesIO()
    torch.save(origin, file)
    file.seek(0)
    again: Origin = torch.load(file, weights_only=False)
    return again


def loaded(origin: Origin, **how: bool) -> Origin:
    new = copy.deepcopy(origin)
    for value in new.tensors.values():
        value.zero_()  # type: ignore[union-attr]
    new.load_state_dict(copy.deepcopy(origin.state_dict()), **how)
    return new


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, pickled, loaded, lambda origin: loaded(origin, assign=True)],
    ids=["copy", "pickle", "load", "assign"],
)
def test_tensors_travel_and_are_no_buffers(way: Callable[[Origin], Origin]) -> None:
    origin = made()
    state = {name: value.clone() for name, value in origin.state_dict().items()}
    assert list(state) == NAMES and hidden(origin)
    again = way(origin)
    assert same(again.state_dict(), state) and hidden(again)
    assert all(again.tensors[name] is not origin.tensors[name] for name in NAMES)
    for value in again.tensors.values():
        value.zero_()  # type: ignore[union-attr]
    assert same(origin.state_dict(), state)


def test_a_pickle_holds_them_as_buffers_as_it_always_did() -> None:
    """Files of 0.1.0, whose class had no `__setstate__`, are read; and it reads these."""
    origin = made()
    state = origin.__reduce_ex__(2)[2]
    assert isinstance(state, dict) and list(state["_buffers"]) == NAMES and "tensors" not in state
    old = Origin.__new__(Origin)
    old.__setstate__(state)
    assert same(old.state_dict(), origin.state_dict()) and old.unchanged({"weight": 2 * origin.weight})


def test_casts_and_moves_take_them_along() -> None:
    origin = made().half()
    dtypes = {name: value.dtype for name, value in origin.state_dict().items()}
    assert dtypes["weight"] == torch.float16 and dtypes["weight_converted"] == torch.float32
    assert {value.device.type for value in made().to("meta").state_dict().values()} == {"meta"}


def test_a_state_that_does_not_fit_is_told() -> None:
    state = made().state_dict()
    del state["weight"]
    assert made().load_state_dict(state, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match="size mismatch for running_var"):
        made().load_state_dict(state | {"running_var": torch.ones(5)}, strict=False)
    with pytest.raises(AttributeError, match="'Origin' object has no attribute 'nothing'"):
        _ = made().nothing


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (None, "has no tensors"),
        ({"a": 1}, "has no tensors"),
        ({"kind": torch.ones(1)}, "has two things called kind"),
        ({'c"': torch.ones(1)}, "could be read as code"),
    ],
)
def test_a_damaged_pickle_is_told(tensors: object, said: str) -> None:
    origin = Origin.__new__(Origin)
    origin.__setstate__(vars(made()) | {"_buffers": tensors})
    assert said in str(fault(origin)) and fault(made()) is None


@pytest.mark.parametrize("to", ["group:4", "layer", "instance", "rms", "frozen"])
def test_no_module_that_learns_holds_a_buffer(to: str) -> None:
    """What Opacus asks of a network; a root may have parameters of its own, too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    twin = nr.convert(model, to)
    learning = [m for m in twin.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    assert len(learning) == (1 if to == "frozen" else 3)
    assert not any(list(module.buffers()) for module in learning)
    assert origin_of(twin[1]) is not None  # type: ignore[index]
