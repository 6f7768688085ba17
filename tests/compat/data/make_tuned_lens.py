"""Makes the folders of tuned-lens's beside it with the real torch.save (torch 2.13.0): the tests read them without torch."""

import json
from pathlib import Path

import torch

LAYERS, DIM = 3, 4


def value(layer: int, row: int, column: int) -> float:
    """Exact in every float type, also plus one in float32."""
    return ((layer * 31 + row * 7 + column * 3) % 64 - 32) / 256


def tensors(dtype: torch.dtype, transposed: bool, bias: bool) -> dict[str, torch.Tensor]:
    """As upstream's TunedLens.save: the state dict of a ModuleList."""
    layers = torch.nn.ModuleList(torch.nn.Linear(DIM, DIM, bias=bias, dtype=dtype) for _ in range(LAYERS))
    for i, layer in enumerate(layers):
        weight = torch.tensor([[value(i, row, column) for column in range(DIM)] for row in range(DIM)], dtype=dtype)
        layer.weight.data = weight.mT.contiguous().mT if transposed else weight
        if bias:
            layer.bias.data = torch.tensor([value(i, row, 9) for row in range(DIM)], dtype=dtype)
    return layers.state_dict()


for name, dtype, zipped, transposed, bias in (
    ("zip-float32", torch.float32, True, False, True),
    ("zip-bfloat16-transposed", torch.bfloat16, True, True, True),
    ("zip-float64-no-bias", torch.float64, True, False, False),
    ("legacy-float16", torch.float16, False, False, True),
):
    folder = Path(__file__).parent / "tuned_lens" / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(dtype, transposed, bias), folder / "params.pt", _use_new_zipfile_serialization=zipped)
    config = {
        "base_model_name_or_path": "example/tiny",
        "d_model": DIM,
        "num_hidden_layers": LAYERS,
        "bias": bias,
        "base_model_revision": "main",
        "unembed_hash": "0" * 64,
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(config))
