"""Fine-tune a network, on labels or on what its original computes: repair what a rewrite could not keep, or train on.

>>> twin, result = finetune(twin, images, epochs=6)                      # no labels: the original in the twin teaches
>>> twin, result = finetune(twin, Data(Batch({"x": images}, labels)), labels=True, precision="bf16", flip=True, crop=4)
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from normrewrite.data import Data
from normrewrite.nn.parts import deepcopy

if TYPE_CHECKING:
    from normrewrite.training.result import Finetuned

Examples = Tensor | Data | Iterable[Any]


def finetune(model: nn.Module, data: Examples, **options: Any) -> tuple[nn.Module, "Finetuned"]:
    """A trained copy of `model`, and what came of it; `finetune_` does it in place and names the options.

    >>> twin, result = finetune(twin, images, epochs=6)
    """
    return finetune_(deepcopy(model), data, **options)


def finetune_(
    model: nn.Module,
    data: Examples,
    *,
    teacher: nn.Module | None = None,
    val: Examples | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    each: Callable[[Any], object] = lambda step: None,
    **options: Any,
) -> tuple[nn.Module, "Finetuned"]:
    """Train `model` on its own device: parameters stay the same objects, and training flags and random state as they were.

    data, val: (N, ...) inputs, Data, or an iterable of batches; with labels where `labels=True`.
    teacher: what to learn from without labels, or beside them; had back from a twin that was not trained since.
    checkpoints: folder to save to; resume: go on from what it holds, or start where it holds nothing. log: for TensorBoard.
    each: called after every step with a training.loop.Step. options: see normrewrite.training.recipe.Recipe.
    Raises NormRewriteError where data, teacher and recipe don't fit, and where losses are no longer finite.
    """
    from normrewrite.training.recipe import recipe  # `import normrewrite` is not to wait for what only training needs
    from normrewrite.training.run import run

    return run(
        model,
        data,
        recipe(options),
        teacher=teacher,
        val=val,
        checkpoints=checkpoints,
        resume=resume,
        log=log,
        each=each,
    )
