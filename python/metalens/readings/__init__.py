"""What a lens says of a text: predictions and statistics of every layer, as values, tables and pictures."""

from metalens.readings.reader import read
from metalens.readings.reading import Reading
from metalens.readings.top_tokens import Predictions, TopToken

__all__ = ["Predictions", "Reading", "TopToken", "read"]
