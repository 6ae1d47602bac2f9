"""Modules to nodes: each norm that measures at inference becomes one node of the exported graph.

>>> model, names = as_nodes(model)
>>> program = torch.onnx.export(model, inputs, dynamo=True)
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.backends import onnx
from normrewrite.backends.families import by_batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.tracing import OneNode
from normrewrite.norms import Gain
from normrewrite.norms import metric as row_of


class Node(OneNode):
    """A norm of normrewrite.nn as one node under torch.onnx.export; it has no other use.

    x: as the norm takes it. Statistics are those of x itself, for batch scope too.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.row, self.gain, self.eps = row_of(norm.metric), cast(Gain, norm.gain), norm.eps
        if self.eps is None:
            self.eps = torch.finfo(torch.float32).eps  # statistics are fp32 in a body
        self.centred = bool(getattr(norm, "centred", True))
        self.weight, self.bias = norm.weight, norm.bias
        self.layout = (by_batch, _as_input) if isinstance(norm, BatchNorm) else (norm.view, norm.from_view)
        self.tail = nn.Sequential(*(norm.get_submodule(name) for name in getattr(norm, "tail", ())))

    def forward(self, x: Tensor) -> Tensor:
        view, from_view = self.layout
        samples = view(x)
        groups, members = int(samples.shape[1]), int(samples.shape[2])
        weight, bias = _affine(self.weight, 1.0, groups, members, x), _affine(self.bias, 0.0, groups, members, x)
        name, attributes = f"{onnx.DOMAIN}::{onnx.operator(self.row)}", self._attributes(samples)
        y = torch.onnx.ops.symbolic(
            name, (samples, weight, bias), attributes, dtype=x.dtype, shape=samples.shape, version=1
        )
        return self.tail(from_view(y, x))  # type: ignore[no-any-return]

    def _attributes(self, samples: Tensor) -> dict[str, Any]:
        n: Any = samples.shape[2] * samples.shape[3]
        known = n if isinstance(n, int) else None  # a torch.SymInt where the export leaves sizes open
        return onnx.attributes(self.row, known, gain=self.gain, eps=self.eps, centred=self.centred)


def _as_input(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _affine(values: Tensor | None, default: float, groups: int, members: int, x: Tensor) -> Tensor:
    if values is None:
        return torch.full((groups, members, 1), default, dtype=x.dtype)
    return values.reshape(groups, members, 1)


def is_live(module: nn.Module, live_stats: bool) -> bool:
    """Whether a norm of ours measures at inference: of batch scope only on request, with running statistics or without."""
    return isinstance(module, RowNorm) or (live_stats and isinstance(module, BatchNorm))


def as_nodes(model: nn.Module, live_stats: bool = False) -> tuple[nn.Module, list[str]]:
    """The model in which live norms are nodes, changed in place unless it is a norm itself, and the names of the norms."""
    live_sites = sites.find(model, lambda module: is_live(module, live_stats))
    for site in live_sites:
        new = sites.replace(site, Node(site.module))
        model = new if site.module is model else model
    return model, [site.label for site in live_sites]
