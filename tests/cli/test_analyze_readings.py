"""metalens analyze questions, depth, anomalies and weights, in process on a tiny model in a folder."""

import importlib.util
import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import TunedLens
from metalens.analysis import DETECTORS, WeightReading, read_questions, score_choices
from metalens.cli import analyze_anomalies, analyze_weights
from metalens.models.language_model import LanguageModel
from support.saved_models import save_zoo_model

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two states of a model, questions, prompts that differ from them, and a lens."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, seed in (("early", 1), ("late", 2)):
        save_zoo_model(folder / name, "llama", quantized=name == "late", seed=seed)
    rows = {
        "questions": [{"context": f"w{i} w{i + 9}", "choices": [" w1", " w2 w3"], "answer": i % 2} for i in range(8)],
        "odd": [{"context": f"w90 w90 w90 w{i}", "choices": [" w1", " w2 w3"], "answer": 0} for i in range(6)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model = LanguageModel(folder / "late")
    lens = TunedLens(model.num_layers, model.unembed.hidden_dim)
    for translator in lens.translators:
        translator.bias = mx.random.normal((lens.hidden_dim,), key=mx.random.key(0))
    lens.save(folder / "lens")
    return folder


def test_the_options_name_what_the_library_has():
    """The command line does not import the library to show its help, so it has lists of its own."""
    assert set(analyze_anomalies.DETECTOR_NAMES) == set(DETECTORS)
    reading = WeightReading(
        0, "", "", *(np.zeros((1, 2)) if i in (2, 3, 4, 5) else np.zeros(1) for i in range(7)), mass=np.zeros(1), opposite_mass=np.zeros(1)
    )
    assert all(reading.strongest(1, by).tolist() == [0] for by in analyze_weights.ORDERS)


def answer(result):
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def test_questions_by_layer_for_both_lenses(run, folders):
    found = answer(run("analyze", "questions", folders / "late", "--questions", folders / "questions.jsonl", "--lens", folders / "lens", "--json"))
    assert found["questions"] == 8
    model, questions = LanguageModel(folders / "late"), read_questions(folders / "questions.jsonl")
    for name, lens in (("logit lens", None), ("tuned lens", folders / "lens")):
        expected = score_choices(model, questions, lens).correct().mean(axis=1)
        assert [each["accuracy"]["value"] for each in found["accuracy"][name]] == pytest.approx(expected.tolist())
        assert [each["layer"] for each in found["accuracy"][name]] == [*range(model.num_layers), None]


def test_questions_after_demonstrations_as_table_and_picture(run, folders):
    result = run("analyze", "questions", folders / "late", "--questions", folders / "questions.jsonl", "--shots", 2, "--limit", 4, "--save", "a.png")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "logit lens, false" in " ".join(result.stdout.split())
    assert "answers best" in result.stderr
    again = run("analyze", "questions", folders / "late", "--questions", folders / "questions.jsonl", "--save", folders / "questions.jsonl")
    assert again.exit_code == 1


def test_depth_and_iteration_learned(run, folders, tmp_path):
    command = ("analyze", "depth", folders / "late", "--questions", folders / "questions.jsonl", "--lens", folders / "lens")
    found = answer(run(*command, "--checkpoint", folders / "early", "--steps", "10,500", "--json"))
    assert set(found["depths"]) == {"logit lens", "tuned lens"} == set(found["correlation"])
    assert set(found["learned"]) <= {10, 500}
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3 w4 w5 w6"}\n', encoding="utf-8")
    result = run("analyze", "depth", folders / "late", "--data", "text.jsonl", "--checkpoint", folders / "early", "--save", "d.png")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "mean depth" in result.stdout
    assert "Rank correlation" in result.stderr
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_depth_needs_one_kind_of_examples_and_fitting_steps(run, folders):
    neither = run("analyze", "depth", folders / "late")
    assert (neither.exit_code, "either" in neither.stderr) == (1, True)
    steps = run("analyze", "depth", folders / "late", "--questions", folders / "questions.jsonl", "--checkpoint", folders / "early", "--steps", "1")
    assert (steps.exit_code, "2 whole numbers" in steps.stderr) == (1, True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "text.jsonl", "--normalize", "tokens"], "no choices whose length could be divided by. Leave out --normalize."),
        (["--max-tokens", 50, "--no-bos"], "Questions are read whole, each as it is. Leave out --max-tokens, --no-bos."),
        (["--max-seq-len", 128], "Leave out --max-seq-len."),
        (["--split", "test", "--field", "text"], "Leave out --field, --split."),
    ],
)
def test_depth_refuses_what_it_would_not_use(run, folders, tmp_path, options, says):
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3 w4 w5 w6"}\n', encoding="utf-8")
    examples = [] if "--data" in options else ["--questions", folders / "questions.jsonl"]
    result = run("analyze", "depth", folders / "late", *examples, *options)
    assert (result.exit_code, says in " ".join(result.stderr.split())) == (1, True)
    plain = run("analyze", "depth", folders / "late", "--questions", folders / "questions.jsonl", "--normalize", "tokens", "--json")
    assert plain.exit_code == 0, plain.stderr


