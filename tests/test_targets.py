"""Every target of the registry, in every form, on every network of tests/forms.py: the laws of a rewrite.

What a target promises is asked of the target itself: one that does not call itself inexact has to keep the function.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import normrewrite as nr
from normrewrite.diagnostics.least_squares import fittable
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.weights import BoundedWeightNorm, weight_norm_of
from normrewrite.passes.reversion import reverted
from normrewrite.provenance.report import Report
from normrewrite.targets import TARGETS, measures, rewrite
from normrewrite.tolerances import SAME_NETWORK, worst
from tests.forms import ALIKE, CASES, FOR_GOOD, FORMS, FROM_OURS, REVERSIBLE, fresh, inputs, rewritten, same_bits, start
from tests.nn.test_weights import norms_of

every_form = pytest.mark.parametrize("form", FORMS)
every_reversible = pytest.mark.parametrize("form", REVERSIBLE)
every_case = pytest.mark.parametrize(("form", "network"), CASES)
every_reversible_case = pytest.mark.parametrize(("form", "network"), [case for case in CASES if case[0] in REVERSIBLE])


def convert(form: str, model: nn.Module, x: Tensor) -> tuple[Any, Report]:
    """Example inputs, so that a linear layer takes its norm in as well."""
    return nr.plan(model, form, example_inputs=[x]).apply()


@cache
def _made(form: str, network: str, dtype: torch.dtype, seed: int) -> tuple[nn.Module, Any]:
    model = start(form, network, dtype, seed)
    return model, convert(form, model, inputs(network).to(dtype))[0]


def twin_of(
    form: str, network: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Any, Tensor]:
    """Copies of a network and its twin, and an input."""
    return *copy.deepcopy(_made(form, network, dtype, seed)), inputs(network).to(dtype)


def train(model: nn.Module, network: str, steps: int = 5, rate: float = 1e-3) -> list[float]:
    """Plain steps on random data, so that nothing but the norms holds the network together."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(loss(model.train(), network, step))
        losses[-1].backward()
        optimizer.step()
    return [float(value.detach()) for value in losses]


def loss(model: nn.Module, network: str, seed: int) -> Tensor:
    value: Tensor = (model(inputs(network, seed)) - 1).square().mean()
    return value


def test_every_row_has_forms() -> None:
    assert {form.partition(":")[0] for form in FORMS} == set(TARGETS)


# --- the function ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eval_is_the_same_function_or_said_not_to_be(form: str, network: str, dtype: torch.dtype) -> None:
    model, x = start(form, network, dtype), inputs(network).to(dtype)
    before = copy.deepcopy(model)
    twin, report = convert(form, model, x)
    assert same_bits(model, before) and report.rewritten and not report.kept and report.ok and not report.live
    gap = worst(twin(x), model(x))
    if report.inexact:
        assert gap > 1e-3 and all("not exact: " in site.note for site in report.inexact)
    else:
        assert gap <= SAME_NETWORK[dtype] and all(site.difference is not None for site in report.rewritten)
        if dtype is torch.float64:
            assert_every_tensor_counts(twin, x)


def assert_every_tensor_counts(twin: nn.Module, x: Tensor) -> None:
    """One tensor off by a hundredth is caught, or the equality would say nothing: all but what may be scaled as a whole."""
    expected = twin(x)
    for name, tensor in _live(twin).items():
        before = tensor.clone()
        tensor.mul_(1.01)
        caught = worst(twin(x), expected) > SAME_NETWORK[torch.float64]
        tensor.copy_(before)
        assert caught != _free(twin, name), name


def _live(twin: nn.Module) -> dict[str, Tensor]:
    """The tensors that forward reads."""
    state = {name: value for name, value in twin.state_dict().items() if value.is_floating_point()}
    return {name: value for name, value in state.items() if "origin." not in name and not name.endswith("checksum")}


def _free(twin: nn.Module, name: str) -> bool:
    """Whether a tensor may be scaled as a whole: v always, g of a bounded norm."""
    layer, inside, which = name.partition(".parametrizations.weight.")
    bounded = bool(inside) and isinstance(weight_norm_of(twin.get_submodule(layer)), BoundedWeightNorm)
    return which == "original0" or (which == "original1" and bounded)


@every_case
def test_half_precision(form: str, network: str) -> None:
    """Parameters follow, the function stays; statistics, where they are ours, stay fp32."""
    dtype = torch.bfloat16 if network in ("dense", "fused") else torch.float16
    _, twin, x = twin_of(form, network)
    expected = twin(x)
    twin = twin.to(dtype)
    y = twin(x.to(dtype))
    assert y.dtype == dtype and worst(y, expected) <= SAME_NETWORK[dtype]
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    wide = [value for name, value in twin.named_buffers() if name.endswith(("running_scale", ".rho"))]
    assert {value.dtype for value in wide} <= {torch.float32}
    assert torch.isfinite(loss(twin.train().float(), network, 1))


