"""A network as people draw it: blocks in the order of execution, each a line of nodes, with what skips over some of them.

>>> [(block.name, [node.label for node in block.nodes]) for block in picture(model, names).blocks][1]
('layer1.0', ['3×3', 'bn1', 'relu', '3×3', 'bn2', '+', 'relu'])

Nodes are calls in the torch.fx graph, without those that only carry shapes about. Where the model can't be traced they are
its modules in order of registration, and nothing skips. A block is the largest module that holds few norms.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.fx import Node as FxNode

from normrewrite import sites
from normrewrite.nn.weights import weight_norm_of
from normrewrite.sites import graph
from normrewrite.sites.neighbours import LAYERS, is_layer

NORMS = 4  # a block holds at most so many norms,
NODES = 24  # and so many modules in all
ENTRY = -1  # where an edge begins that comes from the block before
Kind = Literal["site", "layer", "add", "other"]

# What moves tensors about without computing: not worth a node.
_PLUMBING = {
    *(
        "getitem",
        "getattr",
        "size",
        "dim",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "unsqueeze",
        "squeeze",
    ),
    *("floordiv", "to", "type", "chunk", "split", "unbind", "expand", "clone", "detach", "Identity", "Dropout"),
}
_SHORT = {"adaptive_avg_pool2d": "pool", "max_pool2d": "max-pool", "adaptiveavgpool2d": "pool", "maxpool2d": "max-pool"}


@dataclass(frozen=True)
class Node:
    """One call. label: as drawn; name: the module's, of a site its own; comes: from which nodes of its block (ENTRY: from the
    block before), and `far` from which blocks further back."""

    kind: Kind
    label: str
    name: str
    comes: tuple[int, ...]
    far: tuple[str, ...] = ()


@dataclass
class Block:
    """A run of nodes that belong to one module."""

    name: str
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """blocks: in the order of execution; untraceable: why that order is the modules' alone, if so."""

    blocks: list[Block]
    untraceable: str = ""


def picture(model: nn.Module, names: set[str]) -> Picture:
    """Draw `model`; names: of its sites."""
    if "" in names:
        return Picture([Block("", [Node("site", type(model).__name__, "", (ENTRY,))])])
    modules = sites.by_name(model)
    homes = _homes(modules, names)
    whole = {id(module) for name, module in modules.items() if name in names or _is_layer(module)}
    try:
        traced = graph.trace(model, whole, given=0)
    except graph.Untraceable as error:
        return Picture(_listed(modules, homes, names), str(error))
    return Picture(_Drawn(modules, homes, names).blocks(list(traced.graph.nodes)))


def _is_layer(module: nn.Module) -> bool:
    return is_layer(module) or weight_norm_of(module) is not None


def _homes(modules: dict[str, nn.Module], names: set[str]) -> dict[str, str]:
    """The block of each module: the largest one around it that is small enough; the root is none."""
    norms, sizes = Counter[str](), Counter[str]()
    for name, module in modules.items():
        for parent in _around(name):
            norms[parent] += name in names and not _is_layer(module)
            sizes[parent] += not module._modules
    small = {
        name for name in modules if name and norms[name] <= NORMS and sizes[name] <= NODES and modules[name]._modules
    }
    small -= names
    return {name: next((parent for parent in _around(name) if parent in small), "") for name in modules}


def _around(name: str) -> Iterator[str]:
    """`a.b.c` -> ``, `a`, `a.b`, `a.b.c`."""
    parts = name.split(".") if name else []
    yield from (".".join(parts[:i]) for i in range(len(parts) + 1))