@needs_sklearn
def test_anomalies_by_every_kind_of_features(run, folders, tmp_path):
    files = ("--normal", folders / "questions.jsonl", "--anomalous", folders / "odd.jsonl")
    two = ("--method", "mahalanobis", "--method", "local-outlier-factor")  # a forest takes a second
    found = answer(run("analyze", "anomalies", folders / "late", *files, *two, "--lens", folders / "lens", "--json"))
    assert set(found) == {"logit lens", "tuned lens"}
    assert [each["method"] for each in found["tuned lens"]] == ["mahalanobis", "local-outlier-factor"]
    result = run("analyze", "anomalies", folders / "late", *files, *two, "--features", "statistics", "--save", "r.png")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "6 normal prompts to fit" in " ".join(result.stdout.split())
    assert (tmp_path / "r.png").exists()


def test_anomalies_of_hidden_states_without_scikit_learn(run, folders):
    files = ("--normal", folders / "questions.jsonl", "--anomalous", folders / "odd.jsonl")
    found = answer(run("analyze", "anomalies", folders / "late", *files, "--features", "hidden", "--method", "relative-mahalanobis", "--json"))
    assert 0 <= found["hidden states"][0]["auroc"]["value"] <= 1
    result = run("analyze", "anomalies", folders / "late", *files, "--features", "hidden", "--lens", folders / "lens")
    assert result.exit_code == 1
    assert "--features hidden uses no lens" in result.stderr


@pytest.mark.parametrize("matrix", ["mlp", "attention", "ov", "mlp.down_proj"])
def test_weights(run, folders, matrix):
    command = ("analyze", "weights", folders / "late", "--matrix", matrix, "--layers", 0, "--rows", "0-7", "--show", 2, "--lens", folders / "lens")
    found = answer(run(*command, "--baseline", "--json"))
    assert all(len(each["rows"]) == 2 for each in found)
    assert all(0 <= each["auroc"]["value"] <= 1 for each in found)
    coherences = np.array([[row["coherence"] for row in each["rows"]] for each in found])
    assert (coherences[:, 0] >= coherences[:, 1]).all()
    table = run(*command)
    assert table.exit_code == 0, (table.stderr, table.exception)
    assert "promotes" in table.stdout


def test_weights_of_a_concept(run, folders, tmp_path):
    command = ("analyze", "weights", folders / "late", "--layers", 0, "--rows", "0-40", "--show", 3)
    model = LanguageModel(folders / "late")
    first = model.token_to_str(20)
    (tmp_path / "words.txt").write_text(f"{first}\n\nno token at all\n")
    found = answer(run(*command, "--tokens-file", tmp_path / "words.txt", "--json"))
    masses = [max(row["mass"], row["opposite_mass"]) for row in found[0]["rows"]]
    assert masses == sorted(masses, reverse=True)
    assert all(0 <= mass <= 1 for mass in masses)
    table = run(*command, "--tokens-file", tmp_path / "words.txt")
    assert "mass" in table.stdout
    assert "1 of 3 lines are no single token of this model" in " ".join(table.stderr.split())
    by_size = answer(run(*command, "--token", first, "--by", "size", "--json"))[0]["rows"]
    assert by_size[0]["size"] == max(row["size"] for row in by_size)
    (tmp_path / "none.txt").write_text("no token at all\n")
    for options, says in (
        (["--by", "mass"], "give --token or --tokens-file"),
        (["--tokens-file", tmp_path / "none.txt"], "No line of"),
        (["--token", "no token at all"], "is no single token"),
    ):
        result = run(*command, *options)
        assert (result.exit_code, says in " ".join(result.stderr.split())) == (1, True)


def test_weights_that_are_not_there(run, folders):
    result = run("analyze", "weights", folders / "late", "--matrix", "gate")
    assert (result.exit_code, "mlp.down_proj" in result.stderr) == (1, True)
    assert run("analyze", "weights", folders / "late", "--rows", "9-3").exit_code == 2
