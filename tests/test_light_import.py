"""`import metalens`, `metalens --help` and `--version` answer at once: they load no slow package and run no kernel."""

import json

import pytest

import metalens
from metalens.cli import COMMANDS, main

SLOW = ("mlx_lm", "transformers", "matplotlib", "torch", "datasets", "huggingface_hub", "pyarrow", "pandas")

# Says which slow packages are loaded, whether the native kernels are, and how many bytes MLX has allocated.
WHAT_IS_LOADED = f"""
import json, sys
core = sys.modules.get("mlx.core")
found = [name for name in {SLOW} if name in sys.modules]
print(json.dumps([found, "metalens._ext" in sys.modules, core.get_peak_memory() if core else 0]))
"""
NOTHING = [[], False, 0]


def loaded(run_python, script):
    return json.loads(run_python(f"{script}\n{WHAT_IS_LOADED}").splitlines()[-1])


def command_line(*arguments):
    return f"""
from metalens.cli import main
try:
    main({list(arguments)})
except SystemExit as end:
    assert not end.code
"""


def test_import_metalens(run_python):
    assert loaded(run_python, "import metalens") == NOTHING


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_says_what_it_is(run_python, option):
    assert loaded(run_python, command_line(option)) == NOTHING
    assert loaded(run_python, f"{command_line(option)}\nimport sys\nassert 'rich' not in sys.modules and 'numpy' not in sys.modules") == NOTHING


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command(run_python, command):
    assert loaded(run_python, command_line(command, "--help")) == NOTHING


@pytest.mark.parametrize("name", metalens.__all__)
def test_public_names_are_imported_when_they_are_used(run_python, name):
    script = f"import metalens\nassert {name!r} not in vars(metalens)\nassert metalens.{name} is not None\nassert {name!r} in vars(metalens)"
    assert loaded(run_python, script) == NOTHING


def test_no_module_loads_a_slow_package(run_python):
    every_module = """
import importlib, pkgutil, metalens
for info in pkgutil.walk_packages(metalens.__path__, "metalens."):
    if info.name not in ("metalens._ext", "metalens.compat.lm_eval"):  # the latter is a class of lm-evaluation-harness
        importlib.import_module(info.name)
"""
    assert loaded(run_python, every_module) == NOTHING


def test_public_names_are_listed():
    assert set(metalens.__all__) <= set(dir(metalens))
    assert metalens.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_found_where_the_list_says(name):
    command = main.commands[name]
    assert command.name == name
    assert command.help
    assert main.list_commands(None) == list(main.commands) == list(COMMANDS)


def test_an_unknown_command_is_a_usage_error():
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["trian"])
    assert result.exit_code == 2
    assert "No such command" in result.stderr
