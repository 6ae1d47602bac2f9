"""Weight norms: every layer kind and form against float64 row by row; casts, files, tracing, training, the way back."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from normrewrite import sites
from normrewrite.errors import NormRewriteError
from normrewrite.nn import BoundedWeightNorm, WeightNorm, normalise_weight
from normrewrite.nn.weights import NORMS, gain_of, original, remember, unchanged, weight_norm_of
from tests.backends.tolerances import check_close

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), bias=False), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (2, 4, 3, 3, 3)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise transposed": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), (2, 4, 7)),
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
}
FORMS: dict[str, dict[str, Any]] = {
    "wn": {"bounded": False},
    "bwn": {"bounded": True},
    "strict": {"bounded": True, "strict": True},
}
# Of the largest weight. float64: some ten roundings. fp32 the same, with sums over up to 36 weights; half types round once.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

every_layer = pytest.mark.parametrize("kind", LAYERS)
every_form = pytest.mark.parametrize("form", FORMS)
every_norm = pytest.mark.parametrize("p", NORMS)


def parametrised(kind: str, form: str, p: float = 2, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return normalise_weight(LAYERS[kind][0]().to(dtype), p=p, **FORMS[form], **options)


def learn_anything(layer: nn.Module) -> nn.Module:
    """Parameters as no right_inverse would set them."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) + 0.5)
    return layer


def row(layer: nn.Module, channel: int) -> tuple[Any, ...]:
    """The indices of the weights that make one output channel."""
    if not isinstance(layer, _ConvTransposeNd):
        return (channel,)
    per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group = channel // per_group
    return (slice(group * inputs, (group + 1) * inputs), channel % per_group)


def channels(layer: Any) -> int:
    found: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return found


def norms_of(layer: nn.Module, weight: Any, p: float = 2) -> Any:
    weight = weight.detach().double().numpy()
    return np.array([np.linalg.norm(weight[row(layer, i)].ravel(), p) for i in range(channels(layer))])


def expected(layer: Any, p: float) -> Any:
    """The formulas of formulas.md, in float64, row by row."""
    v, *rest = (parameter.detach().double().numpy() for parameter in layer.parametrizations.weight.parameters())
    norm, n, weight = weight_norm_of(layer), channels(layer), np.empty(v.shape)
    for i in range(n):
        length = 1.0 if not rest else rest[0][i]
        if isinstance(norm, BoundedWeightNorm):
            share = length / np.linalg.norm(rest[0]) if rest else n**-0.5
            length = float(norm.rho) * np.sqrt(n) * share
        weight[row(layer, i)] = length * v[row(layer, i)] / np.linalg.norm(v[row(layer, i)].ravel(), p)
    return weight


# --- values ----------------------------------------------------------------------------------------------------------


@every_layer
@every_form
@every_norm
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value(kind: str, form: str, p: float, dtype: torch.dtype) -> None:
    layer: Any = learn_anything(parametrised(kind, form, p, dtype))
    assert layer.weight.dtype == dtype
    wanted = expected(layer, p)
    check_close("weight", layer.weight, wanted, TOLERANCE[dtype])
    with pytest.raises(AssertionError, match="weight: off by"):
        check_close("weight", layer.weight.detach().double() * 1.01, wanted, TOLERANCE[dtype])


@every_layer
@every_form
@every_norm
def test_the_weight_stays_as_it_was(kind: str, form: str, p: float) -> None:
    """Exact but for the strict form, which keeps directions and the rms of the norms."""
    old: Any = LAYERS[kind][0]()
    before = copy.deepcopy(old)
    new: Any = normalise_weight(old.eval(), p=p, **FORMS[form])
    norms = norms_of(old, old.weight, p)
    if form == "strict":
        rho = np.sqrt((norms**2).mean())
        check_close("norms", norms_of(old, new.weight, p), np.full_like(norms, rho), 1e-6)
        check_close("directions", norms_of(old, old.weight - new.weight, p), np.abs(norms - rho), 1e-6, unit=rho)
    else:
        check_close("weight", new.weight, old.weight, 5e-7)
        x = torch.randn(LAYERS[kind][1])
        torch.testing.assert_close(new(x), old(x))
    assert all(torch.equal(*pair) for pair in zip(old.state_dict().values(), before.state_dict().values(), strict=True))
    assert type(old) is type(before) and isinstance(new, type(old))
    assert new.bias is old.bias and not new.training and not parametrize.is_parametrized(old)


