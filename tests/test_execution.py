"""What runs a network: outputs by name, copies of the inputs, and files that onnxruntime would die of."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.bench import bench
from normrewrite.data import Batch
from normrewrite.execution import dtype_of, flat, leaves, runner
from normrewrite.training.losses import Objective
from normrewrite.training.recipe import Recipe

X = torch.randn(3, 2)


@dataclass
class Answer:
    logits: Tensor
    states: tuple[Tensor, ...]
    cache: object = None


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (X, ["output"]),
        ([X, X], ["output_0", "output_1"]),
        ((X, [X, (X,)]), ["output_0", "output_1_0", "output_1_1_0"]),
        ({"b": X, "a": X}, ["b", "a"]),
        (OrderedDict(a={"w": X}, b={"w": X}), ["a.w", "b.w"]),  # none hides the other
        ({"a": [X], "a_0": X}, ["['a'][0]", "['a_0']"]),
        ({"a.b_0": X, "a.b": [X], "a": {"b": [X]}, "c": X}, ["['a.b_0']", "['a.b'][0]", "['a']['b'][0]", "c"]),
        ([{"a": X}], ["output_0.a"]),
        (Answer(X, (X, X)), ["logits", "states_0", "states_1", "cache"]),
        ({1: X, "text": "yes", "none": None}, ["1", "text", "none"]),
        (torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged), ["output_0", "output_1"]),
        ([], []),
    ],
)
def test_names_of_outputs(outputs: object, names: list[str]) -> None:
    found = leaves(outputs)
    assert list(found) == names
    assert list(flat(outputs)) == [name for name, value in found.items() if isinstance(value, Tensor)]


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(2, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(4)
        return self.norm(self.lin(x))  # type: ignore[no-any-return]


class CountsOn(InPlace):
    """Whole numbers, too."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.add_(ids.add_(1)[:, None]))


def test_a_forward_gets_copies() -> None:
    model, inputs = CountsOn().eval(), {"x": torch.rand(8, 2), "ids": torch.arange(8)}
    kept = {name: values.clone() for name, values in inputs.items()}
    run = runner(model)
    assert torch.equal(run(Batch(inputs))["output"], run(Batch(inputs))["output"])
    assert nr.verify(model, model, inputs).max_abs == 0
    assert all(torch.equal(values, kept[name]) for name, values in inputs.items())


def test_teacher_and_student_learn_from_the_same_input() -> None:
    model, batch = InPlace().eval(), Batch({"x": torch.rand(8, 2)})
    kept = batch.inputs["x"].clone()
    loss = Objective(Recipe(loss="mse"), model, model)(model, batch).loss
    assert float(loss.detach()) == 0 and torch.equal(batch.inputs["x"], kept)
    batches = [{"x": batch.inputs["x"]}]
    nr.finetune(nr.convert(model), batches, epochs=1)
    nr.calibrate(nr.convert(model), batches)
    nr.calibrate(nr.convert(model, to="group:2"), batches)
    bounded = nr.plan(InPlace(), to="wn", example_inputs=(batch.inputs["x"],)).apply()[0]
    nr.initialise_(bounded.train(), batch.inputs["x"])
    assert torch.equal(batch.inputs["x"], kept)


def test_an_export_gets_copies(tmp_path: Path) -> None:
    model, x = InPlace().eval(), torch.rand(8, 2)
    kept = x.clone()
    nr.export(model, x, tmp_path / "model.onnx")
    assert torch.equal(x, kept) and nr.verify(model, tmp_path / "model.onnx", x).ok and torch.equal(x, kept)


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.norm = kind(4, 6, batch_first=True), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.rnn(x)[0].transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])  # of RNN onnxruntime 1.32 dies at its default level
def test_recurrent_layers_in_half(tmp_path: Path, kind: Any) -> None:
    model, x, path = Recurrent(kind).eval(), torch.randn(4, 5, 4), tmp_path / "model.onnx"
    nr.export(model, x, path, precision="fp16")
    compared = nr.verify(model, path, x)
    assert compared.ok and compared.word == "within fp16's tolerance" and compared.max_abs < 5e-3


def test_outputs_without_end_are_told() -> None:
    endless: list[object] = [X]
    endless.append(endless)
    deep: object = X
    for _ in range(3000):
        deep = [deep]
    for outputs in (endless, deep):
        with pytest.raises(nr.NormRewriteError, match="lists in lists"):
            leaves(outputs)


class Rude(Tensor):
    @classmethod
    def __torch_function__(cls, *args: object, **kwargs: object) -> Any:
        raise ValueError("no")


def test_a_subclass_of_tensor_is_a_tensor() -> None:
    (found,) = leaves(X.clone().as_subclass(Rude)).values()
    assert type(found) is Tensor and torch.equal(found, X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_dtype_run_on_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval().to(dtype)
    x, twin = torch.randn(16, 2), nr.convert(model)
    assert dtype_of(model) == dtype and nr.verify(model, twin, x).ok
    nr.calibrate(nr.convert(model), x)
    nr.calibrate(nr.convert(model, to="group:2"), x)
    nr.finetune(nr.convert(model), [{"input": x}], epochs=1)
    assert bench(model, twin, x, rounds=1).inputs == len(nr.advise(model, x).sites) * 16
    assert nr.plan(model, "wn", example_inputs=(x,)).apply()[1].rewritten
    nr.export(model, x, tmp_path / "plain.onnx")
    nr.export(model, x, tmp_path / "int8.onnx", precision="int8", calibrate=x)
    found = nr.verify(model, tmp_path / "plain.onnx", x)
    assert found.ok and found.precision == {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")


def test_a_module_with_parameters_of_its_own_alone_is_given_what_comes() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2).half())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.float()

    assert dtype_of(Own()) is None and runner(Own())(Batch({"x": X}))["output"].dtype == torch.float32


def test_onnxruntime_without_bf16_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nr.export(nn.Linear(2, 3), X, path, precision="bf16", opset=22)
    with pytest.raises(nr.NormRewriteError, match="no bf16: run such a file on a GPU"):
        nr.verify(path, path, X)


class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise SystemExit(3)


def test_a_forward_that_leaves_is_told() -> None:
    with pytest.raises(nr.NormRewriteError, match=r"can't run on x \(3, 2\): SystemExit"):
        nr.verify(Leaves(), Leaves(), X)
