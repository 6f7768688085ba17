"""The text of an evaluation, from files or hub data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metalens.training.data.corpus import Corpus, Join, LossOn, open_corpus
from metalens.training.data.readers import FileSource, Source, TextFile

READ_WHOLE = 1 << 28  # bytes of files whose tokens are all counted, which takes a minute at most


def open_held_out(
    sources: Sequence[Source], tokenizer: Any, *, max_tokens: int | None = None, loss_on: LossOn = "all", to_the_end: bool = True
) -> Corpus:
    """Return the tokens of a text for `metalens.evaluate`, and for analyses.

    One plain text has nothing before it. Other sources are joined as `train` joins them. Files of a moderate size are
    tokenized to their ends also with max_tokens: bits per byte are about the bytes of the whole text, as in tuned-lens. No file is in memory as a
    whole: it is tokenized in parts, and the tokens are a memory map.

    Args:
        sources: the text, as `find_sources` returns it.
        tokenizer: tokenizer of the model.
        max_tokens: tokens that will be read. None = all.
        loss_on: as in `open_corpus`.
        to_the_end: tokenize files of a moderate size to their ends. False = nobody asks for bits per byte.

    Raises:
        InvalidValueError, OSError: as `open_corpus`.
    """
    join: Join = "packed" if len(sources) == 1 and isinstance(sources[0], TextFile) else "eos"
    if to_the_end and sum(source.path.stat().st_size if isinstance(source, FileSource) else sys.maxsize for source in sources) <= READ_WHOLE:
        max_tokens = None
    return open_corpus(sources, tokenizer, join=join, max_tokens=max_tokens, loss_on=loss_on)
