"""The cache of decoded images, as `--cache` fills it: what it holds, and how to empty it.

Runs as `python jobs/cache.py show FOLDER` and `python jobs/cache.py clear FOLDER`; a URI does as well.
"""

from __future__ import annotations

import sys

import click

from pipeline.decoding import cache
from pipeline.decoding.cache import Cache, Usage
from pipeline.errors import EvaluationError, without_secrets


class _Commands(click.Group):
    """Shows what a user can mend as one line, whichever command met it."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except EvaluationError as exc:
            click.echo(f"error: {exc}", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look into a cache of decoded images, or empty it."""


@main.command()
@click.argument("folder")
def show(folder: str) -> None:
    """Say how many decoded shards FOLDER, a folder or URI, holds, and how large they are together."""
    click.echo(f"{without_secrets(folder)}: {_describe(cache.usage(Cache.at(folder)))}")


@main.command()
@click.argument("folder")
def clear(folder: str) -> None:
    """Remove the decoded shards of FOLDER, a folder or URI, and nothing else."""
    click.echo(f"{without_secrets(folder)}: removed {_describe(cache.clear(Cache.at(folder)))}")


def _describe(used: Usage) -> str:
    return f"{used.num_entries} {'shard' if used.num_entries == 1 else 'shards'}, {used.num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
