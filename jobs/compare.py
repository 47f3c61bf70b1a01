"""The command that compares two finished runs, or two classifiers of one.

Run as `python jobs/compare.py A B` or `python jobs/compare.py A --classifiers knn_5,sgd_linear`; A and B are what
`--out` of `jobs/evaluate.py` was. It needs no Ray.

Input: folders or URIs. Output: tables on standard output, and with `--out` two Parquet files and a page. Invariant: a
user's mistake is one line, and neither run is changed.
"""

from __future__ import annotations

import io
import json
import sys

import click

from commands import OneLineCommand
from pipeline.driver.imports import leave_pandas_out
from pipeline.errors import EvaluationError, OptionError
from pipeline.results.comparison_text import comparison_json, comparison_text
from pipeline.results.finished import open_run
from pipeline.results.two_runs import compare_runs, write_comparison
from pipeline.results.writing import Output


class _Command(OneLineCommand):
    """Shows a user's mistake as one line: in an option with status 2, any other with 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EvaluationError as exc:
            click.echo(f"error: {exc}", err=True)
            sys.exit(2 if isinstance(exc, OptionError) else 1)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


@click.command(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 bad usage.",
)
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--classifiers",
    callback=_names,
    help="Compare these, as knn_1,sgd_linear: of two runs each with its namesake, or knn_5:sgd_linear for one of A "
    "with one of B; of one run each with each.  [default: all namesakes, and the best of each run]",
)
@click.option("--out", default=None, help="Folder or URI for comparison.parquet, changes.parquet and compare.html.")
@click.option("--json", "is_json", is_flag=True, help="Print the comparison as one JSON object.")
def main(a: str, b: str | None, classifiers: tuple[str, ...], out: str | None, is_json: bool) -> None:
    """Compare the finished runs A and B, image by image, or two classifiers of A.

    Prints accuracies, their differences with 95 % intervals, and McNemar's exact test.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in letters that the terminal's encoding lacks
    leave_pandas_out()
    first = open_run(a)
    comparison = compare_runs(first, first if b is None else open_run(b), classifiers)
    if out is not None:
        from pipeline.results.comparison_page import write_page  # with Pillow and Jinja, which are not needed else

        output = Output.at(out)
        write_comparison(output, comparison)
        write_page(output, comparison)
    click.echo(json.dumps(comparison_json(comparison)) if is_json else comparison_text(comparison))


if __name__ == "__main__":
    main()
