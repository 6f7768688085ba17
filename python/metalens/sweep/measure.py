"""Run one cell: train a lens, or measure one on a model."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metalens
from metalens.evaluation import evaluate
from metalens.lenses.lens import TunedLens
from metalens.models.facts import facts_of_model
from metalens.models.language_model import LanguageModel
from metalens.sweep.cells import Cell
from metalens.training import CheckpointFolder, TrainingInterruptedError, train
from metalens.training.checkpoint import default_folder
from metalens.training.data import find_sources, open_held_out

OTHER_MODEL = "The lens remembers another model"  # the warning that a transfer between models is meant to cause


class Cells:
    """Runs cells in this process. The last model stays loaded, for the next cell.

    Args:
        out: folder of the sweep.
        checkpoint_every: steps between the checkpoints of a training run.
        stop: function that is called within and after every training step. True ends the run with a checkpoint.
    """

    def __init__(self, out: Path, checkpoint_every: int, stop: Callable[[], bool]) -> None:
        self.out, self.checkpoint_every, self.stop = out, checkpoint_every, stop
        self._loaded: tuple[str, LanguageModel] | None = None

    def run(self, cell: Cell) -> None:
        """Run a cell and write its result.

        Raises:
            TrainingInterruptedError: when `stop` returned True.
            MetalensError, OSError: if the cell can't be run.
        """
        if self.stop():
            raise TrainingInterruptedError("The sweep was asked to stop.", learned=False)
        start, used = time.perf_counter(), time.process_time()
        result = self._train(cell) if cell.kind == "lens" else self._evaluate(cell)
        cost = {"seconds": time.perf_counter() - start, "core_seconds": time.process_time() - used}
        cell.write(self.out, {"metalens": metalens.__version__, **cost, **result})
        if cell.kind == "lens":  # its checkpoints have done their work
            shutil.rmtree(default_folder(self.out / cell.folder / "lens.npz"), ignore_errors=True)

    def _model(self, name: str) -> LanguageModel:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # before the next one is loaded: two may not fit
            self._loaded = (name, LanguageModel(name))
        return self._loaded[1]

    def _train(self, cell: Cell) -> dict[str, Any]:
        model = self._model(cell.inputs["model"])
        path = self.out / cell.folder / "lens"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints = default_folder(path.with_suffix(".npz"))
        resumed = checkpoints.is_dir() and bool(CheckpointFolder(checkpoints).steps())
        lens = train(
            model,
            find_sources(cell.inputs["text"], field=cell.inputs["field"], split=cell.inputs["split"]),
            config=cell.settings["training"],
            out=path,
            resume=True,
            checkpoint_every=self.checkpoint_every,
            stop=self.stop,
        )
        sizes = facts_of_model(model).dimensions
        return {
            "resumed": resumed,
            "lens": "lens.npz",
            "model": {
                "num_layers": model.num_layers,
                "hidden_size": model.unembed.hidden_dim,
                "vocab_size": model.unembed.vocab_size,
                "block_params": sizes.block_params,
            },
            "provenance": lens.provenance,
        }

    def _evaluate(self, cell: Cell) -> dict[str, Any]:
        model = self._model(cell.inputs["model"])
        sources = find_sources(cell.inputs["text"], field=cell.inputs["field"], split=cell.inputs["split"])
        lens = TunedLens.load(self.out / cell.inputs["lens"])
        measured = cell.settings["evaluation"]
        with warnings.catch_warnings():
            if cell.names["lens_model"] != cell.names["model"]:
                warnings.filterwarnings("ignore", message=OTHER_MODEL)
            found = evaluate(
                model,
                open_held_out(sources, model.tokenizer, max_tokens=measured["max_tokens"]),
                lens,
                max_tokens=measured["max_tokens"],
                max_seq_len=measured["max_seq_len"],
                logit_stats=measured["bias"],
                layer_transfer=measured["layer_transfer"],
                embedding=measured["embedding"],
            )
        return {"evaluation": found.to_dict()}
