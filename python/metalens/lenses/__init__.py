"""Lenses, their translators, their files and their provenance."""
