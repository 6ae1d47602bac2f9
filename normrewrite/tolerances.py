"""The one table of tolerances, by dtype, with reasons."""

import math

import torch

# Largest difference of two forms of the same function, in units of max(1, largest output). A per-channel affine takes
# about five roundings; the figures allow some twenty, that is 20 * eps of the dtype, rounded up.
SAME_FUNCTION: dict[torch.dtype, float] = {
    torch.float64: 1e-14,
    torch.float32: 5e-6,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-1,
}

# The same for a whole network, where roundings of a hundred layers add up and are amplified on the way.
SAME_NETWORK: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 4e-1,
}

# The same for an ONNX file, by its precision. Int8 has a step of 1/127 of each tensor's range and clips the largest 0.01 %
# of values, so an output may be off by a quarter of the largest; whether that matters is for top-1 to tell, not for this.
SAME_DEPLOYED: dict[str, float] = {
    "fp32": SAME_NETWORK[torch.float32],
    "fp16": SAME_NETWORK[torch.float16],
    "bf16": SAME_NETWORK[torch.bfloat16],
    "int8": 2.5e-1,
}
FITTED = 2e-3  # where C(n) is a fitted formula, which errs by up to 5e-4 a norm


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
