"""The progress bar of a run: what it counts, and when it moves."""

import mlx.core as mx
import pytest

from metalens.training import (
    CheckpointFolder,
    TrainingConfig,
    TrainingInterruptedError,
    batching,
    train_loop,
)
from metalens.training import step as training_step
from metalens.utils import progress_bar as bars

LENGTH = 16
CONFIG = TrainingConfig(num_steps=4, max_seq_len=LENGTH)


@pytest.fixture
def ids(rng):
    return mx.array(rng.integers(0, 131, 4 * LENGTH))


def run(model, ids, *callbacks, config=CONFIG, **options):
    return train_loop(model.source, model.unembed, ids, config, callbacks=callbacks, **options)


class Bar:
    """A bar that only counts."""

    disable, mininterval = False, 0.0

    def __init__(self, total, title, show, done=0):
        self.total, self.title, self.done, self.n, self.drawn, self.counts = total, title, done, done, 0, []

    def update(self, tokens):
        self.n += tokens
        self.counts.append(self.n)

    def refresh(self):
        self.drawn += 1

    def set_postfix(self, **figures):
        self.figures = figures

    def close(self):
        pass


@pytest.fixture
def drawn(monkeypatch):
    """The bars that a run has shown."""
    made = []

    def make(*args):
        made.append(Bar(*args))
        return made[-1]

    monkeypatch.setattr(bars, "token_bar", make)
    return made


def test_the_bar_counts_what_was_done_before(tiny, ids, tmp_path, drawn):
    folder, seen = CheckpointFolder(tmp_path), []
    with pytest.raises(TrainingInterruptedError):
        run(tiny, ids, seen.append, checkpoints=folder, stop=lambda: len(seen) == 3)
    assert [(bar.title, bar.total, bar.done, bar.n) for bar in drawn] == [("training the lens", 4 * LENGTH, 0, 3 * LENGTH)]
    del drawn[:]
    run(tiny, ids, checkpoints=folder, resume=True)
    assert [(bar.title, bar.total, bar.done, bar.n) for bar in drawn] == [("training the lens", 4 * LENGTH, 3 * LENGTH, 4 * LENGTH)]


@pytest.mark.parametrize("num_steps", [0, 4])
def test_the_bar_names_the_warm_start_and_does_not_count_it_as_steps(tiny, ids, drawn, num_steps):
    run(tiny, ids, config=TrainingConfig(num_steps=num_steps, max_seq_len=LENGTH, warm_start_tokens=2 * LENGTH))
    expected = [("warm start", 2 * LENGTH, 0, 2 * LENGTH), ("training the lens", 4 * LENGTH, 0, 4 * LENGTH)]
    assert [(bar.title, bar.total, bar.done, bar.n) for bar in drawn] == expected[: 2 if num_steps else 1]


def test_the_bar_moves_within_a_warm_start_and_a_step(tiny, rng, drawn, monkeypatch):
    monkeypatch.setattr(batching, "PASS_TOKENS", LENGTH)  # a sequence in each forward pass
    monkeypatch.setattr(training_step, "PIECE_WORK", 0)
    monkeypatch.setattr(training_step, "LEAST_PIECE", 6)
    ids = mx.array(rng.integers(0, 131, 10 * LENGTH))
    run(tiny, ids, config=TrainingConfig(num_steps=1, max_seq_len=LENGTH, tokens_per_step=3 * LENGTH, warm_start_tokens=4 * LENGTH))
    warm, training = drawn
    assert warm.counts == [LENGTH, 2 * LENGTH, 3 * LENGTH, 4 * LENGTH, 4 * LENGTH]
    assert training.counts == [6, 12, 16, 22, 28, 32, 38, 44, 48, 48]
    assert min(bar.drawn - len(bar.counts) for bar in (warm, training)) >= 3 * 3  # the clock goes on after every block of every pass
    assert training.figures["step"] == "1/1"


def test_a_bar_without_a_total_shows_no_rate(capsys):
    with bars.PhaseBar(True) as bar:
        bar.start("tokenizing", 0)
        bar.advance(214_000)
    shown = capsys.readouterr().err
    assert "tokenizing: 214k tokens [" in shown
    assert "tok/s" not in shown
