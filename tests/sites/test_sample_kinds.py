"""Norms within a sample that are no plain torch.nn class: told by watching, refused by name where they do more."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import normrewrite as nr
from normrewrite.sites import find, is_sample_norm
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SampleKind, recognise_sample


class LlamaRMSNorm(nn.Module):
    """As transformers': computed in fp32 whatever it is given, its eps under a name of its own."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class T5LayerNorm(LlamaRMSNorm):
    """As transformers': half of it in the input's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class GemmaRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1 + self.weight.float())).type_as(x)


class ConvNeXtLayerNorm(nn.Module):
    """As ConvNeXt's: by hand, over the channels at each position."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LayerNorm2d(nn.LayerNorm):
    """As timm's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class GroupNorm1(nn.GroupNorm):
    """As timm's."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class HiddenEpsNorm(ConvNeXtLayerNorm):
    """Its eps stands in forward alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-3)


class NormOfTheScale(LlamaRMSNorm):
    """eps beside the root: another function where x is small."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class NormAndRelu(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class TrainingNorm(LlamaRMSNorm):
    """Another function in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class NormWithChild(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()


class TwoSizesNorm(ConvNeXtLayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(1))


class ByRank(nn.LayerNorm):
    """As MixTransformer's: channels first in images, last in sequences."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 4 else super().forward(x)


class StepsAsideForOneNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else super().forward(x)


class GuardedNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1e4, 1e4) + 0 * x)


class AbsoluteNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sign()


class GatedNorm(LlamaRMSNorm):
    """As Mamba's."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class CalledNorm(LlamaRMSNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


TOLD: list[tuple[nn.Module, SampleKind]] = [
    (nn.LayerNorm((3, 4), eps=1e-3), SampleKind("layer", 1e-3, (3, 4))),
    (nn.RMSNorm(6), SampleKind("rms", None, (6,))),
    (nn.GroupNorm(2, 8), SampleKind("group", 1e-5, (8,), 2)),
    (nn.InstanceNorm3d(4), SampleKind("instance", 1e-5, (4,), 4)),
    (LlamaRMSNorm(16), SampleKind("rms", 1e-6, (16,))),
    (LlamaRMSNorm(5, 1e-5), SampleKind("rms", 1e-5, (5,))),
    (T5LayerNorm(16), SampleKind("rms", 1e-6, (16,))),
    (ConvNeXtLayerNorm(8), SampleKind("layer", 1e-6, (8,), channels_first=True, ranks=(4,))),
    (ConvNeXtLayerNorm(5, 1e-5), SampleKind("layer", 1e-5, (5,), channels_first=True, ranks=(4,))),
    (LayerNorm2d(8), SampleKind("layer", 1e-5, (8,), channels_first=True, ranks=(4,))),
    (GroupNorm1(8), SampleKind("group", 1e-5, (8,))),
    (HiddenEpsNorm(8), SampleKind("layer", 1e-3, (8,))),
]


@pytest.mark.parametrize(("module", "kind"), TOLD, ids=lambda value: type(value).__name__)
def test_told(module: nn.Module, kind: SampleKind) -> None:
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in module.state_dict().items()}
    assert is_sample_norm(module)
    assert recognise_sample(module) == kind
    assert recognise_sample(module.half()) == kind
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name].half()), name


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (GemmaRMSNorm(8), "GemmaRMSNorm has its own forward, and is no layer, RMS, group or instance norm"),
        (NormOfTheScale(8), "is no layer"),
        (NormAndRelu(8), "is no layer"),
        (TrainingNorm(8), "is no layer"),
        (ByRank(8), "is no layer"),
        (StepsAsideForOneNorm(8), "is no layer"),
        (GuardedNorm(8), "is no layer"),
        (AbsoluteNorm(8), "is no layer"),
        (GatedNorm(8), "GatedNorm.forward takes further arguments"),
        (CalledNorm(8), "CalledNorm overrides __call__"),
        (prune.l1_unstructured(nn.LayerNorm(8), "weight", 0.5), "its weight is computed anew"),
        (NormWithChild(8), "NormWithChild has its own forward and children"),
        (TwoSizesNorm(8), "other parameters than a weight and a bias of one size"),
        (LlamaRMSNorm(1), r"not \(C,\) with C of at least 2"),
        (nn.utils.parametrize.register_parametrization(nn.LayerNorm(3), "weight", nn.Identity()), "parametrised"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_by_name(module: nn.Module, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(recognise_sample(module))


def test_one_alike_of_another_width_is_told_its_own_shape() -> None:
    assert [recognise_sample(LlamaRMSNorm(width)) for width in (16, 32)] == [
        SampleKind("rms", 1e-6, (16,)),
        SampleKind("rms", 1e-6, (32,)),
    ]


def test_ranks_that_broadcasting_makes_something_of_are_refused_when_they_come() -> None:
    twin = nr.convert(nn.Sequential(ConvNeXtLayerNorm(4)), "l1", scope="layer")
    assert twin(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    with pytest.raises(nr.NormRewriteError, match="expects 4D input"):
        twin(torch.randn(4, 4, 4))


def test_hooks_keep_it_from_being_watched() -> None:
    module = LlamaRMSNorm(8)
    module.register_forward_hook(lambda *_: None)
    assert recognise_sample(module) == Refusal("LlamaRMSNorm has its own forward and hooks, so it can't be watched")


def test_sites_find_batch_norms_unless_told_otherwise() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.LayerNorm(4), LlamaRMSNorm(4), nn.PReLU(4), nn.LocalResponseNorm(2), GemmaRMSNorm(4)
    )
    assert [site.name for site in find(model)] == ["0"]
    assert [site.name for site in find(model, is_sample_norm)] == ["1", "2", "5"]
