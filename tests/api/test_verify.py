"""verify: no wrong network is called right, and nothing is said of what was not compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.data import Batch, Data
from tests.conftest import RealNetwork

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@dataclass
class Answer:
    logits: Tensor
    note: object = None


def soft(seed: int, dtype: torch.dtype = torch.float32, head: nn.Module | None = None) -> nn.Module:
    """1,000 probabilities, all near 0.001."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(6, 64), nn.ReLU())
    return nn.Sequential(body, head or nn.Linear(64, 1000), nn.Softmax(1)).to(dtype)


Function = Callable[[Tensor], Any]
SAME: list[tuple[Function, Function]] = [
    (lambda x: {"a": x, "b": -x}, lambda x: {"b": -x, "a": x}),
    (lambda x: x * 1e-6, lambda x: x * 1e-6),
    (lambda x: Answer(x), lambda x: {"logits": x, "note": None}),
    (lambda x: x.to_sparse(), lambda x: x),
    (lambda x: (x, 3), lambda x: [x, 3]),
    (lambda x: {"a_0": 2 * x, "a": [x]}, lambda x: {"a": [x], "a_0": 2 * x}),
    (lambda x: (x > 0).float().to_sparse_csr(), lambda x: (x > 0).float()),
    (lambda x: x.double() * 1e200, lambda x: x.double() * 1e200),
    (lambda x: torch.complex(x[:, 0], x[:, 1]), lambda x: torch.complex(x[:, 0], x[:, 1])),
]
DIFFERENT: list[tuple[Function, Function]] = [
    (lambda x: {"a": x, "b": -x}, lambda x: {"b": x, "a": -x}),
    (lambda x: {"a": {"w": x}, "b": {"w": x}}, lambda x: {"a": {"w": 2 * x}, "b": {"w": x}}),
    (lambda x: x * 1e-6, lambda x: x * 2e-6),
    (lambda x: 1000 + 1e-2 * x, lambda x: 1000 - 1e-2 * x),
    (lambda x: torch.complex(x, x), lambda x: torch.complex(x, -x)),
    (lambda x: (x * 0 + 1_000_000).long(), lambda x: (x * 0 + 1_000_001).long()),
    (lambda x: x > 0, lambda x: x > 0.5),
    (lambda x: (x, 3), lambda x: (x, 4)),
    (lambda x: Answer(x), lambda x: Answer(2 * x)),
    (lambda x: x.to_sparse(), lambda x: (2 * x).to_sparse()),
    (lambda x: (x > 0).float().to_sparse(), lambda x: (x > 0.1).float().to_sparse()),
    (lambda x: {"a.b_0": x, "a.b": [x], "a": {"b": [x]}}, lambda x: {"a.b_0": x, "a.b": [2 * x], "a": {"b": [x]}}),
    (lambda x: x.double() * 1e200, lambda x: x.double() * 2e200),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("a", "b", "same"), [*((*p, True) for p in SAME), *((*p, False) for p in DIFFERENT)])
def test_what_is_the_same(a: Function, b: Function, same: bool) -> None:
    x = X[X.abs().sum(1).argsort()]
    for one, other in ((a, b), (b, a)):
        found = nr.verify(Returns(one), Returns(other), x)
        assert found.ok == same and found.word == ("same function" if same else "DIFFERENT"), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unrelated_networks_are_different_in_every_precision(dtype: torch.dtype) -> None:
    head = nn.Linear(64, 1000)
    for one, other in ((soft(1, dtype), soft(2, dtype)), (soft(1, dtype, head), soft(2, dtype, head))):
        assert nr.verify(one, one, X.to(dtype)).ok
        found = nr.verify(one, other, X.to(dtype))
        assert not found.ok and "SNR of variation" in found.verdict


def test_halves_are_within_a_tolerance_and_never_the_same_function() -> None:
    half = soft(1).half()
    found = nr.verify(half, half, X.half())
    assert found.ok and found.verdict.startswith("within fp16's tolerance: ") and found.precision == "fp16"
    assert not nr.verify(half, half, X.half(), min_snr=float(10**9)).ok or found.outputs[0].noise == 0
    assert nr.verify(half, soft(2).half(), X.half(), tolerance=1, min_snr=-100, min_agreement=0).ok  # as asked
    assert (
        "within the tolerance given"
        in nr.verify(Returns(lambda x: x), Returns(lambda x: 1.01 * x), X, tolerance=0.1).verdict
    )


