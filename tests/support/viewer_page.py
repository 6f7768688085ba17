"""What the viewer's tests read from an open page."""

import base64

import numpy as np

R, T = 6, 5  # layers and positions of `two_lenses()`
LEFT, CELL, ROW = 70, 60, 20  # the names of the rows; the cells of zoom=60,20


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed["base64"]), np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


class Cell:
    """A cell of the first map."""

    def __init__(self, page, row, position, rows=R + 1):
        box = page.locator(".box canvas").first.bounding_box()
        self.mouse = page.mouse
        self.x = box["x"] + LEFT + (position + 0.5) * CELL
        self.y = box["y"] + (rows - 1 - row + 0.5) * ROW

    def hover(self):
        self.mouse.move(self.x, self.y)

    def click(self):
        self.mouse.click(self.x, self.y)


def at(page, row, position):
    return Cell(page, row, position)


def inspected(page):
    return page.locator("#inspector h2").inner_text()


def luminances(page, rows=R + 1, positions=T):
    """Return the lightness [rows, positions] of the cells, 0 to 255, first layer first, beside the words and the frames."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    pixels = page.evaluate(
        """([rows, positions, left, cell, row]) => {
          const context = document.querySelector(".box canvas").getContext("2d");
          return Array.from({length: rows}, (_, r) => Array.from({length: positions}, (_, t) =>
            [...context.getImageData(left + t * cell + 5, (rows - 1 - r) * row + 5, 1, 1).data]));
        }""",
        [rows, positions, LEFT, CELL, ROW],
    )
    return np.array(pixels)[..., :3] @ [0.2126, 0.7152, 0.0722]
