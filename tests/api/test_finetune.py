"""finetune: label-free repair, labels, what is left as it was, and runs that are broken off."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import normrewrite as nr
from normrewrite import NormRewriteError
from normrewrite.api.finetune import finetune, finetune_
from normrewrite.data import Batch, Data
from normrewrite.training import stability
from normrewrite.training.loop import Step
from normrewrite.training.result import Finetuned
from tests.conftest import ROOT, digits_network

SETTINGS: dict[str, Any] = {
    "labels": True,
    "distill": 0.5,
    "epochs": 3,
    "lr": 0.01,
    "batch_size": 16,
    "ema": 0.8,
    "clip": 1.0,
    "flip": True,
    "crop": 1,
    "warmup": 2,
    "val_split": 0.2,
}


class Stopped(Exception):
    """Stands for whatever breaks a run off."""


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return digits_network()


@pytest.fixture(scope="module")
def examples() -> tuple[Tensor, Tensor]:
    arrays = np.load(ROOT / "examples" / "digits.npz")
    return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()


@pytest.fixture
def tiny() -> nn.Module:
    """With all that a step's result can depend on: batch norms, dropout, images to flip."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10))
    return nr.convert(nn.Sequential(*layers).eval(), to="l1")


@pytest.fixture
def labelled(examples: tuple[Tensor, Tensor]) -> Data:
    return Data(Batch({"input": examples[0][:100]}, examples[1][:100]))


def _accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == labels).double().mean())


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def _record(result: Finetuned) -> dict[str, Any]:
    return result.as_dict() | {"seconds": 0.0}


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_layer_twin_is_repaired_without_labels(digits: nn.Module, examples: tuple[Tensor, Tensor]) -> None:
    images, labels = examples
    twin = nr.convert(digits, to="layer", offset=0)
    nr.calibrate_(twin, images[:100])
    before = _accuracy(twin, images[250:], labels[250:])
    repaired, result = finetune(twin, images[:250], epochs=4)
    after = _accuracy(repaired, images[250:], labels[250:])
    assert after > before + 0.01 and after > _accuracy(digits, images[250:], labels[250:]) - 0.01
    assert result.steps == 12 and result.inputs == 12 * 64 and len(result.epochs) == 4
    assert result.epochs[-1].loss < result.epochs[0].loss / 2  # type: ignore[operator]
    assert _accuracy(nr.revert(repaired), images, labels) > 0.97  # the nearest, not the original
    with pytest.raises(NormRewriteError, match=r"was trained since.*Give it as --teacher"):
        finetune(repaired, images)
    finetune(repaired, images, teacher=digits, steps=1)


@pytest.mark.parametrize(
    ("to", "precision"),
    [
        *(("l1", precision) for precision in ("fp32", "fp16-pure", "int8")),
        *(("bwn", precision) for precision in ("bf16", "fp16-pure", "int8")),
        *(("group:2", precision) for precision in ("fp16", "fp16-pure")),
    ],
)
def test_every_precision_learns(to: str, precision: str, digits: nn.Module, examples: tuple[Tensor, Tensor]) -> None:
    twin = nr.convert(digits, to=to)
    # Steps: gradients of fp16-pure are half too, and the loss scale comes down to that.
    settles = 3 if precision == "fp16-pure" else 0
    trained, result = finetune(twin, examples[0][:128], epochs=3, precision=precision)
    losses = [epoch.loss for epoch in result.epochs if epoch.loss is not None]
    assert result.skipped_steps <= settles and losses[-1] < 1.5 * losses[0] and len(losses) > 1
    assert all(bool(torch.isfinite(value).all()) for value in trained.state_dict().values())
    assert all(value.dtype != torch.float16 for value in trained.state_dict().values())


def test_a_fresh_network_learns_from_labels(tiny: nn.Module, examples: tuple[Tensor, Tensor]) -> None:
    data = Data(Batch({"input": examples[0]}, examples[1]))
    trained, result = finetune(tiny, data, labels=True, epochs=8, lr=0.02, val_split=0.2)
    assert _accuracy(trained, *examples) > 0.85
    assert result.best is not None and result.epochs[result.best - 1].val_accuracy == max(
        epoch.val_accuracy or 0 for epoch in result.epochs
    )


