"""What a comparison of two networks is: how far their outputs are apart, and what that amounts to.

>>> output = OutputDifference("logits")
>>> output.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.5]]))
>>> output.max_abs, output.agreeing
(0.5, 1)
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normrewrite.diagnostics.outputs import has_classes
from normrewrite.diagnostics.sums import Columns, Samples, Slices, masked
from normrewrite.errors import NormRewriteError
from normrewrite.results import Mood, Result, Summary, Table, Verdict
from normrewrite.tolerances import Limit

_ENOUGH = 8  # numbers that vary, for a part of an output to be judged by its variation


@dataclass
class OutputDifference:
    """One output of A against B. Signal and noise are sums of squares; B is the signal.

    whole: numbers are whole, and compared exactly: `differing` of them differ. columns: by the shape of one sample, the sums
    over samples, which tell how the output varies from one to another; squares are in units of `unit`, so that none overflows.
    Constants that stand for masked numbers count in none.
    """

    name: str
    max_abs: float = 0.0
    largest: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0  # samples that have classes
    agreeing: int = 0
    finite: int = 0  # numbers that at least one of the two gave
    right: list[int] = field(default_factory=lambda: [0, 0])
    labelled: int = 0  # of the rows
    numbers: int = 0
    nan: int = 0  # in both
    whole: bool = True
    differing: int = 0
    unit: float = 0.0
    columns: dict[tuple[int, ...], Columns] = field(default_factory=dict)
    by_sample: Samples = field(default_factory=Samples)

    @property
    def max_rel(self) -> float:
        """Largest difference in units of the largest output."""
        return self.max_abs / self.largest if self.largest else self.max_abs

    @property
    def snr_db(self) -> float:
        return self._decibels(self.signal)

    def _decibels(self, signal: float) -> float:
        if not self.noise:
            return math.inf
        return _decibels(signal / self.noise)

    def variation_db(self, limit: Limit) -> float:
        """Signal to noise of what the output tells: how it varies from row to row; two networks may well have the rest of its
        size in common. Where it varies less than the precision can show, all its variation counts; of a constant there is
        nothing but its size, which has `limit.min_snr` where it agrees to `limit.constant`.
        """
        columns = self.columns.values()
        count, total = (
            sum(float(values.sum()) for values in sums)
            for sums in zip(*((c.count, c.total) for c in columns), strict=True)
        )
        by_sample = sum(float(column.variation.sum()) for column in columns)
        whole = self.signal - total**2 / max(count, 1)
        for variation, least in ((by_sample, limit.least), (whole, limit.least / 10)):
            if variation > least**2 * self.signal:
                return self._decibels(variation)
        return limit.min_snr + self._decibels(limit.constant**2 * self.signal)

    @property
    def judged(self) -> bool:
        """Whether every row has a label that its classes can have."""
        return 0 < self.rows == self.labelled

    def agreement(self, limit: Limit) -> float | None:
        """Share of rows with the same class, or with two classes so close that the precision can't tell them; None where there
        are no classes."""
        if not self.rows:
            return None
        return int((torch.cat(self.by_sample.short) <= limit.constant).sum()) / self.rows

    def part_faults(self, limit: Limit) -> list[str]:
        """What is wrong with single rows and columns: the larger ones tell nothing of the others."""
        faults = [_sample_fault(self.by_sample, self.largest, limit)]
        faults += [_column_fault(part, limit) for columns in self.columns.values() for part in columns.slices()]
        return [fault for fault in faults if fault]

    def add(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> None:
        if a.shape != b.shape:
            raise NormRewriteError(
                f"output {self.name}: shapes {tuple(a.shape)} and {tuple(b.shape)}, so there is nothing to compare."
            )
        if not any(values.is_floating_point() or values.is_complex() for values in (a, b)):
            self.differing += int((a.to(torch.int64) != b.to(torch.int64)).sum())
        else:
            self.whole = False
        is_complex = a.is_complex() or b.is_complex()
        a, b = _real(a, b)
        none = a.isnan() & b.isnan()
        gap = torch.where(none | (a == b), 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        self.numbers += a.numel()
        self.nan += int(none.sum())
        self.finite += int((a.isfinite() | b.isfinite()).sum())
        self.max_abs = max(self.max_abs, float(gap.max()) if gap.numel() else 0.0)
        counted = b.isfinite() & ~masked(a, b)
        signal = torch.where(counted, b, 0.0)
        self.largest = max(self.largest, float(signal.abs().max()) if b.numel() else 0.0)
        self._sum(signal, gap, counted)
        if has_classes(a) and not self.whole and not is_complex:
            fits = labels is not None and len(labels) == len(a) > 0 and int(labels.max()) < a.shape[1]
            self._classes(a.argmax(1), b.argmax(1), labels if fits else None)
            self.by_sample.add_classes(a, b, signal.abs().amax(1))

    def _sum(self, b: Tensor, gap: Tensor, counted: Tensor) -> None:
        b, gap, counted = (values if values.dim() else values[None] for values in (b, gap, counted))
        self.by_sample.add(b, gap)
        self.unit = self.unit or 2.0 ** max(-1000, min(1000, math.frexp(self.largest)[1] if self.largest else 0))
        b, gap = b / self.unit, gap / self.unit
        shape = tuple(b.shape[1:])
        if shape not in self.columns:
            self.columns[shape] = Columns.of(torch.empty(shape))
        self.columns[shape].add(b, gap, counted)
        self.signal += float((b * b).sum())
        self.noise += float((gap * gap).sum())

    def _classes(self, a: Tensor, b: Tensor, labels: Tensor | None) -> None:
        self.rows += len(a)
        self.agreeing += int((a == b).sum())
        self.labelled += 0 if labels is None else len(a)
        if labels is not None:
            self.right = [self.right[0] + int((a == labels).sum()), self.right[1] + int((b == labels).sum())]

    def cells(self, limit: Limit, labelled: bool) -> tuple[str, ...]:
        """As a line below `Comparison.head`."""
        top1 = [f"{100 * right / self.rows:.2f} %" if self.judged else "" for right in self.right if labelled]
        agreement = self.agreement(limit)
        same = "" if agreement is None else f"{100 * agreement:.2f} %"
        snr = (f"{self.snr_db:.1f}", f"{self.variation_db(limit):.1f}")
        return (self.name, f"{self.max_abs:.2e}", f"{self.max_rel:.2e}", *snr, same, *top1)

    def as_dict(self, limit: Limit, labelled: bool) -> dict[str, Any]:
        snr, variation = (x if math.isfinite(x) else None for x in (self.snr_db, self.variation_db(limit)))
        record: dict[str, Any] = {"name": self.name, "max_abs": self.max_abs, "max_rel": self.max_rel, "snr_db": snr}
        record |= {"variation_snr_db": variation}
        if self.whole:
            record["differing"] = self.differing
        if self.rows:
            record["agreement"] = self.agreement(limit)
        if self.judged and labelled:
            record["top1"] = [right / self.rows for right in self.right]
        return record


def _real(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """In float64; of complex numbers the two parts."""
    if a.is_complex() or b.is_complex():
        a, b = (torch.view_as_real(values.resolve_conj().to(torch.complex128)) for values in (a, b))
    return a.double(), b.double()


@dataclass
class Comparison(Result):
    """What `verify` found.

    limit: of one number, in units of its output's largest, and floors of signal to noise and of agreement; precision: whose
    they are. given: whether others were asked for, wider than the precision's own. left: what was not compared.
    """

    outputs: list[OutputDifference]
    limit: Limit
    precision: str
    labelled: bool
    inputs: int
    given: bool = False
    left: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        return self.limit.tolerance

    @property
    def max_abs(self) -> float:
        return max(output.max_abs for output in self.outputs)

    @property
    def snr_db(self) -> float:
        return min(output.snr_db for output in self.outputs)

    @property
    def variation_db(self) -> float:
        return min(output.variation_db(self.limit) for output in self.outputs)

    @property
    def agreement(self) -> float | None:
        shares = [output.agreement(self.limit) for output in self.outputs]
        return min((share for share in shares if share is not None), default=None)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[str]:
        """Why the two are different, output by output."""
        return [f"{output.name}: {fault}" for output in self.outputs for fault in _faults(output, self.limit)]

    @property
    def exact(self) -> bool:
        """Whether what was compared was so in full precision, so that agreement is sameness."""
        return not self.given and (self.precision in ("fp32", "fp64") or all(output.whole for output in self.outputs))

    def as_dict(self) -> dict[str, Any]:
        floors = {"min_snr": self.limit.min_snr, "min_agreement": self.limit.min_agreement}
        return {
            "ok": self.ok,
            "precision": self.precision,
            "tolerance": self.tolerance,
            **floors,
            "inputs": self.inputs,
            "outputs": [output.as_dict(self.limit, self.labelled) for output in self.outputs],
            "not_compared": self.left,
            "verdict": self.verdict,
        }

    @property
    def word(self) -> str:
        if not self.ok:
            return "DIFFERENT"
        if self.exact:
            return "same function in what was compared" if any(map(_is_something, self.left)) else "same function"
        return "within the tolerance given" if self.given else f"within {self.precision}'s tolerance"

    @property
    def verdict(self) -> str:
        figures = f"largest difference {self.max_abs:.2e} over {self.inputs} inputs, tolerance {self.tolerance:g}"
        left = [f"not compared: {', '.join(self.left)}"] if self.left else []
        return "; ".join([f"{self.word}: {figures} of the largest output", *self._floors(), *left])

    @property
    def mood(self) -> Mood:
        """Agreement within a tolerance that was asked for is no judgement of ours."""
        if not self.ok:
            return "bad"
        return "plain" if self.given and not self.exact else "good"

    def _floors(self) -> list[str]:
        """What else decided."""
        if not self.ok:
            return self.faults[:4]
        if self.exact:
            return []
        floors = [f"SNR of variation {self.variation_db:.1f} dB, {self.limit.min_snr:g} needed"]
        if self.agreement is not None:
            floors.append(f"same class {100 * self.agreement:.1f} %, {100 * self.limit.min_agreement:g} needed")
        return floors

    def rows(self) -> list[tuple[str, ...]]:
        return [output.cells(self.limit, self.labelled) for output in self.outputs]

    @property
    def head(self) -> tuple[str, ...]:
        labelled = ("top-1 of A", "top-1 of B") if self.labelled else ()
        return ("output", "max difference", "relative", "SNR (dB)", "of variation", "same class", *labelled)

    def summary(self) -> Summary:
        return [Table(self.head, self.rows()), Verdict(self.verdict, self.mood)]


def _is_something(left: str) -> bool:
    return not left.endswith("(NoneType)")


def _faults(output: OutputDifference, limit: Limit) -> list[str]:
    if output.whole:
        return [f"{output.differing} of {output.numbers} whole numbers differ"] if output.differing else []
    faults = []
    if output.max_abs > limit.tolerance * output.largest:
        faults.append(f"{output.max_rel:.2g} of the largest output, {limit.tolerance:g} allowed")
    if output.variation_db(limit) < limit.min_snr:
        faults.append(f"SNR of variation {output.variation_db(limit):.1f} dB, {limit.min_snr:g} needed")
    agreement = output.agreement(limit)
    if agreement is not None and agreement < limit.min_agreement and (1 - agreement) * output.rows > 1.5:
        # one may always lie between two classes
        faults.append(f"same class {100 * agreement:.1f} %, {100 * limit.min_agreement:g} needed")
    return faults or output.part_faults(limit)


def _part_snr(limit: Limit) -> float:
    """Of a part of an output: fewer decibels, as few numbers scatter more; what has nothing in common has -3."""
    return min(limit.min_snr, 0.3 * limit.min_snr)


def _sample_fault(samples: Samples, largest: float, limit: Limit) -> str:
    """Rows with a number off by more than the tolerance of the row's own largest, of a median row's where it is smaller, as it
    may be so by cancellation; or half of the rows with noise near their size."""
    size, gap, signal, noise = samples.all()
    if not size.numel():
        return ""
    floor = max(float(size.median()), limit.small * largest)
    off = int((gap > limit.tolerance * size.clamp_min(floor)).sum())
    if off:
        return f"{off} of {len(size)} rows off by more than {limit.tolerance:g} of their largest"
    noisy = int(((noise > 0) & (10 * torch.log10(signal / noise) < _part_snr(limit))).sum())
    return f"{noisy} of {len(size)} rows with an SNR below {_part_snr(limit):g} dB" if 2 * noisy > len(size) else ""


def _column_fault(columns: Slices, limit: Limit) -> str:
    """Columns with a number off by more than the tolerance; or columns of one size, whose noise is near their variation, where
    they vary by more than the precision can't show."""
    size, gap = columns.largest, columns.gap
    floor = max(float(size.median()), limit.small * float(size.max()))
    off = int((gap > limit.tolerance * size.clamp_min(floor)).sum())
    if off:
        return f"{off} of {len(size)} columns off by more than {limit.tolerance:g} of their largest"
    for freedom, squares, variation, noise in columns.of_one_size():
        seen = (limit.small * float(size.max())) ** 2 * freedom  # 8 bits have one step for large and small columns
        shown = freedom >= _ENOUGH and variation > limit.least**2 * max(squares, seen)
        if shown and noise and _decibels(variation / noise) < _part_snr(limit):
            return f"some columns have an SNR of variation of {_decibels(variation / noise):.1f} dB, {_part_snr(limit):g} needed"
    return ""


def _decibels(ratio: float) -> float:
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else -math.inf
