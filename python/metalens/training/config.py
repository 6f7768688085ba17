"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

MIN_SEQUENCE = 10  # tokens: mlxterp's bound


@dataclass(frozen=True)
class TrainingConfig:
    """How a lens is trained: the paper's optimiser (SGD with Nesterov momentum, linear decay, clipped gradient), with mlxterp's defaults.

    The paper takes 2^18 tokens per step (Belrose et al. 2023, section 3); mlxterp one sequence. `tokens_per_step` says which.

    Attributes:
        num_steps: optimiser steps.
        max_seq_len: tokens per sequence, at least 10.
        tokens_per_step: rounded down to whole sequences; None = one sequence, as in mlxterp.
        learning_rate: at the first step; falls linearly to 0.
        momentum: of SGD, Nesterov.
        gradient_clip: largest norm of the gradient over all layers together.
        seed: None takes the sequences in their order, as mlxterp does; a number shuffles them anew in every pass over the data.
    """

    num_steps: int = 250
    max_seq_len: int = 2048
    tokens_per_step: int | None = None
    learning_rate: float = 1.0
    momentum: float = 0.9
    gradient_clip: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_seq_len < MIN_SEQUENCE:
            raise ValueError(f"max_seq_len ({self.max_seq_len}) is too small. Must be at least {MIN_SEQUENCE} tokens.")
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {self.num_steps}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not self.learning_rate > 0 or not self.gradient_clip > 0:
            raise ValueError(f"learning_rate and gradient_clip must be positive, got {self.learning_rate} and {self.gradient_clip}.")
        if self.tokens_per_step is not None and self.tokens_per_step < self.max_seq_len:
            raise ValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be at least max_seq_len ({self.max_seq_len}): steps are made of whole sequences."
            )

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimiser step sees."""
        return 1 if self.tokens_per_step is None else self.tokens_per_step // self.max_seq_len

    def learning_rate_at(self, step: int) -> float:
        """Linear decay from learning_rate at step 0 to 0 after the last step."""
        return self.learning_rate * (1 - step / self.num_steps)
