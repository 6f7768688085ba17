"""Options mean the same in every command, and older spellings still work."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from metalens import TunedLens
from metalens.cli import COMMANDS, main
from metalens.estimate.roofline import Bounds
from metalens.models.bundled import HELD_OUT_TEXT


def options(command):
    return {spelling: parameter for parameter in main.commands[command].params for spelling in parameter.opts if spelling.startswith("--")}


MEANINGS = {
    "--lens": ("eval", "lens", "view"),
    "--out": ("train", "eval", "sweep", "lens", "demo"),
    "--save": ("eval", "lens", "view"),
    "--token": ("lens", "view"),
    "--max-tokens": ("train", "eval", "view"),
    "--max-seq-len": ("train", "plan", "eval"),
    "--layers": ("train", "plan", "lens"),
    "--data": ("train", "plan", "eval"),
    "--parallel": ("train", "plan"),
    "--shard-model": ("train", "plan", "eval", "lens"),
    "--json": ("plan", "eval", "lens", "roofline", "lenses", "models", "doctor"),
}


@pytest.mark.parametrize(("option", "commands"), MEANINGS.items(), ids=MEANINGS)
def test_an_option_is_in_these_commands(option, commands):
    assert tuple(name for name in COMMANDS if option in options(name)) == commands


@pytest.mark.parametrize(
    ("command", "old"),
    [("eval", "--tokens"), ("eval", "--transfer"), ("lens", "--colour"), ("roofline", "--tokens"), ("plan", "--share"), ("train", "--share")],
)
def test_older_spellings_are_left_out_of_the_help(run, command, old):
    assert old not in options(command)
    help_text = run(command, "--help").stdout
    assert f"{old} " not in help_text


@pytest.mark.parametrize(
    ("command", "default", "other"),
    [("train", "train", "`eval` is 'test'"), ("plan", "train", "`eval` is 'test'"), ("eval", "test", "`train` is 'train'")],
)
def test_the_default_split_is_said(command, default, other):
    split = options(command)["--split"]
    assert split.default == default
    assert other in split.help


def test_every_option_has_a_help_text_that_is_a_phrase():
    for command in COMMANDS:
        for spelling, option in options(command).items():
            if command not in ("train", "plan"):
                assert option.help, f"{command} {spelling}"
                assert not option.help.startswith(("Of ", "For ", "That ")), f"{command} {spelling}"


def test_older_spellings_of_eval(run, tmp_path):
    TunedLens(8, 256).save(tmp_path / "lens")
    result = run("eval", "demo", "--lens", "lens", "--data", HELD_OUT_TEXT, "--tokens", 40, "--transfer", "transfer.png", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == 40
    assert len(answer["transfer"]["kl"]) == 8
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_older_spelling_of_lens(run, tmp_path):
    result = run("lens", "demo", "A prompt", "--save", "out.svg", "--colour", "entropy")
    assert result.exit_code == 0, result.stderr
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_older_spelling_of_roofline(run):
    old, new = (json.loads(run("roofline", "demo", "--chip", "M1", option, 64, "--json").stdout) for option in ("--tokens", "--batch-tokens"))
    assert old == new
    assert new["batch_tokens"] == 64


def test_older_spelling_of_plan(run):
    old, new = (json.loads(run("plan", "demo", "--processes", 3, option, "layers", "--json").stdout) for option in ("--share", "--parallel"))
    assert old == new
    assert new["processes"] == 3


def test_numbers_that_json_does_not_have(run):
    result = run("plan", "demo", "--gradient-clip", "inf", "--json")
    assert json.loads(result.stdout)["config"]["gradient_clip"] == "inf"


def identifiers(value):
    """All keys of a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from identifiers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from identifiers(inner)


def test_keys_of_json_are_identifiers(run):
    for arguments in (("plan", "demo"), ("plan", "Llama-3.1-8B-4bit", "--memory", 5), ("doctor",)):
        result = run(*arguments, "--json")
        assert all(key.isidentifier() and key == key.lower() for key in identifiers(json.loads(result.stdout))), arguments
    found = json.loads(run("roofline", "demo", "--json").stdout)
    assert set(found) == {"note", "model", "batch_tokens", "tokens_per_second", "fraction_of_peak"}
    assert set(found["tokens_per_second"]["M1"]) == {field.name for field in fields(Bounds)}
    found = json.loads(run("models", "--json").stdout)
    assert set(found) == {"tested_mlx_lm", "installed_mlx_lm", "models"}


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "metalens", "plan", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: metalens plan")


SCRIPT = """
import logging
from click.testing import CliRunner
from metalens.cli import main
CliRunner().invoke(main, [*{options}, "plan", "--help"])
from huggingface_hub.utils.logging import get_logger
get_logger("huggingface_hub.x")
print(logging.getLevelName(logging.getLogger("huggingface_hub").getEffectiveLevel()))
"""


@pytest.mark.parametrize(("options", "level"), [([], "ERROR"), (["--verbose"], "DEBUG")])
def test_the_hub_logs_when_asked_only(run_python, options, level):
    """Its package sets its level when it is imported, after the command has begun."""
    assert run_python(SCRIPT.format(options=options), HF_HUB_VERBOSITY="").strip() == level
