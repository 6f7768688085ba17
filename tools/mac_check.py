"""Check metalens on a Mac and write build/mac-check.md; `make mac-check` runs this script.

It compiles every Metal kernel with Apple's compiler, compares the GPU's results with float64, and measures the speed. With --emulated it
runs the same steps without a Mac, on a few cells; the tests run it in this way.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

# On an M5 plain MLX would round float32 operands to 11 bits, and be no reference. MLX reads the variable at its first product.
os.environ["MLX_ENABLE_TF32"] = "0"

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
# The matrix of cells and the emulation are the tests' own (tests/support): a Mac must check exactly the cells that the tests check.
sys.path.insert(0, str(ROOT / "tests"))

from metalens import InterpretableModel, use_backend  # noqa: E402
from metalens.display.tables import diagnosis_facts  # noqa: E402
from metalens.models import bundled  # noqa: E402
from metalens.ops import (  # noqa: E402
    Head,
    Weight,
    doctor,
    lens_compare,
    lens_kl,
    lens_stats,
    lens_target,
)
from metalens.ops.metal import library, source, tuning  # noqa: E402
from metalens.ops.metal.kernel import Kernel  # noqa: E402
from metalens.training import TrainingConfig, train  # noqa: E402
from support import metal_cells  # noqa: E402

# The versions of Metal as which MLX compiles kernels, from macOS 14 on, and the flags of its own build.
STANDARDS = ("metal3.1", "metal3.2", "metal4.0", "metal4.1")
METAL_FLAGS = ["-fno-fast-math", "-Wall", "-Wextra", "-Wmetal-addr-spaces"]

# (name, layers, tokens, hidden size, vocabulary size) of the measured cases, which have 4-bit heads.
CASES = [
    ("1B", 16, 16, 2048, 128256),
    ("8B", 32, 8, 4096, 128256),
    ("one token of 1B", 16, 1, 2048, 128256),
    ("one token, 4 layers", 4, 1, 2048, 128256),
]
TINY = [("tiny", 3, 4, 64, 131)]


def facts() -> list[str]:
    """Return the chip, the system and the versions as rows of a table."""
    chip = (
        subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if sys.platform == "darwin"
        else None
    )
    found = {
        "chip": chip.stdout.strip() if chip else platform.processor() or platform.machine(),
        "macOS": platform.mac_ver()[0] or "none",
        **diagnosis_facts(doctor.examine()),
    }
    return [f"| {name} | {value} |" for name, value in found.items()]


def compile_emulated() -> tuple[list[str], int]:
    """Compile a file of the library, and one with tensor operations, in emulation; return the report's lines and the number of failures."""
    import mslcpu

    units = {"shared": library.translation_units()["shared"], "tensor": library.tensor_units()["affine_b4_g64_half_tensor"]}
    for name, kernels in units.items():
        mslcpu.compile_library(library.text(kernels), name=f"{name}.metal", include_dirs=[source.folder()])
    return [f"compiled {name}.metal in emulation" for name in units], 0


def compile_all() -> tuple[list[str], int]:
    """Compile every file of the library with Apple's compiler; return the report's lines and the number of failures.

    The ahead-of-time library is Metal 3.1. MLX compiles just in time as the newest version that the system knows, so each of them is tried. From
    Metal 4 on there are the kernels with tiles of tensor operations too.
    """
    compiler = ["xcrun", "-sdk", "macosx", "metal"]
    if not runs([*compiler, "--version"]):
        return ["no Metal compiler was found (xcode-select --install, or Xcode's Metal toolchain): kernels are compiled just in time"], 0
    lines, failures = [], 0
    for standard in STANDARDS:
        units = library.translation_units() | (library.tensor_units() if standard >= "metal4" else {})
        command = [*compiler, f"-std={standard}", *METAL_FLAGS, f"-I{source.folder()}", "-x", "metal", "-c", "-", "-o", "/dev/null"]
        if not runs(command, ""):
            lines.append(f"{standard}: this compiler does not know it")
            continue

        def compiled(kernels: list[Kernel], command: list[str] = command) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, input=library.text(kernels), capture_output=True, text=True, check=False)

        broken = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(compiled, units.values()))
        for name, done in zip(units, results, strict=True):
            broken += done.returncode != 0
            if done.stderr:
                told = [f"    {line}" for line in done.stderr.splitlines()[:8]]
                lines += [f"{standard}, {name}: {'failed' if done.returncode else 'warnings'}", *told]
        lines.append(f"{standard}: {len(units) - broken} of {len(units)} files compile, {sum(map(len, units.values()))} kernels")
        failures += broken
    return lines, failures


