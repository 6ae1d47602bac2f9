"""Weight norms: a layer's weight as direction times length, channel by channel, on torch.nn.utils.parametrize.

>>> layer = normalise_weight(conv, bounded=True)         # computes what conv computes; layer.weight is conv.weight
>>> layer.parametrizations.weight.original0              # v, the directions: what an optimiser sees, with original1, g

For convolutions, transposed convolutions and linear layers; channel i is an output channel, N of them, and w_i all the
weights that make it. With g absent where the form is strict:

    WeightNorm          w_i = g_i * v_i/||v_i||_p                              Salimans & Kingma, arXiv:1602.07868, eq. 2
    BoundedWeightNorm   w_i = rho * sqrt(N) * g_i/||g||_2 * v_i/||v_i||_p      Hoffer et al., arXiv:1803.01814, section 4,
    strict              w_i = rho * v_i/||v_i||_p                              which has no g; p = 1, inf: its section 5

Setting the weight sets v_i to norm 1, g to the norms (bounded: over their rms, which is rho), so that fp16 holds rows of
any size. A zero row gets an arbitrary direction and g_i = 0: it computes 0 exactly, and g_i still has a gradient.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from normrewrite.backends.families import statistics_dtype, wide
from normrewrite.errors import NormRewriteError
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import assemble, keep_wide, shallow

NORMS = (1.0, 2.0, float("inf"))


class WeightNorm(nn.Module):
    """w_i = g_i * v_i/||v_i||_p by output channel: the length of each channel's weights apart from their direction.

    >>> torch.nn.utils.parametrize.register_parametrization(conv, "weight", WeightNorm(conv))

    layer: Conv1-3d, ConvTranspose1-3d or Linear, any groups; only its layout is read. p: 1, 2 or inf. v: as the weight;
    g: (N,); both of the weight's dtype, computed in fp32 at least. Raises NormRewriteError for other layers and other p.
    """

    def __init__(self, layer: nn.Module, p: float = 2) -> None:
        super().__init__()
        if p not in NORMS:
            raise NormRewriteError(f"weight norm has p = 1, 2 or inf, got {p}.")
        if not isinstance(layer, _ConvNd | nn.Linear):
            raise NormRewriteError(f"weight norm is for convolutions and linear layers, got {type(layer).__name__}.")
        self.p = float(p)
        self.groups = layer.groups if isinstance(layer, _ConvNd) else 1
        self.transposed = isinstance(layer, _ConvTransposeNd)
        self.origin: Origin | None = None  # what the layer was before a rewrite

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        return self._scaled(v, self.norms(g))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(v, g) that give this weight back, to rounding."""
        vectors = self._by_channel(weight.double())  # squares of the smallest fp32 numbers are still there
        norms = self._norms(vectors)
        zero = norms == 0
        vectors = torch.where(zero, torch.ones_like(vectors), vectors)
        v: Tensor = (vectors / self._norms(vectors)).flatten(0, 1)
        return v.to(weight.dtype), self.gains(norms.flatten()).to(weight.dtype)

    def norms(self, g: Tensor) -> Tensor:
        """||w_i||_p of every channel, (N,), fp32 at least."""
        return wide(g)

    def gains(self, norms: Tensor) -> Tensor:
        """The g that gives these norms, (N,)."""
        return norms

    def _scaled(self, v: Tensor, norms: Tensor) -> Tensor:
        vectors = self._by_channel(wide(v))
        lengths = self._norms(vectors)
        weight: Tensor = (vectors * (norms.view_as(lengths) / lengths)).flatten(0, 1)
        return weight.to(v.dtype)

    def _by_channel(self, weight: Tensor) -> Tensor:
        """(groups, out/groups, in/groups, *kernel); transposed: (groups, in/groups, out/groups, *kernel)."""
        vectors: Tensor = weight.unflatten(0, (self.groups, -1))
        return vectors

    def _norms(self, vectors: Tensor) -> Tensor:
        """By channel, in group-major order as channels are: (groups, out/groups, 1, ...), transposed (groups, 1, ...)."""
        dims = [1 if self.transposed else 2, *range(3, vectors.dim())]
        norms: Tensor = torch.linalg.vector_norm(vectors, self.p, dims, keepdim=True)
        return norms

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class BoundedWeightNorm(WeightNorm):
    """w_i = rho * sqrt(N) * g_i/||g||_2 * v_i/||v_i||_p: the layer's norm stays at rho * sqrt(N), whatever is learned.

    >>> torch.nn.utils.parametrize.register_parametrization(conv, "weight", BoundedWeightNorm(conv))

    Arguments are WeightNorm's and `strict`: w_i = rho * v_i/||v_i||_p, without g, which keeps the weight's directions and
    sets every channel to the same norm. rho, a buffer of fp32 at least, is the rms of the channels' norms when the weight
    is set, and no parameter. With p = 2 the norm that stays is Frobenius's; otherwise the 2-norm of the channels' p-norms.
    """

    rho: Tensor

    def __init__(self, layer: nn.Module, p: float = 2, *, strict: bool = False) -> None:
        super().__init__(layer, p)
        self.strict = strict
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.register_buffer("rho", torch.ones((), dtype=statistics_dtype(weight.dtype), device=weight.device))

    def forward(self, v: Tensor, g: Tensor | None = None) -> Tensor:
        return self._scaled(v, self.rho.expand(self._channels(v)) if g is None else self.norms(g))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(v, g), or (v,) where strict; sets rho."""
        v, g = super().right_inverse(weight)
        return (v,) if self.strict else (v, g)

    def norms(self, g: Tensor) -> Tensor:
        g = wide(g)
        return g * (self.rho / _rms(g))

    def gains(self, norms: Tensor) -> Tensor:
        rho = _rms(norms)
        self.rho.copy_(rho)
        return norms / rho if rho > 0 else torch.ones_like(norms)

    def _channels(self, v: Tensor) -> int:
        return v.shape[1] * self.groups if self.transposed else v.shape[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rho={float(self.rho):.4g}{', strict' if self.strict else ''}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BoundedWeightNorm":
        return keep_wide(self, ["rho"], lambda: super(BoundedWeightNorm, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def normalise_weight(
    layer: nn.Module, *, bounded: bool, strict: bool = False, p: float = 2, origin: Origin | None = None
) -> nn.Module:
    """A copy of the layer whose weight is parametrised; it computes the same weight, to rounding (strict: only its rho).

    >>> twin = normalise_weight(conv, bounded=True, origin=remember(conv))

    The copy has the layer's attributes, training flag and bias (the same parameter), none of its hooks; v and g are new
    parameters. The layer is not altered. `origin` travels along, with a checksum that tells `unchanged` whether v, g, rho
    and bias still have these bits.
    """
    new: nn.Module = shallow(layer)
    new.training = layer.training
    norm = BoundedWeightNorm(layer, p, strict=strict) if bounded else WeightNorm(layer, p)
    parametrize.register_parametrization(new, "weight", norm)
    if origin is not None:
        norm.origin = origin
        casts = [_checksum(new), *(_checksum(new, dtype) for dtype in _CASTS)]
        norm.register_buffer("checksum", torch.stack(casts))
    return new


def weight_norm_of(layer: nn.Module) -> WeightNorm | None:
    """The parametrisation of the layer's weight, if it is one of ours."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    norm = layer.parametrizations["weight"][0]  # type: ignore[index]
    return norm if isinstance(norm, WeightNorm) else None


