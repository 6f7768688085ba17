"""metalens convert, to tuned-lens's files and back."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import TunedLens


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("to", [(), ("--to", "tuned-lens")])
def test_convert_there_and_back(run, lens, tmp_path, to):
    result = run("convert", lens, "theirs", *to, "--model", "owner/model")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "params.pt" in result.stderr
    assert "Warning: tuned-lens has no translator for the last block" in result.stderr
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["base_model_name_or_path"] == "owner/model"
    result = run("convert", "theirs", "back")
    assert result.exit_code == 0, result.stderr
    before, after = TunedLens.load(lens), TunedLens.load("back")
    assert after.provenance["model"] == "owner/model"
    for i in range(7):  # tuned-lens has no translator for the last layer
        np.testing.assert_allclose(np.array(before.dense(i)[0]), np.array(after.dense(i)[0]), atol=1e-6)
        assert mx.array_equal(before.dense(i)[1], after.dense(i)[1])


def test_convert_says_what_is_missing(run, lens):
    result = run("convert", "nothing", "out")
    assert result.exit_code == 1
    assert "No lens at nothing" in result.stderr
    result = run("convert", lens, "out")
    assert result.exit_code == 1
    assert "model" in result.stderr
