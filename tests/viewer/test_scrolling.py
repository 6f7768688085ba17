"""A map of 80 layers and 2000 tokens stays smooth: what one frame costs does not depend on how long the text is."""

import pytest

from metalens.viewer.page import document
from support.view_documents import trajectory

LAYERS, POSITIONS = 80, 2000
FRAMES = 60

# Scrolls in every frame, and returns [milliseconds that drawing took, milliseconds since the frame before]. The callbacks of one frame run in order:
# the first one here, the page's drawing, which the event of scrolling has asked for, and the last one here.
FRAMES_OF_SCROLLING = """async ([frames, step]) => {
  const box = document.querySelector(".box");
  const times = [];
  let before = await new Promise((done) => requestAnimationFrame(done));
  for (let i = 0; i < frames; i++) {
    box.scrollLeft += step;
    times.push(await new Promise((done) => {
      let began = 0;
      requestAnimationFrame(() => { began = performance.now(); });
      box.dispatchEvent(new Event("scroll"));
      requestAnimationFrame((stamp) => { done([performance.now() - began, stamp - before]); before = stamp; });
    }));
  }
  return times;
}"""


@pytest.fixture(scope="module")
def long_document():
    return document([{"name": "A", "trajectories": [trajectory(LAYERS, POSITIONS, k=2)]}], "a model of 80 layers")


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("zoom", ["74,22", "8,8", "1,7"])
def test_scrolling_a_long_text(show, long_document, zoom):
    opened = show(long_document, f"zoom={zoom}&cell=5,0&at=10,10")
    drawing, frames = zip(*opened.evaluate(FRAMES_OF_SCROLLING, [FRAMES, 37]), strict=True)
    found = f"drawing {min(drawing):.1f} ms at best, {median(drawing):.1f} in the middle; a frame {min(frames):.1f} and {median(frames):.1f} ms"
    assert opened.locator(".box").evaluate("e => e.scrollWidth") == max(
        70 + POSITIONS * int(zoom.split(",")[0]) + 1, opened.locator(".box").evaluate("e => e.clientWidth")
    )
    assert opened.locator("canvas").first.evaluate("e => e.width * e.height") < 2_000_000  # as large as the window, not as the text
    # 60 frames a second are 16.7 ms each. What the page itself does has to fit, with room for the browser: a page that draws all cells takes seconds.
    # How long the browser takes for its part depends on the machine; those of tests are shared, and draw without a GPU.
    assert min(drawing) < 8, found
    assert min(frames) < 500, found


def test_a_long_text_adds_no_elements(show, long_document):
    short = document([{"name": "A", "trajectories": [trajectory(LAYERS, 20, k=5)]}], "a model of 80 layers")

    def elements(content):
        return show(content, "table=1&cell=5,0").evaluate("document.querySelectorAll('*').length")

    assert elements(long_document) <= elements(short) + 10
