"""Pieces and cells against the whole tensor."""

import pytest
import torch
from torch import Tensor

from normrewrite.backends import measuring, operators
from normrewrite.backends import pieces as room
from normrewrite.backends.pieces import Pieces, cut, divided
from normrewrite.norms import metric
from tests.backends.test_torch_batch import EPS, affine_of, check_backward, check_forward, gradients, ours

SHAPES = [(6, 3, 16, 12), (1, 2, 40, 9), (37, 5), (8, 4, 24), (3, 2, 4, 6, 8), (2, 3, 64, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[7, 100, 1000])
def elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_ELEMENTS", request.param)


def laid_out(shape: tuple[int, ...]) -> list[Tensor]:
    """Values without ties, contiguous, with channels innermost, and strided."""
    x = torch.randperm(2 * torch.Size(shape).numel()).view(2, *shape).float()
    innermost = x[0].movedim(1, -1).contiguous().movedim(-1, 1)
    return [x[0].clone(), innermost, x.transpose(0, 1).flatten(0, 1)[::2][: shape[0]]]


@pytest.mark.usefixtures("elements")
@every_shape
def test_pieces_cover_everything_once(shape: tuple[int, ...]) -> None:
    for x in laid_out(shape):
        counts, other, channels = torch.zeros_like(x), torch.zeros(shape), torch.arange(shape[1])
        parts = Pieces(counts)
        for a, b, mine in zip(parts.of(counts), parts.of(other), parts.each(channels), strict=False):
            assert a.shape == b.shape and len(mine) == a.shape[1]
            a += 1 + mine.view(1, -1, *(1,) * (a.dim() - 2))
        assert torch.equal(counts, 1 + measuring.per_channel(channels, x.dim()).expand(shape))


@pytest.mark.usefixtures("elements")
@every_shape
def test_what_is_found_in_pieces_adds_up(shape: tuple[int, ...]) -> None:
    for x in laid_out(shape):
        parts = Pieces(x)
        found = [piece.double().sum([dim for dim in range(piece.dim()) if dim != 1]) for piece in parts.of(x)]
        assert torch.equal(parts.total(found), x.double().sum(measuring.over(x)))


def test_pieces_are_small_where_there_is_something_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_ELEMENTS", 64 // torch.get_num_threads())
    for x in (
        torch.zeros(9, 2, 16, 4),
        torch.zeros(9, 4, 8, 2).to(memory_format=torch.channels_last),
        torch.zeros(99, 4),
    ):
        pieces = Pieces(x).of(x)
        assert len(pieces) > 1 and max(piece.numel() for piece in pieces) <= 64
    assert len(Pieces(torch.zeros(4, 2, 8)).of(torch.zeros(4, 2, 8))) == 1  # as it is small


@pytest.mark.parametrize("by", [1, 3, 49, 2**20 + 7])
def test_places_are_divided_as_integers(by: int) -> None:
    places = torch.cat([torch.arange(-2, 3) + multiple * by for multiple in (1, 2, 1000, 2**51 // by)]).clamp_min(0)
    assert all(map(torch.equal, divided(places, by), (places // by, places % by)))


@pytest.mark.usefixtures("elements")
@every_shape
def test_cells_hold_the_extremes_and_where_they_are(shape: tuple[int, ...]) -> None:
    found = 0
    for x in laid_out(shape):
        cells = cut(x)
        if cells is None:
            continue
        found += 1
        rows = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(cells.mean, rows.double().mean(1).float())
        assert torch.equal(cells.high.amax(1), rows.amax(1)) and torch.equal(cells.low.amin(1), rows.amin(1))
        every = torch.arange(cells.high.shape[1]).expand(shape[1], -1)
        within = torch.arange(rows.shape[1]).expand_as(rows)
        places = cells.places(every, within)
        assert torch.equal(places.sort(1).values, within) and torch.equal(cells.read(every), rows.gather(1, places))
    assert found or shape == (37, 5)  # a prime number of rows has no cells


@pytest.mark.usefixtures("elements")
@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "topk:2", "range"])
@every_shape
def test_what_is_read_by_pieces_equals_the_reference(spec: str, shape: tuple[int, ...]) -> None:
    affine = affine_of(shape[1], torch.float32)
    for x in laid_out(shape):
        x = x / 7
        check_forward(operators.batch_norm(x, *affine, metric(spec), "exact", EPS), x, *affine, metric(spec))
        g = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        check_backward(gradients(ours(metric(spec)), g, x, *affine), x, *affine, g, metric(spec))
