"""The map in a real browser: colors, hover, cells, lenses, texts, zoom, keys, table, themes."""

import numpy as np
import pytest

from metalens.viewer.page import document
from support.browser import settle
from support.view_documents import WORDS, comparison, layers_compared, trajectory, two_lenses
from support.viewer_page import CELL, LEFT, ROW, R, T, at, inspected, luminances, numbers

HASH = "zoom=60,20&lens=1"


def top_words(statistic="top", lens=1, layers=6, positions=5):
    ids = numbers(two_lenses(layers, positions)["texts"][0]["trajectories"][lens]["top"]["ids"])[..., 0]
    return [[WORDS[i] for i in row] for row in ids]


@pytest.mark.parametrize("statistic", ["max_probability", "entropy", "kl", "cross_entropy"])
@pytest.mark.parametrize("palette", ["ink", "cividis", "gray", "viridis"])
def test_the_color_shows_the_statistic(show, statistic, palette):
    page = show(two_lenses(), f"{HASH}&statistic={statistic}&palette={palette}")
    values = numbers(two_lenses()["texts"][0]["trajectories"][1]["statistics"][statistic]["values"])
    seen = luminances(page)[:R]
    known = np.isfinite(values)
    order = np.argsort(values[known])
    falls = palette in ("ink", "gray")
    steps = np.diff(seen[known][order]) * (-1 if falls else 1)
    assert steps.min() > -1.5  # 256 colors: equal values may differ by one step of rounding
    assert abs(seen[known][order][-1] - seen[known][order][0]) > 60


def test_a_rank_is_on_a_logarithmic_scale(show):
    page = show(two_lenses(), f"{HASH}&statistic=rank&palette=gray")
    ranks = numbers(two_lenses()["texts"][0]["trajectories"][1]["statistics"]["rank"]["values"]).astype(float)
    seen = luminances(page)[:R]
    lightness = {rank: seen[ranks == rank].mean() for rank in np.unique(ranks[ranks > 0])}
    assert list(lightness.values()) == sorted(lightness.values(), reverse=True)
    low, high = min(lightness), max(lightness)
    assert high >= 4 * low
    # The rank in the middle by factors, not by steps, has the middle color.
    middle = lightness[min(lightness, key=lambda rank: abs(rank - np.sqrt(low * high)))]
    assert abs(middle - 133) < 50  # between the fourth and the fifth of the map's eight stops


def test_hover_shows_the_most_likely_tokens_with_bars(show):
    page = show(two_lenses(), HASH)
    assert page.locator("#tip").is_hidden()
    at(page, 3, 2).hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.locator("h2").inner_text().startswith("layer 3 after")
    top = two_lenses()["texts"][0]["trajectories"][1]["top"]
    expected = [WORDS[i] for i in numbers(top["ids"])[3, 2]]
    assert tip.locator(".token").all_inner_texts()[1:] == [word.strip() for word in expected]
    widths = [
        bar.evaluate("e => e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width") for bar in tip.locator(".bar").all()
    ]
    np.testing.assert_allclose(widths, np.maximum(np.exp(numbers(top["log_probabilities"])[3, 2]), 0.005), atol=0.01)
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_a_click_chooses_a_cell_and_follows_tokens(show):
    page = show(two_lenses(), HASH)
    at(page, 2, 1).click()
    assert inspected(page).startswith("layer 2 after")
    token = page.locator("#inspector .guesses button").nth(1)
    name = token.locator(".token").inner_text()
    token.click()
    chips = page.locator(".chip")
    assert chips.count() == 2
    assert name in chips.nth(1).inner_text()
    assert page.locator(".curve").count() == 2
    assert page.locator(".curve path").count() == 4  # two tokens; probability and rank
    chips.nth(1).click()
    assert page.locator(".chip").count() == 1


def test_the_curve_of_a_chosen_token_has_its_probability_in_every_layer(show):
    page = show(two_lenses(), f"{HASH}&follow=2&cell=3,4")
    chosen = two_lenses()["texts"][0]["trajectories"][1]["chosen"]
    expected = np.exp(np.append(numbers(chosen["log_probabilities"])[0, :, 4], numbers(chosen["model"]["log_probabilities"])[0, 4]))
    points = path_points(page.locator(".curve path").first)
    zero, one = (float(page.locator(".curve").first.locator("line.rule").nth(i).get_attribute("y1")) for i in (0, 2))
    np.testing.assert_allclose((points[:, 1] - zero) / (one - zero), expected, atol=0.01)
    assert "Known only" not in page.locator("#inspector").inner_text()
    page.get_by_text("along the text").click()
    along = path_points(page.locator(".curve path").first)
    np.testing.assert_allclose((along[:, 1] - zero) / (one - zero), np.exp(numbers(chosen["log_probabilities"])[0, 3]), atol=0.01)


