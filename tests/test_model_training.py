import math

import mlx.core as mx
import numpy as np
import pytest

import metalens
from metalens import InterpretableModel, TunedLens, train_tuned_lens
from metalens.models.capture import ResidualCapture
from support.mocks import DIM, LAYERS, VOCAB, MockModel, WordTokenizer, random_lens

IDS = [3, 1, 4, 1, 5]
DATASET = [" ".join(f"w{(7 * i + j * j) % VOCAB}" for i in range(9)) for j in range(8)]  # 72 tokens
QUICK = {"num_steps": 2, "max_seq_len": 12, "verbose": False}


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def identical(lens):
    return all(np.array_equal(np.array(t.weight), np.eye(lens.hidden_dim)) and not np.array(t.bias).any() for t in lens.translators)


# ---------------------------------------------------------------- training


def test_a_trained_lens(model):
    losses = []
    lens = model.train_tuned_lens(DATASET, 40, max_seq_len=24, verbose=False, callback=lambda step, loss: losses.append((step, loss)))
    assert isinstance(lens, TunedLens)
    assert (lens.num_layers, lens.hidden_dim) == (LAYERS, DIM)
    assert [step for step, _ in losses] == list(range(40))
    assert all(type(step) is int and type(loss) is float and math.isfinite(loss) for step, loss in losses)
    # Three sequences take turns: compare whole rounds.
    assert sum(loss for _, loss in losses[-3:]) < 0.7 * sum(loss for _, loss in losses[:3])
    assert not identical(lens)


def test_the_function_is_the_method(model):
    a, b = train_tuned_lens(model, DATASET, **QUICK), model.train_tuned_lens(DATASET, **QUICK)
    for x, y in zip(a.translators, b.translators, strict=True):
        np.testing.assert_array_equal(np.array(x.weight), np.array(y.weight))
        np.testing.assert_array_equal(np.array(x.bias), np.array(y.bias))
    assert metalens.train_tuned_lens is train_tuned_lens


def test_training_leaves_the_model_alone(model):
    before = np.array(model(mx.array([IDS])))
    model.train_tuned_lens(DATASET, **QUICK)
    np.testing.assert_array_equal(np.array(model(mx.array([IDS]))), before)


def test_no_steps(model, tmp_path):
    lens = model.train_tuned_lens(DATASET, 0, max_seq_len=12, save_path=tmp_path / "lens", verbose=True)
    assert identical(lens)
    assert identical(model.load_tuned_lens(tmp_path / "lens"))


@pytest.fixture
def seen(model, monkeypatch):
    """The ids that training runs the model on."""
    sequences, original = [], ResidualCapture.capture

    def capture(self, ids, *args, **options):
        sequences.extend(ids.tolist())
        return original(self, ids, *args, **options)

    _ = model.unembed  # its own check is over before the counting begins
    monkeypatch.setattr(ResidualCapture, "capture", capture)
    return sequences


@pytest.mark.parametrize("length", [12, 13, 23, 24, 30])
def test_every_token_is_used(model, seen, length, monkeypatch):
    monkeypatch.setattr("metalens.training.batching.PASS_TOKENS", 12)  # every step has a pass of its own
    ids = [i % VOCAB for i in range(length)]
    model.train_tuned_lens([ids], 4, max_seq_len=12, verbose=False)
    assert all(len(sequence) <= 12 for sequence in seen)
    # Once per pass, in the text's order: the tail is a shorter sequence.
    used = [i for sequence in seen for i in sequence]
    assert used == (ids * 4)[: len(used)]


def test_texts_are_joined_with_spaces(model, seen):
    model.train_tuned_lens(["w1 w2 w3", "w4", "", "w5 w6 w7 w8 w9 w10"], 1, max_seq_len=10, verbose=False)
    assert seen == [list(range(1, 11))]


@pytest.mark.parametrize(
    "dataset",
    [
        [list(range(5)), list(range(5, 10))],
        [tuple(range(10))],
        [mx.arange(4), mx.arange(4, 10)],
        [np.arange(10)],
        mx.arange(10)[None],
        [[], list(range(10)), []],
        "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9",
    ],
    ids=["lists", "tuple", "arrays", "numpy", "one array", "some lists empty", "one text"],
)
def test_datasets_of_ids(model, seen, dataset):
    model.train_tuned_lens(dataset, 1, max_seq_len=10, verbose=False)
    assert seen == [list(range(10))]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "Dataset is empty"),
        ([""], "only empty or whitespace"),
        (["", "  \n\t"], "only empty or whitespace"),
        ("", "only empty or whitespace|Dataset is empty"),
        (["w1 w2 w3"], "Dataset too small: 3 tokens, need at least 12"),
        (["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11"], "Dataset too small: 11 tokens, need at least 12. Provide more text"),
        ([[1, 2, 3]], "Dataset too small: 3 tokens"),
        ([[]], "Dataset too small: 0 tokens|Dataset is empty"),
        ([[*range(20), VOCAB]], r"Token id 100 is outside the model's vocabulary \(0 to 99\)"),
        ([[*range(20), -1]], "Token id -1 is outside"),
        ([f"w{VOCAB} " * 20], "Token id 100 is outside"),
    ],
)
def test_datasets_that_cannot_be_trained_on(model, dataset, message):
    with pytest.raises(ValueError, match=message):
        model.train_tuned_lens(dataset, **QUICK)


