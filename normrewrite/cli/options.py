"""Options that commands share, and how they reach a command: the model file as one `source`."""

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from normrewrite.errors import NormRewriteError

Command = Callable[..., Any]
_LARGEST = 2**32 - 1


def _together(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _as_source(function: Command) -> Command:
    """Hand the options below to a command as one `source`, a normrewrite.commands.source.Source."""

    @wraps(function)
    def with_source(
        model: Path | None,
        arch: str | None,
        arch_args: tuple[str, ...],
        key: str | None,
        allow: tuple[str, ...],
        trust: bool,
        device: str,
        **options: Any,
    ) -> Any:
        from normrewrite.commands.source import Source
        from normrewrite.files.arch import parse_arguments

        named = model or options.get("manifest")  # verify --manifest alone is about the file that carries it
        if named is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        given = Source(named, arch, parse_arguments(arch_args), key, allow, trust, device)
        try:
            return function(given, **options)
        finally:
            if not options.get("quiet"):
                for note in given.notes:
                    click.echo(f"note: {note}", err=True)

    return with_source


def _numbers(_context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    try:
        numbers = None if text is None else [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, numbers or ())):
            raise ValueError
        return numbers
    except ValueError:
        raise NormRewriteError(
            f"--{parameter.name} {text!r}: write numbers with commas, as in 0.485,0.456,0.406."
        ) from None


def bounded(function: Command) -> Command:
    """Numbers on the command line are finite, and whole ones no larger than what all of torch and numpy takes."""

    @wraps(function)
    def with_bounds(*arguments: Any, **options: Any) -> Any:
        for name, value in options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NormRewriteError(f"--{name.replace('_', '-')} {value}: give a finite number.")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise NormRewriteError(f"--{name.replace('_', '-')}: give a number of at most {_LARGEST:,}.")
        return function(*arguments, **options)

    return with_bounds


PATH = click.Path(path_type=Path)
# How the weights in a file are found, without the code that they belong to.
found = _together(
    click.option(
        "--key", metavar="K", help="Where in a checkpoint the state_dict is, dotted; of the files that have it."
    ),
    click.option(
        "--allow",
        metavar="MODULE:CLASS",
        multiple=True,
        help="A further class that a pickled module may hold; repeatable.",
    ),
    click.option("--trust", is_flag=True, help="Unpickle freely: runs any code that the file contains."),
)
_source_options = _together(
    click.option(
        "--arch",
        metavar="WHERE:FACTORY",
        help="Code of a state_dict: PATH.py:factory, module:factory, timm:NAME or torchvision:NAME.",
    ),
    click.option("--arch-args", metavar="K=V", multiple=True, help="Keyword argument of the factory; repeatable."),
    found,
    click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ..."),
    _as_source,
)
source = _together(click.argument("model", type=PATH), _source_options)
source_if_named = _together(click.argument("model", type=PATH, required=False), _source_options)
pixels = _together(
    click.option("--mean", metavar="R,G,B", callback=_numbers, help="Mean of uint8 images, pixels in 0..1."),
    click.option(
        "--std", metavar="R,G,B", callback=_numbers, help="Standard deviation of uint8 images, pixels in 0..1."
    ),
)
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    help="Inputs at a time; for calibration and advice that of the training to come.",
)
data_help = (
    "A .npz (arrays named as forward's arguments, or images; labels), a .npy, a folder of images, or module:factory."
)
data = _together(
    click.option("--data", metavar="DATA", help=data_help),
    click.option("--input-shape", metavar="N,C,...", help="Random input of this shape instead, as in 1,3,32,32."),
    pixels,
)
printed = _together(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
)
force = click.option("--force", is_flag=True, help="Overwrite an existing output.")
