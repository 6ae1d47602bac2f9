"""convert_ and revert_ that end in an error half-way leave the caller's model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.api import plan
from normrewrite.api.plan import Choice
from normrewrite.passes import FoldAffine, NormaliseWeights, RestoreNative, SwapMetric
from normrewrite.passes.base import Rewrite
from tests.conftest import randomise


class Broken(Exception):
    pass


def network() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block, nn.BatchNorm2d(4), encoder)).eval()
    model[3].register_forward_hook(lambda *_: None)
    return model


def standing(model: nn.Module) -> Any:
    """Where everything stands, by identity, with the bits of all tensors."""
    modules = [
        (name, id(module), type(module), sorted(map(str, vars(module)))) for name, module in model.named_modules()
    ]
    flags = [
        {name: value for name, value in vars(module).items() if isinstance(value, int)} for module in model.modules()
    ]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = [(name, id(tensor), tensor.data_ptr(), tensor.tolist()) for name, tensor in tensors.items()]
    return modules, flags, kept, [dict(module._forward_hooks) for module in model.modules()]


def failing_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(count))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise Broken
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("site", [0, 1, 2])
@pytest.mark.parametrize(
    ("to", "owner", "name"),
    [
        ("l1", SwapMetric, "rewrite"),
        ("none", FoldAffine, "rewrite"),
        ("wn", NormaliseWeights, "rewrite"),
        ("bwn", Rewrite, "apply"),
        ("none", sites, "replace"),
        ("l1", Choice, "outcome"),
        ("wn", Choice, "outcome"),
    ],
)
def test_a_failure_at_any_site_changes_nothing(
    to: str, owner: Any, name: str, site: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    before = standing(model)
    monkeypatch.setattr(owner, name, failing_at(site, getattr(owner, name)))
    with pytest.raises(Broken):
        nr.convert_(model, to, scope="all" if to == "l1" else "batch")
    assert standing(model) == before


def test_optimisers_of_another_model_change_nothing() -> None:
    model = network()
    before = standing(model)
    with pytest.raises(nr.NormRewriteError, match="holds no parameter of the model"):
        nr.convert_(model, "wn", optimizers=[torch.optim.SGD(network().parameters(), 0.1)])
    assert standing(model) == before


def test_a_site_that_is_not_exact_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, held = standing(model), [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    monkeypatch.setattr(plan, "measured", lambda *_: (1.0, 1.0))
    with pytest.raises(nr.NormRewriteError) as error:
        nr.convert_(model, "bwn", optimizers=[optimizer])
    assert error.value.exit_code == 1 and standing(model) == before
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == held


def test_a_revert_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = nr.convert(network(), "wn")
    before = standing(twin)
    monkeypatch.setattr(RestoreNative, "rewrite", failing_at(2, RestoreNative.rewrite))
    with pytest.raises(Broken):
        nr.revert_(twin)
    assert standing(twin) == before
