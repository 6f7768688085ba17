"""`metalens.training.train`: the way from a model and a text to a lens. The command line's tests, tests/cli/test_train.py, take it too."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens import InterpretableModel, TunedLens, plan
from metalens.lenses.provenance import provenance_of
from metalens.models.bundled import HELD_OUT_TEXT, MODEL
from metalens.models.facts import facts_of_model
from metalens.training import (
    Callback,
    CheckpointFolder,
    Corpus,
    NotEnoughDataError,
    TrainingConfig,
    TrainingInterruptedError,
    UnfinishedRunError,
    interruptible,
    open_corpus,
    recipe,
    train,
    train_loop,
)
from metalens.training import run as module
from metalens.training.data import read_inputs
from metalens.utils.errors import InvalidValueError

SMALL = {"recipe": "mlxterp", "max_seq_len": 32, "num_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALENS_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(scope="module")
def model():
    return InterpretableModel("demo")


@pytest.fixture(scope="module")
def text():
    return HELD_OUT_TEXT.read_text(encoding="utf-8")[:4000]


@pytest.fixture
def file(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def bits(lens):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(lens.parameters())}


def test_a_name_and_a_file_are_enough(file):
    lens = train("demo", str(file), **SMALL)
    assert isinstance(lens, TunedLens)
    assert lens.provenance["model"] == str(MODEL)
    assert lens.provenance["recipe"] == "mlxterp"
    assert lens.provenance["tokens"] == 64
    assert (lens.provenance["training"]["num_steps"], lens.provenance["training"]["data"]["documents"]) == (2, 1)
    assert [path.name for path in file.parent.iterdir()] == ["text.txt"]


def test_a_lens_remembers_its_model_however_it_was_trained(model):
    lens = model.train_tuned_lens(["Some words to train on, which are not many."] * 4, 2, max_seq_len=12, verbose=False)
    assert lens.provenance["head"] == provenance_of(model.unembed)["head"]
    assert (lens.provenance["recipe"], lens.provenance["tokens"]) == ("mlxterp", 24)


@pytest.mark.parametrize("given", ["ids", "array", "rows", "corpus"])
def test_ids_of_every_kind_give_the_same_lens(model, given):
    ids = np.random.default_rng(0).integers(0, 6000, 96)
    data = {"ids": ids.tolist(), "array": mx.array(ids), "rows": [ids[:40].tolist(), ids[40:]], "corpus": Corpus.from_ids(ids)}[given]
    expected = train_loop(model.source, model.unembed, mx.array(ids), recipe("mlxterp", num_steps=2, max_seq_len=32))
    assert bits(train(model, data, **SMALL, repeat=True)) == bits(expected)


def test_texts_are_documents(model, tmp_path, text):
    texts = [text[:1500], text[1500:]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    of_texts, of_file = train(model, texts, **SMALL), train(model, tmp_path, **SMALL)
    assert bits(of_texts) == bits(of_file)
    assert of_texts.provenance["training"]["data"]["documents"] == 2


def test_a_model_without_a_tokenizer_takes_ids_alone(model, text):
    bare = InterpretableModel(model.model)
    with pytest.raises(ValueError, match="No tokenizer available"):
        train(bare, [text], **SMALL)
    assert "model" not in train(bare, list(range(100)), **SMALL).provenance


def test_what_is_wrong_is_found_before_the_model_is_loaded(file):
    for arguments, message in (
        ({"recipe": "secret"}, "Unknown recipe 'secret'"),
        ({"stepps": 3}, "Unknown setting stepps"),
        ({"data": "nowhere.txt"}, "no file or folder 'nowhere.txt'. Check the path"),
        ({"resume": True}, "resume=True needs the checkpoints"),
        ({"config": {"optimizer": "lion"}}, "optimizer must be one of sgd, adam, muon"),
    ):
        with pytest.raises(ValueError, match=message):
            train("no-such-model-anywhere", **{"data": file, **arguments})
    (file.parent / "lens.npz").mkdir()
    with pytest.raises(OSError, match="Can't write"):
        train("no-such-model-anywhere", file, out=file.parent / "lens")


# ------------------------------------------------------------------ what the data are


def test_a_mistyped_name_is_never_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in ("my notes.txt", "notes", "a folder/b", ["notes"], ["my notes.txt"], ["a.txt", "b"], [tmp_path / "a b"]):
        with pytest.raises(ValueError, match="no file or folder"):
            read_inputs(data)
    with pytest.raises(ValueError, match=r"To train on the text itself, give it in a list: \[text\]"):
        read_inputs("This is a text. " * 100)


def test_names_and_texts_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes").write_text("Some text.")
    (tmp_path / "a.txt").write_text("Some text.")
    assert [source.name for source in read_inputs(["my notes", tmp_path / "a.txt", "hf:owner/name"])] == [
        "my notes",
        str(tmp_path / "a.txt"),
        "owner/name@main (train)",
    ]
    (texts,) = read_inputs(["A sentence.", "Word", "", "漢" * 300])
    assert len(list(texts.pieces())) == 4
    with pytest.raises(ValueError, match="mix texts and names: 'a.txt' names a file"):
        read_inputs(["A sentence.", "a.txt"])
    with pytest.raises(TypeError, match="mix text and token ids"):
        read_inputs(["A sentence.", [1, 2]])
    for nothing in ([], [[]]):
        with pytest.raises((ValueError, TypeError), match="There are no training data|There are no token ids|not empty"):
            read_inputs(nothing)
    with pytest.raises(TypeError, match="not int"):
        read_inputs(3)
    with pytest.raises(ValueError, match="empty or blank"):
        list(read_inputs([" \n", ""])[0].pieces())


def test_texts_are_identified_by_what_they_say(model):
    first, same, other = (
        open_corpus(read_inputs(texts), model.tokenizer) for texts in (["One text.", "Two."], ["One text.", "Two."], ["One text. Two."])
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint


# ------------------------------------------------------------------ enough text


def test_too_little_text_for_the_closed_form():
    with pytest.raises(NotEnoughDataError, match=r"Not enough text: the closed form needs 65536 tokens, the text has 600\. .* tokens=600; repeat"):
        train("demo", [1, 2, 3] * 200, recipe="ridge")


def test_too_little_text_names_settings_that_fit(model, file):
    settings = {"recipe": "muon", "num_steps": 24, "tokens_per_step": 64, "max_seq_len": 32}
    with pytest.raises(
        NotEnoughDataError,
        match=r"need 1536 tokens, the text has \d+ beside the 64 that are held back for the guard\. Give .* one of: tokens=\d+; .*; repeat=True\.",
    ) as error:
        train(model, file, **settings)
    assert [list(change) for change in error.value.changes] == [["tokens"], ["tokens_per_step"], ["repeat"]]
    train(model, file, **settings | error.value.changes[0])
    assert error.value.changes[0]["tokens"] >= 0.9 * len(model.encode(file.read_text()))


def test_the_closed_form_by_name(model, file, tmp_path):
    """It needs no step, names the tokens that there are, and gives the lens of a run of no steps."""
    with pytest.raises(NotEnoughDataError, match=r"one of: tokens=\d+; repeat=True") as error:
        train(model, file, recipe="ridge", max_seq_len=32)
    lens = train(model, file, recipe="ridge", max_seq_len=32, out=tmp_path / "lens", **error.value.changes[0])
    assert lens.provenance["recipe"] == "ridge"
    read = lens.provenance["training"]["warm_start_tokens"]
    assert read == error.value.changes[0]["tokens"] // 32 * 32  # whole sequences
    expected = train(model, file, recipe="fast", num_steps=0, max_seq_len=32, warm_start_tokens=read)
    assert bits(lens) == bits(expected)
    assert not mx.array_equal(lens.translators[0].weight, mx.eye(lens.translators[0].weight.shape[0]))


def test_a_budget_knows_the_width_of_the_model(make_llama, monkeypatch):
    """Training divides it as `plan` does, which knows the model's facts only."""
    narrow = InterpretableModel(make_llama(hidden=64))
    monkeypatch.setattr("metalens.training.budget.WARM_PER_DIMENSION", 2)
    settings = {"tokens": 2048, "max_seq_len": 32}
    trained = train(narrow, [i % 131 for i in range(3000)], **settings).provenance["training"]
    assert trained["warm_start_tokens"] == 2 * 64 < 2048 // 2
    planned = plan(facts_of_model(narrow), **settings).config
    assert (planned.warm_start_tokens, planned.num_steps) == (trained["warm_start_tokens"], trained["num_steps"])