def test_accumulated_batches_are_one_large_batch(examples: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()  # nothing in it looks across inputs
    data = Data(Batch({"input": examples[0][:64].double()}, examples[1][:64]))
    steps: dict[str, Any] = {"labels": True, "steps": 3, "optimizer": "sgd", "lr": 0.1}
    large, _ = finetune(model, data, batch_size=32, **steps)
    small, _ = finetune(model, data, batch_size=8, accumulate=4, **steps)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(next(large.parameters()), next(model.parameters()), atol=1e-3)


def test_a_gradient_is_clipped_to_its_largest_norm(tiny: nn.Module, labelled: Data) -> None:
    """A step of plain SGD moves the parameters by no more than lr * clip, and by just that where the gradient is larger."""
    once: dict[str, Any] = {"labels": True, "steps": 1, "optimizer": "sgd", "lr": 1.0, "momentum": 0.0}
    free, clipped = (_moved(tiny, finetune(tiny, labelled, **once, clip=clip)[0]) for clip in (None, 0.25))
    assert free > 0.3 and clipped == pytest.approx(0.25, rel=1e-4)


def _moved(before: nn.Module, after: nn.Module) -> float:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return float(torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm())


def test_it_stops_early_and_gives_the_best_weights(tiny: nn.Module, labelled: Data) -> None:
    trained, result = finetune(
        tiny, labelled, labels=True, epochs=30, lr=0.5, schedule="constant", val_split=0.3, patience=2
    )
    assert result.stopped_early and len(result.epochs) < 30 and result.best == len(result.epochs) - 2
    assert result.last is not None and not torch.equal(result.last["5.weight"], trained.state_dict()["5.weight"])


# --- what is left as it was -------------------------------------------------------------------------------------------


def test_the_model_the_flags_and_the_random_state_stay(tiny: nn.Module, labelled: Data) -> None:
    before, state, of_numpy = copy.deepcopy(tiny.state_dict()), torch.get_rng_state(), np.random.get_state()[1]
    tiny[0].train()
    trained, _ = finetune(tiny, labelled, labels=True, steps=2, precision="bf16", deterministic=True)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], of_numpy)
    assert [module.training for module in trained.modules()] == [module.training for module in tiny.modules()]
    assert "forward" not in vars(trained) and not torch.are_deterministic_algorithms_enabled()
    tiny_parameters = list(tiny.parameters())
    finetune_(tiny, labelled, labels=True, steps=1)
    assert all(a is b for a, b in zip(tiny_parameters, tiny.parameters(), strict=True))


def test_frozen_parameters_stay(tiny: nn.Module, labelled: Data) -> None:
    tiny[0].requires_grad_(False)
    trained, _ = finetune(tiny, labelled, labels=True, steps=2)
    assert torch.equal(trained[0].weight, tiny[0].weight) and not torch.equal(trained[5].weight, tiny[5].weight)


def test_batch_norms_of_frozen_statistics(tiny: nn.Module, labelled: Data) -> None:
    trained, _ = finetune(tiny, labelled, labels=True, epochs=2, val_split=0.2, freeze_statistics=True)
    assert all(torch.equal(a, b) for a, b in zip(trained.buffers(), tiny.buffers(), strict=True))
    assert not torch.equal(trained[1].weight, tiny[1].weight) and trained[1].training == tiny[1].training
    assert not torch.equal(finetune(tiny, labelled, labels=True, steps=1)[0][1].running_mean, tiny[1].running_mean)


def test_dropout_is_off_where_a_teacher_is_matched(tiny: nn.Module, labelled: Data) -> None:
    seen: list[bool] = []
    teacher = copy.deepcopy(tiny)
    tiny[3].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    taught: dict[str, Any] = {"teacher": teacher.eval()}
    for options, on in ((taught, False), (taught | {"dropout": True}, True), ({"labels": True}, True)):
        seen.clear()
        finetune_(tiny.train(), labelled, steps=1, **options)
        assert on == any(seen) and seen and tiny[3].training


# --- on 8 bits --------------------------------------------------------------------------------------------------------


