"""A short run that writes checkpoints."""

from metalens.training import TrainingConfig, train_loop

LENGTH = 16
CONFIG = TrainingConfig(num_steps=4, max_seq_len=LENGTH, seed=1)


def begun(model, corpus, folder, config=CONFIG):
    """Make a run with checkpoints after steps 2, 3 and 4, of which the newest two stay. Return its lens."""
    return train_loop(model.source, model.unembed, corpus, config, checkpoints=folder, checkpoint_every=1)
