"""Lenses, their translators and their files."""
