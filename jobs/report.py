"""The command that makes the page of a finished run anew.

Run as `python jobs/report.py OUT`; OUT is the folder or URI of the results.

Input: a finished run. Output: `report.html` beside its tables, and its path on standard output. Invariant: nothing but
the page is written.
"""

from __future__ import annotations

import logging
import sys

import click

from commands import OneLineCommand
from pipeline.errors import EvaluationError, OptionError, without_secrets


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out")
@click.option("--data", default=None, help="Where the images are now.  [default: where they were]")
@click.option("--example", default=None, help="Key of the image that is shown as numbers.")
@click.option(
    "--address", default=None, help="Ray cluster that does the work.  [default: RAY_ADDRESS, else this machine]"
)
def main(out: str, data: str | None, example: str | None, address: str | None) -> None:
    """Make report.html of the finished run in OUT, a folder or URI, anew."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    # Imported here, so that --help and a wrong option need not wait for Ray.
    from pipeline.driver import report
    from pipeline.driver.imports import leave_pandas_out

    leave_pandas_out()
    try:
        click.echo(without_secrets(report.remake(out, data, example, address)))
    except EvaluationError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(2 if isinstance(exc, OptionError) else 1)


if __name__ == "__main__":
    main()
