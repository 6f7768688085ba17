"""What a training run will take, estimated before a model is loaded: memory, work, time, text and disk, and what to change if it does not fit.

Memory is counted as the training loop allocates it. What stays for the whole run (weights, translators, optimizer state, gradients) is exact. What
lives as long as a batch or an update is a bound.

The constants of these bounds (PROGRAM, UPDATE, FORWARD_ARRAYS, FORWARD_WIDE_ARRAYS, LOSS_ARRAYS) were fitted to the peaks of MLX's allocator in the
runs of tests/estimate/test_memory.py: 14 settings on a model of 4 layers, on a CPU, where MLX allocates ahead of its kernels. The test requires each
peak to be 0.6 to 1.05 of its estimate; on the machine of its last run the peaks were 0.75 to 0.96. Nothing was measured on Apple hardware.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalens.estimate.results import BYTES_PER_TOKEN, Advice, Disk, Memory, Parallel, Plan, Work
from metalens.estimate.run_time import time_of, tokens_in
from metalens.estimate.start import StartSizes
from metalens.lenses.lens import TunedLens
from metalens.models.facts import ModelDimensions, ModelFacts, facts_of
from metalens.models.registry import path_of
from metalens.models.tensor_parallel import require_tensor_parallelism
from metalens.ops.backends import metal, native, precision
from metalens.ops.chunks import LOGITS_BYTES
from metalens.ops.metal import tuning
from metalens.ops.metal.kl import HeadSizes, loss_bytes
from metalens.training.batching import PASS_TOKENS, steps_together
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, TrainingData, read_inputs
from metalens.training.data.in_memory import TextList
from metalens.training.data.readers import Source, TextFile
from metalens.training.settings import budget_in_minutes, resolve
from metalens.training.vocabulary import PIECE, sample_size
from metalens.training.work import regression_flops, translator_flops, translator_params, update_flops
from metalens.utils.errors import InvalidValueError
from metalens.utils.renamed import renamed_arguments

PROGRAM = 230_000_000  # bytes of Python, MLX and metalens
TORCH = 260_000_000  # bytes of PyTorch, which transformers imports with a tokenizer if it is installed
TOKENIZER = 12  # times the bytes of tokenizer.json: 385 MB of memory for Gemma 3's 33 MB with 262,144 entries

# Arrays of the optimizer's state for each parameter.
STATES = {"sgd": 1, "adam": 2, "muon": 1}
# Float32 arrays of a layer's size that exist at once while the layer is updated: in bfloat16 also wide copies and random numbers, for Muon also its
# products.
UPDATE = {
    "float32": {"sgd": 6.5, "adam": 7.0, "muon": 13.0},
    "bfloat16": {"sgd": 10.0, "adam": 13.0, "muon": 15.0},
}
# Float32 arrays [tokens, D] and [tokens, intermediate size] that a forward pass holds at once, beside the hidden states that are captured.
FORWARD_ARRAYS, FORWARD_WIDE_ARRAYS = 7, 2
# Float32 arrays [tokens, D] of each trained layer: the translated states, the normed ones, their gradient.
LOSS_ARRAYS = 3


# ------------------------------------------------------------------ the plan


@renamed_arguments(available="memory", share="parallel")
def plan(
    model: str | Path | ModelFacts,
    recipe: str | None = None,
    *,
    config: TrainingConfig | Mapping[str, Any] | str | Path | None = None,
    memory: int | None = None,
    processes: int = 1,
    parallel: Parallel = "data",
    shard_model: bool = False,
    data: TrainingData | None = None,
    field: str = "text",
    split: str = "train",
    measure: bool = False,
    minutes: float | None = None,
    start_from: TunedLens | str | Path | None = None,
    **settings: Any,
) -> Plan:
    """Estimate what `train` would need with the same arguments. No weights of the model are read.

    Args:
        model: a folder in mlx-lm's format (a config.json is enough), a hub id, 'demo', a GGUF file, 'smollm2' or 'gemma3-270m' if it was converted
            before, a name in `metalens.models.facts.KNOWN_MODELS`, or facts.
        recipe: name of a recipe. None = the one that `config` names, else 'fast'.
        config: a JSON or TOML file of settings that replace the recipe's, or a complete `TrainingConfig`, which needs no recipe.
        memory: bytes that each process may use. None = the memory of this machine.
        processes: number of processes that run the training together.
        parallel: what the processes divide among them: the sequences of every step ('data') or the layers ('layers').
        shard_model: whether the processes also divide the model (tensor parallelism), which goes with 'layers'.
        data: the text, in the forms that `train` takes: names of files, folders or hub data sets, texts, or token ids. None = not known yet.
        field: field or column that holds the text.
        split: split of hub data sets.
        measure: also estimate the time on this machine, from a probe of about a second (once for each model).
        minutes: budget in minutes on this machine, as in `train`.
        start_from: the lens that the run starts from, or the path of one, which is read.
        settings: settings of `TrainingConfig` that replace those of the recipe and of `config`, and `tokens`, a budget, as in `train`.

    Raises:
        InvalidValueError: if the model or the text does not exist, or if a setting or the lens does not fit the model.
        FileNotFoundError: if there is no lens at the path.
    """
    facts = model if isinstance(model, ModelFacts) else facts_of(path_of(str(model)))
    if shard_model:
        if not isinstance(model, ModelFacts):
            require_tensor_parallelism(path_of(str(model)))
        facts = facts.of_process(_require_layers(processes, parallel))
    if isinstance(recipe, TrainingConfig):
        warnings.warn("plan(facts, config) is plan(facts, config=config) now; the old call ends with the next release.", DeprecationWarning, 3)
        recipe, config = None, recipe
    config, minutes = budget_in_minutes(config, settings.get("tokens"), minutes)
    from_lens = start_from is not None
    text = None if data is None else read_inputs(data, field=field, split=split)
    share = text.counted_tokens / text.tokens if isinstance(text, Corpus) else 1.0
    if minutes is not None:
        settings["tokens"] = tokens_in(minutes, facts, recipe, config, settings, processes if parallel == "data" else 1, share, from_lens)
    name, settled = resolve(recipe, config, settings, facts.context_length, facts.dimensions.hidden_size, from_lens=from_lens)
    _check(facts.dimensions, settled, memory, processes, parallel)
    available = machine_memory() if memory is None else memory
    layers = _layers(facts, settled, processes, parallel)
    part = layers.of_process / layers.trained
    start = None if start_from is None else StartSizes.of(start_from, facts.dimensions, settled, part)
    found = Plan(
        facts=facts,
        recipe=name,
        config=settled,
        processes=processes,
        memory=memory_of(facts, settled, processes, parallel, start),
        available=available,
        flops_per_token=_work(facts.dimensions, settled, layers, processes if parallel == "layers" else 1),
        passes=layers.passes,
        text_tokens=None if text is None else _given_tokens(text),
        share_known=settled.loss_on == "all" or isinstance(text, Corpus),
        disk=_disk(facts.dimensions, settled, layers),
    )
    if measure:
        of_text = processes if parallel == "data" else 1
        duration, short = time_of(
            facts, name, settled, layers=layers.of_process, passes=layers.passes, processes=of_text, share=share, from_lens=from_lens
        )
        found = replace(found, duration=duration, short_budget=short)
    if found.fits:
        return found
    advice = _advice(facts, settled, available, processes, parallel, start)
    if processes > 1 and not shard_model:
        divided = memory_of(facts.of_process(processes), settled, processes, "layers", start).total
        advice = (Advice("--shard-model", divided, divided <= available, "if mlx-lm can divide the model"), *advice)
    return replace(found, advice=advice)


def _require_layers(processes: int, parallel: Parallel) -> int:
    """Return the number of processes, which divide the layers (InvalidValueError)."""
    if parallel != "layers":
        raise InvalidValueError("shard_model=True needs parallel='layers': processes that divide the model all read the same text.")
    return processes


def _check(d: ModelDimensions, config: TrainingConfig, memory: int | None, processes: int, parallel: Parallel) -> None:
    if config.layers is not None and not all(0 <= layer < d.num_layers for layer in config.layers):
        raise InvalidValueError(f"layers must be from 0 to {d.num_layers - 1}, got {list(config.layers)}.")
    if config.rank is not None and config.rank > d.hidden_size:
        raise InvalidValueError(f"rank must be from 1 to {d.hidden_size}, the hidden size, got {config.rank}.")
    if processes < 1:
        raise InvalidValueError(f"processes must be at least 1, got {processes}.")
    if parallel not in ("data", "layers"):
        raise InvalidValueError(f"parallel must be 'data' or 'layers', got {parallel!r}.")
    if memory is not None and memory < 1:
        raise InvalidValueError(f"memory must be at least 1 byte, got {memory}.")


@dataclass(frozen=True)
class _Layers:
    """How many layers are trained: in all, by one process, and by one process at a time."""

    trained: int
    of_process: int
    at_once: int

    @property
    def passes(self) -> int:
        """Return how often a process reads the text."""
        return max(1, -(-self.of_process // self.at_once))


def _layers(facts: ModelFacts, config: TrainingConfig, processes: int, parallel: Parallel) -> _Layers:
    trained = len(config.trained_layers(facts.dimensions.num_layers))
    of_process = -(-trained // processes) if parallel == "layers" else trained
    return _Layers(trained, of_process, min(config.layers_at_once or of_process, of_process))


def _parameter_bytes(config: TrainingConfig) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def _arrays_per_parameter(config: TrainingConfig) -> int:
    """Return the arrays of the optimizer's state, and of the guard's best state, for each parameter."""
    return STATES[config.optimizer] + (config.held_back_tokens > 0)


def _disk(d: ModelDimensions, config: TrainingConfig, layers: _Layers) -> Disk:
    params = translator_params(d.hidden_size, config)
    checkpoint = (layers.of_process + layers.at_once * _arrays_per_parameter(config)) * params * _parameter_bytes(config)
    return Disk(lens=layers.trained * params * 4, checkpoints=2 * checkpoint, new_checkpoint=checkpoint)


# ------------------------------------------------------------------ memory


def memory_of(facts: ModelFacts, config: TrainingConfig, processes: int = 1, parallel: Parallel = "data", start: StartSizes | None = None) -> Memory:
    """Estimate the memory of one process. Arguments as in `plan`; `start` has the sizes of the lens that the run starts from."""
    layers = _layers(facts, config, processes, parallel)
    params, number = translator_params(facts.dimensions.hidden_size, config), _parameter_bytes(config)
    captured_tokens, loss_tokens, shuffled_tokens = _batch_tokens(config, processes if parallel == "data" else 1)
    if config.num_steps == 0:
        captured_tokens, loss_tokens, shuffled_tokens = 0, 0, 0
    one_gradient = 4 * params if config.num_steps else 0
    state = layers.at_once * _arrays_per_parameter(config) * params * number
    gradients = layers.at_once * one_gradient
    hidden_states = _hidden_state_bytes(facts, layers.at_once, captured_tokens, loss_tokens, shuffled_tokens)
    logits = _loss_bytes(facts.dimensions, config, layers.at_once, loss_tokens) if loss_tokens else 0
    update = max(0, round(bool(loss_tokens) * 4 * params * UPDATE[config.dtype][config.optimizer]) - hidden_states - logits - one_gradient)
    # At the end, when the optimizer's state and the gradients are gone.
    gathered = 4 * (layers.trained - layers.of_process) * params  # in the first process, from the others
    widened = 4 * layers.trained * params if number < 4 else gathered
    float32_lens = max(0, widened - state - gradients - hidden_states)
    gradients += one_gradient  # the layer that is computed next to the sum so far
    in_a_step = state + gradients + hidden_states + logits + update + float32_lens
    return Memory(
        program=PROGRAM + TORCH * (importlib.util.find_spec("torch") is not None) + TOKENIZER * facts.tokenizer_bytes,
        model=facts.weight_bytes,
        translators=layers.of_process * params * number,
        optimizer_state=state,
        gradients=gradients,
        hidden_states=hidden_states,
        logits=logits,
        update=update,
        float32_lens=float32_lens,
        warm_start=max(0, _warm_start_bytes(facts, layers.at_once) - in_a_step) if config.warm_start_tokens else 0,
        start_lens=0 if start is None else start.kept + max(0, start.others - in_a_step),
    )


def _hidden_state_bytes(facts: ModelFacts, layers: int, captured_tokens: int, loss_tokens: int, shuffled_tokens: int = 0) -> int:
    d = facts.dimensions
    forward = 4 * (FORWARD_ARRAYS * d.hidden_size + FORWARD_WIDE_ARRAYS * facts.intermediate_size)
    of_layer = facts.activation_bytes * d.hidden_size
    captured = captured_tokens * (of_layer * d.num_layers + forward)
    if shuffled_tokens:  # those of a forward pass among them, one layer's twice, and those of a step
        captured = captured_tokens * forward + of_layer * (shuffled_tokens * (d.num_layers + 1) + loss_tokens * layers)
    loss_arrays = LOSS_ARRAYS + (facts.activation_bytes != 4)  # narrow states are widened first
    return captured + loss_tokens * 4 * d.hidden_size * layers * loss_arrays


def _warm_start_bytes(facts: ModelFacts, layers: int) -> int:
    """Return the bytes of the sums of every layer [D + 1, 2 D + 1], and of the solution of one layer in float64 or of one batch."""
    d = facts.dimensions
    sums = 4 * (d.hidden_size + 1) * (2 * d.hidden_size + 1)
    return layers * sums + max(12 * sums, 2 * sums + _hidden_state_bytes(facts, 0, PASS_TOKENS, 0))


def _batch_tokens(config: TrainingConfig, processes: int) -> tuple[int, int, int]:
    """Return how many tokens go through the model together, of several steps if these are short, through the head, and are shuffled together.

    See training.batching.
    """
    most = PASS_TOKENS // config.max_seq_len
    of_step, together = config.sequences_per_step, min(steps_together(config), config.num_steps)

    def of_process(sequences: int) -> int:
        return max(1, min(most, -(-sequences // processes))) * config.max_seq_len

    shuffled = -(-of_step * together // processes) * config.max_seq_len if config.shuffle_tokens and together > 1 else 0
    return of_process(of_step * together), of_process(of_step), shuffled


def _loss_bytes(d: ModelDimensions, config: TrainingConfig, layers: int, tokens: int) -> int:
    """Return the bytes of logits and gradients at once: of all ids, or of a sample beside its rows of the head; and of the model's own logits."""
    sample = sample_size(config.vocabulary, d.vocab_size)
    if sample is None:
        return logit_bytes(d, layers, tokens)
    of_sample = replace(d, vocab_size=sample)
    return max(of_sample.head_bytes + logit_bytes(of_sample, layers, min(tokens, PIECE)), logit_bytes(d, 1, tokens))


