"""Which norm of an ONNX file a plugin takes and which its function body: as it must be, and as a parsed network has it.

>>> expected(proto, set(OPS))
{'norm': 'plugin'}

The parsers of TensorRT from 10.15 on, and of TensorRT-RTX 1.7, decide so:

    node                                       plugin registered   not registered
    function, no attribute plugin_namespace    function            function
    function and plugin_namespace              plugin              function
    no function body                           plugin              error

Older parsers take the function wherever there is one: export without bodies for those.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

from normrewrite.backends import onnx as nodes
from normrewrite.errors import NormRewriteError

Path = Literal["plugin", "function"]


def expected(proto: Any, registered: Collection[str]) -> dict[str, Path]:
    """By node of ours, who takes it where plugins for these operators are registered.

    Raises NormRewriteError for a node that nobody takes.
    """
    bodies = {function.name for function in proto.functions}
    norms = [node for node in proto.graph.node if node.domain == nodes.DOMAIN]
    bare = [node for node in norms if node.op_type not in bodies and node.op_type not in registered]
    if bare:
        raise NormRewriteError(
            f"node {nodes.name_of(bare[0])}: {bare[0].op_type} has no function body in the file, and no plugin is registered for "
            "it. Build with --plugins auto, or export with --bodies."
        )
    return {nodes.name_of(node): _path(node, bodies, registered) for node in norms}


def _path(node: Any, bodies: Collection[str], registered: Collection[str]) -> Path:
    asks = nodes.attribute(node, "plugin_namespace") is not None
    return "plugin" if node.op_type in registered and (asks or node.op_type not in bodies) else "function"


def found(layers: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """By node of ours, who took it. layers: (type, metadata) of every layer of a parsed network."""
    paths: dict[str, Path] = {}
    for kind, metadata in layers:
        if kind.startswith("PLUGIN"):
            paths |= dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]|]+)\]", metadata), "plugin")
        else:
            paths |= dict.fromkeys(re.findall(r"\| ([^|\]]+) \(NormRewrite\w+\)\]", metadata), "function")
    return paths


def check(wanted: dict[str, Path], paths: dict[str, Path]) -> dict[str, Path]:
    """The paths of the norms. Raises NormRewriteError where one was not taken by whom it should have been."""
    wrong = [name for name, path in wanted.items() if paths.get(name) != path]
    if wrong:
        raise NormRewriteError(
            f"{len(wrong)} norms are not where they should be: node {wrong[0]} was to be a {wanted[wrong[0]]}, and is "
            f"{paths.get(wrong[0], 'nowhere')}. A parser before TensorRT 10.15 takes the function body wherever there is one: "
            "export with --no-bodies for that.",
            exit_code=1,
        )
    return {name: paths[name] for name in wanted}
