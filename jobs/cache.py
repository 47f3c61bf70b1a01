"""The command that shows and empties the cache of decoded images, which `--cache` fills.

Run as `python jobs/cache.py show FOLDER` or `python jobs/cache.py clear FOLDER`; FOLDER may be a URI.

Input: a folder or URI. Output: one line on standard output. Invariant: only cache entries are removed.
"""

from __future__ import annotations

import sys

import click

from commands import OneLineCommand
from pipeline.decoding import cache
from pipeline.decoding.cache import Cache, Usage
from pipeline.errors import EvaluationError, without_secrets


class _Commands(OneLineCommand, click.Group):
    """Shows a user's mistake as one line, for every subcommand."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EvaluationError as exc:
            click.echo(f"error: {exc}", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Show or empty a cache of decoded images."""


@main.command()
@click.argument("folder")
def show(folder: str) -> None:
    """Show the number and the size of the decoded shards in FOLDER, a folder or URI."""
    click.echo(f"{without_secrets(folder)}: {_usage_text(cache.usage(Cache.at(folder)))}")


@main.command()
@click.argument("folder")
def clear(folder: str) -> None:
    """Remove the decoded shards of FOLDER, a folder or URI, and nothing else."""
    click.echo(f"{without_secrets(folder)}: removed {_usage_text(cache.clear(Cache.at(folder)))}")


def _usage_text(used: Usage) -> str:
    return f"{used.num_entries} {'shard' if used.num_entries == 1 else 'shards'}, {used.num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