def test_int8_learns_ranges_beside_an_ordinary_twin(digits: nn.Module, examples: tuple[Tensor, Tensor]) -> None:
    images, labels = examples
    twin = nr.convert(digits, to="l1")
    trained, result = finetune(twin, images[:250], epochs=2, precision="int8", int8_keep=("first",), lr=1e-4)
    assert type(trained) is type(twin) and trained.state_dict().keys() == twin.state_dict().keys()
    assert (
        result.ranges is not None and result.last_ranges is None and result.as_dict()["ranges"]["kept"] == ("stem.0.0",)
    )
    assert result.notes == [] and "stem.0.0" not in result.ranges.amax and "blocks.2.body.0.0" in result.ranges.amax
    with nr.int8(trained, ranges=result.ranges):
        assert _accuracy(trained, images[250:], labels[250:]) > _accuracy(digits, images[250:], labels[250:]) - 0.01
    (note,) = finetune(digits, images[:64], steps=1, precision="int8", teacher=digits)[1].notes
    assert note.startswith("9 batch norms between 8-bit layers measure squares (stem.0.1, ")


def test_int8_gives_the_ranges_of_the_weights_that_it_gives(tiny: nn.Module, labelled: Data) -> None:
    options: dict[str, Any] = {"labels": True, "lr": 0.5, "schedule": "constant", "val_split": 0.3, "precision": "int8"}
    trained, result = finetune(tiny, labelled, epochs=30, patience=2, **options)
    assert result.best is not None and result.last is not None and result.ranges != result.last_ranges
    again, until = finetune(tiny, labelled, epochs=result.best, **options)
    assert until.ranges == result.ranges and _same(again, trained)


