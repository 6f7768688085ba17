"""The parts of an estimate: memory, work, disk and advice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from metalens.models.facts import ModelFacts
from metalens.training.config import TrainingConfig
from metalens.training.speed import Duration

Parallel = Literal["data", "layers"]

BYTES_PER_TOKEN = 4  # of English text


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak.

    The fields add up: memory that is in use at another time is counted only as far as it exceeds what the fields before it have counted.

    Attributes:
        program: Python, MLX and the tokenizer.
        model: weights of the model.
        translators: translators in training.
        optimizer_state: state of the optimizer, and the best states that the guard keeps.
        gradients: gradients of the translators.
        hidden_states: captured hidden states of a batch and what is computed from them, except logits.
        logits: logits of the lens and their gradients that exist at once.
        update: update of one layer, beyond a batch.
        float32_lens: float32 copy of the trained lens, beyond a step.
        warm_start: closed-form solution, beyond a step.
        start_lens: translators that the run keeps from the lens that it starts from, and what it takes beyond a step until the first one.
    """

    program: int
    model: int
    translators: int
    optimizer_state: int
    gradients: int
    hidden_states: int
    logits: int
    update: int
    float32_lens: int
    warm_start: int
    start_lens: int = 0

    @property
    def total(self) -> int:
        """Return the bytes at the peak."""
        return int(sum(asdict(self).values()))


@dataclass(frozen=True)
class Work:
    """Multiplications and additions for each token, of all processes together.

    Attributes:
        forward: forward passes of the model.
        model_head: the head on the model's own hidden states. It is computed twice in each pass: for the target, and beside the lens's logits;
            with a sampled vocabulary also once for all ids, which says what the model expects.
        lens_head: the head on the lens's hidden states, and its gradient.
        translators: translators and their gradients.
        optimizer: updates.
        warm_start: closed-form solution, for each of its own tokens; the other fields are for each token of a step.
    """

    forward: float
    model_head: float
    lens_head: float
    translators: float
    optimizer: float
    warm_start: float

    @property
    def total(self) -> float:
        """Return the work for each token of a step."""
        return float(sum(asdict(self).values())) - self.warm_start


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        lens: the lens.
        checkpoints: the two checkpoints that are kept.
        new_checkpoint: one more checkpoint while it is written.
    """

    lens: int
    checkpoints: int
    new_checkpoint: int


@dataclass(frozen=True)
class Advice:
    """One change that needs less memory.

    Attributes:
        option: options of the command line to add.
        bytes: bytes at the peak with them.
        fits: whether that fits.
        cost: what the change costs besides, in words. "" = nothing worth a word.
    """

    option: str
    bytes: int
    fits: bool
    cost: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        facts: facts of the model, or of the part that one process has of it.
        recipe: name of the recipe. None = the settings come from no recipe.
        config: settings of the run.
        processes: processes that run it.
        memory: bytes of one process at its peak.
        available: bytes that one process may use.
        flops_per_token: work for each token of the steps, and of the warm start.
        passes: how often the text is read.
        text_tokens: tokens of the given text, estimated. None = unknown.
        disk: bytes on disk.
        advice: changes that need less memory. Empty if the run fits.
        duration: seconds on this machine. None = not measured.
        short_budget: budget in tokens that takes ten minutes, if the run takes more than an hour. None = it does not, or was not measured.
        share_known: whether it is known how many of the tokens count in the loss. If not, work and time are those of a text where all count, and
            `text_tokens` is None.
    """

    facts: ModelFacts
    recipe: str | None
    config: TrainingConfig
    processes: int
    memory: Memory
    available: int
    flops_per_token: Work
    passes: int
    text_tokens: int | None
    disk: Disk
    advice: tuple[Advice, ...] = ()
    duration: Duration | None = None
    short_budget: int | None = None
    share_known: bool = True

    @property
    def total(self) -> int:
        """Return the bytes of one process at its peak."""
        return self.memory.total

    @property
    def fits(self) -> bool:
        """Return whether these bytes are available."""
        return self.total <= self.available

    @property
    def flops(self) -> float:
        """Return the multiplications and additions of the whole run."""
        return self.flops_per_token.total * self.config.num_steps * self.config.step_tokens + self.warm_start_flops

    @property
    def warm_start_flops(self) -> float:
        """Return the multiplications and additions of the warm start."""
        return self.flops_per_token.warm_start * self.config.warm_start_tokens

    @property
    def tokens_needed(self) -> int:
        """Return the tokens of the text that one pass needs, with those that the guard holds back."""
        return self.config.total_tokens + self.config.held_back_tokens

    @property
    def epochs(self) -> float | None:
        """Return how often one pass goes over the given text: at most 1, unless the text is repeated. None = unknown."""
        return self.tokens_needed / self.text_tokens if self.text_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON. Units are bytes, tokens, seconds, and multiplications and additions."""
        return {
            "recipe": self.recipe,
            "dimensions": asdict(self.facts.dimensions),
            "weights_known": self.facts.exact,
            "config": self.config.to_dict(),
            "processes": self.processes,
            "memory": asdict(self.memory) | {"total": self.total},
            "available": self.available,
            "fits": self.fits,
            "advice": [asdict(change) for change in self.advice],
            "flops_per_token": asdict(self.flops_per_token),
            "flops": self.flops,
            "warm_start_flops": self.warm_start_flops,
            "seconds": None if self.duration is None else asdict(self.duration) | {"total": self.duration.total},
            "ten_minute_tokens": self.short_budget,
            "text": {
                "tokens": self.tokens_needed,
                "held_back": self.config.held_back_tokens,
                "share_known": self.share_known,
                "passes": self.passes,
                "bytes_about": self.tokens_needed * BYTES_PER_TOKEN,
                "tokens_given_about": self.text_tokens,
                "epochs": self.epochs,
            },
            "disk": asdict(self.disk),
        }
