"""Tables: every field of a result has a label, and what is printed are the result's numbers."""

import io
from dataclasses import fields, replace

import pytest
from rich.console import Console

from metalens import load
from metalens.display.tables import (
    DISK_LABELS,
    KERNEL_LABELS,
    MEMORY_LABELS,
    ROOFLINE_LABELS,
    WORK_LABELS,
    closed_form_table,
    diagnosis_facts,
    diagnosis_table,
    fraction_text,
    fractions_table,
    plan_remarks,
    plan_table,
    reading_table,
    roofline_table,
)
from metalens.estimate.chips import CHIPS
from metalens.estimate.kernel_model import Fraction, fractions
from metalens.estimate.memory import plan
from metalens.estimate.results import Disk, Memory, Work
from metalens.estimate.roofline import Bounds, bounds
from metalens.evaluation import Evaluation, Scores
from metalens.models.facts import KNOWN_MODELS
from metalens.ops.doctor import Diagnosis, MetalDiagnosis, NativeDiagnosis
from metalens.utils.errors import InvalidValueError

LLAMA = "Llama-3.1-8B-4bit"


def printed(table, width=250):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(("kind", "labels"), [(Memory, MEMORY_LABELS), (Work, WORK_LABELS), (Disk, DISK_LABELS), (Bounds, ROOFLINE_LABELS)])
def test_every_field_has_a_label(kind, labels):
    assert list(labels) == [field.name for field in fields(kind)]
    assert len(set(labels.values())) == len(labels)


def test_a_plan():
    found = plan(LLAMA, "muon", memory=2**50)
    text = printed(plan_table(found, "[/b] a title"))
    assert "[/b] a title" in text
    assert "memory: model (estimated)" in text
    assert "memory: optimizer state" in text
    assert "memory: warm start" not in text  # it takes none
    assert f"{found.total / 1e9:.1f} GB" in text
    assert "epochs" not in text
    assert plan_remarks(found) == [f"The run takes about {found.total / 1e9:.1f} GB of {2**50 / 1e9:.1f} GB: it fits."]


def test_a_plan_that_does_not_fit():
    found = plan(LLAMA, "muon", memory=11 * 10**9)
    lines = plan_remarks(found)
    assert lines[0].endswith("it does not fit.")
    for change, line in zip(found.advice, lines[1:], strict=True):
        assert line.startswith(f"  {change.option}: {change.bytes / 1e9:.1f} GB, ")
        assert ("does not fit either" in line) is not change.fits
        assert line.endswith(f"{change.cost}.")
    none = plan_remarks(plan(LLAMA, "muon", memory=10**9))
    assert none[-1].startswith("None of these fits. The model alone takes 4.5 GB")


def test_a_plan_with_too_little_text():
    found = replace(plan("demo", memory=2**50), text_tokens=1000)
    assert plan_remarks(found)[-1].startswith("The text holds about 1000 tokens, and the run needs 6619648: give more text")
    assert "text: epochs of the given text, about" in printed(plan_table(found, ""))
    repeated = replace(found, config=replace(found.config, repeat=True))
    assert len(plan_remarks(repeated)) == 1


def test_a_roofline():
    found = {name: bounds(KNOWN_MODELS[LLAMA], CHIPS[name], 1) for name in ("M1", "M4-Max")}
    lines = printed(roofline_table(found, "title")).splitlines()
    row = next(line for line in lines if "training, plain MLX" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == [f"{found[name].training_plain_mlx:.1f}" for name in found]


def test_a_reading():
    text = printed(reading_table(load("demo").read("Two words [b]", top_k=2), "title [/b]"))
    assert "title [/b]" in text
    assert "layer 7" in text
    assert "model" in text


def diagnosis(**changes):
    native = NativeDiagnosis("avx2", ["avx2", "portable"], False, 4, "a product", 1e-6, 40.4)
    whole = Diagnosis("0.1", "0.2", "0.3", "3.12", "a platform", "a device", "auto", "float32", None, native, "", [])
    return replace(whole, **changes)


def test_a_diagnosis_of_the_native_kernels():
    facts = diagnosis_facts(diagnosis())
    assert facts["Metal"] == "not available here"
    assert facts["native extension"] == "loaded"
    assert facts["instruction sets available"] == "avx2, portable"
    assert facts["largest difference from plain MLX"] == "1.0e-06"
    assert facts["speed beside plain MLX"] == "40x (a product)"
    assert "instruction sets available" in printed(diagnosis_table(diagnosis()))


def test_a_diagnosis_without_an_extension():
    facts = diagnosis_facts(diagnosis(native=None, native_problem="it was not built"))
    assert facts["native extension"] == "not used: it was not built"
    assert "instruction set" not in facts


@pytest.mark.parametrize(("kernels", "shown"), [(0, "compiled just in time"), (12, "12 compiled ahead of time, others just in time")])
@pytest.mark.parametrize(("counted", "cores"), [(True, "38"), (False, "not counted; planned for 38")])
def test_a_diagnosis_of_a_gpu(kernels, shown, counted, cores):
    gpu = MetalDiagnosis("applegpu_g14s", 14, 38, counted, kernels, "not used: a reason", "float32")
    facts = diagnosis_facts(diagnosis(metal=gpu))
    assert facts["GPU cores"] == cores
    assert facts["float32 products of plain MLX"] == "float32"
    assert facts["Metal"] == "applegpu_g14s, tuned as generation 14"
    assert facts["Metal kernels"] == shown


def test_the_parts_of_the_peak():
    parts = {chip: fractions(KNOWN_MODELS[LLAMA], CHIPS[chip], 64) for chip in ("M1", "M5-Max")}
    assert list(parts["M1"]) == list(KERNEL_LABELS)
    shown = printed(fractions_table(parts, "percent"))
    assert all(label in shown for label in KERNEL_LABELS.values())
    assert fraction_text(Fraction(0.2, 0.444, 0.3)) == "20 > 44 (30)"
    assert fraction_text(parts["M5-Max"]["lens_kl"]) in shown


@pytest.mark.parametrize("without", ["trained lens", "closed form"])
def test_a_closed_form_beside_an_evaluation_without_a_lens(without):
    scores = [Scores(float(i), 0.0, 0.0, 0.5, 0.0, 0.0, 0.0) for i in range(2)]
    evaluations = {name: Evaluation(2, 1.0, scores[0], scores, None if name == without else scores) for name in ("trained lens", "closed form")}
    with pytest.raises(InvalidValueError, match=f"The evaluation of the {without} has scores of the logit lens alone"):
        closed_form_table(*evaluations.values())
    assert closed_form_table(*[Evaluation(2, 1.0, scores[0], scores, scores)] * 2).row_count == 3
