"""Who computes a norm: one table, in order. The first that gives no reason why not computes the call.

>>> chosen(Call(x, "l1")).name                     # of a tensor on a CPU
'torch'
>>> with nr.kernels("torch"):                      # or NORMREWRITE_KERNELS=torch in the environment
...     model(x).sum().backward()                  # a backward chooses when it runs

    auto     the kernels where they serve a tensor: CUDA, compute capability 8.0 and newer, fp32, fp16 or bf16; else torch
    torch    torch's operators everywhere
    triton   the kernels, and an error with the reason where they can't serve; on a CPU through Triton's interpreter
    compiled on a CPU, what torch's compiler makes of dense metrics (backends/compiled.py); else as auto

Two kinds stand in the table. `Whole` ones differentiate themselves and are chosen where a norm is called, which compilers trace:
half arithmetic, several ranks, torch.func. `Halves` are chosen by the operators (operators.py) each time that they run, so that
compiled and exported graphs, too, follow the switch. Statistics over several processes are torch's, and so is eval but for a norm
with its ReLU, where no gradient is asked for.

A new one is a file and a line in the table. The file has

    why_not(call) -> reason | None                                   what it can't serve, in words; None: it computes this
    forward(call, weight, bias) -> y, mean, C * S, indices, signs    y as x; mean and C * S by channel, or (B, G), fp32 at least
    backward(call, g, weight, mean, spread, indices, signs) -> dx, dweight, dbias

with indices and signs as torch_batch.py and torch_sample.py give them: either half may be another's, as a backward chooses anew.
The line's name is a choice of `nr.kernels`; it says whether it is tried without being asked for (`unasked`), and whether it is an
error if it is asked for and can't (`strict`). One that computes ReLU and a residual in the same pass says so (`fused`), and takes
and gives what triton/serving.py does.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normrewrite.backends import compiled, half, plain, ranks, torch_batch, torch_sample
from normrewrite.backends.call import Call
from normrewrite.backends.context import here, setting
from normrewrite.backends.triton import serving
from normrewrite.errors import NormRewriteError, nearest
from normrewrite.norms import Gain, Metric

VARIABLE = "NORMREWRITE_KERNELS"


@dataclass(frozen=True)
class Whole:
    """normalise(call, weight, bias) -> y, mean, C * S: differentiable."""

    name: str
    why_not: Callable[[Call], str | None]
    normalise: Callable[[Call, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Halves:
    """A forward and a backward; see above."""

    name: str
    why_not: Callable[[Call], str | None]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    unasked: Callable[[Call], bool] = lambda call: True
    strict: bool = False
    affine: Callable[..., Tensor] | None = None
    fused: bool = False

    def tried(self, choice: str, call: Call) -> bool:
        return self.name in (choice, "torch") or (choice != "torch" and self.unasked(call))


BACKENDS = (
    Whole("half", half.why_not, half.of_call),
    Whole("ranks", ranks.why_not, ranks.of_call),
    Whole("plain", plain.why_not, plain.of_call),
    Halves(
        "triton",
        serving.why_not,
        serving.forward,
        serving.backward,
        unasked=lambda call: call.x.is_cuda,
        strict=True,
        affine=serving.affine,
        fused=True,
    ),
    Halves("compiled", compiled.why_not, compiled.forward, compiled.backward, unasked=lambda call: False),
    Halves("torch", torch_batch.why_not, torch_batch.forward, torch_batch.backward),
    Halves("torch", torch_sample.why_not, torch_sample.forward, torch_sample.backward),
)
WHOLE = tuple(backend for backend in BACKENDS if isinstance(backend, Whole))
HALVES = tuple(backend for backend in BACKENDS if isinstance(backend, Halves))
CHOICES = tuple(dict.fromkeys(("auto", "torch", *(backend.name for backend in HALVES))))


def asked(
    x: Tensor,
    metric: Metric | str,
    gain: Gain,
    eps: float,
    sample: bool = False,
    centred: bool = True,
    relu: bool = False,
    group: Any = None,
) -> Call:
    """The call where it is made: with half arithmetic and torch.func as they are here."""
    return Call(x, metric, gain, eps, sample, centred, relu, group, half.chosen(x), plain.transformed())


def whole(call: Call) -> Whole | None:
    """Who computes the call and differentiates it, too; None: the operators."""
    for backend in WHOLE:
        if backend.why_not(call) is None:
            return backend
    return None


def chosen(call: Call) -> Halves:
    """Who computes the call for an operator, under the user's choice. Raises NormRewriteError where that can't serve."""
    choice = choice_here()
    for backend in HALVES:
        if not backend.tried(choice, call):
            continue
        reason = backend.why_not(call)
        if reason is None:
            return backend
        if backend.strict and backend.name == choice:
            raise NormRewriteError(
                f"{VARIABLE}={choice}: {reason}. Choose auto to let torch compute what the kernels can't."
            )
    raise AssertionError("torch computes every norm")


def fused_by_choice() -> bool:
    """Whether one is asked for by name that computes ReLU in the same pass."""
    choice = choice_here()
    return any(backend.fused and backend.name == choice for backend in HALVES)


# --- the user's choice ---------------------------------------------------------------------------------------------------------


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Choose `auto`, `torch`, `triton` or `compiled` for the block, in this context, whatever the environment says.

    Autograd runs backwards of CUDA tensors in threads of its own: set NORMREWRITE_KERNELS to choose for those.
    """
    with setting(kernels=_checked(choice, "kernels()")):
        yield


def choice_here() -> str:
    return here.now.kernels or _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise NormRewriteError(f"{where}: unknown {choice!r}.{nearest(choice, CHOICES)} Known: {', '.join(CHOICES)}.")
    return choice
