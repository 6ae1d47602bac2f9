"""The commands `plugins list`, `plugins path` and `plugins cmake`."""

import click

from normrewrite.cli import console
from normrewrite.cli.jobs import printed


@click.group()
def plugins() -> None:
    """TensorRT plugins for norms that measure at inference."""


@plugins.command("list", params=printed())
def plugins_list(as_json: bool, quiet: bool) -> None:
    """List the operators that there are plugins for, and what their attributes may be."""
    from normrewrite.commands.plugins import plugins_list

    console.show(plugins_list(), as_json=as_json, quiet=quiet)


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
