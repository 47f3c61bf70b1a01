"""What the pages have in common: texts that are safe to show, pictures, the templates of `page/`.

Input: plain values and pictures. Output: one HTML file. Invariant: every text is escaped, and what cannot be seen in it
is spelled; nothing on a page asks for anything elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import Picture
from pipeline.results import charts
from pipeline.results.texts import chance, figure, signed, with_minus

if TYPE_CHECKING:
    from markupsafe import Markup

# What all pictures together may take as files; base64 makes them a third larger, and the rest is left to text.
_PICTURES_BYTES = 2_400_000
_MAX_PICTURE_BYTES = 8_000
# What is written where a picture would be, at most.
_MAX_BRIEF = 40
# A picture of less is enlarged without blur.
_SMALL_SIDE = 64
# Categories of Unicode: controls, formats, halves of surrogate pairs, private or no characters, ends of lines.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
# Where names may be broken: classifiers' and images'; and the end of a file's name, which is kept together.
_AFTER_NAME, _AFTER_WORD, _AFTER_PART = map(re.compile, (r"(?<=:)", r"(?<=_)(?=.{4})", r"(?<=[/_-])(?=.)"))
_LAST_LETTERS = re.compile(r"[^/_-]{0,4}\.\w{1,5}$")
_TEMPLATES = Path(__file__).with_name("page")


def render(template: str, page: Mapping[str, Any], pictures: Mapping[str, Picture | Fault]) -> bytes:
    """Fill a template.

    Args:
        template: Its file's name.
        page: What it needs; in `contents` the sections, each a place and a title, and in `tabs` the groups of panels,
            each a letter and how many.
        pictures: By key, or why there are none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., object]] = {
        "figure": lambda value: with_minus(figure(value)),
        "signed": lambda value: with_minus(signed(value)),
        "chance": chance,
        "count": "{:,}".format,
        "seconds": "{:.1f}".format,
        "breakable": breakable,
        "path": path,
    }
    environment.filters |= filters
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    shown = {key: _picture(found) for key, found in pictures.items()}
    faults = Counter(each["fault"] for each in shown.values() if each["fault"])
    more = {
        "made": made,
        "pictures": shown,
        "num_missing": faults.total(),
        "why_missing": ", ".join(fault for fault, _ in faults.most_common(1))
        + (" and others" if len(faults) > 1 else ""),
    }
    return environment.get_template(template).render({**page, **more}).encode()


def picture_bytes(num_pictures: int) -> int:
    """Return what each picture may take, so that all of them fit a page."""
    return min(_MAX_PICTURE_BYTES, _PICTURES_BYTES // max(1, num_pictures))


def dataset_name(run: Mapping[str, Any]) -> str:
    """Return what a run's dataset is called: of a path or URI the last part."""
    given = str(run["options"].get("data") or run["dataset"]["root"]).partition("?")[0]
    return given.rstrip("/").rpartition("/")[2] or given


def visible(text: str) -> str:
    r"""Spell what cannot be seen in a text, or turns the text around it, as `\u202e` and the like."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(each) if unicodedata.category(each) in _UNSEEN else each for each in text)


def breakable(name: str) -> Markup:
    """Let a narrow column break the name of a classifier between words, unless little follows, and of two between."""
    return _with_breaks(name, _AFTER_NAME if ":" in name else _AFTER_WORD)


def path(key: str) -> Markup:
    """Let the name of an image break where its parts end, and not in what its file's name ends with."""
    from markupsafe import Markup

    found = _LAST_LETTERS.search(key)
    end = found[0] if found else ""
    return Markup('{}<span class="end">{}</span>').format(
        _with_breaks(key[: len(key) - len(end)], _AFTER_PART), visible(end)
    )


def _with_breaks(text: str, places: re.Pattern[str]) -> Markup:
    from markupsafe import Markup

    return Markup("<wbr>").join(map(visible, places.split(text)))


def _spelled(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _picture(found: Picture | Fault) -> dict[str, Any]:
    """Return a picture as an address that holds it, or why there is none."""
    if isinstance(found, Fault):
        fault = f"{found.reason}: {found.error}"
        return {"uri": None, "fault": fault, "brief": fault if len(fault) <= _MAX_BRIEF else found.reason}
    is_small = max(found.width, found.height) <= _SMALL_SIDE
    return {"uri": charts.data_uri(found.data, found.media_type), "fault": None, "is_small": is_small}
