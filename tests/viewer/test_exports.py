"""What readers take away from a page: pictures, numbers, links. And hostile tokens on every way out."""

import csv
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from metalens.viewer.page import document, page
from support.browser import clipboard, drawn
from support.view_documents import WORDS, trajectory, two_lenses
from support.viewer_page import R, T, at, inspected, numbers

from .test_page import HOSTILE

SVG = "{http://www.w3.org/2000/svg}"


def saved(opened, kind):
    opened.get_by_role("button", name="Copy", exact=True).click()
    with opened.expect_download() as download:
        opened.get_by_role("button", name=f"Save {kind}").click()
    return download.value


def test_a_png_shows_what_is_seen_at_twice_the_size(show):
    opened = show(two_lenses(), "zoom=60,20&lens=side")
    picture = Image.open(saved(opened, "Picture, PNG").path())
    widths = [box.evaluate("e => e.clientWidth") for box in opened.locator(".box").all()]
    assert picture.width == 2 * (sum(widths) + 2 * 18)
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_an_svg_has_the_words_as_text(show):
    opened = show(two_lenses(), "zoom=60,20&lens=1")
    root = ElementTree.parse(saved(opened, "Picture, SVG").path()).getroot()
    texts = [element.text for element in root.iter(f"{SVG}text")]
    ids = numbers(two_lenses()["texts"][0]["trajectories"][1]["top"]["ids"])[..., 0]
    for word in {WORDS[i] for i in ids.flat if len(WORDS[i]) < 6}:
        assert texts.count(word) >= (ids == WORDS.index(word)).sum()
    assert len(list(root.iter(f"{SVG}image"))) == 1


def test_a_csv_has_every_number(show):
    opened = show(two_lenses(), "lens=1")
    rows = list(csv.DictReader(io.StringIO(saved(opened, "Numbers, CSV").path().read_text(encoding="utf-8"))))
    assert len(rows) == (R + 1) * T
    json = two_lenses()["texts"][0]["trajectories"][1]
    for name in ("entropy", "kl", "cross_entropy"):
        values = [float(row[name] or "nan") for row in rows if row["layer"] != "model"]
        np.testing.assert_allclose(values, numbers(json["statistics"][name]["values"]).ravel(), rtol=1e-6)
    assert [row["top_token"] for row in rows if row["layer"] == "0"] == [WORDS[i] for i in numbers(json["top"]["ids"])[0, :, 0]]


def test_copies_go_to_the_clipboard(show):
    opened = show(two_lenses(), "lens=1")
    opened.get_by_role("button", name="Copy", exact=True).click()
    opened.get_by_role("button", name="Copy Numbers, CSV").click()
    assert clipboard(opened, holds="text_and_lens").startswith("text_and_lens,layer")
    opened.locator("#said", has_text="Numbers, CSV: copied.").wait_for(state="attached")


def test_where_the_browser_does_not_let_it_copy_it_saves(show):
    opened = show(two_lenses(), "lens=1", permissions=())
    opened.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    opened.get_by_role("button", name="Copy", exact=True).click()
    with opened.expect_download() as download:
        opened.get_by_role("button", name="Copy Numbers, CSV").click()
    assert download.value.suggested_filename == "metalens.csv"


def test_a_link_shows_the_same_view_again(show, open_page):
    opened = show(two_lenses(), "zoom=60,20&lens=0&statistic=kl&palette=gray&words=value&theme=dark&follow=2,4")
    at(opened, 2, 1).click()
    opened.get_by_role("button", name="Copy", exact=True).click()
    opened.get_by_role("button", name="Copy link").click()
    link = clipboard(opened, holds="#")
    again = open_page(link)
    drawn(again)
    assert inspected(again).startswith("layer 2 after")
    assert again.locator(".chip").count() == 2
    assert again.evaluate("document.documentElement.hasAttribute('data-dark')")

    def content(which):
        return which.evaluate("document.querySelector('.box canvas').toDataURL()")

    opened.mouse.move(2, 2)
    opened.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert content(opened) == content(again)


@pytest.mark.parametrize(
    "hash",
    [
        "cell=900,900&follow=1,x,-3,999999",
        "zoom=0,nan&at=-5,1e9&statistic=nothing&lens=7&text=9",
        "theme=<b>&palette=__proto__&words=x",
        "cell=1",
        "%%%",
    ],
)
def test_a_link_that_makes_no_sense_shows_something_sensible(show, hash):
    opened = show(two_lenses(), hash)
    assert inspected(opened)
    assert opened.locator(".map").count() == 1


def test_hostile_tokens_are_inert_on_the_page_and_on_every_way_out(show, open_page, tmp_path):
    content = document([{"name": "A", "trajectories": [trajectory(words=HOSTILE, chosen=(0,))]}], HOSTILE[1])
    opened = show(content, "zoom=60,20&table=1&follow=0,1,6&words=token")
    at(opened, 3, 2).hover()
    at(opened, 2, 1).click()
    assert opened.evaluate("[window.pwned, document.querySelectorAll('img, b, script').length]") == [None, 2]  # the page's own two scripts
    assert opened.locator("#tip, #inspector, #table").count() == 3
    shown = opened.locator("#table .token").all_text_contents()
    assert set(shown) <= set(HOSTILE)
    picture = saved(opened, "Picture, SVG").path()
    ElementTree.parse(picture)
    assert b"<script" not in picture.read_bytes()
    numbers_file = saved(opened, "Numbers, CSV").path()
    fields = [field for line in csv.reader(io.StringIO(numbers_file.read_text(encoding="utf-8"), newline="")) for field in line]
    assert not [field for field in fields if field.startswith(("=", "+", "@"))]
    assert "'=HYPERLINK(1)" in fields


def test_a_script_that_comes_into_the_page_does_not_run(show, open_page):
    opened = show(two_lenses())
    opened.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))")
    opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">')")
    opened.wait_for_timeout(200)
    assert opened.evaluate("window.pwned") is None
    assert any("Content Security Policy" in error for error in open_page.errors)
    open_page.expected.append("Content Security Policy")


def test_a_frame_of_a_notebook_shows_the_map(open_page, tmp_path):
    from metalens.viewer.notebook import notebook_html

    file = tmp_path / "notebook.html"
    file.write_text(f"<!doctype html><body>{notebook_html(two_lenses())}</body>", encoding="utf-8")
    opened = open_page(file.as_uri())
    frame = opened.frame_locator("iframe")
    frame.locator("html[data-ready=true]").wait_for()
    assert frame.locator(".map").count() == 1
    assert "</script" in page(two_lenses())
