"""The report of a sweep: report.md, report.html, report.json and pictures, written from the files of the results alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalens.display.figures import transfer_figure
from metalens.display.format import decimals, percent
from metalens.evaluation import Transfer
from metalens.readings.heat_map import save_figure
from metalens.sweep import figures
from metalens.sweep.document import MARK, Entry, Picture, Section, Table, html_page, markdown, number_at, numbers
from metalens.sweep.results import Found, Results, names_in, select
from metalens.utils.files import atomic_write
from metalens.utils.outputs import Output, require_replaceable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import

KL_LABEL = "KL(model || lens) (nats per token)"
LAYERS = "evaluation.layers[tuned]"  # the layers that the lens translates
EMBEDDED = "evaluation.embedding"


REPORTS = ("report.json", "report.md", "report.html")


def report_outputs(out: Path) -> list[Output]:
    """Return the files of the report in the folder of a sweep, which may be replaced if a sweep has written them."""
    return [Output(out / name, "the report of a sweep", lambda path: MARK.encode() in path.read_bytes()) for name in REPORTS]


def write_report(results: Results, title: str, failures: Mapping[str, str] | None = None, *, force: bool = False) -> list[Path]:
    """Write the report of a sweep beside its results. Each file appears whole or not at all.

    report.md and report.html have tables and pictures: in both, every number is a link to the file that it comes from. report.json lists all numbers
    with file and key. Pictures are in the folder figures.

    Args:
        results: the results.
        title: title of the report.
        failures: {title of a cell: why it could not be run}.
        force: replace files of these names that are no report.

    Returns:
        the files written.

    Raises:
        NotOursError: if the folder has a file of these names that is no report.
        OSError: if a file can't be written.
    """
    require_replaceable(report_outputs(results.out), force=force)
    sections = list(_sections(results, failures or {}))
    content = {"about": MARK, "title": title, "numbers": numbers(sections)}
    texts = (json.dumps(content, indent=1, allow_nan=False) + "\n", markdown(title, sections), html_page(title, sections, results.out))
    for name, text in zip(REPORTS, texts, strict=True):
        with atomic_write(results.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    pictures = [results.out / picture.file for section in sections for picture in section.pictures]
    return [results.out / name for name in REPORTS] + pictures


def _sections(results: Results, failures: Mapping[str, str]) -> Iterator[Section]:
    yield _state(results, failures)
    for text in names_in(results.own, "text"):
        yield _lenses(results, str(text), select(results.own, text=text))
    if len(names_in(results.own, "model")) > 1:
        for text in names_in(results.own, "text"):
            yield _sizes(results, str(text), select(results.own, text=text))
    if any(not each.own for each in results.evaluations):
        yield _transfers(results)
    if any("transfer" in each.result["evaluation"] for each in results.own):
        yield _layer_transfers(results)


def _state(results: Results, failures: Mapping[str, str]) -> Section:
    done = len(results.cells) - len(results.missing)
    versions = ", ".join(sorted({each.result["metalens"] for each in [*results.lenses, *results.evaluations]}))
    paragraphs = [
        f"{done} of {len(results.cells)} cells are finished, by metalens {versions or '(none)'}."
        + (" Lenses that are missing have evaluations, which are not counted yet." if any(cell.kind == "lens" for cell in results.missing) else ""),
        "KL, cross-entropy (CE) and bias are in nats per token, as means over the layers that the lens translates. Every number is a link to "
        "the file that it comes from; the key below a table says where it is there. report.json has all of them.",
    ]
    rows: list[list[Entry]] = [[cell.title, failures.get(cell.title, "not run yet")] for cell in results.missing]
    return Section("State", paragraphs, [("Not finished", Table(["cell", "why"], rows))] if rows else [])


def _lenses(results: Results, text: str, found: Sequence[Found]) -> Section:
    """Return the section of all lenses of a text, each on its own model."""
    with_bias = all("bias" in each.result["evaluation"]["layers"][0]["logit"] for each in found)
    values = {"KL": "kl", "CE": "ce", "top-1": "top1"} | ({"bias": "bias"} if with_bias else {})
    scores = [f"{lens} {name}" for name in values for lens in ("logit", "tuned")]
    headings = ["lens", "training tokens", *scores, "model CE", "core seconds"]
    rows: list[list[Entry]] = []
    for each in found:
        lens = results.lens_of(each)
        row: list[Entry] = [_lens_name(each), number_at(lens.result, lens.file, "provenance.tokens", "{:,.0f}".format)]
        row += _scores(each, LAYERS, values.values())
        row.append(number_at(each.result, each.file, "evaluation.model.ce"))
        row.append("resumed" if lens.result["resumed"] else number_at(lens.result, lens.file, "core_seconds", "{:.1f}".format))
        rows.append(row)
    tables = [("Every lens on its own model", Table(headings, rows))]
    if of_embedding := [[_lens_name(each), *_scores(each, EMBEDDED, values.values())] for each in found if "embedding" in each.result["evaluation"]]:
        tables.append(("The embedding's output", Table(["lens", *scores], of_embedding)))
    caption = f"KL by layer, text {text}: {LAYERS}.tuned.kl and .logit.kl"
    pictures = [_picture(results, f"kl-{text}", figures.by_recipe(found, "kl", KL_LABEL), caption)]
    if with_bias:
        figure = figures.by_recipe(found, "bias", "bias (nats per token)")
        pictures.append(_picture(results, f"bias-{text}", figure, f"Bias by layer, text {text}: {LAYERS}.tuned.bias and .logit.bias"))
    return Section(f"Lenses, text {text}", [], tables, pictures)


def _scores(found: Found, at: str, fields: Iterable[str]) -> list[Entry]:
    """Return the scores of both lenses at a key of an evaluation; '-' for those of a tuned lens that does not translate the embedding."""
    kinds = ("logit", "tuned")
    missing = at == EMBEDDED and "tuned" not in found.result["evaluation"]["embedding"]
    return [
        "-" if missing and kind == "tuned" else number_at(found.result, found.file, f"{at}.{kind}.{field}", percent if field == "top1" else decimals)
        for field in fields
        for kind in kinds
    ]


def _lens_name(found: Found) -> str:
    return f"{found.names['lens_model']}, {found.names['recipe']}, seed {found.names['seed']}"


def _sizes(results: Results, text: str, found: Sequence[Found]) -> Section:
    """Return the section that compares the models: their sizes beside what a lens makes of them."""
    recipes, seed = names_in(found, "recipe"), names_in(found, "seed")[0]
    sizes = {"layers": "num_layers", "width": "hidden_size", "block parameters": "block_params"}
    headings = ["model", *sizes, "model bits/byte", "logit KL", *(f"{recipe} KL" for recipe in recipes)]
    rows: list[list[Entry]] = []
    for model in sorted(names_in(found, "model"), key=lambda name: results.model(name).result["model"]["block_params"]):
        lens = results.model(model)
        row: list[Entry] = [str(model)]
        row += [number_at(lens.result, lens.file, f"model.{key}", "{:,.0f}".format) for key in sizes.values()]
        first = select(found, model=model)[0]
        row.append(number_at(first.result, first.file, "evaluation.model.bits_per_byte"))
        row.append(number_at(first.result, first.file, f"{LAYERS}.logit.kl"))
        for recipe in recipes:
            these = select(found, model=model, recipe=recipe, seed=seed)
            row.append(number_at(these[0].result, these[0].file, f"{LAYERS}.tuned.kl") if these else "-")
        rows.append(row)
    caption = f"KL by relative layer, text {text}: {LAYERS}.tuned.kl"
    pictures = [_picture(results, f"sizes-{text}", figures.by_size(found, KL_LABEL), caption)]
    return Section(f"Sizes compared, text {text}", [], [(f"Models by size, seed {seed}", Table(headings, rows))], pictures)


def _transfers(results: Results) -> Section:
    """Return the section about lenses on models that they were not trained for."""
    section = Section(
        "Transfer between models",
        ["A row is a model, a column the model whose lens reads it: the mean KL(model || lens). On the diagonal is the model's own lens."],
    )
    for text in names_in(results.evaluations, "text"):
        for recipe in names_in(results.evaluations, "recipe"):
            for seed in names_in(results.evaluations, "seed"):
                found = select(results.evaluations, text=text, recipe=recipe, seed=seed)
                if all(each.own for each in found):
                    continue
                name = f"{recipe}, text {text}, seed {seed}"
                section.tables.append((name, _matrix(found)))
                caption = f"KL by layer, {name}: {LAYERS}.tuned.kl"
                section.pictures.append(_picture(results, f"transfer-{name}", figures.by_transfer(found, KL_LABEL), caption))
    return section


def _matrix(found: Sequence[Found]) -> Table:
    models, lenses = names_in(found, "model"), names_in(found, "lens_model")
    cells = {(each.names["model"], each.names["lens_model"]): number_at(each.result, each.file, f"{LAYERS}.tuned.kl") for each in found}
    rows: list[list[Entry]] = [[str(model), *(cells.get((model, lens), "-") for lens in lenses)] for model in models]
    return Table(["model", *(f"lens of {lens}" for lens in lenses)], rows)


def _layer_transfers(results: Results) -> Section:
    """Return the section about translators on other layers than their own."""
    section = Section("Layer transfer", ["Every layer read with every other layer's translator: the rise of the cross-entropy."])
    for each in results.own:
        if "transfer" in each.result["evaluation"]:
            transfer = Transfer(**each.result["evaluation"]["transfer"])
            name = f"{_lens_name(each)}, text {each.names['text']}"
            figure = transfer_figure(transfer, name, len(each.result["evaluation"]["layers"]))
            section.pictures.append(_picture(results, f"layers-{name}", figure, f"{name}: evaluation.transfer.ce of {each.file}"))
    return section


def _picture(results: Results, name: str, figure: Figure, caption: str) -> Picture:
    file = f"figures/{''.join(letter if letter.isalnum() or letter in '-._' else '_' for letter in name)}.png"
    path = results.out / file
    path.parent.mkdir(exist_ok=True)
    save_figure(figure, path)
    return Picture(file, caption)
