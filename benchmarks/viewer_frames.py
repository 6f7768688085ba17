"""What a frame of the viewer costs: a map of 80 layers and 2000 tokens is scrolled, the pointer moves over it, a cell is chosen.

    PYTHONPATH=tests python -m benchmarks.viewer_frames

All times are CPU time, so that other work on the machine counts little. "script" is the page's own code. "main thread" adds style, layout and
the raster of the canvas, which the page causes too. "browser" is the sum of all threads and processes of Chromium: without a GPU its CPU also puts
together what the screen shows. The document has random numbers; no model runs.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from metalens.viewer.page import document, page
from support.browser import MISSING, WINDOW, chromium, drawn, launched, settle
from support.view_documents import trajectory

LAYERS, POSITIONS = 80, 2000
FRAMES, RUNS = 30, 3
ZOOMS = {"words, cells of 74 x 22 pixels": "74,22", "colors, 8 x 8": "8,8", "colors, 1 x 7": "1,7"}
BUDGET = 1000 / 60  # milliseconds

# Does something to the map in every frame, and waits for the frame after it.
EACH_FRAME = """async ([frames, what]) => {
  const box = document.querySelector(".box");
  const canvas = box.querySelector("canvas");
  const {left, top} = canvas.getBoundingClientRect();
  const at = (i) => ({clientX: left + 80 + 77 * (i % 11), clientY: top + 40 + 3 * i, bubbles: true});  // another cell in every frame
  const send = (kind, i) => canvas.dispatchEvent(new PointerEvent(kind, at(i)));
  for (let i = 0; i < frames; i++) {
    if (what === "scroll") box.scrollLeft += 37;
    else if (what !== "idle") send(what === "point" ? "pointermove" : "click", i);
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  }
}"""


def cpu_of_children() -> float:
    """Return the CPU seconds of all processes that this one has started, and of theirs."""
    parents, used = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)], used[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])

    def is_mine(process: int) -> bool:
        while process in parents and parents[process] != os.getpid():
            process = parents[process]
        return process in parents

    return sum(ticks for process, ticks in used.items() if is_mine(process)) / os.sysconf("SC_CLK_TCK")


def measured(shown, session, what: str) -> tuple[float, float, float]:
    """Return the milliseconds of a frame: script, main thread, browser."""

    def now() -> tuple[float, float, float]:
        metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
        return metrics["ScriptDuration"], metrics["TaskDuration"], cpu_of_children()

    before = now()
    shown.evaluate(EACH_FRAME, [FRAMES, what])
    return tuple(1000 * (b - a) / FRAMES for a, b in zip(before, now(), strict=True))


def main() -> None:
    if chromium() is None:
        raise SystemExit(f"Error: {MISSING}.")
    from playwright.sync_api import sync_playwright

    content = document([{"name": "A", "trajectories": [trajectory(LAYERS, POSITIONS, k=5)]}], "a model of 80 layers")
    print("| map | what | script | main thread | browser |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        file.write_text(page(content), encoding="utf-8")
        browser = launched(playwright)
        for name, zoom in ZOOMS.items():
            shown = browser.new_context(viewport=WINDOW).new_page()
            shown.goto(f"{file.as_uri()}#zoom={zoom}&cell=5,0")
            drawn(shown)
            session = shown.context.new_cdp_session(shown)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            for what, label in (("idle", "nothing"), ("scroll", "scroll"), ("point", "move the pointer"), ("choose", "choose a cell")):
                runs = []
                for _ in range(RUNS):
                    shown.locator(".box").evaluate("e => { e.scrollLeft = 0; }")
                    settle(shown)
                    runs.append(measured(shown, session, what))
                times = [f"{statistics.median(each):.2f}" for each in zip(*runs, strict=True)]
                print(f"| {name} | {label} | {' | '.join(times)} |", flush=True)
            shown.context.close()
        browser.close()
    print(f"\nMilliseconds a frame, medians of {RUNS} runs of {FRAMES} frames; 60 frames a second leave {BUDGET:.1f}.")


if __name__ == "__main__":
    main()
