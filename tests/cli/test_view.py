"""metalens view: the page as a file, and what it says when it can't."""

import json
import re
import sys

import pytest

PROMPT = "Click the button"


def document(path):
    return json.loads(re.search(r'id="document">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_a_page_has_both_lenses_the_followed_tokens_and_their_comparison(run, tmp_path, lens):
    done = run("view", "demo", "--text", PROMPT, "--lens", lens, "--token", " the", "--token", "#5", "--top-k", 3, "--save", "page.html")
    assert done.exit_code == 0, done.stderr
    found = document(tmp_path / "page.html")
    assert found["title"] == "demo"
    logit, tuned = found["texts"][0]["trajectories"]
    assert [logit["lens"]["name"], tuned["lens"]["name"]] == ["logit lens", "tuned lens"]
    assert logit["top"]["ids"]["shape"][2] == 3
    texts = dict(zip(logit["vocabulary"]["ids"], logit["vocabulary"]["text"], strict=True))
    assert texts[logit["chosen"]["ids"][0]] == " the"
    assert logit["chosen"]["ids"][1] == 5
    assert len(logit["chosen"]["ids"]) in (2, 3)  # and the model's answer at the end
    assert [each["of"] for each in found["comparisons"]] == [[[0, 1], [0, 0]]]


def test_two_texts(run, tmp_path):
    assert run("view", "demo", "--text", "in the", "--text", "on the", "--save", "page.html").exit_code == 0
    found = document(tmp_path / "page.html")
    assert len(found["texts"]) == 2
    assert [each["of"] for each in found["comparisons"]] == [[[0, 0], [1, 0]]]


def test_the_embedding_is_the_first_layer(run, tmp_path, lens):
    done = run("view", "demo", "--text", PROMPT, "--lens", lens, "--embedding", "--compare-layers", "--save", "page.html")
    assert done.exit_code == 0, done.stderr
    found = document(tmp_path / "page.html")
    for trajectory in found["texts"][0]["trajectories"]:
        assert [layer["layer"] for layer in trajectory["layers"]] == ["embedding", *range(8)]
    assert [layer["label"] for layer in found["texts"][0]["trajectories"][1]["layers"]][:2] == ["embedding*", "layer 0"]
    assert [each["statistics"]["js"]["values"]["shape"][0] for each in found["comparisons"]] == [9, 8, 8]


def test_layers_beside_the_next_ones(run, tmp_path, lens):
    assert run("view", "demo", "--text", PROMPT, "--lens", lens, "--compare-layers", "--save", "page.html").exit_code == 0
    found = document(tmp_path / "page.html")["comparisons"]
    assert [each["of"] for each in found] == [[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 1]]]
    assert [each["between"] for each in found] == ["lenses", "layers", "layers"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compare-layers"], "belong to --save"),
        (["--save", "page.html"], "needs one --text"),
        (["--save", "page.html", "--text", "a", "--text", "b", "--text", "c"], "needs one --text"),
        (["--text", "a"], "belong to --save"),
        (["--force"], "belong to --save"),
        (["--top-k", 51], "at most 50"),
        (["--save", "page.html", "--text", "a", "--port", 8000], "belong to the server"),
        (["--save", "page.html", "--text", "a", "--open"], "belong to the server"),
        (["--save", "page.html", "--text", "word " * 5000], "at most 2,048"),
        (["--save", "page.html", "--text", "a", "--token", "no single token"], "is no single token"),
        (["--save", "page.html", "--text", "a", "--token", "#999999"], "There is no token 999999"),
        (["--save", "page.html", "--text", "a", "--lens", "missing"], "missing"),
    ],
)
def test_bad_options_get_one_clear_answer(run, options, says):
    done = run("view", "demo", *options)
    assert done.exit_code == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_pages_are_replaced(run, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("my own page")
    refused = run("view", "demo", "--text", PROMPT, "--save", page)
    assert (refused.exit_code, page.read_text()) == (1, "my own page")
    assert "is not a page of the viewer" in refused.stderr
    for options in (["--force"], []):
        assert run("view", "demo", "--text", PROMPT, "--save", page, *options).exit_code == 0
    assert document(page)["texts"]


def test_without_the_server_s_packages_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run("view", "demo")
    assert done.exit_code == 1
    assert "pip install 'metalens[view]'" in done.stderr