# ------------------------------------------------------------------ checkpoints


def test_a_run_that_was_stopped_goes_on(model, file):
    out = file.parent / "lens"
    settings = {**SMALL, "num_steps": 6, "repeat": True, "out": out}
    straight = train(model, file, **settings | {"out": None})
    seen = []
    with pytest.raises(TrainingInterruptedError):
        train(model, file, **settings, callbacks=[seen.append], stop=lambda: len(seen) == 2)
    assert not out.with_suffix(".npz").exists()
    with pytest.raises(UnfinishedRunError, match=r"go on with resume=True, remove the folder, or give another checkpoint_dir") as error:
        train(model, file, **settings)
    assert error.value.folder == file.parent / "lens.checkpoints"
    with interruptible() as stop:
        resumed = train(model, file, **settings, resume=True, stop=stop)
    assert bits(resumed) == bits(straight)
    assert resumed.provenance == straight.provenance == TunedLens.load(out).provenance
    assert (file.parent / "lens.checkpoints" / "finished").exists()
    again = train(model, file, **settings, resume=True)
    assert again.provenance == straight.provenance
    train(model, file, **settings)  # a finished run makes way


def test_checkpoints_go_where_they_are_asked_for(model, file):
    folder = CheckpointFolder(file.parent / "kept", keep=10)
    train(model, file, **SMALL, checkpoint_dir=folder, checkpoint_every=1)
    assert folder.steps() == [1, 2]
    train(model, file, **SMALL, out=file.parent / "lens", checkpoint_every=None)
    assert sorted(path.name for path in file.parent.iterdir()) == ["kept", "lens.json", "lens.npz", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_dir": ""}, "checkpoint_dir is empty"),
        ({"config": ""}, "file of settings is empty"),
        ({"recipe": ""}, "recipe is empty"),
        ({"out": ""}, "names no lens file"),
        ({"start_from": ""}, "names no lens file"),
    ],
)
def test_an_empty_name_is_an_error(model, file, monkeypatch, arguments, message):
    """As a path, it would be the current folder."""
    monkeypatch.chdir(file.parent)
    with pytest.raises(InvalidValueError, match=message):
        train(model, file, **SMALL | arguments)
    assert [path.name for path in file.parent.iterdir()] == ["text.txt"]


