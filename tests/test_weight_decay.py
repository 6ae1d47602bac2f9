"""Weight decay against what takes its place, in float64 on a small network whose norms have next to no eps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

import normrewrite as nr
from normrewrite.sites.invariance import param_groups, scale_invariant
from normrewrite.weight_decay import ExponentialSchedule, NormRecord, NormSchedule, StepSizeCorrection, shrinkage

STEPS = 30
Way = Callable[..., Any]


def network(metric: str = "l2") -> nn.Sequential:
    """Two invariant weights with a direction a channel, one with a whole; a bias, an affine and a last layer without."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nr.nn.BatchNorm2d(4, eps=1e-14, metric=metric),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6, eps=1e-28),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.GroupNorm(2, 4, eps=1e-28),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    return model.double()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (STEPS, 8), generator=generator), strict=True))


def train(model: nn.Module, optimizer: Optimizer, batches: Any, *each: Callable[[], None]) -> list[float]:
    """The losses; `each` is called behind every step."""
    losses = []
    for x, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        for call in each:
            call()
        losses.append(loss.item())
    return losses


def with_decay(
    batches: Any, lr: float = 0.1, weight_decay: float = 0.05, momentum: float = 0.0, metric: str = "l2"
) -> Any:
    """A run with weight decay on the invariant weights: model, losses, and their norms before and behind every step."""
    model = network(metric)
    record = NormRecord(scale_invariant(model).weights)
    optimizer = SGD(param_groups(model, weight_decay, rest=0.01), lr=lr, momentum=momentum)
    return model, train(model, optimizer, batches, record.step), record.reference()


def undecayed(lr: float = 0.1, momentum: float = 0.0, metric: str = "l2") -> tuple[Any, SGD]:
    model = network(metric)
    return model, SGD(param_groups(model, weight_decay=0.0, rest=0.01), lr=lr, momentum=momentum)


