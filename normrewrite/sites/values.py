"""What the values of a trace answer to code that asks for their class: what they would be if the network ran.

torch.fx's own proxies are no tensors, and `if isinstance(x, torch.Tensor)` would take the other branch without a word.
"""

import operator
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.proxy import Attribute, Proxy

_MEMBERS: dict[object, type] = {"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device}
_CALLS: dict[str, type] = {
    **dict.fromkeys(("dim", "ndimension", "numel", "nelement", "element_size"), int),
    **dict.fromkeys(("chunk", "split", "unbind", "tensor_split", "topk", "sort"), tuple),
}
_TUPLES = (nn.RNNBase, nn.MultiheadAttention)


class Value(Proxy):
    """A proxy that is, to all but torch.fx, what it stands for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _kind_of(self) if _is_users(sys._getframe(1)) else type(self)

    @property
    def _is_param(self) -> bool:
        """What isinstance(x, nn.Parameter) reads of a tensor."""
        return self.node.op == "get_attr"

    def __getattr__(self, k: str) -> Attribute:
        return Member(self, k)


class Member(Value, Attribute):
    """An attribute or a method, as in `x.shape`; no node before it is read."""

    def __init__(self, root: Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)


def _is_users(frame: FrameType | None) -> bool:
    """Whether code asks that is neither torch's nor ours; `torch.is_tensor` asks for its caller."""
    while frame is not None and (
        frame.f_code is torch.is_tensor.__code__ or frame.f_code.co_name == "__instancecheck__"
    ):
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__", "")) if frame is not None else ""
    return name.partition(".")[0] not in ("torch", "normrewrite")


def _kind_of(value: Proxy) -> type:
    if type(value) is Member:
        return _MEMBERS.get(value.attr, Tensor)
    return _kind(value.node, getattr(value.tracer, "root", None))


def _kind(node: Node, root: Any) -> type:
    if node.op == "get_attr":
        return nn.Parameter
    if node.op == "call_module":
        return tuple if isinstance(root.get_submodule(str(node.target)), _TUPLES) else Tensor
    if node.target is getattr:
        return _MEMBERS.get(node.args[1], Tensor)
    if node.target == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        of, item = _kind(node.args[0], root), node.args[1]
        return (of if isinstance(item, slice) else int) if of is torch.Size else Tensor
    if getattr(node.target, "__module__", "") in ("_operator", "math"):
        return _of_numbers(node, root)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _CALLS.get(name, Tensor) if node.op.startswith("call") else Tensor


def _of_numbers(node: Node, root: Any) -> type:
    """What an operator gives: a number of numbers, else a tensor."""
    kinds = {_kind(value, root) if isinstance(value, Node) else type(value) for value in node.args}
    if not kinds <= {int, float}:
        return Tensor
    exact = kinds == {int} and node.target is not operator.truediv
    return int if exact and getattr(node.target, "__module__", "") == "_operator" else float
