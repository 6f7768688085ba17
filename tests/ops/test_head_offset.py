"""The offset of a head's logits, and the head of sampled rows."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, Weight, head_logits
from metalens.ops.logits import capped_logits, head_vjp
from metalens.ops.weight import KERNEL_FORMATS
from support import oracle

pytestmark = pytest.mark.usefixtures("cpu_backend")

V, D = 131, 128
IDS = [0, 1, 7, 64, 100, 130]
FORMATS = [("dense", 0, 0)] + [
    (mode, bits, group_size) for mode, (widths, sizes) in KERNEL_FORMATS.items() for bits in widths for group_size in sizes
]


def weight(rng, mode, bits, group_size, rows=V, dtype=mx.float32):
    if mode == "dense":
        return Weight(oracle.random_array(rng, rows, D, dtype=dtype, scale=0.2))
    if mode == "affine":
        return oracle.random_weight(rng, rows, D, bits, group_size, dtype, scale=0.2)
    return Weight(*mx.quantize(oracle.random_array(rng, rows, D, scale=0.2), mode=mode), None, group_size, bits, mode)


# ---------------------------------------------------------------------- the offset


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_offset_is_added_after_the_softcap(rng, settings, dtype):
    head = replace(oracle.make_head(rng, V, D, **settings), offset=oracle.random_array(rng, V, dtype=dtype, scale=5))
    n = oracle.random_array(rng, 2, 5, D)
    z = head_logits(n, head)
    assert z.dtype == mx.float32
    expected = oracle.head_logits(oracle.wide(n), replace(head, offset=None)) + oracle.wide(head.offset)
    np.testing.assert_allclose(oracle.wide(z), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_slope_of_the_softcap_does_not_see_the_offset(rng, settings):
    # The offset is far larger than the softcap: with z + o in place of z the slope would be negative.
    head = replace(oracle.make_head(rng, V, D, **settings), offset=oracle.random_array(rng, V, scale=50))
    bare = replace(head, offset=None)
    n, dz = oracle.random_array(rng, 3, D), oracle.random_array(rng, 3, V) * (mx.arange(V) < head.tokens)
    gradient = oracle.wide(head_vjp(dz, capped_logits(n, head), head))
    values = oracle.wide(n)
    for index in [(0, 0), (1, 17), (2, 63), (2, 5)]:

        def weighted():
            return np.sum(oracle.head_logits(values, head)[:, : head.tokens] * oracle.wide(dz)[:, : head.tokens])

        assert gradient[index] == pytest.approx(oracle.central_difference(weighted, values, index), rel=1e-4, abs=1e-4)
    np.testing.assert_array_equal(gradient, oracle.wide(head_vjp(dz, capped_logits(n, bare), bare)))


@pytest.mark.parametrize("offset", [mx.zeros(V - 1), mx.zeros((1, V)), mx.zeros(()), mx.zeros((V, 1))], ids=lambda o: str(o.shape))
def test_offsets_of_another_shape(rng, offset):
    with pytest.raises(ValueError, match=rf"offset must be \({V},\), one number for each row of the head, got "):
        replace(oracle.make_head(rng, V, D), offset=offset)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.complex64], ids=str)
def test_offsets_that_are_no_floats(rng, dtype):
    with pytest.raises(TypeError, match="offset must hold floats, got"):
        replace(oracle.make_head(rng, V, D), offset=mx.zeros(V, dtype))


def test_the_values_of_an_offset_are_not_checked(rng):
    offset = mx.array([float("nan"), float("-inf"), *[1e38] * (V - 2)])
    assert replace(oracle.make_head(rng, V, D), offset=offset).offset is offset


# ---------------------------------------------------------------------- sampled rows


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[1]}g{f[2]}")
def test_sampled_rows_have_the_logits_of_the_whole_head(rng, form, dtype):
    head = Head(weight(rng, *form, dtype=dtype), oracle.random_array(rng, V, dtype=dtype), 0.5, 6.0)
    sampled = head.sampled(mx.array(IDS))
    assert (sampled.vocab_size, sampled.tokens, sampled.used_rows, sampled.offset) == (len(IDS), len(IDS), None, None)
    n = oracle.random_array(rng, 5, D)
    assert mx.array_equal(head_logits(n, sampled), head_logits(n, head)[:, mx.array(IDS)])


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[1]}g{f[2]}")
def test_sampled_rows_stay_packed(rng, form):
    head = Head(weight(rng, *form, dtype=mx.bfloat16), oracle.random_array(rng, V, dtype=mx.bfloat16))
    sampled = head.sampled(mx.array(IDS))
    for name in ("values", "scales", "biases"):
        whole, some = getattr(head.weight, name), getattr(sampled.weight, name)
        assert (some is None) == (whole is None)
        if whole is not None:
            assert some.dtype == whole.dtype
            np.testing.assert_array_equal(np.array(some.view(mx.uint8)), np.array(whole.view(mx.uint8))[IDS])
    for name in ("group_size", "bits", "mode"):
        assert getattr(sampled.weight, name) == getattr(head.weight, name)
    assert sampled.bias.dtype == mx.bfloat16


def test_offsets_of_the_head_and_of_the_sample_add_up(rng):
    whole, own = oracle.random_array(rng, V), oracle.random_array(rng, len(IDS), dtype=mx.float16)
    bare, ids = oracle.make_head(rng, V, D), mx.array(IDS)
    head = replace(bare, offset=whole)
    np.testing.assert_array_equal(np.array(bare.sampled(ids, own).offset), np.array(own))
    np.testing.assert_array_equal(np.array(head.sampled(ids).offset), np.array(whole)[IDS])
    np.testing.assert_array_equal(np.array(head.sampled(ids, own).offset), np.array(whole)[IDS] + np.array(own).astype(np.float32))


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.uint32, mx.int64], ids=str)
def test_ids_of_every_integer_type(rng, dtype):
    head = oracle.make_head(rng, V, D, used_rows=130)
    everything = head.sampled(mx.arange(130).astype(dtype))
    assert (everything.tokens, everything.used_rows) == (130, None)
    assert mx.array_equal(everything.weight.values, head.weight.values[:130])
    assert head.sampled(mx.array([129]).astype(dtype)).tokens == 1


@pytest.mark.parametrize("ids", [[3, 2], [0, 5, 5], [-1, 3], [0, 100], [131], [0, 7, 6, 99]], ids=str)
def test_ids_that_are_not_ascending_tokens(rng, ids):
    head = oracle.make_head(rng, V, D, used_rows=100)
    with pytest.raises(ValueError, match=r"ids must be strictly ascending, from 0 to 99; got \d ids from"):
        head.sampled(mx.array(ids))


def test_ids_and_offsets_that_do_not_fit(rng):
    head, ids = oracle.make_head(rng, V, D), mx.array(IDS)
    for bad in (mx.zeros((0,), mx.int32), mx.array(3), ids[None]):
        with pytest.raises(ValueError, match="ids must be"):
            head.sampled(bad)
    with pytest.raises(TypeError, match="ids must be integers, got"):
        head.sampled(ids.astype(mx.float32))
    with pytest.raises(ValueError, match=r"offset must be \(6,\)"):
        head.sampled(ids, mx.zeros(V))
    with pytest.raises(TypeError, match="offset must hold floats"):
        head.sampled(ids, ids)
