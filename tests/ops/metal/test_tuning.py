"""Test the plans of the launches for GPUs that exist: cores, waves of threadgroups, chunks, short dispatches."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import _extension
from metalens.ops import Head, LensTarget, Norm, Weight, lens_kl, lens_stats, lens_target, translate_norm, use_backend, use_precision
from metalens.ops.metal import constants, kernel, library, speed, tuning
from metalens.ops.metal import kl as metal_kl
from metalens.ops.metal import stats as metal_stats
from support.metal_emulation import M1, M3

GB = 2**30
# Apple's chips: architecture, cores, bytes of the working set (two thirds or three quarters of the memory).
CHIPS = {
    "M1": ("applegpu_g13g", 8, 5.3),
    "M1 Pro": ("applegpu_g13s", 16, 10.7),
    "M1 Max": ("applegpu_g13s", 32, 21),
    "M1 Ultra": ("applegpu_g13d", 64, 96),
    "M2": ("applegpu_g14g", 10, 5.3),
    "M2 Pro": ("applegpu_g14s", 19, 10.7),
    "M2 Max": ("applegpu_g14s", 38, 21),
    "M2 Ultra": ("applegpu_g14d", 76, 144),
    "M3": ("applegpu_g15g", 10, 5.3),
    "M3 Pro": ("applegpu_g15s", 18, 12),
    "M3 Max": ("applegpu_g15s", 40, 36),
    "M3 Ultra": ("applegpu_g15d", 80, 384),
    "M4": ("applegpu_g16g", 10, 10.7),
    "M4 Pro": ("applegpu_g16s", 20, 16),
    "M4 Max": ("applegpu_g16s", 40, 48),
    "M5": ("applegpu_g17g", 10, 10.7),
    "M5 Max": ("applegpu_g17s", 40, 96),
}
VOCABULARIES = (32_000, 128_256, 262_144)


def device(name, counted=True):
    architecture, cores, gigabytes = CHIPS[name]
    return tuning.Device(architecture, int(gigabytes * GB), cores if counted else 0)


@pytest.fixture
def launched():
    """Record the launches of a block, which compute nothing: [(kernel, threadgroups, threads of one)]."""
    found = []

    def factory(name, **_):
        def run(inputs, grid, threadgroup, output_shapes, output_dtypes):
            found.append((name, grid[0] // threadgroup[0] * grid[1] * grid[2], threadgroup[0]))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return run

    kernel._just_in_time.cache_clear()
    yield found, factory
    kernel._just_in_time.cache_clear()


def quantized_head(vocab, depth):
    """A 4-bit head whose numbers are never read."""
    scales = mx.zeros((vocab, depth // 64), mx.bfloat16)
    return Head(Weight(mx.zeros((vocab, depth // 8), mx.uint32), scales, scales, 64, 4))


def wanted_groups(name, threads, rows, vocab, gpu, cores):
    """Return the threadgroups that a launch must have: three waves, or as many as its rows and ids can be divided among.

    Args:
        name, threads: of the kernel.
        rows: rows that it divides among threadgroups.
        vocab: number of ids.
        gpu: the GPU as it is planned for.
        cores: cores that it has.
    """
    if "lens_stats_vector" in name:
        return min(3 * (16 * 32 // threads) * cores, vocab // (constants.VECTOR_IDS * constants.VECTOR_SIMDS))
    if "lens_stats" in name:
        return min(3 * 4 * cores, vocab // constants.TILE_IDS * -(-rows // gpu.generation.largest_block))
    if "lens_backward" in name:
        return 3 * 4 * cores
    assert "lens_softmax_grad" in name
    return min(3 * (24 * 32 // threads) * cores, rows)  # 24 simdgroups of a core run at once, and a row has one threadgroup


@pytest.mark.parametrize(("chip", "counted"), [(chip, True) for chip in CHIPS] + [(chip, False) for chip in ("M1", "M1 Pro", "M4 Max", "M1 Ultra")])
def test_every_dispatch_has_three_waves(launched, chip, counted):
    found, factory = launched
    gpu, cores = device(chip, counted), CHIPS[chip][1]
    with kernel.emulation(factory, gpu), use_backend("metal"):
        for vocab in VOCABULARIES:
            head = quantized_head(vocab, 2048)
            for layers in (1, 16, 32, 80):
                for tokens in (1, 7, 64):
                    for rows, call in calls(layers, tokens, head):
                        del found[:]
                        call()
                        for name, groups, threads in found:
                            if not ("merge" in name or "linear" in name or "label" in name):
                                assert groups >= wanted_groups(name, threads, rows, vocab, gpu, cores), (name, layers, tokens, vocab)


def calls(layers, tokens, head):
    """Return (rows of the smallest dispatch or chunk, call) of the statistics, the target and the loss."""
    n, n_model = mx.zeros((layers, tokens, 2048)), mx.zeros((tokens, 2048))
    target = LensTarget(n_model, n_model[:, 0], n_model[:, 0])
    return (
        (smallest_dispatch(n, head, True), lambda: lens_stats(n, head, 10, n_model)),
        (smallest_dispatch(n_model[None], head, False), lambda: lens_target(n_model, head)),
        (smallest_chunk(layers, tokens, head), lambda: lens_kl(n, target, head)),
    )


def smallest_dispatch(n, head, with_model):
    """Return the rows of the smallest dispatch of the statistics."""
    layers, tokens = n.shape[:2]
    slices = [(ls.indices(layers), ts.indices(tokens)) for ls, of_tokens in metal_stats._dispatches(n, head, with_model) for ts in of_tokens]
    return min((ls[1] - ls[0] + with_model) * (ts[1] - ts[0]) for ls, ts in slices)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", ["M1", "M2 Max", "M3 Max", "M4", "M5"])
def test_the_library_holds_every_kernel_that_is_launched(launched, chip, precision):
    found, factory = launched
    in_library = {k.name for kernels in library.translation_units().values() for k in kernels}
    cases, covered = 0, 0
    with kernel.emulation(factory, device(chip)), use_backend("metal"), use_precision(precision):
        head = quantized_head(128_256, 2048)
        for layers in (12, 16, 24, 28, 32, 36, 48, 64, 80):
            for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
                n, n_model = mx.zeros((layers, tokens, 2048)), mx.zeros((tokens, 2048))
                del found[:]
                lens_stats(n, head, 10, n_model, mx.zeros(tokens, mx.int32))
                lens_kl(n[:, :8], lens_target(n_model[:8], head), head)
                cases += 1
                covered += {name for name, _, _ in found} <= in_library
    assert (covered, cases) == (90, 90)


def smallest_chunk(layers, tokens, head):
    """Return the rows of the smallest chunk of a loss; the test below shows that chunks are large enough."""
    per_layers, per_tokens, _ = metal_kl.chunk_shape(layers, tokens, *head.weight.shape, rounded=False)
    return (layers % per_layers or per_layers) * (tokens % per_tokens or per_tokens)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_whole_chunk_fills_the_gpu_and_stays_small(chip, vocab):
    gpu = device(chip)
    for rounded in (False, True):
        rows = tuning.chunk_rows(vocab, 2048, 2 if rounded else 4, gpu)
        assert rows >= min(3 * (24 * 32 // constants.ROW_THREADS) * gpu.cores, tuning.rows_per_dispatch(vocab, 2048, gpu))
        size = rows * vocab * (6 if rounded else 8)
        assert size <= max(gpu.working_set / 20, 3 * tuning.LEAST_GRADIENT_BYTES) + 8 * vocab
        assert rows * vocab * (2 if rounded else 4) > 50 * 2**20 or rows == tuning.rows_per_dispatch(vocab, 2048, gpu)


@pytest.mark.parametrize(("rows", "chip"), [(512, "M4 Max"), (512, "M1"), (1, "M4 Max"), (100_000, "M1"), (17, "M2 Ultra")])
def test_the_gradient_of_the_norm_has_three_waves(launched, rows, chip):
    found, factory = launched
    gpu = device(chip)
    norm = Norm(lambda y: y, "rms", mx.ones(64), None, 1e-5)
    h, w, b = mx.zeros((rows, 64)), mx.zeros((64, 64)), mx.zeros(64)
    with kernel.emulation(factory, gpu), use_backend("metal"):
        mx.vjp(lambda w: translate_norm(h, w, b, norm), [w], [h])
    ((_, groups, threads),) = [launch for launch in found if "norm_grad" in launch[0]]
    assert groups >= min(rows, 3 * (24 * 32 // threads) * gpu.cores)
    assert groups <= max(rows, 1)


def test_a_pro_and_a_max_have_one_name_and_other_plans():
    assert device("M4 Pro").architecture == device("M4 Max").architecture
    assert device("M4 Pro").cores == 20
    unknown = device("M4 Pro", counted=False)
    # More splits than a Pro needs cost little. A dispatch for more cores than there are would take too long.
    assert (unknown.cores, unknown.fewest_cores) == (40, 14)
    assert all(CHIPS[name][1] <= device(name, counted=False).cores for name in CHIPS)
    assert all(CHIPS[name][1] >= device(name, counted=False).fewest_cores for name in CHIPS)


def test_the_emulated_gpus_exist():
    assert {(gpu.architecture, gpu.counted_cores) for gpu in (M1, M3)} <= {chip[:2] for chip in CHIPS.values()}


def test_cores_are_not_known_without_a_gpu(monkeypatch):
    if not mx.metal.is_available():
        assert _extension.gpu_core_count() == 0
    monkeypatch.setattr(_extension, "find", lambda: (None, "it was not built"))
    assert _extension.gpu_core_count() == 0


@pytest.mark.parametrize(
    ("architecture", "darwin", "has_units"),
    [
        ("applegpu_g17s", "25.2.0", True),
        ("applegpu_g17g", "26.0.1", True),
        ("applegpu_g18s", "25.3.0", True),
        ("applegpu_g17s", "25.1.0", False),
        ("applegpu_g17p", "25.2.0", False),
        ("applegpu_g16s", "26.0.0", False),
        ("", "", False),
    ],
)
def test_what_is_read_of_the_gpu(monkeypatch, architecture, darwin, has_units):
    asked = []
    facts = {"architecture": architecture, "max_recommended_working_set_size": 123} if architecture else {}
    monkeypatch.setattr(mx, "device_info", lambda device: asked.append(device) or facts)
    monkeypatch.setattr("platform.mac_ver", lambda: ("16.2", ("", "", ""), ""))  # of a Python that was built with an older SDK
    monkeypatch.setattr("platform.release", lambda: darwin)
    monkeypatch.setattr(_extension, "gpu_core_count", lambda: 20)
    found = tuning._this_device.__wrapped__()
    assert found == tuning.Device(architecture, 123 if architecture else 4 * GB, 20, has_units)
    assert asked == [mx.gpu]


def test_what_a_problem_lacks_is_made_once():
    assert kernel.absent() is kernel.absent()
    assert np.array(kernel.absent(mx.int32)).dtype == np.int32


@pytest.mark.parametrize("generation", tuning.GENERATIONS.values(), ids=lambda g: f"generation {g.number}")
@pytest.mark.parametrize("with_model", [True, False])
def test_blocks_hold_every_row(generation, with_model):
    for layers in (1, 2, 3, 16, 32, 80, 127):
        for tokens in (1, 2, 7, 64, 513):
            blocks = tuning.blocks(layers, tokens, with_model, generation)
            assert blocks.rows <= generation.largest_block
            total = tokens * (layers + with_model)
            assert (blocks.count - 1) * (blocks.rows - blocks.repeat_slots) < total <= blocks.count * (blocks.rows - blocks.repeat_slots)
            if tokens >= 64 and layers >= 16:  # padding and repeated rows
                assert blocks.count * blocks.rows <= 1.08 * total


def test_an_unknown_gpu_is_taken_for_a_slow_one():
    assert tuning.Device("", 0).generation is tuning.DEFAULT
    assert tuning.Device("applegpu_g99z", 0).generation.number == 17
    assert (M1.generation.number, M3.generation.number) == (13, 15)


@pytest.mark.parametrize("chip", CHIPS)
def test_dispatches_stay_short(chip):
    for counted in (True, False):
        gpu = device(chip, counted)
        rows = tuning.rows_per_dispatch(128256, 4096, gpu)
        assert 2 * rows * 128256 * 4096 <= max(tuning.DISPATCH_SECONDS * gpu.generation.core_flops * CHIPS[chip][1], 2 * 32 * 128256 * 4096)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 32), (20, 32), (67, 48), (67, 14), (200, 130)])
def test_the_model_is_multiplied_a_tile_at_a_time(launched, monkeypatch, tokens, rows):
    found, factory = launched
    monkeypatch.setattr(tuning, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr(speed, "mlx_multiplies_faster", lambda *_: False)  # the kernel's launches are counted
    head, n = quantized_head(1000, 64), mx.zeros((12, tokens, 64))
    with kernel.emulation(factory, device("M1")), use_backend("metal"):
        target = lens_target(n[0], head)
        del found[:]
        kl, gradient = lens_kl(n, target, head)
    assert (kl.shape, gradient.shape) == ((12, tokens), (12, tokens, 64))
    chunks = sum("lens_softmax_grad" in name for name, _, _ in found)
    of_model = sum("linear" in name for name, _, _ in found) - chunks
    _, per_tokens, together = metal_kl.chunk_shape(12, tokens, 1000, 64, rounded=False)
    assert of_model == -(-tokens // together)
    assert per_tokens <= together <= max(per_tokens, rows / 2)
    assert together % per_tokens == 0
