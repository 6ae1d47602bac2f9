"""curvature: Hessians known in closed form, torch.func's of a small network, and what the measuring leaves alone."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, hessian

import normrewrite as nr
from normrewrite.data import Batch, Data
from normrewrite.diagnostics.curvature import Curvature, curvature, drawn


class Quadratic(nn.Module):
    """w' A w / 2 for A of the given eigenvalues, with w in two parts; forward's argument only scales it."""

    def __init__(self, eigenvalues: Sequence[float]) -> None:
        super().__init__()
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
        self.matrix = basis * values @ basis.T
        self.first = nn.Parameter(torch.randn(1, dtype=torch.float64))
        self.rest = nn.Parameter(torch.randn(1, len(values) - 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.first, self.rest.flatten()])
        return x.mean() * (w @ self.matrix @ w) / 2


ONE = [Batch({"x": torch.ones(1, dtype=torch.float64)})]


def _of(model: Quadratic, batches: Sequence[Batch] = ONE, iterations: int = 20) -> Curvature:
    return curvature(model, lambda batch: model(**batch.inputs), batches, iterations=iterations, settled=1e-12)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        (7.0, 3.0, 2.0, 1.0, 0.5),
        (7.0, 6.9, 6.8, 0.0),
        (2.0, 2.0, 2.0),  # any vector holds all that there is
        (1.0, -50.0, -3.0),  # the largest in size is another
        (-1.0, -2.0),
        (1e-7, 1e-9, 0.0),
        (3.0,),
        (0.0, 0.0),
    ],
)
def test_of_a_quadratic_it_is_its_largest_eigenvalue(eigenvalues: tuple[float, ...]) -> None:
    model = Quadratic(eigenvalues)
    found = _of(model)
    assert found.value == pytest.approx(max(eigenvalues), rel=1e-6, abs=1e-12)
    assert found.iterations <= len(eigenvalues) + 1 and found.change <= 1e-12
    with torch.no_grad():
        model.matrix *= 1.01
    assert max(eigenvalues) == 0 or _of(model).value != pytest.approx(max(eigenvalues), rel=1e-6, abs=1e-12)


def test_it_is_of_the_mean_over_batches_and_of_what_is_trained() -> None:
    model = Quadratic((7.0, 3.0, 1.0))
    batches = [Batch({"x": torch.full((1,), size, dtype=torch.float64)}) for size in (1.0, 3.0)]
    assert _of(model, batches).value == pytest.approx(14.0, rel=1e-6)
    model.first.requires_grad_(False)
    assert _of(model).value == pytest.approx(float(torch.linalg.eigvalsh(model.matrix[1:, 1:])[-1]), rel=1e-6)


def test_the_last_change_tells_that_it_has_not_settled() -> None:
    model = Quadratic([float(i) for i in range(1, 41)])
    short, long = _of(model, iterations=3), _of(model, iterations=40)
    assert short.value < 0.95 * long.value and short.change > 0.05 and long.value == pytest.approx(40, rel=1e-6)


@pytest.mark.parametrize("to", ["l2", "l1", "topk:4", "range", "layer", "wn"])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_that_of_gradients_differences_and_of_torchs_hessian(to: str, training: bool) -> None:
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    model: nn.Module = nn.Sequential(*layers).double().eval()
    model = (model if to == "l2" else nr.convert(model, to=to)).train(training)
    x, labels = torch.randn(12, 3, dtype=torch.float64), torch.randint(2, (12,))
    names = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [value.numel() for value in names.values()]

    def loss(w: Tensor) -> Tensor:
        parts = zip(names, w.split(sizes), strict=True)
        parameters = {name: part.view_as(names[name]) for name, part in parts}
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        return nn.functional.cross_entropy(functional_call(model, parameters | buffers, (x,)), labels)

    w, slope, step = torch.cat([value.flatten() for value in names.values()]), grad(loss), 1e-5
    units = step * torch.eye(len(w), dtype=torch.float64)
    expected = [torch.stack([slope(w + unit) - slope(w - unit) for unit in units]) / (2 * step)]
    if to != "l2":  # torch.func's own, of torch's batch norms in training, isn't even symmetric
        expected.append(hessian(loss)(w))
    found = curvature(
        model,
        lambda batch: nn.functional.cross_entropy(model(batch.inputs["input"]), batch.labels),
        [Batch({"input": x}, labels)],
        iterations=len(w),
        settled=1e-9,
    )
    for matrix in expected:
        assert found.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)


def test_gradients_and_running_statistics_stay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).train()
    for to in ("l2", "renorm", "l1"):
        twin = model if to == "l2" else nr.convert(model, to=to)
        before, gradients = copy.deepcopy(twin.state_dict()), [p.grad for p in twin.parameters()]
        batches = [Batch({"input": torch.randn(8, 2, 6, 6)}) for _ in range(2)]
        curvature(twin, lambda batch, twin=twin: twin(**batch.inputs).square().mean(), batches)
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
        assert all(a is b for a, b in zip([p.grad for p in twin.parameters()], gradients, strict=True))


class _Once(Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g.square()


def test_what_has_no_second_derivative_is_told() -> None:
    model = nn.Linear(2, 2)
    batch = Batch({"input": torch.randn(3, 2)})
    with pytest.raises(nr.NormRewriteError, match=r"Linear: its second derivatives can't be had: RuntimeError: .*once"):
        curvature(model, lambda batch: _Once.apply(model(**batch.inputs)).square().mean(), [batch])  # type: ignore[no-untyped-call]
    with pytest.raises(nr.NormRewriteError, match="it takes too long"):
        curvature(model, lambda batch: model(**batch.inputs).square().mean(), [batch], seconds=0.0)
    half = nr.convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), to="l1").half().train()
    with (
        nr.half_arithmetic("half:64"),
        pytest.raises(nr.NormRewriteError, match="half arithmetic has first derivatives"),
    ):
        curvature(half, lambda batch: half(batch.inputs["input"].half()).float().square().mean(), [batch])


@pytest.mark.parametrize(("loss", "said"), [("nan", "is nan, with a gradient"), ("free", "is 1, without a gradient")])
def test_losses_that_bend_nowhere(loss: str, said: str) -> None:
    model = nn.Linear(2, 2)
    batch = Batch({"input": torch.randn(3, 2)})
    with pytest.raises(nr.NormRewriteError, match=said):
        curvature(model, lambda batch: model.weight.mean() * torch.nan if loss == "nan" else torch.ones(()), [batch])


def test_attention_is_measured_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train()
    batch = Batch({"src": torch.randn(4, 5, 8)})
    assert curvature(model, lambda batch: model(**batch.inputs).square().mean(), [batch]).value > 0


def test_batches_are_drawn_of_all_the_data_and_a_streams_come_first() -> None:
    whole = Data(Batch({"x": torch.arange(100.0)}, torch.arange(100)))
    batches = drawn(whole, 16, 40)
    assert [len(batch) for batch in batches] == [16, 16]
    values = torch.cat([batch.inputs["x"] for batch in batches])
    assert len(values.unique()) == 32 and values.max() > 60 and values.min() < 40
    labels = [batch.labels for batch in batches]
    assert torch.equal(torch.cat([value for value in labels if value is not None]), values.long())
    assert torch.equal(torch.cat([batch.inputs["x"] for batch in drawn(whole, 16, 40)]), values)
    assert [len(batch) for batch in drawn(whole, 250, 64)] == [100]
    stream = Data(stream=[Batch({"x": torch.full((n,), float(n))}) for n in (10, 20, 30, 40)])
    assert [len(batch) for batch in drawn(stream, 16, 40)] == [10, 16, 16]
    with pytest.raises(nr.NormRewriteError, match="batch size 0"):
        drawn(whole, 0)
