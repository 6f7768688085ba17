"""Time the capture of the hidden states of all blocks, beside a forward pass in PyTorch with dense weights, in tokens per second."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16, LeftOutError
from benchmarks.operations import training
from benchmarks.suite import TOLERANCE, Case, Effort, Work

TITLE = "Capture of the hidden states"


@pytest.mark.filterwarnings("ignore:A sequence of 512 tokens is longer")  # the demo model's context is 256; the work is the same
@pytest.mark.parametrize("ours", [OURS, OURS_BF16])
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 128), (4, 128), (16, 32), (4, 512)])
@pytest.mark.parametrize("model", ["demo", "smollm2"])
def test_capture(suite, model, sequences, tokens, ours):
    if suite.quick and (sequences, tokens) != (1, 128):
        pytest.skip("Quick mode runs the small shapes only.")
    try:
        training.named_model(model)
    except LeftOutError as reason:
        pytest.skip(str(reason))
    peers = [OURS_BF16, TORCH, TORCH_BF16] if ours == OURS else [TORCH_BF16]
    if ours == OURS and (model, sequences) == ("demo", 1):
        peers.append(PLAIN)
    arguments = {"operation": "capture", "tokens": tokens, "sequences": sequences, "model": model}
    label = f"{model}, {sequences} x {tokens} tokens"
    work = Work(sequences * tokens, "tokens/s", None)
    tolerance = 2e-2 if model == "smollm2" else TOLERANCE  # SmolLM2's hidden states are float16, PyTorch's float32
    suite.measure(Case(training, arguments, [ours, *peers], TITLE, label, work, tolerance=tolerance), Effort(budget=20))
