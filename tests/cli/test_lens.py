"""metalens lens, in process on the bundled model."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import Trajectory, TunedLens
from metalens.lenses.lens_file import lens_files

PROMPT = "The free software movement"


def test_lens_prints_json_alone(run):
    result = run("lens", "demo", PROMPT, "--layers", "0,4", "--top-k", 2, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "".join(answer["tokens"]) == PROMPT
    assert set(answer["layers"]) == {"0", "4"}
    for positions in answer["layers"].values():
        assert len(positions) == len(answer["tokens"])
        for best in positions:
            (id0, score0, text0), (_, score1, _) = best
            assert isinstance(id0, int)
            assert isinstance(text0, str)
            assert score0 >= score1


def test_lens_without_a_tuned_lens_is_the_logit_lens(run, tmp_path):
    TunedLens(8, 256).save(tmp_path / "identity")
    plain = json.loads(run("lens", "demo", PROMPT, "--json").stdout)
    identity = json.loads(run("lens", "demo", PROMPT, "--lens", tmp_path / "identity", "--json").stdout)
    for layer in plain["layers"]:
        scores = [np.array([[s for _, s, _ in best] for best in answer["layers"][layer]]) for answer in (plain, identity)]
        np.testing.assert_allclose(*scores, atol=1e-3)


def test_chosen_tokens(run):
    result = run("lens", "demo", PROMPT, "--token", " of", "--token", " the", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    of, the = answer["chosen"]
    assert (of["token"], the["token"]) == (" of", " the")
    assert set(of["ranks"]) == set(answer["layers"])
    on_top = [layer for layer, rows in answer["layers"].items() if rows[-1][0][0] == the["id"]]
    assert [layer for layer, ranks in the["ranks"].items() if ranks[-1] == 1] == on_top
    assert the["first_on_top"] == (int(on_top[0]) if on_top else None)
    table = run("lens", "demo", PROMPT, "--token", " of", "--layers", "7")
    assert "␣of" in table.stdout
    assert "#" in table.stdout
    assert "on top in" in table.stderr
    by_id = run("lens", "demo", "12 345", "--ids", "--token", of["id"], "--json")
    assert json.loads(by_id.stdout)["chosen"][0]["id"] == of["id"]


@pytest.mark.parametrize("name", ["t.json", "t.safetensors"])
def test_statistics_as_a_file(run, tmp_path, name):
    result = run("lens", "demo", PROMPT, "--out", tmp_path / "new" / name, "--token", " of")
    assert result.exit_code == 0, result.stderr
    found = Trajectory.load(tmp_path / "new" / name)
    assert "".join(found.tokens) == PROMPT
    assert found.kl.shape == (8, len(found))
    assert found.chosen(" of").ranks.min() >= 1


def test_statistics_never_replace_the_lens(run, lens, tmp_path):
    files = [tmp_path / "own.npz", tmp_path / "own.json"]
    for file, original in zip(files, lens_files(lens), strict=True):
        file.write_bytes(original.read_bytes())
    before = files[1].read_bytes()
    result = run("lens", "demo", PROMPT, "--lens", tmp_path / "own", "--out", files[1], "--force")
    assert (result.exit_code, files[1].read_bytes()) == (1, before)
    assert "is read and would be replaced by a trajectory" in result.stderr


def test_a_place_for_statistics_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("lens", "no model", PROMPT, "--out", tmp_path / "file" / "t.json")
    assert result.exit_code == 1
    assert "Can't write" in result.stderr  # before the model is looked for


@pytest.mark.parametrize("color", ["probability", "entropy", "kl", "rank"])
def test_lens_saves_a_picture_beside_the_table(run, lens, tmp_path, color):
    picture = tmp_path / "new" / "out.png"
    result = run("lens", "demo", PROMPT, "--lens", lens, "--save", picture, "--color", color)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "layer 7" in result.stdout
    assert "model" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lens", "demo", ""], "no tokens"),
        (["lens", "demo", PROMPT, "--top-k", "0"], "top_k must be from 1 to 6000"),
        (["lens", "demo", PROMPT, "--top-k", "6001"], "top_k must be from 1 to 6000"),
        (["lens", "demo", PROMPT, "--layers", "0,8"], "no layer 8"),
        (["lens", "demo", PROMPT, "--lens", "nowhere/lens"], "No lens at"),
        (["lens", "demo", PROMPT, "--save", "out.nonsense"], "Can't write a picture"),
        (["lens", "demo", PROMPT, "--out", "out.nonsense"], "the suffix must be .json or .safetensors"),
        (["lens", "demo", PROMPT, "--token", "two words"], "'two words' is no single token"),
        (["lens", "demo", "1 2", "--ids", "--token", "6000"], "There is no token 6000: the model predicts the tokens 0 to 5999"),
        (["lens", "demo", "1 2", "--ids", "--token", "x"], "must be token ids"),
    ],
)
def test_bad_input_gives_one_clear_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_list_of_layers_is_a_usage_error(run):
    result = run("lens", "demo", PROMPT, "--layers", "first")
    assert result.exit_code == 2
    assert "not a list of layer numbers" in result.stderr


def test_a_lens_of_another_model_is_refused(run, tmp_path, text):
    TunedLens(4, 64).save(tmp_path / "other")
    for command in (["lens", "demo", PROMPT, "--lens", tmp_path / "other"], ["eval", "demo", "--lens", tmp_path / "other", "--data", text]):
        result = run(*command)
        assert result.exit_code == 1
        assert "4 layers of width 64; the model has 8 of width 256" in result.stderr


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_lens_of_another_head_is_a_note_and_no_error(run, lens, tmp_path):
    other = TunedLens.load(lens)
    other.provenance = {"model": "another/model", "head": "sha256:0"}
    other.save(tmp_path / "other")
    result = run("lens", "demo", "A prompt", "--lens", "other", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    assert "Warning: The lens remembers another model" in result.stderr


def test_control_characters_never_reach_the_terminal(run):
    """A hostile prompt or vocabulary could send escape sequences: ESC, and the one-byte CSI."""
    for switches in ([], ["--json"]):
        result = run("lens", "demo", "a\x1b[31mred\x9b\x7f", "--layers", "7", *switches)
        assert result.exit_code == 0, result.stderr
        assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in result.stdout if c != "\n")
        if switches:
            assert "\x1b" in "".join(json.loads(result.stdout)["tokens"])


def test_the_table_says_what_it_left_out(run):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    result = run("lens", "demo", long, "--layers", "7", "--top-k", "1")
    count = len(json.loads(run("lens", "demo", long, "--layers", "7", "--json").stdout)["tokens"])
    assert f"The last 12 of {count} tokens" in result.stdout
    assert "The last" not in run("lens", "demo", "one two", "--layers", "7").stdout


def test_the_embedding_is_a_layer_of_the_table_the_picture_and_the_files(run, tmp_path):
    lens = TunedLens(8, 256, embedding=True)
    lens.embedding_translator.bias = mx.ones(256)
    lens.save(tmp_path / "lens")
    arguments = ["lens", "demo", PROMPT, "--embedding", "--layers", "0,7", "--token", " of"]
    table = run(*arguments, "--lens", tmp_path / "lens", "--save", tmp_path / "p.png", "--out", tmp_path / "t.json")
    assert table.exit_code == 0, table.stderr
    assert "embedding " in table.stdout
    assert "embedding*" not in table.stdout
    assert Trajectory.load(tmp_path / "t.json").layers == ("embedding", 0, 7)
    answer = json.loads(run(*arguments, "--lens", tmp_path / "lens", "--json").stdout)
    assert list(answer["layers"]) == list(answer["chosen"][0]["ranks"]) == ["embedding", "0", "7"]
    assert answer["untranslated"] == []
    plain = json.loads(run(*arguments, "--json").stdout)
    assert plain["layers"]["embedding"] != answer["layers"]["embedding"]
    TunedLens(8, 256).save(tmp_path / "other")
    assert json.loads(run(*arguments, "--lens", tmp_path / "other", "--json").stdout)["untranslated"] == ["embedding"]
    assert "embedding*" in run(*arguments, "--lens", tmp_path / "other").stdout
