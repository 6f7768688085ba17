"""Test that every barrier of the kernels is necessary: deleting any one of them makes the checks fail."""

import mlx.core as mx
import pytest

import mslcpu
from metalens.ops import Norm, lens_kl, lens_stats, lens_target, translate_norm
from metalens.ops.metal import kernel as metal_kernel
from metalens.ops.metal import source, tuning
from support import oracle
from support.metal_emulation import emulated, needs_clang

pytestmark = needs_clang


def stats(rng):
    head = oracle.make_head(rng, 200, 96)
    n, n_model = oracle.random_array(rng, 3, 9, 96), oracle.random_array(rng, 9, 96)
    mx.eval(vars(lens_stats(n, head, 3, n_model, mx.arange(9))))


def few_rows(rng):
    head = oracle.make_head(rng, 72, 544)  # more columns than are staged at once
    n, n_model = oracle.random_array(rng, 3, 2, 544), oracle.random_array(rng, 2, 544)
    mx.eval(vars(lens_stats(n, head, 3, n_model, mx.arange(4).reshape(2, 2))))


def loss(rng):
    head = oracle.make_head(rng, 600, 96)
    n, n_model = oracle.random_array(rng, 3, 9, 96), oracle.random_array(rng, 9, 96)
    mx.eval(*lens_kl(n, lens_target(n_model, head), head))


def translator(rng):
    norm = Norm(lambda y: y, "rms", mx.ones(96), None, 1e-5)
    h, w, b = oracle.random_array(rng, 20, 96), oracle.random_array(rng, 96, 96), mx.zeros(96)
    mx.eval(mx.vjp(lambda w: translate_norm(h, w, b, norm), [w], [h])[1])


# A GPU with one core, and a single wave: so few splits of the vocabulary that each has several steps, and the barriers between them matter.
FEW_CORES = tuning.Device("applegpu_g13p", 8 * 2**30, 1)
WITH_TENSORS = tuning.Device("applegpu_g17p", 8 * 2**30, 1, matrix_units=True, tensor_tiles=True)


@pytest.fixture(autouse=True)
def one_wave(monkeypatch):
    monkeypatch.setattr(tuning, "WAVES", 1)


RUNS = {
    "tile.h": stats,
    "tensor_tile.h": stats,
    "vector_product.h": few_rows,
    "lens_stats_vector.h": few_rows,
    "lens_backward.h": loss,
    "row_group.h": loss,
    "norm_grad.h": translator,
}


def device_of(header):
    return WITH_TENSORS if header == "tensor_tile.h" else FEW_CORES


def deletions():
    return [(header, i) for header in RUNS for i in range(mslcpu.count_barriers((source.folder() / header).read_text()))]


def test_every_header_with_barriers_is_covered():
    with_barriers = {path.name for path in source.folder().glob("*.h") if mslcpu.count_barriers(path.read_text())}
    assert with_barriers == set(RUNS)
    assert len(deletions()) >= 15


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
@pytest.mark.parametrize("header", RUNS)
def test_complete_kernels_pass_in_every_order(rng, header, schedule):
    with emulated(device_of(header)), mslcpu.options(schedule=schedule, seed=3):
        RUNS[header](rng)


@pytest.mark.parametrize(("header", "index"), deletions())
def test_a_deleted_barrier_is_found(rng, monkeypatch, header, index):
    whole = source.inlined

    def without(name):
        text = (source.folder() / header).read_text()
        assert name != header or body_of(text) in whole(name)
        return whole(name).replace(body_of(text), body_of(mslcpu.without_barrier(text, index)))

    monkeypatch.setattr(metal_kernel, "inlined", without)
    metal_kernel._just_in_time.cache_clear()
    try:
        with emulated(device_of(header)), pytest.raises(mslcpu.MslError, match="race|uninitialized"):
            RUNS[header](rng)
    finally:
        metal_kernel._just_in_time.cache_clear()


def body_of(text):
    """Return the part of a header that inlining does not change: from its namespace on."""
    return text[text.index("namespace metalens {") :]