def runs(command: list[str], text: str | None = None) -> bool:
    """Return whether a command, with `text` as its input, exists and succeeds."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def compare(cells: list[metal_cells.Cell]) -> tuple[list[str], int]:
    """Compare every cell with float64; return the report's lines and the number of cells worse than plain MLX plus an epsilon."""
    lines, failures, worst = [], 0, 0.0
    for cell in cells:
        try:
            errors = metal_cells.run(cell)
        except (RuntimeError, AssertionError, ValueError) as error:
            failures += 1
            lines.append(f"{cell}: {str(error).splitlines()[0]}")
            continue
        worst = max(worst, errors.ours / (errors.plain + errors.epsilon))
        if not errors.good:
            failures += 1
            lines.append(f"{cell}: error {errors.ours:.2e}; plain MLX has {errors.plain:.2e}, and {errors.epsilon:.0e} more is allowed")
    return [f"{len(cells) - failures} of {len(cells)} cells good; the largest error is {worst:.0%} of the allowed error", *lines], failures


def train_both(steps: int) -> tuple[list[str], int]:
    """Train the demo model's lens with the kernels and with plain MLX.

    Returns the report's lines, and 1 if the losses differ, else 0.
    """
    model = InterpretableModel(str(bundled.MODEL))
    ids = model.training_ids([bundled.TRAINING_TEXT.read_text()[:4000]])
    config = TrainingConfig(num_steps=steps, max_seq_len=32, learning_rate=0.3)
    losses: dict[str, list[float]] = {}
    for backend in ("metal", "reference"):
        with use_backend(backend):  # type: ignore[arg-type]
            found = losses.setdefault(backend, [])
            train(model, ids, recipe="mlxterp", config=config, callbacks=[lambda p, found=found: found.append(p.loss)])
    worst = max(abs(a - b) / b for a, b in zip(losses["metal"], losses["reference"], strict=True))
    return [f"{steps} steps: losses {losses['metal'][0]:.4f} ... {losses['metal'][-1]:.4f}, largest relative difference {worst:.1e}"], int(
        worst > 1e-3
    )


def operations(num_layers: int, tokens: int, hidden_size: int, vocab_size: int) -> list[tuple[str, Callable[[], None], int]]:
    """Return (name, function without arguments, its products of all rows with the head) of the measured operations, with a 4-bit head."""
    u = mx.random.normal((vocab_size, hidden_size), key=mx.random.key(0)) * 0.02
    head = Head(Weight(*mx.quantize(u, 64, 4), 64, 4))
    n_model = mx.random.normal((tokens, hidden_size), key=mx.random.key(1))
    n = n_model[None] + 0.3 * mx.random.normal((num_layers, tokens, hidden_size), key=mx.random.key(2))
    mx.eval(head.weight.values, n, n_model)

    def stats() -> None:
        mx.eval(vars(lens_stats(n, head, 10, n_model)))

    def loss() -> None:
        mx.eval(*lens_kl(n, lens_target(n_model, head), head))

    def comparison() -> None:
        mx.eval(vars(lens_compare(n, n_model[None], head)))

    return [("lens_stats", stats, 1), ("lens_kl", loss, 2), ("lens_compare", comparison, 1)]


def measure(cases: list[tuple[str, int, int, int, int]], rounds: int) -> list[str]:
    """Time metalens and plain MLX in turn; return a table of medians, with the TFLOP/s of the matrix products."""
    lines = ["| case | operation | metalens, ms | plain MLX, ms | ratio | TFLOP/s |", "|---|---|---:|---:|---:|---:|"]
    for name, num_layers, tokens, hidden_size, vocab_size in cases:
        for operation, run, products in operations(num_layers, tokens, hidden_size, vocab_size):
            ours, plain = in_turn(run, rounds)
            rate = 2 * products * num_layers * tokens * hidden_size * vocab_size / ours / 1e12
            case = f"{name}: L {num_layers}, T {tokens}, D {hidden_size}, V {vocab_size}"
            lines.append(f"| {case} | {operation} | {1e3 * ours:.2f} | {1e3 * plain:.2f} | {plain / ours:.2f} | {rate:.2f} |")
    return lines


