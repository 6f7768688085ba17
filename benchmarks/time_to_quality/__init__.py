"""Core seconds from nothing to a lens of a given quality: metalens beside PyTorch and plain MLX."""
