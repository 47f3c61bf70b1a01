"""Pages as a person finds them: opened in Chromium, and their tables as text."""

import os
import re
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

MAX_BYTES = 5_000_000
# A long page takes a busy machine a while.
_SCREENSHOT_MS = 120_000
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


# What is to show all of its text, and how to see that some does not.
_WHOLE = (".stats > div", ".bars td", ".bars th", ".card", ".gone", ".pair")
_IS_CUT = """selector => [...document.querySelectorAll(selector)].some(
    each => each.scrollWidth > each.clientWidth + 1 || each.scrollHeight > each.clientHeight + 1)"""


@contextmanager
def chromium():
    """Start Chromium, and end it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(_FLAGS))
        yield browser
        browser.close()


def figure(value):
    """Write a figure as pages do."""
    return f"{value:.4f}".replace("-", "\u2212")


def signed(value):
    """Write a difference likewise."""
    return f"{value:+.4f}".replace("-", "\u2212")


def open_page(browser, path, width, scheme="light"):
    """Open a page; return it with what it wrote to the console and asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    noticed = []
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.on("dialog", lambda dialog: noticed.append(dialog.message))
    page.on("request", lambda request: noticed.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(f"file://{path}")
    return page, noticed


def check_page(browser, path, sections, num_pictures, folder):
    """See that a page is whole and asks for nothing, wide and light, narrow and dark; keep what it looks like."""
    from axe_playwright_python.sync_playwright import Axe

    assert path.stat().st_size < MAX_BYTES
    for width, scheme in [(1280, "light"), (390, "dark")]:
        page, noticed = open_page(browser, path, width, scheme)
        assert noticed == [f"file://{path}"]
        assert page.evaluate("[...document.querySelectorAll('main > section')].map(each => each.id)") == sections
        assert page.evaluate("document.images.length") >= num_pictures
        assert page.evaluate("[...document.images].filter(each => !each.naturalWidth).length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        faults = Axe().run(page).response["violations"]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults if fault["impact"] != "minor"] == []
        assert [each for each in _WHOLE if page.evaluate(_IS_CUT, each)] == []
        picture = Path(os.environ.get("SCREENSHOTS", folder)) / f"{folder.name}-{width}.png"
        page.screenshot(path=picture, full_page=True, timeout=_SCREENSHOT_MS)
        page.close()


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


def without_breaks(page):
    """Return a page without what says where names may be broken."""
    return re.sub(r'<wbr>|<span class="end">(.*?)</span>', r"\1", page)


def read_tables(page):
    """Return the tables of a page, each with the section that it is in, and all of its text."""
    parser = _Tables()
    parser.feed(without_breaks(page))
    return parser.tables, " ".join("".join(parser.text).split())
