"""Are predictions that a model learns late also settled in late layers? The question of the paper's Table 2, on a model that is trained here.

    python examples/iteration_learned.py 256     # the number of steps: some minutes on two cores

A small model of bytes learns the bundled text. At steps 0, 1, 2, 4, ... it predicts the bytes of a held-out text. The step from which on a
prediction is the final one (iteration learned) is compared with the layer from which on it is (prediction depth).
"""

import sys
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama

import metalens
from metalens.analysis import Difficulty, checkpoint_predictions, iteration_learned, text_depths, text_predictions
from metalens.models.bundled import HELD_OUT_TEXT, TRAINING_TEXT

LAYERS, WIDTH, LENGTH, BATCH = 6, 64, 64, 16  # blocks, hidden size, bytes of a sequence, sequences of a step
TEXTS = 24  # held-out sequences
LENS_TOKENS = 8192  # bytes that the tuned lens is computed from


def byte_model(seed: int = 0) -> nn.Module:
    """Return a llama of bytes with random weights."""
    mx.random.seed(seed)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            intermediate_size=2 * WIDTH,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=256,
            tie_word_embeddings=False,
        )
    )


def training_steps(model: nn.Module, ids: np.ndarray, steps: int) -> Iterator[int]:
    """Train, and yield the number of steps done: 0, 1, 2, 4, ... and `steps`. The model changes in place."""
    optimizer, rng = optim.AdamW(learning_rate=3e-3), np.random.default_rng(0)
    loss = nn.value_and_grad(model, lambda x: nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean"))
    yield 0
    for step in range(1, steps + 1):
        starts = rng.integers(0, len(ids) - LENGTH, BATCH)
        _, gradient = loss(mx.array(np.stack([ids[start : start + LENGTH] for start in starts])))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        if step == steps or step & (step - 1) == 0:
            yield step


def main(steps: int) -> None:
    """Print the rank correlation of prediction depth and iteration learned, for the logit lens and a tuned lens."""
    train, held_out = (np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32) for path in (TRAINING_TEXT, HELD_OUT_TEXT))
    texts = [held_out[i * LENGTH : (i + 1) * LENGTH].tolist() for i in range(TEXTS)]
    model = metalens.InterpretableModel(byte_model(), accelerate=False)  # the native kernels have no gradient
    names: list[int] = []

    def checkpoints() -> Iterator[metalens.InterpretableModel]:
        for step in training_steps(model.model, train, steps):
            names.append(step)
            yield model

    learned = iteration_learned(checkpoint_predictions(checkpoints(), text_predictions(texts)), names)
    lens = metalens.train(model, train[:LENS_TOKENS], recipe="ridge", max_seq_len=LENGTH, warm_start_tokens=LENS_TOKENS, show_progress=False)
    print("predictions that were learned at each step:", {step: int((learned == step).sum()) for step in names})
    for name, each in (("logit lens", None), ("tuned lens", lens)):
        depth, groups = text_depths(model, texts, each)
        found = Difficulty(depth, learned, groups).correlation()
        by_step = [f"{depth[learned == step].mean():.1f}" for step in names if (learned == step).any()]
        print(f"{name}: rank correlation {found.value:.2f} ({found.low:.2f} to {found.high:.2f}); mean depth by step learned {' '.join(by_step)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
