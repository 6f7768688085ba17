"""The report of a sweep: every number is the one in the file that it names, and every form has it."""

import json
import re
import statistics
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from click.testing import CliRunner

from metalens.cli import main
from metalens.sweep import Results, read_sweep, run_sweep, write_report
from metalens.sweep.document import Number, Section, Table, html_page, markdown, value_at
from metalens.sweep.report import report_outputs
from metalens.utils.errors import InvalidValueError
from metalens.utils.outputs import NotOursError, require_replaceable


@pytest.fixture(scope="module")
def swept(write_once):
    sweep = read_sweep(write_once(evaluation="max_seq_len = 16\nlayer_transfer = true"))
    found = run_sweep(sweep)
    results = Results(sweep.out, found.lenses, found.evaluations)
    return results, write_report(results, "Words & <b>numbers</b>", found.failures)


def looked_up(data, key):
    """The number at a key, found without the library."""
    plain = re.sub(r"evaluation\.layers\[tuned\]\.", "", key)
    if plain == key:
        for part in key.split("."):
            data = data[part]
        return data
    kind, field = plain.split(".")
    return statistics.fmean(layer[kind][field] for layer in data["evaluation"]["layers"] if "tuned" in layer)


class Links(HTMLParser):
    """Collects the links of a page: (target, title, text)."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "a":
            self.found.append([*(dict(attributes)[name] for name in ("href", "title")), ""])

    def handle_data(self, data):
        if self.found and not self.found[-1][2]:
            self.found[-1][2] = data


def test_every_number_is_the_one_in_its_file(swept):
    results, files = swept
    out = results.out
    numbers = json.loads((out / "report.json").read_text())["numbers"]
    for number in numbers:
        assert number["value"] == pytest.approx(looked_up(json.loads((out / number["file"]).read_text()), number["key"]), rel=1e-12), number
    # 4 lenses with 11 numbers each; two models with 3 sizes, 1 own and 3 KLs; 2 matrices of 2 x 2.
    assert len(numbers) == 4 * 11 + 2 * 7 + 2 * 4
    links = re.findall(r"\[([^]\[]*)\]\(((?:lenses|evaluations)/[^)]*)\)", (out / "report.md").read_text())
    page = Links()
    page.feed((out / "report.html").read_text())
    assert len(links) == len(page.found) == len(numbers)
    for number, (shown, file), (target, key, text) in zip(numbers, links, page.found, strict=True):
        assert unquote(file) == unquote(target) == number["file"]
        assert (key, text) == (number["key"], shown)
        value = float(shown.rstrip(" %").replace(",", ""))
        assert value == pytest.approx(
            100 * number["value"] if shown.endswith("%") else number["value"], abs=0.51 * 10 ** -len(shown.partition(".")[2].rstrip(" %"))
        )
    assert all(file.stat().st_size for file in files)


def test_the_rows_are_of_the_cells_that_they_name(swept):
    results, _ = swept
    numbers = json.loads((results.out / "report.json").read_text())["numbers"]
    for number in numbers:
        names = json.loads((results.out / number["file"]).read_text())["names"]
        if number["section"].startswith("Lenses"):
            assert number["row"] == f"{names.get('lens_model', names['model'])}, {names['recipe']}, seed {names['seed']}"
        elif number["section"].startswith("Transfer"):
            assert (number["row"], number["column"]) == (names["model"], f"lens of {names['lens_model']}")
        else:
            assert number["row"] == names["model"]
            assert number["column"] in ("layers", "width", "block parameters", "model bits/byte", "logit KL", f"{names['recipe']} KL")


def test_the_embedding_is_a_layer(write):
    recipes = """
[[recipes]]
name = "with"
recipe = "adam"
num_steps = 2
tokens_per_step = 64
max_seq_len = 16

