"""Questions: their file, errors by line, and true and false demonstrations."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis import Question, read_questions, with_demonstrations
from metalens.utils.errors import InvalidValueError

CHOICES = [Question(f"Is {i} even?", (" yes", " no"), i % 2) for i in range(7)]
CLOZES = [Question(f"After {i} comes", (f" {i + 1}",), 0) for i in range(5)]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_choices_by_index_and_by_text(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"context": "2 + 2 =", "choices": [" 4", " 5", " 6"], "answer": 0, "source": "ignored"},
        "\n",
        {"context": "2 + 3 =", "choices": [" 4", " 5"], "answer": " 5"},
    )
    assert read_questions(path) == [Question("2 + 2 =", (" 4", " 5", " 6"), 0), Question("2 + 3 =", (" 4", " 5"), 1)]


def test_clozes_also_through_gzip(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"context": "2 + 2 =", "answer": " 4"}\n'))
    (question,) = read_questions(path)
    assert question == Question("2 + 2 =", (" 4",), 0)
    assert question.is_cloze


GOOD = {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]\n", "expected a JSON object"),
        ("{\n", "not JSON"),
        ({**GOOD, "context": ""}, '"context" must be a text'),
        ({"choices": [" 4", " 5"], "answer": 0}, '"context" must be a text'),
        ({**GOOD, "choices": [" 4"]}, "two texts or more"),
        ({**GOOD, "choices": " 4 5"}, "two texts or more"),
        ({**GOOD, "choices": [" 4", ""]}, "two texts or more"),
        ({**GOOD, "choices": [" 4", " 4"]}, "twice"),
        ({**GOOD, "answer": 2}, "0 to 1"),
        ({**GOOD, "answer": -1}, "0 to 1"),
        ({**GOOD, "answer": True}, "0 to 1"),
        ({**GOOD, "answer": " 7"}, "0 to 1"),
        ({"context": "2 + 2 =", "answer": 4}, 'needs "answer" as a text'),
        ({"context": "2 + 2 =", "answer": ""}, 'needs "answer" as a text'),
    ],
)
def test_a_faulty_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "q.jsonl", GOOD, line)
    with pytest.raises(InvalidValueError, match="line 2") as caught:
        read_questions(path)
    assert message in str(caught.value)


def test_kinds_are_not_mixed(tmp_path):
    with pytest.raises(InvalidValueError, match="mixes"):
        read_questions(write(tmp_path / "q.jsonl", GOOD, {"context": "2 + 2 =", "answer": " 4"}))


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(InvalidValueError, match="empty"):
        read_questions(write(tmp_path / "q.jsonl", "\n"))


@given(shots=st.integers(0, 6), false=st.booleans(), seed=st.integers(0, 1000))
def test_demonstrations_are_other_questions_with_the_asked_answers(shots, false, seed):
    asked = with_demonstrations(CHOICES, shots, false=false, separator="\n", seed=seed)
    assert len(asked) == len(CHOICES)
    for question, original in zip(asked, CHOICES, strict=True):
        *shown, last = question.context.split("\n")
        assert last == original.context
        assert (question.choices, question.answer) == (original.choices, original.answer)
        assert len(set(shown)) == shots
        for demonstration in shown:
            (source,) = [each for each in CHOICES if demonstration.startswith(each.context)]
            assert source is not original
            assert demonstration == source.context + source.choices[source.answer if not false else 1 - source.answer]


def test_true_and_false_demonstrations_are_the_same_questions():
    true, false = (with_demonstrations(CLOZES, 3, false=f, separator="|", seed=5) for f in (False, True))
    for a, b in zip(true, false, strict=True):
        parts = list(zip(a.context.split("|"), b.context.split("|"), strict=True))
        assert all(x.rsplit(" ", 1)[0] == y.rsplit(" ", 1)[0] for x, y in parts)
        assert all(x != y for x, y in parts[:-1])  # every demonstration is false, the question is not
        assert parts[-1][0] == parts[-1][1]
    assert with_demonstrations(CLOZES, 3, seed=5) != with_demonstrations(CLOZES, 3, seed=6)


def test_limit_asks_the_first_questions_and_draws_from_all():
    asked = with_demonstrations(CHOICES, 6, separator="\n", limit=2)
    assert len(asked) == 2
    assert CHOICES[6].context in asked[0].context


def test_too_few_questions_or_answers():
    with pytest.raises(InvalidValueError, match="need more than 5 questions"):
        with_demonstrations(CLOZES, 5)
    same = [Question(f"{i} times 0 is", (" 0",), 0) for i in range(3)]
    with pytest.raises(InvalidValueError, match="no false one"):
        with_demonstrations(same, 1, false=True)
