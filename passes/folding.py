"""A network folded whole, for deployment: weight norms baked, batch norms gone into their neighbours or an affine by channel.

>>> plain, outcome, notes = fold(twin, example_inputs)
"""

from collections.abc import Sequence

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import deepcopy
from normrewrite.nn.stand_in import StandIn
from normrewrite.nn.weights import weight_norm_of
from normrewrite.passes.bake import bake_
from normrewrite.passes.fold_affine import FoldAffine, Outcome
from normrewrite.passes.fold_offset import FoldOffset
from normrewrite.sites import graph


def fold(
    model: nn.Module, example_inputs: Sequence[Tensor] | None = None, *, forwards: bool = True
) -> tuple[nn.Module, Outcome, list[str]]:
    """A copy of the model in eval with its norms folded away, where each went, and notes on what could not be done.

    forwards: into the layer behind, too, which then reads another activation. A model that torch.fx can't trace keeps an
    affine by channel in the place of each norm.
    """
    copied = deepcopy(model).cpu().eval()
    if any(weight_norm_of(module) is not None for module in copied.modules()):
        bake_(copied)
    copied, notes = _with_offsets_folded(copied, example_inputs)
    rewrite = FoldAffine(example_inputs, forwards=forwards)
    try:
        count = None if example_inputs is None else len(example_inputs)
        traced = graph.trace(copied, given=count)
    except graph.Untraceable as error:
        whole, _ = rewrite.apply(copied)
        return whole, rewrite.outcome, [*notes, f"norms are not folded into their neighbours: {error}"]
    if traced is not copied:
        sites.carry_over(copied, traced)  # hooks around the model's own forward are no part of the trace
    return rewrite(traced).graph_module, rewrite.outcome, notes


def _with_offsets_folded(model: nn.Module, example_inputs: Sequence[Tensor] | None) -> tuple[nn.Module, list[str]]:
    """In place, and how many there were of each kind."""
    rewrite = FoldOffset(example_inputs)
    model, folded = rewrite.apply(model)
    staying = len(sites.find(model, rewrite.wants))
    note = (
        f"offsets in front of norms: {len(folded)} folded into the layer in front, {staying} stay as a Mul and an Add"
    )
    return model, [note] if folded or staying else []


def plain_state(folded: nn.Module) -> dict[str, Tensor]:
    """A folded network's tensors as one written without normrewrite names them: a norm has its own under its place's name,
    and nothing is kept of what it was."""
    modules = list(folded.named_modules(remove_duplicate=False))
    origins = tuple(f"{name}." for name, module in modules if isinstance(module, Origin))
    state = {name: value for name, value in folded.state_dict().items() if not name.startswith(origins)}
    for place in [f"{name}." for name, module in modules if isinstance(module, StandIn)]:
        state = {_moved(name, f"{place}norm.", place): value for name, value in state.items()}
    return state


def _moved(name: str, before: str, now: str) -> str:
    return now + name.removeprefix(before) if name.startswith(before) else name