def test_callbacks_are_objects_or_functions(model, file):
    events = []

    class Noted(Callback):
        def on_end(self):
            events.append("end")

    train(model, file, **SMALL, callbacks=[Noted(), lambda progress: events.append(progress.step)])
    assert events == [0, 1, "end"]
    with pytest.raises(TypeError, match="A callback is a metalens.training.Callback or a function"):
        train(model, file, **SMALL, callbacks=[3])


def test_a_progress_bar_for_each_part(model, tmp_path, text, capfd):
    (tmp_path / "other.txt").write_text(text[::-1])
    train(model, tmp_path / "other.txt", **SMALL, show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizing" in err
    assert "training the lens" in err


# ------------------------------------------------------------------ old names


def test_the_call_of_the_first_version_still_works(model):
    ids, config, seen = mx.arange(64), TrainingConfig(num_steps=2, max_seq_len=32), []
    with pytest.warns(DeprecationWarning, match=r"is now metalens\.training\.train_loop"):
        lens = train(model.source, model.unembed, ids, config, callback=seen.append)
    assert bits(lens) == bits(train_loop(model.source, model.unembed, ids, config))
    assert [progress.step for progress in seen] == [0, 1]
    assert lens.provenance == {}


def test_old_names_of_classes():
    from metalens import training

    with pytest.warns(DeprecationWarning, match="Listener is now Callback"):
        assert training.Listener is Callback
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        training.Nothing  # noqa: B018
    with pytest.warns(DeprecationWarning, match="recipe has moved"):
        assert training.config.recipe is recipe


def test_groups_by_their_old_argument():
    with pytest.warns(DeprecationWarning, match="share"):
        group = module.Group(share="layers")
    with pytest.warns(DeprecationWarning, match="share"):
        assert group.share == group.parallel == "layers"


def test_the_package_is_light(run_python):
    script = "import sys, metalens.training; print([m for m in ('mlx_lm', 'transformers', 'matplotlib', 'datasets') if m in sys.modules])"
    assert run_python(script) == "[]\n"


def test_nothing_warns(model, file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, file, **SMALL)


def test_a_run_without_clipping_is_saved(file, tmp_path):
    train("demo", file, out=tmp_path / "lens", gradient_clip=float("inf"), **SMALL)
    assert TunedLens.load(tmp_path / "lens").provenance["training"]["gradient_clip"] == "inf"
