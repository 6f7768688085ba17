"""Language models of mlx-lm: loading, tokens, hidden states, final norm and head. No other package knows mlx-lm's names."""
