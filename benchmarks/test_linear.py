"""Time products with a frozen W: a layer's product on many rows, on the single row of a decoding step, and small ones in every format."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16, TORCH_INT4
from benchmarks.operations import linear
from benchmarks.peaks import READ
from benchmarks.suite import Case, Effort, Suite, Work

from metalens import _extension

MANY, ONE, ONE_BACKWARD = (f"quantized_matmul, 4-bit: {rest}" for rest in ("x W^T, many rows", "x W^T, one row", "x W, one row"))
ONE_OF_EVERY_FORMAT = "linear, one row: every format beside reading W"
ISAS = "quantized_matmul, 4-bit: instruction sets"
SMALL = [(128, 256, 704), (1, 256, 6000)]  # rows, inputs, outputs
LARGE = [(512, 320, 1280), (128, 1024, 1024), (512, 1024, 3072), (128, 2048, 2048), (1, 1024, 3072), (1, 2048, 2048)]
# SmolLM2-135M's matrices and that of a small feed-forward layer.
SMALL_PRODUCTS = [(rows, *matrix) for matrix in ((576, 576), (576, 1536), (1536, 576), (576, 192)) for rows in (32, 128, 512)] + [(128, 320, 1280)]
PEERS = [TORCH, TORCH_BF16, TORCH_INT4]


def label(shape: tuple[int, int, int]) -> str:
    rows, inputs, outputs = shape
    return f"{rows} row{'s' if rows > 1 else ''}, W [{outputs}, {inputs}]"


def measure(suite: Suite, shape: tuple[int, int, int], names: list[str], title: str | None = None, transpose: bool = True, **options) -> None:
    rows, inputs, outputs = shape
    if title is None:
        title = MANY if rows > 1 else ONE if transpose else ONE_BACKWARD
    packed = outputs * inputs * (0.5 + 4 / 64)  # bytes of the codes, and of a scale and a bias of 16 bits per 64 codes
    peak = suite.peaks.bf16 if names[0] == OURS_BF16 else None
    work = Work(packed, "B/s", READ) if rows == 1 else Work(2.0 * rows * inputs * outputs, **({"peak": peak} if peak else {}))
    arguments = {"rows": rows, "inputs": inputs, "outputs": outputs, "transpose": transpose}
    suite.measure(Case(linear, arguments, names, title, label(shape), work, **options), Effort(budget=5))


@pytest.mark.parametrize("shape", SMALL, ids=label)
def test_small(suite, shape):
    measure(suite, shape, [OURS, *PEERS, PLAIN])


@pytest.mark.parametrize("shape", LARGE, ids=label)
def test_large(full_only, suite, shape):
    plain = [PLAIN] if shape[0] == 1 else []  # MLX's products of many rows are slow on Linux CPUs
    measure(suite, shape, [OURS, *PEERS, *plain], memory_of=[OURS, TORCH] if shape[0] == 512 else [])


@pytest.mark.parametrize("stored", linear.ROW_FORMATS)
def test_one_row_of_every_format(full_only, suite, stored):
    """Compare one row through a head that no cache holds with reading it once."""
    rows, inputs, outputs = (1, 1024, 65_536)
    work = Work(linear.stored_bytes(stored, outputs, inputs), "B/s", READ)
    arguments = {"rows": rows, "inputs": inputs, "outputs": outputs, "stored": stored}
    suite.measure(Case(linear, arguments, [OURS], ONE_OF_EVERY_FORMAT, f"{stored}, W [{outputs}, {inputs}]", work), Effort(budget=3))


@pytest.mark.parametrize("shape", [(1, 256, 6000), (1, 1024, 3072), (1, 2048, 2048)], ids=label)
def test_one_row_backward(suite, shape):
    """Time the product of the gradient: x [1, outputs] times W."""
    measure(suite, shape, [OURS, TORCH, TORCH_BF16, PLAIN], transpose=False)


@pytest.mark.parametrize("shape", [s for s in SMALL + LARGE if s[0] > 1], ids=label)
def test_bf16(suite, shape):
    measure(suite, shape, [OURS_BF16, OURS, TORCH_BF16])


@pytest.mark.parametrize("shape", [(128, 256, 704), (128, 1024, 1024), (1, 2048, 2048)], ids=label)
def test_instruction_sets(suite, shape):
    """Compare this CPU's widest instruction set with the narrower ones, each in a process of its own."""
    extension, reason = _extension.find()
    if extension is None:
        pytest.skip(reason)
    narrower = [isa for isa in extension.available_isas().split() if isa != extension.isa()]
    measure(suite, shape, [OURS], title=f"{ISAS} beside {extension.isa()}", isas=narrower)


@pytest.mark.parametrize("names", [(OURS, TORCH), (OURS_BF16, TORCH_BF16)], ids=lambda names: names[0])
@pytest.mark.parametrize("stored", linear.FORMATS)
@pytest.mark.parametrize("shape", SMALL_PRODUCTS, ids=label)
def test_small_products(full_only, suite, shape, stored, names):
    """Compare each precision with PyTorch's products in that type."""
    rows, inputs, outputs = shape
    arguments = {"rows": rows, "inputs": inputs, "outputs": outputs, "stored": stored}
    peak = suite.peaks.bf16 if names[0] == OURS_BF16 else None
    work = Work(2.0 * rows * inputs * outputs, **({"peak": peak} if peak else {}))
    suite.measure(Case(linear, arguments, names, f"linear, W in {stored}", label(shape), work), Effort(budget=2))
