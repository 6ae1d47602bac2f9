"""What every pass shares: what `rewrite` and `why_not` may return, and what follows a rewrite."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.nn.parts import shallow
from normrewrite.passes import PIPELINE, FoldAffine, Replacement, Rewrite, SwapMetric
from normrewrite.passes.base import Rewritten
from normrewrite.passes.fold_affine import affine_of, into_previous
from normrewrite.sites import Site, find
from normrewrite.sites.neighbours import attach
from normrewrite.sites.refusal import Refusal
from normrewrite.targets import TARGETS, Target, rewrite
from tests.conftest import randomise


def network() -> nn.Sequential:
    return randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    ).eval()


class Plain(Rewrite):
    """As written before there were Replacement and Refusal: a module, a text."""

    target = "plain"

    def why_not(self, site: Site) -> str | None:
        return "is the first" if site.name == "1" else ""

    def rewrite(self, site: Site) -> nn.Module:
        return shallow(site.module)


def test_a_text_is_a_refusal_and_a_module_takes_the_norms_place_alone() -> None:
    model = network()
    assert [Plain().refusal(site) for site in find(model)] == [Refusal("is the first"), None]
    _, done = Plain().apply(model)
    assert [(site.name, before, type(norm)) for site, before, norm in done] == [("4", None, nn.BatchNorm2d)]
    assert not isinstance(Refusal("l1"), str)


def test_a_plan_of_such_a_pass_words_its_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Target("plain", "", "", lambda argument, example_inputs=None: Plain(), frozenset())
    monkeypatch.setitem(TARGETS, "plain", row)
    plan = nr.plan(network(), "plain")
    assert [choice.reason for choice in plan.choices] == ["is the first", None]
    assert "is the first" in str(plan) and len(plan.apply()[1].rewritten) == 1


class Old(FoldAffine):
    """A fold as it was written when the layer in front had a method of its own."""

    def rewrite(self, site: Site) -> Any:
        return nn.Identity()

    def rewrite_before(self, site: Site) -> nn.Module | None:
        return None if site.before is None else into_previous(site.before.module, affine_of(site.module))


class New(FoldAffine):
    def rewrite(self, site: Site) -> Replacement:
        assert site.before is not None
        return Replacement(nn.Identity(), into_previous(site.before.module, affine_of(site.module)))


@pytest.mark.parametrize("cls", [Old, New])
def test_norm_and_layer_are_replaced_together(cls: type[FoldAffine]) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    twin, done = cls().apply(copy.deepcopy(model))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(twin.get_submodule(site.before.name) is before for site, before, _ in done if site.before)
    assert [site.name for site, _, _ in done] == ["1", "4"]


def test_a_pass_with_a_method_for_the_layer_is_asked_for_it_first() -> None:
    """As before there was Replacement: what it finds out there may be of use to its norm."""
    asked: list[str] = []

    class Noting(Old):
        def rewrite_before(self, site: Site) -> nn.Module | None:
            asked.append("layer")
            return super().rewrite_before(site)

        def rewrite(self, site: Site) -> Any:
            asked.append("norm")
            return super().rewrite(site)

    Noting().apply(network())
    assert asked == ["layer", "norm"] * 2


def test_settle_is_called_once_with_all_that_was_rewritten() -> None:
    calls: list[tuple[nn.Module, list[str]]] = []

    class Settling(SwapMetric):
        def settle(self, model: nn.Module, done: Iterable[Rewritten]) -> None:
            calls.append((model, [each.site.name for each in done]))

    twin, _ = Settling("l1").apply(network())
    assert calls == [(twin, ["1", "4"])]


def test_every_target_has_a_place_in_the_pipeline() -> None:
    passes = [
        type(rewrite(row.spelling.partition("[")[0].replace(":K", ":3").replace(":P%", ":1%")))
        for row in TARGETS.values()
    ]
    assert set(passes) <= set(PIPELINE)


def test_a_plan_carries_passes_out_in_their_order_and_reports_in_that_of_the_sites(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    apply = Rewrite.apply

    def watched(self: Rewrite, model: nn.Module, chosen: Any = None) -> Any:
        order.append(self.target)
        return apply(self, model, chosen)

    monkeypatch.setattr(Rewrite, "apply", watched)
    twin, report = nr.plan(network(), "l1", rules={"1": "none"}).apply()
    assert order == ["l1", "none"] and [site.target for site in report.sites] == ["none", "l1"]
    assert attach(twin, find(twin))[0].name == "4"
