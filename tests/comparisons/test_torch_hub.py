"""The PyTorch side of a comparison runs the same model as MLX."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from support.saved_models import save_zoo_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

IDS = np.array([[3, 17, 5, 0, 22, 9, 9, 1]])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_of_transformers_gives_the_hidden_states_and_logits_of_mlx(tmp_path, quantized):
    from benchmarks.torch_hub import HubModel

    # transformers has its own names for the other angles and windows; MLX rounds sqrt(hidden_size) to bfloat16.
    settings = {
        "tie_word_embeddings": False,
        "hidden_size": 64,
        "query_pre_attn_scalar": 20,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "sliding_window": 512,
        "num_hidden_layers": 6,
    }
    save_zoo_model(tmp_path / "model", "gemma3_text", quantized=quantized, dtype=mx.float32, **settings)
    model = InterpretableModel(tmp_path / "model")
    hub = HubModel(tmp_path / "model", model.model)
    with torch.no_grad():
        hidden = hub.hidden(torch.from_numpy(IDS))
        logits = hub.unembed(hidden[-1])
    expected = model.source.capture(mx.array(IDS)).hidden
    assert len(hidden) == len(expected) == len(hub.blocks)
    for ours, theirs in zip(expected, hidden, strict=True):
        np.testing.assert_allclose(theirs.numpy(), np.array(ours), rtol=0, atol=1e-4 * float(mx.abs(ours).max()))
    scale = float(np.abs(np.array(model(mx.array(IDS)))).max())
    np.testing.assert_allclose(logits.numpy(), np.array(model(mx.array(IDS))), rtol=0, atol=1e-4 * scale)
    assert hub.embedding.shape == (logits.shape[-1], hidden[-1].shape[-1])
