"""Headless Chromium for tests and benchmarks of the HTML report, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
MISSING = "needs Chromium: apt-get install chromium"


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that runs no page of the web, in no sandbox: containers run tests as root."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