[[recipes]]
name = "without"
recipe = "mlxterp"
num_steps = 2
max_seq_len = 16
"""
    sweep = read_sweep(write(recipes=recipes, models="a", evaluation="max_seq_len = 16\nembedding = true\nlayer_transfer = true"))
    found = run_sweep(sweep)
    assert not found.failures
    results = Results(sweep.out, found.lenses, found.evaluations)
    report = write_report(results, "Embedding")[1].read_text()
    _, table = report.split("**The embedding's output**")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| a, ")]
    assert [row[0] for row in rows] == ["| a, with, seed 0", "| a, without, seed 0"]
    evaluations = [json.loads((sweep.out / each.file).read_text())["evaluation"] for each in results.own]
    for row, evaluation in zip(rows, evaluations, strict=True):
        assert row[1].startswith(f"[{evaluation['embedding']['logit']['kl']:.3f}](")
    assert rows[0][2].startswith(f"[{evaluations[0]['embedding']['tuned']['kl']:.3f}](")
    assert rows[1][2] == "-"
    assert [evaluation["transfer"]["layers"][0] for evaluation in evaluations] == ["embedding", 0]


def test_the_pictures_are_there_and_in_the_page(swept):
    results, files = swept
    pictures = [file for file in files if file.suffix == ".png"]
    assert len(pictures) == 2 + 1 + 2 + 4  # KL and bias, sizes, transfers, layer transfers
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)
    page = (results.out / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == len(pictures)
    assert all(f"](figures/{file.name})" in (results.out / "report.md").read_text() for file in pictures)


def test_a_file_that_is_no_report_is_not_replaced(swept):
    results, files = swept
    require_replaceable(report_outputs(results.out))  # its own files may be
    report = files[1].read_text()
    files[1].write_text("# my own notes")
    with pytest.raises(NotOursError, match=r"report\.md exists and is not the report of a sweep"):
        write_report(results, "again")
    assert files[1].read_text() == "# my own notes"
    files[1].write_text(report)


def test_names_are_inert():
    hostile = "<script>alert(1)</script>|`[x](y)"
    section = Section(hostile, [], [(hostile, Table([hostile, "value"], [[hostile, Number(1.5, "a b/r.json", "x.y")]]))])
    page = Links()
    page.feed(html_page(hostile, [section], None))
    assert "script" not in page.tags
    assert page.found == [["a%20b/r.json", "x.y", "1.500"]]
    text = markdown(hostile, [section])
    assert "<script>" not in text.replace("\\<script\\>", "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") - line.count("\\|") for line in rows] == [3, 3, 3]


def test_a_key_that_is_not_there_is_an_error():
    data = {"layers": [{"tuned": {"kl": 1.0}, "logit": {"kl": 5.0}}, {"logit": {"kl": 7.0}}, {"tuned": {"kl": 2.0}, "logit": {"kl": 8.0}}]}
    assert value_at(data, "layers[tuned].tuned.kl") == 1.5
    assert value_at(data, "layers[tuned].logit.kl") == 6.5
    with pytest.raises(InvalidValueError, match=r"no layers\[tuned\]\.tuned\.ce"):
        value_at(data, "layers[tuned].tuned.ce")


def test_the_command(write, tmp_path):
    short = '[[recipes]]\nname = "r"\nrecipe = "mlxterp"\nnum_steps = 1\nmax_seq_len = 16\n'
    too_long = short.replace('"r"', '"long"').replace("num_steps = 1", "num_steps = 100000")
    file = write(models="a", recipes=short + too_long)
    listed = CliRunner().invoke(main, ["sweep", str(file), "--list"])
    assert listed.stdout.splitlines() == ["  to run  lens a / r / words / seed 0", "  to run  lens a / long / words / seed 0"]
    done = CliRunner().invoke(main, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "1 cells could not be run" in done.stderr
    assert "lens a / long / words / seed 0: failed" in done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "2 of 3 cells are finished" in report
    assert "| lens a / long / words / seed 0 |" in report
    wrong = CliRunner().invoke(main, ["sweep", str(write(more="jobz = 1", name="wrong.toml"))])
    assert (wrong.exit_code, "unknown key jobz" in wrong.stderr) == (1, True)
