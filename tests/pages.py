"""Pages as a person finds them: opened in Chromium, and their tables as text."""

import os
import shutil
from html.parser import HTMLParser

import pytest

# Without these flags, Chromium asks for updates and the like.
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic",
)  # fmt: skip


def find_chromium():
    """Return the path of Chromium, or skip the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs Chromium, as Debian's package `chromium` installs it")
    return found


def launch(playwright):
    """Start Chromium."""
    return playwright.chromium.launch(executable_path=find_chromium(), args=list(_FLAGS))


class _Tables(HTMLParser):
    def __init__(self):
        super().__init__()
        self.place, self.tables, self.cell, self.text = "", [], None, []

    def handle_starttag(self, tag, attributes):
        fields = dict(attributes)
        if tag == "section":
            self.place = fields["id"]
        elif tag == "table":
            self.tables.append((self.place, []))
        elif tag == "tr" and self.tables:
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            self.tables[-1][1][-1].append("".join(self.cell).strip())
            self.cell = None

    def handle_data(self, data):
        if self.lasttag not in ("style", "script"):
            self.text.append(f" {data}")
        if self.cell is not None:
            self.cell.append(data)


def read_tables(page):
    """Return the tables of a page, each with the section that it is in, and all of its text."""
    parser = _Tables()
    parser.feed(page)
    return parser.tables, " ".join("".join(parser.text).split())
