"""Run the experiments of Belrose et al. 2023 on small models, and say of each claim whether it holds there."""
