"""The table operation x backend: what it lists, what it selects, and the fallbacks that docs/developer/adding-an-operation.md states."""

import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from metalens import _extension, use_backend
from metalens.ops import Head, Norm, Weight, dispatch, kl, lens_target, stats
from metalens.ops.metal import kernel, speed

BACKENDS = {
    "linear": {"reference", "native"},
    "gram": {"reference", "native"},
    "muon_direction": {"reference", "native"},
    "swiglu": {"reference", "native"},
    "gelu_approx": {"reference", "native"},
    "rms_norm": {"reference", "native"},
    "layer_norm": {"reference", "native"},
    "rope": {"reference", "native"},
    "attention": {"reference", "native"},
    "normed": {"reference", "native"},
    "translate_norm": {"reference", "native", "metal"},
    "lens_stats": {"reference", "native", "metal"},
    "lens_target": {"reference", "native", "metal"},
    "lens_kl": {"reference", "native", "metal"},
    "lens_ce": {"reference", "native"},
    "lens_compare": {"reference", "native", "metal"},
}

ROWS, HALF, INTEGERS = mx.ones((3, 64)), mx.ones((3, 64), dtype=mx.float16), mx.ones((3, 64), dtype=mx.int32)
DENSE = Weight(mx.ones((5, 64)))
QUANTIZED = Weight(*mx.quantize(mx.ones((5, 64)), 32, 4), 32, 4)
TWO_TYPES = Weight(QUANTIZED.values, QUANTIZED.scales, QUANTIZED.biases.astype(mx.float16), 32, 4)
SEVEN_BITS = Weight(QUANTIZED.values, QUANTIZED.scales, QUANTIZED.biases, 32, 7)
WIDE = Head(Weight(mx.ones((40, 64))))
Q = mx.ones((1, 2, 3, 4))
RMS, OTHER = Norm(lambda h: h, "rms", None, None, 1e-5), Norm(lambda h: h)
EYE, ZERO = mx.eye(64), mx.zeros(64)
with use_backend("reference"):
    TARGET = lens_target(ROWS, Head(DENSE))

# {operation: arguments that every backend supports}
SUPPORTED = {
    "linear": [(ROWS, DENSE, True, None), (HALF, QUANTIZED, True, mx.float32)],
    "gram": [(ROWS,), (HALF[None],)],
    "muon_direction": [(ROWS, ROWS, 0.9, [(1.5, -0.5, 0.0)], 1.0, None, None)],
    "swiglu": [(ROWS, ROWS), (HALF, HALF)],
    "gelu_approx": [(ROWS,), (HALF,)],
    "rms_norm": [(ROWS, ROWS[0], 1e-5), (HALF, None, 1e-5), (HALF, ROWS[0], 1e-5)],
    "layer_norm": [(ROWS, ROWS[0], None, 1e-5), (HALF, None, None, 1e-5), (HALF, HALF[0], HALF[0], 1e-5)],
    "rope": [(Q, 4, False, 1e4, 1.0, 0, None), (Q, 2, True, None, 1.0, 3, mx.ones(1))],
    "attention": [
        (Q, Q, Q, 1.0, None, None),
        (Q, Q, Q, 1.0, "causal", mx.zeros(2)),
        (Q, Q, Q, 1.0, mx.ones((2, 3, 3)), None),
        (Q, Q, Q, 1.0, mx.ones(3) > 0, None),
    ],
    "normed": [(ROWS, RMS)],
    "translate_norm": [(ROWS, EYE, ZERO, RMS)],
    "lens_stats": [
        (ROWS[None], Head(DENSE), 2, ROWS, None),
        (ROWS[None], Head(QUANTIZED), 1, None, mx.arange(3)),
        (ROWS[None], Head(DENSE), 1, ROWS, mx.zeros((3, 2), mx.int32), True),
    ],
    "lens_compare": [(ROWS[None], ROWS[None], Head(DENSE), None), (ROWS[None], ROWS[None], Head(DENSE), Head(QUANTIZED))],
    "lens_target": [(ROWS, Head(QUANTIZED))],
    "lens_kl": [(ROWS[None], TARGET, Head(DENSE))],
    "lens_ce": [(ROWS[None], mx.arange(3), Head(DENSE)), (ROWS[None], mx.arange(3), Head(QUANTIZED))],
}

