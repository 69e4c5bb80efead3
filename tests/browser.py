"""A real browser for the tests of pages, where there is one."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclasses.dataclass
class Seen:
    """What a page has asked for, and the errors that it has logged."""

    requests: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Browser:
    """A running Chromium."""

    chromium: Any

    def open(self, address: str, width: int = 1200) -> tuple[Any, Seen]:
        """Opens an address in a tab, which goes away with the browser."""
        tab, seen = self.chromium.new_page(viewport=dict(width=width, height=800)), Seen()
        tab.set_default_timeout(120_000)  # milliseconds, on a machine that does much else
        tab.on("request", lambda request: self._ask(request.url, seen))
        tab.on("console", lambda said: said.type == "error" and seen.errors.append(said.text))
        tab.on("pageerror", lambda error: seen.errors.append(str(error)))
        tab.goto(address)
        return tab, seen

    def _ask(self, address: str, seen: Seen) -> None:
        if not address.startswith("data:"):
            seen.requests.append(address)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Starts a browser, or skips the test where there is none."""
    needed = "needs the package playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=needed)
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(NAMES)}")
    with playwright.sync_playwright() as driver:
        # No sandbox: containers run tests as root, where Chromium has none.
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
