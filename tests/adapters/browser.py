"""A real browser for tests: Debian's chromium, driven by Playwright, which waits for what is expected instead of sleeping."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page that somebody looks at, and all that it asks for and complains about.

    Attributes:
        page: Playwright's.
        complaints: Errors and warnings of the console, among them those of the content security policy.
        requests: Addresses of all requests.
    """

    def __init__(self, browser: Browser, width: int = 1280, height: int = 900, scheme: Any = "light") -> None:
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce")
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def text(self, selector: str) -> str:
        """What one element says."""
        return self.page.locator(selector).inner_text()

    def table(self, selector: str) -> list[list[str]]:
        """Texts of the cells of a table's body, hidden ones included."""
        script = "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent))"
        found: list[list[str]] = self.page.locator(selector).evaluate(script)
        return found

    def close(self) -> None:
        """Leave."""
        self._context.close()