# Fallbacks to the reference: (operation, backend, arguments, the reason)
UNSUPPORTED = [
    ("linear", "native", (INTEGERS, DENSE, True, None), "read no x of .*int32"),
    ("linear", "native", (ROWS, Weight(mx.ones((5, 64), dtype=mx.int32)), True, None), "read no dense weights .*int32"),
    ("linear", "native", (ROWS, Weight(mx.ones((2, 5, 64))), True, None), "read no dense weights"),
    ("linear", "native", (ROWS, TWO_TYPES, True, None), "one float type"),
    ("linear", "native", (ROWS, SEVEN_BITS, True, None), "no affine weights of 7 bits in groups of 32"),
    ("linear", "native", (ROWS, Weight(QUANTIZED.values, QUANTIZED.scales, None, 32, 4, "int4"), True, None), "no int4 weights"),
    ("gram", "native", (ROWS[0],), "not a matrix"),
    ("gram", "native", (INTEGERS,), "read no x of .*int32"),
    ("muon_direction", "native", (HALF, ROWS, 0.9, [(1.5, -0.5, 0.0)], 1.0, None, None), "read float32"),
    ("swiglu", "native", (ROWS, ROWS[:1]), "different shapes"),
    ("swiglu", "native", (ROWS, HALF), "one float type"),
    ("swiglu", "native", (INTEGERS, INTEGERS), "one float type"),
    ("gelu_approx", "native", (INTEGERS,), "read no x of"),
    ("rms_norm", "native", (ROWS, ROWS[0, :1], 1e-5), "not of the width"),
    ("rms_norm", "native", (ROWS[:, :0], None, 1e-5), "no elements along the last axis"),
    ("rms_norm", "native", (INTEGERS, None, 1e-5), "read no .*int32"),
    ("layer_norm", "native", (ROWS, ROWS[0], ROWS[:2, 0], 1e-5), "not of the width"),
    ("rope", "native", (Q, 4, False, 1e4, 1.0, mx.array(1), None), "no array of offsets"),
    ("rope", "native", (Q, 3, False, 1e4, 1.0, 0, None), "do not know this rotation"),
    ("rope", "native", (Q, 4, False, None, 1.0, 0, None), "do not know this rotation"),
    ("rope", "native", (Q, 4, False, None, 1.0, 0, mx.ones(3)), "read no freqs"),
    ("rope", "native", (Q.astype(mx.int32), 4, False, 1e4, 1.0, 0, None), "read no x of"),
    ("attention", "native", (Q, Q, Q, 1.0, None, mx.zeros(2, dtype=mx.int32)), "read no sinks"),
    ("attention", "native", (Q, Q.astype(mx.complex64), Q, 1.0, None, None), "read no q, k, v"),
    ("attention", "native", (Q, Q, Q, 1.0, mx.ones((3, 3), dtype=mx.int32), None), "read no mask of"),
    ("attention", "native", (Q, Q, Q, 1.0, "window", None), "no mask 'window'"),
    ("normed", "native", (ROWS, OTHER), "do not know this norm"),
    ("translate_norm", "native", (ROWS, EYE, ZERO, OTHER), "do not know this norm"),
    ("translate_norm", "native", (ROWS, EYE.astype(mx.complex64), ZERO, RMS), "translators"),
    ("translate_norm", "native", (ROWS, None, ZERO.astype(mx.int32), RMS), "translators"),
    ("translate_norm", "metal", (ROWS, EYE, ZERO, OTHER), "do not know this norm"),
    ("translate_norm", "metal", (ROWS, None, ZERO, RMS), "without a matrix"),
    ("translate_norm", "metal", (ROWS[:0], EYE, ZERO, RMS), "no rows"),
    ("translate_norm", "metal", (ROWS, EYE, ZERO.astype(mx.int32), RMS), "translators"),
    ("lens_stats", "native", (ROWS[None], Head(TWO_TYPES), 1, None, None), "one float type"),
    ("lens_stats", "metal", (ROWS[None], Head(TWO_TYPES), 1, None, None), "one float type"),
    ("lens_stats", "metal", (ROWS[None], WIDE, 33, None, None), "at most 32 tokens"),
    ("lens_compare", "native", (ROWS[None], ROWS[None], Head(TWO_TYPES), None), "one float type"),
    ("lens_compare", "native", (ROWS[None], ROWS[None], Head(DENSE), Head(TWO_TYPES)), "one float type"),
    ("lens_compare", "metal", (ROWS[None], ROWS[None], Head(TWO_TYPES), None), "one float type"),
    ("lens_compare", "metal", (ROWS[None], ROWS[None], Head(DENSE), Head(TWO_TYPES)), "one float type"),
    ("lens_target", "native", (ROWS, Head(TWO_TYPES)), "one float type"),
    ("lens_target", "metal", (ROWS, Head(TWO_TYPES)), "one float type"),
    ("lens_target", "metal", (ROWS[:0], Head(DENSE)), "no rows"),
    ("lens_ce", "native", (ROWS[None], mx.arange(3), Head(TWO_TYPES)), "one float type"),
    ("lens_ce", "native", (ROWS[None], mx.arange(3), Head(DENSE, softcap=30.0)), "softcap"),
    ("lens_kl", "native", (ROWS[None], TARGET, Head(TWO_TYPES)), "one float type"),
    ("lens_kl", "metal", (ROWS[None], TARGET, Head(TWO_TYPES)), "one float type"),
]


