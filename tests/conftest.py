import os
import subprocess
import sys
from pathlib import Path

# The oracle's float64 products are small: on busy cores, OpenBLAS's threads wait for each other ten times longer than they compute.
# NumPy reads the variable when it is loaded; the processes that the tests start inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import settings
from mlx.utils import tree_map
from mlx_lm.models import llama

from metalens import InterpretableModel, use_backend
from support.metal_emulation import emulated, needs_clang

# Examples are reproducible, and have no time limit: a busy machine is not a failure.
settings.register_profile("metalens", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("metalens")


@pytest.fixture(scope="session", autouse=True)
def _cpu():
    """Run the tests on the CPU, also where MLX would choose a GPU: they check the CPU kernels and their reference."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["native", "reference", pytest.param("metal-emulated", marks=needs_clang)])
def each_backend(request):
    """Run the test once with the extension's kernels, once in plain MLX, and once with the Metal kernels in emulation."""
    with emulated() if request.param == "metal-emulated" else use_backend(request.param):
        yield request.param


@pytest.fixture(params=["native", "reference"])
def cpu_backend(request):
    """Run the test on the two CPU backends, for operations without a Metal kernel and for tests of laziness.

    The emulation computes at the call, where the other backends are lazy. tests/ops/metal/test_launch.py tests launches under mx.compile.
    """
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def native():
    """Run the test with the extension's kernels."""
    with use_backend("native"):
        yield


@pytest.fixture(scope="session")
def make_llama():
    """Return a function that builds a tiny Llama with random weights, the same for the same arguments."""

    def make(*, tied=False, bits=4, group_size=32, mode="affine", dtype=mx.float32, layers=3, hidden=64, vocab=131, context=None, seed=0):
        args = llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=2 * hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=vocab,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
        )
        mx.random.seed(seed)
        model = llama.Model(args)
        # Weights are larger than usual initial values and norms are uneven, so that layers differ and a missing norm changes the result.
        model.update(tree_map(lambda p: p * 2 if p.ndim == 2 else 1 + 0.3 * mx.random.normal(p.shape), model.parameters()))
        model.set_dtype(dtype)
        if bits is not None:
            nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
        model.eval()
        mx.eval(model.parameters())
        return model

    return make


@pytest.fixture(params=["tied", "untied"])
def quantized_model(request, make_llama):
    """Return a 4-bit Llama with 3 layers, hidden size 64 and 131 tokens."""
    return InterpretableModel(make_llama(tied=request.param == "tied"))


@pytest.fixture
def tiny(make_llama):
    """Return an untied 4-bit Llama with 3 layers, hidden size 64 and 131 tokens, whose norm and head have been found already."""
    model = InterpretableModel(make_llama())
    _ = model.unembed
    return model


@pytest.fixture
def run_python(tmp_path):
    """Return a function that runs a script in a process of its own and returns its output; the script can import `support`."""

    def run(script, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("METALENS_")}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])), **variables}
        done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
