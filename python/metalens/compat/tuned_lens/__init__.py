"""Lenses of tuned-lens (AlignmentResearch/tuned-lens), read and written without torch.

from metalens.compat import tuned_lens

lens = tuned_lens.load("EleutherAI/pythia-160m-deduped")  # a folder, or a lens on the hub
tuned_lens.save(lens, "my-lens", model_name="EleutherAI/pythia-160m-deduped")
tuned_lens.convert("my-lens", "lens-for-mlxterp", to="metalens")
"""

from metalens.compat.tuned_lens.conversion import Format, convert, load_lens
from metalens.compat.tuned_lens.folder import LensConfig, is_tuned_lens, load, save
from metalens.lenses.hub import CachedLens, available_lenses, cached_lenses

__all__ = ["CachedLens", "Format", "LensConfig", "available_lenses", "cached_lenses", "convert", "is_tuned_lens", "load", "load_lens", "save"]