def test_labels_and_classes() -> None:
    model, labels = nn.Linear(6, 4), torch.arange(8) % 4
    found = nr.verify(model, model, X, labels)
    assert found.labelled and found.outputs[0].judged and found.head[-1] == "top-1 of B"
    both = Returns(lambda x: (x[:, :2], x))  # the first has no class 2
    rows = nr.verify(both, both, X, torch.arange(8) % 6).as_dict()["outputs"]
    assert ["top1" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.arange(8), "labels from 0 to 7, and the outputs have 4 classes"),
        (torch.arange(8) - 1, "labels from -1 to 6"),
        (torch.arange(7), "7 labels for 8 inputs"),
        (torch.rand(8), "labels must be whole numbers"),
        (torch.zeros(8, 4), "labels must be whole numbers"),
        ([0] * 8, "labels must be whole numbers"),
        (torch.zeros(8, dtype=torch.bool), "labels must be whole numbers"),
    ],
)
def test_wrong_labels_are_told(labels: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    for data in (Data(Batch({"input": X}, labels)), Data(stream=[Batch({"input": X}, labels)])):
        with pytest.raises(nr.NormRewriteError, match=said):
            nr.verify(model, model, data)
        with pytest.raises(nr.NormRewriteError, match=said.split(", and")[0]):
            nr.finetune(model, data, labels=True, epochs=1)
    with pytest.raises(nr.NormRewriteError, match=said):
        nr.verify(model, model, X, labels)
    with pytest.raises(nr.NormRewriteError, match="labels beside batches"):
        nr.verify(model, model, [{"input": X}], labels)
    if "classes" not in said and "-1" not in said:  # calibrate needs no labels, and knows no classes
        with pytest.raises(nr.NormRewriteError, match=said):
            nr.calibrate(nr.convert(model), Data(Batch({"input": X}, labels)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_nothing_to_compare_is_told_output_by_output() -> None:
    nan = Returns(lambda x: (x, x * torch.nan))
    with pytest.raises(nr.NormRewriteError, match="output_1: both networks gave NaN or infinity alone"):
        nr.verify(nan, nan, X)
    some = Returns(lambda x: {"y": torch.where(x > 0, x, torch.nan), "cache": object(), "none": x[:0]})
    found = nr.verify(some, some, X)
    assert found.ok and len(found.left) == 3 and found.as_dict()["not_compared"] == found.left
    assert "numbers, NaN in both" in str(found) and "cache (object)" in str(found) and "none (empty)" in str(found)
    masks = Returns(lambda x: (x, torch.masked.masked_tensor(x, x > 0)))
    assert (found := nr.verify(masks, masks, X)).left == ["output_1 (MaskedTensor)"]
    assert found.verdict.startswith("same function in what was compared: ") and found.left[0] in found.verdict
    with pytest.raises(nr.NormRewriteError, match=r"no tensor .* It gives output \(str\)"):
        nr.verify(Returns(lambda x: "yes"), Returns(lambda x: "yes"), X)


@pytest.mark.parametrize("asked", [{"tolerance": -1.0}, {"tolerance": float("nan")}, {"min_agreement": 2.0}])
def test_limits_that_cannot_be(asked: dict[str, float]) -> None:
    with pytest.raises(nr.NormRewriteError, match="a share from 0 to 1"):
        nr.verify(nn.ReLU(), nn.ReLU(), X, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (lambda: X.to_sparse(), "a sparse tensor"),
        (lambda: [(X.to_sparse_csr(),)], "a sparse tensor"),
        (lambda: {"x": X.to("meta")}, "a meta tensor"),
        (lambda: torch.tensor(3.0), "without axes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_inputs_that_no_network_is_run_on(inputs: Callable[[], Any], said: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=said):
        nr.verify(Returns(lambda x: x), Returns(lambda x: x), inputs())


# --- numbers of very different size in one output ---------------------------------------------------------------------

ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
ROWS[0] *= 1e5
ONE, OTHER, BOX = (torch.randn(8, n, generator=torch.Generator().manual_seed(n)) for n in (10, 11, 4))
OTHER, STEPS, MASK = OTHER[:, :10], 50.0 * torch.arange(10), torch.arange(10) > 6
HALVES = (torch.float16, torch.bfloat16)
Mixed = Callable[[Tensor, Tensor], Tensor]
MIXED: list[tuple[Mixed, tuple[torch.dtype, ...]]] = [
    (lambda x, w: (x @ w).masked_fill(MASK, -1e9), (torch.float32, *HALVES)),
    (lambda x, w: (x @ w).masked_fill(MASK, torch.finfo().min), (torch.float32, *HALVES)),
    (
        lambda x, w: (x @ w).masked_fill(torch.arange(len(x))[:, None] % 3 == torch.arange(10) % 3, -1e9),
        (torch.float32,),
    ),
    (lambda x, w: torch.cat([320 + 100 * x @ BOX, torch.sigmoid(x @ w)], 1)[..., None], (torch.float32, torch.float16)),
    (lambda x, w: STEPS + x @ w, HALVES),
]


@pytest.mark.parametrize(("function", "dtypes"), MIXED)
def test_large_numbers_hide_no_small_ones(function: Mixed, dtypes: tuple[torch.dtype, ...]) -> None:
    x = ROWS[1:]

    def network(w: Tensor, dtype: torch.dtype) -> nn.Module:
        return Returns(lambda x: function(x, w).to(dtype)).to(dtype)

    for dtype in dtypes:
        assert not nr.verify(network(ONE, dtype), network(OTHER, dtype), x).ok, dtype
        assert nr.verify(network(ONE, dtype), network(ONE * (1 + 1e-6), dtype), x).ok, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(10,), (10, 1), (5, 2)])
def test_a_large_row_hides_no_others(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def wrong(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1, keepdim=True) > 1e3, x @ ONE, x @ OTHER)

    def network(function: Function, dtype: torch.dtype) -> nn.Module:
        return Returns(lambda x: function(x).unflatten(1, shape).to(dtype)).to(dtype)

    right = network(lambda x: x @ ONE, dtype)
    found = nr.verify(right, network(wrong, dtype), ROWS)
    assert not found.ok and ("rows" in found.verdict or "same class" in found.verdict)
    assert nr.verify(network(lambda x: x @ ONE, torch.float32), right, ROWS).ok


def test_classes_that_a_precision_cannot_tell_apart_agree() -> None:
    logits = 6 * torch.randn(8, 10, generator=torch.Generator().manual_seed(2))
    whole = Returns(lambda x: torch.sigmoid(x @ logits + 8))
    half = Returns(lambda x: torch.sigmoid(x @ logits + 8).half().float()).half()
    found = nr.verify(whole, half, ROWS[1:])
    assert found.ok and found.agreement == 1 > found.outputs[0].agreeing / 63


class Graph(nn.Module):
    def forward(self, nodes: Tensor, graphs: Tensor) -> Tensor:
        return nodes.mean(0, keepdim=True) + graphs


def test_inputs_of_several_lengths() -> None:
    batches = [{"nodes": torch.randn(n, 6), "graphs": torch.randn(2, 6)} for n in (14, 3)]

    def stream() -> Iterator[dict[str, Tensor]]:
        yield from batches

    for given, count in ((batches[0], 1), (batches, 2), (stream(), 2)):
        assert nr.verify(Graph(), Graph(), given, batch_size=1).inputs == count


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_a_file_says_of_itself_widens_nothing(tmp_path: Path) -> None:
    model, path = nn.Linear(6, 4), tmp_path / "model.onnx"
    nr.export(model, X, path)
    proto = onnx.load(path)
    for key, value in {"normrewrite.precision": "int8", "normrewrite.fitted": "9"}.items():
        found = next(entry for entry in proto.metadata_props if entry.key == key)
        found.value = value
    onnx.save(proto, path)
    found = nr.verify(model, path, X)
    assert found.ok and (found.precision, found.tolerance) == ("fp32", 1e-4) and found.word == "same function"


@pytest.mark.slow
def test_limits_hold_for_trained_networks_and_not_between_them(resnet20: RealNetwork, tmp_path: Path) -> None:
    from tests.conftest import NETWORKS

    model, x = resnet20.make(), resnet20.inputs(100)[0]
    for kind in ("fp16", "int8"):
        path = tmp_path / f"{kind}.onnx"
        nr.export(model, x[:2], path, precision=kind, calibrate=x if kind == "int8" else None)  # type: ignore[arg-type]
        assert nr.verify(model, path, x).word == f"within {kind}'s tolerance"
        found = nr.verify(NETWORKS[1].make(), path, x)  # trained on the same images
        assert not found.ok and found.variation_db < found.limit.min_snr - 2


def test_nothing_compared_is_no_agreement() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> object:
            return object()

    with pytest.raises(nr.NormRewriteError, match="no tensor"):
        nr.verify(Opaque(), Opaque(), torch.randn(2, 3))
