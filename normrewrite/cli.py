"""The command line. Thin: each command is the function of the same name in normrewrite.commands."""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from normrewrite._version import __version__
from normrewrite.errors import NormRewriteError

Command = Callable[..., Any]
# As in normrewrite.targets, which would import torch; a test compares them.
_TARGETS = (
    "Metrics: l1, linf, topk:K (a count, or a percentage as topk:1%), range. Weight norms: bwn (bounded), bwn:strict, wn, "
    "wn:mean-bn. Each sample's statistics: group[:G], layer, instance, rms. Also renorm, frozen, none (folded away), and l2 "
    "for torch's own norms back"
)


def _together(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _as_source(function: Command) -> Command:
    """Hand the options below to a command as one `source`, a normrewrite.commands.Source."""

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
        from normrewrite.arch import parse_arguments
        from normrewrite.commands import Source

        named = model or options.get("manifest")  # verify --manifest alone is about the file that carries it
        if named is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        return function(Source(named, arch, parse_arguments(arch_args), key, allow, trust, device), **options)

    return with_source


def _numbers(_context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise NormRewriteError(
            f"--{parameter.name} {text!r}: write numbers with commas, as in 0.485,0.456,0.406."
        ) from None


PATH = click.Path(path_type=Path)
# How the weights in a file are found, without the code that they belong to.
found = _together(
    click.option("--key", metavar="K", help="Where in a checkpoint the state_dict is, dotted."),
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="normrewrite", message="%(prog)s %(version)s")
def app() -> None:
    """Rewrite the norms of trained networks to L1, L-infinity, Top-k, range and weight norms: the same function."""


@app.command()
@source
@click.option(
    "--advise", metavar="DATA", help="Say which target suits each norm and why, from this data, no labels needed."
)
@pixels
@batch_size
@printed
def inspect(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """List the norms of a model and its traps; with data, which target suits each norm."""
    from normrewrite import commands, console

    with console.busy("reading", quiet=quiet or as_json or not options["advise"]) as each:
        result = commands.inspect(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@app.command()
@source
@click.option("--to", metavar="TARGET", help=f"{_TARGETS}.")
@click.option(
    "--replay", type=PATH, metavar="FILE", help="Do what this manifest (.json, or a twin's) did to another checkpoint."
)
@click.option(
    "--scope",
    default="batch",
    show_default=True,
    metavar="SCOPES",
    help="Norms whose metric changes: batch, layer, group, instance, rms, several with commas, or all.",
)
@click.option(
    "--rule",
    "rules",
    metavar="PATTERN=TARGET",
    multiple=True,
    help="Another target, or keep, for some sites; the first match wins.",
)
@click.option("--include", metavar="GLOB", multiple=True, help="Only these sites: name, glob or re:REGEX; repeatable.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Not these sites; repeatable.")
@click.option(
    "--gain",
    type=click.Choice(["exact", "paper"]),
    default="exact",
    show_default=True,
    help="The constants of the metrics; paper: as published.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--expect", type=int, metavar="N", help="Fail unless exactly N sites are rewritten.")
@click.option("--input-shape", metavar="N,C,...", help="Check the whole network too, on random input of this shape.")
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Match training to the original on this data too, as `calibrate` does; fresh weight norms are initialised by it.",
)
@pixels
@batch_size
@click.option("--folded", is_flag=True, help="Write a plain state_dict of the network with its norms folded away.")
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.TARGET.pt beside the input]")
@click.option(
    "--manifest", type=PATH, metavar="FILE", help="Write the manifest as JSON, too: a pickled module has no other."
)
@force
@printed
def convert(
    source: Any,
    to: str | None,
    replay: Path | None,
    rules: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Rewrite norms; in eval the network computes the same function, or says where it can't."""
    from normrewrite import commands, console
    from normrewrite.rules import parse_rule

    if to is None and replay is None:
        raise click.UsageError("Missing option '--to', or '--replay'.")
    options["rules"] = [parse_rule(text) for text in rules]
    with console.busy("converting", quiet=quiet or as_json) as each:
        if replay is None:
            result = commands.convert(source, str(to), each=each, **options)
        else:
            result = commands.convert_again(source, replay, to=to, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@app.command()
@source
@click.option("--data", metavar="DATA", required=True, help=data_help)
@pixels
@batch_size
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.calibrated.pt beside the input]")
@force
@printed
def calibrate(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Match a converted network to its original on unlabelled data; the way back stays exact.

    Batch norms are matched in training, with eval as it was; norms that can't be exact are fitted to the original.
    """
    from normrewrite import commands, console

    with console.busy("calibrating", quiet=quiet or as_json) as each:
        result = commands.calibrate(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@app.command()
@source
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.reverted.pt beside the input]")
@force
@printed
def revert(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Give a converted network its original batch norms back, to the bit."""
    from normrewrite import commands, console

    console.show(commands.revert(source, **options), as_json=as_json, quiet=quiet)


@app.command()
@source
@click.option("--original", type=PATH, help="The network before the rewrite.  [default: had back from the twin itself]")
@click.option("--data", metavar="DATA", help=data_help)
@pixels
@batch_size
@click.option(
    "--latency",
    type=click.Choice(["torch", "onnxruntime"]),
    help="Time MODEL and the original there, too, on the first input of --data.",
)
@click.option("--output", "-o", type=PATH, help="Write a page: one HTML file.  [default: the report as text]")
@click.option("--text", is_flag=True, help="With -o: print the report as text, too.")
@force
@printed
def report(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show a network, rewritten or not: sites, figures, histograms, accuracy, manifest; as a page, text or JSON."""
    from normrewrite import console
    from normrewrite.page import command

    with console.busy("reading", quiet=quiet or as_json or not options["data"]) as each:
        result = command.report(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


# --- training: the command is in normrewrite.training.command ---------------------------------------------------------


@app.command()
@source
@click.option("--data", metavar="DATA", required=True, help=data_help)
@pixels
@click.option(
    "--strict", is_flag=True, help="Refuse a folder for one image that can't be read, instead of leaving it out."
)
@click.option(
    "--val", metavar="DATA", help="Data to validate on after every epoch: the best epoch's weights are written."
)
@click.option("--val-split", type=float, metavar="SHARE", help="Hold out this share of --data instead.")
@click.option(
    "--patience", type=int, metavar="EPOCHS", help="Stop after so many epochs without progress in validation."
)
@click.option("--teacher", type=PATH, help="The original to learn from.  [default: had back from the twin itself]")
@click.option(
    "--labels/--no-labels",
    default=False,
    show_default=True,
    help="Learn from labels by cross-entropy, or from the teacher.",
)
@click.option(
    "--distill", type=float, default=0.0, metavar="SHARE", help="With labels: the teacher's share of the loss."
)
@click.option(
    "--loss",
    default="mse",
    show_default=True,
    metavar="LOSS",
    help="How far from the teacher: mse, kl, cross-entropy. Or module:function, called with outputs, teacher's outputs, labels.",
)
@click.option(
    "--features", multiple=True, metavar="GLOB", help="Modules that are to give what the teacher's do; repeatable."
)
@click.option(
    "--feature-weight", type=float, default=1.0, show_default=True, help="What features count beside the loss."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16", "fp16-pure", "int8"]),
    default="fp32",
    show_default=True,
    help="What the forward pass computes in; weights stay as they are. fp16 scales its loss; fp16-pure has weights and norms in "
    "half too. int8 rounds weights and activations to 8 bits; export --precision int8 uses the ranges it learns.",
)
@click.option(
    "--accumulator",
    default="fp32",
    show_default=True,
    metavar="SUMS",
    help="What norms of fp16-pure sum in: fp32, or half:CHUNK: sums of CHUNK numbers are rounded to half and added up in half.",
)
@click.option("--int8-gradients", is_flag=True, help="For int8: gradients on 8 bits too.")
@click.option(
    "--int8-ranges",
    type=click.Choice(["percentile", "gradient"]),
    default="percentile",
    show_default=True,
    help="For int8: what ranges of activations follow, the 99.99th percentile by moving average or the loss's gradient.",
)
@click.option(
    "--int8-keep",
    multiple=True,
    metavar="GLOB",
    help="For int8: modules to leave in fp32; `first` and `last` are the first and last layer. Repeatable.",
)
@click.option(
    "--freeze-statistics", is_flag=True, help="Batch norms run on their running statistics, and leave them as they are."
)
@click.option("--dropout/--no-dropout", default=None, help="Dropout in training.  [default: with --labels]")
@click.option("--epochs", type=int, help="Times through the data.  [default: 6]")
@click.option("--steps", type=int, help="Updates, instead of epochs.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate at its highest.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Inputs a batch, on each process.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches to an update.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option("--momentum", type=float, default=0.9, show_default=True, help="Of sgd, by Nesterov.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option(
    "--weight-decay-as",
    type=click.Choice(["decay", "lr"]),
    default="decay",
    show_default=True,
    help="lr: of sgd without Nesterov, as a growing learning rate of the weights in front of norms.",
)
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), default="cosine", show_default=True)
@click.option("--warmup", type=int, default=0, metavar="STEPS", help="Steps in which the learning rate rises.")
@click.option("--ema", type=float, metavar="DECAY", help="Average the weights, as in 0.999; the average is written.")
@click.option("--clip", type=float, metavar="NORM", help="Largest norm of a gradient.")
@click.option("--flip", is_flag=True, help="Mirror images at random.")
@click.option("--crop", type=int, default=0, metavar="PIXELS", help="Shift images by up to so many pixels each way.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--deterministic", is_flag=True, help="Deterministic kernels alone.")
@click.option("--save-every", type=int, metavar="STEPS", help="Steps between checkpoints.  [default: an epoch]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, where there is one.")
@click.option(
    "--timeout",
    type=float,
    default=45.0,
    show_default=True,
    metavar="SECONDS",
    help="How long processes wait for another.",
)
@click.option("--log", type=PATH, metavar="DIR", help="Write TensorBoard logs here.")
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.finetuned.pt beside the input]")
@force
@printed
def finetune(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train a network on labels, or on what its original computes. Launch by torchrun or accelerate for several processes."""
    from normrewrite import console
    from normrewrite.training import command

    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with console.training(quiet=quiet or as_json) as each:
        result = command.finetune(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


# --- deployment: the commands are in normrewrite.deploy ---------------------------------------------------------------


@app.command()
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
    from normrewrite import console, deploy

    with console.busy("exporting", quiet=quiet or as_json):
        result = deploy.export(source, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@app.command()
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
    from normrewrite import console, deploy

    shapes = {"min": low, "opt": middle, "max": high}
    with console.busy("building", quiet=quiet or as_json) as each:
        result = deploy.build(shapes=shapes, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@app.group()
def plugins() -> None:
    """TensorRT plugins for norms that measure at inference."""


@plugins.command("list")
@printed
def plugins_list(as_json: bool, quiet: bool) -> None:
    """List the operators that there are plugins for, and what their attributes may be."""
    from normrewrite import console, deploy

    console.show(deploy.plugins_list(), as_json=as_json, quiet=quiet)


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


@app.command()
@source_if_named
@click.argument("other", type=PATH, required=False)
@data
@batch_size
@click.option("--tolerance", type=float, help="Of max(1, largest output).  [default: by precision, 1e-4 for fp32]")
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
    from normrewrite import audit, console, deploy

    if (other is None) == (manifest is None):
        raise click.UsageError("Missing argument 'OTHER', or option '--manifest'; one of the two.")
    with console.busy("comparing", quiet=quiet or as_json) as each:
        if other is None:
            result: Any = audit.audit(source, manifest, original)
        else:
            result = deploy.verify(source, other, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)
    if not result.ok:
        sys.exit(1)


@app.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@found
@printed
def diff(a: Path, b: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Sites, targets and tensors that differ between two model files, or two manifests. Exit code 1 where any does."""
    from normrewrite import console
    from normrewrite.diff import diff_files

    result = diff_files(a, b, **options)
    console.show(result, as_json=as_json, quiet=quiet)
    if not result.ok:
        sys.exit(1)


@app.command()
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
    from normrewrite import console, deploy

    with console.busy("timing", quiet=quiet or as_json) as each:
        result = deploy.bench(source, other, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _report(error.format_message(), error.exit_code, error.show)
    except NormRewriteError as error:
        _report(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # stdout is full, or nobody reads it any more
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (what is buffered goes nowhere)
        _report(f"stdout: {error.strerror}. Nothing else is wrong; files were written as asked.", 2)
    except Exception as error:
        if os.environ.get("NORMREWRITE_TRACEBACK"):
            raise
        _report(_unexpected(error), 70)


def _unexpected(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0][:200]
    return (
        f"{type(error).__name__}: {first}. This was not foreseen: an input is damaged in a way that is not recognised, or "
        "normrewrite is at fault. No file was left half-written. With NORMREWRITE_TRACEBACK=1 it tells where; please report that."
    )


def _report(message: str, exit_code: int, show: Callable[[], None] | None = None) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": exit_code}))
    show() if show else print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