@every_layer
@every_form
def test_what_is_stored(kind: str, form: str) -> None:
    """v of norm 1, bounded g of rms 1, g by channel; fp16 holds those whatever the weights are."""
    layer = parametrised(kind, form)
    check_close("v", norms_of(layer, next(layer.parametrizations.weight.parameters())), np.ones(channels(layer)), 1e-6)  # type: ignore[union-attr]
    gain = gain_of(layer)
    assert (gain is None) == (form == "strict")
    if gain is not None:
        assert gain.shape == (channels(layer),)
        wanted = norms_of(layer, layer.weight) if form == "wn" else None
        check_close("g", gain if form == "wn" else gain.square().mean(), 1.0 if wanted is None else wanted, 1e-6)


@every_layer
def test_the_bounded_norm_is_fixed(kind: str) -> None:
    def drift(form: str) -> float:
        layer: Any = parametrised(kind, form)
        before = layer.weight.norm()
        learn_anything(layer)
        return abs((layer.weight.norm() / before).item() - 1)

    assert drift("bwn") <= 1e-6
    assert drift("strict") <= 1e-6
    assert drift("wn") > 1e-2


@every_form
@every_norm
@pytest.mark.parametrize("kind", ["grouped", "grouped transposed", "linear"])
def test_gradients(kind: str, form: str, p: float) -> None:
    layer: Any = learn_anything(parametrised(kind, form, p, torch.float64))
    norm = weight_norm_of(layer)
    assert norm is not None
    assert torch.autograd.gradcheck(norm, tuple(layer.parametrizations.weight.parameters()))


@every_layer
@every_form
@every_norm
def test_a_zero_row_computes_zero_and_learns(kind: str, form: str, p: float) -> None:
    old: Any = LAYERS[kind][0]()
    with torch.no_grad():
        old.weight[row(old, 1)] = 0
    new: Any = normalise_weight(old, p=p, **FORMS[form])
    assert form == "strict" or not new.weight[row(old, 1)].any()
    (new.weight * torch.randn(new.weight.shape)).sum().backward()
    grads = [parameter.grad for parameter in new.parametrizations.weight.parameters()]
    assert all(torch.isfinite(grad).all() for grad in grads)
    gain = gain_of(new)
    assert gain is None or (gain.grad is not None and gain.grad[1] != 0)


@every_form
def test_a_layer_of_zeros(form: str) -> None:
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    new: Any = normalise_weight(layer, **FORMS[form])
    new.weight.sum().backward()
    assert not new.weight.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in new.parametrizations.weight.parameters())


@pytest.mark.parametrize("form", ["wn", "bwn"])
@pytest.mark.parametrize("size", [1.9e-6, 1e-20, 1e-40])
def test_tiny_rows(form: str, size: float) -> None:
    """A trained ResNet-20 has folded rows of norm 1.9e-6; squares of 1e-40 vanish in fp32, and the row must not."""
    layer = nn.Conv2d(16, 8, 3, bias=False)
    with torch.no_grad():
        layer.weight[2] *= size / layer.weight[2].norm()
    new: Any = normalise_weight(layer, **FORMS[form])
    wanted = layer.weight[2].detach()
    check_close("row", new.weight[2], wanted, 1e-6 if size > 1e-38 else 1e-2)  # fp32 has few bits left below 1e-38


