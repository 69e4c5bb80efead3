"""The built site in a real browser: no error, no outside request, nothing wider than a phone."""

import functools
import http.server
import re
import threading
from pathlib import Path

import pytest

from tests.browser import browser

SITE = Path(__file__).parents[1] / "site"

pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    if not (SITE / "index.html").exists():
        pytest.skip("needs the site: make docs")
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_links_lead_to_files(address):
    for page in SITE.rglob("index.html"):
        for link in re.findall(r'(?:href|src)="([^":#?]+)[#?"]', page.read_text()):
            target = (page.parent / link).resolve() if link[0] != "/" else SITE / link[1:]
            assert (target / "index.html").exists() or target.is_file(), f"{page}: {link}"


def test_every_page(address):
    pages = sorted(str(page.parent.relative_to(SITE)) for page in SITE.rglob("index.html"))
    assert len(pages) > 20
    wrong = {}
    with browser() as chromium:
        tab, seen = chromium.open(address)
        for page in pages:
            tab.set_viewport_size(dict(width=1200, height=800))
            tab.goto(address + page)
            for width in (1200, 360):
                tab.set_viewport_size(dict(width=width, height=800))
                # A frame later, so that the theme has heard of the width.
                tab.evaluate("new Promise(done => requestAnimationFrame(() => done()))")
                needed = tab.evaluate("document.documentElement.scrollWidth")
                if needed > width:
                    wrong[page, width] = needed
    assert not wrong, "pages wider than the window"
    assert not seen.errors
    assert not [request for request in seen.requests if not request.startswith(address)]


def test_search_finds_a_page(address):
    with browser() as chromium:
        tab, _ = chromium.open(address)
        tab.keyboard.press("/")
        tab.keyboard.type("drop_oldest")
        found = tab.locator(".md-search-result__link").first
        found.wait_for()
        assert "stream" in (found.get_attribute("href") or "")
