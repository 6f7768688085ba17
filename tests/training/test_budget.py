"""A budget in tokens: what each recipe makes of it."""

import numpy as np
import pytest

from metalens.training.data import Corpus, Sampler
from metalens.training.data.sampler import MIN_HELD
from metalens.training.recipes import RECIPES
from metalens.training.settings import budget_in_minutes, resolve
from metalens.training.sufficiency import suffices
from metalens.utils.errors import InvalidValueError

FIELDS = ("warm_start_tokens", "num_steps", "tokens_per_step", "max_seq_len")


def budgeted(recipe, tokens, context=512, config=None, **settings):
    _, found = resolve(recipe, config, settings | {"tokens": tokens}, context)
    return found


@pytest.mark.parametrize(
    ("recipe", "tokens", "expected"),
    [
        ("fast", 9000, (4244, 33, 128, 128)),
        ("fast", 43_008, (21_248, 166, 128, 128)),
        ("fast", 1_000_000, (65_536, 456, 2048, 512)),  # half would be more than the recipe's own warm start
        ("fast", 20_000_000, (65_536, 1216, 16_384, 512)),
        ("fast", 100, (50, 1, 50, 50)),
        ("paper", 9000, (0, 66, 128, 128)),
        ("muon", 100_000, (0, 250, 397, 397)),
        ("mlxterp", 9000, (0, 70, 128, 128)),
        ("mlxterp", 10**7, (0, 19_531, 512, 512)),
    ],
)
def test_many_small_steps_of_at_least_128_tokens(recipe, tokens, expected):
    found = budgeted(recipe, tokens)
    assert tuple(getattr(found, name) for name in FIELDS) == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [10, 11, 77, 128, 200, 1000, 4095, 9000, 70_000, 10**6, 10**7])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_steps": 12}, {"tokens_per_step": 64}, {"num_steps": 40, "tokens_per_step": 256}, {"max_seq_len": 10}, {"warm_start_tokens": 100}],
    ids=str,
)
def test_no_more_is_taken_than_the_budget_and_most_of_it_is_used(recipe, tokens, settings):
    found = budgeted(recipe, tokens, **settings)
    held_back = found.held_back_tokens if found.held_back_tokens >= MIN_HELD else 0
    assert 0 < found.total_tokens <= tokens - held_back
    if "num_steps" not in settings:
        assert found.total_tokens >= 0.7 * tokens or tokens < 1000 or found.num_steps == 0
        assert found.num_steps == 0 or tokens - found.total_tokens < found.step_tokens + found.num_steps * found.max_seq_len + min(
            found.guard_tokens, tokens // 17 + 1
        )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sequences", [72, 336, 1000])
def test_a_text_of_the_budget_is_enough(recipe, sequences):
    """Also for what the guard holds back. The warm start is rounded up to whole sequences."""
    found = budgeted(recipe, 128 * sequences, max_seq_len=128)
    text = Corpus.from_ids(np.zeros(128 * (sequences + bool(found.warm_start_tokens)), np.int32))
    assert suffices(text, found)
    assert found.guard_tokens == 0 or found.num_steps == 0 or len(Sampler(text, 128, held_back=found.held_back_tokens)) == text.tokens // 128 - 4


def test_the_guard_comes_out_of_the_budget():
    assert budgeted("fast", 9000, guard_tokens=0).total_tokens == 8980
    assert budgeted("fast", 9000).total_tokens + 512 <= 9000
    assert budgeted("fast", 2000).total_tokens + budgeted("fast", 2000).held_back_tokens <= 2000
    assert budgeted("ridge", 9000).total_tokens == 9000


def test_the_warm_start_has_at_most_16_tokens_for_each_dimension():
    """A narrow model has steps for the rest. Without the model, and for wide ones, half or the recipe's own number is less."""
    narrow = resolve("fast", None, {"tokens": 43_008}, 512, 256)[1]
    assert (narrow.warm_start_tokens, narrow.num_steps, narrow.tokens_per_step) == (4096, 300, 128)
    assert resolve("fast", None, {"tokens": 43_008}, 512, 4096)[1] == budgeted("fast", 43_008)
    assert resolve("fast", None, {"tokens": 8000}, 512, 256)[1] == budgeted("fast", 8000)
    assert resolve("fast", None, {"tokens": 43_008, "warm_start_tokens": 8000}, 512, 256)[1].warm_start_tokens == 8000
    assert resolve("ridge", None, {"tokens": 43_008}, 512, 256)[1].warm_start_tokens == 43_008


