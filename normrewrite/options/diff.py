"""The options of `diff`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import Found


@options
class Diff(Found):
    """Sites, targets and tensors that differ between two model files, or two manifests. Exit code 1 where any does."""

    a: Path = option("", argument=True)
    b: Path = option("", argument=True)
    _found: ClassVar[Any] = Found