@pytest.mark.parametrize("form", ["wn", "bwn"])
def test_tiny_rows_in_fp16(form: str) -> None:
    """fp16 counts in 6e-8 down there: a weight of 3e-7 comes back to one such step, and is not lost."""
    layer = nn.Conv2d(4, 8, 3, bias=False)
    with torch.no_grad():
        layer.weight[2] *= 1.9e-6 / layer.weight[2].norm()
    half = layer.half()
    for new in (normalise_weight(half, **FORMS[form]), normalise_weight(layer.float(), **FORMS[form]).half()):
        weight: Any = new.weight
        check_close("tiny row", weight[2], half.weight[2], 1.01 * 2**-24, unit=1.0)
        check_close("weight", weight, half.weight, 1e-3)
        assert weight[2].any()


def test_the_weight_can_be_set() -> None:
    layer: Any = parametrised("grouped transposed", "bwn")
    parameters, weight = list(layer.parameters()), torch.randn_like(layer.weight)
    layer.weight = weight
    check_close("weight", layer.weight, weight, 5e-7)
    assert [id(parameter) for parameter in layer.parameters()] == [id(parameter) for parameter in parameters]


def test_layout_is_kept() -> None:
    layer: Any = normalise_weight(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), bounded=True)  # type: ignore[call-overload]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", [WeightNorm, BoundedWeightNorm])
def test_what_it_is_not_for(norm: type[WeightNorm]) -> None:
    with pytest.raises(NormRewriteError, match=r"p = 1, 2 or inf, got 3\."):
        norm(nn.Linear(2, 2), p=3)
    with pytest.raises(NormRewriteError, match=r"convolutions and linear layers, got Embedding\."):
        norm(nn.Embedding(2, 2))


def test_repr() -> None:
    assert repr(WeightNorm(nn.Linear(2, 2), 1)) == "WeightNorm(p=1)"
    assert repr(BoundedWeightNorm(nn.Linear(2, 2), strict=True)) == "BoundedWeightNorm(p=2, rho=1, strict)"


# --- casts, copies, files --------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts(form: str, dtype: torch.dtype) -> None:
    layer: Any = parametrised("conv1d", form)
    rho = dict(layer.named_buffers())
    there = copy.deepcopy(layer).to(dtype)
    assert there.weight.dtype == dtype and there(torch.randn(2, 4, 7).to(dtype)).dtype == dtype
    check_close("weight", there.weight, expected(there, 2), TOLERANCE[dtype])
    back = there.float()
    assert all(torch.equal(rho[name], value) and value.dtype == rho[name].dtype for name, value in back.named_buffers())
    twice = copy.deepcopy(layer).double().float()
    assert torch.equal(twice.weight, layer.weight)


@every_layer
@every_form
def test_copies_and_state_dicts(kind: str, form: str) -> None:
    layer: Any = learn_anything(parametrised(kind, form))
    same, other = copy.deepcopy(layer), parametrised(kind, form)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (same, other):
        assert torch.equal(twin.weight, layer.weight)  # type: ignore[arg-type]
        assert not {id(tensor) for tensor in twin.parameters()} & {id(tensor) for tensor in layer.parameters()}
        layer.load_state_dict(twin.state_dict(), strict=True)


@every_form
def test_the_way_back(form: str) -> None:
    """The original, to the bit, and whether nothing was learned since; through a file into a twin of other bits."""
    old: Any = nn.Conv2d(4, 6, 3, groups=2, bias=False, padding_mode="circular", padding=1)
    origin = remember(old)
    folded = copy.deepcopy(old)
    folded.bias = nn.Parameter(torch.randn(6))
    new = normalise_weight(folded, **FORMS[form], origin=origin)
    loaded = normalise_weight(
        learn_anything(copy.deepcopy(folded)), **FORMS[form], origin=remember(learn_anything(copy.deepcopy(old)))
    )
    loaded.load_state_dict({name: value.clone() for name, value in new.state_dict().items()}, strict=True)
    for twin in (new, loaded, copy.deepcopy(new)):
        assert unchanged(twin)
        back: Any = original(twin)
        assert type(back) is nn.Conv2d and back.bias is None and back.padding_mode == "circular"
        assert torch.equal(back.weight, old.weight) and back.weight.requires_grad
        assert list(back.state_dict()) == list(old.state_dict())


