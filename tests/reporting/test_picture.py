"""Every network's picture: all of its sites once, edges as the graph has them, nothing drawn outside."""

from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from torch import nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.reporting.drawing import WIDTH, Look, block, histogram
from normrewrite.reporting.picture import ENTRY, picture
from tests.reporting.networks import EVIL, networks

MAKE = networks()
SVG = "{http://www.w3.org/2000/svg}"


def norms_in(model: nn.Module) -> set[str]:
    """Names of the norms and rewritten places of a model, the first of each."""
    return {site.name for site in sites.find(model, lambda each: sites.is_norm(each) or sites.is_rewritten(each))}


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = MAKE[request.param]()
    return made


@pytest.mark.parametrize("to", [None, "l1", "bwn", "layer", "renorm", "frozen"])
def test_every_site_is_drawn_once(model: nn.Module, to: str | None) -> None:
    twin = model if to is None else nr.convert(model, to)
    names = norms_in(twin)
    shown = [node.name for each in picture(twin, names).blocks for node in each.nodes if node.name in names]
    assert sorted(shown) == sorted(names) and names


def test_residual_blocks() -> None:
    model = MAKE["resnet"]()
    blocks = picture(model, norms_in(model)).blocks
    assert [each.name for each in blocks] == ["", "stages.0", "stages.1", ""]
    labels = [node.label for node in blocks[1].nodes]
    assert labels == ["3×3", "bn1", "relu", "3×3", "bn2", "+", "relu"] * 2
    adds = [node.comes for node in blocks[1].nodes if node.kind == "add"]
    assert adds == [(4, ENTRY), (11, 6)]  # the block's input, and the first half's output
    assert all(node.comes == (i - 1,) for i, node in enumerate(blocks[0].nodes))


def test_what_comes_from_further_back_says_so() -> None:
    model = MAKE["unet"]()
    blocks = picture(model, norms_in(model)).blocks
    (cat,) = [node for each in blocks for node in each.nodes if node.label == "cat"]
    assert cat.far == ("down",)


def test_without_a_graph_modules_are_listed() -> None:
    model = MAKE["branching"]()
    drawn = picture(model, {"norm"})
    assert "torch.fx can't trace Branching" in drawn.untraceable
    assert [node.label for node in drawn.blocks[0].nodes] == ["3×3", "norm", "relu"]


def looks(names: set[str]) -> dict[str, Look]:
    return {name: Look("is-l1", "l1", f"{name}: l1", "#site-0") for name in names}


@pytest.mark.parametrize("to", ["l1", "bwn"])
def test_drawings_are_whole_and_stay_inside(model: nn.Module, to: str) -> None:
    twin = nr.convert(model, to)
    names = norms_in(twin)
    for each in picture(twin, names).blocks:
        root = ElementTree.fromstring(f'<div xmlns="http://www.w3.org/2000/svg">{block(each, looks(names))}</div>')[0]
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        assert width <= WIDTH + 12 and root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
        for shape in root.iter(f"{SVG}rect"):
            assert 0 <= float(shape.get("x", 0)) <= float(shape.get("x", 0)) + float(shape.get("width", 0)) <= width
            assert 0 <= float(shape.get("y", 0)) <= float(shape.get("y", 0)) + float(shape.get("height", 0)) <= height
        assert len(list(root.iter(f"{SVG}a"))) == sum(node.name in names for node in each.nodes)
        assert len(list(root.iter(f"{SVG}g"))) == len(each.nodes)


def test_names_are_escaped() -> None:
    model = MAKE["evil"]()
    names = norms_in(model)
    drawn = "".join(str(block(each, looks(names))) for each in picture(model, names).blocks)
    assert "<script" not in drawn and "<img" not in drawn and "&lt;script&gt;" in drawn and EVIL not in drawn


@pytest.mark.parametrize("shares", [[0.0] * 48, [1.0, *[0.0] * 47], [1 / 48] * 48])
def test_histograms_of_anything(shares: list[float]) -> None:
    root = ElementTree.fromstring(str(histogram(shares, "<inputs>")))
    numbers = [float(word) for word in root[0].get("d", "").split() if word not in "MLZ"]
    assert root.get("aria-label") == "<inputs>" and min(numbers) >= 0 and max(numbers) <= 168


def test_many_blocks_stay_small() -> None:
    """A thousand norms make a page, not a book."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())  # noqa: E731
    model = nn.Sequential(*(make() for _ in range(300))).eval()
    drawn = picture(model, norms_in(model)).blocks
    assert len(drawn) == 300 and sum(len(str(block(each, {}))) for each in drawn) < 600_000
