"""What a user can do wrong is one line on stderr and exit code 1; a bug shows its traceback."""

import json
import shutil
import sys

import pytest
from click.testing import CliRunner

from metalens import TunedLens
from metalens.cli import main
from metalens.cli.common import note
from metalens.models.bundled import MODEL
from metalens.utils.errors import InvalidValueError

EVAL = ("eval", "demo", "--data", "text.txt", "--max-tokens", 40)
TRAIN = ("train", "demo", "--data", "text.txt", "--recipe", "mlxterp", "--steps", 1, "--max-seq-len", 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a text, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("Some words for a text that is long enough to be read. " * 20)
    (tmp_path / "file").write_text("no folder")
    return tmp_path


@pytest.fixture
def run(folder):
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def fails(run):
    """Run a command that must end with one error."""

    def failed(*args, message):
        result = run(*args)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Error: " in result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""

    return failed


def copied_model(folder, config=None, weights=None):
    model = folder / "model"
    shutil.copytree(MODEL, model)
    if isinstance(config, dict):
        config = json.dumps(json.loads((MODEL / "config.json").read_text()) | config)
    if config is not None:
        (model / "config.json").write_text(config)
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    return model


def weights():
    return (MODEL / "model.safetensors").read_bytes()


# ------------------------------------------------------------------ the model


@pytest.mark.parametrize("name", ["nowhere", "owner/nothing", "", "file", "[/b]"])
def test_an_unknown_model(fails, name):
    fails("lens", name, "A prompt", message="Could not load model")
    fails("plan", name, message="config.json")
    fails("roofline", name, message="config.json")


DAMAGED = {
    "no JSON": ("{", "is not valid JSON"),
    "a list": ("[]", "must hold a JSON object, not list"),
    "nested without end": ("[" * 100_000, "is not valid JSON"),
    "no number": ({"hidden_size": "many"}, "not a whole number above 0"),
    "null": ({"hidden_size": None}, "not a whole number above 0"),
    "no size at all": ({"hidden_size": 0}, "must be at least 1"),
    "experts": ({"num_experts": 4, "num_experts_per_tok": "x"}, "not a whole number above 0"),
    "quantization": ({"quantization": "four bits"}, "quantization must be an object"),
}


@pytest.mark.parametrize(("config", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration(fails, folder, config, message):
    copied_model(folder, config)
    fails("plan", "model", message=message)
    fails("roofline", "model", message="config.json")


def test_a_damaged_configuration_cannot_be_loaded(fails, folder):
    copied_model(folder, "{")
    fails("lens", "model", "A prompt", message="Could not load model 'model'")


@pytest.mark.parametrize(("content", "of_plan"), [(weights()[:20_000], None), (b"junk", "is damaged"), (b"\xff" * 8 + b"junk", "is damaged")])
def test_damaged_weights(fails, folder, content, of_plan):
    copied_model(folder, weights=content)
    fails("lens", "model", "A prompt", message="Could not load model 'model'")
    fails("eval", "model", "--data", "text.txt", message="Could not load model 'model'")
    if of_plan:
        fails("plan", "model", message="model.safetensors is damaged")


def test_an_index_without_a_size_is_left_out(run, folder):
    model = copied_model(folder)
    (model / "model.safetensors").unlink()
    for index in ('{"metadata": 3}', '{"metadata": {"total_size": "x"}}', "{}"):
        (model / "model.safetensors.index.json").write_text(index)
        result = run("plan", "model")
        assert result.exit_code == 0, result.stderr
        assert "model (estimated)" in result.stdout


# ------------------------------------------------------------------ text, lens, places, results


@pytest.mark.parametrize("name", ["nowhere.txt", "hf:"])
def test_no_such_text(fails, name):
    fails("eval", "demo", "--data", name, message="There is no file or folder")


def test_texts_without_text(fails, folder):
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "broken.parquet").write_bytes(b"PAR1xxxxPAR1")
    fails("eval", "demo", "--data", "empty.txt", message="empty.txt is empty")
    fails("eval", "demo", "--data", "binary.txt", message="not UTF-8")
    fails("eval", "demo", "--data", "numbers.jsonl", message="must be text, got int")
    fails("eval", "demo", "--data", "broken.parquet", message="can't be read as Parquet")
    (folder / "nested.jsonl").write_text('{"text": ' + "[" * 100_000)
    (folder / "digits.jsonl").write_text('{"text": ' + "9" * 10_000 + "}")
    fails("eval", "demo", "--data", "nested.jsonl", message="nested.jsonl, line 1: can't be read as JSON")
    fails("eval", "demo", "--data", "digits.jsonl", message="digits.jsonl, line 1: can't be read as JSON")
    fails("lens", "demo", "", message="no tokens")
    fails("lens", "demo", "\udcff", message="The text is not Unicode (surrogates not allowed at character 0)")


def test_what_is_no_lens(fails, folder):
    TunedLens(4, 64).save(folder / "other")
    TunedLens(8, 256).save(folder / "cut")
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:1000])
    TunedLens(8, 256).save(folder / "unlike")
    (folder / "unlike.json").write_text("[]")
    messages = {
        "other": "4 layers of width 64",
        "cut": "is damaged",
        "unlike": "does not describe a lens",
        "nowhere": "No lens at",
        "file": "No lens at",
    }
    for name, message in messages.items():
        fails("lens", "demo", "A prompt", "--lens", name, message=message)
        fails(*EVAL, "--lens", name, message=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lens", "demo", "A prompt", "--layers", "8"), "there is no layer 8"),
        (("lens", "demo", "A prompt", "--top-k", 0), "top_k must be from 1"),
        (("plan", "demo", "--layers", "8"), "layers must be from 0 to 7"),
        (("plan", "demo", "--rank", 257), "rank must be from 1 to 256"),
        (("plan", "demo", "--recipe", "secret"), "ecipe 'secret'"),
        ((*TRAIN, "--out", "lens", "--layers", "8"), "layers must be from 0 to 7"),
    ],
)
def test_numbers_out_of_range(fails, arguments, message):
    fails(*arguments, message=message)


