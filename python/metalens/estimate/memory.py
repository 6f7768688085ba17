"""What a training run will take, before anything is loaded: memory, work, text; and what to change if it does not fit.

Memory is counted as the training loop allocates it. What stays (weights, translators, optimizer state, gradients) is exact; what lives as long as a
batch or an update is a bound that was fitted to measured runs on the CPU, where MLX allocates ahead of its kernels: tests/test_plan.py holds both
against real runs. Nothing was measured on Apple hardware.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import mlx.core as mx

from metalens.estimate.roofline import Dimensions
from metalens.models.facts import ModelFacts
from metalens.ops import Head, Weight
from metalens.ops.backends import metal, native, precision
from metalens.ops.chunks import LOGITS_BYTES
from metalens.ops.metal import tuning
from metalens.ops.metal.kl import chunk_shape
from metalens.training import TrainingConfig
from metalens.training.batching import PASS_TOKENS, steps_together
from metalens.training.data.readers import FileSource, Source, TextFile
from metalens.training.polar import quintics
from metalens.utils.errors import InvalidValueError

BYTES_PER_TOKEN = 4  # of English text
PROGRAM = 300_000_000  # bytes: Python, MLX, the tokenizer

# Arrays of the optimizer's state for each parameter.
STATES = {"sgd": 1, "adam": 2, "muon": 1}
# Float32 arrays of a layer's size that live at once while it is updated: wide copies and random numbers in bfloat16, Muon's products.
UPDATE = {
    "float32": {"sgd": 6.5, "adam": 7.0, "muon": 13.0},
    "bfloat16": {"sgd": 10.0, "adam": 13.0, "muon": 15.0},
}
# Multiplications and additions of an update for each parameter, without Muon's iteration.
UPDATE_FLOPS = {"sgd": 6, "adam": 12, "muon": 6}

# Float32 [tokens, D] and [tokens, intermediate] that the model's forward pass holds at once beside its streams.
FORWARD_WIDTHS, FORWARD_INTERMEDIATES = 12, 3
# Float32 [tokens, D] of each trained layer: translated, normed, its gradient.
LOSS_WIDTHS = 3


# ------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        facts, config, processes: as given.
        memory: {what: bytes} of one process at its peak; they add up.
        available: bytes.
        flops_per_token: {what: multiplications and additions} for each token of the text, all processes together.
        passes: how often the text is read.
        text_tokens: an estimate of what the given text holds, None if unknown.
        disk: {what: bytes}.
        advice: what would need less, [{"option", "bytes", "fits", "remark"}]; empty if the run fits.
    """

    facts: ModelFacts
    config: TrainingConfig
    processes: int
    memory: dict[str, int]
    available: int
    flops_per_token: dict[str, float]
    passes: int
    text_tokens: int | None
    disk: dict[str, int]
    advice: list[dict[str, Any]]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether they are there."""
        return self.total <= self.available

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return sum(self.flops_per_token.values()) * self.config.num_steps * self.config.step_tokens

    @property
    def epochs(self) -> float | None:
        """How often the given text is needed in one pass: at most 1, unless it repeats."""
        return self.config.total_tokens / self.text_tokens if self.text_tokens else None

    @property
    def remarks(self) -> list[str]:
        """In sentences: does it fit, and what would."""
        needed = f"It takes about {gigabytes(self.total)} of {gigabytes(self.available)}"
        lines = [f"{needed}: it fits." if self.fits else f"{needed}: it does not fit."]
        for entry in self.advice:
            verdict = "fits" if entry["fits"] else "does not fit either"
            lines.append(f"  {entry['option']}: {gigabytes(entry['bytes'])}, {verdict}{entry['remark']}.")
        if not self.fits and not any(entry["fits"] for entry in self.advice):
            lines.append(f"None of these fits. The model alone takes {gigabytes(self.memory['model'])}: quantize it to fewer bits.")
        if self.epochs is not None and self.epochs > 1 and not self.config.repeat:
            lines.append(
                f"The text holds about {self.text_tokens} tokens, and {self.config.total_tokens} are needed: "
                "give more, --repeat it, or take fewer --steps or --tokens-per-step."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON; bytes, tokens, and multiplications and additions."""
        return {
            "dimensions": asdict(self.facts.dimensions),
            "weights_known": self.facts.exact,
            "config": self.config.to_dict(),
            "processes": self.processes,
            "memory": {**self.memory, "total": self.total},
            "available": self.available,
            "fits": self.fits,
            "advice": self.advice,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "text": {
                "tokens": self.config.total_tokens,
                "passes": self.passes,
                "bytes_about": self.config.total_tokens * BYTES_PER_TOKEN,
                "tokens_given_about": self.text_tokens,
                "epochs": self.epochs,
            },
            "disk": self.disk,
        }


