"""Chosen tokens: by text or id, and where they are first on top."""

import pytest

from metalens import InterpretableModel
from support.mocks import MockModel, WordTokenizer

IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def test_by_text_and_by_id(model):
    t = model.trajectory(IDS, tokens=["w7", 5, "w5"])
    assert t.chosen_ids == (7, 5)
    assert (t.chosen("w7").id, t.chosen(7).text, t.chosen(5).text) == (7, "w7", "w5")
    assert (t.chosen(5).ranks == t.chosen_ranks[1]).all()
    with pytest.raises(ValueError, match=r"'w8' is none of the chosen tokens \['w7', 'w5'\]"):
        t.chosen("w8")


def test_where_a_token_is_first_on_top(model):
    t = model.trajectory(IDS, embedding=True)
    best = t.top_ids[..., 0]
    for column in range(len(IDS)):
        token = int(best[-1, column])
        first = next(layer for layer, row in zip(t.layers, best[:, column], strict=True) if row == token)
        assert t.follow([token]).chosen(token).first_on_top(column) == first
        assert t.select(layers=[2, 1, 0]).follow([token]).chosen(token).first_on_top(column) == (0 if first == "embedding" else first)
    missing = next(i for i in range(100) if i not in best)
    assert t.follow([missing]).chosen(missing).first_on_top() is None


def test_following_equals_choosing(model):
    chosen, followed = model.trajectory(IDS, tokens=[7, 9]), model.trajectory(IDS).follow(["w7", 9])
    assert (followed.chosen_ranks == chosen.chosen_ranks).all()
    assert followed.model.chosen_ranks.tolist() == chosen.model.chosen_ranks.tolist()
    assert followed.select(positions=-1).chosen("w9").ranks.shape == (3, 1)


class SentencePiece:
    """A tokenizer that puts a space before every text, and drops it when it decodes. It reads other texts as <unk>."""

    pieces = ("\u2581Paris", "Paris", "\u2581", "is", "\u2581a", "<unk>", "\u2581late")
    asked = 0

    def encode(self, text, **_):
        words = [word for word in ("\u2581" + text).replace(" ", "\u2581").split("\u2581")[1:] if word or text == " "]
        return [self.pieces.index("\u2581" + word) if "\u2581" + word in self.pieces else 5 for word in words]

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids).replace("\u2581", " ").strip(" ")

    def convert_ids_to_tokens(self, i):
        return self.pieces[i]

    def get_vocab(self):
        self.asked += 1
        return {piece: i for i, piece in enumerate(self.pieces)}


def test_a_tokenizer_with_spaces_of_its_own():
    tokenizer = SentencePiece()
    model = InterpretableModel(MockModel(vocab=6), tokenizer)
    assert (tokenizer.encode("Paris"), tokenizer.encode("Rome")) == ([0], [5])
    assert model.trajectory([0, 1], top_k=1, tokens=[" Paris", "Paris", "is", " ", "<unk>"]).chosen_ids == (0, 1, 3, 2, 5)
    assert tokenizer.asked == 1
    for unknown in ("Rome", "a", " late"):  # the model has no row for the last one
        with pytest.raises(ValueError, match="no single token.*Many tokens begin with a space"):
            model.trajectory([0, 1], top_k=1, tokens=[unknown])


class ByteLevel:
    """A tokenizer of bytes that drops the space before a full stop when it decodes, as some are set to do."""

    pieces = (".", "\u0120.", "\u0120a")

    def encode(self, text, **_):
        piece = text.replace(" ", "\u0120")
        return [self.pieces.index(piece)] if piece in self.pieces else []

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids).replace("\u0120", " ").replace(" .", ".")

    def convert_ids_to_tokens(self, i):
        return self.pieces[i]


def test_a_tokenizer_that_drops_spaces_before_punctuation():
    model = InterpretableModel(MockModel(vocab=3), ByteLevel())
    assert model.trajectory([0, 1], top_k=1, tokens=[" .", ".", " a"]).chosen_ids == (1, 0, 2)


def test_errors_stay_short(model):
    for text, message in (("w1 " * 60, "and 52 more"), ("w" * 2**20, "1,048,576 characters: too many"), (10**1000, "no token")):
        with pytest.raises(ValueError, match=message) as error:
            model.trajectory(IDS, tokens=[text])
        assert len(str(error.value)) < 400
