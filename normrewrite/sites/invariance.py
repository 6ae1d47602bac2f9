"""Which weights a network's function doesn't depend on the scale of: those of layers that only feed norms.

>>> found = scale_invariant(model)
>>> [weight.name for weight in found.weights]
['conv1.weight', 'layer1.0.conv1.weight']
>>> found.left["fc"]
'goes into output, no norm'

Such a weight has a direction and nothing else; its norm sets how far a step of the optimiser turns it (weight_decay.py).
What shares statistics shares a scale: each output channel has its own in front of a batch or instance norm, all channels
of a group in front of a group norm, the whole weight in front of a layer norm. In training, and up to eps.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normrewrite import sites
from normrewrite.backends.families import wide
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.nn.parts import require_module
from normrewrite.nn.renorm import BatchRenorm
from normrewrite.sites import graph, read
from normrewrite.sites.modes import evaluating
from normrewrite.sites.neighbours import has_hooks, is_layer
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SampleKind


@dataclass(frozen=True)
class InvariantWeight:
    """A layer's weight, in `blocks` of output channels that can be scaled each by itself without a change of the function."""

    name: str
    layer: Any
    blocks: int

    @property
    def parameter(self) -> nn.Parameter:
        weight: nn.Parameter = self.layer.weight
        return weight

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The 2-norm of each block, (blocks,), fp32 at least."""
        vectors = wide(self.parameter.detach())
        if isinstance(self.layer, _ConvTransposeNd):  # (in, out/groups, *): channels first
            vectors = vectors.unflatten(0, (self.layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        norms: Tensor = torch.linalg.vector_norm(vectors.reshape(self.blocks, -1), dim=1)
        return norms

    def expanded(self, values: Tensor) -> Tensor:
        """(blocks,) to meet the weight by broadcasting."""
        by_channel = values.repeat_interleave(out_channels(self.layer) // self.blocks)
        positions = (1,) * (self.parameter.dim() - 2)
        if not isinstance(self.layer, _ConvTransposeNd):
            return by_channel.view(-1, 1, *positions)
        of_group = by_channel.view(self.layer.groups, -1)
        return of_group.repeat_interleave(self.layer.in_channels // self.layer.groups, 0).view(
            self.layer.in_channels, -1, *positions
        )


@dataclass(frozen=True)
class Invariance:
    """weights: those found; left: by layer, why it is not among them; untraceable: torch.fx's reason, where all are left."""

    weights: tuple[InvariantWeight, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    untraceable: str = ""


def scale_invariant(model: nn.Module) -> Invariance:
    """The weights of convolutions and linear layers whose output goes into norms alone, by the model's torch.fx graph.

    >>> [weight.name for weight in scale_invariant(model).weights]
    ['conv1.weight', 'layer1.0.conv1.weight']

    Norms are torch's, ours and what `recognise` finds, of batch, group, layer, instance or rms scope. Not among them: weights
    in front of Batch Renorm or a frozen norm, which measure by fixed statistics; parametrised and shared weights; layers
    with a bias that the norm doesn't subtract. Nothing is changed, and nothing raised: a model that can't be traced has none.
    """
    require_module(model)
    layers = sites.find(model, is_layer)
    try:
        with evaluating(model):
            ways = graph.traces(model)
    except graph.Untraceable as error:
        return Invariance(left={site.name: str(error) for site in layers}, untraceable=str(error))
    shared = sites.shared_parameters(model)
    past = {key for way in ways for key in graph.read_past_modules(way)}
    weights, left = [], {}
    for site in layers:
        refusal = Refusal("shares its weight") if id(site.module.weight) in shared else None
        refusal = Refusal("its weight is read elsewhere too") if id(site.module.weight) in past else refusal
        blocks = refusal or _agreed([_blocks_of_layer(way, site.module) for way in ways])
        if isinstance(blocks, Refusal):
            left[site.name] = str(blocks)
        else:
            weights.append(InvariantWeight(f"{site.name}.weight" if site.name else "weight", site.module, blocks))
    return Invariance(tuple(weights), left)


def param_groups(model: nn.Module, weight_decay: float = 0.0, rest: float | None = None) -> list[dict[str, Any]]:
    """Groups for any torch optimiser: scale-invariant weights, then all other parameters.

    >>> optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.0, rest=5e-4), lr=0.1, momentum=0.9)

    weight_decay: of the scale-invariant ones; rest: of the others (None: the same). Each group says which it is under
    `scale_invariant`; an empty one is left out. A model that torch.fx can't trace has one group, of the others:
    `scale_invariant(model).untraceable` says why.
    """
    invariant = {id(weight.parameter) for weight in scale_invariant(model).weights}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "scale_invariant": True},
        {"params": [], "weight_decay": weight_decay if rest is None else rest, "scale_invariant": False},
    ]
    for parameter in model.parameters():
        groups[id(parameter) not in invariant]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def out_channels(layer: Any) -> int:
    channels: int = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    return channels


def _blocks_of_layer(graph_module: GraphModule, layer: nn.Module) -> int | Refusal:
    """How many blocks of channels have a scale of their own, or why none has."""
    calls = [node for node in graph_module.graph.nodes if graph.module_of(graph_module, node) is layer]
    if not calls:
        return Refusal("is not called in the graph")
    if has_hooks(layer):
        return Refusal("has hooks")
    readers = [reader for call in calls for reader in call.users]
    return _agreed([_blocks_of_reader(graph_module, layer, reader) for reader in readers])


def _agreed(answers: list[int | Refusal]) -> int | Refusal:
    """What is so whichever arguments forward is given."""
    refusals = [blocks for blocks in answers if isinstance(blocks, Refusal)]
    return refusals[0] if refusals else math.gcd(*(blocks for blocks in answers if isinstance(blocks, int)))


def _blocks_of_reader(graph_module: GraphModule, layer: nn.Module, reader: Node) -> int | Refusal:
    norm = graph.module_of(graph_module, reader)
    if norm is None or not (sites.is_norm(norm) or sites.is_sample_norm(norm)):
        return Refusal(f"goes into {reader.target if isinstance(reader.target, str) else reader.name}, no norm")
    channels = out_channels(layer)
    blocks = _blocks(norm, channels)
    if isinstance(blocks, Refusal):
        return Refusal(f"goes into {reader.target}, which {blocks}")
    if channels % blocks or (sites.is_norm(norm) and channels != blocks):
        return Refusal(f"goes into {reader.target}, whose channels are not its own")
    centred = blocks == channels and getattr(norm, "centred", True)
    if layer.bias is not None and not centred:
        return Refusal(f"has a bias, which {reader.target} doesn't subtract")
    return blocks


def _blocks(norm: Any, channels: int) -> int | Refusal:
    """How many blocks of channels the norm measures apart."""
    kind = read(norm)
    if isinstance(kind, Refusal):
        return kind
    if isinstance(kind, SampleKind):
        return {"instance": channels, "group": kind.groups}.get(kind.scope, 1)
    if issubclass(kind.cls, FrozenBatchNorm | BatchRenorm):
        return Refusal("measures by fixed statistics")
    return len(norm.running_mean) if norm.running_mean is not None else int(norm.num_features)
