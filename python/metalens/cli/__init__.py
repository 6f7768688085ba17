"""The command line: metalens train | plan | eval | lens | convert | demo | roofline | doctor.

Results go to stdout, as a table or with --json as JSON alone; progress and notes go to stderr. Each command is in a file of its group: training.py,
reading.py, tools.py; settings.py has the options that make a TrainingConfig, common.py what all need.
"""

from __future__ import annotations

import logging
import sys

import click

from metalens.cli.plan import plan_command
from metalens.cli.read import demo_command, eval_command, lens_command
from metalens.cli.tools import convert_command, doctor_command, models_command, roofline_command
from metalens.cli.train import train_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="metalens")
@click.option("--verbose", is_flag=True, help="Log every training step to stderr.")
def main(verbose: bool) -> None:
    """Train and apply tuned lenses on (quantized) language models.

    MODEL is a folder in mlx-lm's format, a hub id, or 'demo' for the small model that comes with metalens.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    for chatty in ("matplotlib", "httpx", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG if verbose else logging.ERROR)  # what it could not do ends as an error of ours


for command in (
    train_command,
    plan_command,
    eval_command,
    lens_command,
    convert_command,
    demo_command,
    roofline_command,
    models_command,
    doctor_command,
):
    main.add_command(command)
