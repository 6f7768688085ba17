"""What is known of language models: the only package that knows mlx-lm's names."""
