"""A browser for the tests of the viewer: Debian's Chromium, driven by Playwright. Without one of them these tests are skipped, and say why."""

import pytest

from support.browser import MISSING, WINDOW, chromium, drawn, launched


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if chromium() is None:
        pytest.skip(MISSING)
    with sync_api.sync_playwright() as playwright:
        opened = launched(playwright)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens an address. An error on a page, or something that its policy blocks, fails the test at its end.

    Add a part of an error that the test expects to `expected` of the function: the browser may report it after the test has looked.
    """
    contexts, errors, expected = [], [], []

    def open_(address, *, permissions=("clipboard-read", "clipboard-write"), **options):
        context = browser.new_context(viewport=WINDOW, accept_downloads=True, permissions=list(permissions), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)  # milliseconds; a busy machine is not a failure
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    open_.errors, open_.expected = errors, expected
    yield open_
    for context in contexts:
        context.close()
    unexpected = [error for error in errors if not any(part in error for part in expected)]
    assert not unexpected, unexpected


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
