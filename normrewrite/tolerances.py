"""The one table of tolerances, by dtype, with reasons."""

import math
from dataclasses import dataclass

import torch

# Largest difference of two forms of the same function, in units of max(1, largest output). A per-channel affine takes
# about five roundings; the figures allow some twenty, that is 20 * eps of the dtype, rounded up.
SAME_FUNCTION: dict[torch.dtype, float] = {
    torch.float64: 1e-14,
    torch.float32: 5e-6,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-1,
}

# The same for a whole network, where roundings of a hundred layers add up and are amplified on the way; in units of the largest
# output itself.
SAME_NETWORK: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 4e-1,
}

FITTED = 2e-3  # where C(n) is a fitted formula, which errs by up to 5e-4 a norm


@dataclass(frozen=True)
class Limit:
    """When two forms of a network, the coarser in some precision, are within its tolerance.

    tolerance: of one number, in units of its output's largest. min_snr: in dB, of what an output tells: how it varies from
    input to input. min_agreement: share of inputs with the same class. least: the variation, in units of the output, below
    which a precision can't show it. constant: how far outputs may be apart that don't vary, in units of their size. small: rows
    and columns below this share of the output are held to as much of it, as rounding may come from larger numbers.
    """

    tolerance: float
    min_snr: float
    min_agreement: float
    least: float
    constant: float
    small: float = 1e-2


# Int8 has a step of 1/127 of each tensor's range and clips the largest 0.01 % of values, so a number may be off by a quarter of
# the largest, and two networks that have nothing in common may be no further apart: the floors decide. Trained ResNet-20,
# ResNet-56, MobileNetV2 and CREPE on real inputs have an SNR of 45 dB at least in fp16, 26 in bf16 and 15 in int8, and the same
# class for 100, 99.5 and 96.5 %; networks that have nothing in common have 3 dB at most, and ResNet-20 against ResNet-56, trained
# on the same images, 6. On noise, which moves their outputs by 10 to 24 %, they have 28 dB in fp16 and 8 in bf16 (below `least`);
# int8 may fall to 0, as its ranges are those of images.
LIMITS: dict[str, Limit] = {
    "fp64": Limit(SAME_NETWORK[torch.float64], min_snr=20, min_agreement=0, least=1e-10, constant=1e-9),
    "fp32": Limit(SAME_NETWORK[torch.float32], min_snr=20, min_agreement=0, least=3e-5, constant=1e-4),
    "fp16": Limit(SAME_NETWORK[torch.float16], min_snr=20, min_agreement=0.9, least=0.05, constant=5e-3),
    "bf16": Limit(SAME_NETWORK[torch.bfloat16], min_snr=10, min_agreement=0.75, least=0.15, constant=0.03),
    "int8": Limit(2.5e-1, min_snr=10, min_agreement=0.8, least=0.1, constant=0.02, small=1),
}


def worst(a: torch.Tensor, b: torch.Tensor, size: float = 1.0) -> float:
    """Largest |a - b| in units of max(size, largest |b|), in float64; NaN against NaN is no difference, NaN else infinite."""
    a, b = a.detach(), b.detach()
    gap = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
    if math.isfinite(gap):
        return gap / max(size, float(b.abs().max())) if gap else 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b[b.isfinite()].abs()
    gaps = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=math.inf)
    return float(gaps.max()) / max(size, float(finite.max()) if finite.numel() else 0.0)
