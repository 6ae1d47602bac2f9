"""A site knows its norm: read once, when it is first asked for, and what one walk finds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.api.inspect import inspect
from normrewrite.sites import Site, Walk, find, kinds, read, sample_kinds
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SampleKind
from tests.conftest import randomise


class Watched(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Llama(nn.Module):
    """Called a norm, and none that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.ones_(nn.Parameter().new_empty(4)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class LlamaNorm(Llama):
    pass


def network() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), Watched(4), nn.GroupNorm(2, 4))
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), block)).eval()


Count = Callable[[], Counter[str]]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the norms of each class were read."""
    counts: Counter[str] = Counter()

    def counted(name: str, module: Any) -> None:
        function = getattr(module, name)

        def wrapped(norm: nn.Module) -> Any:
            counts[type(norm).__name__] += 1
            return function(norm)

        monkeypatch.setattr(module, name, wrapped)

    counted("recognise", kinds)
    counted("recognise_sample", sample_kinds)
    return counts


@pytest.mark.parametrize("to", ["l1", "wn", "bwn", "none", "group", "frozen", "renorm"])
def test_a_plan_reads_each_norm_once(to: str, readings: Counter[str]) -> None:
    nr.plan(network(), to)
    assert readings == {"BatchNorm2d": 1, "Watched": 1}


def test_so_does_inspect_for_all_its_traps(readings: Counter[str]) -> None:
    inspect(network())
    assert readings == {"BatchNorm2d": 1, "Watched": 1, "GroupNorm": 1}


def test_lists_of_norms_read_none(readings: Counter[str]) -> None:
    assert len(find(network())) == 2 and not readings
    nr.plan(network(), "l1", rules={"*": None})
    assert not readings


def test_a_copy_with_its_neighbour_keeps_what_was_read(readings: Counter[str]) -> None:
    site = find(network())[0]
    assert site.norm is replace(site, alone="of no use").norm and sum(readings.values()) == 1


def test_a_norm_that_changes_after_the_plan_is_read_again() -> None:
    model = network()
    plan = nr.plan(model, "l1")
    model[1].eps = 0.5
    assert plan.apply()[0][1].eps == 0.5


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.BatchNorm1d(4, 0.5), Kind(nr.nn.BatchNorm1d, 0.5, (), (2, 3))),
        (
            nr.nn.BatchNorm2d(4, metric="linf", gain="paper"),
            Kind(nr.nn.BatchNorm2d, 1e-5, (), (4,), "linf", "paper", True),
        ),
        (nn.GroupNorm(2, 4), SampleKind("group", 1e-5, (4,), 2)),
        (nr.nn.LayerNorm((4, 2)), SampleKind("layer", 1e-5, (4, 2), metric="l1", ours=True)),
        (nr.nn.RMSNorm(4, 0.1), SampleKind("rms", 0.1, (4,), metric="l1", ours=True)),
        (nr.nn.GroupNorm(2, 4), SampleKind("group", 1e-5, (4,), 2, metric="l1", ours=True)),
        (nr.nn.InstanceNorm2d(4), SampleKind("instance", 1e-5, (4,), 4, metric="l1", ours=True)),
        (nn.Conv2d(3, 4, 1), Refusal("is no norm")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_norm_is_read_as(norm: nn.Module, kind: Any) -> None:
    assert read(norm) == kind == Site(("here",), norm, ()).norm


def test_a_refusal_has_words_and_is_none() -> None:
    refusal = read(LlamaNorm())
    assert isinstance(refusal, Refusal) and "LlamaNorm has its own forward" in str(refusal)
    assert Refusal.of("") is None and Refusal.of(None) is None and Refusal.of(refusal) is refusal


def test_one_walk_finds_what_find_does() -> None:
    model = network()
    walk = Walk(model)
    assert walk.find() == find(model) and walk.by_name == dict(sites.by_name(model)) and not walk.compiled()
    assert walk.find()[0] is walk.site(model[1])
