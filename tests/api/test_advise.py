"""advise: each rule by a site that calls for it, and what it makes of trained networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.advise import Advice, SiteAdvice
from normrewrite.data import Batch, Data
from normrewrite.rules import parse_rule
from tests.conftest import RealNetwork, randomise


def one(norm: nn.Module, x: Tensor, size: int = 50) -> SiteAdvice:
    (site,) = nr.advise(norm.eval(), x, batch_size=size).sites
    return site


def norm1d(channels: int = 4) -> nn.Module:
    return randomise(nn.BatchNorm1d(channels))


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target"), [(1, "group"), (2, "renorm"), (15, "renorm"), (16, "l1"), (400, "l1")], ids=str
)
def test_few_elements(size: int, target: str) -> None:
    site = one(norm1d(), torch.randn(400, 4), size)
    assert (site.target, site.n) == (target, size)
    assert ("n = " in " ".join(site.why)) == (target != "l1")


def test_positions_count_as_elements() -> None:
    assert one(nn.BatchNorm2d(4), torch.randn(8, 4, 4, 4), 2).target == "l1"


def test_few_elements_without_running_statistics() -> None:
    site = one(nn.BatchNorm1d(4, track_running_stats=False), torch.randn(40, 4), 8)
    assert site.target == "group" and "calibrate" in site.why  # renorm needs running statistics


def test_frozen_norms_are_folded_away() -> None:
    site = one(nr.convert(norm1d().eval(), "frozen"), torch.randn(400, 4))
    assert site.target == "none" and "frozen" in site.why[0]


class _Odd(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.odd = norm1d(), norm1d(), _Odd(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.used(x))  # type: ignore[no-any-return]


def test_sites_that_stay_say_why() -> None:
    advice = nr.advise(_Unused().eval(), torch.randn(400, 4), batch_size=50)
    targets = {site.name: site.target for site in advice.sites}
    assert targets == {"used": "l1", "unused": None, "odd": None}
    assert advice.sites[1].why == ("not reached by the data",) and "overrides forward" in advice.sites[2].why[0]
    assert "keep" in str(advice) and advice.options == "--to l1"


# --- what goes with them ----------------------------------------------------------------------------------------------


def test_metrics_of_few_elements_are_named_where_they_are_quiet() -> None:
    bounded = one(norm1d(), torch.rand(4000, 4), 1000)  # the largest of a thousand uniforms hardly moves
    assert {"linf", "range", "topk:10", "topk:1%"} <= set(bounded.also)
    assert one(norm1d(), torch.randn(4000, 4).exp(), 1000).also == ()  # that of lognormals does
    assert one(norm1d(), torch.rand(2000, 4), 1000).also == ()  # two batches measure no noise


def test_kappa_far_from_one_calls_for_calibration() -> None:
    assert "calibrate" in one(norm1d(), torch.randn(4000, 4).exp(), 1000).why
    assert "calibrate" not in one(norm1d(), torch.randn(4000, 4), 1000).why


@pytest.mark.parametrize(
    ("spread", "said"),
    [(1.0, ""), (12.0, "squares overflow"), (200.0, "both sums"), (300.0, "one square"), (40_000.0, "inputs")],
)
def test_half_precision(spread: float, said: str) -> None:
    x = spread * (2.0 * torch.randint(0, 2, (1000, 4)) - 1)  # +-spread, so that every sum is known
    x[:, :2] *= 0.1
    site = one(norm1d(), x + (30_000 if spread > 30_000 else 0), 500)
    assert [word for word in site.why if "fp16" in word] == ([] if not said else [w for w in site.why if said in w])
    assert bool(said) == any("fp16" in word for word in site.why)
    assert site.fp16_sums == pytest.approx(torch.tensor(65504 / (500 * spread)).log2().item(), abs=0.02)


@pytest.mark.parametrize(
    ("spread", "notes"),
    [(1.0, []), (12.0, ["l1 fits"]), (200.0, ["too"]), (300.0, ["too", "one element"])],
)
def test_half_precision_is_explained_once(spread: float, notes: list[str]) -> None:
    x = spread * (2.0 * torch.randint(0, 2, (1000, 4)) - 1)
    lines = [line for line in str(nr.advise(norm1d().eval(), x, batch_size=500)).splitlines() if "- fp16" in line]
    assert len(lines) == len(notes) and all(note in line for note, line in zip(notes, lines, strict=True))


def test_dead_channels_are_counted() -> None:
    x = torch.randn(400, 4)
    x[:, 1] = 3.0
    advice = nr.advise(norm1d().eval(), x, batch_size=50)
    assert advice.sites[0].dead == 1 and "1/4" in str(advice) and "dead channels at 1 of 1" in str(advice)
    dead = nr.advise(norm1d().eval(), torch.ones(400, 4), batch_size=50)
    assert dead.sites[0].dead == 4 and "nan" not in str(dead)


def test_layers_that_a_norm_folds_into() -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm1d(), nn.ReLU(), norm1d()).eval()
    assert [site.folds_into for site in nr.advise(model, torch.randn(400, 4), batch_size=50).sites] == ["0", None]


def test_sorted_inputs_are_drawn_at_random() -> None:
    x = torch.randn(1000, 4) * torch.linspace(0.1, 10, 1000)[:, None]
    sites = [nr.advise(norm1d().eval(), data, batch_size=100).sites[0] for data in (x, x.split(100))]
    noise = [site.noise["l1"] for site in sites if site.noise is not None]
    assert noise[0] is not None and noise[1] is not None and noise[0] < 0.2 < 0.4 < noise[1]


# --- the whole --------------------------------------------------------------------------------------------------------


def _mixed() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    return randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8))).eval()


def test_convert_follows_the_options() -> None:
    model, x = _mixed(), torch.randn(80, 3, 8, 8)
    advice = nr.advise(model, x, batch_size=8)
    assert advice.options == "--to l1 --rule '7=renorm'"
    to, _, rule = advice.options.removeprefix("--to ").partition(" --rule ")
    twin = nr.convert(model, to, rules=[parse_rule(rule.strip("'"))])
    assert [nr.advise(twin, x, batch_size=8).sites[i].target for i in range(3)] == ["l1", "l1", "renorm"]
    assert nr.verify(model, twin, x).max_abs < 1e-4


def test_the_model_is_left_as_it_is(small: Callable[[], nn.Module]) -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (nr.advise(model, torch.ones(40, 3, 4, 4).cumsum(0), batch_size=10) for _ in range(2))
    assert first.as_dict() == second.as_dict() and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_batches_of_any_kind(small: Callable[[], nn.Module]) -> None:
    model, x = small(), torch.randn(40, 3, 4, 4)
    batches: list[Any] = [list(x.split(10)), [(part, torch.zeros(10)) for part in x.split(10)]]
    whole = nr.advise(model, Data(Batch({"input": x})), batch_size=10)
    for advice in (nr.advise(model, data) for data in batches):
        assert (advice.inputs, advice.batch_size) == (whole.inputs, whole.batch_size) == (40, 10)


def test_fewer_inputs_than_a_batch_are_said_so(small: Callable[[], nn.Module]) -> None:
    advice = nr.advise(small(), torch.randn(20, 3, 4, 4), batch_size=250)
    assert "in batches of 20, from 20 inputs" in str(advice) and "four batches or more" in str(advice)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.randn(4, 5, 4, 4), "can't run on"),
        (torch.full((4, 3, 4, 4), float("nan")), "not finite"),
        ([], "no batch"),
        (["text"], "a batch is a tensor"),
    ],
    ids=["shape", "nan", "empty", "text"],
)
def test_bad_data(small: Callable[[], nn.Module], data: object, message: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=message):
        nr.advise(small(), data)  # type: ignore[arg-type]
    with pytest.raises(nr.NormRewriteError, match="holds no batch norm"):
        nr.advise(nn.Linear(3, 3), torch.randn(4, 3))


def test_a_real_network(resnet20: RealNetwork) -> None:
    advice: Advice = nr.advise(resnet20.make(), resnet20.inputs(256)[0], batch_size=64)
    assert len(advice.sites) == 19 and advice.options == "--to l1"
    assert all(site.folds_into and site.n >= 64 * 64 and not site.dead for site in advice.sites)
    l1, topk, linf = (
        sum((site.noise or {})[name] or 0.0 for site in advice.sites) for name in ("l1", "topk:10", "linf")
    )
    assert l1 < topk < linf
    assert sum("calibrate" in site.why for site in advice.sites) >= 5
    assert all(site.fp16_squares < 0 for site in advice.sites[:4])
