"""Fine-tune a network, on labels or on what its original computes: repair what a rewrite could not keep, or train on.

>>> twin, result = finetune(twin, images, epochs=6)                      # no labels: the original in the twin teaches
>>> twin, result = finetune(twin, Data(Batch({"x": images}, labels)), labels=True, precision="bf16", flip=True, crop=4)
"""

from collections.abc import Callable, Iterable
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from normrewrite.data import Data
from normrewrite.nn.parts import deepcopy
from normrewrite.options.fields import callback, options, part, quiet, takes
from normrewrite.options.finetune import RecipeOptions

if TYPE_CHECKING:
    from normrewrite.training.result import Finetuned

Examples = Tensor | Data | Iterable[Any]


@options
class FinetuneCall(RecipeOptions):
    """What `finetune` and `finetune_` take in Python."""

    model: nn.Module = field(kw_only=False)
    data: Examples = field(kw_only=False)
    teacher: nn.Module | None = None
    val: Examples | None = None
    checkpoints: Path | None = None
    resume: bool = False
    log: Path | None = None
    progress: Callable[[Any], object] = callback(default=quiet)


@takes(FinetuneCall)
def finetune(options: FinetuneCall) -> tuple[nn.Module, "Finetuned"]:
    """A trained copy of `model`, and what came of it; `finetune_` does it in place and says what the options are.

    >>> twin, result = finetune(twin, images, epochs=6)
    """
    return _trained(replace(options, model=deepcopy(options.model)))


@takes(FinetuneCall)
def finetune_(options: FinetuneCall) -> tuple[nn.Module, "Finetuned"]:
    """Train `model` on its own device: parameters stay the same objects, and training flags and random state as they were.

    data, val: (N, ...) inputs, Data, or an iterable of batches; with labels where `labels=True`.
    teacher: what to learn from without labels, or beside them; had back from a twin that was not trained since.
    checkpoints: folder to save to; resume: go on from what it holds, or start where it holds nothing. log: for TensorBoard.
    progress: called after every step with a training.loop.Step. All others: see normrewrite.training.recipe.Recipe.
    Raises NormRewriteError where data, teacher and recipe don't fit, and where losses are no longer finite.
    """
    return _trained(options)


def _trained(options: FinetuneCall) -> tuple[nn.Module, "Finetuned"]:
    from normrewrite.training.recipe import recipe  # `import normrewrite` is not to wait for what only training needs
    from normrewrite.training.run import run

    return run(
        options.model,
        options.data,
        recipe(part(options, RecipeOptions)),
        teacher=options.teacher,
        val=options.val,
        checkpoints=options.checkpoints,
        resume=options.resume,
        log=options.log,
        progress=options.progress,
    )