BACKENDS = (lambda: use_backend("metal"), lambda: use_backend("reference"))
TILES = (lambda: tuning.use_tiles("simdgroup"), lambda: tuning.use_tiles("tensor"))


def in_turn(run: Callable[[], None], rounds: int, settings: Sequence[Callable[[], AbstractContextManager[None]]] = BACKENDS) -> list[float]:
    """Return the median seconds with each of the settings, which run in turn; the first round is not counted."""
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds + 1):
        for setting, found in zip(settings, times, strict=True):
            with setting():
                start = time.perf_counter()
                run()
                found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


def check_tensor_tiles(cells: list[metal_cells.Cell], cases: list[tuple[str, int, int, int, int]], rounds: int) -> tuple[list[str], int]:
    """Compare the kernels' tiles of tensor operations with float64, and time them and the others in turn.

    Returns the report's lines, with whether to enable these tiles, and the number of cells that differ.
    """
    if not tuning.device().matrix_units:
        return ["this GPU, or this macOS, has no matrix units that the kernels can use"], 0
    with tuning.use_tiles("tensor"):
        lines, failures = compare(cells)
    lines += ["", "| case | operation | simdgroup tiles, ms | tensor tiles, ms | ratio |", "|---|---|---:|---:|---:|"]
    ratios = []
    for name, num_layers, tokens, hidden_size, vocab_size in cases:
        for operation, run, _ in operations(num_layers, tokens, hidden_size, vocab_size)[:2]:
            before, after = in_turn(run, rounds, TILES)
            ratios.append(before / after)
            lines.append(f"| {name} | {operation} | {1e3 * before:.2f} | {1e3 * after:.2f} | {ratios[-1]:.2f} |")
    if failures:
        verdict = "Do not enable tensor tiles: their values differ."
    elif min(ratios) > 0.97 and max(ratios) > 1.05:
        verdict = "Enable tensor tiles on this chip (METALENS_METAL_TILES=tensor), and report it: they could be its default."
    else:
        verdict = "Do not enable tensor tiles on this chip: they are not faster."
    return [*lines, "", verdict], failures


@contextlib.contextmanager
def device(emulated: bool, with_matrix_units: bool = False) -> Iterator[None]:
    """Run a block on the GPU, or on its emulation: that of one with matrix units, if so."""
    if not emulated:
        if not mx.metal.is_available():
            sys.exit("mac-check needs a Mac with Apple silicon: MLX finds no Metal GPU here. Use --emulated to try the script without a GPU.")
        mx.set_default_device(mx.gpu)
        with use_backend("metal"):
            yield
        return
    from support import metal_emulation

    with metal_emulation.emulated(metal_emulation.M5 if with_matrix_units else metal_emulation.M1):
        yield


def main() -> None:
    """Run all steps and write the report; exit with 1 if a kernel does not compile or a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="run a few cells in emulation, without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mac-check.md", help="file of the report [default: build/mac-check.md]")
    arguments = parser.parse_args()
    emulated: bool = arguments.emulated
    with device(emulated):
        cells = [c for c in metal_cells.cells() if not emulated or "affine4g64-float32" in str(c)]
        compiled, broken = compile_emulated() if emulated else compile_all()
        compared, differing = compare(cells)
        trained, diverging = train_both(2 if emulated else 20)
        measured = measure(TINY if emulated else CASES, 1 if emulated else 5)
    with device(emulated, with_matrix_units=True):
        cells = [c for c in metal_cells.tensor_cells() if not emulated or "affine4g64-float32" in str(c)]
        of_tensors, wrong = check_tensor_tiles(cells, TINY if emulated else CASES, 1 if emulated else 5)
        parts = [
            "# mac-check" + (" (in emulation: a test of the script, nothing was measured on Apple hardware)" if emulated else ""),
            "## Facts\n\n| | |\n|---|---|\n" + "\n".join(facts()),
            f"## Compile\n\nplanned for {tuning.device()}\n\n" + "\n".join(compiled),
            "## Compare\n\n" + "\n".join(compared + trained),
            "## Measure\n\n" + "\n".join(measured),
            "## Tiles of tensor operations\n\n" + "\n".join(of_tensors),
        ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n\n".join(parts) + "\n")
    sys.stdout.write("\n\n".join(parts) + f"\n\nWritten to {arguments.out}. Please report it: docs/on-a-mac.md.\n")
    sys.exit(1 if broken or differing or diverging or wrong else 0)


if __name__ == "__main__":
    main()
