"""What the commands have in common: a usage error is one line.

Input: a command line. Output: the command's own, or one line on standard error and exit status 2. Invariant: none of
click's usage errors takes more than a line; `evaluate.py`, which `ray submit` copies alone, does the same by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from pipeline.errors import usage_line


class OneLineCommand(click.Command):
    """A command, or with `click.Group` a group of them, whose usage errors are one line."""

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """Parse the command line."""
        with _one_line():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; that of a group is looked up here."""
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except NoArgsIsHelpError:  # which shows the help
        raise
    except click.UsageError as exc:
        click.echo(f"error: {usage_line(exc)}", err=True)
        sys.exit(exc.exit_code)