# --- copies and files --------------------------------------------------------------------------------------------------


@every_case
def test_a_deep_copy_is_whole_and_independent(form: str, network: str) -> None:
    _, twin, x = twin_of(form, network)
    other, before = copy.deepcopy(twin), copy.deepcopy(twin.state_dict())
    assert same_bits(twin, other) and torch.equal(other(x), twin(x)) and repr(other) == repr(twin)
    train(other, network, steps=1, rate=0.1)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@every_case
def test_a_state_dict_goes_both_ways(form: str, network: str) -> None:
    _, twin, x = twin_of(form, network)
    other = twin_of(form, network, seed=1)[1]
    states, outputs = copy.deepcopy((twin.state_dict(), other.state_dict())), (twin(x), other(x))
    assert not torch.equal(*outputs) and list(states[0]) == list(states[1])
    for model, state, output in ((twin, states[1], outputs[1]), (other, states[0], outputs[0])):
        model.load_state_dict(state, strict=True)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), output)


def through_a_file(form: str, network: str, twin: nn.Module, path: Path) -> nn.Module:
    """Read back into a network of other weights."""
    nr.save(twin, path, force=True)
    return nr.load(path, arch=fresh_start(form, network)).eval()


def fresh_start(form: str, network: str) -> nn.Module:
    """Another network of the same architecture: what the form starts from; what it makes, where the file is torch's own."""
    model = start(form, network, seed=7)
    return convert(form, model, inputs(network))[0] if form in FROM_OURS else model


@every_case
def test_a_file_keeps_the_bits(form: str, network: str, tmp_path: Path) -> None:
    """Also of linear layers, though the file can't know the example inputs."""
    suffix = "safetensors" if network in ("dense", "fused") else "pt"
    model, twin, x = twin_of(form, network)
    again = through_a_file(form, network, twin, tmp_path / f"twin.{suffix}")
    assert same_bits(again, twin) and torch.equal(again(x), twin(x))
    assert form in FOR_GOOD or same_bits(nr.revert(again), model)


# --- the way back ------------------------------------------------------------------------------------------------------


@every_reversible_case
def test_revert_gives_the_bits_back(form: str, network: str) -> None:
    model, twin, x = twin_of(form, network)
    assert rewritten(twin)
    back, names, trained = reverted(copy.deepcopy(twin))
    assert same_bits(back, model) and torch.equal(back(x), model(x)) and names and not trained
    assert repr(back) == repr(model) and not rewritten(back)
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]


@every_reversible_case
def test_revert_gives_the_bits_back_after_calibration(form: str, network: str, tmp_path: Path) -> None:
    model, twin, x = twin_of(form, network)
    if not _calibrates(twin):
        with pytest.raises(NormRewriteError, match=r"there is nothing to calibrate|no site can be calibrated"):
            nr.calibrate(twin, x)
        return
    calibrated, _ = nr.calibrate(twin, x, batch_size=len(x))
    assert not same_bits(calibrated, twin)
    again = through_a_file(form, network, calibrated, tmp_path / "twin.pt")
    assert same_bits(again, calibrated)
    for each in (calibrated, again):
        back, _, trained = reverted(copy.deepcopy(each))
        assert same_bits(back, model) and not trained


def _calibrates(twin: nn.Module) -> bool:
    measured = [m for m in twin.modules() if isinstance(m, BatchNorm) and not isinstance(m, FrozenBatchNorm)]
    return bool(measured or fittable(twin))


@every_reversible_case
def test_after_training_the_nearest_comes_back_and_is_said_so(form: str, network: str) -> None:
    model, twin, x = twin_of(form, network)
    train(twin, network)
    back, names, trained = reverted(copy.deepcopy(twin.eval()))
    assert worst(back(x), twin(x)) <= SAME_NETWORK[torch.float32] and not same_bits(back, model)
    assert set(trained) == (set() if form == "frozen" else set(names))
    assert not [module for module in back.modules() if isinstance(module, BatchNorm)]


@every_reversible
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_revert_after_a_cast(form: str, dtype: torch.dtype) -> None:
    """What the original itself becomes by that cast."""
    model, twin, _ = twin_of(form, "chain")
    back, _, trained = reverted(twin.to(dtype))
    assert same_bits(back, model.to(dtype)) and not trained


# --- tools of torch ----------------------------------------------------------------------------------------------------


@every_case
def test_torch_fx_traces_it(form: str, network: str) -> None:
    _, twin, x = twin_of(form, network)
    traced = fx.symbolic_trace(copy.deepcopy(twin))
    assert form in FOR_GOOD or not [node for node in traced.graph.nodes if node.op == "get_attr"]
    assert torch.equal(traced(x), twin(x))
    if form not in FROM_OURS:  # the fused class of the test asks its own training flag, which a trace fixes
        torch.testing.assert_close(traced.train()(x), twin.train()(x))
    assert {name: value for name, value in traced.state_dict().items() if name not in twin.state_dict()} == {}


