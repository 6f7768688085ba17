"""The names of mlxterp.core."""

from metalens.compat.mlxterp.core.module_resolver import ModuleResolver, find_layer_key_pattern, normalize_layer_key
from metalens.models.interventions import InterventionComposer, add_vector, clamp, noise, replace_with, scale, zero_out

__all__ = [
    "InterventionComposer",
    "ModuleResolver",
    "add_vector",
    "clamp",
    "find_layer_key_pattern",
    "noise",
    "normalize_layer_key",
    "replace_with",
    "scale",
    "zero_out",
]
