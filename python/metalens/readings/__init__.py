"""What a lens says of a text."""
