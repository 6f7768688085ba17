"""A tuned lens in 60 lines of plain MLX and mlx-lm, without metalens: the definition. The argument is the number of steps.

    python examples/lens_from_scratch.py 20      # the bundled model: about a minute on two cores

metalens computes the same losses and gradients without a graph over all layers and without an array of all logits.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import load
from mlx_lm.models.base import create_attention_mask

ASSETS = Path(__file__).parent.parent / "python" / "metalens" / "assets"
TOKENS = 128  # per step, and of the held-out text
Lens = dict[str, mx.array]  # {"weight": W [L, D, D], "bias": b [L, D]}: the translators of all L blocks


def identity_lens(num_layers: int, hidden_size: int) -> Lens:
    """Return translators that change nothing: this lens is the logit lens."""
    weight = mx.broadcast_to(mx.eye(hidden_size), (num_layers, hidden_size, hidden_size))
    return {"weight": weight, "bias": mx.zeros((num_layers, hidden_size))}


def hidden_states(model: nn.Module, ids: mx.array) -> list[mx.array]:
    """Run the frozen model on ids [T]. Return the residual stream after each block, [T, D]."""
    h = model.model.embed_tokens(ids[None])
    mask, states = create_attention_mask(h), []
    for block in model.model.layers:
        h = block(h, mask, cache=None)
        states.append(mx.stop_gradient(h[0]).astype(mx.float32))
    return states


def log_probabilities(model: nn.Module, h: mx.array) -> mx.array:
    """Decode hidden states [T, D] with the model's own final norm and head: [T, V], natural logarithms."""
    return nn.log_softmax(model.model.embed_tokens.as_linear(model.model.norm(h)), axis=-1)


def losses(lens: Lens, model: nn.Module, states: list[mx.array]) -> mx.array:
    """Return KL(model || lens) [L] in nats per token: how far each layer's prediction is from the model's own."""
    log_p, found = log_probabilities(model, states[-1]), []
    for weight, bias, h in zip(lens["weight"], lens["bias"], states, strict=True):
        log_q = log_probabilities(model, h @ weight.T + bias)
        found.append(mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1).mean())
    return mx.stack(found)


def train(lens: Lens, model: nn.Module, ids: mx.array, steps: int) -> Lens:
    """Train on ids [N], one sequence per step. Each layer's loss reaches its own translator only."""
    optimizer = optim.SGD(optim.linear_schedule(0.3, 0.0, steps), momentum=0.9, nesterov=True)
    loss_and_gradient = mx.value_and_grad(lambda lens, states: losses(lens, model, states).sum())
    for step in range(steps):
        start = step * TOKENS % (ids.size - TOKENS)
        loss, gradient = loss_and_gradient(lens, hidden_states(model, ids[start : start + TOKENS]))
        lens = optimizer.apply_gradients(optim.clip_grad_norm(gradient, 1.0)[0], lens)
        mx.eval(lens, optimizer.state)
        print(f"step {step + 1:3d}   mean KL {loss.item() / len(model.layers):.3f} nats", flush=True)
    return lens


if __name__ == "__main__":
    model, tokenizer = load(str(ASSETS / "demo_model"))
    ids, held_out = (mx.array(tokenizer.encode((ASSETS / name).read_text())) for name in ("lens_train.txt", "heldout.txt"))
    logit_lens = identity_lens(len(model.layers), model.args.hidden_size)
    tuned_lens = train(logit_lens, model, ids, int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    states = hidden_states(model, held_out[:TOKENS])
    print("\nKL to the model on held-out text, nats per token\nlayer  logit lens  tuned lens")
    for layer, (before, after) in enumerate(zip(losses(logit_lens, model, states), losses(tuned_lens, model, states), strict=True)):
        print(f"{layer:5d}  {before.item():10.3f}  {after.item():10.3f}")