def logit_bytes(d: ModelDimensions, layers: int, tokens: int) -> int:
    """Return the bytes of all logits and their gradients that exist at once, on the backend that would be used here."""
    if metal():
        return loss_bytes(layers, tokens, HeadSizes(d.vocab_size, d.hidden_size, d.bits, d.group_size), precision() == "bfloat16")
    extension = native()
    if extension is not None:
        rows, ids = int(extension.row_block), int(extension.vocabulary_block)
        return int(extension.num_threads()) * 4 * (4 * rows * d.hidden_size + 4 * rows * ids)
    return 8 * max(LOGITS_BYTES[mx.default_device().type], 4 * d.vocab_size * layers)


def machine_memory() -> int:
    """Return the bytes that a process may use here: those that a GPU may use without paging, else the machine's memory."""
    if mx.metal.is_available():
        return tuning.device().working_set
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------ work and text


def _work(d: ModelDimensions, config: TrainingConfig, layers: _Layers, groups: int) -> Work:
    """Count the work for each token of the steps, and of the warm start. `groups` of processes read the whole text."""
    passes, trained, hidden_size = layers.passes * groups, layers.trained, d.hidden_size
    sample = sample_size(config.vocabulary, d.vocab_size)
    ids = sample or d.vocab_size
    return Work(
        forward=passes * 2.0 * d.block_params,
        model_head=passes * (4.0 * ids + 2.0 * (0 if sample is None else d.vocab_size)) * hidden_size,
        lens_head=trained * 4.0 * ids * hidden_size,
        translators=float(trained * translator_flops(hidden_size, config)),
        optimizer=trained * update_flops(hidden_size, config) / config.step_tokens,
        warm_start=passes * 2.0 * d.block_params + trained * regression_flops(hidden_size) if config.warm_start_tokens else 0.0,
    )


