"""lens_stats on views, in compiled functions, under vmap and on streams; and its laziness."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, lens_stats
from support import oracle

V, D, L, N, K = 131, 64, 3, 5, 4


@pytest.fixture
def problem(rng):
    """Make (n, head, n_model, labels)."""
    head = oracle.make_head(rng, V, D, bias=True, scale=1.5)
    return oracle.random_array(rng, L, N, D), head, oracle.random_array(rng, N, D), mx.array(rng.integers(0, V, N))


def values(n, head, n_model, labels):
    return list(oracle.present(lens_stats(n, head, K, n_model, labels)).values())


def assert_same(ours, theirs):
    """Compare results of the same float32 operations in another order."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(oracle.wide(a), oracle.wide(b), atol=1e-5)


VIEWS = {
    "transposed": lambda a: mx.contiguous(mx.swapaxes(a, -1, -2)).swapaxes(-1, -2),
    "tokens first": lambda a: mx.contiguous(mx.swapaxes(a, 0, -2)).swapaxes(0, -2),
    "every second column": lambda a: mx.repeat(a, 2, axis=-1)[..., ::2],
    "every third row": lambda a: mx.repeat(a, 3, axis=-2)[..., ::3, :],
    "a slice in the middle": lambda a: mx.pad(a, [(0, 0)] * (a.ndim - 2) + [(2, 3), (1, 4)])[..., 2:-3, 1:-4],
    "reversed": lambda a: mx.contiguous(a[..., ::-1])[..., ::-1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_that_are_not_contiguous(each_backend, problem, view):
    n, head, n_model, labels = problem
    assert_same(values(view(n), head, view(n_model), mx.repeat(labels, 2)[::2]), values(n, head, n_model, labels))


def test_broadcast_rows_and_labels(each_backend, problem):
    n, head, n_model, labels = problem
    ours = values(mx.broadcast_to(n[:1, :1], (L, N, D)), head, mx.broadcast_to(n_model[:1], (N, D)), mx.broadcast_to(labels[:1], (N,)))
    one = values(n[:1, :1], head, n_model[:1], labels[:1])
    assert_same(ours, [mx.broadcast_to(a, (L, N, *a.shape[2:])) for a in one])


def test_a_bias_and_a_weight_that_are_views(rng, each_backend, problem):
    n, head, n_model, labels = problem
    w = head.weight
    twice = [mx.repeat(a, 2, axis=0)[::2] for a in (w.values, w.scales, w.biases, head.bias)]
    view = Head(type(w)(*twice[:3], w.group_size, w.bits), twice[3], head.scale)
    assert_same(values(n, view, n_model, labels), values(n, head, n_model, labels))


def test_compiled_is_the_same_as_eager(cpu_backend, problem):
    n, head, n_model, labels = problem

    def function(n, n_model, labels):
        return values(n * 2, head, n_model, labels)

    compiled = mx.compile(function)
    for tokens in (N, 2, N):  # another shape, then the first one from the cache
        arguments = n[:, :tokens], n_model[:tokens], labels[:tokens]
        assert_same(compiled(*arguments), function(*arguments))


def test_compile_does_not_merge_what_differs(cpu_backend, problem):
    n, head, n_model, labels = problem

    def function(n, n_model, labels):
        a, b = lens_stats(n, head, 2, n_model), lens_stats(n, head, 3, n_model)
        c, d = lens_stats(n, head, 2, labels=labels), lens_stats(n, Head(head.weight), 2)
        return [-a.lse, -b.lse, -c.lse, -d.lse, -a.top_logits, -b.top_logits, -d.top_logits, -a.kl, -c.nll]

    assert_same(mx.compile(function)(n, n_model, labels), function(n, n_model, labels))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmap_over_the_rows(rng, native, problem, axis):
    _, head, n_model, labels = problem
    n = oracle.random_array(rng, 4, L, N, D)
    ours = mx.vmap(lambda n: tuple(values(n, head, n_model, labels)), in_axes=axis)(mx.moveaxis(n, 0, axis))
    assert_same(ours, [mx.stack(parts) for parts in zip(*(values(rows, head, n_model, labels) for rows in n), strict=True)])


def test_vmap_over_anything_else_is_refused(native, problem):
    n, head, n_model, labels = problem
    with pytest.raises(ValueError, match="vmap is supported over n alone"):
        mx.eval(mx.vmap(lambda m: lens_stats(n, head, K, m).kl)(mx.stack([n_model, n_model])))
    with pytest.raises(ValueError, match="vmap is supported over n alone"):
        mx.eval(mx.vmap(lambda ids: lens_stats(n, head, K, labels=ids).nll)(mx.stack([labels, labels])))


def test_two_streams(each_backend, problem):
    expected = values(*problem)
    n, head, n_model, labels = problem
    streams = [mx.new_stream(mx.cpu) for _ in range(2)]
    results = []
    for i in range(10):
        with mx.stream(streams[i % 2]):
            results.append(values(n + 0, head, n_model + 0, labels + 0))
    for result in results:
        assert_same([a + 0 if a.dtype != mx.bool_ else a for a in result], expected)  # read on a third stream


def test_nothing_is_evaluated_at_the_call(cpu_backend, problem, monkeypatch):
    n, head, n_model, labels = problem
    evaluated, seen = [], []
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, lambda *args: evaluated.append(args))

    def traced(n):  # inside a transformation, arrays can't be evaluated at all
        seen.append([a.shape for a in values(n, head, n_model, labels)])
        return n

    mx.compile(traced)(n)
    assert seen == [[(L, N)] * 3 + [(L, N, K)] * 2 + [(L, N)] * 4]
    assert not evaluated


def test_inputs_may_be_forgotten_before_evaluation(rng, each_backend):
    kept, results = [], []
    for i in range(20):
        head, n = oracle.make_head(rng, 67, 32, bias=i % 2 == 0), oracle.random_array(rng, 2, 2, 32)
        kept.append(oracle.entropy(oracle.head_logits(oracle.wide(n), head)))
        results.append(lens_stats(n + 0, head).entropy)
    del n, head
    mx.async_eval(results)
    for ours, expected in zip(results, kept, strict=True):
        np.testing.assert_allclose(oracle.wide(ours), expected, atol=1e-5)
