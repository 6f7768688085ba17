"""Debian's Chromium, driven by Playwright: for the tests of the viewer, its pictures and its frames."""

import os
import shutil

# As root in a container, without its services.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium is installed (Debian: apt-get install chromium); METALENS_CHROMIUM names another one"
WINDOW = {"width": 1440, "height": 860}


def chromium():
    """Return the path of the browser, or None."""
    return os.environ.get("METALENS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def launched(playwright):
    """Return the browser, started."""
    return playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)


def drawn(page):
    """Wait until the viewer's page is ready and two frames have passed."""
    page.locator("html[data-ready=true]").wait_for()
    settle(page)


def settle(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def clipboard(page, *, holds):
    """Return what is in the clipboard, once it holds a text. (`wait_for_function` is no help: the page's policy forbids eval.)"""
    for _ in range(100):
        text = page.evaluate("navigator.clipboard.readText()")
        if holds in text:
            return text
        page.wait_for_timeout(50)
    raise AssertionError(f"the clipboard has {text!r:.200}, without {holds!r}")
