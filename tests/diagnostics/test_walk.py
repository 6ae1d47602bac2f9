"""Two networks side by side: what is held between places, and what is given at each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normrewrite.data import Batch
from normrewrite.diagnostics import walk
from tests.conftest import randomise
from tests.forms import Chain


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def places(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(f"bn{i}") for i in (1, 2, 3, 4)]


def inputs_at_each(original: nn.Module, twin: nn.Module) -> dict[int, list[tuple[Tensor, Tensor]]]:
    x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = [Batch({"x": part}) for part in x.split(5)]
    pairs = list(zip(places(original), places(twin), strict=True))
    return {index: list(inputs) for index, inputs in walk.walk(original, twin, pairs, batches)}


@pytest.mark.parametrize("in_lockstep", [True, False])
def test_what_goes_into_each_norm(in_lockstep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks see the same, in both networks; a residual passes one of the places by."""
    original, twin = randomise(Chain()).eval(), randomise(Chain(), 1).eval()
    if not in_lockstep:
        monkeypatch.setattr(walk, "traced", lambda *_: None)
    seen = inputs_at_each(original, twin)
    assert list(seen) == [0, 1, 2, 3]
    hooked: dict[int, Tensor] = {}
    for which, model in ((1, original), (0, twin)):
        for norm in places(model):
            norm.register_forward_pre_hook(lambda module, args: hooked.update({id(module): args[0].clone()}))
        model(torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
        for index, norm in enumerate(places(model)):
            given = torch.cat([pair[which] for pair in seen[index]])
            torch.testing.assert_close(given, hooked[id(norm)], rtol=1e-5, atol=1e-5)


def test_what_memory_has_no_room_for_is_mapped_to_files_that_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, twin = randomise(Chain()).eval(), randomise(Chain(), 1).eval()
    wanted, mapped = inputs_at_each(original, twin), []
    keep = walk._mapped
    monkeypatch.setattr(walk, "_HELD", 20_000)
    monkeypatch.setattr(walk, "_mapped", lambda value: mapped.append(value.nbytes) or keep(value))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = inputs_at_each(original, twin)
    assert mapped and not list(tmp_path.iterdir())
    for index, pairs in wanted.items():
        for one, other in zip(pairs, found[index], strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