def test_int8_forgets_the_ranges_of_a_step_that_is_skipped(tiny: nn.Module, labelled: Data) -> None:
    class Late(nn.Sequential):
        """Gives NaN for what its layers take as any number."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * torch.where((input > limit).any(), torch.nan, 1.0)

    assert labelled.whole is not None
    images = labelled.whole.inputs["input"].clone()
    images[7] *= 1e4
    data, reach = Data(Batch({"input": images}, labelled.whole.labels)), []
    for limit in (100, 1e9):
        _, result = finetune(Late(*tiny), data, labels=True, epochs=1, batch_size=20, precision="int8")
        assert result.skipped_steps == (limit == 100) and result.ranges is not None
        reach.append(result.ranges.amax["0"])
    assert reach[0] < 10 < 100 < reach[1]


# --- losses that are not finite ---------------------------------------------------------------------------------------


class _Sometimes(nn.Sequential):
    """Gives NaN for a batch of which an input is marked."""

    def forward(self, input: Tensor) -> Tensor:
        marked = torch.where((input > 100).any(), torch.nan, 1.0)
        return super().forward(input.clamp(max=9) * marked)


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny: nn.Module, labelled: Data) -> None:
    model = _Sometimes(*tiny)
    model[1] = nn.BatchNorm2d(4)  # torch's own would keep NaN in its running statistics
    assert labelled.whole is not None
    images = labelled.whole.inputs["input"].clone()
    images[7, 0, 0, 0] = 1000
    data = Data(Batch({"input": images}, labelled.whole.labels))
    trained, result = finetune(model, data, labels=True, epochs=3, batch_size=20)
    assert result.skipped_steps == 3 and result.steps == 15 and "3 steps were skipped" in str(result)
    assert all(bool(torch.isfinite(value).all()) for value in trained.state_dict().values())


def test_many_in_a_row_are_an_error(tiny: nn.Module, labelled: Data) -> None:
    with torch.no_grad():
        tiny[5].bias[0] = torch.inf
    with pytest.raises(NormRewriteError, match=r"20 times in a row. Lower --lr") as error:
        finetune(tiny, labelled, labels=True, epochs=100)
    assert error.value.exit_code == 1


# --- the largest stable learning rate ---------------------------------------------------------------------------------


def test_sgd_is_told_its_largest_stable_learning_rate(tiny: nn.Module, labelled: Data) -> None:
    sgd: dict[str, Any] = {"labels": True, "steps": 1, "optimizer": "sgd", "dropout": False, "batch_size": 32}
    result = finetune(tiny, labelled, **sgd, lr=1e-3)[1]
    without = nn.Sequential(*(layer for layer in tiny if not isinstance(layer, nn.Dropout)))
    expected = nr.stable_lr(without, nn.functional.cross_entropy, labelled, nesterov=True, batch_size=32, iterations=8)
    assert result.stable_lr == expected and result.stable_lr.curvature.inputs == 64 and result.notes == []
    assert f"Nesterov momentum 0.9: {float(expected):.3g}" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["stable_lr"]["limit"] == float(expected)
    above, plain = 1.01 * float(expected), finetune(tiny, labelled, **sgd, momentum=0.0)[1].stable_lr
    assert plain is not None and float(plain) == pytest.approx(2 / plain.curvature.value) and not plain.nesterov
    assert finetune(tiny, labelled, **sgd, lr=above)[1].notes == [
        f"--lr {above:g} is above it: the loss may rise instead of falling. Lower --lr, or give --warmup"
    ]
    assert finetune(tiny, labelled, labels=True, steps=1)[1].stable_lr is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-pure", "int8"])
def test_the_measuring_changes_no_bit_of_the_training(
    precision: str, tiny: nn.Module, labelled: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sgd: dict[str, Any] = SETTINGS | {"epochs": 1, "optimizer": "sgd", "precision": precision}
    trained, result = finetune(tiny, labelled, **sgd)
    wide = finetune(tiny, labelled, **sgd | {"precision": "fp32"})[1].stable_lr
    assert result.stable_lr is not None and result.stable_lr == wide  # in the model's own precision
    monkeypatch.setattr(stability, "at_start", lambda *_: (None, []))
    unmeasured, other = finetune(tiny, labelled, **sgd)
    assert _same(trained, unmeasured) and other.epochs == result.epochs and other.ranges == result.ranges


def test_what_can_not_be_measured_is_told_and_no_error(
    tiny: nn.Module, labelled: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return Doubled.apply(super().forward(input))  # type: ignore[no-any-return, no-untyped-call]

    sgd: dict[str, Any] = {"labels": True, "steps": 1, "optimizer": "sgd"}
    (note,) = finetune(Once(*tiny), labelled, **sgd)[1].notes
    assert note.startswith(
        "the largest stable learning rate was not measured: Once: its second derivatives can't be had"
    )
    monkeypatch.setattr(stability, "_SECONDS", 0.0)
    (note,) = finetune(tiny, labelled, **sgd)[1].notes
    assert "it takes too long" in note and "nr.stable_lr" in note
    monkeypatch.setattr(stability, "drawn", lambda *_: 1 / 0)
    (note,) = finetune(tiny, labelled, **sgd)[1].notes
    assert note.endswith("not measured: ZeroDivisionError: division by zero")


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


# --- broken off and resumed -------------------------------------------------------------------------------------------


def _stopping(at: int) -> Any:
    def each(step: Step) -> None:
        if step.step == at:
            raise Stopped

    return each


@pytest.mark.parametrize(
    "chosen",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp16-pure", "accumulator": "half:16"},
        {"precision": "int8", "int8_gradients": True},
        {"precision": "int8", "int8_ranges": "gradient"},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    chosen: dict[str, Any], tiny: nn.Module, labelled: Data, tmp_path: Path
) -> None:
    settings = SETTINGS | chosen
    whole, expected = finetune(tiny, labelled, **settings)
    assert expected.steps == 15
    # before the first checkpoint, at the end of an epoch, within one, at the very end
    for stop in (1, 5, 7, 15) if chosen == {"precision": "fp32"} else (7,):
        folder = tmp_path / str(stop)
        run = settings | {"checkpoints": folder, "resume": True, "save_every": 3}
        with pytest.raises(Stopped):
            finetune(tiny, labelled, progress=_stopping(stop), **run)
        torch.manual_seed(stop)
        resumed, result = finetune(tiny, labelled, **run)
        assert _same(resumed, whole) and _record(result) == _record(expected), stop
    assert not _same(finetune(tiny, labelled, **settings | {"seed": 1})[0], whole)


def test_the_comparison_would_show_a_lost_state(tiny: nn.Module, labelled: Data, tmp_path: Path) -> None:
    whole, _ = finetune(tiny, labelled, **SETTINGS)
    run = SETTINGS | {"checkpoints": tmp_path / "run", "resume": True, "save_every": 3}
    with pytest.raises(Stopped):
        finetune(tiny, labelled, progress=_stopping(7), **run)
    (path,) = tmp_path.glob("run/step-*/optimizer.bin")
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"].mul_(1.01)
    torch.save(state, path)
    assert not _same(finetune(tiny, labelled, **run)[0], whole)


def test_a_stream_is_resumed_too(tiny: nn.Module, labelled: Data, tmp_path: Path) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Batch]:
            assert labelled.whole is not None and labelled.whole.labels is not None
            for rows in torch.randperm(100).split(20):
                yield Batch({"input": labelled.whole.inputs["input"][rows]}, labelled.whole.labels[rows])

    settings: dict[str, Any] = {"labels": True, "epochs": 2, "lr": 0.01}
    whole, _ = finetune(tiny, Data(stream=Loader()), **settings)
    run = settings | {"checkpoints": tmp_path / "run", "resume": True, "save_every": 2}
    with pytest.raises(Stopped):
        finetune(tiny, Data(stream=Loader()), progress=_stopping(3), **run)
    assert _same(finetune(tiny, Data(stream=Loader()), **run)[0], whole)


def test_another_run_is_not_resumed_and_an_unfinished_one_not_overwritten(
    tiny: nn.Module, labelled: Data, tmp_path: Path
) -> None:
    run: dict[str, Any] = {"labels": True, "epochs": 2, "checkpoints": tmp_path / "run", "save_every": 1}
    with pytest.raises(Stopped):
        finetune(tiny, labelled, progress=_stopping(2), **run)
    with pytest.raises(NormRewriteError, match=r"another run: lr 0.001 then, 0.1 now"):
        finetune(tiny, labelled, **run, resume=True, lr=0.1)
    with pytest.raises(NormRewriteError, match=r"unfinished run .*--resume"):
        finetune(tiny, labelled, **run)
    for path in tmp_path.glob("run/step-*/*"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(NormRewriteError, match="can't be resumed from"):
        finetune(tiny, labelled, **run, resume=True)


def test_a_checkpoint_that_was_being_written_is_not_taken_for_one(
    tiny: nn.Module, labelled: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {
        "labels": True,
        "epochs": 4,
        "checkpoints": tmp_path / "run",
        "save_every": 1,
        "resume": True,
    }
    whole, _ = finetune(tiny, labelled, labels=True, epochs=4)
    save = torch.save

    def dies(content: object, path: Any, *rest: object, **more: object) -> None:
        if "step-00000003" in str(path) and "optimizer" in str(path):
            raise Stopped
        save(content, path, *rest, **more)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Stopped):
        finetune(tiny, labelled, **run)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("run/step-*")} == {"step-00000002"}
    shutil.copytree(tmp_path / "run/step-00000002", tmp_path / "run/step-00000003.tmp")  # as kill -9 leaves one
    assert _same(finetune(tiny, labelled, **run)[0], whole)


# --- what can't be asked for ------------------------------------------------------------------------------------------


def test_requests_that_do_not_fit_together(tiny: nn.Module, labelled: Data) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    bad: list[tuple[nn.Module, dict[str, Any], str]] = [
        (plain, {}, "no original to learn from. Give --teacher, or --labels"),
        (tiny, {"labels": True, "teacher": tiny}, "say how much it counts"),
        (tiny, {"patience": 2}, "--patience watches validation"),
        (tiny, {"val": labelled, "val_split": 0.1}, "give one of the two"),
        (tiny, {"warmup": 1000}, "--warmup 1000: the whole training is 6 steps"),
    ]
    for model, options, message in bad:
        with pytest.raises(NormRewriteError, match=message):
            finetune(model, labelled, **options)


def test_data_that_end_before_they_should_are_an_error(tiny: nn.Module, labelled: Data) -> None:
    assert labelled.whole is not None
    once = iter([labelled.whole, labelled.whole])
    with pytest.raises(NormRewriteError, match="the data"):
        finetune(tiny, Data(stream=once), labels=True)


def test_the_loop_is_told_of_every_step(tiny: nn.Module, labelled: Data) -> None:
    seen: list[Step] = []
    finetune(tiny, labelled, labels=True, steps=3, progress=seen.append)
    assert [(step.step, step.of) for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(step.inputs_per_second > 0 and step.loss is not None for step in seen)
