"""The commands around a rewrite: inspect, convert, calibrate, revert, report, diff."""

import sys
from pathlib import Path
from typing import Any

import click

from normrewrite.cli import console
from normrewrite.cli.options import PATH, batch_size, data_help, force, found, pixels, printed, source

# As in normrewrite.targets, which would import torch; a test compares them.
_TARGETS = (
    "Metrics: l1, linf, topk:K (a count, or a percentage as topk:1%), range. Weight norms: bwn (bounded), bwn:strict, wn, "
    "wn:mean-bn. Each sample's statistics: group[:G], layer, instance, rms. Also renorm, frozen, none (folded away), and l2 "
    "for torch's own norms back"
)


@click.command()
@source
@click.option(
    "--advise", metavar="DATA", help="Say which target suits each norm and why, from this data, no labels needed."
)
@pixels
@batch_size
@printed
def inspect(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """List the norms of a model and its traps; with data, which target suits each norm."""
    from normrewrite.commands import rewriting as commands

    with console.busy("reading", quiet=quiet or as_json or not options["advise"]) as each:
        result = commands.inspect(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@click.command()
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
@click.option(
    "--input-shape",
    metavar="N,C,...",
    help="Check the whole network too, on random input of this shape; needed where its code looks at its norms.",
)
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Bring training nearer to the original's eval on this data, as `calibrate` does; fresh weight norms are initialised.",
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
    from normrewrite.commands import rewriting as commands
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


@click.command()
@source
@click.option("--data", metavar="DATA", required=True, help=data_help)
@pixels
@batch_size
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.calibrated.pt beside the input]")
@force
@printed
def calibrate(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Bring a converted network nearer to its original on unlabelled data; the way back stays exact.

    Training comes nearer to the original's eval, with eval as it was, and how far it is from the original's training is told
    beside; norms that can't be exact are fitted to the original.
    """
    from normrewrite.commands import rewriting as commands

    with console.busy("calibrating", quiet=quiet or as_json) as each:
        result = commands.calibrate(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@click.command()
@source
@click.option("--output", "-o", type=PATH, help="Output file.  [default: MODEL.reverted.pt beside the input]")
@force
@printed
def revert(source: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Give a converted network its original batch norms back, to the bit."""
    from normrewrite.commands import rewriting as commands

    console.show(commands.revert(source, **options), as_json=as_json, quiet=quiet)


@click.command()
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
    from normrewrite.commands import report as commands

    with console.busy("reading", quiet=quiet or as_json or not options["data"]) as each:
        result = commands.report(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@found
@printed
def diff(a: Path, b: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Sites, targets and tensors that differ between two model files, or two manifests. Exit code 1 where any does."""
    from normrewrite.commands.diff import diff_files

    result = diff_files(a, b, **options)
    console.show(result, as_json=as_json, quiet=quiet)
    for note in () if quiet else result.notes:
        click.echo(f"note: {note}", err=True)
    if not result.ok:
        sys.exit(1)
