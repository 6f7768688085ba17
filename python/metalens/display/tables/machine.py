"""Tables of what machines and installations can do: the roofline, the facts of an installation, and the models that lenses support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from metalens.display.format import rate, yes_or_no
from metalens.display.tables.parts import titled, two_columns
from metalens.estimate.kernel_model import Fraction
from metalens.estimate.roofline import Bounds
from metalens.models.support import RIGHT, Module, remark
from metalens.ops.doctor import Diagnosis

ROOFLINE_LABELS = {
    "statistics": "statistics, metalens",
    "statistics_plain_mlx": "statistics, plain MLX",
    "training": "training, metalens",
    "training_plain_mlx": "training, plain MLX",
    "training_in_16_bits": "training with 16-bit operands, metalens",
    "forward": "the model's forward pass",
    "training_and_forward": "training and forward, metalens",
    "sampled_training": "training with a sampled vocabulary",
    "sampled_training_and_forward": "the same and forward",
}


def roofline_table(bounds: Mapping[str, Bounds], title: str) -> Table:
    """Make a table with a column for each chip and a row for each task: tokens per second at most."""
    table = Table(title=titled(title))
    table.add_column("")
    for chip in bounds:
        table.add_column(chip, justify="right")
    for task, label in ROOFLINE_LABELS.items():
        table.add_row(label, *(rate(getattr(found, task)) for found in bounds.values()))
    return table


KERNEL_LABELS = {
    "lens_stats": "statistics",
    "lens_stats_one_token": "statistics of one token",
    "linear": "logits of a chunk",
    "lens_backward": "gradient of a chunk",
    "lens_kl": "loss and gradient",
}


def fractions_table(parts: Mapping[str, Mapping[str, Fraction]], title: str) -> Table:
    """Make a table with a column for each chip and a row for each kernel: percent of the chip's float32 peak, as `fraction_text` shows it."""
    table = Table(title=titled(title))
    table.add_column("")
    for chip in parts:
        table.add_column(chip, justify="right")
    for kernel, label in KERNEL_LABELS.items():
        table.add_row(label, *(fraction_text(kernels[kernel]) for kernels in parts.values()))
    return table


def fraction_text(part: Fraction) -> str:
    """Return percents of the peak: first design > now (plain MLX)."""
    return f"{100 * part.first:.0f} > {100 * part.now:.0f} ({100 * part.plain_mlx:.0f})"


def diagnosis_facts(diagnosis: Diagnosis) -> dict[str, str]:
    """Return the facts of an installation by label."""
    facts = {
        "metalens": diagnosis.metalens,
        "mlx": diagnosis.mlx,
        "mlx-lm": diagnosis.mlx_lm,
        "Python": diagnosis.python,
        "platform": diagnosis.platform,
        "default device": diagnosis.device,
        "backend setting": diagnosis.backend,
        "precision setting": diagnosis.precision,
    }
    gpu, native = diagnosis.metal, diagnosis.native
    if gpu is None:
        facts["Metal"] = "not available here"
    else:
        compiled = f"{gpu.compiled_kernels} compiled ahead of time, others just in time" if gpu.compiled_kernels else "compiled just in time"
        facts |= {
            "Metal": f"{gpu.architecture}, tuned as generation {gpu.generation}",
            "GPU cores": f"{gpu.cores}" if gpu.cores_counted else f"not counted; planned for {gpu.cores}",
            "Metal kernels": compiled,
            "matrix units": gpu.matrix_units,
            "float32 products of plain MLX": gpu.float32_products,
        }
    if native is None:
        facts["native extension"] = f"not used: {diagnosis.native_problem}"
    else:
        facts |= {
            "native extension": "loaded",
            "instruction set": native.instruction_set,
            "instruction sets available": ", ".join(native.available_instruction_sets),
            "faster 16-bit products": yes_or_no(native.fast_bfloat16),
            "threads": str(native.threads),
            "largest difference from plain MLX": f"{native.largest_difference:.1e}",
            "speed beside plain MLX": f"{native.speedup:.0f}x ({native.product})",
        }
    return facts


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Make a table of the facts of an installation, without its problems."""
    table = two_columns("metalens doctor")
    table.columns[0].style = "bold"
    for name, value in diagnosis_facts(diagnosis).items():
        table.add_row(name, Text(value))
    return table


def support_table(found: Sequence[Module], title: str) -> Table:
    """Make a table with a row for each of mlx-lm's modules."""
    table = Table(title=titled(title))
    for column in ("module", "a lens", "remark"):
        table.add_column(column)
    for module in found:
        table.add_row(module.name, Text(module.status, style="" if module.status == RIGHT else "yellow"), Text(remark(module)))
    return table
