"""A browser for the tests of the viewer: Debian's Chromium, driven by Playwright. Without one of them these tests are skipped, and say why."""

import os
import shutil

import pytest

# Debian's Chromium, as root in a container, without its services.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = os.environ.get("METALENS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WINDOW = {"width": 1440, "height": 860}


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium); METALENS_CHROMIUM names another one")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens an address. An error on a page, or something that its policy blocks, fails the test at its end."""
    contexts, errors = [], []

    def open_(address, *, permissions=("clipboard-read", "clipboard-write"), **options):
        context = browser.new_context(viewport=WINDOW, accept_downloads=True, permissions=list(permissions), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)  # milliseconds; a busy machine is not a failure
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    open_.errors = errors
    yield open_
    for context in contexts:
        context.close()
    assert not errors, errors


@pytest.fixture
def show(open_page, tmp_path):
    """Return a function that writes a document as a file, opens it, and waits until it is drawn."""
    from metalens.viewer.page import page

    def show_(content, hash="", **options):
        file = tmp_path / "page.html"
        file.write_text(page(content), encoding="utf-8")
        opened = open_page(f"{file.as_uri()}#{hash}", **options)
        drawn(opened)
        return opened

    return show_


def drawn(page):
    """Wait until the page is ready and two frames have passed."""
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
