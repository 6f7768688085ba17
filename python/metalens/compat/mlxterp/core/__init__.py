"""The names of mlxterp.core."""
