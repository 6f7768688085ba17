"""Call the extension's functions with arbitrary arguments: they return the promised arrays, or raise a ValueError or TypeError of one sentence."""

from functools import reduce

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metalens import _ext

EXAMPLES = 200
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
DTYPES = (*FLOATS, mx.float64, mx.int32, mx.int64, mx.uint8, mx.uint32, mx.int8, mx.bool_, mx.complex64)
FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)] + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]

sizes = st.sampled_from([0, 1, 2, 3, 5, 16, 32, 33, 64, 128])
precisions = st.sampled_from(["float32"] * 8 + ["bf16"] * 8 + ["", "fp16"])


def rarely(usual, unusual):
    """Draw mostly arguments that fit, so that an example has one or two faults, not all at once."""
    return st.integers(0, 29).flatmap(lambda i: unusual if i == 0 else usual)


@st.composite
def arrays(draw, shape, dtype=mx.float32, other_dtypes=DTYPES):
    """Draw an array of this shape and type, sometimes of another one, or a view."""
    shape = list(shape)
    change = draw(st.integers(0, 39))
    if change == 0:
        shape = draw(st.lists(sizes, max_size=3))
    elif change == 1 and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(sizes)
    dtype = draw(rarely(st.just(dtype), st.sampled_from(other_dtypes)))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 200, shape) - (100 if dtype in FLOATS else 0)
    array = mx.array(values.astype(np.int32)).astype(mx.float32 if dtype in FLOATS else dtype)
    if dtype in FLOATS:
        array = (array / 50).astype(dtype)
    if array.ndim and draw(st.booleans()):
        array = array[..., ::-1]
    return array


floats = st.sampled_from(FLOATS)


def optional(strategy, usually=True):
    return rarely(strategy if usually else st.none(), st.none() if usually else strategy)