def _given_tokens(data: Corpus | Sequence[Source]) -> int | None:
    """Return the tokens of a corpus, or estimate those of texts and plain text files. None = there are other sources."""
    if isinstance(data, Corpus):
        return data.counted_tokens
    sizes = [_text_bytes(source) for source in data]
    return None if None in sizes else sum(filter(None, sizes)) // BYTES_PER_TOKEN


def _text_bytes(source: Source) -> int | None:
    """Return the bytes of a text. None = it may be longer or shorter than its file."""
    if isinstance(source, TextList):
        return sum(len(text.encode("utf-8", "replace")) for text in source.texts)
    if isinstance(source, TextFile) and source.path.suffix != ".gz":
        return source.path.stat().st_size
    return None


# ------------------------------------------------------------------ what to change


def _advice(
    facts: ModelFacts, config: TrainingConfig, available: int, processes: int, parallel: Parallel, start: StartSizes | None
) -> tuple[Advice, ...]:
    """Return changes that need less memory: each change alone, with numbers as large as fit, and then the first two together.

    A run that starts from a lens keeps the lens's variant.
    """

    def total(changed: TrainingConfig) -> int:
        of_start = None if start is None else start.in_type(changed)
        return memory_of(facts, changed, processes, parallel, of_start).total

    def change(option: str, changed: TrainingConfig, cost: str = "") -> Advice:
        return Advice(option, total(changed), total(changed) <= available, cost)

    def largest_that_fits(numbers: Sequence[int], changed: Callable[[int], TrainingConfig]) -> int:
        """Return the largest of ascending numbers whose settings fit, or the smallest."""
        return next((n for n in reversed(numbers) if total(changed(n)) <= available), numbers[0])

    found: list[Advice] = []
    prefix = ""
    cheap: dict[str, dict[str, Any]] = {}  # all other changes come on top of these
    if config.shuffle_tokens >= 2 * config.step_tokens:
        cheap["--shuffle-tokens 0 "] = {"shuffle_tokens": 0}
    if config.max_seq_len > PASS_TOKENS:
        step = config.step_tokens
        cheap[f"--max-seq-len {PASS_TOKENS} --tokens-per-step {step} "] = {"max_seq_len": PASS_TOKENS, "tokens_per_step": step}
    for option, settings in cheap.items():
        config, prefix = replace(config, **settings), prefix + option
        found.append(change(prefix.rstrip(), config))
        if found[-1].fits:
            return tuple(found)
    narrow = f"{prefix}--dtype bfloat16"
    bases = {prefix: config}
    if config.dtype != "bfloat16":
        bases[f"{narrow} "] = replace(config, dtype="bfloat16")
    layers = _layers(facts, config, processes, parallel)
    for options, base in bases.items():
        if base is not config:
            found.append(change(narrow, base))
        if layers.at_once > 1:
            count = largest_that_fits(range(1, layers.at_once), lambda n, base=base: replace(base, layers_at_once=n))  # type: ignore[misc]
            passes = -(-layers.of_process // count)
            found.append(change(f"{options}--layers-at-once {count}", replace(base, layers_at_once=count), f"reads the text {passes} times"))
    if start is not None:
        return tuple(found)
    if config.rank is None and not config.bias_only:
        ranks = [2**i for i in range(3, 16) if 2**i <= facts.dimensions.hidden_size // 4] or [1]
        rank = largest_that_fits(ranks, lambda n: replace(config, rank=n, warm_start_tokens=0))
        found.append(change(f"{prefix}--rank {rank}", replace(config, rank=rank, warm_start_tokens=0), "a lens of less power"))
    if not config.bias_only:
        bias_only = replace(config, bias_only=True, rank=None, warm_start_tokens=0)
        found.append(change(f"{prefix}--bias-only", bias_only, "a lens of much less power"))
    return tuple(found)
