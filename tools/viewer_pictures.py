"""Takes the pictures of the viewer in docs/viewer again. `make pictures` runs it.

It trains a lens for SmolLM2 (its closed form on 2,048 tokens: the same on every machine within rounding), writes pages, opens them in
Chromium, and takes what the window shows. Without Chromium or Playwright it says so, and ends with an error.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "python" / "metalens" / "assets"
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import MISSING, WINDOW, chromium, drawn, launched, settle  # noqa: E402  tests/ is found only now
from support.view_server import Server  # noqa: E402

MODEL, TITLE = "smollm2", "SmolLM2-135M-Instruct"
LENS = ["--recipe", "fast", "--steps", "0", "--warm-start-tokens", "2048", "--max-seq-len", "256"]
FACT, OTHER = "The capital of France is", "The capital of Japan is"
LONG_TEXT = 1200  # characters of the long text


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "viewer", help="folder of the pictures")
    parser.add_argument("--lens", type=Path, help="a lens of SmolLM2 to show, in place of a new one")
    options = parser.parse_args()
    if chromium() is None:
        sys.exit(f"Error: {MISSING}.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("Error: Playwright is not installed: pip install playwright.")
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = write_pages(Path(folder), options.lens)
        browser = launched(playwright)

        def take(name: str, page: Any) -> None:
            settle(page)
            page.screenshot(path=options.out / f"{name}.png")
            page.context.close()

        def opened(page: str, **choices: Any) -> Any:
            shown = browser.new_context(viewport=WINDOW).new_page()
            shown.goto(f"{pages[page].as_uri()}#{urlencode(choices)}")
            drawn(shown)
            return shown

        followed = ",".join(str(token_id(pages["fact"], text)) for text in (" Paris", " the"))
        take("lenses", opened("fact", lens="side", follow=followed, cell="24,4"))
        take("fact", opened("fact", lens="1", statistic="layers:js", palette="cividis", depth=1, follow=followed, cell="24,4"))
        take("texts", opened("texts", text="compare", cell="24,4"))
        long = opened("long", statistic="kl", theme="dark", zoom="7,20", cell="20,40", depth=1)
        long.mouse.move(500, 380)
        take("long", long)
        take("live", generating(browser))
        browser.close()


def write_pages(folder: Path, lens_path: Path | None) -> dict[str, Path]:
    """Write the pages that are opened, and return their paths."""
    import metalens
    from metalens.display.pages import reading_page

    if lens_path is None:
        lens_path = folder / "lens"
        run(["train", MODEL, "--data", str(ASSETS / "lens_train.txt"), *LENS, "--out", str(lens_path)])
    model, lens = metalens.load(MODEL), metalens.TunedLens.load(lens_path)
    long_text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")[:LONG_TEXT]
    contents = {
        "fact": reading_page(model, [FACT], lens, title=TITLE, tokens=[" Paris", " the"], compare_layers=True),
        "texts": reading_page(model, [FACT, OTHER], lens, title=TITLE),
        "long": reading_page(model, [long_text], title=TITLE, top_k=5),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in contents}


def run(arguments: list[str]) -> None:
    """Run a command of metalens in this process, so that its environment is the same."""
    from metalens.cli import main as command

    command(arguments, standalone_mode=False)


def token_id(page: Path, text: str) -> int:
    """Return the id that a page's document has for a text."""
    found = re.search(r'id="document">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no document.")
    vocabulary = json.loads(found[1])["texts"][0]["trajectories"][0]["vocabulary"]
    return int(vocabulary["ids"][vocabulary["text"].index(text)])


def generating(browser: Any) -> Any:
    """Return a served page in the middle of a text that the demo model continues."""
    server = Server()
    page = browser.new_context(viewport=WINDOW).new_page()

    def stop(_: Any) -> None:
        server.process.send_signal(signal.SIGCONT)
        server.stop()

    page.context.on("close", stop)
    page.goto(server.address)
    drawn(page)
    page.get_by_label("Text A").fill("Click the button in the top right")
    page.get_by_label("Tokens to generate").fill("256")
    page.get_by_role("button", name="Generate").click()
    page.locator("#prompt .state", has_text=re.compile(r"generating: [1-9]\d of")).wait_for()
    server.process.send_signal(signal.SIGSTOP)  # a fast machine would end before the picture is taken
    return page


if __name__ == "__main__":
    main()