@pytest.fixture
def gpu():
    """Let the Metal backend count as available. Nothing may be launched."""

    def refuse(**_):
        raise AssertionError("launched a kernel")

    with kernel.emulation(refuse):
        yield


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_extension, "find", lambda: (None, "it fell off"))
    _extension._warn_once.cache_clear()
    yield
    _extension._warn_once.cache_clear()


@pytest.fixture
def default_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))


CALLS = [(name, arguments) for name, several in SUPPORTED.items() for arguments in several]


def select(name, arguments):
    found, reason = dispatch.operations()[name].select(*arguments)
    assert found in dispatch.implementations()
    return found.backend, reason


def test_the_table():
    listed = {}
    for entry in dispatch.implementations():
        assert callable(entry.call)
        assert callable(entry.why_not)
        listed.setdefault(entry.operation, []).append(entry.backend)
    assert {name: set(backends) for name, backends in listed.items()} == BACKENDS
    assert all(backends[0] == "reference" and len(set(backends)) == len(backends) for backends in listed.values())
    assert set(dispatch.operations()) == set(BACKENDS) == set(SUPPORTED)


def test_every_operation_has_a_reference_that_supports_everything():
    for name, operation in dispatch.operations().items():
        assert operation.reference.backend == "reference"
        for arguments in [*SUPPORTED[name], *(a for other, _, a, _ in UNSUPPORTED if other == name)]:
            assert operation.reference.why_not(*arguments) == ""


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
@pytest.mark.parametrize("backend", ["reference", "native", "metal"])
def test_a_forced_backend_runs_what_it_has(gpu, backend, name, arguments):
    with use_backend(backend):
        found, reason = select(name, arguments)
    if backend in BACKENDS[name]:
        assert (found, reason) == (backend, "")
    else:
        assert (found, reason) == ("reference", f"{name} has no {backend} kernel")


