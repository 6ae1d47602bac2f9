"""Lists of what is in a module, `parameters()` and its like, in a function's syntax tree: what the code does with them.

>>> is_innocent(call, above, tree)      # next(self.parameters()).device
True
"""

import ast
from collections.abc import Mapping

Above = Mapping[ast.AST, ast.AST]
_FREE = frozenset(
    {
        "device",
        "dtype",
        "is_cuda",
        "is_meta",
        "is_floating_point",
        "is_complex",
        "requires_grad",
        "requires_grad_",
        "grad",
    }
)


def is_innocent(call: ast.Call, above: Above, tree: ast.AST) -> bool:
    """Whether of each tensor that a call lists no more is read than where it is and of what type."""
    match above.get(call):
        case ast.Call(func=ast.Name(id="next")) as following:
            return _is_free(following, above, tree)
        case ast.For(target=target, iter=loop) | ast.comprehension(target=target, iter=loop) if loop is call:
            return all(_is_free_name(name, above, tree) for name in _tensors(target, call))
        case ast.Subscript():  # looked at by its name
            return True
    return False


def _tensors(target: ast.expr, call: ast.Call) -> list[ast.expr]:
    named = isinstance(call.func, ast.Attribute) and (call.func.attr.startswith("named_"))
    return target.elts[1:] if named and isinstance(target, ast.Tuple) else [target]


def _is_free(node: ast.AST, above: Above, tree: ast.AST) -> bool:
    match above.get(node):
        case ast.Attribute(attr=name):
            return name in _FREE
        case ast.Assign(targets=[ast.Name() as target]) | ast.NamedExpr(target=target):
            return _is_free_name(target, above, tree)
    return False


def _is_free_name(target: ast.expr, above: Above, tree: ast.AST) -> bool:
    if not isinstance(target, ast.Name):
        return False
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == target.id]
    uses = [above.get(node) for node in read if isinstance(node.ctx, ast.Load)]
    return all(isinstance(use, ast.Attribute) and use.attr in _FREE for use in uses)


def is_counted(call: ast.Call, above: Above) -> bool:
    """Whether what matters is how many there are, `len(list(...))`, or any is picked out, `list(...)[0]`."""
    outer = above.get(call)
    listed = (
        isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in ("list", "tuple", "dict")
    )
    match above.get(outer) if listed and outer is not None else None:
        case ast.Call(func=ast.Name(id="len" | "bool" | "any")) | ast.Compare() | ast.Return():
            return True
        case ast.If() | ast.IfExp() | ast.UnaryOp() | ast.BoolOp():
            return True
    return False