def path_points(path):
    return np.array([[float(n) for n in part.split()] for part in path.get_attribute("d").replace("M", "L").split("L") if part])


def test_the_page_says_where_a_token_is_first_on_top(show):
    page = show(two_lenses(), f"{HASH}&cell=5,3")
    words = top_words()
    model = numbers(two_lenses()["texts"][0]["trajectories"][1]["top"]["model"]["ids"])[3, 0]
    first = next(r for r in range(R) if words[r][3] == WORDS[model])
    assert page.locator(".chip").inner_text().replace("\n", " ").startswith(f"{WORDS[model].strip()} first on top: layer {first}")


def test_a_curve_without_all_values_says_so(show):
    page = show(two_lenses(), f"{HASH}&follow=7")
    assert "Known only where it is among the top 4" in page.locator("#inspector").inner_text()


@pytest.mark.parametrize("typed", [" Paris", "Paris", "#2"])
def test_a_token_can_be_named(show, typed):
    page = show(two_lenses(), f"{HASH}&follow=")
    page.get_by_label("Token to follow").fill(typed)
    page.get_by_role("button", name="Follow", exact=True).click()
    assert "Paris" in page.locator(".chip").inner_text()


def test_a_token_that_the_page_does_not_know_gets_one_clear_answer(show):
    page = show(two_lenses(), HASH)
    page.get_by_label("Token to follow").fill("Zanzibar")
    page.get_by_label("Token to follow").press("Enter")
    assert "does not know that token" in page.locator("#inspector [role=status]").inner_text()


def test_lenses_alone_their_difference_and_side_by_side(show):
    page = show(two_lenses(), HASH)
    titles = page.locator(".map figcaption > span:first-child")
    assert titles.all_inner_texts() == ["tuned lens"]
    tuned = luminances(page)
    page.get_by_text("logit lens", exact=True).first.click()
    assert titles.all_inner_texts() == ["logit lens"]
    assert np.abs(luminances(page) - tuned).max() > 30
    page.get_by_text("side by side").click()
    assert titles.all_inner_texts() == ["logit lens", "tuned lens", "tuned lens − logit lens"]
    page.get_by_text("difference", exact=True).click()
    at(page, 1, 1).hover()
    a, b = (numbers(t["statistics"]["max_probability"]["values"])[1, 1] for t in reversed(two_lenses()["texts"][0]["trajectories"]))
    assert f"{'+' if a > b else '−'}{abs(100 * (a - b)):.0f}" in page.locator("#tip p").last.inner_text()


def test_divergences_between_the_lenses_can_be_shown(show):
    page = show(two_lenses(), "zoom=60,20&lens=difference&statistic=between:js")
    at(page, 1, 1).hover()
    js = numbers(two_lenses()["comparisons"][0]["statistics"]["js"]["values"])[1, 1]
    assert f"Jensen-Shannon divergence: {js:.2f} nats" in page.locator("#tip p").last.inner_text()


def test_each_layer_beside_the_next_one_can_be_shown(show):
    page = show(layers_compared(), "zoom=60,20")
    at(page, 2, 1).hover()
    js = numbers(layers_compared()["comparisons"][0]["statistics"]["js"]["values"])
    assert f"Jensen-Shannon divergence, to the next layer: {js[2, 1]:.2f} nats" in page.locator("#tip p").last.inner_text()
    at(page, R - 1, 1).hover()
    assert "to the next layer: –" in page.locator("#tip p").last.inner_text()  # the last layer has no next one
    seen = luminances(page)
    order = np.argsort(js.ravel())
    assert np.diff(seen[: R - 1].ravel()[order]).max() < 1.5  # the more, the darker
    np.testing.assert_allclose(seen[R - 1 :], seen[R, 0])  # no value: the ground
    assert "KL(layer || next layer)" in page.locator("#inspector .numbers").inner_text()


def depths(lens=1):
    top = two_lenses()["texts"][0]["trajectories"][lens]["top"]
    same = numbers(top["ids"])[..., 0] == numbers(top["model"]["ids"])[:, 0]
    return [next(row for row in range(R + 1) if same[row:, t].all()) for t in range(T)]


