"""The command line. Thin: options are made of normrewrite.options, and handed to the jobs of normrewrite.commands."""

import json
import os
import sys
from collections.abc import Callable

import click

from normrewrite._version import __version__
from normrewrite.cli import console, signals
from normrewrite.cli.jobs import JOBS
from normrewrite.cli.plugins import plugins
from normrewrite.errors import NormRewriteError

_STDERR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="normrewrite", message="%(prog)s %(version)s")
def app() -> None:
    """Rewrite the norms of trained networks to L1, L-infinity, Top-k, range and weight norms: the same function."""


for _job in JOBS:
    app.add_command(_job.command())
app.add_command(plugins)


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    _standard_handles()
    with console.visible_streams():
        _run()


def _standard_handles() -> None:
    """Those that are closed lead nowhere: else the next file that is opened would take what libraries print."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(handle)


def _run() -> None:
    try:
        with signals.as_exceptions():
            app(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _report(error.format_message(), error.exit_code, error.show)
    except NormRewriteError as error:
        _report(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:  # click's has the other for its cause
        said, code = signals.outcome(error.__cause__ or error)
        print(said, file=sys.stderr)
        sys.exit(code)
    except OSError as error:  # stdout is full, or nobody reads it any more
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (what is buffered goes nowhere)
        _report(f"stdout: {error.strerror}. Nothing else is wrong; files were written as asked.", 2)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            _report(
                "what is asked needs more memory than there is. Nothing was left half-written. Take less at a time.", 2
            )
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
