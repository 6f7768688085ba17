"""Time the demo model's whole training loop with the capture, the capture alone, and evaluation, in tokens per second."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16, LeftOutError
from benchmarks.operations import training
from benchmarks.operations.training import CONFIG
from benchmarks.suite import Case, Effort, Suite, Work

TITLE = "Demo model: whole loops"
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def same_model():
    """Check that PyTorch's forward pass reproduces MLX's logits, so that both sides run the same model."""
    try:
        difference = training.largest_logit_difference()
    except LeftOutError:
        return None
    assert difference < LOGIT_TOLERANCE
    return difference


def measure(
    suite: Suite, arguments: dict, names: list[str], label: str, tokens: int, memory_of: list[str] | None = None, effort: Effort | None = None
) -> None:
    suite.measure(Case(training, arguments, names, TITLE, label, Work(tokens, "tokens/s", None), memory_of=memory_of or []), effort)


@pytest.mark.parametrize("ours", [OURS, OURS_BF16])
def test_training(suite, same_model, ours):
    steps, sequences = (1, 4) if suite.quick else (4, 4)
    tokens = steps * sequences * CONFIG.max_seq_len
    peers = [TORCH, TORCH_BF16] if ours == OURS else [OURS, TORCH_BF16]
    arguments = {"operation": "train", "steps": steps, "sequences": sequences}
    memory_of = [OURS, TORCH] if ours == OURS else []
    label = f"training, {steps} step{'s' if steps > 1 else ''} of {sequences} x {CONFIG.max_seq_len} tokens"
    measure(suite, arguments, [ours, *peers], label, tokens, memory_of, Effort(limit=30, budget=60))
    if same_model is not None:
        suite.benchmark.extra_info["note"] = f"PyTorch's logits of the demo model differ from MLX's by at most {same_model:.1e}."


@pytest.mark.parametrize("sequences", [1, 4])
def test_training_beside_plain_mlx(suite, sequences):
    """Use few sequences, because MLX's matrix products are slow on Linux CPUs.

    Both competitors run the same loop, and their memory must not grow with the length of the step.
    """
    tokens = sequences * CONFIG.max_seq_len
    arguments = {"operation": "train", "steps": 1, "sequences": sequences}
    label = f"training, one step of {tokens} tokens"
    measure(suite, arguments, [OURS, PLAIN], label, tokens, [OURS, PLAIN], Effort(limit=30, budget=60))


@pytest.mark.parametrize("sequences", [16, 64])
def test_memory_of_a_longer_step(suite, full_only, sequences):
    """Show that a step of several passes of 512 tokens needs the memory of one pass."""
    tokens = sequences * CONFIG.max_seq_len
    arguments = {"operation": "train", "steps": 1, "sequences": sequences}
    label = f"training, one step of {tokens} tokens"
    measure(suite, arguments, [OURS], label, tokens, [OURS], Effort(limit=30, budget=30))


@pytest.mark.parametrize("sequences", [1, 16])
def test_evaluation(suite, sequences):
    tokens = sequences * CONFIG.max_seq_len
    peers = [PLAIN] if sequences == 1 else []
    label = f"evaluation of the logit lens and a tuned lens, {tokens} tokens"
    measure(suite, {"operation": "evaluate", "tokens": tokens}, [OURS, *peers], label, tokens)
