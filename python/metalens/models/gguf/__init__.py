"""GGUF, llama.cpp's file format: read a model and write it as a folder that mlx-lm opens.

header.py reads the metadata and the list of tensors, formats.py the weights, architectures.py knows the names and settings of each kind of model,
tokenizer.py rebuilds the tokenizer, conversion.py writes the folder.
"""

from metalens.models.gguf.conversion import Conversion, convert_gguf
from metalens.models.gguf.header import is_gguf

__all__ = ["Conversion", "convert_gguf", "is_gguf"]
