"""mlxterp.core."""
