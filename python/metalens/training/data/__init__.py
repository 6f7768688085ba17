"""Training data: sources -> documents -> token cache (Corpus) -> sequences (Sampler) -> the model, fed by a Producer."""

from metalens.training.data.corpus import Corpus, open_corpus
from metalens.training.data.held_out import open_held_out
from metalens.training.data.inputs import TrainingData, read_inputs
from metalens.training.data.producer import Producer
from metalens.training.data.sampler import NotEnoughDataError, Sampler, Step, batches
from metalens.training.data.sources import documents, find_sources

__all__ = [
    "Corpus",
    "NotEnoughDataError",
    "Producer",
    "Sampler",
    "Step",
    "TrainingData",
    "batches",
    "documents",
    "find_sources",
    "open_corpus",
    "open_held_out",
    "read_inputs",
]
