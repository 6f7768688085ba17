import dataclasses

import numpy as np
import pytest

from metalens.training import TrainingConfig


def test_the_defaults_are_mlxterp_s():
    config = TrainingConfig()
    assert (config.num_steps, config.max_seq_len, config.sequences_per_step) == (250, 2048, 1)
    assert (config.learning_rate, config.momentum, config.gradient_clip, config.seed) == (1.0, 0.9, 1.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_len": 9}, "max_seq_len"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"num_steps": -1}, "num_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"gradient_clip": float("nan")}, "gradient_clip"),
        ({"max_seq_len": 64, "tokens_per_step": 63}, "tokens_per_step"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_the_ends_of_the_ranges_are_allowed():
    config = TrainingConfig(num_steps=0, max_seq_len=10, tokens_per_step=10, momentum=0.0, gradient_clip=float("inf"))
    assert config.sequences_per_step == 1


@pytest.mark.parametrize(("tokens_per_step", "expected"), [(None, 1), (64, 1), (127, 1), (128, 2), (2**18, 4096)])
def test_a_step_is_made_of_whole_sequences(tokens_per_step, expected):
    assert TrainingConfig(max_seq_len=64, tokens_per_step=tokens_per_step).sequences_per_step == expected


def test_the_learning_rate_falls_linearly_to_zero():
    config = TrainingConfig(num_steps=4, learning_rate=2.0)
    assert [config.learning_rate_at(step) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().num_steps = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, or None, got -1"),
        ({"seed": 1.5}, "seed can't be 1.5; it takes a whole number or None"),
        ({"num_steps": 1.5}, "num_steps can't be 1.5; it takes a whole number"),
        ({"num_steps": True}, "num_steps can't be True"),
        ({"num_steps": "3"}, "num_steps can't be '3'"),
        ({"repeat": "no"}, "repeat can't be 'no'; it takes True or False"),
        ({"repeat": 1}, "repeat can't be 1"),
        ({"layers": (0.5,)}, r"layers can't be \(0.5,\); it takes a list of whole numbers or None"),
        ({"layers": (True,)}, "layers can't be"),
        ({"layers": "01"}, "layers can't be '01'"),
        ({"layers": 3}, "layers can't be 3"),
        ({"learning_rate": "1"}, "learning_rate can't be '1'; it takes a number"),
        ({"optimizer": 3}, "optimizer can't be 3"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd"),
    ],
)
def test_settings_of_another_type_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_numbers_of_numpy_are_numbers():
    config = TrainingConfig(num_steps=np.int64(3), learning_rate=np.float32(0.5), layers=np.arange(3), seed=np.uint8(1), momentum=0)
    assert config == TrainingConfig(num_steps=3, learning_rate=0.5, layers=[0, 1, 2], seed=1, momentum=0)