def apart(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two networks, invariant weights by the directions of their blocks."""
    weights = scale_invariant(a).weights, scale_invariant(b).weights
    assert [len(found) for found in weights] == [3, 3]
    directions = [
        {weight.name: weight.parameter / weight.expanded(weight.norms()) for weight in found} for found in weights
    ]
    left, right = (dict(m.named_parameters()) | d for m, d in zip((a, b), directions, strict=True))
    # A bias in front of a batch norm changes nothing; its gradient is rounding.
    names = [name for name in left if name not in ("0.bias", "3.bias")]
    return max(float((left[name] - right[name]).detach().abs().max()) for name in names)


def gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# --- by recorded norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [StepSizeCorrection, NormSchedule])
@settings(max_examples=6, deadline=None)
@given(lr=st.floats(0.01, 0.3), weight_decay=st.floats(0.0, 0.3), metric=st.sampled_from(["l2", "l1", "topk:10"]))
def test_plain_sgd_takes_the_very_path(batches: Any, way: Way, lr: float, weight_decay: float, metric: str) -> None:
    """To rounding: norms of every step, times sqrt(1 - lr * weight_decay), as a decayed step divides by one and multiplies."""
    decayed, losses, reference = with_decay(batches, lr, weight_decay, metric=metric)
    shorter = {name: norms * (1 - lr * weight_decay) ** 0.5 for name, norms in reference.items()}
    model, optimizer = undecayed(lr, metric=metric)
    correction = way(optimizer, scale_invariant(model).weights, shorter)
    assert gap(train(model, optimizer, batches, correction.step), losses) < 1e-8
    assert apart(model, decayed) < 1e-8


@pytest.mark.parametrize("way", [StepSizeCorrection, NormSchedule])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_norms_of_every_fifth_step_come_close(batches: Any, way: Way, momentum: float) -> None:
    """As published: much closer to the run with weight decay than the run without any."""
    options = {"lr": 0.005, "momentum": momentum}
    decayed, _, reference = with_decay(batches, weight_decay=2.0, **options)
    alone, optimizer = undecayed(**options)
    train(alone, optimizer, batches)
    model, optimizer = undecayed(**options)
    rows = {name: norms[::5] for name, norms in reference.items()}
    correction = way(optimizer, scale_invariant(model).weights, rows)
    for start in range(0, STEPS, 5):
        train(model, optimizer, batches[start : start + 5])
        correction.step()
    assert apart(model, decayed) < 0.5 * apart(alone, decayed)


def test_norm_schedule_keeps_the_norms(batches: Any) -> None:
    _, _, reference = with_decay(batches)
    model, optimizer = undecayed(momentum=0.9)
    weights = scale_invariant(model).weights
    schedule = NormSchedule(optimizer, weights, {name: norms[:3] for name, norms in reference.items()})
    for row in (0, 1, 2, 2):  # the last one stays
        for weight in weights:
            torch.testing.assert_close(weight.norms(), reference[weight.name][row], rtol=1e-14, atol=0)
        train(model, optimizer, batches[:2])
        schedule.step()
    schedule.remove()
    train(model, optimizer, batches[:1])
    assert not torch.allclose(weights[0].norms(), reference["0.weight"][2], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda groups: Adam(groups), lambda groups: AdamW(groups), lambda groups: SGD(groups, 0.1)]
)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_any_optimiser_is_corrected_block_by_block(batches: Any, make: Way, factor: float) -> None:
    """A step on norms of its own is as it was; on norms four times as large it is a sixteenth."""
    plain, corrected = network(), network()
    weights = scale_invariant(corrected).weights
    StepSizeCorrection(
        optimizer := make(param_groups(corrected)), weights, {w.name: w.norms()[None] / factor for w in weights}
    )
    train(corrected, optimizer, batches[:1])
    train(plain, make(param_groups(plain)), batches[:1])
    start = network()
    for weight in weights:
        found, step, old = (model.get_parameter(weight.name) for model in (corrected, plain, start))
        torch.testing.assert_close(found - old, (step - old) * factor**2, rtol=1e-9, atol=1e-15)
    assert torch.equal(corrected[-1].weight, plain[-1].weight)


def test_dead_blocks_stay_finite(batches: Any) -> None:
    for way in (StepSizeCorrection, NormSchedule):
        model, optimizer = undecayed()
        weights = scale_invariant(model).weights
        reference = {weight.name: weight.norms()[None] for weight in weights}
        reference["0.weight"][:, 1] = 0
        with torch.no_grad():
            model[0].weight[2] = 0
        way(optimizer, weights, reference)
        train(model, optimizer, batches[:2])
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# --- the exponential schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "l1", "linf"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_theorem_of_li_and_arora(batches: Any, momentum: float, metric: str) -> None:
    """Directions, losses and all other parameters are those of the run with weight decay; weights are a^-t times its own."""
    lr, weight_decay = 0.1, 0.02
    decayed, losses, reference = with_decay(batches, lr, weight_decay, momentum, metric)
    model, optimizer = undecayed(lr, momentum, metric)
    schedule = ExponentialSchedule(optimizer, weight_decay)
    assert gap(train(model, optimizer, batches, schedule.step), losses) < 1e-8
    assert apart(model, decayed) < 1e-8
    grown = shrinkage(lr, weight_decay, momentum) ** -STEPS
    for weight in scale_invariant(model).weights:
        torch.testing.assert_close(weight.norms(), grown * reference[weight.name][-1], rtol=1e-8, atol=0)


def test_one_percent_of_the_weight_decay_is_seen(batches: Any) -> None:
    _, losses, _ = with_decay(batches, momentum=0.5)
    model, optimizer = undecayed(momentum=0.5)
    schedule = ExponentialSchedule(optimizer, 0.05 * 1.01)
    assert gap(train(model, optimizer, batches, schedule.step), losses) > 1e-5


def test_it_grows_with_a_schedule_of_the_other_runs_learning_rate(batches: Any) -> None:
    """Exactly, without momentum: warm-up from zero and a decay."""

    def planned(step: int) -> float:
        return min(1.0, step / 5) * 0.9**step

    decayed = network()
    optimizer = SGD(param_groups(decayed, 0.05, rest=0.01), lr=0.1)
    losses = train(decayed, optimizer, batches, torch.optim.lr_scheduler.LambdaLR(optimizer, planned).step)
    model, optimizer = undecayed()
    schedule = ExponentialSchedule(optimizer, 0.05, planned)
    assert gap(train(model, optimizer, batches, schedule.step), losses) < 1e-9
    assert apart(model, decayed) < 1e-9


@given(st.floats(1e-4, 1.0), st.floats(0.0, 0.1), st.floats(0.0, 0.9))
def test_shrinkage_is_the_larger_root(lr: float, weight_decay: float, momentum: float) -> None:
    if lr * weight_decay >= 0.99 * (1 - momentum**0.5) ** 2:
        return
    a = shrinkage(lr, weight_decay, momentum)
    assert abs(a * a - (1 + momentum - lr * weight_decay) * a + momentum) < 1e-12
    assert momentum**0.5 - 1e-15 <= a <= 1
    assert shrinkage(lr, weight_decay) == pytest.approx(1 - lr * weight_decay)


# --- files and faults ------------------------------------------------------------------------------------------------


def _by_reference(way: Way, reference: Any) -> Way:
    return lambda model, optimizer: way(optimizer, scale_invariant(model).weights, reference)


@pytest.mark.parametrize("name", ["correction", "schedule", "exponential"])
def test_it_resumes_to_the_bit(batches: Any, tmp_path: Any, name: str) -> None:
    _, _, reference = with_decay(batches, momentum=0.9, weight_decay=0.02)
    ways: dict[str, Way] = {
        "correction": _by_reference(StepSizeCorrection, reference),
        "schedule": _by_reference(NormSchedule, reference),
        "exponential": lambda model, optimizer: ExponentialSchedule(optimizer, 0.02),
    }
    whole, optimizer = undecayed(momentum=0.9)
    train(whole, optimizer, batches, ways[name](whole, optimizer).step)

    first, optimizer = undecayed(momentum=0.9)
    way = ways[name](first, optimizer)
    train(first, optimizer, batches[:11], way.step)
    torch.save([part.state_dict() for part in (first, optimizer, way)], tmp_path / "state.pt")
    second, optimizer = undecayed(momentum=0.9)
    way = ways[name](second, optimizer)
    for part, state in zip((second, optimizer, way), torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(second, optimizer, batches[11:], way.step)
    assert all(
        torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_record_resumes(batches: Any) -> None:
    _, _, reference = with_decay(batches[:3])
    record = NormRecord(scale_invariant(network()).weights)
    record.load_state_dict(reference)
    record.step()
    assert {name: len(norms) for name, norms in record.reference().items()} == dict.fromkeys(reference, 5)
    assert all(torch.equal(record.reference()[name][:-1], norms) for name, norms in reference.items())


def test_what_is_refused() -> None:
    model = network()
    weights = scale_invariant(model).weights
    reference = NormRecord(weights).reference()
    decayed = SGD(param_groups(model, weight_decay=0.1), lr=0.1)
    with pytest.raises(nr.NormRewriteError, match=r"0\.weight: the optimiser decays it by 0\.1"):
        StepSizeCorrection(decayed, weights, reference)
    with pytest.raises(nr.NormRewriteError, match=r"0\.weight: SGD doesn't step it"):
        NormSchedule(SGD(model[-1].parameters(), lr=0.1), weights, reference)
    with pytest.raises(nr.NormRewriteError, match=r"0\.weight: reference norms are \(epochs, 4\), got none"):
        NormSchedule(SGD(param_groups(model), lr=0.1), weights, {})
    with pytest.raises(nr.NormRewriteError, match=r"a scale-invariant group is decayed by 0\.1"):
        ExponentialSchedule(decayed, 0.1)
    for optimizer in (Adam(param_groups(model)), SGD(param_groups(model), lr=0.1, momentum=0.9, nesterov=True)):
        with pytest.raises(nr.NormRewriteError, match="a theorem on SGD"):
            ExponentialSchedule(optimizer, 0.1)
    with pytest.raises(nr.NormRewriteError, match=r"lr \* weight_decay is 0\.01"):
        ExponentialSchedule(SGD(param_groups(model), lr=0.1, momentum=0.9), 0.1)
