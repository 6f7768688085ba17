"""Compare the recipes on two bundled models and two pretrained ones."""
