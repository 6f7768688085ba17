"""The served page in a browser: a text is typed, read, continued, compared, followed, cancelled, and refused."""

import mlx.core as mx
import pytest

from metalens import TunedLens
from support.browser import drawn, settle
from support.view_server import Server, need_server_packages


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    need_server_packages()
    lens = TunedLens(8, 256)
    for i, translator in enumerate(lens.translators):
        translator.bias = 0.1 * mx.random.normal((256,), key=mx.random.key(i))
    path = tmp_path_factory.mktemp("lens") / "lens"
    lens.save(path)
    running = Server("--lens", path, "--max-tokens", 300)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def page(open_page, server):
    opened = open_page(server.address)
    drawn(opened)
    return opened


def read(page, text, second=None):
    page.get_by_label("Text A").fill(text)
    if second is not None:
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Text B").fill(second)
    page.get_by_role("button", name="Read").click()
    finished(page)


def finished(page):
    """Wait until a job is done, and the one that completes the curves after it."""
    page.locator("#prompt .state", has_text="Done").wait_for()
    page.get_by_role("button", name="Cancel").wait_for(state="hidden")
    settle(page)


def columns(page):
    """Return the number of positions of the first map."""
    width = page.locator(".extent").first.evaluate("e => parseFloat(e.style.width)")
    page.get_by_role("button", name="Table").click()
    last = page.locator("#table thead th").last.locator("small").inner_text()
    page.get_by_role("button", name="Table").click()
    assert width > 70
    return int(last) + 1


def test_an_empty_page_says_what_to_do(page):
    assert "Type a text above" in page.locator(".empty").inner_text()
    assert page.locator("#controls").is_hidden()
    page.get_by_role("button", name="Read").click()
    assert "There is no text to read" in page.locator("#message").inner_text()
    page.get_by_role("button", name="Copy", exact=True).click()
    for what in ("Copy Numbers, CSV", "Save Picture, PNG", "Copy Picture, SVG"):
        page.locator("#message").evaluate("e => { e.textContent = ''; }")
        page.get_by_role("button", name=what).click()
        page.locator("#message", has_text="nothing to copy yet").wait_for()


def test_a_typed_text_is_read_through_both_lenses(page):
    read(page, "Click the button")
    page.get_by_text("side by side").click()
    assert page.locator(".map figcaption > span:first-child").all_inner_texts() == ["logit lens", "tuned lens", "tuned lens − logit lens"]
    assert "Jensen-Shannon divergence (difference)" not in page.locator("[name=statistic]").inner_text()
    page.get_by_text("difference", exact=True).click()
    assert "Jensen-Shannon" in page.locator("[name=statistic]").inner_text()
    # The curves of the answer were asked for after the text was read.
    assert "Known only" not in page.locator("#inspector").inner_text()


def test_generated_tokens_appear_one_by_one(page):
    page.get_by_label("Text A").fill("Click the button")
    page.get_by_label("Tokens to generate").fill("250")
    page.evaluate(
        """() => {
          window.widths = new Set();
          new MutationObserver(() => {
            const generating = document.querySelector("#prompt .state").textContent.startsWith("generating");
            if (generating) window.widths.add(document.querySelector(".extent")?.style.width);
          }).observe(document.body, {attributes: true, childList: true, subtree: true});
        }"""
    )
    page.get_by_role("button", name="Generate").click()
    finished(page)
    assert columns(page) >= 20
    # The map has grown while tokens were generated. How often it was drawn depends on the machine.
    assert page.evaluate("[...window.widths].filter(width => width).length") > 1
    assert page.locator("input[name=lens]:disabled").count() == 0  # both lenses are there in the end


def test_a_job_can_be_cancelled_and_the_next_one_runs(page):
    page.get_by_label("Text A").fill("Click the button")
    page.get_by_label("Tokens to generate").fill("250")
    page.evaluate(
        """() => {
          const [state, cancel] = [document.querySelector("#prompt .state"), [...document.querySelectorAll("#prompt button")].at(-1)];
          const watch = new MutationObserver(() => {
            if (!state.textContent.startsWith("generating")) return;
            watch.disconnect();
            cancel.click(); // at once: a fast machine generates all of it before a pointer would be there
          });
          watch.observe(state, {childList: true, characterData: true, subtree: true});
        }"""
    )
    page.get_by_role("button", name="Generate").click()
    page.locator("#prompt .state", has_text="Cancelled").wait_for()
    read(page, "Press the button")
    assert columns(page) < 20


def test_two_texts_are_compared(page):
    read(page, "in the", "on the")
    assert page.locator(".map").count() == 3
    assert page.get_by_role("button", name="Generate").is_disabled()


