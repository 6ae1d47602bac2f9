"""The commands of deployment: export, build, plugins, verify, bench."""

import sys
from pathlib import Path
from typing import Any

import click

from normrewrite.cli import console
from normrewrite.cli.options import PATH, batch_size, data, force, printed, source, source_if_named


@click.command()
@source
@data
@click.option("--output", "-o", type=PATH, required=True, help="The ONNX file to write.")
@click.option(
    "--deploy",
    type=click.Choice(["fold", "op"]),
    default="fold",
    show_default=True,
    help="fold: standard operators alone. op: a norm that measures at inference is one node, with its body as a function.",
)
@click.option("--live-stats", is_flag=True, help="Batch norms measure each batch, instead of using running statistics.")
@click.option(
    "--bodies/--no-bodies", default=True, show_default=True, help="For op: bodies, or nodes for plugins alone."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="What the network computes in; bf16 needs --opset 22.",
)
@click.option(
    "--calibrate",
    metavar="DATA",
    help="For int8: unlabelled inputs that show how far activations reach, where finetune --precision int8 has not learned it.",
)
@click.option(
    "--ranges",
    type=click.Choice(["percentile", "minmax", "entropy"]),
    default="percentile",
    show_default=True,
    help="For int8: how ranges follow from the activations; percentile is 99.99.",
)
@click.option("--keep-io-types", is_flag=True, help="For fp16 and bf16: inputs and outputs stay fp32.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset, 18 to 23.")
@click.option(
    "--dynamic-batch/--static-batch",
    default=True,
    show_default=True,
    help="Leave the batch size open, or fix it to the example's.",
)
@click.option(
    "--dynamic-size/--static-size", default=False, show_default=True, help="Leave the sizes behind the channels open."
)
@force
@printed
def export(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write ONNX with the norms folded away, or as nodes of their own, in one file."""
    from normrewrite.commands import deployment as commands

    with console.busy("exporting", quiet=quiet or as_json):
        result = commands.export(source, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@click.command()
@click.argument("model", type=PATH)
@click.option("--output", "-o", type=PATH, required=True, help="The engine file to write.")
@click.option(
    "--runtime", type=click.Choice(["rtx", "tensorrt"]), default="rtx", show_default=True, help="The builder."
)
@click.option(
    "--gpu", metavar="SM[,SM]", default="", help="For rtx: GPUs to build for, which need not be here: sm86,sm89."
)
@click.option("--min", "low", metavar="SHAPE", multiple=True, help="Smallest input: 1,3,32,32 or input:1,3,32,32.")
@click.option("--opt", "middle", metavar="SHAPE", multiple=True, help="The input to tune for.  [default: a batch of 8]")
@click.option("--max", "high", metavar="SHAPE", multiple=True, help="Largest input.  [default: a batch of 32]")
@click.option("--timing-cache", type=PATH, metavar="FILE", help="For tensorrt: measurements kept between builds.")
@click.option(
    "--plugins",
    metavar="auto|off|PATH.so",
    default="off",
    show_default=True,
    help="Who takes norms that measure at inference: normrewrite's plugins in Python, function bodies, or a library's plugins.",
)
@force
@printed
def build(
    low: tuple[str, ...], middle: tuple[str, ...], high: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Build a TensorRT engine from ONNX. Exit code 1 where it doesn't keep the precision of the file."""
    from normrewrite.commands import deployment as commands

    shapes = {"min": low, "opt": middle, "max": high}
    with console.busy("building", quiet=quiet or as_json) as each:
        result = commands.build(shapes=shapes, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@click.group()
def plugins() -> None:
    """TensorRT plugins for norms that measure at inference."""


@plugins.command("list")
@printed
def plugins_list(as_json: bool, quiet: bool) -> None:
    """List the operators that there are plugins for, and what their attributes may be."""
    from normrewrite.commands import deployment as commands

    console.show(commands.plugins_list(), as_json=as_json, quiet=quiet)


@plugins.command("path")
def plugins_path() -> None:
    """Print where the library of plugins in C++ is; exit code 1, and how to build it, where there is none."""
    from normrewrite.plugins.built import built

    click.echo(built())


@plugins.command("cmake")
def plugins_cmake() -> None:
    """Print the folder of that library's sources, for cmake -S."""
    from normrewrite.plugins.built import SOURCES

    click.echo(SOURCES)


@click.command()
@source_if_named
@click.argument("other", type=PATH, required=False)
@data
@batch_size
@click.option(
    "--tolerance", type=float, help="Of the largest number of an output.  [default: by precision, 1e-4 for fp32]"
)
@click.option(
    "--min-snr",
    type=float,
    metavar="DB",
    help="Least signal to noise; the signal is how an output varies from input to input.  "
    "[default: by precision, 20 for fp32 and fp16, 10 for bf16 and int8]",
)
@click.option(
    "--min-agreement",
    type=float,
    metavar="SHARE",
    help="Least share of inputs with the same class, 0 to 1, where there are classes.  "
    "[default: by precision, 0 for fp32, 0.9 for fp16, 0.75 for bf16, 0.8 for int8]",
)
@click.option("--layers", is_flag=True, help="Compare layer by layer, too, on the first 8 inputs.")
@click.option(
    "--manifest",
    type=PATH,
    metavar="FILE",
    help="Instead: check this manifest (.json, or a twin's) against MODEL, by default FILE itself, byte by byte.",
)
@click.option("--original", type=PATH, metavar="FILE", help="With --manifest: the network before the rewrite.")
@printed
def verify(
    source: Any,
    other: Path | None,
    manifest: Path | None,
    original: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the same inputs through MODEL and OTHER, torch or ONNX. Exit code 1 where they differ beyond tolerance."""
    from normrewrite.commands import deployment as commands
    from normrewrite.commands.audit import audit

    if (other is None) == (manifest is None):
        raise click.UsageError("Missing argument 'OTHER', or option '--manifest'; one of the two.")
    with console.busy("comparing", quiet=quiet or as_json) as each:
        if other is None:
            result: Any = audit(source, manifest, original)
        else:
            result = commands.verify(source, other, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)
    if not result.ok:
        sys.exit(1)


@click.command()
@source
@click.argument("other", type=PATH)
@data
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="With --data: inputs at a time."
)
@click.option(
    "--runtime",
    type=click.Choice(["torch", "onnxruntime"]),
    default="torch",
    show_default=True,
    help="What runs a torch model; ONNX files always run in onnxruntime.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=50, show_default=True, help="Runs of each, in turns.")
@printed
def bench(source: Any, other: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Time MODEL and OTHER, torch or ONNX, in turns on the same batch."""
    from normrewrite.commands import deployment as commands

    with console.busy("timing", quiet=quiet or as_json) as each:
        result = commands.bench(source, other, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)