def test_datasets_of_floats(model):
    with pytest.raises(TypeError, match="integers"):
        model.train_tuned_lens([[0.5] * 20], **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 9}, r"max_seq_len \(9\) is too small. Must be at least 10 tokens"),
        ({"num_steps": -1}, "num_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
    ],
)
def test_settings_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.train_tuned_lens(DATASET, **(QUICK | options))


def test_the_shortest_sequences(model):
    assert not identical(model.train_tuned_lens(DATASET, 1, max_seq_len=10, verbose=False))


def test_training_without_a_tokenizer(model):
    with pytest.raises(ValueError, match="No tokenizer available"):
        InterpretableModel(model.model).train_tuned_lens(DATASET, **QUICK)
    assert not identical(InterpretableModel(model.model).train_tuned_lens([IDS * 4], **QUICK))


@pytest.mark.parametrize("dataset", [DATASET, [IDS * 4]], ids=["texts", "ids"])
def test_training_without_a_head(dataset):
    class Headless(MockModel):
        def __init__(self):
            super().__init__()
            self.table, self.projection = self.embed_tokens.weight, self.lm_head.weight
            del self["embed_tokens"], self["lm_head"]

        def __call__(self, ids):
            x = self.table[ids]
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) @ self.projection.T

    with pytest.raises(ValueError, match="Cannot find output projection layer"):
        InterpretableModel(Headless(), WordTokenizer()).train_tuned_lens(dataset, **QUICK)


def test_training_a_damaged_model(model):
    model.model.lm_head.weight = model.model.lm_head.weight * float("nan")
    with pytest.raises(ValueError, match="weights are damaged") as error:
        model.train_tuned_lens(DATASET, **QUICK)
    assert "Could not find output projection" not in str(error.value)  # it was found


def test_a_progress_bar_on_stderr_alone(model, capsys):
    model.train_tuned_lens(DATASET, **(QUICK | {"verbose": True}))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "KL" in shown.err
    model.train_tuned_lens(DATASET, **QUICK)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_steps_are_clipped(model):
    strict, loose = (model.train_tuned_lens(DATASET, 1, momentum=0.0, max_seq_len=12, gradient_clip=clip, verbose=False) for clip in (1e-3, 1e6))

    def distance(lens):
        return math.sqrt(sum(float(np.sum((np.array(t.weight) - np.eye(DIM)) ** 2) + np.sum(np.array(t.bias) ** 2)) for t in lens.translators))

    assert distance(strict) == pytest.approx(1e-3, rel=1e-2)  # learning rate 1, plain SGD
    assert distance(loose) > 2e-3


# ---------------------------------------------------------------- training: where the lens goes


def test_a_saved_lens_is_the_returned_one(model, tmp_path):
    lens = model.train_tuned_lens(DATASET, save_path=tmp_path / "a" / "mock-1.0", **QUICK)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["mock-1.0.json", "mock-1.0.npz"]
    for loaded in (model.load_tuned_lens(tmp_path / "a" / "mock-1.0"), TunedLens.load(str(tmp_path / "a" / "mock-1.0.npz"))):
        for x, y in zip(loaded.translators, lens.translators, strict=True):
            np.testing.assert_array_equal(np.array(x.weight), np.array(y.weight))
            np.testing.assert_array_equal(np.array(x.bias), np.array(y.bias))


@pytest.mark.parametrize("path", ["file/lens", "file/deeper/lens.npz", "folder", "folder2"])
def test_a_path_that_cannot_be_written_is_found_before_training(model, tmp_path, monkeypatch, path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder2.json").mkdir()
    monkeypatch.setattr("metalens.training.run.train_loop", lambda *args, **options: pytest.fail("training started"))
    with pytest.raises(OSError, match=r"Can't write .*Choose a path"):
        model.train_tuned_lens(DATASET, save_path=tmp_path / path, **QUICK)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.npz", "folder2.json"]


def test_a_failed_training_leaves_an_older_lens(model, tmp_path):
    lens = random_lens()
    lens.save(tmp_path / "lens")

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train_tuned_lens(DATASET, save_path=tmp_path / "lens", callback=stop, **QUICK)
    np.testing.assert_array_equal(np.array(TunedLens.load(tmp_path / "lens").translators[0].weight), np.array(lens.translators[0].weight))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens.json", "lens.npz"]


def test_a_lens_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="No lens at"):
        model.load_tuned_lens(tmp_path / "lens")
