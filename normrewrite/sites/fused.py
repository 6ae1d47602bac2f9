"""Torch's fused transformer layers: in eval they read their norms' weights past the norms' own forward.

>>> step_aside_(model, [old, new])          # after norms were put in, or taken out again

Without this, a TransformerEncoderLayer whose norms are ours would go on computing torch's layer norm in eval, silently.
Each such module has an attribute that keeps it off the fused path; the value it had comes back with torch's norms.
"""

from collections.abc import Iterable

from torch import nn

from normrewrite.nn.sample import RowNorm

_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_KEPT = "fused_before_rewrite"


def step_aside_(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Keep every transformer module that holds one of our norms off the fused path, and let the others back on it.

    changed: the norms that were put in or taken out; where none is ours within a sample, all stays as it is.
    """
    if not any(isinstance(norm, RowNorm) for norm in changed):
        return
    for module in model.modules():
        switch = next((name for cls, name in _SWITCHES.items() if isinstance(module, cls)), None)
        if switch is None:
            continue
        ours = any(isinstance(part, RowNorm) for part in module.modules())
        if ours and _KEPT not in vars(module):
            setattr(module, _KEPT, getattr(module, switch))
            setattr(module, switch, False)
        elif not ours and _KEPT in vars(module):
            setattr(module, switch, vars(module).pop(_KEPT))
