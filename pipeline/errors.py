"""The exceptions that a user meets, as one tree.

    EvaluationError
    ├── OptionError        an option's value cannot be used (exit status 2)
    ├── DataError          the dataset is missing, empty or inconsistent
    │   └── DownloadError  a dataset known by name could not be fetched
    ├── ModelError         the user's own model cannot be used
    ├── TrainingError      the loss is no number any more
    ├── ImageCountError    images listed, used and skipped do not add up
    ├── OutputError        the results' folder cannot be used or written
    ├── CacheError         the cache's folder cannot be used
    └── ClusterError       Ray cannot give, or no longer gives, what the job needs
        ├── StalledError   no work was finished for a set time
        └── ActorLostError an actor, or one that it waited for, died; the driver starts the actors anew

Every message is one line, `<where>: expected <x>, got <y>; <what to do>`. Every class takes that one
line alone, so that an error crosses Ray by pickle unchanged. No message holds the secret key that a URI carries, nor
anything that a terminal would obey.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from click import UsageError

# From here on what was typed is taken for a slip: `--adress`, and not `--bogus` for `--out`.
_MIN_LIKENESS = 0.65
_SECRET = re.compile(
    # What stands between the colon and the @ of a URI's user.
    r"(?<=://)([^/?#\s@:]*:)[^/?#\s]*(?=@)|"
    # A key with slashes, as AWS and Azure hand them out: no valid URI, and therefore soon in an error.
    r"(?i:(?<=s3://)|(?<=abfs://)|(?<=abfss://))([^/?#\s@:]*:)[^?#\s@]*(?=@)|"
    # An option of a URI, as Azure's `client_secret`.
    r"(?i:([?&]\w*(?:secret|password|token)\w*=))[^&#\s]*"
)


def without_secrets(text: str) -> str:
    """Put asterisks in the place of the secret key of every URI in a text, as in `s3://key:***@bucket`."""
    return _SECRET.sub(r"\1\2\3***", text)


def printable(text: str) -> str:
    r"""Write what a terminal would not show, or would obey, as escapes: line ends, marks of direction, `\x1b`."""
    if text.isprintable():
        return text
    # Joiners shape letters, of Persian and of pictures, and nothing else.
    shown = (each if each.isprintable() or each in "\u200c\u200d" else f"{each!a}"[1:-1] for each in text)
    return "".join(shown)


def usage_line(exc: UsageError) -> str:
    """Write a usage error of click as one line; of a name that there is not, the one that is near to it, if any."""
    from difflib import get_close_matches

    typed = str(getattr(exc, "option_name", getattr(exc, "command_name", "")))
    # Click's own possibilities share no more than a letter, some of them.
    names = {name.lstrip("-"): name for name in getattr(exc, "possibilities", None) or ()}
    near = get_close_matches(typed.lstrip("-"), names, 1, _MIN_LIKENESS)
    message = exc.message if hasattr(exc, "possibilities") else exc.format_message()
    advice = f"is {names[near[0]]} meant, or try --help" if near else "try --help"
    return f"{' '.join(message.split()).rstrip('.')}; {advice}"


def quoted(name: str) -> str:
    """Write a name as `--classes` takes it: in quotes where it has a comma or a quote in it."""
    return '"{}"'.format(name.replace('"', '""')) if "," in name or '"' in name else name


def counted(number: int, noun: str) -> str:
    """Write a number of things, `1 row` or `1,234 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class EvaluationError(Exception):
    """Base of all errors that a user meets."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(" ".join(message.split()))))


class OptionError(EvaluationError):
    """An option's value cannot be used."""


class DataError(EvaluationError):
    """The dataset is missing, empty or inconsistent."""


class DownloadError(DataError):
    """A dataset known by name could not be fetched, checked or unpacked."""


class ModelError(EvaluationError):
    """The user's own model cannot be read, run, or fitted to the dataset."""


class TrainingError(EvaluationError):
    """The loss is no number any more."""


class ImageCountError(EvaluationError):
    """Images listed, used and skipped do not add up, so no figure can be trusted."""


class OutputError(EvaluationError):
    """The results' folder cannot be used or written."""


class CacheError(EvaluationError):
    """The folder for decoded shards cannot be used."""


class ClusterError(EvaluationError):
    """Ray cannot give, or no longer gives, what the job needs."""


class StalledError(ClusterError):
    """No work was finished for a set time."""


class ActorLostError(ClusterError):
    """An actor, or one that it waited for, died in the middle of its work."""
