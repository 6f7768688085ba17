import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest

from metalens import _ext, _extension, use_backend
from metalens.ops import backend, linear
from metalens.ops.backends import metal, native
from support import oracle


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("METALENS_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of the extension's product."""
    counted = []

    def spy(*args, kept=_ext.quantized_matmul, **kwargs):
        counted.append(args)
        return kept(*args, **kwargs)

    monkeypatch.setattr(_ext, "quantized_matmul", spy)
    return counted


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_extension, "find", lambda: (None, "it fell off"))
    _extension._warn_once.cache_clear()
    yield
    _extension._warn_once.cache_clear()


def test_auto_is_the_default():
    assert backend() == "auto"


@pytest.mark.parametrize(
    ("value", "expected"), [("", "auto"), ("auto", "auto"), ("reference", "reference"), ("native", "native"), ("metal", "metal")]
)
def test_the_variable(monkeypatch, value, expected):
    monkeypatch.setenv("METALENS_BACKEND", value)
    assert backend() == expected


@pytest.mark.parametrize("value", ["cuda", "Native", " native", "0"])
def test_a_wrong_variable_is_named_with_the_choices(rng, monkeypatch, value):
    monkeypatch.setenv("METALENS_BACKEND", value)
    with pytest.raises(ValueError, match=rf"METALENS_BACKEND='{value}' is not a valid backend. Choose one of auto, reference, native, metal\."):
        linear(oracle.random_array(rng, 1, 128), oracle.random_weight(rng, 5, 128))


@pytest.mark.parametrize("value", ["cuda", "", None])
def test_use_backend_refuses_other_names(value):
    message = rf"use_backend\(\) got {value!r}, which is not a valid backend. Choose one of auto, reference, native, metal\."
    with pytest.raises(ValueError, match=message), use_backend(value):
        pass
    assert backend() == "auto"


def test_use_backend_goes_before_the_variable_and_nests(monkeypatch):
    monkeypatch.setenv("METALENS_BACKEND", "reference")
    with use_backend("native"):
        assert backend() == "native"
        with use_backend("auto"):
            assert backend() == "auto"
        assert backend() == "native"
    assert backend() == "reference"


def test_use_backend_ends_with_an_exception_too():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend() == "auto"


def test_use_backend_is_this_thread_s_own():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_native_and_auto_call_the_extension_and_reference_does_not(rng, calls):
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    for name, expected in (("native", 1), ("auto", 2), ("reference", 2)):
        with use_backend(name):
            oracle.assert_product(linear(x, w), x, w)
        assert len(calls) == expected


def test_reference_does_not_even_look_for_the_extension(rng, monkeypatch):
    def refuse():
        raise AssertionError("looked for the extension")

    monkeypatch.setattr(_extension, "find", refuse)
    monkeypatch.setattr(_extension, "load", refuse)
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with use_backend("reference"):
        assert native() is None
        y = linear(x, w)
    assert mx.array_equal(y, mx.quantized_matmul(x, w.values, w.scales, w.biases, True, 32, 4))


def test_the_choice_is_made_at_the_call(rng, calls):
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with use_backend("native"):
        y = linear(x, w)
    with use_backend("reference"):
        mx.eval(y)
    assert len(calls) == 1


def test_native_without_the_extension_says_why(no_extension):
    with use_backend("native"), pytest.raises(RuntimeError, match="it fell off"):
        native()


def test_auto_without_the_extension_is_the_reference(rng, no_extension):
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="it fell off"):
        y = linear(x, w)
    assert mx.array_equal(y, mx.quantized_matmul(x, w.values, w.scales, w.biases, True, 32, 4))


def test_auto_on_a_gpu_is_the_reference(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    with use_backend("auto"):
        assert native() is None
    with use_backend("native"):
        assert native() is _ext


def test_the_fixture_that_runs_tests_several_times_does(each_backend):
    assert backend() == each_backend.removesuffix("-emulated")
    assert (native() is None) == (each_backend != "native")
    assert metal() == (each_backend == "metal-emulated")
