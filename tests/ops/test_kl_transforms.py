"""lens_kl and translate_norm under MLX's transformations: gradients, vmap, compile, streams, laziness, views."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Norm, lens_kl, lens_target, translate_norm
from support import oracle

V, D, L, N = 131, 64, 3, 5
# Tolerance for the same float32 operations in another order.
ROUNDING = 1e-5


@pytest.fixture(params=["linear", "softcap"])
def problem(request, rng):
    """Make (n, n_model, head)."""
    settings = {"linear": {"bias": True, "scale": 1.5}, "softcap": {"softcap": 6.0}}[request.param]
    head, n_model = oracle.make_head(rng, V, D, **settings), oracle.random_array(rng, N, D)
    return n_model[None] + oracle.random_array(rng, L, N, D, scale=0.3), n_model, head


def assert_close(ours, theirs):
    np.testing.assert_allclose(oracle.wide(ours), oracle.wide(theirs), atol=ROUNDING)


def kl_of(head, target):
    return lambda n: lens_kl(n, target, head)[0]


# ---------------------------------------------------------------------- derivatives


def test_the_way_back_is_the_gradient_that_was_returned(rng, each_backend, problem):
    n, n_model, head = problem
    target = lens_target(n_model, head)
    kl, gradient = lens_kl(n, target, head)
    assert_close(mx.grad(lambda n: mx.sum(kl_of(head, target)(n)))(n), gradient)

    value, slope = mx.value_and_grad(lambda n: mx.mean(kl_of(head, target)(n)))(n)
    assert value.item() == pytest.approx(mx.mean(kl).item(), abs=ROUNDING)
    assert_close(slope, gradient / (L * N))

    weights = oracle.random_array(rng, L, N)
    (again,), (pulled,) = mx.vjp(kl_of(head, target), [n], [weights])
    assert_close(again, kl)
    assert_close(pulled, weights[..., None] * gradient)


def test_a_loss_that_uses_kl_twice_and_other_things(each_backend, problem):
    n, n_model, head = problem
    target = lens_target(n_model, head)
    kl, gradient = lens_kl(n, target, head)

    def loss(n):
        kl = kl_of(head, target)(n * 2)
        return mx.sum(mx.square(kl)) + mx.sum(kl) + mx.sum(n)

    kl, gradient = lens_kl(n * 2, target, head)
    assert_close(mx.grad(loss)(n), 2 * (2 * kl + 1)[..., None] * gradient + 1)


def test_the_returned_gradient_is_a_constant(each_backend, problem):
    n, n_model, head = problem
    target = lens_target(n_model, head)
    assert not np.any(oracle.wide(mx.grad(lambda n: mx.sum(lens_kl(n, target, head)[1]))(n)))


def test_the_target_has_no_gradient(each_backend, problem):
    n, n_model, head = problem
    slope = mx.grad(lambda n_model: mx.sum(lens_kl(n, lens_target(n_model, head), head)[0]))(n_model)
    assert not np.any(oracle.wide(slope))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_the_gradient_of_16_bit_rows_is_theirs(each_backend, problem, dtype):
    n, n_model, head = problem
    n = n.astype(dtype)
    target = lens_target(n_model, head)
    slope = mx.grad(lambda n: mx.sum(kl_of(head, target)(n)))(n)
    assert slope.dtype == dtype
    np.testing.assert_allclose(oracle.wide(slope), oracle.wide(lens_kl(n, target, head)[1]), rtol=oracle.EPSILON[dtype], atol=1e-6)


def test_forward_mode(rng, native, problem):
    n, n_model, head = problem
    target = lens_target(n_model, head)
    tangent = oracle.random_array(rng, L, N, D)
    (kl,), (pushed,) = mx.jvp(kl_of(head, target), [n], [tangent])
    expected, gradient = lens_kl(n, target, head)
    assert_close(kl, expected)
    assert_close(pushed, mx.sum(gradient * tangent, axis=-1))


# ---------------------------------------------------------------------- the whole chain


def lens_loss(h, target, head, norm):
    def loss(weight, bias):
        return mx.mean(lens_kl(translate_norm(h, weight, bias, norm), target, head)[0])

    return loss


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_whole_lens_against_finite_differences(rng, each_backend, problem, kind):
    _, n_model, head = problem
    gain, eps = 1 + oracle.random_array(rng, D, scale=0.2), 1e-5
    norm = Norm(lambda h: mx.fast.rms_norm(h, gain, eps) if kind == "rms" else mx.fast.layer_norm(h, gain, None, eps), kind, gain, None, eps)
    h, target = oracle.random_array(rng, L, N, D), lens_target(n_model, head)
    weight, bias = mx.eye(D) + oracle.random_array(rng, D, D, scale=0.05), oracle.random_array(rng, D, scale=0.1)
    value, gradients = mx.value_and_grad(lens_loss(h, target, head, norm), argnums=(0, 1))(weight, bias)

    z_model, rows, w, b = oracle.head_logits(oracle.wide(n_model), head), oracle.wide(h), oracle.wide(weight), oracle.wide(bias)

    def exact():
        y = rows @ w.T + b
        y = oracle.rms_norm(y if kind == "rms" else y - y.mean(axis=-1, keepdims=True), oracle.wide(gain), eps)
        return oracle.kl(z_model, oracle.head_logits(y, head)).mean()

    assert value.item() == pytest.approx(exact(), rel=1e-5)
    for values, gradient in ((w, gradients[0]), (b, gradients[1])):
        for _ in range(5):
            index = tuple(rng.integers(0, D, values.ndim))
            assert gradient[index].item() == pytest.approx(oracle.central_difference(exact, values, index), rel=1e-3, abs=1e-6)


def test_training_without_the_graph_is_the_same_as_with_it(rng, each_backend, problem):
    # The way of training: take the gradient of the KL from lens_kl, then go back through the norm and the translator only.
    _, n_model, head = problem
    norm = Norm(lambda h: mx.fast.rms_norm(h, None, 1e-5), "rms", None, None, 1e-5)
    h, target = oracle.random_array(rng, L, N, D), lens_target(n_model, head)
    weight, bias = mx.eye(D), oracle.random_array(rng, D, scale=0.1)
    expected = mx.grad(lens_loss(h, target, head, norm), argnums=(0, 1))(weight, bias)
    _, dn = lens_kl(translate_norm(h, weight, bias, norm), target, head)
    _, ours = mx.vjp(lambda w, b: translate_norm(h, w, b, norm), [weight, bias], [dn / (L * N)])
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b)


# ---------------------------------------------------------------------- vmap, compile


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmap_over_the_rows(rng, native, problem, axis):
    _, n_model, head = problem
    target, n = lens_target(n_model, head), n_model + oracle.random_array(rng, 4, L, N, D, scale=0.3)
    ours = mx.vmap(lambda n: lens_kl(n, target, head), in_axes=axis)(mx.moveaxis(n, 0, axis))
    for i in range(4):
        for a, b in zip(ours, lens_kl(n[i], target, head), strict=True):
            assert_close(a[i], b)


def test_vmap_of_a_gradient(rng, native, problem):
    _, n_model, head = problem
    target, n = lens_target(n_model, head), n_model + oracle.random_array(rng, 4, L, N, D, scale=0.3)
    ours = mx.vmap(mx.grad(lambda n: mx.sum(kl_of(head, target)(n))))(n)
    assert_close(ours, mx.stack([lens_kl(rows, target, head)[1] for rows in n]))


def test_vmap_over_the_model_is_refused(native, problem):
    n, n_model, head = problem
    with pytest.raises(ValueError, match="vmap"):
        mx.eval(mx.vmap(lambda m: lens_kl(n, lens_target(m, head), head)[0])(mx.stack([n_model, n_model])))


def test_compiled_is_the_same_as_eager(rng, cpu_backend, problem):
    _, n_model, head = problem

    def function(n, n_model):
        target = lens_target(n_model, head)
        kl, gradient = lens_kl(n, target, head)
        return kl * 2, gradient + 1, target.lse, target.entropy

    compiled = mx.compile(function)
    for tokens in (N, 2, N):  # another shape, then the first one from the cache
        n = n_model[:tokens] + oracle.random_array(rng, L, tokens, D, scale=0.3)
        for ours, eager in zip(compiled(n, n_model[:tokens]), function(n, n_model[:tokens]), strict=True):
            assert_close(ours, eager)


def test_compiled_gradient(cpu_backend, problem):
    n, n_model, head = problem
    target = lens_target(n_model, head)
    slope = mx.compile(mx.grad(lambda n: mx.sum(kl_of(head, target)(n))))(n)
    assert_close(slope, lens_kl(n, target, head)[1])


def test_compile_does_not_merge_heads_that_differ(rng, cpu_backend):
    # The same arrays with another scale, softcap or number of used rows.
    head, n_model = oracle.make_head(rng, V, D), oracle.random_array(rng, N, D)
    n = n_model + oracle.random_array(rng, L, N, D, scale=0.3)
    heads = [type(head)(head.weight, **settings) for settings in ({}, {"scale": 2.0}, {"softcap": 3.0}, {"softcap": 4.0}, {"used_rows": 100})]

    def function(n, n_model):
        return [-lens_kl(n, lens_target(n_model, head), head)[0] for head in heads]

    for ours, head in zip(mx.compile(function)(n, n_model), heads, strict=True):
        np.testing.assert_allclose(-oracle.wide(ours), oracle.lens_kl(n, n_model, head)[0], atol=1e-5)


# ---------------------------------------------------------------------- evaluation


def test_nothing_is_evaluated_at_the_call(cpu_backend, problem, monkeypatch):
    n, n_model, head = problem
    evaluated = []
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, lambda *args: evaluated.append(args))
    # Inside a transformation arrays are tracers, which can't be evaluated at all.
    seen = []

    def traced(n):
        kl, gradient = lens_kl(n, lens_target(n_model, head), head)
        seen.append((kl.shape, gradient.shape))
        return kl

    mx.compile(traced)(n)
    assert seen == [((L, N), (L, N, D))]
    assert not evaluated


VIEWS = {
    "transposed": lambda a: mx.contiguous(mx.swapaxes(a, -1, -2)).swapaxes(-1, -2),
    "every second column": lambda a: mx.repeat(a, 2, axis=-1)[..., ::2],
    "every third row": lambda a: mx.repeat(a, 3, axis=-2)[..., ::3, :],
    "a slice in the middle": lambda a: mx.pad(a, [(0, 0)] * (a.ndim - 2) + [(2, 3), (1, 4)])[..., 2:-3, 1:-4],
    "reversed": lambda a: mx.contiguous(a[..., ::-1])[..., ::-1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_that_are_not_contiguous(each_backend, problem, view):
    n, n_model, head = problem
    expected = lens_kl(n, lens_target(n_model, head), head)
    for ours, straight in zip(lens_kl(view(n), lens_target(view(n_model), head), head), expected, strict=True):
        assert_close(ours, straight)


def test_broadcast_rows(each_backend, problem):
    n, n_model, head = problem
    target = lens_target(mx.broadcast_to(n_model[:1], (N, D)), head)
    kl, gradient = lens_kl(mx.broadcast_to(n[:1, :1], (L, N, D)), target, head)
    one = lens_kl(n[:1, :1], lens_target(n_model[:1], head), head)
    assert_close(kl, mx.broadcast_to(one[0], (L, N)))
    assert_close(gradient, mx.broadcast_to(one[1], (L, N, D)))


def test_two_streams(each_backend, problem):
    n, n_model, head = problem
    expected = lens_kl(n, lens_target(n_model, head), head)
    streams = [mx.new_stream(mx.cpu) for _ in range(2)]
    for _ in range(5):
        with mx.stream(streams[0]):
            target = lens_target(n_model + 0, head)
        with mx.stream(streams[1]):
            results = lens_kl(n + 0, target, head)
        for ours, straight in zip(results, expected, strict=True):
            assert_close(ours + 0, straight)  # read on a third stream


def test_inputs_may_be_forgotten_before_evaluation(rng, each_backend):
    kept, results = [], []
    for i in range(20):
        head, n_model = oracle.make_head(rng, 67, 32, bias=i % 2 == 0), oracle.random_array(rng, 2, 32)
        n = n_model + oracle.random_array(rng, 2, 2, 32, scale=0.3)
        kept.append(oracle.lens_kl(n, n_model, head)[0])
        results.append(lens_kl(n + 0, lens_target(n_model + 0, head), head)[0])
    del n, n_model, head
    mx.async_eval(results)
    for ours, expected in zip(results, kept, strict=True):
        np.testing.assert_allclose(oracle.wide(ours), expected, atol=1e-5)
