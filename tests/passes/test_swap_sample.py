"""SwapMetric and RestoreNative on norms within a sample: scope and parameters stay, and the way back is exact."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.errors import NormRewriteError
from normrewrite.nn.sample import RowNorm
from normrewrite.passes import RestoreNative, SwapMetric
from normrewrite.passes.swap_metric import SCOPES
from normrewrite.sites import find
from normrewrite.tolerances import SAME_FUNCTION, worst
from tests.conftest import TARGETS
from tests.sites.test_sample_kinds import ConvNeXtLayerNorm, GemmaRMSNorm, LlamaRMSNorm

# A norm, an input, and what it becomes.
CASES: list[tuple[nn.Module, tuple[int, ...], type[RowNorm]]] = [
    (nn.LayerNorm(12), (4, 5, 12), nr.nn.LayerNorm),
    (nn.LayerNorm((3, 4), elementwise_affine=False), (4, 3, 4), nr.nn.LayerNorm),
    (nn.LayerNorm(12, bias=False), (4, 12), nr.nn.LayerNorm),
    (nn.RMSNorm(12), (4, 5, 12), nr.nn.RMSNorm),
    (nn.GroupNorm(3, 12, eps=1e-3), (4, 12, 3, 5), nr.nn.GroupNorm),
    (nn.InstanceNorm1d(12, affine=True), (4, 12, 15), nr.nn.InstanceNorm1d),
    (nn.InstanceNorm2d(12), (4, 12, 3, 5), nr.nn.InstanceNorm2d),
    (nn.InstanceNorm3d(12, affine=True, track_running_stats=True), (4, 12, 3, 5, 2), nr.nn.InstanceNorm3d),
    (LlamaRMSNorm(12), (4, 5, 12), nr.nn.RMSNorm),
    (ConvNeXtLayerNorm(12), (4, 12, 3, 5), nr.nn.LayerNorm),
]
every_case = pytest.mark.parametrize(("norm", "shape", "cls"), CASES, ids=lambda value: str(value)[:30])


def swap(model: nn.Module, to: str = "l1", scopes: tuple[str, ...] = SCOPES) -> Any:
    return SwapMetric(to, scopes=scopes).apply(copy.deepcopy(model))[0]


def restore(twin: nn.Module) -> tuple[Any, list[str]]:
    rewrite = RestoreNative()
    return rewrite.apply(copy.deepcopy(twin))[0], rewrite.trained


def trained(norm: nn.Module) -> nn.Module:
    norm = copy.deepcopy(norm)
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            tensor.data = 0.5 + torch.rand_like(tensor)
    return norm


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    """Class, plain attributes and tensors, to the bit."""
    assert type(found) is type(wanted)
    assert repr(found) == repr(wanted)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value) and found.state_dict()[name].dtype == value.dtype, name


@pytest.mark.parametrize("to", TARGETS)
@every_case
def test_scope_parameters_and_eps_stay(norm: nn.Module, shape: tuple[int, ...], cls: type[RowNorm], to: str) -> None:
    old = trained(norm)
    twin, [(site, _, new)] = SwapMetric(to, scopes=SCOPES).apply(nn.Sequential(old))
    assert type(new) is cls and isinstance(new, RowNorm)
    assert (new.metric, new.site) == (to, "0")
    assert new.eps == getattr(old, "variance_epsilon", getattr(old, "eps", None))
    assert all(new._parameters[name] is value for name, value in old._parameters.items())
    x = torch.randn(shape).exp()
    assert twin(x).shape == x.shape and site.module is old


@every_case
def test_it_is_close_on_gaussian_rows(norm: nn.Module, shape: tuple[int, ...], cls: type[RowNorm]) -> None:
    """Not exact, but no other function either: on Gaussian rows C * S reads the standard deviation, on average."""
    old, x = trained(norm).eval(), torch.randn(shape)
    assert torch.nn.functional.cosine_similarity(swap(old)(x).flatten(), old(x).flatten(), 0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_case
def test_the_way_back_gives_the_originals_bits(
    norm: nn.Module, shape: tuple[int, ...], cls: type[RowNorm], dtype: torch.dtype
) -> None:
    old = trained(norm).to(dtype)
    twin = swap(swap(old, "l1"), "range")
    assert twin.metric == "range"
    back, changed = restore(twin)
    assert_same(back, old)
    assert not changed
    assert_same(nr.revert(twin), old)


def test_after_training_the_live_tensors_come_back() -> None:
    old = trained(nn.LayerNorm(4))
    twin = swap(nn.Sequential(old))
    with torch.no_grad():
        twin[0].weight[1] = 7.0
    back, changed = restore(twin)
    assert changed == ["0"]
    wanted = old.get_parameter("weight").detach().clone()
    wanted[1] = 7.0
    assert torch.equal(back[0].weight, wanted) and torch.equal(back[0].bias, old.get_parameter("bias"))


def test_a_calibration_is_undone_and_a_bias_that_it_added_goes() -> None:
    old = trained(nn.RMSNorm(4))
    twin = swap(nn.Sequential(old))
    new = twin[0]
    kept = new.weight.detach().clone()
    new.weight.data *= 1.5
    new.origin.converted("weight", new.weight, kept)
    new.bias = nn.Parameter(torch.ones(4))
    x = torch.randn(3, 4)
    assert not torch.equal(twin(x), swap(nn.Sequential(old))(x))
    back, changed = restore(twin)
    assert_same(back[0], old)
    assert not changed


def test_an_instance_norm_with_running_statistics_is_exact_in_eval() -> None:
    for old, shape in (
        (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (4, 3, 15)),
        (nn.InstanceNorm2d(3, track_running_stats=True, eps=0.1), (3, 5, 7)),
    ):
        old = trained(old).eval()
        x = torch.randn(shape)
        assert worst(swap(old)(x), old(x)) <= SAME_FUNCTION[torch.float32]
        twin = swap(old).train()
        twin.running_scale *= 2
        back, changed = restore(twin)
        assert changed == [""] and type(back) is type(old)
        assert worst(back.eval()(x), twin.eval()(x)) <= SAME_FUNCTION[torch.float32]


def test_a_network_with_running_statistics_of_samples_is_converted() -> None:
    norm = trained(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval(), torch.randn(2, 3, 8, 8)
    twin, report = nr.plan(model, "l1", scope="instance").apply()
    (site,) = report.sites
    assert site.difference is not None and site.difference <= SAME_FUNCTION[torch.float32]
    assert site.error is not None and site.error <= SAME_FUNCTION[torch.float32]
    assert nr.verify(model, twin, x).ok
    assert torch.equal(nr.revert(twin)(x), model(x))


def test_files_keep_the_way_back() -> None:
    old = trained(nn.GroupNorm(2, 4))
    file = io.BytesIO()
    torch.save(swap(nn.Sequential(old)).state_dict(), file)
    file.seek(0)
    twin = swap(nn.Sequential(nn.GroupNorm(2, 4)))
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_same(restore(twin)[0][0], old)


# --- which norms -----------------------------------------------------------------------------------------------------


def mixture() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(12), nn.LayerNorm(20), nn.GroupNorm(3, 12), nn.InstanceNorm2d(12), nn.RMSNorm(20)
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_scopes_asked_for(scope: str) -> None:
    model, rewrite = mixture(), SwapMetric("l1", scopes=(scope,))
    _, done = rewrite.apply(model)
    assert [int(site.name) for site, _, _ in done] == [("batch", "layer", "group", "instance", "rms").index(scope)]
    others = [rewrite.why_not(site) for site in find(mixture(), rewrite.wants)]
    assert sum(reason is None for reason in others) == 1
    again = SwapMetric("linf", scopes=(scope,))
    assert [again.why_not(site) is None for site in find(model, again.wants)].count(True) == 1


def test_by_default_batch_norms_alone() -> None:
    model = mixture()
    assert [site.name for site, _, _ in SwapMetric("l1").apply(model)[1]] == ["0"]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nr.nn.LayerNorm(12, metric="topk:10"), "is topk:10 already"),
        (nn.LayerNorm(8), "topk:10 needs at least 10 elements"),
        (nr.nn.RMSNorm(8), "topk:10 needs at least 10 elements"),
        (GemmaRMSNorm(12), "GemmaRMSNorm has its own forward"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    rewrite = SwapMetric("topk:10", scopes=SCOPES)
    [site] = find(nn.Sequential(norm), rewrite.wants)
    assert reason in str(rewrite.why_not(site))
    assert not rewrite.apply(nn.Sequential(norm))[1]


def test_unknown_scopes_are_refused() -> None:
    with pytest.raises(NormRewriteError, match=r"unknown scope 'grup'\. Did you mean 'group'"):
        SwapMetric("l1", scopes=("grup",))


def test_norms_that_never_were_torchs() -> None:
    for ours, native in (
        (nr.nn.LayerNorm(4), nn.LayerNorm(4)),
        (nr.nn.RMSNorm(4), nn.RMSNorm(4)),
        (nr.nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)),
        (nr.nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, affine=True)),
    ):
        assert_same(restore(ours)[0], native)
        back = restore(swap(ours, "range"))[0]
        assert_same(back, ours)
    refused = [
        nr.nn.LayerNorm(4, channels_first=True),
        nr.nn.GroupNorm(2, 4, centred=False),
        nr.nn.InstanceNorm(4),
    ]
    for norm in refused:
        [site] = find(norm, lambda _: True)
        assert "torch has no such norm" in str(RestoreNative().why_not(site))


# --- whole models ----------------------------------------------------------------------------------------------------


def test_as_a_torch_fx_pass() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    result = SwapMetric("l1", scopes=("layer",))(traced)
    assert result.modified and isinstance(traced.get_submodule("1"), nr.nn.LayerNorm)
    assert not SwapMetric("l1", scopes=("layer",))(traced).modified
    x = torch.randn(4, 12)
    assert torch.equal(traced(x), swap(model)(x)) and type(model[1]) is nn.LayerNorm
    assert RestoreNative()(traced).modified and torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("traced", [False, True], ids=["tree", "graph"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fused_encoder_steps_aside(traced: bool, masked: bool) -> None:
    """In eval it would read the norms' weights past their forward, and compute torch's layer norm as before."""
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12)).eval()
    x = torch.randn(3, 5, 12)
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None] if masked else None

    def run(model: nn.Module) -> Tensor:
        y: Tensor = model(x, src_key_padding_mask=mask)
        return y

    twin: nn.Module
    if traced:
        graph = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(encoder)))
        twin = SwapMetric("l1", scopes=("layer",))(graph).graph_module.get_submodule("0")
    else:
        twin = swap(encoder, "l1", ("layer",))
    with torch.no_grad():
        fused = run(twin)
    live = run(twin).detach()  # torch fuses nothing where a gradient is wanted
    seen = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fused[seen], live[seen], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(fused[seen], run(encoder)[seen], atol=1e-3)
        back = restore(twin)[0]
        assert torch.equal(run(back), run(encoder))
    assert back.use_nested_tensor == encoder.use_nested_tensor
    assert "fused_before_rewrite" not in vars(back)
