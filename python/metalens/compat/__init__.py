"""The names and files of other libraries: mlxterp's modules, and tuned-lens's lenses."""

from metalens.compat.tuned_lens.conversion import load_lens

__all__ = ["load_lens"]
