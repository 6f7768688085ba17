"""The page as a file: complete, inert whatever tokens say, and the same in notebooks."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest

from metalens.viewer.notebook import notebook_html
from metalens.viewer.page import document, is_page, page
from support.view_documents import trajectory, two_lenses

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!--<script>",
    "]]>",
    "\u2028\u2029",
    "javascript:alert(1)",
    "\"'`${window.pwned = 1}",
    "&lt;b&gt;",
    "\u202etxt\u202c",
    "{{SCRIPT}}",
    "=HYPERLINK(1)",
    "\x1b[31m",
]


class Elements(HTMLParser):
    """Collects what a parser of HTML finds in a page."""

    def __init__(self):
        super().__init__()
        self.found, self.texts, self.open = [], {}, False

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open = True

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.open:
            self.texts[len(self.found) - 1] = self.texts.get(len(self.found) - 1, "") + data


def parsed(text):
    elements = Elements()
    elements.feed(text)
    return elements


def hostile_document(title="a model"):
    return document([{"name": "A", "trajectories": [trajectory(words=HOSTILE, chosen=(0,))]}], title)


def test_a_page_needs_no_other_file():
    found = parsed(page(two_lenses())).found
    assert not [attributes for _, attributes in found if "src" in attributes]
    assert [attributes["href"] for _, attributes in found if "href" in attributes] == ["data:,"]


@pytest.mark.parametrize("live", [None, {"lenses": ["logit lens"], "max_tokens": 9, "max_new_tokens": 9}])
def test_the_policy_lets_only_this_script_and_this_style_run(live):
    elements = parsed(page(two_lenses() | {"live": live}))
    (policy,) = [a["content"] for tag, a in elements.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (script,) = [elements.texts[i] for i, (tag, a) in enumerate(elements.found) if tag == "script" and a["type"] == "module"]
    (style,) = [elements.texts[i] for i, (tag, _) in enumerate(elements.found) if tag == "style"]

    def allowed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == allowed(script)
    assert rules["style-src"] == allowed(style)
    assert rules.get("connect-src") == ("'self'" if live else None)


def test_the_modules_are_joined_without_a_rest():
    (script,) = re.findall(r'<script type="module">(.*?)</script>', page(two_lenses()), re.DOTALL)
    lines = [line for line in script.splitlines() if not line.lstrip().startswith(("*", "/"))]
    assert not [line for line in lines if re.match(r"\s*(import|export)\b", line)]
    declared = re.findall(r"^(?:async )?(?:function\*?|class|const|let) (\w+)", script, re.MULTILINE)
    assert len(declared) == len(set(declared)), "two modules declare the same name"


def test_hostile_tokens_do_not_change_what_a_parser_finds():
    def shape(content):
        return [tag for tag, _ in parsed(page(content)).found]

    assert shape(hostile_document(title="</title><script>")) == shape(two_lenses())


def test_the_document_arrives_unchanged():
    content = hostile_document()
    elements = parsed(page(content))
    (data,) = [elements.texts[i] for i, (_, a) in enumerate(elements.found) if a.get("type") == "application/json"]
    assert json.loads(data) == content


def test_a_notebook_has_the_page_in_a_frame_that_reaches_nothing():
    content = hostile_document()
    ((tag, attributes),) = parsed(notebook_html(content)).found
    assert tag == "iframe"
    assert "allow-same-origin" not in attributes["sandbox"]
    assert attributes["srcdoc"] == page(content)
    assert html.escape("</script><script>window") not in html.unescape(notebook_html(content))


@pytest.mark.parametrize("content", [two_lenses(), hostile_document()])
def test_a_page_is_known_by_its_document(tmp_path, content):
    file = tmp_path / "page.html"
    file.write_text(page(content), encoding="utf-8")
    assert is_page(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "my own page",
        "<!doctype html>\n<title>another page</title>",
        # A text about pages, and pages that quote one.
        'It has <script type="application/json" id="document">{"format":"metalens.view"}</script>',
        '<script type="application/json" id="document">{"format":"metalens.view"}</script>',
        '<!doctype html>\n<pre>x <script type="application/json" id="document">{"format":"metalens.view"}</script></pre>',
        f"<!doctype html>\n{html.escape(page(two_lenses()))}",
        # Documents of others, and half a document.
        '<!doctype html>\n<script type="application/json" id="document">{"format":"another"}</script>',
        '<!doctype html>\n<script type="application/json" id="document">["metalens.view"]</script>',
        '<!doctype html>\n<script type="application/json" id="document">{"format":"metalens.view"</script>',
        '<!doctype html>\n<script type="application/json" id="document">{"format":"metalens.view"',
        '<!doctype html>\n<script type="application/json" id="document">\udcff</script>',
    ],
)
def test_other_files_are_no_pages(tmp_path, text):
    file = tmp_path / "page.html"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert not is_page(file)


def test_numbers_that_json_does_not_have_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        page(two_lenses() | {"title": float("nan")})
