"""What the tests of all commands share: the bundled model, an empty folder, a cache for tokens, a small text and a lens."""

import mlx.core as mx
import pytest
from click.testing import CliRunner

from metalens import TunedLens
from metalens.cli import main
from metalens.models.bundled import HELD_OUT_TEXT


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALENS_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder; stdout and stderr are kept apart, as scripts see them."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with about 700 tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(HELD_OUT_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    """The path of a lens of the bundled model that adds random vectors."""
    lens = TunedLens(8, 256)
    for i, translator in enumerate(lens.translators):
        translator.bias = 0.1 * mx.random.normal((256,), key=mx.random.key(i))
    path = tmp_path_factory.mktemp("lens") / "lens"
    lens.save(path)
    return path