def plan(
    facts: ModelFacts,
    config: TrainingConfig,
    *,
    available: int | None = None,
    processes: int = 1,
    share: Literal["data", "layers"] = "data",
    text_bytes: int | None = None,
) -> Plan:
    """Count what a run takes.

    Args:
        facts: of the model.
        config: the settings.
        available: bytes of memory; None = this machine's.
        processes: that share the run.
        share: what they divide among them.
        text_bytes: of the text, if it is known.

    Raises:
        ValueError: if the settings do not fit the model.
    """
    d = facts.dimensions
    if config.layers is not None and not all(0 <= layer < d.layers for layer in config.layers):
        raise InvalidValueError(f"layers must be from 0 to {d.layers - 1}, got {list(config.layers)}.")
    if config.rank is not None and config.rank > d.depth:
        raise InvalidValueError(f"rank must be from 1 to {d.depth}, the width, got {config.rank}.")
    available = machine_memory() if available is None else available
    trained, mine, at_once = _layers(facts, config, processes, share)
    passes = max(1, -(-mine // at_once))
    memory = memory_of(facts, config, processes, share)
    parameters = _parameters(d.depth, config)
    number = _number_bytes(config)
    checkpoint = mine * parameters * number + at_once * STATES[config.optimizer] * parameters * number
    found = Plan(
        facts,
        config,
        processes,
        memory,
        available,
        _flops(d, config, trained, passes * (processes if share == "layers" else 1)),
        passes,
        None if text_bytes is None else text_bytes // BYTES_PER_TOKEN,
        {"lens": trained * parameters * 4, "checkpoints": 2 * checkpoint, "while a checkpoint is written": checkpoint},
        [],
    )
    return found if found.fits else replace(found, advice=_advice(facts, config, available, processes, share))


def _layers(facts: ModelFacts, config: TrainingConfig, processes: int, share: str) -> tuple[int, int, int]:
    """(layers that are trained, by one process, by one process at a time)."""
    trained = facts.dimensions.layers if config.layers is None else len(config.layers)
    mine = -(-trained // processes) if share == "layers" else trained
    return trained, mine, min(config.layers_at_once or mine, mine)


def _parameters(depth: int, config: TrainingConfig) -> int:
    """Of one translator."""
    return depth if config.bias_only else 2 * config.rank * depth + depth if config.rank is not None else depth * depth + depth


def _number_bytes(config: TrainingConfig) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def memory_of(facts: ModelFacts, config: TrainingConfig, processes: int = 1, share: str = "data") -> dict[str, int]:
    """{what: bytes} of one process at its peak. They add up: what lives at other times is counted as far as it exceeds what is counted already."""
    d = facts.dimensions
    trained, mine, at_once = _layers(facts, config, processes, share)
    parameters, number = _parameters(d.depth, config), _number_bytes(config)
    captured, tokens = _batch_tokens(config, processes if share == "data" else 1)
    state, gradients = at_once * STATES[config.optimizer] * parameters * number, at_once * parameters * 4
    logits = logit_bytes(d, at_once, tokens)
    forward = 4 * (FORWARD_WIDTHS * d.depth + FORWARD_INTERMEDIATES * facts.intermediate)
    streams = captured * (facts.activation_bytes * d.layers * d.depth + forward)
    streams += tokens * 4 * d.depth * at_once * (LOSS_WIDTHS + (facts.activation_bytes != 4))
    one_gradient = 4 * parameters
    update = round(4 * parameters * UPDATE[config.dtype][config.optimizer])
    widened = 4 * trained * parameters if number < 4 else 0  # at the end, when optimizer state and gradients are gone
    memory = {
        "program": PROGRAM,
        "model": facts.weights,
        "translators in training": mine * parameters * number,
        "optimizer state": state,
        "gradients": gradients + one_gradient,
        "streams of a batch": streams,
        "logits": logits,
        "update of a layer, beyond a batch": max(0, update - streams - logits - one_gradient),
        "lens as float32, beyond a step": max(0, widened - state - gradients - streams),
    }
    if config.warm_start_tokens:
        # Sums of every layer, and float64 for the solution of one.
        squares = 4 * (d.depth + 1) * (2 * d.depth + 1)
        warm = at_once * squares + max(12 * squares, 2 * squares + streams)
        later = sum(memory[name] for name in list(memory)[3:])
        memory["warm start, beyond a step"] = max(0, warm - later)
    return memory


def _batch_tokens(config: TrainingConfig, processes: int) -> tuple[int, int]:
    """Tokens that go through the model together, of several steps if these are short (see training.capture), and through the head."""
    at_most, of_step = PASS_TOKENS // config.max_seq_len, config.sequences_per_step
    captured, in_loss = (max(1, min(at_most, -(-n // processes))) for n in (of_step * steps_together(config), of_step))
    return captured * config.max_seq_len, in_loss * config.max_seq_len


def logit_bytes(d: Dimensions, layers: int, tokens: int) -> int:
    """Of all logits and their gradients that exist at a time, with the backend that would be used here."""
    if metal():
        rounded = precision() == "bf16"
        head = Head(Weight(mx.zeros((d.vocab, d.depth))))  # lazy: its shape is all that counts
        per_layers, per_tokens = chunk_shape(layers, tokens, head, rounded)
        return d.vocab * (per_layers * per_tokens * (4 + (2 if rounded else 4)) + 4 * per_tokens)
    extension = native()
    if extension is not None:
        rows, ids = int(extension.row_block), int(extension.vocabulary_block)
        return int(extension.num_threads()) * 4 * (4 * rows * d.depth + 4 * rows * ids)
    return 8 * max(LOGITS_BYTES[mx.default_device().type], 4 * d.vocab * layers)


def _flops(d: Dimensions, config: TrainingConfig, trained: int, passes: int) -> dict[str, float]:
    """For each token of the text. The model's own head is computed twice in each pass: for its target, and beside the lens's logits."""
    per_step = config.step_tokens
    share_of_warm_start = config.warm_start_tokens / max(1, config.num_steps * per_step)
    translator = 14 * config.rank * d.depth if config.rank is not None else 0 if config.bias_only else 6 * d.depth**2
    update = UPDATE_FLOPS[config.optimizer] * _parameters(d.depth, config) + _muon_flops(d.depth, config)
    warm_start = passes * 2 * d.body + trained * 2 * (d.depth + 1) * (2 * d.depth + 1)
    return {
        "the model's forward pass": passes * 2.0 * d.body,
        "head, for the model": passes * 4.0 * d.vocab * d.depth,
        "head, for the lens": trained * 4.0 * d.vocab * d.depth,
        "translators": float(trained * translator),
        "optimizer": trained * update / per_step,
        "warm start": share_of_warm_start * warm_start,
    }


def _muon_flops(depth: int, config: TrainingConfig) -> int:
    """Of one layer's matrices: three products in each iteration."""
    if config.optimizer != "muon" or config.bias_only:
        return 0
    rows = depth if config.rank is None else config.rank
    iterations = len(quintics(rows, config.ns_steps)[0])
    return iterations * (1 if config.rank is None else 2) * (4 * rows**2 * depth + 2 * rows**3)


# ------------------------------------------------------------------ what to change


def _advice(facts: ModelFacts, config: TrainingConfig, available: int, processes: int, share: str) -> list[dict[str, Any]]:
    """What would need less: each change alone, numbers as large as fit, and the first two together."""

    def total(other: TrainingConfig) -> int:
        return sum(memory_of(facts, other, processes, share).values())

    def most(numbers: Sequence[int], changed: Callable[[int], TrainingConfig]) -> int:
        """The largest of ascending numbers that fits, or the first."""
        return next((n for n in reversed(numbers) if total(changed(n)) <= available), numbers[0])

    _, mine, at_once = _layers(facts, config, processes, share)
    changes: list[tuple[str, TrainingConfig, str]] = []
    start = ""
    if config.max_seq_len > PASS_TOKENS:  # costs little, and so goes first
        start = f"--max-seq-len {PASS_TOKENS} --tokens-per-step {config.step_tokens} "
        config = replace(config, max_seq_len=PASS_TOKENS, tokens_per_step=config.step_tokens)
        changes.append((start.strip(), config, ""))
        if total(config) <= available:
            return [{"option": start.strip(), "bytes": total(config), "fits": True, "remark": ""}]
    bases = {start: config}
    if config.dtype != "bfloat16":
        bases[f"{start}--dtype bfloat16 "] = replace(config, dtype="bfloat16")
    for options, base in bases.items():
        if base is not config:
            changes.append((options.strip(), base, ""))
        if at_once > 1:
            count = most(range(1, at_once), lambda n, base=base: replace(base, layers_at_once=n))  # type: ignore[misc]
            passes = f", reads the text {-(-mine // count)} times"
            changes.append((f"{options}--layers-at-once {count}", replace(base, layers_at_once=count), passes))
    if config.rank is None and not config.bias_only:
        ranks = [2**i for i in range(3, 16) if 2**i <= facts.dimensions.depth // 4] or [1]
        rank = most(ranks, lambda n: replace(config, rank=n, warm_start_tokens=0))
        changes.append((f"{start}--rank {rank}", replace(config, rank=rank, warm_start_tokens=0), ", a lens of less power"))
    if not config.bias_only:
        changes.append((f"{start}--bias-only", replace(config, bias_only=True, rank=None, warm_start_tokens=0), ", a lens of much less power"))
    needs = [(option, total(changed), remark) for option, changed, remark in changes]
    return [{"option": option, "bytes": need, "fits": need <= available, "remark": remark} for option, need, remark in needs]


# ------------------------------------------------------------------ the machine, the text


def machine_memory() -> int:
    """Bytes that a process may use here: what a GPU may have without paging, else the machine's memory."""
    if mx.metal.is_available():
        return tuning.device().working_set
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def text_bytes(sources: Sequence[Source]) -> int | None:
    """Of plain files; None if there are others, whose text may be longer or shorter than the file."""
    if not all(isinstance(source, TextFile) and source.path.suffix != ".gz" for source in sources):
        return None
    return sum(source.path.stat().st_size for source in sources if isinstance(source, FileSource))


def gigabytes(count: int) -> str:
    """'1.5 GB', or '20 MB'."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
