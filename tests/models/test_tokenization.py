import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.models.tokenization import as_token_ids
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from support.mocks import VOCAB, MockModel, WordTokenizer


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture(scope="module")
def bare():
    return InterpretableModel(MockModel())


class Named:
    """A tokenizer that has only the given attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Sized:
    def __len__(self):
        return 7


def test_encode_and_decode(model):
    assert model.encode("w3 w1 w4") == [3, 1, 4]
    assert model.decode([3, 1]) == "w3 w1"
    assert model.decode(mx.array([3, 1])) == "w3 w1"
    assert model.decode(mx.array([[3, 1]])) == "w3 w1"
    assert model.encode_batch(["w1", "w2 w3"]) == [[1], [2, 3]]
    assert model.token_to_str(9) == "w9"


@pytest.mark.parametrize("text", ["w3 w1 w4", [3, 1, 4], (3, 1, 4), mx.array([3, 1, 4]), mx.array([[3, 1, 4]]), mx.array([[3, 1, 4], [9, 9, 9]])])
def test_tokens_as_text(model, text):
    assert model.to_str_tokens(text) == ["w3", "w1", "w4"]


def test_the_beginning_of_sequence_token_goes_first(model):
    assert model.to_str_tokens("w3", prepend_bos=True) == ["w0", "w3"]
    without = InterpretableModel(MockModel(), WordTokenizer())
    without.tokenizer.bos_token_id = None
    assert without.to_str_tokens("w3", prepend_bos=True) == ["w3"]


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [(Named(vocab_size=5, n_words=6), 5), (Named(n_words=6), 6), (Sized(), 7), (Named(), None)],
    ids=["vocab_size", "n_words", "len", "unknown"],
)
def test_vocabulary_size_of_the_tokenizer(tokenizer, size):
    assert InterpretableModel(MockModel(), tokenizer).vocab_size == size


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.encode("w1"),
        lambda m: m.decode([1]),
        lambda m: m.encode_batch(["w1"]),
        lambda m: m.token_to_str(1),
        lambda m: m.to_str_tokens([1]),
        lambda m: m.vocab_size,
        lambda m: m.ids("w1"),
        lambda m: m.ids(["w1"]),
    ],
    ids=["encode", "decode", "encode_batch", "token_to_str", "to_str_tokens", "vocab_size", "ids of text", "ids of texts"],
)
def test_a_missing_tokenizer_is_named(bare, use):
    with pytest.raises(ValueError, match="No tokenizer available. Pass a tokenizer to InterpretableModel"):
        use(bare)


def test_ids_need_no_tokenizer(bare):
    assert bare.ids([1, 2]).tolist() == [[1, 2]]


def test_distinct_token_strings(model, bare):
    assert model.token_strings(mx.array([[5, 2], [5, 5]])) == {2: "w2", 5: "w5"}
    assert bare.token_strings(mx.array([5])) == {5: "5"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w1 w2", [[1, 2]]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(1, 3), [[1, 2]]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        (["w1 w2 w3", "w4"], [[1, 2, 3], [4, 0, 0]]),
        (["w1", ""], [[1], [0]]),
        (mx.array([1, 2]), [[1, 2]]),
        (mx.array([[1, 2]], dtype=mx.uint8), [[1, 2]]),
        (np.array([1, 2], dtype=np.int64), [[1, 2]]),
        (list(np.array([1, 2])), [[1, 2]]),
        ([VOCAB - 1, 0], [[VOCAB - 1, 0]]),
    ],
    ids=[
        "text",
        "list",
        "tuple",
        "range",
        "nested list",
        "padded texts",
        "one empty text",
        "array",
        "uint8 batch",
        "numpy",
        "list of numpy integers",
        "first and last id",
    ],
)
def test_every_input_becomes_a_batch_of_ids(model, text, expected):
    ids = model.ids(text)
    assert ids.dtype == mx.int32
    assert ids.tolist() == expected


@pytest.mark.parametrize("text", ["", "  \n", [], [""], [[]], mx.array([]), mx.zeros((2, 0), dtype=mx.int32)])
def test_empty_input(model, text):
    with pytest.raises(ValueError, match="no tokens"):
        model.ids(text)


@pytest.mark.parametrize("text", [[VOCAB], [-1], f"w1 w{VOCAB}", f"w{2**31}", mx.array([[0, -7]]), mx.array([2**40]), [2**40], [2**70]])
def test_ids_outside_the_vocabulary(model, text):
    with pytest.raises(ValueError, match=rf"outside the model's vocabulary \(0 to {VOCAB - 1}\)"):
        model.ids(text)


def test_the_offending_id_is_named(model):
    with pytest.raises(ValueError, match=r"Token id -3 "):
        model.ids([1, -3, 500])
    with pytest.raises(ValueError, match=r"Token id 500 "):
        model.ids([1, 3, 500])


@pytest.mark.parametrize("text", [[1.0, 2.0], mx.array([1.5]), mx.array([True, False])], ids=["list", "array", "bool"])
def test_ids_that_are_not_integers(model, text):
    with pytest.raises(TypeError, match="Token ids must be integers"):
        model.ids(text)


@pytest.mark.parametrize("text", [None, {"a": 1}, object(), ["w1", 2], [[1, 2], [3]]], ids=["none", "dict", "object", "mixed", "ragged"])
def test_inputs_of_another_kind(model, text):
    with pytest.raises(TypeError, match="Expected text, a list of token ids or an array of them"):
        model.ids(text)


def test_arrays_of_three_dimensions(model):
    with pytest.raises(ValueError, match=r"must be \[T\] or \[B, T\], got \(1, 1, 2\)"):
        model.ids(mx.array([[[1, 2]]]))


# ---------------------------------------------------------------- as_token_ids


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (range(1, 3), [1, 2]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([], []),
        (mx.array([[1], [2]]), [[1], [2]]),
        (mx.zeros((2, 0), mx.int32), [[], []]),
        ([2**70], [2**70]),
        (mx.array([1.5], mx.bfloat16), [1.5]),
    ],
)
def test_lists_and_arrays_as_numpy_arrays(value, expected):
    found = as_token_ids(value)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == expected


def test_an_array_of_numpy_is_not_copied():
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert as_token_ids(ids) is ids


NO_IDS = [None, 5, "w1", ["w1"], [b"w1"], [1, "w2"], [[1, 2], [3]], {1: 2}, {1, 2}, iter([1]), np.array(3), mx.array(3)]


@pytest.mark.parametrize("value", NO_IDS, ids=lambda value: type(value).__name__)
def test_values_that_are_not_token_ids(value):
    with pytest.raises(InvalidTypeError, match=f"a list of token ids or an array of them, got {type(value).__name__}"):
        as_token_ids(value)


def test_token_ids_of_three_dimensions():
    with pytest.raises(InvalidValueError, match=r"must be \[T\] or \[B, T\], got \(1, 2, 1\)"):
        as_token_ids([[[1], [2]]])