@st.composite
def weights(draw, outputs, inputs):
    """Draw the arguments of a weight [outputs, inputs]: (values, scales, biases, group_size, bits, mode)."""
    mode, bits, group = draw(st.sampled_from(FORMATS))
    said = (draw(rarely(st.just(group), sizes)), draw(rarely(st.just(bits), st.integers(-1, 17))), draw(rarely(st.just(mode), st.just("int4"))))
    dtype = draw(floats) if mode == "affine" else mx.uint8
    packed = draw(arrays((outputs, inputs * bits // 32), mx.uint32))
    scales = draw(arrays((outputs, inputs // group), dtype))
    return packed, scales, draw(optional(arrays((outputs, inputs // group), dtype), mode == "affine")), *said


def outcome(function, *args):
    """Return the result, or None for an error of one readable sentence. Any other error is raised."""
    try:
        return function(*args)
    except (ValueError, TypeError) as error:
        kind, message = type(error), str(error)
    if kind is TypeError:  # nanobind's own error, which lists the signature
        assert "incompatible function arguments" in message
    else:
        assert message.startswith("[metalens] "), message
        assert message.endswith("."), message
        assert "\n" not in message
    return None


def assert_arrays(results, shapes, dtypes):
    mx.eval(results)
    assert [a.shape for a in results] == [tuple(s) for s in shapes]
    assert [a.dtype for a in results] == list(dtypes)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_quantized_matmul(data):
    outputs, groups, transpose = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3)), data.draw(st.booleans())
    weight = data.draw(weights(outputs, 128 * groups))
    lead = data.draw(st.lists(st.integers(0, 3), max_size=2))
    x = data.draw(arrays((*lead, 128 * groups if transpose else outputs), data.draw(floats)))
    dtype = data.draw(optional(st.sampled_from(DTYPES), usually=False))
    group_size, bits, mode = weight[3:]
    y = outcome(_ext.quantized_matmul, x, *weight[:3], group_size, bits, transpose, mode, dtype, data.draw(precisions))
    if y is not None:
        columns = weight[0].shape[0] if transpose else weight[0].shape[1] * 32 // bits
        assert_arrays([y], [(*x.shape[:-1], columns)], [dtype or x.dtype])


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_matmul(data):
    rows, columns, transpose = data.draw(sizes), data.draw(sizes), data.draw(st.booleans())
    lead = data.draw(st.lists(st.integers(0, 3), max_size=2))
    x = data.draw(arrays((*lead, columns if transpose else rows), data.draw(floats)))
    w = data.draw(arrays((rows, columns), data.draw(floats)))
    dtype = data.draw(optional(st.sampled_from(DTYPES), usually=False))
    y = outcome(_ext.matmul, x, w, transpose, dtype, data.draw(precisions))
    if y is not None:
        assert_arrays([y], [(*x.shape[:-1], w.shape[0] if transpose else w.shape[1])], [dtype or mx.result_type(x, w)])


@st.composite
def heads(draw, width):
    """Draw (head, its tokens, whether it has a softcap), or None if the head was rejected."""
    rows = draw(st.sampled_from([1, 2, 7, 255, 257, 0]))
    if width % 128 == 0 and draw(st.booleans()):
        weight = draw(weights(rows, width))
    else:
        weight = (draw(arrays((rows, width), draw(floats))), None, None, draw(sizes), draw(sizes), draw(st.sampled_from(["affine", "int4"])))
    bias = draw(optional(arrays((rows,), draw(floats)), usually=False))
    numbers = st.sampled_from([1.0, 0.5, 1e30, -2.0, 0.0, float("inf"), float("nan")])
    softcap = draw(optional(numbers, usually=False))
    vocab = draw(st.sampled_from([None, None, None, 1, rows, rows - 1, rows + 1, 0, -1]))
    offset = draw(optional(arrays((rows,), draw(floats)), usually=draw(st.booleans())))
    head = outcome(_ext.Head, *weight, bias, draw(rarely(st.just(1.0), numbers)), softcap, vocab, offset)
    return None if head is None else (head, weight[0].shape[0] if vocab is None else vocab, bool(softcap))


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_lens_stats(data):
    width, layers, tokens = (data.draw(st.sampled_from(s)) for s in ([1, 3, 33, 128, 128], [0, 1, 2, 70], [0, 1, 3, 6]))
    drawn = data.draw(heads(width))
    if drawn is None:
        return
    head, vocab, _ = drawn
    n = data.draw(arrays((layers, tokens, width), data.draw(floats)))
    k = data.draw(st.sampled_from([1, 1, 1, min(2, vocab), vocab, vocab, vocab + 1, 0, -1]))
    n_model = data.draw(optional(arrays((tokens, width), data.draw(floats)), data.draw(st.booleans())))
    of_labels = data.draw(st.sampled_from([(tokens,), (tokens, 1), (tokens, 3), (tokens, 0)]))
    labels = data.draw(optional(arrays(of_labels, data.draw(st.sampled_from([mx.int32, mx.int64, mx.uint8, mx.uint32]))), data.draw(st.booleans())))
    reverse = data.draw(st.booleans())
    results = outcome(_ext.lens_stats, n, head, k, n_model, labels, data.draw(precisions), reverse)
    if results is not None:
        rows = n.shape[:2]
        expected = [(rows, mx.float32)] * 3 + [((*rows, k), mx.int32), ((*rows, k), mx.float32)]
        expected += [(rows, mx.float32), (rows, mx.bool_)] if n_model is not None else []
        expected += [((*rows, *labels.shape[1:]), kind) for kind in (mx.float32, mx.int32)] if labels is not None else []
        expected += [(rows, mx.float32)] if reverse else []
        assert_arrays(results, *zip(*expected, strict=True))
        ids = np.array(results[3])
        assert ((ids >= 0) & (ids < vocab)).all()


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_lens_target_and_lens_kl(data):
    width, layers, tokens = (data.draw(st.sampled_from(s)) for s in ([1, 3, 33, 128, 128], [0, 1, 2, 70], [0, 1, 3, 6]))
    drawn = data.draw(heads(width))
    if drawn is None:
        return
    head, _, softcap = drawn
    n_model, with_mean = data.draw(arrays((tokens, width), data.draw(floats))), data.draw(rarely(st.just(True), st.just(False)))
    target = outcome(_ext.lens_target, n_model, head, with_mean, data.draw(precisions))
    if target is not None:
        shapes = [n_model.shape[:1]] * 2 + ([n_model.shape] if with_mean and not softcap else [])
        assert_arrays(target, shapes, [mx.float32] * len(shapes))
    n, lse = data.draw(arrays((layers, tokens, width), data.draw(floats))), data.draw(arrays((tokens,), data.draw(floats)))
    mean = data.draw(optional(arrays((tokens, width), data.draw(floats))))
    with_gradient = data.draw(st.booleans())
    results = outcome(_ext.lens_kl, n, head, n_model, lse, mean, with_gradient, data.draw(precisions))
    if results is not None:
        shapes = [n.shape[:2]] + ([n.shape] if with_gradient else [])
        assert_arrays(results, shapes, [mx.float32] * len(shapes))


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_lens_compare(data):
    width, layers, tokens = (data.draw(st.sampled_from(s)) for s in ([1, 3, 33, 128], [0, 1, 2, 70], [0, 1, 3, 6]))
    drawn, other = data.draw(heads(width)), data.draw(optional(heads(width), data.draw(st.booleans())))
    if drawn is None:
        return
    layers_b = data.draw(rarely(st.sampled_from([1, layers]), st.integers(0, 3)))
    a, b = (data.draw(arrays((count, tokens, width), data.draw(floats))) for count in (layers, layers_b))
    lse_a, lse_b = (data.draw(arrays((count, tokens), data.draw(floats))) for count in (layers, layers_b))
    results = outcome(_ext.lens_compare, a, drawn[0], lse_a, b, lse_b, None if other is None else other[0], data.draw(precisions))
    if results is not None:
        assert_arrays(results, [a.shape[:2]] * 4, [mx.float32] * 4)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_translate_norm(data):
    width, lead = data.draw(st.sampled_from([1, 3, 33, 64, 0])), data.draw(st.lists(st.integers(0, 3), max_size=2))
    h, w = data.draw(arrays((*lead, width), data.draw(floats))), data.draw(arrays((width, width), data.draw(floats)))
    vectors = [data.draw(optional(arrays((width,), data.draw(floats)), data.draw(st.booleans()))) for _ in range(3)]
    norm = data.draw(rarely(st.sampled_from(["rms", "layer", "none"]), st.sampled_from(["", "RMS", "batch"])))
    eps = data.draw(st.sampled_from([1e-5, 0.0, -1.0, float("nan"), 1e30]))
    n = outcome(_ext.translate_norm, h, w, vectors[0], norm, *vectors[1:], eps, data.draw(precisions))
    if n is not None:
        assert_arrays([n], [h.shape], [mx.float32])


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.floats(),
    st.text(max_size=3),
    arrays((3, 33)),
    arrays((2, 3, 33)),
    st.just([1, 2]),
    st.just(mx.float16),
)


@settings(max_examples=EXAMPLES)
@given(
    st.sampled_from(["quantized_matmul", "matmul", "Head", "lens_stats", "lens_compare", "lens_target", "lens_kl", "translate_norm"]),
    st.lists(anything, max_size=12),
)
def test_arguments_that_are_anything(name, args):
    result = outcome(getattr(_ext, name), *args)
    if name != "Head" and result is not None:
        mx.eval(result)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_norms_and_activations(data):
    lead, width = data.draw(st.lists(st.integers(0, 3), max_size=2)), data.draw(st.sampled_from([1, 3, 33, 64, 0]))
    x, gate = (data.draw(arrays((*lead, width), data.draw(floats))) for _ in range(2))
    gain, bias = (data.draw(optional(arrays((width,), data.draw(floats)), data.draw(st.booleans()))) for _ in range(2))
    eps = data.draw(st.sampled_from([1e-5, 0.0, -1.0, float("nan")]))
    given_types = [a.dtype for a in (x, gain, bias) if a is not None]
    for y, types in (
        (outcome(_ext.rms_norm, x, gain, eps), given_types[: 1 + (gain is not None)]),
        (outcome(_ext.layer_norm, x, gain, bias, eps), given_types),
        (outcome(_ext.swiglu, gate, x), [x.dtype]),
        (outcome(_ext.gelu_tanh, x), [x.dtype]),
    ):
        if y is not None:
            assert_arrays([y], [x.shape], [reduce(lambda a, b: mx.result_type(mx.zeros(1, a), mx.zeros(1, b)), types)])


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_rope(data):
    lead, tokens, width = (
        data.draw(st.lists(st.integers(0, 3), max_size=2)),
        data.draw(st.integers(0, 5)),
        data.draw(st.sampled_from([0, 1, 2, 6, 33])),
    )
    x = data.draw(arrays((*lead, tokens, width), data.draw(floats)))
    dims = data.draw(rarely(st.just(width // 2 * 2), sizes))
    freqs = data.draw(optional(arrays((dims // 2,), data.draw(floats)), data.draw(st.booleans())))
    base = data.draw(rarely(st.just(None if freqs is not None else 100.0), st.sampled_from([None, 0.0, 1e4])))
    scale, offset = data.draw(st.sampled_from([1.0, 0.0, float("inf")])), data.draw(st.integers(-3, 2**31 - 10))
    y = outcome(_ext.rope, x, dims, data.draw(st.booleans()), base, scale, offset, freqs)
    if y is not None:
        assert_arrays([y], [x.shape], [x.dtype])


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_attention(data):
    batch, groups, shared, queries, keys, d, e = (
        data.draw(st.sampled_from(s)) for s in ([0, 1, 2], [1, 2, 0], [1, 3], [0, 1, 5, 67], [0, 1, 5, 67, 260], [1, 5], [1, 8])
    )
    q, k, v = (
        data.draw(arrays(shape, data.draw(floats)))
        for shape in ((batch, groups * shared, queries, d), (batch, groups, keys, d), (batch, groups, keys, e))
    )
    shape = [data.draw(st.sampled_from([1, size])) for size in (batch, groups * shared, queries, keys)][data.draw(st.integers(0, 3)) :]
    mask = data.draw(optional(arrays(shape, data.draw(st.sampled_from([*FLOATS, mx.bool_]))), data.draw(st.booleans())))
    sinks = data.draw(optional(arrays((groups * shared,), data.draw(floats)), usually=False))
    causal = data.draw(st.booleans()) if mask is None else data.draw(rarely(st.just(False), st.just(True)))
    y = outcome(_ext.attention, q, k, v, 0.5, causal, mask, sinks, data.draw(precisions))
    if y is not None:
        assert_arrays([y], [(*q.shape[:3], v.shape[3])], [q.dtype])