def asked(page):
    """Return a list in the page of the jobs that it asks for from now on."""
    page.evaluate(
        """() => {
          window.asked = [];
          const whole = window.fetch;
          window.fetch = (path, ...rest) => {
            window.asked.push(path);
            return whole(path, ...rest);
          };
        }"""
    )
    return lambda: page.evaluate("window.asked")


def test_texts_are_compared_when_their_difference_is_shown(page):
    jobs = asked(page)
    read(page, "in the", "on the")
    assert "api/compare" not in jobs()
    page.locator("[name=statistic]").select_option("between:js")
    finished(page)
    assert jobs()[-1] == "api/compare"
    page.locator(".map").nth(2).locator("canvas").last.hover(position={"x": 100, "y": 100})
    assert "Jensen-Shannon divergence: 0." in page.locator("#tip p").last.inner_text()
    count = len(jobs())
    page.locator("[name=statistic]").select_option("between:tv")  # it came with the first
    settle(page)
    assert len(jobs()) == count


def test_layers_are_compared_when_that_is_shown(page):
    jobs = asked(page)
    read(page, "Click the button")
    page.locator("[name=statistic]").select_option("layers:js")
    finished(page)
    assert jobs()[-1] == "api/compare"
    page.locator(".map .box canvas").hover(position={"x": 100, "y": 60})
    assert "to the next layer: 0." in page.locator("#tip p").last.inner_text()
    page.get_by_text("logit lens", exact=True).first.click()  # of this lens they are not known yet
    finished(page)
    assert jobs()[-1] == "api/compare"
    page.mouse.move(5, 5)
    page.locator(".map .box canvas").hover(position={"x": 100, "y": 60})
    assert "to the next layer: 0." in page.locator("#tip p").last.inner_text()


def test_a_link_with_another_key_opens_nothing(open_page, server):
    opened = open_page(server.address.replace(server.key, "x" + server.key[1:]))
    assert "lacks the key" in opened.locator("body").inner_text()
    open_page.expected.append("403")  # the browser logs the status


def test_a_typed_token_is_followed_in_every_cell(page):
    read(page, "Click the button")
    page.get_by_label("Token to follow").fill(" menu")
    page.get_by_role("button", name="Follow", exact=True).click()
    page.locator(".chip", has_text="menu").wait_for()
    finished(page)
    assert "Known only" not in page.locator("#inspector").inner_text()


def follow(page, token, says):
    page.get_by_label("Token to follow").fill(token)
    page.get_by_role("button", name="Follow", exact=True).click()
    page.locator("#message", has_text=says).wait_for()
    assert page.locator(".chip", has_text=token.strip()).count() == 0


def test_a_tab_whose_text_another_one_has_replaced_follows_nothing_wrong(page, open_page, server):
    read(page, "Click the button")
    other = open_page(server.address)
    drawn(other)
    read(other, "Press it")
    follow(page, " menu", "read another text since")
    open_page.expected.append("422")  # the browser logs the status


def test_a_text_that_was_cancelled_half_way_follows_nothing_wrong(page):
    # The page gets the first part only, as if the reader had cancelled then. The server has all of the text.
    page.evaluate(
        """() => {
          const whole = window.fetch;
          window.fetch = async (path, options) => {
            const answer = await whole(path, options);
            if (path !== "api/read") return answer;
            return new Response((await answer.text()).split("\\n").find((line) => line.includes('"type":"part"')) + "\\n");
          };
        }"""
    )
    page.get_by_label("Text A").fill("Click the button " * 50)  # more than one part of 128 tokens
    page.get_by_role("button", name="Read").click()
    page.locator("#message", has_text="Not all of this text has been read").wait_for()  # the curves of the answer
    follow(page, " menu", "Not all of this text has been read")


def test_what_the_server_refuses_is_said_and_the_old_text_stays(page, open_page):
    read(page, "Click the button")
    before = columns(page)
    page.get_by_label("Text A").fill("word " * 1000)
    page.get_by_role("button", name="Read").click()
    page.locator("#message", has_text="at most 300").wait_for()
    assert columns(page) == before
    open_page.expected.append("422")  # the browser logs the status


def test_a_link_waits_for_enter_and_a_reload_does_not(page, open_page):
    read(page, "Click the button")
    page.get_by_text("logit lens", exact=True).first.click()
    page.wait_for_timeout(400)  # the address follows a moment later
    again = open_page(page.url)
    drawn(again)
    assert "Press Enter to read it" in again.locator("#prompt .state").inner_text()
    assert again.locator(".map").count() == 0
    again.get_by_label("Text A").press("Enter")
    finished(again)
    assert again.get_by_label("Text A").input_value() == "Click the button"
    assert again.locator(".map figcaption > span:first-child").all_inner_texts() == ["logit lens"]
    assert columns(again) == columns(page)
    page.reload()
    drawn(page)
    finished(page)
    assert columns(page) == columns(again)
