"""Rebuild a model's tokenizer from the metadata of a GGUF file, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalens.models.gguf.header import Metadata
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any  # takes a while to import

# Types of tokens in a GGUF file.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6

SPACE = "▁"  # SentencePiece's sign for a space

# ------------------------------------------------------------------ how byte-level tokenizers split a text into words

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _llama3_words(digits: str) -> str:
    """Return Llama 3's pattern, with the given pattern of numbers."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _cased_words(contractions: str, digits: str) -> str:
    """Return the pattern of tokenizers that split words before capital letters."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{contractions}|{start}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"


# {name in tokenizer.ggml.pre: how a text is split}. 'gpt2' is the splitter of the `tokenizers` library, 'digits' also separates digits.
# The others are patterns.
WORDS: dict[str, str] = {
    **dict.fromkeys(("gpt-2", "gpt2", "gpt-neox", "gptneox", "pythia", "olmo", "phi-2", "mpt", "jais", "default"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone", "codeshell", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "lfm2"), _llama3_words(r"\p{N}{1,3}")),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), _llama3_words(r"\p{N}")),
    "tekken": _cased_words("", r"\p{N}"),
    "gpt-4o": _cased_words(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),
}
# Tokenizers that look a whole word up before they merge its parts.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "smaug-bpe", "lfm2")
# Tokenizers that normalize their text (NFC).
NORMALIZED = ("qwen2", "deepseek-r1-qwen", "gpt-neox", "gptneox", "pythia", "olmo")
# Tokenizers that begin every text with the token for its beginning, if the file does not say so.
BEGINNING = ("llama-bpe", "llama3", "llama-v3", "tekken")


def write_tokenizer(metadata: Metadata, folder: Path, context: int) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        metadata: metadata of the file.
        folder: an existing folder.
        context: tokens that the model was made for.

    Returns:
        remarks for the user.

    Raises:
        InvalidValueError: if metalens can't rebuild this kind of tokenizer. The error names it.
    """
    import json

    kind = metadata.need("tokenizer.ggml.model", str)
    if kind not in KINDS:
        raise InvalidValueError(f"{metadata.path} has a tokenizer of the kind {kind!r}. metalens rebuilds {', '.join(KINDS)}.")
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise InvalidValueError(f"{metadata.path} is damaged: it has {len(tokens)} tokens and {len(types)} token types. Download it again.")
    tokenizer, remarks = KINDS[kind](metadata, tokens, types)
    _add_marked_tokens(tokenizer, tokens, types, in_normalized_text=kind == "llama" and not _begins_with_space(metadata))
    _add_template(tokenizer, metadata, tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(_tokenizer_config(metadata, tokens, context), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return remarks


def special_id(metadata: Metadata, name: str) -> int | None:
    """Return the id of a special token: 'bos', 'eos', 'eot', 'unknown' or 'padding'. None = the file has none."""
    found = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) and 0 <= found < len(metadata.get("tokenizer.ggml.tokens", ())) else None


# ------------------------------------------------------------------ the two kinds


def _byte_level(metadata: Metadata, tokens: list[str], types: list[int]) -> tuple[Tokenizer, list[str]]:
    """Rebuild a byte-level BPE tokenizer (GPT-2's kind): the file has its merges, and the name of its way to split words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    remarks = [] if name not in (None, "default") else ["The file does not say how its tokenizer splits words: GPT-2's way is taken."]
    words = WORDS.get(str(name or "default"))
    if words is None:
        raise InvalidValueError(f"{metadata.path} has a tokenizer that splits words like {name!r}. metalens knows {', '.join(sorted(WORDS))}.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [_merge(metadata, line, vocabulary) for line in metadata.need("tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=name in WHOLE_WORDS))
    if name in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    whole = words in ("gpt2", "digits")  # the library's own splitter does the rest
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=whole)
    if words == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif words == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, remarks


def _merge(metadata: Metadata, line: Any, vocabulary: dict[str, int]) -> tuple[str, str]:
    left, _, right = str(line).partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise InvalidValueError(f"{metadata.path} is damaged: its tokenizer merges {line!r}, which are not tokens. Download it again.")
    return left, right


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> tuple[Tokenizer, list[str]]:
    """Rebuild a SentencePiece BPE tokenizer with bytes for unknown characters (Llama's and Gemma's kind): the file has the score of each token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = metadata.need("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise InvalidValueError(f"{metadata.path} is damaged: it has {len(tokens)} tokens and {len(scores)} scores. Download it again.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = special_id(metadata, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(vocabulary, scores, types),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _begins_with_space(metadata):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer, []


KINDS: dict[str, Callable[[Metadata, list[str], list[int]], tuple[Tokenizer, list[str]]]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def merges_of(vocabulary: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE tokenizer, first the one that is done first.

    SentencePiece merges the neighbors whose union has the highest score. So every way to split a token into two tokens is a merge, in the order of
    the scores of the tokens.
    """
    found = []
    for token, i in vocabulary.items():
        if types[i] == NORMAL:
            for k in range(1, len(token)):
                left, right = vocabulary.get(token[:k]), vocabulary.get(token[k:])
                if left is not None and right is not None and types[left] == types[right] == NORMAL:
                    found.append((-scores[i], i, k, token))
    found.sort()
    return [(token[:k], token[k:]) for _, _, k, token in found]


def _begins_with_space(metadata: Metadata) -> bool:
    """Return whether the tokenizer puts a space before a text: SentencePiece does, unless the file says that it does not."""
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


# ------------------------------------------------------------------ special tokens


def _add_marked_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], in_normalized_text: bool) -> None:
    """Add the tokens that are found before a text is split into words: control tokens, and those that the model's makers defined.

    Args:
        tokenizer: the tokenizer.
        tokens: all tokens.
        types: their types.
        in_normalized_text: find defined tokens in the normalized text, where a space is '▁' as in the token.
    """
    from tokenizers import AddedToken

    marked = [(token, kind == CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED) and token]
    added = [AddedToken(token, normalized=in_normalized_text and not special, special=special) for token, special in marked]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _add_template(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str]) -> None:
    """Let the tokenizer put the tokens for the beginning and the end around a text, if the file says so."""
    from tokenizers import processors

    begins = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BEGINNING
    bos = special_id(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    eos = special_id(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    single = [part for part in (bos, "$A", eos) if part is not None]
    around = [part if isinstance(part, str) else tokens[part] for part in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around,
        pair=[*around, *(f"{part}:1" if part != "$A" else "$B:1" for part in around)],
        special_tokens=[(tokens[i], i) for i in dict.fromkeys((bos, eos)) if i is not None],
    )


def _tokenizer_config(metadata: Metadata, tokens: list[str], context: int) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {key: special_id(metadata, name) for key, name in names.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False}
    config |= {key: tokens[i] for key, i in found.items() if i is not None}
    template = metadata.get("tokenizer.chat_template")
    return {**config, "chat_template": template} if isinstance(template, str) else config