@pytest.mark.parametrize(("name", "backend", "arguments", "reason"), UNSUPPORTED, ids=[f"{u[0]} {u[1]} {u[3]}" for u in UNSUPPORTED])
def test_a_forced_backend_falls_back_where_it_says_so(gpu, name, backend, arguments, reason):
    with use_backend(backend):
        found, why = select(name, arguments)
    assert found == "reference"
    assert re.search(reason, why)


def test_auto_follows_the_default_device(gpu, monkeypatch):
    for operation in (stats, kl):  # kernels are as fast
        monkeypatch.setattr(operation, "plain_stats_are_faster", lambda *_: False)
    with use_backend("auto"):
        assert {select(name, arguments)[0] for name, arguments in CALLS} == {"native"}
        monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
        for name, arguments in CALLS:
            assert select(name, arguments)[0] == ("metal" if "metal" in BACKENDS[name] else "reference")


def test_auto_asks_the_model_of_speed(gpu, default_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(stats, "plain_stats_are_faster", lambda *a: asked.append(a) or True)
    monkeypatch.setattr(kl, "plain_stats_are_faster", lambda *a: asked.append(a) or True)
    labels = mx.zeros((3, 2), mx.int32)
    calls = [("lens_stats", (ROWS[None], Head(QUANTIZED), 2, ROWS, labels, True)), ("lens_target", (ROWS, Head(QUANTIZED)))]
    with use_backend("auto"):
        assert {select(*call) for call in calls} == {("reference", speed.PLAIN_IS_FASTER)}
    matrix = speed.Matrix.of(QUANTIZED)
    assert asked == [(speed.Asked(1, 3, True, 2, 2, True), matrix), (speed.Asked(1, 3, with_model=False), matrix)]
    with use_backend("metal"):  # what is named is not questioned
        assert {select(*call)[0] for call in calls} == {"metal"}


def test_auto_on_a_gpu_without_metal_is_the_reference(default_gpu):
    with use_backend("auto"):
        assert {select(name, arguments)[0] for name, arguments in CALLS} == {"reference"}


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_backends_that_are_not_there(no_extension, name, arguments):
    with use_backend("native"), pytest.raises(RuntimeError, match="it fell off"):
        select(name, arguments)
    with use_backend("metal"):
        if "metal" in BACKENDS[name]:
            with pytest.raises(RuntimeError, match="no Metal GPU"):
                select(name, arguments)
        else:  # plain MLX needs no GPU
            assert select(name, arguments)[0] == "reference"
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="it fell off"):
        assert select(name, arguments) == ("reference", "it fell off")


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_implementations_take_the_same_arguments_and_return_the_same(name, arguments):
    def computed(implementation):
        found = implementation.call(*arguments)
        return [found] if isinstance(found, mx.array) else [a for a in found if a is not None]

    operation = dispatch.operations()[name]
    plain, ours = computed(operation.reference), computed(operation.kernels["native"])
    for a, b in zip(plain, ours, strict=False):  # the native target has one more result, the mean
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert mx.allclose(a.astype(mx.float32), b.astype(mx.float32), rtol=1e-2, atol=1e-4)


def test_the_developer_guide_has_the_same_table():
    guide = Path(__file__).parents[2] / "docs" / "developer" / "adding-an-operation.md"
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", guide.read_text(), re.MULTILINE)
    stated = {name: {"reference"} | {b for b, text in (("native", native), ("metal", metal)) if text.strip() != "-"} for name, native, metal in rows}
    assert stated == BACKENDS


def test_the_developer_guide_names_files_that_exist():
    root = Path(__file__).parents[2]
    guide = (root / "docs" / "developer" / "adding-an-operation.md").read_text()
    paths = [p for p in re.findall(r"`((?:python|csrc|metal|tests|benchmarks|docs)/[\w./<>-]*)`", guide) if "<" not in p]
    assert len(paths) > 25
    assert [p for p in paths if not (root / p).exists()] == []
