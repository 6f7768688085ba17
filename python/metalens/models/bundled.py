"""The small model and the texts that come with metalens."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files("metalens"))) / "assets"
NAME = "demo"
MODEL = ASSETS / "demo_model"
TRAINING_TEXT = ASSETS / "lens_train.txt"
HELD_OUT_TEXT = ASSETS / "heldout.txt"


def path_of(model: str) -> str:
    """Return a path or hub id as it is. Return the bundled model's path for 'demo', unless a model is in a folder of that name here."""
    return str(MODEL) if model == NAME and not (Path(model) / "config.json").exists() else model
