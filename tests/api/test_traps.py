"""Faults on record in this field, one test each; `inspect` names those that a model holds."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.api.inspect import inspect
from normrewrite.api.traps import find_traps
from tests.conftest import randomise
from tests.passes.test_lift_functional import Block
from tests.sites.test_kinds import Frozen, NormAct, ReluInside


def _titles(model: nn.Module) -> set[str]:
    return {trap.title for trap in find_traps(model)}


def _norm(**options: object) -> nn.BatchNorm2d:
    return randomise(nn.BatchNorm2d(4, **options)).eval()  # type: ignore[arg-type, return-value]


def test_nan_does_not_poison_running_statistics() -> None:
    """pytorch #88474, #115500, #96798."""
    twin = nr.convert(_norm()).train()
    before = copy.deepcopy(twin.state_dict())
    twin(torch.full((2, 4, 3, 3), float("nan")))
    assert all(torch.equal(twin.state_dict()[name], before[name]) for name in ("running_mean", "running_scale"))
    poisoned = _norm()
    poisoned.running_var[1] = float("nan")  # type: ignore[index]
    assert "running statistics that are not finite" in _titles(poisoned)
    assert torch.isnan(nr.convert(poisoned).running_scale[1])  # the same function: not hidden, not spread


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_stay_fp32_in_half_models(dtype: torch.dtype) -> None:
    """coreai-torch #54. Half before the conversion, or after it; and the way back is the half model's bits."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _norm())
    for twin in (nr.convert(copy.deepcopy(model).to(dtype)), nr.convert(model).to(dtype)):
        assert twin[1].running_scale.dtype is torch.float32 and twin[1].weight.dtype is dtype  # type: ignore[index]
        half = copy.deepcopy(model).to(dtype).state_dict()
        assert all(torch.equal(value, half[name]) for name, value in nr.revert(twin).state_dict().items())
    assert "running statistics in half precision" in _titles(copy.deepcopy(model).to(dtype))


def test_a_fused_activation_is_never_lost() -> None:
    """timm #1254, pytorch #187298."""
    x = torch.randn(2, 6, 4, 4)
    model = randomise(NormAct(6)).eval()
    torch.testing.assert_close(nr.convert(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert "activation or dropout fused into the norm's class" in _titles(model)
    assert "class that does more than normalise" in _titles(ReluInside(6))


def test_shared_and_twice_registered_modules_stay_one() -> None:
    """pytorch #197539, ao #2795; aliases that Opacus misses."""
    norm = _norm()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(4, 4, 1), norm), "b": nn.Sequential(nn.Conv2d(4, 4, 1), norm)})
    model["alias"] = model["a"]
    twin = nr.convert(model)
    assert twin["a"][1] is twin["b"][1] and twin["alias"] is twin["a"]  # type: ignore[index]
    assert len(sites.find(twin)) == 1 and sites.find(twin)[0].names == ("a.1", "b.1")
    assert "used at several places" in _titles(model)


def test_frozen_by_its_flag_keeps_the_flag() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _norm()).train()
    model[1].eval()
    assert "frozen inside a model in training" in _titles(model)
    twin = nr.convert(model)
    assert twin.training and twin[0].training and not twin[1].training  # type: ignore[index]


def test_frozen_by_its_class_stays_frozen_and_affine_only() -> None:
    """Opacus #315."""
    twin = nr.convert(nn.Sequential(Frozen(4))).train()
    before, x = copy.deepcopy(twin.state_dict()), torch.randn(3, 4, 2, 2)
    twin(x)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert "frozen for good" in _titles(nn.Sequential(Frozen(4)))


def test_functional_batch_norm_is_found() -> None:
    """pytorch #122070; and torch.fx's baked training flag is alive again."""
    model = nn.Sequential(Block())
    assert "F.batch_norm called by hand" in _titles(model)
    twin, x = nr.convert(model), 3 + torch.randn(4, 3, 8, 8)
    assert not torch.equal(twin.train()(x), twin.eval()(x))


def test_no_running_statistics_is_marked_and_not_exported_in_silence(tmp_path: Path) -> None:
    """pytorch #75252."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    twin, report = nr.plan(model, "l1").apply()
    assert [site.label for site in report.live] == ["1"] and "live statistics" in str(report)
    x = torch.randn(5, 3, 4, 4)
    assert not torch.allclose(twin(x)[:1], twin(x[:1]), atol=1e-3)  # the batch is measured, in eval too
    with pytest.raises(nr.NormRewriteError, match="keep no running statistics"):
        nr.export(twin, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir()) and "no running statistics" in _titles(model)


@pytest.mark.parametrize("to", ["l1", "linf", "topk:10", "range"])
def test_dead_channels_and_zero_gamma_come_out_right(to: str) -> None:
    """0/0 and 1/eps of the paper's reference code."""
    norm = _norm()
    norm.running_var[0], norm.weight.data[1] = 0.0, 0.0  # type: ignore[index]
    twin = nr.convert(norm, to)
    x = torch.randn(8, 4, 3, 3)
    x[:, 0] = norm.running_mean[0]  # type: ignore[index]
    torch.testing.assert_close(twin(x), norm(x), rtol=1e-5, atol=1e-5)
    y = twin.train()(x.requires_grad_())
    y.square().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    assert "dead channels" in _titles(norm)


def test_momentum_is_torchs() -> None:
    """The reference code has it reversed, starts from zeros, and stores the inverse."""
    twin = nr.convert(_norm(momentum=0.25), "l1").train()
    mean, scale, x = twin.running_mean.clone(), twin.running_scale.clone(), torch.randn(50, 4, 6, 6)
    twin(x)
    torch.testing.assert_close(twin.running_mean, 0.75 * mean + 0.25 * x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert ((twin.running_scale - (0.75 * scale + 0.25)).abs() < 0.05).all()  # a scale near 1, of unit Gaussians


def test_lazy_sync_and_momentum_zero_are_named() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4, momentum=0.0), nn.BatchNorm2d(4, affine=False))
    assert {"SyncBatchNorm", "momentum 0", "no affine parameters"} <= _titles(model)
    text = str(inspect(model))
    assert "what goes wrong" in text and "what is done here" in text
    assert not find_traps(nn.Sequential(nn.Conv2d(3, 4, 1), _norm()).eval())


def test_conversion_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    nr.calibrate(nr.convert(_norm(), "topk:10"), torch.ones(4, 4, 4, 4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_hooks_are_carried_over() -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), _norm()), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model[1].register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    twin = nr.convert(model)
    twin(torch.randn(2, 3, 2, 2, requires_grad=True)).sum().backward()
    assert seen == ["BatchNorm2d", "backward"] and type(twin[1]) is nr.nn.BatchNorm2d  # type: ignore[index]