def test_the_prediction_depth_is_a_line_and_a_number(show):
    page = show(two_lenses(), f"{HASH}&cell=0,3")
    name = f"layer {depths()[3]}" if depths()[3] < R else "model"
    assert f"the model’s answer from\t{name}" in page.locator("#inspector .numbers").inner_text()
    column = """([left, cell, height]) => {
      const data = document.querySelector(".box canvas").getContext("2d").getImageData(left + 2.5 * cell, 0, 1, height).data;
      return Array.from({length: height}, (_, y) => data[4 * y]);
    }"""
    where = [LEFT, CELL, (R + 1) * ROW]
    before = page.evaluate(column, where)
    page.get_by_label("depth").check()
    settle(page)
    changed = np.flatnonzero(np.array(before) != page.evaluate(column, where))
    line = (R + 1 - depths()[2]) * ROW
    assert abs(changed.mean() - line) < 1
    assert 1 <= len(changed) <= 6
    page.locator("#maps").focus()
    page.keyboard.press("p")
    settle(page)
    assert page.evaluate(column, where) == before


def texts(lengths):
    trajectories = [trajectory(R, length, seed=i) for i, length in enumerate(lengths)]
    same = [comparison([[0, 0], [1, 0]], R, lengths[0])] if lengths[0] == lengths[1] else []
    return document([{"name": name, "trajectories": [t]} for name, t in zip("AB", trajectories, strict=True)], "a model", same)


def test_two_texts_of_equal_length_are_compared(show):
    page = show(texts([5, 5]), "text=compare")
    titles = page.locator(".map figcaption > span:first-child").all_inner_texts()
    assert titles == ["text A, tuned lens", "text B, tuned lens", "A − B"]
    page.locator("label:has-text('text B')").first.click()
    assert page.locator(".map").count() == 1


def test_texts_of_unequal_length_stand_side_by_side_without_a_difference(show):
    page = show(texts([5, 7]), "text=compare")
    assert page.locator(".map").count() == 2


def test_keys_move_the_cell_and_say_where_it_is(show):
    page = show(two_lenses(), f"{HASH}&cell=2,1")
    page.locator("#maps").focus()
    for key, expected in [
        ("ArrowUp", (3, 1)),
        ("ArrowRight", (3, 2)),
        ("ArrowDown", (2, 2)),
        ("Home", (2, 0)),
        ("End", (2, 4)),
        ("PageUp", (6, 4)),
        ("PageDown", (0, 4)),
    ]:
        page.keyboard.press(key)
        row, position = expected
        assert inspected(page).startswith("the model" if row == R else f"layer {row} after")
        assert inspected(page).endswith(f"· {position}")
    said = page.locator("#said").inner_text()
    assert said.startswith("layer 0, after")
    assert "probability of the top token" in said
    followed = page.locator(".chip .token").all_inner_texts()
    top = page.locator("#inspector .guesses .token").first.inner_text()
    page.keyboard.press("Enter")
    assert page.locator(".chip .token").all_inner_texts() == ([] if followed == [top] else [*followed, top])


def test_the_table_has_the_words_and_numbers_of_the_map(show):
    page = show(two_lenses(), HASH)
    assert page.locator("#table").is_hidden()
    page.get_by_role("button", name="Table").click()
    rows = page.locator("#table tbody tr")
    assert rows.count() == R + 1
    assert rows.nth(R).locator("th").inner_text() == "layer 0"
    assert [cell.strip() for cell in rows.nth(R).locator(".token").all_inner_texts()] == [word.strip() for word in top_words()[0]]
    assert page.locator("#table td[aria-selected]").count() == 1


def test_a_long_table_shows_a_part_and_turns_its_pages(show):
    page = show(document([{"name": "A", "trajectories": [trajectory(3, 30)]}], "a model"), "table=1")
    assert "positions 18 to 29 of 30" in page.locator("#table").inner_text()
    page.get_by_text("← earlier").click()
    assert "positions 11 to 22 of 30" in page.locator("#table").inner_text()


def test_themes(show):
    page = show(two_lenses(), HASH, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(ground) != dark
    assert luminances(page).mean() > 0


def test_keys_are_listed_and_the_list_closes(show):
    page = show(two_lenses(), HASH)
    page.locator("#maps").focus()
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.get_by_role("button", name="Close").click()
    assert page.locator("#help").is_hidden()


def test_a_text_of_one_token_and_a_model_of_one_layer(show):
    page = show(document([{"name": "A", "trajectories": [trajectory(1, 1, k=1)]}], "a model"))
    assert inspected(page)
    assert T == 5
    assert page.locator(".curve").count() == 2