@every_form
@pytest.mark.parametrize("what", ["bias", "v", "g", "rho"])
def test_a_single_changed_bit_is_noticed(form: str, what: str) -> None:
    layer: Any = parametrised("grouped", form, origin=None)
    assert not unchanged(layer) and original(layer) is None
    layer = parametrised("grouped", form, origin=remember(nn.Conv2d(4, 6, 3, groups=2)))
    assert unchanged(layer)
    tensors = {"bias": layer.bias, "g": gain_of(layer), "rho": getattr(weight_norm_of(layer), "rho", None)}
    tensor = tensors.get(what, layer.parametrizations.weight.original0)
    if tensor is not None:
        flat = tensor.detach().view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert not unchanged(layer)


def test_a_frozen_layer_stays_frozen() -> None:
    layer = normalise_weight(nn.Linear(3, 2).requires_grad_(False), bounded=True, origin=remember(nn.Linear(3, 2)))
    back = original(layer)
    assert back is not None
    assert not any(parameter.requires_grad for parameter in [*layer.parameters(), *back.parameters()])


def test_it_is_no_norm_site() -> None:
    assert not sites.find(nn.Sequential(parametrised("conv1d", "bwn", origin=remember(nn.Linear(2, 2)))))


# --- tracing, training -----------------------------------------------------------------------------------------------


@every_layer
@every_form
def test_one_node_when_traced(kind: str, form: str) -> None:
    model = nn.Sequential(parametrised(kind, form), nn.ReLU())
    traced = fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes][1:3] == [("call_module", "0"), ("call_module", "1")]
    x = torch.randn(LAYERS[kind][1])
    assert torch.equal(copy.deepcopy(traced)(x), model(x))


@every_form
@pytest.mark.parametrize("kind", ["grouped", "grouped transposed", "linear"])
def test_compiled(kind: str, form: str) -> None:
    torch._dynamo.reset()
    layer, x = parametrised(kind, form), torch.randn(LAYERS[kind][1])
    same = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (compiled, same):
        run(x).square().sum().backward()
    for got, wanted in zip(layer.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@every_form
@pytest.mark.parametrize("kind", ["grouped", "grouped transposed", "linear"])
def test_exported(kind: str, form: str) -> None:
    layer, x = parametrised(kind, form).eval(), torch.randn(LAYERS[kind][1])
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wide = torch.cat([x, x])
    torch.testing.assert_close(program.module()(wide), layer(wide))


@every_layer
@every_form
def test_five_steps(kind: str, form: str) -> None:
    layer: Any = parametrised(kind, form)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3)
    before, norms = layer.weight.detach().clone(), norms_of(layer, layer.weight)
    for _ in range(5):
        optimiser.zero_grad()
        layer(torch.randn(LAYERS[kind][1])).square().mean().backward()
        optimiser.step()
    assert torch.isfinite(layer.weight).all() and not torch.equal(layer.weight, before)
    cosine = torch.cosine_similarity(layer.weight.flatten().double(), before.flatten().double(), dim=0)
    assert cosine < 1 - 1e-12
    if form != "wn":
        drift = np.linalg.norm(norms_of(layer, layer.weight)) / np.linalg.norm(norms) - 1
        assert abs(drift) <= 1e-5
    if form == "strict":
        check_close("norms", norms_of(layer, layer.weight), norms, 1e-6)


def test_read_by_other_code() -> None:
    """As `layer.weight`, by a functional call, within torch's cache."""
    layer: Any = parametrised("linear", "bwn")
    x: Tensor = torch.randn(2, 5)
    with parametrize.cached():
        assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
