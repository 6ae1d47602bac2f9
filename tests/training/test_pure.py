"""fp16-pure: a training in half, and the ordinary model that comes of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import NormRewriteError
from normrewrite.api.finetune import finetune, finetune_
from normrewrite.data import Batch, Data
from normrewrite.training.loop import Step
from normrewrite.training.pure import HalfWeights, LossScale

PURE: dict[str, Any] = {"labels": True, "precision": "fp16-pure", "batch_size": 20}


class Net(nn.Module):
    """With a buffer that activations meet, one that forward changes, a frozen layer, and norms of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.frozen, self.head = nn.Linear(144, 16).requires_grad_(False), nn.Linear(16, 3)
        self.register_buffer("place", torch.randn(4, 6, 6), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        logits: Tensor = self.head(self.frozen((self.norm(self.conv(x)).relu() + self.place).flatten(1)).relu())
        return logits


def _data(count: int = 60, factor: float = 1.0) -> Data:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    inputs[:, 0, 0] += 2 * labels[:, None]
    return Data(Batch({"x": factor * inputs}, labels))


def _halves(value: Tensor) -> bool:
    return torch.equal(value, value.half().to(value.dtype))


# --- what comes out ----------------------------------------------------------------------------------------------------------


def test_the_model_is_the_ordinary_one() -> None:
    model = Net()
    kept = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    objects = [*model.parameters(), *model.buffers()]
    trained, result = finetune_(model, _data(), epochs=10, lr=0.05, **PURE)
    assert trained is model and all(
        a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert result.epochs[-1].loss < 0.7 * result.epochs[0].loss and result.accumulator == "fp32"  # type: ignore[operator]
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.dtype == kept[name].dtype
        stays = name.startswith("frozen") or name == "place"
        assert torch.equal(value, kept[name]) is stays, name
        assert _halves(value) or stays or name.startswith("norm.running")
    assert model.seen == 600 and not _halves(model.norm.running_var)  # type: ignore[arg-type]
    assert not model._forward_pre_hooks and not model.norm._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_it_keeps_the_dtype_that_the_model_came_in(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    whole = _data().whole
    assert whole is not None
    data = Data(Batch({"input": whole.inputs["x"].to(dtype)}, whole.labels))
    trained, _ = finetune(model, data, steps=2, **PURE)
    assert {value.dtype for value in trained.state_dict().values()} == {dtype}


def test_best_and_averaged_weights_come_back_too() -> None:
    settings = PURE | {"epochs": 12, "lr": 0.2, "schedule": "constant", "val_split": 0.3, "patience": 2}
    model = Net()
    best, result = finetune(model, _data(90), **settings)
    assert result.last is not None and torch.float16 not in {value.dtype for value in result.last.values()}
    assert torch.equal(best.frozen.weight, model.frozen.weight)  # type: ignore[union-attr]
    assert torch.equal(result.last["frozen.weight"], model.frozen.weight)
    averaged, _ = finetune(model, _data(), epochs=4, ema=0.7, **PURE)
    assert not _halves(averaged.head.weight) and averaged.head.weight.dtype is torch.float32  # type: ignore[union-attr, arg-type]
    assert torch.equal(averaged.frozen.weight, model.frozen.weight)  # type: ignore[union-attr]


def test_a_request_that_fails_leaves_the_model_as_it_was() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormRewriteError, match="--warmup"):
        finetune_(model, _data(), steps=2, warmup=5, **PURE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32} and not model._forward_pre_hooks


# --- what pure means ---------------------------------------------------------------------------------------------------------


def test_updates_below_half_a_step_are_lost() -> None:
    """Adam's first steps are of the learning rate: 1e-5 next to weights of about 0.1, whose half numbers are 6e-5 apart."""
    model = Net()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(0.1 + 0.01 * torch.rand_like(parameter)).copy_(parameter.half())
    lost, _ = finetune(model, _data(), steps=3, lr=1e-5, schedule="constant", **PURE)
    kept, _ = finetune(model, _data(), steps=3, lr=1e-5, schedule="constant", labels=True)
    moved, _ = finetune(model, _data(), steps=3, lr=1e-3, schedule="constant", **PURE)
    assert torch.equal(lost.head.weight, model.head.weight)  # type: ignore[union-attr]
    assert not torch.equal(kept.head.weight, model.head.weight)  # type: ignore[union-attr]
    assert not torch.equal(moved.head.weight, model.head.weight)  # type: ignore[union-attr]


def test_small_gradients_survive_by_the_scale() -> None:
    """1e-8 is no half number."""
    for scale, reached in ((2.0**16, 1e-8), (1.0, 0.0)):
        model = nn.Linear(1, 1, bias=False)
        weights = HalfWeights(model)
        weights.optimised(torch.optim.SGD(model.parameters(), lr=1.0))
        weights.scale.value = scale
        weights.scaled(1e-8 * model(torch.ones(1, 1)).float().sum()).backward()
        (seen,) = weights.gradients()
        assert seen.grad is not None and seen.grad.item() == pytest.approx(reached, rel=1e-3)


def test_gradients_are_measured_in_fp32() -> None:
    """Scaled, their norm may be beyond half where each of them is within."""
    model = nn.Linear(1000, 1, bias=False)
    weights = HalfWeights(model)
    weights.optimised(torch.optim.SGD(model.parameters(), lr=1.0))
    model.weight.grad = torch.full((1, 1000), 30_000.0).half()
    found = torch.nn.utils.clip_grad_norm_(weights.gradients(), 1.0)
    assert found.item() == pytest.approx(30_000 / 2**16 * 1000**0.5)


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = LossScale()
    scale.update(False)
    for _ in range(2000):
        scale.update(True)
    assert (scale.value, scale.steps) == (2.0**16, 2000)
    scale.update(False)
    again = LossScale()
    again.load_state_dict(scale.state_dict())
    assert (again.value, again.steps) == (2.0**15, 0)


def test_steps_that_overflow_lower_the_scale_and_are_skipped() -> None:
    """Inputs of 3000 make the first weights' gradients overflow at a scale of 65536."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    trained, result = finetune(model, _data(factor=3000.0), steps=20, lr=1e-3, **PURE)
    assert 3 <= result.skipped_steps <= 16 and result.nonfinite_batches == 0
    assert not torch.equal(trained[1].weight, model[1].weight)


def test_the_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: Step) -> None:
        if step.step == 5:  # the checkpoint is of step 4
            raise Stopped

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    whole, expected = finetune(model, _data(factor=3000.0), **PURE | {"steps": 20})
    for tamper in (False, True):
        run = PURE | {"steps": 20, "checkpoints": tmp_path / str(tamper), "save_every": 4, "resume": True}
        with pytest.raises(Stopped):
            finetune(model, _data(factor=3000.0), progress=stop, **run)
        for path in tmp_path.glob(f"{tamper}/step-*/custom_checkpoint_*.pkl"):
            state = torch.load(path, weights_only=True)
            if tamper and set(state) == {"value", "steps"}:
                torch.save(state | {"value": 2.0**16}, path)
        resumed, result = finetune(model, _data(factor=3000.0), **run)
        same = torch.equal(resumed[1].weight, whole[1].weight) and result.skipped_steps == expected.skipped_steps
        assert same is not tamper


# --- norms -------------------------------------------------------------------------------------------------------------------


def _normed(to: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return model if to == "l2" else nr.convert(model, to)


@pytest.mark.parametrize(
    ("to", "accumulator", "spoilt"),
    [
        ("l2", "fp32", False),
        ("l2", "half", True),
        ("l1", "half", False),
        ("linf", "half", False),
        ("range", "half:1", False),
    ],
)
def test_squares_overflow_where_magnitudes_do_not(to: str, accumulator: str, spoilt: bool) -> None:
    """720 deviations of about 25: their sum fits half, the sum of their squares does not, one square does."""
    trained, result = finetune(_normed(to), _data(factor=45.0), epochs=4, lr=0.01, accumulator=accumulator, **PURE)
    assert result.nonfinite_batches == (result.steps if spoilt else 0), result
    assert (result.skipped_steps < 8) and result.epochs[-1].loss is not None
    kept = dict(trained[1].named_buffers())
    still = "running_var" in kept and torch.equal(kept["running_var"], torch.ones(4))
    assert still is spoilt and all(bool(value.isfinite().all()) for value in kept.values())
    assert (result.epochs[-1].accuracy > 0.7) is not spoilt  # type: ignore[operator]


class RootMeanSquare(nn.Module):
    """As libraries write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class RmsNorm(RootMeanSquare):
    """Found by its name and its one weight."""


def test_what_is_not_in_half_arithmetic_is_told() -> None:
    layers = (nn.Flatten(), nn.Linear(64, 8), RmsNorm(8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    _, result = finetune(nn.Sequential(*layers), _data(), steps=1, **PURE)
    assert result.notes == ["norms of code of their own, not in half arithmetic: 2"]
    _, result = finetune(_normed("bwn"), _data(), steps=1, **PURE)
    assert result.notes == ["1 weight norms, computed in fp32 and rounded once"]
    assert finetune(_normed("l1"), _data(), steps=1, **PURE)[1].notes == []


def test_the_teacher_stays_in_its_own_precision() -> None:
    model = _normed("l1")
    dtypes: set[torch.dtype] = set()
    teacher = _normed("l2")
    teacher[1].register_forward_pre_hook(lambda _, inputs: dtypes.add(inputs[0].dtype))
    settings = PURE | {"labels": False, "teacher": teacher, "features": ["2"], "loss": "kl"}
    finetune(model, Data(Batch({"input": torch.randn(40, 1, 8, 8)})), steps=2, **settings)
    assert dtypes == {torch.float32}