@pytest.mark.parametrize(
    "arguments",
    [
        (*EVAL, "--out", "file/results"),
        (*TRAIN, "--out", "file/lens"),
        (*TRAIN, "--out", "lens", "--checkpoint-dir", "file/state"),
        ("lens", "demo", "A prompt", "--save", "file/picture.png"),
        ("demo", "--out", "file/demo"),
    ],
)
def test_results_that_cannot_be_written(fails, arguments):
    fails(*arguments, message="Can't write file/")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "{"), ("a.json", "[" * 100_000), ("a.toml", "= 3"), ("a.json", '{"steps": 3}'), ("a.json", '{"num_steps": "x"}')],
    ids=["cut off", "nested without end", "no TOML", "unknown", "wrong type"],
)
def test_a_damaged_file_of_settings(fails, folder, name, content):
    (folder / name).write_text(content)
    fails("plan", "demo", "--config", name, message=name)
    fails(*TRAIN, "--out", "lens", "--config", name, message=name)


def test_a_missing_package(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    fails(*TRAIN, "--out", "lens", "--wandb", "project", message="pip install wandb")


@pytest.mark.parametrize("memory", ["inf", "nan", "1e308", "0", "-1"])
def test_an_impossible_memory_is_a_usage_error(run, memory):
    result = run("plan", "demo", f"--memory={memory}")
    assert result.exit_code == 2
    assert "not a number of gigabytes above 0" in result.stderr


@pytest.mark.parametrize("layers", ["0-99999999999", "0-10000", "4-2", "first", "", "1,,2"])
def test_an_impossible_list_of_layers_is_a_usage_error(run, layers):
    result = run("lens", "demo", "A prompt", f"--layers={layers}")
    assert result.exit_code == 2
    assert "not a list of layer numbers" in result.stderr


# ------------------------------------------------------------------ bugs, debugging, broken pipes


@pytest.fixture
def raising(monkeypatch):
    """Let `metalens doctor` raise an error."""

    def raise_in_doctor(error):
        def examine():
            raise error

        monkeypatch.setattr("metalens.ops.doctor.examine", examine)

    return raise_in_doctor


@pytest.mark.parametrize("bug", [kind("a bug") for kind in (ValueError, TypeError, AttributeError, RuntimeError, KeyError, ImportError)])
def test_a_bug_is_not_taken_for_a_mistake_of_the_user(run, raising, bug):
    raising(bug)
    result = run("doctor")
    assert result.exception is bug  # Python prints its traceback
    assert "Error: " not in result.stderr


@pytest.mark.parametrize("error", [InvalidValueError("what was wrong"), FileNotFoundError("what was wrong")])
def test_debugging_shows_where_an_error_comes_from(run, raising, monkeypatch, error):
    raising(error)
    assert "Error: what was wrong" in run("doctor").stderr
    monkeypatch.setenv("METALENS_DEBUG", "1")
    assert run("doctor").exception is error


def test_a_reader_that_has_gone_is_no_error(run, raising):
    raising(BrokenPipeError(32, "Broken pipe"))
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr == ""


def test_a_note_that_cannot_be_written_stops_nothing(monkeypatch):
    class Full:
        encoding = "utf-8"

        def write(self, _):
            raise OSError(28, "No space left on device")

        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    note("Lens written.")
