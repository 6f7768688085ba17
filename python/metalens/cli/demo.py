"""The main job on the bundled model: train a lens, compare it with the logit lens on held-out text, read a prompt through it."""

from __future__ import annotations

from dataclasses import dataclass

from metalens.evaluation import Evaluation, evaluate
from metalens.lenses.lens import TunedLens
from metalens.model import InterpretableModel
from metalens.models.bundled import HELD_OUT_TEXT, TRAINING_TEXT
from metalens.readings.reading import Reading
from metalens.training import recipe, train

PROMPT = "Click the button in the top right corner of the window to open the"

# The command line's default recipe, in the small steps that suit so few tokens: 43,008 of them.
CONFIG = recipe("fast", num_steps=240, max_seq_len=128, tokens_per_step=128, warm_start_tokens=12288, seed=0)
HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    lens: TunedLens
    evaluation: Evaluation
    logit: Reading
    tuned: Reading


def run(model: InterpretableModel, *, show_progress: bool = False) -> Demo:
    """Train on the bundled text, evaluate on the held-out text, read the prompt."""
    ids = model.training_ids([TRAINING_TEXT.read_text(encoding="utf-8")])
    lens = train(model.source, model.unembed, ids, CONFIG, show_progress=show_progress)
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    evaluation = evaluate(model, text, lens, max_seq_len=CONFIG.max_seq_len, max_tokens=HELD_OUT_TOKENS, show_progress=show_progress)
    return Demo(lens, evaluation, model.read(PROMPT), model.read(PROMPT, lens))