def test_what_is_given_stays():
    assert budgeted("fast", 9000, num_steps=10).num_steps == 10
    assert budgeted("fast", 9000, tokens_per_step=300).tokens_per_step == 300
    assert budgeted("fast", 9000, warm_start_tokens=1000).warm_start_tokens == 1000
    assert budgeted("fast", 9000, max_seq_len=512).max_seq_len == 512
    assert budgeted("fast", 9000, rank=4).warm_start_tokens == 0
    both = budgeted("fast", 10**6, num_steps=10, tokens_per_step=256, warm_start_tokens=0)
    assert both.total_tokens == 2560


def test_the_closed_form_takes_all():
    found = budgeted("fast", 9000, num_steps=0)
    assert (found.num_steps, found.warm_start_tokens) == (0, 9000)


@pytest.mark.parametrize("tokens", [10, 11, 19, 64, 127, 128, 511, 513, 700, 9000, 9001])
@pytest.mark.parametrize("settings", [{}, {"max_seq_len": 10}, {"tokens_per_step": 64}, {"warm_start_tokens": 100}], ids=str)
def test_the_closed_form_reads_no_more_than_its_budget(tokens, settings):
    """A budget of 64 tokens read a whole sequence of 512."""
    found = budgeted("ridge", tokens, **settings)
    read = Sampler(Corpus.from_ids(np.zeros(20_000, np.int32)), found.max_seq_len).take_step(found.warm_start_tokens).tokens
    wanted = min(tokens, settings.get("warm_start_tokens", tokens))
    assert wanted - found.max_seq_len < found.warm_start_tokens <= read <= tokens
    assert found.warm_start_tokens > 0.5 * wanted


def test_in_a_file_of_settings(tmp_path):
    (tmp_path / "settings.toml").write_text('recipe = "muon"\ntokens = 9000\n')
    name, found = resolve(None, tmp_path / "settings.toml", {})
    assert (name, found.num_steps, found.tokens_per_step) == ("muon", 66, 128)
    assert resolve(None, tmp_path / "settings.toml", {"tokens": 1280})[1].num_steps == 9


def test_minutes_in_a_file_or_a_dict(tmp_path):
    """A budget of the caller replaces that of the file, of either kind."""
    file = tmp_path / "settings.toml"
    file.write_text('recipe = "muon"\nminutes = 2.5\nnum_steps = 12\n')
    rest = {"recipe": "muon", "num_steps": 12}
    assert budget_in_minutes(file, None, None) == (rest, 2.5)
    assert budget_in_minutes(rest | {"minutes": 2}, None, None) == (rest, 2)
    assert budget_in_minutes(file, None, 7) == (rest, 7)
    assert budget_in_minutes(file, 9000, None) == (rest, None)
    assert budget_in_minutes(rest | {"tokens": 5}, None, 7) == (rest, 7)
    assert budget_in_minutes(rest | {"tokens": 5}, None, None) == (rest | {"tokens": 5}, None)
    assert budget_in_minutes(None, None, None) == (None, None)
    config = resolve("muon", None, {})[1]
    assert budget_in_minutes(config, None, 3) == (config, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("minutes = 0", "minutes must be a number above 0, got 0"),
        ("minutes = 2\ntokens = 5", "give one of them"),
        ("minutes = 'ten'", "minutes can't be 'ten'; it takes a number"),
        ("minutes = inf", "minutes must be a number above 0, got inf"),
        ("minutes = true", "minutes can't be True"),
    ],
)
def test_what_are_no_minutes_in_a_file(tmp_path, content, message):
    (tmp_path / "settings.toml").write_text(content)
    with pytest.raises(InvalidValueError, match=message):
        budget_in_minutes(tmp_path / "settings.toml", None, None)


@pytest.mark.parametrize("tokens", [0, -5, 1.5, True, "9000"])
def test_what_is_no_budget(tokens):
    with pytest.raises(InvalidValueError, match="tokens must be a whole number of at least 1"):
        budgeted("fast", tokens)


def test_a_budget_of_less_than_a_sequence():
    with pytest.raises(InvalidValueError, match="A budget of 100 tokens is too small: a sequence has 128"):
        budgeted("fast", 100, max_seq_len=128)


def test_a_complete_configuration_is_divided_anew():
    _, complete = resolve("fast", None, {}, 512)
    assert complete.max_seq_len == 512
    assert budgeted(None, 9000, config=complete) == budgeted("fast", 9000)