def gain_of(layer: nn.Module) -> nn.Parameter | None:
    """g of a layer with one of our weight norms, (N,); None where the form is strict or the layer has none."""
    if weight_norm_of(layer) is None:
        return None
    gain: nn.Parameter | None = getattr(layer.parametrizations["weight"], "original1", None)  # type: ignore[index]
    return gain


def remember(layer: nn.Module) -> Origin:
    """What `original` needs: the layer's class, attributes and copies of its parameters (None for a bias it has not)."""
    origin = Origin(layer, {})
    for name, parameter in layer._parameters.items():
        origin.tensors[name] = None if parameter is None else parameter.detach().clone()
    return origin


def original(layer: nn.Module) -> nn.Module | None:
    """The layer that `remember` saw, to the bit, with parameters of its own; None where no origin was kept.

    It learns what that layer did, and nothing where this one doesn't. It is what the layer was, not what it has learned since:
    ask `unchanged` first, and bake it otherwise.
    """
    norm = weight_norm_of(layer)
    if norm is None or norm.origin is None:
        return None
    learning = any(parameter.requires_grad for parameter in layer.parameters())
    parameters = {
        name: None if value is None else nn.Parameter(value.clone(), learning and name not in norm.origin.fixed)
        for name, value in norm.origin.tensors.items()
        if name != "trained"
    }
    old: nn.Module = assemble(norm.origin.kind, norm.origin.attributes, parameters, {})
    old.training = layer.training
    return old


def unchanged(layer: nn.Module) -> bool:
    """Whether v, g, rho and bias have the bits that `normalise_weight` gave them. False where it kept no origin."""
    checksum = getattr(weight_norm_of(layer), "checksum", None)
    return checksum is not None and bool((checksum == _checksum(layer)).any())


# A cast, too, leaves what was not trained: each of these has a checksum of its own.
_CASTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _checksum(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """crc32 of everything that is learned or fixed when the weight is set: two copies would cost the weight again.

    dtype: as it will be after a cast to it.
    """
    fixed = [value for name, value in layer.named_buffers() if name.endswith(".rho")]
    fixed = [value.to(dtype) for value in fixed] if dtype in (torch.float32, torch.float64) else fixed
    tensors = [*(tensor.to(dtype or tensor.dtype) for tensor in layer.parameters()), *fixed]
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return torch.tensor(crc, device=tensors[0].device)
