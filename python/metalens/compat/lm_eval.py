"""A layer as a model of lm-evaluation-harness: every task of the harness can score what a lens reads in a block.

    from lm_eval import simple_evaluate
    from metalens.compat.lm_eval import LensLM

    simple_evaluate(LensLM(model, lens, layer=20), tasks=["arc_easy"], limit=100)

The harness is an optional package: pip install 'metalens[lm-eval]'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from metalens.analysis.choices import Continuation, score_continuations
from metalens.lenses.lens import Lens, as_lens
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.readings.generation import end_tokens, generate_from_layer
from metalens.readings.rows import select_layers
from metalens.utils.errors import InvalidValueError, MissingPackageError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingPackageError("This module needs lm-evaluation-harness: pip install 'metalens[lm-eval]'.") from error

DEFAULT_TOKENS = 256  # tokens that are generated if a task does not say how many; the harness's own default


class LensLM(TemplateLM):
    """One layer of a model, read through a lens, as the harness calls a model.

    Args:
        model: the model, with a tokenizer.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens.
        layer: number of the block, negative from the end. None = the model itself, without a lens.
        max_length: tokens that are read of a request; of a longer one the end. None = the model's context, or 2048.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an unknown layer, a lens of another model, a lens without a layer, or a length below 1.
    """

    def __init__(
        self, model: LanguageModel, lens: Lens | str | Path | None = None, layer: int | None = None, *, max_length: int | None = None
    ) -> None:
        super().__init__()
        if layer is None and lens is not None:
            raise InvalidValueError("A lens reads one layer: give its number too (layer=).")
        self.model, self.lens = model, as_lens(lens)
        check_lens(self.lens, model)
        self.block = model.num_layers - 1 if layer is None else select_layers([layer], model.num_layers)[0]
        self.row = -1 if layer is None else 0  # scores have the layer's row, then the model's own
        self.tokenizer = model.plain_encoder.tokenizer
        self.max_length = (model.context or 2048) if max_length is None else max_length
        if self.max_length < 1:
            raise InvalidValueError(f"max_length must be at least 1, got {max_length}: a prediction needs a token before it.")

    @property
    def eot_token_id(self) -> int:
        """Return the id of the token that ends a text; without one, that of the token that begins it, or 0."""
        found = (getattr(self.tokenizer, name, None) for name in ("eos_token_id", "bos_token_id"))
        return next((int(each) for each in found if each is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """Return the id that stands for an empty context."""
        return self.model.prefix[0] if self.model.prefix else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Return the name that the harness's cache knows this layer's requests by."""
        return f"{self.model.name}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text. None = with the tokens that the tokenizer adds, once."""
        return self.model.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = []
        for _context, members in groupby(self._with_progress(requests, "scoring", disable_tqdm), key=lambda request: request[1]):
            asked = list(members)
            for (texts, _, _), answer in zip(asked, self._scores((context, ids) for _, context, ids in asked), strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
                found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows of the context, each token predicted once."""
        found = []
        for (text,) in self._with_progress([request.args for request in requests], "scoring", disable_tqdm):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1))
            total = sum(log_prob for log_prob, _ in self._scores(windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the layer generates after each context, up to the first of its stop texts. No later block runs."""
        found = []
        for context, options in self._with_progress([request.args for request in requests], "generating", disable_tqdm):
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            limit = int(options.get("max_gen_toks", DEFAULT_TOKENS))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            prompt = self.tok_encode(context)[-max(1, self.max_length - limit) :]
            text, ends = "", end_tokens(self.model)
            for token in generate_from_layer(self.model, prompt, self.block, self.lens, max_tokens=limit, temperature=temperature):
                if token.token_id in ends:
                    break
                text += token.text
                if any(stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.split(stop)[0]
            self.cache_hook.add_partial("generate_until", (context, options), text)
            found.append(text)
        return found

    def _scores(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return what the layer says of continuations of contexts. Of a long context the end is read."""
        asked = []
        for context, ids in pairs:
            room = self.max_length + 1 - len(ids)  # the last token of a continuation is predicted, not read
            if room < 1:
                raise InvalidValueError(
                    f"A continuation of {len(ids)} tokens has no room beside a context in {self.max_length} tokens: set a larger max_length."
                )
            asked.append(Continuation(tuple(context[-room:]), tuple(ids)))
        scores = score_continuations(self.model, asked, self.lens, [self.block])
        return [(float(each.log_prob[self.row]), bool(each.greedy[self.row])) for each in scores]

    def _with_progress(self, items: Sequence[Any], title: str, disable: bool) -> Iterable[Any]:
        from tqdm import tqdm

        found: Iterable[Any] = tqdm(items, desc=title, disable=disable)
        return found