@pytest.mark.parametrize("form", ["l1", *(form for form in FORMS if not measures(form) and form not in ALIKE)])
def test_torch_compile(form: str) -> None:
    """A step of training; tests/test_compile.py has every metric, and export has eval."""
    torch._dynamo.reset()
    _, twin, x = twin_of(form, "fused")
    eager = copy.deepcopy(twin.train())
    for model in (torch.compile(twin, fullgraph=True, backend="aot_eager"), eager):
        model(x).square().sum().backward()
    for (name, found), wanted in zip(twin.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-3, msg=name)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-4, atol=1e-4)


@every_form
def test_torch_export(form: str) -> None:
    _, twin, x = twin_of(form, "fused")
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    other = inputs("fused", seed=1)[:5]
    torch.testing.assert_close(program.module()(other), twin(other), rtol=1e-4, atol=1e-4)


# --- training ----------------------------------------------------------------------------------------------------------


@every_case
def test_five_steps(form: str, network: str) -> None:
    _, twin, _ = twin_of(form, network)
    before = copy.deepcopy(twin)
    assert np.isfinite(train(twin, network)).all()
    for name, old in before.named_modules():
        new: Any = twin.get_submodule(name)
        norm = weight_norm_of(old)
        if isinstance(old, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            assert _turned(old.weight, new.weight), name
        if isinstance(norm, BoundedWeightNorm):
            lengths = [np.linalg.norm(norms_of(layer, layer.weight, norm.p)) for layer in (old, new)]
            assert abs(lengths[1] / lengths[0] - 1) <= 1e-5, name
        if isinstance(old, FrozenBatchNorm):
            assert same_bits(old, new), name
        elif isinstance(old, BatchNorm):
            assert not torch.equal(old.running_scale, new.running_scale), name  # type: ignore[arg-type]


def _turned(old: Any, new: Any) -> bool:
    directions = [value.detach().double() / value.detach().double().norm() for value in (old, new)]
    return worst(*directions) > 1e-9


@every_case
def test_optimizers_follow(form: str, network: str) -> None:
    """They step just the twin's parameters, with the momentum of those that were handed over as they are."""
    in_place = CASES.index((form, network)) % 2 == 1  # convert and convert_ in turn
    model, x = start(form, network), inputs(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    loss(model.train(), network, 0).backward()
    optimizer.step()
    momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    own = dict(model.named_parameters())
    options: Any = {"optimizers": [optimizer], "example_inputs": [x]}
    twin = nr.convert_(model, form, **options) if in_place else nr.convert(model, form, **options)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in twin.parameters())
    state = {name: optimizer.state[p]["momentum_buffer"] for name, p in twin.named_parameters() if p in optimizer.state}
    kept = state.keys() & momentum.keys()
    assert kept and all(torch.equal(state[name], momentum[name]) for name in kept)
    assert kept >= {name for name, p in twin.named_parameters() if p is own.get(name)}
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer.zero_grad()
    loss(twin.train(), network, 1).backward()
    optimizer.step()
    moved = {name for name, p in twin.named_parameters() if not torch.equal(p, before[name])}
    pushed = {name for name, p in twin.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-3}
    assert len(pushed) > len(before) / 3 and moved >= pushed
    assert any(name not in ("head.weight", "head.bias") for name in moved)


@every_case
def test_fresh_models(form: str, network: str) -> None:
    """No trained statistics: the twin still trains, is the same in eval where it says so, and goes back."""
    model, x = fresh(form, network), inputs(network)
    twin, report = convert(form, model, x)
    assert twin.training and report.ok and len(report.rewritten) == len(report.sites)
    if not report.inexact:
        assert worst(copy.deepcopy(twin).eval()(x), copy.deepcopy(model).eval()(x)) <= SAME_NETWORK[torch.float32]
    if form not in FOR_GOOD:
        assert same_bits(nr.revert(twin), model)
    assert np.isfinite(train(twin, network)).all()


@every_form
def test_the_pass_is_a_torch_fx_pass(form: str) -> None:
    model, x = start(form, "fused"), inputs("fused")
    result = rewrite(form)(fx.symbolic_trace(model))
    assert result.modified and (form in FOR_GOOD or rewritten(result.graph_module))
    if not nr.plan(model, form).apply()[1].inexact:
        assert worst(result.graph_module(x), model(x)) <= SAME_NETWORK[torch.float32]


def test_a_source_and_a_summary_for_each() -> None:
    for name, target in TARGETS.items():
        assert target.summary and target.source and target.spelling.startswith(name)
