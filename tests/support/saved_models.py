"""Tiny models in folders like those of mlx-lm's converter, with a tokenizer of words w0, w1, ..."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import quantize_model, save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zoo import build, configuration


def save_zoo_model(folder: Path, label: str, *, quantized: bool = False, dtype: mx.Dtype | None = None, seed: int = 0, **settings):
    """Save the zoo's model of a label, with other settings of its configuration or of the text model inside it."""
    config = configuration(label, **settings)
    model = build(label, seed, config)
    if dtype is not None:
        model.update(tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
    if quantized:
        model, config = quantize_model(model, config, 32, 4)
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95", eos_token="w0").save_pretrained(folder)
    return folder
