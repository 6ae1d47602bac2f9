"""The command that trains: finetune."""

import os
from typing import Any

import click

from normrewrite.cli import console
from normrewrite.cli.options import PATH, data_help, force, pixels, printed, source


@click.command()
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
    from normrewrite.commands import training as commands

    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with console.training(quiet=quiet or as_json) as each:
        result = commands.finetune(source, each=each, **options)
    console.show(result, as_json=as_json, quiet=quiet)
