"""The names of mlxterp.interventions."""

from metalens.models.interventions import InterventionComposer, add_vector, clamp, compose, noise, replace_with, scale, zero_out

__all__ = ["InterventionComposer", "add_vector", "clamp", "compose", "noise", "replace_with", "scale", "zero_out"]
