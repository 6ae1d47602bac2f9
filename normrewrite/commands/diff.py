"""Two model files, or two manifests, against each other: sites, targets and tensors that differ, and by how much.

>>> print(compared(read(Path("a.pt")), read(Path("b.pt"))))
same: 3 sites, 21 tensors

No code is needed: tensors go by name. Of manifests only digests can be compared, which tell that, and not how much.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import files
from normrewrite.commands.source import by_key
from normrewrite.options.diff import Diff
from normrewrite.provenance import digests, manifest
from normrewrite.results import Result, Summary, Table, Verdict, apart


@dataclass(frozen=True)
class Side:
    """What one file says: sites by name (None where it tells of none), digests by name, and tensors where it holds them."""

    name: str
    sites: dict[str, dict[str, Any]] | None
    digests: dict[str, str]
    tensors: dict[str, Tensor] | None
    notes: tuple[str, ...] = ()  # what people are to know of how it was read


@dataclass(frozen=True)
class SiteDifference:
    """A site that is not the same: what each side says of it, None where it says nothing."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same. largest: |a - b| of one element; relative: that over the largest |b|; None where only
    the bytes, or one side, are known. elements: how many differ."""

    name: str
    a: str
    b: str
    elements: int | None = None
    largest: float | None = None
    relative: float | None = None


@dataclass
class Difference(Result):
    """What `diff` found."""

    names: tuple[str, str]
    sites: list[SiteDifference]
    tensors: list[TensorDifference]
    compared: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.sites and not self.tensors

    def as_dict(self) -> dict[str, Any]:
        return {"same": self.ok, **asdict(self)}

    def summary(self) -> Summary:
        sides = [f"in {name}" for name in self.names]
        tables: list[Summary] = []
        if self.sites:
            lines = [(site.name, site.a or "–", site.b or "–") for site in self.sites]
            tables.append([Table(("site", *sides), lines)])
        if self.tensors:
            heads = ("tensor", *sides, "elements that differ", "largest difference", "of largest")
            tables.append([Table(heads, [_cells(tensor) for tensor in self.tensors])])
        return apart([*tables, [self._verdict()]])

    def _verdict(self) -> Verdict:
        sites, tensors = self.compared
        if self.ok:
            return Verdict(f"same: {sites} sites, {tensors} tensors", "good")
        different = f"{len(self.sites)} of {sites} sites and {len(self.tensors)} of {tensors} tensors"
        return Verdict(f"DIFFERENT: {different}", "bad")


def _cells(tensor: TensorDifference) -> tuple[str, ...]:
    figures = [tensor.largest, tensor.relative]
    elements = "" if tensor.elements is None else f"{tensor.elements:,}"
    return (tensor.name, tensor.a, tensor.b, elements, *("" if x is None else f"{x:.2e}" for x in figures))


def diff(options: Diff, progress: Callable[..., object]) -> Difference:
    """The differences of two files: model files, or manifests in .json."""
    side = partial(read, allow=options.allow, trust=options.trust)
    return compared(*by_key(side, options.key, options.a, options.b))


def read(path: Path, *, key: str | None, allow: Sequence[str], trust: bool) -> Side:
    """What a model file or a manifest says."""
    if path.suffix == ".json":
        record = files.record(path)
        assert record is not None
        return Side(path.name, _by_name(record), dict(record.get("tensors", {})), None)
    content = files.look(path, key=key, allow=allow, trust=trust)
    described = manifest.describe(content.found) if isinstance(content.found, nn.Module) else content.manifest
    state = {name: tensor for name, tensor in content.state.items() if isinstance(tensor, Tensor)}
    return Side(
        path.name,
        None if described is None else _by_name(described),
        digests.of_tensors(state),
        state,
        tuple(content.notes),
    )


def _by_name(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["names"][0]: {key: entry.get(key) for key in manifest.TOLD} for entry in record["sites"]}


def compared(a: Side, b: Side) -> Difference:
    """Compare two sides. A file without a manifest, as an original's, has no sites."""
    known = bool(a.digests and b.digests)  # an older manifest has none, so its tensors can't be compared
    tensors = list(dict.fromkeys((*a.digests, *b.digests))) if known else []
    sites = list(dict.fromkeys((*(a.sites or {}), *(b.sites or {}))))
    return Difference(
        (a.name, b.name),
        list(_sites(a, b, sites)),
        list(_tensors(a, b, tensors)),
        (len(sites), len(tensors)),
        tuple(dict.fromkeys((*a.notes, *b.notes))),
    )


def _sites(a: Side, b: Side, names: list[str]) -> Iterator[SiteDifference]:
    for name in names:
        left, right = ((side.sites or {}).get(name) for side in (a, b))
        if left != right:
            yield SiteDifference(name, _site(left), _site(right))


def _site(entry: Mapping[str, Any] | None) -> str | None:
    """`BatchNorm2d -> l1, calibrated`."""
    if entry is None:
        return None
    gain = "" if entry["gain"] == "exact" else f", gain {entry['gain']}"
    layer = f", in {entry['layer']}" if entry["layer"] else ""
    return f"{entry['was']} -> {entry['to']}{gain}{layer}{', calibrated' if entry['calibrated'] else ''}"


def _tensors(a: Side, b: Side, names: list[str]) -> Iterator[TensorDifference]:
    for name in names:
        left, right = a.digests.get(name), b.digests.get(name)
        if left == right:
            continue
        values = [None if side.tensors is None else side.tensors.get(name) for side in (a, b)]
        shapes = ["–" if digest is None else _shape(value) for digest, value in zip((left, right), values, strict=True)]
        yield TensorDifference(name, shapes[0], shapes[1], *_amount(*values))


def _shape(tensor: Tensor | None) -> str:
    return "other bytes" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _amount(a: Tensor | None, b: Tensor | None) -> tuple[int | None, float | None, float | None]:
    """(elements that differ, largest |a - b|, that over the largest |b|), where both have the same shape and values."""
    if a is None or b is None or a.shape != b.shape or a.is_meta or b.is_meta or a.is_complex() or b.is_complex():
        return None, None, None
    left, right = (digests.plain(tensor).double() for tensor in (a, b))
    apart = ~((left == right) | (left.isnan() & right.isnan()))
    gap = torch.where(apart, (left - right).abs(), 0.0).nan_to_num(nan=math.inf)
    largest = float(gap.max()) if gap.numel() else 0.0
    size = float(right.abs().nan_to_num(nan=0.0).max()) if right.numel() else 0.0
    return int(apart.sum()), largest, largest / size if 0 < size < math.inf else None
