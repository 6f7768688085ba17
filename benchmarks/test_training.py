"""The demo model's whole training loop, capture included, its capture alone, and evaluation: tokens per second."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16, LeftOutError
from benchmarks.operations import training
from benchmarks.operations.training import CONFIG
from benchmarks.suite import Work

TITLE = "Demo model: whole loops"
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def same_model():
    """What is compared must be the same model: PyTorch's forward pass reproduces MLX's logits."""
    try:
        difference = training.largest_logit_difference()
    except LeftOutError:
        return None
    assert difference < LOGIT_TOLERANCE
    return difference


def tokens_per_second(tokens: int) -> Work:
    return Work(tokens, "tokens/s", None)


@pytest.mark.parametrize("ours", [OURS, OURS_BF16])
def test_training(suite, same_model, ours):
    steps, sequences = (1, 4) if suite.quick else (4, 4)
    tokens = steps * sequences * CONFIG.max_seq_len
    peers = [TORCH, TORCH_BF16] if ours == OURS else [OURS, TORCH_BF16]
    arguments = {"operation": "train", "steps": steps, "sequences": sequences}
    memory_of = [OURS, TORCH] if ours == OURS else []
    label = f"training, {steps} step{'s' if steps > 1 else ''} of {sequences} x {CONFIG.max_seq_len} tokens"
    suite.measure(training, arguments, [ours, *peers], label, tokens_per_second(tokens), title=TITLE, memory_of=memory_of, limit=30, budget=60)
    if same_model is not None:
        suite.benchmark.extra_info["note"] = f"PyTorch's logits of the demo model differ from MLX's by at most {same_model:.1e}."


@pytest.mark.parametrize("sequences", [1, 4])
def test_training_beside_plain_mlx(suite, sequences):
    """Few sequences, because MLX's matrix products are slow on Linux CPUs. The same restructured loop in both; memory must not grow with the step."""
    tokens = sequences * CONFIG.max_seq_len
    arguments = {"operation": "train", "steps": 1, "sequences": sequences}
    label = f"training, one step of {tokens} tokens"
    suite.measure(training, arguments, [OURS, PLAIN], label, tokens_per_second(tokens), title=TITLE, memory_of=[OURS, PLAIN], limit=30, budget=60)


@pytest.mark.parametrize("sequences", [16, 64])
def test_memory_of_a_longer_step(suite, full_only, sequences):
    """Accumulated over passes of 512 tokens: as much memory as one of them."""
    tokens = sequences * CONFIG.max_seq_len
    arguments = {"operation": "train", "steps": 1, "sequences": sequences}
    label = f"training, one step of {tokens} tokens"
    suite.measure(training, arguments, [OURS], label, tokens_per_second(tokens), title=TITLE, memory_of=[OURS], limit=30, budget=30)


def test_capture(suite, same_model):
    arguments = {"operation": "capture", "tokens": CONFIG.max_seq_len}
    label = f"capture of one sequence of {CONFIG.max_seq_len} tokens"
    suite.measure(training, arguments, [OURS, TORCH, TORCH_BF16, PLAIN], label, tokens_per_second(CONFIG.max_seq_len), title=TITLE)


@pytest.mark.parametrize("sequences", [1, 16])
def test_evaluation(suite, sequences):
    tokens = sequences * CONFIG.max_seq_len
    peers = [PLAIN] if sequences == 1 else []
    label = f"evaluation of the logit lens and a tuned lens, {tokens} tokens"
    suite.measure(training, {"operation": "evaluate", "tokens": tokens}, [OURS, *peers], label, tokens_per_second(tokens), title=TITLE)
