"""Pictures show the numbers of a reading."""

import numpy as np
import pytest

from metalens import load
from metalens.display.figures import MOST_TOKENS, reading_figure


@pytest.fixture(scope="module")
def reading():
    return load("demo").read(
        "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    )


@pytest.mark.parametrize("color", ["probability", "entropy"])
def test_a_reading(reading, color):
    assert len(reading.tokens) > MOST_TOKENS
    figure = reading_figure(reading, "a title", color)
    image = figure.axes[0].get_images()[0]
    name = "max_probability" if color == "probability" else "entropy"
    expected = np.concatenate([np.array(getattr(reading.stats, name)), np.array(getattr(reading.model, name))])[:, -MOST_TOKENS:]
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-6)
    assert figure.axes[0].get_title() == "a title"
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "model"
    if color == "probability":
        assert image.get_clim() == (0, 1)