@dataclass
class _Drawn:
    modules: dict[str, nn.Module]
    homes: dict[str, str]
    names: set[str]

    def blocks(self, nodes: list[FxNode]) -> list[Block]:
        shown = [node for node in nodes if self._is_shown(node)]
        runs: list[list[FxNode]] = []
        for node in shown:
            if not runs or self._home(runs[-1][0]) != self._home(node):
                runs.append([])
            runs[-1].append(node)
        place = {node: (i, j) for i, run in enumerate(runs) for j, node in enumerate(run)}
        drawn = []
        for i, run in enumerate(runs):
            block = Block(self._home(run[0]))
            for node in run:
                block.nodes.append(self._node(node, i, runs, place))
            drawn.append(block)
        return drawn

    def _node(self, node: FxNode, i: int, runs: list[list[FxNode]], place: dict[FxNode, tuple[int, int]]) -> Node:
        comes, far = [], []
        for source in _sources(node, place):
            run, j = place.get(source, (ENTRY, ENTRY))
            if run == i:
                comes.append(j)
            elif run >= i - 1 and source is not None and (run == ENTRY or source is runs[run][-1]):
                comes.append(ENTRY)
            else:
                far.append(self._home(runs[run][0]) or _called(source))
        kind, label, name = self._described(node)
        return Node(kind, label, name, tuple(dict.fromkeys(comes)), tuple(dict.fromkeys(far)))

    def _is_shown(self, node: FxNode) -> bool:
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        return str(node.target) in self.names or (_called(node) not in _PLUMBING and self._class(node) not in _PLUMBING)

    def _class(self, node: FxNode) -> str:
        return type(self.modules[str(node.target)]).__name__ if node.op == "call_module" else ""

    def _home(self, node: FxNode) -> str:
        if node.op == "call_module":
            return self.homes.get(str(node.target), "")
        stack: Any = node.meta.get("nn_module_stack") or {"": None}
        return self.homes.get(next(reversed(stack)), "")

    def _described(self, node: FxNode) -> tuple[Kind, str, str]:
        if node.op == "call_module":
            return _described(str(node.target), self.modules[str(node.target)], self.names)
        called = _called(node)
        return (
            ("add", "+", "add") if called in ("add", "iadd", "add_") else ("other", _SHORT.get(called, called), called)
        )


def _called(node: FxNode) -> str:
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2].strip("_")


def _sources(node: FxNode, place: dict[FxNode, tuple[int, int]]) -> Iterator[FxNode]:
    """The shown nodes, or inputs, that a node's arguments come from, through those that are not shown."""
    waiting, seen = list(node.all_input_nodes), set[FxNode]()
    while waiting:
        source = waiting.pop(0)
        if source in seen:
            continue
        seen.add(source)
        if source in place or source.op == "placeholder":
            yield source
        else:
            waiting += source.all_input_nodes


def _described(name: str, module: nn.Module, names: set[str]) -> tuple[Kind, str, str]:
    if name in names and not _is_layer(module):
        return "site", name.rpartition(".")[2], name
    if _is_layer(module) or isinstance(module, LAYERS):
        return ("site" if name in names else "layer"), _size(module), name
    label = type(module).__name__.lower()
    return "other", _SHORT.get(label, label), name


def _size(layer: Any) -> str:
    """`3×3`, `1×1 /2` with a stride, `linear`."""
    if isinstance(layer, nn.Linear):
        return "linear"
    kernel = "×".join(map(str, layer.kernel_size))
    stride = max(layer.stride)
    apart = " dw" if layer.groups > 1 and layer.groups == layer.in_channels else ""
    return f"{kernel}{apart}{f' /{stride}' if stride > 1 else ''}"


def _listed(modules: dict[str, nn.Module], homes: dict[str, str], names: set[str]) -> list[Block]:
    """Modules in order of registration, one after the other."""
    drawn: list[Block] = []
    for name, module in modules.items():
        inside = any(name.startswith(f"{site}.") for site in names)
        if (
            name not in names
            and (inside or module._modules or type(module).__name__ in _PLUMBING)
            and not _is_layer(module)
        ):
            continue
        if inside or any(_is_layer(modules[parent]) for parent in list(_around(name))[:-1] if parent in modules):
            continue
        if not drawn or drawn[-1].name != homes[name]:
            drawn.append(Block(homes[name]))
        kind, label, text = _described(name, module, names)
        drawn[-1].nodes.append(Node(kind, label, text, (len(drawn[-1].nodes) - 1,)))
    return drawn
